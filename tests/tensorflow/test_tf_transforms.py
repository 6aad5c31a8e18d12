"""Transforms of the layers' variables: what they change, what they must not, and the switch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from conftest import Array, frozen
from fusebn.tensorflow import FakeQuantize, layers

v1 = tf.compat.v1

SHAPE = (6, 4, 3)
NAMES = ("scale", "offset", "moving_mean", "moving_variance")
Graph = dict[str, Any]

# The two layers under one interface: (function, name of the flag, of the decay, arguments).
BOTH: dict[str, Any] = {
    "batch_norm": (layers.batch_norm, "is_training", "decay", {"scale": True}),
    "batch_normalization": (layers.batch_normalization, "training", "momentum", {}),
}
SPECIALS: dict[str, dict[str, Any]] = {
    "plain": {},
    "in place": {"updates_collections": None},
    "renorm": {"renorm": True},
    "adjustment": {"adjustment": lambda shape: (2.0, 3.0)},
    "activation": {"activation_fn": tf.nn.relu},
    "portable": {"fused": False},
}
ONLY: dict[str, dict[str, Any]] = {
    "batch_norm": {
        "weights": {"batch_weights": np.arange(6.0)},
        "small weights": {"batch_weights": np.arange(6.0) / 100},
        "no weights": {"batch_weights": np.zeros(6)},
    },
    "batch_normalization": {
        "virtual batches": {"virtual_batch_size": 2},
        "two axes": {"axis": [1, 2]},
    },
}
EVERY = [
    pytest.param(layer, options, id=f"{layer}, {name}")
    for layer in BOTH
    for name, options in {**SPECIALS, **ONLY[layer]}.items()
]
OF_BATCH = [one for one in EVERY if not {"renorm", "virtual_batch_size"} & set(one.values[1])]


def smooth() -> dict[str, Callable[[Any], Any]]:
    return {
        "scale": lambda v: 2 * tf.tanh(v),
        "offset": tf.math.expm1,
        "moving_mean": lambda v: v + 0.5 * tf.sin(v),
        "moving_variance": lambda v: 0.5 * v + tf.square(v),
    }


@contextmanager
def graph() -> Iterator[Any]:
    with tf.Graph().as_default(), v1.Session() as session:
        yield session


def build(layer: str, options: Graph, transforms: Any = None, active: Any = None) -> Graph:
    """Build a layer, its gradients and its updates into the current graph."""
    function, flag, decay, arguments = BOTH[layer]
    x = v1.placeholder(tf.float32, SHAPE)
    training = v1.placeholder(tf.bool, [])
    given = {**arguments, decay: 0.5, flag: training, "transforms": transforms, **options}
    if active is not None:
        given["transforms_active"] = active
    y = function(x, **given)
    sources = [x, *v1.trainable_variables()]
    gradients = tf.gradients(tf.reduce_sum(y * tf.sin(y + 1)), sources)
    updates = v1.get_collection(v1.GraphKeys.UPDATE_OPS)
    return {"x": x, "training": training, "y": y, "gradients": gradients, "updates": updates}


def run(session: Any, net: Graph, x: Array, training: bool, feed: Any = None) -> list[Array]:
    """Return y, the gradients, and the variables afterwards."""
    wanted = [net["y"], net["gradients"], net["updates"]]
    y, gradients, _ = session.run(wanted, {net["x"]: x, net["training"]: training, **(feed or {})})
    own = [v for v in v1.global_variables() if "transforms/" not in v.name]
    return [y, *gradients, *session.run(own)]


def start(session: Any) -> None:
    rng = np.random.default_rng(1)
    session.run(v1.global_variables_initializer())
    for variable in v1.global_variables():
        if "transforms/" not in variable.name and variable.shape.rank:
            variable.load(rng.uniform(0.5, 2, variable.shape), session)


def steps(layer: str, options: Graph, **more: Any) -> list[Array]:
    """Return what two steps of training and one of inference yield."""
    found = []
    with graph() as session:
        feed = {}
        if more.get("active") == "fed":
            more["active"] = v1.placeholder(tf.bool, [])
            feed = {more["active"]: False}
        net = build(layer, options, **more)
        start(session)
        for training in (True, True, False):
            x = frozen(np.random.default_rng(3).normal(3, 2, SHAPE), np.float32)
            found += run(session, net, x, training, feed)
    return found


@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize(("layer", "options"), EVERY)
def test_what_is_not_active_changes_no_bit(layer: str, options: Graph, of_batch: bool) -> None:
    if of_batch and {"renorm", "virtual_batch_size"} & set(options):
        of_batch = False  # which is refused, see below
    plain = steps(layer, options)
    given = {**options, "transform_batch_statistics": of_batch}
    for active in ("fed",) if options else ("fed", False):
        transforms = {**smooth(), "moving_mean": FakeQuantize(3, limits="moving")}
        found = steps(layer, given, transforms=transforms, active=active)
        for a, b in zip(found, plain, strict=True):
            if "fused" in options and active == "fed" and of_batch:
                # TensorFlow adds up the gradients of its own ops in another order inside a cond.
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
            else:
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("layer", "options"), EVERY)
def test_averages_take_up_the_batch_as_it_is(
    layer: str, options: Graph, rng: np.random.Generator
) -> None:
    def averages(**more: Any) -> list[bytes]:
        with graph() as session:
            net = build(layer, options, **more)
            start(session)
            x = frozen(np.random.default_rng(3).normal(3, 2, SHAPE), np.float32)
            run(session, net, x, True)
            own = [v for v in v1.global_variables() if "moving" in v.name or "renorm_" in v.name]
            assert len(own) >= 2
            return [v.tobytes() for v in session.run(own)]

    plain = averages()
    assert averages(transforms=smooth()) == plain
    if not {"renorm", "virtual_batch_size"} & set(options):
        options = {**options, "transform_batch_statistics": True}
        assert averages(transforms=smooth()) == plain


def composite(net: Graph, options: Graph, variables: Any, of_batch: bool) -> Any:
    """Return what the layer is to yield, made of TensorFlow's ops in float64."""
    functions = smooth()
    beta, gamma, mean, variance = (tf.cast(v, tf.float64) for v in variables)
    x = tf.cast(net["x"], tf.float64)
    if options.get("axis"):
        x = tf.reshape(x, [SHAPE[0], -1])
        beta, gamma, mean, variance = (tf.reshape(v, [-1]) for v in (beta, gamma, mean, variance))
    axes = list(range(len(x.shape) - 1))
    weights = options.get("batch_weights")
    w = tf.constant(1.0 if weights is None else weights.reshape(-1, 1, 1), tf.float64)
    count = tf.reduce_sum(w * tf.ones_like(x), axes)
    own_mean = tf.reduce_sum(w * x, axes) / count
    own_variance = tf.reduce_sum(w * tf.square(x - own_mean), axes) / count
    if of_batch:
        own_mean = functions["moving_mean"](own_mean)
        own_variance = functions["moving_variance"](own_variance)
    training = net["training"]
    mean = tf.where(training, own_mean, functions["moving_mean"](mean))
    variance = tf.where(training, own_variance, functions["moving_variance"](variance))
    y = (x - mean) * tf.math.rsqrt(variance + 0.001)
    if "adjustment" in options:
        y = tf.where(training, y * 2 + 3, y)
    y = y * functions["scale"](gamma) + functions["offset"](beta)
    return options.get("activation_fn", tf.identity)(tf.reshape(y, SHAPE))


@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize(("layer", "options"), OF_BATCH)
def test_against_a_composite(
    layer: str, options: Graph, of_batch: bool, rng: np.random.Generator
) -> None:
    if "batch_weights" in options and not options["batch_weights"].any():
        return  # no statistics to compare
    with graph() as session:
        given = {**options, "transform_batch_statistics": of_batch}
        net = build(layer, given, smooth())
        by_name = {v.op.name.rpartition("/")[2]: v for v in v1.global_variables()}
        variables = [by_name[n] for n in ("beta", "gamma", "moving_mean", "moving_variance")]
        y = composite(net, options, variables, of_batch)
        sources = [net["x"], *v1.trainable_variables()]
        gradients = tf.gradients(tf.reduce_sum(y * tf.sin(y + 1)), sources)
        x = frozen(rng.normal(3, 2, SHAPE), np.float32)
        for training in (True, False):
            start(session)
            feed = {net["x"]: x, net["training"]: training}
            expected = session.run([y, *gradients], feed)
            got = session.run([net["y"], *net["gradients"]], feed)
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * np.abs(b).max())


@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize("layer", BOTH)
def test_one_graph_serves_both(layer: str, of_batch: bool, rng: np.random.Generator) -> None:
    x = frozen(rng.normal(3, 2, SHAPE), np.float32)
    options = {"transform_batch_statistics": of_batch}

    def constant(active: bool, training: bool) -> Array:
        with graph() as session:
            net = build(layer, options, smooth(), active)
            start(session)
            return run(session, net, x, training)

    with graph() as session:
        flag = v1.get_variable("flag", [], tf.bool, v1.zeros_initializer(), trainable=False)
        net = build(layer, options, smooth(), flag)
        start(session)
        values = session.run(v1.global_variables())
        session.graph.finalize()  # from here on, a new node is an error
        for training in (True, False):
            for active in (False, True, False):
                for variable, value in zip(v1.global_variables(), values, strict=True):
                    variable.load(value, session)
                flag.load(active, session)
                got = [v for v in run(session, net, x, training) if v.shape]
                expected = [v for v in constant(active, training) if v.shape]
                for a, b in zip(got, expected, strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("jit", [False, True])
def test_a_switch_does_not_retrace(jit: bool, rng: np.random.Generator) -> None:
    traces = []
    active = tf.Variable(False)

    def model(x: Any) -> Any:
        return layers.batch_normalization(
            x, training=True, transforms=smooth(), transforms_active=active
        )

    template = v1.make_template("model", model)

    @tf.function(jit_compile=jit)
    def train(x: Any) -> Any:
        traces.append(1)
        return template(x)

    x = tf.constant(rng.normal(3, 2, SHAPE), tf.float32)
    train(x)
    before = len(traces)
    plain = train(x).numpy()
    active.assign(True)
    assert np.abs(train(x).numpy() - plain).max() > 0.1  # 2 * tanh(1) is no 1
    active.assign(False)
    assert (train(x).numpy() == plain).all()
    assert len(traces) == before


@pytest.mark.parametrize("active", [True, False, "fed"])
@pytest.mark.parametrize("flag", [True, "fed"])
@pytest.mark.parametrize("layer", BOTH)
def test_observers_see_the_averages_before_they_change(
    layer: str, flag: Any, active: Any, rng: np.random.Generator
) -> None:
    function, name, decay, arguments = BOTH[layer]
    x = frozen(rng.normal(3, 2, SHAPE), np.float32)
    with graph() as session:
        quantizers = {n: FakeQuantize(8, limits="moving", decay=0.5) for n in NAMES}
        training = v1.placeholder_with_default(True, []) if flag == "fed" else flag
        given = v1.placeholder_with_default(active is True, []) if active == "fed" else active
        y = function(
            tf.constant(x),
            transforms=quantizers, transforms_active=given,
            **{**arguments, name: training, decay: 0.5},
        )  # fmt: skip
        updates = v1.get_collection(v1.GraphKeys.UPDATE_OPS)
        session.run(v1.global_variables_initializer())
        session.run([y, updates])
        mean = quantizers["moving_mean"]
        assert session.run([quantizers[n].steps for n in NAMES]) == [1] * 4
        assert session.run([mean.low, mean.high]) == [0, 0]
        session.run(y)  # which alone observes as well
        high = session.run(mean.high)
        expected = (x.mean((0, 1)) / 2).max() / 2
        np.testing.assert_allclose(high, expected, rtol=1e-5)
        assert session.run([quantizers[n].steps for n in NAMES]) == [2] * 4


def test_a_variance_below_0_and_one_of_0(rng: np.random.Generator) -> None:
    x = frozen(rng.normal(3, 2, SHAPE), np.float32)
    for of_batch, training in ((False, False), (True, True)):
        for epsilon in (0.0, 0.25):
            with graph() as session:
                y = layers.batch_normalization(
                    tf.constant(x), training=training, epsilon=epsilon,
                    beta_initializer=v1.ones_initializer(),
                    transforms={"moving_variance": lambda v: -v, "moving_mean": tf.zeros_like},
                    transform_batch_statistics=of_batch,
                )  # fmt: skip
                session.run(v1.global_variables_initializer())
                expected = x * 2 + 1 if epsilon else np.ones_like(x)
                np.testing.assert_allclose(session.run(y), expected, rtol=1e-6)
        with graph() as session:
            y = layers.batch_normalization(
                tf.constant(x), training=training, transforms={"scale": tf.zeros_like},
                transform_batch_statistics=of_batch,
            )  # fmt: skip
            session.run(v1.global_variables_initializer())
            assert not session.run(y).any()


def test_a_checkpoint_holds_what_was_observed(tmp_path: Any, rng: np.random.Generator) -> None:
    x = frozen(rng.normal(3, 2, SHAPE), np.float32)
    path = str(tmp_path / "model")

    def model() -> tuple[Any, Any]:
        quantizer = FakeQuantize(3, limits="moving", name="offset_quantizer")
        y = layers.batch_normalization(
            tf.constant(x), training=v1.placeholder_with_default(False, []),
            transforms={"offset": quantizer}, beta_initializer=v1.random_normal_initializer(),
        )  # fmt: skip
        return y, quantizer

    with graph() as session:
        y, quantizer = model()
        session.run(v1.global_variables_initializer())
        for variable in (quantizer.low, quantizer.steps):
            variable.load(-1, session)
        quantizer.steps.load(1, session)
        expected = session.run(y)
        v1.train.Saver().save(session, path)
    with graph() as session:
        y, _ = model()
        v1.train.Saver().restore(session, path)
        np.testing.assert_array_equal(session.run(y), expected)


@pytest.mark.parametrize("layer", BOTH)
def test_errors(layer: str, rng: np.random.Generator) -> None:
    function = BOTH[layer][0]
    x = np.ones(SHAPE, "float32")

    def call(**options: Any) -> Any:
        with tf.Graph().as_default():
            return function(tf.constant(x), **options)

    with pytest.raises(TypeError, match=f"{layer}: `transforms` must be a mapping"):
        call(transforms=[1])
    with pytest.raises(ValueError, match="`transforms` must name scale, offset"):
        call(transforms={"gamma": tf.tanh})
    with pytest.raises(TypeError, match=r"`transforms\['offset'\]` must be a function"):
        call(transforms={"offset": 3})
    with pytest.raises(ValueError, match=r"`transforms\['offset'\]` must return the shape \(3,\)"):
        call(transforms={"offset": lambda v: v[:2]})
    with pytest.raises(TypeError, match="`transforms_active` must be a bool"):
        call(transforms={"offset": tf.tanh}, transforms_active=2)
    with pytest.raises(TypeError, match="`transform_batch_statistics`"):
        call(transform_batch_statistics="yes")
    with pytest.raises(ValueError, match="`transform_batch_statistics` must be False with renorm"):
        call(renorm=True, transform_batch_statistics=True)


def test_errors_of_values(rng: np.random.Generator) -> None:
    transforms = {"offset": lambda v: v * np.float32("nan")}
    x = rng.normal(size=SHAPE).astype("float32")
    text = r"offset.* must return no NaN for what has none; got NaN"  # the log escapes quotes
    with graph() as session:
        active = v1.placeholder(tf.bool, [])
        y = layers.batch_normalization(
            tf.constant(x), transforms=transforms, transforms_active=active
        )
        session.run(v1.global_variables_initializer())
        session.run(y, {active: False})
        with pytest.raises(tf.errors.InvalidArgumentError, match=text):
            session.run(y, {active: True})
    template = v1.make_template(
        "model", lambda: layers.batch_normalization(tf.constant(x), transforms=transforms)
    )
    with pytest.raises(ValueError, match=text):
        template()
    with pytest.raises(ValueError, match="must be False with virtual_batch_size"):
        layers.batch_normalization(
            tf.constant(x), virtual_batch_size=2, transform_batch_statistics=True
        )


def test_observers_are_named_by_their_place_and_not_by_their_order() -> None:
    def names(order: list[str]) -> set[str]:
        with tf.Graph().as_default():
            transforms = {name: FakeQuantize(8, limits="moving") for name in order}
            x = tf.zeros([4, 3])
            with v1.variable_scope("net"):
                layers.batch_norm(
                    x, scale=True, is_training=True, scope="bn", transforms=transforms
                )
            return {variable.name for variable in v1.global_variables() if "low" in variable.name}

    wanted = {f"net/bn/transforms/{name}/low:0" for name in ("scale", "moving_mean")}
    assert names(["scale", "moving_mean"]) == names(["moving_mean", "scale"]) == wanted


def test_an_observer_of_another_graph_is_refused() -> None:
    quantize = FakeQuantize(8, limits="moving")
    for graph in range(2):
        with tf.Graph().as_default():
            x = tf.zeros([4, 3])
            if graph == 0:
                layers.batch_norm(x, is_training=True, transforms={"offset": quantize})
                continue
            with pytest.raises(ValueError, match="be of the graph in which this FakeQuantize"):
                layers.batch_norm(x, is_training=True, transforms={"offset": quantize})
