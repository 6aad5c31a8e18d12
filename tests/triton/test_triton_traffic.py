"""How often each element of each tensor goes over the bus, which is what a GPU's time is made of.

One launch touches everything once. Two launches read x twice forward; backward they read x twice,
and dy, or what the first has made of it.
"""

import pytest
import torch
from interpreted import fused, traffic, verbs

import cases

HELD = [(150, 64, 1), (300, 128, 1)]
NOT_HELD = [(400, 64, 1), (90, 3, 1), (24, 7, 49), (3, 3, 1100)]
EXACT, ROUNDED = "relu", "silu"  # what 16 bits hold of g is g, or is not
LOADED, TWICE, STORED, BOTH = (1, 0), (2, 0), (0, 1), (1, 1)


def large(block, dtype):
    return torch.from_numpy(cases.make("standard_normal", block, cases.FLOAT32).copy()).to(dtype)


def assert_traffic(tensors, counted, expected):
    for name, of in zip(tensors, counted, strict=True):
        loads, stores = expected[name]
        assert (of.loads == loads).all(), name
        assert (of.stores == stores).all(), name


def step(block, dtype, activation, residual, training=True):
    """Return what forward and gradient touch, by the names of the tensors."""
    made = {name: large(block, dtype) for name in ("x", "dy", "y", "dx", "residual", "dresidual")}
    names = ("residual",) if residual else ()
    of = verbs.Normalization(
        None, None, made["residual"] if residual else None, None, activation, 1e-3, training
    )
    channels = block[1]
    given = None if training else (torch.zeros(channels), torch.ones(channels))
    returned = verbs.Returned(None, None, *torch.empty(2, channels), 1.0, 1.0)
    view = verbs.Block(*block)
    forward = {name: made[name] for name in ("x", "y", *names)}
    with traffic(*forward.values()) as forward_counts:
        statistics = fused.forward(made["x"], view, of, given, returned, made["y"])
    names = ("residual", "dresidual") if residual else ()
    backward = {name: made[name] for name in ("dy", "x", "dx", *names)}
    vectors = torch.empty(2, channels)
    with traffic(*backward.values()) as backward_counts:
        fused.gradient(
            made["dy"], made["x"], view, of, statistics, verbs.Flowing(None, None, 1.0, 1.0),
            made["dx"], made["dresidual"] if residual else None, *vectors, None,
        )  # fmt: skip
    return (forward, forward_counts), (backward, backward_counts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("block", HELD, ids=str)
def test_one_launch_touches_everything_once(block, dtype, residual):
    forward, backward = step(block, dtype, EXACT, residual)
    assert_traffic(*forward, {"x": LOADED, "residual": LOADED, "y": STORED})
    expected = {"dy": LOADED, "x": LOADED, "residual": LOADED, "dx": STORED, "dresidual": STORED}
    assert_traffic(*backward, expected)


@pytest.mark.parametrize("block", NOT_HELD, ids=str)
def test_two_launches_read_twice(block, monkeypatch):
    monkeypatch.setenv("FUSEBN_GPU_PERSISTENT", "0")
    forward, backward = step(block, torch.bfloat16, EXACT, residual=False)
    assert_traffic(*forward, {"x": TWICE, "y": STORED})
    assert_traffic(*backward, {"dy": TWICE, "x": TWICE, "dx": STORED})


@pytest.mark.parametrize("activation", [EXACT, ROUNDED])
@pytest.mark.parametrize("block", NOT_HELD[:3], ids=str)
def test_two_launches_with_a_residual(block, activation, monkeypatch):
    """Where g is exact in 16 bits the second launch reads it, not dy and the residual."""
    monkeypatch.setenv("FUSEBN_GPU_PERSISTENT", "0")
    forward, backward = step(block, torch.bfloat16, activation, residual=True)
    assert_traffic(*forward, {"x": TWICE, "residual": LOADED, "y": STORED})
    expected = {"x": TWICE, "dx": STORED} | (
        {"dy": LOADED, "residual": LOADED, "dresidual": BOTH}
        if activation == EXACT
        else {"dy": TWICE, "residual": TWICE, "dresidual": STORED}
    )
    assert_traffic(*backward, expected)


@pytest.mark.parametrize("block", NOT_HELD, ids=str)
def test_evaluation_reads_once(block):
    forward, _ = step(block, torch.bfloat16, EXACT, residual=True, training=False)
    assert_traffic(*forward, {"x": LOADED, "residual": LOADED, "y": STORED})


def test_what_is_outside_of_all_tensors_is_not_touched():
    """The watch sees one element too many."""
    view = verbs.Block(40, 3, 1)
    statistics = verbs.Statistics(torch.ones((), dtype=torch.float64), torch.ones(2, 3).double())
    of = verbs.Normalization(None, None, None, None, "identity", 1e-3, True)
    x, y = torch.zeros(2, 120)
    with pytest.raises(Exception, match="1 addresses of no tensor that was given"):
        verbs.normalize(x[:119], y, view, statistics, of)
