"""The short way of plain NumPy calls: it is taken, nothing else takes it, and nobody can tell.

What nearly every call brings is recognized in C++; the rest is left to the checks in Python. So
every call here is made twice, the second time with the short way closed, and both must come to the
same: values, types, memory, errors.
"""

from __future__ import annotations

import inspect
import pickle
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest

import fusebn
from conftest import assert_same_bits, frozen, parameters, stat
from fusebn import BatchNorm, _core, _numpy, _spec, memory

F32 = np.dtype(np.float32)
forward, gradient = fusebn.fused_batch_norm, fusebn.fused_batch_norm_grad


class Outcome(NamedTuple):
    result: Any
    error: str
    taken: int  # how often the short way was


class Ways:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def make(self, call: Callable[[], Any], open: bool) -> Outcome:
        taken = 0

        def way(short: Callable[..., Any], *arguments: Any) -> Any:
            nonlocal taken
            found = short(*arguments) if open else None
            taken += found is not None
            return found

        with self.patch.context() as patch:
            for name in ("forward_of_plain", "gradient_of_plain"):
                patch.setattr(_numpy, name, partial(way, getattr(_numpy, name)))
            try:
                return Outcome(call(), "", taken)
            except Exception as error:
                return Outcome(None, f"{type(error).__name__}: {error}", taken)

    def same(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Outcome:
        """Return what the call comes to, after making sure that it is the same both ways."""
        call = partial(call, *arguments, **options)
        opened, closed = self.make(call, True), self.make(call, False)
        assert closed.taken == 0
        assert opened.error == closed.error
        assert_alike(opened.result, closed.result)
        return opened


def assert_alike(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, np.ndarray):
        assert_same_bits(actual, expected)
        assert actual.strides == expected.strides
        assert str(actual.flags) == str(expected.flags)
    elif isinstance(expected, list | tuple):
        for a, b in zip(actual, expected, strict=True):
            assert_alike(a, b)
    else:
        assert actual == expected


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    return Ways(monkeypatch)


def block(shape: tuple[int, ...] = (6, 4), dtype: Any = F32, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def vector(seed: int = 0, dtype: Any = F32) -> Any:
    return (np.random.default_rng(seed).random(4) + 0.5).astype(dtype)


# --- what is plain ----------------------------------------------------------------------------

LAYOUTS = [("NC", (6, 4), 1), ("NWC", (2, 5, 4), 2), ("NCHW", (2, 4, 3, 2), 1)]


@pytest.mark.parametrize(("data_format", "shape", "axis"), LAYOUTS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_forward(
    data_format: str, shape: Any, axis: int, activation: Any, dtype: Any, ways: Ways, rng: Any
) -> None:
    x, residual = frozen(block(shape, dtype)), frozen(block(shape, dtype, 1))
    scale, offset = parameters(rng, 4, dtype)
    given = {"mean": offset, "variance": frozen(np.abs(scale))}
    for options in (
        {"data_format": data_format},
        {"axis": axis, "residual": residual, "epsilon": 0, "correction": 0.5},
        {"axis": axis - len(shape), "exponential_avg_factor": 0.25, **given},
        {"data_format": data_format, "is_training": False, **given},
        {"axis": axis, "out": np.full(shape, 7).astype(dtype), **given},
    ):
        for parts in ((scale, offset), (None, offset), (None, None)):
            found = ways.same(forward, x, *parts, activation=activation, **options)
            assert found.taken == 1
            assert found.result.y.dtype is x.dtype


@pytest.mark.parametrize(("data_format", "shape", "axis"), LAYOUTS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_gradient(
    data_format: str, shape: Any, axis: int, activation: Any, dtype: Any, ways: Ways, rng: Any
) -> None:
    dy, x, residual = (frozen(block(shape, dtype, seed)) for seed in range(3))
    scale, offset = parameters(rng, 4, dtype)
    given = offset, frozen(np.abs(scale))
    wide = tuple(of.astype(np.float64) for of in given)
    for options in (
        {"data_format": data_format},
        {"axis": axis, "residual": residual, "is_training": False},
        {"axis": axis, "dmean": offset, "dvariance": scale, "epsilon": 1},
    ):
        for parts in ((scale, offset, *given), (scale, None, *wide), (None, None, *wide)):
            found = ways.same(gradient, dy, x, *parts, activation=activation, **options)
            assert found.taken == 1


@pytest.mark.parametrize("shape", [(1, 4), (5, 1), (1, 1), (3, 4, 1, 1), (2,) * 5 + (1,) * 27])
def test_axes_of_length_1(shape: tuple[int, ...], ways: Ways) -> None:
    x = frozen(block(shape))
    for axis in (0, 1, -1):
        assert ways.same(forward, x, None, None, axis=axis).taken == 1


def test_equals_are_as_good(dtype: Any, ways: Ways) -> None:
    # A dtype out of a pickle is another object, and so is a name that was put together.
    x, scale = block(dtype=dtype), vector(dtype=stat(dtype))
    x, scale = (pickle.loads(pickle.dumps(of)) for of in (x, scale))
    names = {"data_format": "".join("NC"), "activation": "".join(["re", "lu"])}
    assert ways.same(forward, x, scale, None, **names).taken == 1
    assert ways.same(gradient, x, x, scale, None, scale, scale, **names).taken == 1


def test_statistics_that_nobody_reads(ways: Ways) -> None:
    assert ways.same(forward, block(), None, None, "of no", "interest", axis=1).taken == 1


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:], lambda x: x.reshape(6, 4)])
def test_in_place(view: Callable[[Any], Any], ways: Ways) -> None:
    def call() -> Any:
        x = block()
        out = view(x)
        found = forward(x, None, None, axis=1, out=out)
        assert found.y is out
        return found

    assert ways.same(call).taken == 1


@pytest.mark.parametrize("rows", [memory.LEAST // 16 - 1, memory.LEAST // 16])
def test_large_results_are_recycled(rows: int, ways: Ways) -> None:
    limit, x, one = memory.stats()["limit"], frozen(block((rows, 4))), np.ones(4, F32)
    try:
        for allowed in (memory.LEAST << 6, 0):
            memory.set_limit(allowed)
            recycled = allowed > 0 and x.nbytes >= memory.LEAST
            before = memory.stats()["in_use"]
            found = ways.same(forward, x, None, None, axis=1)
            back = ways.same(gradient, x, x, one, one, one, one, axis=1, residual=x)
            assert (found.taken, back.taken) == (1, 1)
            arrays = [found.result.y, back.result.dx, back.result.dresidual]
            assert [array.flags.owndata for array in arrays] == [not recycled] * 3
            assert all(array.flags.writeable for array in arrays)
            view = arrays[0][1:]
            del found, back, arrays
            assert (memory.stats()["in_use"] > before) == recycled
            del view
            assert memory.stats()["in_use"] == before
    finally:
        memory.set_limit(limit)


# --- what is not ------------------------------------------------------------------------------


class Tagged(np.ndarray[Any, Any]):
    """A subclass of an array."""


class Name(str):
    """A subclass of a string."""


def misaligned(array: Any) -> Any:
    found = np.empty(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    found[...] = array
    return found


UNUSUAL: dict[str, Callable[[Any], Any]] = {
    "a subclass": lambda a: a.view(Tagged),
    "masked": lambda a: np.ma.masked_array(a, a > 1),
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "misaligned": misaligned,
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "backwards": lambda a: a[::-1],
    "Fortran": np.asfortranarray,
    "float16": lambda a: a.astype(np.float16),
    "float64": lambda a: a.astype(np.float64),
    "int32": lambda a: a.astype(np.int32),
    "objects": lambda a: a.astype(object),
    "an axis more": lambda a: a[None],
    "shorter": lambda a: a[..., :-1].copy(),
    "empty": lambda a: a[:0],
    "rank 0": lambda a: a.reshape(-1)[0].reshape(()),
    "a scalar": lambda a: a.reshape(-1)[0],
    "a list": lambda a: a.tolist(),
    "a string": lambda a: "abcd",
    "a type": lambda a: np.ndarray,
}
BLOCKS = ("x", "dy", "residual", "out")


def arguments(**changes: Any) -> dict[str, Any]:
    """Return the arguments of a plain call, in inference, so that all of them are looked at."""
    given = {
        name: vector(seed) for seed, name in enumerate(("scale", "offset", "mean", "variance"))
    }
    given |= {name: block(seed=seed) for seed, name in enumerate(("x", "residual", "out"))}
    return given | {"axis": 1, "is_training": False} | changes


def gradient_arguments(**changes: Any) -> dict[str, Any]:
    given = arguments() | {"dy": block(seed=5), "dmean": vector(6), "dvariance": vector(7)}
    del given["out"]
    return given | {"is_training": True} | changes


def test_these_are_plain(ways: Ways) -> None:
    # Whatever is changed below is what makes the difference.
    assert ways.same(forward, **arguments()).taken == 1
    assert ways.same(gradient, **gradient_arguments()).taken == 1


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("name", ["x", "residual", "out", "scale", "offset", "mean", "variance"])
def test_forward_of_an_unusual_array(name: str, kind: str, ways: Ways) -> None:
    def call() -> Any:
        given = arguments()
        given[name] = UNUSUAL[kind](given[name])
        found = forward(**given)
        assert found.y is given["out"]
        return found

    # A vector lies in either order.
    assert ways.same(call).taken == (kind == "Fortran" and name not in BLOCKS)


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize(
    "name", ["x", "dy", "residual", "scale", "offset", "mean", "variance", "dmean", "dvariance"]
)
def test_gradient_of_an_unusual_array(name: str, kind: str, ways: Ways) -> None:
    def call() -> Any:
        given = gradient_arguments()
        return gradient(**given | {name: UNUSUAL[kind](given[name])})

    fine = kind == "Fortran" and name not in BLOCKS
    fine |= kind == "float64" and name in ("mean", "variance")
    assert ways.same(call).taken == fine


CHANGES: dict[str, dict[str, Any]] = {
    "a NumPy bool": {"is_training": np.False_},
    "a boolean array": {"is_training": np.array(True)},
    "0 for a flag": {"is_training": 0},
    "None for a flag": {"is_training": None},
    "a NumPy epsilon": {"epsilon": np.float64(0.1)},
    "an array epsilon": {"epsilon": np.array(0.1)},
    "a NaN epsilon": {"epsilon": float("nan")},
    "an infinite epsilon": {"epsilon": float("inf")},
    "a negative epsilon": {"epsilon": -0.1},
    "a huge epsilon": {"epsilon": 10**400},
    "True for epsilon": {"epsilon": True},
    "a string epsilon": {"epsilon": "0.1"},
    "a NaN correction": {"correction": float("nan")},
    "a negative correction": {"correction": -1},
    "no correction": {"correction": None},
    "a factor above 1": {"exponential_avg_factor": 1.5},
    "a NaN factor": {"exponential_avg_factor": float("nan")},
    "a NumPy factor": {"exponential_avg_factor": np.float32(0.5)},
    "an unknown activation": {"activation": "tanh"},
    "a function": {"activation": np.tanh},
    "an array for an activation": {"activation": np.ones(3)},
    "a subclassed activation": {"activation": Name("relu")},
    "an axis too large": {"axis": 2},
    "an axis too small": {"axis": -3},
    "a huge axis": {"axis": 10**30},
    "a NumPy axis": {"axis": np.int64(1)},
    "a float axis": {"axis": 1.0},
    "True for an axis": {"axis": True},
    "an unknown format": {"axis": None, "data_format": "nc"},
    "a subclassed format": {"axis": None, "data_format": Name("NC")},
    "a format of another rank": {"axis": None, "data_format": "NHWC"},
    "no format": {"axis": None, "data_format": None},
    "an array for a format": {"axis": None, "data_format": np.ones(3)},
    "weights": {"weights": np.arange(6)},
    "one weight": {"weights": 1},
    "no mean": {"mean": None},
    "no variance": {"variance": None},
    "neither": {"mean": None, "variance": None},
    "no variance, in training": {"is_training": True, "variance": None},
    "neither, to mix": {"exponential_avg_factor": 0.5, "mean": None, "variance": None},
    "a negative variance": {"variance": -vector()},
    "a negative variance, to mix": {
        "is_training": True, "exponential_avg_factor": 0.5, "variance": -vector(),
    },
    "no positions": {name: block((0, 4)) for name in ("x", "residual", "out")},
    "no channels": {
        **{name: block((6, 0)) for name in ("x", "residual", "out")},
        **{name: np.ones(0, F32) for name in ("scale", "offset", "mean", "variance")},
    },
    "a read-only output": {"out": frozen(block())},
    "read-only in place": dict.fromkeys(("x", "out"), frozen(block())),
}  # fmt: skip


def fits(function: Callable[..., Any]) -> list[str]:
    """Name the changes that are arguments of the function."""
    known = inspect.signature(function).parameters.keys()
    return [name for name, change in CHANGES.items() if change.keys() <= known]


@pytest.mark.parametrize("name", fits(forward))
def test_forward_of_unusual_arguments(name: str, ways: Ways) -> None:
    def call() -> Any:
        given = arguments(**CHANGES[name])
        return forward(**given), given["out"]

    assert ways.same(call).taken == 0


@pytest.mark.parametrize("name", fits(gradient))
def test_gradient_of_unusual_arguments(name: str, ways: Ways) -> None:
    assert ways.same(gradient, **gradient_arguments(**CHANGES[name])).taken == 0


def test_gradients_of_given_statistics(ways: Ways) -> None:
    for name in ("dmean", "dvariance"):
        given = gradient_arguments(is_training=False, **{name: None})
        found = ways.same(gradient, **given)
        assert (found.taken, "statistics do not depend" in found.error) == (0, True)


@pytest.mark.parametrize("shared", ["x", "residual"])
@pytest.mark.parametrize(
    ("first", "second"), [(0, 1), (1, 0), (0, 4), (0, 23), (23, 0), (0, 24), (24, 0), (0, 0)]
)
def test_an_output_in_the_same_memory(first: int, second: int, shared: str, ways: Ways) -> None:
    def call() -> Any:
        held = block((48,))
        given, out = (held[start : start + 24].reshape(6, 4) for start in (first, second))
        try:
            forward(**arguments(**{shared: given, "out": out}))
        except ValueError as error:
            return held, str(error)
        return held, ""

    fine = abs(first - second) == 24 or (shared == "x" and first == second)
    found = ways.same(call)
    assert (found.taken, found.result[1] == "") == (fine, fine)


def test_an_output_backwards(ways: Ways) -> None:
    held = block()
    found = ways.same(forward, held, None, None, axis=1, out=held[::-1])
    assert (found.taken, "overlaps" in found.error) == (0, True)


def test_an_output_that_numpy_warns_of(ways: Ways) -> None:
    def call() -> Any:
        out, x = np.broadcast_arrays(block(), block((1, 6, 4)))
        return forward(x.copy(), None, None, axis=1, out=out)

    found = ways.same(call)
    assert found.taken == 0
    assert found.error.startswith("FutureWarning")


# --- the layer --------------------------------------------------------------------------------


def states(layer: BatchNorm) -> list[Any]:
    return list(layer.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": None, "activation": "relu"},
        {"decay": 0.5, "zero_debias": True, "correction": 0, "epsilon": 0.1},
        {"decay": 0, "center": False},
        {"scale": False, "center": False},
        {"axis": 1, "activation": "silu"},
        {"dtype": np.float64},
    ],
    ids=str,
)
def test_layer(options: dict[str, Any], ways: Ways) -> None:
    dtype = options.get("dtype", F32)

    def call() -> list[Any]:
        layer = BatchNorm(4, **options)
        seen = []
        for seed in range(3):
            x, dy, residual = (block((6, 4), dtype, 3 * seed + i) for i in range(3))
            seen += [layer(x, training=True), *layer.backward(dy), states(layer)]
            out = np.empty_like(x)
            seen += [layer(x, training=True, residual=residual, out=out), *layer.backward(dy)]
            assert seen[-5] is out
            seen += [layer(x, training=False, residual=residual), *layer.backward(dy)]
            seen.append(states(layer))
        layer.freeze()
        return [*seen, layer(x, training=True), *layer.backward(dy), states(layer)]

    assert ways.same(call).taken == 20


def test_layer_of_halves(ways: Ways, dtype: Any) -> None:
    def call() -> list[Any]:
        layer = BatchNorm(4, dtype=stat(dtype))
        x = block((6, 4), dtype)
        return [layer(x, training=True), *layer.backward(x), states(layer)]

    assert ways.same(call).taken == 2


def with_statistics(mean: Any, variance: Any) -> BatchNorm:
    layer = BatchNorm(4)
    layer.moving_mean, layer.moving_variance = mean, variance
    return layer


def changed(**attributes: Any) -> BatchNorm:
    layer = BatchNorm(4)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


UNUSUAL_LAYERS: dict[str, tuple[Callable[[], BatchNorm], dict[str, Any]]] = {
    "an update": (lambda: BatchNorm(4), {"update": True}),
    "no update": (lambda: BatchNorm(4), {"update": False}),
    "an update alone": (lambda: BatchNorm(4), {"training": False, "update": True}),
    "weights": (lambda: BatchNorm(4), {"weights": np.arange(6)}),
    "a NumPy bool": (lambda: BatchNorm(4), {"training": np.True_}),
    "no bool": (lambda: BatchNorm(4), {"training": 1}),
    "skips": (lambda: BatchNorm(4, nonfinite="skip"), {}),
    "raises": (lambda: BatchNorm(4, nonfinite="raise"), {"x": np.full((6, 4), np.nan, F32)}),
    "transforms": (lambda: BatchNorm(4, transforms={"scale": np.negative}), {}),
    "transforms off": (lambda: BatchNorm(4), {"transforms_active": False}),
    "transforms off there": (lambda: changed(transforms_active=False), {}),
    "no switch": (lambda: changed(transforms_active=3), {}),
    "another type": (lambda: BatchNorm(4), {"x": block(dtype=np.float64)}),
    "a wider layer": (lambda: BatchNorm(4, dtype=np.float64), {}),
    "other channels": (lambda: BatchNorm(4), {"x": block((6, 5))}),
    "no such axis": (lambda: BatchNorm(4, axis=2), {}),
    "no positions": (lambda: BatchNorm(4), {"x": block((0, 4))}),
    "an odd residual": (lambda: BatchNorm(4), {"residual": block((6, 5))}),
    "an odd output": (lambda: BatchNorm(4), {"out": block((6, 5))}),
    "a NaN epsilon": (lambda: changed(epsilon=float("nan")), {}),
    "an odd activation": (lambda: changed(activation="tanh"), {}),
    "read-only": (lambda: with_statistics(frozen(vector()), vector()), {}),
    "read-only too": (lambda: with_statistics(vector(), frozen(vector())), {}),
    "strided": (lambda: with_statistics(np.ones(8, F32)[::2], np.ones(8, F32)[1::2]), {}),
    "negative": (lambda: with_statistics(vector(), -vector()), {}),
    "negative, given": (lambda: with_statistics(vector(), -vector()), {"training": False}),
}


@pytest.mark.parametrize("name", UNUSUAL_LAYERS)
def test_an_unusual_call_of_a_layer(name: str, ways: Ways) -> None:
    make, options = UNUSUAL_LAYERS[name]

    def call() -> Any:
        layer = make()
        try:
            return layer(**({"x": block(), "training": True} | options)), states(layer)
        except (TypeError, ValueError) as error:
            return str(error), states(layer), layer._last

    assert ways.same(call).taken == 0


def test_a_layer_in_place(ways: Ways) -> None:
    def call() -> Any:
        layer, x = BatchNorm(4), block()
        y = layer(x, training=True, out=x[:])
        with pytest.raises(RuntimeError, match="wrote y over x"):
            layer.backward(y)
        return x, states(layer)

    assert ways.same(call).taken == 1


@pytest.mark.parametrize("in_place", [False, True])
def test_averages_that_lie_in_x(in_place: bool, ways: Ways) -> None:
    # The averages are the last that is written, as if they were assigned.
    def call() -> Any:
        x = np.abs(block())
        layer = with_statistics(x[2], x[3])
        return layer(x, training=True, out=x if in_place else None), x, states(layer)

    assert ways.same(call).taken == 1


# --- the switch -------------------------------------------------------------------------------


def test_what_numpy_is_not_known_to_be_closes_it(ways: Ways) -> None:
    known = [np.ndarray, tuple(_numpy._ELEMENTS), _spec.DATA_FORMATS, tuple(_spec.ACTIVATIONS)]
    known += [fusebn.FusedBatchNorm, fusebn.FusedBatchNormGrad, memory.LEAST]
    probe = np.zeros((2, 3), np.float32)
    address = probe.__array_interface__["data"][0]
    try:
        for other in (
            [*known, probe, address + 4],
            [*known, probe.astype(np.float64), address],
            [*known, probe.reshape(3, 2), address],
            [*known, probe[:, :2], address],
            [*known, "no array", address],
            [Tagged, *known[1:], probe.view(Tagged), address],
        ):
            assert not _core.know_numpy(*other)
            assert ways.same(forward, block(), None, None, axis=1).taken == 0
    finally:
        assert _numpy._know_numpy()
    assert ways.same(forward, block(), None, None, axis=1).taken == 1


def test_nothing_is_kept() -> None:
    x, one, layer = block(), np.ones(4, F32), BatchNorm(4)
    large = block((memory.LEAST // 16, 4))
    held = [x, large, one, F32, None, True, False, np.ndarray, "NC", *_spec.ACTIVATIONS]
    held += [fusebn.FusedBatchNorm, fusebn.FusedBatchNormGrad, layer.moving_mean]

    def calls() -> None:
        forward(x, one, one, one, one, is_training=False, data_format="NC")
        forward(large, None, None, axis=1, out=large)
        forward(large, None, None, axis=1)
        gradient(x, x, one, None, one, one, axis=1, residual=x, activation="relu")
        layer(x, training=True)
        layer.backward(x)
        layer._last = None
        for wrong in ({"epsilon": -1}, {"axis": 7}, {"out": frozen(x)}, {"activation": "tanh"}):
            with pytest.raises(ValueError, match="must"):
                forward(x, one, one, **{"axis": 1} | wrong)

    calls()
    before = [sys.getrefcount(of) for of in held]
    for _ in range(50):
        calls()
    after = [sys.getrefcount(of) for of in held]
    assert np.abs(np.subtract(after, before)).max() < 25
