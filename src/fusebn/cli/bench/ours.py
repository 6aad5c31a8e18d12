"""Our own answers: as a user gets them, and into memory that is warm already."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import fusebn
from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import EPSILON, Array, Case, Data, Verb, aligned
from fusebn.cli.bench.inside import floor, gradient_into

Call = Callable[[], Any]

AHEAD = 2048  # floats: what the kernels do, and the fastest of 1024, 2048 and 4096


class Ours:
    """One case: its data, and the outputs that are written again and again."""

    def __init__(self, case: Case, data: Data) -> None:
        self.case, self.data = case, data
        self._statistics = fusebn.moments(data.x, [i for i in range(data.x.ndim) if i != case.axis])
        # Float64, which the library takes as it is.
        self._mean, self._variance = (vector.astype(float) for vector in self._statistics)
        self._out = [aligned(case), aligned(case)]
        for out in self._out:
            out[...] = 0  # the pages exist from now on

    def fresh(self, verb: Verb) -> Call:
        """Return the public call, which allocates what it returns."""
        return (lambda: self._backward(verb)) if verb.backward else (lambda: self._forward(verb))

    def warm(self, verb: Verb) -> Call:
        """Return the call that writes where it wrote before."""
        if not verb.backward:
            return lambda: self._forward(verb, self._out[0])
        dresidual = self._out[1] if verb.residual else None
        return lambda: gradient_into(
            self._out[0], dresidual, self.case, self.data, verb, self._mean, self._variance
        )

    def answers(self, verb: Verb) -> list[Answer]:
        """Return what both calls answer."""
        for out in self._out:
            out[...] = float("nan")  # an element that nobody writes cannot pass for an answer
        fresh, warm = self.fresh(verb)(), self.warm(verb)()
        if not verb.backward:
            return [_named(fresh), _named(warm)]
        answer = {"dx": self._out[0], "dscale": warm[0], "doffset": warm[1]}
        if verb.residual:
            answer["dresidual"] = self._out[1]
        return [_named(fresh), answer]

    def floors(self, verb: Verb) -> dict[str, Call]:
        """Return the least that memory has to do for a verb, and the ways to go about it.

        A pass reads the tensors it needs and writes the ones it makes. Two passes in training: the
        first for the sums, the second for the result. Where a pass handles more tensors than any
        measured floor, it is the sum of two that together move the same bytes.
        """
        data, (y, dresidual) = self.data, self._out
        first: list[tuple[str, Array, Array | None]] = []
        second: list[tuple[str, Array, Array | None, Array]] = []
        if verb.backward:
            first = [("read2", data.dy, data.x)]
            second = [("2", data.dy, data.x, y)]
            if verb.residual:
                first.append(("read", data.residual, None))
                second.append(("", data.residual, None, dresidual))
        else:
            if verb.training:
                first = [("read", data.x, None)]
            second = [("2", data.x, data.residual, y) if verb.residual else ("", data.x, None, y)]

        def run(store: str, ahead: int) -> None:
            for kind, a, b in first:
                floor(kind, a, b, ahead=ahead)
            for suffix, a, b, out in second:
                floor(store + suffix, a, b, out, ahead)

        return {
            store + (", asked for early" if ahead else ""): partial(run, store, ahead)
            for store in ("copy", "stream")
            for ahead in (0, AHEAD)
        }

    def _forward(self, verb: Verb, out: Array | None = None) -> Any:
        data = self.data
        return fusebn.fused_batch_norm(
            data.x,
            data.scale,
            data.offset,
            None if verb.training else data.mean,
            None if verb.training else data.variance,
            EPSILON,
            is_training=verb.training,
            axis=self.case.axis,
            activation=verb.activation,
            residual=data.residual if verb.residual else None,
            out=out,
        )

    def _backward(self, verb: Verb) -> Any:
        data = self.data
        return fusebn.fused_batch_norm_grad(
            data.dy,
            data.x,
            data.scale,
            data.offset,
            *self._statistics,
            EPSILON,
            axis=self.case.axis,
            activation=verb.activation,
            residual=data.residual if verb.residual else None,
        )


def _named(result: Any) -> Answer:
    """Return a named tuple as an answer."""
    return {name: array for name, array in result._asdict().items() if array is not None}
