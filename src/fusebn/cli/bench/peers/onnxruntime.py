"""ONNX Runtime: inference of a model of one operator, which knows channels as axis 1 only."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from fusebn.cli.bench.answers import Answer
from fusebn.cli.bench.cases import EPSILON, Case, Data, Verb


class OnnxRuntime:
    """The peer. Its own arena recycles memory, whatever the allocator."""

    def __init__(self, threads: int) -> None:
        self.runtime: Any = importlib.import_module("onnxruntime")
        self.onnx: Any = importlib.import_module("onnx")
        self.threads = threads
        self.version = self.runtime.__version__

    def load(self, case: Case, data: Data) -> None:
        """See Peer."""
        if case.axis != 1:
            raise ValueError("channels must be axis 1")
        onnx, helper = self.onnx, self.onnx.helper
        element = helper.np_dtype_to_tensor_dtype(data.x.dtype)
        x, y = (helper.make_tensor_value_info(name, element, case.dims) for name in "xy")
        names = ("scale", "offset", "mean", "variance")
        node = helper.make_node("BatchNormalization", ["x", *names], ["y"], epsilon=EPSILON)
        vectors = [
            onnx.numpy_helper.from_array(v.astype(data.x.dtype), name)
            for v, name in zip(data[3:], names, strict=True)
        ]
        graph = helper.make_graph([node], "inference", [x], [y], vectors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        self.session = self.runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.x = data.x

    def call(self, verb: Verb) -> Callable[[], Any] | None:
        """See Peer."""
        return None if verb.training else lambda: self.session.run(None, {"x": self.x})

    def answer(self, verb: Verb, result: Any) -> Answer:
        """See Peer."""
        return {"y": np.asarray(result[0])}


create = OnnxRuntime
