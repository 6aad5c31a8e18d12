"""`batch_norm` and `batch_normalization`, the layers: every argument, and what must not change."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import cases
from conftest import Array, assert_close, assert_forward, assert_same_bits, frozen
from fusebn import _reference as reference
from fusebn.tensorflow import layers

v1 = tf.compat.v1

# The two layers under one interface: (function, name of the flag, of the decay, arguments).
BOTH = {
    "batch_norm": (layers.batch_norm, "is_training", "decay", {"scale": True}),
    "batch_normalization": (layers.batch_normalization, "training", "momentum", {}),
}

# What each layer may be asked for beyond the plain: no rule about the state may depend on it.
SPECIALS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "plain": (None, {}),
    "in place": (None, {"updates_collections": None}),
    "renorm": (None, {"renorm": True}),
    "adjustment": (None, {"adjustment": lambda shape: (2.0, 3.0)}),
    "activation": (None, {"activation_fn": tf.tanh}),
    "zero_debias": ("batch_norm", {"zero_debias_moving_mean": True}),
    "batch_weights": ("batch_norm", {"batch_weights": np.arange(6.0)}),
    "virtual batches": ("batch_normalization", {"virtual_batch_size": 2}),
    "virtual renorm": ("batch_normalization", {"virtual_batch_size": 2, "renorm": True}),
    "portable": (None, {"fused": False}),
    "portable virtual batches": (
        "batch_normalization",
        {"virtual_batch_size": 2, "fused": False},
    ),
    "two axes": ("batch_normalization", {"axis": [1, 2]}),
}
EVERY_LAYER = [
    pytest.param(layer, options, id=f"{layer}, {special}")
    for special, (only, options) in SPECIALS.items()
    for layer in BOTH
    if only in (layer, None)
]


@contextmanager
def graph() -> Iterator[Any]:
    with tf.Graph().as_default(), v1.Session() as session:
        yield session


def start(session: Any, rng: np.random.Generator | None = None) -> None:
    """Initialize the variables; with a generator, to values of their own, variances positive."""
    session.run(v1.global_variables_initializer())
    for variable in v1.global_variables() if rng else ():
        variable.load(rng.uniform(0.5, 2, variable.shape), session)


def state(session: Any) -> dict[str, Array]:
    """Return the variables by the last part of their name."""
    names = [variable.op.name.rpartition("/")[2] for variable in v1.global_variables()]
    return dict(zip(names, session.run(v1.global_variables()), strict=True))


def bits(session: Any) -> list[bytes]:
    return [value.tobytes() for value in state(session).values()]


def updates() -> list[Any]:
    return v1.get_collection(v1.GraphKeys.UPDATE_OPS)


def batch(rng: np.random.Generator, shape: Any = (6, 4, 3), dtype: Any = np.float32) -> Array:
    return frozen(rng.normal(3, 2, shape), dtype)


# --- the toy run ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_training_then_inference_with_a_placeholder(name: str, rng: np.random.Generator) -> None:
    layer, flag, decay, options = BOTH[name]
    with graph() as session:
        x = v1.placeholder(tf.float32, [None, 3])
        training = v1.placeholder(tf.bool, [])
        y = layer(x, **{flag: training, decay: 0.9}, **options)
        start(session)
        mean, variance = np.zeros(3), np.ones(3)
        for _ in range(20):
            data = batch(rng, (16, 3))
            got, _ = session.run([y, updates()], {x: data, training: True})
            statistics = np.float32(data.mean(0)), np.float32(data.var(0, ddof=1))
            assert_forward((got, *statistics), data, None, None)
            mean = 0.9 * mean + 0.1 * data.mean(0, dtype=np.float64)
            variance = 0.9 * variance + 0.1 * data.var(0, ddof=1, dtype=np.float64)
        kept = state(session)
        assert len(kept) == 4
        assert kept["moving_mean"] == pytest.approx(mean, rel=1e-6)
        assert kept["moving_variance"] == pytest.approx(variance, rel=1e-6)
        before = bits(session)
        for _ in range(5):
            data = batch(rng, (7, 3))
            got, _ = session.run([y, updates()], {x: data, training: False})
            assert bits(session) == before
            assert_forward(
                (got, kept["moving_mean"], kept["moving_variance"]), data,
                kept["gamma"], kept["beta"], kept["moving_mean"], kept["moving_variance"],
                is_training=False,
            )  # fmt: skip


# --- the state does not change when it must not -----------------------------------------------


@pytest.mark.parametrize(("name", "options"), EVERY_LAYER)
@pytest.mark.parametrize("known", [True, False], ids=["bool", "tensor"])
def test_inference_changes_nothing(
    name: str, options: dict[str, Any], known: bool, rng: np.random.Generator
) -> None:
    layer, flag, _, more = BOTH[name]
    with graph() as session:
        x = v1.placeholder(tf.float32, [None, 4, 3])
        training = False if known else v1.placeholder_with_default(False, [])
        y = layer(x, **{flag: training}, **more, **options)
        assert bool(updates()) == (not known and "updates_collections" not in options)
        start(session, rng)
        before, kept = bits(session), state(session)
        data = batch(rng)
        got, _ = session.run([y, updates()], {x: data})
        assert bits(session) == before
        # A special layer infers as a plain one does.
        axis = options.get("axis", -1)
        axes = tuple(i for i in range(3) if i not in np.atleast_1d(axis) % 3)
        mean, variance, gamma, beta = (
            kept[key].reshape([1 if i in axes else n for i, n in enumerate(data.shape)])
            for key in ("moving_mean", "moving_variance", "gamma", "beta")
        )
        want = reference.normalize(data, mean, variance, gamma, beta, 0.001)
        if "activation_fn" in options:
            want = np.tanh(want)
        assert got == pytest.approx(want.astype(float), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("name", "options"), EVERY_LAYER)
@pytest.mark.parametrize("known", [True, False], ids=["bool", "tensor"])
def test_an_empty_batch_changes_nothing(
    name: str, options: dict[str, Any], known: bool, rng: np.random.Generator
) -> None:
    layer, flag, _, more = BOTH[name]
    options = {k: v[:0] if k == "batch_weights" else v for k, v in options.items()}
    with graph() as session:
        x = v1.placeholder(tf.float32, [None, 4, 3])
        training = True if known else v1.placeholder_with_default(True, [])
        y = layer(x, **{flag: training}, **more, **options)
        start(session, rng)
        before = bits(session)
        got, _ = session.run([y, updates()], {x: np.zeros((0, 4, 3))})
        assert got.shape == (0, 4, 3)
        assert bits(session) == before


@pytest.mark.parametrize("renorm", [False, True])
def test_a_batch_of_weight_0_changes_nothing(renorm: bool, rng: np.random.Generator) -> None:
    with graph() as session:
        data = batch(rng)
        y = layers.batch_norm(tf.constant(data), batch_weights=np.zeros(6), renorm=renorm)
        start(session, rng)
        before, beta = bits(session), state(session)["beta"]
        got, _ = session.run([y, updates()])
        assert bits(session) == before
        assert_same_bits(got, np.broadcast_to(beta, got.shape))


@pytest.mark.parametrize(("name", "options"), EVERY_LAYER)
def test_training_changes_every_average(
    name: str, options: dict[str, Any], rng: np.random.Generator
) -> None:
    """Else the tests above could not fail."""
    layer, flag, _, more = BOTH[name]
    with graph() as session:
        y = layer(tf.constant(batch(rng)), **{flag: True}, **more, **options)
        start(session, rng)
        before = state(session)
        session.run([y, updates()])
        after = state(session)
        for key in before:
            assert (before[key] != after[key]).all() == (key not in ("gamma", "beta")), key


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    ("value", "trains", "constant"),
    [
        (lambda: True, True, True),
        (lambda: False, False, True),
        (lambda: 1, True, True),
        (lambda: 0, False, True),
        (lambda: np.bool_(True), True, True),
        (lambda: np.array(False), False, True),
        (lambda: tf.constant(False), False, True),
        (lambda: tf.constant(True), True, True),
        (lambda: v1.placeholder_with_default(False, []), False, False),
        (lambda: v1.placeholder_with_default(True, []), True, False),
        (lambda: v1.placeholder_with_default(True, None), True, False),
        (lambda: tf.Variable(False), False, False),
    ],
)
def test_flags(name: str, value: Callable[[], Any], trains: bool, constant: bool) -> None:
    layer, flag, decay, options = BOTH[name]
    with graph() as session:
        y = layer(tf.constant([[1.0], [3.0]]), **{flag: value(), decay: 0.5}, **options)
        assert bool(updates()) == (trains or not constant)
        start(session)
        got, _ = session.run([y, updates()])
        expected = [[-1], [1]] if trains else [[1], [3]]
        assert got == pytest.approx(np.array(expected), rel=1e-3)
        assert state(session)["moving_mean"] == (1 if trains else 0)


# --- the graph --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("in_place", [False, True])
def test_one_op_and_no_cond(name: str, in_place: bool) -> None:
    layer, flag, _, options = BOTH[name]
    collections = None if in_place else v1.GraphKeys.UPDATE_OPS
    with graph() as session:
        x = v1.placeholder(tf.float32, [None, 8, 8, 3])
        training = v1.placeholder(tf.bool, [])
        for _ in range(3):
            x = layer(
                x, **{flag: training}, **options, activation_fn=tf.nn.relu,
                updates_collections=collections,
            )  # fmt: skip
        types = [op.type for op in session.graph.get_operations()]
        assert sum("BatchNorm" in kind for kind in types) == types.count("FusebnBatchNorm") == 3
        assert not {"If", "StatelessIf", "Switch", "RefSwitch", "Merge", "While"} & set(types)
        assert "Relu" not in types


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"renorm": True},
        {"virtual_batch_size": 2},
        {"axis": [1, 3]},
        {"adjustment": lambda shape: (v1.placeholder(tf.float32), 1.0)},
        {"activation_fn": tf.tanh},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_static_shape_survives(options: dict[str, Any]) -> None:
    with graph():
        x = v1.placeholder(tf.float32, [None, 7, None, 3])
        training = v1.placeholder(tf.bool, [])
        y = layers.batch_normalization(x, training=training, **options)
        assert y.shape.as_list() == [None, 7, None, 3]
        assert y.dtype == x.dtype


# --- updates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
def test_updates_wait_in_their_collection(name: str) -> None:
    layer, flag, decay, options = BOTH[name]
    with graph() as session:
        x = tf.constant([[1.0], [3.0]])
        y = layer(x, **{flag: True, decay: 0.5}, **options)
        assert len(updates()) == 2
        start(session)
        session.run(y)
        assert state(session)["moving_mean"] == 0
        session.run(updates())
        assert state(session)["moving_mean"] == 1
        assert state(session)["moving_variance"] == 1.5


@pytest.mark.parametrize("name", BOTH)
def test_updates_in_place(name: str) -> None:
    layer, flag, decay, options = BOTH[name]
    with graph() as session:
        x = tf.constant([[1.0], [3.0]])
        y = layer(x, **{flag: True, decay: 0.5}, **options, updates_collections=None)
        assert not updates()
        start(session)
        session.run(y)
        assert state(session)["moving_mean"] == 1
        assert state(session)["moving_variance"] == 1.5


def test_updates_in_collections_of_ones_own() -> None:
    with graph():
        x = tf.constant([[1.0], [3.0]])
        layers.batch_norm(x, updates_collections="mine")
        layers.batch_norm(x, updates_collections=["mine", "yours"])
        assert len(v1.get_collection("mine")) == 4
        assert v1.get_collection("yours") == v1.get_collection("mine")[2:]
        assert not updates()


def test_a_training_step_runs_the_updates(rng: np.random.Generator) -> None:
    """The way every tutorial writes it."""
    with graph() as session:
        x = v1.placeholder(tf.float32, [None, 3])
        y = layers.batch_norm(x, scale=True, decay=0.5)
        with tf.control_dependencies(updates()):
            optimizer = v1.train.GradientDescentOptimizer(0.1)
            step = optimizer.minimize(tf.reduce_sum(y * [1.0, 2.0, 3.0]))
        start(session)
        session.run(step, {x: batch(rng, (8, 3))})
        after = state(session)
        assert (after["moving_mean"] != 0).all()
        assert after["beta"] == pytest.approx([-0.8, -1.6, -2.4], rel=1e-6)


def test_two_calls_in_one_step_lose_no_update() -> None:
    with graph() as session:
        for x, reuse in ((1.0, None), (10.0, True)):
            layers.batch_norm(tf.fill([4, 1], x), decay=0.5, scope="norm", reuse=reuse)
        # In either order, or at once; 0.5 or 5 would be one of the two alone.
        possible = [5.25, 3.0, 5.5]
        for _ in range(20):
            start(session)
            session.run(updates())
            assert state(session)["moving_mean"] in possible


# --- variables --------------------------------------------------------------------------------


def test_names_and_order() -> None:
    averages = "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev"
    with graph():
        layers.batch_norm(tf.ones([2, 3]), scale=True)
        layers.batch_norm(tf.ones([2, 3]), scale=True)
        with v1.variable_scope("net"):
            layers.batch_norm(tf.ones([2, 3]), renorm=True, center=False)
        assert [v.op.name for v in v1.global_variables()] == [
            *(f"BatchNorm/{name}" for name in ("beta", "gamma", "moving_mean", "moving_variance")),
            *(
                f"BatchNorm_1/{name}"
                for name in ("beta", "gamma", "moving_mean", "moving_variance")
            ),
            *(f"net/BatchNorm/{name}" for name in averages),
        ]
        assert v1.get_collection(v1.GraphKeys.MODEL_VARIABLES) == v1.global_variables()
        assert [v.op.name for v in v1.trainable_variables()] == [
            "BatchNorm/beta", "BatchNorm/gamma", "BatchNorm_1/beta", "BatchNorm_1/gamma",
        ]  # fmt: skip


def test_names_and_order_of_batch_normalization() -> None:
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    with graph():
        layers.batch_normalization(tf.ones([2, 3]))
        layers.batch_normalization(tf.ones([2, 3]), name="mine", trainable=False)
        assert [v.op.name for v in v1.global_variables()] == [
            *(f"batch_normalization/{name}" for name in names),
            *(f"mine/{name}" for name in names),
        ]
        assert len(v1.trainable_variables()) == 2
        assert not v1.get_collection(v1.GraphKeys.MODEL_VARIABLES)


def test_names_of_debiasing() -> None:
    """TensorFlow opens the variable's full name as a scope inside the layer's."""
    with graph():
        layers.batch_norm(tf.ones([2, 3]), center=False, zero_debias_moving_mean=True)
        assert [v.op.name for v in v1.global_variables()] == [
            "BatchNorm/moving_mean",
            "BatchNorm/moving_variance",
            "BatchNorm/BatchNorm/moving_mean/biased",
            "BatchNorm/BatchNorm/moving_mean/local_step",
        ]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("renorm", [False, True])
def test_types(dtype: np.dtype[Any], renorm: bool, rng: np.random.Generator) -> None:
    with graph() as session:
        data = batch(rng, dtype=dtype)
        options = {"decay": 0.0, "epsilon": 0.0, "renorm": renorm}
        y = layers.batch_norm(tf.constant(data), activation_fn=tf.nn.relu, **options)
        assert y.dtype == dtype
        start(session)
        got, _ = session.run([y, updates()])
        of = cases.FLOAT64 if dtype == cases.FLOAT64 else cases.FLOAT32
        after = state(session)
        assert {value.dtype for value in after.values()} == {of}
        if renorm:  # by the averages it starts from: 0 and 1
            want = np.maximum(reference.wide(data), 0)
            ulps = 16 if dtype in (cases.FLOAT32, cases.FLOAT64) else 1
            assert_close(got, want, dtype=dtype, magnitude=np.abs(want) + 1, ulps=ulps)
        else:
            statistics = after["moving_mean"], after["moving_variance"]
            assert_forward((got, *statistics), data, None, None, epsilon=0, activation="relu")


@pytest.mark.parametrize("name", BOTH)
def test_reuse(name: str, rng: np.random.Generator) -> None:
    layer, flag, decay, options = BOTH[name]
    scope = "scope" if name == "batch_norm" else "name"
    options = {**options, scope: "norm"}
    with graph() as session:
        data = batch(rng)
        layer(tf.constant(data), **{flag: True, decay: 0.0}, **options)
        y = layer(tf.constant(data), **{flag: False}, **options, reuse=True)
        assert len(v1.global_variables()) == 4
        start(session)
        session.run(updates())
        assert session.run(y).mean() == pytest.approx(0, abs=1e-5)
        layer(tf.constant(data), **{flag: False}, **options, reuse=v1.AUTO_REUSE)
        assert len(v1.global_variables()) == 4
        with pytest.raises(ValueError, match=r"norm/\w+ already exists, disallowed"):
            layer(tf.constant(data), **options)
        with pytest.raises(ValueError, match=r"other/\w+ does not exist"):
            layer(tf.constant(data), **{**options, scope: "other"}, reuse=True)
        with pytest.raises(ValueError, match=r"[Rr]euse"):
            layer(tf.constant(data), reuse=True)
        with pytest.raises(ValueError, match="shape"):
            layer(tf.ones([2, 5]), **options, reuse=True)


def test_a_scope_object() -> None:
    with graph():
        with v1.variable_scope("net") as scope:
            layers.batch_norm(tf.ones([2, 3]))
        layers.batch_norm(tf.ones([2, 3]), scope=scope)
        assert v1.global_variables()[-1].op.name == "net/moving_variance"


def test_initializers(rng: np.random.Generator) -> None:
    values = {"beta": 2.0, "gamma": 3.0, "moving_mean": 4.0, "moving_variance": 25.0}
    given = {name: v1.constant_initializer(value) for name, value in values.items()}
    spelled = {f"{name}_initializer": value for name, value in given.items()}
    for layer in (
        lambda x: layers.batch_norm(x, scale=True, is_training=False, param_initializers=given),
        lambda x: layers.batch_normalization(x, **spelled),
    ):
        with graph() as session:
            y = layer(tf.fill([2, 3], 9.0))
            start(session)
            assert {k: v.tolist() for k, v in state(session).items()} == {
                k: [v] * 3 for k, v in values.items()
            }
            assert session.run(y) == pytest.approx(np.full((2, 3), 5), rel=1e-4)


def test_initializers_of_renorm() -> None:
    with graph() as session:
        given = {"moving_mean": v1.constant_initializer(4.0)}
        given["moving_variance"] = v1.constant_initializer(25.0)
        layers.batch_norm(tf.ones([2, 3]), renorm=True, param_initializers=given)
        start(session)
        kept = {key: value[0] for key, value in state(session).items()}
        assert kept["renorm_mean"] == 4
        assert kept["moving_stddev"] == kept["renorm_stddev"] == 5


def test_regularizers() -> None:
    def l1(variable: Any) -> Any:
        return tf.reduce_sum(tf.abs(variable))

    losses = v1.GraphKeys.REGULARIZATION_LOSSES
    for layer in (
        lambda **reuse: layers.batch_norm(
            tf.ones([2, 3]), scale=True, scope="norm", batch_weights=[1.0, 2.0],
            param_regularizers={"beta": l1, "gamma": lambda v: 2 * l1(v)}, **reuse,
        ),
        lambda **reuse: layers.batch_normalization(
            tf.ones([2, 3]), name="norm", beta_regularizer=l1,
            gamma_regularizer=lambda v: 2 * l1(v), **reuse,
        ),
    ):  # fmt: skip
        with graph() as session:
            layer()
            layer(reuse=True)
            start(session)
            assert sorted(session.run(v1.get_collection(losses))) == [0, 6]
    with graph(), v1.variable_scope("net", regularizer=l1):
        layers.batch_norm(tf.ones([2, 3]), renorm=True)
        # The scope's regularizer is for parameters, not for averages.
        assert len(v1.get_collection(losses)) == 1


def test_constraints() -> None:
    with graph():
        layers.batch_normalization(
            tf.ones([2, 3]), beta_constraint=tf.nn.relu, gamma_constraint=tf.nn.relu6
        )
        gamma, beta, *averages = v1.global_variables()
        assert gamma.constraint is tf.nn.relu6
        assert beta.constraint is tf.nn.relu
        assert {average.constraint for average in averages} == {None}


def test_variables_collections() -> None:
    with graph():
        layers.batch_norm(tf.ones([2, 3]), scale=True, variables_collections=["mine"])
        assert v1.get_collection("mine") == v1.global_variables()
        layers.batch_norm(tf.ones([2, 3]), variables_collections={"beta": "offsets"})
        assert [v.op.name for v in v1.get_collection("offsets")] == ["BatchNorm_1/beta"]


def test_outputs_collections() -> None:
    with graph():
        with v1.variable_scope("net"):
            y = layers.batch_norm(tf.ones([2, 3]), outputs_collections="ends")
        z = layers.batch_norm(tf.ones([2, 3]), outputs_collections=["ends", "more"])
        assert v1.get_collection("ends") == [y, z]
        assert v1.get_collection("more") == [z]
        assert (y.aliases, z.aliases) == (["net/BatchNorm"], ["BatchNorm"])


def test_a_partitioned_scope(rng: np.random.Generator) -> None:
    with graph() as session:
        data = batch(rng, (8, 4))
        with v1.variable_scope("net", partitioner=v1.fixed_size_partitioner(2)):
            y = layers.batch_norm(tf.constant(data), scale=True, decay=0.0)
        start(session)
        assert session.run(v1.global_variables()[-1]).shape == (4,)  # an average is in one piece
        got, _ = session.run([y, updates()])
        assert got.mean(0) == pytest.approx(np.zeros(4), abs=1e-6)


def test_reference_variables(rng: np.random.Generator) -> None:
    with graph() as session, v1.variable_scope("net", use_resource=False):
        training = v1.placeholder(tf.bool, [])
        data = batch(rng)
        y = layers.batch_norm(
            tf.constant(data),
            decay=0.5,
            is_training=training,
            updates_collections=None,
            renorm=True,
        )
        assert {type(v).__name__ for v in v1.global_variables()} == {"RefVariable"}
        start(session)
        before = bits(session)
        session.run(y, {training: False})
        assert bits(session) == before
        session.run(y, {training: True})
        assert state(session)["moving_mean"] == pytest.approx(data.mean((0, 1)) / 2, rel=1e-6)


# --- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_data_format(data_format: str, rank: int, rng: np.random.Generator) -> None:
    axis = 1 if data_format == "NCHW" else rank - 1
    with graph() as session:
        data = batch(rng, (6, 3, 4, 2, 5)[:rank])
        y = layers.batch_norm(tf.constant(data), 0.9, scale=True, data_format=data_format)
        start(session, rng)
        before = state(session)
        got, _ = session.run([y, updates()])
        after = state(session)
        assert_forward(
            (got, after["moving_mean"], after["moving_variance"]), data, before["gamma"],
            before["beta"], before["moving_mean"], before["moving_variance"],
            exponential_avg_factor=1 - 0.9, axis=axis,
        )  # fmt: skip


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -3, [3], (1,)])
def test_axis(axis: Any, rng: np.random.Generator) -> None:
    with graph() as session:
        data = batch(rng, (6, 3, 4, 5))
        y = layers.batch_normalization(tf.constant(data), axis, 0.9, training=True)
        start(session, rng)
        before = state(session)
        got, _ = session.run([y, updates()])
        after = state(session)
        assert_forward(
            (got, after["moving_mean"], after["moving_variance"]), data, before["gamma"],
            before["beta"], before["moving_mean"], before["moving_variance"],
            exponential_avg_factor=1 - 0.9, axis=np.atleast_1d(axis)[0],
        )  # fmt: skip


@pytest.mark.parametrize("axis", [[1, 2], [2, 3], [1, 2, 3], [3, 1], [0, -1], [-2, 0]])
@pytest.mark.parametrize("known", [True, False], ids=["static", "dynamic"])
def test_several_axes(axis: list[int], known: bool, rng: np.random.Generator) -> None:
    with graph() as session:
        data, more = batch(rng, (6, 3, 4, 5)), batch(rng, (6, 3, 4, 5))
        axes = [a % 4 for a in axis]
        across = tuple(a for a in range(4) if a not in axes)
        shape = [n if a in axes else None for a, n in enumerate(data.shape)]
        x = v1.placeholder(tf.float32, data.shape if known else shape)
        y = layers.batch_normalization(
            x, axis, 0.0, training=True, residual=tf.constant(more), activation_fn=tf.nn.relu
        )
        start(session, rng)
        before = state(session)
        got, _ = session.run([y, updates()], {x: data})
        after = state(session)
        moments = reference.moments(data, across)
        assert after["moving_mean"] == pytest.approx(moments.mean.astype(float), rel=1e-5)
        variance = moments.variance(1).astype(float)
        assert after["moving_variance"] == pytest.approx(variance, rel=1e-5)
        want = reference.normalize(
            data, moments.mean, moments.variance(), before["gamma"], before["beta"], 0.001,
            "relu", more,
        )  # fmt: skip
        assert_close(got, want, dtype=cases.FLOAT32, magnitude=4 * np.abs(want) + 4, ulps=8)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("correction", [0, 1, 2.5])
def test_correction(name: str, correction: float, rng: np.random.Generator) -> None:
    layer, flag, decay, _ = BOTH[name]
    with graph() as session:
        data = batch(rng, (6, 3), np.float64)
        options = {"correction": correction, flag: True, decay: 0.75}
        layer(tf.constant(data), **options)
        start(session)
        session.run(updates())
        want = 0.75 + 0.25 * data.var(0) * 6 / (6 - correction)
        assert state(session)["moving_variance"] == pytest.approx(want, rel=1e-13)


@pytest.mark.parametrize("name", BOTH)
def test_a_batch_of_one(name: str) -> None:
    layer, flag, decay, options = BOTH[name]
    with graph() as session:
        y = layer(tf.constant([[5.0, 7.0]]), **{flag: True, decay: 0.75}, **options)
        start(session)
        got, _ = session.run([y, updates()])
        assert got.tolist() == [[0, 0]]  # beta
        assert state(session)["moving_mean"].tolist() == [1.25, 1.75]
        assert state(session)["moving_variance"].tolist() == [0.75, 0.75]


def test_schedules(rng: np.random.Generator) -> None:
    """Decays and limits may be tensors, as the paper on renormalization wants them to change."""
    with graph() as session:
        step = v1.placeholder(tf.float64, [])
        data = batch(rng, (8, 3), np.float64)
        y = layers.batch_norm(
            tf.constant(data), decay=step, renorm=True, renorm_decay=step,
            renorm_clipping={"rmax": 1 + step, "rmin": 1 / (1 + step), "dmax": step},
        )  # fmt: skip
        start(session)
        mean, stddev = data.mean(0), np.sqrt(data.var(0) + 0.001)
        for value in (0.0, 0.5):
            start(session)
            got, _ = session.run([y, updates()], {step: value})
            r, d = np.clip(stddev, 1 / (1 + value), 1 + value), np.clip(mean, -value, value)
            assert got == pytest.approx((data - mean) / stddev * r + d, rel=1e-11, abs=1e-11)
            after = state(session)
            assert after["moving_mean"] == pytest.approx((1 - value) * mean, rel=1e-12)
            assert after["renorm_mean"] == pytest.approx((1 - value) * mean, rel=1e-12)


@pytest.mark.parametrize(("center", "scale"), [(False, False), (True, False), (False, True)])
def test_center_and_scale(center: bool, scale: bool, rng: np.random.Generator) -> None:
    for layer in (
        lambda x: layers.batch_norm(x, 0.0, center, scale),
        lambda x: layers.batch_normalization(x, momentum=0.0, center=center, scale=scale,
                                             training=True),
    ):  # fmt: skip
        with graph() as session:
            data = batch(rng)
            y = layer(tf.constant(data))
            start(session, rng)
            before = state(session)
            assert ("beta" in before, "gamma" in before) == (center, scale)
            got, _ = session.run([y, updates()])
            after = state(session)
            assert_forward(
                (got, after["moving_mean"], after["moving_variance"]),
                data, before.get("gamma"), before.get("beta"),
            )  # fmt: skip


@pytest.mark.parametrize("known", [True, False], ids=["bool", "tensor"])
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_batch_weights(data_format: str, known: bool, rng: np.random.Generator) -> None:
    axis = 1 if data_format == "NCHW" else 2
    with graph() as session:
        data = np.array(batch(rng))
        weights = np.array([1, 2, 0, 0.5, 3, 1], np.float32)
        data[2] = np.nan  # an example of weight 0 may hold anything
        training = True if known else v1.placeholder_with_default(True, [])
        y = layers.batch_norm(
            tf.constant(data), 0.9, scale=True, is_training=training, data_format=data_format,
            batch_weights=weights,
        )  # fmt: skip
        start(session, rng)
        before = state(session)
        got, _ = session.run([y, updates()])
        after = state(session)
        assert_forward(
            (got, after["moving_mean"], after["moving_variance"]), data, before["gamma"],
            before["beta"], before["moving_mean"], before["moving_variance"],
            exponential_avg_factor=1 - 0.9, axis=axis, weights=weights[:, None],
        )  # fmt: skip


def test_weights_are_repetitions(rng: np.random.Generator) -> None:
    """Together with everything that TensorFlow's layer refused to combine them with."""
    data, times = batch(rng, (4, 3), np.float64), np.array([2, 1, 0, 3])
    options: dict[str, Any] = {
        "decay": 0.5, "renorm": True, "renorm_decay": 0.75, "zero_debias_moving_mean": True,
        "adjustment": lambda shape: (2.0, tf.ones(shape[1:], tf.float64)),
        "updates_collections": None,
    }  # fmt: skip
    states, results = [], []
    for x, weights in ((data, times), (data.repeat(times, 0), None)):
        with graph() as session:
            y = layers.batch_norm(tf.constant(x), batch_weights=weights, **options)
            start(session)
            for _ in range(3):
                result = session.run(y)
            results.append(result[-1])
            states.append(state(session))
    assert results[0] == pytest.approx(results[1], rel=1e-12)
    for key, value in states[0].items():
        assert value == pytest.approx(states[1][key], rel=1e-12), key


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (tf.nn.relu, "relu"), (tf.nn.relu6, "relu6"), (tf.nn.silu, "silu"), (tf.nn.swish, "silu"),
        (tf.nn.gelu, "gelu"), (v1.nn.relu, "relu"), (v1.nn.relu6, "relu6"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
@pytest.mark.parametrize("renorm", [False, True])
def test_known_activations(
    function: Any, name: str, renorm: bool, rng: np.random.Generator
) -> None:
    with graph() as session:
        data, more = batch(rng), batch(rng)
        y = layers.batch_norm(
            tf.constant(data), 0.0, activation_fn=function, residual=tf.constant(more),
            renorm=renorm, is_training=v1.placeholder_with_default(not renorm, []),
        )  # fmt: skip
        start(session)
        got, _ = session.run([y, updates()])
        after = state(session)
        statistics = after["moving_mean"], after["moving_variance"]
        given = statistics if renorm else (None, None)
        assert_forward(
            (got, *statistics), data, None, None, *given,
            is_training=not renorm, activation=name, residual=more,
        )  # fmt: skip
        kinds = {op.type for op in session.graph.get_operations()}
        assert bool(kinds & {"Relu", "Relu6", "Sigmoid", "Erfc"}) == renorm  # else it is fused


@pytest.mark.parametrize("function", [tf.tanh, tf.nn.leaky_relu, lambda y: y**2 - 1])
@pytest.mark.parametrize("name", BOTH)
def test_any_activation(name: str, function: Any, rng: np.random.Generator) -> None:
    layer, flag, _, options = BOTH[name]
    with graph() as session:
        data = batch(rng)
        z = layer(tf.constant(data), **{flag: True}, **options)
        y = layer(tf.constant(data), **{flag: True}, **options, activation_fn=function)
        start(session)
        got, want = session.run([y, function(z)])
        assert_same_bits(got, want)


def test_zero_debias(rng: np.random.Generator) -> None:
    """A moving mean that forgets its start, and a moving variance that does not."""
    with graph() as session:
        x = v1.placeholder(tf.float64, [8, 3])
        training = v1.placeholder(tf.bool, [])
        layers.batch_norm(x, 0.75, is_training=training, zero_debias_moving_mean=True)
        start(session)
        means, variance = [], np.ones(3)
        for step in range(1, 6):
            data = batch(rng, (8, 3), np.float64)
            session.run(updates(), {x: data, training: True})
            session.run(updates(), {x: batch(rng, (8, 3)), training: False})
            means.append(data.mean(0))
            weights = 0.75 ** np.arange(step)[::-1]
            kept = state(session)
            assert kept["moving_mean"] == pytest.approx(np.average(means, 0, weights), rel=1e-12)
            variance = 0.75 * variance + 0.25 * data.var(0, ddof=1)
            assert kept["moving_variance"] == pytest.approx(variance, rel=1e-12)
            assert kept["local_step"] == step


@pytest.mark.parametrize("known", [True, False], ids=["bool", "tensor"])
@pytest.mark.parametrize(
    "clipping",
    [None, {}, {"rmax": 1.1, "rmin": 0.9, "dmax": 0.25}, {"rmax": 1.5}, {"dmax": 0.0}],
)
@pytest.mark.parametrize("name", BOTH)
def test_renorm(
    name: str, clipping: dict[str, float] | None, known: bool, rng: np.random.Generator
) -> None:
    """Equation by equation after the paper, with the averages TensorFlow keeps."""
    layer, flag, decay, options = BOTH[name]
    decays = {decay: 0.9, f"renorm_{decay}": 0.5}
    epsilon = 0.01
    with graph() as session:
        x = v1.placeholder(tf.float64, [None, 3])
        training = True if known else v1.placeholder(tf.bool, [])
        y = layer(
            x, **{flag: training}, **decays, **options, epsilon=epsilon, renorm=True,
            renorm_clipping=clipping,
        )  # fmt: skip
        start(session, rng)
        want = {key: value.astype(float) for key, value in state(session).items()}
        want["moving_stddev"] = np.sqrt(want["moving_variance"])
        session.run([v.assign(want[v.op.name.rpartition("/")[2]]) for v in v1.global_variables()])
        limits = {"rmax": np.inf, "rmin": 0, "dmax": np.inf, **(clipping or {})}
        for _ in range(4):
            data = batch(rng, (8, 3), np.float64)
            got, _ = session.run([y, updates()], {x: data} | ({} if known else {training: True}))
            mean, stddev = data.mean(0), np.sqrt(data.var(0) + epsilon)
            r = np.clip(stddev / want["renorm_stddev"], limits["rmin"], limits["rmax"])
            d = (mean - want["renorm_mean"]) / want["renorm_stddev"]
            d = np.clip(d, -limits["dmax"], limits["dmax"])
            z = (data - mean) / stddev * r + d
            assert got == pytest.approx(z * want["gamma"] + want["beta"], rel=1e-11, abs=1e-11)
            unbiased = np.sqrt(data.var(0, ddof=1) + epsilon)
            want["renorm_mean"] = (want["renorm_mean"] + mean) / 2
            want["renorm_stddev"] = (want["renorm_stddev"] + stddev) / 2
            want["moving_mean"] = 0.9 * want["moving_mean"] + 0.1 * mean
            want["moving_stddev"] = 0.9 * want["moving_stddev"] + 0.1 * unbiased
            want["moving_variance"] = np.maximum(want["moving_stddev"] ** 2 - epsilon, 0)
            for key, value in state(session).items():
                assert value == pytest.approx(want[key], rel=1e-11), key


def test_renorm_from_a_deviation_of_0(rng: np.random.Generator) -> None:
    """The average of the standard deviation is taken for no less than that of a constant."""
    with graph() as session:
        data = batch(rng, (8, 3), np.float64)
        y = layers.batch_normalization(
            tf.constant(data), training=True, renorm=True, epsilon=0.25,
            moving_variance_initializer=v1.zeros_initializer(),
        )  # fmt: skip
        start(session)
        assert session.run(y) == pytest.approx(data / 0.5, rel=1e-12)


def test_renorm_does_not_differentiate_its_correction(rng: np.random.Generator) -> None:
    with graph() as session:
        data, dy = batch(rng, (8, 3), np.float64), batch(rng, (8, 3), np.float64)
        x = tf.constant(data)
        y = layers.batch_norm(x, scale=True, renorm=True)
        gradients = tf.gradients(y, [x, *v1.trainable_variables()], dy)
        start(session, rng)
        before = state(session)
        dx, dbeta, dgamma = session.run(gradients)
        stddev = np.sqrt(data.var(0) + 0.001)
        r = stddev / before["renorm_stddev"]
        d = (data.mean(0) - before["renorm_mean"]) / before["renorm_stddev"]
        want = reference.fused_batch_norm_grad(
            dy, data, before["gamma"] * r, before["beta"], data.mean(0), data.var(0), axis=-1
        )
        assert dx == pytest.approx(want.dx.astype(float), rel=1e-9, abs=1e-9)
        assert dbeta == pytest.approx(dy.sum(0), rel=1e-12)
        xhat = (data - data.mean(0)) / stddev
        assert dgamma == pytest.approx((dy * (xhat * r + d)).sum(0), rel=1e-9)


@pytest.mark.parametrize("name", BOTH)
def test_adjustment(name: str, rng: np.random.Generator) -> None:
    """A factor for each channel and a summand for each example, between xhat and gamma."""
    layer, flag, _, options = BOTH[name]
    factor, summand = rng.uniform(1, 2, 3), rng.uniform(1, 2, (6, 1, 1))
    shapes = []

    def adjustment(shape: Any) -> tuple[Any, Any]:
        shapes.append(shape)
        return tf.constant(factor), tf.constant(summand)

    with graph() as session:
        x = v1.placeholder(tf.float64, [None, 4, 3])
        training = v1.placeholder(tf.bool, [])
        y = layer(x, **{flag: training}, **options, adjustment=adjustment)
        start(session, rng)
        kept, data = state(session), batch(rng, dtype=np.float64)
        got, shape = session.run([y, shapes[0]], {x: data, training: True})
        assert shape.tolist() == [6, 4, 3]
        xhat = (data - data.mean((0, 1))) / np.sqrt(data.var((0, 1)) + 0.001)
        want = (xhat * factor + summand) * kept["gamma"] + kept["beta"]
        assert got == pytest.approx(want, rel=1e-11, abs=1e-11)
        got = session.run(y, {x: data, training: False})
        xhat = (data - kept["moving_mean"]) / np.sqrt(kept["moving_variance"] + 0.001)
        assert got == pytest.approx(xhat * kept["gamma"] + kept["beta"], rel=1e-11, abs=1e-11)


# --- virtual batches --------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, 3, [1, 3]])
@pytest.mark.parametrize("size", [1, 2, 6])
@pytest.mark.parametrize("known", [True, False], ids=["bool", "tensor"])
def test_virtual_batches(axis: Any, size: int, known: bool, rng: np.random.Generator) -> None:
    with graph() as session:
        shape = [None, 3, None, 5]
        x = v1.placeholder(tf.float64, shape)
        training = True if known else v1.placeholder(tf.bool, [])
        y = layers.batch_normalization(
            x, axis, 0.5, training=training, virtual_batch_size=size, activation_fn=tf.nn.relu
        )
        axes = np.atleast_1d(axis)
        several = [1, 1, 3 if 1 in axes else 1, 1, 5 if 3 in axes else 1]
        assert v1.global_variables()[0].shape == several
        start(session, rng)
        before, data = state(session), batch(rng, (6, 3, 4, 5), np.float64)
        gamma, beta, mean, variance = (
            before[key][0] for key in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        got, _ = session.run([y, updates()], {x: data} | ({} if known else {training: True}))
        groups, means, variances = 6 // size, [], []
        across = tuple(a for a in range(4) if a not in axes)
        for j in range(groups):
            group = data[j::groups]
            xhat = (group - group.mean(across, keepdims=True)) / np.sqrt(
                group.var(across, keepdims=True) + 0.001
            )
            want = np.maximum(xhat * gamma + beta, 0)
            assert got[j::groups] == pytest.approx(want, rel=1e-11, abs=1e-11)
            means.append(group.mean(across, keepdims=True))
            variances.append(group.var(across, ddof=1, keepdims=True))
        after = state(session)
        assert after["moving_mean"][0] == pytest.approx((mean + np.mean(means, 0)) / 2, rel=1e-12)
        assert after["moving_variance"][0] == pytest.approx(
            (variance + np.mean(variances, 0)) / 2, rel=1e-12
        )
        if not known:  # any batch will do for inference, and nothing changes
            data = batch(rng, (5, 3, 2, 5), np.float64)
            got, _ = session.run([y, updates()], {x: data, training: False})
            mean, variance = after["moving_mean"][0], after["moving_variance"][0]
            want = np.maximum((data - mean) / np.sqrt(variance + 0.001) * gamma + beta, 0)
            assert got == pytest.approx(want, rel=1e-11, abs=1e-11)
            assert all((state(session)[key] == value).all() for key, value in after.items())


def test_a_virtual_batch_of_all_is_the_batch(rng: np.random.Generator) -> None:
    with graph() as session:
        data = batch(rng)
        y = layers.batch_normalization(tf.constant(data), training=True)
        z = layers.batch_normalization(tf.constant(data), training=True, virtual_batch_size=6)
        start(session)
        first, second, _ = session.run([y, z, updates()])
        assert first == pytest.approx(second, rel=1e-6, abs=1e-6)
        values = session.run(v1.global_variables())
        for one, other in zip(values[:4], values[4:], strict=True):
            assert one == pytest.approx(other.ravel(), rel=1e-6)


def test_virtual_batches_must_divide_the_batch(rng: np.random.Generator) -> None:
    with graph() as session:
        with pytest.raises(ValueError, match=r"`virtual_batch_size` must divide .* 6; got 4"):
            layers.batch_normalization(tf.ones([6, 3]), training=True, virtual_batch_size=4)
        x = v1.placeholder(tf.float32, [None, 3])
        y = layers.batch_normalization(x, training=True, virtual_batch_size=4)
        start(session)
        before = bits(session)
        with pytest.raises(tf.errors.InvalidArgumentError, match="virtual_batch_size_must_divide"):
            session.run([y, updates()], {x: np.ones((6, 3))})
        assert bits(session) == before


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("in_place", [False, True])
def test_gradients(training: bool, in_place: bool, rng: np.random.Generator) -> None:
    with graph() as session:
        data, dy = batch(rng, dtype=np.float64), batch(rng, dtype=np.float64)
        x, flag = tf.constant(data), v1.placeholder(tf.bool, [])
        y = layers.batch_norm(
            x, scale=True, is_training=flag, activation_fn=tf.nn.silu,
            updates_collections=None if in_place else "later",
        )  # fmt: skip
        gradients = tf.gradients(y, [x, *v1.trainable_variables()], dy)
        start(session, rng)
        before = state(session)
        dx, dbeta, dgamma = session.run(gradients, {flag: training})
        mean, variance = (
            (data.mean((0, 1)), data.var((0, 1)))
            if training
            else (before["moving_mean"], before["moving_variance"])
        )
        want = reference.fused_batch_norm_grad(
            dy, data, before["gamma"], before["beta"], mean, variance, 0.001, training, axis=-1,
            activation="silu",
        )  # fmt: skip
        for got, expected in ((dx, want.dx), (dbeta, want.doffset), (dgamma, want.dscale)):
            assert got == pytest.approx(expected.astype(float), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "options"), [row for row in EVERY_LAYER if "renorm" not in row.values[1]]
)
def test_gradients_of_every_layer(
    name: str, options: dict[str, Any], rng: np.random.Generator
) -> None:
    """Against finite differences of y; renorm is not y's derivative, by design: see above."""
    layer, flag, _, more = BOTH[name]
    with graph() as session:
        data, dy, along = (batch(rng, dtype=np.float64) for _ in range(3))
        x = v1.placeholder(tf.float64, data.shape)
        y = layer(x, **{flag: True}, **more, **options)
        loss = tf.reduce_sum(y * dy)
        (dx,) = tf.gradients(loss, x)
        start(session, rng)
        session.run([v.assign(tf.abs(v) + 1) for v in v1.trainable_variables()])
        got = (session.run(dx, {x: data}) * along).sum()
        h = 1e-5
        ends = [session.run(loss, {x: data + sign * h * along}) for sign in (1, -1)]
        assert got == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-6)


# --- ways to run ------------------------------------------------------------------------------


def network(x: Any, training: Any) -> Any:
    x = layers.batch_norm(x, decay=0.5, is_training=training, updates_collections=None)
    return layers.batch_normalization(x, momentum=0.5, training=training, renorm=True)


def test_in_a_template(rng: np.random.Generator) -> None:
    """Eagerly and in a function, a template keeps the variables, and what a graph does, it does."""
    batches = [batch(rng, (8, 3)) for _ in range(3)]
    with graph() as session:
        x, training = v1.placeholder(tf.float32, [None, 3]), v1.placeholder(tf.bool, [])
        y = network(x, training)
        start(session)
        for data in batches:
            session.run([y, updates()], {x: data, training: True})
        want = session.run(y, {x: batches[0], training: False})
        kept = session.run(v1.global_variables())

    eager = v1.make_template("network", network)
    traced = v1.make_template("network", network)
    for template, call in ((eager, eager), (traced, tf.function(traced))):
        for data in batches:
            call(tf.constant(data), tf.constant(True))
        got = call(tf.constant(batches[0]), tf.constant(False)).numpy()
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)
        assert len(template.variables) == len(kept)
        before = [v.numpy().tobytes() for v in template.variables]
        call(tf.constant(batches[1]), tf.constant(False))
        assert before == [v.numpy().tobytes() for v in template.variables]


def test_eager_execution_alone_would_forget() -> None:
    for layer in (layers.batch_norm, layers.batch_normalization):
        with pytest.raises(RuntimeError, match=r"`scope` must keep [^`]*make_template"):
            layer(tf.ones([2, 3]))


def test_in_a_wrapped_function() -> None:
    def once(x: Any) -> Any:
        return layers.batch_norm(x, decay=0.5, updates_collections=None)

    wrapped = v1.wrap_function(once, [tf.TensorSpec([None, 1])])
    wrapped(tf.constant([[1.0], [3.0]]))
    values = {v.name: v.numpy().item() for v in wrapped.graph.variables}
    assert values["BatchNorm/moving_mean:0"] == 1


def test_compiled_by_xla(rng: np.random.Generator) -> None:
    """From standard ops then, with the same results, and the same updates."""

    def special(x: Any, training: Any) -> Any:
        x = network(x, training)
        return layers.batch_normalization(x, training=training, virtual_batch_size=4)

    data = tf.constant(batch(rng, (8, 3)))
    results = []
    for compiled in (False, True):
        template = v1.make_template("network", special)
        call = tf.function(template, jit_compile=compiled)
        ys = [call(data, training).numpy() for training in (True, False)]
        results.append([*ys, *(v.numpy() for v in template.variables)])
    for one, other in zip(*results, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


REPLICAS = """
import tensorflow as tf
v1 = tf.compat.v1
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from fusebn.tensorflow import layers, moving_averages

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
number = lambda: tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32)

with tf.Graph().as_default(), strategy.scope(), v1.Session() as session:
    y = strategy.extended.call_for_each_replica(
        lambda: layers.batch_norm(
            tf.fill([4, 2], 10 * number()), decay=0.5, scope="norm", updates_collections=None
        )
    )
    session.run(v1.global_variables_initializer())
    session.run(strategy.experimental_local_results(y))
    print({v.op.name: session.run(v).tolist() for v in v1.global_variables()})

with strategy.scope():
    average = tf.Variable(0.0, aggregation=tf.VariableAggregation.MEAN)
strategy.run(
    tf.function(
        lambda: moving_averages.assign_moving_average(average, 10 * number(), 0.5, False)
    )
)
print([v.numpy().item() for v in strategy.experimental_local_results(average)])
"""


def test_replicas() -> None:
    """Each has averages of its own, read as their mean, as TensorFlow's layers had."""
    # Devices can be split only before TensorFlow has started.
    command = [sys.executable, "-c", REPLICAS]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert output.returncode == 0, output.stderr[-2000:]
    first, second = output.stdout.splitlines()[-2:]
    assert ast.literal_eval(first) == {
        "norm/beta": [0, 0], "norm/moving_mean": [2.5, 2.5], "norm/moving_variance": [0.5, 0.5],
    }  # fmt: skip
    assert ast.literal_eval(second) == [2.5, 2.5]


def test_fused_false_is_portable(rng: np.random.Generator) -> None:
    results = []
    for fused in (None, True, False):
        with graph() as session:
            data = tf.constant(batch(np.random.default_rng(1)))
            y = layers.batch_norm(
                data, fused=fused, is_training=v1.placeholder_with_default(True, [])
            )
            start(session)
            got, _ = session.run([y, updates()])
            results.append([got, *state(session).values()])
            native = "FusebnBatchNorm" in {op.type for op in session.graph.get_operations()}
            assert native == (fused is not False)
    for one, other in zip(results[0], results[2], strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


# --- the door ---------------------------------------------------------------------------------


def test_signatures_are_tensorflows() -> None:
    contrib = """inputs decay center scale epsilon activation_fn param_initializers
        param_regularizers updates_collections is_training reuse variables_collections
        outputs_collections trainable batch_weights fused data_format zero_debias_moving_mean scope
        renorm renorm_clipping renorm_decay adjustment"""
    core = """inputs axis momentum epsilon center scale beta_initializer gamma_initializer
        moving_mean_initializer moving_variance_initializer beta_regularizer gamma_regularizer
        beta_constraint gamma_constraint training trainable name reuse renorm renorm_clipping
        renorm_momentum fused virtual_batch_size adjustment"""
    for layer, names in ((layers.batch_norm, contrib), (layers.batch_normalization, core)):
        parameters = inspect.signature(layer).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == names.split()
    defaults = {
        name: p.default for name, p in inspect.signature(layers.batch_norm).parameters.items()
    }
    assert (defaults["decay"], defaults["scale"], defaults["is_training"]) == (0.999, False, True)
    core_defaults = inspect.signature(layers.batch_normalization).parameters
    assert core_defaults["momentum"].default == 0.99
    assert core_defaults["scale"].default is True
    assert core_defaults["training"].default is False


def _x(*shape: int | None, dtype: Any = tf.float32) -> Any:
    return lambda: v1.placeholder(dtype, shape)


X = _x(6, 4, 3)
NORM, CORE = layers.batch_norm, layers.batch_normalization


@pytest.mark.parametrize(
    ("layer", "x", "options", "kind", "text"),
    [
        (NORM, _x(6, 3, dtype=tf.int32), {}, TypeError, "`inputs` must be an array of float16"),
        (NORM, _x(6), {}, ValueError, "`inputs` must have a known rank of at least 2; got shape"),
        (
            NORM,
            lambda: v1.placeholder(tf.float32),
            {},
            ValueError,
            "`inputs` must have a known rank",
        ),
        (
            NORM,
            _x(6, None),
            {},
            ValueError,
            "`inputs` must have a known length on its channel axis 1",
        ),
        (NORM, X, {"decay": 1.5}, ValueError, r"`decay` must lie in \[0, 1\]; got 1.5"),
        (NORM, X, {"epsilon": -1}, ValueError, "`epsilon` must be finite and not negative"),
        (NORM, X, {"correction": -1}, ValueError, "`correction` must be finite and not negative"),
        (NORM, X, {"center": "yes"}, TypeError, "`center` must be a bool"),
        (NORM, X, {"scale": None}, TypeError, "`scale` must be a bool"),
        (NORM, X, {"trainable": 3}, TypeError, "`trainable` must be a bool"),
        (NORM, X, {"is_training": "no"}, TypeError, "`is_training` must be a bool"),
        (NORM, X, {"is_training": None}, TypeError, "`is_training` must be a bool"),
        (NORM, X, {"is_training": 2}, TypeError, "`is_training` must be a bool"),
        (NORM, X, {"is_training": np.ones(2, bool)}, TypeError, "`is_training` must be a bool"),
        (CORE, X, {"training": 0.5}, TypeError, "`training` must be a bool"),
        (
            NORM,
            X,
            {"data_format": "NWC"},
            ValueError,
            "`data_format` must be one of 'NHWC', 'NCHW'",
        ),
        (NORM, X, {"fused": "auto"}, TypeError, "`fused` must be a bool"),
        (
            NORM,
            X,
            {"batch_weights": np.ones(5)},
            ValueError,
            r"`batch_weights` must have shape \(6,\)",
        ),
        (
            NORM,
            X,
            {"batch_weights": np.ones((6, 4))},
            ValueError,
            "`batch_weights` must have shape",
        ),
        (
            NORM,
            X,
            {"param_initializers": {"offset": 1}},
            ValueError,
            "`param_initializers` must .*offset",
        ),
        (
            NORM,
            X,
            {"param_initializers": {"beta": 1}},
            TypeError,
            r"`param_initializers\['beta'\]` must",
        ),
        (
            NORM,
            X,
            {"param_regularizers": {"moving_mean": len}},
            ValueError,
            "`param_regularizers` must",
        ),
        (
            NORM,
            X,
            {"param_regularizers": len},
            TypeError,
            "`param_regularizers` must be a dictionary",
        ),
        (NORM, X, {"activation_fn": "relu"}, TypeError, "`activation_fn` must be callable"),
        (
            NORM,
            X,
            {"renorm": True, "renorm_clipping": {"r": 1}},
            ValueError,
            "`renorm_clipping` must",
        ),
        (NORM, X, {"renorm": True, "renorm_decay": 2}, ValueError, "`renorm_decay` must lie in"),
        (NORM, X, {"adjustment": 2.0}, TypeError, "`adjustment` must be callable"),
        (NORM, X, {"residual": np.ones((6, 4, 3))}, TypeError, "`residual` must have the dtype"),
        (
            NORM,
            X,
            {"residual": np.ones((6, 1, 3), "f")},
            ValueError,
            "`residual` must have the shape",
        ),
        (NORM, X, {"zero_debias_moving_mean": 2}, TypeError, "`zero_debias_moving_mean` must be"),
        (CORE, X, {"axis": 3}, ValueError, r"`axis` must lie in \[-3, 3\)"),
        (CORE, X, {"axis": "1"}, TypeError, "`axis` must be an integer"),
        (CORE, X, {"axis": [1, -2]}, ValueError, "`axis` must name each axis once"),
        (CORE, X, {"axis": []}, ValueError, "`axis` must name each axis once"),
        (CORE, X, {"momentum": "0.9"}, TypeError, "`momentum` must be a real number"),
        (CORE, X, {"beta_initializer": "zeros"}, TypeError, "`beta_initializer` must be an init"),
        (CORE, X, {"virtual_batch_size": 0}, ValueError, "`virtual_batch_size` must be at least 1"),
        (CORE, X, {"virtual_batch_size": 2, "axis": 0}, ValueError, "`axis` must leave out axis 0"),
        (
            CORE,
            X,
            {"virtual_batch_size": 2, "adjustment": len},
            ValueError,
            "`adjustment` must be None",
        ),
    ],
    ids=lambda value: None if callable(value) else str(value)[:50],
)
def test_bad_arguments(
    layer: Any, x: Any, options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with graph():
        inputs = x()
        with pytest.raises(kind, match=rf"^{layer.__name__}: .*{text}"):
            layer(inputs, **options)
        assert not v1.global_variables()  # nothing half done
