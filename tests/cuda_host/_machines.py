"""What tests of the host twin import: the order of its threads, and the machines that it can be."""

from __future__ import annotations

import os
import random

SEED = int(os.environ.get("DLKERNELS_HOST_SEED", random.randrange(1 << 32)))

# Arguments of the twin's machine(): arch, multiprocessors, shared memory of a block and of a multiprocessor, its
# threads, L2.
MACHINES = {
    "h200": (90, 132, 232448, 233472, 2048, 50 << 20),
    "a100": (80, 108, 166912, 167936, 2048, 40 << 20),
    "t4": (75, 40, 65536, 65536, 1024, 4 << 20),
}
