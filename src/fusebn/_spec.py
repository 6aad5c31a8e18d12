"""The rules for arguments, and the text of every error.

A rule takes what any framework can say of its arrays (a shape, the name of a dtype) and either
returns the canonical form or raises: TypeError for the wrong kind of thing, ValueError for the
wrong value. Every message names the operation, the argument, what was expected, what came, and the
fix where one is likely.
"""

import math
import operator
from collections.abc import Collection, Iterable, Sequence
from numbers import Real
from typing import Any, NoReturn

# The numbers by which csrc/bindings/python.cpp knows the element types and the activations.
ELEMENT_TYPES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2, "leaky_relu": 3, "silu": 4, "gelu": 5}

# Rank and channel axis of each data format.
DATA_FORMATS = {
    "NHWC": (4, 3),
    "NCHW": (4, 1),
    "NDHWC": (5, 4),
    "NCDHW": (5, 1),
    "NWC": (3, 2),
    "NCW": (3, 1),
    "NC": (2, 1),
}


def fail(
    kind: type[Exception], operation: str, argument: str, expected: str, got: str, fix: str = ""
) -> NoReturn:
    """Raise the one kind of message this library has."""
    message = f"{operation}: `{argument}` must {expected}; got {got}."
    raise kind(f"{message} {fix}" if fix else message)


def stat_type(dtype: str) -> str:
    """Return the dtype of statistics and parameters for elements of `dtype`."""
    return "float64" if dtype == "float64" else "float32"


def element_type(operation: str, argument: str, dtype: str) -> int:
    """Return the core's number for an element type."""
    code = ELEMENT_TYPES.get(dtype)
    if code is None:
        fail(
            TypeError,
            operation,
            argument,
            f"be an array of {', '.join(ELEMENT_TYPES)}",
            f"dtype {dtype}",
            "Convert it first, for instance to float32."
            if dtype.startswith(("int", "uint", "bool"))
            else "",
        )
    return code


def same_type(operation: str, argument: str, dtype: str, expected: str) -> None:
    """Check that an array has the dtype of x."""
    if dtype != expected:
        fail(TypeError, operation, argument, f"have the dtype of x, {expected}", f"dtype {dtype}")


def same_shape(
    operation: str,
    argument: str,
    shape: tuple[int, ...],
    expected: tuple[int, ...],
    of: str = "x",
) -> None:
    """Check that an array has the shape of another."""
    if shape != expected:
        wanted = f"have the shape of {of}, {expected}"
        fail(ValueError, operation, argument, wanted, f"shape {shape}")


def same_device(operation: str, argument: str, device: str, expected: str) -> None:
    """Check that a tensor is where the others are."""
    if device != expected:
        wanted = f"be on {expected}, where the others are"
        fail(ValueError, operation, argument, wanted, f"one on {device}", "Move it there first.")


def channel_axis(
    operation: str, shape: tuple[int, ...], data_format: str | None, axis: Any = None
) -> int:
    """Return the channel axis, counted from the front; `axis` overrides `data_format`."""
    if axis is not None:
        return axis_of(operation, "axis", axis, shape)
    if not isinstance(data_format, str):
        fail(
            TypeError,
            operation,
            "data_format",
            "be a string",
            repr(data_format),
            "Pass axis= for any other layout.",
        )
    rank, channel = DATA_FORMATS.get(data_format, (0, 0))
    if rank == 0:
        fail(
            ValueError,
            operation,
            "data_format",
            f"be one of {', '.join(DATA_FORMATS)}",
            repr(data_format),
            "Pass axis= for any other layout.",
        )
    if len(shape) != rank:
        same_side = [
            name
            for name, (r, c) in DATA_FORMATS.items()
            if r == len(shape) and (c == r - 1) == (channel == rank - 1)
        ]
        hint = f"data_format={same_side[0]!r} or " if same_side else ""
        fail(
            ValueError,
            operation,
            "x",
            f"have {rank} axes for data_format={data_format!r}",
            f"shape {shape}",
            f"Pass {hint}axis= for a layout of your own." if shape else "",
        )
    return channel


def integer(operation: str, argument: str, value: Any) -> int:
    """Return an integer; a bool is none."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    fail(TypeError, operation, argument, "be an integer", repr(value))


def axis_of(operation: str, argument: str, axis: Any, shape: tuple[int, ...]) -> int:
    """Return one axis, counted from the front."""
    index = integer(operation, argument, axis)
    rank = len(shape)
    if not -rank <= index < rank:
        expected = f"lie in [{-rank}, {rank})" if rank else "name an axis, and x has none"
        fail(ValueError, operation, argument, expected, f"{index} for x of shape {shape}")
    return index % rank


def axes_of(operation: str, axes: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a set of axes, sorted, counted from the front; None means all."""
    if axes is None:
        return tuple(range(len(shape)))
    try:
        given = [operator.index(axes)]
    except TypeError:
        if isinstance(axes, str | bytes) or not isinstance(axes, Iterable):
            fail(TypeError, operation, "axes", "be an integer or integers", repr(axes))
        given = list(axes)
    found = [axis_of(operation, "axes", axis, shape) for axis in given]
    if len(set(found)) != len(found):
        fail(ValueError, operation, "axes", "name each axis once", repr(axes))
    return tuple(sorted(found))


def channel_vector(
    operation: str, argument: str, shape: tuple[int, ...], channels: int, x_shape: tuple[int, ...]
) -> None:
    """Check the shape of a parameter: one value a channel."""
    if shape != (channels,):
        fix = ""
        if math.prod(shape) == channels:
            fix = "Reshape it by .reshape(-1)."
        elif len(shape) == 1 and shape[0] in x_shape[1:]:  # axis 0 is the batch
            fix = f"Did you mean axis={x_shape.index(shape[0], 1)}?"
        fail(
            ValueError,
            operation,
            argument,
            f"have shape ({channels},), one value per channel of x of shape {x_shape}",
            f"shape {shape}",
            fix,
        )


def real(operation: str, argument: str, value: Any) -> float:
    """Return a real number as a float; arrays of rank 0 are numbers, bools are not."""
    if isinstance(value, Real):
        is_real = value is not True and value is not False
    else:
        # bfloat16 says it is of kind V.
        is_real = getattr(value, "shape", None) == () and value.dtype.kind in "fiuV"
    if not is_real:
        fail(TypeError, operation, argument, "be a real number", repr(value))
    return float(value)


def non_negative(operation: str, argument: str, value: Any) -> float:
    """Return a finite number that is not below 0."""
    if type(value) in (float, int) and 0 <= value < math.inf:
        return float(value)
    number = real(operation, argument, value)
    if not 0 <= number < math.inf:
        fail(ValueError, operation, argument, "be finite and not negative", repr(number))
    return number


def fraction(operation: str, argument: str, value: Any, fix: str = "") -> float:
    """Return a number in [0, 1]."""
    if type(value) is float and 0 <= value <= 1:
        return value
    number = real(operation, argument, value)
    if not 0 <= number <= 1:
        fail(ValueError, operation, argument, "lie in [0, 1]", repr(number), fix)
    return number


def flag(operation: str, argument: str, value: Any) -> bool:
    """Return a switch: a bool, a NumPy bool, or an array of rank 0 that holds one."""
    if value is True or value is False:
        return bool(value)
    if getattr(value, "shape", None) == () and str(getattr(value, "dtype", "")) == "bool":
        return bool(value)
    got = repr(value) if getattr(value, "shape", ()) == () else f"an array of shape {value.shape}"
    fail(TypeError, operation, argument, "be a bool, or a boolean array of rank 0", got)


def activation(operation: str, value: Any) -> int:
    """Return the core's number for an activation."""
    code = ACTIVATIONS.get(value) if value is None or isinstance(value, str) else None
    if code is None:
        fail(
            ValueError if isinstance(value, str) else TypeError,
            operation,
            "activation",
            f"be one of {', '.join(map(repr, ACTIVATIONS))}",
            repr(value),
            "Apply any other function to y yourself." if callable(value) else "",
        )
    return code


def one_of(operation: str, argument: str, value: Any, choices: Collection[str]) -> str:
    """Return one of a few words."""
    if not isinstance(value, str) or value not in choices:
        kind = ValueError if isinstance(value, str) else TypeError
        fail(kind, operation, argument, f"be one of {', '.join(map(repr, choices))}", repr(value))
    return value


def positive_integer(operation: str, argument: str, value: Any, most: int | None = None) -> int:
    """Return an integer that is at least 1."""
    number = integer(operation, argument, value)
    if number < 1 or (most is not None and number > most):
        bound = "be at least 1" if most is None else f"lie in [1, {most}]"
        fail(ValueError, operation, argument, bound, repr(number))
    return number


def statistics_given(
    operation: str, training: bool | None, factor: float, has_mean: bool, has_variance: bool
) -> bool:
    """Check that mean and variance come together, and where they are needed; True if they are.

    `training` is None where it becomes known when a graph runs.
    """
    if has_mean != has_variance:
        here, missing = ("mean", "variance") if has_mean else ("variance", "mean")
        fail(ValueError, operation, missing, f"be given, since `{here}` is", "None")
    needed = not training or factor != 1
    if needed and not has_mean:
        why = "with exponential_avg_factor != 1"
        if not training:
            why = "with is_training=False" if training is False else "where is_training is a tensor"
        fix = (
            "Pass the moving statistics."
            if not training
            else "Pass the moving statistics that the batch is mixed into."
        )
        fail(ValueError, operation, "mean", f"be given, and `variance`, {why}", "None", fix)
    return needed


def missing(user: str, package: str) -> NoReturn:
    """Raise for a framework that is not installed."""
    raise ImportError(
        f"{user} needs {package}, which is not installed. "
        f"Install it by: pip install 'fusebn[{package}]'"
    )


def unsupported(operation: str, argument: str, x: object) -> NoReturn:
    """Raise for an array that no adapter takes."""
    kind = type(x)
    name = kind.__qualname__
    if kind.__module__ != "builtins":
        name = f"{kind.__module__}.{name}"
    fix = ""
    if isinstance(x, Sequence) and not isinstance(x, str | bytes):
        fix = "Make it an array by numpy.asarray(x, dtype='float32')."
    elif hasattr(x, "__array__"):
        fix = "Pass numpy.asarray(x)."
    fail(TypeError, operation, argument, "be a NumPy array", name, fix)
