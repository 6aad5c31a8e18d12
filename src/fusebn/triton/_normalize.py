"""normalize: y = activation((x - mean) * scale * rstd + offset + residual), one pass over memory.

x is centred at the mean as its own type has it, and what that rounding lost is in the offset (see
`rounded`): no cancellation where the mean is large, at no cost. Tiles are walked in the opposite
order to that of moments, so that what is still in the cache is read first; what is read for the
last time, and what is written, leaves it first.
"""

import triton
import triton.language as tl

from fusebn.triton._tiles import activated, channel_of, constants, rounded, tile_at


@triton.jit
def normalize_kernel(
    X, RESIDUAL, Y, COUNT, BATCH, SCALE, OFFSET,
    rows, tail, width, stride, channels, groups, chunks, tiles, parts, turns,
    FOLD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAT: tl.constexpr,
    EPSILON: tl.constexpr, TRAINING: tl.constexpr, ACTIVATION: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Fill Y."""
    group, part = tl.program_id(0) % groups, tl.program_id(0) // groups
    channel, there = channel_of(group, channels, width, FOLD, WIDTH)
    mean, rstd, scale, offset = constants(
        BATCH, COUNT, SCALE, OFFSET, channel, there, channels, EPSILON, TRAINING
    )
    m, a, b = rounded(mean, rstd, scale, offset, STAT)
    if TRAINING:
        lost = tl.load(COUNT) == 0
    for turn in range(0, turns, AHEAD):
        xs, residuals = (), ()
        for k in tl.static_range(AHEAD):
            base, offsets, data, _row, _column = tile_at(
                (turns - 1 - turn - k) * parts + part, group,
                rows, tail, width, stride, chunks, tiles, FOLD, ROWS, WIDTH,
            )  # fmt: skip
            here = base + offsets
            xs = xs + (tl.load(X + here, mask=data, other=0.0, eviction_policy="evict_first"),)
            if RESIDUAL is not None:
                residuals = residuals + (tl.load(RESIDUAL + here, mask=data, other=0.0),)
        for k in tl.static_range(AHEAD):
            base, offsets, data, _row, _column = tile_at(
                (turns - 1 - turn - k) * parts + part, group,
                rows, tail, width, stride, chunks, tiles, FOLD, ROWS, WIDTH,
            )  # fmt: skip
            x = xs[k].to(STAT)
            if TRAINING:
                x = tl.where(lost, 0.0, x)  # whatever it holds
            z = (x - m) * a + b
            if RESIDUAL is not None:
                z += residuals[k].to(STAT)
            y = activated(z, ACTIVATION).to(Y.dtype.element_ty)
            tl.store(Y + base + offsets, y, mask=data, eviction_policy="evict_first")
