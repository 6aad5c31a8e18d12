"""``keras.distribution`` over 8 devices against one: the array is the whole batch all the same."""

import jax
import keras
import numpy as np

from fusebn.keras import BatchNormalization

assert len(jax.devices()) == 8
rng = np.random.default_rng(0)
x = rng.normal(100, 2, (16, 4, 3)).astype("float32")
x[:, 2:] = 0
x[3:, 1:] = 0  # masked: of most devices more than of the first
wanted = rng.normal(size=(16, 2)).astype("float32")


def trained() -> keras.Model:
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((4, 3)),
            keras.layers.Masking(),
            BatchNormalization(momentum=0.5, synchronized=True, activation="relu"),
            keras.layers.Dense(4),
            BatchNormalization(momentum=0.5),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )
    model.compile("sgd", "mse")
    model.fit(x, wanted, batch_size=16, epochs=2, verbose=0, shuffle=False)
    return model


one = trained()
keras.distribution.set_distribution(keras.distribution.DataParallel())
many = trained()
for mine, other in zip(many.weights, one.weights, strict=True):
    assert len(mine.value.devices()) == 8
    np.testing.assert_allclose(
        np.asarray(mine.value), np.asarray(other.value), rtol=1e-4, atol=1e-5
    )
print("same as one")
