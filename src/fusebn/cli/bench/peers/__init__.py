"""The peers: who else can batch-normalize, each called as its own users call it.

A peer gets its tensors in its own memory, in the layout of the case, and does each verb in the
fewest operations it has for it. It runs in a `worker`; nothing here is imported before that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol

from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import Case, Data

# Name -> its name in tables, and the packages it needs.
PEERS = {
    "torch": ("PyTorch", ("torch",)),
    "tensorflow": ("TensorFlow", ("tensorflow",)),
    "jax": ("JAX jit", ("jax",)),
    "keras": ("Keras 3", ("keras", "tensorflow")),
    "onnxruntime": ("ONNX Runtime", ("onnxruntime", "onnx")),
    "onednn": ("oneDNN", ("torch",)),
}


class Peer(Protocol):
    """What a worker asks of a peer. Whatever it raises means: it cannot."""

    version: str

    def __init__(self, threads: int) -> None: ...

    def load(self, case: Case, data: Data) -> None:
        """Take copies of the data."""

    def call(self, verb: Any) -> Callable[[], Any] | None:
        """Return what computes the Verb (or the Step) and nothing else, or None."""

    def answer(self, verb: Any, result: Any) -> Answer:
        """Return y, or dx and dresidual, as NumPy arrays of the case's shape."""


def installed() -> list[str]:
    """Return the peers whose packages are here."""
    return [name for name, (_, needs) in PEERS.items() if all(map(find_spec, needs))]


def create(name: str, threads: int) -> Peer:
    """Import a peer."""
    peer: Peer = importlib.import_module(f"fusebn.cli.bench.peers.{name}").create(threads)
    return peer
