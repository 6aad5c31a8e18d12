"""`fusebn.torch.FakeQuantize` is NumPy's, bit for bit, and a module."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from tensors import array, tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import cases
import fusebn.torch as fbt
from conftest import Array
from fusebn.quantize import FakeQuantize, Transform

# Ties, both zeros, numbers below the smallest normal one, large and small ones.
FINITE = [0, -0.0, 0.5, -0.5, 1.5, 2.5, -7.0, 3.75, 1e-3, 1e-30, -1e-44, 2e-40, 9.99, -3.3, 3e4]
NONFINITE = [1.0, np.nan, np.inf, -np.inf, -2.0]
DTYPES = {"float16": "float16", "bfloat16": cases.BFLOAT16, "float32": "f4", "float64": "f8"}
LIMITS = ("minmax", "moving", (-7.0, 7.0), (1.0, 2.0), (-1e-20, 1.3e-20))


def batches(dtype: Any, *, finite: bool = True) -> list[Array]:
    """Four batches, of the same shape, of which one holds what is not finite."""
    rng = np.random.default_rng(0)
    found = [np.array(FINITE).reshape(3, 5), rng.normal(size=(3, 5)), np.zeros((3, 5))]
    found.append(np.array(NONFINITE * 3).reshape(5, 3).T if not finite else -found[1])
    return [np.ascontiguousarray(values.astype(dtype)) for values in found]


def same_bits(actual: Tensor, expected: Array) -> bool:
    got = array(actual)
    assert got is not None
    assert got.dtype == expected.dtype
    nan = np.isnan(expected)
    return bool((np.isnan(got) == nan).all()) and got[~nan].tobytes() == expected[~nan].tobytes()


def both(*arguments: Any, dtype: str = "float32", **options: Any) -> tuple[Any, Any]:
    mine = fbt.FakeQuantize(*arguments, **options)
    return mine.double() if dtype == "float64" else mine, FakeQuantize(*arguments, **options)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value")
@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_as_numpys(dtype: str, limits: Any) -> None:
    for bits, symmetric, axis, delay in product(range(2, 17), (False, True), (None, 1), (0, 2)):
        mine, numpys = both(
            bits,
            symmetric=symmetric,
            axis=axis,
            limits=limits,
            decay=0.75,
            delay=delay,
            dtype=dtype,
        )
        for x in batches(DTYPES[dtype], finite=False):
            assert same_bits(mine(tensor(x)), numpys(x, training=True))
        mine.eval()
        assert same_bits(mine(tensor(x)), numpys(x))
        for name in mine.state_dict():
            assert same_bits(mine.state_dict()[name], np.asarray(getattr(numpys, name)))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 4)])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_of_any_rank(shape: tuple[int, ...], axis: int | None) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype("f4")
    if axis is None or shape:
        for limits in ("minmax", "moving"):
            mine, numpys = both(4, axis=axis, limits=limits)
            assert same_bits(mine(tensor(x)), numpys(x, training=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"limits": "moving", "axis": 0}, {"delay": 1}], ids=str)
def test_the_gradient_is_that_of_the_definition(dtype: str, options: Any) -> None:
    for symmetric in (False, True):
        mine, numpys = both(3, symmetric=symmetric, decay=0.5, dtype=dtype, **options)
        clipped = []
        for x in batches(DTYPES[dtype]):
            values = tensor(x, needs_gradient=True)
            dy = np.random.default_rng(1).normal(size=x.shape).astype(DTYPES[dtype])
            mine(values).backward(tensor(dy))
            numpys(x, training=True)
            assert values.grad is not None
            expected = numpys.gradient(x, dy)
            assert same_bits(values.grad, expected)
            clipped.append((expected == 0).any())
        assert any(clipped) == (options.get("limits") == "moving")


@pytest.mark.parametrize("axis", [None, 1])
def test_compiled_it_has_the_same_bits_and_compiles_once(axis: int | None) -> None:
    for options in ({"limits": "moving", "decay": 0.5}, {"delay": 2}, {"symmetric": True}):
        torch._dynamo.reset()
        eager = fbt.FakeQuantize(5, axis=axis, **options)
        watched = copy.deepcopy(eager)
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(watched, fullgraph=True, backend=counter)
        for x in batches("f4", finite=False):
            one, other = (tensor(x, needs_gradient=True) for _ in range(2))
            expected, y = eager(one), compiled(other)
            assert same_bits(y, array(expected))
            expected.sum().backward()
            y.sum().backward()
            assert same_bits(other.grad, array(one.grad))
        for name, value in eager.state_dict().items():
            assert watched.state_dict()[name].equal(value)
        # Once more where the shape of the limits is not known before the first step.
        assert counter.frame_count == (2 if axis and "limits" in options else 1)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options", [{"limits": "moving"}, {"limits": "moving", "axis": 1}], ids=str
)
def test_the_state_is_saved_and_loaded_before_the_first_step_and_after(options: Any) -> None:
    x, later = (tensor(values) for values in batches("f4")[:2])
    new, used = fbt.FakeQuantize(**options), fbt.FakeQuantize(**options)
    before = copy.deepcopy(new.state_dict())
    used(x)
    assert list(before) == list(used.state_dict()) == ["low", "high", "steps"]
    low = new.low
    new.load_state_dict(used.state_dict())
    assert new.low is low  # as DistributedDataParallel holds it
    assert new.eval()(later).equal(used.eval()(later))
    for other in (copy.deepcopy(used), pickle.loads(pickle.dumps(used))):
        assert other(later).equal(used(later))
        other(x, training=True)
        assert (other.steps, used.steps) == (2, 1)
    used.load_state_dict(before)
    assert used.steps == 0
    assert used(later).equal(fbt.FakeQuantize(axis=options.get("axis"))(later))


def test_the_limits_stay_float32() -> None:
    quantize = fbt.FakeQuantize(limits="moving")
    for cast in (quantize.half, quantize.bfloat16, lambda: quantize.to(torch.float16)):
        assert cast().low.dtype == quantize.high.dtype == torch.float32
    assert quantize.double().low.dtype == torch.float64
    assert quantize.half().low.dtype == torch.float32
    assert quantize.steps.dtype == torch.int64


def test_without_a_state_there_is_nothing_to_save() -> None:
    assert fbt.FakeQuantize().state_dict() == {}
    assert fbt.FakeQuantize(limits=(0, 1)).state_dict() == {}
    assert list(fbt.FakeQuantize(delay=1).state_dict()) == ["steps"]


def test_the_mode_is_the_modules_unless_given() -> None:
    x = tensor(batches("f4")[0])
    quantize = fbt.FakeQuantize(limits="moving")
    for mode, training, steps in (
        (True, None, 1),
        (False, None, 1),
        (False, True, 2),
        (True, False, 2),
        (True, torch.tensor(False), 2),
        (False, torch.tensor(True), 3),
    ):
        quantize.train(mode)(x, training=training)
        assert quantize.steps == steps


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_checkpointing_repeats_is_observed_once(reentrant: bool) -> None:
    quantize = fbt.FakeQuantize(3, limits="moving", decay=0.5)
    plain = copy.deepcopy(quantize)
    for values in batches("f4"):
        results = []
        for module, call in ((quantize, checkpoint), (plain, lambda f, x, **_: f(x))):
            x = tensor(values, needs_gradient=True)
            y = call(lambda x, module=module: module(x).square(), x, use_reentrant=reentrant)
            y.sum().backward()
            results.append((y, x.grad))
        for mine, expected in zip(*results, strict=True):
            assert mine.equal(expected)
    assert quantize.low.equal(plain.low)
    assert quantize.steps == plain.steps == 4


def test_vmap_and_higher_derivatives() -> None:
    quantize = fbt.FakeQuantize(3, limits=(-1.0, 2.0))
    x = tensor(batches("f8")[1])
    assert torch.func.vmap(quantize)(x).equal(quantize(x))
    each = torch.func.vmap(torch.func.grad(lambda row: quantize(row).square().sum()))(x)
    whole = torch.func.grad(lambda x: quantize(x).square().sum())(x)
    assert each.equal(whole)
    gradient = torch.func.grad(lambda x: quantize(x).square().sum() / 2)
    hessian = torch.func.jacrev(gradient)(x.flatten())
    passed = (whole != 0) | (quantize(x) == 0)
    assert hessian.equal(torch.diag(passed.flatten().double()))


def test_it_stays_a_node_where_fx_traces() -> None:
    model = torch.nn.Sequential(fbt.FakeQuantize(3, delay=1))
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    x = tensor(batches("f4")[0])
    assert traced(x).equal(x)
    assert not traced(x).equal(x)


def test_numpys_takes_tensors_where_there_is_no_state() -> None:
    x = batches("f4")[0]
    for options in ({}, {"axis": 0}, {"limits": (-1.0, 3.0), "symmetric": True}):
        assert same_bits(FakeQuantize(3, **options)(tensor(x)), FakeQuantize(3, **options)(x))
    with pytest.raises(
        TypeError, match=r"where there is a state; got Tensor. Use fusebn.torch.FakeQuantize"
    ):
        FakeQuantize(delay=1)(tensor(x))


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"FakeQuantize: `bits` must lie in \[2, 16\]; got 17"):
        fbt.FakeQuantize(17)
    with pytest.raises(ValueError, match=r"`limits` must be .*low < high; got \(1.0, 1.0\)"):
        fbt.FakeQuantize(limits=(1, 1))
    with pytest.raises(TypeError, match="FakeQuantize: `x` must be a tensor; got list"):
        fbt.FakeQuantize()([1.0])
    with pytest.raises(
        TypeError, match=r"FakeQuantize: `x` must be an array of .*; got dtype int64"
    ):
        fbt.FakeQuantize()(torch.arange(3))
    with pytest.raises(TypeError, match="`training` must be a bool, or a boolean array of rank 0"):
        fbt.FakeQuantize(delay=1)(torch.ones(3), training=torch.tensor(1.0))
    moving = fbt.FakeQuantize(axis=0, limits="moving")
    moving(torch.ones(3))
    with pytest.raises(
        ValueError, match=r"limits are those seen before, of shape \(3,\); got \(4,"
    ):
        moving(torch.ones(4))
    assert moving.steps == 1


def test_it_is_a_transform_and_says_what_it_is() -> None:
    quantize = fbt.FakeQuantize(4, symmetric=True, limits="moving")
    assert isinstance(quantize, Transform)
    assert isinstance(quantize, torch.nn.Module)
    assert repr(quantize) == "FakeQuantize(4, symmetric=True, limits='moving')"
