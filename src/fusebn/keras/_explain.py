"""`explain`: what is folded into each batch norm of a model, and why not more."""

from collections.abc import Iterator
from typing import Any

import keras

from fusebn._report import Report, Row, folded
from fusebn.keras._folding import Fold, check, folds_of, is_norm, is_open
from fusebn.keras.layers import BatchNormalization

__all__ = ["Report", "Row", "explain"]

Layer = Any
Model = Any


def explain(model: Model) -> Report:
    """Say of each batch norm of a model what is fused into it, and why not more.

    Parameters
    ----------
    model : keras.Model
        Before :func:`fuse` or after it.

    Returns
    -------
    Report
        A tuple of rows ``(name, kind, ours, residual, activation, reason)``, which prints as a
        table: ``name`` is that of the layer, behind those of the models it is in; ``ours`` says
        that it runs on our kernels, ``fused`` that anything is folded into it. In the table that
        is "nothing" for one of ours that stands alone, and "-" for one that is not ours.

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
    batch norm  class               fused with  not more, because
    ----------  ------------------  ----------  -------------------------
    norm        BatchNormalization  -           Activation 'tanh' follows
    """
    check("explain", model)
    return Report(_rows(model, ""))


def _rows(model: Model, prefix: str) -> Iterator[Row]:
    known: dict[int, Fold] = {}
    if is_open(model):
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
    kind = type(norm).__name__
    ours = isinstance(norm, BatchNormalization)
    activation = norm.activation if ours else None
    residual = any("residual" in node.arguments.kwargs for node in norm._inbound_nodes)
    if not is_norm(norm):
        reason = "its class is not Keras's own"
    elif fold is None:
        reason = "how it is called is not known"
    elif fold.add is not None or fold.activate is not None:
        would = Row(name, kind, True, fold.add is not None, fold.activation, "")
        reason = f"fuse would fold {folded(would)} into it"
    else:
        reason = fold.reason
    return Row(name, kind, ours, residual, activation, reason)
