"""PyTorch's modules of batch normalization, by its names: what they do in addition is optional.

Every class is a subclass of PyTorch's of the same name and behaves as that does, but for three
things that nobody wants as they are: the running statistics stay float32 in a module cast to half
precision, a recomputation updates nothing, and an error leaves the module as it was.
"""

from types import EllipsisType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fusebn import _spec
from fusebn.torch import _calls
from fusebn.torch._calls import is_recomputation, is_symbol
from fusebn.torch._wide import Wide
from fusebn.torch.functional import batch_norm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
]

NONFINITE = ("propagate", "skip", "raise")

_MOMENTUM = 0.1  # PyTorch's default


def momentum_of(name: str, momentum: float | None, decay: float | None) -> float | None:
    """Return the momentum that either of the two names."""
    if decay is None:
        return momentum
    fix = "momentum is 1 - decay: pass one of the two."
    if momentum != _MOMENTUM:
        expected = f"be None beside momentum={momentum}"
        _spec.fail(ValueError, name, "decay", expected, f"{decay}", fix)
    return 1 - _spec.fraction(name, "decay", decay, "It is the weight of the old value.")


class Extended(Wide, torch.nn.modules.batchnorm._BatchNorm):
    """What the modules do beyond PyTorch's. A constructor calls `_extend` when PyTorch's is done.

    The defaults stand in the class, so that PyTorch's own modules lack nothing to become ours.
    """

    activation: str | None = None
    correction: float = 1
    nonfinite: str = "propagate"
    axis: int = 1
    _frozen: bool = False
    _wide: ClassVar[tuple[str, ...]] = ("running_mean", "running_var")

    def _extend(self, activation: str | None, correction: float, nonfinite: str, axis: int) -> None:
        name = type(self).__name__
        _spec.activation(name, activation)
        self.activation = activation
        self.correction = _spec.non_negative(name, "correction", correction)
        self.nonfinite = _spec.one_of(name, "nonfinite", nonfinite, NONFINITE)
        self.axis = _spec.integer(name, "axis", axis)
        self._widen()

    def extra_repr(self) -> str:
        """Return PyTorch's, and what differs from PyTorch's."""
        shown = [super().extra_repr()]
        for name in ("activation", "correction", "nonfinite", "axis"):
            value = getattr(self, name)
            if value != getattr(Extended, name):
                shown.append(f"{name}={value!r}")
        return ", ".join(shown + ["frozen=True"] * self._frozen)

    # ---- the switches ----

    @property
    def frozen(self) -> bool:
        """Whether the running statistics normalize every batch and never change."""
        return self._frozen

    def freeze(self) -> Self:
        """From here on normalize by the running statistics and never update them.

        ``train()`` does not undo it, copies and pickles keep it, and a state_dict does not know of
        it. `weight` and `bias` go on learning; ``requires_grad_(False)`` is theirs.
        """
        if self.running_mean is None or self.running_var is None:
            name = type(self).__name__
            _spec.fail(ValueError, name, "track_running_stats", "be True to freeze", "False")
        self._frozen = True
        return self

    def unfreeze(self) -> Self:
        """Undo :meth:`freeze`."""
        self._frozen = False
        return self

    # ---- forward ----

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        activation: str | EllipsisType | None = ...,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Normalize a batch.

        Parameters
        ----------
        input : Tensor
            As PyTorch's module takes it.
        residual : Tensor of the shape of input, optional
            Added before the activation.
        activation : str or None
            In place of the module's own.
        weights : Tensor, optional
            One non-negative real for each position, in the shape of `input` without the channels:
            see :func:`fusebn.torch.batch_norm`.
        """
        if is_symbol(input):
            node: Tensor = self._node(input, residual, activation, weights)
            return node
        self._check_input_dim(input)
        mean, var, tracked = self._statistics()
        if self._frozen or not self.training:
            training, updates = mean is None and var is None, False
        else:
            training, updates = True, self.track_running_stats
            if not updates:
                mean = var = None
        chosen = self.activation if activation is ... else activation
        if updates:
            if is_recomputation():  # the same steps again, and nothing comes of them
                mean, var, tracked = _copies(mean, var, tracked)
            return self._update(input, mean, var, tracked, residual, chosen, weights)
        return self._normalize(input, mean, var, training, 0.0, residual, chosen, weights)

    # A Module finds its tensors by __getattr__, which on a small input is a fifth of the time. They
    # are not where they should be when parametrized or wrapped.

    def _statistics(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        own = self._buffers
        try:
            return own["running_mean"], own["running_var"], own["num_batches_tracked"]
        except KeyError:
            return self.running_mean, self.running_var, self.num_batches_tracked

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        own = self._parameters
        try:
            return own["weight"], own["bias"]
        except KeyError:
            return self.weight, self.bias

    def _node(self, input: Any, residual: Any, activation: Any, weights: Any) -> Any:
        tensors = (input,) if residual is None else (input, residual)
        given = {} if activation is ... else {"activation": activation}
        if weights is not None:
            given["weights"] = weights
        return _calls.node(self, tensors, given)

    def _normalize(
        self,
        input: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        training: bool,
        factor: float,
        residual: Tensor | None,
        activation: str | None,
        weights: Tensor | None,
    ) -> Tensor:
        weight, bias = self._affine()
        return batch_norm(
            input,
            mean,
            var,
            weight,
            bias,
            training,
            factor,
            self.eps,
            residual=residual,
            activation=activation,
            weights=weights,
            axis=self.axis,
            correction=self.correction,
        )

    def _update(
        self,
        input: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        tracked: Tensor | None,
        residual: Tensor | None,
        activation: str | None,
        weights: Tensor | None,
    ) -> Tensor:
        """Normalize by the batch, and move the running statistics towards it."""
        factor = 1.0 if self.momentum is None else self.momentum
        plain = self.nonfinite == "propagate" and self.momentum is not None
        if plain or mean is None or var is None:
            y = self._normalize(input, mean, var, True, factor, residual, activation, weights)
        else:
            new = mean.clone(), var.clone()
            y = self._normalize(input, *new, True, factor, residual, activation, weights)
            self._take(mean, var, tracked, *new)
        # Counted only now: nothing has failed.
        if tracked is not None:
            tracked.add_(1)
        return y

    @torch.no_grad()
    def _take(
        self,
        mean: Tensor,
        var: Tensor,
        tracked: Tensor | None,
        new_mean: Tensor,
        new_var: Tensor,
    ) -> None:
        """Take over new statistics: into the cumulative average, and if they are finite."""
        if self.momentum is None:
            # By a tensor, for which no compiler has to wait. Without a count PyTorch never moves.
            share = mean.new_zeros(()) if tracked is None else 1 / (tracked + 1).to(mean.dtype)
            new_mean, new_var = mean.lerp(new_mean, share), var.lerp(new_var, share)
        if self.nonfinite != "propagate":
            finite = new_mean.isfinite() & new_var.isfinite()
            if self.nonfinite == "raise" and not finite.all():
                self._refuse((~finite).nonzero().flatten().tolist())
            new_mean = torch.where(finite, new_mean, mean)
            new_var = torch.where(finite, new_var, var)
        mean.copy_(new_mean)
        var.copy_(new_var)

    def _refuse(self, channels: list[int]) -> None:
        shown = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
        fix = 'Use nonfinite="skip" to leave such channels out of the running statistics.'
        expected = 'hold finite values (nonfinite="raise")'
        name, got = type(self).__name__, f"NaN or Inf in channels {shown}"
        _spec.fail(ValueError, name, "input", expected, got, fix)


def _copies(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Copy tensors unseen by modes: selective checkpointing counts the ops of both forwards."""
    with torch._C._DisableTorchDispatch():
        return tuple(None if tensor is None else tensor.clone() for tensor in tensors)


# ---- of a given number of channels ----


class _Sized(Extended):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = _MOMENTUM,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        correction: float = 1,
        nonfinite: str = "propagate",
        decay: float | None = None,
        axis: int = 1,
    ) -> None:
        momentum = momentum_of(type(self).__name__, momentum, decay)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        self._extend(activation, correction, nonfinite, axis)


class BatchNorm2d(_Sized, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``, and what surrounds it in the same pass.

    ::

        y = activation((input - mean) / sqrt(variance + eps) * weight + bias + residual)

    In training mean and variance are the batch's, ``variance = m2 / n`` with m2 the sum of squared
    distances from the mean, and the running statistics move towards them::

        running_mean = (1 - momentum) * running_mean + momentum * mean
        running_var  = (1 - momentum) * running_var  + momentum * m2 / (n - correction)

    In evaluation they are the running ones, unless there are none.

    Parameters
    ----------
    num_features : int
        Number of channels: input is (N, C, H, W).
    eps : float
        Added to the variance.
    momentum : float, or None
        Weight of the batch in the running statistics. None weighs all batches alike.
    affine, bias : bool
        Whether there is a `weight` (first 1) and, with it, a `bias` (first 0).
    track_running_stats : bool
        Whether there are running statistics (first 0 and 1); if not, the batch's always normalize.
    device, dtype
        Of the parameters and the running statistics; but these are float32 where dtype is float16
        or bfloat16, and stay float32 in ``half()``.
    activation : None, "relu", "relu6", "leaky_relu", "silu" or "gelu"
        Applied in the same pass; leaky_relu has slope 0.01 below 0, gelu is the exact one.
    correction : float
        1 as PyTorch has it, 0 as Keras 3 and Flax do. Where n is not above it, the divisor is n.
    nonfinite : "propagate", "skip" or "raise"
        What a NaN or an infinity in a channel does to that channel's running statistics: it gets
        into them, as in PyTorch; or they stay as they are; or ValueError is raised and nothing has
        changed. It touches no other channel in any case. "raise" waits for the values, and cannot
        be compiled into one graph.
    decay : float in [0, 1], optional
        Another name for ``1 - momentum``, the weight of the old value.
    axis : int
        Where the channels are: -1 for (N, H, W, C).

    Attributes
    ----------
    weight, bias : Parameter of shape (num_features,), or None
    running_mean, running_var : Tensor of shape (num_features,), or None
    num_batches_tracked : int64 Tensor of rank 0, or None
        How many batches have moved the running statistics.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As PyTorch, with PyTorch's text: for inputs of another rank, of another number of channels,
        or, in training, of one value a channel. In our own words for what is ours.

    Notes
    -----
    The state_dict is PyTorch's, key by key, and loads either way; what is not in PyTorch's module
    is not in it. A forward that activation checkpointing repeats within a backward updates nothing.
    ``torch.compile``, ``torch.export`` and ``torch.fx`` take the modules, ``torch.jit.script`` does
    not.

    As ``torch.nn.BatchNorm2d``; the arguments from `activation` on are ours:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167

    Examples
    --------
    >>> import torch
    >>> import fusebn.torch as fbt
    >>> layer = fbt.BatchNorm2d(2, decay=0.5, activation="relu")
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 10.0]]).reshape(2, 2, 1, 1)
    >>> layer(x).flatten(1)
    tensor([[0.0000, 0.0000],
            [1.0000, 0.0000]], grad_fn=<ViewBackward0>)
    >>> layer(x, residual=torch.full_like(x, 9), activation=None).flatten(1)
    tensor([[ 8.0000,  9.0000],
            [10.0000,  9.0000]], grad_fn=<ViewBackward0>)
    >>> layer.running_mean
    tensor([1.5000, 7.5000])
    >>> layer.freeze().train().frozen
    True
    """


class BatchNorm1d(_Sized, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d``: `BatchNorm2d` for inputs (N, C) or (N, C, L).

    Examples
    --------
    >>> import torch
    >>> import fusebn.torch as fbt
    >>> fbt.BatchNorm1d(1, affine=False)(torch.tensor([[1.0], [3.0]]))
    tensor([[-1.0000],
            [ 1.0000]])
    """


class BatchNorm3d(_Sized, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d``: `BatchNorm2d` for inputs (N, C, D, H, W).

    Examples
    --------
    >>> import torch
    >>> import fusebn.torch as fbt
    >>> fbt.BatchNorm3d(4, activation="silu")(torch.ones(2, 4, 3, 3, 3)).shape
    torch.Size([2, 4, 3, 3, 3])
    """


# ---- of a number of channels that the first input tells ----


class _Unsized(Extended):
    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = _MOMENTUM,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        correction: float = 1,
        nonfinite: str = "propagate",
        decay: float | None = None,
        axis: int = 1,
    ) -> None:
        momentum = momentum_of(type(self).__name__, momentum, decay)
        # By position this is the constructor of PyTorch's lazy modules.
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype, bias=bias)  # type: ignore[arg-type]
        self._extend(activation, correction, nonfinite, axis)

    def initialize_parameters(self, input: Tensor, *_: Any, **__: Any) -> None:
        """Take the number of channels from the first input."""
        super().initialize_parameters(input.movedim(self.axis, 1))  # type: ignore[misc]


class LazyBatchNorm1d(_Unsized, torch.nn.LazyBatchNorm1d):
    """`BatchNorm1d`, its number of channels told by the first input.

    Examples
    --------
    >>> import torch
    >>> import fusebn.torch as fbt
    >>> layer = fbt.LazyBatchNorm1d(activation="relu")
    >>> _ = layer(torch.ones(3, 5))
    >>> type(layer).__name__, layer.num_features
    ('BatchNorm1d', 5)
    """

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_Unsized, torch.nn.LazyBatchNorm2d):
    """`BatchNorm2d`, its number of channels told by the first input: see `LazyBatchNorm1d`."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_Unsized, torch.nn.LazyBatchNorm3d):
    """`BatchNorm3d`, its number of channels told by the first input: see `LazyBatchNorm1d`."""

    cls_to_become = BatchNorm3d
