"""What JAX's transformations make of a batch norm: jit, vmap, scan, remat, donation, export."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from test_jax_ops import assert_close_trees, names_of

import fusebn
import fusebn.jax as fbj
from conftest import assert_same_bits
from fusebn import _core

VECTOR = np.ones(3, np.float32)


def step(x: Any, scale: Any, offset: Any, is_training: Any = True, **options: Any) -> Any:
    """Return all results of a batch norm with everything but weights."""
    return tuple(
        fusebn.fused_batch_norm(
            x, scale, offset, VECTOR, VECTOR, is_training=is_training, axis=-1,
            exponential_avg_factor=0.25, activation="relu", **options,
        )
    )  # fmt: skip


def loss(x: Any, *arguments: Any, **options: Any) -> Any:
    y, mean, variance = step(x, *arguments, **options)
    return jnp.sin(y).sum() + jnp.square(mean).sum() + variance.sum()


@pytest.fixture
def inputs(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Return x, scale and offset."""
    return tuple(rng.standard_normal(shape).astype("f") for shape in ((6, 4, 3), (3,), (3,)))


# ---- jit ----


def test_a_traced_flag_is_compiled_once(inputs: Any) -> None:
    """For both values, with no cond: one forward, one gradient."""
    traced = jax.jit(jax.grad(loss, (0, 1, 2)))
    for is_training in (True, False, True):
        found = traced(*inputs, is_training)
        want = jax.jit(jax.grad(lambda *a, t=is_training: loss(*a, t), (0, 1, 2)))(*inputs)
        for one, other in zip(found, want, strict=True):
            assert_same_bits(one, other)
    assert traced._cache_size() == 1
    text = traced.lower(*inputs, True).compile().as_text()
    assert text.count("custom_call_target") == 2
    assert "conditional" not in text


def test_the_same_bits_whatever_the_threads(rng: np.random.Generator) -> None:
    x = rng.standard_normal((64, 14, 14, 3)).astype("f")
    both = jax.jit(lambda x: (step(x, VECTOR, VECTOR), jax.grad(loss)(x, VECTOR, VECTOR)))
    first = both(x)
    for threads in (1, 3):
        _core.set_num_threads(threads)
        jax.tree.map(assert_same_bits, both(x), first)


def test_many_may_call_at_once(rng: np.random.Generator) -> None:
    both = jax.jit(lambda x: (step(x, VECTOR, VECTOR), jax.grad(loss)(x, VECTOR, VECTOR)))
    batches = [rng.standard_normal((64, 14, 3)).astype("f") for _ in range(12)]
    alone = [both(x) for x in batches]
    with ThreadPoolExecutor(6) as pool:
        for together, one in zip(pool.map(both, batches), alone, strict=True):
            jax.tree.map(assert_same_bits, together, one)


def test_without_compilation(inputs: Any) -> None:
    with jax.disable_jit():
        found = jax.value_and_grad(loss)(*inputs)
    assert_close_trees(found, jax.value_and_grad(loss)(*inputs), 1e-6)


# ---- vmap ----

AXES: list[tuple[Any, ...]] = [
    (0, None, None, None),
    (1, 0, None, None),
    (-1, None, 1, None),
    (None, 0, 0, None),
    (2, 0, 1, 0),
]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_vmap_over_anything(rng: np.random.Generator, axes: tuple[Any, ...]) -> None:
    """Any axis, and any of the arrays: of values and of gradients, whichever comes first."""
    size = 5
    shapes: tuple[tuple[int, ...], ...] = ((6, 4, 3), (3,), (3,), ())
    single = [rng.standard_normal((size, *shape)).astype("f") for shape in shapes[:3]]
    flags = np.array([True, False, True, True, False])
    arguments: list[Any] = [*single, flags]
    for i, axis in enumerate(axes):
        arguments[i] = arguments[i][0] if axis is None else np.moveaxis(arguments[i], 0, axis)

    def one(i: int) -> list[Any]:
        return [
            value if axis is None else np.take(value, i, axis)
            for value, axis in zip(arguments, axes, strict=True)
        ]

    both = jax.value_and_grad(loss, (0, 1, 2))
    found = jax.jit(jax.vmap(both, axes))(*arguments)
    want = [jax.jit(both)(*one(i)) for i in range(size)]
    assert_close_trees(found, jax.tree.map(lambda *v: np.stack(v), *want), 1e-5)

    def total(*arguments: Any) -> Any:
        return jax.vmap(loss, axes)(*arguments).sum()

    whole = jax.jit(jax.grad(total, (0, 1, 2)))(*arguments)
    for gradient, parts, axis in zip(whole, found[1], axes, strict=False):
        expected = parts.sum(0) if axis is None else np.moveaxis(parts, 0, axis)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_vmap_of_vmap_is_one_call(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 3, 8, 3)).astype("f")
    scales = rng.standard_normal((3, 3)).astype("f")

    def inner(x: Any, scale: Any) -> Any:
        return fusebn.fused_batch_norm(x, scale, None, axis=1).y

    twice = jax.vmap(jax.vmap(inner), (0, None))
    calls = [e for e in jax.make_jaxpr(twice)(x, scales).eqns if "fusebn" in e.primitive.name]
    assert names_of(calls) == ["fusebn_forward"]
    want = [[inner(jnp.asarray(x[i, j]), scales[j]) for j in range(3)] for i in range(2)]
    assert_same_bits(jax.jit(twice)(x, scales), np.stack([np.stack(row) for row in want]))


def test_vmap_with_weights_and_a_residual(rng: np.random.Generator) -> None:
    x, residual = (rng.standard_normal((4, 6, 3)).astype("f") for _ in range(2))
    weights = rng.integers(0, 3, (4, 6)).astype("f")
    weights[1] = 0

    def one(x: Any, residual: Any, weights: Any) -> Any:
        return step(x, VECTOR, None, residual=residual, weights=weights)

    found = jax.jit(jax.vmap(one))(x, residual, weights)
    want = [one(jnp.asarray(x[i]), residual[i], weights[i]) for i in range(4)]
    jax.tree.map(assert_same_bits, found, jax.tree.map(lambda *v: np.stack(v), *want))


# ---- scan, remat, donation ----


def test_moving_statistics_in_a_scan(rng: np.random.Generator) -> None:
    """A loop of updates, and the gradient through all of it."""
    batches = rng.standard_normal((5, 8, 3)).astype("f")

    def scanned(scale: Any) -> Any:
        def update(moving: Any, x: Any) -> Any:
            y, *moving = fusebn.fused_batch_norm(
                x, scale, None, *moving, axis=1, exponential_avg_factor=0.25
            )
            return tuple(moving), jnp.sin(y).sum()

        moving, losses = jax.lax.scan(update, (jnp.zeros(3), jnp.ones(3)), batches)
        return losses.sum() + moving[1].sum(), moving

    def looped(scale: Any) -> Any:
        moving, total = (jnp.zeros(3), jnp.ones(3)), 0.0
        for x in batches:
            y, *moving = fusebn.fused_batch_norm(
                jnp.asarray(x), scale, None, *moving, axis=1, exponential_avg_factor=0.25
            )
            total += jnp.sin(y).sum()
        return total + moving[1].sum(), tuple(moving)

    of = [jax.jit(jax.value_and_grad(f, has_aux=True))(VECTOR) for f in (scanned, looped)]
    assert_close_trees(*of, 1e-5)


@pytest.mark.parametrize("policy", ["nothing_saveable", "everything_saveable", "dots_saveable"])
def test_recomputation(inputs: Any, policy: str) -> None:
    """Under any policy the gradient is the same; what is not saved is computed again."""
    again = jax.checkpoint(loss, policy=getattr(jax.checkpoint_policies, policy))
    found = jax.jit(jax.grad(lambda *a: jnp.sin(again(*a)), (0, 1, 2)))(*inputs)
    want = jax.jit(jax.grad(lambda *a: jnp.sin(loss(*a)), (0, 1, 2)))(*inputs)
    assert_close_trees(found, want, 1e-6)
    text = str(jax.make_jaxpr(jax.grad(again))(*inputs))
    assert text.count("fusebn_forward[") == (1 if policy == "everything_saveable" else 2)


def test_donation(inputs: Any) -> None:
    x, scale, offset = map(jnp.asarray, inputs)
    want = step(x, scale, offset)
    donated = jax.jit(step, donate_argnums=0)(x, scale, offset)
    jax.tree.map(assert_same_bits, donated, want)
    assert x.is_deleted()


# ---- export ----


def _exported(path: Path, *, portable: bool) -> None:
    """Export a training step's loss, to be differentiated by who loads it."""

    def exported(x: Any) -> Any:
        if portable:
            with fbj.portable():
                return loss(x, VECTOR, VECTOR)
        return loss(x, VECTOR, VECTOR)

    checks = [
        export.DisabledSafetyCheck.custom_call(f"fusebn_{name}") for name in ("forward", "gradient")
    ]
    (batch,) = export.symbolic_shape("batch")
    kind = jax.ShapeDtypeStruct((batch, 4, 3), np.float32)
    made = export.export(jax.jit(exported), disabled_checks=[] if portable else checks)(kind)
    path.write_bytes(made.serialize(vjp_order=1))


@pytest.mark.parametrize("portable", [False, True])
def test_export_to_another_process(inputs: Any, tmp_path: Path, portable: bool) -> None:
    """Of any batch size; what is portable runs where fusebn is not imported."""
    _exported(tmp_path / "step", portable=portable)
    np.save(tmp_path / "x.npy", inputs[0])
    code = (
        "import sys, pathlib, numpy as np, jax\n"
        "from jax import export\n"
        f"{'' if portable else 'import fusebn.jax'}\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "step = export.deserialize(bytearray((folder / 'step').read_bytes()))\n"
        "x = np.load(folder / 'x.npy')\n"
        "np.save(folder / 'dx.npy', jax.jit(jax.grad(step.call))(x))\n"
        f"assert ('fusebn' in sys.modules) == {not portable}\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    finished = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    want = jax.grad(loss)(jnp.asarray(inputs[0]), VECTOR, VECTOR)
    np.testing.assert_allclose(np.load(tmp_path / "dx.npy"), want, rtol=1e-4, atol=1e-5)


def test_what_is_not_portable_says_so(inputs: Any) -> None:
    with pytest.raises(ValueError, match="fusebn_forward"):
        export.export(jax.jit(loss))(*inputs)


def test_a_graph_for_other_devices_is_the_composite(inputs: Any) -> None:
    """Nothing of ours stands in it, and lowering asks for no such device."""
    for platform in ("cuda", "tpu"):
        text = export.export(jax.jit(jax.grad(loss)), platforms=[platform])(*inputs).mlir_module()
        assert "@fusebn_" not in text


def test_portable_ends_where_it_ends(inputs: Any) -> None:
    """What was compiled inside is not taken outside, nor the other way."""
    compiled = str(jax.make_jaxpr(step)(*inputs))
    with fbj.portable():
        assert "fusebn_forward" not in str(jax.make_jaxpr(step)(*inputs))
        portable = step(*map(jnp.asarray, inputs))
    assert "fusebn_forward" in compiled
    assert str(jax.make_jaxpr(step)(*inputs)) == compiled
    assert_close_trees(portable, step(*map(jnp.asarray, inputs)), 1e-5)
