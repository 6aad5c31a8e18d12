"""ONNX models of every pattern, folded, and run by the evaluator of `onnx` in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import fusebn.onnx
from onnx_models import IMAGE, MATRIX, Array, Node, arrays, conv, model_of, norm, op


class BatchNormalization(OpRun):
    """The evaluator's own normalizes by the batch before opset 14, in inference, too."""

    def _run(self, x, scale, offset, mean, variance, epsilon=None, **unused):
        channels = [1, -1, *[1] * (x.ndim - 2)]
        held = (v.astype(np.float64).reshape(channels) for v in (scale, offset, mean, variance))
        scale, offset, mean, variance = held
        y = (x.astype(np.float64) - mean) / np.sqrt(variance + epsilon) * scale + offset
        return (y.astype(x.dtype),)


class ConvTranspose(OpRun):
    """The evaluator's own has no groups."""

    def _run(self, *arrays, group=None, strides=None, pads=None, **unused):
        tensors = map(torch.tensor, arrays)
        y = F.conv_transpose2d(
            *tensors, stride=strides or 1, padding=(pads or [0])[:1] * 2, groups=group or 1
        )
        return (y.numpy(),)


def answers(model: onnx.ModelProto) -> list[Array]:
    """Return what a model makes of random input."""
    value = next(value for value in model.graph.input if value.name == "x")
    shape = [axis.dim_value or 3 for axis in value.type.tensor_type.shape.dim]
    x = np.random.default_rng(1).normal(size=shape)
    dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    evaluator = ReferenceEvaluator(model, new_ops=[BatchNormalization, ConvTranspose])
    return evaluator.run(None, {"x": x.astype(dtype)})


def same_answers(one: onnx.ModelProto, other: onnx.ModelProto, within: float = 1e-12) -> None:
    onnx.checker.check_model(other, full_check=True)
    for want, actual in zip(answers(one), answers(other), strict=True):
        assert want.dtype == actual.dtype
        want, actual = want.astype(np.float64), actual.astype(np.float64)
        assert 0 < np.abs(want).max() < np.inf
        assert np.abs(actual - want).max() <= within * np.abs(want).max()


def ops(model: onnx.ModelProto) -> str:
    return " ".join(node.op_type for node in model.graph.node)


def folded(model: onnx.ModelProto, left: str, *into: str, **options: Any) -> onnx.ModelProto:
    """Fold; check the nodes that are left, what is said of each norm, and the answers."""
    before = model.SerializeToString(deterministic=True)
    new, report = fusebn.onnx.fold(model)
    assert model.SerializeToString(deterministic=True) == before
    assert ops(new) == left
    assert tuple(row.layer for row in report) == into
    assert all(row.kind == "BatchNormalization" for row in report)
    same_answers(model, new, **options)
    for field in ("input", "output"):
        names = [[value.name for value in getattr(m.graph, field)] for m in (model, new)]
        assert names[0] == names[1] or (field == "input" and model.ir_version < 4)
    if new.ir_version < 4:
        shapes = {
            v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in new.graph.input
        }
        assert all(shapes[tensor.name] == tensor.dims for tensor in new.graph.initializer)
    unread = {t.name for t in new.graph.initializer} - {i for n in new.graph.node for i in n.input}
    assert not unread
    return new


def kept(model: onnx.ModelProto, *reasons: str) -> None:
    """Fold; check that nothing has changed, and what is said of each norm."""
    new, report = fusebn.onnx.fold(model)
    assert new == model
    assert len(report) == len(reasons)
    for row, reason in zip(report, reasons, strict=True):
        assert row.layer is None
        assert reason in row.reason


# ---- a linear node, then the norm ----

OPSETS = [*range(9, 23)]


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("bias", [(), ("b",)])
def test_conv(opset, bias):
    held = arrays(w=(6, 2, 3, 3), **({"b": (6,)} if bias else {}))
    nodes = [conv(bias=bias, group=2, pads=[1, 1, 1, 1], strides=[2, 1]), norm()]
    model = model_of(nodes, held, opset=opset, ir_version=3 if opset == 9 else 8)
    new = folded(model, "Conv", "Conv the_conv")
    assert new.graph.node[0].output == ["y"]
    assert len(new.graph.initializer) == 2


@pytest.mark.parametrize("rank", [1, 3])
def test_conv_of_any_rank(rank):
    held = arrays(w=(6, 4, *[3] * rank))
    model = model_of([conv(), norm()], held, ("N", 4, *[5] * rank))
    folded(model, "Conv", "Conv the_conv")


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("group", [1, 2])
def test_conv_transpose(opset, group):
    held = arrays(w=(4, 6 // group, 3, 3), b=(6,))
    nodes = [conv(op="ConvTranspose", bias=("b",), group=group, strides=[2, 2]), norm()]
    folded(model_of(nodes, held, opset=opset), "ConvTranspose", "ConvTranspose the_convtranspose")


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("shape", [(6,), (1, 6), (1,), ()])
def test_gemm(opset, shape):
    turned = opset % 2
    held = arrays(w=(6, 4) if turned else (4, 6), b=shape)
    nodes = [conv(op="Gemm", bias=("b",), transB=turned, alpha=0.5, beta=2.0), norm()]
    model = model_of(nodes, held, MATRIX, opset=opset, ir_version=3 if opset == 9 else 8)
    new = folded(model, "Gemm", "Gemm the_gemm", within=1e-6)
    attributes = {a.name: helper.get_attribute_value(a) for a in new.graph.node[0].attribute}
    assert attributes == {"transB": turned, "alpha": 1, "beta": 1}


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_gemm_of_a_matrix_turned_without_a_bias_that_counts(beta):
    held = arrays(w=(4, 6), **({} if beta else {"b": (3, 6)}))
    nodes = [conv(op="Gemm", bias=() if beta else ("b",), transA=1, beta=beta), norm()]
    folded(model_of(nodes, held, (4, 3)), "Gemm", "Gemm the_gemm")


@pytest.mark.parametrize("opset", OPSETS)
def test_matmul_gets_an_add(opset):
    model = model_of([conv(op="MatMul"), norm()], arrays(w=(4, 6)), MATRIX, opset=opset)
    new = folded(model, "MatMul Add", "MatMul the_matmul")
    assert [node.output[0] for node in new.graph.node] == ["c", "y"]


@pytest.mark.parametrize("inputs", ["c b", "b c"])
@pytest.mark.parametrize("shape", [(6,), (1, 6), ()])
def test_matmul_whose_add_is_there(inputs, shape):
    nodes = [conv(op="MatMul"), op("Add", inputs, "a"), norm("a")]
    model = model_of(nodes, arrays(w=(4, 6), b=shape), MATRIX)
    folded(model, "MatMul Add", "MatMul the_matmul")


def test_matmul_without_a_shift_needs_no_add():
    held = arrays(w=(4, 6)) | {"mean": np.zeros(6), "offset": np.zeros(6)}
    folded(model_of([conv(op="MatMul"), norm()], held, MATRIX), "MatMul", "MatMul the_matmul")


def test_a_bias_that_becomes_0():
    held = arrays(w=(6, 4, 3, 3)) | {"offset": np.zeros(6)}
    held["b"] = held["mean"]
    new = folded(model_of([conv(bias=("b",)), norm()], held), "Conv", "Conv the_conv")
    assert not numpy_helper.to_array(new.graph.initializer[1]).any()


def test_the_default_epsilon():
    model = model_of([conv(), norm()], arrays(w=(6, 4, 3, 3)))
    model.graph.node[1].ClearField("attribute")
    folded(model, "Conv", "Conv the_conv")


def test_norm_after_norm_after_conv():
    held = arrays(w=(6, 4, 1, 1)) | arrays(of="second_")
    nodes = [conv(), norm(y="n"), norm("n", of="second_")]
    folded(model_of(nodes, held), "Conv", "Conv the_conv", "Conv the_conv")


# ---- the norm, then a linear node ----


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("bias", [(), ("b",)])
def test_norm_before_conv(opset, bias):
    held = arrays(4, w=(6, 2, 3, 3), **({"b": (6,)} if bias else {}))
    nodes = [norm("x", "n"), conv("n", "y", bias=bias, group=2, strides=[2, 1])]
    folded(model_of(nodes, held, opset=opset), "Conv", "Conv the_conv")


@pytest.mark.parametrize(
    ("kernel", "attributes", "exact"),
    [
        (3, {"auto_pad": "VALID"}, True),
        (3, {"auto_pad": "SAME_UPPER"}, False),
        (3, {"auto_pad": "SAME_LOWER"}, False),
        (1, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, True),
        (1, {"pads": [0, 0, 0, 1]}, False),
        (3, {"auto_pad": "NOTSET", "pads": [0, 0, 0, 0]}, True),
    ],
)
def test_norm_before_conv_with_or_without_padding(kernel, attributes, exact):
    held = arrays(4, w=(6, 4, kernel, kernel))
    model = model_of([norm("x", "n"), conv("n", "y", **attributes)], held)
    if exact:
        folded(model, "Conv", "Conv the_conv")
    else:
        kept(model, "behind an input; Conv the_conv pads its output with zeros")


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_norm_that_shifts_nothing_before_a_border(kind):
    held = arrays(4, w=(4, 4, 3, 3), b=(4,)) | {"mean": np.zeros(4), "offset": np.zeros(4)}
    nodes = [norm("x", "n"), conv("n", "y", op=kind, bias=("b",), pads=[1, 1, 1, 1])]
    folded(model_of(nodes, held), kind, f"{kind} the_{kind.lower()}")


@pytest.mark.parametrize("turned", [0, 1])
def test_norm_before_gemm(turned):
    held = arrays(4, w=(6, 4) if turned else (4, 6), b=(6,))
    nodes = [norm("x", "n"), conv("n", "y", op="Gemm", bias=("b",), transB=turned, alpha=0.5)]
    folded(model_of(nodes, held, MATRIX), "Gemm", "Gemm the_gemm")


def test_norm_before_matmul():
    model = model_of([norm("x", "n"), conv("n", "y", op="MatMul")], arrays(4, w=(4, 6)), MATRIX)
    new = folded(model, "MatMul Add", "MatMul the_matmul")
    assert new.graph.node[0].input[0] == "x"


def test_norm_before_matmul_whose_add_is_there():
    nodes = [norm("x", "n"), conv("n", op="MatMul"), op("Add", "b c", "y")]
    model = model_of(nodes, arrays(4, w=(4, 6), b=(6,)), MATRIX)
    folded(model, "MatMul Add", "MatMul the_matmul")


def test_norm_before_matmul_whose_add_is_no_bias():
    nodes = [norm("x", "n"), conv("n", op="MatMul"), op("Add", "c x", "y")]
    model = model_of(nodes, arrays(4, w=(4, 4)), MATRIX)
    folded(model, "MatMul Add Add", "MatMul the_matmul")


def test_the_one_before_is_preferred():
    held = arrays(4, w=(4, 4, 3, 3), v=(6, 4, 3, 3))
    nodes = [conv(), norm(y="n"), conv("n", "y", "v", pads=[1, 1, 1, 1])]
    folded(model_of(nodes, held), "Conv Conv", "Conv the_conv")


# ---- who else reads ----


def test_a_shared_weight_is_copied():
    nodes = [conv(), norm(y="n"), conv(y="d"), op("Add", "n d", "y")]
    model = model_of(nodes, arrays(w=(6, 4, 3, 3)))
    new = folded(model, "Conv Conv Add", "Conv the_conv")
    kept_weight = next(t for t in new.graph.initializer if t.name == "w")
    assert kept_weight == next(t for t in model.graph.initializer if t.name == "w")


def test_two_norms_that_share_everything():
    nodes = [conv(bias=("b",)), norm(y="n"), conv(y="d", bias=("b",)), norm("d", "m")]
    nodes.append(op("Sub", "n m", "z"))
    nodes.append(op("Add", "z n", "y"))
    model = model_of(nodes, arrays(w=(6, 4, 3, 3), b=(6,)))
    folded(model, "Conv Conv Sub Add", "Conv the_conv", "Conv another")


@pytest.mark.parametrize("opset", OPSETS)
def test_another_reader_of_what_is_normalized(opset):
    nodes = [conv(), norm(y="n"), op("Add", "n c", "y")]
    model = model_of(nodes, arrays(w=(6, 4, 3, 3)), opset=opset)
    kept(model, "others read the output of Conv the_conv too; before Add a_add")


def test_another_reader_of_what_the_bias_is_added_to():
    nodes = [conv(op="MatMul"), op("Add", "c b", "a"), norm("a", "n"), op("Sub", "n c", "y")]
    kept(model_of(nodes, arrays(w=(4, 6), b=(6,)), MATRIX), "behind Add a_add")


def test_what_is_normalized_is_an_output_too():
    model = model_of([conv(), norm()], arrays(w=(6, 4, 3, 3)), outputs="y c")
    kept(model, "others read the output of Conv the_conv too; before an output")


def test_a_norm_before_two():
    nodes = [norm("x", "n"), conv("n", "y"), conv("n", "z")]
    kept(model_of(nodes, arrays(4, w=(6, 4, 3, 3)), outputs="y z"), "several read its output")


def branches(*nodes: Node, rank: int = 4) -> dict[str, Any]:
    """Return both branches of an If."""
    out = [helper.make_tensor_value_info("z", TensorProto.DOUBLE, [None] * rank)]
    other = [op("Identity", "x", "z")]
    return {
        "then_branch": helper.make_graph(list(nodes), "then", [], out),
        "else_branch": helper.make_graph(other, "else", [], out),
    }


CONDITION = helper.make_node(
    "Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True), "yes")
)


def test_a_subgraph_reads_what_is_normalized():
    then = branches(op("Relu", "c", "z"))
    nodes = [CONDITION, conv(), norm(), helper.make_node("If", ["yes"], ["i"], "an_if", **then)]
    model = model_of(nodes, arrays(w=(6, 4, 3, 3)), outputs="y i")
    kept(model, "others read the output of Conv the_conv too")


def test_a_subgraph_shares_the_weight_and_the_scale():
    then = branches(conv(y="d"), op("Mul", "d d", "z"))
    nodes = [CONDITION, conv(), norm(), helper.make_node("If", ["yes"], ["i"], "an_if", **then)]
    model = model_of(nodes, arrays(w=(6, 4, 3, 3)), outputs="y i")
    new, _ = fusebn.onnx.fold(model)
    assert ops(new) == "Constant Conv If"
    same_answers(model, new)


def test_a_norm_in_a_subgraph_stays():
    then = branches(conv(), norm(y="z"))
    nodes = [CONDITION, helper.make_node("If", ["yes"], ["y"], "an_if", **then)]
    kept(model_of(nodes, arrays(w=(6, 4, 3, 3))), "in a subgraph of If an_if")


def test_a_norm_in_a_function_stays():
    names = ["x", "w", "scale", "offset", "mean", "variance"]
    opsets = [helper.make_opsetid("", 17)]
    block = helper.make_function("of.others", "Block", names, ["y"], [conv(), norm()], opsets)
    call = helper.make_node("Block", names, ["y"], domain="of.others")
    model = model_of([call], arrays(w=(6, 4, 3, 3)))
    model.functions.append(block)
    kept(model, "in the function Block")


# ---- where constants come from ----


def constant(name: str, value: Array) -> Node:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value, name))


@pytest.mark.parametrize("shared", [False, True])
def test_constants_that_are_nodes(shared):
    held = arrays(w=(6, 4, 3, 3), b=(6,))
    nodes = [constant(name, value) for name, value in held.items()]
    nodes += [conv(bias=("b",)), norm(y="n"), op("Relu", "n", "r")]
    nodes += [conv(y="d"), op("Add", "r d", "y")] if shared else [op("Neg", "r", "y")]
    left = "Constant Conv Relu Conv Add" if shared else "Conv Relu Neg"
    folded(model_of(nodes, {}), left, "Conv the_conv")


def test_constants_that_are_lists():
    held = arrays(w=(6, 4, 3, 3))
    nodes = [helper.make_node("Constant", [], ["mean"], value_floats=held.pop("mean"))]
    nodes += [helper.make_node("Constant", [], ["one"], value_float=1.0), conv(), norm(y="n")]
    nodes += [op("Add", "n one", "y")]
    model = model_of(nodes, held, element=TensorProto.FLOAT)
    folded(model, "Constant Conv Add", "Conv the_conv", within=1e-6)


def test_constants_by_way_of_identity():
    held = arrays(w=(6, 4, 3, 3))
    held["the_mean"] = held.pop("mean")
    nodes = [op("Identity", "w", "v"), op("Identity", "the_mean", "mean"), conv(w="v"), norm()]
    folded(model_of(nodes, held), "Conv", "Conv the_conv")


@pytest.mark.parametrize(
    ("name", "what"), [("w", "the weight of Conv the_conv"), ("b", "the bias of Conv the_conv")]
)
def test_a_weight_that_is_computed(name, what):
    held = arrays(w=(6, 4, 3, 3), b=(6,))
    held["v"] = held.pop(name)
    nodes = [op("Neg", "v", name), conv(bias=("b",)), norm()]
    kept(model_of(nodes, held), f"{what} is no constant; before an output")


def test_a_mean_that_is_an_input():
    held = arrays(w=(6, 4, 3, 3))
    del held["mean"]
    kept(model_of([conv(), norm()], held, inputs={"mean": (6,)}), "its mean is no constant")


@pytest.mark.parametrize("name", ["w", "scale"])
def test_an_initializer_that_the_caller_may_override(name):
    held = arrays(w=(6, 4, 3, 3))
    model = model_of([conv(), norm()], held, inputs={name: held[name].shape})
    kept(model, "can be overridden by the caller: it is an input too")


def test_inputs_for_initializers_before_ir_version_4():
    nodes = [conv(), norm(y="n"), conv(y="d"), op("Add", "n d", "y")]
    model = model_of(nodes, arrays(w=(6, 4, 3, 3)), opset=9, ir_version=3)
    new = folded(model, "Conv Conv Add", "Conv the_conv")
    initializers = {tensor.name for tensor in new.graph.initializer}
    assert {value.name for value in new.graph.input} == {"x"} | initializers


# ---- norms and neighbours of other kinds ----


def test_training_mode():
    model = model_of([conv(), norm(training_mode=1)], arrays(w=(6, 4, 3, 3)))
    kept(model, "in training mode")
    more = {"more": ("running_mean", "running_variance"), "training_mode": 1}
    kept(model_of([conv(), norm(**more)], arrays(w=(6, 4, 3, 3))), "in training mode")
    held = arrays(w=(6, 4, 3, 3))
    more = {"more": ("m", "v", "saved_m", "saved_v")}
    kept(model_of([conv(), norm(**more)], held, opset=9), "in training mode")


@pytest.mark.parametrize("opset", [6, 7, 8])
def test_older_opsets(opset):
    held = arrays(w=(6, 4, 3, 3))
    model = model_of([conv(), norm()], held, opset=opset, ir_version=3)
    if opset < 7:
        kept(model, "opset 6, before 7")
    else:
        new, report = fusebn.onnx.fold(model)
        assert (ops(new), report[0].layer) == ("Conv", "Conv the_conv")
        onnx.checker.check_model(new)
        model.graph.node[1].attribute.append(helper.make_attribute("spatial", 0))
        kept(model, "each position has statistics of its own (spatial=0)")


@pytest.mark.parametrize(
    ("nodes", "x", "reason"),
    [
        ([op("Relu", "x", "c"), norm()], IMAGE, "behind Relu a_relu; before an output"),
        ([norm("x", "n"), op("Relu", "n", "y")], IMAGE, "behind an input; before Relu a_relu"),
        ([norm("x", "n"), conv("w", "y", "n", op="MatMul")], (4, 4), "before MatMul the_matmul"),
        ([norm("x", "n"), conv("n", "y", op="Gemm", transA=1)], (4, 4), "transposes what it"),
        ([norm("x", "n"), conv("n", "y", op="MatMul", w="w4")], (3, 4), "is no matrix"),
        ([conv(op="MatMul"), norm()], (3, 4, 4), "is not known to have 2 axes"),
        ([norm("x", "n"), conv("n", "y", op="MatMul")], (3, 4, 4), "is not known to have 2 axes"),
        (
            [conv(op="Gemm", bias=("rows",)), norm()],
            (5, 4),
            "the bias of Gemm the_gemm has more than one value a channel",
        ),
        (
            [norm("x", "n"), conv("n", "y", op="ConvTranspose", w="w4")],
            IMAGE,
            "ConvTranspose the_convtranspose has other taps at the border, and the norm shifts",
        ),
        ([norm("x", "unread")], IMAGE, "nobody reads its output"),
    ],
)
def test_what_is_not_folded(nodes, x, reason):
    held = arrays(4, w=(4, 4), w4=(4, 4, 3, 3), rows=(5, 4))
    model = model_of(
        nodes if nodes[-1].output[0] == "y" else [*nodes, op("Neg", "x", "y")], held, x
    )
    kept(model, reason)


def test_a_negative_variance():
    held = arrays(w=(6, 4, 3, 3)) | {"variance": -np.ones(6)}
    kept(model_of([conv(), norm()], held), "`layer: variance` must not be negative")


def test_everything_else_stays_as_it_is():
    held = arrays(w=(6, 4, 3, 3), unread=(5,))
    other = helper.make_node("Anything", ["y"], ["z"], domain="of.others", doc_string="kept")
    model = model_of([conv(), norm(), other], held, outputs="y z")
    model.doc_string, model.graph.doc_string = "of a model", "of a graph"
    new, _ = fusebn.onnx.fold(model)
    model.graph.node.pop(1)
    model.graph.node[0].output[0] = "y"
    model.graph.node[0].input.append(new.graph.node[0].input[2])
    for tensor in new.graph.initializer:
        if tensor.name not in ("w", "unread"):
            assert tensor.name == new.graph.node[0].input[2]
    for field in ("initializer", "value_info"):
        new.graph.ClearField(field)
        model.graph.ClearField(field)
    assert new == model


def test_operators_of_others_by_the_same_name():
    nodes = [conv(), norm(), conv("y", "z")]
    nodes[0].domain = nodes[2].domain = "of.others"
    model = model_of(nodes, arrays(w=(6, 6, 3, 3)), outputs="z")
    kept(model, "behind Conv the_conv; before Conv the_conv")


def test_what_is_said_of_a_value_that_is_gone_goes_too():
    model = model_of([conv(), norm()], arrays(w=(6, 4, 3, 3)))
    for name in ("c", "w", "mean"):
        value = helper.make_tensor_value_info(name, TensorProto.DOUBLE, None)
        model.graph.value_info.append(value)
    new = folded(model, "Conv", "Conv the_conv")
    assert [value.name for value in new.graph.value_info] == ["w"]


def test_names_that_are_taken():
    held = arrays(w=(6, 4, 3, 3), w_folded=(1,), y_bias=(1,))
    nodes = [conv(), norm(y="n"), conv(y="d"), op("Mul", "w_folded y_bias", "e")]
    nodes += [op("Add", "n d", "f"), op("Add", "e f", "y")]
    folded(model_of(nodes, held), "Conv Conv Mul Add Add", "Conv the_conv")


def test_names_that_nodes_and_subgraphs_have():
    then = branches(op("Neg", "x", "n_bias"), op("Neg", "n_bias", "z"), rank=2)
    nodes = [CONDITION, conv(op="MatMul"), norm(y="n"), op("Neg", "n", "y")]
    nodes.append(helper.make_node("If", ["yes"], ["i"], "the_matmul_bias", **then))
    new = folded(
        model_of(nodes, arrays(w=(4, 6)), MATRIX, outputs="y i"),
        "Constant MatMul Add Neg If",
        "MatMul the_matmul",
    )
    assert len({node.name for node in new.graph.node}) == len(new.graph.node)
    assert "n_bias" not in {tensor.name for tensor in new.graph.initializer}


# ---- element types ----


@pytest.mark.parametrize(
    ("element", "within"),
    [
        (TensorProto.FLOAT, 1e-6),
        (TensorProto.FLOAT16, 4e-3),
        (TensorProto.BFLOAT16, 4e-2),
        (TensorProto.DOUBLE, 1e-12),
    ],
)
def test_element_types(element, within):
    model = model_of([conv(), norm()], arrays(w=(6, 4, 3, 3)), element=element, opset=22)
    new = folded(model, "Conv", "Conv the_conv", within=within)
    assert {tensor.data_type for tensor in new.graph.initializer} == {element}


def test_statistics_of_another_type():
    model = model_of([conv(), norm()], arrays(w=(6, 4, 3, 3)), element=TensorProto.FLOAT16)
    for tensor in model.graph.initializer:
        if tensor.name != "w":
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    new = folded(model, "Conv", "Conv the_conv", within=4e-3)
    assert {tensor.data_type for tensor in new.graph.initializer} == {TensorProto.FLOAT16}


def test_weights_that_float16_cannot_hold():
    held = arrays(w=(6, 4, 3, 3)) | {"scale": np.full(6, 6e4)}
    model = model_of([conv(), norm()], held, element=TensorProto.FLOAT16)
    kept(model, "must be of a dtype that holds what it becomes")


# ---- bad input ----


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"onnx.fold: `model` must be an onnx.ModelProto; got str"):
        fusebn.onnx.fold("model.onnx")


def test_data_that_are_not_loaded(tmp_path):
    model = model_of([conv(), norm()], arrays(w=(6, 4, 3, 3)))
    options = {"save_as_external_data": True, "location": "weights", "size_threshold": 0}
    onnx.save_model(model, tmp_path / "m.onnx", **options)
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    with pytest.raises(
        ValueError, match="`model` must have its data loaded; got 'scale' in another"
    ):
        fusebn.onnx.fold(model)
