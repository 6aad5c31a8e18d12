"""`fold` against the unfolded answer, by the convolutions whose layouts it takes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
import torch
import torch.nn.functional as F
from flax import linen, nnx

import fusebn
import fusebn.keras
import fusebn.torch
from fusebn._folding import rounded

Array = Any

EPSILON = 1e-3


class Linear(NamedTuple):
    """A linear layer: its kind and layout, the shapes of x and weight, and how it is applied."""

    kind: str
    layout: str
    channel_axis: int
    x_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    channels: tuple[int, int]
    groups: int
    apply: Callable[[Array, Array], Array]


def torch_conv(rank: int, groups: int, stride: int, dilation: int) -> Linear:
    def apply(x: Array, weight: Array) -> Array:
        conv = getattr(F, f"conv{rank}d")
        tensors = torch.tensor(x), torch.tensor(weight)
        return conv(*tensors, stride=stride, dilation=dilation, groups=groups).numpy()

    weight = (8, 4 // groups, *(3, 2, 2)[:rank])
    return Linear("conv", "torch", 1, (2, 4, *[7] * rank), weight, (4, 8), groups, apply)


def torch_conv_transpose(rank: int, groups: int, stride: int, dilation: int) -> Linear:
    def apply(x: Array, weight: Array) -> Array:
        conv = getattr(F, f"conv_transpose{rank}d")
        tensors = torch.tensor(x), torch.tensor(weight)
        return conv(*tensors, stride=stride, dilation=dilation, groups=groups, padding=1).numpy()

    weight = (4, 8 // groups, *(3, 2, 2)[:rank])
    return Linear("conv_transpose", "torch", 1, (2, 4, *[5] * rank), weight, (4, 8), groups, apply)


def tensorflow_conv(rank: int, groups: int, stride: int, dilation: int) -> Linear:
    def apply(x: Array, weight: Array) -> Array:
        return tf.nn.convolution(x, weight, strides=stride, dilations=dilation).numpy()

    weight = (*(3, 2, 2)[:rank], 4 // groups, 8)
    return Linear("conv", "tensorflow", -1, (2, *[7] * rank, 4), weight, (4, 8), groups, apply)


def tensorflow_conv_transpose(rank: int, groups: int, stride: int, dilation: int) -> Linear:
    assert dilation == 1

    def apply(x: Array, weight: Array) -> Array:
        # TensorFlow has no groups here: so each by itself.
        sizes = [(n - 1) * stride + k for n, k in zip(x.shape[1:-1], weight.shape, strict=False)]
        parts = zip(np.split(x, groups, -1), np.split(weight, groups, -1), strict=True)
        ys = [
            tf.nn.conv_transpose(*part, [2, *sizes, 8 // groups], stride, padding="VALID")
            for part in parts
        ]
        return np.concatenate(ys, -1)

    weight = (*(3, 2, 2)[:rank], 8 // groups, 4)
    x = (2, *[5] * rank, 4)
    return Linear("conv_transpose", "keras", -1, x, weight, (4, 8), groups, apply)


def tensorflow_depthwise(rank: int, multiplier: int, stride: int, dilation: int) -> Linear:
    def apply(x: Array, weight: Array) -> Array:
        strides = [1, stride, stride, 1]
        return tf.nn.depthwise_conv2d(x, weight, strides, "VALID", dilations=[dilation] * 2).numpy()

    assert rank == 2
    x, weight = (2, 7, 7, 4), (3, 2, 4, multiplier)
    return Linear("depthwise_conv", "tensorflow", -1, x, weight, (4, 4 * multiplier), 1, apply)


def keras_depthwise(rank: int, multiplier: int, stride: int, dilation: int) -> Linear:
    def apply(x: Array, weight: Array) -> Array:
        y = keras.ops.depthwise_conv(x, weight, stride, "valid", "channels_last", dilation)
        return keras.ops.convert_to_numpy(y)

    assert rank == 1
    x, weight = (2, 7, 4), (3, 4, multiplier)
    return Linear("depthwise_conv", "keras", -1, x, weight, (4, 4 * multiplier), 4, apply)


def flax_conv(rank: int, groups: int, stride: int, dilation: int) -> Linear:
    kernel = (3, 2, 2)[:rank]

    def apply(x: Array, weight: Array) -> Array:
        layer = linen.Conv(
            *(8, kernel, stride, "VALID"),
            kernel_dilation=dilation,
            feature_group_count=groups,
            use_bias=False,
        )
        with jax.enable_x64(True):
            return np.asarray(layer.apply({"params": {"kernel": weight}}, x))

    weight = (*kernel, 4 // groups, 8)
    return Linear("conv", "flax", -1, (2, *[7] * rank, 4), weight, (4, 8), groups, apply)


def flax_conv_transpose(rank: int, groups: int, stride: int, dilation: int) -> Linear:
    kernel = (3, 2, 2)[:rank]

    def apply(x: Array, weight: Array) -> Array:
        with jax.enable_x64(True):
            if groups > 1:  # as Flax has it, but for the groups
                spec = jax.lax.conv_dimension_numbers(x.shape, weight.shape, ("NWC", "WIO", "NWC"))
                y = jax.lax.conv_general_dilated(
                    jnp.asarray(x),
                    weight,
                    (1,),
                    [(2, 2)],
                    lhs_dilation=(stride,),
                    rhs_dilation=(dilation,),
                    dimension_numbers=spec,
                    feature_group_count=groups,
                )
                return np.asarray(y)
            strides, dilations = (stride,) * rank, (dilation,) * rank
            layer = linen.ConvTranspose(8, kernel, strides, "SAME", dilations, use_bias=False)
            return np.asarray(layer.apply({"params": {"kernel": weight}}, x))

    weight = (*kernel, 4 // groups, 8)
    return Linear("conv_transpose", "flax", -1, (2, *[5] * rank, 4), weight, (4, 8), groups, apply)


def dense(layout: str) -> Linear:
    def apply(x: Array, weight: Array) -> Array:
        return x @ (weight.T if layout == "torch" else weight)

    weight = (8, 4) if layout == "torch" else (4, 8)
    return Linear("dense", layout, -1, (5, 4), weight, (4, 8), 1, apply)


def table(*rows: tuple[Callable[..., Linear], int, Any, Any]) -> list[Any]:
    """Return linear layers: of each row the groups (or multipliers), each with every step."""
    return [
        pytest.param(make(rank, groups, *step), id=f"{make.__name__}-{rank}-{groups}-{step}")
        for make, rank, all_groups, steps in rows
        for groups, step in itertools.product(all_groups, steps)
    ]


# Strides and dilations.
PLAIN, STRIDE, DILATION, BOTH = (1, 1), (2, 1), (1, 2), (3, 2)

DENSE = [pytest.param(dense(layout), id=f"dense-{layout}") for layout in ("torch", "keras", "flax")]
CONVS = table(
    (torch_conv, 1, (1, 2), (PLAIN, BOTH)),
    (torch_conv, 2, (1, 2), (PLAIN, STRIDE, DILATION, BOTH)),
    (torch_conv, 3, (1, 2), (PLAIN, BOTH)),
    (tensorflow_conv, 1, (1, 2), (PLAIN, STRIDE, DILATION)),
    (tensorflow_conv, 2, (1, 2), (PLAIN, STRIDE, DILATION)),
    (tensorflow_conv, 3, (1,), (PLAIN, STRIDE)),
    (tensorflow_depthwise, 2, (1, 3), (PLAIN, STRIDE, DILATION)),
    (keras_depthwise, 1, (1, 2), (STRIDE,)),
    (flax_conv, 1, (1, 2), (BOTH,)),
    (flax_conv, 2, (1, 2), (STRIDE, DILATION)),
    (flax_conv, 3, (2,), (PLAIN,)),
)
TRANSPOSED = table(
    (torch_conv_transpose, 1, (1, 2), (PLAIN, BOTH)),
    (torch_conv_transpose, 2, (1, 2), (PLAIN, STRIDE, DILATION, BOTH)),
    (torch_conv_transpose, 3, (1, 2), (PLAIN, BOTH)),
    (tensorflow_conv_transpose, 1, (1, 2), (STRIDE,)),
    (tensorflow_conv_transpose, 2, (1, 2), (PLAIN, STRIDE)),
    (tensorflow_conv_transpose, 3, (1,), (STRIDE,)),
    (flax_conv_transpose, 1, (1, 2), (BOTH,)),
    (flax_conv_transpose, 2, (1,), (STRIDE,)),
)
# Every channel in its own group, where that is no kind of its own.
DEPTHWISE = table((torch_conv, 2, (4,), (STRIDE,)), (flax_conv, 2, (4,), (STRIDE,)))


# ---- the answer ----


def variables(rng: np.random.Generator, channels: int) -> dict[str, Any]:
    """Return what a batch norm holds: one scale is 0, one variance is."""
    held = {
        "scale": rng.normal(size=channels),
        "offset": rng.normal(size=channels),
        "mean": 10 * rng.normal(size=channels),
        "variance": rng.uniform(0.1, 3, channels),
    }
    held["scale"][0] = held["variance"][1] = 0
    return {**held, "epsilon": EPSILON}


def norm(x: Array, held: dict[str, Any], axis: int) -> Array:
    """Return the batch norm of x in more than float64."""
    x = np.moveaxis(x.astype(np.longdouble), axis, -1)
    y = (x - held["mean"]) / np.sqrt(held["variance"] + np.longdouble(EPSILON))
    return np.moveaxis(y * held["scale"] + held["offset"], -1, axis)


def add(x: Array, bias: Array, axis: int) -> Array:
    return np.moveaxis(np.moveaxis(x, axis, -1) + bias, -1, axis)


def close(actual: Array, want: Array) -> None:
    magnitude = np.abs(want).max()
    assert magnitude > 0
    assert np.abs(actual - want).max() <= 1e-12 * magnitude


def inputs(rng: np.random.Generator, linear: Linear) -> tuple[Array, Array, Array]:
    x, weight = rng.normal(size=linear.x_shape), rng.normal(size=linear.weight_shape)
    bias = rng.normal(size=linear.channels[1])
    for array in (x, weight, bias):
        array.setflags(write=False)
    return x, weight, bias


def folded(linear: Linear, weight: Array, bias: Any, layer: Any, **options: Any) -> Any:
    kind, layout, groups = linear.kind, linear.layout, linear.groups
    return fusebn.fold(weight, bias, layer, kind=kind, layout=layout, groups=groups, **options)


@pytest.mark.parametrize("linear", DENSE + CONVS + TRANSPOSED + DEPTHWISE)
def test_a_norm_after(linear, rng):
    x, weight, bias = inputs(rng, linear)
    axis, held = linear.channel_axis, variables(rng, linear.channels[1])
    alone = linear.apply(x, weight)
    new_weight, new_bias = folded(linear, weight, bias, held)
    y = linear.apply(x, new_weight)
    close(add(y, new_bias, axis), norm(add(alone, bias, axis), held, axis))
    same_weight, bias_of_none = folded(linear, weight, None, held)
    np.testing.assert_array_equal(same_weight, new_weight)
    close(add(y, bias_of_none, axis), norm(alone, held, axis))


@pytest.mark.parametrize("linear", DENSE + CONVS + DEPTHWISE)
def test_a_norm_before(linear, rng):
    x, weight, bias = inputs(rng, linear)
    axis, held = linear.channel_axis, variables(rng, linear.channels[0])
    want = linear.apply(norm(x, held, axis).astype(np.float64), weight)
    options = {} if linear.kind == "dense" else {"padded": False}
    for given in (bias, None):
        new_weight, new_bias = folded(linear, weight, given, held, before=True, **options)
        y = add(linear.apply(x, new_weight), new_bias, axis)
        close(y, want if given is None else add(want, bias, axis))


@pytest.mark.parametrize("linear", TRANSPOSED)
def test_a_norm_that_shifts_nothing_before_a_transposed_one(linear, rng):
    x, weight, bias = inputs(rng, linear)
    axis, held = linear.channel_axis, variables(rng, linear.channels[0])
    held["mean"], held["offset"] = np.zeros(4), np.zeros(4)
    want = linear.apply(norm(x, held, axis).astype(np.float64), weight)
    new_weight, new_bias = folded(linear, weight, bias, held, before=True)
    np.testing.assert_array_equal(new_bias, bias)
    close(linear.apply(x, new_weight), want)


def test_padding_is_exact_where_nothing_is_shifted(rng):
    held = variables(rng, 2) | {"mean": np.array([3.0, 0]), "offset": np.array([0.0, 0])}
    held["scale"] = np.array([0.0, 2])  # a scale of 0: the mean has no part in it
    weight, x = rng.normal(size=(1, 2, 3)), rng.normal(size=(1, 2, 5))
    new_weight, new_bias = fusebn.fold(weight, None, held, kind="conv", before=True, padded=True)

    def conv(x: Array, weight: Array) -> Array:
        return F.conv1d(torch.from_numpy(x), torch.from_numpy(weight), padding=1).numpy()

    close(conv(x, new_weight), conv(norm(x, held, 1).astype(np.float64), weight))
    assert new_bias == 0


def test_inexact_folding_is_wrong_at_the_border_alone(rng):
    held, weight, x = variables(rng, 4), rng.normal(size=(3, 4, 3)), rng.normal(size=(1, 4, 9))
    options = {"kind": "conv", "before": True, "padded": "inexact"}
    new_weight, new_bias = fusebn.fold(weight, None, held, **options)

    def conv(x: Array, weight: Array) -> Array:
        return F.conv1d(torch.from_numpy(x), torch.from_numpy(weight), padding=1).numpy()

    actual = add(conv(x, new_weight), new_bias, 1)
    want = conv(norm(x, held, 1).astype(np.float64), weight)
    close(actual[..., 1:-1], want[..., 1:-1])
    assert (np.abs(actual - want)[..., [0, -1]] > 0.1).all()


@pytest.mark.parametrize("before", [False, True])
def test_a_variance_and_an_epsilon_of_zero(before):
    # Where their sum is 0, so is rstd: the batch norm returns its offset.
    held = {"mean": [1.0, 2], "variance": [0.0, 2.0**-80], "offset": [5.0, 6], "epsilon": 0}
    held = {key: np.array(value) if key != "epsilon" else 0 for key, value in held.items()}
    weight, bias = fusebn.fold(np.eye(2), None, held, kind="dense", before=before)
    np.testing.assert_array_equal(weight, [[0, 0], [0, 2.0**40]])
    np.testing.assert_array_equal(bias, [5, 6 - 2 * 2.0**40])


# ---- layers ----


def a_numpy_layer(held):
    layer = fusebn.BatchNorm(8, epsilon=EPSILON, dtype=np.float64)
    layer.scale, layer.offset = held["scale"], held["offset"]
    layer.moving_mean, layer.moving_variance = held["mean"], held["variance"]
    return layer


def a_torch_layer(held, kind=torch.nn.BatchNorm1d):
    layer = kind(8, eps=EPSILON, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(held["scale"]))
        layer.bias.copy_(torch.from_numpy(held["offset"]))
        layer.running_mean.copy_(torch.from_numpy(held["mean"]))
        layer.running_var.copy_(torch.from_numpy(held["variance"]))
    return layer


def a_keras_layer(held, kind=keras.layers.BatchNormalization):
    layer = kind(epsilon=EPSILON, dtype="float64")
    layer.build((None, 8))
    layer.set_weights([held[key] for key in ("scale", "offset", "mean", "variance")])
    return layer


def an_nnx_layer(held):
    with jax.enable_x64(True):
        layer = nnx.BatchNorm(8, epsilon=EPSILON, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        layer.scale.set_value(jnp.asarray(held["scale"]))
        layer.bias.set_value(jnp.asarray(held["offset"]))
        layer.mean.set_value(jnp.asarray(held["mean"]))
        layer.var.set_value(jnp.asarray(held["variance"]))
    return layer


def our_torch_layer(held):
    return a_torch_layer(held, fusebn.torch.BatchNorm1d)


def our_keras_layer(held):
    return a_keras_layer(held, fusebn.keras.layers.BatchNormalization)


def a_mapping_of_moving_statistics(held):
    names = {"mean": "moving_mean", "variance": "moving_variance"}
    return {names.get(key, key): value for key, value in held.items()}


def what_says_what_is_effective(held):
    return SimpleNamespace(effective_variables=lambda: held, moving_mean="not asked")


@pytest.mark.parametrize(
    "make",
    [
        a_numpy_layer,
        a_torch_layer,
        our_torch_layer,
        a_keras_layer,
        our_keras_layer,
        an_nnx_layer,
        a_mapping_of_moving_statistics,
        what_says_what_is_effective,
    ],
)
def test_whatever_holds_what_normalizes(make, rng):
    held, weight = variables(rng, 8), rng.normal(size=(8, 4))
    want = fusebn.fold(weight, None, held, kind="dense")
    actual = fusebn.fold(weight, None, make(held), kind="dense")
    for one, other in zip(actual, want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_no_scale_and_no_offset(rng):
    held, weight = variables(rng, 8), rng.normal(size=(8, 4))
    bare = torch.nn.BatchNorm1d(8, eps=EPSILON, affine=False, dtype=torch.float64)
    bare.running_mean.copy_(torch.from_numpy(held["mean"]))
    bare.running_var.copy_(torch.from_numpy(held["variance"]))
    held |= {"scale": np.ones(8), "offset": np.zeros(8)}
    want = fusebn.fold(weight, None, held, kind="dense")
    for layer in (bare, {key: held[key] for key in ("mean", "variance", "epsilon")}):
        for one, other in zip(fusebn.fold(weight, None, layer, kind="dense"), want, strict=True):
            np.testing.assert_array_equal(one, other)


# ---- arrays ----

DTYPES = ("float16", "bfloat16", "float32", "float64")


def jax_array(x, dtype):
    with jax.enable_x64(True):
        return jnp.asarray(x, dtype)


ARRAYS = {
    "numpy": lambda x, dtype: x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype),
    "torch": lambda x, dtype: torch.nn.Parameter(torch.from_numpy(x).to(getattr(torch, dtype))),
    "tensorflow": lambda x, dtype: tf.constant(x, dtype),
    "tensorflow's variables": lambda x, dtype: tf.Variable(tf.constant(x, dtype)),
    "jax": jax_array,
    "flax's variables": lambda x, dtype: nnx.Param(jax_array(x, dtype)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("framework", ARRAYS)
def test_arrays_come_back_as_they_were(framework, dtype, rng):
    held, values = variables(rng, 8), rng.normal(size=(8, 4)).astype(np.float32).astype(float)
    weight = ARRAYS[framework](values, dtype)
    want = fusebn.fold(ARRAYS["numpy"](values, dtype), None, held, kind="dense")
    held |= {key: ARRAYS[framework](held[key], "float64") for key in ("scale", "mean")}
    for one, other in zip(fusebn.fold(weight, None, held, kind="dense"), want, strict=True):
        plain = weight.get_value() if framework.startswith("flax") else weight
        expected = {"torch": torch.Tensor, "tensorflow's variables": tf.Tensor}
        assert isinstance(one, expected.get(framework, type(plain)))
        assert one.dtype == plain.dtype
        assert not getattr(one, "requires_grad", False)
        values = one.float().numpy() if framework == "torch" and dtype == "bfloat16" else one
        np.testing.assert_array_equal(np.asarray(values).astype(float), other.astype(float))


def test_variables_of_keras(rng):
    held, values = variables(rng, 8), rng.normal(size=(4, 8))
    layer = keras.layers.Dense(8, dtype="float64")
    layer.build((None, 4))
    layer.set_weights([values, np.ones(8)])
    options = {"kind": "dense", "layout": "keras"}
    actual = fusebn.fold(layer.kernel, layer.bias, held, **options)
    want = fusebn.fold(values, np.ones(8), held, **options)
    for one, other in zip(actual, want, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(one), other)


def test_an_array_stays_on_its_device():
    weight = jax.device_put(np.ones((2, 2), np.float32), jax.devices("cpu")[-1])
    held = {"mean": np.zeros(2), "variance": np.ones(2), "epsilon": 0}
    for array in fusebn.fold(weight, None, held, kind="dense"):
        assert array.devices() == weight.devices()


@pytest.mark.parametrize("sign", [1, -1])
def test_bfloat16_is_rounded_once(sign):
    # Halfway between two numbers of bfloat16, and beyond by less than float32 can say.
    halfway = 1 + 2.0**-8
    wide = sign * np.array([halfway, halfway + 2.0**-40, halfway - 2.0**-40, 3e-45, 1e300, 1.5])
    assert wide[1].astype(ml_dtypes.bfloat16) == sign  # rounded twice, it is wrong
    actual = rounded(wide, np.dtype(ml_dtypes.bfloat16)).astype(float)
    np.testing.assert_array_equal(actual, sign * np.array([1, 1 + 2.0**-7, 1, 0, np.inf, 1.5]))


def test_nothing_given_is_modified(rng):
    held, weight, bias = variables(rng, 3), rng.normal(size=(3, 2)), rng.normal(size=3)
    before = [array.copy() for array in (weight, bias, *list(held.values())[:4])]
    fusebn.fold(weight, bias, held, kind="dense")
    for array, copy in zip((weight, bias, *list(held.values())[:4]), before, strict=True):
        np.testing.assert_array_equal(array, copy)


# ---- what cannot be folded ----

ONES = np.ones(2)
GOOD = {"mean": 0 * ONES, "variance": ONES, "epsilon": 0}
SHIFTED = GOOD | {"mean": ONES}
KERNEL, MATRIX, HUGE = np.ones((2, 2, 3)), np.ones((2, 2)), np.full((2, 2, 3), 6e4, np.float16)
GROUPED = {"kind": "depthwise_conv", "layout": "keras", "groups": 3}
BEFORE = {"before": True, "layer": SHIFTED}


def with_layer(**held: Any) -> dict[str, Any]:
    return {"layer": GOOD | held}


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"kind": "deconv"}, ValueError, "`kind` must be one of 'dense', 'conv'"),
        ({"kind": None}, TypeError, "`kind` must be one of"),
        ({"layout": "NCHW"}, ValueError, "`layout` must be one of"),
        ({"kind": "depthwise_conv"}, ValueError, "`kind` must be 'conv' for layout='torch'"),
        (GROUPED, ValueError, "`groups` must be 2; got 3"),
        ({"kind": "dense"}, ValueError, "`weight` must have 2 axes for kind='dense'"),
        ({"weight": MATRIX}, ValueError, "`weight` must have at least 3 axes for kind='conv'"),
        ({"weight": ONES, "kind": "dense"}, ValueError, "`weight` must have 2 axes"),
        ({"weight": KERNEL.astype(int)}, TypeError, "`weight` must be an array of float16"),
        ({"weight": [[1.0]]}, TypeError, "`weight` must be a NumPy array; got list"),
        ({"groups": 3}, ValueError, "`groups` must divide the 2 channels of `weight`"),
        ({"groups": 0}, ValueError, "`groups` must be at least 1"),
        ({"groups": 2, "kind": "dense", "weight": MATRIX}, ValueError, "`groups` must be 1 for"),
        ({"bias": np.ones(3)}, ValueError, "`bias` must have shape (2,), for a weight of shape"),
        ({"bias": 0.5}, TypeError, "`bias` must be a NumPy array; got float"),
        ({"weight": np.ones((3, 2, 3))}, ValueError, "`layer: mean` must have shape (3,)"),
        (with_layer(scale=np.ones(3)), ValueError, "`layer: scale` must have shape (2,)"),
        (with_layer(mean=np.ones((2, 1))), ValueError, "got shape (2, 1)"),
        (with_layer(variance=-ONES), ValueError, "must not be negative; got another value in"),
        (with_layer(offset=np.array([0, np.nan])), ValueError, "finite; got another value in ch"),
        (with_layer(variance=np.array([0, np.inf])), ValueError, "`layer: variance` must be fin"),
        (with_layer(epsilon=-1), ValueError, "`layer: epsilon` must be finite and not negative"),
        (with_layer(beta=ONES), ValueError, "`layer` must be a batch norm"),
        ({"layer": {"mean": ONES}}, TypeError, "`layer: variance` must be a NumPy array; got No"),
        ({"layer": torch.nn.Linear(2, 2)}, TypeError, "`layer` must be a batch norm that has been"),
        ({"layer": None}, TypeError, "got NoneType"),
        (
            {"layer": torch.nn.BatchNorm1d(2, track_running_stats=False)},
            ValueError,
            "`layer` must hold moving statistics; got running_mean=None",
        ),
        ({"layer": keras.layers.BatchNormalization()}, ValueError, "got moving_mean=None"),
        ({"layer": fusebn.BatchNorm(2, activation="relu")}, ValueError, "have no activation; got"),
        (BEFORE, ValueError, "`padded` must be given with before=True; got None"),
        (BEFORE | {"padded": True}, ValueError, "Padding adds zeros after the batch norm"),
        (BEFORE | {"padded": "yes"}, TypeError, "`padded` must be a bool"),
        ({"before": "yes"}, TypeError, "`before` must be a bool"),
        (BEFORE | {"kind": "conv_transpose"}, ValueError, "`before` must be False for kind='conv_"),
        (with_layer(scale=2 * ONES) | {"weight": HUGE}, ValueError, "up to 1.2e+05; got float16"),
    ],
)
def test_what_cannot_be_folded(arguments, kind, says):
    options = {"weight": KERNEL, "bias": None, "layer": GOOD, "kind": "conv"}
    assert fusebn.fold(**options)[1].shape == (2,)
    with pytest.raises(kind, match=re.escape(says)) as raised:
        fusebn.fold(**(options | arguments))
    assert re.match("fold: `.*` must .*; got .*", str(raised.value))


def test_a_tensor_of_a_graph_has_no_values_yet():
    with tf.Graph().as_default():
        weight = tf.constant(KERNEL)
        with pytest.raises(TypeError, match="run it in a session first"):
            fusebn.fold(weight, None, GOOD, kind="conv")
