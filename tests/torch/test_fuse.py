"""`fuse`, `unfuse` and `explain`: the same numbers from the same model, whatever is done with it."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusebn.torch as fbt
from fusebn.torch import _folding, modules
from networks import NETWORKS, BasicBlock, DenseLayer, Flagged, convolution, network


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
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


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
    model, x = network(name)
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
