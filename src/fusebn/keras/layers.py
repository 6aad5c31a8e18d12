"""`BatchNormalization`: Keras's layer by its name, its arguments and its weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from fusebn import _spec, _transforms
from fusebn.keras._batch_norm import Call
from fusebn.keras._renorm import Renorm
from fusebn.keras._transformed import Transforms, flag

__all__ = ["BatchNormalization"]

NONFINITE = ("propagate", "skip", "raise")

_NAME = "BatchNormalization"


@keras.saving.register_keras_serializable(package="fusebn")
class BatchNormalization(keras.layers.BatchNormalization):
    """``keras.layers.BatchNormalization``, and what surrounds it in the same pass.

    ::

        y = activation((inputs - mean) / sqrt(variance + epsilon) * gamma + beta + residual)

    In training mean and variance are the batch's, ``variance = m2 / n`` with m2 the sum of squared
    distances from the mean over the n positions of a channel, and the averages move towards them::

        moving_mean     = momentum * moving_mean     + (1 - momentum) * mean
        moving_variance = momentum * moving_variance + (1 - momentum) * m2 / (n - correction)

    Otherwise they are the averages, and nothing changes.

    Parameters
    ----------
    axis : int, or list of int
        The channels. With several axes each combination is a channel of its own, and the weights
        have one axis for each.
    momentum : float
        Weight of the old average.
    epsilon : float
        Not negative; added to the variance.
    center, scale : bool
        Whether there is a ``beta``, a ``gamma``.
    beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer
    beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint
        As in Keras.
    renorm : bool
        Batch renormalization: train as if the averages ``renorm_mean`` and ``renorm_stddev`` had
        normalized the batch, as far as `renorm_clipping` lets them. It costs one more pass over
        the inputs.
    renorm_clipping : dict, optional
        Floats by the keys "rmin", "rmax", "dmax".
    renorm_momentum : float
        Weight of the old value in ``renorm_mean`` and ``renorm_stddev``.
    synchronized : bool
        Take the statistics of the batches of all replicas together, masks and uneven parts
        included: under a ``tf.distribute`` strategy; among the processes of ``torch.distributed``
        where that is initialized. On JAX an array of ``keras.distribution`` is the whole batch, so
        this is always so.
    activation : None, "relu", "relu6", "leaky_relu", "silu" or "gelu"
        Applied in the same pass. "leaky_relu" has slope 0.01 below 0 (Keras's has 0.2 unless told
        otherwise), "gelu" is the exact one.
    correction : float
        Taken from n in the divisor of the averaged variance: 0 as Keras has it, 1 as PyTorch does.
        Where n is not above it, the divisor is n.
    virtual_batch_size : int, optional
        In training, normalize groups of so many examples, each by itself. Group j of G has the
        examples j, j + G, j + 2G, ... The averages take up the mean of the groups' statistics. The
        size must divide the batch. Neither with `synchronized` nor with a mask.
    nonfinite : "propagate", "skip" or "raise"
        What a NaN or an infinity in a channel does to that channel's averages: it gets into them;
        or they stay as they are; or ValueError is raised and nothing has changed. "raise" waits for
        the values, so it cannot be compiled: use ``compile(run_eagerly=True)``.
    transforms : dict, optional
        Functions of a vector of shape (channels,), by the name of the variable they apply to:
        "scale" (gamma), "offset" (beta), "moving_mean", "moving_variance". What they return
        normalizes in its place; gradients flow through them, the weights stay as they are. A
        variance below 0 becomes 0. For instance ``{"scale": fusebn.keras.FakeQuantize(8)}``; what
        has a state observes in training. In a file are FakeQuantize and other layers, and
        functions as Keras saves functions.
    transforms_active : bool, or ``keras.Variable(..., dtype="bool", trainable=False)``
        Whether the transforms apply. A variable is read when the layer runs, so to assign to it
        compiles nothing anew; it is among the layer's `variables`, not among its weights, and a
        file holds its value alone. Without the transforms the results are those of a layer that
        has none, bit for bit. May be set at any time.
    transform_batch_statistics : bool
        Whether, in training, the batch's mean and biased variance go through the transforms of the
        moving statistics before they normalize it, at the cost of two more passes over the inputs.
        The averages take up the batch's own. Neither with `renorm` nor with `virtual_batch_size`.
    **kwargs
        `name`, `dtype`, `trainable`, ... as for any layer.

    Call arguments
    --------------
    inputs : tensor of float16, bfloat16, float32 or float64; others become floats
    training : bool, or scalar boolean tensor, optional
        None is what the model is doing. A tensor is read when it runs: one kernel serves both.
    mask : boolean tensor, optional
        Which positions count in the statistics, in the shape of inputs without the channel axis.
        All are normalized.
    residual : tensor like inputs, optional
        Added before the activation.
    transforms_active : bool, or scalar boolean tensor, optional
        By keyword. None: as the layer's says.

    Raises
    ------
    ValueError, TypeError
        As Keras's layer, with its text: for inputs of another rank or number of channels, for
        masks of another rank, for `renorm_clipping`. In our own words for what is ours.

    Notes
    -----
    The weights are Keras's, in its order: ``gamma, beta, moving_mean, moving_variance``, with
    `renorm` also ``moving_stddev, renorm_mean, renorm_stddev``. Files of weights load both ways.
    Where fusebn is not imported, a saved model is loaded with Keras's layer in the place of this
    one, if this has nothing that Keras's lacks, by ``load_model(path, custom_objects=
    {"fusebn>BatchNormalization": keras.layers.BatchNormalization})``.

    Where it differs from Keras's: a mask is right on any axis and with one channel; a batch of
    which nothing counts leaves the averages alone and yields ``activation(beta + residual)``; a
    constant channel yields exactly that too, on every backend; averages stay float32 in a layer
    whose weights are float16 or bfloat16, where they would stall.

    With ``trainable = False`` the averages normalize whatever `training` says, and do not change.

    On TensorFlow, ``compile(jit_compile=True)`` has XLA compile the model, which takes no kernel
    of ours: the results are the same, the speed is XLA's. Keras chooses it by itself on a GPU only.

    As ``keras.layers.BatchNormalization``,
    https://keras.io/api/layers/normalization_layers/batch_normalization/.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167; Ioffe, "Batch
    Renormalization", 2017, https://arxiv.org/abs/1702.03275; Hoffer, Hubara and Soudry, "Train
    longer, generalize better", 2017, https://arxiv.org/abs/1705.08741.

    Examples
    --------
    >>> import keras
    >>> import numpy as np
    >>> import fusebn.keras
    >>> layer = fusebn.keras.BatchNormalization(momentum=0.5, activation="relu")
    >>> x = np.array([[1.0, 10.0], [3.0, 10.0]], "float32")
    >>> y = layer(x, training=True)
    >>> keras.ops.convert_to_numpy(y).round(3)
    array([[0., 0.],
           [1., 0.]], dtype=float32)
    >>> layer.moving_mean.numpy()
    array([1., 5.], dtype=float32)
    """

    # The extras' defaults stand in the class, so that Keras's own layers lack nothing to become
    # ours; get_config tells those that are not the default.
    activation: str | None = None
    correction: float = 0.0
    virtual_batch_size: int | None = None
    nonfinite: str = "propagate"
    transforms: Mapping[str, Any] | None = None
    transform_batch_statistics: bool = False
    _transforms_active: Any = True

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        renorm: bool = False,
        renorm_clipping: Mapping[str, Any] | None = None,
        renorm_momentum: float = 0.99,
        synchronized: bool = False,
        *,
        activation: str | None = None,
        correction: float = 0,
        virtual_batch_size: int | None = None,
        nonfinite: str = "propagate",
        transforms: Mapping[str, Callable[..., Any]] | None = None,
        transforms_active: Any = True,
        transform_batch_statistics: bool = False,
        **kwargs: Any,
    ) -> None:
        several = axis if isinstance(axis, list | tuple) else None
        super().__init__(
            axis if several is None else -1,
            momentum,
            epsilon,
            center,
            scale,
            beta_initializer,
            gamma_initializer,
            moving_mean_initializer,
            moving_variance_initializer,
            beta_regularizer,
            gamma_regularizer,
            beta_constraint,
            gamma_constraint,
            renorm,
            renorm_clipping,
            renorm_momentum,
            **kwargs,
        )
        self.axis: int | tuple[int, ...] = self.axis
        if several is not None:
            self.axis = tuple(_spec.integer(_NAME, "axis", one) for one in several)
        self.synchronized = synchronized  # Keras's constructor refuses it but on TensorFlow
        _spec.fraction(_NAME, "momentum", self.momentum, "It is the weight of the old value.")
        _spec.non_negative(_NAME, "epsilon", self.epsilon)
        _spec.activation(_NAME, activation)
        self.activation = activation
        self.correction = _spec.non_negative(_NAME, "correction", correction)
        self.nonfinite = _spec.one_of(_NAME, "nonfinite", nonfinite, NONFINITE)
        if virtual_batch_size is not None:
            _spec.positive_integer(_NAME, "virtual_batch_size", virtual_batch_size)
            if synchronized:
                expected = "be None with synchronized=True"
                got = repr(virtual_batch_size)
                _spec.fail(ValueError, _NAME, "virtual_batch_size", expected, got)
        self.virtual_batch_size = virtual_batch_size
        self.transforms = _transforms.checked(_NAME, transforms) or None
        self.transforms_active = transforms_active
        self.transform_batch_statistics = _spec.flag(
            _NAME, "transform_batch_statistics", transform_batch_statistics
        )
        other = "renorm" if renorm else "virtual_batch_size" if virtual_batch_size else None
        if other and self.transform_batch_statistics:
            expected = f"be False with {other}, which changes the batch's statistics in its own way"
            _spec.fail(ValueError, _NAME, "transform_batch_statistics", expected, "True")

    @property
    def transforms_active(self) -> Any:
        """Whether the transforms apply: a bool or a ``keras.Variable``."""
        return self._transforms_active

    @transforms_active.setter
    def transforms_active(self, value: Any) -> None:
        if isinstance(value, keras.Variable):
            if len(value.shape):
                expected, got = "be a scalar", f"a variable of shape {tuple(value.shape)}"
                _spec.fail(ValueError, _NAME, "transforms_active", expected, got)
            value.trainable = False
        else:
            value = _spec.flag(_NAME, "transforms_active", value)
        self.__dict__["_transforms_active"] = value

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; Keras would take the variable that is a switch for a weight."""
        if name == "transforms_active":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def variables(self) -> list[Any]:
        """All variables: the weights, and the one that switches the transforms."""
        found: list[Any] = super().variables
        active = self._transforms_active
        return [*found, active] if isinstance(active, keras.Variable) else found

    def get_config(self) -> dict[str, Any]:
        """Return Keras's, and what differs from Keras's."""
        config: dict[str, Any] = super().get_config()
        if isinstance(self.axis, tuple):
            config["axis"] = list(self.axis)
        for name in (
            "activation",
            "correction",
            "virtual_batch_size",
            "nonfinite",
            "transform_batch_statistics",
        ):
            value = getattr(self, name)
            if value != getattr(BatchNormalization, name):
                config[name] = value
        if self.transforms:
            serialize = keras.saving.serialize_keras_object
            config["transforms"] = {name: serialize(t) for name, t in self.transforms.items()}
            active = self.transforms_active
            if isinstance(active, keras.Variable):
                active = bool(ops.convert_to_numpy(active))
            config["transforms_active"] = active
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Construct a layer from what `get_config` returned."""
        if transforms := config.get("transforms"):
            restore = keras.saving.deserialize_keras_object
            config = {**config, "transforms": {n: restore(t) for n, t in transforms.items()}}
        return super().from_config(config)

    def share_transforms(self, other: "BatchNormalization") -> None:
        """Take over another layer's transforms: functions and switch as they are, layers anew."""
        self.transforms = {
            name: type(t).from_config(t.get_config()) if isinstance(t, keras.layers.Layer) else t
            for name, t in (other.transforms or {}).items()
        } or None
        self.transforms_active = other.transforms_active

    # ---- the weights ----

    def build(self, input_shape: Any) -> None:
        """Make the weights, for inputs of this shape."""
        axes = self._axes(len(input_shape))
        shape = tuple(input_shape[axis] for axis in axes)
        for name, wanted in (("gamma", self.scale), ("beta", self.center)):
            if wanted:
                weight = self.add_weight(
                    shape=shape,
                    name=name,
                    initializer=getattr(self, f"{name}_initializer"),
                    regularizer=getattr(self, f"{name}_regularizer"),
                    constraint=getattr(self, f"{name}_constraint"),
                    autocast=False,
                )
                setattr(self, name, weight)
        mean, variance = self.moving_mean_initializer, self.moving_variance_initializer
        averages = {"moving_mean": mean, "moving_variance": variance}
        if self.renorm:
            averages["moving_stddev"] = _root(variance)
            averages["renorm_mean"] = _own(mean)
            averages["renorm_stddev"] = _root(variance)
        for name, initializer in averages.items():
            setattr(self, name, self._average(name, shape, initializer))
        for transform in (self.transforms or {}).values():
            if isinstance(transform, keras.layers.Layer) and not transform.built:
                transform.build((math.prod(shape),))
        named = axes if isinstance(self.axis, tuple) else (self.axis,)  # as errors shall name them
        sizes = dict(zip(named, shape, strict=True))
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes=sizes)

    def _average(self, name: str, shape: tuple[int, ...], initializer: Any) -> Any:
        # A step of less than half a unit in the last place, 2**-9 of the value in bfloat16, is
        # lost: averages of half precision stall.
        half = self.variable_dtype in ("float16", "bfloat16")
        return self.add_weight(
            shape=shape,
            name=name,
            initializer=initializer,
            dtype="float32" if half else None,
            trainable=False,
            autocast=False,
        )

    def _axes(self, rank: int) -> tuple[int, ...]:
        """Return the channel axes, sorted, counted from the front."""
        if not isinstance(self.axis, tuple):
            return (tuple(range(rank))[self.axis],)  # Keras's error for an axis out of range
        shape = (0,) * rank
        axes = sorted(_spec.axis_of(_NAME, "axis", axis, shape) for axis in self.axis)
        if not axes or len({*axes}) != len(axes):
            expected = "name each axis once, and one at least"
            _spec.fail(ValueError, _NAME, "axis", expected, repr(self.axis))
        return tuple(axes)

    # ---- a call ----

    def compute_output_spec(
        self,
        inputs: Any,
        training: Any = None,
        mask: Any = None,
        residual: Any = None,
        *,
        transforms_active: Any = None,
    ) -> Any:
        """Return what a call with symbolic tensors yields."""
        if residual is not None:
            _same_shape(residual.shape, inputs.shape)
        return super().compute_output_spec(inputs)

    def call(
        self,
        inputs: Any,
        training: Any = None,
        mask: Any = None,
        residual: Any = None,
        *,
        transforms_active: Any = None,
    ) -> Any:
        """Normalize a batch: see the class."""
        if mask is None:  # Keras looks for it only where inputs are the one tensor
            mask = getattr(inputs, "_keras_mask", None)
        x = inputs if keras.backend.is_float_dtype(inputs.dtype) else ops.cast(inputs, "float32")
        training = flag("training", training) if self.trainable else False
        transforms = self._transforms_of_a_call(transforms_active, training)
        y, averages = self._call(x, training, mask, residual)(x, transforms)
        if training is not False:
            self._take(averages)
        return ops.cast(y, self.compute_dtype)

    def _call(self, x: Any, training: Any, mask: Any, residual: Any) -> Call:
        if residual is not None:
            _same_shape(residual.shape, x.shape)
            residual = ops.cast(residual, x.dtype)
        axes = self._axes(len(x.shape))
        if mask is not None:
            mask = self._checked_mask(mask, x, axes)
        if self.virtual_batch_size is not None and training is not False:
            self._check_virtual_batches(x, axes, mask)
        scale, offset = self._gamma_and_beta
        averages = tuple(variable.value for variable in self._averages)
        return Call(
            axes=axes,
            training=training,
            epsilon=self.epsilon,
            decay=self.momentum,
            correction=self.correction,
            activation=self.activation,
            virtual_batch_size=self.virtual_batch_size,
            synchronized=self.synchronized,
            renorm=Renorm(self.renorm_momentum, self.renorm_clipping or {})
            if self.renorm
            else None,
            scale=scale,
            offset=offset,
            averages=averages,
            given=averages[:2],
            residual=residual,
            mask=mask,
        )

    def _transforms_of_a_call(self, active: Any, training: Any) -> Transforms:
        if active is None:
            active = self.transforms_active
        active = flag("transforms_active", active)
        return Transforms(self.transforms or {}, active, training, self.transform_batch_statistics)

    def effective_variables(self) -> dict[str, Any]:
        """Return what normalizes in inference: the variables, as the transforms have them.

        Returns
        -------
        dict
            ``scale`` and ``offset``, None where the layer has none, ``mean``, ``variance``, in the
            shape of the weights; and ``epsilon``.
        """
        transforms = self._transforms_of_a_call(None, False)
        (scale, offset), averages = self._gamma_and_beta, self._averages
        return {
            "scale": transforms("scale", scale),
            "offset": transforms("offset", offset),
            "mean": transforms("moving_mean", averages[0].value),
            "variance": transforms("moving_variance", averages[1].value),
            "epsilon": self.epsilon,
        }

    @property
    def _gamma_and_beta(self) -> tuple[Any, Any]:
        gamma, beta = (None if of is None else of.value for of in (self.gamma, self.beta))
        return gamma, beta

    @property
    def _averages(self) -> list[Any]:
        found = [self.moving_mean, self.moving_variance]
        if self.renorm:
            found += [self.moving_stddev, self.renorm_mean, self.renorm_stddev]
        return found

    def _checked_mask(self, mask: Any, x: Any, axes: tuple[int, ...]) -> Any:
        if len(mask.shape) != len(x.shape) - len(axes):
            if len(axes) == 1:  # in Keras's words
                raise ValueError(
                    "The mask provided should be one dimension less than the inputs. Received: "
                    f"mask.shape={mask.shape}, inputs.shape={x.shape}"
                )
            expected = f"have the shape of inputs without the axes {axes}"
            _spec.fail(ValueError, _NAME, "mask", expected, f"shape {tuple(mask.shape)}")
        others = tuple(n for i, n in enumerate(x.shape) if i not in axes)
        if any(
            n not in (1, None, m) and m is not None for n, m in zip(mask.shape, others, strict=True)
        ):
            expected = f"broadcast to {others}, the shape of inputs without the channels"
            _spec.fail(ValueError, _NAME, "mask", expected, f"shape {tuple(mask.shape)}")
        return ops.cast(mask, "bool")

    def _check_virtual_batches(self, x: Any, axes: tuple[int, ...], mask: Any) -> None:
        size, batch = self.virtual_batch_size, x.shape[0]
        if mask is not None:
            expected = "be None with virtual_batch_size: the groups would differ in their counts"
            _spec.fail(ValueError, _NAME, "mask", expected, f"shape {tuple(mask.shape)}")
        if 0 in axes:
            expected = "leave out axis 0 with virtual_batch_size, which cuts it"
            _spec.fail(ValueError, _NAME, "axis", expected, repr(self.axis))
        if size is not None and batch is not None and batch % size:
            expected = f"divide the size of the batch in training, {batch}"
            _spec.fail(ValueError, _NAME, "virtual_batch_size", expected, repr(size))

    def _take(self, averages: tuple[Any, ...]) -> None:
        """Take over new averages, if they are finite or may be otherwise."""
        old = self._averages
        if self.nonfinite != "propagate":
            finite = ops.isfinite(averages[0])
            for average in averages[1:]:
                finite = ops.logical_and(finite, ops.isfinite(average))
            if self.nonfinite == "raise":
                self._refuse_nonfinite(finite)
            averages = tuple(
                ops.where(finite, new, variable.value)
                for new, variable in zip(averages, old, strict=True)
            )
        for variable, average in zip(old, averages, strict=True):
            variable.assign(average)

    def _refuse_nonfinite(self, finite: Any) -> None:
        try:
            values = ops.convert_to_numpy(finite).reshape(-1)
        except Exception as error:  # each backend has its own for values that are not there yet
            fix = 'Use compile(run_eagerly=True), or nonfinite="skip".'
            expected, got = "be known where they are to be checked", "a symbol in a compiled step"
            try:
                _spec.fail(ValueError, _NAME, "inputs", expected, got, fix)
            except ValueError as refusal:
                raise refusal from error
        if not values.all():
            channels = (~values).nonzero()[0].tolist()
            shown = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
            fix = 'Use nonfinite="skip" to leave such channels out of the averages.'
            expected, got = (
                'hold finite values (nonfinite="raise")',
                f"NaN or Inf in channels {shown}",
            )
            _spec.fail(ValueError, _NAME, "inputs", expected, got, fix)


def _same_shape(residual: Any, inputs: Any) -> None:
    """Check what is known of two shapes."""
    same = len(residual) == len(inputs) and all(
        a == b or a is None or b is None for a, b in zip(residual, inputs, strict=True)
    )
    if not same:
        _spec.same_shape(_NAME, "residual", tuple(residual), tuple(inputs), of="inputs")


def _own(initializer: Any) -> Any:
    """Return an initializer like this one: a random one must not be called twice."""
    if isinstance(initializer, keras.initializers.Initializer):
        return initializer.__class__.from_config(initializer.get_config())
    return initializer


def _root(initializer: Any) -> Any:
    """Return the initializer of the roots of what this one makes."""

    def root(shape: Any, dtype: Any = None) -> Any:
        return ops.sqrt(_own(initializer)(shape, dtype=dtype))

    return root
