"""`BatchNorm`: the NumPy layer. Parameters, moving statistics, two switches and a state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fusebn import _moving, _numpy, _spec, _transforms
from fusebn._results import FusedBatchNormGrad
from fusebn.quantize import FakeQuantize

Array = NDArray[Any]

NONFINITE = ("propagate", "skip", "raise")


class _Batch(NamedTuple):
    """The statistics of a batch, as float64."""

    count: float  # type: ignore[assignment]  # a field, not a tuple's count
    mean: Array
    variance: Array  # biased


class _Call(NamedTuple):
    """What backward needs of the last call."""

    x: Array
    normalizers: Array  # mean and variance, as they normalized x
    training: bool
    residual: Array | None
    weights: Any
    overwritten: bool
    scale: Array | None  # as transformed
    offset: Array | None
    transformed: bool
    batch: _Batch | None  # where its statistics were transformed


def _checked_decay(operation: str, decay: float | None, zero_debias: bool) -> float | None:
    if decay is None:
        return None
    fix = "It is the weight of the old value; None averages all batches alike."
    decay = _spec.fraction(operation, "decay", decay, fix)
    if zero_debias and decay == 1:
        _spec.fail(ValueError, operation, "decay", "be below 1 with zero_debias", "1.0")
    return decay


class BatchNorm:
    """Normalize each channel by the statistics of the batch, or by their moving averages.

    ::

        training   y = activation((x - mean(x)) * scale / sqrt(variance(x) + epsilon) + offset)
                   moving_mean     = (1 - factor) * moving_mean     + factor * mean(x)
                   moving_variance = (1 - factor) * moving_variance + factor * m2 / (n - correction)
        inference  y = activation((x - moving_mean) * scale / sqrt(moving_variance + epsilon)
                                  + offset)

    In training x is normalized by the biased variance, ``m2 / n``. After Ioffe and Szegedy, "Batch
    Normalization", 2015, https://arxiv.org/abs/1502.03167.

    Parameters
    ----------
    channels : int
        Length of the channel axis of x.
    axis : int
        The channel axis: -1 for NHWC, 1 for NCHW.
    decay : float in [0, 1], or None
        Weight of the old value in the moving averages: the factor of an update is 1 - decay. None
        gives every batch the same weight (the cumulative average, factor 1 / number of updates).
        PyTorch's ``momentum`` is 1 - decay, Keras's is decay. May be set at any time.
    epsilon : float
        Added to the variance.
    center, scale : bool
        Whether the layer has an `offset` (first 0) and a `scale` (first 1) of its own.
    correction : float
        The moving variance averages ``m2 / (n - correction)``: 1 as TensorFlow's fused op and
        PyTorch have it, 0 as Keras 3 and Flax do. Where n is not above it, the divisor is n.
    activation : None, "relu", "relu6", "leaky_relu", "silu" or "gelu"
        Applied in the same pass.
    zero_debias : bool
        Divide the moving averages by the sum of their weights, so that their initial values, 0 and
        1, have no part in them.
    nonfinite : "propagate", "skip" or "raise"
        What a NaN or an infinity in a channel does to that channel's moving statistics: it gets
        into them; or they stay as they are (for a cumulative or debiased average as if the batch
        had repeated them); or ValueError is raised and nothing has changed. It touches no other
        channel in any case.
    dtype : dtype
        Of the parameters and moving statistics: float32 or float64. Inputs may have any type.
    transforms : mapping, optional
        Functions of a vector, by the name of the variable they apply to: "scale", "offset",
        "moving_mean", "moving_variance". What they return normalizes in the variable's place; the
        variable stays as it is. A variance below 0 becomes 0. For instance
        ``{"scale": fusebn.quantize.FakeQuantize(8)}``.
    transforms_active : bool, or boolean array of rank 0
        Whether the transforms apply. An array is read at each call, so that it may switch several
        layers. Without them the results are those of a layer without transforms, bit for bit.
    transform_batch_statistics : bool
        Whether, in training, the batch's mean and biased variance go through the transforms of the
        moving statistics before they normalize x. The moving averages take up the batch's own.

    Attributes
    ----------
    scale, offset : array of shape (channels,), or None
    moving_mean, moving_variance : array of shape (channels,)
    num_updates : int
        How often the moving statistics have been updated.

    Notes
    -----
    A batch of one element a channel gives y = activation(offset) and updates with variance 0. An
    empty batch, or one whose weights are all 0, updates nothing.

    Examples
    --------
    >>> import numpy as np
    >>> from fusebn import BatchNorm
    >>> layer = BatchNorm(2, decay=0.5, epsilon=0)
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]], dtype="float32")
    >>> layer(x, training=True)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> layer.moving_mean, layer.moving_variance     # halfway from 0 to 2, from 1 to 2, ...
    (array([ 1., 10.], dtype=float32), array([  1.5, 100.5], dtype=float32))
    >>> dx, dscale, doffset, dresidual = layer.backward(np.ones_like(x))
    >>> doffset
    array([2., 2.], dtype=float32)
    >>> layer.freeze()                               # from here on, training=True changes nothing
    >>> y = layer(x, training=True)
    >>> layer.num_updates
    1
    """

    scale: Array | None
    offset: Array | None
    moving_mean: Array
    moving_variance: Array

    def __init__(
        self,
        channels: int,
        axis: int = -1,
        decay: float | None = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        correction: float = 1,
        activation: str | None = None,
        zero_debias: bool = False,
        nonfinite: str = "propagate",
        dtype: DTypeLike = np.float32,
        *,
        transforms: Mapping[str, Callable[..., Any]] | None = None,
        transforms_active: Any = True,
        transform_batch_statistics: bool = False,
    ) -> None:
        name = "BatchNorm"
        self.channels = _spec.positive_integer(name, "channels", channels)
        self.axis = _spec.integer(name, "axis", axis)
        self.zero_debias = _spec.flag(name, "zero_debias", zero_debias)
        self.decay = decay
        self.epsilon = _spec.non_negative(name, "epsilon", epsilon)
        self.correction = _spec.non_negative(name, "correction", correction)
        _spec.activation(name, activation)
        self.activation = activation
        self.nonfinite = _spec.one_of(name, "nonfinite", nonfinite, NONFINITE)
        self.dtype = np.dtype(dtype)
        _spec.one_of(name, "dtype", self.dtype.name, ("float32", "float64"))
        self.scale = np.ones(channels, self.dtype) if _spec.flag(name, "scale", scale) else None
        self.offset = np.zeros(channels, self.dtype) if _spec.flag(name, "center", center) else None
        self.moving_mean = np.zeros(channels, self.dtype)
        self.moving_variance = np.ones(channels, self.dtype)
        self.num_updates = 0
        self.transforms = _transforms.checked(name, transforms)
        _spec.flag(name, "transforms_active", transforms_active)
        self.transforms_active = transforms_active
        self.transform_batch_statistics = _spec.flag(
            name, "transform_batch_statistics", transform_batch_statistics
        )
        self._frozen = False
        self._last: _Call | None = None

    # ---- the two switches ----

    @property
    def decay(self) -> float | None:
        """Weight of the old value in the moving averages; None is the cumulative average."""
        return self._decay

    @decay.setter
    def decay(self, decay: float | None) -> None:
        self._decay = _checked_decay("BatchNorm", decay, self.zero_debias)

    @property
    def frozen(self) -> bool:
        """Whether the moving statistics normalize every call and never change."""
        return self._frozen

    def freeze(self) -> None:
        """From here on normalize by the moving statistics and never update them."""
        self._frozen = True

    def unfreeze(self) -> None:
        """Undo :meth:`freeze`."""
        self._frozen = False

    # ---- forward and backward ----

    def __call__(
        self,
        x: Any,
        *,
        training: Any,
        update: Any = None,
        residual: Any = None,
        weights: Any = None,
        out: Any = None,
        transforms_active: Any = None,
    ) -> Array:
        """Normalize x.

        Parameters
        ----------
        x : array of float16, bfloat16, float32 or float64
            Any rank; its channel axis has length `channels`. Not modified, but remembered until
            the next call: `backward` reads it again, so change it only afterwards, and `scale` too.
        training : bool, or boolean array of rank 0
            Whether the batch's statistics normalize x, or the moving ones. There is no default:
            the forgotten one is the most common mistake there is.
        update : bool, or boolean array of rank 0, optional
            Whether the batch updates the moving statistics. None follows `training`. False with
            training normalizes by the batch and leaves the state alone; True without it normalizes
            by the moving statistics as they were, then updates them.
        residual : array like x, optional
            Added before the activation.
        weights : array, optional
            One non-negative real for each position, its shape that of x without the channel axis,
            or broadcasting to it. They weigh the statistics; positions of weight 0 are left out of
            them, even if they hold NaN, but normalized all the same. None means 1.
        out : array like x, optional
            Where y is written; it may be x itself, and then `backward` is not possible.
        transforms_active : bool, or boolean array of rank 0, optional
            Whether the transforms apply to this call. None: as the layer's says.

        Returns
        -------
        y : array of the shape and dtype of x

        Raises
        ------
        TypeError, ValueError
            An argument does not fit. The layer is as it was.
        """
        if update is None and transforms_active is None:
            y = self._call_plain(x, training, residual, weights, out)
            if y is not None:
                return y
        options = training, update, residual, weights, out, transforms_active
        if not self.transforms:
            return self._call(x, *options)
        with self._whole():
            return self._call(x, *options)

    def _call_plain(
        self, x: Any, training: Any, residual: Any, weights: Any, out: Any
    ) -> Array | None:
        """Do what `_call` does for what nearly every call brings; None, and nothing, otherwise."""
        if self.transforms or self.transforms_active is not True:
            return None
        factor = 1.0
        if training is True:
            if self._frozen:
                training = False
            elif self.nonfinite != "propagate":
                return None
            else:
                factor = self._factor()
        scale, offset = self.scale, self.offset
        found = _numpy.forward_of_plain(
            x, scale, offset, self.moving_mean, self.moving_variance, self.epsilon, None, training,
            factor, self.axis, self.activation, residual, weights, self.correction, out, True,
        )  # fmt: skip
        if found is None:
            return None
        y, normalizers, overwritten = found
        if training:
            self.num_updates += 1
        call = x, normalizers, training, residual, None, overwritten, scale, offset, True, None
        self._last = tuple.__new__(_Call, call)  # without the frame of a named tuple's own
        return y  # type: ignore[no-any-return]

    def _call(
        self,
        x: Any,
        training: Any,
        update: Any,
        residual: Any,
        weights: Any,
        out: Any,
        transforms_active: Any,
    ) -> Array:
        name = "BatchNorm"
        x = _numpy.array_of(name, "x", x)
        axis = _spec.axis_of(name, "axis", self.axis, x.shape)
        if x.shape[axis] != self.channels:
            expected = f"have {self.channels} channels on axis {self.axis}"
            _spec.fail(ValueError, name, "x", expected, f"shape {x.shape}")
        training = _spec.flag(name, "training", training)
        update = training if update is None else _spec.flag(name, "update", update)
        if self._frozen:
            training = update = False
        if transforms_active is None:
            transforms_active = self.transforms_active
        active = _spec.flag(name, "transforms_active", transforms_active)
        scale = self._transformed("scale", self.scale, active, training)
        offset = self._transformed("offset", self.offset, active, training)
        own = training and active and self.transform_batch_statistics and bool(self.transforms)
        apart = update and (not training or self.nonfinite == "raise")
        # Statistics that may refuse the batch, or are not those that normalize it, come first.
        batch = self._statistics(x, axis, weights) if apart or own else None
        if batch is not None and batch.count == 0:
            own = False  # there are none to transform
        # Most batches are mixed in by the pass itself, which returns the new averages.
        mixed = update and not (apart or own) and self.nonfinite == "propagate"
        mixed = mixed and _numpy.stat_dtype(x) == self.dtype
        mean, variance = self._normalizers(batch if own else None, active, training)
        by_batch = training and not own
        result, normalizers, count = _numpy.forward(
            name,
            x,
            scale,
            offset,
            mean if mixed or not by_batch else None,
            variance if mixed or not by_batch else None,
            self.epsilon,
            axis,
            by_batch,
            self._factor() if mixed else 1.0,
            self.activation,
            residual,
            weights,
            self.correction,
            out,
            keep_batch=True,
        )
        assert normalizers is not None
        if mixed and count > 0:
            self._assign(result.mean, result.variance)
        elif update and not mixed:
            self._update(batch or _Batch(count, *normalizers))
        self._last = _Call(
            x,
            normalizers,
            by_batch,
            residual,
            weights,
            out is not None and np.may_share_memory(out, x),
            scale,
            offset,
            active,
            batch if own else None,
        )
        return result.y  # type: ignore[no-any-return]

    def _transformed(
        self, name: str, vector: Array | None, active: bool, training: bool
    ) -> Array | None:
        if name not in self.transforms:
            return vector
        given = self.transforms, name, vector, active, training
        new: Array | None = _transforms.apply(_numpy.array_ops, "BatchNorm", *given)
        return new

    def _normalizers(
        self, batch: _Batch | None, active: bool, training: bool
    ) -> tuple[Array, Array]:
        """Return the mean and variance to hand to the kernel; in training they are mixed in."""
        mean, variance = self.moving_mean, self.moving_variance
        if batch is not None:
            mean, variance = batch.mean.astype(self.dtype), batch.variance.astype(self.dtype)
        new = (
            self._transformed("moving_mean", mean, active, training),
            self._transformed("moving_variance", variance, active, training),
        )
        # By its own statistics a batch is normalized as it is: but transforms have observed.
        kept = (mean, variance) if training and batch is None else new
        return kept  # type: ignore[return-value]  # there is a mean, so there is one transformed

    def effective_variables(self) -> dict[str, Any]:
        """Return what normalizes in inference: the variables, as the transforms have them.

        Returns
        -------
        dict
            ``scale`` and ``offset``, None where the layer has none, ``mean``, ``variance``, of
            shape (channels,); and ``epsilon``.
        """
        active = _spec.flag("BatchNorm", "transforms_active", self.transforms_active)
        mean, variance = self._normalizers(None, active, False)
        return {
            "scale": self._transformed("scale", self.scale, active, False),
            "offset": self._transformed("offset", self.offset, active, False),
            "mean": mean,
            "variance": variance,
            "epsilon": self.epsilon,
        }

    def _statistics(self, x: Array, axis: int, weights: Any) -> _Batch:
        axes = tuple(a for a in range(x.ndim) if a != axis)
        count, mean, m2, _ = _numpy.moments_of_blocks("BatchNorm", x, axes, weights)
        finite = np.isfinite(mean) & np.isfinite(m2)
        if self.nonfinite == "raise" and not finite.all():
            bad = np.flatnonzero(~finite)
            shown = ", ".join(map(str, bad[:8])) + (", ..." if bad.size > 8 else "")
            fix = 'Use nonfinite="skip" to leave such channels out of the moving statistics.'
            expected = 'hold finite values (nonfinite="raise")'
            _spec.fail(
                ValueError, "BatchNorm", "x", expected, f"NaN or Inf in channels {shown}", fix
            )
        return _Batch(count, mean, m2 / (count or 1))

    def _update(self, batch: _Batch) -> None:
        """Mix the batch's mean and biased variance into the moving ones."""
        count, mean, variance = batch
        if count == 0:
            return
        unbiased = count / (count - self.correction) if count > self.correction else 1
        factor = self._factor()
        new_mean = _moving.mix(self.moving_mean, mean, factor)
        new_variance = _moving.mix(self.moving_variance, variance, factor, unbiased)
        if self.nonfinite == "skip":
            finite = np.isfinite(mean) & np.isfinite(variance)
            new_mean = np.where(finite, new_mean, self.moving_mean)
            new_variance = np.where(finite, new_variance, self.moving_variance)
        self._assign(new_mean, new_variance)

    def _factor(self) -> float:
        """Return the weight of the next batch."""
        return _moving.factor(self._decay, self.num_updates + 1, self.zero_debias)

    def _assign(self, new_mean: Array, new_variance: Array) -> None:
        self.moving_mean[...] = new_mean
        self.moving_variance[...] = new_variance
        self.num_updates += 1

    def backward(self, dy: Any) -> FusedBatchNormGrad:
        """Return the gradients of the last call, given that of its y.

        Parameters
        ----------
        dy : array of the shape and dtype of x

        Returns
        -------
        FusedBatchNormGrad
            ``dx``; ``dscale`` and ``doffset`` of shape (channels,), None where the layer has no
            scale or offset; ``dresidual``, None where there was no residual. See
            :func:`fusebn.fused_batch_norm_grad`.

        Raises
        ------
        RuntimeError
            There was no call yet, or it wrote y over x.
        """
        last = self._last
        if last is None:
            raise RuntimeError("BatchNorm.backward: call the layer first; it has seen no x yet.")
        if last.overwritten:
            raise RuntimeError(
                "BatchNorm.backward: the last call wrote y over x (out=x), and the gradient needs "
                "x. Call the layer without out=."
            )
        found = self._gradient(dy, last) if last.batch is None else self._between(dy, last)
        if not self.transforms:
            return found
        dscale = self._back("scale", self.scale, found.dscale, last.transformed)
        doffset = self._back("offset", self.offset, found.doffset, last.transformed)
        return found._replace(dscale=dscale, doffset=doffset)

    def _gradient(self, dy: Any, last: _Call) -> FusedBatchNormGrad:
        mean, variance = last.normalizers
        found: FusedBatchNormGrad | None = _numpy.gradient_of_plain(
            dy, last.x, last.scale, last.offset, mean, variance, self.epsilon, None, last.training,
            self.axis, self.activation, last.residual, last.weights, None, None,
        )  # fmt: skip
        if found is not None:
            return found
        return _numpy.gradient(
            "BatchNorm.backward",
            dy,
            last.x,
            last.scale,
            last.offset,
            mean,
            variance,
            self.epsilon,
            self.axis % last.x.ndim,
            last.training,
            self.activation,
            last.residual,
            last.weights,
            None,
            None,
        )

    def _between(self, dy: Any, last: _Call) -> FusedBatchNormGrad:
        """Return the gradients of a call whose batch statistics were transformed."""
        batch, (normalizing_mean, normalizing_variance) = last.batch, last.normalizers
        assert batch is not None

        def between(dmean: Array, dvariance: Array) -> tuple[Array, Array]:
            dmean = self._back("moving_mean", batch.mean, dmean, True)
            if "moving_variance" in self.transforms:
                # What the transform made less than 0 is 0, whatever it was.
                dvariance = np.where(normalizing_variance > 0, dvariance, 0)
                dvariance = self._back("moving_variance", batch.variance, dvariance, True)
            # The kernel takes distances from the mean that normalized x.
            return dmean - 2 * dvariance * (batch.mean - normalizing_mean), dvariance

        return _numpy.gradient_between(
            dy,
            last.x,
            last.scale,
            last.offset,
            normalizing_mean,
            normalizing_variance,
            self.epsilon,
            self.axis % last.x.ndim,
            self.activation,
            last.residual,
            last.weights,
            batch.count,
            between,
        )

    def _back(self, name: str, vector: Any, gradient: Any, transformed: bool) -> Any:
        """Take the gradient of what a transform made of a variable to the variable."""
        transform = self.transforms.get(name) if transformed else None
        if transform is None or gradient is None or not hasattr(transform, "gradient"):
            return gradient  # straight through
        return transform.gradient(vector.astype(self.dtype), gradient)

    # ---- the state ----

    def state_dict(self) -> dict[str, Array]:
        """Return a copy of the state, as arrays: parameters, statistics and their convention.

        ``scale`` and ``offset`` where the layer has them, ``moving_mean``, ``moving_variance``,
        ``num_updates``; and what the statistics mean: ``decay`` (NaN for None), ``epsilon``,
        ``correction``, ``zero_debias``, ``frozen``. A transform with a state_dict of its own adds
        that, as ``transforms.scale.steps``.
        """
        state = {
            "scale": self.scale,
            "offset": self.offset,
            "moving_mean": self.moving_mean,
            "moving_variance": self.moving_variance,
            "num_updates": np.array(self.num_updates, np.int64),
            "decay": np.array(math.nan if self._decay is None else self._decay),
            "epsilon": np.array(self.epsilon),
            "correction": np.array(self.correction),
            "zero_debias": np.array(self.zero_debias),
            "frozen": np.array(self._frozen),
        }
        own = {key: value.copy() for key, value in state.items() if value is not None}
        for name, transform in self._stateful().items():
            own |= {f"{name}.{key}": value for key, value in transform.state_dict().items()}
        return own

    def _stateful(self) -> dict[str, Any]:
        """Return the transforms that have a state, by the prefix of its keys."""
        return {
            f"transforms.{name}": transform
            for name, transform in self.transforms.items()
            if hasattr(transform, "state_dict")
        }

    def load_state_dict(self, state: Any) -> None:
        """Take over a state, its convention included; all of it or, on an error, nothing.

        Raises
        ------
        ValueError
            A key is missing or unknown, or a value does not fit the layer.
        """
        name = "BatchNorm.load_state_dict"
        own = self.state_dict()
        if not isinstance(state, Mapping):
            _spec.fail(TypeError, name, "state", "be a mapping", type(state).__name__)
        observed = {key: state[key] for key in state if str(key).startswith("transforms.")}
        own = {key: value for key, value in own.items() if not key.startswith("transforms.")}
        missing, unknown = own.keys() - state.keys(), state.keys() - own.keys() - observed.keys()
        if missing or unknown:
            got = "; ".join(
                f"{what} {', '.join(sorted(map(str, keys)))}"
                for what, keys in (("without", missing), ("with", unknown))
                if keys
            )
            fix = "A layer with center=False has no offset, one with scale=False no scale."
            _spec.fail(ValueError, name, "state", f"have the keys {', '.join(own)}", got, fix)
        new: dict[str, Array] = {}
        for key, old in own.items():
            value = np.asarray(state[key])
            _spec.same_shape(name, key, value.shape, old.shape, of="the layer's")
            if value.dtype.kind != old.dtype.kind:
                expected = f"have a dtype like the layer's, {old.dtype.name}"
                _spec.fail(TypeError, name, key, expected, f"dtype {value.dtype.name}")
            new[key] = value.astype(old.dtype)
        if (new["moving_variance"] < 0).any():
            got = f"{new['moving_variance'].min()}"
            _spec.fail(ValueError, name, "moving_variance", "not be negative", got)
        if new["num_updates"] < 0:
            _spec.fail(ValueError, name, "num_updates", "not be negative", f"{new['num_updates']}")
        decay = None if np.isnan(new["decay"]) else new["decay"].item()
        decay = _checked_decay(name, decay, bool(new["zero_debias"]))
        epsilon = _spec.non_negative(name, "epsilon", float(new["epsilon"]))
        correction = _spec.non_negative(name, "correction", float(new["correction"]))

        self._load_observed(name, observed)
        for key in ("scale", "offset", "moving_mean", "moving_variance"):
            if key in new:
                getattr(self, key)[...] = new[key]
        self.num_updates = int(new["num_updates"])
        self.zero_debias = bool(new["zero_debias"])
        self._decay, self.epsilon, self.correction = decay, epsilon, correction
        self._frozen = bool(new["frozen"])

    def _load_observed(self, name: str, observed: Mapping[str, Any]) -> None:
        """Give the transforms their states: all of them or, on an error, none."""
        transforms = self._stateful()
        states: dict[str, dict[str, Any]] = {prefix: {} for prefix in transforms}
        for key, value in observed.items():
            prefix, _, rest = key.rpartition(".")
            if prefix not in states:
                fix = "Construct the layer with the transforms that it had."
                expected = f"be of a transform with a state: {', '.join(states) or 'there is none'}"
                _spec.fail(ValueError, name, "state", expected, repr(key), fix)
            states[prefix][rest] = value
        with self._whole():
            for prefix, transform in transforms.items():
                transform.load_state_dict(states[prefix])

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Leave the transforms as they are, if what is done within raises."""
        transforms = self._stateful().values()
        before = [transform.state_dict() for transform in transforms]
        try:
            yield
        except BaseException:
            for transform, state in zip(transforms, before, strict=True):
                transform.load_state_dict(state)
            raise

    def __getstate__(self) -> dict[str, Any]:
        # A pickle or a copy is the layer, not the last batch that backward remembers.
        return self.__dict__ | {"_last": None}

    def __copy__(self) -> BatchNorm:
        # Two layers that shared their averages, but not the count of updates, would both be wrong.
        return deepcopy(self)

    def config(self) -> dict[str, Any]:
        """Return the arguments that construct a layer like this one, ready for JSON.

        Transforms are written down as the arguments of :class:`fusebn.quantize.FakeQuantize`.

        Raises
        ------
        TypeError
            A transform is another function.
        """
        config = self._arguments()
        if not self.transforms:
            return config
        written = {}
        for name, transform in self.transforms.items():
            if type(transform) is not FakeQuantize:
                fix = "Clear layer.transforms, and set them again when the layer is loaded."
                expected, got = "be a FakeQuantize, to be written down", repr(transform)
                argument = f"transforms[{name!r}]"
                _spec.fail(TypeError, "BatchNorm.config", argument, expected, got, fix)
            written[name] = transform.config()
        return config | {
            "transforms": written,
            "transforms_active": bool(self.transforms_active),
            "transform_batch_statistics": self.transform_batch_statistics,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BatchNorm:
        """Return a layer like the one whose :meth:`config` this is."""
        written = config.get("transforms", {})
        transforms = {name: FakeQuantize(**arguments) for name, arguments in written.items()}
        return cls(**{**config, "transforms": transforms})

    def _arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments, without the transforms."""
        return {
            "channels": self.channels,
            "axis": self.axis,
            "decay": self._decay,
            "epsilon": self.epsilon,
            "center": self.offset is not None,
            "scale": self.scale is not None,
            "correction": self.correction,
            "activation": self.activation,
            "zero_debias": self.zero_debias,
            "nonfinite": self.nonfinite,
            "dtype": self.dtype.name,
        }

    def __repr__(self) -> str:
        shown = self._arguments()
        if self.transforms:
            shown["transforms"] = self.transforms
        arguments = ", ".join(f"{key}={value!r}" for key, value in shown.items())
        return f"BatchNorm({arguments})"
