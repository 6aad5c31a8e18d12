"""`fuse`: batch norms of a whole model, with what surrounds them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

from fusebn.keras._folding import Fold, check, folds_of, is_norm, is_open
from fusebn.keras.layers import BatchNormalization

__all__ = ["fuse"]

Layer = Any
Model = Any


def fuse(model: Model) -> Model:
    """Return a model in which batch norms are ours and take in what surrounds them.

    Every ``keras.layers.BatchNormalization`` becomes :class:`BatchNormalization`, and where a
    Functional model computes

    ::

        activation(norm(x) + residual)      norm(x) + residual      activation(norm(x))

    with an activation we have (ReLU, ReLU of at most 6, LeakyReLU of slope 0.01, SiLU, exact GELU;
    as layers, as ``Activation(...)`` or as operations), and nobody else reads what stands between,
    it becomes one call of the batch norm; in a Sequential model the last of the three. The layers
    that were folded are gone from the model; :func:`explain` says which stayed, and why.

    It computes the same to rounding, in training and in inference.

    A Functional or Sequential model is cloned, its models inside too, and the one given stays what
    it is. Layers keep their names, configuration, weights (values, not objects), and whether they
    are trainable. A compiled model is compiled alike, and its optimizer goes on where it was;
    metrics start anew.

    Of any other model nothing is known but its layers. It changes in place, without folding: so do
    the batch norms inside of layers that are not Keras's own.

    Parameters
    ----------
    model : keras.Model

    Returns
    -------
    keras.Model
        The clone, or the model itself if its class is not Keras's own.

    Raises
    ------
    TypeError
        The model is no ``keras.Model``.

    Notes
    -----
    Models are cloned as by ``keras.models.clone_model``,
    https://keras.io/api/models/model_saving_apis/model_config_serialization/, which asks layers for
    ``get_config``.

    Examples
    --------
    >>> import keras
    >>> import fusebn.keras
    >>> x = keras.Input((8, 8, 4))
    >>> y = keras.layers.BatchNormalization(name="norm")(keras.layers.Conv2D(4, 1)(x))
    >>> model = keras.Model(x, keras.layers.ReLU()(keras.layers.Add()([x, y])))
    >>> fused = fusebn.keras.fuse(model)
    >>> [type(layer).__name__ for layer in fused.layers]
    ['InputLayer', 'Conv2D', 'BatchNormalization']
    >>> print(fusebn.keras.explain(fused))
    batch norm  class               fused with       not more, because
    ----------  ------------------  ---------------  -----------------
    norm        BatchNormalization  residual + relu
    """
    check("fuse", model)
    if not is_open(model):
        _adopt_inside(model)
        _forget_compiled_steps(model)
        return model
    clone = Cloning().clone(model)
    _compile_alike(clone, model)
    return clone


# ---- in place ----


def _adopt_inside(layer: Layer) -> None:
    """Make the batch norms inside of a layer ours, by their class."""
    for inner in layer._flatten_layers(include_self=False):
        if type(inner) is keras.layers.BatchNormalization:
            inner.__class__ = BatchNormalization


def _forget_compiled_steps(model: Model) -> None:
    model.train_function = model.test_function = model.predict_function = None


# ---- as a clone ----


class _Sum:
    """Stands for a sum of two that a batch norm takes in: calls that with both."""

    def __init__(self, norm: Layer) -> None:
        self.norm = norm
        self.given: Any = None
        self.options: dict[str, Any] = {}

    def wait(self, inputs: Any, **options: Any) -> Any:
        """Be called for the batch norm, whose time has not come."""
        self.given, self.options = inputs, options
        return inputs

    def __call__(self, *terms: Any, **named: Any) -> Any:
        """Be called for the sum."""
        both = keras.tree.flatten((terms, named))
        (residual,) = (term for term in both if term is not self.given)
        return self.norm(self.given, residual=residual, **self.options)


def pass_on(*args: Any, **kwargs: Any) -> Any:
    """Be called for an activation that has been applied."""
    return (*args, *kwargs.values())[0]


class Cloning:
    """Clones a model and the models in it; a layer that stands in several is cloned once."""

    def __init__(self) -> None:
        self.clones: dict[int, Any] = {}
        self.changed: set[int] = set()  # whose clones have variables of another kind

    def clone(self, model: Model) -> Model:
        """Return the fused clone of a Functional or Sequential model."""
        stand_ins = self.plan(model)
        if isinstance(model, keras.Sequential):
            layers = [layer for layer in model.layers if stand_ins.get(id(layer)) is not pass_on]
            inputs = map(_input_like, model.inputs if model.built else ())
            clone = keras.Sequential([*inputs, *map(self._clone_of, layers)], name=model.name)
        else:
            with _uncompiled(model):
                clone = keras.models.clone_model(
                    model,
                    input_tensors=keras.tree.map_structure(_input_like, model.input),
                    clone_function=lambda op: stand_ins.get(id(op)) or self._clone_of(op),
                )
        clones = {key: new for key, new in self.clones.items() if key not in self.changed}
        _take_state(clone, model, clones)
        return clone

    def plan(self, model: Model) -> dict[int, Any]:
        """Return what is called instead of operations of the model, by their ids."""
        stand_ins: dict[int, Any] = {}
        for fold in folds_of(model):
            stand_ins |= self._stand_ins(fold)
        return stand_ins

    def _stand_ins(self, fold: Fold) -> dict[int, Any]:
        """Return what is called instead of the operations of a fold."""
        norm = self._clone_of(fold.norm)
        found: dict[int, Any] = {}
        if fold.activate is not None:
            norm.activation = fold.activation
            found[id(fold.activate)] = pass_on
        if fold.add is not None:
            total = _Sum(norm)
            found |= {id(fold.norm): total.wait, id(fold.add): total}
        return found

    def _clone_of(self, operation: Any) -> Any:
        if id(operation) not in self.clones:
            self.clones[id(operation)] = self._cloned(operation)
        return self.clones[id(operation)]

    def _cloned(self, operation: Any) -> Any:
        if isinstance(operation, keras.Model) and is_open(operation):
            return self.clone(operation)
        return clone_as(BatchNormalization if is_norm(operation) else type(operation), operation)


def clone_as(kind: type[Any], operation: Any) -> Any:
    """Return an operation of a class, configured like another; transforms are no configuration."""
    config = operation.get_config()
    has_transforms = kind is BatchNormalization and config.pop("transforms", None) is not None
    clone = kind.from_config(config)
    if has_transforms:
        clone.share_transforms(operation)
    return clone


def _input_like(x: Any) -> Any:
    """Return an input with the name of the one that made x."""
    return keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x._keras_history.operation.name)


@contextmanager
def _uncompiled(model: Model) -> Iterator[None]:
    """Keep Keras from compiling the clone, which fails for losses that are plain functions."""
    compiled, model.compiled = model.compiled, False
    try:
        yield
    finally:
        model.compiled = compiled


def _take_state(clone: Model, model: Model, clones: dict[int, Any]) -> None:
    """Give the layers of a clone the values of those they were made from."""
    if not model.trainable:
        clone.trainable = False
    for old in model.layers:
        new = clones.get(id(old))
        if new is None or isinstance(old, keras.layers.InputLayer):
            continue
        _adopt_inside(new)
        for a, b in zip(new.variables, old.variables, strict=True):
            _copy(b, a)
        for a, b in zip(new._flatten_layers(), old._flatten_layers(), strict=False):
            a.trainable = b.trainable


def _copy(source: Any, target: Any) -> None:
    # By value: JAX gives the memory of what a step of training reads to what it writes.
    target.assign(keras.ops.copy(source))


def _compile_alike(clone: Model, model: Model) -> None:
    if not model.compiled:
        return
    try:
        clone.compile_from_config(model.get_compile_config())
    except (TypeError, ValueError) as error:
        message = f"The fused model is not compiled, call compile(): {error}"
        warnings.warn(message, stacklevel=3)
        return
    old, new = model.optimizer, clone.optimizer
    if old is not None and old.built:
        new.build(clone.trainable_variables)
        values = {variable.path: variable for variable in old.variables}
        for variable in new.variables:
            if variable.path in values:
                _copy(values[variable.path], variable)
