"""A batch in parts, on eight devices or along an axis of vmap, against the batch in one piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax_arrays import assert_near

import fusebn.jax as fbj
from fusebn import _reference as reference

Array = Any
PARTS = 8


def mesh(**axes: int) -> Any:
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def over_parts(way: str, function: Callable[..., Any], axis_name: Any = "parts") -> Any:
    """Return a function of stacked parts and of what they share, which returns stacked results."""
    if way == "vmap":
        return lambda parts, shared: jax.vmap(
            lambda part: function(part, shared), axis_name="parts"
        )(parts)
    if way == "pmap":
        return jax.pmap(function, axis_name="parts", in_axes=(0, None))

    def inside(parts: Any, shared: Any) -> Any:
        found = function(jax.tree.map(lambda v: v[0], parts), shared)
        return jax.tree.map(lambda v: v[None], found)

    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    sizes = dict(zip(names, (2, 4) if len(names) == 2 else (PARTS,), strict=True))
    specs = {"in_specs": (P(names), P()), "out_specs": P(names)}
    check = way == "shard_map"
    return jax.shard_map(inside, mesh=mesh(**sizes), **specs, check_vma=check)


class Batch:
    """The parts of a batch, what they share, and what flows into the results."""

    def __init__(self, rng: np.random.Generator, weights: str = "uneven") -> None:
        shape = (PARTS, 3, 2, 5)
        self.x, self.residual, self.dy = (jnp.asarray(rng.standard_normal(shape)) for _ in range(3))
        self.weights = jnp.asarray(rng.uniform(0.5, 2, (*shape[:-1], 1)))
        if weights == "uneven":
            self.weights *= jnp.asarray(rng.random(self.weights.shape) > 0.4)
            self.weights = self.weights.at[2].set(0)
        vectors = (jnp.asarray(rng.standard_normal(5)) for _ in range(4))
        self.scale, self.offset, self.dmean, self.dvariance = vectors
        self.parts = {"x": self.x, "residual": self.residual, "weights": self.weights}
        self.shared = {"scale": self.scale, "offset": self.offset}
        self.given = jnp.zeros(5), jnp.ones(5)

    def call(self, part: Any, shared: Any, is_training: Any = True, **options: Any) -> Any:
        return tuple(
            fbj.batch_norm(
                part["x"],
                shared["scale"],
                shared["offset"],
                *self.given,
                residual=part.get("residual"),
                weights=part["weights"],
                is_training=is_training,
                exponential_avg_factor=0.1,
                activation="gelu" if "residual" in part else None,
                **options,
            )
        )

    def in_parts(self, way: str, is_training: Any = True) -> Callable[[Any, Any], Any]:
        function = partial(self.call, is_training=is_training, axis_name="parts")
        mapped = over_parts(way, function)

        def results(parts: Any, shared: Any) -> Any:
            y, mean, variance = mapped(parts, shared)
            return y, mean[3], variance[5]

        return results

    def in_one(self, parts: Any, shared: Any, is_training: Any = True) -> Any:
        joined = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), parts)
        y, *statistics = self.call(joined, shared, is_training)
        return y.reshape(self.x.shape), *statistics

    def everything(self, results: Callable[..., Any]) -> Any:
        """Return results and gradients."""
        return results(self.parts, self.shared), self.gradients(results)

    def loss(self, results: Callable[..., Any]) -> Callable[[Any, Any], Array]:
        def loss(parts: Any, shared: Any) -> Array:
            y, mean, variance = results(parts, shared)
            return (y * self.dy).sum() + (mean * self.dmean + variance * self.dvariance).sum()

        return loss

    def gradients(self, results: Callable[..., Any]) -> Any:
        """Return the gradients, but not of the weights of a part that is nothing but 0."""
        parts, shared = jax.grad(self.loss(results), (0, 1))(self.parts, self.shared)
        some = (self.weights > 0).any((1, 2, 3), keepdims=True)
        return {**parts, "weights": jnp.where(some, parts["weights"], 0)}, shared


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@cache
def batch_and_answers(weights: str) -> tuple[Batch, Any]:
    """Return a batch, and its answers in one piece: training, not training, second derivatives."""
    batch = Batch(np.random.default_rng(0), weights)

    @jax.jit
    def answers() -> Any:
        if weights == "positive":
            return second_derivatives(batch, batch.in_one)
        return [batch.everything(partial(batch.in_one, is_training=t)) for t in (True, False)]

    return batch, answers()


def second_derivatives(batch: Batch, results: Callable[..., Any]) -> Any:
    def length(parts: Any) -> Array:
        first = jax.grad(batch.loss(results))(parts, batch.shared)
        return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(first))

    return jax.grad(length)({"x": batch.x, "weights": batch.weights})


@pytest.mark.parametrize("way", ["shard_map, unchecked", "pmap", "vmap"])
def test_parts_of_any_weights(way: str) -> None:
    """One part has no weight at all. Gradients flow into the returned statistics as well."""
    batch, (expected, _) = batch_and_answers("uneven")
    parts = batch.in_parts(way)
    everything = batch.everything if way == "pmap" else jax.jit(batch.everything, static_argnums=0)
    assert_near(everything(parts), expected, 256)


def test_a_traced_switch() -> None:
    batch, expected = batch_and_answers("uneven")
    traces = []

    @jax.jit
    def everything(is_training: Any) -> Any:
        traces.append(is_training)
        return batch.everything(batch.in_parts("shard_map", is_training))

    for is_training, answer in zip((True, False), expected, strict=True):
        assert_near(everything(is_training), answer, 256)
    assert len(traces) == 1


def test_second_derivatives() -> None:
    """Along an axis of vmap, where JAX cannot differentiate collectives in a custom derivative."""
    batch, expected = batch_and_answers("positive")
    found = jax.jit(lambda: second_derivatives(batch, batch.in_parts("vmap")))()
    assert_near(found, expected, 1024)


def test_nobody_has_anything(rng: np.random.Generator) -> None:
    batch = Batch(rng)
    batch.parts["weights"] = jnp.zeros_like(batch.weights)
    batch.parts["x"] = batch.x.at[0].set(jnp.nan)
    everything = jax.jit(lambda: batch.everything(batch.in_parts("shard_map")))
    (y, mean, variance), (gradients, shared) = everything()
    assert_near(y, jax.nn.gelu(batch.offset + batch.residual, approximate=False), 16)
    assert (mean == batch.given[0]).all()
    assert (variance == batch.given[1]).all()
    assert (gradients["x"] == 0).all()
    assert_near(shared["offset"], gradients["residual"].sum((0, 1, 2)), 64)


def test_one_collective_there_and_one_back(rng: np.random.Generator) -> None:
    batch = Batch(rng)
    function = partial(batch.call, axis_name="parts")

    def loss(x: Array, part: Any) -> Array:
        return (function({**part, "x": x}, batch.shared)[0] * part["residual"]).sum()

    def collectives(function: Any) -> dict[str, int]:
        mapped = over_parts("shard_map, unchecked", lambda part, _: function(part["x"], part))
        program = str(jax.make_jaxpr(mapped)(batch.parts, None))
        return {name: program.count(f"= {name}[") for name in ("all_gather", "psum", "all_to_all")}

    assert collectives(loss) == {"all_gather": 1, "psum": 0, "all_to_all": 0}
    assert collectives(jax.grad(loss)) == {"all_gather": 1, "psum": 1, "all_to_all": 0}


def test_groups(rng: np.random.Generator) -> None:
    batch = Batch(rng, "positive")
    groups = [[0, 2, 4, 6], [1, 3, 5, 7]]
    function = partial(batch.call, axis_name="parts", axis_index_groups=groups)
    y, mean, variance = over_parts("pmap", function)(batch.parts, batch.shared)
    for group in groups:
        own = jax.tree.map(
            lambda v, g=group: v[jnp.array(g)].reshape(-1, *v.shape[2:]), batch.parts
        )
        expected = batch.call(own, batch.shared)
        assert_near(y[jnp.array(group)].reshape(-1, *y.shape[2:]), expected[0], 64)
        for part in group:
            assert_near((mean[part], variance[part]), expected[1:], 64)


def test_several_axes_of_a_mesh(rng: np.random.Generator) -> None:
    batch = Batch(rng)
    names = ("hosts", "cores")
    mapped = jax.jit(over_parts("shard_map", partial(batch.call, axis_name=names), names))
    y, mean, variance = mapped(batch.parts, batch.shared)
    expected = batch.in_one(batch.parts, batch.shared)
    assert_near((y, mean[0], variance[7]), expected, 64)


def test_statistics_are_known_to_be_the_same_everywhere(rng: np.random.Generator) -> None:
    """So that shard_map, which checks it, lets them out as what no device has for itself."""
    x = jnp.asarray(rng.standard_normal((16, 3)))

    def local(x: Array, mean: Array, variance: Array) -> Any:
        options = {"exponential_avg_factor": 0.1, "axis_name": "parts"}
        return fbj.batch_norm(x, None, None, mean, variance, **options)[1:]

    specs = {"in_specs": (P("parts"), P(), P()), "out_specs": (P(), P())}
    given = jnp.zeros(3), jnp.ones(3)
    found = jax.jit(jax.shard_map(local, mesh=mesh(parts=PARTS), **specs))(x, *given)
    expected = fbj.batch_norm(x, None, None, *given, exponential_avg_factor=0.1)
    assert_near(found, expected[1:], 16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_large_mean_in_parts(rng: np.random.Generator, dtype: str) -> None:
    """Without a float64 anywhere, and to the same bits on every device."""
    with jax.enable_x64(False):
        values = rng.standard_normal((PARTS, 64, 3)) * 0.1 + (1e4 if dtype == "float32" else 10)
        x = jnp.asarray(values, dtype)
        function = partial(fbj.batch_norm, axis_name="parts", correction=0, epsilon=1e-5)
        y, mean, variance = over_parts("pmap", lambda x, _: tuple(function(x, *[None] * 4)))(
            x, None
        )
    whole = np.asarray(x).reshape(-1, 3)
    want = reference.fused_batch_norm(whole, None, None, epsilon=1e-5, axis=-1, correction=0)
    assert (mean == mean[0]).all()
    assert (variance == variance[0]).all()
    np.testing.assert_allclose(mean[0], np.float64(want.mean), rtol=1e-7)
    np.testing.assert_allclose(variance[0], np.float64(want.variance), rtol=1e-6)
    tolerance = 1e-5 if dtype == "float32" else 0.02
    y = np.asarray(y, np.float64).reshape(-1, 3)
    np.testing.assert_allclose(y, np.float64(want.y), atol=tolerance)


# ---- layers ----


@pytest.mark.parametrize("way", ["shard_map", "pmap"])
def test_flaxs_layer_has_the_same_gradients(rng: np.random.Generator, way: str) -> None:
    x, dy = (jnp.asarray(rng.standard_normal((PARTS, 3, 4)), jnp.float32) for _ in range(2))

    def results(kind: Any) -> Any:
        layer = kind(use_running_average=False, axis_name="parts", use_fast_variance=False)
        variables = layer.init(jax.random.key(0), x[0])

        def local(part: Any, params: Any) -> Any:
            x, dy = part

            def loss(params: Any, x: Array) -> Any:
                given = {**variables, "params": params}
                y, updated = layer.apply(given, x, mutable=["batch_stats"])
                return (y * dy).sum(), (y, updated)

            return jax.grad(loss, (0, 1), has_aux=True)(params, x)

        mapped = over_parts(way, local)
        mapped = mapped if way == "pmap" else jax.jit(mapped)
        return mapped((x, dy), variables["params"])

    found, expected = (results(kind) for kind in (fbj.linen.BatchNorm, linen.BatchNorm))
    assert_near(found, expected, 64)


@pytest.mark.parametrize("own", [False, True], ids=["of positions", "of every channel"])
def test_uneven_masks(rng: np.random.Generator, own: bool) -> None:
    x = jnp.asarray(rng.standard_normal((PARTS, 3, 4)))
    mask = jnp.asarray(rng.random((PARTS, 3, 4 if own else 1)) > 0.5).at[1].set(False)

    def run(kind: Any, parts: bool) -> Any:
        layer = kind(use_running_average=False, axis_name="parts" if parts else None, momentum=0.5)
        variables = layer.init(jax.random.key(0), x[0])

        def local(part: Any, variables: Any) -> Any:
            x, mask = part
            return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])

        if parts:
            y, updated = jax.jit(over_parts("shard_map", local))((x, mask), variables)
            return y, jax.tree.map(lambda v: v[0], updated)
        y, updated = local((x.reshape(-1, 4), mask.reshape(-1, mask.shape[-1])), variables)
        return y.reshape(x.shape), updated

    assert_near(run(fbj.linen.BatchNorm, True), run(fbj.linen.BatchNorm, False), 64)
    # In one piece Flax is right too; in parts it takes the mean of means, one of them of nothing.
    assert_near(run(fbj.linen.BatchNorm, False), run(linen.BatchNorm, False), 1e3)
    assert jnp.isnan(run(linen.BatchNorm, True)[1]["batch_stats"]["mean"]).any()
