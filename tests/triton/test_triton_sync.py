"""SyncBatchNorm by the kernels of a GPU: real processes, interpreted, with gloo in NCCL's place.

The checks are those of tests/torch/test_sync.py, against one batch norm over the whole batch.
"""

import sys
import traceback
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[1] / "torch"))

import interpreted
import test_sync as checks  # not by name, or they would run here, too

import fusebn.torch as fbt
from fusebn.torch import _gpu, _synchronized


def as_one_big_batch():
    """Parts of any sizes, with weights, a residual and a ReLU: y, all gradients, the averages."""
    for sizes, weighted, joined in product(checks.splits(), (False, True), (False, True)):
        part, whole = checks.layers(activation="relu")
        data = checks.Part(sizes)
        pairs = [data.random(3, 2, 2, 5) for _ in range(3)]
        w, w_whole = (v.abs().round() for v in data.random(2, 2, 5))
        sides = []
        for i, (layer, weights) in enumerate(((part, w), (whole, w_whole))):
            x, residual, dy = (pair[i] for pair in pairs)
            for leaf in (x, residual):
                leaf.requires_grad_()
            y = layer(x, residual if joined else None, weights=weights if weighted else None)
            y.backward(dy)
            sides.append((y, x.grad, *([residual.grad] if joined else [])))
        for mine, all_of_it in zip(*sides, strict=True):
            checks.assert_near(mine, all_of_it[data.rows])
        for mine, expected in zip(part.parameters(), whole.parameters(), strict=True):
            checks.assert_near(checks.summed(mine.grad), expected.grad)
        checks.assert_same_state(part, whole)
        checks.assert_same_bits(part.running_var)


def one_collective_each_way():
    """And what they carry is float64, as long as the documentation says."""
    sent = []

    def spy(name, real):
        def called(*tensors, **options):
            sent.append((name, tensors[-1].dtype, tensors[-1].numel()))
            return real(*tensors, **options)

        return called

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_into_tensor", "all_reduce", "all_gather", "broadcast"):
            patch.setattr(dist, name, spy(name, getattr(dist, name)))
        x = torch.randn(4, 3, 2, requires_grad=True)
        fbt.SyncBatchNorm(3, activation="relu")(x).sum().backward()
    assert sent == [
        ("all_gather_into_tensor", torch.float64, 7),
        ("all_reduce", torch.float64, 6),
    ]


def a_running_statistic_elsewhere_is_told_before_anything_is_sent():
    if dist.get_rank() == 0:  # nobody else comes
        layer = fbt.SyncBatchNorm(3)
        layer.running_var = torch.ones(3, device="meta")
        with pytest.raises(ValueError, match="`running_var` must be on cpu, where the others are"):
            layer(torch.ones(2, 3))
        with pytest.raises(ValueError, match="`residual` must be on cpu, where the others are"):
            fbt.SyncBatchNorm(3)(torch.ones(2, 3), torch.ones(2, 3, device="meta"))


CHECKS = (
    as_one_big_batch,
    one_collective_each_way,
    checks.memory_orders_and_ranks,
    checks.every_process_has_the_same_bits,
    checks.higher_derivatives,
    checks.weights,
    checks.nobody_has_anything,
    checks.checkpointing_updates_once,
    checks.narrow_types,
    checks.a_large_mean_costs_no_digits,
    checks.distributed_data_parallel,
    a_running_statistic_elsewhere_is_told_before_anything_is_sent,
)


# ---- the processes ----


def work(rank, world, folder):
    """Run all checks in one process, where the kernels take tensors of the CPU."""
    interpreted.verbs._ahead = lambda *read: 1  # a tile beside the data costs as any other
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=200),
    )
    # What is synchronized is the kernels', and the judge, one batch norm, remains the core's.
    _synchronized._verbs_for = lambda x: _gpu
    for check in CHECKS:
        try:
            check()
        except BaseException:
            Path(folder, f"{check.__name__}.{rank}").write_text(traceback.format_exc())
            break  # the others wait in vain, and say so
        Path(folder, f"{check.__name__}.{rank}").touch()


@pytest.mark.parametrize("world", [2, 4])
def test_in_processes(world, tmp_path):
    torch.multiprocessing.spawn(work, (world, tmp_path), nprocs=world)
    for check, rank in product(CHECKS, range(world)):
        outcome = tmp_path / f"{check.__name__}.{rank}"
        assert outcome.exists(), f"{outcome.name} was not reached"
        assert not outcome.read_text(), f"{outcome.name}:\n{outcome.read_text()}"
