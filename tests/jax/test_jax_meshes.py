"""Arrays that are sharded over a mesh, under plain jit: divided, not gathered, and all the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_arrays import assert_near

import fusebn
import fusebn.jax as fbj

Array = Any
SHAPE = (16, 4, 6, 8)
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}
SPECS = {
    "batch": P("data"),
    "over both": P(("data", "model")),
    "channels": P(None, None, None, "model"),
    "batch and channels": P("data", None, None, "model"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_spec = pytest.mark.parametrize("spec", SPECS)


def sharding(kind: str, spec: Any) -> NamedSharding:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(KINDS[kind],) * 2)
    return NamedSharding(mesh, spec)


def largest_gather(compiled: Any) -> int:
    """Return how many elements the largest array has that is gathered from all devices."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]* all-gather(?:-start)?\(", compiled.as_text())
    return max((int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes), default=0)


def assert_divided(
    function: Callable[..., Any], arguments: Any, places: Any, ulps: float = 64
) -> Any:
    """Assert that a function of sharded arrays yields what it does of whole ones, ungathered."""
    wanted = jax.jit(function)(*arguments)
    sharded = [
        value if place is None else jax.device_put(value, place)
        for value, place in zip(arguments, places, strict=True)
    ]
    compiled = jax.jit(function).lower(*sharded).compile()
    assert largest_gather(compiled) < arguments[0].size // 8
    found = jax.jit(function)(*sharded)
    assert_near(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, wanted), ulps)
    return found


def inputs(rng: np.random.Generator) -> tuple[Array, ...]:
    """Return x, dy, scale and offset."""
    shapes: Any = SHAPE, SHAPE, SHAPE[-1:], SHAPE[-1:]
    return tuple(jnp.asarray(rng.normal(3, 2, shape), jnp.float32) for shape in shapes)


def step(x: Array, dy: Array, scale: Array, offset: Array, **options: Any) -> Any:
    def loss(x: Array, scale: Array, offset: Array) -> Any:
        found = fusebn.fused_batch_norm(x, scale, offset, activation="silu", **options)
        return (found.y * dy).sum() + found.variance.sum(), found

    gradients, found = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, offset)
    return tuple(found), gradients


@every_spec
@every_kind
def test_training(rng: np.random.Generator, kind: str, spec: str) -> None:
    place = sharding(kind, SPECS[spec])
    (y, *_), (dx, *_) = assert_divided(step, inputs(rng), [place, place, None, None], 256)
    for of_x in (y, dx):
        assert of_x.sharding.is_equivalent_to(place, 4)


@every_kind
def test_channels_first(rng: np.random.Generator, kind: str) -> None:
    x, dy, scale, offset = inputs(rng)
    arguments = x.transpose(0, 3, 1, 2), dy.transpose(0, 3, 1, 2), scale, offset
    place = sharding(kind, P("data", "model"))
    assert_divided(partial(step, data_format="NCHW"), arguments, [place, place, None, None], 256)


@every_kind
def test_a_mask(rng: np.random.Generator, kind: str) -> None:
    """Which leaves to some devices much, and to some nothing."""
    mask = rng.random(SHAPE[:3]) > 0.5
    mask[4:8] = False
    place, of_mask = (sharding(kind, P("data")) for _ in range(2))

    def masked(*arguments: Any) -> Any:
        *rest, weights = arguments
        return step(*rest, weights=weights)

    arguments = *inputs(rng), jnp.asarray(mask)
    assert_divided(masked, arguments, [place, place, None, None, of_mask], 256)


@every_kind
def test_inference_and_a_traced_flag(rng: np.random.Generator, kind: str) -> None:
    x, _, mean, variance = inputs(rng)

    def function(x: Array, mean: Array, variance: Array, is_training: Any) -> Any:
        options = {"is_training": is_training, "exponential_avg_factor": 0.1}
        return tuple(fusebn.fused_batch_norm(x, None, None, mean, variance, **options))

    place = sharding(kind, P("data"))
    for is_training in (True, False):
        arguments = x, mean, jnp.square(variance), jnp.asarray(is_training)
        assert_divided(function, arguments, [place, None, None, None])


@every_kind
def test_the_other_functions(rng: np.random.Generator, kind: str) -> None:
    place = sharding(kind, P("data", None, None, "model"))

    def function(x: Array, dy: Array, scale: Array, offset: Array) -> Any:
        mean, variance = fusebn.moments(x, (0, 1, 2))
        gradients = fusebn.fused_batch_norm_grad(dy, x, scale, offset, mean, variance, residual=x)
        y = fusebn.batch_normalization(x, mean, variance, offset, scale, 1e-3)
        return mean, variance, tuple(gradients), y

    assert_divided(function, inputs(rng), [place, place, None, None], 256)


@pytest.mark.parametrize("transform", ["vmap", "remat", "scan"])
def test_transformed(rng: np.random.Generator, transform: str) -> None:
    def one(x: Array) -> Array:
        return jnp.sin(fusebn.fused_batch_norm(x, None, None, axis=-1).y).sum()

    of: dict[str, Callable[[Array], Any]] = {
        "vmap": jax.grad(lambda x: jax.vmap(one, 1)(x).sum()),
        "remat": jax.grad(jax.checkpoint(one)),
        "scan": jax.grad(lambda x: jax.lax.scan(lambda c, _: (c + one(x), None), 0.0, None, 2)[0]),
    }
    assert_divided(of[transform], inputs(rng)[:1], [sharding("automatic", P("data"))], 256)


@every_kind
@pytest.mark.parametrize("masked", [False, True])
def test_flaxs_layer(rng: np.random.Generator, kind: str, masked: bool) -> None:
    x, dy, *_ = inputs(rng)
    layer = fbj.linen.BatchNorm(use_running_average=False, activation="relu")
    variables = layer.init(jax.random.key(0), x)
    mask = jnp.asarray(rng.random((*SHAPE[:3], 1)) > 0.3) if masked else None

    def train(x: Array, dy: Array, params: Any) -> Any:
        def loss(params: Any) -> Any:
            given = {**variables, "params": params}
            y, updated = layer.apply(given, x, mask=mask, residual=x, mutable=["batch_stats"])
            return (y * dy).sum(), updated

        return jax.grad(loss, has_aux=True)(params)

    place = sharding(kind, P("data"))
    assert_divided(train, (x, dy, variables["params"]), [place, place, None], 256)


def test_without_jit(rng: np.random.Generator) -> None:
    x, dy, scale, offset = inputs(rng)
    place = sharding("automatic", P("data"))
    found = step(*(jax.device_put(v, place) for v in (x, dy)), scale, offset)
    assert_near(jax.tree.map(np.asarray, found), step(x, dy, scale, offset), 256)
    assert found[0][0].sharding.is_equivalent_to(place, 4)


def test_one_device_of_many_runs_the_kernel() -> None:
    x = jax.device_put(jnp.ones((4, 2)), jax.devices()[3])
    compiled = (
        jax.jit(lambda x: fusebn.fused_batch_norm(x, None, None, axis=1).y).lower(x).compile()
    )
    assert "fusebn_forward" in compiled.as_text()
