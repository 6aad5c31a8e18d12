"""The one path of both layers: normalize, and say what updates the moving statistics.

The op is told at run time whether to normalize by the batch or by the moving statistics, and says
how much the batch weighed: 0 where nothing was in it, or outside training. The updates ask for that
alone, so there is no cond, and a batch of weight 0 changes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from fusebn.tensorflow._functions import forward, moments_of
from fusebn.tensorflow._groups import merge_axes, virtual_batches
from fusebn.tensorflow._portable import BatchNorm
from fusebn.tensorflow._renorm import Renorm
from fusebn.tensorflow._transformed import Transforms, both, choose
from fusebn.tensorflow.moving_averages import converted, update

# The activations that the op applies in the pass that writes y. tf.nn.leaky_relu is not among
# them: its slope is 0.2, the op's 0.01.
FUSED = {
    getattr(nn, name): name
    for nn in (tf.nn, tf.compat.v1.nn)
    for name in ("relu", "relu6", "silu", "gelu")
    if hasattr(nn, name)
}


class Batch(NamedTuple):
    """What one call of the op tells; the statistics are [channels]."""

    y: Any
    mean: Any
    variance: Any  # with divisor n - correction
    biased_variance: Any
    counted: Any  # whether there was a batch to count: a scalar boolean tensor
    used: Sequence[Any] = ()  # made from averages that must not be updated before


@dataclass(frozen=True)
class Layer:
    """The variables of a layer, and the arguments of one call."""

    operation: str
    axes: tuple[int, ...]
    training: Any  # a bool, or a scalar boolean tensor
    epsilon: float
    decay: Any
    correction: float
    zero_debias: bool
    virtual_batch_size: int | None
    adjustment: Callable[[Any], tuple[Any, Any]] | None
    weights: Any
    residual: Any
    activation: Callable[[Any], Any] | None
    scale: Any
    offset: Any
    moving_mean: Any
    moving_variance: Any
    renorm: Renorm | None
    transforms: Transforms

    def __call__(self, x: Any) -> tuple[Any, list[Any]]:
        """Return y, and the updates of the moving statistics: none where training is False."""
        special = self.renorm or self.virtual_batch_size or self.adjustment
        plain = self.training is False or not special
        batch = self._plain(x) if plain else self._in_steps(x)
        seen = self.transforms.seen
        if seen:
            with tf.control_dependencies(seen):
                batch = batch._replace(y=tf.identity(batch.y), used=[*batch.used, *seen])
        return batch.y, [] if self.training is False else self._updates(batch)

    def _plain(self, x: Any) -> Batch:
        fused = None if self.activation is None else FUSED.get(self.activation)
        batch = self._op(
            x,
            scale=self.transforms("scale", self._channels(self.scale)),
            offset=self.transforms("offset", self._channels(self.offset)),
            residual=self.residual,
            activation=fused,
        )
        if fused or self.activation is None:
            return batch
        return batch._replace(y=self.activation(batch.y))

    def _in_steps(self, x: Any) -> Batch:
        """Normalize, then do what the op does not know, all in the statistics' type."""
        batch = self._op(tf.cast(x, self._dtype), groups_of=self.virtual_batch_size)
        shape = [n if axis in self.axes else 1 for axis, n in enumerate(x.shape)]
        steps = []  # in the order in which they apply: each is a factor and a summand
        if self.renorm is not None:
            stddev = self._stddev(batch.biased_variance)
            r, d = self.renorm.correction(batch.mean, stddev, self.epsilon, batch.counted)
            batch = batch._replace(used=[r, d])
            steps.append((tf.reshape(r, shape), tf.reshape(d, shape)))
        if self.adjustment is not None:
            factor, summand = (converted(v, self._dtype) for v in self.adjustment(tf.shape(x)))
            factor = tf.where(self.training, factor, tf.ones_like(factor))
            steps.append((factor, tf.where(self.training, summand, tf.zeros_like(summand))))
        gamma, beta = (
            None if variable is None else tf.reshape(self.transforms(name, variable), shape)
            for name, variable in (
                ("scale", self._channels(self.scale)),
                ("offset", self._channels(self.offset)),
            )
        )
        steps.append((1 if gamma is None else gamma, 0 if beta is None else beta))
        scale, offset = tf.ones([], self._dtype), tf.zeros([], self._dtype)
        for factor, summand in steps:
            scale, offset = scale * factor, offset * factor + summand
        y = batch.y * scale + offset
        y.set_shape(x.shape)  # what an adjustment of unknown shape would lose
        if self.residual is not None:
            y = y + tf.cast(self.residual, self._dtype)
        if self.activation is not None:
            y = self.activation(y)
        return batch._replace(y=tf.cast(y, x.dtype))

    def _op(
        self,
        x: Any,
        scale: Any = None,
        offset: Any = None,
        residual: Any = None,
        activation: str | None = None,
        groups_of: int | None = None,
    ) -> Batch:
        """Call the op on x as it wants it laid out, and undo that."""
        block, axes = x, self.axes
        if groups_of is not None:
            block, axes, groups = virtual_batches(x, axes, groups_of, self.training)
        block, axis, undo = merge_axes(block, axes)
        if residual is not None:
            residual, _, _ = merge_axes(residual, axes)

        def call(mean: Any, variance: Any, training: Any) -> BatchNorm:
            if groups_of is not None:
                mean, variance = (tf.tile(v, [groups]) for v in (mean, variance))
            return forward(
                self.operation,
                block,
                scale,
                offset,
                mean,
                variance,
                self.epsilon,
                data_format=None,
                is_training=training,
                factor=1.0,
                axis=axis,
                activation=activation,
                residual=residual,
                weights=self.weights,
                correction=self.correction,
            )

        result = self._by_statistics(block, axis, call)
        y, counted = undo(result.y), result.count > 0
        biased = tf.cast(result.batch[1], self._dtype)
        mean, variance = result.mean, result.variance
        if groups_of is not None:
            # The mean of the groups' statistics, as TensorFlow has it; no group is no batch.
            y, counted = tf.reshape(y, tf.shape(x)), counted & (groups > 0)
            shape = [groups, self.moving_mean.shape.num_elements()]
            mean, variance, biased = (
                tf.reduce_mean(tf.reshape(v, shape), 0) for v in (mean, variance, biased)
            )
        y.set_shape(x.shape)
        return Batch(y, mean, variance, biased, counted)

    def _by_statistics(self, block: Any, axis: int, call: Callable[..., BatchNorm]) -> BatchNorm:
        """Call the op with the statistics that are to normalize the block."""
        averages = [self._channels(v) for v in (self.moving_mean, self.moving_variance)]
        own, batch = self.transforms.replace_batch(), None
        given = averages
        if own is not False:
            batch, biased = self._statistics(block, axis)
            counted = both(own, batch.count > 0)
            given = [choose(counted, *pair) for pair in zip(biased, averages, strict=True)]
            if self.weights is not None:  # an empty batch has no y that it could spoil
                own = counted
        names = "moving_mean", "moving_variance"
        new = [self.transforms(*pair) for pair in zip(names, given, strict=True)]
        # By its own statistics a batch is normalized as they are.
        used = [choose(self.training, *pair) for pair in zip(averages, new, strict=True)]
        if batch is None:
            return call(*used, self.training)
        if own is True:
            return batch._replace(y=call(*new, False).y)
        y = tf.cond(own, lambda: call(*new, False).y, lambda: call(*used, self.training).y)
        return batch._replace(y=y)

    def _statistics(self, block: Any, axis: int) -> tuple[BatchNorm, list[Any]]:
        """Return the statistics that the op would, without y; and the mean and biased variance."""
        others = [i for i in range(block.shape.rank) if i != axis]
        (count, mean, m2), _ = moments_of(self.operation, block, others, self.weights)
        count = tf.convert_to_tensor(count, tf.float64)
        n = tf.where(count > 0, count, tf.ones_like(count))
        rest = tf.where(count > self.correction, count - self.correction, n)
        batch = tf.stack([mean, m2 / n])
        mean, variance, *biased = (
            tf.cast(v, self._dtype) for v in (mean, m2 / rest, *tf.unstack(batch))
        )
        counted = choose(self.training, count, tf.zeros_like(count))
        return BatchNorm(None, mean, variance, batch, counted), biased

    def _updates(self, batch: Batch) -> list[Any]:
        def average(
            variable: Any, value: Any, decay: Any = self.decay, zero_debias: bool = False
        ) -> Any:
            return update(
                self.operation,
                variable,
                _shaped(value, variable.shape),
                decay,
                zero_debias=zero_debias,
                when=batch.counted,
            )

        with tf.control_dependencies(batch.used):
            updates = [average(self.moving_mean, batch.mean, zero_debias=self.zero_debias)]
            if self.renorm is None:
                return [*updates, average(self.moving_variance, batch.variance)]
            renorm, biased = self.renorm, self._stddev(batch.biased_variance)
            updates.append(average(renorm.renorm_mean, batch.mean, renorm.decay))
            updates.append(average(renorm.renorm_stddev, biased, renorm.decay))
            # The average is that of the standard deviation; moving_variance is kept equal to it.
            stddev = average(renorm.moving_stddev, self._stddev(batch.variance))
            variance = tf.maximum(tf.square(stddev) - self.epsilon, 0)
            variance = tf.where(batch.counted, variance, tf.convert_to_tensor(self.moving_variance))
            return [*updates, tf.compat.v1.assign(self.moving_variance, variance)]

    def _stddev(self, variance: Any) -> Any:
        return tf.sqrt(variance + self.epsilon)

    @property
    def _dtype(self) -> Any:
        """The type of the statistics."""
        return self.moving_mean.dtype.base_dtype

    def _channels(self, variable: Any) -> Any:
        return None if variable is None else _shaped(tf.cast(variable, self._dtype), [None])


def _shaped(tensor: Any, shape: Any) -> Any:
    """Give a tensor a shape, without an op if it has it."""
    if tensor.shape.is_compatible_with(shape):
        return tensor
    return tf.reshape(tensor, [-1 if n is None else n for n in shape])
