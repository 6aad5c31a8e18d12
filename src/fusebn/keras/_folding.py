"""What stands behind each batch norm of a model, and how much of it can be folded in.

The pattern is ``norm``, then perhaps a sum of two, then perhaps an activation, where each result
but the last has one reader and each operation is called once. Nothing is changed here.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import keras

from fusebn import _spec
from fusebn.keras.layers import BatchNormalization

Operation = Any
Tensor = Any
Node = Any


class Fold(NamedTuple):
    """What one call of a batch norm can take in."""

    norm: Operation
    add: Operation | None = None
    activate: Operation | None = None
    activation: str | None = None  # what `activate` computes
    reason: str = ""  # why not more


def check(operation: str, model: Any) -> None:
    """Raise TypeError for what is no model."""
    if not isinstance(model, keras.Model):
        _spec.fail(TypeError, operation, "model", "be a keras.Model", type(model).__name__)


def is_open(model: Any) -> bool:
    """Say whether the whole of a model is known: its layers and how they are called."""
    is_graph = isinstance(model, keras.Sequential) or hasattr(model, "operations")
    return is_graph and type(model).__module__.partition(".")[0] == "keras"


def is_norm(operation: Operation) -> bool:
    """Say whether this is a batch norm that computes what its class says, Keras's or ours."""
    return type(operation) in (keras.layers.BatchNormalization, BatchNormalization)


def folds_of(model: Any) -> list[Fold]:
    """Return what each batch norm in a Functional or Sequential model can take in."""
    follow = followed(model)
    taken: set[int] = set()
    found = []
    for operation in follow.operations:
        if is_norm(operation):
            fold = _fold(follow, operation, taken)
            taken |= {id(part) for part in (fold.add, fold.activate) if part is not None}
            found.append(fold)
    return found


def _fold(follow: Any, norm: Operation, taken: set[int]) -> Fold:
    if norm.activity_regularizer is not None:
        return Fold(norm, reason="it has an activity regularizer")
    if getattr(norm, "activation", None) is not None:
        return Fold(norm)
    fold, (reader, reason) = Fold(norm), follow.reader_of(norm)
    if reader is not None and id(reader) not in taken and follow.is_sum(norm, reader):
        fold = fold._replace(add=reader)
        reader, reason = follow.reader_of(reader)
    if reader is None:
        return fold._replace(reason=reason)
    name = activation_of(reader)
    if name is None or not _alike(norm, reader):
        return fold._replace(reason=f"{type(reader).__name__} {reader.name!r} follows")
    return fold._replace(activate=reader, activation=name)


def _alike(norm: Operation, other: Operation) -> bool:
    """Say whether an operation computes in the type of the batch norm, and does nothing else."""
    dtype = getattr(other, "compute_dtype", norm.compute_dtype)
    return dtype == norm.compute_dtype and getattr(other, "activity_regularizer", None) is None


# ---- who reads a result ----


def followed(model: Any) -> "Chain | Graph":
    """Return what tells who reads whose results in a Functional or Sequential model."""
    return Chain(model) if isinstance(model, keras.Sequential) else Graph(model)


class Chain:
    """The layers of a Sequential model: each is read by the next."""

    def __init__(self, model: Any) -> None:
        self.operations = model.layers

    def reader_of(self, operation: Operation) -> tuple[Operation | None, str]:
        following = self.operations[self.operations.index(operation) + 1 :]
        return (following[0], "") if following else (None, "")

    def source_of(self, operation: Operation) -> Operation | None:
        """Return the operation that yields the inputs of another."""
        before = self.operations[: self.operations.index(operation)]
        return before[-1] if before else None

    def is_sum(self, norm: Operation, reader: Operation) -> bool:
        return False


class Graph:
    """The operations of a Functional model, and their calls between its inputs and outputs."""

    def __init__(self, model: Any) -> None:
        self.operations = model.operations
        self.outputs = {id(tensor) for tensor in model.outputs}
        self.calls: dict[int, list[Node]] = defaultdict(list)
        self.readers: dict[int, list[Node]] = defaultdict(list)
        ends, seen, pending = {id(tensor) for tensor in model.inputs}, set(), list(model.outputs)
        while pending:
            tensor = pending.pop()
            operation, index, _ = tensor._keras_history
            if id(tensor) in ends or operation is None:
                continue
            node = operation._inbound_nodes[index]
            if id(node) not in seen:
                seen.add(id(node))
                self.calls[id(operation)].append(node)
                for source in node.input_tensors:
                    self.readers[id(source)].append(node)
                pending += node.input_tensors

    def reader_of(self, operation: Operation) -> tuple[Operation | None, str]:
        """Return the one operation that reads the result of another, or None and why."""
        calls = self.calls[id(operation)]
        if len(calls) != 1:
            return None, f"{operation.name!r} is called {len(calls)} times"
        (output,) = calls[0].outputs
        readers = self.readers[id(output)]
        if id(output) in self.outputs:
            return None, f"what {operation.name!r} yields is an output of the model"
        if len(readers) != 1:
            return None, f"what {operation.name!r} yields has {len(readers)} readers"
        reader = readers[0].operation
        if len(self.calls[id(reader)]) != 1:
            return None, f"{reader.name!r} is called {len(self.calls[id(reader)])} times"
        return reader, ""

    def source_of(self, operation: Operation) -> Operation | None:
        """Return the operation that yields the first argument of another, called once."""
        calls = self.calls[id(operation)]
        if len(calls) != 1:
            return None
        found: Operation | None = calls[0].input_tensors[0]._keras_history.operation
        return found

    def is_sum(self, norm: Operation, reader: Operation) -> bool:
        """Say whether the reader adds a tensor of the same shape and type to what norm yields."""
        if type(reader) is not keras.layers.Add and not _is_keras(reader, "Add"):
            return False
        ((output,), (node,)) = self.calls[id(norm)][0].outputs, self.calls[id(reader)]
        others = [tensor for tensor in node.input_tensors if tensor is not output]
        return (
            len(others) == 1
            and _alike(norm, reader)
            and others[0].shape == output.shape
            and others[0].dtype == output.dtype
            # Keras masks a sum in a way of its own.
            and all(getattr(t, "_keras_mask", None) is None for t in (*others, output))
        )


# ---- activations ----


def activation_of(operation: Operation) -> str | None:
    """Return our name for what a layer or an operation of Keras's computes, or None."""
    if type(operation) is keras.layers.Activation:
        return _FUNCTIONS.get(operation.activation)
    if _is_keras(operation, "ReLU"):
        if operation.threshold:
            return None
        return _RELUS.get((operation.negative_slope, operation.max_value))
    if _is_keras(operation, "LeakyReLU", "LeakyRelu"):
        return _RELUS.get((operation.negative_slope, None))
    if _is_keras(operation, "Gelu"):
        return None if operation.approximate else "gelu"
    return (
        type(operation).__name__.lower() if _is_keras(operation, "Relu", "Relu6", "Silu") else None
    )


_FUNCTIONS = {getattr(keras.activations, name): name for name in ("relu", "relu6", "silu", "gelu")}
# By slope below 0 and greatest value.
_RELUS = {(0.0, None): "relu", (0.0, 6.0): "relu6", (0.01, None): "leaky_relu"}


def _is_keras(operation: Operation, *names: str) -> bool:
    """Say whether an operation is of a class of Keras's own: its operations have no public name."""
    kind = type(operation)
    return kind.__name__ in names and kind.__module__.partition(".")[0] == "keras"
