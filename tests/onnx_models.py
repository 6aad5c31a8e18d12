"""Small ONNX models, made node by node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = Any
Node = onnx.NodeProto

EPSILON = 0.5  # exact in float32, which attributes are of
IMAGE, MATRIX = ("N", 4, 7, 7), ("N", 4)


def conv(x: str = "x", y: str = "c", w: str = "w", op: str = "Conv", **attributes: Any) -> Node:
    inputs = [x, w, *attributes.pop("bias", ())]
    name = f"the_{op.lower()}" if y != "d" else "another"
    return helper.make_node(op, inputs, [y], name, **attributes)


def norm(x: str = "c", y: str = "y", of: str = "", **attributes: Any) -> Node:
    parameters = [f"{of}{name}" for name in ("scale", "offset", "mean", "variance")]
    outputs = [y, *attributes.pop("more", ())]
    attributes = {"epsilon": EPSILON} | attributes
    name = f"{of}norm_of_{x}"
    return helper.make_node("BatchNormalization", [x, *parameters], outputs, name, **attributes)


def op(kind: str, inputs: str, outputs: str, **attributes: Any) -> Node:
    return helper.make_node(
        kind, inputs.split(), outputs.split(), f"a_{kind.lower()}", **attributes
    )


def arrays(channels: int = 6, of: str = "", **more: tuple[int, ...]) -> dict[str, Array]:
    """Return what a batch norm holds, with a scale and a variance of 0; and arrays of a shape."""
    rng = np.random.default_rng(channels)
    held = {
        "scale": rng.normal(size=channels),
        "offset": rng.normal(size=channels),
        "mean": rng.normal(size=channels),
        "variance": rng.uniform(0.1, 2, channels),
    }
    held["scale"][0] = held["variance"][1] = 0
    held = {f"{of}{name}": value for name, value in held.items()}
    return held | {name: rng.normal(size=shape) for name, shape in more.items()}


def model_of(
    nodes: list[Node],
    initializers: dict[str, Array],
    x: tuple[Any, ...] = IMAGE,
    *,
    opset: int = 17,
    ir_version: int = 8,
    element: int = TensorProto.DOUBLE,
    outputs: str = "y",
    rank: int | None = None,
    inputs: dict[str, tuple[Any, ...]] | None = None,
) -> onnx.ModelProto:
    """Return a model that the checker of `onnx` finds valid."""
    dtype = helper.tensor_dtype_to_np_dtype(element)
    tensors = [numpy_helper.from_array(np.asarray(v, dtype), k) for k, v in initializers.items()]
    out = [None] * (len(x) if rank is None else rank)
    given = [
        helper.make_tensor_value_info(name, element, shape)
        for name, shape in ({"x": x} | (inputs or {})).items()
    ]
    if ir_version < 4:
        given += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
    results = [helper.make_tensor_value_info(name, element, out) for name in outputs.split()]
    graph = helper.make_graph(nodes, "graph", given, results, tensors)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("of.others", 3)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
    helper.set_model_props(model, {"whose": "ours"})
    onnx.checker.check_model(model)
    return model
