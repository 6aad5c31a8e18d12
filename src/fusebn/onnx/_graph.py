"""A graph that is being rewritten: who makes and who reads a value, and which are constant.

Subgraphs read the values around them by name, so their reads count too.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

Array = NDArray[Any]


class Reader(NamedTuple):
    """Where a value is read."""

    node: onnx.NodeProto | None
    """None: it is an output of the graph."""
    slot: int
    """Which input of the node; -1: inside a subgraph of it."""


class Graph:
    """The main graph of a model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._graph = model.graph
        # Before IR version 4 every initializer had to be an input, too, and none was overridden.
        self._all_are_inputs = model.ir_version < 4
        self._names = _names(model.graph) | {node.name for node in model.graph.node}
        self._read()

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """The nodes, in their order."""
        return list(self._graph.node)

    def _read(self) -> None:
        self._makers: dict[str, onnx.NodeProto] = {}
        self._readers: dict[str, list[Reader]] = {}
        for node in self._graph.node:
            self._makers |= {name: node for name in node.output if name}
            for index, name in enumerate(node.input):
                self._readers.setdefault(name, []).append(Reader(node, index))
            for graph in subgraphs(node):
                for name in _names(graph):
                    self._readers.setdefault(name, []).append(Reader(node, -1))
        for index, output in enumerate(self._graph.output):
            self._readers.setdefault(output.name, []).append(Reader(None, index))
        self._initializers = {tensor.name: tensor for tensor in self._graph.initializer}
        self._inputs = {value.name for value in self._graph.input}

    # ---- what there is ----

    def maker(self, name: str) -> onnx.NodeProto | None:
        """Return the node that makes a value; none makes inputs and initializers."""
        return self._makers.get(name)

    def readers(self, name: str) -> list[Reader]:
        """Return all places where a value is read."""
        return self._readers.get(name, [])

    def overridable(self, name: str) -> bool:
        """Return whether an initializer is a default, which a caller may replace."""
        return name in self._initializers and name in self._inputs and not self._all_are_inputs

    def constant(self, name: str) -> Array | None:
        """Return the value of a constant, or None where it is none."""
        if name in self._initializers:
            return None if self.overridable(name) else _array(self._initializers[name])
        node = self._makers.get(name)
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Identity":
            return self.constant(node.input[0])
        return _constant(node.attribute[0]) if node.op_type == "Constant" else None

    def rank(self, name: str) -> int | None:
        """Return the number of axes of a value, if known."""
        return self._ranks.get(name)

    @cached_property
    def _ranks(self) -> dict[str, int]:
        try:
            graph = onnx.shape_inference.infer_shapes(self._model).graph
        except Exception:  # larger than a message may be, or not valid: what it says itself
            graph = self._graph
        values = [*graph.input, *graph.value_info, *graph.output]
        types = {value.name: value.type.tensor_type for value in values}
        return {name: len(t.shape.dim) for name, t in types.items() if t.HasField("shape")}

    # ---- changes ----

    def set_constant(self, node: onnx.NodeProto, index: int, array: Array) -> None:
        """Give a node another constant as an input; where others read the old one, they keep it."""
        while len(node.input) <= index:
            node.input.append("")
        old = node.input[index]
        if old in self._initializers and len(self._readers[old]) == 1:
            tensor = self._initializers[old]
            tensor.CopyFrom(numpy_helper.from_array(array, old))
            self._retype(tensor)
        else:
            name = f"{old}_folded" if old else f"{node.output[0]}_bias"
            node.input[index] = self.add_constant(name, array)
            self.prune(old)

    def add_constant(self, like: str, array: Array) -> str:
        """Add an initializer, and return its name."""
        name = self.unused_name(like)
        tensor = numpy_helper.from_array(array, name)
        self._graph.initializer.append(tensor)
        if self._all_are_inputs:
            value = onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
            self._graph.input.append(value)
        self._read()
        return name

    def _retype(self, tensor: onnx.TensorProto) -> None:
        """Say the new shape of an initializer where its old one is said."""
        for value in (*self._graph.input, *self._graph.value_info):
            if value.name == tensor.name:
                shape = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
                value.type.CopyFrom(shape)

    def unused_name(self, like: str) -> str:
        """Return a name that no value and no node has, in no subgraph either."""
        name, count = like, 1
        while name in self._names:
            name, count = f"{like}_{count}", count + 1
        self._names.add(name)
        return name

    def rename_output(self, node: onnx.NodeProto, name: str) -> None:
        """Let a node make its first output by another name; the old one is gone."""
        if node.output[0] != name:
            _remove_where(self._graph.value_info, node.output[0])
            node.output[0] = name
            self._read()

    def insert_after(self, node: onnx.NodeProto, new: onnx.NodeProto) -> None:
        """Put a node behind another."""
        self._graph.node.insert(self.nodes.index(node) + 1, new)
        self._read()

    def remove(self, node: onnx.NodeProto) -> None:
        """Remove a node, and the constants that only it has read."""
        read = set(node.input)
        self._graph.node.remove(node)
        self._read()
        for name in read:
            self.prune(name)

    def prune(self, name: str) -> None:
        """Remove a constant that nobody reads any more."""
        self._read()
        if self.readers(name):
            return
        node = self._makers.get(name)
        if name in self._initializers:
            for values in (self._graph.initializer, self._graph.input, self._graph.value_info):
                _remove_where(values, name)
            self._read()
        elif node is not None and node.op_type in ("Constant", "Identity"):
            _remove_where(self._graph.value_info, name)
            self.remove(node)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs that a node holds, not those within them."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _names(graph: onnx.GraphProto) -> set[str]:
    """Return all names of values in a graph, and in those within it."""
    names = {tensor.name for tensor in graph.initializer}
    names |= {value.name for value in (*graph.input, *graph.output, *graph.value_info)}
    names |= {tensor.values.name for tensor in graph.sparse_initializer}
    for node in graph.node:
        names |= {*node.input, *node.output}
        for inner in subgraphs(node):
            names |= _names(inner)
    return names


def _constant(attribute: onnx.AttributeProto) -> Array | None:
    """Return what a Constant makes; None where that is no dense array of reals."""
    if attribute.name == "value":
        return _array(attribute.t)
    if attribute.name in ("value_float", "value_floats"):
        return np.asarray(onnx.helper.get_attribute_value(attribute), np.float32)
    return None


def _array(tensor: onnx.TensorProto) -> Array:
    return np.asarray(numpy_helper.to_array(tensor))


def _remove_where(values: Any, name: str) -> None:
    for index in reversed([i for i, value in enumerate(values) if value.name == name]):
        del values[index]
