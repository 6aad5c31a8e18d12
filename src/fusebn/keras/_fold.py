"""`fold`: a model for inference, its batch norms taken over by the layers beside them."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from fusebn import _spec
from fusebn._folding import fold as fold_arrays
from fusebn._report import FoldReport, FoldRow
from fusebn.keras._folding import check, is_open
from fusebn.keras._fuse import Cloning, clone_as, pass_on
from fusebn.keras._neighbours import Neighbour, has_residual, neighbours, shared_layers
from fusebn.keras.layers import BatchNormalization

__all__ = ["explain_fold", "fold"]

Layer = Any
Model = Any


def fold(model: Model, *, before: bool = False) -> Model:
    """Return a model for inference, whose linear layers have taken over the batch norms.

    In inference a batch norm is affine (see :func:`fusebn.fold`), so the layer whose output it
    normalizes can do it by other weights::

        kernel[i, o] * factor[o]    (bias[o] - moving_mean[o]) * factor[o] + beta[o]

    with ``factor = gamma / sqrt(moving_variance + epsilon)``. The layers are ``Dense``, ``Conv1D``
    to ``3D``, ``DepthwiseConv1D`` and ``2D``, ``SeparableConv1D`` and ``2D``, ``Conv1DTranspose``
    to ``3D``; the batch norms Keras's and ours, before :func:`fuse` or after it. What one of ours
    does besides stays: ``activation(norm(conv(x)) + residual)`` becomes
    ``activation(conv(x) + residual)``, of an ``Add`` and an ``Activation``.

    A batch norm stays where that would not be exact, or where what passes between the two is seen
    by anyone else: a layer or a batch norm that is called twice, a result with two readers or that
    the model returns, a layer with an activation. :func:`explain_fold` says of each what becomes
    of it.

    Parameters
    ----------
    model : keras.Model
        Functional or Sequential, built. It stays as it is.
    before : bool
        Whether a batch norm that comes after no such layer is folded into the one it comes before:
        a ``Dense``, or a convolution, depthwise or not, that pads no zeros. With zeros, which are
        added after the batch norm, the border would be wrong.

    Returns
    -------
    keras.Model
        A clone, not compiled. Layers keep their names and weights; one that had no bias has one
        now. What else a batch norm did has its name.

    Raises
    ------
    TypeError
        The model is no ``keras.Model``.
    ValueError
        The model is neither Functional nor Sequential, or not built; a moving variance is
        negative, or a statistic not finite.

    Notes
    -----
    Transforms of our layer are applied, if they are active. Weights are computed in float64 and
    rounded once.

    Examples
    --------
    >>> import keras
    >>> import fusebn.keras
    >>> layers = keras.layers
    >>> model = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3)])
    >>> model.add(layers.BatchNormalization())
    >>> model.add(layers.ReLU())
    >>> [type(layer).__name__ for layer in fusebn.keras.fold(model).layers]
    ['Conv2D', 'ReLU']
    """
    _check(model, "fold")
    before = _spec.flag("fold", "before", before)
    return _Folding(before, shared_layers(model)).clone(model)


def explain_fold(model: Model, *, before: bool = False) -> FoldReport:
    """Say of each batch norm into which layer :func:`fold` folds it, or why into none.

    Parameters
    ----------
    model : keras.Model
        Functional or Sequential, built.
    before : bool
        As for :func:`fold`.

    Returns
    -------
    FoldReport
        A tuple of rows ``(name, kind, layer, reason)``, which prints as a table. `layer` is the
        name of the layer, or None.

    Raises
    ------
    TypeError, ValueError
        As for :func:`fold`.

    Examples
    --------
    >>> import keras
    >>> import fusebn.keras
    >>> layers = keras.layers
    >>> model = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="dense")])
    >>> model.add(layers.BatchNormalization(name="norm"))
    >>> model.add(layers.ReLU(name="relu"))
    >>> model.add(layers.BatchNormalization(name="other"))
    >>> print(fusebn.keras.explain_fold(model))
    batch norm  class               folded into  not, because
    ----------  ------------------  -----------  ------------------------
    norm        BatchNormalization  dense
    other       BatchNormalization  -            ReLU 'relu' is beside it
    """
    _check(model, "explain_fold")
    before = _spec.flag("explain_fold", "before", before)
    return FoldReport(_rows(model, before, shared_layers(model), ""))


def _check(model: Any, operation: str) -> None:
    check(operation, model)
    if not is_open(model) or not model.built:
        got = "another" if model.built else "one that is not built"
        _spec.fail(ValueError, operation, "model", "be Functional or Sequential, and built", got)


def _rows(model: Model, before: bool, shared: set[int], prefix: str) -> Iterator[FoldRow]:
    known = {id(found.norm): found for found in neighbours(model, before, shared)}
    for layer in model.layers:
        if isinstance(layer, keras.Model) and is_open(layer):
            yield from _rows(layer, before, shared, f"{prefix}{layer.name}/")
            continue
        for inner in layer._flatten_layers():
            if isinstance(inner, keras.layers.BatchNormalization):
                name = prefix + (inner.name if inner is layer else f"{layer.name}/{inner.name}")
                yield _row(name, inner, known.get(id(inner)))


def _row(name: str, norm: Layer, found: Neighbour | None) -> FoldRow:
    kind = type(norm).__name__
    if found is None:
        return FoldRow(name, kind, None, "how it is called is not known, or what it computes")
    return FoldRow(name, kind, found.layer and found.layer.name, found.reason)


class _Folding(Cloning):
    """Clones a model without the batch norms that its layers can take over."""

    def __init__(self, before: bool, shared: set[int]) -> None:
        super().__init__()
        self.before = before
        self.shared = shared

    def plan(self, model: Model) -> dict[int, Any]:
        """Return what is called instead of batch norms."""
        stand_ins: dict[int, Any] = {}
        for found in neighbours(model, self.before, self.shared):
            if found.layer is not None:
                self._fold(found)
                stand_ins |= self._rest(found.norm)
        return stand_ins

    def _fold(self, found: Neighbour) -> None:
        layer, norm = self._with_bias(found.layer), found.norm
        ours = isinstance(norm, BatchNormalization)
        weight, bias = fold_arrays(
            getattr(layer, found.weight),
            layer.bias,
            norm.effective_variables() if ours else norm,
            kind=found.kind,
            layout="keras",
            groups=found.groups,
            before=found.before,
            padded=False if found.before else None,
        )
        getattr(layer, found.weight).assign(weight)
        layer.bias.assign(bias)

    def _with_bias(self, layer: Layer) -> Layer:
        """Return the clone of a layer, with its weights and a bias."""
        if id(layer) not in self.changed:
            clone = type(layer).from_config({**layer.get_config(), "use_bias": True})
            clone.build(layer._build_shapes_dict["input_shape"])
            values = layer.get_weights()
            if not layer.use_bias:
                values.append(np.zeros(clone.bias.shape))
            clone.set_weights(values)
            clone.trainable = layer.trainable
            self.clones[id(layer)] = clone
            self.changed.add(id(layer))
        return self.clones[id(layer)]

    def _rest(self, norm: Layer) -> dict[int, Any]:
        """Return what does what a batch norm did besides."""
        self.changed.add(id(norm))
        name, activation = norm.name, getattr(norm, "activation", None)
        activate = pass_on
        if activation is not None:
            activate = self.clones[id(norm)] = _activation(activation, name, norm.dtype_policy)

        def rest(inputs: Any, *, residual: Any = None, **_: Any) -> Any:
            if residual is not None:
                add = keras.layers.Add(name=f"{name}_sum", dtype=norm.dtype_policy)
                inputs = add([inputs, residual])
            return activate(inputs)

        return {id(norm): pass_on if activation is None and not has_residual(norm) else rest}

    def _cloned(self, operation: Any) -> Any:
        if isinstance(operation, keras.Model) and is_open(operation):
            self.changed.add(id(operation))  # its layers have taken what they keep
            return self.clone(operation)
        return clone_as(type(operation), operation)


def _activation(name: str, layer_name: str, dtype: Any) -> Layer:
    if name == "leaky_relu":  # whose slope is not Keras's
        return keras.layers.LeakyReLU(0.01, name=layer_name, dtype=dtype)
    return keras.layers.Activation(name, name=layer_name, dtype=dtype)
