"""Small networks of Keras's layers, and data for them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers


def data(examples: int = 32) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(1, 2, (examples, 8, 8, 3)).astype("float32")
    return x, rng.normal(size=(examples, 2)).astype("float32")


def sequential(norm: type[Any] = layers.BatchNormalization, **options: Any) -> Any:
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, use_bias=False, name="conv"),
            norm(name="norm", momentum=0.5, **options),
            layers.ReLU(name="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2, name="dense"),
        ],
        name="small",
    )


def resnet() -> Any:
    """Two blocks: one adds its input, one a projection of it that is normalized too."""

    def normalized(x: Any, width: int, name: str, strides: int = 1) -> Any:
        x = layers.Conv2D(width, 3, strides, "same", use_bias=False, name=f"{name}_conv")(x)
        return layers.BatchNormalization(momentum=0.5, name=f"{name}_norm")(x)

    inputs = keras.Input((8, 8, 3))
    x = layers.Activation("relu", name="stem_relu")(normalized(inputs, 4, "stem"))
    y = layers.ReLU(name="a_relu")(normalized(x, 4, "a"))
    x = layers.Add(name="first_sum")([normalized(y, 4, "b"), x])
    x = layers.Activation("relu", name="first_relu")(x)
    y = keras.activations.relu(normalized(x, 6, "c", 2))
    x = normalized(x, 6, "shortcut", 2) + normalized(y, 6, "d")
    x = layers.GlobalAveragePooling2D()(layers.ReLU(name="last_relu")(x))
    return keras.Model(inputs, layers.Dense(2)(x), name="resnet")


def mobilenet() -> Any:
    """Inverted residuals: a batch norm before a sum without activation, ReLU6 elsewhere."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 1, name="stem")(inputs)
    y = layers.Conv2D(8, 1, name="expand")(x)
    y = layers.ReLU(6.0, name="expand_relu")(layers.BatchNormalization(name="expand_norm")(y))
    y = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(y)
    y = layers.Activation("silu")(layers.BatchNormalization(name="depthwise_norm")(y))
    y = layers.BatchNormalization(name="project_norm")(layers.Conv2D(4, 1, name="project")(y))
    x = layers.Add(name="sum")([x, y])
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 1, name="head")(x))
    return keras.Model(inputs, layers.Dense(2)(x), name="mobilenet")


NETWORKS = {"sequential": sequential, "resnet": resnet, "mobilenet": mobilenet}
