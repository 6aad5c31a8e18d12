"""The modules against PyTorch's own in float64, and what they do beyond."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)
from torch.utils.data import DataLoader, Dataset

import fusebn.torch as fbt
from devices import seeded

SHAPES = {
    "NC": ("BatchNorm1d", (6, 3)),
    "NCL": ("BatchNorm1d", (4, 3, 5)),
    "NCHW": ("BatchNorm2d", (4, 3, 5, 2)),
    "NHWC": ("BatchNorm2d", (4, 3, 5, 2)),
    "NCDHW": ("BatchNorm3d", (2, 3, 2, 3, 4)),
    "NDHWC": ("BatchNorm3d", (2, 3, 2, 3, 4)),
}
ORDERS = {"NHWC": torch.channels_last, "NDHWC": torch.channels_last_3d}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no affine": {"affine": False},
    "no bias": {"bias": False},
    "cumulative": {"momentum": None},
    "momentum": {"momentum": 0.7, "eps": 0.1},
    "untracked": {"track_running_stats": False},
    "untracked, no affine": {"affine": False, "track_running_stats": False},
}
NAMES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
EVENTS = ("train", "train", "eval", "train", "untrack", "train", "eval")


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Return a generator seeded by the test's own name."""
    return seeded(sum(request.node.name.encode()))


def batch(generator: torch.Generator, shape: Any = (4, 3, 5, 2)) -> Tensor:
    """Return values around 3, which float32 holds exactly, in float64."""
    values = torch.randn(shape, generator=generator, dtype=torch.float32).double() * 2 + 3
    return values.float().double()


def assert_near(actual: Tensor | None, expected: Tensor | None, ulps: float = 32) -> None:
    """Assert that a result has the digits its dtype can have, beside terms of size 8."""
    assert (actual is None) == (expected is None)
    if actual is None or expected is None:
        return
    tolerance = ulps * torch.finfo(actual.dtype).eps
    error = (actual.double() - expected).abs()
    assert actual.shape == expected.shape
    assert bool((error <= tolerance * (8 + expected.abs())).all()), error.max()


def randomize(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Give the parameters values of either sign, which float32 holds exactly."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def pair(
    name: str, generator: torch.Generator, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Any, Any]:
    """Return ours in dtype and PyTorch's in float64, in the same state."""
    theirs = getattr(torch.nn, name)(3, dtype=torch.float64, **options)
    randomize(theirs, generator)
    ours = getattr(fbt, name)(3, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_same_state(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    mine, others = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(others)
    for key, value in others.items():
        if value.is_floating_point():
            assert_near(mine[key], value)
        else:
            assert mine[key].dtype == value.dtype
            assert mine[key].equal(value)


def step(module: torch.nn.Module, x: Tensor, dy: Tensor) -> tuple[Any, ...]:
    """Return y and the gradients of x and of the parameters."""
    x = x.clone().requires_grad_()
    y = module(x)
    module.zero_grad()
    y.backward(dy)
    return y.detach(), x.grad, *(p.grad for p in module.parameters())


def raised(call: Callable[[], object]) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (compared with another)
        call()
    return caught.type, str(caught.value)


# --- as PyTorch's -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", SHAPES)
def test_steps(case: str, options: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    name, shape = SHAPES[case]
    ours, theirs = pair(name, generator, dtype, **OPTIONS[options])
    for event in EVENTS:
        if event == "untrack":
            ours.track_running_stats = theirs.track_running_stats = False
            continue
        ours.train(event == "train")
        theirs.train(event == "train")
        x, dy = batch(generator, shape), torch.randn(shape, generator=generator).double()
        order = ORDERS.get(case, torch.contiguous_format)
        x, dy = (v.contiguous(memory_format=order) for v in (x, dy))
        found, wanted = step(ours, x.to(dtype), dy.to(dtype)), step(theirs, x, dy)
        for actual, expected in zip(found, wanted, strict=True):
            assert_near(actual, expected)
        assert found[0].stride() == x.stride()
        assert_same_state(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_under_autocast(training: bool, generator: torch.Generator) -> None:
    ours, theirs = pair("BatchNorm2d", generator, torch.float32)
    ours.train(training)
    theirs.train(training)
    x, one = batch(generator).bfloat16(), torch.eye(3)[..., None, None]
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(torch.nn.functional.conv2d(x.float(), one))
    assert y.dtype == torch.bfloat16
    assert_near(y, theirs(x.double()), ulps=1)
    assert ours.running_mean.dtype == torch.float32
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch(momentum: float | None, generator: torch.Generator) -> None:
    ours, theirs = pair("BatchNorm2d", generator, momentum=momentum)
    x = torch.empty(0, 3, 2, 2, dtype=torch.float64)
    assert ours(x).shape == theirs(x).shape
    assert_same_state(ours, theirs)


def test_without_grad_the_statistics_move(generator: torch.Generator) -> None:
    ours, theirs = pair("BatchNorm2d", generator)
    with torch.no_grad():
        x = batch(generator)
        assert_near(ours(x), theirs(x))
    assert_same_state(ours, theirs)
    assert ours.num_batches_tracked == 1


BAD_INPUTS = {
    "rank": torch.ones(2, 3, 4, 4, 4, 4),
    "one value": torch.ones(1, 3, 1, 1),
    "channels": torch.ones(2, 4, 2, 2),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_errors_are_pytorchs(case: str) -> None:
    ours, theirs = fbt.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    x = BAD_INPUTS[case]
    assert raised(lambda: ours(x)) == raised(lambda: theirs(x))


@pytest.mark.parametrize("name", NAMES)
def test_errors_of_rank_name_what_is_expected(name: str) -> None:
    x = torch.ones(3)
    ours, theirs = getattr(fbt, name)(3), getattr(torch.nn, name)(3)
    assert raised(lambda: ours(x)) == raised(lambda: theirs(x))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_error_changes_nothing(momentum: float | None) -> None:
    module = fbt.BatchNorm2d(3, momentum=momentum)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="more than 1 value"):
        module(torch.ones(1, 3, 1, 1))
    assert all(value.equal(before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", [*NAMES, *(f"Lazy{name}" for name in NAMES)])
def test_they_are_pytorchs(name: str) -> None:
    ours, theirs = getattr(fbt, name), getattr(torch.nn, name)
    assert issubclass(ours, theirs)
    mine, others = (list(inspect.signature(c).parameters.values()) for c in (ours, theirs))
    named = {parameter.name: parameter for parameter in mine}
    for parameter in others:
        assert named[parameter.name].kind == parameter.kind
        assert named[parameter.name].default == parameter.default
    positional = [p.name for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [p.name for p in others if p.kind is p.POSITIONAL_OR_KEYWORD]
    arguments = () if name.startswith("Lazy") else (3,)
    assert repr(ours(*arguments, bias=False)) == repr(theirs(*arguments, bias=False))


@pytest.mark.parametrize("options", OPTIONS)
def test_state_dicts_both_ways(options: str, generator: torch.Generator) -> None:
    _, theirs = pair("BatchNorm2d", generator, **OPTIONS[options])
    theirs(batch(generator))
    ours = fbt.BatchNorm2d(3, dtype=torch.float64, activation="relu", **OPTIONS[options])
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_state(ours, theirs)
    back = torch.nn.BatchNorm2d(3, dtype=torch.float64, **OPTIONS[options])
    back.load_state_dict(ours.state_dict(), strict=True)
    assert_same_state(back, theirs)


def test_pytorchs_own_lacks_nothing_to_become_ours(generator: torch.Generator) -> None:
    module: Any = torch.nn.BatchNorm2d(3)
    module.__class__ = fbt.BatchNorm2d
    assert module(batch(generator).float()).shape == (4, 3, 5, 2)
    assert not module.freeze().unfreeze().frozen


# --- beyond PyTorch's -------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize("training", [True, False])
def test_activation_and_residual(
    activation: str, training: bool, generator: torch.Generator
) -> None:
    ours, theirs = pair("BatchNorm2d", generator)
    ours.activation = activation
    ours.train(training)
    theirs.train(training)
    x, residual = batch(generator), batch(generator)
    f = getattr(torch.nn.functional, activation)
    assert_near(ours(x), f(theirs(x)))
    assert_near(ours(x, residual), f(theirs(x) + residual))
    assert_near(ours(x, residual, activation=None), theirs(x) + residual)
    assert_near(ours(x, activation="relu"), torch.relu(theirs(x)))


def test_weights(generator: torch.Generator) -> None:
    ours, theirs = pair("BatchNorm2d", generator)
    x = batch(generator)
    weights = torch.tensor([1.0, 0, 2, 0], dtype=torch.float64).reshape(4, 1, 1)
    repeated = theirs(x[[0, 2, 2]])
    assert_near(ours(x, weights=weights)[[0, 2, 2]], repeated)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("correction", [0, 1, 2.5])
def test_correction(correction: float, generator: torch.Generator) -> None:
    module = fbt.BatchNorm2d(3, momentum=1.0, correction=correction, dtype=torch.float64)
    x = batch(generator)
    module(x)
    m2 = x.transpose(0, 1).flatten(1).var(1, correction=0) * 40
    assert_near(module.running_var, m2 / (40 - correction))


@pytest.mark.parametrize("axis", [-1, 0, 2])
def test_axis(axis: int, generator: torch.Generator) -> None:
    ours, theirs = pair("BatchNorm2d", generator)
    ours.axis = axis
    x = batch(generator)
    assert_near(ours(x.movedim(1, axis)), theirs(x).movedim(1, axis))
    assert_same_state(ours, theirs)


def test_decay_is_another_name() -> None:
    assert fbt.BatchNorm1d(3, decay=0.75).momentum == 0.25
    with pytest.raises(ValueError, match=r"`decay` must be None beside momentum=0.3; got 0.7. mom"):
        fbt.BatchNorm1d(3, momentum=0.3, decay=0.7)
    with pytest.raises(ValueError, match=r"`decay` must lie in \[0, 1\]; got 1.5"):
        fbt.LazyBatchNorm1d(decay=1.5)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"activation": "tanh"}, ValueError, "BatchNorm1d: `activation` must be one of None"),
        ({"activation": torch.relu}, TypeError, "Apply any other function to y yourself"),
        ({"correction": -1}, ValueError, "`correction` must be finite and not negative; got -1"),
        ({"nonfinite": "drop"}, ValueError, "`nonfinite` must be one of 'propagate', 'skip', 'ra"),
        ({"axis": 1.5}, TypeError, "`axis` must be an integer; got 1.5"),
    ],
)
def test_bad_options(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fbt.BatchNorm1d(3, **options)


def test_the_representation_shows_what_differs() -> None:
    module = fbt.BatchNorm2d(3, activation="relu", axis=-1, nonfinite="skip", correction=0)
    extras = "activation='relu', correction=0.0, nonfinite='skip', axis=-1"
    assert repr(module.freeze()).endswith(f"track_running_stats=True, {extras}, frozen=True)")


def test_parametrized(generator: torch.Generator) -> None:
    class Doubled(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    ours, theirs = pair("BatchNorm2d", generator)
    for module in (ours, theirs):
        torch.nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
    x, dy = batch(generator), batch(generator)
    for actual, expected in zip(step(ours, x, dy), step(theirs, x, dy), strict=True):
        assert_near(actual, expected)


# --- NaN and infinities -----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_nonfinite(bad: float, momentum: float | None, generator: torch.Generator) -> None:
    x = batch(generator)
    x[0, 1] = bad
    results = {}
    for nonfinite in ("propagate", "skip"):
        results[nonfinite], _ = pair("BatchNorm2d", generator, momentum=momentum)
        results[nonfinite].nonfinite = nonfinite
        y = results[nonfinite](x)
        assert y[:, 1].isnan().all()
        assert y[:, [0, 2]].isfinite().all()
    for name, first in (("running_mean", 0.0), ("running_var", 1.0)):
        plain, kept = (getattr(module, name) for module in results.values())
        assert plain[1].isnan()
        assert kept[1] == first
        assert kept[[0, 2]].equal(plain[[0, 2]])
    assert results["skip"].num_batches_tracked == 1


def test_nonfinite_raises_and_changes_nothing(generator: torch.Generator) -> None:
    module = fbt.BatchNorm2d(3, nonfinite="raise", dtype=torch.float64)
    plain = fbt.BatchNorm2d(3, dtype=torch.float64)
    x = batch(generator)
    assert module(x).equal(plain(x))
    assert_same_state(module, plain)
    x[0, 1:] = torch.nan
    with pytest.raises(
        ValueError, match=r"`input` must hold finite .* NaN or Inf in channels 1, 2"
    ):
        module(x)
    assert_same_state(module, plain)
    assert module.eval()(x)[:, 0].isfinite().all()


# --- freezing ---------------------------------------------------------------------------------


def test_frozen_is_evaluation_that_train_does_not_undo(generator: torch.Generator) -> None:
    module = fbt.BatchNorm2d(3, dtype=torch.float64)
    module(batch(generator))
    before = copy.deepcopy(module.state_dict())
    x = batch(generator)
    expected = module.eval()(x)
    module.freeze().train()
    assert module.frozen
    assert module.training
    y = module(x)
    assert y.equal(expected)
    y.sum().backward()
    assert module.weight.grad is not None
    assert all(value.equal(before[key]) for key, value in module.state_dict().items())
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.frozen
        assert copied(x).equal(expected)
    module.unfreeze()
    assert not module(x).equal(expected)
    assert module.num_batches_tracked == 2


def test_there_must_be_something_to_freeze() -> None:
    module = fbt.BatchNorm2d(3, track_running_stats=False)
    with pytest.raises(ValueError, match="`track_running_stats` must be True to freeze; got False"):
        module.freeze()


# --- dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_statistics_stay_float32(half: torch.dtype, generator: torch.Generator) -> None:
    module = fbt.BatchNorm2d(3, dtype=torch.float64)
    module(batch(generator))
    statistics = module.running_mean.float(), module.running_var.float()
    made = fbt.BatchNorm2d(3, dtype=half)
    made.load_state_dict(module.state_dict())
    for cast in (module.to(half), made, copy.deepcopy(module)):
        assert cast.weight.dtype == cast.bias.dtype == half
        assert cast.running_mean.equal(statistics[0])
        assert cast.running_var.equal(statistics[1])
        assert cast.num_batches_tracked == 1
        x = batch(generator).to(half).requires_grad_()
        y = cast(x)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == cast.weight.grad.dtype == half
    assert module.double().running_mean.dtype == torch.float64
    assert module.float().running_var.dtype == torch.float32


def test_half_precision_does_not_stall(generator: torch.Generator) -> None:
    module = fbt.BatchNorm1d(1, momentum=0.001).bfloat16()
    for _ in range(1000):
        module(torch.tensor([[3.0], [5.0]], dtype=torch.bfloat16))
    assert module.running_mean.item() == pytest.approx(4 * (1 - 0.999**1000), rel=1e-4)


def test_to_empty_and_meta(generator: torch.Generator) -> None:
    module = fbt.BatchNorm2d(3, device="meta").half()
    assert module.running_mean.dtype == torch.float32
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    assert module(batch(generator).half()).dtype == torch.float16
    assert module.num_batches_tracked == 1


# --- lazy ones --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SHAPES)
def test_lazy_ones_become_the_others(case: str, generator: torch.Generator) -> None:
    name, shape = SHAPES[case]
    module = getattr(fbt, f"Lazy{name}")(activation="relu", correction=0, dtype=torch.float64)
    plain = getattr(fbt, name)(3, activation="relu", correction=0, dtype=torch.float64)
    x = batch(generator, shape)
    assert module(x, x).equal(plain(x, x))
    assert type(module) is type(plain)
    assert repr(module) == repr(plain)
    assert_same_state(module, plain)


def test_a_lazy_one_knows_its_axis(generator: torch.Generator) -> None:
    module = fbt.LazyBatchNorm2d(axis=-1, dtype=torch.float16)
    assert module(batch(generator, (2, 4, 5, 7)).half()).shape == (2, 4, 5, 7)
    assert module.num_features == 7
    assert module.weight.dtype == torch.float16
    assert module.running_mean.dtype == torch.float32


def test_a_lazy_one_loads(generator: torch.Generator) -> None:
    _, theirs = pair("BatchNorm2d", generator)
    module = fbt.LazyBatchNorm2d(dtype=torch.float64)
    module.load_state_dict(theirs.state_dict())
    x = batch(generator)
    assert_near(module(x), theirs(x))


# --- activation checkpointing -----------------------------------------------------------------


def network(**options: Any) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1),
        fbt.BatchNorm2d(4, activation="relu", **options),
        torch.nn.Conv2d(4, 2, 1),
        fbt.BatchNorm2d(2, **options),
    ).double()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"nonfinite": "skip"}], ids=str)
def test_checkpointing_updates_once(
    reentrant: bool, early_stop: bool, options: dict[str, Any], generator: torch.Generator
) -> None:
    net, plain = network(**options), network(**options)
    for _ in range(2):
        values = batch(generator)
        x, x_plain = values.clone().requires_grad_(), values.clone().requires_grad_()
        with set_checkpoint_early_stop(early_stop):
            checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
        plain(x_plain).square().sum().backward()
        assert x.grad.equal(x_plain.grad)
        for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            assert ours.grad.equal(theirs.grad)
        for key, value in plain.state_dict().items():
            assert net.state_dict()[key].equal(value), key
    assert net[1].num_batches_tracked == 2


@pytest.mark.parametrize("options", [{}, {"momentum": None}], ids=str)
def test_selective_checkpointing(options: dict[str, Any], generator: torch.Generator) -> None:
    def policy(context: Any, op: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
        saved = op is torch.ops.aten.convolution.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    net, plain = network(**options), network(**options)
    values = batch(generator)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    checkpoint(net, values, use_reentrant=False, context_fn=contexts).square().sum().backward()
    plain(values).square().sum().backward()
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert_near(ours.grad, theirs.grad, ulps=1000)
    assert_same_state(net, plain)


def test_checkpoints_within_checkpoints(generator: torch.Generator) -> None:
    net = network()

    def inner(x: Tensor) -> Tensor:
        return checkpoint(net[1], net[0](x), use_reentrant=False)

    def outer(x: Tensor) -> Tensor:
        return net[3](net[2](checkpoint(inner, x, use_reentrant=False)))

    x = batch(generator).requires_grad_()
    checkpoint(outer, x, use_reentrant=False).sum().backward()
    assert net[1].num_batches_tracked == net[3].num_batches_tracked == 1


def test_compiled_checkpoints(generator: torch.Generator) -> None:
    torch._dynamo.reset()
    net, plain = network(), network()

    @torch.compile(backend="aot_eager")
    def compiled(x: Tensor) -> Tensor:
        return checkpoint(net, x, use_reentrant=False).square().sum()

    x = batch(generator)
    compiled(x).backward()
    plain(x).square().sum().backward()
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert_near(ours.grad, theirs.grad, ulps=1000)
    assert_same_state(net, plain)


# --- compilers, exporters, transforms ---------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "silu"},
        {"momentum": None},
        {"nonfinite": "skip"},
        {"track_running_stats": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_compiled_into_one_graph(
    options: dict[str, Any], training: bool, generator: torch.Generator
) -> None:
    torch._dynamo.reset()
    module = fbt.BatchNorm2d(3, dtype=torch.float64, **options).train(training)
    plain = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x, dy = batch(generator), batch(generator)
        for actual, expected in zip(step(compiled, x, dy), step(plain, x, dy), strict=True):
            assert_near(actual, expected)
        assert_same_state(module, plain)


@pytest.mark.parametrize("training", [True, False])
def test_exported(training: bool, generator: torch.Generator) -> None:
    module = fbt.BatchNorm2d(3, dtype=torch.float64, activation="relu").train(training)
    x = batch(generator)
    program = torch.export.export(module, (x,))
    exported = program.module()
    assert exported(x).equal(module(x))
    assert_same_state(exported, module)


def test_a_node_of_torch_fx(generator: torch.Generator) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = fbt.BatchNorm2d(3, dtype=torch.float64)

        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return self.norm(self.norm(x, x, activation="relu", weights=w))

    block = Block()
    traced = torch.fx.symbolic_trace(copy.deepcopy(block))
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
    x, w = batch(generator), torch.tensor([1.0, 0, 2, 0]).reshape(4, 1, 1)
    assert traced(x, w).equal(block(x, w))
    assert_same_state(traced, block)


def test_functional_call(generator: torch.Generator) -> None:
    module = fbt.BatchNorm2d(3, dtype=torch.float64)
    before = copy.deepcopy(module.state_dict())
    state = {key: value.clone() for key, value in module.state_dict().items()}
    state["weight"] += 1
    x = batch(generator)
    y = torch.func.functional_call(module, state, (x,))
    assert all(value.equal(before[key]) for key, value in module.state_dict().items())
    assert state["num_batches_tracked"] == 1
    assert_near(y, 2 * module(x))
    assert state["running_var"].equal(module.running_var)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"nonfinite": "skip"}], ids=str)
def test_an_ensemble(options: dict[str, Any], training: bool, generator: torch.Generator) -> None:
    modules = [fbt.BatchNorm2d(3, dtype=torch.float64, **options).train(training) for _ in range(2)]
    for module in modules:
        randomize(module, generator)
    state = torch.func.stack_module_state(modules)
    shell = copy.deepcopy(modules[0])

    def call(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(shell, (parameters, buffers), (x,))

    x = batch(generator, (2, 4, 3, 5, 2))
    found = torch.func.vmap(call)(*state, x)
    for i, module in enumerate(modules):
        assert_near(found[i], module(x[i]))
        for name, buffer in module.named_buffers():
            assert_near(state[1][name][i].double(), buffer.double())


def test_gradients_by_functional_call(generator: torch.Generator) -> None:
    module = fbt.BatchNorm2d(3, dtype=torch.float64, activation="silu")
    x = batch(generator)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        return torch.func.functional_call(module, (parameters, buffers), (x,)).square().sum()

    found = torch.func.grad(loss)(dict(module.named_parameters()))
    loss(dict(module.named_parameters())).backward()
    for name, parameter in module.named_parameters():
        assert_near(found[name], parameter.grad)


# --- copies and files -------------------------------------------------------------------------


def saved(module: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), saved],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies(
    copied: Callable[[torch.nn.Module], torch.nn.Module], generator: torch.Generator
) -> None:
    module = fbt.BatchNorm2d(3, activation="gelu", correction=0, axis=-1, nonfinite="skip")
    x = batch(generator).movedim(1, -1).float()
    module(x)
    other = copied(module)
    assert repr(other) == repr(module)
    assert other(x).equal(module(x))
    assert_same_state(other, module.double())


def test_state_dicts_survive_files(generator: torch.Generator) -> None:
    module = fbt.BatchNorm2d(3)
    module(batch(generator).float())
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = torch.nn.BatchNorm2d(3)
    loaded.load_state_dict(torch.load(file))
    assert loaded.running_mean.equal(module.running_mean)


class Normalized(Dataset[Tensor]):
    """Batches that the worker normalizes, as some do who preprocess with a network."""

    def __init__(self) -> None:
        self.module = fbt.BatchNorm2d(3)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        x = torch.full((64, 3, 32, 32), float(i))
        x[:32] += 2
        return self.module(x).detach()[::32]


def test_workers_that_fork() -> None:
    dataset = Normalized()
    dataset[0]  # threads have been started before
    found = torch.cat(list(DataLoader(dataset, num_workers=2, multiprocessing_context="fork")))
    assert_near(found[:, 0], torch.ones(4, 3, 32, 32).double())
    assert_near(found[:, 1], -torch.ones(4, 3, 32, 32).double())
