"""The ops as `torch.library` knows them, so that compilers and exporters can see and move them.

``fusebn::batch_norm``, ``fusebn::batch_norm_backward`` and ``fusebn::moments``, each with what it
computes, the shapes of its results, its derivative, and what vmap makes of it.

Gradients of first order are kernels, but for those of the weights; these, and all gradients of
gradients, are PyTorch's of the composite in `_portable`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusebn.torch import _gpu, _kernels, _portable
from fusebn.torch._arguments import stat_type
from fusebn.torch._portable import NAMES, BatchNorm, Gradient, Options
from fusebn.torch._transforms import Op, Rule
from fusebn.torch._verbs import Normalization, rstd_of

_library = torch.library.Library("fusebn", "FRAGMENT")

# ---- what they are ----

_OPTIONS = (
    "*, bool training, int axis, float epsilon, float correction, float factor, str activation"
)
_TENSORS = (
    "Tensor x, Tensor? scale, Tensor? offset, Tensor? mean, Tensor? variance, Tensor? residual, "
    "Tensor? weights"
)
_SOURCES = NAMES[:6]  # of the gradients that `fusebn::batch_norm_backward` returns
_BACKWARD_NAMES = ("dy", "dmean", "dvariance", "batch", *NAMES)

for _schema in (
    f"batch_norm({_TENSORS}, {_OPTIONS}) "
    "-> (Tensor y, Tensor mean, Tensor variance, Tensor batch, Tensor count)",
    f"batch_norm_backward(Tensor dy, Tensor? dmean, Tensor? dvariance, Tensor batch, {_TENSORS}, "
    f"{_OPTIONS}) -> (Tensor dx, Tensor dscale, Tensor doffset, Tensor dmean, Tensor dvariance, "
    "Tensor dresidual)",
    "moments(Tensor x, Tensor? weights, *, int[] axes) -> (Tensor count, Tensor mean, Tensor m2)",
):
    _library.define(_schema, tags=torch.Tag.pt2_compliant_tag)


# ---- what they compute ----


def _in_line(*vectors: Tensor | None) -> Any:
    return (None if vector is None else vector.contiguous() for vector in vectors)


def _batch_norm_kernel(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    returned, batch, count = _statistics_of(x, options["axis"])
    if mean is not None and variance is not None and mean.dtype is not stat_type(x):
        for statistics in (returned, batch):
            statistics[0].copy_(mean)
            statistics[1].copy_(variance)
        y = _kernels.empty_like(x)
        _normalization(y, x, scale, offset, batch, residual, options).write(y)
        return y, *returned, batch, count.zero_()
    scale, offset, mean, variance = _in_line(scale, offset, mean, variance)
    y, total = _kernels.forward(
        x, scale, offset, mean, variance, residual, weights, Options(**options),
        returned[0], returned[1], batch.numpy(),
    )  # fmt: skip
    return y, *returned, batch, count.fill_(total)


@torch.library.register_fake("fusebn::batch_norm", lib=_library)
def _batch_norm_fake(x: Tensor, *_: Tensor | None, axis: int, **__: Any) -> tuple[Tensor, ...]:
    returned, batch, count = _statistics_of(x, axis)
    return torch.empty_like(x), *returned, batch, count


def _statistics_of(x: Tensor, axis: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return room for what `fusebn::batch_norm` says of the batch."""
    channels, stat = x.shape[axis], stat_type(x)
    returned = [x.new_empty([channels], dtype=stat) for _ in range(2)]
    batch = x.new_empty([2, channels], dtype=torch.float64)
    return returned, batch, x.new_empty([], dtype=torch.float64)


def _backward_kernel(
    dy: Tensor,
    dmean: Tensor | None,
    dvariance: Tensor | None,
    batch: Tensor,
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    vectors = _kernels.gradients_like(x, scale, offset, mean, variance)
    dresidual = x.new_empty(0) if residual is None else _kernels.empty_like(x)
    if mean is not None and mean.dtype is not stat_type(x):
        dx = _kernels.empty_like(x)
        normalization = _normalization(dx, x, scale, offset, batch, residual, options)
        dy = _kernels.beside(dx, dy)
        for room, found in zip(vectors, normalization.into_vectors(dy), strict=True):
            if room.numel():
                room.copy_(found)
        wanted_residual = None if residual is None else dresidual
        normalization.write_gradients(dy, None, 0, None, dx, wanted_residual)
        return dx, *vectors, dresidual
    wanted = [vector if vector.numel() else None for vector in vectors]
    dmean, dvariance, scale, offset = _in_line(dmean, dvariance, scale, offset)
    dx = _kernels.gradient(
        dy,
        dmean,
        dvariance,
        x,
        scale,
        offset,
        residual,
        weights,
        batch.numpy(),
        Options(**options),
        None if residual is None else dresidual,
        *wanted,
    )
    return dx, *vectors, dresidual


@torch.library.register_fake("fusebn::batch_norm_backward", lib=_library)
def _backward_fake(
    dy: Tensor,
    dmean: Tensor | None,
    dvariance: Tensor | None,
    batch: Tensor,
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    dresidual = x.new_empty([0]) if residual is None else torch.empty_like(x)
    vectors = _kernels.gradients_like(x, scale, offset, mean, variance)
    return torch.empty_like(x), *vectors, dresidual


def _normalization(
    out: Tensor,
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    batch: Tensor,
    residual: Tensor | None,
    options: dict[str, Any],
) -> Normalization:
    """Return a normalization by statistics that are wider than the compositions of verbs take."""
    rstd = rstd_of(batch[1], options["epsilon"])
    return Normalization(out, x, batch[0], rstd, scale, offset, residual, Options(**options))


def _moments_kernel(x: Tensor, weights: Tensor | None, *, axes: list[int]) -> tuple[Tensor, ...]:
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    shape = [x.shape[axis] for axis in kept]
    if len(kept) != 1:  # made one, in front
        x = x.permute(*kept, *axes).reshape(math.prod(shape), *(x.shape[axis] for axis in axes))
        if weights is not None:
            weights = weights.permute(*kept, *axes)
            weights = weights.reshape(1, *weights.shape[len(kept) :])
    verb = _gpu.moments if _gpu.serves(x) else _kernels.moments
    count, mean, m2 = verb(x, kept[0] if len(kept) == 1 else 0, weights)
    return count, mean.reshape(shape), m2.reshape(shape)


@torch.library.register_fake("fusebn::moments", lib=_library)
def _moments_fake(x: Tensor, weights: Tensor | None, *, axes: list[int]) -> tuple[Tensor, ...]:
    shape = [n for axis, n in enumerate(x.shape) if axis not in axes]
    return tuple(x.new_empty(of, dtype=torch.float64) for of in ([], shape, shape))


# ---- derivatives ----


def _save(ctx: Any, inputs: Any, keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[3])
    ctx.options = Options(**keyword_only_inputs)


def _first(ctx: Any, dy: Any, dmean: Any, dvariance: Any, *_: Any) -> tuple[Tensor | None, ...]:
    """The backward of `fusebn::batch_norm`, differentiable in its turn."""
    *inputs, batch = ctx.saved_tensors
    return gradients(dy, dmean, dvariance, batch, inputs, ctx.options, ctx.needs_input_grad)


def gradients(
    dy: Tensor | None,
    dmean: Tensor | None,
    dvariance: Tensor | None,
    batch: Tensor,
    inputs: list[Tensor | None],
    options: Options,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, scale, offset, mean, variance, residual and weights if needed."""
    if dy is None and dmean is None and dvariance is None:
        return (None,) * len(NAMES)
    x, *_, weights = inputs
    assert x is not None
    dy = torch.zeros_like(x) if dy is None else dy
    found = batch_norm_backward(dy, dmean, dvariance, batch, *inputs, **options._asdict())
    dweights = None
    if needed[6] and weights is not None:
        tensors = dict(zip(NAMES, inputs, strict=True))
        (dweights,) = _portable.gradient(dy, dmean, dvariance, tensors, options, ["weights"])
    kept = (value if wanted else None for value, wanted in zip(found, needed, strict=False))
    return *kept, dweights


def _save_backward(ctx: Any, inputs: Any, keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.set_materialize_grads(False)
    dy, dmean, dvariance, _, *tensors = inputs
    ctx.save_for_backward(dy, dmean, dvariance, *tensors)
    ctx.options = Options(**keyword_only_inputs)


def _second(ctx: Any, *flowing: Tensor | None) -> tuple[Tensor | None, ...]:
    """The backward of `fusebn::batch_norm_backward`: the composite's, to any order.

    The statistics of the batch are a function of x, and counted there.
    """
    options = ctx.options
    given = dict(zip(("dy", "dmean", "dvariance", *NAMES), ctx.saved_tensors, strict=True))
    sources = [name for name in _SOURCES if given[name] is not None]
    variables = [name for name, value in given.items() if value is not None]

    def first(*values: Tensor) -> tuple[Tensor, ...]:
        now = {**given, **dict(zip(variables, values, strict=True))}
        dy, dmean, dvariance = (now.pop(name) for name in ("dy", "dmean", "dvariance"))
        return _portable.gradient(dy, dmean, dvariance, now, options, sources)

    found, back = torch.func.vjp(  # type: ignore[misc]
        first, *(given[name] for name in variables)
    )
    by_name = dict(zip(_SOURCES, flowing, strict=True))
    cotangents = tuple(
        torch.zeros_like(value) if by_name[name] is None else by_name[name]
        for name, value in zip(sources, found, strict=True)
    )
    results = dict(zip(variables, back(cotangents), strict=True))
    into = [results.get(name) for name in ("dy", "dmean", "dvariance")]
    return *into, None, *(results.get(name) for name in NAMES)


def _save_moments(ctx: Any, inputs: Any, keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output[:2])
    ctx.axes = keyword_only_inputs["axes"]


def _first_of_moments(
    ctx: Any, dcount: Tensor | None, dmean: Tensor | None, dm2: Tensor | None
) -> tuple[Tensor | None, ...]:
    """dx = weight * (2 * (x - mean) * dm2 + dmean / count): a normalization, so ours does it."""
    x, weights, count, mean = ctx.saved_tensors
    zeros = torch.zeros_like(mean)
    dmean, dm2 = (zeros if flow is None else flow for flow in (dmean, dm2))
    dx = dweights = None
    if ctx.needs_input_grad[0]:
        kept = [axis for axis in range(x.ndim) if axis not in ctx.axes]
        order = [*kept, *ctx.axes]
        front = x.permute(order)
        # One axis for all that is kept; a view if that is one axis already.
        merged = front.reshape(mean.numel(), *front.shape[len(kept) :])
        stat = stat_type(x)
        high = mean.to(stat)
        n = torch.where(count > 0, count, 1)
        offset = dmean / n - 2 * dm2 * (mean - high.double())
        dx, *_ = batch_norm(
            merged,
            (2 * dm2).to(stat).reshape(-1),
            offset.to(stat).reshape(-1),
            high.reshape(-1),
            torch.ones_like(high).reshape(-1),
            None,
            None,
            **Options(False, 0, 0.0, 0.0, 1.0, "identity")._asdict(),
        )
        dx = dx.reshape(front.shape).permute([order.index(axis) for axis in range(x.ndim)])
        if weights is not None:
            dx = torch.where(weights > 0, dx * weights, 0).to(x.dtype)
    if weights is not None and ctx.needs_input_grad[1]:
        _, back = torch.func.vjp(  # type: ignore[misc]
            lambda w: _portable.moments(x, ctx.axes, w), weights
        )
        dcount = torch.zeros_like(count) if dcount is None else dcount
        (dweights,) = back((dcount, dmean, dm2))
    return dx, dweights


# ---- the composites ----


def _composite(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    return _portable.batch_norm(*tensors, Options(**options))  # type: ignore[call-arg, arg-type]


def _composite_backward(
    dy: Tensor,
    dmean: Tensor | None,
    dvariance: Tensor | None,
    batch: Tensor,
    *tensors: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    x = tensors[0]
    assert x is not None
    given = dict(zip(NAMES, tensors, strict=True))
    sources = [name for name in _SOURCES if given[name] is not None]
    found = _portable.gradient(dy, dmean, dvariance, given, Options(**options), sources)
    by_name = dict(zip(sources, found, strict=True))
    return tuple(by_name.get(name, x.new_empty(0)) for name in _SOURCES)


def _composite_moments(x: Tensor, weights: Tensor | None, *, axes: list[int]) -> tuple[Tensor, ...]:
    return _portable.moments(x, axes, weights)


# ---- on which device ----


def _implement(name: str, on_cpu: Any, on_gpu: Any, composite: Any) -> None:
    """Register what computes an op.

    On a CUDA device where no kernels are wanted it is the composite, for programs that were
    exported elsewhere.
    """

    def beside_gpu(otherwise: Any) -> Any:
        def implementation(first: Tensor, *tensors: Tensor | None, **options: Any) -> Any:
            way = on_gpu if _gpu.serves(first) else otherwise
            return way(first, *tensors, **options)

        return implementation

    for device, way in (("CPU", on_cpu), ("CUDA", composite)):
        torch.library.impl(f"fusebn::{name}", device, lib=_library)(beside_gpu(way))


_implement("batch_norm", _batch_norm_kernel, _gpu.batch_norm, _composite)
_implement("batch_norm_backward", _backward_kernel, _gpu.batch_norm_backward, _composite_backward)
_implement("moments", _moments_kernel, _moments_kernel, _composite_moments)


# ---- vmap ----


def _loop(op: Any, size: int, in_dims: Any, tensors: Any, options: Any) -> Any:
    """Call the op once for each element: for weights that differ, which no channel can have."""
    results = [
        op(
            *(
                value if dim is None else value.select(dim, i)
                for value, dim in zip(tensors, in_dims, strict=True)
            ),
            **options,
        )
        for i in range(size)
    ]
    stacked = tuple(torch.stack(values) for values in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _folding(names: tuple[str, ...], outputs: tuple[str, ...]) -> Rule:
    """Return the rule of an op with these tensors: what is mapped over joins the channels."""

    def rule(op: Any, size: int, in_dims: Any, tensors: Any, options: dict[str, Any]) -> Any:
        axis, dims = options["axis"], dict(zip(names, in_dims, strict=True))
        if dims["weights"] is not None:
            return _loop(op, size, in_dims, tensors, options)

        def folded(name: str, value: Tensor | None) -> Tensor | None:
            if value is None or name == "weights":
                return value
            at = _channels_of(name, axis)
            if dims[name] is not None:
                return value.movedim(dims[name], at).flatten(at, at + 1)
            shape = [*value.shape[:at], size, *value.shape[at:]]
            return value.unsqueeze(at).expand(shape).flatten(at, at + 1)

        given = dict(zip(names, tensors, strict=True))
        results = op(*(folded(name, given[name]) for name in names), **options)
        unfolded, out_dims = [], []
        for name, value in zip(outputs, results, strict=True):
            at = _channels_of(name, axis)
            # One for all: the count, and what stands for the gradient of a tensor that is not.
            whole = name == "count" or (name[0] == "d" and given[name[1:]] is None)
            if not whole:
                value = value.unflatten(at, (size, value.shape[at] // size))
            unfolded.append(value)
            out_dims.append(None if whole else at)
        return tuple(unfolded), tuple(out_dims)

    return rule


def _channels_of(name: str, axis: int) -> int:
    """Return the axis along which a tensor of the ops has its channels."""
    if name == "batch":
        return 1
    return axis if name in ("x", "y", "residual", "dx", "dy", "dresidual") else 0


def _moments_rule(op: Any, size: int, in_dims: Any, tensors: Any, options: Any) -> Any:
    """What is mapped over is kept, in front."""
    (dim, weights_dim), (x, weights) = in_dims, tensors
    if weights_dim is not None:
        return _loop(op, size, in_dims, tensors, options)
    weights = None if weights is None else weights.unsqueeze(0)
    axes = [axis + 1 for axis in options["axes"]]
    return op(x.movedim(dim, 0), weights, axes=axes), (None, 0, 0)


# ---- the ops ----

batch_norm = Op(
    "batch_norm", _save, _first, _composite, _folding(NAMES, BatchNorm._fields), _library
)
batch_norm_backward = Op(
    "batch_norm_backward", _save_backward, _second, _composite_backward,
    _folding(_BACKWARD_NAMES, Gradient._fields), _library,
)  # fmt: skip
moments = Op(
    "moments", _save_moments, _first_of_moments, _composite_moments, _moments_rule, _library
)
