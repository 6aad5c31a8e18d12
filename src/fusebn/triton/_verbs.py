"""The kernels, called on PyTorch's tensors: the verbs, and both compositions of a held batch.

A caller has checked the arguments, and hands over tensors that lie as the plan says: dense blocks
`[outer, channels, inner]`, all alike. Nothing waits for the device.
"""

from ctypes import c_float
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusebn.triton._backward import backward_kernel, backward_sums_kernel
from fusebn.triton._moments import moments_kernel
from fusebn.triton._normalize import normalize_kernel
from fusebn.triton._plan import WARPS, Plan, Residency, plan, residency
from fusebn.triton._resident_backward import gradient_kernel
from fusebn.triton._resident_forward import forward_kernel


class Block(NamedTuple):
    """How a tensor lies in memory."""

    outer: int
    channels: int
    inner: int


class Normalization(NamedTuple):
    """What normalizes, and what surrounds it."""

    scale: Tensor | None  # of the statistics' type, as offset and weights
    offset: Tensor | None
    residual: Tensor | None
    weights: Tensor | None  # one for each position: they weigh moments and what flows through them
    activation: str
    epsilon: float
    training: bool


class Statistics(NamedTuple):
    """Of a batch, or given: what normalized x."""

    count: Tensor  # type: ignore[assignment]  # [], float64
    batch: Tensor  # [2, channels], float64: mean and biased variance


class Returned(NamedTuple):
    """What becomes of the batch's statistics; tensors of [channels] and of the statistics' type."""

    mean: Tensor | None  # the given ones: read where the factor is not 1
    variance: Tensor | None
    mean_out: Tensor  # may be the given one
    variance_out: Tensor
    correction: float
    factor: float


class Flowing(NamedTuple):
    """What flows into the statistics that `moments` returned; the last two are what it was told."""

    dmean: Tensor | None
    dvariance: Tensor | None
    correction: float
    factor: float


def moments(
    x: Tensor, block: Block, weights: Tensor | None, returned: Returned | None = None
) -> Statistics:
    """Return the statistics of a batch, and fill in those that are wanted of it."""
    view, stat = _plan_of(x, block, joins=True), _stat(x)
    statistics = _statistics(x, block)
    none = Returned(None, None, None, None, 0.0, 1.0)  # type: ignore[arg-type]
    given = returned or none
    moments_kernel[(view.programs,)](
        x, weights, *_room(x, view, 3),
        *statistics, given.mean, given.variance, given.mean_out, given.variance_out,
        *_pair(given.factor), *_walk(view), **_shape(view, stat),
        CORRECTION=given.correction, MIXED=given.factor != 1, JOINED=_joined(view),
        AHEAD=_ahead(x), num_warps=WARPS,
    )  # fmt: skip
    return statistics


def forward_resident(
    x: Tensor, y: Tensor, block: Block, held: Residency, of: Normalization, returned: Returned
) -> Statistics:
    """Do what moments and normalize do of a batch, in training and without weights, in one launch.

    All programs run at the same time, or the driver refuses the launch.
    """
    statistics = _statistics(x, block)
    lanes = held.words * 4 // x.element_size()
    partials = x.new_empty(held.strips * held.members * 3 * lanes, dtype=torch.float32)
    forward_kernel[(held.programs,)](
        _words(x), _words(of.residual), _words(y),
        partials, x.new_zeros(held.teams, dtype=torch.int32),
        *statistics, returned.mean, returned.variance, returned.mean_out, returned.variance_out,
        of.scale, of.offset, *_pair(returned.factor),
        *_held(x, block, held),
        ROWS=held.rows, WORDS=held.words, HELD=held.held, ELEMENT=_ELEMENTS[x.dtype],
        EPSILON=of.epsilon, ACTIVATION=of.activation, CORRECTION=returned.correction,
        MIXED=returned.factor != 1, num_warps=WARPS, launch_cooperative_grid=True,
    )  # fmt: skip
    return statistics


def gradient_resident(
    dy: Tensor,
    x: Tensor,
    block: Block,
    held: Residency,
    statistics: Statistics,
    of: Normalization,
    flowing: Flowing,
    dx: Tensor,
    dresidual: Tensor | None,
    dscale: Tensor | None,
    doffset: Tensor | None,
) -> None:
    """Do what backward_sums and backward do, in training and without weights, in one launch."""
    lanes = held.words * 4 // x.element_size()
    partials = x.new_empty(held.strips * held.members * 2 * lanes, dtype=torch.float64)
    gradient_kernel[(held.programs,)](
        _words(dy), _words(x), _words(of.residual), _words(dx), _words(dresidual),
        partials, x.new_zeros(held.teams, dtype=torch.int32),
        *statistics, of.scale, of.offset, dscale, doffset, flowing.dmean, flowing.dvariance,
        *_pair(flowing.factor), *_held(x, block, held),
        ROWS=held.rows, WORDS=held.words, HELD=held.held, ELEMENT=_ELEMENTS[x.dtype],
        EPSILON=of.epsilon, ACTIVATION=of.activation, CORRECTION=flowing.correction,
        num_warps=WARPS, launch_cooperative_grid=True,
    )  # fmt: skip


def residency_of(x: Tensor, block: Block, arrays: int) -> Residency | None:
    """Return how so many arrays like x are held by the device, or None if they are not to be."""
    return residency(*block, x.element_size(), _processors(x.device), arrays)


def _held(x: Tensor, block: Block, held: Residency) -> tuple[int, ...]:
    words = block.channels * x.element_size() // 4
    return block.outer, words, block.channels, held.strips, held.teams, held.members


def normalize(
    x: Tensor, y: Tensor, block: Block, statistics: Statistics, of: Normalization
) -> None:
    """Fill y."""
    view, stat = _plan_of(x, block, joins=False), _stat(x)
    normalize_kernel[(view.programs,)](
        x, of.residual, y, *statistics, of.scale, of.offset, *_walk(view), **_shape(view, stat),
        EPSILON=of.epsilon, TRAINING=of.training, ACTIVATION=of.activation,
        AHEAD=_ahead(x, of.residual), num_warps=WARPS,
    )  # fmt: skip


def backward_sums(
    dy: Tensor,
    x: Tensor,
    block: Block,
    statistics: Statistics,
    of: Normalization,
    dscale: Tensor | None = None,
    doffset: Tensor | None = None,
    g: Tensor | None = None,
) -> Tensor:
    """Return sum_g and sum_g_x, [2, channels] of float64; fill g, dscale, doffset if wanted."""
    view, stat = _plan_of(x, block, joins=True), _stat(x)
    sums = x.new_empty((2, block.channels), dtype=torch.float64)
    backward_sums_kernel[(view.programs,)](
        dy, x, of.residual, g, *_room(x, view, 2),
        *statistics, of.scale, of.offset, sums, dscale, doffset, *_walk(view),
        **_shape(view, stat), EPSILON=of.epsilon, TRAINING=of.training,
        ACTIVATION=of.activation, JOINED=_joined(view), AHEAD=_ahead(dy, x, of.residual),
        num_warps=WARPS,
    )  # fmt: skip
    return sums


def backward(
    dy: Tensor,
    x: Tensor,
    block: Block,
    statistics: Statistics,
    of: Normalization,
    sums: Tensor,
    flowing: Flowing,
    dx: Tensor,
    dresidual: Tensor | None,
) -> None:
    """Fill dx, and dresidual if it is wanted."""
    view, stat = _plan_of(x, block, joins=False), _stat(x)
    backward_kernel[(view.programs,)](
        dy, x, of.residual, of.weights, dx, dresidual,
        *statistics, of.scale, of.offset, sums, flowing.dmean, flowing.dvariance,
        *_pair(flowing.factor), *_walk(view), **_shape(view, stat),
        EPSILON=of.epsilon, TRAINING=of.training, ACTIVATION=of.activation,
        CORRECTION=flowing.correction, AHEAD=_ahead(dy, x, of.residual), num_warps=WARPS,
    )  # fmt: skip


# ---- what the kernels are told ----

_ELEMENTS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


def _statistics(x: Tensor, block: Block) -> Statistics:
    """Return room for the statistics of a batch."""
    batch = x.new_empty((2, block.channels), dtype=torch.float64)
    # The count is filled in with the first channel, if there is one.
    room = x.new_empty if block.channels else x.new_zeros
    return Statistics(room((), dtype=torch.float64), batch)


def _words(x: Tensor | None) -> Tensor | None:
    """Return the memory of a dense tensor as words of 4 bytes."""
    return None if x is None else x.as_strided([x.numel()], [1]).view(torch.int32)


def _stat(x: Tensor) -> Any:
    """Return the type of the statistics, as kernels call it."""
    return tl.float64 if x.dtype is torch.float64 else tl.float32


# Of a block without channels: no program at all.
_NOTHING = Plan(0, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1)


def _plan_of(x: Tensor, block: Block, *, joins: bool) -> Plan:
    if not block.channels:
        return _NOTHING
    return plan(*block, x.element_size(), _processors(x.device), joins=joins)


@cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":  # Triton's interpreter: enough for programs to share a group
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


# Of a plan, what kernels are told at run time, in their order.
WALK = (
    "rows", "tail", "width", "stride", "channels", "groups", "chunks", "tiles", "parts", "turns",
)  # fmt: skip


def _walk(view: Plan) -> tuple[int, ...]:
    return tuple(getattr(view, name) for name in WALK)


def _shape(view: Plan, stat: Any) -> dict[str, Any]:
    return {
        "FOLD": view.fold,
        "ROWS": view.tile_rows,
        "WIDTH": view.tile_width,
        "STAT": stat,
    }


def _joined(view: Plan) -> int:
    """Return the length of what is kept of folded columns: the channels, as a power of two."""
    return triton.next_power_of_2(view.channels) if view.fold > 1 else 1


def _ahead(*read: Tensor | None) -> int:
    """Return how many tiles to load before the first is needed: of all arrays, eight together."""
    arrays = sum(array is not None for array in read)
    return {1: 8, 2: 4, 3: 2}[arrays]


def _room(x: Tensor, view: Plan, values: int) -> tuple[Tensor | None, Tensor | None]:
    """Return the room for partial results, and the counters of who has finished, which are 0."""
    lanes = view.tile_width if view.fold else 1
    size = 0
    if view.parts > 1:
        size = view.groups * view.parts * values * lanes
    if view.fold > 1:
        size = 2 * view.groups * view.parts * values * lanes
    room = x.new_empty(size, dtype=torch.float64) if size else None
    finished = x.new_zeros(view.groups, dtype=torch.int32) if view.parts > 1 else None
    return room, finished


def _pair(value: float) -> tuple[float, float]:
    """Return a number as two of float32, which is what kernels are called with."""
    high = c_float(value).value
    return high, value - high
