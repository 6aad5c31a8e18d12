"""The core on tensors of the CPU: how a tensor becomes a block, and the calls.

A tensor is taken as it lies, in whatever order its axes are; a copy is made of what is not dense.
Every tensor that arrives here has been checked: parameters and statistics are contiguous vectors in
the type of the statistics, weights have the rank of x and length 1 for the channels.
"""

import ctypes
import math
import os
from typing import Any, NoReturn

import torch
from torch import Tensor

from fusebn import _core, _spec
from fusebn.torch._arguments import ELEMENTS, stat_type
from fusebn.torch._portable import Options

ACTIVATIONS = {name or "identity": code for name, code in _spec.ACTIVATIONS.items()}

# ---- tensors as blocks ----


# Below this PyTorch's allocator hands out what was freed last, still in a core's cache: worth more
# than recycled pages. From the pool a layer of 3 or 6 MB took a fourth to a half
# longer (Intel Xeon, forward, warm memory).
POOLED = 8 << 20


def empty_like(x: Tensor) -> Tensor:
    """Return an uninitialized tensor as torch.empty_like does, of recycled memory if it is large.

    It is dense whatever x is, in the order of x's strides.
    """
    size = x.numel() * x.element_size()
    if size < POOLED or not _core.pool_limit():
        return torch.empty_like(x)
    strides = x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()
    bytes = torch.from_numpy(_core.empty(size))
    # Detached: autograd lets nobody change in place what a Function returned as a view.
    return bytes.view(x.dtype).as_strided(x.shape, strides).detach()


def beside(y: Tensor, x: Tensor) -> Tensor:
    """Return x as it must lie in memory beside y: itself, or a copy."""
    return x if x.stride() == y.stride() else torch.empty_like(y).copy_(x)


def block(y: Tensor, axis: int) -> tuple[int, int, int]:
    """Return outer, channels and inner of a dense tensor: the stride of its channels is inner."""
    channels, total = y.shape[axis], y.numel()
    if not total:
        return 0, channels, 1
    inner = y.stride(axis) if channels > 1 else total
    return total // (channels * inner), channels, inner


def positions(operation: str, y: Tensor, weights: Tensor, axis: int) -> Tensor:
    """Lay out weights in the order of y's memory, one for each position."""
    weights = weights.expand([1 if i == axis else n for i, n in enumerate(y.shape)])
    if weights.numel() and weights.is_cpu:  # what another device has, would have to be waited for
        least, most = (bound.item() for bound in weights.aminmax())
        if not (least >= 0 and most < math.inf):
            got = f"{least if least < 0 else most}"
            _spec.fail(ValueError, operation, "weights", "be finite and not negative", got)
    order = sorted(range(y.ndim), key=y.stride, reverse=True)
    return weights.permute(order).contiguous()


def gradients_like(x: Tensor, *vectors: Tensor | None) -> list[Tensor]:
    """Return room for the gradients of vectors, of no elements for those that are None."""
    return [
        x.new_empty([0], dtype=stat_type(x))
        if of is None
        else x.new_empty(of.shape, dtype=of.dtype)
        for of in vectors
    ]


def address(tensor: Tensor | None) -> int | None:
    """Return where a tensor's elements lie; None for None."""
    return None if tensor is None else tensor.data_ptr()


# ---- threads ----

_follows_torch = not os.environ.get("FUSEBN_NUM_THREADS")


def openmp() -> int:
    """Return where PyTorch's OpenMP runtime starts its threads, or 0 if it has none."""
    # What the library depends on is searched too, so that this is the runtime PyTorch uses.
    start: Any = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
    return ctypes.cast(start, ctypes.c_void_p).value or 0


if _follows_torch:
    _core.lend_threads(openmp())


def follow_threads() -> None:
    """Use as many threads as PyTorch does, and its own, unless the environment says how many."""
    if _follows_torch and _core.get_num_threads() != torch.get_num_threads():
        _core.set_num_threads(torch.get_num_threads())


# ---- the calls ----


def forward(
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
    batch: Any,
) -> tuple[Tensor, float]:
    """Return y and the batch's count; fill what is given to be filled.

    `batch`, a NumPy array of float64 [2, channels], gets the mean and biased variance that
    normalized x.
    """
    training, axis, epsilon, correction, factor, activation = options
    y = empty_like(x)
    if not x.is_contiguous():
        x = beside(y, x)
    if residual is not None:
        residual = beside(y, residual)
    if weights is not None:
        weights = positions("batch_norm", y, weights, axis)
    follow_threads()
    count = _core.forward(
        ELEMENTS[x.dtype],
        *block(y, axis),
        x.data_ptr(),
        training,
        address(mean),
        address(variance),
        address(weights),
        address(scale),
        address(offset),
        address(residual),
        ACTIVATIONS[activation],
        epsilon,
        correction,
        factor,
        y.data_ptr(),
        address(mean_out),
        address(variance_out),
        batch,
        lent=True,
    )
    if count < 0:
        _negative(variance)
    return y, count


def forward_of_plain(
    x: Tensor,
    y: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    residual: Tensor | None,
    options: Options,
    batch: Any,
) -> bool:
    """Do what `forward` does, and check in the same call that these are plain vectors and alike.

    Returns False, and has done nothing, if they are not. In training mean and variance are
    overwritten by what they are mixed into.
    """
    if _EXCHANGE_API is None:
        return False
    training, axis, epsilon, correction, factor, activation = options
    follow_threads()
    count = _core.forward_of_tensors(
        _EXCHANGE_API, x, y, axis, training, mean, variance, scale, offset, residual,
        ACTIVATIONS[activation], epsilon, correction, factor, batch,
    )  # fmt: skip
    if count is not None and count < 0:
        _negative(variance)
    return count is not None


# PyTorch has it from 2.10 on.
_EXCHANGE_API: object = getattr(Tensor, "__dlpack_c_exchange_api__", None)


def _negative(variance: Tensor | None) -> NoReturn:
    assert variance is not None
    got = f"{variance.min().item()}"
    _spec.fail(ValueError, "batch_norm", "variance", "not be negative", got)


def gradient(
    dy: Tensor,
    dmean: Tensor | None,
    dvariance: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    residual: Tensor | None,
    weights: Tensor | None,
    batch: Any,
    options: Options,
    dresidual: Tensor | None,
    dscale: Tensor | None,
    doffset: Tensor | None,
    dgiven_mean: Tensor | None = None,
    dgiven_variance: Tensor | None = None,
) -> Tensor:
    """Return dx; fill what is given to be filled, dresidual a tensor that lies as x does."""
    training, axis, epsilon, correction, factor, activation = options
    dx = empty_like(x)
    in_order = x.is_contiguous()
    if not (in_order and dy.is_contiguous()):
        dy = beside(dx, dy)
    if not in_order:
        x = beside(dx, x)
    if residual is not None:
        residual = beside(dx, residual)
    if weights is not None:
        weights = positions("batch_norm", dx, weights, axis)
    follow_threads()
    _core.gradient(
        ELEMENTS[x.dtype],
        *block(dx, axis),
        dy.data_ptr(),
        x.data_ptr(),
        training,
        batch[0],
        batch[1],
        address(weights),
        address(scale),
        address(offset),
        address(residual),
        ACTIVATIONS[activation],
        epsilon,
        address(dmean),
        address(dvariance),
        correction,
        factor,
        dx.data_ptr(),
        address(dresidual),
        address(dscale),
        address(doffset),
        address(dgiven_mean),
        address(dgiven_variance),
        lent=True,
    )
    return dx


def moments(x: Tensor, axis: int, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return count, mean and m2 of each index of the axis, in float64."""
    y = x if is_dense(x) else x.contiguous()
    if weights is not None:
        weights = positions("batch_norm", y, weights, axis)
    mean, m2 = (x.new_empty(x.shape[axis], dtype=torch.float64) for _ in range(2))
    follow_threads()
    count = _core.moments(
        ELEMENTS[x.dtype],
        *block(y, axis),
        y.data_ptr(),
        address(weights),
        mean.data_ptr(),
        m2.data_ptr(),
        lent=True,
    )
    return mean.new_tensor(count), mean, m2


def is_dense(x: Tensor) -> bool:
    """Say whether the elements of x fill one piece of memory, in whatever order of the axes."""
    return x.is_contiguous() or x.stride() == torch.empty_like(x, device="meta").stride()
