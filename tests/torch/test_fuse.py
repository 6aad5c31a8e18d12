"""`fuse`, `unfuse`, `explain`: the same numbers from the same model, whatever is done with it."""

from __future__ import annotations

import copy
import doctest
import io
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, BasicBlock, DenseLayer, convolution, network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusebn.torch as fbt
from fusebn.torch import modules
from fusebn.torch._kernels import POOLED

SLOPE = 0.5  # a test changes it


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run in one thread: the networks are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- how two models are compared ----


def step(model: nn.Module, x: Tensor, training: bool = True) -> list[Tensor]:
    """Return all that one step of a model makes: y, the gradients, and the buffers after it."""
    model.train(training).zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(0)
    y = model(x)
    torch.manual_seed(1)
    y.backward(torch.randn_like(y))
    gradients = [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    return [y.detach(), *gradients, *model.buffers()]


def assert_equal(actual: list[Tensor], expected: list[Tensor], ulps: float = 256) -> None:
    """Assert equality to rounding, beside the greatest element of each tensor."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        eps = torch.finfo(e.dtype).eps if e.is_floating_point() else 0
        error, size = (a - e).abs().max(), 1 + e.abs().max()
        assert error <= ulps * eps * size, f"{error} of {size}"


def assert_same_model(fused: nn.Module, plain: nn.Module, x: Tensor) -> None:
    for training in (True, False, True):
        assert_equal(step(fused, x, training), step(plain, x, training))


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a fused network, the same as it was, and an input."""
    model, x = network(name)
    return fbt.fuse(copy.deepcopy(model)), model, x


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool, str | None]]]:
    """Collect residual and activation of each batch norm that runs with either."""
    calls = []
    forward = modules.Extended.forward

    def counting(self: Any, input: Any, residual: Any = None, **options: Any) -> Any:
        activation = options.get("activation")
        if residual is not None or isinstance(activation, str):
            calls.append((residual is not None, activation))
        return forward(self, input, residual, **options)

    with monkeypatch.context() as patch:
        patch.setattr(modules.Extended, "forward", counting)
        yield calls


def only_row(model: nn.Module) -> Any:
    (row,) = fbt.explain(model)
    return row


# ---- architectures ----

# How many batch norms of a network are called with (residual, activation).
EXPECTED = {
    "resnet, basic": {(False, "relu"): 5, (True, "relu"): 4},
    "resnet, bottleneck": {(False, "relu"): 9, (True, "relu"): 4},
    "resnet, functional": {(False, "relu"): 5, (True, "relu"): 4},
    "pre-activation": {(False, "relu"): 4},
    "densenet": {(False, "relu"): 10},
    "mobilenet": {(False, "relu6"): 7, (True, None): 2},
    "efficientnet": {(False, "silu"): 6, (True, None): 1},
    "u-net": {(False, "leaky_relu"): 5, (False, "gelu"): 5},
    "timm": {(True, "relu"): 2},  # and two more through the function
    "mlp": {(False, "relu"): 1},
    "dynamic": {(False, "relu"): 1},
    "flagged": {(False, "relu"): 1},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fused_network_computes_the_same(name, monkeypatch):
    fused, plain, x = pair(name)
    assert_same_model(fused, plain, x)
    with counted(monkeypatch) as calls:
        step(fused, x)
    assert {call: calls.count(call) for call in calls} == EXPECTED[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_only_classes_change(name):
    model, _ = network(name)
    before = {key: (value, value.training) for key, value in model.named_modules()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    states = random.getstate(), torch.get_rng_state()
    values = copy.deepcopy(model.state_dict())
    shown = repr(model)
    assert fbt.fuse(model) is model
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert repr(model) == shown
    after = {key: (value, value.training) for key, value in model.named_modules()}
    assert after == before
    kept = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert kept.keys() == tensors.keys()
    assert all(kept[key] is tensors[key] for key in tensors)
    assert model.state_dict().keys() == values.keys()
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_unfuse_gives_back_every_class_and_keeps_what_was_learned(name):
    fused, plain, x = pair(name)
    classes = [type(module) for module in plain.modules()]
    assert [type(module) for module in fused.modules()] != classes
    step(fused, x)
    learned = copy.deepcopy(fused.state_dict())
    assert fbt.unfuse(fused) is fused
    assert [type(module) for module in fused.modules()] == classes
    for module, before in zip(fused.modules(), plain.modules(), strict=True):
        assert vars(module).keys() == vars(before).keys()
    assert all(torch.equal(value, learned[key]) for key, value in fused.state_dict().items())


def test_unfuse_leaves_ours_ours():
    ours = fbt.BatchNorm1d(4, correction=0)
    model = nn.Sequential(ours, nn.ReLU())
    assert only_row(fbt.fuse(model)).activation == "relu"
    assert type(fbt.unfuse(model)[0]) is fbt.BatchNorm1d
    assert ours.correction == 0


def test_unfuse_leaves_what_is_frozen():
    model = fbt.fuse(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4)))
    model[0].freeze()
    fbt.unfuse(model.train())(torch.randn(8, 4))
    assert [type(model[i]) for i in (0, 2)] == [fbt.BatchNorm1d, nn.BatchNorm1d]
    assert not model[0].running_mean.any()
    assert model[2].running_mean.any()


def test_arguments_by_keyword(monkeypatch):
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
            return F.relu(self.bn(x) + y) * scale

    plain = Added().eval()
    fused = fbt.fuse(copy.deepcopy(plain))
    x, y = torch.randn(2, 8, 4)
    for args, kwargs, folds in (
        ((x,), {"y": y}, True),
        ((), {"y": y, "x": x}, True),
        ((x,), {"y": y, "scale": 2.0}, False),
        ((x, y), {"scale": 1.0}, False),
    ):
        with counted(monkeypatch) as calls:
            torch.testing.assert_close(fused(*args, **kwargs), plain(*args, **kwargs))
        assert any(residual for residual, _ in calls) is folds
    for model in (fused, plain):
        with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
            model(x, z=y)
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
            model(y=y)


def test_fusing_twice_is_fusing_once(monkeypatch):
    fused, plain, x = pair("resnet, basic")
    classes = [type(module) for module in fused.modules()]
    assert [type(module) for module in fbt.fuse(fused).modules()] == classes
    with counted(monkeypatch) as calls:
        assert_equal(step(fused, x), step(plain, x))
    assert len(calls) == 9
    fbt.unfuse(fused)
    assert [type(module) for module in fused.modules()] == [type(m) for m in plain.modules()]


def test_a_batch_norm_by_itself():
    norm = nn.BatchNorm2d(3)
    assert type(fbt.fuse(norm)) is fbt.BatchNorm2d
    assert str(fbt.explain(norm)).splitlines()[2].startswith("(itself)    BatchNorm2d  nothing")
    assert type(fbt.unfuse(norm)) is nn.BatchNorm2d


@pytest.mark.parametrize("function", [fbt.fuse, fbt.unfuse, fbt.explain])
def test_a_model_is_a_module(function):
    message = rf"^{function.__name__}: `model` must be a torch.nn.Module; got int\.$"
    with pytest.raises(TypeError, match=message):
        function(3)


# ---- patterns ----


class Around(nn.Module):
    """A batch norm of a convolution, and a function of both and of an input."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        self.conv = convolution(3, 3)
        self.bn = nn.BatchNorm2d(3)
        for name, child in children.items():
            setattr(self, name, child)


def around(forward: Callable[..., Any], **children: nn.Module) -> tuple[Any, Any, Tensor]:
    """Return a module with that forward, fused and plain, and an input."""
    kind = type("Case", (Around,), {"forward": forward, "__module__": __name__})
    globals()["Case"] = kind  # where pickle looks for it
    torch.manual_seed(3)
    plain = kind(**children).double()
    with torch.no_grad():
        plain.bn.weight.uniform_(0.5, 2)
        plain.bn.bias.normal_()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    return fbt.fuse(copy.deepcopy(plain)), plain, x


FOLDED: dict[str, tuple[Callable[..., Any], bool, str | None]] = {
    "relu": (lambda s, x: F.relu(s.bn(x)), False, "relu"),
    "relu in place": (lambda s, x: F.relu(s.bn(x), inplace=True), False, "relu"),
    "relu_": (lambda s, x: torch.relu_(s.bn(x)), False, "relu"),
    "torch.relu": (lambda s, x: torch.relu(s.bn(x)), False, "relu"),
    ".relu": (lambda s, x: s.bn(x).relu(), False, "relu"),
    ".relu_": (lambda s, x: s.bn(x).relu_(), False, "relu"),
    "relu6": (lambda s, x: F.relu6(s.bn(x)), False, "relu6"),
    "hardtanh": (lambda s, x: F.hardtanh(s.bn(x), 0, 6), False, "relu6"),
    "leaky_relu": (lambda s, x: F.leaky_relu(s.bn(x)), False, "leaky_relu"),
    "silu": (lambda s, x: F.silu(s.bn(x), inplace=True), False, "silu"),
    "gelu": (lambda s, x: F.gelu(s.bn(x)), False, "gelu"),
    "add": (lambda s, x: s.bn(x) + x, True, None),
    "add, left": (lambda s, x: x + s.bn(x), True, None),
    "torch.add": (lambda s, x: torch.add(x, s.bn(x)).relu(), True, "relu"),
    ".add": (lambda s, x: F.gelu(s.bn(x).add(x)), True, "gelu"),
    ".add_": (lambda s, x: F.silu(s.bn(x).add_(x)), True, "silu"),
    "two": (lambda s, x: F.relu(s.bn(x) + s.conv(x) + x), True, None),
    "residual also elsewhere": (
        lambda s, x: (lambda y: torch.cat([s.bn(y).add(y).relu(), torch.flatten(y, 0, 0)]))(
            s.conv(x)
        ),
        True,
        "relu",
    ),
    "past other functions": (
        lambda s, x: F.relu((lambda y, z: y + z)(s.bn(x), torch.cat([x[:2], x[2:]]) * 2)),
        True,
        "relu",
    ),
    "past a child that writes elsewhere": (
        lambda s, x: s.bn(s.conv(x)) + s.act(x * 1),
        True,
        None,
    ),
    "residual first": (lambda s, x: F.relu(s.conv(x).tanh() + s.bn(x)), True, "relu"),
}


@pytest.mark.parametrize("case", FOLDED)
def test_what_is_folded(case):
    forward, residual, activation = FOLDED[case]
    fused, plain, x = around(forward, act=nn.ReLU(inplace=True))
    assert_same_model(fused, plain, x)
    row = only_row(fused)
    assert (row.residual, row.activation) == (residual, activation)


MODULES = {
    "relu": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(),
    "silu": nn.SiLU(inplace=True),
    "gelu": nn.GELU(),
}


@pytest.mark.parametrize("name", [*MODULES, "hardtanh"])
def test_activation_modules(name):
    act = MODULES.get(name, nn.Hardtanh(0, 6))
    fused, plain, x = around(lambda s, x: s.act(s.bn(x) + x), act=act)
    assert_same_model(fused, plain, x)
    assert only_row(fused)[3:5] == (True, {"hardtanh": "relu6"}.get(name, name))


def keeps_the_other_name(self: Any, x: Tensor) -> Tensor:
    first = second = self.conv(x)
    second += self.bn(x)
    return first * 2


def reads_its_average(self: Any, x: Tensor) -> Tensor:
    y = self.bn(x)
    mean = self.bn.running_mean.sum()
    return y + self.conv(x) * mean


def changes_the_residual(self: Any, x: Tensor) -> Tensor:
    identity = x * 1
    y = self.bn(x) + identity
    identity.mul_(3)
    return F.relu(y) + identity


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y


# (forward, what is folded nevertheless, reason)
UNFOLDED: dict[str, tuple[Callable[..., Any], tuple[bool, str | None], str]] = {
    "slope": (lambda s, x: F.leaky_relu(s.bn(x), 0.2), (False, None), "leaky_relu follows"),
    "tanh approximation": (
        lambda s, x: F.gelu(s.bn(x), approximate="tanh"),
        (False, None),
        "gelu follows",
    ),
    "hardtanh": (lambda s, x: F.hardtanh(s.bn(x)), (False, None), "hardtanh follows"),
    "alpha": (lambda s, x: torch.add(s.bn(x), x, alpha=2), (False, None), "add follows"),
    "a child of that name": (
        lambda s, x: F.relu(s.add(s.bn(x), x)),
        (False, None),
        "Add 'add' follows",
    ),
    "number": (lambda s, x: s.bn(x) + 1.0, (False, None), "no other tensor"),
    "itself": (lambda s, x: (lambda y: y + y)(s.bn(x)), (False, None), "no other tensor"),
    "used twice": (
        lambda s, x: (lambda y: F.relu(y) + y)(s.bn(x)),
        (False, None),
        "used more than once",
    ),
    "sum used twice": (
        lambda s, x: (lambda y: F.relu(y) + y)(s.bn(x) + x),
        (True, None),
        "used more than once",
    ),
    "in place, twice": (
        lambda s, x: (lambda y: (y.relu_(), y)[1])(s.bn(x)),
        (False, None),
        "used more than once",
    ),
    "other in place": (keeps_the_other_name, (False, None), "in place to another tensor"),
    "changed input": (
        lambda s, x: (lambda z: s.bn(z) + F.relu(z, inplace=True))(x * 1),
        (False, None),
        "relu might change its input before the sum",
    ),
    "changed by another name": (
        lambda s, x: (lambda w: s.bn(w.view(4, 3, 5, 5)) + F.relu(w, inplace=True))(x * 1),
        (False, None),
        "relu might change its input before the sum",
    ),
    "changed by a child": (
        lambda s, x: (lambda z: s.bn(z) + s.act(z))(x * 1),
        (False, None),
        "ReLU 'act' might change its input before the sum",
    ),
    "called again": (
        lambda s, x: s.bn(x) + s.bn(s.conv(x)),
        (True, None),
        "end of forward",
    ),
    "average": (reads_its_average, (False, None), "parameters are read before"),
    "changed residual": (changes_the_residual, (False, None), "change its residual after"),
    "more arguments": (lambda s, x: F.relu(s.bn(input=x)), (False, None), "more than its input"),
}


@pytest.mark.parametrize("case", UNFOLDED)
def test_what_is_not_folded(case):
    forward, folded, reason = UNFOLDED[case]
    fused, plain, x = around(forward, act=nn.ReLU(inplace=True), add=Add())
    if "changed" in case:
        # Autograd does not allow it, of the original either.
        fused, plain = fused.requires_grad_(False), plain.requires_grad_(False)
        for training in (True, False):
            assert_equal([fused.train(training)(x)], [plain.train(training)(x)])
    else:
        assert_same_model(fused, plain, x)
    (row, *_) = fbt.explain(fused)
    assert (row.residual, row.activation) == folded
    assert reason in row.reason


@pytest.mark.parametrize(
    "residual",
    [
        torch.full((3, 1, 1), 0.5, dtype=torch.float64),
        torch.full((2, 4, 3, 5, 5), 0.5, dtype=torch.float64),
        torch.full((4, 3, 5, 5), 0.5, dtype=torch.complex128),
        0.5,
    ],
    ids=["broadcasts", "is broadcast to", "promotes", "is a number"],
)
def test_a_residual_of_another_kind_is_added_as_it_was(residual, monkeypatch):
    fused, plain, x = around(lambda s, x, r: s.bn(x) + r)
    assert only_row(fused).residual
    with counted(monkeypatch) as calls:
        actual, expected = fused(x, residual), plain(x, residual)
    assert not calls
    assert_equal([actual.abs()], [expected.abs()])
    assert actual.dtype == expected.dtype


def test_what_a_batch_norm_returns_may_be_changed_in_place():
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.bn(x)
        y *= 2
        return y.relu_() + self.bn(x)

    fused, plain, _ = around(forward)
    x = torch.randn(2, 3, 420, 420, dtype=torch.float64)
    assert x.numel() * x.element_size() > POOLED
    assert_equal(step(fused, x), step(plain, x), ulps=4096)


def test_a_sum_in_place_keeps_its_error():
    def forward(self: Any, x: Tensor, residual: Tensor) -> Tensor:
        y = self.bn(x)
        y += residual
        return y

    fused, plain, x = around(forward)
    for model in fused, plain:
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            model(x, x[None])


# ---- a model that changes after it was fused ----


def test_an_attribute_may_change():
    fused, plain, x = pair("flagged")
    for activate in (False, True, False):
        fused.activate = plain.activate = activate
        assert_same_model(fused, plain, x)


def test_a_global_may_change(monkeypatch):
    fused, plain, x = around(lambda s, x: F.relu(s.bn(x)) * SLOPE)
    assert only_row(fused).activation == "relu"
    monkeypatch.setitem(globals(), "SLOPE", 3.0)
    assert_same_model(fused, plain, x)


def test_a_layer_is_fused_for_tensors_and_for_lists(monkeypatch):
    plain = DenseLayer(6, 2).double()
    fused = fbt.fuse(copy.deepcopy(plain))
    x = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    for argument in (x, [x[:, :2], x[:, 2:]]):
        with counted(monkeypatch) as calls:
            assert_equal([fused(argument)], [plain(argument)])
        assert len(calls) == 2
    fused.drop_rate = plain.drop_rate = 0.5
    again = "forward of the model met other attributes or children: fuse again"
    assert [row.reason for row in fbt.explain(fused)] == [again] * 2
    with counted(monkeypatch) as calls:
        assert_same_model(fused, plain, x)
    assert not calls
    fbt.fuse(fused)
    with counted(monkeypatch) as calls:
        assert_same_model(fused, plain, x)
    assert len(calls) == 6


def test_an_attribute_of_the_class_may_change():
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.bn(x))
        return y * self.factor if self.factor else y

    fused, plain, x = around(forward)
    type(plain).factor = 0.0
    fbt.fuse(fused)
    assert only_row(fused).activation == "relu"
    fused.factor = plain.factor = 2.0
    assert_same_model(fused, plain, x)
    del fused.factor, plain.factor
    type(plain).factor = 3.0
    assert_same_model(fused, plain, x)


def test_a_forward_may_be_exchanged_in_its_class():
    fused, plain, x = around(lambda s, x: F.relu(s.bn(x)))
    type(plain).forward = lambda s, x: F.relu6(s.bn(x) * 2)
    assert_same_model(fused, plain, x)
    fbt.fuse(fused)
    assert_same_model(fused, plain, x)
    fbt.unfuse(fused)
    assert type(fused) is type(plain)


def test_a_closure_may_change():
    factors = [1.0]
    fused, plain, x = around(lambda s, x: F.relu(s.bn(x)) * factors[0])
    assert "it reads 'factors', a list" in only_row(fused).reason
    factors[0] = 2.0
    assert_same_model(fused, plain, x)


def exchange(model: Any) -> None:
    model.act = nn.Tanh()


def exchange_quietly(model: Any) -> None:
    model._modules["act"] = nn.SiLU()


def retune(model: Any) -> None:
    model.act = nn.LeakyReLU()
    model.act.negative_slope = 0.3


def retune_in_place(model: Any) -> None:
    model.leaky.negative_slope = 0.3


def lose(model: Any) -> None:
    model.bn = nn.Identity()


def close(model: Any) -> None:
    model.bn.eval()


def give_own_activation(model: Any) -> None:
    model.bn.activation = "silu"


def unfuse_a_part(model: Any) -> None:
    fbt.unfuse(model.bn)


CHANGES = (exchange, exchange_quietly, retune, retune_in_place, lose, close, unfuse_a_part)


@pytest.mark.parametrize("change", CHANGES)
def test_a_child_may_change(change):
    fused, plain, x = around(
        lambda s, x: s.leaky(s.bn(s.act(s.bn(s.conv(x)))) + x),
        act=nn.ReLU(inplace=True),
        leaky=nn.LeakyReLU(),
    )
    assert [row.activation for row in fbt.explain(fused)] == ["relu", "leaky_relu"]
    change(fused)
    if change is not unfuse_a_part:
        change(plain)
    assert_same_model(fused, plain, x)


def test_a_batch_norm_may_get_an_activation_of_its_own():
    fused, plain, x = around(lambda s, x: F.relu(s.bn(x)))
    fused.bn.activation = "silu"
    expected = F.relu(F.silu(plain.bn(x)))
    assert_equal([fused(x)], [expected])
    assert only_row(fbt.fuse(fused)).reason == "it has an activation already, silu"
    assert_equal([fused(x)], [expected])


def test_containers_may_grow():
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.BatchNorm1d(4), nn.ReLU()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    x = torch.randn(6, 4, dtype=torch.float64)
    plain = Chain().double()
    fused = fbt.fuse(copy.deepcopy(plain))
    assert only_row(fused).activation == "relu"
    for model in fused, plain:
        model.layers.append(nn.Softplus())
    assert_same_model(fused, plain, x)


def test_sequentials_stay_sequentials():
    plain = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    fused = fbt.fuse(copy.deepcopy(plain))
    x = torch.randn(6, 4, dtype=torch.float64)
    assert isinstance(fused, nn.Sequential)
    assert [type(child) for child in fused] == [fbt.BatchNorm1d, nn.ReLU, nn.Linear]
    assert_equal([fused[:2](x)], [plain[:2](x)])
    for model in fused, plain:
        model.append(nn.Softplus())
        model[1] = nn.Tanh()
    assert len(fused) == 4
    assert_same_model(fused, plain, x)
    assert only_row(fused).reason == "Tanh '1' follows"


# ---- hooks ----


def heard(model: nn.Module, name: str, x: Tensor, kind: str) -> list[Tensor]:
    """Return what a hook hears in one step of a model."""
    values: list[Tensor] = []

    def hook(_: nn.Module, *parts: Any) -> None:
        values.extend(
            t.clone() for part in parts for t in ([part] if isinstance(part, Tensor) else part)
        )

    handle = getattr(model.get_submodule(name), kind)(hook)
    step(model, x)
    handle.remove()
    return values


HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", ["bn", "act", "conv", ""])
def test_a_hook_hears_what_it_heard(name, kind, monkeypatch):
    fused, plain, x = around(lambda s, x: s.act(s.bn(s.conv(x)) + x), act=nn.ReLU())
    assert_equal(heard(fused, name, x, kind), heard(plain, name, x, kind))
    with counted(monkeypatch) as calls:
        assert_equal(step(fused, x), step(plain, x))
    assert calls == [(True, "relu")]


def test_a_hook_of_all_modules_hears_every_module():
    fused, plain, x = pair("resnet, basic")
    names: dict[nn.Module, list[str]] = {fused: [], plain: []}
    for model, called in names.items():
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_, called=called: called.append(type(module).__name__)
        )
        step(model, x)
        handle.remove()
    assert sorted(names[fused]) == sorted(names[plain])
    assert names[plain].count("ReLU") == 9


def test_a_hook_of_a_sequential_whose_end_is_folded():
    fused, plain, x = pair("mobilenet")
    kind = "register_forward_hook"
    assert_equal(heard(fused, "1.conv", x, kind), heard(plain, "1.conv", x, kind))


def test_hooks_from_before():
    plain = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4), nn.ReLU())
    plain[1].register_forward_hook(lambda *_: None)
    plain[2].register_forward_hook(lambda *_: None)
    reasons = [row.reason for row in fbt.explain(fbt.fuse(plain))]
    assert reasons == [
        "'1' has hooks, which would not run",
        "it has hooks, which would see other values",
    ]


# ---- what is shared ----


def test_a_batch_norm_and_a_block_used_twice():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = BasicBlock(3, 3, 1, None)
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn(x))
            x = self.block(self.block(x))
            return self.bn(x) + self.bn(x * 2)

    torch.manual_seed(0)
    plain = Shared().double()
    fused = fbt.fuse(copy.deepcopy(plain))
    assert_same_model(fused, plain, torch.randn(4, 3, 5, 5, dtype=torch.float64))
    rows = [(row.residual, row.activation) for row in fbt.explain(fused) if row.name == "bn"]
    # Of the two in the sum one is folded.
    assert rows == [(False, "relu"), (True, None), (False, None)]


# ---- copies ----


def by_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_save(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_save])
@pytest.mark.parametrize("name", ["resnet, basic", "mobilenet", "densenet", "flagged"])
def test_copies_are_fused_and_their_own(name, copied, monkeypatch):
    fused, plain, x = pair(name)
    other = copied(fused)
    before = step(copy.deepcopy(plain), x)
    with counted(monkeypatch) as calls:
        assert_equal(step(other, x), before)
    assert {call: calls.count(call) for call in calls} == EXPECTED[name]
    assert_equal(step(fused, x), before)
    fbt.unfuse(other)
    assert [type(module) for module in other.modules()] == [type(m) for m in plain.modules()]


def test_state_dicts_go_both_ways():
    fused, plain, x = pair("resnet, basic")
    step(fused, x)
    plain.load_state_dict(fused.state_dict())
    assert_same_model(fused, plain, x)
    step(plain, x)
    fused.load_state_dict(plain.state_dict())
    assert_same_model(fused, plain, x)


def test_an_optimizer_from_before():
    model, x = network("resnet, basic")
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1, momentum=0.9) for each in (model, plain)]
    fbt.fuse(model)
    for _ in range(3):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            step(each, x)
            optimizer.step()
    assert_equal([*model.state_dict().values()], [*plain.state_dict().values()], ulps=4096)


# ---- what is put around a model ----


@pytest.mark.parametrize("name", ["resnet, bottleneck", "mobilenet", "densenet"])
def test_compile(name):
    fused, plain, x = pair(name)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        assert_equal(step(compiled, x, training), step(plain, x, training))


def test_export():
    fused, plain, x = pair("resnet, basic")
    program = torch.export.export(fused.eval(), (x,))
    assert_equal([program.module()(x)], [plain.eval()(x)])
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("fusebn.batch_norm.default") == 11
    assert not any("relu" in target or "add" in target for target in targets)


def test_distributed_data_parallel(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fused, plain, x = pair("resnet, basic")
        wrapped = nn.parallel.DistributedDataParallel(fused)
        assert_equal(step(wrapped, x), step(plain, x))
    finally:
        torch.distributed.destroy_process_group()


def test_checkpointing_counts_a_batch_once():
    fused, plain, x = pair("resnet, basic")
    x = x.requires_grad_()
    expected, actual = plain(x), checkpoint(fused, x, use_reentrant=False)
    for y in (expected, actual):
        y.sum().backward()
    assert_equal([actual.detach(), *fused.buffers()], [expected.detach(), *plain.buffers()])


def test_functional_call():
    fused, plain, x = pair("resnet, basic")
    state = {key: value * 0.9 for key, value in plain.eval().state_dict().items()}
    fused.eval()
    actual, expected = (torch.func.functional_call(m, state, (x,)) for m in (fused, plain))
    assert_equal([actual], [expected])


def test_autocast():
    fused, plain, x = pair("resnet, basic")
    x = x.float()
    fused, plain = fused.float(), plain.float()
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = fused(x), plain(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert_equal([actual], [expected], ulps=16)


def test_a_forward_of_more_arguments():
    def forward(self: Any, x: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return F.relu(self.bn(x)) * scale + shift

    fused, plain, x = around(forward)
    for args, options in [((x,), {}), ((x, 2.0), {}), ((x,), {"shift": 1.0})]:
        assert_equal([fused(*args, **options)], [plain(*args, **options)])
    assert_equal([fused(x=x)], [plain(x=x)])


# ---- forwards that no graph can stand for ----


def by_value(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(x)) if x.sum() > 0 else self.bn(x)


def by_shape(self: Any, x: Tensor) -> Tensor:
    assert x.shape[1] == 3
    return F.relu(self.bn(x))


def by_python_chance(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(x)) * random.random()


def by_numpy_chance(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(x)) * np.random.random()  # noqa: NPY002


def by_torch_chance(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(x)) if torch.rand(()) < 0.5 else x


def by_a_new_tensor(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(x)) * torch.full((3, 1, 1), 2.0)


def without_gradient(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = F.relu(self.bn(x))
    return y + x


def without_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.relu(self.bn(x))


def by_grad_mode(self: Any, x: Tensor) -> Tensor:
    y = self.bn(x)
    return F.relu(y) if torch.is_grad_enabled() else y


def through_checkpoint(self: Any, x: Tensor) -> Tensor:
    return F.relu(checkpoint(self.bn, x, use_reentrant=False))


def through_reentrant_checkpoint(self: Any, x: Tensor) -> Tensor:
    return F.relu(checkpoint(self.bn, x, use_reentrant=True))


def counting(self: Any, x: Tensor) -> Tensor:
    self.called = getattr(self, "called", 0) + 1
    return F.relu(self.bn(x)) * self.called


def remembering(self: Any, x: Tensor) -> Tensor:
    self.last = F.relu(self.bn(x))
    return self.last


def reading_a_list(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(x)) * self.factors[0]


def reading_a_global_list(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(x)) * FACTORS[0]


def printing(self: Any, x: Tensor) -> Tensor:
    y = self.bn(x)
    assert f"{y}"
    return F.relu(y)


def by_type(self: Any, x: Tensor) -> Tensor:
    y = self.bn(x)
    return F.relu(y) if isinstance(y, Tensor) else y


def of_all(self: Any, *inputs: Tensor) -> Tensor:
    return F.relu(self.bn(inputs[0]))


def of_a_keyword(self: Any, x: Tensor, *, scale: Any) -> Tensor:
    return F.relu(self.bn(x)) * scale


def through_a_stranger(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(STRANGER(x)))


def through_something_foreign(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(Doubled.apply(x)))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 3 * dy  # unlike the derivative of forward: it must be this that runs


FACTORS = [2.0]
STRANGER = nn.Tanh()
UNTRACED: dict[Any, str] = {
    by_value: "its control flow depends on",
    by_shape: "its control flow depends on",
    by_python_chance: "it draws random numbers itself",
    by_numpy_chance: "it draws random numbers itself",
    by_torch_chance: "it draws random numbers itself",
    by_a_new_tensor: "a tensor that is no parameter, buffer or input",
    without_gradient: "it sets no_grad, autocast, checkpointing",
    without_autocast: "it sets no_grad, autocast, checkpointing",
    by_grad_mode: "depends on more than its input",
    through_checkpoint: "it sets no_grad, autocast, checkpointing",
    through_reentrant_checkpoint: "it sets no_grad, autocast, checkpointing",
    counting: "it sets 'called'",
    remembering: "it sets 'last'",
    reading_a_list: "it reads 'factors', a list",
    reading_a_global_list: "it reads 'FACTORS', a list",
    printing: "it makes text of a tensor",
    by_type: "it asks for the type",
    of_all: "IndexError",
    of_a_keyword: "keyword-only",
    through_a_stranger: "it calls a Tanh that is not among its children",
    through_something_foreign: "it sets no_grad",
}


@pytest.mark.parametrize("forward", UNTRACED, ids=lambda forward: forward.__name__)
def test_what_cannot_be_traced_runs_as_it_did(forward):
    FACTORS[0] = 2.0
    fused, plain, x = around(forward)
    keys = vars(plain).keys()
    for model in fused, plain:
        model.factors = [1.5]
    fbt.fuse(fused)
    assert vars(fused).keys() - {"factors"} == keys - {"factors"}
    assert type(fused.bn) is fbt.BatchNorm2d
    row = only_row(fused)
    assert row[2:5] == (True, False, None)
    assert row.reason.startswith("forward of the model cannot be traced: ")
    assert UNTRACED[forward] in row.reason
    fused.factors[0] = plain.factors[0] = FACTORS[0] = 7.0
    options = {"scale": 2} if forward is of_a_keyword else {}
    for training in (False, True):
        results = []
        for model in fused.train(training), plain.train(training):
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            torch.manual_seed(0)
            inputs = x.clone().requires_grad_()
            y = model(inputs, **options)
            y.square().sum().backward()
            # A recomputation updates nothing of ours, and what is PyTorch's a second time.
            buffers = () if "checkpoint" in forward.__name__ else model.buffers()
            results.append([y.detach(), inputs.grad, *buffers])
        assert_equal(*results)


def test_tracing_leaves_no_trace():
    class Counted(Around):
        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return F.relu(self.bn(x)) * self.count

    plain = Counted().double()
    plain.register_buffer("count", torch.zeros((), dtype=torch.float64))
    fused = fbt.fuse(copy.deepcopy(plain))
    assert only_row(fused).activation == "relu"
    assert fused.count == 0
    assert_same_model(fused, plain, torch.randn(4, 3, 5, 5, dtype=torch.float64))
    assert "isinstance" not in globals()
    assert "__getattribute__" not in vars(nn.Module)


def test_one_mode_may_be_traced_and_the_other_not(monkeypatch):
    def forward(self: Any, x: Tensor) -> Tensor:
        y = F.relu(self.bn(x))
        return y * random.random() if self.training else y

    fused, plain, x = around(forward)
    with counted(monkeypatch) as calls:
        assert_equal([fused.eval()(x)], [plain.eval()(x)])
        fused.train()(x)
    assert calls == [(False, "relu")]
    reason = "not in training: it draws random numbers itself"
    assert only_row(fused).reason == reason


# ---- modules that are left alone ----


class Sub(nn.BatchNorm2d):
    """A batch norm of somebody else."""


def own_forward() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    norm.forward = lambda x: x
    return norm


LEFT = {
    "synchronized": (
        lambda: nn.SyncBatchNorm(3),
        "use fusebn.torch.convert_sync_batchnorm, then fuse",
    ),
    "lazy": (
        nn.LazyBatchNorm2d,
        "it has no channels yet: call the model once, then fuse",
    ),
    "subclass": (lambda: Sub(3), "its class is not PyTorch's own"),
    "own forward": (own_forward, "forward is an attribute of the module itself"),
    "compiled": (
        lambda: torch.compile(nn.Sequential(nn.BatchNorm2d(3)), backend="eager"),
        "it is in a compiled module: fuse before compiling",
    ),
    "quantized": (
        lambda: torch.ao.nn.intrinsic.BNReLU2d(nn.BatchNorm2d(3), nn.ReLU()),
        "it is in a module for quantization",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_alone(case):
    make, reason = LEFT[case]
    model = nn.Sequential(make(), nn.ReLU())
    classes = [type(module) for module in model.modules()]
    fbt.fuse(model)
    assert [type(module) for module in model.modules()] == classes
    row = only_row(model)
    assert row.reason == reason
    assert not row.fused


def test_forwards_that_are_left_alone():
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()))
    parametrized = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())
    parametrized.register_parameter("scale", nn.Parameter(torch.ones(1)))
    nn.utils.parametrize.register_parametrization(parametrized, "scale", nn.Softplus())
    replaced = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())
    replaced.forward = lambda x: x
    reasons = {
        graph: "it is a graph already, of torch.fx",
        parametrized: "it has parametrizations",
        replaced: "forward is an attribute of the module itself",
    }
    for model, reason in reasons.items():
        kind = type(model)
        assert type(fbt.fuse(model)) is kind
        assert only_row(model).reason == f"forward of the model cannot be traced: {reason}"
        row = only_row(model)
        assert row.ours
        assert not row.fused
        assert "nothing" in str(fbt.explain(model))


def test_ours_that_are_synchronized_or_lazy(monkeypatch):
    x = torch.randn(4, 3, 5, 5)
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    for norm in fbt.SyncBatchNorm(3), fbt.LazyBatchNorm2d():
        model = nn.Sequential(norm, nn.ReLU())
        assert_equal([fbt.fuse(model)(x)], [plain(x)])
        with counted(monkeypatch) as calls:
            assert_equal([fbt.fuse(model)(x)], [plain(x)])
        assert calls == [(False, "relu")]
        assert only_row(model).activation == "relu"


def test_a_class_that_takes_no_subclass():
    class Final(nn.Sequential):
        def __init_subclass__(cls) -> None:
            raise TypeError("final")

    plain = Final(nn.BatchNorm1d(4), nn.ReLU()).double()
    fused = fbt.fuse(copy.deepcopy(plain))
    assert type(fused) is Final
    assert type(fused[0]) is fbt.BatchNorm1d
    assert_same_model(fused, plain, torch.randn(6, 4, dtype=torch.float64))
    assert type(fbt.unfuse(fused)[0]) is nn.BatchNorm1d


# ---- the report ----


def test_a_report_is_a_table_and_a_tuple():
    model, _ = network("dynamic")
    report = fbt.explain(model)
    assert report[0] == ("stem.1", "BatchNorm2d", False, False, None, report[0].reason)
    assert str(report) == repr(report)
    head, _, first, _ = str(report).splitlines()
    assert head == "batch norm  class        fused with  not more, because"
    assert first == "stem.1      BatchNorm2d  -           fuse would fold relu into it"
    assert str(fbt.explain(fbt.fuse(model))).splitlines()[2:] == [
        "stem.1      BatchNorm2d  relu",
        "bn          BatchNorm2d  nothing     forward of the model cannot be traced: "
        "its control flow depends on the values or the shape of its input",
    ]


def test_a_report_changes_nothing():
    fused, plain, x = pair("efficientnet")
    states = {key: dict(vars(module)) for key, module in fused.named_modules()}
    fbt.explain(fused)
    assert {key: vars(module) for key, module in fused.named_modules()} == states
    fbt.explain(plain)
    assert_same_model(fused, plain, x)


def test_calls_of_the_function():
    fused, plain, x = pair("timm")
    kinds = [(row.name, row.kind, row.residual, row.activation) for row in fbt.explain(fused)]
    assert kinds[:2] == [
        ("0.bn1", "F.batch_norm", False, "relu"),
        ("0.bn2", "BatchNorm2d", True, "relu"),
    ]
    reasons = [row.reason for row in fbt.explain(plain)]
    assert reasons[0] == "fuse would fold relu into it"
    node = fused(x).grad_fn
    graph = {node}
    while node := next((n for n, _ in node.next_functions if n), None):
        graph.add(node)
    assert not any("Relu" in type(node).__name__ for node in graph)


def batch_norm_of(self: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=self.training)


FUNCTIONS: dict[str, tuple[Callable[..., Any], bool, str | None]] = {
    "alone": (lambda s, x: batch_norm_of(s, x).tanh(), False, None),
    "activation": (lambda s, x: F.silu(batch_norm_of(s, x)), False, "silu"),
    "module": (lambda s, x: s.act(batch_norm_of(s, x)), False, "relu"),
    "residual": (lambda s, x: s.act(batch_norm_of(s, x) + x), True, "relu"),
    "in place": (lambda s, x: batch_norm_of(s, x).add_(x), True, None),
    "broadcasts": (lambda s, x: F.relu(batch_norm_of(s, x) + x[:1]), True, "relu"),
    "past another": (lambda s, x: batch_norm_of(s, x) + s.conv(x), False, None),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_the_function_in_a_forward(case):
    forward, residual, activation = FUNCTIONS[case]
    fused, plain, x = around(forward, act=nn.ReLU())
    assert_same_model(fused, plain, x)
    (row,) = [row for row in fbt.explain(fused) if row.kind == "F.batch_norm"]
    assert row[2:5] == (True, residual, activation)
    hooked = heard(fused, "act", x, "register_forward_hook")
    assert_equal(hooked, heard(plain, "act", x, "register_forward_hook"))


def test_identities_are_no_obstacle_and_keep_their_hooks(monkeypatch):
    fused, plain, x = around(lambda s, x: F.relu(s.drop(s.bn(x))), drop=nn.Identity())
    assert only_row(fused).activation == "relu"
    kind = "register_forward_hook"
    assert_equal(heard(fused, "drop", x, kind), heard(plain, "drop", x, kind))
    assert_same_model(fused, plain, x)
    fused.drop = plain.drop = nn.Softplus()
    assert_same_model(fused, plain, x)


def test_a_parameter_may_come_and_go():
    class Scaled(Around):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter("scale", None)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.bn(x))
            return y if self.scale is None else y * self.scale

    plain = Scaled().double()
    fused = fbt.fuse(copy.deepcopy(plain))
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    assert only_row(fused).activation == "relu"
    for value in (3.0, None):
        for model in fused, plain:
            model.scale = value and nn.Parameter(torch.tensor(value, dtype=torch.float64))
        assert_same_model(fused, plain, x)
        fbt.fuse(fused)


def test_the_examples_run():
    for function in (fbt.fuse, fbt.unfuse, fbt.explain):
        runner = doctest.DocTestRunner()
        for example in doctest.DocTestFinder().find(function, globs={}):
            assert runner.run(example).failed == 0
        assert runner.tries


def test_what_nobody_calls():
    class Unused(Around):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    assert only_row(fbt.fuse(Unused())).reason == "no forward that was traced calls it"
