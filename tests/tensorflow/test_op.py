"""The ops against the oracle: values, gradients of any order, shapes, errors, graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import cases
from conftest import (
    Array,
    assert_close,
    assert_forward,
    assert_gradients,
    assert_same_bits,
    away_from_kinks,
    frozen,
    parameters,
    stat,
)
from fusebn import _reference as reference
from fusebn.tensorflow import nn

FLAGS = [True, False, tf.constant(True), tf.constant(False)]
FLAG_NAMES = ["True", "False", "tensor_true", "tensor_false"]
EPSILON = 1e-3


def numpy_of(results: Any) -> tuple[Array, ...]:
    return tuple(None if result is None else result.numpy() for result in results)


def given(rng: np.random.Generator, channels: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """A moving mean and variance."""
    return (
        frozen(rng.standard_normal(channels), stat(dtype)),
        frozen(rng.uniform(0.5, 2, channels), stat(dtype)),
    )


def used(x: Array, is_training: Any, mean: Array, variance: Array, **options: Any) -> Any:
    """The mean and the biased variance that normalize x."""
    weights = options.get("weights")
    batch = reference.fused_batch_norm(
        x, mean=mean, variance=variance, is_training=bool(is_training), axis=options["axis"],
        weights=weights, correction=0,
    )  # fmt: skip
    return batch.mean, batch.variance


# ---- forward ----


@pytest.mark.parametrize("shape", cases.SHAPES, ids=lambda shape: "x".join(map(str, shape.block)))
@pytest.mark.parametrize("is_training", [True, False])
def test_every_shape(
    rng: np.random.Generator, shape: cases.Shape, is_training: bool, dtype: np.dtype[Any]
) -> None:
    x = cases.make("standard_normal", shape.block, dtype)
    scale, offset = parameters(rng, x.shape[1], dtype)
    mean, variance = given(rng, x.shape[1], dtype)
    result = nn.fused_batch_norm(x, scale, offset, mean, variance, is_training=is_training, axis=1)
    assert_forward(numpy_of(result), x, scale, offset, mean, variance, 1e-3, is_training, axis=1)


@pytest.mark.parametrize("data", cases.DATA, ids=lambda data: data.name)
def test_every_kind_of_data(
    rng: np.random.Generator, data: cases.Data, dtype: np.dtype[Any]
) -> None:
    if dtype not in data.dtypes:
        return
    x = cases.make(data.name, (64, 6, 5), dtype)
    scale, offset = parameters(rng, 6, dtype)
    result = nn.fused_batch_norm(x, scale, offset, axis=1)
    assert_forward(numpy_of(result), x, scale, offset, axis=1)


@pytest.mark.parametrize("data_format", cases.FORMATS)
@pytest.mark.parametrize("is_training", FLAGS, ids=FLAG_NAMES)
def test_every_format(rng: np.random.Generator, data_format: str, is_training: Any) -> None:
    x = frozen(rng.standard_normal(cases.FORMATS[data_format]), cases.FLOAT32)
    scale, offset = parameters(rng, 5, cases.FLOAT32)
    mean, variance = given(rng, 5, cases.FLOAT32)
    result = nn.fused_batch_norm(
        x, scale, offset, mean, variance, data_format=data_format, is_training=is_training
    )
    axis = 1 if data_format[1] == "C" else -1
    assert_forward(
        numpy_of(result), x, scale, offset, mean, variance, 1e-3, bool(is_training), axis=axis
    )


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("correction", [0, 1, 1.5])
def test_what_is_returned(rng: np.random.Generator, factor: float, correction: float) -> None:
    x = frozen(rng.standard_normal((3, 4)), cases.FLOAT32)
    mean, variance = given(rng, 4, cases.FLOAT32)
    options: dict[str, Any] = {"exponential_avg_factor": factor, "correction": correction}
    result = nn.fused_batch_norm(x, None, None, mean, variance, axis=-1, **options)
    assert_forward(numpy_of(result), x, None, None, mean, variance, **options)


def test_real_attributes_keep_all_their_digits() -> None:
    """TensorFlow's float attributes have 32 bits; 0.1 as one of them is off by 1e-9."""
    x = tf.constant([[-1.0], [1.0]], tf.float64)
    y = nn.fused_batch_norm(x, None, None, epsilon=0.1, axis=-1).y
    assert_close(
        y.numpy()[1, 0], 1 / np.sqrt(np.longdouble(1) + 0.1),
        dtype=cases.FLOAT64, magnitude=1, ulps=2,
    )  # fmt: skip


@pytest.mark.parametrize("shape", cases.EMPTY_SHAPES, ids=lambda shape: shape.why)
def test_an_empty_batch(shape: cases.Shape, dtype: np.dtype[Any]) -> None:
    x = np.zeros(shape.block, dtype)
    channels = x.shape[1]
    y, mean, variance = numpy_of(nn.fused_batch_norm(x, None, None, axis=1))
    assert y.shape == x.shape
    assert np.isnan(mean).all()
    assert np.isnan(variance).all()
    old = np.full(channels, 2, stat(dtype))
    result = nn.fused_batch_norm(x, None, None, old, old, exponential_avg_factor=0.1, axis=1)
    assert_same_bits(result[1].numpy(), old)
    assert_same_bits(result[2].numpy(), old)


def test_one_element_a_channel(dtype: np.dtype[Any]) -> None:
    x, offset = np.full((1, 3), 7, dtype), frozen([-1, 0, 2], stat(dtype))
    y, mean, variance = numpy_of(nn.fused_batch_norm(x, None, offset, axis=1, activation="relu"))
    assert_same_bits(y, np.array([[0, 0, 2]], dtype))
    assert_same_bits(mean, np.full(3, 7, stat(dtype)))
    assert_same_bits(variance, np.zeros(3, stat(dtype)))


def test_the_weights_may_be_of_any_shape_that_broadcasts(rng: np.random.Generator) -> None:
    x = frozen(rng.standard_normal((4, 3, 2, 5)), cases.FLOAT32)
    for shape in [(4, 3, 2), (4, 1, 1), (4, 3, 2, 1), (4, 1, 1, 1), (3, 2), (2,), ()]:
        weights = frozen(rng.integers(0, 3, shape).astype(np.float32) + 0.5)
        result = nn.fused_batch_norm(x, None, None, weights=weights)
        full = weights[..., 0] if weights.ndim == 4 else weights
        assert_forward(numpy_of(result), x, None, None, weights=full)
    x = frozen(np.moveaxis(x, -1, 1))
    for shape in [(4, 3, 2), (4, 1, 1), (4, 1, 3, 2), (3, 2), (2,)]:
        weights = frozen(rng.integers(0, 3, shape).astype(np.int32) + 1)
        result = nn.fused_batch_norm(x, None, None, weights=weights, data_format="NCHW")
        full = weights[:, 0] if weights.ndim == 4 else weights
        assert_forward(numpy_of(result), x, None, None, axis=1, weights=full)


# ---- gradients ----


@pytest.mark.parametrize("is_training", FLAGS, ids=FLAG_NAMES)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("extras", ["plain", "residual", "weights", "both"])
def test_values_and_gradients(
    rng: np.random.Generator,
    dtype: np.dtype[Any],
    is_training: Any,
    activation: str | None,
    extras: str,
) -> None:
    shape = (6, 5, 7)
    x, dy, residual = (frozen(rng.standard_normal(shape), dtype) for _ in range(3))
    scale, offset = parameters(rng, 5, dtype)
    mean, variance = given(rng, 5, dtype)
    options: dict[str, Any] = {"axis": 1, "activation": activation}
    if extras in ("weights", "both"):
        options["weights"] = frozen(rng.integers(0, 3, (6, 7)), stat(dtype))
    if extras in ("residual", "both"):
        options["residual"] = residual
    statistics = used(x, is_training, mean, variance, **options)
    dy = away_from_kinks(
        dy, x, scale, offset, *statistics, axis=1, residual=options.get("residual")
    )

    with tf.GradientTape() as tape:
        sources = [tf.constant(v) for v in (x, scale, offset)]
        if "residual" in options:
            sources.append(tf.constant(residual))
        tape.watch(sources)
        arguments = {**options, "residual": sources[3]} if "residual" in options else options
        result = nn.fused_batch_norm(
            *sources[:3], mean, variance, is_training=is_training, **arguments
        )
    assert_forward(
        numpy_of(result), x, scale, offset, mean, variance, EPSILON, bool(is_training), **options
    )
    gradients = numpy_of(tape.gradient(result.y, sources, output_gradients=tf.constant(dy)))
    assert_gradients(
        (*gradients, None)[:4], dy, x, scale, offset, *statistics, EPSILON, bool(is_training),
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("factor", [0.25, 1.0])
@pytest.mark.parametrize("correction", [0, 1])
def test_gradients_through_the_returned_statistics(
    rng: np.random.Generator, dtype: np.dtype[Any], factor: float, correction: float
) -> None:
    """TensorFlow's are silently 0."""
    x, dy = (frozen(rng.standard_normal((9, 4)), dtype) for _ in range(2))
    mean, variance = given(rng, 4, dtype)
    dmean, dvariance = (frozen(rng.standard_normal(4), stat(dtype)) for _ in range(2))
    with tf.GradientTape() as tape:
        sources = [tf.constant(v) for v in (x, mean, variance)]
        tape.watch(sources)
        result = nn.fused_batch_norm(
            sources[0], None, None, *sources[1:], axis=1, exponential_avg_factor=factor,
            correction=correction,
        )  # fmt: skip
    dx, dgiven_mean, dgiven_variance = tape.gradient(
        list(result), sources, output_gradients=[tf.constant(v) for v in (dy, dmean, dvariance)],
        unconnected_gradients="zero",
    )  # fmt: skip
    batch = reference.moments(x, 0)
    assert_gradients(
        (dx.numpy(), None, None, None), dy, x, None, None, batch.mean[0], batch.variance()[0],
        dmean=factor * dmean.astype(np.longdouble),
        dvariance=factor * dvariance.astype(np.longdouble) * 9 / (9 - correction),
        axis=1,
    )  # fmt: skip
    for got, into in ((dgiven_mean, dmean), (dgiven_variance, dvariance)):
        expected = (1 - factor) * into
        assert_close(got.numpy(), expected, dtype=stat(dtype), magnitude=np.abs(into), ulps=1)


def test_gradients_of_the_given_statistics(rng: np.random.Generator, dtype: np.dtype[Any]) -> None:
    """At inference y depends on them, and they are returned."""
    x, dy = (frozen(rng.standard_normal((9, 4)), dtype) for _ in range(2))
    scale, offset = parameters(rng, 4, dtype)
    mean, variance = given(rng, 4, dtype)
    dmean, dvariance = (frozen(rng.standard_normal(4), stat(dtype)) for _ in range(2))
    with tf.GradientTape() as tape:
        sources = [tf.constant(v) for v in (mean, variance)]
        tape.watch(sources)
        result = nn.fused_batch_norm(x, scale, offset, *sources, is_training=False, axis=1)
    gradients = tape.gradient(
        list(result), sources, output_gradients=[tf.constant(v) for v in (dy, dmean, dvariance)]
    )
    g, rstd = reference.wide(dy), reference.rstd(variance, EPSILON)
    centred = reference.wide(x) - reference.wide(mean)
    slope = reference.wide(scale) * rstd
    into_mean = dmean - slope * g.sum(0)
    into_variance = dvariance - slope * rstd**2 / 2 * (g * centred).sum(0)
    for got, want, terms in (
        (gradients[0], into_mean, np.abs(g).sum(0)),
        (gradients[1], into_variance, rstd**2 * np.abs(g * centred).sum(0)),
    ):
        magnitude = np.abs(slope) * terms + 1
        assert_close(got.numpy(), want, dtype=stat(dtype), magnitude=magnitude, ulps=8)


@pytest.mark.parametrize("is_training", FLAGS, ids=FLAG_NAMES)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_finite_differences(
    rng: np.random.Generator, is_training: Any, activation: str | None
) -> None:
    """First order of every input, weights and given statistics included, in float64."""
    x, residual = rng.standard_normal((2, 5, 3, 2))
    scale, offset = parameters(rng, 3, cases.FLOAT64)
    mean, variance = given(rng, 3, cases.FLOAT64)
    weights = rng.uniform(0.5, 2, (5, 2))
    cotangents = [tf.constant(rng.standard_normal(s)) for s in (x.shape, 3, 3)]

    def loss(x: Any, s: Any, o: Any, m: Any, v: Any, r: Any, w: Any) -> Any:
        results = nn.fused_batch_norm(
            x, s, o, m, v, axis=1, is_training=is_training, residual=r, weights=w,
            activation=activation, exponential_avg_factor=0.25,
        )  # fmt: skip
        return sum(tf.reduce_sum(a * b) for a, b in zip(results, cotangents, strict=True))

    arguments = [tf.constant(a) for a in (x, scale, offset, mean, variance, residual, weights)]
    theory, practice = tf.test.compute_gradient(loss, arguments, delta=1e-5)
    for ours, differences in zip(theory, practice, strict=True):
        np.testing.assert_allclose(ours, differences, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("is_training", FLAGS, ids=FLAG_NAMES)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_second_order_by_finite_differences(
    rng: np.random.Generator, is_training: Any, activation: str | None
) -> None:
    x, residual = rng.standard_normal((2, 5, 3, 2))
    scale, offset = parameters(rng, 3, cases.FLOAT64)
    mean, variance = given(rng, 3, cases.FLOAT64)
    weights = rng.uniform(0.5, 2, (5, 2))
    cotangents = [tf.constant(rng.standard_normal(s)) for s in (x.shape, 3, 3)]

    def loss(*arguments: Any) -> Any:
        *first, r, w = arguments
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            results = nn.fused_batch_norm(
                *first, axis=1, is_training=is_training, residual=r, weights=w,
                activation=activation, exponential_avg_factor=0.25,
            )  # fmt: skip
            value = sum(tf.reduce_sum(a * b) for a, b in zip(results, cotangents, strict=True))
        gradients = tape.gradient(value, arguments[:-1])
        return sum(tf.reduce_sum(tf.sin(gradient)) for gradient in gradients)

    arguments = [tf.constant(a) for a in (x, scale, offset, mean, variance, residual, weights)]
    theory, practice = tf.test.compute_gradient(loss, arguments, delta=1e-5)
    for ours, differences in zip(theory, practice, strict=True):
        np.testing.assert_allclose(ours, differences, rtol=1e-5, atol=1e-7)


def test_third_order(rng: np.random.Generator) -> None:
    x = tf.constant(rng.standard_normal((6, 2)))

    def derivative(f: Any) -> Any:
        def gradient(x: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = tf.reduce_sum(tf.sin(f(x)))
            return tape.gradient(value, x)

        return gradient

    second = derivative(derivative(lambda x: nn.fused_batch_norm(x, None, None, axis=1).y))
    theory, practice = tf.test.compute_gradient(lambda x: tf.reduce_sum(second(x) ** 2), [x], 1e-5)
    np.testing.assert_allclose(theory[0], practice[0], rtol=1e-5, atol=1e-6)


def test_gradients_in_a_session(rng: np.random.Generator) -> None:
    x, dy = (frozen(rng.standard_normal((7, 3)), cases.FLOAT32) for _ in range(2))
    scale, offset = parameters(rng, 3, cases.FLOAT32)
    mean, variance = given(rng, 3, cases.FLOAT32)
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        flag = v1.placeholder(tf.bool, [])
        sources = [tf.constant(v) for v in (x, scale, offset)]
        result = nn.fused_batch_norm(*sources, mean, variance, is_training=flag, axis=-1)
        gradients = tf.gradients(result.y, sources, grad_ys=tf.constant(dy))
        for is_training in (True, False):
            got = session.run([list(result), gradients], {flag: is_training})
            assert_forward(got[0], x, scale, offset, mean, variance, EPSILON, is_training)
            statistics = used(x, is_training, mean, variance, axis=-1)
            assert_gradients(
                (*got[1], None), dy, x, scale, offset, *statistics, EPSILON, is_training
            )


def test_second_order_in_a_session(rng: np.random.Generator) -> None:
    v1 = tf.compat.v1
    x, mean, variance = rng.standard_normal((5, 2)), rng.standard_normal(2), rng.uniform(1, 2, 2)

    def gradients(flag: Any, x: Any, of: Any) -> Any:
        y = nn.fused_batch_norm(x, None, None, mean, variance, is_training=flag, axis=-1).y
        first = of(tf.reduce_sum(tf.sin(y)), x)
        return of(tf.reduce_sum(first**3), x)

    with tf.Graph().as_default(), v1.Session() as session:
        flag, source = v1.placeholder(tf.bool, []), tf.constant(x)
        second = gradients(flag, source, lambda y, x: tf.gradients(y, x)[0])
        results = [session.run(second, {flag: value}) for value in (True, False)]
    for value, got in zip((True, False), results, strict=True):
        source = tf.constant(x)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(source)
            flag = tf.constant(value)
            y = nn.fused_batch_norm(source, None, None, mean, variance, is_training=flag, axis=-1).y
            first = tape.gradient(tf.reduce_sum(tf.sin(y)), source)
            cube = tf.reduce_sum(first**3)
        np.testing.assert_allclose(got, tape.gradient(cube, source), rtol=1e-12)


def test_a_jacobian(rng: np.random.Generator) -> None:
    """TensorFlow maps our gradient op over the rows by a loop of its own."""
    x = tf.constant(rng.standard_normal((4, 2)))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = nn.fused_batch_norm(x, None, None, axis=-1).y
    jacobian = tape.jacobian(y, x).numpy().reshape(8, 8)
    _, practice = tf.test.compute_gradient(
        lambda x: nn.fused_batch_norm(x, None, None, axis=-1).y, [x], delta=1e-5
    )
    np.testing.assert_allclose(jacobian, practice[0], rtol=1e-6, atol=1e-8)


def test_subnormal_numbers_are_numbers_on_every_thread() -> None:
    """TensorFlow's threads flush them to zero; the core's do not."""
    x = tf.constant(cases.make("subnormal", (300_000, 2, 1), cases.FLOAT32)[..., 0])
    mean = nn.fused_batch_norm(x, None, None, axis=-1).mean
    want = np.mean(x.numpy().astype(np.float64), 0)
    np.testing.assert_allclose(mean, want, rtol=1e-5)


def test_gradients_of_nothing(dtype: np.dtype[Any]) -> None:
    for shape, weights in (((0, 3), None), ((4, 3), np.zeros(4, stat(dtype)))):
        with tf.GradientTape() as tape:
            sources = [tf.ones(shape, dtype), tf.ones(3, stat(dtype)), tf.ones(3, stat(dtype))]
            tape.watch(sources)
            y = nn.fused_batch_norm(*sources, axis=-1, weights=weights).y
        dx, dscale, doffset = numpy_of(tape.gradient(y, sources))
        assert not dx.any()
        assert not dscale.any()
        assert_same_bits(doffset, np.full(3, shape[0], stat(dtype)))


# ---- graphs ----


def batch_norm_nodes(graph: Any) -> list[str]:
    return [op.type for op in graph.get_operations() if op.type.startswith("Fusebn")]


CONTROL_FLOW = {"If", "StatelessIf", "Switch", "Merge", "Case", "While", "StatelessWhile"}


def test_a_tensor_flag_is_one_node_and_no_cond() -> None:
    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph:
        x, flag = v1.placeholder(tf.float32, [None, 3]), v1.placeholder(tf.bool, [])
        one = tf.ones(3)
        y, *_ = nn.fused_batch_norm(x, one, one, one, one, is_training=flag, axis=-1)
        assert batch_norm_nodes(graph) == ["FusebnBatchNorm"]
        tf.gradients(y, [x, one])
        assert batch_norm_nodes(graph) == ["FusebnBatchNorm", "FusebnBatchNormGrad"]
        assert not {op.type for op in graph.get_operations()} & CONTROL_FLOW


def test_absent_arguments_are_absent() -> None:
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, [None, 3])
        nn.fused_batch_norm(x, None, None, axis=-1)
        # The flag is the one constant.
        assert sorted(op.type for op in graph.get_operations()) == [
            "Const", "FusebnBatchNorm", "Placeholder",
        ]  # fmt: skip


def test_static_shapes_survive() -> None:
    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph:
        for shape, axis in (([None, 8, None, 6], -1), ([4, 6, None], 1), ([None, 6], -1)):
            x = v1.placeholder(tf.float16, shape)
            y, mean, variance = nn.fused_batch_norm(x, None, None, axis=axis, name="bare")
            assert y.shape.as_list() == shape
            assert mean.shape.as_list() == variance.shape.as_list() == [6]
            gradient = tf.gradients([y, mean], x)[0]
            assert gradient.shape.as_list() == shape
        x = v1.placeholder(tf.float16, [None, 8, None, 6])
        mean, variance = nn.moments(x, [0, 2])
        assert mean.shape.as_list() == variance.shape.as_list() == [8, 6]
        mean, variance = nn.moments(x, [0, 2], keepdims=True)
        assert mean.shape.as_list() == variance.shape.as_list() == [1, 8, 1, 6]
        assert nn.batch_normalization(x, mean, variance, None, None, 0).shape.as_list() == [
            None, 8, None, 6,
        ]  # fmt: skip
        nn.fused_batch_norm(x, tf.ones(6), None, name="scaled")
    # The shape function alone, without the wrapper.
    with tf.Graph().as_default() as copy:
        tf.import_graph_def(graph.as_graph_def(), name="")
        y, mean, variance, batch, count = copy.get_operation_by_name("scaled").outputs
        assert y.shape.as_list() == [None, 8, None, 6]
        assert mean.shape.as_list() == variance.shape.as_list() == [6]
        assert batch.shape.as_list() == [2, 6]
        assert count.shape.as_list() == []


def test_vectors_that_disagree_are_refused_when_a_graph_is_imported() -> None:
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, [None, 3])
        scale, offset = (tf.compat.v1.placeholder(tf.float32, [None]) for _ in range(2))
        nn.fused_batch_norm(x, scale, offset, axis=-1)
    definition = graph.as_graph_def()
    vectors = [n for n in definition.node if n.op == "Placeholder"][1:]
    for node, length in zip(vectors, (3, 4), strict=True):
        node.attr["shape"].shape.dim[0].size = length
    with tf.Graph().as_default(), pytest.raises(ValueError, match="lengths 3 and 4"):
        tf.import_graph_def(definition, name="")


def test_the_op_writes_into_a_buffer_nobody_else_needs(rng: np.random.Generator) -> None:
    """Inside a graph y takes the memory of 2 * x, and dx that of dy: the answers stay right."""
    x = frozen(rng.standard_normal((50, 64)), cases.FLOAT32)

    @tf.function
    def step(x: Any) -> Any:
        doubled = 2 * x
        with tf.GradientTape() as tape:
            tape.watch(doubled)
            y = nn.fused_batch_norm(doubled, None, None, axis=-1).y
        return y, tape.gradient(y, doubled, output_gradients=3 * x), doubled

    y, dx, doubled = numpy_of(step(tf.constant(x)))
    assert_same_bits(doubled, 2 * x)
    assert_same_bits(y, nn.fused_batch_norm(doubled, None, None, axis=-1).y.numpy())
    batch = reference.moments(doubled, 0)
    assert_gradients(
        (dx, None, None, None), 3 * x, doubled, None, None, batch.mean[0], batch.variance()[0]
    )


def test_an_unknown_rank(rng: np.random.Generator) -> None:
    x = frozen(rng.standard_normal((3, 4, 5, 2)), cases.FLOAT32)

    @tf.function(input_signature=[tf.TensorSpec(None)])
    def by_axis(x: Any) -> Any:
        return nn.fused_batch_norm(x, None, None, axis=-1)

    @tf.function(input_signature=[tf.TensorSpec(None)])
    def by_format(x: Any) -> Any:
        return nn.fused_batch_norm(x, None, None)

    assert_forward(numpy_of(by_axis(x)), x, None, None)
    assert_forward(numpy_of(by_axis(x[0])), x[0], None, None)
    assert_forward(numpy_of(by_format(x)), x, None, None)
    with pytest.raises(tf.errors.InvalidArgumentError):
        by_format(x[0])


# ---- bad input that shows when the op runs ----

VECTOR = tf.TensorSpec([None])


@tf.function(
    input_signature=[
        tf.TensorSpec(None), VECTOR, VECTOR, VECTOR, VECTOR, tf.TensorSpec(None, tf.bool),
        tf.TensorSpec(None),
    ]
)  # fmt: skip
def _anything(x: Any, scale: Any, offset: Any, mean: Any, variance: Any, flag: Any, r: Any) -> Any:
    return nn.fused_batch_norm(
        x, scale, offset, mean, variance, is_training=flag, residual=r, axis=-1
    ).y


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("x", np.ones((), "f"), r"`x` must have the channel axis -1; got shape \(\)"),
        ("scale", np.ones(4, "f"), r"`scale` must have shape \(3,\).*got shape \(4,\)"),
        ("offset", np.ones(2, "f"), r"`offset` must have shape \(3,\)"),
        ("mean", np.ones(2, "f"), r"`mean` must have shape \(3,\)"),
        ("variance", np.ones(2, "f"), r"`variance` must have shape \(3,\)"),
        ("variance", -np.ones(3, "f"), "`variance` must not be negative"),
        (
            "flag",
            np.ones(2, bool),
            r"`is_training` must have shape \(\), a scalar; got shape \(2,\)",
        ),
        ("residual", np.ones((5, 3), "f"), r"`residual` must have shape \(2, 3\), that of x"),
    ],
)
def test_errors_of_the_op(argument: str, value: Array, message: str) -> None:
    one = np.ones(3, "f")
    arguments = {
        "x": np.ones((2, 3), "f"), "scale": one, "offset": one, "mean": one, "variance": one,
        "flag": np.array(False), "residual": np.ones((2, 3), "f"),
    }  # fmt: skip
    assert _anything(*arguments.values()).shape == (2, 3)
    arguments[argument] = value
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"fused_batch_norm: {message}"):
        _anything(*arguments.values())


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_weights_are_checked_when_the_op_runs(weight: float) -> None:
    x, weights = tf.ones([2, 3]), tf.constant([1.0, weight])
    for call in (
        lambda: nn.fused_batch_norm(x, None, None, axis=-1, weights=weights),
        lambda: nn.moments(x, 0, weights=weights),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match="finite and not negative"):
            call()


def test_a_parameter_of_the_wrong_type_is_not_read() -> None:
    """Only a graph made by hand can hold one: the wrapper casts."""
    with tf.Graph().as_default() as graph:
        x = tf.ones([2, 3], tf.float64)
        nn.fused_batch_norm(x, tf.constant(np.ones(3)), None, axis=-1, name="norm")
    definition = graph.as_graph_def()
    (node,) = (n for n in definition.node if n.op == "FusebnBatchNorm")
    node.attr["Scale"].list.type[0] = tf.float32.as_datatype_enum
    (ones,) = (n for n in definition.node if n.name == node.input[2])
    ones.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.ones(3, np.float32)))
    ones.attr["dtype"].type = tf.float32.as_datatype_enum
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(definition, name="")
        with pytest.raises(tf.errors.InvalidArgumentError, match="not the type that x calls for"):
            session.run("norm:0")
