"""Transforms of the variables of Flax's layers, against the definition in JAX's own operations."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx, serialization
from jax.sharding import PartitionSpec as P
from jax_arrays import assert_near
from test_jax_devices import mesh

import fusebn.jax as fbj
from conftest import assert_same_bits
from fusebn.quantize import FakeQuantize

Array = Any
KEY = jax.random.key(0)
SMOOTH = {
    "scale": jnp.tanh,
    "offset": jnp.sin,
    "moving_mean": jnp.tanh,
    "moving_variance": lambda v: jnp.exp(-v),
}
EIGHT_BITS = dict.fromkeys(SMOOTH, FakeQuantize(8))
FLAX = {"scale": "scale", "offset": "bias", "moving_mean": "mean", "moving_variance": "var"}
OPTIONS: dict[str, Any] = {"momentum": 0.7, "activation": "silu", "correction": 1}


def layer_of(transforms: Any = None, batch: bool = False, **options: Any) -> Any:
    given = {"transforms": transforms, "transform_batch_statistics": batch}
    return fbj.linen.BatchNorm(**{**OPTIONS, **given, **options})


class Data:
    """A batch, the variables, and what flows into y."""

    def __init__(self, rng: np.random.Generator, dtype: Any = jnp.float32) -> None:
        self.x, self.dy = (jnp.asarray(rng.standard_normal((6, 5, 3)), dtype) for _ in range(2))
        self.x = self.x * 2 + 0.5
        self.mask = jnp.asarray(rng.random((6, 5, 1)) > 0.3)
        self.params = {"scale": jnp.array([0.5, -1, 2], dtype), "bias": jnp.arange(3, dtype=dtype)}
        self.averages = {"mean": jnp.array([0.1, -0.2, 1], dtype), "var": jnp.array([1, 2, 0.5])}

    def results(
        self, layer: Any, training: Any, active: Any = None, mask: Any = None, **state: Any
    ) -> Any:
        """Return y, the averages, and the gradients of parameters and of x."""

        def loss(params: Any, x: Array) -> Any:
            variables = {"params": params, "batch_stats": self.averages, **state}
            options = {"use_running_average": _not(training), "transforms_active": active}
            mutable = ["batch_stats", "quantize"]
            y, updated = layer.apply(variables, x, **options, mask=mask, mutable=mutable)
            return (y * self.dy).sum(), (y, updated)

        return jax.grad(loss, (0, 1), has_aux=True)(self.params, self.x)

    def compiled(self, *arguments: Any, **options: Any) -> Any:
        """Return the same of a program that knows all of them."""
        return jax.jit(partial(self.results, *arguments, **options))()

    def defined(self, training: bool, active: bool, batch: bool, mask: Any = None) -> Any:
        """Return the same by the definition, for `SMOOTH`."""
        mask = jnp.ones_like(self.mask) if mask is None else mask
        n = mask.sum()

        def loss(params: Any, x: Array) -> Any:
            mean = jnp.where(mask, x, 0).sum((0, 1)) / n
            variance = jnp.where(mask, (x - mean) ** 2, 0).sum((0, 1)) / n
            of = SMOOTH if active else dict.fromkeys(SMOOTH, lambda v: v)
            used = (mean, variance) if training else (self.averages["mean"], self.averages["var"])
            if batch or not training:
                used = of["moving_mean"](used[0]), of["moving_variance"](used[1])
            z = (x - used[0]) / jnp.sqrt(used[1] + 1e-5)
            y = jax.nn.silu(z * of["scale"](params["scale"]) + of["offset"](params["bias"]))
            found = {"mean": mean, "var": variance * n / (n - 1)}
            new = {name: 0.7 * self.averages[name] + 0.3 * v for name, v in found.items()}
            return (y * self.dy).sum(), (y, {"batch_stats": new if training else self.averages})

        return jax.grad(loss, (0, 1), has_aux=True)(self.params, self.x)


def _not(training: Any) -> Any:
    return not training if isinstance(training, bool) else ~training


def assert_same(found: Any, expected: Any) -> None:
    jax.tree.map(assert_same_bits, found, expected)


# ---- the definition ----


@pytest.mark.parametrize("batch", [False, True])
def test_values_and_gradients(rng: np.random.Generator, batch: bool) -> None:
    """All switches, known or traced; those that are traced compile once."""
    traces = []
    with jax.enable_x64(True):
        data = Data(rng, jnp.float64)
        layer = layer_of(SMOOTH, batch, param_dtype=jnp.float64)

        @jax.jit
        def traced(training: Any, active: Any, mask: Any) -> Any:
            traces.append(mask)
            return data.results(layer, training, active, mask)

        for training in (True, False):
            for active in (True, False):
                for mask in (None, data.mask):
                    want = data.defined(training, active, batch, mask)
                    assert_near(traced(training, active, mask), want, 256)
                want = data.defined(training, active, batch)
                known = jax.jit(partial(data.results, layer, training, active))
                assert_near(known(), want, 256)
    assert len(traces) == 2


@pytest.mark.parametrize("active", [True, None], ids=["known", "traced"])
def test_derivatives_of_second_order_and_forwards(rng: np.random.Generator, active: Any) -> None:
    with jax.enable_x64(True):
        data = Data(rng, jnp.float64)
        layer = layer_of(SMOOTH, True, param_dtype=jnp.float64)

        def length(gradients: Any) -> Array:
            return sum((leaf**2).sum() for leaf in jax.tree.leaves(gradients[0]))

        def ours(x: Array, switch: Any) -> Array:
            data.x = x
            return length(data.results(layer, True, active or switch))

        def defined(x: Array) -> Array:
            data.x = x
            return length(data.defined(True, True, True))

        x = data.x
        both = jax.jit(
            lambda x, s: (jax.grad(ours)(x, s), jax.jvp(partial(ours, switch=s), (x,), (x,)))
        )
        want = jax.jit(lambda x: (jax.grad(defined)(x), jax.jvp(defined, (x,), (x,))))(x)
        assert_near(both(x, jnp.array(True)), want, 4096)


# ---- float mode ----


@pytest.mark.parametrize("mask", ["none", "positions", "own"])
def test_float_mode_is_that_of_a_layer_without_transforms(
    rng: np.random.Generator, mask: str
) -> None:
    """To the bit, known or traced; and so are the averages always, whatever the transforms do.

    Where a mask differs between the features of a position, XLA rounds as it likes.
    """
    data = Data(rng)
    given = {"none": None, "positions": data.mask, "own": data.mask & (data.x < 3)}[mask]
    agree = partial(assert_near, ulps=4) if mask == "own" else assert_same
    plain = jax.jit(lambda training: data.results(layer_of(), training, mask=given))
    for batch in (False, True):
        layer = layer_of(EIGHT_BITS, batch)
        run = jax.jit(lambda *switches, layer=layer: data.results(layer, *switches, given))
        known = jax.jit(lambda training, layer=layer: data.results(layer, training, False, given))
        for training in (True, False):
            want = plain(training)
            agree(run(training, False), want)
            agree(known(training), want)
            found = run(training, True)
            agree(found[1][1], want[1][1])
            assert not np.array_equal(found[1][0], want[1][0])
        assert run._cache_size() == known._cache_size() == 1
    sure = jax.jit(lambda: data.results(layer_of(EIGHT_BITS, True), True, True, given))()
    agree(sure[1][1], plain(True)[1][1])


def test_it_stays_one_call(rng: np.random.Generator) -> None:
    data = Data(rng)

    def calls(batch: bool, active: Any) -> list[str]:
        layer = layer_of(EIGHT_BITS, batch)
        text = jax.jit(lambda a: data.results(layer, True, a)).lower(active).as_text()
        return [
            name for name in ("forward", "gradient") for _ in range(text.count(f"@fusebn_{name}"))
        ]

    assert calls(False, True) == calls(False, jnp.array(True)) == ["forward", "gradient"]


# ---- gradients ----


def test_straight_through(rng: np.random.Generator) -> None:
    """The gradient of a quantized variable is that of a layer that has it so, unless clipped."""
    data = Data(rng)
    data.params = {"scale": jnp.array([0.31, -1.4, 2]), "bias": jnp.array([0.2, 0.6, -3])}
    clip = FakeQuantize(3, limits=(-1.0, 1.0))
    transforms = {"scale": FakeQuantize(3), "offset": clip}
    found, (y, _) = data.compiled(layer_of(transforms), True)
    data.params = {
        "scale": FakeQuantize(3)(data.params["scale"]),
        "bias": clip(data.params["bias"]),
    }
    want, (expected, _) = data.compiled(layer_of(), True)
    assert_same(y, expected)
    assert_same(found[0]["scale"], want[0]["scale"])
    assert_same(found[0]["bias"], want[0]["bias"] * jnp.array([1, 1, 0]))
    assert_same(found[1], want[1])


@pytest.mark.parametrize("batch", [False, True])
def test_transforms_may_learn(rng: np.random.Generator, batch: bool) -> None:
    """A step of their own, as in learned step size quantization."""
    data = Data(rng)

    @partial(jax.jit, static_argnums=1)
    def of(factor: Array, transforms: Any) -> Array:
        layer = layer_of({name: lambda v: v * factor for name in transforms}, batch)
        variables = {"params": data.params, "batch_stats": data.averages}
        y = layer.apply(variables, data.x, use_running_average=not batch, mutable="batch_stats")[0]
        return (y * data.dy).sum()

    names = tuple(SMOOTH)
    gradient = jax.grad(of)(1.5, names)
    np.testing.assert_allclose(gradient, (of(1.51, names) - of(1.49, names)) / 0.02, rtol=2e-3)
    assert abs(gradient) > 0.1


# ---- degenerate ----


def test_a_variance_is_never_below_zero(rng: np.random.Generator) -> None:
    data = Data(rng)
    below = {"moving_variance": lambda v: v - 10}
    for batch, training in ((True, True), (False, False)):
        layer = layer_of(below, batch, epsilon=0.25, activation=None)
        _, (y, _) = data.compiled(layer, training)
        mean = data.x.mean((0, 1)) if training else data.averages["mean"]
        want = (data.x - mean) * 2 * data.params["scale"] + data.params["bias"]
        assert_near(y, want, 16)
        layer = layer_of(below, batch, epsilon=0.0)
        gradients, (y, _) = data.compiled(layer, training)
        assert_near(y, jnp.broadcast_to(jax.nn.silu(data.params["bias"]), y.shape), 4)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    data.params["scale"] *= 0
    gradients, (y, _) = data.compiled(layer_of(EIGHT_BITS, True), True)
    assert_near(y[0, 0], jax.nn.silu(FakeQuantize(8)(data.params["bias"])), 4)
    assert (gradients[1] == 0).all()


def test_a_batch_of_nothing(rng: np.random.Generator) -> None:
    data = Data(rng)
    for layer in (layer_of(EIGHT_BITS, True), layer_of(EIGHT_BITS, False)):
        for mask in (jnp.zeros_like(data.mask), jnp.zeros(data.x.shape, bool)):
            _, (y, updated) = data.compiled(layer, True, mask=mask)
            want = jax.nn.silu(FakeQuantize(8)(data.params["bias"]))
            assert_near(y, jnp.broadcast_to(want, y.shape), 4)
            assert_same(updated["batch_stats"], data.averages)


# ---- observers ----


def observers() -> dict[str, Any]:
    return {
        name: fbj.linen.FakeQuantize(8, limits="moving", decay=0.5, delay=i)
        for i, name in enumerate(SMOOTH)
    }


def test_observers_look_on_in_float_mode(rng: np.random.Generator) -> None:
    """At the variables before the update; with `transform_batch_statistics` at the batch's."""
    data = Data(rng)
    for batch, active in ((False, False), (False, True), (True, False), (True, True)):
        layer = layer_of(observers(), batch)
        state = layer.init(KEY, data.x, use_running_average=False)["quantize"]
        assert sorted(state) == [f"transforms_{name}" for name in sorted(SMOOTH)]
        for switch in (active, jnp.array(active)):
            _, (_, updated) = data.compiled(layer, True, switch, quantize=state)
            seen = {**data.params, **data.averages}
            if batch and active:
                seen |= {"mean": data.x.mean((0, 1)), "var": data.x.var((0, 1))}
            for name, flax in FLAX.items():
                kept = updated["quantize"][f"transforms_{name}"]
                assert kept["steps"] == 1
                np.testing.assert_allclose(kept["low"], seen[flax].min(), rtol=1e-6)
                np.testing.assert_allclose(kept["high"], seen[flax].max(), rtol=1e-6)
        _, (_, same) = data.compiled(layer, False, active, quantize=updated["quantize"])
        assert_same(same["quantize"], updated["quantize"])


def test_the_state_is_saved(rng: np.random.Generator) -> None:
    data = Data(rng)
    layer = layer_of(observers())
    variables = layer.init(KEY, data.x, use_running_average=False)
    for _ in range(2):
        options = {"use_running_average": False, "mutable": ["batch_stats", "quantize"]}
        _, updated = layer.apply(variables, data.x, **options)
        variables = {**variables, **updated}
    empty = layer.init(KEY, data.x, use_running_average=True)
    loaded = serialization.from_bytes(empty, serialization.to_bytes(variables))
    assert loaded["quantize"]["transforms_scale"]["steps"] == 2
    y, z = (layer.apply(v, data.x, use_running_average=True) for v in (variables, loaded))
    assert_same_bits(y, z)


class Block(linen.Module):
    @linen.compact
    def __call__(self, x: Array, _: Any = None) -> tuple[Array, None]:
        transforms = {"scale": fbj.linen.FakeQuantize(3, limits="moving"), "moving_mean": jnp.tanh}
        layer = fbj.linen.BatchNorm(use_running_average=False, transforms=transforms)
        return layer(x) + x, None


def test_in_a_network_and_a_scan(rng: np.random.Generator) -> None:
    data = Data(rng)
    axes = {"params": 0, "batch_stats": 0, "quantize": 0}
    stack = linen.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)()
    variables = stack.init(KEY, data.x, None)
    apply = jax.jit(partial(stack.apply, mutable=["batch_stats", "quantize"]))
    (y, _), updated = apply(variables, data.x, None)
    [steps] = [leaf for leaf in jax.tree.leaves(updated["quantize"]) if leaf.dtype == jnp.int32]
    assert steps.tolist() == [1, 1]
    x = data.x
    for i in range(2):
        one = jax.tree.map(lambda v, i=i: v[i], variables)
        (x, _), _ = Block().apply(one, x, mutable=["batch_stats", "quantize"])
    assert_near(y, x, 16)


# ---- NNX ----


@pytest.mark.parametrize("batch", [False, True])
def test_nnx_does_the_same(rng: np.random.Generator, batch: bool) -> None:
    data, traces = Data(rng), []
    mine, theirs = (
        {name: kind(4, limits="moving") for name in FLAX}
        for kind in (fbj.nnx.FakeQuantize, fbj.linen.FakeQuantize)
    )
    options = {**OPTIONS, "transforms": mine, "transform_batch_statistics": batch}
    switch = nnx.Variable(jnp.array(False))
    layer = fbj.nnx.BatchNorm(3, **options, transforms_active=switch, rngs=nnx.Rngs(0))
    for name, value in {**data.params, **data.averages}.items():
        getattr(layer, name)[...] = value
    other = layer_of(theirs, batch)
    state = other.init(KEY, data.x, use_running_average=True)["quantize"]

    @nnx.jit
    def step(layer: Any, x: Array) -> Any:
        traces.append(x)
        return nnx.grad(lambda m, x: (m(x) * data.dy).sum(), argnums=(0, 1))(layer, x)

    for active in (False, True):
        layer.transforms_active[...] = jnp.array(active)
        want, (_, updated) = data.compiled(other, True, active, quantize=state)
        found, dx = step(layer, data.x)
        found = nnx.to_pure_dict(nnx.state(found, nnx.Param))
        assert_near((found, dx), want, 64)
        averages = {name: getattr(layer, name)[...] for name in ("mean", "var")}
        assert_near(averages, updated["batch_stats"], 4)
        data.averages, state = updated["batch_stats"], updated["quantize"]
    assert len(traces) == 1
    kept = nnx.to_pure_dict(nnx.state(layer))["transforms"]
    want = {name.removeprefix("transforms_"): dict(of) for name, of in state.items()}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), kept, want)
    layer.eval()
    assert_near(layer(data.x), data.compiled(other, False, quantize=state)[1][0], 16)


class Scaled(nnx.Module):
    def __init__(self) -> None:
        self.factor = nnx.Param(jnp.array(1.5))

    def __call__(self, v: Array) -> Array:
        return v * self.factor[...]


def test_parameters_of_a_transform_are_the_layers(rng: np.random.Generator) -> None:
    data = Data(rng)
    layer = fbj.nnx.BatchNorm(
        3, transforms={"scale": Scaled(), "offset": jnp.tanh}, rngs=nnx.Rngs(0)
    )
    gradients = nnx.grad(lambda m: (m(data.x) * data.dy).sum())(layer)
    y = nnx.view(layer, use_running_average=False)(data.x)
    factor = gradients["transforms"]["scale"]["factor"][...]
    assert_near(factor, (y * data.dy).sum() / 1.5, 64)
    assert sorted(nnx.to_pure_dict(nnx.state(layer, nnx.Param))) == ["bias", "scale", "transforms"]


# ---- devices ----


@pytest.mark.parametrize("way", ["vmap", "shard_map"])
def test_what_all_parts_have_together_is_transformed(rng: np.random.Generator, way: str) -> None:
    data = Data(rng)
    x, dy = (jnp.asarray(rng.standard_normal((16, 2, 3)), jnp.float32) for _ in range(2))
    variables = {"params": data.params, "batch_stats": data.averages}

    def local(x: Array, dy: Array, active: Any, axis_name: str | None) -> Any:
        layer = layer_of(SMOOTH, True, axis_name=axis_name)

        def loss(params: Any, x: Array) -> Any:
            options = {"transforms_active": active, "mutable": ["batch_stats"]}
            given = {**variables, "params": params}
            y, updated = layer.apply(given, x, use_running_average=False, **options)
            return (y * dy).sum(), (y, updated)

        return jax.grad(loss, (0, 1), has_aux=True)(data.params, x)

    def in_parts(x: Array, dy: Array, active: Any) -> Any:
        if way == "vmap":
            parts = (v.reshape(8, 2, 2, 3) for v in (x, dy))
            (dp, dx), (y, updated) = jax.vmap(
                lambda x, dy: local(x, dy, active, "parts"), axis_name="parts"
            )(*parts)
            dp = jax.tree.map(lambda v: v.sum(0), dp)
            updated = jax.tree.map(lambda v: v[0], updated)
            return (dp, dx.reshape(x.shape)), (y.reshape(x.shape), updated)
        specs = {
            "in_specs": (P("parts"), P("parts"), P()),
            "out_specs": ((P(), P("parts")), (P("parts"), P())),
        }
        return jax.shard_map(lambda *a: local(*a, "parts"), mesh=mesh(parts=8), **specs)(
            x, dy, active
        )

    for active in (True, False):
        want = jax.jit(partial(local, active=active, axis_name=None))(x, dy)
        assert_near(jax.jit(in_parts)(x, dy, jnp.array(active)), want, 256)


# ---- what else ----


def test_effective_variables(rng: np.random.Generator) -> None:
    data = Data(rng)
    variables = {"params": data.params, "batch_stats": data.averages}
    found = layer_of(SMOOTH, epsilon=0.5).bind(variables).effective_variables()
    values = {**data.params, **data.averages}
    want = {name: SMOOTH[name](values[flax]) for name, flax in FLAX.items()}
    assert found.pop("epsilon") == 0.5
    assert_near(list(found.values()), list(want.values()), 2)
    assert list(found) == ["scale", "offset", "mean", "variance"]
    layer = fbj.nnx.BatchNorm(3, transforms=SMOOTH, transforms_active=False, rngs=nnx.Rngs(0))
    assert layer.effective_variables()["variance"].tolist() == [1, 1, 1]
    layer.transforms_active = True
    assert_near(layer.effective_variables()["variance"], jnp.exp(-jnp.ones(3)), 2)
    plain = fbj.linen.BatchNorm(use_scale=False, use_bias=False).bind(
        {"batch_stats": data.averages}
    )
    assert [plain.effective_variables()[name] for name in ("scale", "offset")] == [None, None]


def test_several_feature_axes(rng: np.random.Generator) -> None:
    """A variable has its own shape, and so have the batch's statistics."""
    shapes = []

    def seen(v: Array) -> Array:
        shapes.append(v.shape)
        return v * 2

    x = jnp.asarray(rng.standard_normal((7, 2, 4, 3)), jnp.float32)
    layer = layer_of(dict.fromkeys(FLAX, seen), True, axis=(1, 3))
    variables = layer.init(KEY, x, use_running_average=False)
    layer.apply(variables, x, use_running_average=False, mutable="batch_stats")
    assert set(shapes) == {(2, 3)}


ERRORS = (
    ({"gamma": jnp.tanh}, {}, ValueError, "`transforms` must name scale, offset, moving_mean"),
    ([jnp.tanh], {}, TypeError, "`transforms` must be a mapping"),
    ({"scale": 3}, {}, TypeError, r"`transforms\['scale'\]` must be a function"),
    ({"scale": lambda v: v[:2]}, {}, ValueError, r"`transforms\['scale'\]` must return the shape"),
    (SMOOTH, {"transforms_active": 1}, TypeError, "`transforms_active` must be a bool"),
    (SMOOTH, {"transforms_active": jnp.ones(1, bool)}, TypeError, "`transforms_active` must be"),
    (SMOOTH, {"transform_batch_statistics": None}, TypeError, "`transform_batch_statistics` must"),
)


@pytest.mark.parametrize(
    ("transforms", "options", "kind", "message"), ERRORS, ids=lambda v: str(v)[:20]
)
def test_errors(transforms: Any, options: Any, kind: Any, message: str) -> None:
    x, options = jnp.ones((4, 3)), {"transforms": transforms, **options}

    def with_linen() -> Any:
        return fbj.linen.BatchNorm(**options).init(KEY, x, use_running_average=True)

    def with_nnx() -> Any:
        return fbj.nnx.BatchNorm(3, **options, rngs=nnx.Rngs(0))(x, use_running_average=True)

    for layer in (with_linen, with_nnx):
        with pytest.raises(kind, match=f"BatchNorm: {message}"):
            jax.eval_shape(layer)


def test_a_nan_is_found_where_values_are_known() -> None:
    lost = {"moving_variance": lambda v: jnp.log(v - 2)}
    layer = fbj.nnx.BatchNorm(3, transforms=lost, rngs=nnx.Rngs(0))
    message = r"`transforms\['moving_variance'\]` must return no NaN for what has none"
    with pytest.raises(ValueError, match=message):
        layer(jnp.ones((4, 3)), use_running_average=True)
    layer(jnp.ones((4, 3)), use_running_average=True, transforms_active=jnp.array(False))
    with pytest.raises(TypeError, match="`x` must be real beside"):
        layer(jnp.ones((4, 3)) + 1j)
