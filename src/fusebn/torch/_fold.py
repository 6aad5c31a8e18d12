"""`fold`: a model for inference, its batch norms taken over by the layers beside them."""

import copy
from collections.abc import Callable
from types import EllipsisType
from typing import Any, TypeVar

from torch import Tensor, nn

from fusebn import _spec
from fusebn._folding import fold as fold_arrays
from fusebn._report import FoldReport, FoldRow
from fusebn.torch._calls import is_symbol, node
from fusebn.torch._fuse import unfuse
from fusebn.torch._neighbours import TRANSPOSED, Neighbour, Neighbours, rank_between, replace
from fusebn.torch._planning import check
from fusebn.torch._portable import ACTIVATIONS

__all__ = ["explain_fold", "fold"]

M = TypeVar("M", bound=nn.Module)


def fold(model: M, *, before: bool = False) -> M:
    """Return a model for inference, whose linear layers have taken over the batch norms.

    In inference a batch norm is affine (see :func:`fusebn.fold`), so the layer whose output it
    normalizes can do it by other weights::

        weight[o, i] * factor[o]    (bias[o] - running_mean[o]) * factor[o] + offset[o]

    with ``factor = scale / sqrt(running_var + eps)``. The layers are ``Conv1d`` to ``3d``,
    ``ConvTranspose1d`` to ``3d``, with groups or not, and ``Linear``; the batch norms PyTorch's and
    ours, before :func:`fuse` or after it, ``SyncBatchNorm`` too. What one of ours does besides
    stays: ``activation(norm(conv(x)) + residual)`` becomes ``activation(conv(x) + residual)``.

    A batch norm stays where that would not be exact, or where what passes between the two is seen
    by anyone else: a layer whose output is read twice, a shared layer or batch norm, weights that
    are tied, parametrized or read by a forward, hooks. :func:`explain_fold` says of each what
    becomes of it. A layer and a batch norm that are shared together, as one, are folded.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode. It stays as it is.
    before : bool
        Whether a batch norm that comes after no such layer is folded into the one it comes before:
        a ``Linear``, or a convolution that pads no zeros. With zeros, which are added after the
        batch norm, the border would be wrong.

    Returns
    -------
    torch.nn.Module
        A copy, as if never fused. Where a batch norm was, there is ``nn.Identity``, or what
        else it did. All other modules, names and entries of the state_dict are the model's; a
        layer that had no bias has one now. After a ``Linear`` or ``Conv1d``, whose batch norm
        takes inputs of two ranks, one of them is folded, [N, C] or [N, C, L], and the other a
        ValueError.

    Raises
    ------
    TypeError
        The model is no module.
    ValueError
        A module is in training mode; a running variance is negative, or a statistic not finite.

    Notes
    -----
    Forwards are traced, as by :func:`fuse`: a pair inside a forward that cannot be traced is left
    alone. Such a forward is taken to call its children and not to reach into them. What a forward
    does is folded as it is now: set attributes that it depends on before.

    ``torch.nn.utils.fusion`` has this for one pair, without groups of transposed convolutions.
    Weights are computed in float64 and rounded once.

    Examples
    --------
    >>> import torch
    >>> import fusebn.torch as fbt
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    ... ).eval()
    >>> folded = fbt.fold(model)
    >>> folded[1]
    Identity()
    >>> x = torch.ones(1, 3, 5, 5)
    >>> torch.allclose(folded(x), model(x), atol=1e-6)
    True
    """
    _check(model, "fold")
    before = _spec.flag("fold", "before", before)
    folded = unfuse(copy.deepcopy(model))
    for found in Neighbours(folded).find(before):
        if found.layer is not None:
            _fold_in(found)
            replace(folded, found.norm, _rest(found))
    return folded


def explain_fold(model: nn.Module, *, before: bool = False) -> FoldReport:
    """Say of each batch norm into which layer :func:`fold` folds it, or why into none.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode. It is traced and not changed.
    before : bool
        As for :func:`fold`.

    Returns
    -------
    FoldReport
        A tuple of rows ``(name, kind, layer, reason)``, in the order of ``named_modules``, which
        prints as a table. `layer` is the name of the layer, or None.

    Raises
    ------
    TypeError
        The model is no module.
    ValueError
        A module is in training mode.

    Examples
    --------
    >>> import torch
    >>> import fusebn.torch as fbt
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.BatchNorm1d(4)
    ... )
    >>> print(fbt.explain_fold(model.eval()))
    batch norm  class        folded into  not, because
    ----------  -----------  -----------  ---------------------------
    1           BatchNorm1d  0
    3           BatchNorm1d  -            ReLU '2' is right before it
    """
    _check(model, "explain_fold")
    before = _spec.flag("explain_fold", "before", before)
    found = Neighbours(model).find(before)
    return FoldReport(
        FoldRow(each.name, type(each.norm).__name__, each.layer_name, each.reason) for each in found
    )


def _check(model: Any, operation: str) -> None:
    check(operation, model)
    for name, module in model.named_modules():
        if module.training:
            got = f"training mode in {name!r}" if name else "training mode"
            expected, fix = "be in evaluation mode", "Call model.eval() first."
            _spec.fail(ValueError, operation, "model", expected, got, fix)


# ---- the layer ----


def _fold_in(found: Neighbour) -> None:
    layer: Any = found.layer
    kind = "dense" if isinstance(layer, nn.Linear) else "conv"
    try:
        weight, bias = fold_arrays(
            layer.weight.detach(),
            None if layer.bias is None else layer.bias.detach(),
            _variables(found.norm),
            kind="conv_transpose" if isinstance(layer, TRANSPOSED) else kind,
            groups=getattr(layer, "groups", 1),
            before=found.before,
            padded=False if found.before else None,
        )
    except ValueError as error:
        raise ValueError(f"{error} It is batch norm {found.name!r}.") from None
    learns = layer.weight.requires_grad
    layer.weight, layer.bias = nn.Parameter(weight, learns), nn.Parameter(bias, learns)


def _variables(norm: Any) -> Any:
    """Return what normalizes in inference: not the layer, whose activation stays where it is."""
    if hasattr(norm, "effective_variables"):
        return norm.effective_variables()
    return {
        "scale": norm.weight,
        "offset": norm.bias,
        "mean": norm.running_mean,
        "variance": norm.running_var,
        "epsilon": norm.eps,
    }


# ---- what is left of a batch norm ----

ACTIVATION_MODULES: dict[str | None, Callable[[], nn.Module]] = {
    None: nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,  # of slope 0.01
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


def _rest(found: Neighbour) -> nn.Module:
    """Return what a batch norm did besides, as a module."""
    activation = getattr(found.norm, "activation", None)
    rank = rank_between(found.norm, found.layer)
    if rank is None and all(call.is_plain for call in found.calls):
        return ACTIVATION_MODULES[activation]()
    return Rest(activation, rank)


class Rest(nn.Module):
    """What a batch norm does besides normalizing: ``activation(input + residual)``.

    It is called as the batch norm was. `rank` is what that took, where another rank would have
    another axis of channels.
    """

    def __init__(self, activation: str | None, rank: int | None) -> None:
        super().__init__()
        self.activation = activation
        self.rank = rank

    def extra_repr(self) -> str:
        """Return what it does."""
        shown = {"activation": self.activation, "rank": self.rank}
        return ", ".join(f"{key}={value!r}" for key, value in shown.items() if value is not None)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        activation: str | EllipsisType | None = ...,
        weights: Tensor | None = None,
        transforms_active: Any = None,
    ) -> Tensor:
        """Do it. Weights and transforms have no part in inference by folded weights."""
        if is_symbol(input):
            given = {} if activation is ... else {"activation": activation}
            symbol: Tensor = node(self, (input, residual), given)
            return symbol
        if self.rank is not None and input.ndim != self.rank:
            expected = f"have rank {self.rank}, for which the batch norm was folded"
            _spec.fail(ValueError, "fold", "input", expected, f"shape {tuple(input.shape)}")
        y = input if residual is None else input + residual
        chosen = self.activation if activation is ... else activation
        return y if chosen is None else ACTIVATIONS[chosen](y)
