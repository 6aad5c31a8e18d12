"""What the kernels share: where a tile lies, the constants of its channels, the activations.

A kernel is given a plan (`_plan.py`) as numbers, in this order::

    rows, tail, width, stride, channels, groups, chunks, tiles, parts, turns    at run time
    FOLD, ROWS, WIDTH                                                           when it is compiled

and a program is number ``part * groups + group`` of the grid: neighbours share rows. It loads AHEAD
tiles before it looks at the first: only so many bytes on their way keep the memory busy.
"""

import triton
import triton.language as tl

_ROOT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)  # of the normal distribution at 0: 1 / sqrt(2 pi)
_SLOPE = tl.constexpr(0.01)  # of leaky_relu


@triton.jit
def tile_at(
    number, group, rows, tail, width, stride, chunks, tiles,
    FOLD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return of a tile: the first element, the rest from there, what is data; rows and columns."""
    if FOLD == 0:
        # As wide as width is: a plane, too, may have more elements than 32 bits can count.
        down, across = number // chunks, number % chunks + 0 * width
        first_column = group.to(tl.int64) * width
    else:
        down, across = number, group
        first_column = 0
    row = down * ROWS + tl.arange(0, ROWS)
    column = across * WIDTH + tl.arange(0, WIDTH)
    # A tensor may have more elements than 32 bits can count; a tile has not.
    base = (down * ROWS).to(tl.int64) * stride + first_column + across * WIDTH
    offsets = tl.arange(0, ROWS).to(tl.int64)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    whole = row < rows
    data = whole[:, None] | ((row == rows)[:, None] & (column < tail)[None, :])
    data = data & (column < width)[None, :] & (number >= 0) & (number < tiles)
    return base, offsets, data, row, column


@triton.jit
def positions(row, column, width, channels, FOLD: tl.constexpr):
    """Return the position of each element: those of one position share a weight."""
    if FOLD > 1:
        return (row.to(tl.int64)[:, None] * width + column[None, :]) // channels
    elif FOLD == 1:
        return row.to(tl.int64)[:, None] + (column * 0)[None, :]
    else:
        return row.to(tl.int64)[:, None] * width + column[None, :]


@triton.jit
def channel_of(group, channels, width, FOLD: tl.constexpr, WIDTH: tl.constexpr):
    """Return the channel of each column of a group's tiles, and whether there is one."""
    if FOLD == 0:
        lane = tl.arange(0, 1)
        return group + lane, lane == 0
    else:
        column = group * WIDTH + tl.arange(0, WIDTH)
        return column % channels, column < width


@triton.jit
def over_rows(values, FOLD: tl.constexpr):
    """Add up a tile: of each column, or of all of it where a channel is a plane."""
    total = tl.sum(values, 0)
    if FOLD == 0:
        return tl.sum(total, 0) + tl.zeros([1], values.dtype)
    else:
        return total


@triton.jit
def constants(
    BATCH, COUNT, SCALE, OFFSET, channel, there, channels,
    EPSILON: tl.constexpr, TRAINING: tl.constexpr,
):  # fmt: skip
    """Return of each channel, in float64: the mean, rstd, scale and offset, 0 where none is there.

    rstd is 0 where variance + epsilon is, and for a batch of count 0, whose mean is 0 then.
    """
    mean = tl.load(BATCH + channel, mask=there, other=0.0)
    rstd = rstd_of(tl.load(BATCH + channels + channel, mask=there, other=1.0), EPSILON)
    if TRAINING:
        lost = tl.load(COUNT) == 0
        mean, rstd = tl.where(lost, 0.0, mean), tl.where(lost, 0.0, rstd)
    scale, offset = parameters(SCALE, OFFSET, channel, there)
    return mean, rstd, scale, offset


@triton.jit
def rstd_of(variance, EPSILON: tl.constexpr):
    """Return 1 / sqrt(variance + epsilon), and 0 where that sum is."""
    shifted = variance + EPSILON
    return tl.where(shifted == 0, 0.0, 1.0 / tl.sqrt(tl.where(shifted == 0, 1.0, shifted)))


@triton.jit
def parameters(SCALE, OFFSET, channel, there):
    """Return scale and offset of each channel, in float64."""
    scale = tl.full(channel.shape, 1.0, tl.float64)
    offset = tl.full(channel.shape, 0.0, tl.float64)
    if SCALE is not None:
        scale = tl.load(SCALE + channel, mask=there, other=0.0).to(tl.float64)
    if OFFSET is not None:
        offset = tl.load(OFFSET + channel, mask=there, other=0.0).to(tl.float64)
    return scale, offset


@triton.jit
def rounded(mean, rstd, scale, offset, STAT: tl.constexpr):
    """Return m, a and b of ``z = (x - m) * a + b``: what rounding m loses is in b."""
    m = mean.to(STAT)
    a = scale * rstd
    b = offset - (mean - m.to(tl.float64)) * a
    return m[None, :], a.to(STAT)[None, :], b.to(STAT)[None, :]


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """Apply an activation. NaN stays NaN."""
    if ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "relu6":
        return tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACTIVATION == "leaky_relu":
        return tl.where(z < 0, z * _SLOPE, z)
    elif ACTIVATION == "silu":
        return z / (1 + tl.exp(-z))
    elif ACTIVATION == "gelu":
        return z * 0.5 * (1 + tl.erf(z * _ROOT_HALF))
    else:
        return z


@triton.jit
def through_activation(dy, z, ACTIVATION: tl.constexpr):
    """Return dy * activation'(z)."""
    if ACTIVATION == "relu":
        return tl.where(z > 0, dy, 0.0)
    elif ACTIVATION == "relu6":
        return tl.where((z > 0) & (z < 6), dy, 0.0)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z > 0, dy, dy * _SLOPE)
    elif ACTIVATION == "silu":
        share = 1 / (1 + tl.exp(-z))
        return dy * share * (1 + z * (1 - share))
    elif ACTIVATION == "gelu":
        return dy * (0.5 * (1 + tl.erf(z * _ROOT_HALF)) + z * _DENSITY * tl.exp(-0.5 * z * z))
    else:
        return dy


@triton.jit
def is_last(FINISHED, group, parts):
    """Say whether this program is the last of its group; what the others stored can be read then.

    Stored before by this program, it is seen by whoever is last. The counter is 0 again afterwards.
    """
    tl.debug_barrier()
    before = tl.atomic_add(FINISHED + group, 1, sem="acq_rel", scope="gpu")
    last = before == parts - 1
    if last:
        tl.store(FINISHED + group, 0)
    return last
