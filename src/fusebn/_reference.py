"""The oracle: batch normalization as the textbook writes it, in NumPy's longest float.

Every backend is judged by this file, so it is written to be read, not to be fast: two passes,
nothing fused. It knows no block, no dtype rule and no thread. The four verbs work along any axes
by broadcasting; statistics and sums keep the reduced axes with length one, so they broadcast back
against x. The two compositions at the end, :func:`fused_batch_norm` and
:func:`fused_batch_norm_grad`, read like the public functions of those names, but name the channel
axis alone and return longdouble.

The policies:

- a batch of count 0 is undefined: its mean and variance are NaN, and x is forgotten by its y;
- a position of weight 0 is outside the batch whatever it holds, NaN included;
- a channel that holds a NaN or an infinity has mean NaN and variance NaN;
- where variance + epsilon is 0, so is 1 / sqrt(variance + epsilon).

NaN and infinity are answers here, not accidents: nothing warns about them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = Any  # or what np.asarray takes; results are longdouble, a type NumPy's stubs lose


def wide(values: Array) -> Array:
    """Return a longdouble copy of any real array."""
    return np.asarray(values).astype(np.longdouble)


# --- The activations, f(z), and their derivatives, f'(z) --------------------------------------

SLOPE = wide(1) / 100  # of leaky_relu
PI = 4 * np.arctan(wide(1))


@np.errstate(all="ignore")
def erf(z: Array) -> Array:
    """Sum 2 / sqrt(pi) * exp(-z^2) * (z + 2 z^3 / 3 + 4 z^5 / 15 + ...): terms of one sign.

    Nothing cancels, so it is good to a few epsilon of longdouble (DLMF 7.6.2). Beyond 6.6 the
    answer is 1 to the last of its 64 bits.
    """
    far, sign = np.abs(z) > 6.6, np.sign(wide(z))
    z = np.where(far, 0, wide(z))
    term = total = z
    n = 0
    while np.any(np.abs(term) > np.finfo(np.longdouble).eps / 8 * np.abs(total)):
        n += 1
        term = term * 2 * z * z / (2 * n + 1)
        total = total + term
    return np.where(far, sign, 2 / np.sqrt(PI) * np.exp(-z * z) * total)


def _normal_cdf(z: Array) -> Array:
    return (1 + erf(z / np.sqrt(wide(2)))) / 2


def _normal_pdf(z: Array) -> Array:
    return np.exp(-z * z / 2) / np.sqrt(2 * PI)


def _sigmoid(z: Array) -> Array:
    small = np.exp(-np.abs(z))  # never overflows
    return np.where(z >= 0, 1, small) / (1 + small)


def _silu_derivative(z: Array) -> Array:
    return _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))


# A NaN goes through every f. At a kink f' is that of the flat side; so it is for NaN.
ACTIVATIONS: dict[str | None, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    None: (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda z: wide(z > 0)),
    "relu6": (lambda z: np.clip(z, 0, 6), lambda z: wide((z > 0) & (z < 6))),
    "leaky_relu": (
        lambda z: np.where(z > 0, z, SLOPE * z),
        lambda z: np.where(z > 0, 1, SLOPE),
    ),
    "silu": (lambda z: z * _sigmoid(z), _silu_derivative),
    "gelu": (lambda z: z * _normal_cdf(z), lambda z: _normal_cdf(z) + z * _normal_pdf(z)),
}


# --- The four verbs ---------------------------------------------------------------------------


class Moments(NamedTuple):
    """count = sum of w, mean = sum of w x / count, m2 = sum of w (x - mean)^2."""

    count: Array
    mean: Array
    m2: Array

    def variance(self, correction: float = 0) -> Array:
        """Return m2 / (count - correction); divide by count where no more than that is there."""
        divisor = np.where(self.count > correction, self.count - correction, self.count)
        return _divide(self.m2, divisor)


@np.errstate(all="ignore")
def moments(x: Array, axes: int | Sequence[int], weights: Array | None = None) -> Moments:
    """Return the moments of x over axes; weights, which broadcast against x, count positions."""
    x = wide(x)
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    w = np.broadcast_to(wide(1 if weights is None else weights), x.shape)
    x = np.where(w == 0, 0, x)
    count = w.sum(axes, keepdims=True)
    mean = _divide((w * x).sum(axes, keepdims=True), count)
    mean = np.where(np.isfinite(mean), mean, np.nan)
    m2 = np.where(count == 0, 0, (w * (x - mean) ** 2).sum(axes, keepdims=True))
    return Moments(count, mean, m2)


@np.errstate(all="ignore")
def normalize(
    x: Array,
    mean: Array,
    variance: Array,
    scale: Array | None,
    offset: Array | None,
    epsilon: float,
    activation: str | None = None,
    residual: Array | None = None,
) -> Array:
    """Return y = f((x - mean) * scale / sqrt(variance + epsilon) + offset + residual)."""
    z = preactivation(x, mean, variance, scale, offset, epsilon, residual)
    return ACTIVATIONS[activation][0](z)


class Sums(NamedTuple):
    """sum_g is the gradient of offset; sum_g_x / sqrt(variance + epsilon) is that of scale."""

    sum_g: Array
    sum_g_x: Array


@np.errstate(all="ignore")
def backward_sums(g: Array, x: Array, mean: Array, variance: Array, axes: Sequence[int]) -> Sums:
    """Return the sums over axes of g and of g * (x - mean); 0 for the latter where x is unused.

    g = dy * f'(preactivation) is the gradient of what the activation saw.
    """
    g, axes = wide(g), tuple(axes)
    centred = np.where(np.isposinf(wide(variance)), 0, wide(x) - wide(mean))
    return Sums(g.sum(axes, keepdims=True), (g * centred).sum(axes, keepdims=True))


@np.errstate(all="ignore")
def backward(
    g: Array,
    x: Array,
    mean: Array,
    variance: Array,
    scale: Array | None,
    epsilon: float,
    *,
    sums: Sums | None = None,
    count: Array = 0,
    weights: Array | None = None,
    dmean: Array = 0,
    dvariance: Array = 0,
) -> Array:
    """Return dx by the chain rule through x itself, the mean and the variance.

    y depends on x directly, dz/dx = scale * rstd; and, where the statistics are the batch's
    (sums given), through mean, dmean/dx = w / count, and variance, dvariance/dx =
    2 w (x - mean) / count. dmean and dvariance are what flows into them from elsewhere.
    """
    scale = wide(1 if scale is None else scale)
    inverse = rstd(variance, epsilon)
    dx = wide(g) * scale * inverse
    if sums is None:
        return dx
    share = _divide(wide(1 if weights is None else weights), wide(count))
    share = np.where(wide(count) == 0, 0, share)
    into_mean = dmean - scale * inverse * sums.sum_g
    into_variance = dvariance - scale * inverse**3 / 2 * sums.sum_g_x
    centred = wide(x) - wide(mean)
    return dx + np.where(share == 0, 0, share * (into_mean + 2 * centred * into_variance))


# --- What the verbs share ---------------------------------------------------------------------


def _divide(a: Array, b: Array) -> Array:
    """Return a / b, NaN where b is 0."""
    return a / np.where(b == 0, np.nan, b)


def rstd(variance: Array, epsilon: float) -> Array:
    """Return 1 / sqrt(variance + epsilon), 0 where variance + epsilon is 0."""
    shifted = wide(variance) + wide(epsilon)
    return np.where(shifted == 0, 0, 1 / np.sqrt(np.where(shifted == 0, 1, shifted)))


def preactivation(
    x: Array,
    mean: Array,
    variance: Array,
    scale: Array | None,
    offset: Array | None,
    epsilon: float,
    residual: Array | None = None,
) -> Array:
    """Return z = (x - mean) * scale * rstd + offset + residual; rstd 0 forgets x, NaN or not."""
    inverse = rstd(variance, epsilon)
    xhat = np.where(inverse == 0, 0, (wide(x) - wide(mean)) * inverse)
    z = xhat * wide(1 if scale is None else scale) + wide(0 if offset is None else offset)
    return z + wide(0 if residual is None else residual)


# --- The two compositions ---------------------------------------------------------------------


class FusedBatchNorm(NamedTuple):
    y: Array
    mean: Array
    variance: Array


class FusedBatchNormGrad(NamedTuple):
    dx: Array
    dscale: Array
    doffset: Array
    dresidual: Array


class _Layout:
    """Bring per-channel vectors and per-position weights into the rank of x, and back."""

    def __init__(self, x: Array, axis: int) -> None:
        self.axis, self.ndim = axis % x.ndim, x.ndim
        self.axes = tuple(i for i in range(x.ndim) if i != self.axis)

    def spread(self, vector: Array | None) -> Array | None:
        return None if vector is None else np.expand_dims(wide(vector), self.axes)

    def squeeze(self, kept: Array) -> Array:
        return kept.squeeze(self.axes)

    def positions(self, weights: Array | None, shape: Sequence[int]) -> Array | None:
        if weights is None:
            return None
        positions = [shape[i] for i in self.axes]
        return np.expand_dims(np.broadcast_to(wide(weights), positions), self.axis)


@np.errstate(all="ignore")
def fused_batch_norm(
    x: Array,
    scale: Array | None = None,
    offset: Array | None = None,
    mean: Array | None = None,
    variance: Array | None = None,
    epsilon: float = 0.001,
    is_training: bool = True,
    exponential_avg_factor: float = 1.0,
    *,
    axis: int = -1,
    activation: str | None = None,
    residual: Array | None = None,
    weights: Array | None = None,
    correction: float = 1,
) -> FusedBatchNorm:
    """Compose moments and normalize as the public function of this name does."""
    x = wide(x)
    layout = _Layout(x, axis)
    given: tuple[Array, ...] = layout.spread(mean), layout.spread(variance)
    returned: tuple[Array, ...]
    if is_training:
        # An undefined batch normalizes as if its variance were infinite: x is forgotten.
        batch = moments(x, layout.axes, layout.positions(weights, x.shape))
        used = (batch.mean, np.where(batch.count == 0, np.inf, batch.variance()))
        returned = batch.mean, batch.variance(correction)
        if exponential_avg_factor != 1:
            f = wide(exponential_avg_factor)
            returned = tuple(
                np.where(batch.count == 0, old, (1 - f) * old + f * new)
                for old, new in zip(given, returned, strict=True)
            )
    else:
        used = returned = given
    y = normalize(
        x, *used, layout.spread(scale), layout.spread(offset), epsilon, activation, residual
    )
    return FusedBatchNorm(y, *map(layout.squeeze, returned))


@np.errstate(all="ignore")
def fused_batch_norm_grad(
    dy: Array,
    x: Array,
    scale: Array | None,
    offset: Array | None,
    mean: Array,
    variance: Array,
    epsilon: float = 0.001,
    is_training: bool = True,
    *,
    axis: int = -1,
    activation: str | None = None,
    residual: Array | None = None,
    weights: Array | None = None,
    dmean: Array | None = None,
    dvariance: Array | None = None,
) -> FusedBatchNormGrad:
    """Compose backward_sums and backward as the public function of this name does."""
    x = wide(x)
    layout = _Layout(x, axis)
    scale, offset, mean, variance, dmean, dvariance = map(
        layout.spread, (scale, offset, mean, variance, dmean, dvariance)
    )
    positions = layout.positions(weights, x.shape)
    count = np.broadcast_to(1 if positions is None else positions, x.shape)
    count = count.sum(layout.axes, keepdims=True)
    if is_training:
        variance = np.where(count == 0, np.inf, variance)
    z = preactivation(x, mean, variance, scale, offset, epsilon, residual)
    g = wide(dy) * ACTIVATIONS[activation][1](z)
    sums = backward_sums(g, x, mean, variance, layout.axes)
    dx = backward(
        g,
        x,
        mean,
        variance,
        scale,
        epsilon,
        sums=sums if is_training else None,
        count=count,
        weights=positions,
        dmean=0 if dmean is None else dmean,
        dvariance=0 if dvariance is None else dvariance,
    )
    dscale = np.where(rstd(variance, epsilon) == 0, 0, sums.sum_g_x * rstd(variance, epsilon))
    return FusedBatchNormGrad(dx, layout.squeeze(dscale), layout.squeeze(sums.sum_g), g)
