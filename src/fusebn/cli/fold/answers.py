"""Whether two models give the same answers: both run on random input.

onnxruntime runs them, its own optimizations off, since those fold as well. What it does not
implement (float64 and bfloat16 convolutions) the evaluator of the `onnx` package runs instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import click
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import fusebn

Array = NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]

# By how much an answer may move, as a share of the largest of its output. Rounding stays far below:
# the 53 folds of a ResNet-50 come to 7e-7 in float32, 7e-4 in float16. A wrong fold is far above.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
# An argmax may turn over at a tie.
_SHARE_OF_INTEGERS = 0.01

# What symbolic sizes are tried with, until the model runs: of the first axis, and of the others.
_SIZES = ((2, 32), (1, 32), (2, 64), (1, 224), (2, 8), (1, 256), (2, 2), (1, 1))


class Unverified(click.ClickException):
    """Why the answers could not be compared."""

    def __init__(self, why: str) -> None:
        super().__init__(f"The answers cannot be compared, so nothing was written: {why}.")


class Moved(click.ClickException):
    """What has moved, and by how much."""

    def __init__(self, what: str) -> None:
        super().__init__(f"The answers have moved, so nothing was written: {what}.")


class Agreement(NamedTuple):
    """What was compared, and how well it agreed."""

    runner: str
    shapes: dict[str, tuple[int, ...]]
    difference: float
    """The largest, as a share of the largest answer of its output."""
    tolerance: float


class _Session(Protocol):
    def run(self, names: list[str] | None, feeds: dict[str, Array], /) -> Any: ...


def compare(original: Path, folded: Path, model: onnx.ModelProto, shapes: Shapes) -> Agreement:
    """Compare the answers of two files; `model` is what the folded one holds.

    Raises
    ------
    Unverified
        The original does not run, or says nothing that can be compared.
    Moved
        The answers differ by more than the tolerance.
    """
    start, runner, old = _started(original)
    feeds, answers = _answers(old, runner, model, shapes)
    try:
        new_answers = start(folded).run(None, feeds)
    except Exception as error:
        raise Moved(f"the folded model does not run: {_first_line(error)}") from None
    names = [output.name for output in model.graph.output]
    tolerance = _tolerance(model)
    try:
        difference = _largest_difference(names, answers, new_answers, tolerance)
    except Moved:
        if _repeats(names, answers, old.run(None, feeds)):
            raise
        raise Unverified("the original gives another answer each time it runs") from None
    return Agreement(runner, {k: v.shape for k, v in feeds.items()}, difference, tolerance)


# ---- running ----


def _onnxruntime(path: Path) -> _Session:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session: _Session = onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"]
    )
    return session


class BatchNormalization(OpRun):  # the evaluator finds it by this name
    """Inference. Before opset 14 the evaluator's own normalizes by the batch."""

    def _run(
        self, x: Array, *held: Array, epsilon: float | None = None, **unused: Any
    ) -> tuple[Array]:
        shape = (x.shape[1], *(1,) * (x.ndim - 2))
        scale, offset, mean, variance = (v.astype(np.float64).reshape(shape) for v in held)
        epsilon = 1e-5 if epsilon is None else epsilon
        return (fusebn.batch_normalization(x, mean, variance, offset, scale, epsilon),)


def _evaluator(path: Path) -> _Session:
    evaluator = ReferenceEvaluator(str(path))
    if evaluator.opsets[""] < 14:
        evaluator = ReferenceEvaluator(str(path), new_ops=[BatchNormalization])
    session: _Session = evaluator
    return session


def _started(path: Path) -> tuple[Any, str, _Session]:
    """Return what starts a model, its name, and the model started."""
    try:
        return _onnxruntime, f"onnxruntime {onnxruntime.__version__}", _onnxruntime(path)
    except Exception as first:
        runner = f"the evaluator of onnx {onnx.__version__}, as onnxruntime does not load it"
        try:
            return _evaluator, runner, _evaluator(path)
        except Exception:
            raise Unverified(f"onnxruntime does not load it: {_first_line(first)}") from None


def _answers(
    session: _Session, runner: str, model: onnx.ModelProto, shapes: Shapes
) -> tuple[dict[str, Array], list[Any]]:
    """Return random input that the model takes, and its answers."""
    inputs = [value.name for value in model.graph.input]
    if unknown := sorted(shapes.keys() - set(inputs)):
        raise Unverified(f"it has no input {unknown[0]!r}, but {', '.join(map(repr, inputs))}")
    failure = None
    for sizes in _SIZES:
        feeds = dict(_inputs(model, sizes, shapes))
        try:
            with np.errstate(all="ignore"):
                answers: list[Any] = session.run(None, feeds)
        except Exception as error:
            failure = failure or error
        else:
            return feeds, answers
    tried = ", ".join(f"{name}: {_by(value.shape)}" for name, value in feeds.items())
    raise Unverified(
        f"{runner} does not run it on random input (such as {tried}): {_first_line(failure)}. "
        "Give the shapes of its inputs by --shape"
    )


def _inputs(
    model: onnx.ModelProto, sizes: tuple[int, int], shapes: Shapes
) -> Iterator[tuple[str, Array]]:
    """Yield an array for each input; axes of one name have one size."""
    rng = np.random.default_rng(0)
    given = {tensor.name for tensor in model.graph.initializer}
    symbols: dict[str, int] = {}
    for value in model.graph.input:
        if value.name in given:
            continue
        if not value.type.HasField("tensor_type"):
            raise Unverified(f"its input {value.name!r} is no tensor")
        tensor = value.type.tensor_type
        shape = []
        for index, axis in enumerate(tensor.shape.dim):
            size = symbols.setdefault(axis.dim_param, sizes[index > 0]) if axis.dim_param else None
            shape.append(axis.dim_value or size or sizes[index > 0])
        yield value.name, _random(rng, tensor.elem_type, shapes.get(value.name, tuple(shape)))


def _random(rng: np.random.Generator, element: int, shape: tuple[int, ...]) -> Array:
    """Return an array: normal numbers, or 0 and 1, which are indices of nearly everything."""
    if element == TensorProto.STRING:
        return np.full(shape, "", object)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
    if element in (TensorProto.BOOL,) or dtype.kind in "iu":
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


# ---- comparing ----


def _tolerance(model: onnx.ModelProto) -> float:
    """Return that of the least precise type among the model's weights and outputs."""
    elements = [tensor.data_type for tensor in model.graph.initializer]
    elements += [output.type.tensor_type.elem_type for output in model.graph.output]
    names = {TensorProto.DataType.Name(element).lower() for element in elements}
    names = {{"float": "float32", "double": "float64"}.get(name, name) for name in names}
    return max((TOLERANCES[name] for name in names if name in TOLERANCES), default=1e-4)


def _largest_difference(
    names: list[str], old: list[Any], new: list[Any], tolerance: float
) -> float:
    outputs = zip(names, old, new, strict=True)
    return max((_difference(*output, tolerance) for output in outputs), default=0.0)


def _repeats(names: list[str], once: list[Any], twice: list[Any]) -> bool:
    try:
        return _largest_difference(names, once, twice, 0) == 0
    except Moved:
        return False


def _difference(name: str, old: Any, new: Any, tolerance: float) -> float:
    """Return how far an output has moved; raise if that is too far."""
    old, new = np.asarray(old), np.asarray(new)
    if old.dtype != new.dtype or old.shape != new.shape:
        raise Moved(f"output {name!r} has become {new.dtype}{list(new.shape)}")
    if old.dtype.kind in "biuOSU":
        share = float(np.mean(old != new)) if old.size else 0.0
        if share > _SHARE_OF_INTEGERS:
            raise Moved(f"{share:.1%} of output {name!r} have changed")
        return 0.0
    old, new = old.astype(np.complex128), new.astype(np.complex128)
    finite = np.isfinite(old)
    if old.size and not finite.any():
        raise Unverified(f"output {name!r} has no finite value on random input")
    largest = float(np.abs(old[finite]).max(initial=0))
    moved = float(np.abs(new - old)[finite].max(initial=0))
    share = moved / largest if largest else float(moved > 0)
    if not share <= tolerance:
        raise Moved(f"output {name!r} has moved by {share:.2g} of its largest value")
    return share


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"
