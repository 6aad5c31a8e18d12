"""fusebn.jax.nnx.BatchNorm against Flax's layer; what it shares with Linen's is tested there."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax_arrays import assert_near

import fusebn.jax as fbj

Array = Any
LAYERS = nnx.BatchNorm, fbj.nnx.BatchNorm
BFLOAT16 = jnp.bfloat16


def like_float32(arrays: Any, *, dtype: Any) -> Any:
    """Promote as Flax does by default, but to float32."""
    return tuple(v if v is None else v.astype(jnp.float32) for v in arrays)


CASES: dict[str, tuple[dict[str, Any], Any, tuple[int, ...] | None]] = {
    "as it comes": ({}, jnp.float32, None),
    "channels first": ({"axis": 1}, jnp.float32, None),
    "no scale, no bias": ({"use_scale": False, "use_bias": False}, jnp.float32, None),
    "a mask": ({"momentum": 0.5}, jnp.float32, (5, 4, 1)),
    "a mask of its own for every channel": ({"momentum": 0.5}, jnp.float32, (5, 4, 4)),
    "bfloat16 with float32 parameters": ({}, BFLOAT16, None),
    "bfloat16 asked for of float32": ({"dtype": BFLOAT16}, jnp.float32, None),
    "bfloat16 throughout": ({"dtype": BFLOAT16, "param_dtype": BFLOAT16}, BFLOAT16, (5, 4, 1)),
    "another promotion": ({"promote_dtype": like_float32}, BFLOAT16, None),
    "integers": ({}, jnp.int32, None),
}


@pytest.mark.parametrize("name", CASES)
def test_it_does_what_flax_does(rng: np.random.Generator, name: str) -> None:
    options, dtype, mask_shape = CASES[name]
    x = jnp.asarray(rng.standard_normal((5, 4, 4)) * 4 + 1).astype(dtype)
    dy = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    mask = None if mask_shape is None else jnp.asarray(rng.random(mask_shape) > 0.3)

    def results(kind: Any) -> Any:
        layer = kind(4, rngs=nnx.Rngs(0), **options)

        @nnx.jit
        def step(layer: Any, x: Array) -> Any:
            def loss(layer: Any) -> tuple[Array, Array]:
                y = layer(x, mask=mask)
                return (y.astype(jnp.float32) * dy).sum(), y

            gradients, y = nnx.grad(loss, has_aux=True)(layer)
            return nnx.to_pure_dict(gradients), y

        found = step(layer, x)
        state = nnx.to_pure_dict(nnx.state(layer))
        layer.eval()
        y = layer(x)
        # In half precision Flax rounds the averages themselves.
        return found, state, y if options.get("dtype") is None else y.dtype

    found, expected = (results(kind) for kind in reversed(LAYERS))
    assert found[2] is expected[2] or found[2].dtype == expected[2].dtype
    assert_near(found[:2], expected[:2], 64)
    if options.get("dtype") is None:
        assert_near(found[2], expected[2], 64)


def test_the_constructor_is_flaxs() -> None:
    theirs, ours = (dict(inspect.signature(kind.__init__).parameters) for kind in LAYERS)
    extras = [ours.pop(name) for name in list(ours) if name not in theirs]
    assert list(ours) == list(theirs)
    for name in theirs:
        if name not in ("bias_init", "scale_init"):  # functions made anew
            assert ours[name].default == theirs[name].default, name
            assert ours[name].kind == theirs[name].kind, name
    assert {extra.kind for extra in extras} == {inspect.Parameter.KEYWORD_ONLY}
    assert isinstance(fbj.nnx.BatchNorm(1, rngs=nnx.Rngs(0)), nnx.BatchNorm)


# ---- a network, and its files ----


class Network(nnx.Module):
    def __init__(self, kind: Any, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(2, 8, use_bias=False, rngs=rngs)
        self.norm = kind(8, momentum=0.9, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.last(nnx.relu(self.norm(self.first(x))))


TARGET = np.arange(12) % 3
X = jnp.asarray(np.eye(3, 2)[TARGET] * np.arange(4, 16)[:, None], jnp.float32)


def trained(kind: Any, remat: bool = False) -> tuple[Array, Network]:
    """Return the losses of a training, and the network."""
    network = Network(kind)

    @nnx.jit
    def step(network: Network) -> Array:
        def loss(network: Network) -> Array:
            call = nnx.remat(Network.__call__) if remat else Network.__call__
            likely = jax.nn.log_softmax(call(network, X))
            return -jnp.take_along_axis(likely, jnp.asarray(TARGET)[:, None], 1).mean()

        value, gradients = nnx.value_and_grad(loss)(network)
        params = nnx.state(network, nnx.Param)
        nnx.update(network, jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients))
        return value

    return jnp.stack([step(network) for _ in range(5)]), network


def test_a_network_learns_the_same() -> None:
    expected, flax_network = trained(nnx.BatchNorm)
    assert expected[-1] < expected[0] / 2
    for remat in (False, True):
        losses, network = trained(fbj.nnx.BatchNorm, remat)
        assert_near(losses, expected, 256)
        states = (nnx.to_pure_dict(nnx.state(n)) for n in (network, flax_network))
        assert_near(*states, 4096)


@pytest.mark.parametrize("kinds", [LAYERS, LAYERS[::-1]], ids=["from Flax", "to Flax"])
def test_states_go_both_ways(tmp_path: Path, kinds: Any) -> None:
    saved, loading = Network(kinds[0]), Network(kinds[1], seed=1)
    saved(X)
    graph, _ = nnx.split(loading)
    merged = nnx.merge(graph, nnx.state(saved))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", nnx.state(saved))
        checkpointer.wait_until_finished()
        nnx.update(loading, checkpointer.restore(tmp_path / "saved", nnx.state(loading)))
    for network in (saved, merged, loading):
        network.eval()
    for network in (merged, loading):
        assert type(network.norm) is kinds[1]
        assert_near(network(X), saved(X), 64)


# ---- switches and extras ----


def test_the_switches() -> None:
    layer = fbj.nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
    layer(X, use_running_average=True)
    assert layer.mean[...].tolist() == [0, 0]
    layer.eval()
    layer(X)
    assert layer.mean[...].tolist() == [0, 0]
    layer(X, use_running_average=False)
    np.testing.assert_allclose(layer.mean[...], X.mean(0) / 2, rtol=1e-6)
    view = nnx.view(layer, use_running_average=False)
    view(X)
    np.testing.assert_allclose(layer.mean[...], X.mean(0) * 0.75, rtol=1e-6)
    unset = fbj.nnx.BatchNorm(2, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="No `use_running_average` argument"):
        unset(X)


def test_a_traced_switch_compiles_once() -> None:
    traces = []

    @nnx.jit
    def call(layer: Any, switch: Any) -> Array:
        traces.append(switch)
        return layer(X, use_running_average=switch)

    for switch in (True, False):
        layer, other = (fbj.nnx.BatchNorm(2, activation="silu", rngs=nnx.Rngs(0)) for _ in range(2))
        assert_near(call(layer, switch), other(X, use_running_average=switch), 4)
        assert_near(layer.mean[...], other.mean[...], 4)
    assert len(traces) == 1


def test_averages_stay_float32_whatever_x_is() -> None:
    """Flax rounds them to bfloat16 for the sake of a bfloat16 x, and 1000.5 is then 1000."""
    layer = fbj.nnx.BatchNorm(2, dtype=BFLOAT16, use_running_average=True, rngs=nnx.Rngs(0))
    layer.mean[...] = jnp.full(2, 1000.5)
    y = layer(jnp.full((1, 2), 1000, BFLOAT16))
    np.testing.assert_allclose(np.float32(y), -0.5, rtol=2**-8)


def test_extras(rng: np.random.Generator) -> None:
    x, residual = (jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.float32) for _ in range(2))
    options = {"axis": (1, 2), "activation": "relu", "correction": 1, "momentum": 0.0}
    layer = fbj.nnx.BatchNorm(12, rngs=nnx.Rngs(0), **options)
    y = layer(x, residual=residual)
    plain = nnx.BatchNorm(12, rngs=nnx.Rngs(0), use_fast_variance=False)
    flat = x.reshape(2, 12)
    assert_near(y, jax.nn.relu(plain(flat).reshape(x.shape) + residual), 64)
    assert_near(layer.var[...], flat.var(0, ddof=1), 16)
    layer = fbj.nnx.BatchNorm(4, nonfinite="skip", rngs=nnx.Rngs(0))
    layer(x.at[0, 0, 1].set(jnp.nan))
    assert (layer.mean[...] == 0).tolist() == [False, True, False, False]


def test_errors() -> None:
    with pytest.raises(ValueError, match="BatchNorm: `activation` must be"):
        fbj.nnx.BatchNorm(2, activation="tanh", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Compiled code cannot raise"):
        fbj.nnx.BatchNorm(2, nonfinite="raise", rngs=nnx.Rngs(0))
    layer = fbj.nnx.BatchNorm(3, correction=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"must have shape \(2,\), one value per channel"):
        jax.eval_shape(layer, X)
    with pytest.raises(TypeError, match="`x` must be real beside"):
        layer(X + 1j)
