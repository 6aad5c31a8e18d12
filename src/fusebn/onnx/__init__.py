"""Batch norms of ONNX models, taken over by the layers beside them."""

from typing import Any as _Any

from fusebn import _spec

try:
    import onnx as _onnx
except ModuleNotFoundError as error:
    if error.name != "onnx":
        raise
    _spec.missing("fusebn.onnx", "onnx")

from fusebn._report import FoldReport, FoldRow
from fusebn.onnx import _patterns

__all__ = ["FoldReport", "FoldRow", "fold"]


def fold(model: _Any) -> tuple[_onnx.ModelProto, FoldReport]:
    """Return a model whose batch norms have been folded into the layers beside them.

    A BatchNormalization behind Conv, ConvTranspose, Gemm or MatMul is folded into that; else it is
    folded into the one that follows, where that is exact: without padding, and into a
    ConvTranspose only if nothing is shifted. MatMul gets an Add behind it, unless it has one
    already. :func:`fusebn.fold` has the formulas. Everything else stays as it is, the names of
    inputs and outputs too.

    What is folded must be known: the variables of the batch norm and the weight are initializers
    that the caller cannot override, or come from Constant, possibly by way of Identity. Nobody else
    reads what lies between the two. A weight with other readers is copied. Subgraphs (of If, Loop,
    Scan) and functions stay as they are.

    Parameters
    ----------
    model : onnx.ModelProto
        With its external data loaded, as ``onnx.load`` does. Of opset 7 or later; not modified.

    Returns
    -------
    model : onnx.ModelProto
        A copy, even if nothing could be folded.
    report : FoldReport
        One row for each BatchNormalization: its ``name`` (or that of its output), its ``kind``, the
        ``layer`` it was folded into, or None, and then the ``reason``. As a string, a table.

    Raises
    ------
    TypeError
        `model` is no ``onnx.ModelProto``.
    ValueError
        The data of an initializer are not loaded.

    Notes
    -----
    https://onnx.ai/onnx/operators/onnx__BatchNormalization.html. The command ``fusebn fold`` does
    the same to files, and compares the answers of both models.

    Examples
    --------
    >>> import fusebn.onnx
    >>> from onnx import parser
    >>> model = parser.parse_model('''
    ...     <ir_version: 8, opset_import: ["": 17]>
    ...     network (float[N, 1] x) => (float[N, 1] y)
    ...     <float[1, 1] w = {3}, float[1] one = {1}, float[1] two = {2}> {
    ...         z = MatMul (x, w)
    ...         [norm] y = BatchNormalization <epsilon = 3.0> (z, two, one, two, one)
    ...     }
    ... ''')
    >>> folded, report = fusebn.onnx.fold(model)
    >>> print(report)
    batch norm  class               folded into  not, because
    ----------  ------------------  -----------  ------------
    norm        BatchNormalization  MatMul z
    >>> [node.op_type for node in folded.graph.node]
    ['MatMul', 'Add']
    """
    if not isinstance(model, _onnx.ModelProto):
        fix = "Read a file by onnx.load."
        kind = type(model).__name__
        _spec.fail(TypeError, "onnx.fold", "model", "be an onnx.ModelProto", kind, fix)
    for tensor in model.graph.initializer:
        if _onnx.external_data_helper.uses_external_data(tensor):
            fix = "onnx.load does so; or call onnx.load_external_data_for_model."
            got = f"{tensor.name!r} in another file"
            _spec.fail(ValueError, "onnx.fold", "model", "have its data loaded", got, fix)
    folded = _onnx.ModelProto()
    folded.CopyFrom(model)
    return folded, _patterns.fold_all(folded)
