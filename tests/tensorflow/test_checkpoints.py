"""Checkpoints: those of TensorFlow's own layers restore, and ours go both ways."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from conftest import Array, assert_same_bits
from fusebn.tensorflow import layers

v1 = tf.compat.v1

# The variables that TensorFlow's layers wrote, by the scope and the arguments that made them.
WRITTEN: dict[str, tuple[Any, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "tf.contrib.layers": (
        layers.batch_norm,
        {"scale": True, "scope": "resnet/BatchNorm"},
        {
            "resnet/BatchNorm/beta": (3,),
            "resnet/BatchNorm/gamma": (3,),
            "resnet/BatchNorm/moving_mean": (3,),
            "resnet/BatchNorm/moving_variance": (3,),
        },
    ),
    "tf.contrib.layers, defaults": (
        layers.batch_norm,
        {},
        {
            "BatchNorm/beta": (3,),
            "BatchNorm/moving_mean": (3,),
            "BatchNorm/moving_variance": (3,),
        },
    ),
    "tf.contrib.layers, debiased": (
        layers.batch_norm,
        {"zero_debias_moving_mean": True},
        {
            "BatchNorm/beta": (3,),
            "BatchNorm/moving_mean": (3,),
            "BatchNorm/moving_variance": (3,),
            "BatchNorm/BatchNorm/moving_mean/biased": (3,),
            "BatchNorm/BatchNorm/moving_mean/local_step": (),
        },
    ),
    "tf.layers": (
        layers.batch_normalization,
        {},
        {
            "batch_normalization/gamma": (3,),
            "batch_normalization/beta": (3,),
            "batch_normalization/moving_mean": (3,),
            "batch_normalization/moving_variance": (3,),
        },
    ),
    "tf.layers, renorm": (
        layers.batch_normalization,
        {"renorm": True, "name": "norm"},
        {
            "norm/gamma": (3,),
            "norm/beta": (3,),
            "norm/moving_mean": (3,),
            "norm/moving_variance": (3,),
            "norm/moving_stddev": (3,),
            "norm/renorm_mean": (3,),
            "norm/renorm_stddev": (3,),
        },
    ),
    "tf.layers, two axes": (
        layers.batch_normalization,
        {"axis": [1, 2]},
        {
            "batch_normalization/gamma": (1, 4, 3),
            "batch_normalization/beta": (1, 4, 3),
            "batch_normalization/moving_mean": (1, 4, 3),
            "batch_normalization/moving_variance": (1, 4, 3),
        },
    ),
    "tf.layers, virtual batches": (
        layers.batch_normalization,
        {"virtual_batch_size": 2},
        {
            "batch_normalization/gamma": (1, 1, 1, 3),
            "batch_normalization/beta": (1, 1, 1, 3),
            "batch_normalization/moving_mean": (1, 1, 1, 3),
            "batch_normalization/moving_variance": (1, 1, 1, 3),
        },
    ),
}


@contextmanager
def graph() -> Iterator[Any]:
    with tf.Graph().as_default(), v1.Session() as session:
        yield session


def build(layer: Any, options: dict[str, Any]) -> Any:
    """Build a layer with a flag to be fed, in the default graph."""
    flag = "is_training" if layer is layers.batch_norm else "training"
    return layer(tf.ones([6, 4, 3]), **{flag: v1.placeholder_with_default(False, [])}, **options)


def values_of(shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> dict[str, Array]:
    return {name: rng.uniform(0.5, 2, shape).astype("f") for name, shape in shapes.items()}


def assert_variables(session: Any, values: dict[str, Array]) -> None:
    variables = {variable.op.name: variable for variable in v1.global_variables()}
    assert variables.keys() == values.keys()
    for name, variable in variables.items():
        assert_same_bits(session.run(variable), values[name])


@pytest.mark.parametrize("written", WRITTEN)
def test_a_checkpoint_of_tensorflows_layer_restores(
    written: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    layer, options, shapes = WRITTEN[written]
    values = values_of(shapes, rng)
    path = str(tmp_path / "model.ckpt")
    tf.raw_ops.SaveV2(
        prefix=path,
        tensor_names=list(values),
        shape_and_slices=[""] * len(values),
        tensors=list(values.values()),
    )
    with graph() as session:
        build(layer, options)
        v1.train.Saver().restore(session, path)
        assert_variables(session, values)


@pytest.mark.parametrize("written", WRITTEN)
def test_saver_both_ways(written: str, tmp_path: Path, rng: np.random.Generator) -> None:
    layer, options, shapes = WRITTEN[written]
    values = values_of(shapes, rng)
    with graph() as session:
        build(layer, options)
        for variable in v1.global_variables():
            variable.load(values[variable.op.name], session)
        path = v1.train.Saver().save(session, str(tmp_path / "model"))
    assert dict(tf.train.list_variables(path)) == {name: list(s) for name, s in shapes.items()}
    with graph() as session:
        y = build(layer, options)
        v1.train.Saver().restore(session, path)
        assert_variables(session, values)
        assert np.isfinite(session.run(y)).all()


def network(x: Any, training: Any) -> Any:
    x = layers.batch_norm(x, decay=0.5, is_training=training)
    return layers.batch_normalization(x, momentum=0.5, training=training, renorm=True)


def trained(steps: int = 2) -> Any:
    """Return a network that runs eagerly. Templates get names of their own: network, network_1."""
    template = v1.make_template("network", network)
    for step in range(steps):
        template(tf.random.stateless_normal([8, 3], [step, 0]), True)
    return template


def inner_name(variable: Any) -> str:
    """Return the name without the network's."""
    return variable.name.partition("/")[2].partition(":")[0]


def test_checkpoint_both_ways(tmp_path: Path) -> None:
    first, second = trained(), trained(0)
    path = tf.train.Checkpoint(network=first).save(str(tmp_path / "model"))
    status = tf.train.Checkpoint(network=second).restore(path)  # before the variables are made
    x = tf.random.stateless_normal([8, 3], [9, 9])
    got = second(x, False)
    status.assert_consumed()
    assert_same_bits(got, first(x, False))
    assert len(first.variables) == 10
    for one, other in zip(first.variables, second.variables, strict=True):
        assert inner_name(one) == inner_name(other)
        assert_same_bits(one.numpy(), other.numpy())


def test_from_a_saver_to_a_checkpoint(tmp_path: Path, rng: np.random.Generator) -> None:
    """An old model's graph was written by name; its layers now run eagerly."""
    template = trained()
    with graph() as session:
        with v1.variable_scope(template.variables[0].name.partition("/")[0]):
            network(tf.ones([8, 3]), True)
        values = {inner_name(v): rng.uniform(0.5, 2, v.shape) for v in v1.global_variables()}
        for variable in v1.global_variables():
            variable.load(values[inner_name(variable)], session)
        path = v1.train.Saver().save(session, str(tmp_path / "model"))
    tf.train.Checkpoint(network=template).restore(path)
    assert len(template.variables) == len(values) == 10
    for variable in template.variables:
        assert_same_bits(variable.numpy(), values[inner_name(variable)].astype("f"))


def test_from_a_checkpoint_to_a_saver(tmp_path: Path) -> None:
    template = trained()
    path = tf.train.Checkpoint(network=template).save(str(tmp_path / "model"))
    values = {variable.name.partition(":")[0]: variable.numpy() for variable in template.variables}
    with graph() as session:
        with v1.variable_scope(template.variables[0].name.partition("/")[0]):
            network(tf.ones([8, 3]), True)
        v1.train.Saver().restore(session, path)
        assert_variables(session, values)


@pytest.mark.parametrize("written", WRITTEN)
def test_checkpoint_both_ways_in_a_graph(
    written: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    layer, options, shapes = WRITTEN[written]
    values = values_of(shapes, rng)
    with graph() as session:
        build(layer, options)
        for variable in v1.global_variables():
            variable.load(values[variable.op.name], session)
        checkpoint = tf.train.Checkpoint(layer=v1.global_variables())
        path = checkpoint.save(str(tmp_path / "model"))  # in the default session
    with graph() as session:
        build(layer, options)
        variables = v1.global_variables()
        status = tf.train.Checkpoint(layer=variables).restore(path)
        status.assert_existing_objects_matched().run_restore_ops(session)
        for variable in variables:
            assert_same_bits(session.run(variable), values[variable.op.name])
