"""The command `fusebn fold`: what it writes, what it refuses, and that nothing is half written."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

import fusebn.onnx
from fusebn.cli.commands import cli
from onnx_models import MATRIX, arrays, conv, model_of, norm, op
from terminal import type_in

FLOAT = {"element": TensorProto.FLOAT}


def simple(**options: Any) -> onnx.ModelProto:
    return model_of([conv(pads=[1] * 4), norm()], arrays(w=(6, 4, 3, 3)), **(FLOAT | options))


def fold(*args: object) -> Result:
    return CliRunner().invoke(cli, ["fold", *map(str, args)], catch_exceptions=False)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.onnx"
    onnx.save_model(simple(), path)
    return path


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return tmp_path / "new.onnx"


def refused(result: Result, *says: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    for words in says:
        assert words in " ".join(result.stderr.split())


# ---- what it writes ----


def test_a_model(old, new):
    before = old.read_bytes()
    result = fold(old, new)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "norm_of_c" in result.output
    assert "Conv the_conv" in result.output
    assert "1 of 1 folded. Answers differ by " in result.output
    assert f"Wrote {new}." in result.output
    assert onnx.load(new) == fusebn.onnx.fold(simple())[0]
    assert old.read_bytes() == before
    assert sorted(new.parent.iterdir()) == [new, old]


def test_as_a_person_types_it(old, new):
    code, out, err = type_in("fold", old, new / "in" / "a" / "new" / "folder.onnx")
    assert (code, err) == (0, "")
    assert "norm_of_c" in out
    assert [node.op_type for node in onnx.load(new / "in/a/new/folder.onnx").graph.node] == ["Conv"]


@pytest.mark.parametrize("opset", range(9, 23))
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose", "Gemm", "MatMul"])
def test_onnxruntime_gives_the_same_answers(kind, opset, tmp_path, old, new):
    image = kind.startswith("Conv")
    held = arrays(4, w=(4, 4, 3, 3) if image else (4, 4), b=(4,)) | arrays(4, of="second_")
    nodes = [conv("x", op=kind, bias=() if kind == "MatMul" else ("b",)), norm(y="n")]
    nodes += [op("Relu", "n", "r"), norm("r", "s", of="second_")]
    nodes += [helper.make_node("Gemm" if kind == "Gemm" else kind, ["s", "w", "b"], ["y"], "last")]
    if kind == "MatMul":
        nodes[-1].input.pop()
    x = ("N", 4, "H", 9) if image else MATRIX
    version = 3 if opset == 9 else 8  # before 4 the initializers are inputs, too
    onnx.save_model(model_of(nodes, held, x, opset=opset, ir_version=version, **FLOAT), old)
    result = fold(old, new)
    assert result.exit_code == 0
    assert "onnxruntime" in result.output
    count = 1 if kind == "ConvTranspose" else 2  # nothing that shifts goes into the second
    assert f"{count} of 2 folded" in result.output
    # And by onnxruntime as everybody has it, its optimizations on.
    x = np.random.default_rng(0).normal(size=[3, 4, 9, 9][: len(x)]).astype(np.float32)
    want, actual = (
        onnxruntime.InferenceSession(path).run(None, {"x": x})[0] for path in (old, new)
    )
    assert np.abs(actual - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(
    ("element", "opset", "runner", "allowed"),
    [
        ("FLOAT16", 17, "onnxruntime", "2e-02"),
        ("DOUBLE", 9, "the evaluator of onnx", "1e-10"),
        ("DOUBLE", 17, "the evaluator of onnx", "1e-10"),
        ("BFLOAT16", 22, "the evaluator of onnx", "1e-01"),
    ],
)
def test_element_types(element, opset, runner, allowed, old, new):
    element = TensorProto.DataType.Value(element)
    onnx.save_model(simple(element=element, opset=opset), old)
    result = fold(old, new)
    assert result.exit_code == 0
    assert f"{allowed} is allowed ({runner}" in result.output
    assert {tensor.data_type for tensor in onnx.load(new).graph.initializer} == {element}


def test_inputs_of_other_types(old, new):
    held = arrays(w=(4, 6))
    nodes = [op("Gather", "x i", "g"), op("Where", "yes g x", "h"), conv("h", op="MatMul"), norm()]
    nodes.append(op("ArgMax", "y", "largest"))
    more = {"i": (2,), "yes": ()}
    model = model_of(nodes, held, (2, 4), outputs="y largest", inputs=more, **FLOAT)
    integers = model.graph.input[1], model.graph.output[1]
    for value, element in zip((*integers, model.graph.input[2]), (7, 7, 9), strict=True):
        value.type.tensor_type.elem_type = element
    onnx.save_model(model, old)
    result = fold(old, new)
    assert result.exit_code == 0
    assert "i of shape [2], yes of shape []" in result.output


def test_sizes_that_are_not_said_are_looked_for(old, new):
    nodes, held = [conv(), norm()], arrays(w=(6, 4, 40, 3))
    onnx.save_model(model_of(nodes, held, ("N", 4, "H", "H"), **FLOAT), old)
    result = fold(old, new)
    assert result.exit_code == 0
    assert "x of shape [2, 4, 64, 64]" in result.output


def test_sizes_of_one_name_are_one(old, new):
    nodes, held = [op("MatMul", "x u", "v"), conv("v", op="MatMul"), norm()], arrays(w=(32, 6))
    model = model_of(nodes, held, ("M", "K"), inputs={"u": ("K", "N")}, **FLOAT)
    onnx.save_model(model, old)
    assert "x of shape [2, 32], u of shape [32, 32]" in fold(old, new).output


def test_the_least_precise_of_weights_and_outputs_decides(old, new):
    nodes = [conv(), norm(y="n"), op("Cast", "n", "y", to=TensorProto.FLOAT16)]
    model = model_of(nodes, arrays(w=(6, 4, 3, 3)), **FLOAT)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save_model(model, old)
    assert "2e-02 is allowed" in fold(old, new).output


def test_sizes_that_are_given(old, new):
    nodes, held = [conv(op="MatMul"), norm()], arrays(w=(5, 6))
    onnx.save_model(model_of(nodes, held, ("N", "K"), **FLOAT), old)
    refused(fold(old, new), "does not run it on random input", "by --shape")
    assert not new.exists()
    refused(fold(old, new, "--shape", "z=3x5"), "no input 'z', but 'x'")
    result = fold(old, new, "--shape", "x=3x5")
    assert result.exit_code == 0
    assert "x of shape [3, 5]" in result.output


@pytest.mark.parametrize("value", ["x", "x=", "=3", "x=3xfour", "x=-1x3"])
def test_sizes_that_are_none(value, old, new):
    refused(fold(old, new, "--shape", value), f"{value!r} is not of the form NAME=", code=2)


def with_data_outside(path: Path) -> None:
    model = model_of([conv(), norm()], arrays(60, w=(60, 4, 3, 3)), **FLOAT)
    onnx.save_model(model, path, save_as_external_data=True, location="weights", size_threshold=0)


def test_data_in_another_file(tmp_path, old):
    with_data_outside(old)
    held, data = old.read_bytes(), (tmp_path / "weights").read_bytes()
    new = tmp_path / "folder" / "new.onnx"
    new.parent.mkdir()
    (new.parent / "new.onnx.data").write_text("another's")
    assert fold(old, new).exit_code == 0
    assert sorted(path.name for path in new.parent.iterdir()) == [
        "new.onnx",
        "new.onnx.1.data",
        "new.onnx.data",
    ]
    assert (new.parent / "new.onnx.data").read_text() == "another's"
    want, actual = fusebn.onnx.fold(onnx.load(old))[0], onnx.load(new)
    for one, other in zip(want.graph.initializer, actual.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))
    assert (old.read_bytes(), (tmp_path / "weights").read_bytes()) == (held, data)


def test_data_are_in_their_place_before_the_model(old, new, monkeypatch):
    with_data_outside(old)
    moved = []
    monkeypatch.setattr(os, "replace", lambda source, target: moved.append(target.name))
    fold(old, new)
    assert moved == ["new.onnx.data", "new.onnx"]


def test_data_in_another_file_that_is_missing(tmp_path, old, new):
    with_data_outside(old)
    (tmp_path / "weights").unlink()
    refused(fold(old, new), "old.onnx has data in other files")
    assert not new.exists()


def test_data_of_a_constant_in_another_file(tmp_path, old):
    weight = numpy_helper.from_array(np.ones((6, 4, 3, 3), np.float32))
    constant = helper.make_node("Constant", [], ["w"], value=weight)
    nodes = [constant, conv(), norm(y="n"), conv(y="d"), op("Add", "n d", "y")]
    options = {"location": "weights", "size_threshold": 0, "convert_attribute": True}
    model = model_of(nodes, arrays(6), **FLOAT)
    onnx.save_model(model, old, save_as_external_data=True, **options)
    new = tmp_path / "folder" / "new.onnx"
    assert fold(old, new).exit_code == 0
    (tmp_path / "weights").unlink()
    tensor = onnx.load(new).graph.node[0].attribute[0].t
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), np.ones((6, 4, 3, 3)))


def test_in_place(tmp_path, old):
    link = tmp_path / "link.onnx"
    link.symlink_to(old)
    before = old.read_bytes()
    for same in (old, link):
        refused(fold(old, same), "Invalid value for 'OUT': is IN; --force replaces it.", code=2)
    assert old.read_bytes() == before
    assert fold(old, old, "--force").exit_code == 0
    assert [node.op_type for node in onnx.load(old).graph.node] == ["Conv"]


def test_in_place_with_data_in_another_file(tmp_path, old):
    with_data_outside(old)
    want = fusebn.onnx.fold(onnx.load(old))[0]
    assert fold(old, old, "--force").exit_code == 0
    names = ["old.onnx", "old.onnx.data", "weights"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for one, other in zip(want.graph.initializer, onnx.load(old).graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))


# ---- what it refuses ----


def test_every_truncated_file(old, new):
    whole = old.read_bytes()
    new.write_text("a good file")
    ends = [*range(40), *range(len(whole) - 40, len(whole))]
    for length in [*ends, *range(40, len(whole) - 40, 97)]:
        old.write_bytes(whole[:length])
        result = fold(old, new)
        if result.exit_code == 0:  # what was cut off meant nothing
            assert onnx.load(old).graph == simple().graph
            new.write_text("a good file")
        else:
            refused(result, "Error: ")
    assert new.read_text() == "a good file"
    assert sorted(old.parent.iterdir()) == [new, old]


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100, b"{}"])
def test_what_is_no_onnx_file(content, old, new):
    old.write_bytes(content)
    refused(fold(old, new), f"{old} is damaged, or no ONNX file")
    assert not new.exists()


def test_what_is_not_there(tmp_path, new):
    refused(fold(tmp_path / "nothing", new), "does not exist", code=2)
    refused(fold(tmp_path, new), "is a directory", code=2)


def test_a_model_without_a_batch_norm(old, new):
    onnx.save_model(model_of([conv(y="y")], {"w": np.ones((6, 4, 3, 3))}, **FLOAT), old)
    refused(fold(old, new), "old.onnx has no BatchNormalization; nothing was written.")
    assert not new.exists()


def test_a_batch_norm_that_cannot_be_folded(old, new):
    onnx.save_model(model_of([op("Relu", "x", "c"), norm()], arrays(4), **FLOAT), old)
    result = fold(old, new)
    refused(result, "None could be folded; nothing was written.")
    assert "behind Relu a_relu" in result.stdout
    assert not new.exists()


def spoilt(monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    """Let folding do something else as well."""
    right = fusebn.onnx.fold

    def wrong(model: onnx.ModelProto) -> Any:
        folded, report = right(model)
        spoil(folded)
        return folded, report

    monkeypatch.setattr(fusebn.onnx, "fold", wrong)


@pytest.mark.parametrize("element", ["FLOAT", "FLOAT16", "DOUBLE"])
def test_answers_that_have_moved(element, old, new, monkeypatch):
    def spoil(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        array = numpy_helper.to_array(tensor).copy()
        array[2] *= 1 + tolerance * 30
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    tolerance = {"FLOAT": 1e-4, "FLOAT16": 2e-2, "DOUBLE": 1e-10}[element]
    onnx.save_model(simple(element=TensorProto.DataType.Value(element)), old)
    new.write_text("a good file")
    spoilt(monkeypatch, spoil)
    result = fold(old, new)
    refused(result, "The answers have moved, so nothing was written: output 'y' has moved by")
    assert new.read_text() == "a good file"
    assert sorted(old.parent.iterdir()) == [new, old]


def test_integers_that_have_moved(old, new, monkeypatch):
    nodes = [conv(op="MatMul"), norm(y="n"), op("ArgMax", "n", "y", axis=1)]
    model = model_of(nodes, arrays(w=(4, 6)), (50, 4), **FLOAT)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    onnx.save_model(model, old)
    assert fold(old, new).exit_code == 0
    spoilt(monkeypatch, lambda model: model.graph.node[2].CopyFrom(op("ArgMin", "n", "y", axis=1)))
    refused(fold(old, new), "of output 'y' have changed")


def test_another_shape(old, new, monkeypatch):
    spoilt(monkeypatch, lambda model: model.graph.node[0].attribute.pop())
    refused(fold(old, new), "output 'y' has become float32[2, 6, 5, 5]")


def test_a_folded_model_that_is_not_valid(old, new, monkeypatch):
    spoilt(monkeypatch, lambda model: model.graph.node[0].input.append("nothing"))
    refused(fold(old, new), "The folded model is not valid; nothing was written.")
    assert not new.exists()


def test_answers_of_chance(old, new):
    nodes = [conv(), norm(y="n"), op("RandomNormalLike", "n", "z"), op("Add", "n z", "y")]
    onnx.save_model(model_of(nodes, arrays(w=(6, 4, 3, 3)), **FLOAT), old)
    refused(fold(old, new), "cannot be compared", "gives another answer each time")
    assert not new.exists()


def test_answers_that_are_not_finite(old, new):
    nodes = [conv(), norm(y="n"), op("Sub", "n n", "z"), op("Div", "z z", "y")]
    onnx.save_model(model_of(nodes, arrays(w=(6, 4, 3, 3)), **FLOAT), old)
    refused(fold(old, new), "cannot be compared", "output 'y' has no finite value")


def test_operators_that_nobody_knows(old, new):
    other = helper.make_node("Anything", ["n"], ["y"], domain="of.others")
    onnx.save_model(model_of([conv(), norm(y="n"), other], arrays(w=(6, 4, 3, 3)), **FLOAT), old)
    refused(fold(old, new), "cannot be compared, so nothing was written")
    assert not new.exists()


def test_an_input_that_is_no_tensor(old, new):
    model = simple()
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    many = helper.make_sequence_type_proto(tensor)
    model.graph.input.append(helper.make_value_info("many", many))
    onnx.save_model(model, old)
    refused(fold(old, new), "its input 'many' is no tensor")


def test_a_place_that_cannot_be_written(tmp_path, old):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "new.onnx", Path("/proc/self/fusebn/new.onnx")):
        refused(fold(old, place), f"Invalid value for 'OUT': cannot write {place}", code=2)


def test_a_full_disk_leaves_the_old_file(old, new):
    new.write_text("a good file")
    limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", sys.executable, "-m", "fusebn"]
    code, _, err = type_in("fold", old, new, command=limited)
    assert code == 2
    assert "File too large" in err
    assert new.read_text() == "a good file"
    assert sorted(old.parent.iterdir()) == [new, old]


@pytest.mark.parametrize("missing", ["click", "rich", "onnx", "onnxruntime"])
def test_a_missing_extra_is_named(missing, old, new):
    without = f"import sys; sys.modules[{missing!r}] = None; from fusebn.cli import main; main()"
    code, out, err = type_in("fold", old, new, command=[sys.executable, "-c", without])
    assert (code, out) == (2, "")
    assert f"this needs {missing}" in err
    assert "pip install 'fusebn[onnx]'" in err
    assert not new.exists()
