"""Who is measured: each called as its own users call it, through autograd where there is backward.

A contestant makes, of the parameters of a case, the forward that a user would write; the gradient
is autograd's, over one graph again and again, so that what runs is what runs in training. It raises
whatever it likes where it cannot: that is told, and the others go on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import fusebn.torch as fbt
from fusebn.cli.bench.cases import EPSILON, Case, Verb
from fusebn.cli.bench.device.clock import Call
from fusebn.cli.bench.device.tensors import Parameters, Tensors

MOMENTUM = 0.1

Forward = Callable[[Tensor, Tensor | None], Tensor]


class Contestant(NamedTuple):
    """One of those."""

    name: str
    title: str
    make: Callable[[Case, Verb, Parameters], Forward]

    @property
    def ours(self) -> bool:
        """Whether the answer must be as exact as ours."""
        return self.name.startswith("fusebn")


class Entry:
    """A contestant in one case and verb: its calls, one for each copy, and its answer."""

    def __init__(self, who: Contestant, verb: Verb, tensors: Tensors) -> None:
        self._who, self._verb, self._tensors = who, verb, tensors
        self._parameters = tensors.parameters()
        self._forward = who.make(tensors.case, verb, self._parameters)
        with torch.set_grad_enabled(verb.training):
            self.calls = [self._call(i) for i in range(tensors.copies)]

    def answer(self) -> dict[str, Tensor]:
        """Return what the first call gives, by name."""
        if self._verb.backward:
            names = ("dx", "dscale", "doffset", "dresidual")
            return dict(zip(names, self.calls[0](), strict=False))
        of = self._parameters
        if self._who.ours and self._verb.training:  # then it is what moves averages that were 0
            of.mean.zero_()
            of.variance.zero_()
        answer = {"y": self.calls[0]()}
        if self._who.ours and self._verb.training:
            answer |= {"mean": of.mean / MOMENTUM, "variance": of.variance / MOMENTUM}
        return answer

    def _call(self, copy: int) -> Call:
        forward, verb, tensors = self._forward, self._verb, self._tensors
        x = tensors.xs[copy]
        residual = tensors.residuals[copy] if verb.residual else None
        if not verb.backward:

            def run() -> Any:
                with torch.set_grad_enabled(verb.training):
                    return forward(x, residual).detach()

            return run
        of, dy = self._parameters, tensors.dys[copy]
        inputs = [x, of.scale, of.offset] + ([] if residual is None else [residual])
        y = forward(x, residual)
        return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


# ---- ours ----


def _ours(_case: Case, verb: Verb, of: Parameters) -> Forward:
    def forward(x: Tensor, residual: Tensor | None) -> Tensor:
        return fbt.batch_norm(
            x, of.mean, of.variance, of.scale, of.offset, verb.training, MOMENTUM, EPSILON,
            residual=residual, activation=verb.activation,
        )  # fmt: skip

    return forward


# ---- the others ----


def _eager(_case: Case, verb: Verb, of: Parameters) -> Forward:
    """What torchvision's blocks run: an addition and ReLU in place."""

    def forward(x: Tensor, residual: Tensor | None) -> Tensor:
        y = functional.batch_norm(
            x, of.mean, of.variance, of.scale, of.offset, verb.training, MOMENTUM, EPSILON
        )
        if residual is not None:
            y += residual
        return y.relu_() if verb.activation else y

    return forward


def _compiled(case: Case, verb: Verb, of: Parameters) -> Forward:
    import torch._functorch.config as settings

    # Afresh for each case: the compiler gives a function up that it has seen too many shapes of.
    torch.compiler.reset()
    settings.donated_buffer = False  # for backward runs over one graph again and again
    compiled: Forward = torch.compile(_eager(case, verb, of), fullgraph=True, dynamic=False)
    return compiled


def _apex(case: Case, verb: Verb, of: Parameters) -> Forward:
    """Apex's kernel, in one launch where its slab fits: github.com/NVIDIA/apex, contrib/groupbn."""
    from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC

    if (case.dtype, case.layout, case.rank) != ("float16", "channels-last", 4):
        raise ValueError("it takes float16 images, channels last")
    norm = BatchNorm2d_NHWC(case.block[1], fuse_relu=verb.activation == "relu")
    norm = norm.to(of.scale.device).train(verb.training)
    norm.eps, norm.momentum = EPSILON, MOMENTUM
    for name, vector in (("weight", of.scale), ("bias", of.offset)):
        delattr(norm, name)  # a module takes nothing but a new Parameter for one that it has
        setattr(norm, name, vector)
    norm.running_mean, norm.running_var = of.mean, of.variance

    def nhwc(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.permute(0, 2, 3, 1)

    def forward(x: Tensor, residual: Tensor | None) -> Tensor:
        y: Tensor = norm(nhwc(x), nhwc(residual))
        return y.permute(0, 3, 1, 2)

    return forward


OURS = Contestant("fusebn", "fusebn", _ours)
TWO_LAUNCHES = Contestant("fusebn-2", "fusebn, two launches", _ours)
EAGER = Contestant("eager", "PyTorch", _eager)
COMPILED = Contestant("compile", "torch.compile", _compiled)
APEX = Contestant("apex", "Apex", _apex)
PEERS = {"torch": EAGER, "compile": COMPILED, "apex": APEX}  # as they are asked for
CONTESTANTS = (OURS, TWO_LAUNCHES, *PEERS.values())


def present(peers: tuple[str, ...]) -> tuple[Contestant, ...]:
    """Return ours, and of the peers that are asked for, or else of all, who is here."""
    here = {name: who for name, who in PEERS.items() if who is not APEX or find_spec("apex")}
    return OURS, TWO_LAUNCHES, *(here[name] for name in here if name in (peers or PEERS))


@contextmanager
def road_of(who: Contestant) -> Iterator[None]:
    """Have ours go its way while it is called: the road is chosen at each call."""
    chosen = {"fusebn": "1", "fusebn-2": "0"}.get(who.name)
    before = os.environ.get(_ROAD)
    try:
        if chosen is not None:
            os.environ[_ROAD] = chosen
        yield
    finally:
        if before is None:
            os.environ.pop(_ROAD, None)
        else:
            os.environ[_ROAD] = before


_ROAD = "FUSEBN_GPU_PERSISTENT"


def backend_of(case: Case, tensors: Tensors) -> str | None:
    """Return whose kernel PyTorch's batch norm takes in training, where PyTorch says it."""
    select = getattr(torch._C, "_select_batch_norm_backend", None)
    if select is None:
        return None
    of = tensors.parameters()
    found = select(tensors.xs[0], of.scale, of.offset, of.mean, of.variance, True, EPSILON)
    return str(getattr(found, "name", found)).lower()
