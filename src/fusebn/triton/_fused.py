"""forward and gradient: the two compositions of the four verbs, as in csrc/core/fused.cpp."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from fusebn.triton import _verbs
from fusebn.triton._plan import Residency
from fusebn.triton._verbs import Block, Flowing, Normalization, Returned, Statistics


def forward(
    x: Tensor,
    block: Block,
    of: Normalization,
    given: tuple[Tensor, Tensor] | None,
    returned: Returned,
    y: Tensor,
) -> Statistics:
    """Fill y and the returned statistics; return those that normalized x, for backward.

    Without training these are the given ones, the count is 0, and what is returned is a copy of
    them. Two launches in training, or one where the batch can be held; and one without.
    """
    held = _residency(block, of, x)
    if held is not None:
        try:
            return _verbs.forward_resident(x, y, block, held, of, returned)
        except RuntimeError as error:
            _raise_unless_refused(error)
    if of.training:
        statistics = _verbs.moments(x, block, of.weights, returned)
    else:
        assert given is not None
        statistics = Statistics(x.new_zeros((), dtype=torch.float64), _wide(given))
        for new, old in zip((returned.mean_out, returned.variance_out), given, strict=True):
            if new is not old:
                new.copy_(old)
    _verbs.normalize(x, y, block, statistics, of)
    return statistics


def _wide(given: tuple[Tensor, Tensor]) -> Tensor:
    """Return both in one tensor of float64, by one launch."""
    room = given[0].new_empty((2, *given[0].shape), dtype=torch.float64)
    return torch.stack(given, out=room)


def gradient(
    dy: Tensor,
    x: Tensor,
    block: Block,
    of: Normalization,
    statistics: Statistics,
    flowing: Flowing,
    dx: Tensor,
    dresidual: Tensor | None,
    dscale: Tensor | None,
    doffset: Tensor | None,
    dgiven: tuple[Tensor, Tensor] | None,
    join: Callable[[Tensor], None] | None = None,
) -> None:
    """Fill the gradients that are wanted.

    Where x is a part of a batch, `join` adds up the sums of all parts, in place, between the two
    launches that it takes then. What goes into scale and offset is of this part alone.
    """
    into_given = not of.training and dgiven is not None
    sums = None
    g = None
    if of.activation == "identity":  # what was added has no part in any gradient but its own
        if dresidual is not None:
            dresidual.copy_(dy)
        of, dresidual = of._replace(residual=None), None
    alone = of.residual is None or _is_exact(x, of.activation)
    held = _residency(block, of, x, dy) if alone and join is None else None
    if held is not None:
        vectors = dresidual, dscale, doffset
        try:
            _verbs.gradient_resident(dy, x, block, held, statistics, of, flowing, dx, *vectors)
        except RuntimeError as error:
            _raise_unless_refused(error)
        else:
            if dgiven is not None:
                _fill_given(dgiven, statistics, of, flowing, None)
            return
    if of.training or into_given or dscale is not None or doffset is not None:
        g = dresidual if _is_exact(x, of.activation) else None
        vectors = dscale, doffset, g
        sums = _verbs.backward_sums(dy, x, block, statistics, of, *vectors)
        if join is not None:
            join(sums)
    if dgiven is not None:
        _fill_given(dgiven, statistics, of, flowing, sums if into_given else None)
    if g is not None:  # it is dresidual, done, and all that the second pass wants to know of dy
        of = of._replace(activation="identity", residual=None)
        dy, dresidual = g, None
    if sums is None:
        sums = statistics.batch  # not read without training
    _verbs.backward(dy, x, block, statistics, of, sums, flowing, dx, dresidual)


def _residency(block: Block, of: Normalization, *arrays: Tensor) -> Residency | None:
    """Return how one launch can hold the arrays, if it is to do the whole work."""
    if not of.training or of.weights is not None:
        return None
    if os.environ.get("FUSEBN_GPU_PERSISTENT", "1") == "0":
        return None
    # It loads 16 bytes at once, as words of 4; a view may begin anywhere.
    read = arrays if of.residual is None else (*arrays, of.residual)
    if any(array.data_ptr() % 16 for array in read):
        return None
    return _verbs.residency_of(arrays[0], block, len(arrays))


# CUDA's words for a grid that does not fit on the device at once; Triton hands them on.
_REFUSED = "too many blocks in cooperative launch"


def _raise_unless_refused(error: RuntimeError) -> None:
    """Let pass that the driver refuses programs which must run at the same time.

    It does so before anything runs: where another process was given a share of the multiprocessors,
    say, or a program needs a register more than `_plan.py` knows of.
    """
    if _REFUSED not in str(error):
        raise error


def _is_exact(x: Tensor, activation: str) -> bool:
    """Say whether g, written down in the type of x, is what it was."""
    wide = x.dtype in (torch.float32, torch.float64)
    return activation != "identity" and (wide or activation in ("relu", "relu6"))


def _fill_given(
    dgiven: tuple[Tensor, Tensor],
    statistics: Statistics,
    of: Normalization,
    flowing: Flowing,
    sums: Tensor | None,
) -> None:
    """Fill the gradients of the given statistics: what passes through, and what normalizes."""
    kept = 1.0 if not of.training else 1 - flowing.factor
    shares: list[Tensor | None] = [None, None]
    if sums is not None:
        shifted = statistics.batch[1] + of.epsilon
        rstd = torch.where(shifted == 0, 0, shifted.rsqrt())
        slope = rstd if of.scale is None else of.scale * rstd
        shares = [-slope * sums[0], -slope * rstd.square() / 2 * sums[1]]
    for filled, flows, share in zip(dgiven, flowing[:2], shares, strict=True):
        parts = [share, None if flows is None else kept * flows]
        found = [part for part in parts if part is not None]
        if found:
            filled.copy_(sum(found[1:], found[0]))
        else:
            filled.zero_()
