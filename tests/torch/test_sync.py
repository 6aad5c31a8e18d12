"""SyncBatchNorm in real processes, against one batch norm over the whole batch."""

from __future__ import annotations

import copy
import inspect
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fusebn.torch as fbt
from devices import on_gpus, seeded, use_the_parents

# On GPUs, each process has one of its own.
WORLDS = tuple(n for n in (2, 4) if not on_gpus() or n <= torch.cuda.device_count())
SPLITS = {2: [(3, 3), (5, 1), (0, 4)], 4: [(2, 2, 2, 2), (5, 0, 1, 3), (0, 0, 7, 0)]}
FLOAT64 = torch.float64
VARIABLES = ("scale", "offset", "moving_mean", "moving_variance")


class Part:
    """What one process has of a batch that all could make: of everything the rows that are its."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.generator = seeded(sum(sizes))
        self.n, rank = sum(sizes), dist.get_rank()
        self.rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def random(self, *shape: int, dtype: torch.dtype = FLOAT64) -> tuple[Tensor, Tensor]:
        """Return the part and the whole of a random tensor of n rows."""
        values = torch.randn(self.n, *shape, generator=self.generator, dtype=FLOAT64).to(dtype)
        return values[self.rows].clone(), values


def splits() -> list[tuple[int, ...]]:
    return SPLITS[dist.get_world_size()]


def layers(*arguments: Any, **options: Any) -> tuple[Any, Any]:
    """Return a synchronized layer and one for the whole batch, of the same parameters."""
    whole = fbt.BatchNorm3d(3, *arguments, **{"dtype": FLOAT64, **options})
    torch.manual_seed(1)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter)
    part = fbt.SyncBatchNorm(3, *arguments, **{"dtype": FLOAT64, **options})
    part.load_state_dict(whole.state_dict())
    return part, whole


def summed(value: Tensor) -> Tensor:
    total = value.clone()
    dist.all_reduce(total)
    return total


def assert_near(actual: Tensor, expected: Tensor, ulps: float = 256) -> None:
    tolerance = ulps * torch.finfo(actual.dtype).eps if actual.is_floating_point() else 0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_same_state(part: torch.nn.Module, whole: torch.nn.Module) -> None:
    for key, value in whole.state_dict().items():
        assert_near(part.state_dict()[key], value)


def assert_same_bits(value: Tensor) -> None:
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value)
    assert all(other.equal(value) for other in values)


# --- what is checked in every process ---------------------------------------------------------


def forward_and_backward() -> None:
    for sizes, activation, joined in product(splits(), (None, "relu", "gelu"), (False, True)):
        part, whole = layers(activation=activation)
        data = Part(sizes)
        for _ in range(2):
            x, x_whole = data.random(3, 2, 2, 5)
            r, r_whole = data.random(3, 2, 2, 5)
            dy, dy_whole = data.random(3, 2, 2, 5)
            x, r, x_whole, r_whole = (v.requires_grad_() for v in (x, r, x_whole, r_whole))
            y = part(x, r if joined else None)
            y_whole = whole(x_whole, r_whole if joined else None)
            part.zero_grad()
            whole.zero_grad()
            y.backward(dy)
            y_whole.backward(dy_whole)
            assert_near(y, y_whole[data.rows])
            assert_near(x.grad, x_whole.grad[data.rows])
            if joined:
                assert_near(r.grad, r_whole.grad[data.rows])
            assert_near(summed(part.weight.grad), whole.weight.grad)
            assert_near(summed(part.bias.grad), whole.bias.grad)
            assert_same_state(part, whole)


def memory_orders_and_ranks() -> None:
    for sizes in splits():
        data = Part(sizes)
        orders: dict[tuple[int, ...], Callable[[Tensor], Tensor]] = {
            (3,): lambda x: x,
            (3, 4): lambda x: x,
            (3, 4, 2): lambda x: x.contiguous(memory_format=torch.channels_last),
            (3, 2, 4, 2): lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
            (3, 4, 6): lambda x: x[..., ::2],
        }
        for shape, ordered in orders.items():
            part, _ = layers()
            whole = torch.nn.SyncBatchNorm(3, dtype=FLOAT64)  # alone a batch norm of any rank
            whole.load_state_dict(part.state_dict())
            x, x_whole = (ordered(v) for v in data.random(*shape))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, "is_initialized", lambda: False)
                expected = whole(x_whole)
            y = part(x)
            assert_near(y, expected[data.rows])
            assert y.stride() == torch.empty_like(x).stride()
            assert_same_state(part, whole)


def every_process_has_the_same_bits() -> None:
    for sizes, dtype in product(splits(), (torch.float32, FLOAT64)):
        part = fbt.SyncBatchNorm(3, dtype=dtype)
        part(Part(sizes).random(3, 7, dtype=dtype)[0])
        assert_same_bits(part.running_mean)
        assert_same_bits(part.running_var)


def higher_derivatives() -> None:
    for sizes, activation in product(splits(), ("gelu", "silu")):
        data = Part(sizes)
        own, all_of_it = [], []
        for _ in range(4):  # x, residual, dy, and a direction for the second derivative
            mine, whole = data.random(3, 2, 2, 2)
            own.append(mine.requires_grad_())
            all_of_it.append(whole.requires_grad_())
        results = []
        for layer, tensors in zip(layers(activation=activation), (own, all_of_it), strict=True):
            x, residual, dy, direction = tensors
            inputs = (x, residual, layer.weight)
            first = torch.autograd.grad(layer(x, residual), inputs, dy, create_graph=True)
            second = torch.autograd.grad(first[0], (x, dy, residual), direction, create_graph=True)
            third = torch.autograd.grad(second[0].square().sum(), (x, dy, direction))
            results.append((*first[:2], *second, *third))
        for actual, expected in zip(*results, strict=True):
            assert_near(actual, expected[data.rows], ulps=1e6)


def weights() -> None:
    for sizes, positions in product(splits(), ((1, 1, 1), (2, 2, 2))):
        part, whole = layers(activation="silu")
        data = Part(sizes)
        x, x_whole = data.random(3, 2, 2, 2)
        w, w_whole = (v.abs().round() for v in data.random(*positions))
        dy, dy_whole = data.random(3, 2, 2, 2)
        tensors = [v.requires_grad_() for v in (x, x_whole)]
        part(x, weights=w).backward(dy)
        whole(x_whole, weights=w_whole).backward(dy_whole)
        assert_near(tensors[0].grad, tensors[1].grad[data.rows])
        assert_same_state(part, whole)
        w, w_whole = (v.detach().requires_grad_() for v in (w, w_whole))
        part(x, weights=w).backward(dy)
        whole(x_whole, weights=w_whole).backward(dy_whole)
        assert_near(w.grad, w_whole.grad[data.rows], ulps=1e4)


class Learned(torch.nn.Module):
    """A transform with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.step = torch.nn.Parameter(torch.tensor(0.3, dtype=FLOAT64))

    def forward(self, vector: Tensor) -> Tensor:
        return self.step * torch.sinh(vector)


def transforms_of_the_whole_batch() -> None:
    """As one layer does with the whole batch: smooth ones, one that learns, and observers."""

    made: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: {"moving_mean": Learned(), "moving_variance": torch.exp, "scale": torch.tanh},
        lambda: {name: fbt.FakeQuantize(6, limits="moving").double() for name in VARIABLES},
    )
    for sizes, transforms, of_batch, joined in product(
        splits(), made, (True, False), (True, False)
    ):
        options = {"transforms": transforms(), "transform_batch_statistics": of_batch}
        part, whole = layers(activation="gelu", **options)
        part = copy.deepcopy(part)  # with observers of its own
        data = Part(sizes)
        for active in (True, torch.tensor(True), torch.tensor(False)):
            x, x_whole = (v.requires_grad_() for v in data.random(3, 2, 2, 5))
            r, r_whole = (v.requires_grad_() for v in data.random(3, 2, 2, 5))
            dy, dy_whole = data.random(3, 2, 2, 5)
            for layer in (part, whole):
                layer.zero_grad()
                layer.transforms_active = active
            y, y_whole = part(x, r if joined else None), whole(x_whole, r_whole if joined else None)
            y.backward(dy)
            y_whole.backward(dy_whole)
            assert_near(y, y_whole[data.rows], ulps=1e4)
            assert_near(x.grad, x_whole.grad[data.rows], ulps=1e4)
            if joined:
                assert_near(r.grad, r_whole.grad[data.rows], ulps=1e4)
            for mine, expected in zip(part.parameters(), whole.parameters(), strict=True):
                if expected.grad is not None:
                    assert_near(summed(mine.grad), expected.grad, ulps=1e5)
            assert_same_state(part, whole)
            assert_same_bits(part.running_var)


def transforms_that_are_off_change_no_bit() -> None:
    for sizes, of_batch in product(splits(), (True, False)):
        part, plain = (
            fbt.SyncBatchNorm(3, activation="relu", **options)
            for options in (
                {
                    "transforms": dict.fromkeys(VARIABLES, torch.exp),
                    "transforms_active": torch.tensor(False),
                    "transform_batch_statistics": of_batch,
                },
                {},
            )
        )
        x, _ = Part(sizes).random(3, 4, 4, dtype=torch.float32)
        x = x * 3 + 100
        mine, others = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = part(mine), plain(others)
        assert y.equal(expected)
        assert part.running_var.equal(plain.running_var)
        y.square().sum().backward()
        expected.square().sum().backward()
        # What flows back is summed over the processes at another place.
        assert_near(mine.grad, others.grad, ulps=64)


def transforms_twice_differentiated() -> None:
    results = []
    data = Part(splits()[1])
    tensors = [data.random(3, 2, 2, 2) for _ in range(3)]
    smooth = {"moving_mean": torch.sin, "moving_variance": torch.exp}
    options = {"transforms": smooth, "transform_batch_statistics": True, "activation": "silu"}
    for i, layer in enumerate(layers(**options)):
        x, dy, direction = (pair[i].clone().requires_grad_() for pair in tensors)
        (first,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
        results.append((first, *torch.autograd.grad(first, (x, dy), direction)))
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected[data.rows], ulps=1e6)


def transforms_when_nobody_has_anything() -> None:
    transforms = {"moving_variance": torch.ones_like}
    part, whole = layers(transforms=transforms, transform_batch_statistics=True)
    nan = torch.full((2, 3, 2, 2, 2), torch.nan, dtype=FLOAT64)
    nothing = torch.zeros(2, 1, 1, 1, dtype=FLOAT64)
    for x, weights_of in ((nan[:0], None), (nan, nothing)):
        assert part(x, weights=weights_of).equal(whole(x, weights=weights_of))
    assert part.running_var.equal(torch.ones(3, dtype=FLOAT64))


def nobody_has_anything() -> None:
    part, whole = layers(activation="relu")
    nan = torch.full((2, 3, 2, 2, 2), torch.nan, dtype=FLOAT64)
    nothing = torch.zeros(2, 1, 1, 1, dtype=FLOAT64)
    assert part(nan[:0]).shape == (0, 3, 2, 2, 2)
    assert part(nan, weights=nothing).equal(whole(nan, weights=nothing))
    assert part.running_mean.equal(torch.zeros(3, dtype=FLOAT64))
    assert part.running_var.equal(torch.ones(3, dtype=FLOAT64))
    assert part.num_batches_tracked == 2


def cumulative_and_untracked() -> None:
    for options in ({"momentum": None}, {"track_running_stats": False}, {"affine": False}):
        part, whole = layers(**options)
        data = Part(splits()[1])
        for _ in range(3):
            x, x_whole = data.random(3, 2, 2, 2)
            assert_near(part(x), whole(x_whole)[data.rows])
        assert_same_state(part, whole)


def evaluation_is_not_synchronized() -> None:
    part, whole = layers(activation="relu")
    x, x_whole = Part(splits()[0]).random(3, 2, 2, 2)
    part(x)
    whole(x_whole)
    if dist.get_rank() == 0:  # nobody else comes
        for layer in (part.eval(), part.train().freeze()):
            assert_near(layer(x_whole), whole.eval()(x_whole))
        untracked = fbt.SyncBatchNorm(3, track_running_stats=False).eval()
        untracked(x_whole.float())


def groups() -> None:
    mine = None
    for first in range(0, dist.get_world_size(), 2):
        group = dist.new_group([first, first + 1])
        mine = group if dist.get_rank() // 2 == first // 2 else mine
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    rank = dist.get_rank()
    x = torch.arange(6.0).reshape(2, 3) + rank
    pair = torch.cat([x - rank % 2, x - rank % 2 + 1])
    for group, batch in ((mine, pair), (alone[rank], x)):
        part, whole = fbt.SyncBatchNorm(3, process_group=group), fbt.BatchNorm1d(3)
        part(x)
        whole(batch)
        assert_same_state(part, whole)


def checkpointing_updates_once() -> None:
    for reentrant in (True, False):
        part, whole = layers(activation="relu")
        data = Part(splits()[1])
        x, x_whole = (v.requires_grad_() for v in data.random(3, 2, 2, 2))
        checkpoint(part, x, use_reentrant=reentrant).square().sum().backward()
        whole(x_whole).square().sum().backward()
        assert_near(x.grad, x_whole.grad[data.rows])
        assert_same_state(part, whole)


def narrow_types() -> None:
    data = Part(splits()[1])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        part, whole = layers(activation="silu", dtype=torch.float32)
        x, x_whole = data.random(3, 2, 2, 2, dtype=dtype)
        r, r_whole = data.random(3, 2, 2, 2, dtype=dtype)
        dy, dy_whole = data.random(3, 2, 2, 2, dtype=dtype)
        y, y_whole = part(x.requires_grad_(), r), whole(x_whole.requires_grad_(), r_whole)
        y.backward(dy)
        y_whole.backward(dy_whole)
        assert_near(y, y_whole[data.rows], ulps=8)
        assert_near(x.grad, x_whole.grad[data.rows], ulps=8)
        assert_near(part.running_var, whole.running_var, ulps=8)
        # A residual of another type is added as PyTorch adds.
        assert part(x, r.double()).dtype == FLOAT64


def a_large_mean_costs_no_digits() -> None:
    part = fbt.SyncBatchNorm(1, momentum=1.0)
    rank, world = dist.get_rank(), dist.get_world_size()
    values = torch.tensor([-1.0, 1.0]) + 1e6 + 4 * rank
    part(values.reshape(2, 1))
    everything = (torch.arange(world) * 4.0 + 1e6).double().repeat_interleave(2)
    everything[::2] -= 1
    everything[1::2] += 1
    assert_near(part.running_var, everything.var(correction=1).float().reshape(1), ulps=2)


def nonfinite() -> None:
    x, _ = Part(splits()[0]).random(3, 2, 2, 2)
    if dist.get_rank() == 1:
        x[0, 2] = torch.inf
    part, _ = layers(nonfinite="skip")
    part(x)
    assert part.running_mean[2] == 0
    assert part.running_mean[:2].ne(0).all()
    part, _ = layers(nonfinite="raise")
    with pytest.raises(ValueError, match="NaN or Inf in channels 2"):  # in every process
        part(x)
    assert part.num_batches_tracked == 0


def bad_input_is_told_before_anything_is_sent() -> None:
    part = fbt.SyncBatchNorm(3)
    if dist.get_rank() == 0:  # nobody else comes
        with pytest.raises(ValueError, match=r"`input` must have 3 channels on axis 1; got shape"):
            part(torch.ones(2, 4))
        with pytest.raises(ValueError, match="expected at least 2D input"):
            part(torch.ones(3))
        with pytest.raises(ValueError, match="`residual` must have the shape of input"):
            part(torch.ones(2, 3), torch.ones(3, 3))
        with pytest.raises(ValueError, match="`weights` must be finite and not negative; got -1"):
            part(torch.ones(2, 3), weights=torch.tensor([1.0, -1.0]))
        with pytest.raises(ValueError, match="`activation` must be one of"):
            part(torch.ones(2, 3), activation="tanh")
        assert part.num_batches_tracked == 0


def distributed_data_parallel(transforms: Any = None) -> None:
    torch.manual_seed(0)
    whole = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1)
    ).double()
    if transforms:
        fbt.fuse(whole)
        whole[1].transforms = transforms
        whole[1].transform_batch_statistics = True
    part = fbt.convert_sync_batchnorm(copy.deepcopy(whole))
    assert type(part[1]) is fbt.SyncBatchNorm
    parallel = torch.nn.parallel.DistributedDataParallel(part)
    data, world = Part(splits()[1]), dist.get_world_size()
    optimizers = [torch.optim.SGD(net.parameters(), 0.1) for net in (parallel, whole)]
    for _ in range(3):
        x, x_whole = data.random(3, 4, 4)
        # The gradients are averaged over the processes, so the loss is as many times the sum.
        losses = world * parallel(x).square().sum() / 100, whole(x_whole).square().sum() / 100
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_same_state(part, whole)


def distributed_data_parallel_with_transforms() -> None:
    observer = fbt.FakeQuantize(8, limits="moving").double()
    distributed_data_parallel({"moving_mean": Learned(), "moving_variance": observer})


def one_that_fails_is_waited_for_until_the_time_limit() -> None:
    group = dist.new_group(timeout=timedelta(seconds=5))
    part = fbt.SyncBatchNorm(3, process_group=group)
    channels = 4 if dist.get_rank() == 0 else 3
    with pytest.raises((ValueError, RuntimeError)):
        part(torch.ones(2, channels))


CHECKS = (
    forward_and_backward,
    memory_orders_and_ranks,
    every_process_has_the_same_bits,
    higher_derivatives,
    weights,
    transforms_of_the_whole_batch,
    transforms_that_are_off_change_no_bit,
    transforms_twice_differentiated,
    transforms_when_nobody_has_anything,
    nobody_has_anything,
    cumulative_and_untracked,
    evaluation_is_not_synchronized,
    groups,
    checkpointing_updates_once,
    narrow_types,
    a_large_mean_costs_no_digits,
    nonfinite,
    bad_input_is_told_before_anything_is_sent,
    distributed_data_parallel,
    distributed_data_parallel_with_transforms,
    one_that_fails_is_waited_for_until_the_time_limit,  # and leaves no connection behind
)[: -1 if on_gpus() else None]  # where NCCL ends the process instead


# --- the processes ----------------------------------------------------------------------------


def work(rank: int, world: int, folder: str) -> None:
    """Run all checks in one process, and write down what came of each."""
    use_the_parents()
    torch.set_num_threads(1)
    if on_gpus():
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if on_gpus() else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=100),
    )
    for check in CHECKS:
        try:
            check()
        except BaseException:
            Path(folder, f"{check.__name__}.{rank}").write_text(traceback.format_exc())
            break  # the others wait in vain, and say so
        Path(folder, f"{check.__name__}.{rank}").touch()


@cache
def outcome(world: int) -> dict[str, list[str]]:
    """Return what came of each check in each process: nothing is good."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (world, folder), nprocs=world)
        return {
            check.__name__: [
                path.read_text() if path.exists() else "not reached: see the checks before"
                for path in (Path(folder, f"{check.__name__}.{rank}") for rank in range(world))
            ]
            for check in CHECKS
        }


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
@pytest.mark.parametrize("world", WORLDS)
def test_in_processes(world: int, check: str) -> None:
    failures = [text for text in outcome(world)[check] if text]
    assert not failures, "\n".join(failures)


# --- in one process ---------------------------------------------------------------------------


def test_it_is_called_as_pytorchs() -> None:
    assert issubclass(fbt.SyncBatchNorm, torch.nn.modules.batchnorm._BatchNorm)
    mine, others = (
        inspect.signature(c).parameters for c in (fbt.SyncBatchNorm, torch.nn.SyncBatchNorm)
    )
    assert list(mine)[: len(others)] == list(others)
    assert all(mine[name].default == others[name].default for name in others)
    assert repr(fbt.SyncBatchNorm(3)) == repr(torch.nn.SyncBatchNorm(3))


def test_alone_it_is_a_batch_norm() -> None:
    part, whole = layers(activation="relu", nonfinite="skip")
    x = torch.randn(4, 3, 2, 2, 2, dtype=FLOAT64)
    assert part(x, x).equal(whole(x, x))
    assert_same_state(part, whole)
    with pytest.raises(ValueError, match="more than 1 value"):
        part(x[:1, :, :1, :1, :1])


def test_conversion_keeps_everything() -> None:
    net = torch.nn.Sequential(
        torch.nn.BatchNorm1d(3, eps=0.1, momentum=None, bias=False),
        torch.nn.Sequential(fbt.BatchNorm2d(4, activation="relu", axis=-1, correction=0).freeze()),
        torch.nn.BatchNorm2d(5, affine=False, track_running_stats=False).eval(),
        torch.nn.InstanceNorm1d(3),
    )
    calls = []
    net[1][0].register_forward_hook(lambda *_: calls.append(1))
    net[0].weight.requires_grad_(False)
    old, names = [net[0], net[1][0], net[2]], list(dict(net.named_parameters()))
    assert fbt.convert_sync_batchnorm(net) is net
    new = [net[0], net[1][0], net[2]]
    assert all(type(module) is fbt.SyncBatchNorm for module in new)
    assert type(net[3]) is torch.nn.InstanceNorm1d
    assert list(dict(net.named_parameters())) == names
    for before, after in zip(old, new, strict=True):
        for key, value in (*before.named_parameters(), *before.named_buffers()):
            assert getattr(after, key) is value
        assert after.extra_repr() == before.extra_repr()
        assert after.training == before.training
    assert new[1].frozen
    new[1](torch.ones(2, 3, 3, 4))
    assert calls == [1]
    new[0].weight = torch.nn.Parameter(torch.zeros(3))
    assert old[0].weight.equal(torch.ones(3))


def test_conversion_widens_statistics() -> None:
    module = fbt.convert_sync_batchnorm(torch.nn.BatchNorm1d(3, dtype=torch.float16))
    assert module.weight.dtype == torch.float16
    assert module.running_var.dtype == torch.float32


def test_conversion_keeps_a_group_unless_given_another() -> None:
    module = torch.nn.SyncBatchNorm(3, process_group="a group")
    assert fbt.convert_sync_batchnorm(module).process_group == "a group"
    assert fbt.convert_sync_batchnorm(module, "another").process_group == "another"
    assert fbt.convert_sync_batchnorm(torch.nn.BatchNorm1d(3)).process_group is None
    method = fbt.SyncBatchNorm.convert_sync_batchnorm
    assert type(method(module)) is fbt.SyncBatchNorm


def test_conversion_wants_no_lazy_ones() -> None:
    with pytest.raises(ValueError, match=r"must know its number of channels; got LazyBatchNorm1d"):
        fbt.convert_sync_batchnorm(torch.nn.Sequential(torch.nn.LazyBatchNorm1d()))
