"""ONNX files: read with all their data, written as they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import uses_external_data


def read(path: Path) -> tuple[onnx.ModelProto, bool]:
    """Return a model with its data, and whether those were in files of their own."""
    try:
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise _unreadable(path, f"is damaged, or no ONNX file ({error})") from None
    if not model.graph.node or not model.opset_import:
        missing = "operator sets" if model.graph.node else "nodes"
        raise _unreadable(path, f"is damaged, or no ONNX file: it has no {missing}")
    external = any(map(uses_external_data, _tensors(model.graph)))
    if external:
        try:
            onnx.load_external_data_for_model(model, str(path.absolute().parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise _unreadable(path, f"has data in other files: {error}") from None
    return model, external


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield all that a graph holds, and those within it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _unreadable(path: Path, why: str) -> click.ClickException:
    return click.ClickException(f"{path} {why}.")


def is_valid(path: Path) -> bool:
    """Return whether the checker of the `onnx` package finds no fault."""
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError:
        return False
    return True


def write(model: onnx.ModelProto, path: Path, data: str | None) -> None:
    """Write a model; with `data`, the name of a file beside it, its large arrays go there."""
    if data is not None:
        onnx.convert_model_to_external_data(model, location=data)
    onnx.save_model(model, path, format="protobuf")


def unused_data_name(path: Path) -> str:
    """Return a name for the data of a model that no file has.

    A model that is replaced keeps its data until the new one is in its place, and others may share
    them.
    """
    name, number = f"{path.name}.data", 0
    while path.with_name(name).exists():
        number += 1
        name = f"{path.name}.{number}.data"
    return name
