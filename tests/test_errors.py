"""Every message: its kind, its voice, and that nothing has changed when it is raised.

The voice is ``operation: `argument` must EXPECTED; got GOT. FIX``. A row of the table names the
operation, the argument, the kind, and what the message must say beside them.
"""

# ruff: noqa: E501 - a row of the table is one line, to be read across

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import fusebn
from conftest import assert_same_bits
from fusebn import BatchNorm, Moments

F32 = np.float32
X = np.arange(24, dtype=F32).reshape(6, 4)
X4 = np.arange(96, dtype=F32).reshape(2, 4, 4, 3)
ONE4, ONE3 = np.ones(4, F32), np.ones(3, F32)
for _array in (X, X4, ONE4, ONE3):
    _array.setflags(write=False)


class Row(NamedTuple):
    operation: str
    argument: str
    kind: type[Exception]
    says: tuple[str, ...]
    call: Callable[[], Any]


def fused(x: Any = X, scale: Any = None, offset: Any = None, **options: Any) -> Any:
    if np.ndim(x) == 2 and "data_format" not in options:
        options.setdefault("axis", 1)
    return fusebn.fused_batch_norm(x, scale, offset, **options)


def grad(dy: Any = X, x: Any = X, mean: Any = ONE4, variance: Any = ONE4, **options: Any) -> Any:
    arguments = {"scale": None, "offset": None, "axis": 1} | options
    return fusebn.fused_batch_norm_grad(dy, x, mean=mean, variance=variance, **arguments)


def given(x: Any = X, mean: Any = ONE4, variance: Any = ONE4, **options: Any) -> Any:
    arguments = {"offset": None, "scale": None, "variance_epsilon": 0.001} | options
    return fusebn.batch_normalization(x, mean, variance, **arguments)


def layer_call(x: Any = X, **options: Any) -> Any:
    return BatchNorm(4)(x, **({"training": True} | options))


def state_of(**changes: Any) -> dict[str, Any]:
    state: dict[str, Any] = dict(BatchNorm(4).state_dict())
    return {key: value for key, value in (state | changes).items() if value is not None}


def load_state(**changes: Any) -> None:
    BatchNorm(4).load_state_dict(state_of(**changes))


def overlapping(shift: int, **options: Any) -> Any:
    memory = np.arange(32, dtype=F32)
    x, out = memory[:24].reshape(6, 4), memory[shift : 24 + shift].reshape(6, 4)
    return fused(x, out=out, **options)


def read_only(array: Any) -> Any:
    array.setflags(write=False)
    return array


class Foreign:
    """An array of a framework this library does not know."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.ones((6, 4), F32)


FUSED, GRAD, GIVEN = "fused_batch_norm", "fused_batch_norm_grad", "batch_normalization"
TYPES = ("float16", "bfloat16", "float32", "float64")

ARRAYS = [
    # x of a kind that no kernel takes, in every function that takes one
    *(
        Row(
            operation,
            argument,
            TypeError,
            (*TYPES, str(np.dtype(bad))),
            lambda f=f, b=bad: f(X.astype(b)),
        )
        for operation, argument, f in (
            (FUSED, "x", lambda x: fused(x)),
            (GRAD, "x", lambda x: grad(x, x)),
            (GIVEN, "x", lambda x: given(x)),
            (
                "batch_norm_with_global_normalization",
                "input",
                lambda x: fusebn.batch_norm_with_global_normalization(
                    x, ONE4, ONE4, ONE4, ONE4, 0.1, True
                ),
            ),
            ("moments", "x", lambda x: fusebn.moments(x, 0)),
            ("weighted_moments", "x", lambda x: fusebn.weighted_moments(x, 0, np.ones((6, 1)))),
            ("sufficient_statistics", "x", lambda x: fusebn.sufficient_statistics(x, 0)),
            ("normalize_moments", "mean_ss", lambda x: fusebn.normalize_moments(1.0, x, x, None)),
            ("Moments.of", "x", lambda x: Moments.of(x, 0)),
            ("BatchNorm", "x", lambda x: layer_call(x)),
            (
                "assign_moving_average",
                "variable",
                lambda x: fusebn.assign_moving_average(x, X, 0.5),
            ),
        )
        for bad in ("int64", "uint8", "bool", "complex64", "object", "longdouble", "datetime64[s]")
    ),
    Row(FUSED, "x", TypeError, ("int64", "to float32"), lambda: fused(X.astype(np.int64))),
    # x of a kind that is no array
    *(
        Row(operation, argument, TypeError, ("NumPy array", kind), lambda f=f, v=value: f(v))
        for operation, argument, f in (
            (FUSED, "x", lambda x: fused(x)),
            (GRAD, "x", lambda x: grad(X, x)),
            (GIVEN, "x", lambda x: given(x)),
            ("moments", "x", lambda x: fusebn.moments(x, 0)),
            ("weighted_moments", "x", lambda x: fusebn.weighted_moments(x, 0, 1.0)),
            ("sufficient_statistics", "x", lambda x: fusebn.sufficient_statistics(x, 0)),
            ("normalize_moments", "mean_ss", lambda x: fusebn.normalize_moments(1.0, x, X, None)),
            ("BatchNorm", "x", lambda x: layer_call(x)),
            (
                "assign_moving_average",
                "variable",
                lambda x: fusebn.assign_moving_average(x, X, 0.5),
            ),
        )
        for value, kind in (([[1.0, 2.0]], "list"), ("text", "str"), (None, "NoneType"))
    ),
    Row(
        FUSED,
        "x",
        TypeError,
        ("test_errors.Foreign", "Pass numpy.asarray(x)."),
        lambda: fused(Foreign()),
    ),
    Row(
        GRAD,
        "dy",
        TypeError,
        ("test_errors.Foreign", "Pass numpy.asarray("),
        lambda: grad(Foreign()),
    ),
    Row(FUSED, "x", TypeError, ("asarray",), lambda: fused([[1.0, 2.0]])),
    *(
        Row(operation, "x", TypeError, ("masked array", "weights="), call)
        for operation, call in (
            (FUSED, lambda: fused(np.ma.masked_array(X, X > 3))),
            ("moments", lambda: fusebn.moments(np.ma.masked_array(X, X > 3), 0)),
            ("Moments.of", lambda: Moments.of(np.ma.masked_array(X, X > 3), 0)),
            ("BatchNorm", lambda: layer_call(np.ma.masked_array(X, X > 3))),
        )
    ),
    Row(GRAD, "dy", TypeError, ("masked array",), lambda: grad(np.ma.masked_array(X, X > 3))),
    Row(
        FUSED,
        "residual",
        TypeError,
        ("masked array",),
        lambda: fused(residual=np.ma.masked_array(X, X > 3)),
    ),
    # other arrays that must be like x
    Row(
        FUSED,
        "residual",
        TypeError,
        ("float32", "float64"),
        lambda: fused(residual=X.astype(float)),
    ),
    Row(FUSED, "residual", ValueError, ("(6, 4)", "(6, 3)"), lambda: fused(residual=X[:, :3])),
    Row(FUSED, "residual", TypeError, ("list",), lambda: fused(residual=X.tolist())),
    Row(GRAD, "dy", TypeError, ("float32", "float16"), lambda: grad(X.astype(np.float16))),
    Row(GRAD, "dy", ValueError, ("(6, 4)", "(5, 4)"), lambda: grad(X[:5])),
    Row(GRAD, "dy", TypeError, ("NoneType",), lambda: grad(None)),
    Row(GRAD, "residual", ValueError, ("(6, 4)", "(4, 6)"), lambda: grad(residual=X.T)),
    Row(
        "BatchNorm",
        "residual",
        ValueError,
        ("(6, 4)", "(5, 4)"),
        lambda: layer_call(residual=X[:5]),
    ),
]

SHAPES = [
    Row(FUSED, "x", ValueError, ("4 axes", "NHWC", "(6, 4)", "'NC'", "axis="), lambda: fused(data_format="NHWC")),
    Row(FUSED, "x", ValueError, ("2 axes", "NC", "(2, 4, 4, 3)"), lambda: fused(X4, data_format="NC")),
    Row(GRAD, "x", ValueError, ("4 axes",), lambda: grad(axis=None)),
    Row(FUSED, "data_format", ValueError, ("NHWC", "NCW", "'NWHC'", "axis="), lambda: fused(X4, data_format="NWHC")),
    Row(FUSED, "data_format", ValueError, ("'nhwc'",), lambda: fused(X4, data_format="nhwc")),
    Row(FUSED, "data_format", TypeError, ("string", "3"), lambda: fused(X4, data_format=3)),
    Row(FUSED, "axis", ValueError, ("[-2, 2)", "2", "(6, 4)"), lambda: fused(axis=2)),
    Row(FUSED, "axis", ValueError, ("[-2, 2)", "-3"), lambda: fused(axis=-3)),
    Row(FUSED, "axis", TypeError, ("integer", "1.0"), lambda: fused(axis=1.0)),
    Row(FUSED, "axis", ValueError, ("none",), lambda: fused(np.array(1.0), axis=0)),
    Row(GRAD, "axis", ValueError, ("[-2, 2)", "5"), lambda: grad(axis=5)),
    *(
        Row(operation, "axes", kind, says, lambda f=f, a=axes: f(a))
        for operation, f in (
            ("moments", lambda a: fusebn.moments(X, a)),
            ("weighted_moments", lambda a: fusebn.weighted_moments(X, a, 1.0)),
            ("sufficient_statistics", lambda a: fusebn.sufficient_statistics(X, a)),
            ("Moments.of", lambda a: Moments.of(X, a)),
        )
        for axes, kind, says in (
            (2, ValueError, ("[-2, 2)", "2")),
            ((0, -3), ValueError, ("[-2, 2)", "-3")),
            ((0, 0), ValueError, ("once", "(0, 0)")),
            ((1, -1), ValueError, ("once",)),
            ("01", TypeError, ("integer", "'01'")),
            (0.5, TypeError, ("integer", "0.5")),
            ((0, 1.5), TypeError, ("integer", "1.5")),
        )
    ),
    # one value a channel
    *(
        Row(operation, name, ValueError, ("(4,)", "(6, 4)", "(6,)"), lambda f=f, n=name: f(**{n: np.ones(6, F32)}))
        for operation, f, names in (
            (FUSED, lambda **v: fused(**v), ("scale", "offset")),
            (FUSED, lambda **v: fused(is_training=False, **({"mean": ONE4, "variance": ONE4} | v)), ("mean", "variance")),
            (GRAD, lambda **v: grad(**v), ("scale", "offset", "mean", "variance", "dmean", "dvariance")),
        )
        for name in names
    ),
    Row(FUSED, "scale", ValueError, ("(4,)", "(1, 4)", "reshape"), lambda: fused(scale=np.ones((1, 4)))),
    Row(FUSED, "scale", ValueError, ("(4,)", "()"), lambda: fused(scale=2.0)),
    Row(FUSED, "scale", TypeError, ("int64",), lambda: fused(scale=np.ones(4, np.int64))),
    Row(FUSED, "offset", TypeError, ("complex128",), lambda: fused(offset=np.ones(4, complex))),
    Row(GIVEN, "mean", ValueError, ("broadcast", "(6, 4)", "(3,)"), lambda: given(mean=ONE3)),
    Row(GIVEN, "variance", ValueError, ("broadcast", "(6, 4)", "(3,)"), lambda: given(variance=ONE3)),
    Row(GIVEN, "offset", ValueError, ("broadcast", "(6, 4)", "(3,)"), lambda: given(offset=ONE3)),
    Row(GIVEN, "scale", ValueError, ("broadcast", "(6, 4)", "(3,)"), lambda: given(scale=ONE3)),
    Row(GIVEN, "mean", TypeError, ("None",), lambda: given(mean=None)),
    Row(GIVEN, "variance", TypeError, ("None",), lambda: given(variance=None)),
    Row(GIVEN, "scale", TypeError, ("int64",), lambda: given(scale=np.ones(4, np.int64))),
    Row("batch_norm_with_global_normalization", "beta", ValueError, ("broadcast", "(3,)"), lambda: fusebn.batch_norm_with_global_normalization(X, ONE4, ONE4, ONE3, ONE4, 0.1, True)),
    Row("batch_norm_with_global_normalization", "gamma", ValueError, ("broadcast", "(3,)"), lambda: fusebn.batch_norm_with_global_normalization(X, ONE4, ONE4, ONE4, ONE3, 0.1, True)),
    Row("batch_norm_with_global_normalization", "scale_after_normalization", TypeError, ("bool", "1"), lambda: fusebn.batch_norm_with_global_normalization(X, ONE4, ONE4, ONE4, ONE4, 0.1, 1)),
    Row("sufficient_statistics", "shift", ValueError, ("(1, 4)", "(3,)"), lambda: fusebn.sufficient_statistics(X, 0, ONE3)),
    Row("normalize_moments", "variance_ss", ValueError, ("(4,)", "(3,)"), lambda: fusebn.normalize_moments(2.0, ONE4, ONE3, None)),
    Row("normalize_moments", "counts", ValueError, ("negative", "-2"), lambda: fusebn.normalize_moments(-2.0, ONE4, ONE4, None)),
]  # fmt: skip

VALUES = [
    Row(FUSED, "variance", ValueError, ("given", "`mean`"), lambda: fused(mean=ONE4)),
    Row(FUSED, "mean", ValueError, ("given", "`variance`"), lambda: fused(variance=ONE4)),
    Row(FUSED, "mean", ValueError, ("is_training=False", "moving statistics"), lambda: fused(is_training=False)),
    Row(FUSED, "mean", ValueError, ("exponential_avg_factor",), lambda: fused(exponential_avg_factor=0.1)),
    Row(FUSED, "variance", ValueError, ("negative", "-1"), lambda: fused(is_training=False, mean=ONE4, variance=-ONE4)),
    Row(GRAD, "variance", ValueError, ("negative", "-1"), lambda: grad(variance=-ONE4)),
    Row(GIVEN, "variance", ValueError, ("negative", "-1"), lambda: given(variance=-ONE4)),
    Row(GRAD, "mean", ValueError, ("given", "None"), lambda: grad(mean=None)),
    Row(GRAD, "variance", ValueError, ("given", "None"), lambda: grad(variance=None)),
    Row(GRAD, "dmean", ValueError, ("is_training=False",), lambda: grad(is_training=False, dmean=ONE4)),
    Row(GRAD, "dvariance", ValueError, ("is_training=False",), lambda: grad(is_training=False, dvariance=ONE4)),
    *(
        Row(operation, argument, kind, says, lambda f=f, v=value: f(v))
        for operation, argument, f in (
            (FUSED, "epsilon", lambda v: fused(epsilon=v)),
            (FUSED, "correction", lambda v: fused(correction=v)),
            (GRAD, "epsilon", lambda v: grad(epsilon=v)),
            (GIVEN, "variance_epsilon", lambda v: given(variance_epsilon=v)),
            ("BatchNorm", "epsilon", lambda v: BatchNorm(4, epsilon=v)),
            ("BatchNorm", "correction", lambda v: BatchNorm(4, correction=v)),
            ("Moments.variance", "correction", lambda v: Moments.of(X, 0).variance(v)),
            ("Moments", "count", lambda v: Moments(v, 0.0, 0.0)),
        )
        for value, kind, says in (
            (-1e-3, ValueError, ("negative", "-0.001")),
            (float("nan"), ValueError, ("finite", "nan")),
            (float("inf"), ValueError, ("finite", "inf")),
            ("small", TypeError, ("real number", "'small'")),
            (1j, TypeError, ("real number", "1j")),
            (True, TypeError, ("real number", "True")),
            (np.ones(2), TypeError, ("real number",)),
            (None, TypeError, ("real number", "None")),
        )
    ),
    *(
        Row(operation, argument, kind, says, lambda f=f, v=value: f(v))
        for operation, argument, f in (
            (FUSED, "exponential_avg_factor", lambda v: fused(exponential_avg_factor=v, mean=ONE4, variance=ONE4)),
            ("BatchNorm", "decay", lambda v: BatchNorm(4, decay=v)),
            ("BatchNorm", "decay", lambda v: setattr(BatchNorm(4), "decay", v)),
            ("assign_moving_average", "decay", lambda v: fusebn.assign_moving_average(X.copy(), X, v)),
        )
        for value, kind, says in (
            (-0.1, ValueError, ("[0, 1]", "-0.1")),
            (1.1, ValueError, ("[0, 1]", "1.1")),
            (float("nan"), ValueError, ("[0, 1]", "nan")),
            ("0.9", TypeError, ("real number", "'0.9'")),
        )
    ),
    *(
        Row(operation, argument, TypeError, ("bool", repr(value)), lambda f=f, v=value: f(v))
        for operation, argument, f in (
            (FUSED, "is_training", lambda v: fused(is_training=v)),
            (GRAD, "is_training", lambda v: grad(is_training=v)),
            ("BatchNorm", "training", lambda v: layer_call(training=v)),
            ("moments", "keepdims", lambda v: fusebn.moments(X, 0, keepdims=v)),
            ("weighted_moments", "keepdims", lambda v: fusebn.weighted_moments(X, 0, 1.0, v)),
            ("sufficient_statistics", "keepdims", lambda v: fusebn.sufficient_statistics(X, 0, None, v)),
            ("BatchNorm", "center", lambda v: BatchNorm(4, center=v)),
            ("BatchNorm", "scale", lambda v: BatchNorm(4, scale=v)),
            ("BatchNorm", "zero_debias", lambda v: BatchNorm(4, zero_debias=v)),
            ("assign_moving_average", "zero_debias", lambda v: fusebn.assign_moving_average(X.copy(), X, 0.5, v)),
        )
        for value in (1, 0.0, "yes", None)
    ),
    Row(FUSED, "is_training", TypeError, ("bool", "(2,)"), lambda: fused(is_training=np.array([True, False]))),
    Row("BatchNorm", "update", TypeError, ("bool", "1"), lambda: layer_call(update=1)),
    *(
        Row(operation, "activation", kind, says, lambda f=f, v=value: f(v))
        for operation, f in (
            (FUSED, lambda v: fused(activation=v)),
            (GRAD, lambda v: grad(activation=v)),
            ("BatchNorm", lambda v: BatchNorm(4, activation=v)),
        )
        for value, kind, says in (
            ("tanh", ValueError, ("None", "'relu'", "'gelu'", "'tanh'")),
            ("ReLU", ValueError, ("'relu'", "'ReLU'")),
            (np.tanh, TypeError, ("'relu'", "yourself")),
            (3, TypeError, ("'relu'", "3")),
        )
    ),
    # weights
    *(
        Row(operation, argument, kind, says, lambda f=f, v=value: f(v))
        for operation, argument, f in (
            (FUSED, "weights", lambda v: fused(weights=v)),
            (GRAD, "weights", lambda v: grad(weights=v)),
            ("moments", "weights", lambda v: fusebn.moments(X, 0, weights=v)),
            ("Moments.of", "weights", lambda v: Moments.of(X, 0, weights=v)),
            ("BatchNorm", "weights", lambda v: layer_call(weights=v)),
        )
        for value, kind, says in (
            (np.array([1, 1, 1, 1, 1, -0.5]), ValueError, ("negative", "-0.5")),
            (np.array([1, 1, 1, 1, 1, np.nan]), ValueError, ("finite", "nan")),
            (np.array([1, 1, 1, 1, 1, np.inf]), ValueError, ("finite", "inf")),
            (np.ones(4), ValueError, ("(6,)", "(4,)")),
            (np.ones((6, 4)), ValueError, ("(6,)", "(6, 4)")),
            (np.ones(6, complex), TypeError, ("complex128",)),
            (np.array(["a"] * 6), TypeError, ("str",)),
        )
    ),
    Row("weighted_moments", "frequency_weights", ValueError, ("negative", "-1"), lambda: fusebn.weighted_moments(X, 0, np.full((6, 1), -1.0))),
    Row("weighted_moments", "frequency_weights", ValueError, ("negative", "-1"), lambda: fusebn.weighted_moments(X, 0, np.full((6, 4), -1.0))),
    Row("weighted_moments", "frequency_weights", ValueError, ("(6, 4)", "(5, 4)"), lambda: fusebn.weighted_moments(X, 0, np.ones((5, 4)))),
    # out
    Row(FUSED, "out", TypeError, ("NumPy array", "list"), lambda: fused(out=[1, 2])),
    Row(FUSED, "out", TypeError, ("float32", "float64"), lambda: fused(out=np.empty((6, 4)))),
    Row(FUSED, "out", ValueError, ("(6, 4)", "(4, 6)"), lambda: fused(out=np.empty((4, 6), F32))),
    Row(FUSED, "out", ValueError, ("read-only", "writeable"), lambda: fused(out=read_only(np.empty((6, 4), F32)))),
    Row(FUSED, "out", ValueError, ("x itself", "overlap"), lambda: overlapping(1)),
    Row(FUSED, "out", ValueError, ("x itself", "overlap"), lambda: overlapping(4)),
    Row("BatchNorm", "out", ValueError, ("(6, 4)", "(5, 4)"), lambda: layer_call(out=np.empty((5, 4), F32))),
]  # fmt: skip

OBJECTS = [
    Row("BatchNorm", "channels", ValueError, ("at least 1", "0"), lambda: BatchNorm(0)),
    Row("BatchNorm", "channels", ValueError, ("at least 1", "-3"), lambda: BatchNorm(-3)),
    Row("BatchNorm", "channels", TypeError, ("integer", "4.0"), lambda: BatchNorm(4.0)),
    Row("BatchNorm", "channels", TypeError, ("integer", "True"), lambda: BatchNorm(True)),
    Row("BatchNorm", "axis", TypeError, ("integer", "'C'"), lambda: BatchNorm(4, axis="C")),
    Row("BatchNorm", "nonfinite", ValueError, ("'skip'", "'ignore'"), lambda: BatchNorm(4, nonfinite="ignore")),
    Row("BatchNorm", "nonfinite", TypeError, ("'skip'", "True"), lambda: BatchNorm(4, nonfinite=True)),
    Row("BatchNorm", "dtype", ValueError, ("'float32'", "'float16'"), lambda: BatchNorm(4, dtype=np.float16)),
    Row("BatchNorm", "decay", ValueError, ("below 1", "zero_debias"), lambda: BatchNorm(4, decay=1.0, zero_debias=True)),
    Row("BatchNorm", "decay", ValueError, ("below 1", "zero_debias"), lambda: setattr(BatchNorm(4, zero_debias=True), "decay", 1)),
    Row("BatchNorm", "x", ValueError, ("4 channels", "axis -1", "(6, 3)"), lambda: layer_call(X[:, :3])),
    Row("BatchNorm", "axis", ValueError, ("none",), lambda: layer_call(np.array(1.0))),
    Row("BatchNorm", "x", ValueError, ("finite", "channels 0, 2"), lambda: BatchNorm(3, nonfinite="raise")(np.array([[np.nan, 1, np.inf]]), training=True)),
    Row("BatchNorm.backward", "dy", ValueError, ("(6, 4)", "(5, 4)"), lambda: backward(X[:5])),
    Row("BatchNorm.backward", "dy", TypeError, ("float32", "float64"), lambda: backward(X.astype(float))),
    Row("BatchNorm.load_state_dict", "state", TypeError, ("mapping", "list"), lambda: BatchNorm(4).load_state_dict([1])),
    Row("BatchNorm.load_state_dict", "state", ValueError, ("without moving_mean",), lambda: load_state(moving_mean=None)),
    Row("BatchNorm.load_state_dict", "state", ValueError, ("with gamma",), lambda: load_state(gamma=ONE4)),
    Row("BatchNorm.load_state_dict", "state", ValueError, ("without offset", "center=False"), lambda: BatchNorm(4).load_state_dict(BatchNorm(4, center=False).state_dict())),
    *(
        Row("BatchNorm.load_state_dict", key, ValueError, ("(4,)", "(3,)"), lambda k=key: load_state(**{k: ONE3}))
        for key in ("scale", "offset", "moving_mean", "moving_variance")
    ),
    Row("BatchNorm.load_state_dict", "moving_mean", TypeError, ("float32", "complex128"), lambda: load_state(moving_mean=np.ones(4, complex))),
    Row("BatchNorm.load_state_dict", "moving_variance", ValueError, ("negative", "-1"), lambda: load_state(moving_variance=-ONE4)),
    Row("BatchNorm.load_state_dict", "num_updates", ValueError, ("negative", "-1"), lambda: load_state(num_updates=np.array(-1))),
    Row("BatchNorm.load_state_dict", "decay", ValueError, ("[0, 1]", "1.5"), lambda: load_state(decay=np.array(1.5))),
    Row("BatchNorm.load_state_dict", "epsilon", ValueError, ("negative", "-1"), lambda: load_state(epsilon=np.array(-1.0))),
    Row("BatchNorm.load_state_dict", "correction", ValueError, ("finite", "nan"), lambda: load_state(correction=np.array(np.nan))),
    Row("BatchNorm.load_state_dict", "decay", ValueError, ("below 1", "zero_debias"), lambda: load_state(decay=np.array(1.0), zero_debias=np.array(True))),
    Row("Moments", "m2", ValueError, ("(2,)", "(3,)"), lambda: Moments(1, np.ones(2), np.ones(3))),
    Row("Moments", "m2", ValueError, ("negative", "-1"), lambda: Moments(1, np.ones(2), -np.ones(2))),
    Row("Moments.merge", "others", ValueError, ("(4,)", "(3,)"), lambda: Moments.of(X, 0).merge(Moments.of(X[:, :3], 0))),
    Row("Moments.merge", "others", ValueError, ("(4,)", "(3,)"), lambda: Moments.of(X, 0) + Moments.of(X[:, :3], 0)),
    Row("Moments.merge", "others", TypeError, ("Moments", "float"), lambda: Moments.of(X, 0).merge(1.0)),
    Row("assign_moving_average", "value", ValueError, ("(6, 4)", "(4,)"), lambda: fusebn.assign_moving_average(X.copy(), ONE4, 0.5)),
    Row("assign_moving_average", "value", TypeError, ("complex128",), lambda: fusebn.assign_moving_average(X.copy(), X.astype(complex), 0.5)),
    Row("assign_moving_average", "variable", ValueError, ("writeable", "read-only"), lambda: fusebn.assign_moving_average(X, X, 0.5)),
    Row("assign_moving_average", "variable", ValueError, ("own its memory", "view"), lambda: fusebn.assign_moving_average(X.copy()[1:], X[1:], 0.5, zero_debias=True)),
    Row("assign_moving_average", "decay", ValueError, ("below 1",), lambda: fusebn.assign_moving_average(X.copy(), X, 1, zero_debias=True)),
    Row("save", "layers", TypeError, ("mapping", "BatchNorm", "name"), lambda: fusebn.save("never", BatchNorm(4))),
    Row("save", "layers", TypeError, ("strings", "1"), lambda: fusebn.save("never", {1: BatchNorm(4)})),
    Row("save", "layers", TypeError, ("'bn'", "list"), lambda: fusebn.save("never", {"bn": [1, 2]})),
    Row("save", "layers", TypeError, ("'a'", "object"), lambda: fusebn.save("never", {"a": np.array([None])})),
    Row("save", "layers", TypeError, ("'a'", "complex128"), lambda: fusebn.save("never", {"a": np.ones(2, complex)})),
    Row("save", "layers", ValueError, ("own name", "'bn.scale'"), lambda: fusebn.save("never", {"bn": BatchNorm(4), "bn.scale": ONE4})),
    Row("set_num_threads", "count", ValueError, ("[1, 1024]", "0"), lambda: fusebn.set_num_threads(0)),
    Row("set_num_threads", "count", ValueError, ("[1, 1024]", "1025"), lambda: fusebn.set_num_threads(1025)),
    Row("set_num_threads", "count", TypeError, ("integer", "2.0"), lambda: fusebn.set_num_threads(2.0)),
    Row("set_num_threads", "count", TypeError, ("integer", "True"), lambda: fusebn.set_num_threads(True)),
]  # fmt: skip

ROWS = [*ARRAYS, *SHAPES, *VALUES, *OBJECTS]
IDS = [f"{row.operation}-{row.argument}-{i}" for i, row in enumerate(ROWS)]


def backward(dy: Any) -> Any:
    layer = BatchNorm(4)
    layer(X, training=True)
    return layer.backward(dy)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_message(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError)) as caught:
        row.call()
    message = str(caught.value)
    assert type(caught.value) is row.kind, message
    voice = rf"{re.escape(row.operation)}: `{row.argument}` must .+; got .+\."
    assert re.match(voice, message, re.DOTALL), message
    for part in row.says:
        assert part in message
    assert len(message) < 400
    assert os.listdir(tmp_path) == []


def test_a_whole_message() -> None:
    with pytest.raises(ValueError, match="scale") as caught:
        fusebn.fused_batch_norm(np.ones((8, 64), F32), np.ones(32), None, axis=-1)
    text = (
        "fused_batch_norm: `scale` must have shape (64,), one value per channel of x of shape "
        "(8, 64); got shape (32,)."
    )
    assert str(caught.value) == text


@pytest.mark.parametrize(
    "options",
    [
        {"scale": np.ones(3)},
        {"epsilon": -1},
        {"activation": "tanh"},
        {"weights": -np.ones(6)},
        {"residual": X[:3]},
        {"is_training": 1},
        {"is_training": False},
    ],
    ids="-".join,
)
def test_an_error_writes_nothing(options: dict[str, Any]) -> None:
    out = np.full((6, 4), 7, F32)
    with pytest.raises((TypeError, ValueError)):
        fused(out=out, **options)
    assert (out == 7).all()
    x = X.copy()
    with pytest.raises((TypeError, ValueError)):
        fused(x, out=x, **options)
    assert_same_bits(x, X)


@pytest.mark.parametrize(
    "options",
    [
        {"x": X[:, :3]},
        {"x": X.astype(int)},
        {"training": 1},
        {"update": "no"},
        {"weights": -np.ones(6)},
        {"residual": X[:3]},
        {"out": np.empty((6, 4))},
        {"x": np.full((6, 4), np.nan, F32)},
        {"x": np.full((6, 4), np.nan, F32), "training": False, "update": True},
    ],
    ids="-".join,
)
def test_an_error_leaves_the_layer_as_it_was(options: dict[str, Any]) -> None:
    layer = BatchNorm(4, nonfinite="raise")
    layer(X, training=True)
    before = {key: value.tobytes() for key, value in layer.state_dict().items()}
    gradient = layer.backward(X).dx
    with pytest.raises((TypeError, ValueError)):
        layer(**({"x": X, "training": True} | options))
    assert {key: value.tobytes() for key, value in layer.state_dict().items()} == before
    assert_same_bits(layer.backward(X).dx, gradient)


@pytest.mark.parametrize(
    "changes",
    [
        {"moving_variance": np.ones(3)},
        {"moving_variance": -np.ones(4)},
        {"num_updates": np.array(-1)},
        {"decay": np.array(3.0)},
        {"epsilon": np.array(-1.0)},
        {"correction": np.array(np.inf)},
        {"frozen": None},
        {"frozen": np.array(0.5)},
        {"other": np.ones(4)},
    ],
    ids="-".join,
)
def test_a_state_that_does_not_fit_changes_nothing(changes: dict[str, Any]) -> None:
    layer = BatchNorm(4)
    layer(X, training=True)
    layer.freeze()
    before = {key: value.tobytes() for key, value in layer.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match=r"BatchNorm\.load_state_dict: `"):
        layer.load_state_dict(state_of(scale=np.full(4, 9.0), **changes))
    assert {key: value.tobytes() for key, value in layer.state_dict().items()} == before


def test_a_rejected_decay_keeps_the_old_one() -> None:
    layer = BatchNorm(4, decay=0.75)
    with pytest.raises(ValueError, match="decay"):
        layer.decay = 2
    assert layer.decay == 0.75


def test_a_rejected_moving_average_keeps_the_variable() -> None:
    variable = X.copy()
    for value, decay, debias in ((ONE4, 0.5, False), (X, 1.5, False), (X, 1, True), (X, 0.5, 1)):
        with pytest.raises((TypeError, ValueError)):
            fusebn.assign_moving_average(variable, value, decay, debias)
    assert_same_bits(variable, X)
    # Nor was an update counted: the next one is the first, whose factor is 1.
    fusebn.assign_moving_average(variable, 2 * X, 0.5, zero_debias=True)
    assert_same_bits(variable, 2 * X)


def test_adding_something_else_to_moments() -> None:
    batch = Moments.of(X, 0)
    for other in (1.0, "a", None):
        with pytest.raises(TypeError):
            batch + other
        with pytest.raises(TypeError):
            other + batch
    assert 0 + batch == batch  # what sum() begins with


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("FUSEBN_NUM_THREADS", "many", "`FUSEBN_NUM_THREADS` must be an integer; got 'many'."),
        ("FUSEBN_NUM_THREADS", "-2", "`FUSEBN_NUM_THREADS` must be an integer; got '-2'."),
        ("FUSEBN_NUM_THREADS", "0", "`FUSEBN_NUM_THREADS` must lie in [1, 1024]; got 0."),
        ("FUSEBN_NUM_THREADS", "1025", "`FUSEBN_NUM_THREADS` must lie in [1, 1024]; got 1025."),
        ("FUSEBN_INSTRUCTION_SET", "mmx", "`FUSEBN_INSTRUCTION_SET` must be one of x86-64-"),
    ],
)
def test_bad_environment(name: str, value: str, says: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import fusebn"], env=os.environ | {name: value},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 1
    assert f"ValueError: import fusebn: {says}" in result.stderr


def test_a_vector_that_fits_another_axis_names_it_unless_it_is_the_batch() -> None:
    x = np.ones((4, 5, 5, 3), np.float32)
    with pytest.raises(ValueError, match=r"Did you mean axis=1\?"):
        fusebn.fused_batch_norm(x, np.ones(5, np.float32), None)
    with pytest.raises(ValueError, match=r"got shape \(4,\)\.$"):
        fusebn.fused_batch_norm(x, np.ones(4, np.float32), None)
