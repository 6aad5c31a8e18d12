"""oneDNN's own batch normalization, called through PyTorch's tensors of that library's layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import EPSILON, Case, Data, Verb
from fusebn.cli.bench.peers.torch import Torch


class OneDnn(Torch):
    """The peer: plain, channels-first tensors, without what oneDNN can only do elsewhere."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        version = self.torch.__config__.show().partition("MKL-DNN v")[2]
        self.version = version.partition(" ")[0] or self.torch.__version__

    def load(self, case: Case, data: Data) -> None:
        """See Peer."""
        if case.layout != "channels-first" or case.rank == 3:
            raise ValueError("PyTorch hands it images and volumes, channels first")
        super().load(case, data)
        self.x, self.dy = self.x.to_mkldnn(), self.dy.to_mkldnn()

    def call(self, verb: Verb) -> Callable[[], Any] | None:
        """See Peer."""
        if verb.activation:
            return None
        if verb.backward:
            return self.backward(verb)
        given = self.moving if not verb.training else [None, None]
        return lambda: self.torch.native_batch_norm(
            self.x, *self.parameters, *given, verb.training, 0.0, EPSILON
        )[0]

    def answer(self, verb: Verb, result: Any) -> Answer:
        """See Peer."""
        name, tensor = ("dx", result[0]) if verb.backward else ("y", result)
        return {name: self.array(tensor.to_dense())}


create = OneDnn
