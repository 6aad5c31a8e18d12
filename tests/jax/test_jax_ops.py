"""The calls and their derivatives: what is run, and that all of it is right."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import cases
import fusebn
import fusebn.jax as fbj
from conftest import Array, assert_gradients, frozen
from fusebn import _reference as reference
from fusebn.jax import _ops
from fusebn.jax._ops import Options

NAMES = ("x", "scale", "offset", "mean", "variance", "residual", "weights")


def arrays_of(rng: np.random.Generator, dtype: Any = np.float64) -> dict[str, Array]:
    """Return what `batch_norm` takes, all of it to be differentiated."""
    made = {
        "x": rng.standard_normal((5, 3, 2)),
        "scale": rng.standard_normal(3),
        "offset": rng.standard_normal(3),
        "mean": rng.standard_normal(3),
        "variance": rng.uniform(0.5, 2, 3),
        "residual": rng.standard_normal((5, 3, 2)),
        "weights": rng.uniform(0.5, 2, (5, 1, 2)),
    }
    return {name: value.astype(dtype) for name, value in made.items()}


def step_of(is_training: Any = True, **options: Any) -> Callable[..., Any]:
    """Return `batch_norm` as a function of all its arrays."""
    defaults = {"axis": 1, "epsilon": 0.1, "factor": 0.25}
    of = Options(**{**defaults, **options})
    return lambda *arrays: tuple(_ops.batch_norm(*arrays, is_training, of))[:3]


def portably(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function made of the composite."""

    def composite(*arguments: Any) -> Any:
        with fbj.portable():
            return function(*arguments)

    return composite


def weighed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a number that depends on all results, and on none of them linearly."""
    return lambda *arrays: sum(jnp.sin(result).sum() for result in function(*arrays))


def assert_close_trees(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), actual, expected
    )


# ---- derivatives, in float64 ----


@pytest.mark.parametrize(
    ("is_training", "activation"), [(True, "silu"), (False, "silu"), (True, "relu6")]
)
def test_first_order(rng: np.random.Generator, is_training: bool, activation: str) -> None:
    """Of all results, by every array: forwards and backwards, as the composite has them."""
    with jax.enable_x64(True):
        arrays = tuple(arrays_of(rng).values())
        tangents = tuple(rng.standard_normal(array.shape) for array in arrays)
        step = step_of(is_training, activation=activation)

        def both(*arrays: Any) -> Any:
            results, back = jax.vjp(step, *arrays)
            return results, back(tuple(map(jnp.cos, results))), jax.jvp(step, arrays, tangents)

        assert_close_trees(jax.jit(both)(*arrays), jax.jit(portably(both))(*arrays))


def assert_slopes(function: Callable[..., Any], *orders: Any) -> None:
    """Assert that each order of differentiation, at 0, is the slope of the one before."""
    h = 1e-5
    for order in orders:
        slope = order(function)
        last, now = jax.jit(function), jax.jit(slope)
        np.testing.assert_allclose(now(0.0), (last(h) - last(-h)) / (2 * h), rtol=1e-6)
        function = slope


def test_the_second_order_against_differences(rng: np.random.Generator) -> None:
    """Of a number, along a line on which all arrays move."""
    with jax.enable_x64(True):
        arrays = tuple(arrays_of(rng).values())
        directions = tuple(rng.standard_normal(array.shape) / 4 for array in arrays)
        function = weighed(step_of(activation="silu"))
        assert_slopes(
            lambda t: function(*(a + t * d for a, d in zip(arrays, directions, strict=True))),
            jax.grad,
            jax.grad,
        )


def test_the_third_order_against_differences(rng: np.random.Generator) -> None:
    with jax.enable_x64(True):
        x, direction = rng.standard_normal((2, 5, 3))

        def along(t: Any) -> Any:
            y = fusebn.fused_batch_norm(x + t * direction, None, None, axis=1).y
            return jnp.sin(y).sum()

        assert_slopes(along, jax.grad, jax.grad, jax.grad)


def test_jacobians_forwards_and_backwards(rng: np.random.Generator) -> None:
    with jax.enable_x64(True):
        arrays = tuple(arrays_of(rng).values())
        step = step_of(activation="gelu")
        both = jax.jit(lambda *a: (jax.jacfwd(step, 0)(*a), jax.jacrev(step, 0)(*a)))
        assert_close_trees(*both(*arrays))


def test_linearize_is_the_tangent(rng: np.random.Generator) -> None:
    with jax.enable_x64(True):
        arrays = tuple(arrays_of(rng).values())
        tangents = tuple(rng.standard_normal(array.shape) for array in arrays)
        step = step_of(activation="silu")
        results, linear = jax.linearize(step, *arrays)
        assert_close_trees((results, linear(*tangents)), jax.jvp(step, arrays, tangents))


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_one_gradient_alone(rng: np.random.Generator, activation: str) -> None:
    """Each is the same whoever else is asked for."""
    arrays = arrays_of(rng, np.float32)
    loss = weighed(step_of(activation=activation))
    everything = jax.jit(jax.grad(loss, tuple(range(len(NAMES)))))(*arrays.values())
    for wanted in ("scale", "mean", "residual"):
        alone = jax.jit(jax.grad(loss, NAMES.index(wanted)))(*arrays.values())
        np.testing.assert_allclose(alone, everything[NAMES.index(wanted)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("data", ["ten_thousand", "million", "huge"])
def test_the_mean_keeps_its_digits_for_backward(rng: np.random.Generator, data: str) -> None:
    """JAX has no float64 here, and float32 would lose the mean."""
    x = cases.make(data, (64, 6, 5), cases.FLOAT32)
    dy = frozen(rng.standard_normal(x.shape), cases.FLOAT32)
    batch = reference.moments(x, (0, 2))
    mean, variance = (v.squeeze((0, 2)) for v in (batch.mean, batch.variance()))
    _, back = jax.vjp(lambda x: fusebn.fused_batch_norm(x, None, None, axis=1).y, jnp.asarray(x))
    (dx,) = back(jnp.asarray(dy))
    assert_gradients((dx, None, None, None), dy, x, None, None, mean, variance, axis=1)


# ---- what is run ----


def calls_in(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return the calls of a traced program, wherever they stand, and check what else it holds."""
    found = []

    def look(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name.startswith("fusebn_"):
                found.append(equation)
            assert equation.primitive.name not in ("cond", "while", "rsqrt", "erfc", "logistic")
            for inner in jaxprs_in_params(equation.params):
                look(inner)

    look(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


X = np.ones((4, 3), np.float32)
VECTOR = np.ones(3, np.float32)


def names_of(calls: list[Any]) -> list[str]:
    return [call.primitive.name for call in calls]


@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
def test_reverse_mode_is_one_forward_and_one_gradient(activation: str | None) -> None:
    def loss(x: Any, scale: Any, offset: Any, residual: Any) -> Any:
        return fusebn.fused_batch_norm(
            x, scale, offset, VECTOR, VECTOR, axis=1, exponential_avg_factor=0.1,
            activation=activation, residual=residual,
        ).y.sum()  # fmt: skip

    calls = calls_in(jax.grad(loss, (0, 1, 2, 3)), X, VECTOR, VECTOR, X)
    assert names_of(calls) == ["fusebn_forward", "fusebn_gradient"]
    # Without an activation the gradient of a residual is dy itself, and its value is forgotten.
    passes = ("dx", "dscale", "doffset") if activation is None else None
    assert calls[1].params["results"] == (passes or ("dx", "dresidual", "dscale", "doffset"))
    assert ("residual" in calls[1].params["names"]) == (activation is not None)


def test_what_nobody_wants_is_not_computed() -> None:
    def of_parameters(x: Any, scale: Any, offset: Any) -> Any:
        return fusebn.fused_batch_norm(x, scale, offset, axis=1).y.sum()

    calls = calls_in(jax.grad(of_parameters, (1, 2)), X, VECTOR, VECTOR)
    assert calls[1].params["results"] == ("dscale", "doffset")
    calls = calls_in(jax.grad(of_parameters, 0), X, VECTOR, VECTOR)
    assert calls[1].params["results"] == ("dx",)
    unused = jax.jit(lambda x: (fusebn.fused_batch_norm(x, None, None, axis=1), x + 1)[1])
    assert "fusebn" not in unused.lower(X).compile().as_text()


def test_moments_are_one_call_and_a_formula() -> None:
    calls = calls_in(jax.grad(lambda x: fusebn.moments(x, 0)[1].sum()), X)
    assert names_of(calls) == ["fusebn_moments"]


def test_compiled_programs_call_the_kernels() -> None:
    def loss(x: Any) -> Any:
        return fusebn.fused_batch_norm(x, VECTOR, VECTOR, axis=1).y.sum()

    text = jax.jit(jax.grad(loss)).lower(X).compile().as_text()
    assert text.count('custom_call_target="fusebn_forward"') == 1
    assert text.count('custom_call_target="fusebn_gradient"') == 1


# ---- the verbs one by one ----


@pytest.mark.parametrize(("activation", "extras"), [("identity", False), ("silu", True)])
def test_the_verbs_make_up_the_whole(
    rng: np.random.Generator, activation: str, extras: bool
) -> None:
    """Natively and in the composite, they are what `batch_norm` and its gradient are made of."""
    with jax.enable_x64(True):
        given = arrays_of(rng)
        x, scale, offset = (given[name] for name in ("x", "scale", "offset"))
        residual, weights = (given[n] if extras else None for n in ("residual", "weights"))
        options = Options(1, 0.1, activation=activation)
        dy, dmean, dvariance = rng.standard_normal(x.shape), *rng.standard_normal((2, 3))

        def whole() -> Any:
            def step(x: Any) -> Any:
                of = options._replace(correction=0.0)
                found = _ops.batch_norm(x, scale, offset, None, None, residual, weights, True, of)
                return found.y, found.mean, found.variance

            (y, *_), back = jax.vjp(step, x)
            return y, *back((dy, dmean, dvariance))

        def verbs() -> Any:
            count, batch = _ops.moments(x, weights, 1)
            of = batch, scale, offset, residual
            y = _ops.normalize(x, *of, options)
            sums = _ops.backward_sums(dy, x, *of, options)
            dx, dresidual = _ops.backward(
                dy, x, *of, weights, count, *sums, dmean, dvariance, options
            )
            assert (dresidual is not None) == extras
            return y, dx

        want = jax.jit(whole)()
        assert_close_trees(jax.jit(verbs)(), want)
        assert_close_trees(jax.jit(portably(verbs))(), want)


# ---- with and without kernels, with and without JAX ----


def test_support_is_told() -> None:
    frameworks = fusebn.info()["frameworks"]
    assert frameworks["jax"]["version"] == jax.__version__
    assert frameworks["jax"]["support"].startswith("native calls on the CPU; a composite")


def run(code: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_without_the_bridge_the_composite_serves() -> None:
    """As where the library was built without jaxlib's header."""
    out = run(
        "import fusebn, numpy as np, jax.numpy as jnp\n"
        "fusebn._core.__file__ = '/nowhere/_core.so'\n"
        "x = np.arange(6, dtype='f').reshape(3, 2)\n"
        "ours = fusebn.fused_batch_norm(jnp.asarray(x), None, None, axis=1)\n"
        "np.testing.assert_allclose(ours.y, fusebn.fused_batch_norm(x, None, None, axis=1).y,"
        " rtol=1e-6)\n"
        "print(fusebn.info()['frameworks']['jax']['support'])\n"
    )
    assert out.startswith("composite of JAX's own operations: fusebn was built where jaxlib's")


def test_without_jax_the_extra_is_named() -> None:
    out = run(
        "import sys\n"
        "sys.modules['jax'] = None\n"
        "try:\n"
        "    import fusebn.jax\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert "fusebn.jax needs jax, which is not installed" in out
    assert "pip install 'fusebn[jax]'" in out
