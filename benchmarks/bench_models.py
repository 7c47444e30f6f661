"""Training steps of six real models."""
import sys
from pathlib import Path
ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "real")]
    import _libraries
    from dlkernels.__main__ import main
    sys.exit(main(["bench", *sys.argv[1:]]))
