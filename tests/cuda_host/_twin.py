"""Builds the host twin of the CUDA kernels: csrc/cuda as C++ for CPU tensors, under sanitizers.

    python tests/cuda_host/_twin.py            build it and print its path
    python tests/cuda_host/_twin.py --plain    without sanitizers: faster to build, no library to preload

Objects are kept in build/cuda_host by what they are made of.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-sanitize=vptr"]
FLAGS = ["-std=c++17", "-g1", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-DDL_CUDA_HOST"]


def sources() -> list[Path]:
    cuda = ROOT / "csrc" / "cuda"
    return [HERE / "shim.cpp", HERE / "module.cpp", *sorted(cuda.glob("*.cpp")), *sorted(cuda.glob("*_kernel.cu"))]


def build(sanitize: bool = True, *, jobs: int | None = None, changed: dict[Path, str] | None = None) -> Path:
    """The library, compiled as far as needed.

    Args:
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer; the process that loads it must have the first
            one preloaded: see `environment`.
        jobs: compilers at a time.
        changed: other texts of some sources, for tests of the tests.
    """
    folder = ROOT / "build" / "cuda_host"
    folder.mkdir(parents=True, exist_ok=True)
    headers = sorted([*(ROOT / "csrc").rglob("*.h"), HERE / "shim.h"])
    made_of = b"".join(p.read_bytes() for p in headers)
    flags = [*FLAGS, *(SANITIZERS if sanitize else [])]
    compiler = os.environ.get("CXX", "c++").split()
    objects, commands = [], []
    for source in sources():
        text = (changed or {}).get(source, source.read_text())
        quickly = ["-O0"] if changed and source in changed else []  # it runs one test
        torch_free = source.suffix == ".cu" or source.name == "shim.cpp"
        command = [
            *compiler,
            *flags,
            *quickly,
            *([] if torch_free else torch_flags()),
            f"-I{HERE}",
            f"-I{source.parent}",
        ]
        digest = hashlib.sha256(f"{command}{text}".encode() + made_of).hexdigest()[:24]
        target = folder / f"{source.stem}.{digest}.o"
        objects.append(target)
        if not target.exists():
            copy = folder / f"{source.stem}.{digest}.cpp"
            # Names of files in reports are the sources'.
            copy.write_text(f'#line 1 "{source}"\n{text}')
            commands.append((command, copy, target))
    with ThreadPoolExecutor(jobs or int(os.environ.get("MAX_JOBS", "2"))) as pool:
        for error in pool.map(compile_one, commands):
            if error:
                raise RuntimeError(error)
    name = hashlib.sha256(" ".join(p.name for p in objects).encode()).hexdigest()[:24]
    library = folder / f"_cuda_host.{name}.so"
    if not library.exists():
        run([*compiler, *flags, "-shared", *map(str, objects), *torch_libraries(), "-o", str(library)])
    return library


def compile_one(job: tuple[list[str], Path, Path]) -> str:
    command, source, target = job
    partial = target.with_suffix(f".{os.getpid()}.o")
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(partial)], capture_output=True, text=True, env=plain()
    )
    if done.returncode == 0:
        partial.replace(target)
    source.unlink(missing_ok=True)
    return done.stderr[-6000:] if done.returncode else ""


def plain() -> dict[str, str]:
    """The environment without what the twin's own processes preload."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=plain())
    if done.returncode:
        raise RuntimeError(done.stderr[-6000:])


def torch_flags() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    return [f"-isystem{path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]]


def torch_libraries() -> list[str]:
    from torch.utils.cpp_extension import library_paths

    found = [f"-L{path}" for path in library_paths()]
    return [*found, "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]


def environment(library: Path, sanitize: bool = True, report: Path | None = None) -> dict[str, str]:
    """What a Python process needs to load the library, and to fail when a sanitizer finds something.

    Its report goes to the files report.PID: what a test writes to stderr, pytest keeps, and a process that ends loses.
    """
    report = report or library.parent / "report"
    env = {"DLKERNELS_CUDA_HOST": str(library)}
    if sanitize:
        gcc = os.environ.get("CXX", "c++").split()
        preload = [
            subprocess.check_output([*gcc, f"-print-file-name={n}"], text=True).strip()
            for n in ("libasan.so", "libstdc++.so")
        ]
        env["LD_PRELOAD"] = " ".join(preload)
        env["ASAN_OPTIONS"] = f"detect_leaks=0:detect_stack_use_after_return=0:log_path={report}"
        env["UBSAN_OPTIONS"] = f"print_stacktrace=1:log_path={report}"
    return env


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", action="store_true", help="without sanitizers")
    parser.add_argument("--env", action="store_true", help="print the environment that loads it, as shell assignments")
    args = parser.parse_args()
    built = build(not args.plain)
    if args.env:
        print("\n".join(f"export {name}='{value}'" for name, value in environment(built, not args.plain).items()))
    else:
        print(built)
