"""The ops of csrc/bindings/tensorflow.cpp: loaded, called, and their gradients.

`batch_norm` and `moments` take canonical arguments (see `_functions`) and choose between the op and
the composite of `_portable`. `batch_norm_gradient` is the gradient as a function.

First-order gradients are ops of our own, but for those of the weights; these, and all gradients of
gradients, are TensorFlow's of the composite.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import tensorflow as tf

from fusebn import _core
from fusebn.tensorflow import _portable
from fusebn.tensorflow._portable import BatchNorm, Moments

try:  # no public name says whether a function is being traced for XLA
    from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext as _in_xla
except ImportError:

    def _in_xla(graph: Any) -> bool:
        return False


Tensor = Any

# ---- native or portable ----


def _load() -> tuple[Any, str]:
    """Return the module of ops, or None and the reason."""
    path = Path(_core.__file__).parent / "lib" / "libfusebn_tensorflow.so"
    try:
        library = tf.load_op_library(str(path))
        for name in ("fusebn_batch_norm", "fusebn_batch_norm_grad", "fusebn_moments"):
            getattr(library, name)
    except (tf.errors.OpError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded: {error}"
    return library, ""


_library, _why_not_loaded = _load()
_asked = threading.local()


@contextmanager
def portable() -> Iterator[None]:
    """Make the functions of this package, as long as it lasts, of TensorFlow's own ops.

    A graph traced inside holds no op of fusebn: it can be exported and run where fusebn is not
    installed. The results are the same to rounding; the speed is TensorFlow's.

    Examples
    --------
    >>> import tensorflow as tf
    >>> import fusebn.tensorflow as fbt
    >>> @tf.function(input_signature=[tf.TensorSpec([None, 3])])
    ... def serve(x):
    ...     with fbt.portable():
    ...         return fbt.nn.fused_batch_norm(x, None, None, data_format="NC").y
    >>> graph = serve.get_concrete_function().graph
    >>> [op.type for op in graph.get_operations() if "Fusebn" in op.type]
    []
    """
    depth = getattr(_asked, "depth", 0)
    _asked.depth = depth + 1
    try:
        yield
    finally:
        _asked.depth = depth


@cache
def _gpus() -> bool:
    return bool(tf.config.list_physical_devices("GPU"))


def in_xla() -> bool:
    """Say whether what is built now is for XLA to compile."""
    return not tf.executing_eagerly() and bool(_in_xla(tf.compat.v1.get_default_graph()))


def why_portable(x: Tensor | None = None) -> str:
    """Return why the composite is used here (for x, if given), or "" if the op is."""
    if getattr(_asked, "depth", 0):
        return "inside portable()"
    if _library is None:
        return _why_not_loaded
    if in_xla():
        return "XLA compiles TensorFlow's own ops only"
    if x is not None and _gpus() and "CPU" not in x.device:
        return "the op has no kernel for a GPU"
    return ""


def support() -> str:
    """Return what `fusebn.info` says of TensorFlow."""
    why = why_portable()
    if why:
        return f"composite of TensorFlow's own ops: {why}"
    return "native op; a composite of TensorFlow's own under XLA, on a GPU and in portable()"


# ---- calls ----


def _optional(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _tell_shapes(*known: tuple[Tensor, Any]) -> None:
    """Tell a graph what shape functions cannot: those of the C API see no attributes."""
    if not tf.executing_eagerly():
        for tensor, shape in known:
            tensor.set_shape(shape)


def batch_norm(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    *,
    is_training: Any,
    axis: int,
    epsilon: float,
    correction: float = 1.0,
    factor: float = 1.0,
    activation: str = "identity",
    residual: Tensor | None = None,
    weights: Tensor | None = None,
    name: str | None = None,
) -> BatchNorm:
    """Return y, the returned mean and variance, what normalized x, and the count.

    All tensors have the types and shapes of the op: vectors of float32 (float64 if x is), weights
    with the rank of x and length 1 for channels. `is_training` is a bool or a boolean scalar.
    """
    options: dict[str, Any] = {
        "axis": axis,
        "epsilon": epsilon,
        "correction": correction,
        "factor": factor,
        "activation": activation,
    }
    if why_portable(x):
        with tf.name_scope(name or "batch_norm"):
            return _portable.batch_norm(
                x,
                scale,
                offset,
                mean,
                variance,
                is_training=is_training,
                residual=residual,
                weights=weights,
                **options,
            )
    result = _library.fusebn_batch_norm(
        x=x,
        is_training=is_training,
        scale=_optional(scale),
        offset=_optional(offset),
        given=_optional(mean, variance),
        residual=_optional(residual),
        weights=_optional(weights),
        S=tf.float64 if x.dtype == tf.float64 else tf.float32,
        name=name,
        **_attributes(**options),
    )
    if x.shape.rank is not None:
        vector = [x.shape[axis]]
        _tell_shapes((result.mean, vector), (result.variance, vector), (result.batch, [2, *vector]))
    return BatchNorm(*result)


def _attributes(
    axis: int, epsilon: float, correction: float, factor: float, activation: str
) -> dict[str, Any]:
    return {
        "axis": axis,
        "activation": activation,
        "epsilon": repr(epsilon),
        "correction": repr(correction),
        "exponential_avg_factor": repr(factor),
    }


def moments(x: Tensor, axes: tuple[int, ...], weights: Tensor | None = None) -> Moments:
    """Return count, mean and m2 over `axes`, sorted and counted from the front.

    `weights` have the type of the statistics, the rank of x, and length 1 for the kept axes.
    """
    if why_portable(x):
        return _portable.moments(x, list(axes), weights)
    kept = [axis for axis in range(x.shape.rank) if axis not in axes]
    shape = [x.shape[axis] for axis in kept]
    begin, end = (kept[0], kept[-1] + 1) if kept else (0, 0)
    if end - begin != len(kept):  # the op keeps neighbours
        order = [*kept, *axes]
        x = tf.transpose(x, order)
        weights = None if weights is None else tf.transpose(weights, order)
        begin, end = 0, len(kept)
    result = _library.fusebn_moments(x=x, weights=_optional(weights), begin=begin, end=end)
    _tell_shapes((result.mean, shape), (result.m2, shape))
    return Moments(*result)


# ---- gradients ----


class _Node:
    """The optional inputs of a batch-norm op, and its attributes."""

    def __init__(self, op: Any, required: int) -> None:
        rest = iter(op.inputs[required:])
        self.lists = [
            [next(rest) for _ in op.get_attr(name)]
            for name in ("Scale", "Offset", "Given", "Residual", "Weights")
        ]
        scale, offset, given, residual, weights = self.lists
        self.tensors: dict[str, Tensor | None] = {
            "scale": scale[0] if scale else None,
            "offset": offset[0] if offset else None,
            "mean": given[0] if given else None,
            "variance": given[1] if given else None,
            "residual": residual[0] if residual else None,
            "weights": weights[0] if weights else None,
        }
        self.options: dict[str, Any] = {
            "axis": op.get_attr("axis"),
            "epsilon": float(op.get_attr("epsilon")),
            "correction": float(op.get_attr("correction")),
            "factor": float(op.get_attr("exponential_avg_factor")),
            "activation": op.get_attr("activation").decode(),
        }


def _portable_gradient(
    dy: Tensor,
    x: Tensor,
    is_training: Any,
    dmean: Tensor,
    dvariance: Tensor,
    sources: list[Tensor],
    tensors: dict[str, Tensor | None],
    options: dict[str, Any],
) -> list[Tensor]:
    """Return the gradients of the composite with respect to `sources`, as a composite."""
    with tf.GradientTape() as tape:
        tape.watch(sources)
        arguments = {**tensors, **options}
        result = _portable.batch_norm(x, is_training=is_training, **arguments)
    gradients: list[Tensor] = tape.gradient(
        result[:3],
        sources,
        output_gradients=[dy, dmean, dvariance],
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    return gradients


def _wanted(op: Any, index: int) -> bool:
    """Whether anybody asks for the gradient of that input; a graph cannot know, and prunes."""
    return index not in (getattr(op, "skip_input_indices", None) or ())


@tf.RegisterGradient("FusebnBatchNorm")
def _batch_norm_gradient(
    op: Any, dy: Tensor, dmean: Tensor, dvariance: Tensor, _batch: Tensor, _count: Tensor
) -> list[Tensor | None]:
    x, is_training = op.inputs[:2]
    node = _Node(op, 2)
    scale, offset, given, residual, weights = node.lists
    dx, dscale, doffset, dgiven, dresidual = _library.fusebn_batch_norm_grad(
        dy=dy,
        x=x,
        batch=op.outputs[3],
        is_training=is_training,
        dmean=dmean,
        dvariance=dvariance,
        scale=scale,
        offset=offset,
        given=given,
        residual=residual,
        weights=weights,
        **_attributes(**node.options),
    )
    dweights: list[Tensor | None] = [None] * len(weights)
    if weights and _wanted(op, len(op.inputs) - 1):
        dweights = _portable_gradient(
            dy, x, is_training, dmean, dvariance, weights, node.tensors, node.options
        )
    return [dx, None, *dscale, *doffset, *dgiven, *dresidual, *dweights]


@tf.RegisterGradient("FusebnBatchNormGrad")
def _batch_norm_second_gradient(op: Any, *gradients: Tensor) -> list[Tensor | None]:
    dy, x, _, is_training, dmean, dvariance = op.inputs[:6]
    node = _Node(op, 6)
    sources = [dy, x, dmean, dvariance, *op.inputs[6:]]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        # In the order of the op's outputs: those of x and of the lists, but for the weights.
        of = [x, *(tensor for tensors in node.lists[:-1] for tensor in tensors)]
        first = _portable_gradient(
            dy, x, is_training, dmean, dvariance, of, node.tensors, node.options
        )
    ddy, dx, ddmean, ddvariance, *rest = tape.gradient(first, sources, output_gradients=gradients)
    # The statistics of the batch are a function of x, and counted there.
    return [ddy, dx, None, None, ddmean, ddvariance, *rest]


@tf.RegisterGradient("FusebnMoments")
def _moments_gradient(op: Any, dcount: Tensor, dmean: Tensor, dm2: Tensor) -> list[Tensor | None]:
    """dx = weight * (2 * (x - mean) * dm2 + dmean / count): a normalization, so ours does it."""
    x, *weights = op.inputs
    count, mean, _ = op.outputs
    begin, end = op.get_attr("begin"), op.get_attr("end")
    stat = tf.float64 if x.dtype == tf.float64 else tf.float32
    high = tf.cast(mean, stat)
    offset = tf.math.divide_no_nan(dmean, count) - 2 * dm2 * (mean - tf.cast(high, tf.float64))
    block, axis = x, begin
    if end - begin != 1:
        shape = tf.shape(x)
        outer, kept, inner = (
            tf.reduce_prod(part, keepdims=True)
            for part in (shape[:begin], shape[begin:end], shape[end:])
        )
        block, axis = tf.reshape(x, tf.concat([outer, kept, inner], 0)), 1
    dx = batch_norm(
        block,
        tf.cast(tf.reshape(2 * dm2, [-1]), stat),
        tf.cast(tf.reshape(offset, [-1]), stat),
        tf.reshape(high, [-1]),
        tf.ones_like(tf.reshape(high, [-1])),
        is_training=False,
        axis=axis,
        epsilon=0.0,
    ).y
    if end - begin != 1:
        dx = tf.reshape(dx, shape)
    if not weights:
        return [dx]
    w = tf.cast(weights[0], x.dtype)
    dx = tf.where(w > 0, w * dx, tf.zeros_like(dx))
    if not _wanted(op, 1):
        return [dx, None]
    axes = [axis for axis in range(x.shape.rank) if not begin <= axis < end]
    with tf.GradientTape() as tape:
        tape.watch(weights)
        result = _portable.moments(x, axes, weights[0])
    return [dx, *tape.gradient(result, weights, output_gradients=[dcount, dmean, dm2])]


def batch_norm_gradient(
    dy: Tensor,
    x: Tensor,
    batch: Tensor,
    dmean: Tensor,
    dvariance: Tensor,
    *,
    is_training: Any,
    scale: Tensor | None,
    offset: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return dx, dscale, doffset and dresidual, None for what is absent.

    `batch` holds the mean and biased variance that normalized x, and dmean and dvariance flow into
    these.
    """
    lists = [_optional(scale), _optional(offset), _optional(residual)]
    stat = dmean.dtype
    given = list(tf.unstack(tf.cast(batch, stat)))
    if why_portable(x):
        sources = [x, *(tensor for tensors in lists for tensor in tensors)]
        mean, variance = given
        tensors: dict[str, Tensor | None] = {
            "scale": scale,
            "offset": offset,
            "mean": mean,
            "variance": variance,
            "residual": residual,
            "weights": weights,
        }
        dx, *rest = _portable_gradient(
            dy, x, is_training, dmean, dvariance, sources, tensors, options
        )
        following = iter(rest)
        dscale, doffset, dresidual = ([next(following) for _ in tensors] for tensors in lists)
    else:
        dx, dscale, doffset, _, dresidual = _library.fusebn_batch_norm_grad(
            dy=dy,
            x=x,
            batch=batch,
            is_training=is_training,
            dmean=dmean,
            dvariance=dvariance,
            scale=lists[0],
            offset=lists[1],
            given=given,
            residual=lists[2],
            weights=_optional(weights),
            **_attributes(**options),
        )
    return (dx, *(some[0] if some else None for some in (dscale, doffset, dresidual)))
