"""`fold`: in inference a batch norm is affine, so a linear layer beside it can take it over.

    batch norm          y = (x - mean) * factor + offset,  factor = scale * rstd
    linear, then norm   weight[i, o] * factor[o],  (bias[o] - mean[o]) * factor[o] + offset[o]
    norm, then linear   weight[i, o] * factor[i],  bias[o] + sum over i of weight[i, o] * shift[i]
                        with shift = offset - mean * factor

Every kind of weight, in every layout, is seen as an array [groups, in, out, *kernel] and scaled in
place; the rest is vectors. All of it is NumPy, in float64, rounded once.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fusebn import _spec
from fusebn._dispatch import adapter_of, held_by

Array = NDArray[Any]

_NAME = "fold"

KINDS = ("dense", "conv", "depthwise_conv", "conv_transpose")
LAYOUTS = ("torch", "tensorflow", "keras", "flax")

# The axes of a weight: I and O, all channels in and out, of which a group has its share; i and o,
# those of one group; * the kernel's own.
_AXES = {
    ("dense", "torch"): "oi",
    ("dense", "tensorflow"): "io",
    ("dense", "flax"): "io",
    ("conv", "torch"): "Oi*",
    ("conv", "tensorflow"): "*iO",
    ("conv", "flax"): "*iO",
    ("depthwise_conv", "tensorflow"): "*Io",
    ("conv_transpose", "torch"): "Io*",
    ("conv_transpose", "tensorflow"): "*oI",
    ("conv_transpose", "flax"): "*iO",
}


class Affine(NamedTuple):
    """What a batch norm does in inference, one value a channel: see the top of this file."""

    factor: Array
    mean: Array
    offset: Array

    @property
    def shift(self) -> Array:
        """What it makes of 0."""
        shift: Array = self.offset - self.mean * self.factor
        return shift


def fold(
    weight: Any,
    bias: Any,
    layer: Any,
    *,
    kind: Any,
    layout: Any = "torch",
    groups: Any = 1,
    before: Any = False,
    padded: Any = None,
) -> tuple[Any, Any]:
    """See :func:`fusebn.fold`."""
    like = held_by(weight)
    adapter = adapter_of(_NAME, like, "weight")
    given = adapter.to_numpy(_NAME, "weight", like)
    wide = np.array(given, np.float64, order="C")
    axes = _axes(kind, layout)
    by_group = _by_group(wide, axes, kind, _groups(groups, kind, wide.shape))
    count, inputs, outputs = by_group.shape[:3]
    before = _spec.flag(_NAME, "before", before)
    norm = affine(layer, count * (inputs if before else outputs), given.shape)
    new_bias = _vector("bias", bias, count * outputs, given.shape, absent=0)
    one_each = (1,) * (by_group.ndim - 3)
    if before:
        _check_exact(kind, padded, norm.shift)
        taps = by_group.sum(tuple(range(3, by_group.ndim)))
        shifted = np.einsum("gio,gi->go", taps, norm.shift.reshape(count, inputs))
        new_bias = new_bias + shifted.reshape(-1)
        by_group *= norm.factor.reshape(count, inputs, 1, *one_each)
    else:
        new_bias = (new_bias - norm.mean) * norm.factor + norm.offset
        by_group *= norm.factor.reshape(count, 1, outputs, *one_each)
    folded = (_held("weight", wide, given), _held("bias", new_bias, given))
    return adapter.from_numpy(folded[0], like), adapter.from_numpy(folded[1], like)


# ---- the weight ----


def _axes(kind: Any, layout: Any) -> str:
    _spec.one_of(_NAME, "kind", kind, KINDS)
    _spec.one_of(_NAME, "layout", layout, LAYOUTS)
    axes = _AXES.get((kind, "tensorflow" if layout == "keras" else layout))
    if axes is None:
        fix = "There a depthwise convolution is grouped: kind='conv', groups=the channels in."
        expected = f"be 'conv' for layout={layout!r}"
        _spec.fail(ValueError, _NAME, "kind", expected, repr(kind), fix)
    return axes


def _groups(groups: Any, kind: str, shape: tuple[int, ...]) -> int:
    number = _spec.positive_integer(_NAME, "groups", groups)
    if kind == "depthwise_conv" and len(shape) > 2:
        if number not in (1, shape[-2]):
            fix = "Leave it out: each channel is a group."
            _spec.fail(ValueError, _NAME, "groups", f"be {shape[-2]}", f"{number}", fix)
        return shape[-2]
    if kind == "dense" and number != 1:
        _spec.fail(ValueError, _NAME, "groups", "be 1 for kind='dense'", f"{number}")
    return number


def _by_group(weight: Array, axes: str, kind: str, groups: int) -> Array:
    """Return a view of the weight: [groups, in of a group, out of a group, *kernel]."""
    kernel = weight.ndim - len(axes.replace("*", ""))
    if kernel < 1 if "*" in axes else kernel:
        expected = f"have {'at least 3' if '*' in axes else '2'} axes for kind={kind!r}"
        _spec.fail(ValueError, _NAME, "weight", expected, f"shape {weight.shape}")
    names, shape = "", []
    for name, size in zip(axes.replace("*", "*" * kernel), weight.shape, strict=True):
        if name.isupper():
            if size % groups:
                expected = f"divide the {size} channels of `weight`, of shape {weight.shape}"
                _spec.fail(ValueError, _NAME, "groups", expected, f"{groups}")
            names += "g"
            shape += [groups, size // groups]
        else:
            shape.append(size)
        names += name.lower()
    if "g" not in names:
        names, shape = "g" + names, [1, *shape]
    order = [names.index(name) for name in "gio"]
    order += [i for i, name in enumerate(names) if name == "*"]
    return weight.reshape(shape).transpose(order)


def _check_exact(kind: str, padded: Any, shift: Array) -> None:
    """Refuse a batch norm before a layer whose border sees something else than the inside."""
    if kind == "conv_transpose" and shift.any():
        expected = "be False for kind='conv_transpose'"
        fix = (
            "Which taps of the kernel reach an output depends on where it is, and each adds its "
            "share of what the batch norm shifts: no one bias is all of them. With a kernel of 1 "
            "and a stride of 1 it is a convolution: kind='conv', the channels of weight swapped."
        )
        _spec.fail(ValueError, _NAME, "before", expected, "True", fix)
    if kind in ("dense", "conv_transpose") or padded == "inexact":
        return
    if padded is None:
        fix = (
            "Say whether the convolution adds zeros around what the batch norm returns: "
            "without padding folding is exact."
        )
        _spec.fail(ValueError, _NAME, "padded", "be given with before=True", "None", fix)
    if _spec.flag(_NAME, "padded", padded) and shift.any():
        fix = (
            "Padding adds zeros after the batch norm, which it would shift if they came before: "
            "the border would be wrong. padded='inexact' folds all the same."
        )
        _spec.fail(ValueError, _NAME, "padded", "be False with before=True", "True", fix)


# ---- the batch norm ----

# What layers call scale, offset, mean, variance and epsilon: PyTorch's, Keras's, Flax's.
_ATTRIBUTES = (
    ("weight", "bias", "running_mean", "running_var", "eps"),
    ("gamma", "beta", "moving_mean", "moving_variance", "epsilon"),
    ("scale", "bias", "mean", "var", "epsilon"),
)
_KEYS = {"scale", "offset", "mean", "moving_mean", "variance", "moving_variance", "epsilon"}
_A_LAYER = (
    "be a batch norm that has been built, or a mapping of 'scale', 'offset', 'mean', 'variance' "
    "and 'epsilon'"
)


def affine(layer: Any, channels: int, shape: tuple[int, ...]) -> Affine:
    """Return what a batch norm of so many channels does in inference; `shape` is the weight's."""
    held = _variables(layer)
    if held.keys() - _KEYS:
        _spec.fail(ValueError, _NAME, "layer", _A_LAYER, f"the keys {sorted(map(str, held))}")
    vectors = {}
    for name, absent in (("scale", 1), ("offset", 0), ("mean", None), ("variance", None)):
        value = held.get(name)
        value = held.get(f"moving_{name}") if value is None else value
        of_layer = f"layer: {name}"
        vectors[name] = _vector(of_layer, value, channels, shape, absent)
        _none_where(~np.isfinite(vectors[name]), of_layer, "be finite")
    _none_where(vectors["variance"] < 0, "layer: variance", "not be negative")
    epsilon = _spec.non_negative(_NAME, "layer: epsilon", held.get("epsilon"))
    spread = np.sqrt(vectors["variance"] + epsilon)
    rstd = np.divide(1, spread, out=np.zeros(channels), where=spread > 0)
    return Affine(vectors["scale"] * rstd, vectors["mean"], vectors["offset"])


def _variables(layer: Any) -> Mapping[str, Any]:
    """Return what normalizes in inference, by our names."""
    if isinstance(layer, Mapping):
        return layer
    if getattr(layer, "activation", None) is not None:
        fix = (
            "Folding would lose it: pass layer.effective_variables(), or a mapping, and apply the "
            "activation to what the folded layer returns."
        )
        got = f"activation={layer.activation!r}"
        _spec.fail(ValueError, _NAME, "layer", "have no activation", got, fix)
    if hasattr(layer, "effective_variables"):
        held: Mapping[str, Any] = layer.effective_variables()
        return held
    for names in _ATTRIBUTES:
        if all(hasattr(layer, name) for name in names):
            return _of_attributes(layer, names)
    _spec.fail(TypeError, _NAME, "layer", _A_LAYER, type(layer).__name__)


def _of_attributes(layer: Any, names: tuple[str, ...]) -> Mapping[str, Any]:
    values = [getattr(layer, name) for name in names]
    if values[2] is None or values[3] is None:
        fix = "A layer without them is not built, or normalizes by the batch in inference too."
        _spec.fail(ValueError, _NAME, "layer", "hold moving statistics", f"{names[2]}=None", fix)
    return dict(zip(("scale", "offset", "mean", "variance", "epsilon"), values, strict=True))


def _vector(
    argument: str, value: Any, channels: int, shape: tuple[int, ...], absent: float | None
) -> Array:
    """Return one value a channel in float64; `absent` is what None stands for, if it may be."""
    if value is None and absent is not None:
        return np.full(channels, float(absent))
    value = held_by(value)
    given = adapter_of(_NAME, value, argument).to_numpy(_NAME, argument, value)
    if given.shape != (channels,):
        expected = f"have shape ({channels},), for a weight of shape {shape}"
        fix = "See `kind`, `layout` and `groups`: they say which axis has the channels."
        _spec.fail(ValueError, _NAME, argument, expected, f"shape {given.shape}", fix)
    return np.asarray(given, np.float64)


def _none_where(bad: Array, argument: str, expected: str) -> None:
    if bad.any():
        shown = ", ".join(map(str, np.flatnonzero(bad)[:8])) + (", ..." if bad.sum() > 8 else "")
        _spec.fail(ValueError, _NAME, argument, expected, f"another value in channels {shown}")


# ---- the result ----


def _held(argument: str, wide: Array, like: Array) -> Array:
    """Return folded values in the dtype of the weight, or say that it cannot hold them."""
    narrow = rounded(wide, like.dtype)
    if (np.isinf(narrow) & np.isfinite(wide)).any():
        largest = np.abs(wide[np.isfinite(wide)]).max()
        expected = f"be of a dtype that holds what it becomes, up to {largest:.3g}"
        fix = "Pass a weight of float32."
        _spec.fail(ValueError, _NAME, argument, expected, like.dtype.name, fix)
    return narrow


def rounded(wide: Array, dtype: np.dtype[Any]) -> Array:
    """Return float64 in another dtype, rounded once; infinite what is too large."""
    with np.errstate(over="ignore"):
        if dtype == ml_dtypes.bfloat16:
            wide = _to_odd(wide)  # ml_dtypes goes by way of float32
        narrow: Array = wide.astype(dtype)
    return narrow


def _to_odd(wide: Array) -> Array:
    """Return float32 whose last bit says that something was cut off: a second rounding is right.

    S. Boldo and G. Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms
    using rounding to odd", 2008, https://doi.org/10.1109/TC.2007.70819.
    """
    nearest = wide.astype(np.float32)
    below = np.nextafter(nearest, np.float32(0))
    cut = np.where(np.abs(nearest) > np.abs(wide), below, nearest)
    odd: Array = cut.view(np.uint32) | (cut != wide)
    return odd.view(np.float32)
