"""What both of Flax's layers are made of: its axes, masks and dtypes, and one call.

Flax normalizes over all axes but the feature axes, of which there may be several, and takes a mask
that broadcasts to x. The function takes one channel axis, and one weight a position. Axes that are
neighbours are one axis by a reshape, which costs nothing; others are first brought together.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fusebn import _spec, _transforms
from fusebn.jax import _batch, _masked, _transformed, functional
from fusebn.jax._arguments import training_flag
from fusebn.jax._transformed import Pair, Transformation, chosen

Array = Any

_NAME = "BatchNorm"

# What a NaN or an infinity in a channel does to its running statistics.
NONFINITE = ("propagate", "skip")


class Layer(NamedTuple):
    """What a layer is set to."""

    axis: Any
    momentum: Any
    epsilon: Any
    axis_name: Any
    axis_index_groups: Any
    activation: str | None
    correction: float
    nonfinite: str


def layer_of(module: Any) -> Layer:
    """Return what a layer of Flax with our fields is set to."""
    return Layer(*(getattr(module, name) for name in Layer._fields))


def check(layer: Layer) -> None:
    """Check what Flax's layers do not have."""
    _spec.activation(_NAME, layer.activation)
    _spec.non_negative(_NAME, "correction", layer.correction)
    if layer.nonfinite == "raise":
        fix = (
            "Compiled code cannot raise; see jax.config.jax_debug_nans, jax.experimental.checkify."
        )
        _spec.fail(ValueError, _NAME, "nonfinite", "be 'propagate' or 'skip'", "'raise'", fix)
    _spec.one_of(_NAME, "nonfinite", layer.nonfinite, NONFINITE)


def check_plain(layer: Layer, x: Array, residual: Any, transforms: Any) -> None:
    """Check that complex x, which only Flax's own layers take, comes without what only ours do."""
    extras = layer.activation, layer.correction, layer.nonfinite, residual, transforms or None
    if extras != (None, 0, "propagate", None, None):
        expected = "be real beside activation=, residual=, correction=, nonfinite=, transforms="
        _spec.fail(TypeError, _NAME, "x", expected, f"dtype {x.dtype}")


def checked_transforms(transforms: Any) -> dict[str, Callable[..., Any]]:
    """Return the transforms that a layer is given, checked."""
    return _transforms.checked(_NAME, transforms)


def transformation_of(module: Any, active: Any) -> Transformation:
    """Return what a layer and its call are told of transforms."""
    if active is None:
        active = module.transforms_active
    name = "transforms_active"
    return Transformation(
        checked_transforms(module.transforms),
        training_flag(_NAME, name, active),
        _spec.flag(_NAME, "transform_batch_statistics", module.transform_batch_statistics),
    )


def effective(
    transformation: Transformation,
    epsilon: float,
    scale: Array | None,
    bias: Array | None,
    mean: Array,
    var: Array,
) -> dict[str, Any]:
    """Return what normalizes in inference, in the words of `fusebn.fold`."""
    scale, bias = transformation.of_parameters(scale, bias, False)
    mean, var = transformation.of_statistics((mean, var), False)
    return {
        "scale": scale,
        "offset": bias,
        "mean": mean,
        "variance": var,
        "epsilon": epsilon,
    }


def feature_axes(x: Array, axis: int | Iterable[int]) -> tuple[int, ...]:
    """Return the axes of features, sorted, counted from the front, each once, as Flax does."""
    axes = axis if isinstance(axis, Iterable) else (axis,)
    return tuple(sorted({_spec.axis_of(_NAME, "axis", one, x.shape) for one in axes}))


def flag(value: Any) -> Any:
    """Return a switch as a bool, if its value is known while the function is traced."""
    return value if isinstance(value, jax.core.Tracer) else bool(value)


def normalize(
    layer: Layer,
    transformation: Transformation,
    x: Array,
    scale: Array | None,
    bias: Array | None,
    mean: Array,
    var: Array,
    training: Any,
    *,
    mask: Array | None,
    residual: Array | None,
    dtype: Any,
) -> tuple[Array, Array, Array]:
    """Return y, of `dtype`, and both running statistics, updated unless they normalized x.

    The kernel computes in the wider of the types of x and y.
    """
    view = _View(x.shape, feature_axes(x, layer.axis))
    wide = jnp.promote_types(x.dtype, dtype)
    block = view.to_block(x.astype(wide))
    if residual is not None:
        residual = view.to_block(_like_x(residual, x).astype(wide))
    weights = None
    if mask is not None and training is not False:
        weights = view.to_block(_of_rank(mask, x))
    own = weights is not None and weights.shape[view.axis] != 1
    function: Callable[..., Any] = _masked.batch_norm if own else functional.batch_norm
    options = {
        "axis": view.axis,
        "weights": weights,
        "exponential_avg_factor": _factor(layer.momentum),
        "correction": layer.correction,
        "axis_name": layer.axis_name,
        "axis_index_groups": layer.axis_index_groups,
    }
    by = _transformed.normalizers(
        transformation,
        (mean, var),
        training,
        partial(_batch.measured, block, (mean, var), own_weights=own, **options),
    )
    vectors = (None if v is None else v.reshape(-1) for v in (scale, bias, *by.given))
    result = function(
        block,
        *vectors,
        is_training=by.by_batch,
        epsilon=layer.epsilon,
        activation=layer.activation,
        residual=residual,
        **options,
    )
    returned = result.mean.reshape(mean.shape), result.variance.reshape(var.shape)
    new = _finite(layer, by.averages(returned), (mean, var))
    return view.from_block(result.y).astype(dtype), *new


def _factor(momentum: Any) -> float:
    """Return the weight of the batch: less than 1, for which a batch of nothing changes nothing."""
    factor = 1 - _spec.fraction(_NAME, "momentum", momentum, "It is the weight of the old value.")
    return min(factor, math.nextafter(1, 0))


def _finite(layer: Layer, new: Pair, old: Pair) -> Pair:
    """Return the running statistics, without what is not finite if the layer skips that."""
    if layer.nonfinite == "propagate":
        return new
    return chosen(jnp.isfinite(new[0]) & jnp.isfinite(new[1]), new, old)


def _like_x(residual: Any, x: Array) -> Array:
    residual = jnp.asarray(residual)
    _spec.same_shape(_NAME, "residual", residual.shape, x.shape)
    return residual


def _of_rank(mask: Any, x: Array) -> Array:
    """Return a mask as booleans of the rank of x."""
    mask = jnp.asarray(mask, bool)
    pairs = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    if mask.ndim > x.ndim or not all(m in (1, n) for m, n in pairs):
        expected, got = f"broadcast to x of shape {x.shape}", f"shape {mask.shape}"
        _spec.fail(ValueError, _NAME, "mask", expected, got)
    return mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)


# ---- axes ----


class _View:
    """How an array with several feature axes becomes one with a single channel axis, and back."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
        rest = [i for i in range(len(shape)) if i not in axes]
        first = axes[0] if axes else len(shape)
        together = axes == tuple(range(first, first + len(axes)))
        self.order = None if together else (*rest, *axes)
        self.axis = first if together else len(rest)
        self.features = tuple(shape[i] for i in axes)
        self.shape = shape if self.order is None else tuple(shape[i] for i in self.order)

    def to_block(self, array: Array) -> Array:
        """Return an array with its feature axes as one: of x's length there, or of 1."""
        if self.order is not None:
            array = array.transpose(self.order)
        before, rest = array.shape[: self.axis], array.shape[self.axis :]
        found, after = rest[: len(self.features)], rest[len(self.features) :]
        if any(length != 1 for length in found):
            found = self.features
            array = jnp.broadcast_to(array, (*before, *found, *after))
        return array.reshape(*before, math.prod(found), *after)

    def from_block(self, y: Array) -> Array:
        """Return what `to_block` was given."""
        y = y.reshape(self.shape)
        if self.order is None:
            return y
        return y.transpose(sorted(range(y.ndim), key=self.order.__getitem__))
