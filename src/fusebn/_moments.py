"""`Moments`: the one statistic, count, mean and m2, and its exact merge."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fusebn import _numpy, _spec

Array = NDArray[np.float64]


class Moments:
    """Count, mean and sum of squared distances from the mean, of any part of a data set.

    ::

        count = sum(w)    mean = sum(w * x) / count    m2 = sum(w * (x - mean)**2)

    Two of them merge into those of both parts together (Chan, Golub and LeVeque, 1983)::

        delta = b.mean - a.mean
        mean  = a.mean + delta * b.count / (a.count + b.count)
        m2    = a.m2 + b.m2 + delta**2 * a.count * b.count / (a.count + b.count)

    without a large number ever being subtracted from another. So the statistics of micro-batches,
    of devices, of masked sequences or of files larger than memory are those of all the data at
    once. The variance cannot be negative.

    Parameters
    ----------
    count : float
        Sum of the weights; the number of elements where nothing was weighted.
    mean, m2 : array of one shape
        Kept in float64. NaN marks a channel that held a NaN or an infinity.

    ``Moments()`` is the empty batch, the identity of the merge: it takes any shape.
    Instances do not change.

    Raises
    ------
    ValueError
        The count is negative or not finite, an m2 is negative, or the shapes differ.

    Examples
    --------
    Statistics of data that never is in memory at once:

    >>> import numpy as np
    >>> from fusebn import Moments
    >>> def chunks():
    ...     rng = np.random.default_rng(0)
    ...     for _ in range(100):
    ...         yield rng.normal(5.0, 2.0, size=(1000, 3)).astype("float32")
    >>> total = sum((Moments.of(chunk, axes=0) for chunk in chunks()), Moments())
    >>> total.count
    100000.0
    >>> everything = np.concatenate(list(chunks())).astype("float64")
    >>> bool(np.allclose(total.variance(), everything.var(axis=0), rtol=1e-6))
    True
    """

    __slots__ = ("_count", "_m2", "_mean")

    def __init__(self, count: float = 0, mean: ArrayLike = 0.0, m2: ArrayLike = 0.0) -> None:
        self._count = _spec.non_negative("Moments", "count", count)
        self._mean = np.array(mean, dtype=np.float64)
        self._m2 = np.array(m2, dtype=np.float64)
        if self._mean.shape != self._m2.shape:
            _spec.same_shape("Moments", "m2", self._m2.shape, self._mean.shape, of="mean")
        if (self._m2 < 0).any():
            _spec.fail(ValueError, "Moments", "m2", "not be negative", f"{self._m2.min()}")
        self._mean.flags.writeable = self._m2.flags.writeable = False

    @classmethod
    def of(cls, x: Any, axes: Any, weights: Any = None) -> Moments:
        """Return the moments of an array over `axes`.

        Parameters
        ----------
        x : array of float16, bfloat16, float32 or float64
            Not modified.
        axes : int, ints or None
            The axes to reduce, any set of them; None means all.
        weights : array, optional
            One non-negative real for each reduced position: its shape broadcasts to that of the
            reduced axes. Positions of weight 0 are left out, even if they hold NaN. None means 1.

        Examples
        --------
        >>> import numpy as np
        >>> from fusebn import Moments
        >>> m = Moments.of(np.array([[1.0, 5.0], [3.0, 5.0]]), axes=0)
        >>> m
        Moments(count=2.0, mean=[2. 5.], m2=[2. 0.])
        """
        count, mean, m2, _ = _numpy.moments_of_blocks("Moments.of", x, axes, weights)
        return cls(count, mean, m2)

    @property
    def count(self) -> float:
        """Sum of the weights."""
        return self._count

    @property
    def mean(self) -> Array:
        """The mean; NaN where the count is 0."""
        return self._mean if self._count else np.full_like(self._mean, math.nan)

    @property
    def m2(self) -> Array:
        """Sum of squared distances from the mean."""
        return self._m2

    def variance(self, correction: float = 0) -> Array:
        """Return ``m2 / (count - correction)``.

        `correction` 0 gives the biased variance that normalizes a batch, 1 the unbiased one. Where
        the count is not above the correction, the divisor is the count, so a single element has
        variance 0. NaN where the count is 0.
        """
        correction = _spec.non_negative("Moments.variance", "correction", correction)
        if not self._count:
            return np.full_like(self._m2, math.nan)
        divisor = self._count - correction if self._count > correction else self._count
        variance: Array = self._m2 / divisor
        return variance

    def std(self, correction: float = 0) -> Array:
        """Return the square root of :meth:`variance`."""
        std: Array = np.sqrt(self.variance(correction))
        return std

    def merge(self, *others: Any) -> Moments:
        """Return the moments of this part and the others together, joined from left to right.

        Examples
        --------
        >>> import numpy as np
        >>> from fusebn import Moments
        >>> x = np.arange(10.0)
        >>> Moments.of(x[:3], 0).merge(Moments.of(x[3:4], 0), Moments.of(x[4:], 0))
        Moments(count=10.0, mean=4.5, m2=82.5)
        """
        total = self
        for other in others:
            if not isinstance(other, Moments):
                kind = type(other).__name__
                _spec.fail(TypeError, "Moments.merge", "others", "be Moments", kind)
            total = total._merge_one(other)
        return total

    def _merge_one(self, other: Moments) -> Moments:
        if not other._count:
            return self
        if not self._count:
            return other
        shape, other_shape = self._mean.shape, other._mean.shape
        if shape != other_shape:
            expected = f"have the same channels, shape {shape}"
            _spec.fail(ValueError, "Moments.merge", "others", expected, f"shape {other_shape}")
        count = self._count + other._count
        share = other._count / count
        delta = other._mean - self._mean
        return Moments(
            count,
            self._mean + delta * share,
            self._m2 + other._m2 + delta * delta * (self._count * share),
        )

    def __add__(self, other: object) -> Moments:
        if not isinstance(other, Moments):
            return NotImplemented
        return self._merge_one(other)

    def __radd__(self, other: object) -> Moments:
        # What `sum` begins with.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Moments):
            return NotImplemented
        return (
            self._count == other._count
            and np.array_equal(self._mean, other._mean, equal_nan=True)
            and np.array_equal(self._m2, other._m2, equal_nan=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Moments(count={self._count}, mean={self._mean}, m2={self._m2})"
