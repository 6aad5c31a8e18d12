"""Quantization-aware training of convolutions with the batch norms behind them.

For inference a batch norm goes into the weights before it, and these are rounded to a few bits. So
training must see the weights as they will be: folded, then quantized. `ConvBatchNorm2d` (and 1d,
3d) is the two layers in one that does this; `prepare` puts it into a model in place of both, and
`convert` makes plain convolutions of what was trained.
"""

import copy
from types import EllipsisType
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fusebn import _quantization, _spec
from fusebn._report import FoldReport, FoldRow
from fusebn._transforms import Transform
from fusebn.torch import _functions, modules
from fusebn.torch._array_ops import array_ops
from fusebn.torch._calls import is_recomputation, is_symbol, node
from fusebn.torch._fold import ACTIVATION_MODULES
from fusebn.torch._folding import activation_called
from fusebn.torch._fuse import unfuse
from fusebn.torch._neighbours import CONVOLUTIONS, Call, Neighbour, Neighbours, replace
from fusebn.torch._planning import check
from fusebn.torch._portable import ACTIVATIONS
from fusebn.torch._tracing import is_watched
from fusebn.torch.functional import batch_norm, check_size
from fusebn.torch.quantize import FakeQuantize

__all__ = [
    "ConvBatchNorm1d",
    "ConvBatchNorm2d",
    "ConvBatchNorm3d",
    "QuantizedWeight",
    "convert",
    "explain",
    "prepare",
]

STATISTICS = ("float", "quantized")


class QuantizedWeight(NamedTuple):
    """A weight as integers: ``weight = (codes - zero) * step``."""

    codes: Tensor
    """Integers, in the shape of the weight; of the narrowest type that holds them."""
    step: Tensor
    """float32; one for each channel out, or one, in a shape that broadcasts."""
    zero: Tensor
    """int32, in that shape: the code of 0; 0 where the quantizer is symmetric."""


class _ConvBatchNorm(_ConvNd):
    """What the layers of all ranks share. It comes before PyTorch's convolution of that rank."""

    steps: Tensor
    _convolution: ClassVar[Any]
    _norms: ClassVar[tuple[type, type]]  # PyTorch's, ours

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        activation: str | None = None,
        weight_quantize: Any = ...,
        output_quantize: Any = None,
        freeze_delay: int | None = None,
        statistics: str = "float",
    ) -> None:
        make: Any = super().__init__  # not _ConvNd's, which takes more
        make(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        name = type(self).__name__
        if weight_quantize is ...:
            weight_quantize = FakeQuantize(8, symmetric=True, axis=0)
        norm: Any = self._norms[1]
        self.bn = norm(
            out_channels, eps, momentum, affine, device=device, dtype=dtype, activation=activation
        )
        self.weight_quantize = _quantizer(name, "weight_quantize", weight_quantize)
        self.output_quantize = _quantizer(name, "output_quantize", output_quantize)
        self.freeze_delay = _delay(name, freeze_delay)
        self.statistics = _spec.one_of(name, "statistics", statistics, STATISTICS)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    @classmethod
    def from_float(
        cls,
        conv: nn.Module,
        bn: nn.Module,
        *,
        activation: str | EllipsisType | None = ...,
        weight_quantize: Any = ...,
        output_quantize: Any = None,
        freeze_delay: int | None = None,
        statistics: str = "float",
    ) -> Self:
        """Return the layer that a convolution and the batch norm behind it become.

        Their parameters and running statistics are not copied: they are in both.

        Parameters
        ----------
        conv : torch.nn.Conv1d, Conv2d or Conv3d
        bn : BatchNorm1d, 2d or 3d of PyTorch's or ours, of that rank
        activation : str or None
            None, or a name as for the constructor; not given: that of `bn`, if it is ours.
        weight_quantize, output_quantize, freeze_delay, statistics
            As for the constructor.

        Raises
        ------
        TypeError, ValueError
            The layers are not of those classes; their channels differ; the batch norm has no
            running statistics, another axis than 1, or transforms of its own.
        """
        name = f"{cls.__name__}.from_float"
        _check_layers(name, conv, bn, cls._convolution, cls._norms)
        layer: Any = conv
        new = cls(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            False,
            layer.padding_mode,
            "meta",
            weight_quantize=weight_quantize,
            output_quantize=output_quantize,
            freeze_delay=freeze_delay,
            statistics=statistics,
        )
        new.weight, new.bias = layer.weight, layer.bias
        new.bn = _taken_over(bn, cls._norms[1])
        if activation is not ...:
            _spec.activation(name, activation)
            new.bn.activation = activation
        new.steps = torch.zeros((), dtype=torch.int64, device=layer.weight.device)
        return new.train(layer.training)

    def extra_repr(self) -> str:
        """Return PyTorch's of the convolution, and what is ours."""
        shown = [super().extra_repr()]
        shown += [f"freeze_delay={self.freeze_delay}"] * (self.freeze_delay is not None)
        return ", ".join([*shown, f"statistics={self.statistics!r}"])

    # ---- the switches ----

    @property
    def frozen(self) -> bool:
        """Whether the running statistics normalize every batch and never change."""
        if self.bn.frozen or self.freeze_delay is None:
            return bool(self.bn.frozen)
        # A forward that is repeated within a backward has been counted already.
        return int(self.steps) - is_recomputation() >= self.freeze_delay

    def freeze(self) -> Self:
        """From here on normalize by the running statistics and never update them."""
        self.bn.freeze()
        return self

    def unfreeze(self) -> Self:
        """Undo :meth:`freeze`, and the freezing by `freeze_delay`, which is None from here on."""
        self.bn.unfreeze()
        self.freeze_delay = None
        return self

    # ---- forward ----

    def forward(self, input: Tensor) -> Tensor:
        """Return the activation of the normalized convolution; quantized, if outputs are."""
        if is_symbol(input):
            symbol: Tensor = node(self, (input,), {})
            return symbol
        if not self.training or self.frozen:
            y = self._by_running(input)
        elif self.statistics == "quantized" or self.weight_quantize is None:
            y = self._by_quantized(input)
        else:
            y = self._by_batch(input)
        if self.training and not is_recomputation():
            self.steps.add_(1)
        return _quantized(self.output_quantize, y, self.training)

    def _by_running(self, input: Tensor) -> Tensor:
        """Do what the plain convolution will do."""
        y = self._convolved(input, *self._folded(self.training))
        return ACTIVATIONS[self.bn.activation or "identity"](y)

    def _by_batch(self, input: Tensor) -> Tensor:
        """Normalize by the statistics of what the weight itself gives.

        With factor = scale / running_std and correction = running_std / std the definition is

            y = conv(x, Q(weight * factor)) * correction + offset - mean * factor * correction

        which is a batch norm of that convolution by the mean `mean * factor`, the variance of the
        batch, and running_std for a scale. Nothing is divided by the scale, which may be 0.
        """
        plain = self._convolved(input, self.weight, self.bias)
        self.bn._check_input_dim(plain)
        check_size(plain, 1)
        if not plain.numel():
            return self._by_running(input)
        axes = [axis for axis in range(plain.ndim) if axis != 1]
        mean, variance = _functions.moments(plain, axes)
        # Before they fold the weight, so that a forward that is repeated for backward, which
        # updates nothing, folds by the same.
        self._update(plain, mean, variance)
        std, factor = self._factor()
        y = self._convolved(input, self._weight(factor, True), None)
        if self.bias is not None:
            mean = mean - self.bias  # of what has none: y
        return batch_norm(
            y,
            mean * factor,
            variance,
            std,
            self.bn.bias,
            eps=self.bn.eps,
            activation=self.bn.activation,
        )

    def _by_quantized(self, input: Tensor) -> Tensor:
        """Normalize by the statistics of what the quantized weight gives: a batch norm's own call.

        Folding is undone in the weight. Where the scale is 0 nothing of it is left after folding:
        there the weight itself stands in, whose output the scale takes away in any case.
        """
        if self.weight_quantize is None:
            weight = self.weight
        else:
            _, factor = self._factor()
            folded = factor.abs() > _LEAST
            weight = self._weight(factor, True) * self._per_channel(
                torch.where(folded, 1 / torch.where(folded, factor, 1), 0)
            )
            weight = torch.where(self._per_channel(folded), weight, self.weight)
        y: Tensor = self.bn(self._convolved(input, weight, self.bias))
        return y

    def _convolved(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = self.weight.dtype
        bias = None if bias is None else bias.to(dtype)
        convolve: Any = self._conv_forward
        y: Tensor = convolve(input, weight.to(dtype), bias)
        return y

    # ---- vectors and weights ----

    def _factor(self) -> tuple[Tensor, Tensor]:
        """Return the running standard deviation, and the scale divided by it, 0 where it is 0."""
        std = (_snapshot(self.bn.running_var) + self.bn.eps).sqrt()
        factor = torch.where(std > 0, 1 / std, 0)
        return std, factor if self.bn.weight is None else factor * self.bn.weight

    def _weight(self, factor: Tensor, training: bool) -> Tensor:
        """Return the folded weight, quantized."""
        return _quantized(self.weight_quantize, self.weight * self._per_channel(factor), training)

    def _folded(self, training: bool) -> tuple[Tensor, Tensor]:
        """Return the weight, quantized, and the bias of the plain convolution."""
        _, factor = self._factor()
        mean = self.bn.running_mean
        shift = -factor * (mean if self.bias is None else mean - self.bias)
        bias = shift if self.bn.bias is None else self.bn.bias + shift
        return self._weight(factor, training), bias

    def _per_channel(self, vector: Tensor) -> Tensor:
        return vector.reshape(-1, *(1,) * (self.weight.ndim - 1))

    @torch.no_grad()
    def _update(self, plain: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics as the batch norm does."""
        bn = self.bn
        if is_recomputation():
            return
        count = plain.numel() // plain.shape[1]
        if count > bn.correction:
            variance = variance * (count / (count - bn.correction))
        new = mean, variance
        if bn.momentum is not None:
            old = bn.running_mean, bn.running_var
            new = tuple(a.lerp(b.to(a.dtype), bn.momentum) for a, b in zip(old, new, strict=True))
        bn._take(bn.running_mean, bn.running_var, bn.num_batches_tracked, *new)
        bn.num_batches_tracked.add_(1)

    # ---- what it becomes ----

    @torch.no_grad()
    def convert(self) -> nn.Module:
        """Return the plain convolution that computes the same in inference.

        Returns
        -------
        torch.nn.Conv1d, Conv2d or Conv3d
            Its weight is folded and quantized, its bias is the rest of the batch norm. With an
            activation, or quantized outputs, an ``nn.Sequential`` that begins with it.
        """
        conv = nn.utils.skip_init(
            self._convolution,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            True,
            self.padding_mode,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        for parameter, value in zip((conv.weight, conv.bias), self._folded(False), strict=True):
            parameter.copy_(value)
        parts: list[nn.Module] = [conv]
        if self.bn.activation is not None:
            parts.append(ACTIVATION_MODULES[self.bn.activation]())
        if self.output_quantize is not None:
            parts.append(_as_module(copy.deepcopy(self.output_quantize)))
        return (conv if len(parts) == 1 else nn.Sequential(*parts)).train(self.training)

    @torch.no_grad()
    def quantized_weight(self) -> QuantizedWeight:
        """Return the folded weight as integers, for inference in integers.

        Returns
        -------
        QuantizedWeight
            ``(codes, step, zero)``. With symmetric quantization by channel, as by default, and an
            input of ``(q - z) * s``, the convolution is
            ``s * step * conv(q - z, codes) + convert().bias``, whose sum is exact in integers.

        Raises
        ------
        TypeError
            `weight_quantize` is not a ``fusebn.torch.FakeQuantize``.
        """
        quantize = self.weight_quantize
        if not isinstance(quantize, FakeQuantize):
            operation = f"{type(self).__name__}.quantized_weight"
            expected, got = "be a FakeQuantize", type(quantize).__name__
            _spec.fail(TypeError, operation, "weight_quantize", expected, got)
        settings = quantize.settings
        weight = self.weight * self._per_channel(self._factor()[1])
        state = quantize._state(weight) if settings.has_state else None
        codes, step, zero = _quantization.codes(array_ops, settings, weight, state)
        codes = codes.to(_narrowest(settings.least, settings.largest))
        return QuantizedWeight(codes, step, zero.to(torch.int32).expand(step.shape))


def _snapshot(buffer: Tensor) -> Tensor:
    """Return what a buffer holds, for backward too, when it has been updated.

    Compilers may compute again in backward what they need not keep, and read the buffer then:
    https://github.com/pytorch/pytorch/pull/197039. What an op of ours returns they keep.
    """
    return _copied(buffer) if torch.compiler.is_compiling() else buffer


@torch.library.custom_op("fusebn::copied", mutates_args=())
def _copied(buffer: Tensor) -> Tensor:
    return buffer.clone()


@_copied.register_fake
def _(buffer: Tensor) -> Tensor:
    return torch.empty_like(buffer)


# Below it a product with a weight may be no normal number of float32.
_LEAST = 2.0**-100


class ConvBatchNorm2d(_ConvBatchNorm, nn.Conv2d):
    """A ``Conv2d`` and the batch norm behind it, trained as they will run: folded and quantized.

    In evaluation, and frozen, it is the convolution that :meth:`convert` returns::

        factor = bn.weight / sqrt(bn.running_var + eps)
        y = activation(conv(x, Q(weight * factor)) + bn.bias + (bias - bn.running_mean) * factor)

    with Q the quantizer of the weight. In training the batch normalizes, while the weight is
    folded by the running statistics, which do not jump from batch to batch as its own would::

        y = activation((conv(x, Q(weight * factor)) - mean * factor) * running_std / std + bn.bias)

    Here mean and ``std = sqrt(variance + eps)`` are those of ``conv(x, weight)``, and
    ``running_std / std`` is the factor that corrects for what Q was given. Without Q this is the
    batch norm of the convolution. Gradients pass straight through the rounding.

    After so many steps as `freeze_delay` says, or :meth:`freeze`, the running statistics normalize
    and stay what they are.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        Those of ``Conv2d``.
    bias : bool
        Whether the convolution has a bias, which training takes away again.
    device, dtype
        Of the parameters.
    eps, momentum, affine
        Those of :class:`fusebn.torch.BatchNorm2d`, which is in `bn`. By keyword, as all that
        follow.
    activation : None, "relu", "relu6", "leaky_relu", "silu" or "gelu"
        Applied to the result.
    weight_quantize : function of a tensor, or None
        Q; by default ``FakeQuantize(8, symmetric=True, axis=0)``: 8 bits, with a step for each
        channel out. None: no quantization.
    output_quantize : function of a tensor, or None
        Applied last.
    freeze_delay : int, optional
        How many forwards in training go by before the statistics freeze. None: they never do.
    statistics : "float" or "quantized"
        What mean and variance are of: the convolution with the weight as it is, as in the papers,
        which takes a second convolution; or with the quantized one, unfolded again, which takes
        but a few passes over the weight. Running statistics are then those of what inference
        computes; but a channel that is rounded to 0 as a whole, which few bits do without limits
        of its own, has a variance of 0.

    Attributes
    ----------
    weight : Parameter
        Of the convolution, before folding.
    bias : Parameter, or None
    bn : BatchNorm2d
    steps : int64 Tensor of rank 0
        How many forwards there were in training.
    frozen : bool

    Raises
    ------
    TypeError, ValueError
        As ``Conv2d`` and the batch norm do, and for what is ours, in our own words.

    Notes
    -----
    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-
    Only Inference", 2018, https://arxiv.org/abs/1712.05877, section 3.2, with the correction of
    Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018,
    https://arxiv.org/abs/1806.08342, section 3.2.2. TensorFlow's ``fold_batch_norms`` did it so.
    ``torch.ao.nn.intrinsic.qat.ConvBn2d`` divides the output by the factor to have the convolution
    back, which fails for a scale of 0. Nothing is divided by the scale here, but for "quantized"
    the weight, where the scale is not 0. The state_dict has its keys, and `steps`.

    With `freeze_delay` the graph of ``torch.compile`` breaks at the number of the step. Where
    activation checkpointing repeats forwards use ``statistics="float"``: with the other a repeated
    forward folds by statistics that have moved.

    Examples
    --------
    >>> import torch
    >>> from fusebn.torch import qat
    >>> layer = qat.ConvBatchNorm2d(3, 8, 3, activation="relu", freeze_delay=1000)
    >>> x = torch.randn(2, 3, 8, 8)
    >>> layer(x).sum().backward()
    >>> plain = layer.eval().convert()
    >>> type(plain[0]).__name__, torch.allclose(plain(x), layer(x))
    ('Conv2d', True)
    >>> layer.quantized_weight().codes.dtype
    torch.int8
    """

    _convolution = nn.Conv2d
    _norms = (nn.BatchNorm2d, modules.BatchNorm2d)


class ConvBatchNorm1d(_ConvBatchNorm, nn.Conv1d):
    """`ConvBatchNorm2d` for a ``Conv1d``.

    Examples
    --------
    >>> import torch
    >>> from fusebn.torch import qat
    >>> qat.ConvBatchNorm1d(3, 8, 3)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 8, 6])
    """

    _convolution = nn.Conv1d
    _norms = (nn.BatchNorm1d, modules.BatchNorm1d)


class ConvBatchNorm3d(_ConvBatchNorm, nn.Conv3d):
    """`ConvBatchNorm2d` for a ``Conv3d``.

    Examples
    --------
    >>> import torch
    >>> from fusebn.torch import qat
    >>> qat.ConvBatchNorm3d(3, 8, 3)(torch.randn(2, 3, 4, 4, 4)).shape
    torch.Size([2, 8, 2, 2, 2])
    """

    _convolution = nn.Conv3d
    _norms = (nn.BatchNorm3d, modules.BatchNorm3d)


_FUSED: dict[Any, type[_ConvBatchNorm]] = {
    kind._convolution: kind for kind in (ConvBatchNorm1d, ConvBatchNorm2d, ConvBatchNorm3d)
}


# ---- quantizers ----


def _quantizer(name: str, argument: str, quantize: Any) -> Any:
    if quantize is not None and not callable(quantize):
        expected, got = "be a function of a tensor, or None", type(quantize).__name__
        _spec.fail(TypeError, name, argument, expected, got)
    return quantize


def _delay(name: str, delay: Any) -> int | None:
    if delay is None:
        return None
    delay = _spec.integer(name, "freeze_delay", delay)
    if delay < 0:
        _spec.fail(ValueError, name, "freeze_delay", "not be negative", f"{delay}")
    return int(delay)


def _quantized(quantize: Any, x: Tensor, training: bool) -> Tensor:
    if quantize is None:
        return x
    observes = isinstance(quantize, Transform)
    call: Any = quantize
    y: Tensor = call(x, training=training) if observes else call(x)
    return y


class _Function(nn.Module):
    """A quantizer that is a function, as a module."""

    def __init__(self, quantize: Any) -> None:
        super().__init__()
        self.quantize = quantize

    def forward(self, x: Tensor) -> Tensor:
        return _quantized(self.quantize, x, self.training)


def _as_module(quantize: Any) -> nn.Module:
    return quantize if isinstance(quantize, nn.Module) else _Function(quantize)


def _narrowest(least: int, largest: int) -> torch.dtype:
    for dtype in (torch.int8, torch.uint8, torch.int16):
        if torch.iinfo(dtype).min <= least and largest <= torch.iinfo(dtype).max:
            return dtype
    return torch.int32


# ---- of a convolution and a batch norm ----


def _check_layers(
    name: str, conv: Any, bn: Any, convolution: type[nn.Module], norms: tuple[type, type]
) -> None:
    kinds = type(conv).__name__, type(bn).__name__
    if type(conv) is not convolution:
        _spec.fail(TypeError, name, "conv", f"be a torch.nn.{convolution.__name__}", kinds[0])
    if type(bn) not in norms:
        expected = f"be a {norms[0].__name__} of torch.nn or fusebn.torch"
        _spec.fail(TypeError, name, "bn", expected, kinds[1])
    if bn.num_features != conv.out_channels:
        expected = f"have {conv.out_channels} channels, as many as conv returns"
        _spec.fail(ValueError, name, "bn", expected, f"{bn.num_features}")
    if bn.running_mean is None or bn.running_var is None:
        _spec.fail(ValueError, name, "bn", "have running statistics", "track_running_stats=False")
    if getattr(bn, "axis", 1) != 1:
        _spec.fail(ValueError, name, "bn", "have its channels second", f"axis={bn.axis}")
    if getattr(bn, "transforms", None):
        fix = "Here the folded weight is quantized, and the running statistics with it."
        _spec.fail(ValueError, name, "bn", "have no transforms", f"{[*bn.transforms]}", fix)


def _taken_over(bn: Any, kind: Any) -> Any:
    """Return a batch norm of ours that has the settings and the tensors of another."""
    ours = isinstance(bn, modules.Extended)
    settings = ("activation", "correction", "nonfinite") if ours else ()
    more = {key: getattr(bn, key) for key in settings}
    new = kind(bn.num_features, bn.eps, bn.momentum, affine=False, device="meta", **more)
    new.affine, new.track_running_stats = bn.affine, bn.track_running_stats
    new.weight, new.bias = bn.weight, bn.bias
    for name, buffer in bn.named_buffers():
        setattr(new, name, buffer)
    if ours and bn.frozen:
        new.freeze()
    return new.train(bn.training)


# ---- whole models ----


def prepare(
    model: nn.Module,
    *,
    weight_quantize: Any = ...,
    output_quantize: Any = None,
    freeze_delay: int | None = None,
    statistics: str = "float",
) -> nn.Module:
    """Return a model for quantization-aware training.

    Every convolution with a batch norm behind it becomes a `ConvBatchNorm2d` (1d, 3d) in its place,
    and the batch norm ``nn.Identity``; an activation behind that which we have, if it is a module
    called nowhere else, goes into the layer too. Which pairs there are is found as by
    :func:`fusebn.torch.fold`, in both modes; :func:`explain` says of each batch norm what hinders.

    Parameters
    ----------
    model : torch.nn.Module
        Trained or not, fused or not. It stays as it is.
    weight_quantize, output_quantize : function of a tensor, or None
        As for `ConvBatchNorm2d`; every layer gets a copy of its own.
    freeze_delay, statistics
        As for `ConvBatchNorm2d`.

    Returns
    -------
    torch.nn.Module
        A copy, as if never fused. Make the optimizer for its parameters. What was ``bn.weight`` in
        the state_dict is ``conv.bn.weight`` now, and so on.

    Raises
    ------
    TypeError
        The model is no module, or an argument is of the wrong kind.
    ValueError
        There is no such pair in it.

    Notes
    -----
    With `output_quantize` a ReLU or ReLU6 behind the batch norm goes into the layer even where its
    own call has to stay, which then changes nothing: outputs are quantized after it.

    Examples
    --------
    >>> import torch
    >>> from fusebn.torch import qat
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    ... )
    >>> prepared = qat.prepare(model)
    >>> [type(layer).__name__ for layer in prepared]
    ['ConvBatchNorm2d', 'Identity', 'Identity']
    >>> [type(layer).__name__ for layer in qat.convert(prepared)]
    ['Sequential', 'Identity', 'Identity']
    """
    check("prepare", model)
    prepared = unfuse(copy.deepcopy(model))
    study = Neighbours(prepared, CONVOLUTIONS, (True, False))
    pairs = [each for each in study.find() if not _obstacle(each)]
    if not pairs:
        expected = "have a convolution with a batch norm behind it"
        reasons = "; ".join(f"{row.name}: {row.reason}" for row in explain(model)[:3])
        _spec.fail(ValueError, "prepare", "model", expected, f"none ({reasons or 'no batch norm'})")
    for pair in pairs:
        activation, module = _activation_behind(study, pair, output_quantize is not None)
        conv: Any = pair.layer
        layer = _FUSED[type(conv)].from_float(
            conv,
            pair.norm,
            activation=activation,
            weight_quantize=copy.deepcopy(weight_quantize),
            output_quantize=copy.deepcopy(output_quantize),
            freeze_delay=freeze_delay,
            statistics=statistics,
        )
        replace(prepared, conv, layer)
        replace(prepared, pair.norm, nn.Identity())
        if module is not None:
            replace(prepared, module, nn.Identity())
    return prepared


def convert(model: nn.Module) -> nn.Module:
    """Return a model for inference: a plain convolution for every `ConvBatchNorm2d` (1d, 3d).

    Parameters
    ----------
    model : torch.nn.Module
        What :func:`prepare` returned, trained. It stays as it is.

    Returns
    -------
    torch.nn.Module
        A copy; see :meth:`ConvBatchNorm2d.convert` for what is in it.

    Raises
    ------
    TypeError
        The model is no module.
    """
    check("convert", model)
    if isinstance(model, _ConvBatchNorm):
        return model.convert()
    converted = copy.deepcopy(model)
    for module in list(converted.modules()):
        if isinstance(module, _ConvBatchNorm):
            replace(converted, module, module.convert())
    return converted


def explain(model: nn.Module) -> FoldReport:
    """Say of each batch norm which convolution :func:`prepare` joins it with, or why with none.

    Parameters
    ----------
    model : torch.nn.Module
        It is traced and not changed.

    Returns
    -------
    FoldReport
        As of :func:`fusebn.torch.explain_fold`.

    Raises
    ------
    TypeError
        The model is no module.
    """
    check("explain", model)
    rows = []
    for each in Neighbours(model, CONVOLUTIONS, (True, False)).find():
        obstacle = _obstacle(each)
        layer = None if obstacle else each.layer_name
        rows.append(FoldRow(each.name, type(each.norm).__name__, layer, obstacle))
    return FoldReport(rows)


def _obstacle(pair: Neighbour) -> str:
    """Say why a batch norm is not joined with the convolution before it, or ""."""
    if pair.layer is None:
        return pair.reason
    if any(not call.is_plain for call in pair.calls):
        return "it is called with more than its input"
    if getattr(pair.norm, "transforms", None):
        return "it has transforms"
    return ""


def _activation_behind(
    study: Neighbours, pair: Neighbour, anyway: bool
) -> tuple[str | EllipsisType, nn.Module | None]:
    """Return the activation behind a pair, and its module if that is called nowhere else."""
    readers = [call.reader() for call in pair.calls]
    if getattr(pair.norm, "activation", None) is not None or None in readers:
        return ..., None
    called = [Call(r, c.parent) for r, c in zip(readers, pair.calls, strict=True) if r is not None]
    names = {activation_called(call.node, call.parent) for call in called}
    callees = {call.callee(call.node) for call in called}
    (name, *others), (module, *more) = names, callees
    if name is None or others or (module is not None and is_watched(module)):
        return ..., None
    if module is not None and not more and len(study.calls.of[module]) == len(called):
        return name, module
    return (name if anyway and name in ("relu", "relu6") else ...), None
