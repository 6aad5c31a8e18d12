"""What a call of the layer computes, without side effects: y, and the averages afterwards.

Nearly always that is one call of :func:`fusebn.fused_batch_norm`, which finds the backend by its
tensors, reads `training` when it runs, and leaves the averages alone where nothing is counted. What
needs the statistics before they normalize (renormalization, several replicas), or has several of
each channel (virtual batches), goes in parts.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import keras
from keras import ops

import fusebn
from fusebn.keras import _synchronized
from fusebn.keras._groups import Arranged, arrange
from fusebn.keras._renorm import Renorm, transform
from fusebn.keras._transformed import Transforms, both, choose

Tensor = Any


@dataclass  # not frozen, and not changed by dataclasses.replace: for torch.compile
class Call:
    """The state of a layer, as tensors of the shape of its weights, and the arguments of a call."""

    axes: tuple[int, ...]  # sorted, counted from the front
    training: Any  # a bool, or a scalar boolean tensor
    epsilon: float
    decay: float
    correction: float
    activation: str | None
    virtual_batch_size: int | None
    synchronized: bool
    renorm: Renorm | None
    scale: Tensor | None
    offset: Tensor | None
    averages: tuple[Tensor, ...]  # mean and variance; stddev, renorm_mean, renorm_stddev
    given: tuple[Tensor, ...]  # mean and variance as they normalize where the batch's do not
    residual: Tensor | None
    mask: Tensor | None  # boolean, in the shape of x without its channel axes

    def __call__(self, x: Tensor, transforms: Transforms) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return y, and the averages as they are to be."""
        if not transforms.functions:
            return self._plainly(x)
        own, vectors = transforms.replace_batch(), self.averages[:2]
        if own is not False:
            counted, *found = self._statistics(x)
            # Replicas cannot add up inside a cond; but they normalize by given statistics anyway.
            own = transforms.training if self.synchronized else both(own, counted)
            vectors = tuple(choose(own, *pair) for pair in zip(found, vectors, strict=True))
        names = "moving_mean", "moving_variance"
        given = tuple(transforms(*pair) for pair in zip(names, vectors, strict=True))
        if own is not False and self.synchronized:
            forgotten = ops.logical_and(own, ops.logical_not(counted))
            given = given[0], ops.where(forgotten, math.inf, given[1])
        changed = {
            "scale": transforms("scale", self.scale),
            "offset": transforms("offset", self.offset),
            "given": given,
        }
        call = Call(**{name: getattr(self, name) for name in _FIELDS} | changed)

        def by_transformed() -> tuple[Tensor, tuple[Tensor, ...]]:
            # The averages take up the batch as it is, to the bit.
            return call._by_given(x), call._plainly(ops.stop_gradient(x))[1]

        if own is False:
            return call._plainly(x)
        if own is True or self.synchronized:
            return by_transformed()
        result: tuple[Tensor, tuple[Tensor, ...]]
        result = ops.cond(own, by_transformed, lambda: call._plainly(x))
        return result

    def _statistics(self, x: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Return whether the batch counts, its mean and biased variance."""
        block, axis, *_ = arranged = arrange(x, self.axes)
        weights = self._weights(x, arranged)
        if self.synchronized:
            count, mean, variance = _synchronized.moments(block, axis, weights)
            counted = count > 0
        else:
            others = [i for i in range(len(block.shape)) if i != axis]
            mean, variance = fusebn.moments(block, others, weights=weights)
            # An empty batch has no y that its statistics could spoil.
            counted = True if self.mask is None else self._counted(x)
        like = self.averages[0]
        shaped = (ops.cast(ops.reshape(v, like.shape), like.dtype) for v in (mean, variance))
        return counted, *shaped

    def _plainly(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Normalize by the batch as it is, or by what is given."""
        if self.training is False:
            return self._by_given(x), self.averages
        if not (self.virtual_batch_size or self.synchronized or self.renorm):
            return self._in_one_call(x)
        if self.training is True or self.synchronized:
            return self._in_parts(x)
        result: tuple[Tensor, tuple[Tensor, ...]] = ops.cond(
            self.training,
            lambda: self._in_parts(x),
            lambda: (self._by_given(x), self.averages),
        )
        return result

    def _by_given(self, x: Tensor) -> Tensor:
        arranged = arrange(x, self.axes)
        y, *_ = self._fused(arranged, self.scale, self.offset, *self.given, is_training=False)
        return y

    def _in_one_call(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        old = self.averages
        if keras.backend.backend() == "torch":
            # Backward may want to see what is about to be overwritten.
            old = tuple(map(ops.copy, old))
        triples = zip(old, self.averages, self.given, strict=True)
        given = [
            raw if used is own else choose(self.training, raw, used) for raw, own, used in triples
        ]
        arranged = arrange(x, self.axes)
        y, *new = self._fused(
            arranged,
            self.scale,
            self.offset,
            *given,
            is_training=self.training,
            exponential_avg_factor=1 - self.decay,
            weights=self._weights(x, arranged),
        )
        # Without training, what was given comes back, and that may be transformed.
        new = [
            ops.reshape(value, raw.shape)
            if used is raw
            else choose(self.training, ops.reshape(value, raw.shape), raw)
            for value, raw, used in zip(new, old, given, strict=True)
        ]
        if self.decay == 0:  # only then a batch of count 0 does not leave them alone
            counted = self._counted(x)
            new = [choose(counted, *pair) for pair in zip(new, given, strict=True)]
        return y, self._constants(new)

    def _in_parts(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Normalize by the batch's statistics; by the given ones where `training` says so.

        Only what is synchronized leaves that to its values, for replicas cannot meet inside a cond.
        """
        arranged = arrange(x, self.axes, self.virtual_batch_size)
        block, axis, groups, *_ = arranged
        scale, offset, *averages = (
            None if vector is None else ops.tile(ops.reshape(vector, [-1]), [groups])
            for vector in (self.scale, self.offset, *self.averages)
        )
        weights, counted = self._weights(x, arranged), self._counted(x)
        if self.synchronized:
            count, mean, variance = _synchronized.moments(block, axis, weights)
            # Of a batch of count 0 x is forgotten.
            by_batch = mean, ops.where(count > 0, variance, math.inf)
            counted = both(self.training, count > 0)
        elif self.renorm:
            others = [i for i in range(len(block.shape)) if i != axis]
            mean, variance = fusebn.moments(ops.stop_gradient(block), others, weights=weights)
        if self.renorm:
            biased = variance
            least = math.sqrt(self.epsilon)
            r, d = self.renorm.correction(mean, self._stddev(biased), *averages[3:], least=least)
            r, d = choose(counted, r, ops.ones_like(r)), choose(counted, d, ops.zeros_like(d))
            scale, offset = transform(ops.stop_gradient(r), ops.stop_gradient(d), scale, offset)
        if self.synchronized:
            used = [
                choose(self.training, own, ops.reshape(given, own.shape))
                for own, given in zip(by_batch, self.given, strict=True)
            ]
            y, *_ = self._fused(arranged, scale, offset, *used, is_training=False)
            rest = count - self.correction
            variance = variance * ops.where(rest > 0, count / ops.where(rest > 0, rest, 1.0), 1.0)
        else:
            y, mean, variance = self._fused(
                arranged, scale, offset, is_training=True, weights=weights
            )
        statistics = [mean, variance, *([mean, biased] if self.renorm else [])]
        if self.virtual_batch_size is not None:
            # The averages take up the mean of the groups, as in TensorFlow's layers.
            statistics = [ops.mean(ops.reshape(v, (groups, -1)), 0) for v in statistics]
        shape = self.averages[0].shape
        return y, self._constants(self._mixed([ops.reshape(v, shape) for v in statistics], counted))

    def _mixed(self, statistics: list[Tensor], counted: Any) -> list[Tensor]:
        """Return the averages with the statistics of a batch mixed in."""

        def mix(old: Tensor, new: Tensor, decay: float = self.decay) -> Tensor:
            return choose(counted, decay * old + (1 - decay) * new, old)

        mean, variance, *seen = statistics
        moving_mean, moving_variance, *more = self.averages
        if self.renorm is None:
            return [mix(moving_mean, mean), mix(moving_variance, variance)]
        moving_stddev, renorm_mean, renorm_stddev = more
        # The average is that of the standard deviation; moving_variance is kept equal to it.
        stddev = mix(moving_stddev, self._stddev(variance))
        equal = ops.relu(ops.square(stddev) - self.epsilon)
        return [
            mix(moving_mean, mean),
            choose(counted, equal, moving_variance),
            stddev,
            mix(renorm_mean, seen[0], self.renorm.decay),
            mix(renorm_stddev, self._stddev(seen[1]), self.renorm.decay),
        ]

    def _fused(
        self,
        arranged: Arranged,
        scale: Tensor | None,
        offset: Tensor | None,
        mean: Tensor | None = None,
        variance: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Call the kernels on x as it is arranged, and give y the layout of x again."""
        residual = self.residual
        if residual is not None:
            residual = arrange(residual, self.axes, arranged.size).x
        given = {"scale": scale, "offset": offset, "mean": mean, "variance": variance}
        vectors: dict[str, Any] = {
            name: vector if vector is None else ops.reshape(vector, [-1])
            for name, vector in given.items()
        }
        result = fusebn.fused_batch_norm(
            arranged.x,
            **vectors,
            epsilon=self.epsilon,
            axis=arranged.axis,
            activation=self.activation,
            residual=residual,
            correction=self.correction,
            **options,
        )
        return arranged.restore(result.y), result.mean, result.variance

    def _weights(self, x: Tensor, arranged: Arranged) -> Tensor | None:
        """Return the mask as a weight for each position of x as it is arranged."""
        if self.mask is None:
            return None
        weights = ops.cast(self.mask, "float32")
        if len(self.axes) == 1:
            return weights
        others = [n for i, n in enumerate(ops.shape(x)) if i not in self.axes]
        outer, _, inner = ops.shape(arranged.x)
        return ops.reshape(ops.broadcast_to(weights, others), (outer, inner))

    def _counted(self, x: Tensor) -> Any:
        """Say whether anything is in the batch: a bool, or a boolean tensor."""
        some = math.prod(ops.shape(x)) > 0
        return some if self.mask is None else ops.logical_and(some, ops.any(self.mask))

    def _stddev(self, variance: Tensor) -> Tensor:
        return ops.sqrt(variance + self.epsilon)

    def _constants(self, values: list[Tensor]) -> tuple[Tensor, ...]:
        """Return new averages in the type of the old, to which no gradient flows."""
        return tuple(
            ops.stop_gradient(ops.cast(new, old.dtype))
            for new, old in zip(values, self.averages, strict=True)
        )


_FIELDS = tuple(field.name for field in fields(Call))
