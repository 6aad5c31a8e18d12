"""What a layer's transforms do to the statistics by which its batch norm normalizes.

The kernel takes given statistics and, in training, those of the batch; which ones normalize, it
reads when it runs. So transformed statistics are given ones, also those of a batch, and a switch
that is known only at run time chooses between two vectors. In training the kernel mixes the given
ones into the averages: there they are the averages themselves, untransformed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from fusebn import _transforms
from fusebn._quantization import choose
from fusebn._transforms import Transforms
from fusebn.jax._array_ops import array_ops

Array = Any
Pair = tuple[Array, Array]  # mean and variance, or what is returned for them

_NAME = "BatchNorm"


class Transformation(NamedTuple):
    """The transforms of a layer, and when they apply."""

    transforms: Transforms
    active: Any  # a bool, or a boolean scalar
    of_batch: bool  # whether those of the moving statistics apply to the batch's, too

    def of_parameters(self, scale: Array | None, offset: Array | None, training: Any) -> Any:
        """Return scale and offset as they are to normalize; None stays None."""
        return self._of("scale", scale, training), self._of("offset", offset, training)

    def of_statistics(self, statistics: Pair, training: Any) -> Pair:
        """Return a mean and a variance as they are to normalize."""
        mean, variance = statistics
        mean = self._of("moving_mean", mean, training)
        return mean, self._of("moving_variance", variance, training)

    def _of(self, name: str, vector: Array | None, training: Any) -> Any:
        arguments = self.transforms, name, vector, self.active, training
        return _transforms.apply(array_ops, _NAME, *arguments)


class Batch(NamedTuple):
    """What a layer needs of a batch whose statistics are transformed."""

    count: Array
    statistics: Pair  # mean and biased variance
    averages: Pair  # the moving ones, after it


class Normalizers(NamedTuple):
    """What to hand to the batch norm, and what to make of what it returns."""

    given: Pair
    by_batch: Any  # whether the batch's statistics normalize as they are
    averages: Callable[[Pair], Pair]  # from the statistics it returns


def normalizers(
    transformation: Transformation,
    old: Pair,
    training: Any,
    batch_of: Callable[[Any], Batch],
) -> Normalizers:
    """Return what the transforms make of the moving statistics, and of the batch's.

    `batch_of` measures the batch where its argument holds, a bool or a boolean scalar.
    """
    if not {"moving_mean", "moving_variance"} & set(transformation.transforms):
        return Normalizers(old, training, lambda returned: returned)
    transformed = transformation.of_batch and both(training, transformation.active)
    seen, after = old, old
    if transformed is not False:
        batch = batch_of(transformed)
        transformed = both(transformed, batch.count > 0)  # else there is nothing to transform
        seen, after = chosen(transformed, batch.statistics, old), batch.averages
    new = transformation.of_statistics(seen, training)
    by_batch = both(training, negated(transformed))

    def averages(returned: Pair) -> Pair:
        return chosen(training, chosen(transformed, after, returned), old)

    return Normalizers(chosen(by_batch, old, new), by_batch, averages)


def both(one: Any, other: Any) -> Any:
    """Return whether both hold: a bool where that is known."""
    if isinstance(one, bool):
        return other if one else False
    if isinstance(other, bool):
        return one if other else False
    return one & other


def negated(condition: Any) -> Any:
    """Return the contrary: a bool where that is known."""
    return not condition if isinstance(condition, bool) else jnp.logical_not(condition)


def chosen(condition: Any, new: Pair, old: Pair) -> Pair:
    """Return one pair or the other."""
    mean, variance = (choose(array_ops, condition, *pair) for pair in zip(new, old, strict=True))
    return mean, variance
