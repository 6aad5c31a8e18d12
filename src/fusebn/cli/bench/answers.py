"""Whether an answer is right: no speed is measured without.

A tensor is too large for the oracle, so statistics come from float64 NumPy over the whole of it,
and the oracle's formulas are then asked for random positions. Tolerances are units of epsilon times
the magnitude of the terms that a result is made from, as in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fusebn.cli.bench.cases import DTYPES, EPSILON, Array, Case, Data, Verb
from fusebn.cli.bench.inside import oracle

# y, dx and dresidual at the positions asked for; dscale, doffset, mean and variance whole.
Answer = dict[str, Array]

SAMPLE = 1 << 15
CHUNK = 1 << 20  # elements in float64 at a time

# Units in the last place that we may err by. A peer only has to compute the same thing: it may
# round between its steps, and sum in its own way.
ULPS = {"float32": 8.0, "bfloat16": 1.0, "float16": 1.0, "float64": 32.0}
PEER = {"float32": 2e-4, "bfloat16": 0.04, "float16": 0.01, "float64": 2e-4}

KINK = 1e-5  # so near to 0 rounding may decide on which side of relu a value is


class Wrong(Exception):
    """An answer that is not worth timing."""


class Agreement:
    """What the answers must be where no oracle knows: the first of them, to rounding."""

    def __init__(self, case: Case) -> None:
        self._allowed, self._first = PEER[case.dtype], Answer()

    def check(self, answer: Answer) -> None:
        """Raise Wrong unless every array agrees with the one that came first."""
        for name, array in answer.items():
            want = self._first.setdefault(name, array).astype(np.float64)
            error = np.abs(array.astype(np.float64) - want)
            bad = ~(error <= self._allowed * (1 + np.abs(want)))
            if bad.any():
                at = int(np.argmax(bad))
                raise Wrong(
                    f"{name} is {float(array[at]):.6g} at {at} where the first way has "
                    f"{float(want[at]):.6g}"
                )


class _Sums(NamedTuple):
    """Of every channel: of g and g * (x - mean), and of |dy| where rounding decides if g is 0."""

    g: Array
    g_x: Array
    doubt: Array
    doubt_x: Array


class Truth:
    """What the answers for one case must be."""

    def __init__(self, case: Case, data: Data) -> None:
        self.case, self.data = case, data
        self.positions = positions_of(case)
        self.count = data.x.size // case.block[1]
        self._sums: dict[tuple[str | None, bool], _Sums] = {}
        mean: Array = sum(x.sum((0, 2)) for (x,) in self._chunks(data.x)) / self.count
        m2 = sum(((x - mean[:, None]) ** 2).sum((0, 2)) for (x,) in self._chunks(data.x))
        self.mean, self.variance = mean, m2 / self.count

    def check(self, verb: Verb, answer: Answer, *, peer: bool = False) -> None:
        """Raise Wrong unless every array of the answer is right."""
        expected = self._backward(verb, peer) if verb.backward else self._forward(verb)
        if not peer and (missing := expected.keys() - answer.keys()):
            raise Wrong(f"no {', '.join(sorted(missing))}")
        for name in expected.keys() & answer.keys():
            wide = name in ("mean", "variance", "dscale", "doffset")
            self._compare(name, answer[name], *expected[name], peer, wide)

    def _compare(
        self, name: str, got: Array, want: Array, magnitude: Array, peer: bool, wide: bool
    ) -> None:
        kind = self.case.dtype
        if wide and kind != "float64":
            kind = "float32"
        epsilon = float(ml_dtypes.finfo(DTYPES[kind]).eps)  # type: ignore[no-untyped-call]
        allowed = (PEER[self.case.dtype] if peer else ULPS[kind] * epsilon) * magnitude
        error = np.abs(got.astype(np.float64) - want)
        bad = ~(error <= allowed)  # so that NaN is bad
        if bad.any():
            at = int(np.argmax(np.where(bad, np.nan_to_num(error / allowed, nan=np.inf), 0)))
            raise Wrong(
                f"{name} is {float(got[at]):.6g} where it must be {float(want[at]):.6g} "
                f"({bad.mean():.0%} of {bad.size} checked values are wrong)"
            )

    def _forward(self, verb: Verb) -> dict[str, tuple[Array, Array]]:
        mean, variance = self.mean, self.variance
        if not verb.training:
            mean, variance = self.data.mean, self.data.variance
        at = _At(self, mean, variance, verb)
        y = oracle.normalize(
            at.x, at.mean, at.variance, at.scale, at.offset, EPSILON, verb.activation, at.residual
        )
        magnitude = np.abs(at.scale) * (np.abs(at.xhat) + 1) + np.abs(at.offset)
        if at.residual is not None:
            magnitude = magnitude + np.abs(at.residual)
        expected = {"y": (y, magnitude)}
        if verb.training:
            returned = variance * (self.count / max(self.count - 1, 1))
            expected["mean"] = mean, np.abs(mean) + np.sqrt(variance)
            expected["variance"] = returned, returned
        return expected

    def _backward(self, verb: Verb, peer: bool) -> dict[str, tuple[Array, Array]]:
        at, sums = _At(self, self.mean, self.variance, verb), self._sums_of(verb)
        z = oracle.preactivation(
            at.x, at.mean, at.variance, at.scale, at.offset, EPSILON, at.residual
        )
        g = at.dy * oracle.ACTIVATIONS[verb.activation][1](z)
        spread = oracle.Sums(sums.g[at.channel], sums.g_x[at.channel])
        dx = oracle.backward(
            g, at.x, at.mean, at.variance, at.scale, EPSILON, sums=spread, count=self.count
        )
        rstd = 1 / np.sqrt(self.variance + EPSILON)
        # dy and xhat have magnitude 1: so have the means of |g| and |g xhat|.
        magnitude = np.abs(at.scale) * rstd[at.channel] * (np.abs(g) + 1 + np.abs(at.xhat))
        dresidual = g, np.abs(at.dy)
        unit = ULPS["float32"] * float(np.finfo(np.float32).eps)
        if verb.activation:
            # Where the preactivation is within rounding of 0, its sign is anybody's guess, and
            # through the sums that of one element is felt by its whole channel.
            doubt_g, doubt_x = sums.doubt, rstd * sums.doubt_x
            felt = doubt_g[at.channel] + np.abs(at.xhat) * doubt_x[at.channel]
            magnitude += np.abs(at.scale) * rstd[at.channel] * felt / (self.count * unit)
            band = PEER[self.case.dtype] if peer else KINK
            doubt = np.where(np.abs(z) < band * (1 + np.abs(z)), np.inf, 1)
            magnitude, dresidual = magnitude * doubt, (g, np.abs(at.dy) * doubt)
        expected = {
            "dx": (dx, magnitude),
            "dscale": (rstd * sums.g_x, self.count + rstd * sums.doubt_x / unit),
            "doffset": (sums.g, self.count + sums.doubt / unit),
        }
        if verb.residual:
            expected["dresidual"] = dresidual
        return expected

    def _sums_of(self, verb: Verb) -> _Sums:
        key = verb.activation, verb.residual
        if key not in self._sums:
            total: Any = 0
            a, b = self.data.scale / np.sqrt(self.variance + EPSILON), self.data.offset
            arrays = [self.data.dy, self.data.x] + [self.data.residual] * verb.residual
            for dy, x, *residual in self._chunks(*arrays):
                centred = x - self.mean[:, None]
                g, doubt = dy, np.zeros_like(dy)
                if verb.activation == "relu":
                    z = centred * a[:, None] + b[:, None] + sum(residual)
                    g, doubt = dy * (z > 0), np.abs(dy) * (np.abs(z) < KINK)
                sums = [
                    values.sum((0, 2))
                    for values in (g, g * centred, doubt, doubt * np.abs(centred))
                ]
                total = total + np.array(sums)
            self._sums[key] = _Sums(*total)
        return self._sums[key]

    def _chunks(self, *tensors: Array) -> Iterator[list[Array]]:
        """Cut tensors along outer, as [outer, channels, inner] in float64."""
        outer, channels, inner = self.case.block
        step = max(1, CHUNK // (channels * inner))
        blocks = [tensor.reshape(outer, channels, inner) for tensor in tensors]
        for i in range(0, outer, step):
            yield [block[i : i + step].astype(np.float64) for block in blocks]


class _At:
    """All that belongs to the positions: one number of each for every position."""

    def __init__(self, truth: Truth, mean: Array, variance: Array, verb: Verb) -> None:
        data, at = truth.data, truth.positions
        _, channels, inner = truth.case.block
        self.channel = at // inner % channels
        self.x, self.dy = (tensor.ravel()[at].astype(float) for tensor in (data.x, data.dy))
        self.residual = data.residual.ravel()[at].astype(float) if verb.residual else None
        self.mean, self.variance, self.scale, self.offset = (
            vector[self.channel].astype(float)
            for vector in (mean, variance, data.scale, data.offset)
        )
        self.xhat = (self.x - self.mean) / np.sqrt(self.variance + EPSILON)


def positions_of(case: Case) -> Array:
    """Return where the tensors of a case are checked: both ends, and at random between."""
    n = int(np.prod(case.dims))
    if n <= SAMPLE:
        return np.arange(n)
    ends = np.arange(64)
    return np.concatenate([ends, np.random.default_rng(0).integers(n, size=SAMPLE), n - 64 + ends])


def sampled(answer: Answer, case: Case) -> Answer:
    """Keep of the tensors of an answer what is checked."""
    at = positions_of(case)
    return {
        name: array.ravel()[at] if array.shape == case.dims else array
        for name, array in answer.items()
    }
