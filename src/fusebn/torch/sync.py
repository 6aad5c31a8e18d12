"""`SyncBatchNorm`: the batch is that of all processes, of which each holds a part."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fusebn import _spec
from fusebn.torch import _arguments, _batch_statistics, _merging, _portable, _synchronized
from fusebn.torch._portable import Options
from fusebn.torch._variables import Through
from fusebn.torch.modules import Extended, momentum_of

__all__ = ["SyncBatchNorm", "convert_sync_batchnorm"]

_NAME = "SyncBatchNorm"

M = TypeVar("M", bound=torch.nn.Module)


class SyncBatchNorm(Extended):
    """As ``torch.nn.SyncBatchNorm``, on CPUs too, and what surrounds it in the same pass.

    In training, where ``torch.distributed`` is initialized and the group has more than one process,
    mean, variance and n are those of the whole batch; all else is as in `BatchNorm2d`, as it is
    wherever a process is alone and in evaluation. The parts may have any sizes, 0 and 1 included,
    and weights. Every process gets the same statistics to the last bit.

    Forward is one ``all_gather`` of 2 * num_features + 1 doubles, backward one ``all_reduce`` of
    2 * num_features. The gradients of `weight` and `bias` are those of the process's own part:
    ``DistributedDataParallel`` averages them with all others. Gradients of any order are right; the
    second and higher, and those of the weights, gather once more for each order.

    Parameters
    ----------
    num_features : int
        Number of channels: input is (N, C) or (N, C, ...).
    process_group : ProcessGroup, optional
        Who has the batch; None means all.
    eps, momentum, affine, track_running_stats, device, dtype, bias
        As in ``torch.nn.SyncBatchNorm``.
    activation, correction, nonfinite, decay, axis
        As in `BatchNorm2d`.
    transforms, transforms_active, transform_batch_statistics
        As in `BatchNorm2d`; what is transformed are the statistics of the whole batch.

    Raises
    ------
    ValueError, TypeError
        An argument does not fit: before anything is sent, so the other processes wait for this one
        until the time limit of the group.

    Notes
    -----
    Every process of the group must come to each forward, and to each backward of its input, in the
    same order, and have the same number of channels. On the CPU the kernels are ours, with gloo or
    any other backend that has ``all_gather_into_tensor``; on CUDA devices they are where
    ``FUSEBN_TRITON=1`` asks for Triton's, and nothing waits for the device then. Otherwise the
    parts between the collectives are PyTorch's own ops. No GPU has run either yet.
    ``torch.compile`` leaves it between two graphs.

    This is no subclass of PyTorch's, which ``DistributedDataParallel`` refuses on a CPU.

    As ``torch.nn.SyncBatchNorm``:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.SyncBatchNorm.html

    References
    ----------
    Chan, Golub and LeVeque, "Algorithms for computing the sample variance: analysis and
    recommendations", The American Statistician 37, 1983, https://doi.org/10.2307/2683386

    Examples
    --------
    >>> import torch
    >>> import fusebn.torch as fbt
    >>> layer = fbt.SyncBatchNorm(3, activation="relu")      # alone it is a batch norm like any
    >>> layer(torch.ones(4, 3)).shape
    torch.Size([4, 3])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
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
        momentum = momentum_of(_NAME, momentum, decay)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        self.process_group = process_group
        self._extend(
            activation, correction, nonfinite, axis,
            transforms, transforms_active, transform_batch_statistics,
        )  # fmt: skip

    @staticmethod
    def convert_sync_batchnorm(module: Any, process_group: Any = None) -> Any:
        """See :func:`fusebn.torch.convert_sync_batchnorm`."""
        return convert_sync_batchnorm(module, process_group)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

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
        group = self._others() if training and self.training else None
        if group is None:
            return super()._normalize(
                input, mean, var, training, factor, residual, activation, weights, through
            )
        axis = self._check(input, mean, var)
        _spec.activation(_NAME, activation)
        chosen = activation or "identity"
        if residual is not None and not self._joins(residual, input):
            y = self._normalize(input, mean, var, training, factor, None, None, weights, through)
            return _portable.ACTIVATIONS[chosen](y + residual)
        if weights is not None:
            weights = _arguments.position_weights(_NAME, "weights", weights, input, {axis})
        weight, bias = self._affine()
        if through is not None:
            weight, bias = through("scale", weight), through("offset", bias)
        stat = _arguments.stat_type(input)
        scale, offset = (
            _arguments.vector(_NAME, name, value, input, axis, stat)
            for name, value in (("weight", weight), ("bias", bias))
        )
        given = factor if mean is not None else 1.0
        options = Options(True, axis, self.eps, self.correction, given, chosen)
        if through is not None and self._transforms_batch(through):
            return _batch_statistics.batch_norm_updating(
                input, scale, offset, mean, var, residual, weights, options, through, group
            )
        if through is not None:
            through.observe(mean, var)
        y, moments = _synchronized.batch_norm(
            input, scale, offset, residual, weights, options, group
        )
        if mean is not None and var is not None:
            _merging.mix(mean, var, moments, factor, self.correction)
        return y

    def _others(self) -> Any:
        """Return the group, or None if there is nobody else in it."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    def _check(self, input: Tensor, mean: Tensor | None, var: Tensor | None) -> int:
        """Return the axis of a good input: what one process finds out alone stalls the others."""
        _arguments.tensor_of(_NAME, "input", input)
        for name, running in (("running_mean", mean), ("running_var", var)):
            if running is not None:
                _arguments.on_device_of(input, _NAME, name, running)
        shape = tuple(input.shape)
        axis = _spec.axis_of(_NAME, "axis", self.axis, shape)
        if shape[axis] != self.num_features:
            expected = f"have {self.num_features} channels on axis {self.axis}"
            _spec.fail(ValueError, _NAME, "input", expected, f"shape {shape}")
        return axis

    @staticmethod
    def _joins(residual: Any, input: Tensor) -> bool:
        """Say whether the residual can be added in the same pass."""
        _arguments.on_device_of(
            input, _NAME, "residual", _arguments.tensor_of(_NAME, "residual", residual)
        )
        _spec.same_shape(_NAME, "residual", tuple(residual.shape), tuple(input.shape), "input")
        return bool(residual.dtype is input.dtype)


def convert_sync_batchnorm(module: M, process_group: Any = None) -> Any:
    """Replace every batch norm in a module by a `SyncBatchNorm`.

    It takes over all that the old one has: parameters and buffers (the same objects, so build the
    optimizer before or after), hooks, activation and other extras, train or eval mode, freezing.

    Parameters
    ----------
    module : Module
        Its children are replaced in place.
    process_group : ProcessGroup, optional
        Who has the batch. None leaves a ``SyncBatchNorm`` its own, and means all for others.

    Returns
    -------
    Module
        `module`, or what replaces it if it is a batch norm itself.

    Raises
    ------
    ValueError
        A lazy batch norm has not seen its first input.

    Notes
    -----
    As ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``; but that one does not know of activations
    and other extras, and drops them in silence.

    Examples
    --------
    >>> import torch
    >>> import fusebn.torch as fbt
    >>> fbt.convert_sync_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm2d(3)))
    Sequential(
      (0): SyncBatchNorm(3, eps=1e-05, momentum=0.1, affine=True, bias=True, \
track_running_stats=True)
    )
    """
    converted: torch.nn.Module = module
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        converted = _converted(module, process_group)
    for name, child in module.named_children():
        converted.add_module(name, convert_sync_batchnorm(child, process_group))
    return converted


def _converted(module: torch.nn.Module, process_group: Any) -> SyncBatchNorm:
    if getattr(module, "cls_to_become", None) is not None:
        expected, fix = "know its number of channels", "Run one batch through the model first."
        name = "convert_sync_batchnorm"
        _spec.fail(ValueError, name, "module", expected, type(module).__name__, fix)
    converted = SyncBatchNorm.__new__(SyncBatchNorm)
    converted.__dict__.update(
        {key: dict.copy(value) if isinstance(value, dict) else value
         for key, value in vars(module).items()}
    )  # fmt: skip
    converted.process_group = process_group or getattr(module, "process_group", None)
    converted._widen()
    return converted
