"""The ops of PyTorch over the core: registered, called, and their derivatives.

There are two ways to the same kernels. `torch.library` knows them as ``fusebn::batch_norm`` and
``fusebn::batch_norm_backward``, so that compilers, exporters and ``torch.func`` can see and move
them. A plain tensor in eager mode takes the short way, `_Eager`, which spares the dispatcher.

Gradients of first order are kernels, but for those of the weights; these, and all gradients of
gradients, are PyTorch's of the composite in `_portable`.

Every tensor that arrives here has been checked: parameters and statistics are vectors in the type
of the statistics, weights have the rank of x and length 1 for the channels.
"""

import math
import os
from typing import Any

import torch
from torch import Tensor

from fusebn import _core, _spec, memory
from fusebn.torch import _native, _portable
from fusebn.torch._arguments import ELEMENTS, stat_type
from fusebn.torch._portable import BatchNorm, Gradient, Options

# ---- tensors as blocks ----

_ACTIVATIONS = {name or "identity": code for name, code in _spec.ACTIVATIONS.items()}


def _empty_like(x: Tensor) -> Tensor:
    """Return an uninitialized tensor as torch.empty_like does, of recycled memory if it is large.

    It is dense whatever x is, in the order of x's strides.
    """
    size = x.numel() * x.element_size()
    if size < memory.LEAST or not _core.pool_limit():
        return torch.empty_like(x)
    strides = x.stride() if _is_dense(x) else torch.empty_like(x, device="meta").stride()
    bytes = torch.from_numpy(_core.empty(size))
    return bytes.view(x.dtype).as_strided(x.shape, strides)


def _is_dense(x: Tensor) -> bool:
    """Say whether the elements of x fill one piece of memory, in whatever order of the axes."""
    return x.is_contiguous() or torch._prims_common.is_non_overlapping_and_dense(x)


def _as(y: Tensor, x: Tensor) -> Tensor:
    """Return x as it must lie in memory beside y: itself, or a copy."""
    return x if x.stride() == y.stride() else torch.empty_like(y).copy_(x)


def _block(y: Tensor, axis: int) -> tuple[int, int, int]:
    """Return outer, channels and inner of a dense tensor: the stride of its channels is inner."""
    channels, total = y.shape[axis], y.numel()
    inner = (y.stride(axis) if channels > 1 else total) if total else 1
    return (total // (channels * inner) if total else 0), channels, inner


def _positions(y: Tensor, weights: Tensor, axis: int) -> Tensor:
    """Lay out weights in the order of y's memory, one for each position."""
    if weights.numel():
        least, most = (bound.item() for bound in weights.aminmax())
        if not (least >= 0 and most < math.inf):
            got = f"{least if least < 0 else most}"
            _spec.fail(ValueError, "batch_norm", "weights", "be finite and not negative", got)
    shape = [1 if i == axis else n for i, n in enumerate(y.shape)]
    order = sorted(range(y.ndim), key=lambda i: -y.stride(i))
    return weights.expand(shape).permute(order).contiguous()


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# ---- threads ----

_follows_torch = not os.environ.get("FUSEBN_NUM_THREADS")


def _threads() -> None:
    """Use as many threads as PyTorch does, unless the environment says how many."""
    if _follows_torch and _core.get_num_threads() != torch.get_num_threads():
        _core.set_num_threads(torch.get_num_threads())


# ---- the kernels ----


def _forward(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    options: Options,
    mean_out: Tensor | None,
    variance_out: Tensor | None,
    batch: Tensor | None,
) -> tuple[Tensor, float]:
    """Return y and the batch's count; fill what is given to be filled."""
    training, axis, epsilon, correction, factor, activation = options
    y = _empty_like(x)
    x = _as(y, x)
    if residual is not None:
        residual = _as(y, residual)
    if weights is not None:
        weights = _positions(y, weights, axis)
    _threads()
    count = _core.forward(
        ELEMENTS[x.dtype],
        *_block(y, axis),
        x.data_ptr(),
        training,
        _address(mean),
        _address(variance),
        _address(weights),
        _address(scale),
        _address(offset),
        _address(residual),
        _ACTIVATIONS[activation],
        epsilon,
        correction,
        factor,
        y.data_ptr(),
        _address(mean_out),
        _address(variance_out),
        _address(batch),
    )
    if count < 0:
        assert variance is not None
        got = f"{variance.min().item()}"
        _spec.fail(ValueError, "batch_norm", "variance", "not be negative", got)
    return y, count


def _gradient(
    dy: Tensor,
    dmean: Tensor | None,
    dvariance: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    batch: Tensor,
    options: Options,
    dresidual: Tensor | None,
    dscale: Tensor | None,
    doffset: Tensor | None,
    dgiven_mean: Tensor | None = None,
    dgiven_variance: Tensor | None = None,
) -> Tensor:
    """Return dx; fill what is given to be filled, dresidual a tensor that lies as x does."""
    training, axis, epsilon, correction, factor, activation = options
    dx = _empty_like(x)
    dy, x = _as(dx, dy), _as(dx, x)
    if residual is not None:
        residual = _as(dx, residual)
    if weights is not None:
        weights = _positions(dx, weights, axis)
    _threads()
    _core.gradient(
        ELEMENTS[x.dtype],
        *_block(dx, axis),
        dy.data_ptr(),
        x.data_ptr(),
        training,
        batch.data_ptr(),
        batch[1].data_ptr(),
        _address(weights),
        _address(scale),
        _address(offset),
        _address(residual),
        _ACTIVATIONS[activation],
        epsilon,
        _address(dmean),
        _address(dvariance),
        correction,
        factor,
        dx.data_ptr(),
        _address(dresidual),
        _address(dscale),
        _address(doffset),
        _address(dgiven_mean),
        _address(dgiven_variance),
    )
    return dx


def _vector(of: Tensor | None, x: Tensor) -> Tensor | None:
    return None if of is None else x.new_empty(of.shape, dtype=stat_type(x))


# ---- the ops ----

_library = torch.library.Library("fusebn", "FRAGMENT")
_OPTIONS = (
    "*, bool training, int axis, float epsilon, float correction, float factor, str activation"
)
_TENSORS = (
    "Tensor x, Tensor? scale, Tensor? offset, Tensor? mean, Tensor? variance, Tensor? residual, "
    "Tensor? weights"
)
_library.define(
    f"batch_norm({_TENSORS}, {_OPTIONS}) "
    "-> (Tensor y, Tensor mean, Tensor variance, Tensor batch, Tensor count)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    f"batch_norm_backward(Tensor dy, Tensor? dmean, Tensor? dvariance, Tensor batch, "
    f"{_TENSORS}, {_OPTIONS}) -> (Tensor dx, Tensor dscale, Tensor doffset, Tensor dmean, "
    "Tensor dvariance, Tensor dresidual)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("fusebn::batch_norm", "CPU", lib=_library)
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
    channels, stat = x.shape[options["axis"]], stat_type(x)
    returned = [x.new_empty(channels, dtype=stat) for _ in range(2)]
    batch = x.new_empty((2, channels), dtype=torch.float64)
    y, count = _forward(
        x, scale, offset, mean, variance, residual, weights, Options(**options), *returned, batch
    )
    return y, *returned, batch, x.new_full((), count, dtype=torch.float64)


@torch.library.register_fake("fusebn::batch_norm", lib=_library)
def _batch_norm_fake(x: Tensor, *_: Tensor | None, axis: int, **__: Any) -> tuple[Tensor, ...]:
    channels, stat = x.shape[axis], stat_type(x)
    returned = [x.new_empty([channels], dtype=stat) for _ in range(2)]
    batch = x.new_empty([2, channels], dtype=torch.float64)
    return torch.empty_like(x), *returned, batch, x.new_empty([], dtype=torch.float64)


def _gradients_like(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
) -> list[Tensor]:
    none = x.new_empty([0], dtype=stat_type(x))
    return [torch.empty_like(none if of is None else of) for of in (scale, offset, mean, variance)]


@torch.library.impl("fusebn::batch_norm_backward", "CPU", lib=_library)
def _batch_norm_backward_kernel(
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
    vectors = _gradients_like(x, scale, offset, mean, variance)
    wanted = [vector if vector.numel() else None for vector in vectors]
    dresidual = x.new_empty(0) if residual is None else _empty_like(x)
    dx = _gradient(
        dy,
        dmean,
        dvariance,
        x,
        scale,
        offset,
        residual,
        weights,
        batch,
        Options(**options),
        None if residual is None else dresidual,
        *wanted,
    )
    return dx, *vectors, dresidual


@torch.library.register_fake("fusebn::batch_norm_backward", lib=_library)
def _batch_norm_backward_fake(
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
    vectors = _gradients_like(x, scale, offset, mean, variance)
    return torch.empty_like(x), *vectors, dresidual


# ---- derivatives of the ops ----

_NAMES = ("x", "scale", "offset", "mean", "variance", "residual", "weights")


def _save(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[3])
    ctx.options = Options(**keyword_only_inputs)


def _first(ctx: Any, dy: Any, dmean: Any, dvariance: Any, *_: Any) -> tuple[Tensor | None, ...]:
    """The backward of `fusebn::batch_norm`, differentiable in its turn."""
    *inputs, batch = ctx.saved_tensors
    return _through_op(dy, dmean, dvariance, batch, inputs, ctx.options, ctx.needs_input_grad)


def _through_op(
    dy: Tensor | None,
    dmean: Tensor | None,
    dvariance: Tensor | None,
    batch: Tensor,
    inputs: list[Tensor | None],
    options: Options,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    if dy is None and dmean is None and dvariance is None:
        return (None,) * len(_NAMES)
    assert inputs[0] is not None
    dy = torch.zeros_like(inputs[0]) if dy is None else dy
    found = torch.ops.fusebn.batch_norm_backward(
        dy, dmean, dvariance, batch, *inputs, **options._asdict()
    )
    gradients = [
        gradient if wanted else None for gradient, wanted in zip(found, needed, strict=False)
    ]
    return *gradients, _of_weights(dy, dmean, dvariance, inputs, options, needed[6])


def _of_weights(
    dy: Tensor,
    dmean: Tensor | None,
    dvariance: Tensor | None,
    inputs: list[Tensor | None],
    options: Options,
    needed: bool,
) -> Tensor | None:
    if not needed or inputs[6] is None:
        return None
    tensors = dict(zip(_NAMES, inputs, strict=True))
    return _portable.gradient(dy, dmean, dvariance, tensors, options, ["weights"])[0]


def _save_backward(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    dy, dmean, dvariance, _, *tensors = inputs
    ctx.save_for_backward(dy, dmean, dvariance, *tensors)
    ctx.options = Options(**keyword_only_inputs)


def _second(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The backward of `fusebn::batch_norm_backward`: the composite's, to any order.

    The statistics of the batch are a function of x, and counted there.
    """
    options = ctx.options
    given = dict(zip(("dy", "dmean", "dvariance", *_NAMES), ctx.saved_tensors, strict=True))
    tensors = {name: given[name] for name in _NAMES}
    sources = [name for name in _NAMES[:6] if tensors[name] is not None]
    variables = [name for name, value in given.items() if value is not None]

    def first(*values: Tensor) -> tuple[Tensor, ...]:
        now = {**given, **dict(zip(variables, values, strict=True))}
        flowing = [now.pop(name) for name in ("dy", "dmean", "dvariance")]
        return _portable.gradient(*flowing, now, options, sources)

    found, back = torch.func.vjp(first, *(given[name] for name in variables))
    flowing = [gradients[_NAMES.index(name)] for name in sources]
    cotangents = tuple(
        torch.zeros_like(value) if flow is None else flow
        for value, flow in zip(found, flowing, strict=True)
    )
    results = dict(zip(variables, back(cotangents), strict=True))
    dys = [results.get(name) for name in ("dy", "dmean", "dvariance")]
    return *dys, None, *(results.get(name) for name in _NAMES)


torch.library.register_autograd("fusebn::batch_norm", _first, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "fusebn::batch_norm_backward", _second, setup_context=_save_backward, lib=_library
)


# ---- vmap: what is mapped over becomes part of the channels ----


def _loop(op: Any, batch_size: int, in_dims: Any, arguments: Any, options: Any) -> Any:
    """Call the op once for each element: for weights that differ, which no channel can have."""
    results = [
        op(
            *(
                value if dim is None else value.select(dim, i)
                for value, dim in zip(arguments, in_dims, strict=True)
            ),
            **options,
        )
        for i in range(batch_size)
    ]
    stacked = tuple(torch.stack(values) for values in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _folding(op: Any, names: tuple[str, ...]) -> Any:
    """Return the vmap rule of an op with tensors of these names."""

    def rule(info: Any, in_dims: Any, *arguments: Tensor | None, **options: Any) -> Any:
        size, axis = info.batch_size, options["axis"]
        dims = dict(zip(names, in_dims, strict=True))
        if dims["weights"] is not None:
            return _loop(op, size, in_dims, arguments, options)

        def folded(name: str, value: Tensor | None) -> Tensor | None:
            if value is None or name == "weights":
                return value
            at = axis if name in ("x", "dy", "residual") else 1 if name == "batch" else 0
            dim = dims[name]
            shape = [*value.shape[:at], size, *value.shape[at:]]
            apart = value.unsqueeze(at).expand(shape) if dim is None else value.movedim(dim, at)
            return apart.flatten(at, at + 1)

        results = op(*map(folded, names, arguments), **options)
        unfolded, out_dims = [], []
        for name, value in zip(_OUTPUTS[len(names)], results, strict=True):
            at = axis if name in ("y", "dx", "dresidual") else 1 if name == "batch" else 0
            whole = name == "count" or not value.numel() or value.ndim <= at
            out_dims.append(None if whole else at)
            unfolded.append(value if whole else value.unflatten(at, (size, -1)))
        return tuple(unfolded), tuple(out_dims)

    return rule


_BACKWARD_NAMES = ("dy", "dmean", "dvariance", "batch", *_NAMES)
_OUTPUTS = {len(_NAMES): BatchNorm._fields, len(_BACKWARD_NAMES): Gradient._fields}
torch.library.register_vmap(
    "fusebn::batch_norm", _folding(torch.ops.fusebn.batch_norm, _NAMES), lib=_library
)
torch.library.register_vmap(
    "fusebn::batch_norm_backward",
    _folding(torch.ops.fusebn.batch_norm_backward, _BACKWARD_NAMES),
    lib=_library,
)


# ---- the short way ----


class _Eager(torch.autograd.Function):
    """`fusebn::batch_norm` for plain tensors in eager mode."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        offset: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        residual: Tensor | None,
        weights: Tensor | None,
        options: Options,
        mean_out: Tensor | None,
        variance_out: Tensor | None,
        returned: bool,
    ) -> Any:
        """Return y, and the tensors for the statistics if they are to be returned."""
        batch = x.new_empty((2, x.shape[options.axis]), dtype=torch.float64)
        y, _ = _forward(
            x, scale, offset, mean, variance, residual, weights, options, mean_out, variance_out,
            batch,
        )  # fmt: skip
        if options.training and not returned:
            # They may be what has just been overwritten, and nothing depends on them.
            mean = variance = None
        ctx.save_for_backward(x, scale, offset, mean, variance, residual, weights, batch)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return (y, mean_out, variance_out) if returned else y

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dy: Tensor | None, dmean: Tensor | None = None, dvariance: Tensor | None = None
    ) -> Any:
        """Return the gradients: by the op where they are to be differentiated again."""
        *inputs, batch = ctx.saved_tensors
        options, needed = ctx.options, ctx.needs_input_grad
        if torch.is_grad_enabled() or dy is None or needed[3] or needed[4]:
            found = _through_op(dy, dmean, dvariance, batch, inputs, options, needed)
            return *found, None, None, None, None
        x, scale, offset, _, _, residual, weights = inputs
        dscale = _vector(scale, x) if needed[1] else None
        doffset = _vector(offset, x) if needed[2] else None
        # Without an activation the residual's gradient is dy.
        masked = needed[5] and options.activation != "identity"
        dresidual = _empty_like(x) if masked else None
        dx = _gradient(
            dy, dmean, dvariance, x, scale, offset, residual, weights, batch, options, dresidual,
            dscale, doffset,
        )  # fmt: skip
        if needed[5] and not masked:
            dresidual = dy
        dweights = _of_weights(dy, dmean, dvariance, inputs, options, needed[6])
        return dx, dscale, doffset, None, None, dresidual, dweights, None, None, None, None


def _is_plain(x: Tensor) -> bool:
    """Say whether nobody but autograd watches what is done with x."""
    return not (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
    )


def batch_norm(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, mean and variance, all differentiable."""
    if not x.is_cpu:
        return _native.batch_norm(x, scale, offset, mean, variance, residual, weights, options)
    if not _is_plain(x):
        tensors = (x, scale, offset, mean, variance, residual, weights)
        y, mean, variance, *_ = torch.ops.fusebn.batch_norm(*tensors, **options._asdict())
        return y, mean, variance
    channels, stat = x.shape[options.axis], stat_type(x)
    outs = x.new_empty(channels, dtype=stat), x.new_empty(channels, dtype=stat)
    if torch.is_grad_enabled():
        return _Eager.apply(
            x, scale, offset, mean, variance, residual, weights, options, *outs, True
        )
    y, _ = _forward(x, scale, offset, mean, variance, residual, weights, options, *outs, None)
    return y, *outs


def batch_norm_updating(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    options: Options,
) -> Tensor:
    """Return y, and in training write the returned statistics over the given ones.

    A batch of count 0 leaves them as they are.
    """
    if not x.is_cpu:
        return _native.batch_norm_updating(
            x, scale, offset, mean, variance, residual, weights, options
        )
    updates = options.training and mean is not None
    # The core reads and writes them as they lie. With factor 1 it would not read what was given,
    # and write NaN for a batch of count 0.
    fit = mean is None or (_is_vector(mean, x) and _is_vector(variance, x))
    keeps = (weights is None and x.numel()) or options.factor != 1
    if not _is_plain(x) or not fit or (updates and not keeps):
        return _updating_through_op(
            x, scale, offset, mean, variance, residual, weights, options, updates
        )
    outs = (mean, variance) if updates else (None, None)
    if torch.is_grad_enabled():
        y = _Eager.apply(x, scale, offset, mean, variance, residual, weights, options, *outs, False)
    else:
        y, _ = _forward(x, scale, offset, mean, variance, residual, weights, options, *outs, None)
    if updates:
        torch.autograd.graph.increment_version(outs)
    return y


def _is_vector(tensor: Tensor | None, x: Tensor) -> bool:
    """Say whether the core can write to it."""
    return tensor is not None and tensor.dtype is stat_type(x) and tensor.is_contiguous()


def _updating_through_op(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    options: Options,
    updates: bool,
) -> Tensor:
    stat = stat_type(x)
    given = [None if of is None else of.detach().to(stat) for of in (mean, variance)]
    y, *returned, _, count = torch.ops.fusebn.batch_norm(
        x, scale, offset, *given, residual, weights, **options._asdict()
    )
    if updates:
        assert mean is not None
        assert variance is not None
        with torch.no_grad():
            for old, new in zip((mean, variance), returned, strict=True):
                new = new.detach().to(old.dtype)
                old.copy_(new if options.factor != 1 else torch.where(count > 0, new, old))
    return y
