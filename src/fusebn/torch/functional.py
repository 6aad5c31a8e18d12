"""``torch.nn.functional.batch_norm``, and what surrounds it in the same pass.

PyTorch's words and errors for PyTorch's arguments; ours for the others.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fusebn import _spec
from fusebn.torch import _batch_statistics, _ops, _portable
from fusebn.torch._arguments import ELEMENTS, on_device_of, position_weights, stat_type
from fusebn.torch._portable import Options
from fusebn.torch._variables import Through

__all__ = ["batch_norm"]

_OPERATION = "batch_norm"


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    weights: Tensor | None = None,
    axis: int = 1,
    correction: float = 1,
) -> Tensor:
    """Normalize each channel, as ``torch.nn.functional.batch_norm`` does, and what surrounds it.

    ::

        y = activation((input - m) / sqrt(v + eps) * weight + bias + residual)

    In training m and v are the batch's, ``v = sum((input - m)**2) / n``, and what was running
    moves towards them: ``running = (1 - momentum) * running + momentum * batch``. Otherwise they
    are the running ones.

    Parameters
    ----------
    input : Tensor of float16, bfloat16, float32 or float64
        Of any rank that has the axis, in any memory order: y lies as it does.
    running_mean, running_var : Tensor of shape (channels,), or None
        Needed unless `training`, where they are changed in place. None there: nobody asks.
    weight, bias : Tensor of shape (channels,), or None
        None means 1 and 0. They, and what is running, have the dtype of `input` or float32.
    training : bool
        Whether the batch's statistics normalize, or the running ones.
    momentum : float
        Weight of the batch in what is running.
    eps : float
        Added to the variance: positive in training, else not negative.
    residual : Tensor of the shape of input, optional
        Added before the activation. If its dtype is another, the sum has the type that PyTorch
        gives it, and is not fused.
    activation : None, "relu", "relu6", "leaky_relu", "silu" or "gelu"
        leaky_relu has slope 0.01 below 0; gelu is the exact one.
    weights : Tensor, optional
        One non-negative real for each position, in the shape of `input` without the channels (or
        with length 1 there), or broadcasting to it. They weigh the statistics; a position of
        weight 0 is left out of them, even if it holds NaN.
    axis : int
        Where the channels are.
    correction : float
        What is taken from n in the divisor of the variance that moves `running_var`.

    Returns
    -------
    Tensor of the shape and dtype of input

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As PyTorch, with PyTorch's text, for PyTorch's arguments: above all, a training batch of
        one value per channel is a ValueError. In our own words for the rest.
    NotImplementedError
        `weights` on another device than the CPU, unless ``FUSEBN_TRITON=1`` and that is CUDA's.

    Notes
    -----
    As ``torch.nn.functional.batch_norm``; the arguments after the star are ours:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.batch_norm.html

    Gradients flow to every tensor but, in training, what is running. An empty batch, or one whose
    weights are all 0, leaves what is running as it is.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167

    Examples
    --------
    >>> import torch
    >>> import fusebn.torch as fbt
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 10.0]])
    >>> mean, var = torch.zeros(2), torch.ones(2)
    >>> fbt.batch_norm(x, mean, var, training=True, activation="relu")
    tensor([[0.0000, 0.0000],
            [1.0000, 0.0000]])
    >>> mean, var
    (tensor([0.2000, 1.0000]), tensor([1.1000, 0.9000]))
    """
    # A factor other than 1 mixes, which takes something to mix into.
    factor = momentum if running_mean is not None else 1.0
    if weights is None and _ops.is_plain(input):
        try:
            options = _options(training, input.ndim, axis, eps, correction, factor, activation)
        except TypeError:
            pass  # something is of the wrong kind, or cannot be hashed: see below
        else:
            y = _ops.short_way(input, weight, bias, running_mean, running_var, residual, options)
            if y is not None:
                return y

    tensors, weights, options = _checked(
        input, running_mean, running_var, weight, bias, training, factor, eps, activation, weights,
        axis, correction,
    )  # fmt: skip
    return _joined(_ops.batch_norm_updating, tensors, residual, weights, options)


def batch_norm_through(
    through: Through,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    weights: Tensor | None,
    axis: int,
    correction: float,
) -> Tensor:
    """Normalize as in training, by the batch's statistics as transforms have them."""
    factor = momentum if running_mean is not None else 1.0
    tensors, weights, options = _checked(
        input, running_mean, running_var, weight, bias, True, factor, eps, activation, weights,
        axis, correction,
    )  # fmt: skip
    normalize = partial(_batch_statistics.batch_norm_updating, through=through)
    return _joined(normalize, tensors, residual, weights, options)


def _checked(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    training: Any,
    factor: Any,
    eps: Any,
    activation: Any,
    weights: Any,
    axis: Any,
    correction: Any,
) -> tuple[tuple[Any, ...], Tensor | None, Options]:
    """Check all but the residual; return the first tensors that the ops take, weights, options."""
    _check_tensors(input, weight, bias, running_mean, running_var)
    options = _options.__wrapped__(training, input.ndim, axis, eps, correction, factor, activation)
    if training:
        check_size(input, options.axis)
    _check_running(running_mean, running_var, training)
    channels = input.shape[options.axis]
    _check_running_vector("running_mean", running_mean, input, channels)
    _check_running_vector("running_var", running_var, input, channels)
    weight = _vector("weight", weight, input, channels)
    bias = _vector("bias", bias, input, channels)
    if weights is not None:
        weights = position_weights(_OPERATION, "weights", weights, input, {options.axis})
    return (input, weight, bias, running_mean, running_var), weights, options


def _joined(
    normalize: Callable[..., Tensor],
    tensors: tuple[Any, ...],
    residual: Tensor | None,
    weights: Tensor | None,
    options: Options,
) -> Tensor:
    """Normalize, with the residual in the same pass if it is like x."""
    if residual is not None and not _joins(residual, tensors[0]):
        plain = options._replace(activation="identity")
        y = normalize(*tensors, None, weights, plain)
        return _portable.ACTIVATIONS[options.activation](y + residual)
    return normalize(*tensors, residual, weights, options)


@lru_cache(maxsize=1024, typed=True)  # a network calls with the same few again and again
def _options(
    training: Any, rank: int, axis: Any, eps: Any, correction: Any, factor: Any, activation: Any
) -> Options:
    """Check what is no tensor."""
    for name, position, kind, value in (
        ("training", 6, bool, training),
        ("momentum", 7, float, factor),
        ("eps", 8, float, eps),
    ):
        if not isinstance(value, (kind, int) if kind is float else kind):
            _wrong_kind(name, position, kind.__name__, value)
    if training and not eps > 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if not eps >= 0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    if not isinstance(correction, Real):
        _spec.fail(TypeError, _OPERATION, "correction", "be a real number", repr(correction))
    _spec.activation(_OPERATION, activation)
    return Options(
        training,
        _axis(axis, rank),
        float(eps),
        _spec.non_negative(_OPERATION, "correction", correction),
        float(factor),
        activation or "identity",
    )


def _axis(axis: Any, rank: int) -> int:
    index = _spec.integer(_OPERATION, "axis", axis)
    if not -rank <= index < rank:
        expected = f"lie in [{-rank}, {rank})" if rank else "name an axis, and input has none"
        _spec.fail(ValueError, _OPERATION, "axis", expected, f"{index} for input of rank {rank}")
    return index % rank


# ---- what PyTorch checks, in its words ----


def _check_tensors(input: Any, weight: Any, bias: Any, mean: Any, var: Any) -> None:
    """Check what PyTorch's parser of arguments does."""
    arguments = (input, weight, bias, mean, var)
    for i, (name, value) in enumerate(zip(_TENSORS, arguments, strict=True)):
        if not isinstance(value, Tensor) and (value is not None or i == 0):
            _wrong_kind(name, i + 1, "Tensor", value)
    if input.dtype not in ELEMENTS:
        kind = input.new_empty(0).type().removeprefix("torch.").removesuffix("Tensor")
        raise NotImplementedError(f'"batch_norm" not implemented for {kind!r}')


_TENSORS = ("input", "weight", "bias", "running_mean", "running_var")


def _wrong_kind(name: str, position: int, expected: str, value: object) -> None:
    raise TypeError(
        f"batch_norm(): argument '{name}' (position {position}) must be {expected}, "
        f"not {type(value).__name__}"
    )


def check_size(input: Tensor, axis: int) -> None:
    # A list, since no compiler follows math.prod into a generator.
    if math.prod([n for i, n in enumerate(input.shape) if i != axis]) == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.shape}"
        )


def _check_running(mean: Tensor | None, var: Tensor | None, training: bool) -> None:
    if training and (mean is None) != (var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    for name, value in (("running_mean", mean), ("running_var", var)):
        if value is None and not training:
            raise RuntimeError(f"{name} must be defined in evaluation mode")
        if value is not None and training and value.requires_grad:
            raise RuntimeError(
                f"The function 'batch_norm' is not differentiable with respect to argument "
                f"'{name}'. This input cannot have requires_grad True."
            )


def _vector(name: str, value: Tensor | None, input: Tensor, channels: int) -> Tensor | None:
    """Return a parameter as the vector that the ops take."""
    _check_vector(name, value, input, channels)
    if value is None:
        return None
    value = value if value.ndim == 1 else value.reshape(-1)
    return value.to(stat_type(input))


def _check_vector(name: str, value: Tensor | None, input: Tensor, channels: int) -> None:
    if value is None:
        return
    if not torch._C._get_tracing_state() and value.numel() != channels:
        raise RuntimeError(f"{name} should contain {channels} elements not {value.numel()}")
    if value.dtype not in (input.dtype, stat_type(input)):
        expected = "Double" if input.dtype is torch.float64 else "Float"
        raise RuntimeError(
            f"mixed dtype (CPU): expect parameter to have scalar type of {expected}, "
            f"but {name} is {value.dtype} and input {input.dtype}"
        )
    if value.device != input.device:
        raise RuntimeError(
            f"Tensor on device {value.device} is not on the expected device {input.device}!"
        )


def _check_running_vector(name: str, value: Tensor | None, input: Tensor, channels: int) -> None:
    _check_vector(name, value, input, channels)
    if value is not None and value.ndim != 1:
        raise RuntimeError(f"{name} expected 1 dims but tensor has {value.ndim}")


# ---- what is ours ----


def _joins(residual: Any, input: Tensor) -> bool:
    """Say whether the residual can be added in the same pass."""
    if not isinstance(residual, Tensor):
        _spec.fail(TypeError, _OPERATION, "residual", "be a tensor", type(residual).__name__)
    on_device_of(input, _OPERATION, "residual", residual)
    _spec.same_shape(_OPERATION, "residual", tuple(residual.shape), tuple(input.shape), "input")
    return residual.dtype is input.dtype
