"""FakeQuantize on JAX's arrays: NumPy's bits, compiled too, and a state that Flax keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.errors import ModifyScopeVariableError
from jax_arrays import types_of

import cases
import fusebn.jax as fbj
from conftest import assert_same_bits
from fusebn.quantize import FakeQuantize

Array = Any
KEY = jax.random.key(0)
SHAPE = 9, 35
STEPS = 3


def all_settings() -> list[dict[str, Any]]:
    """Return every number of bits, and beside it something of everything else."""
    limits = ["minmax", "moving", (-0.7, 1.3), (0.1, 0.2), (-5.0, -0.01)]
    found = []
    for bits in range(2, 17):
        for i in range(4):
            settings = {
                "bits": bits,
                "symmetric": i % 2 == 1,
                "axis": (None, 0, -1)[(bits + i) % 3],
            }
            settings |= {
                "limits": limits[(bits + 2 * i) % 5],
                "delay": (0, 0, 1)[(bits // 3 + i) % 3],
            }
            found.append({**settings, "decay": (0.75, 0.9)[bits % 2]})
    return found


SETTINGS = all_settings()


def batches(dtype: np.dtype[Any], rng: np.random.Generator) -> list[Array]:
    """Return what is hard to round alike: ties, all sizes, zeros, subnormal and infinite ones."""
    found = [rng.standard_normal(SHAPE) * 10.0 ** rng.integers(-3, 4, (9, 1)) for _ in range(4)]
    found[1] = np.round(found[1] * 4) / 4
    found[2][0] = np.linspace(-17, 17, 35) / 2
    found[3][:, ::5] *= -0.0
    found[3][2] = -0.0
    found[3][3, :2] = np.nan, 1
    found[3][4, :3] = np.inf, -np.inf, 1
    found[3][5] = np.arange(35) * 1e-44 - 1e-43
    return [x.astype(dtype) for x in found]


def same_bits(actual: Any, expected: Any) -> bool:
    """Compare bits, but those of a NaN, of which there are many."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    nothing = np.isnan(expected)
    if actual.shape != expected.shape or (np.isnan(actual) != nothing).any():
        return False
    zero = np.zeros((), actual.dtype)
    return np.where(nothing, zero, actual).tobytes() == np.where(nothing, zero, expected).tobytes()


def module(settings: dict[str, Any]) -> Any:
    return fbj.linen.FakeQuantize(**settings)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_bits_are_numpys(rng: np.random.Generator, dtype: str) -> None:
    """Of y, of the gradient and of the state, over some steps; all settings in one program."""
    kind = np.dtype(getattr(jnp, dtype))
    xs, dy = batches(kind, rng), rng.standard_normal(SHAPE).astype(kind)

    @jax.jit
    def step(x: Array, states: Any, training: Any) -> Any:
        found = []
        for settings, state in zip(SETTINGS, states, strict=True):

            def quantize(x: Array, settings: Any = settings, state: Any = state) -> Any:
                options = {"training": training, "mutable": ["quantize"]}
                return module(settings).apply(state, x, **options)

            y, back, new = jax.vjp(quantize, x, has_aux=True)
            found.append((y, back(dy)[0], new))
        return found

    with types_of(np.dtype("float64") if dtype == "float64" else cases.FLOAT32):
        states: Any = [module(s).init(KEY, jnp.asarray(xs[0])) for s in SETTINGS]
        numpys = [FakeQuantize(**s) for s in SETTINGS]
        for i, x in enumerate(xs):
            training = i < STEPS
            found = step(x, states, training)
            states = [new for _, _, new in found]
            for (y, dx, state), theirs, settings in zip(found, numpys, SETTINGS, strict=True):
                with np.errstate(all="ignore"):
                    want = theirs(x, training=training)
                    gradient = theirs.gradient(x, dy)
                assert same_bits(y, want), (i, settings)
                assert same_bits(dx, gradient), (i, settings)
                if theirs.settings.has_state:
                    kept = state["quantize"]
                    assert kept["steps"] == theirs.steps == min(i + 1, STEPS)
                if theirs.low is not None:
                    assert same_bits(kept["low"], theirs.low), (i, settings)
                    assert same_bits(kept["high"], theirs.high), (i, settings)


def test_without_a_compiler_too(rng: np.random.Generator) -> None:
    x = batches(np.dtype("float32"), rng)[0]
    for settings in SETTINGS[:8]:
        if settings["limits"] != "moving" and not settings["delay"]:
            quantize = FakeQuantize(**settings)
            assert_same_bits(quantize(jnp.asarray(x)), quantize(x))
            assert_same_bits(jax.jit(quantize)(x), quantize(x))


def test_transformations(rng: np.random.Generator) -> None:
    xs = jnp.asarray(rng.standard_normal((5, 3, 4)), jnp.float32)
    quantize = FakeQuantize(3, symmetric=True)
    assert_same_bits(jax.jit(jax.vmap(quantize))(xs), np.stack([quantize(np.array(x)) for x in xs]))
    observer = module({"bits": 4, "limits": "moving", "axis": -1})

    def step(state: Any, x: Array) -> Any:
        y, state = observer.apply(state, x, training=True, mutable=["quantize"])
        return state, y

    state, ys = jax.lax.scan(step, observer.init(KEY, xs[0]), xs)
    theirs = FakeQuantize(4, limits="moving", axis=-1)
    for x, y in zip(xs, ys, strict=True):
        assert_same_bits(y, theirs(np.array(x), training=True))
    assert_same_bits(state["quantize"]["low"], theirs.low)


def test_a_traced_switch_compiles_once() -> None:
    observer, traces = module({"limits": "moving", "decay": 0.5}), []

    @jax.jit
    def call(state: Any, x: Array, training: Any) -> Any:
        traces.append(training)
        return observer.apply(state, x, training=training, mutable=["quantize"])

    x = jnp.array([-1.0, 3.0])
    state = observer.init(KEY, x)
    for training, high in ((True, 3), (True, 4.5), (False, 4.5)):
        _, state = call(state, x, training)
        assert state["quantize"]["high"] == high
        x = 2 * x
    assert state["quantize"]["steps"] == 2
    assert len(traces) == 1


# ---- states ----


def observe(x: Array) -> tuple[Any, Any]:
    """Return a module of Linen and its state."""
    observer = module({"limits": "moving", "axis": 0, "delay": 1})
    _, state = observer.apply(observer.init(KEY, x), x, training=True, mutable=["quantize"])
    return observer, state


@pytest.mark.parametrize("way", ["msgpack", "orbax"])
def test_checkpoints_carry_the_state(tmp_path: Path, rng: np.random.Generator, way: str) -> None:
    x = jnp.asarray(rng.standard_normal((4, 3)), jnp.float32)
    observer, state = observe(x)
    empty = observer.init(KEY, x)
    if way == "msgpack":
        loaded = serialization.from_bytes(empty, serialization.to_bytes(state))
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "saved", state)
            checkpointer.wait_until_finished()
            loaded = checkpointer.restore(tmp_path / "saved", empty)
    assert loaded["quantize"]["steps"] == 1
    jax.tree.map(assert_same_bits, loaded, state)
    jax.tree.map(lambda a, b: a.shape == b.shape or pytest.fail("shape"), empty, state)


def test_nnx_has_the_same_state(rng: np.random.Generator) -> None:
    """Before the first call, limits of an axis have no shape; that call gives it to them."""
    x = jnp.asarray(rng.standard_normal((4, 3)), jnp.float32)
    _, state = observe(x)
    observer = fbj.nnx.FakeQuantize(limits="moving", axis=0, delay=1)
    assert observer(x) is not None
    assert observer.low.get_value().shape == (4, 1)
    assert observer.steps[...] == 0
    fresh = fbj.nnx.FakeQuantize(limits="moving", axis=0, delay=1)
    y = nnx.jit(lambda m, x: m(x, training=True))(fresh, x)
    assert_same_bits(y, x)
    found = nnx.to_pure_dict(nnx.state(fresh))
    jax.tree.map(assert_same_bits, found, dict(state["quantize"]))
    nnx.update(observer, nnx.state(fresh))
    nnx.jit(lambda m: m(2 * x, training=True))(observer)
    other, state = observe(x)
    _, state = other.apply(state, 2 * x, training=True, mutable=["quantize"])
    found = nnx.to_pure_dict(nnx.state(observer))
    jax.tree.map(assert_same_bits, found, dict(state["quantize"]))
    assert nnx.to_pure_dict(nnx.state(fbj.nnx.FakeQuantize(3))) == {}


def test_gradients_through_nnx(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal(7), jnp.float32)
    observer = fbj.nnx.FakeQuantize(3, limits="moving")
    observer(x / 2, training=True)
    found = nnx.grad(lambda m, x: (m(x) * x).sum(), argnums=1)(observer, x)
    theirs = FakeQuantize(3, limits="moving")
    theirs(np.array(x / 2), training=True)
    y, passed = theirs(np.array(x)), theirs.gradient(np.array(x), np.array(x))
    np.testing.assert_allclose(found, y + passed, rtol=1e-6)
    assert 0 < np.count_nonzero(passed) < 7


# ---- errors ----


def test_errors() -> None:
    for kind in (fbj.linen.FakeQuantize, fbj.nnx.FakeQuantize):
        with pytest.raises(ValueError, match=r"FakeQuantize: `bits` must lie in \[2, 16\]; got 17"):
            kind(17)
        with pytest.raises(ValueError, match="`limits` must be 'minmax', 'moving', or two finite"):
            kind(8, limits=(1.0, 1.0))
        with pytest.raises(TypeError):
            kind(8, True)
    x = jnp.ones((2, 3))
    observer, state = observe(x)
    for given, kind, message in (
        (jnp.ones(2, int), TypeError, "`x` must be an array of"),
        (jnp.ones((4, 3)), ValueError, r"`x` must have a shape .* limits .* shape \(2, 1\)"),
    ):
        with pytest.raises(kind, match=f"FakeQuantize: {message}"):
            jax.eval_shape(lambda given=given: observer.apply(state, given))
    with pytest.raises(TypeError, match="FakeQuantize: `training` must be a bool"):
        observer.apply(state, x, training=1)
    with pytest.raises(ModifyScopeVariableError):
        observer.apply(state, x, training=True)
    with pytest.raises(TypeError, match=r"Use fusebn\.jax\.linen\.FakeQuantize"):
        FakeQuantize(limits="moving")(x)
