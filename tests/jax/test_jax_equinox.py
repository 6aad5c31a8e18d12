"""Equinox's layer on our kernels: its values, gradients, state and files; and where it is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_arrays import assert_near

import fusebn.jax as fbj
from fusebn.jax import equinox as ours

Array = Any
SHAPE = (6, 3, 4, 2)  # a batch of examples, channels first
MODES = ("batch", "ema")


def made(kind: Any, **options: Any) -> Any:
    """Return a layer and its state."""
    settings = {"axis_name": "batch", "mode": "batch", "momentum": 0.75, **options}
    layer, state = eqx.nn.make_with_state(kind)(3, **settings)
    if layer.weight is not None:
        vectors = jnp.array([0.5, -2.0, 1.5]), jnp.array([0.25, 1.0, -1.0])
        layer = eqx.tree_at(lambda m: (m.weight, m.bias), layer, vectors)
    return layer, state


def copy(state: Any) -> Any:
    """Return a state to be used up: Equinox lets nobody use one twice."""
    return jax.tree.map(lambda leaf: leaf, state)


def over_batch(layer: Any, **options: Any) -> Any:
    def call(x: Array, state: Any) -> Any:
        return layer(x, state, **options)

    return jax.vmap(call, axis_name="batch", in_axes=(0, None), out_axes=(0, None))


def batches(rng: np.random.Generator, steps: int = 3) -> list[Array]:
    return [jnp.asarray(rng.normal(2, 3, SHAPE), jnp.float32) for _ in range(steps)]


def floats(tree: Any) -> list[Array]:
    """Return the leaves of a tree, counters as floats."""
    return [
        jnp.asarray(leaf, jnp.float32) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))
    ]


@eqx.filter_jit
def step(layer: Any, state: Any, x: Array, dy: Array) -> Any:
    """Return what a training step makes: y, the gradients of all, the new state."""

    def loss(inputs: Any) -> Any:
        layer, x = inputs
        y, new = over_batch(layer)(x, state)
        return (y * dy).sum(), (y, new)

    gradients, (y, new) = eqx.filter_grad(loss, has_aux=True)((layer, x))
    return (y, [leaf for leaf in jax.tree.leaves(gradients) if leaf is not None]), new


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("affine", [True, False])
def test_training_goes_the_same_way(mode: str, affine: bool, rng: np.random.Generator) -> None:
    """Values, gradients and the state, over several batches."""
    dy = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    pairs = [
        made(kind, mode=mode, channelwise_affine=affine)
        for kind in (ours.BatchNorm, eqx.nn.BatchNorm)
    ]
    states = [state for _, state in pairs]
    for x in batches(rng):
        results = []
        for i, (layer, _) in enumerate(pairs):
            found, states[i] = step(layer, states[i], x, dy)
            results.append((found, floats(states[i])))
        assert_near(*results, 256)


def test_inference_by_averages(rng: np.random.Generator) -> None:
    [x] = batches(rng, 1)
    answers = []
    for kind in (ours.BatchNorm, eqx.nn.BatchNorm):
        layer, state = made(kind, mode="ema")
        _, state = over_batch(layer)(x, state)
        y, same = over_batch(eqx.nn.inference_mode(layer))(x, state)
        assert same is not None
        alone, _ = layer(x[0], state, inference=True)  # no axis is needed
        np.testing.assert_allclose(alone, y[0], atol=1e-5)
        answers.append(y)
    assert_near(*answers, 32)


def test_inference_after_one_batch(rng: np.random.Generator) -> None:
    """The averages are those of what was seen: without the ones that the variance began with."""
    [x] = batches(rng, 1)
    layer, state = made(ours.BatchNorm, channelwise_affine=False)
    y, state = over_batch(layer)(x / 100, state)
    served, state = over_batch(layer, inference=True)(x / 100, state)
    np.testing.assert_allclose(served, y, rtol=1e-3, atol=1e-3)
    theirs, _ = made(eqx.nn.BatchNorm, channelwise_affine=False)
    wrong, _ = over_batch(theirs, inference=True)(x / 100, state)
    assert float(wrong.std()) < 0.1


def test_inference_after_many_batches_is_theirs(rng: np.random.Generator) -> None:
    layer, state = made(ours.BatchNorm)
    theirs, _ = made(eqx.nn.BatchNorm)
    for x in batches(rng, 60):
        _, state = over_batch(layer)(x, state)
    found, wanted = (over_batch(one, inference=True)(x, state)[0] for one in (layer, theirs))
    assert_near(found, wanted, 64)


def test_before_any_batch(rng: np.random.Generator) -> None:
    layer, state = made(ours.BatchNorm, channelwise_affine=False)
    [x] = batches(rng, 1)
    y, _ = over_batch(layer, inference=True)(x, state)
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_traced_flag(mode: str, rng: np.random.Generator) -> None:
    layer, state = made(ours.BatchNorm, mode=mode)
    first, x = batches(rng, 2)
    _, state = over_batch(layer)(first, state)
    traces = []

    @eqx.filter_jit
    def call(state: Any, inference: Any) -> Any:
        traces.append(inference)
        return over_batch(layer, inference=inference)(x, state)

    for inference in (False, True):
        found = call(state, jnp.asarray(inference))
        wanted = over_batch(layer, inference=inference)(x, state)
        assert_near(floats(found), floats(wanted), 32)
    assert len(traces) == 1


@pytest.mark.parametrize("mode", MODES)
def test_activation_and_residual(mode: str, rng: np.random.Generator) -> None:
    x, residual = batches(rng, 2)
    (fused, state), (plain, _) = (
        made(ours.BatchNorm, mode=mode, **options) for options in ({"activation": "relu"}, {})
    )

    def call(x: Array, residual: Array) -> Array:
        return fused(x, state, residual=residual)[0]

    wanted = jax.nn.relu(over_batch(plain)(x, copy(state))[0] + residual)
    y = jax.vmap(call, axis_name="batch")(x, residual)
    assert_near(y, wanted, 32)


def test_a_file_goes_from_either_to_the_other(rng: np.random.Generator, tmp_path: Path) -> None:
    [x] = batches(rng, 1)
    for source, target in ((ours.BatchNorm, eqx.nn.BatchNorm), (eqx.nn.BatchNorm, ours.BatchNorm)):
        layer, state = made(source)
        _, state = over_batch(layer)(x, state)
        eqx.tree_serialise_leaves(tmp_path / "leaves.eqx", (layer, state))
        like = eqx.nn.make_with_state(target)(3, axis_name="batch", mode="batch")
        loaded = eqx.tree_deserialise_leaves(tmp_path / "leaves.eqx", like)
        assert_near(floats(loaded), floats((layer, state)), 0)


def test_in_a_model(rng: np.random.Generator) -> None:
    """In Equinox's Sequential, trained, with its switch to inference."""
    key = jax.random.key(0)
    model, state = eqx.nn.make_with_state(
        lambda: eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(3, 4, 3, key=key),
                fbj.equinox.BatchNorm(4, "batch", mode="batch", activation="relu"),
                eqx.nn.Lambda(jnp.sum),
            ]
        )
    )()
    x = jnp.asarray(rng.normal(size=(6, 3, 5, 5)), jnp.float32)

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def loss(model: Any, state: Any) -> Any:
        y, state = over_batch(model)(x, state)
        return jnp.square(y - 10).mean(), state

    losses = []
    for _ in range(5):
        (value, state), gradients = loss(model, state)
        model = eqx.apply_updates(model, jax.tree.map(lambda g: -1e-4 * g, gradients))
        losses.append(float(value))
    assert losses[-1] < losses[0]
    y, _ = over_batch(eqx.nn.inference_mode(model))(x, state)
    assert bool(jnp.isfinite(y).all())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32], ids=str)
def test_types_are_theirs(dtype: Any, rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(0, 9, SHAPE)).astype(dtype)
    answers = [
        over_batch(*made(kind)[:1])(x, made(kind)[1])[0]
        for kind in (ours.BatchNorm, eqx.nn.BatchNorm)
    ]
    assert answers[0].dtype == answers[1].dtype
    np.testing.assert_allclose(*answers, atol=0.1 if dtype == jnp.bfloat16 else 1e-4)


def test_errors() -> None:
    with pytest.raises(ValueError, match="BatchNorm: `activation` must be one of None, 'relu'"):
        ours.BatchNorm(3, "batch", mode="batch", activation="tanh")
    with pytest.raises(ValueError, match="Invalid mode"):
        ours.BatchNorm(3, "batch", mode="other")
    with pytest.warns(UserWarning, match="is unspecified it defaults to 'ema'"):
        ours.BatchNorm(3, "batch")
    layer, state = made(ours.BatchNorm, activation="relu")
    with pytest.raises(TypeError, match="`x` must be real; got dtype complex64"):
        over_batch(layer)(jnp.ones(SHAPE, jnp.complex64), state)
    with pytest.raises(TypeError, match="`inference` must be a bool"):
        over_batch(layer, inference="yes")(jnp.ones(SHAPE), state)
    with pytest.raises(NameError, match="batch"):
        layer(jnp.ones(SHAPE[1:]), state)
