"""Builds dlkernels: the Python package, and `dlkernels._C` when a C++17 compiler is found.

    pip install --no-build-isolation .        # the usual way: the build sees the torch that it is for

Environment:
    DLKERNELS_CPP=auto|0|1     compiled part: when possible (default), never, or an error when impossible
    DLKERNELS_CUDA=auto|0|1    CUDA part: when torch has CUDA and nvcc is found (default), never, or an error
    TORCH_CUDA_ARCH_LIST       architectures of the CUDA part, as torch reads it; no GPU is looked for
    MAX_JOBS                   compilers at a time
    DLKERNELS_KERNEL_CACHE     a folder: objects of the kernels are kept there and taken from there. They hold nothing
                               of torch or Python, so that builds for several of these share them
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
CXX_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]
DEFAULT_CUDA_ARCHS = "7.5;8.0;9.0;10.0+PTX"

# Files named *_kernel.cpp hold loops on raw pointers and are compiled once per instruction set.
INSTRUCTION_SETS = {"DEFAULT": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "AVX2": ["-mavx2", "-mfma", "-mf16c"],
        "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    }

TORCH_MISSING = """
dlkernels is built against the torch that it will run with, and no torch is visible to this build.
  torch is not installed:       pip install torch setuptools
  build isolation hides it:     pip install --no-build-isolation .
"""


def switch(name: str) -> str:
    value = os.environ.get(name, "auto").lower()
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"`{name}` must be auto, 0 or 1, got {value!r}")
    return value


def cxx() -> str:
    return os.environ.get("CXX", "c++")


def compiler_problem() -> str:
    """Empty when a small C++17 program with Python's headers compiles, else one line."""
    command = cxx().split()
    if shutil.which(command[0]) is None:
        return f"no C++ compiler: {command[0]!r} is not on PATH (set CXX)"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "try.cpp")
        source.write_text("#include <optional>\nint main() { return std::optional<int>(0).value(); }\n")
        done = subprocess.run(
            [*command, "-std=c++17", str(source), "-o", str(Path(folder, "try"))], capture_output=True, text=True
        )
    return "" if done.returncode == 0 else f"{cxx()} does not compile C++17: {done.stderr.strip().splitlines()[-1:]}"


def cuda_problem() -> str:
    """Empty when the CUDA part can be built, else one line."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if CUDA_HOME is None or not Path(CUDA_HOME, "bin", "nvcc").exists():
        return "nvcc was not found (set CUDA_HOME)"
    return ""


def find_cuda_home() -> None:
    """Set CUDA_HOME to the toolkit that nvcc itself names: the nvcc on PATH may be a wrapper in another folder."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    with tempfile.NamedTemporaryFile(suffix=".cu") as empty:
        said = subprocess.run([nvcc, "--dryrun", "-c", empty.name], capture_output=True, text=True, cwd="/").stderr
    for line in said.splitlines():
        if line.startswith("#$ TOP=") and Path(line[7:], "bin", "nvcc").exists():
            os.environ["CUDA_HOME"] = str(Path(line[7:]).resolve())


def wanted(name: str, problem: str, consequence: str) -> bool:
    """Whether to build a part; warns or stops, in one line, when it is impossible."""
    choice = switch(name)
    if choice == "0" or not problem:
        return choice != "0"
    if choice == "1":
        raise SystemExit(f"{name}=1, but {problem}")
    warnings.warn(f"{problem}: {consequence}", stacklevel=2)
    return False


def build_options() -> dict:
    """ext_modules and cmdclass; torch is imported only where something is compiled."""
    if not {"build_ext", "build", "bdist_wheel", "install", "develop", "editable_wheel"} & set(sys.argv):
        return {}  # sdist, egg_info, --version: nothing to compile
    find_cuda_home()
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        raise SystemExit(TORCH_MISSING) from None
    if not wanted("DLKERNELS_CPP", compiler_problem(), "dlkernels is installed without its compiled part"):
        return {}
    cpu_torch = torch.version.cuda is None and switch("DLKERNELS_CUDA") == "auto"  # nothing to warn of
    cuda = not cpu_torch and wanted("DLKERNELS_CUDA", cuda_problem(), "building for CPU only")

    folders = ["csrc", "csrc/cpu", "csrc/common", *(["csrc/cuda"] if cuda else [])]
    sources = sorted(p for folder in folders for p in (ROOT / folder).glob("*.cpp"))
    kernels = [p for p in sources if p.stem.endswith("_kernel")]
    cuda_kernels = sorted((ROOT / "csrc" / "cuda").glob("*_kernel.cu")) if cuda else []
    macros = []
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
        arch_flags = cpp_extension._get_cuda_arch_flags()
        archs = architectures(arch_flags)
        macros = [("DLKERNELS_WITH_CUDA", None), ("DLKERNELS_CUDA_ARCHS", f'"{archs}"')]
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    extension = make(
        "dlkernels._C",
        [str(p.relative_to(ROOT)) for p in sources if p not in kernels],
        depends=[str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")]
        + [str(p) for p in [*kernels, *cuda_kernels]],
        extra_compile_args={"cxx": CXX_FLAGS},
        define_macros=macros,
    )

    class BuildExtension(cpp_extension.BuildExtension):
        """Adds the per-instruction-set objects, and writes down which torch the extension is for."""

        def build_extension(self, ext):
            objects = compile_kernels(kernels, Path(self.build_temp))
            if cuda_kernels:
                nvcc = [str(Path(cpp_extension.CUDA_HOME, "bin", "nvcc")), *arch_flags]
                objects += compile_cuda(cuda_kernels, Path(self.build_temp), nvcc)
            ext.extra_objects = [str(o) for o in objects]
            ext.depends += ext.extra_objects
            if not self.use_ninja:
                compile_in_threads(self.compiler)
            super().build_extension(ext)
            write_record(Path(self.get_ext_fullpath(ext.name)).parent)

        def copy_extensions_to_source(self):
            super().copy_extensions_to_source()
            write_record(ROOT / "dlkernels")

    def write_record(folder: Path) -> None:
        (folder / "_build_record.json").write_text(json.dumps({"torch": torch.__version__}) + "\n")

    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


def compile_kernels(kernels: list[Path], folder: Path) -> list[Path]:
    """One object per kernel file and instruction set, with the flags that only these files may have."""
    quiet = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # false alarms in gcc's own AVX-512 headers
    jobs = []
    for source in kernels:
        for name, flags in INSTRUCTION_SETS.items():
            command = [*cxx().split(), *CXX_FLAGS, *quiet, "-std=c++17", *flags, f"-DCPU_CAPABILITY={name}", "-fPIC"]
            jobs.append((source, name, command))
    return compile_objects(jobs, folder / "kernels")


def compile_cuda(kernels: list[Path], folder: Path, nvcc: list[str]) -> list[Path]:
    """One object per file of CUDA kernels, for all architectures. They hold nothing of torch."""
    command = [*nvcc, "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    return compile_objects([(source, "CUDA", command) for source in kernels], folder / "kernels")


def compile_objects(jobs: list[tuple[Path, str, list[str]]], folder: Path) -> list[Path]:
    """The object of each source, name and command: kept, taken from the cache, or made."""
    folder.mkdir(parents=True, exist_ok=True)
    to_make = []
    for source, name, command in jobs:
        target = folder / f"{source.stem}.{name}.o"
        cached = cached_object(command, source, name)
        if stale(target) and not (cached and cached.exists()):
            made_of = ["-MMD"]  # beside the object in a .d file
            to_make.append(([*command, *made_of, "-c", str(source), "-o", str(target)], target, cached))
        elif stale(target):
            shutil.copy(cached, target)
            target.with_suffix(".d").unlink(missing_ok=True)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        for (job, target, cached), done in zip(to_make, pool.map(subprocess.run, [job for job, *_ in to_make])):
            if done.returncode:
                raise SystemExit(f"compiling failed: {' '.join(job)}")
            if cached:
                cached.parent.mkdir(parents=True, exist_ok=True)
                partial = cached.with_suffix(f".{os.getpid()}")
                shutil.copy(target, partial)
                partial.replace(cached)  # whole, or not there
    return [folder / f"{source.stem}.{name}.o" for source, name, _ in jobs]


def cached_object(command: list[str], source: Path, name: str) -> Path | None:
    """Where DLKERNELS_KERNEL_CACHE holds the object of this compiler, these flags and these sources."""
    folder = os.environ.get("DLKERNELS_KERNEL_CACHE")
    if not folder:
        return None
    digest = hashlib.sha256(f"{compiler_and_headers()} {command}".encode() + source.read_bytes())
    return Path(folder) / f"{source.stem}.{name}.{digest.hexdigest()[:32]}.o"


@functools.cache
def compiler_and_headers() -> str:
    """One name for what all objects are made with."""
    version = subprocess.run([*cxx().split(), "--version"], capture_output=True).stdout
    return hashlib.sha256(version + b"".join(p.read_bytes() for p in sorted((ROOT / "csrc").rglob("*.h")))).hexdigest()


def architectures(flags) -> str:
    """What nvcc's flags make code for, "8.0;9.0+PTX": TORCH_CUDA_ARCH_LIST may name generations ("Hopper") instead."""
    found = {}
    for flag in flags:
        if match := re.match(r"-gencode=arch=compute_(\d+)(\d[a-z]?),code=([a-z]+)_", flag):
            major, minor, kind = match.groups()
            found.setdefault((int(major), minor), set()).add(kind)
    return ";".join(f"{a}.{b}" + ("+PTX" if "compute" in found[a, b] else "") for a, b in sorted(found))


def compile_in_threads(compiler) -> None:
    """What torch does with ninja: without it one source would wait for the other."""
    compile_all = compiler.compile

    def compile_each(sources, *args, **kwargs):
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            made = list(pool.map(lambda source: compile_all([source], *args, **kwargs), sources))
        return [target for targets in made for target in targets]

    compiler.compile = compile_each


def stale(target: Path) -> bool:
    """Whether an object is missing, or older than a file that it was made of."""
    made_of = target.with_suffix(".d")
    if not (target.exists() and made_of.exists()):
        return True
    names = made_of.read_text().replace("\\\n", " ").split(": ", 1)[1].split()
    files = [Path(name) for name in names] + [ROOT / "setup.py"]
    return any(not p.exists() or p.stat().st_mtime > target.stat().st_mtime for p in files)


def version() -> str:
    scope: dict = {}
    exec((ROOT / "dlkernels" / "_version.py").read_text(), scope)
    return scope["__version__"]


# The metadata stands here and not in pyproject.toml, so that any setuptools of the last years reads it.
setup(
    name="dlkernels",
    version=version(),
    description="Fused losses, layers and optimizers of modern vision training, for NVIDIA GPUs and for CPUs",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    python_requires=">=3.10",
    packages=find_packages(include=["dlkernels", "dlkernels.*"]),
    package_data={"dlkernels": ["_build_record.json"]},
    include_package_data=False,
    install_requires=["torch>=2.11"],
    entry_points={"torch_dynamo_backends": ["dlkernels = dlkernels.compile:backend"]},
    extras_require={
        "cli": ["rich", "matplotlib"],
        "demo": ["rich", "matplotlib", "scikit-learn", "monai>=1.6"],
        "bench": ["pytest", "pytest-benchmark", "rich", "matplotlib"],
        "test": [
            "pytest",
            "pytest-benchmark",
            "hypothesis",
            "expecttest",
            "numpy",
            "rich",
            "matplotlib",
            "scikit-learn",
        ],
    },
    classifiers=[
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    **build_options(),
)
