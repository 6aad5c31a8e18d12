"""Takes training steps on a GPU in a process of its own, and says what it begins and what is done.

`test_gpu_barrier.py` kills it when it stays away, `test_gpu_sanitizer.py` runs it under watch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

# What one launch can hold: rows and channels, rows of a tile, of several, of the whole device.
RESIDENT = {
    "two rows": (2, 64),
    "a tile": (32, 64),
    "a tile and a row": (33, 64),
    "a strip": (4096, 64),
    "many strips": (1000, 2048),
    "few strips for all": (50_000, 192),
}
SMALL = ("a tile and a row", "many strips")
# Shapes of the other kernels: folded rows, wide rows, planes.
IN_TWO_LAUNCHES = {"folded": (700, 3), "wide": (333, 520), "planes": (5, 7, 7, 7)}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def exercise(shape: tuple[int, ...], dtype: torch.dtype, times: int) -> None:
    from gpu_batches import assert_right, assert_same_bits, batch_of, step

    for residual in (False, True):
        batch = batch_of(shape, dtype, residual=residual)
        first = step(batch)
        assert_right(batch, first)
        for _ in range(times):
            assert_same_bits(step(batch), first)
    torch.cuda.synchronize()


def is_held(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Say whether forward and gradient are one launch each."""
    from fusebn.triton import Block
    from fusebn.triton._verbs import residency_of

    x = torch.empty(shape, dtype=dtype)
    return all(residency_of(x, Block(*shape, 1), arrays) for arrays in (1, 2))


def main(names: list[str], times: int) -> None:
    from devices import use

    use("cuda")
    for name in names:
        shape = RESIDENT.get(name) or IN_TWO_LAUNCHES[name]
        for of, dtype in DTYPES.items():
            print(f"begins: {name}, {shape}, {of}", flush=True)
            held = is_held(shape, dtype) if len(shape) == 2 else False
            if name in RESIDENT and os.environ.get("FUSEBN_GPU_PERSISTENT") != "0":
                assert held, "this device does not hold it: choose another shape"
            exercise(shape, dtype, times)
            print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[2:], int(sys.argv[1]))
