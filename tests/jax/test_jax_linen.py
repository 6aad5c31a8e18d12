"""fusebn.jax.linen.BatchNorm against Flax's layer, and where that fails against the oracle."""

from __future__ import annotations

import importlib
import inspect
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen, serialization
from flax.errors import ModifyScopeVariableError
from jax_arrays import assert_near

import fusebn.jax as fbj
from fusebn import _reference as reference

Array = Any
LAYERS = linen.BatchNorm, fbj.linen.BatchNorm
KEY = jax.random.key(0)


class Case(NamedTuple):
    why: str
    options: dict[str, Any] = {}  # noqa: RUF012
    shape: tuple[int, ...] = (6, 4, 3, 5)
    dtype: Any = jnp.float32
    mask: tuple[int, ...] | None = None
    ulps: float = 64


BFLOAT16, FLOAT16 = jnp.bfloat16, jnp.float16
CASES = (
    Case("as it comes"),
    Case("channels first", {"axis": 1}),
    Case("the axis counted from the front", {"axis": 3}),
    Case("two neighbours", {"axis": (1, 2)}),
    Case("two axes apart, the order of which is not asked for", {"axis": (-1, 1)}),
    Case("an axis named twice", {"axis": (3, -1)}),
    Case("every axis is one of features", {"axis": (0, 1, 2, 3)}),
    Case("no axis is", {"axis": ()}),
    Case("rank 1", {"axis": 0}, (5,)),
    Case("rank 2", {}, (7, 3)),
    Case("rank 5", {"axis": (0, 4)}, (2, 3, 2, 3, 4)),
    Case("one position", {}, (1, 4)),
    Case("no scale, no bias", {"use_scale": False, "use_bias": False}),
    Case("scale alone", {"use_bias": False}),
    Case("other initial values", {"scale_init": linen.initializers.normal(), "epsilon": 0.1}),
    Case("no memory", {"momentum": 0.0}),
    Case("no learning", {"momentum": 1.0}),
    Case("bfloat16 with float32 parameters gives float32", {}, dtype=BFLOAT16),
    Case("bfloat16 throughout", {"param_dtype": BFLOAT16}, dtype=BFLOAT16),
    Case("bfloat16 asked for", {"dtype": BFLOAT16}, dtype=BFLOAT16),
    Case("bfloat16 asked for of float32", {"dtype": BFLOAT16}),
    Case("float32 asked for of bfloat16", {"dtype": jnp.float32}, dtype=BFLOAT16),
    Case("float16 asked for of bfloat16", {"dtype": FLOAT16}, dtype=BFLOAT16),
    Case("float16", {"dtype": FLOAT16}, dtype=FLOAT16),
    Case("integers", {}, dtype=jnp.int32),
    Case(
        "averages in half precision, in which Flax rounds the old one once more",
        {"param_dtype": BFLOAT16, "force_float32_reductions": False},
        ulps=2**16,
    ),
    Case("a mask of positions", {}, mask=(6, 4, 3, 1)),
    Case("a mask of examples", {}, mask=(6, 1, 1, 1)),
    Case("a mask of lower rank", {"axis": 0}, mask=(4, 3, 5)),
    Case("a mask beside two axes apart", {"axis": (1, 3)}, mask=(6, 1, 3, 1)),
    Case("a mask of its own for every channel", {}, mask=(6, 4, 3, 5)),
    Case("a mask for channels alone", {}, mask=(5,)),
    Case("a mask for one of two axes", {"axis": (1, 3)}, mask=(6, 1, 3, 5)),
    Case("a mask in bfloat16", {"dtype": BFLOAT16}, dtype=BFLOAT16, mask=(6, 4, 3, 1)),
)


def data(case: Case, rng: np.random.Generator) -> tuple[Array, Array | None]:
    """Return x and a mask that leaves something of every channel."""
    x = jnp.asarray(rng.standard_normal(case.shape) * 4 + 1).astype(case.dtype)
    if case.mask is None:
        return x, None
    mask = rng.random(case.mask) > 0.3
    return x, jnp.asarray(mask | (case.mask == (5,)))


def run(layer: Any, x: Array, mask: Array | None) -> tuple[Any, Any]:
    """Return the initial variables; and y, averages and gradients of training, and y afterwards."""
    dy = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    sources = (0, 1) if jnp.issubdtype(x.dtype, jnp.inexact) else 0

    @jax.jit
    def steps(x: Array) -> tuple[Any, Any]:
        variables = layer.init(KEY, x, use_running_average=False)

        def train(params: Any, x: Array) -> tuple[Array, Any]:
            given = {**variables, "params": params}
            options = {"use_running_average": False, "mask": mask, "mutable": ["batch_stats"]}
            y, updated = layer.apply(given, x, **options)
            return (y.astype(jnp.float32) * dy).sum(), (y, updated)

        params = variables.get("params", {})
        gradients, (y, updated) = jax.grad(train, sources, has_aux=True)(params, x)
        inference = layer.apply({**variables, **updated}, x, use_running_average=True)
        return variables, (y, updated, gradients, inference)

    found: tuple[Any, Any] = steps(x)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_it_does_what_flax_does(rng: np.random.Generator, case: Case) -> None:
    x, mask = data(case, rng)
    (initial, found), (flax_initial, expected) = (
        run(kind(**case.options), x, mask) for kind in reversed(LAYERS)
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, initial, flax_initial))
    assert_near(found, expected, ulps=case.ulps)
    assert jax.tree.structure(found) == jax.tree.structure(expected)


def test_the_constructor_is_flaxs() -> None:
    theirs, ours = (dict(inspect.signature(kind).parameters) for kind in LAYERS)
    for parameters in (theirs, ours):
        del parameters["parent"], parameters["name"]  # every module has its own
    extras = [ours.pop(name) for name in list(ours) if name not in theirs]
    assert list(ours.items()) == list(theirs.items())
    assert {extra.kind for extra in extras} == {inspect.Parameter.KEYWORD_ONLY}
    assert isinstance(fbj.linen.BatchNorm(), linen.BatchNorm)


# ---- files ----


class Network(linen.Module):
    layer: Any

    @linen.compact
    def __call__(self, x: Array, train: Any) -> Array:
        for features in (4, 8):
            x = linen.Dense(features, use_bias=False)(x)
            x = linen.relu(self.layer(momentum=0.9)(x, use_running_average=not train))
        return linen.Dense(3)(x)


STEPS = 5


@cache
def trained(kind: Any) -> tuple[list[Array], Any]:
    """Return the losses of a training, and the variables in the end."""
    network, (x, target) = Network(kind), examples()
    variables = network.init(KEY, x, train=True)

    @jax.jit
    def step(variables: Any) -> tuple[Array, Any]:
        def loss(params: Any) -> tuple[Array, Any]:
            logits, updated = network.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            likely = jax.nn.log_softmax(logits)
            return -jnp.take_along_axis(likely, target[:, None], 1).mean(), updated

        (value, updated), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.5 * g, variables["params"], gradient)
        return value, {"params": params, **updated}

    losses = []
    for _ in range(STEPS):
        value, variables = step(variables)
        losses.append(value)
    return losses, variables


def examples() -> tuple[Array, Array]:
    """Return points, and on which of three rays they lie."""
    target = np.arange(12) % 3
    x = np.eye(3, 2)[target] * np.arange(4, 16)[:, None]
    return jnp.asarray(x, jnp.float32), jnp.asarray(target)


def test_a_network_learns_the_same() -> None:
    (losses, variables), (flax_losses, flax_variables) = map(trained, reversed(LAYERS))
    assert losses[-1] < losses[0] / 2
    assert_near(losses, flax_losses, ulps=256)
    assert_near(variables, flax_variables, ulps=4096)


@pytest.mark.parametrize("kinds", [LAYERS, LAYERS[::-1]], ids=["from Flax", "to Flax"])
@pytest.mark.parametrize("way", ["msgpack", "orbax"])
def test_checkpoints_go_both_ways(tmp_path: Path, kinds: Any, way: str) -> None:
    x, _ = examples()
    _, variables = trained(kinds[0])
    saved, loading = map(Network, kinds)
    empty = jax.tree.map(jnp.zeros_like, loading.init(jax.random.key(1), x, train=True))
    if way == "msgpack":
        loaded = serialization.from_bytes(empty, serialization.to_bytes(variables))
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "saved", variables)
            checkpointer.wait_until_finished()
            loaded = checkpointer.restore(tmp_path / "saved", empty)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, variables))
    expected = saved.apply(variables, x, train=False)
    assert_near(loading.apply(loaded, x, train=False), expected, ulps=64)


# ---- where Flax fails ----


def normalized(layer: Any, x: Array, **options: Any) -> tuple[Array, Any]:
    """Return y of a training batch, and the running averages."""
    variables = layer.init(KEY, x, use_running_average=False)
    y, updated = layer.apply(
        variables, x, use_running_average=False, mutable=["batch_stats"], **options
    )
    return y, updated["batch_stats"]


def test_a_large_mean(rng: np.random.Generator) -> None:
    x = np.float32(rng.standard_normal((64, 8, 8, 3)) + 1e4)
    want = reference.fused_batch_norm(x, None, None, epsilon=1e-5, axis=-1, correction=0)
    found, expected = (normalized(kind(momentum=0.0), x) for kind in reversed(LAYERS))
    np.testing.assert_allclose(found[1]["var"], np.float64(want.variance), rtol=1e-6)
    np.testing.assert_allclose(found[0], np.float64(want.y), atol=1e-5)
    # If this fails Flax has become better: the note in the docstring may go.
    assert np.abs(expected[1]["var"] - np.float64(want.variance)).max() > 0.5


def test_a_batch_that_is_all_masked(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((4, 3, 2)), jnp.float32).at[1].set(jnp.nan)
    none = jnp.zeros((4, 1, 1), bool)
    for mask in (none, jnp.zeros(x.shape, bool)):
        y, averages = normalized(fbj.linen.BatchNorm(activation="relu"), x, mask=mask)
        assert (y == 0).all()
        assert (averages["mean"] == 0).all()
        assert (averages["var"] == 1).all()
    y, averages = normalized(fbj.linen.BatchNorm(momentum=0.0), x[:0])
    assert y.shape == (0, 3, 2)
    assert (averages["var"] == 1).all()
    assert jnp.isnan(normalized(linen.BatchNorm(), x[2:], mask=none[2:])[1]["mean"]).all()


def test_what_is_masked_may_hold_anything(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((6, 4, 3)), jnp.float32)
    mask = jnp.asarray(rng.random((6, 4, 1)) > 0.4)
    lost = jnp.where(mask, x, jnp.nan)
    for full in (mask, jnp.broadcast_to(mask, x.shape)):
        y, averages = normalized(fbj.linen.BatchNorm(), lost, mask=full)
        expected, flax_averages = normalized(linen.BatchNorm(), x, mask=mask)
        assert_near(averages, flax_averages, ulps=16)
        assert_near(jnp.where(mask, y, 0), jnp.where(mask, expected, 0), ulps=64)


# ---- switches ----


def test_a_traced_switch_compiles_once(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((6, 3)), jnp.float32)
    mask = jnp.asarray([[True]] * 4 + [[False]] * 2)
    layer = fbj.linen.BatchNorm(momentum=0.8, activation="relu")
    variables = layer.init(KEY, x, use_running_average=False)
    traces = []

    @jax.jit
    def apply(x: Array, switch: Any, mask: Array) -> Any:
        traces.append(switch)
        options = {"use_running_average": switch, "mask": mask, "mutable": ["batch_stats"]}
        return layer.apply(variables, x, **options)

    for full in (mask, jnp.broadcast_to(mask, x.shape)):
        for switch in (True, False):
            found = apply(x, switch, full)
            options = {"use_running_average": switch, "mask": full, "mutable": ["batch_stats"]}
            assert_near(found, layer.apply(variables, x, **options), ulps=4)
    assert len(traces) == 2
    calls = str(jax.make_jaxpr(apply)(x, True, mask))
    assert calls.count("= fusebn_forward[") == 1
    assert "cond[" not in calls


def test_the_switch_is_named_once_as_in_flax() -> None:
    x = jnp.ones((2, 3))
    for kind in LAYERS:
        with pytest.raises(ValueError, match="must be passed to the constructor or at call time"):
            kind().init(KEY, x)
        with pytest.raises(ValueError, match="passed to the constructor and at call time"):
            kind(use_running_average=True).init(KEY, x, use_running_average=True)
        variables = kind(use_running_average=np.True_).init(KEY, x)
        with pytest.raises(ModifyScopeVariableError):
            kind(use_running_average=False).apply(variables, x)


def test_nothing_is_updated_while_it_is_initialized() -> None:
    layer = fbj.linen.BatchNorm(use_running_average=False, axis_name="devices")
    y, variables = layer.init_with_output(KEY, jnp.array([[1.0], [3.0]]))
    assert variables["batch_stats"]["mean"].tolist() == [0]
    np.testing.assert_allclose(y, [[-1], [1]], atol=1e-4)


# ---- transformations ----


def transformed(kind: Any, way: str) -> Any:
    """Return a network that repeats a layer by a transformation of Flax's."""

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x: Array, _: Any = None) -> tuple[Array, None]:
            x = linen.Dense(3)(x)
            return linen.tanh(kind(use_running_average=False, momentum=0.7)(x)), None

    if way == "remat":
        return linen.remat(Block)()
    if way == "vmap":
        axes = {"params": 0, "batch_stats": 0}
        return linen.vmap(Block, variable_axes=axes, split_rngs={"params": True})()
    axes = {"params": 0, "batch_stats": 0}
    return linen.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)()


@pytest.mark.parametrize("way", ["remat", "vmap", "scan"])
def test_transformations(rng: np.random.Generator, way: str) -> None:
    x = jnp.asarray(rng.standard_normal((4, 5, 3)), jnp.float32)

    def results(kind: Any) -> Any:
        network = transformed(kind, way)
        variables = network.init(KEY, x, None) if way == "scan" else network.init(KEY, x)

        def loss(params: Any) -> tuple[Array, Any]:
            carried = (None,) if way == "scan" else ()
            (y, _), updated = network.apply(
                {**variables, "params": params}, x, *carried, mutable=["batch_stats"]
            )
            return jnp.sin(y).sum(), updated

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    found, expected = (jax.tree.map(lambda v: v, results(kind)) for kind in reversed(LAYERS))
    assert_near(found, expected, ulps=1024)


# ---- extras ----


@pytest.mark.parametrize("axis", [-1, (1, 3)])
def test_activation_and_residual(rng: np.random.Generator, axis: Any) -> None:
    x, residual = (jnp.asarray(rng.standard_normal((6, 4, 3, 5)), jnp.float32) for _ in range(2))
    layer = fbj.linen.BatchNorm(axis=axis, activation="gelu", dtype=jnp.bfloat16)
    y, averages = normalized(layer, x, residual=residual)
    plain, flax_averages = normalized(linen.BatchNorm(axis=axis), x)
    expected = jax.nn.gelu(plain + residual, approximate=False).astype(jnp.bfloat16)
    assert_near(y, expected, ulps=2)
    assert_near(averages, flax_averages, ulps=16)


def test_correction() -> None:
    x = jnp.array([[1.0], [2.0], [6.0]])
    for correction, variance in ((0, 14 / 3), (1, 7), (1.5, 28 / 3), (3, 14 / 3)):
        layer = fbj.linen.BatchNorm(correction=correction, momentum=0.0)
        np.testing.assert_allclose(normalized(layer, x)[1]["var"], [variance], rtol=1e-6)


def test_nonfinite() -> None:
    x = jnp.array([[1.0, 1.0], [3.0, jnp.inf]])
    for nonfinite, mean in (("propagate", jnp.nan), ("skip", 0)):
        _, averages = normalized(fbj.linen.BatchNorm(nonfinite=nonfinite, momentum=0.5), x)
        np.testing.assert_array_equal(averages["mean"], [1, mean])
    assert averages["var"].tolist() == [1, 1]


def test_complex_is_left_to_flax(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((4, 3)) + 1j * rng.standard_normal((4, 3)))
    found, expected = (normalized(kind(), x) for kind in reversed(LAYERS))
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
    with pytest.raises(TypeError, match=r"BatchNorm: `x` must be real beside activation="):
        fbj.linen.BatchNorm(activation="relu").init(KEY, x, use_running_average=False)


ERRORS = (
    ({"activation": "tanh"}, {}, ValueError, "`activation` must be"),
    ({"correction": -1}, {}, ValueError, "`correction` must be finite and not negative"),
    ({"nonfinite": "raise"}, {}, ValueError, "Compiled code cannot raise"),
    ({"nonfinite": "ignore"}, {}, ValueError, "`nonfinite` must be"),
    ({"momentum": 1.1}, {}, ValueError, r"`momentum` must lie in \[0, 1\]"),
    ({"axis": 2}, {}, ValueError, r"`axis` must lie in \[-2, 2\)"),
    ({"axis": "C"}, {}, TypeError, "`axis` must be an integer"),
    (
        {},
        {"mask": jnp.ones((3, 3), bool)},
        ValueError,
        r"`mask` must broadcast to x of shape \(4, 3\)",
    ),
    ({}, {"mask": jnp.ones((1, 4, 3), bool)}, ValueError, "`mask` must broadcast"),
    (
        {},
        {"residual": jnp.ones((4, 1))},
        ValueError,
        r"`residual` must have the shape of x, \(4, 3\)",
    ),
)


@pytest.mark.parametrize(("options", "given", "kind", "message"), ERRORS, ids=lambda v: str(v)[:30])
def test_errors(options: Any, given: Any, kind: Any, message: str) -> None:
    layer = fbj.linen.BatchNorm(**options, use_running_average=False)
    with pytest.raises(kind, match=f"BatchNorm: .*{message}|{message}"):
        jax.eval_shape(lambda: layer.init(KEY, jnp.ones((4, 3)), **given))


@pytest.mark.parametrize(
    ("name", "library"), [("linen", "flax"), ("nnx", "flax"), ("equinox", "equinox")]
)
def test_without_its_library_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    monkeypatch.delitem(sys.modules, f"fusebn.jax.{name}", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"pip install 'fusebn\[{library}\]'"):
        importlib.import_module(f"fusebn.jax.{name}")
    with pytest.raises(AttributeError, match="no attribute 'haiku'"):
        _ = fbj.haiku
