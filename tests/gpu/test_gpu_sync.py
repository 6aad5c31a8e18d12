"""SyncBatchNorm over NCCL, a process for each GPU that there is: as one batch norm of all parts."""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gpu_batches import channels_last

import fusebn.torch as fbt
from devices import seeded, use_the_parents

SHAPE = (24, 64, 6, 5)


def part_of(rank: int, world: int) -> slice:
    """Return the rows of a process: the first one has the most, the last one may have none."""
    edges = [round(SHAPE[0] * (1 - (1 - i / world) ** 2)) for i in range(world + 1)]
    return slice(edges[rank], edges[rank + 1])


def work(rank: int, world: int, folder: str) -> None:
    use_the_parents()
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{folder}/meeting", rank=rank, world_size=world,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    rows, generator = part_of(rank, world), seeded(0)
    part, whole = fbt.SyncBatchNorm(64, activation="relu"), fbt.BatchNorm2d(64, activation="relu")
    if world == 1:  # it would not ask for anybody, and the road is what this is about
        part._others = lambda: dist.group.WORLD
    for i in range(3):
        x, residual, dy = (
            torch.randn(SHAPE, generator=generator).contiguous(memory_format=channels_last)
            for _ in range(3)
        )
        mine, all_of_it = x[rows].clone().requires_grad_(), x.clone().requires_grad_()
        if i == 2:
            torch.cuda.set_sync_debug_mode("error")
        y = part(mine, residual[rows])
        y.backward(dy[rows])
        torch.cuda.set_sync_debug_mode("default")
        expected = whole(all_of_it, residual)
        expected.backward(dy)
        torch.testing.assert_close(y, expected[rows], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.grad, all_of_it.grad[rows], rtol=1e-4, atol=1e-5)
        for one, other in zip(part.buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(one, other)
    dist.all_reduce(part.weight.grad)
    torch.testing.assert_close(part.weight.grad, whole.weight.grad, rtol=1e-4, atol=1e-3)
    dist.destroy_process_group()


@pytest.mark.parametrize("asked", ["1", "0"], ids=["one launch", "two launches"])
def test_as_one_batch(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEBN_GPU_PERSISTENT", asked)
    world: Any = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (world, folder), nprocs=world)
    assert os.environ["TRITON_INTERPRET"] == "0"
