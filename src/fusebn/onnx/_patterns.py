"""A batch norm and the linear node beside it, and how the one is folded into the other.

What stands in the way is raised as `_Kept`, with the reason as the report has it. Nothing has been
changed then: a fold is computed before it is written.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import numpy as np
import onnx
from numpy.typing import NDArray

from fusebn._folding import affine, fold
from fusebn._report import FoldReport, FoldRow
from fusebn.onnx._graph import Graph, Reader, subgraphs

Array = NDArray[Any]

_NORM = "BatchNormalization"
_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_OPSET = 7  # from it on, inference is what it is now


class _Kept(Exception):
    """Why a batch norm stays."""


def fold_all(model: onnx.ModelProto) -> FoldReport:
    """Fold what can be folded, in place, and say of each batch norm what became of it."""
    graph = Graph(model)
    rows = [_row(graph, node, _opset(model)) for node in graph.nodes if _is(node, _NORM)]
    kept = [*_inside_nodes(graph.nodes), *_inside_functions(model)]
    return FoldReport(rows + [FoldRow(_label(node), _NORM, None, why) for node, why in kept])


def _row(graph: Graph, norm: onnx.NodeProto, opset: int) -> FoldRow:
    name, into, reason = _label(norm), None, ""
    try:
        into = _fold(graph, norm, opset)
    except _Kept as kept:
        reason = str(kept)
    return FoldRow(name, _NORM, into, reason)


def _fold(graph: Graph, norm: onnx.NodeProto, opset: int) -> str:
    """Fold one batch norm, and return into what."""
    if opset < _OPSET:
        raise _Kept(f"the model has opset {opset}, before {_OPSET}")
    held = _variables(graph, norm)
    try:
        return _into_the_one_before(graph, norm, held)
    except _Kept as before:
        try:
            return _into_the_one_behind(graph, norm, held)
        except _Kept as behind:
            raise _Kept(f"{before}; {behind}") from None


def _inside_nodes(nodes: Any) -> Iterator[tuple[onnx.NodeProto, str]]:
    for node in nodes:
        for graph in subgraphs(node):
            within = f"in a subgraph of {_kind_and_label(node)}"
            yield from ((inner, within) for inner in graph.node if _is(inner, _NORM))
            yield from _inside_nodes(graph.node)


def _inside_functions(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, str]]:
    for function in model.functions:
        within = f"in the function {function.name}"
        yield from ((inner, within) for inner in function.node if _is(inner, _NORM))
        yield from _inside_nodes(function.node)


# ---- nodes ----


def _is(node: onnx.NodeProto, *kinds: str) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type in kinds


def _opset(model: onnx.ModelProto) -> int:
    return max((i.version for i in model.opset_import if i.domain in ("", "ai.onnx")), default=1)


def _label(node: onnx.NodeProto) -> str:
    return node.name or next(filter(None, node.output), "")


def _kind_and_label(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {_label(node)}"


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return default


def _set_attribute(node: onnx.NodeProto, name: str, value: float) -> None:
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.f = value


def _constant(graph: Graph, name: str, what: str) -> Array:
    value = graph.constant(name)
    if value is None:
        if graph.overridable(name):
            raise _Kept(f"{what} can be overridden by the caller: it is an input too")
        raise _Kept(f"{what} is no constant")
    return value


# ---- the batch norm ----


def _variables(graph: Graph, norm: onnx.NodeProto) -> dict[str, Any]:
    """Return what normalizes, as `fusebn.fold` takes it."""
    if _attribute(norm, "training_mode", 0) or any(norm.output[1:]):
        raise _Kept("in training mode")
    if not _attribute(norm, "spatial", 1):
        raise _Kept("each position has statistics of its own (spatial=0)")
    names = ("scale", "offset", "mean", "variance")
    held: dict[str, Any] = {
        name: _constant(graph, value, f"its {name}")
        for name, value in zip(names, norm.input[1:], strict=True)
    }
    return held | {"epsilon": _attribute(norm, "epsilon", float(np.float32(1e-5)))}


# ---- the linear node ----


class _Linear(NamedTuple):
    """A node that `fusebn.fold` has a kind for."""

    node: onnx.NodeProto
    add: onnx.NodeProto | None
    """The Add of its bias, where that is a node of its own."""
    kind: str
    layout: str
    groups: int
    weight: Array
    bias: Array | None

    @property
    def output(self) -> str:
        """What it makes, bias included."""
        name: str = (self.add or self.node).output[0]
        return name


def _linear(graph: Graph, node: onnx.NodeProto, add: onnx.NodeProto | None = None) -> _Linear:
    weight = _constant(graph, node.input[1], f"the weight of {_kind_and_label(node)}")
    if node.op_type == "Gemm":
        layout = "torch" if _attribute(node, "transB", 0) else "tensorflow"
        alpha = _attribute(node, "alpha", 1.0)
        if alpha != 1:
            weight = (weight.astype(np.float64) * alpha).astype(weight.dtype)
        channels = weight.shape[0 if layout == "torch" else 1]
        bias = _bias(graph, node, 2, channels, _attribute(node, "beta", 1.0))
        return _Linear(node, None, "dense", layout, 1, weight, bias)
    if node.op_type == "MatMul":
        if weight.ndim != 2:
            raise _Kept(f"the weight of {_kind_and_label(node)} is no matrix")
        bias = None
        if add is not None:
            bias = _bias(graph, add, _index_of_bias(add, node), weight.shape[1])
        return _Linear(node, add, "dense", "tensorflow", 1, weight, bias)
    kind = "conv" if node.op_type == "Conv" else "conv_transpose"
    groups = _attribute(node, "group", 1)
    channels = weight.shape[0] if kind == "conv" else weight.shape[1] * groups
    return _Linear(node, None, kind, "torch", groups, weight, _bias(graph, node, 2, channels))


def _bias(
    graph: Graph, node: onnx.NodeProto, index: int, channels: int, factor: float = 1.0
) -> Array | None:
    """Return the bias times a factor, one value a channel; None where there is none."""
    if len(node.input) <= index or not node.input[index] or factor == 0:
        return None
    bias = _constant(graph, node.input[index], f"the bias of {_kind_and_label(node)}")
    if bias.size != 1 and bias.shape != (*(1,) * (bias.ndim - 1), channels):
        raise _Kept(f"the bias of {_kind_and_label(node)} has more than one value a channel")
    return np.broadcast_to(bias.reshape(-1), channels).astype(np.float64) * factor


def _write(graph: Graph, linear: _Linear, weight: Array, bias: Array, output: str) -> str:
    """Give a linear node another weight, bias and name of its output; return what it is called.

    A bias of zeros is left out where there was none.
    """
    node, label = linear.node, _kind_and_label(linear.node)
    graph.set_constant(node, 1, weight)
    for name in ("alpha", "beta"):
        _set_attribute(node, name, 1)
    has_place = linear.add is not None or any(node.input[2:])
    if bias.any() and not has_place and node.op_type == "MatMul":
        _add_bias(graph, node, bias, output)
        return label
    if linear.add is not None:
        graph.set_constant(linear.add, _index_of_bias(linear.add, node), bias)
    elif bias.any() or has_place:
        graph.set_constant(node, 2, bias)
    graph.rename_output(linear.add or node, output)
    return label


def _add_bias(graph: Graph, matmul: onnx.NodeProto, bias: Array, output: str) -> None:
    if matmul.output[0] == output:
        graph.rename_output(matmul, graph.unused_name(f"{output}_without_bias"))
    inputs = [matmul.output[0], graph.add_constant(f"{output}_bias", bias)]
    name = matmul.name and graph.unused_name(f"{matmul.name}_bias")
    graph.insert_after(matmul, onnx.helper.make_node("Add", inputs, [output], name))


def _index_of_bias(add: onnx.NodeProto, matmul: onnx.NodeProto) -> int:
    return 0 if add.input[1] == matmul.output[0] else 1


def _only_reader(graph: Graph, name: str) -> Reader | None:
    readers = graph.readers(name)
    return readers[0] if len(readers) == 1 else None


def _folded(linear: _Linear, held: dict[str, Any], before: bool) -> tuple[Array, Array]:
    try:
        if before and affine(held, held["mean"].size, linear.weight.shape).shift.any():
            _check_exact(linear)
        return fold(
            linear.weight,
            linear.bias,
            held,
            kind=linear.kind,
            layout=linear.layout,
            groups=linear.groups,
            before=before,
            padded=linear.kind == "conv" and _pads(linear),
        )
    except ValueError as error:
        raise _Kept(str(error)) from None


# ---- a linear node, then the batch norm ----


def _into_the_one_before(graph: Graph, norm: onnx.NodeProto, held: dict[str, Any]) -> str:
    linear = _the_one_before(graph, norm)
    new = _folded(linear, held, before=False)
    output = norm.output[0]
    graph.remove(norm)
    return _write(graph, linear, *new, output)


def _the_one_before(graph: Graph, norm: onnx.NodeProto) -> _Linear:
    x = norm.input[0]
    node = graph.maker(x)
    if node is None:
        raise _Kept("behind an input")
    matmul = _matmul_of(graph, node) if _is(node, "Add") else None
    if matmul is None and not _is(node, *_LINEAR):
        raise _Kept(f"behind {_kind_and_label(node)}")
    if _only_reader(graph, x) is None:
        raise _Kept(f"others read the output of {_kind_and_label(node)} too")
    if (matmul is not None or _is(node, "MatMul")) and graph.rank(x) != 2:
        raise _Kept(f"the output of {_kind_and_label(node)} is not known to have 2 axes")
    return _linear(graph, node) if matmul is None else _linear(graph, matmul, node)


def _matmul_of(graph: Graph, add: onnx.NodeProto) -> onnx.NodeProto | None:
    """Return the MatMul to whose output an Add adds a constant, and nobody else reads it."""
    for x, other in (add.input, reversed(add.input)):
        node = graph.maker(x)
        if node is not None and _is(node, "MatMul") and graph.constant(other) is not None:
            return node if _only_reader(graph, x) else None
    return None


# ---- the batch norm, then a linear node ----


def _into_the_one_behind(graph: Graph, norm: onnx.NodeProto, held: dict[str, Any]) -> str:
    linear = _the_one_behind(graph, norm)
    new = _folded(linear, held, before=True)
    linear.node.input[0] = norm.input[0]
    graph.remove(norm)
    return _write(graph, linear, *new, linear.output)


def _the_one_behind(graph: Graph, norm: onnx.NodeProto) -> _Linear:
    y = norm.output[0]
    reader = _only_reader(graph, y)
    if reader is None:
        raise _Kept("several read its output" if graph.readers(y) else "nobody reads its output")
    node = reader.node
    if node is None:
        raise _Kept("before an output")
    if reader.slot != 0 or not _is(node, *_LINEAR):
        raise _Kept(f"before {_kind_and_label(node)}")
    if _attribute(node, "transA", 0):
        raise _Kept(f"{_kind_and_label(node)} transposes what it returns")
    if not _is(node, "MatMul"):
        return _linear(graph, node)
    if graph.rank(y) != 2:
        raise _Kept(f"the input of {_kind_and_label(node)} is not known to have 2 axes")
    after = _only_reader(graph, node.output[0])
    if after is not None and after.node is not None and _is(after.node, "Add"):
        add = after.node
        if _matmul_of(graph, add) == node:
            return _linear(graph, node, add)
    return _linear(graph, node)


def _check_exact(linear: _Linear) -> None:
    """Refuse what is not exact, for a batch norm that makes something else than 0 of 0."""
    if linear.kind == "conv_transpose":
        _not_exact(linear, "has other taps at the border, and the norm shifts")
    if linear.kind == "conv" and _pads(linear):
        _not_exact(linear, "pads its output with zeros")


def _not_exact(linear: _Linear, why: str) -> NoReturn:
    raise _Kept(f"{_kind_and_label(linear.node)} {why}")


def _pads(linear: _Linear) -> bool:
    kind = _attribute(linear.node, "auto_pad", b"NOTSET")
    if kind == b"NOTSET":
        return any(_attribute(linear.node, "pads", ()))
    return kind != b"VALID" and any(size > 1 for size in linear.weight.shape[2:])
