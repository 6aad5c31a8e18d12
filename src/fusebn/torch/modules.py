"""PyTorch's modules of batch normalization, by its names: what they do in addition is optional.

Every class is a subclass of PyTorch's of the same name and behaves as that does, but for three
things that nobody wants as they are: the running statistics stay float32 in a module cast to half
precision, a recomputation updates nothing, and an error leaves the module as it was.
"""

from collections.abc import Callable, Mapping
from types import EllipsisType
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from fusebn import _spec
from fusebn._transforms import checked
from fusebn.torch import _calls
from fusebn.torch._calls import condition, is_recomputation, is_symbol
from fusebn.torch._variables import Through, Transforms
from fusebn.torch._wide import Wide
from fusebn.torch.functional import batch_norm, batch_norm_through

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "set_transforms_active",
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
    transforms_active: bool | Tensor = True
    transform_batch_statistics: bool = False
    _frozen: bool = False
    _wide: ClassVar[tuple[str, ...]] = ("running_mean", "running_var")

    def _extend(
        self,
        activation: str | None,
        correction: float,
        nonfinite: str,
        axis: int,
        transforms: Mapping[str, Callable[..., Tensor]] | None,
        transforms_active: bool | Tensor,
        transform_batch_statistics: bool,
    ) -> None:
        name = type(self).__name__
        _spec.activation(name, activation)
        self.activation = activation
        self.correction = _spec.non_negative(name, "correction", correction)
        self.nonfinite = _spec.one_of(name, "nonfinite", nonfinite, NONFINITE)
        self.axis = _spec.integer(name, "axis", axis)
        self.transforms = transforms
        self.transforms_active = condition(name, "transforms_active", transforms_active)
        self.transform_batch_statistics = _spec.flag(
            name, "transform_batch_statistics", transform_batch_statistics
        )
        self._widen()

    def extra_repr(self) -> str:
        """Return PyTorch's, and what differs from PyTorch's."""
        shown = [super().extra_repr()]
        for name in ("activation", "correction", "nonfinite", "axis"):
            value = getattr(self, name)
            if value != getattr(Extended, name):
                shown.append(f"{name}={value!r}")
        if self.transforms is not None and self.transforms_active is not True:
            shown.append(f"transforms_active={self.transforms_active}")
        if self.transform_batch_statistics:
            shown.append("transform_batch_statistics=True")
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

    # ---- transforms ----

    @property
    def transforms(self) -> Transforms | None:
        """What is done to the variables before they normalize: functions, by their names.

        Set it to another mapping, or to None, at any time.
        """
        return self._modules.get("transforms")  # type: ignore[return-value]

    @transforms.setter
    def transforms(self, transforms: Mapping[str, Callable[..., Tensor]] | None) -> None:
        functions = checked(type(self).__name__, transforms)
        self._modules.pop("transforms", None)
        if functions:
            self._modules["transforms"] = Transforms(functions)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; of a child PyTorch would want that it is a module."""
        if name == "transforms":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _through(self, active: bool | Tensor | None, beside: Tensor | None) -> Through | None:
        """Return what stands between the variables and what normalizes, if anything does."""
        transforms = self.transforms
        if transforms is None:
            return None
        name = type(self).__name__
        active = self.transforms_active if active is None else active
        active = condition(name, "transforms_active", active, beside)
        observes = self.training and not self._frozen and not is_recomputation()
        return Through(name, transforms, active, observes)

    def effective_variables(self) -> dict[str, Any]:
        """Return what normalizes in evaluation: the variables, as the transforms have them.

        Returns
        -------
        dict
            ``scale``, ``offset``, ``mean`` and ``variance``, of shape (num_features,), None for
            what the module does not have; and ``epsilon``.

        Examples
        --------
        >>> import torch
        >>> import fusebn.torch as fbt
        >>> layer = fbt.BatchNorm1d(2, affine=False, transforms={"moving_variance": torch.neg})
        >>> layer.effective_variables()
        {'scale': None, 'offset': None, 'mean': tensor([0., 0.]), 'variance': tensor([0., 0.]), \
'epsilon': 1e-05}
        """
        scale, offset = self._affine()
        mean, variance, _ = self._statistics()
        beside = next((each for each in (scale, mean) if each is not None), None)
        through = self._through(None, beside)
        if through is not None:
            through = through._replace(training=False)  # this is no step
            scale, offset = through("scale", scale), through("offset", offset)
            mean, variance = through("moving_mean", mean), through("moving_variance", variance)
        return {
            "scale": scale,
            "offset": offset,
            "mean": mean,
            "variance": variance,
            "epsilon": self.eps,
        }

    # ---- forward ----

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        activation: str | EllipsisType | None = ...,
        weights: Tensor | None = None,
        transforms_active: bool | Tensor | None = None,
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
        transforms_active : bool, or boolean Tensor of rank 0, optional
            In place of the module's own.
        """
        if is_symbol(input):
            node: Tensor = self._node(input, residual, activation, weights, transforms_active)
            return node
        self._check_input_dim(input)
        chosen = self.activation if activation is ... else activation
        through = self._through(transforms_active, input) if self._modules else None
        mean, var, tracked = self._statistics()
        if self._frozen or not self.training:
            training, updates = mean is None and var is None, False
        else:
            training, updates = True, self.track_running_stats
            if not updates:
                mean = var = None
        if updates:
            if is_recomputation():  # the same steps again, and nothing comes of them
                mean, var, tracked = _copies(mean, var, tracked)
            update = self._update if through is None else through.wholly(self._update)
            return update(input, mean, var, tracked, residual, chosen, weights, through)
        normalize = self._normalize if through is None else through.wholly(self._normalize)
        return normalize(input, mean, var, training, 0.0, residual, chosen, weights, through)

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

    def _node(
        self, input: Any, residual: Any, activation: Any, weights: Any, transforms_active: Any
    ) -> Any:
        tensors = (input,) if residual is None else (input, residual)
        given = {} if activation is ... else {"activation": activation}
        if weights is not None:
            given["weights"] = weights
        if transforms_active is not None:
            given["transforms_active"] = transforms_active
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
        through: Through | None,
    ) -> Tensor:
        weight, bias = self._affine()
        if through is not None:
            weight, bias = through("scale", weight), through("offset", bias)
            if not training:
                mean, var = through("moving_mean", mean), through("moving_variance", var)
            elif self._transforms_batch(through):
                return batch_norm_through(
                    through, input, mean, var, weight, bias, factor, self.eps, residual,
                    activation, weights, self.axis, self.correction,
                )  # fmt: skip
            else:
                through.observe(mean, var)
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

    def _transforms_batch(self, through: Through) -> bool:
        """Say whether the transforms may apply to the statistics of a batch."""
        return self.transform_batch_statistics and through.active is not False

    def _update(
        self,
        input: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        tracked: Tensor | None,
        residual: Tensor | None,
        activation: str | None,
        weights: Tensor | None,
        through: Through | None,
    ) -> Tensor:
        """Normalize by the batch, and move the running statistics towards it."""
        factor = 1.0 if self.momentum is None else self.momentum
        plain = self.nonfinite == "propagate" and self.momentum is not None
        if plain or mean is None or var is None:
            y = self._normalize(
                input, mean, var, True, factor, residual, activation, weights, through
            )
        else:
            new = mean.clone(), var.clone()
            y = self._normalize(input, *new, True, factor, residual, activation, weights, through)
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


M = TypeVar("M", bound=torch.nn.Module)


def set_transforms_active(model: M, active: bool | Tensor) -> M:
    """Switch the transforms of all batch norms in a model; in place.

    Parameters
    ----------
    model : Module
        Whose batch norms of ours get `active` as their `transforms_active`.
    active : bool, or boolean Tensor of rank 0
        With a tensor, later changes of its value switch them all, and compile nothing again.

    Returns
    -------
    Module
        The model itself.

    Raises
    ------
    TypeError
        `active` is something else.

    Examples
    --------
    >>> import torch
    >>> import fusebn.torch as fbt
    >>> model = torch.nn.Sequential(fbt.BatchNorm1d(2, transforms={"offset": torch.ones_like}))
    >>> active = torch.tensor(False)
    >>> _ = fbt.set_transforms_active(model.eval(), active)
    >>> model(torch.zeros(1, 2)).tolist()
    [[0.0, 0.0]]
    >>> _ = active.fill_(True)
    >>> model(torch.zeros(1, 2)).tolist()
    [[1.0, 1.0]]
    """
    active = condition("set_transforms_active", "active", active)
    for module in model.modules():
        if isinstance(module, Extended):
            module.transforms_active = active
    return model


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
        transforms: Mapping[str, Callable[..., Tensor]] | None = None,
        transforms_active: bool | Tensor = True,
        transform_batch_statistics: bool = False,
    ) -> None:
        momentum = momentum_of(type(self).__name__, momentum, decay)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        self._extend(
            activation, correction, nonfinite, axis,
            transforms, transforms_active, transform_batch_statistics,
        )  # fmt: skip


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
    transforms : mapping, optional
        Functions of a vector, by the name of the variable they apply to: "scale" is `weight`,
        "offset" `bias`, "moving_mean" and "moving_variance" are the running ones. What they return
        normalizes in the variable's place, with gradients to both; the variable stays as it is. A
        variance below 0 becomes 0. For instance ``{"scale": fusebn.torch.FakeQuantize(8)}``.
    transforms_active : bool, or boolean Tensor of rank 0
        Whether the transforms apply. A tensor is read at each call, so one may switch many
        modules, compiled ones too. Where it is false, the results are those without transforms,
        bit for bit. An attribute that may be set at any time.
    transform_batch_statistics : bool
        Whether, in training, the batch's mean and biased variance go through the transforms of the
        running statistics before they normalize the input, with gradients through both. If not,
        these apply in evaluation only. The running statistics take up the batch's own in any case.

    Attributes
    ----------
    weight, bias : Parameter of shape (num_features,), or None
    running_mean, running_var : Tensor of shape (num_features,), or None
    num_batches_tracked : int64 Tensor of rank 0, or None
        How many batches have moved the running statistics.
    transforms : mapping, or None
        May be set at any time.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As PyTorch, with PyTorch's text: for inputs of another rank, of another number of channels,
        or, in training, of one value a channel. In our own words for what is ours.

    Notes
    -----
    The state_dict is PyTorch's, key by key, and loads either way; what is not in PyTorch's module
    is not in it, but for transforms that are modules, as ``transforms.scale.low``. A forward that
    activation checkpointing repeats within a backward updates nothing and shows transforms nothing.
    ``torch.compile``, ``torch.export`` and ``torch.fx`` take the modules, ``torch.jit.script`` does
    not.

    A transform of the class :class:`fusebn.quantize.Transform` observes: the variables in every
    step of training, and in place of the running statistics those of the batch where these are
    transformed. After an error the transforms, too, are as they were. A NaN that a transform makes
    of what is none is an error on a CPU, which a compiled program calls a RuntimeError.

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
        transforms: Mapping[str, Callable[..., Tensor]] | None = None,
        transforms_active: bool | Tensor = True,
        transform_batch_statistics: bool = False,
    ) -> None:
        momentum = momentum_of(type(self).__name__, momentum, decay)
        # By position this is the constructor of PyTorch's lazy modules.
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype, bias=bias)  # type: ignore[arg-type]
        self._extend(
            activation, correction, nonfinite, axis,
            transforms, transforms_active, transform_batch_statistics,
        )  # fmt: skip

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
