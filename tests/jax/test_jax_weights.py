"""The gradients of weights: the same on every road, at weight 0 as well, and of a batch of nothing.

A weight moves the mean by (x - mean) / count and the variance by ((x - mean)^2 - variance) / count,
whatever it is: where it is 0 a position begins to count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_jax_ops import portably

import fusebn
import fusebn.jax as fbj
from fusebn import _reference as reference

Array = Any
WEIGHTS = np.array([1.5, 0, 2, 0, 0.5, 1])
ROADS: dict[str, Callable[[Any], Any]] = {"native": lambda function: function, "portable": portably}


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def normalized(x: Array, weights: Array) -> Any:
    return tuple(fusebn.fused_batch_norm(x, None, None, weights=weights, axis=1, activation="silu"))


def in_parts(x: Array, weights: Array) -> Any:
    """Three parts of a batch, each of which counts."""

    def part(x: Array, weights: Array) -> Any:
        options = {"weights": weights, "axis_name": "parts", "activation": "silu"}
        return tuple(fbj.batch_norm(x, None, None, None, None, **options))

    y, mean, variance = jax.vmap(part, axis_name="parts")(
        x.reshape(3, 2, -1), weights.reshape(3, 2)
    )
    return y, mean[0], variance[1]


FUNCTIONS: dict[str, Callable[[Array, Array], Any]] = {
    "moments": lambda x, weights: fusebn.moments(x, 0, weights=weights),
    "moments over two axes": lambda x, weights: fusebn.moments(
        x.reshape(2, 3, -1), (0, 1), weights=weights.reshape(2, 3)
    ),
    "weights of every channel": lambda x, weights: fusebn.weighted_moments(
        x, 0, weights[:, None] * jnp.ones(x.shape)
    ),
    "batch norm": normalized,
    "in parts": in_parts,
}
every_road = pytest.mark.parametrize("road", ROADS)
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def loss_of(name: str, road: str) -> Callable[[Array, Array], Array]:
    """Return a number that depends on all results, and on none of them linearly."""
    function = ROADS[road](FUNCTIONS[name])
    return jax.jit(lambda x, weights: sum(jnp.sin(v).sum() for v in function(x, weights)))


def slope(function: Callable[[float], Array], h: float = 1e-4) -> Array:
    """Return the derivative at 0 of what there is from 0 on, with an error of h^3."""
    at = [function(i * h) for i in range(4)]
    return (18 * at[1] - 11 * at[0] - 9 * at[2] + 2 * at[3]) / (6 * h)


@every_function
@every_road
def test_against_differences(rng: np.random.Generator, name: str, road: str) -> None:
    x, loss = rng.standard_normal((6, 3)), loss_of(name, road)
    found = jax.grad(loss, 1)(x, WEIGHTS)
    expected = [slope(lambda h, e=e: loss(x, WEIGHTS + h * e)) for e in np.eye(6)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@every_function
@every_road
def test_together_with_x(rng: np.random.Generator, name: str, road: str) -> None:
    """What a weight of 0 does to the gradient of x: the mixed second derivative."""
    x, loss = rng.standard_normal((6, 3)), loss_of(name, road)
    gradient = jax.jit(jax.grad(loss))
    mixed = jax.jit(jax.jacrev(jax.grad(loss), 1))(x, WEIGHTS)
    expected = [slope(lambda h, e=e: gradient(x, WEIGHTS + h * e)) for e in np.eye(6)]
    np.testing.assert_allclose(mixed, np.stack(expected, -1), rtol=1e-5, atol=1e-6)


@every_road
def test_against_the_formula(rng: np.random.Generator, road: str) -> None:
    x = rng.standard_normal((6, 3))
    batch = reference.moments(x, 0, WEIGHTS[:, None])
    centred, count = x - np.float64(batch.mean), WEIGHTS.sum()
    moments = ROADS[road](FUNCTIONS["moments"])
    dmean, dvariance = jax.jit(jax.jacrev(moments, 1))(x, WEIGHTS)
    np.testing.assert_allclose(dmean.T, centred / count, rtol=1e-12)
    expected = (centred**2 - np.float64(batch.variance())) / count
    np.testing.assert_allclose(dvariance.T, expected, rtol=1e-12)
    forwards = jax.jit(jax.jacfwd(moments, 1))(x, WEIGHTS)
    np.testing.assert_allclose(forwards, (dmean, dvariance), rtol=1e-12)


@pytest.mark.parametrize("name", ["moments", "weights of every channel", "in parts"])
@pytest.mark.parametrize("held", [np.nan, np.inf, 1e200])
@every_road
def test_what_cannot_be_told_is_0(
    rng: np.random.Generator, road: str, held: float, name: str
) -> None:
    """A position of weight 0 may hold anything: it spoils no gradient of the others."""
    x = rng.standard_normal((6, 3))
    function = ROADS[road](FUNCTIONS[name])

    @jax.jit
    def gradients(x: Array) -> Any:
        return jax.grad(lambda *a: sum(jnp.sin(v).sum() for v in function(*a)[-2:]), (0, 1))(
            x, WEIGHTS
        )

    dx, dweights = gradients(x)
    spoilt = x.copy()
    spoilt[3] = held
    dx_spoilt, dweights_spoilt = gradients(spoilt)
    np.testing.assert_allclose(dx_spoilt, dx, rtol=1e-12)
    np.testing.assert_allclose(np.delete(dweights_spoilt, 3), np.delete(dweights, 3), rtol=1e-10)
    if not np.isfinite(held) and name != "in parts":  # what a part counts moves all channels
        assert dweights_spoilt[3] == 0
    assert np.isfinite(dweights_spoilt).all()


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@every_road
def test_a_batch_of_nothing(rng: np.random.Generator, road: str, activation: str | None) -> None:
    """y is activation(offset + residual), whatever x holds; so only these two have gradients."""
    x, residual, dy = rng.standard_normal((3, 6, 2))
    x[2, 1] = np.nan
    scale, offset = rng.standard_normal((2, 2))

    def step(x: Array, scale: Array, offset: Array, residual: Array) -> Array:
        options = {"weights": np.zeros(6), "residual": residual, "activation": activation}
        return fusebn.fused_batch_norm(x, scale, offset, axis=1, **options).y

    y, back = jax.vjp(jax.jit(ROADS[road](step)), x, scale, offset, residual)
    dx, dscale, doffset, dresidual = back(dy)
    value, derivative = reference.ACTIVATIONS[activation]
    want = np.float64(dy * derivative(offset + residual))
    np.testing.assert_allclose(y, np.float64(value(offset + residual)), rtol=1e-12)
    np.testing.assert_allclose(dresidual, want, rtol=1e-10)
    np.testing.assert_allclose(doffset, want.sum(0), rtol=1e-10)
    assert not dx.any()
    assert not dscale.any()
