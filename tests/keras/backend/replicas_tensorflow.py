"""Two replicas under ``tf.distribute`` against one: with a mask, and parts of uneven weight."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from fusebn.keras import BatchNormalization

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

rng = np.random.default_rng(0)
x = rng.normal(100, 2, (2, 4, 5, 3)).astype("float32")
dy = rng.normal(size=x.shape).astype("float32")
masks = {"all": None, "some": rng.random((2, 4, 5)) < 0.4, "of one": np.zeros((2, 4, 5), "bool")}
masks["of one"][1] = rng.random((4, 5)) < 0.5


def step(layer: Any, x: Any, dy: Any, mask: Any, training: Any) -> Any:
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=training, mask=mask)
        loss = tf.reduce_sum(y * dy)
    dx, *rest = tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])
    return y, dx, *rest


def split(array: Any) -> Any:
    if array is None:
        return None
    return strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(array[context.replica_id_in_sync_group])
    )


transformed = {
    "transforms": {"moving_mean": lambda v: v + tf.sin(v), "moving_variance": lambda v: 2 * v},
    "transform_batch_statistics": True,
}
every: Any = ({}, {"renorm": True}, {"activation": "relu", "momentum": 0.0}, transformed)
# What `training` is, call by call; as a tensor it is read when the one function runs.
SWITCHES: Any = {"known": (True,), "traced": (tf.constant(True), tf.constant(False))}


def compare(options: Any, mask: Any, switches: Any) -> None:
    """Compare the calls of a layer on two replicas with those of one that has the whole batch."""
    with strategy.scope():
        layer = BatchNormalization(synchronized=True, **options)
        layer.build((None, 5, 3))
    one = BatchNormalization(**options)
    one.build((None, 5, 3))
    function = tf.function(lambda *given: strategy.run(step, (layer, *given)))
    whole = None if mask is None else tf.constant(mask.reshape(8, 5))
    for training in switches:
        found = [strategy.experimental_local_results(one)
                 for one in function(split(x), split(dy), split(mask), training)]  # fmt: skip
        joined = tf.constant(x.reshape(8, 5, 3)), tf.constant(dy.reshape(8, 5, 3))
        wanted = step(one, *joined, whole, bool(training))
        for parts, expected, put in zip(
            found, wanted, (np.concatenate, np.concatenate, sum, sum), strict=True
        ):
            together = put([np.asarray(part.numpy()) for part in parts])
            np.testing.assert_allclose(together, expected.numpy(), rtol=1e-3, atol=1e-3)
        for mine, other in zip(layer.weights, one.weights, strict=True):
            copies = [copy.numpy() for copy in strategy.experimental_local_results(mine.value)]
            assert len(copies) == 2
            for copy in copies:
                np.testing.assert_allclose(copy, other.value.numpy(), rtol=1e-5)
    assert function.experimental_get_tracing_count() == 1


for options in every:
    for mask in masks.values():
        compare(options, mask, SWITCHES["known"])
    compare(options, masks["of one"], SWITCHES["traced"])

# fit, with a batch that the replicas share
with strategy.scope():
    model = keras.Sequential(
        [keras.Input((5, 3)), BatchNormalization(synchronized=True, momentum=0.0)]
    )
    model.compile("sgd", "mse")
flat = x.reshape(8, 5, 3)
model.fit(flat, flat, batch_size=8, epochs=1, verbose=0)
mean = strategy.experimental_local_results(model.layers[0].moving_mean.value)[0].numpy()
np.testing.assert_allclose(mean, flat.mean((0, 1)), rtol=1e-5)
print("same as one")
