"""`fuse` and `explain`: batch norms of a whole model, with what surrounds them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras

from fusebn import _spec
from fusebn.keras._folding import Fold, folds_of, is_norm
from fusebn.keras.layers import BatchNormalization

__all__ = ["Report", "Row", "explain", "fuse"]

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
    batch norm  ours  fused with       not more, because
    ----------  ----  ---------------  -----------------
    norm        yes   residual + relu
    """
    _check("fuse", model)
    if not _is_open(model):
        _adopt_inside(model)
        _forget_compiled_steps(model)
        return model
    clone = _Cloning().clone(model)
    _compile_alike(clone, model)
    return clone


def _check(operation: str, model: Any) -> None:
    if not isinstance(model, keras.Model):
        _spec.fail(TypeError, operation, "model", "be a keras.Model", type(model).__name__)


def _is_open(model: Model) -> bool:
    """Say whether the whole of a model is known: its layers and how they are called."""
    is_graph = isinstance(model, keras.Sequential) or hasattr(model, "operations")
    return is_graph and type(model).__module__.partition(".")[0] == "keras"


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


def _pass_on(*args: Any, **kwargs: Any) -> Any:
    """Be called for an activation that has been applied."""
    return (*args, *kwargs.values())[0]


class _Cloning:
    """Clones a model and the models in it; a layer that stands in several is cloned once."""

    def __init__(self) -> None:
        self.clones: dict[int, Any] = {}

    def clone(self, model: Model) -> Model:
        """Return the fused clone of a Functional or Sequential model."""
        stand_ins: dict[int, Any] = {}
        for fold in folds_of(model):
            stand_ins |= self._stand_ins(fold)
        if isinstance(model, keras.Sequential):
            layers = [layer for layer in model.layers if stand_ins.get(id(layer)) is not _pass_on]
            inputs = map(_input_like, model.inputs if model.built else ())
            clone = keras.Sequential([*inputs, *map(self._clone_of, layers)], name=model.name)
        else:
            with _uncompiled(model):
                clone = keras.models.clone_model(
                    model,
                    input_tensors=keras.tree.map_structure(_input_like, model.input),
                    clone_function=lambda op: stand_ins.get(id(op)) or self._clone_of(op),
                )
        _take_state(clone, model, self.clones)
        return clone

    def _stand_ins(self, fold: Fold) -> dict[int, Any]:
        """Return what is called instead of the operations of a fold."""
        norm = self._clone_of(fold.norm)
        found: dict[int, Any] = {}
        if fold.activate is not None:
            norm.activation = fold.activation
            found[id(fold.activate)] = _pass_on
        if fold.add is not None:
            total = _Sum(norm)
            found |= {id(fold.norm): total.wait, id(fold.add): total}
        return found

    def _clone_of(self, operation: Any) -> Any:
        if id(operation) not in self.clones:
            self.clones[id(operation)] = self._cloned(operation)
        return self.clones[id(operation)]

    def _cloned(self, operation: Any) -> Any:
        if isinstance(operation, keras.Model) and _is_open(operation):
            return self.clone(operation)
        kind = BatchNormalization if is_norm(operation) else type(operation)
        clone = kind.from_config(operation.get_config())
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


# ---- the report ----


class Row(NamedTuple):
    """One batch norm in a report."""

    name: str
    """Of the layer, behind those of the models it is in."""
    ours: bool
    """Whether it runs on our kernels."""
    residual: bool
    """Whether a sum is folded into it."""
    activation: str | None
    """The activation that is folded into it."""
    reason: str
    """Why not more, or ""."""


class Report(tuple[Row, ...]):
    """The rows of :func:`explain`; as a string, a table."""

    __slots__ = ()

    def __str__(self) -> str:
        """Return the table."""
        heads = ("batch norm", "ours", "fused with", "not more, because")
        lines: list[tuple[str, ...]] = [heads, heads]
        lines += [(row.name, "yes" if row.ours else "no", _with(row), row.reason) for row in self]
        widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
        lines[1] = tuple("-" * width for width in widths)
        shown = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
        return "\n".join(shown)

    __repr__ = __str__


def _with(row: Row) -> str:
    return " + ".join(part for part in ("residual" * row.residual, row.activation) if part) or "-"


def explain(model: Model) -> Report:
    """Say of each batch norm of a model what is fused into it, and why not more.

    Parameters
    ----------
    model : keras.Model
        Before :func:`fuse` or after it.

    Returns
    -------
    Report
        A tuple of rows ``(name, ours, residual, activation, reason)``, which prints as a table.

    Raises
    ------
    TypeError
        The model is no ``keras.Model``.

    Examples
    --------
    >>> import keras
    >>> import fusebn.keras
    >>> norm = keras.layers.BatchNormalization(name="norm")
    >>> model = keras.Sequential([norm, keras.layers.Activation("tanh", name="tanh")])
    >>> print(fusebn.keras.explain(model))
    batch norm  ours  fused with  not more, because
    ----------  ----  ----------  -------------------------
    norm        no    -           Activation 'tanh' follows
    """
    _check("explain", model)
    return Report(_rows(model, ""))


def _rows(model: Model, prefix: str) -> Iterator[Row]:
    known: dict[int, Fold] = {}
    if _is_open(model):
        known = {id(fold.norm): fold for fold in folds_of(model)}
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _rows(layer, f"{prefix}{layer.name}/")
            continue
        for inner in layer._flatten_layers():
            if isinstance(inner, keras.layers.BatchNormalization):
                name = prefix + (inner.name if inner is layer else f"{layer.name}/{inner.name}")
                yield _row(name, inner, known.get(id(inner)))


def _row(name: str, norm: Layer, fold: Fold | None) -> Row:
    ours = isinstance(norm, BatchNormalization)
    activation = norm.activation if ours else None
    residual = any("residual" in node.arguments.kwargs for node in norm._inbound_nodes)
    if not is_norm(norm):
        reason = "its class is not Keras's own"
    elif fold is None:
        reason = "how it is called is not known"
    elif fold.add is not None or fold.activate is not None:
        would = Row(name, ours, fold.add is not None, fold.activation, "")
        reason = f"fuse would fold {_with(would)} into it"
    else:
        reason = fold.reason
    return Row(name, ours, residual, activation, reason)
