"""Batch renormalization: a batch normalized as the moving averages would, gradients left alone.

::

    y = ((x - mean) / stddev * r + d) * scale + offset       stddev = sqrt(variance + epsilon)
    r = stddev / renorm_stddev,    clipped to [rmin, rmax]
    d = (mean - renorm_mean) / renorm_stddev,    clipped to [-dmax, dmax]

r and d are constants to the gradient, and use the averages as they were before this batch.
Ioffe, "Batch Renormalization", 2017, https://arxiv.org/abs/1702.03275.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from fusebn.tensorflow._variables import Wish
from fusebn.tensorflow.moving_averages import converted

CLIPPING = ("rmax", "rmin", "dmax")


class Renorm(NamedTuple):
    """The averages of a layer that renormalizes. Under TensorFlow's names, as of its version 2."""

    moving_stddev: Any  # follows `decay`, as moving_variance, which is made from it
    renorm_mean: Any  # these two follow `renorm_decay`
    renorm_stddev: Any
    clipping: Mapping[str, Any]
    decay: Any

    @classmethod
    def create(
        cls,
        variable: Callable[[str, Wish], Any],
        wishes: Mapping[str, Wish],
        clipping: Mapping[str, Any],
        decay: Any,
    ) -> "Renorm":
        """Make the averages, each like the one it stands beside."""
        mean, variance = wishes["moving_mean"], wishes["moving_variance"]

        def root(*arguments: Any, **options: Any) -> Any:
            return tf.sqrt(variance.initializer(*arguments, **options))

        stddev = variance._replace(initializer=root)
        return cls(
            variable("moving_stddev", stddev),
            variable("renorm_mean", mean),
            variable("renorm_stddev", stddev),
            clipping,
            decay,
        )

    def correction(self, mean: Any, stddev: Any, epsilon: float, when: Any) -> tuple[Any, Any]:
        """Return r and d, one value a channel; 1 and 0 where `when` is false."""
        # The averages may not have seen a batch yet.
        average = tf.maximum(_flat(self.renorm_stddev), epsilon**0.5)
        r, d = stddev / average, (mean - _flat(self.renorm_mean)) / average
        rmin, rmax, dmax = (
            None if limit is None else converted(limit, r.dtype)
            for limit in map(self.clipping.get, ("rmin", "rmax", "dmax"))
        )
        if rmin is not None:
            r = tf.maximum(r, rmin)
        if rmax is not None:
            r = tf.minimum(r, rmax)
        if dmax is not None:
            d = tf.maximum(tf.minimum(d, dmax), -dmax)
        r, d = tf.where(when, r, tf.ones_like(r)), tf.where(when, d, tf.zeros_like(d))
        return tf.stop_gradient(r), tf.stop_gradient(d)


def _flat(variable: Any) -> Any:
    return tf.reshape(variable, [-1])
