"""`explain`: what is folded into each batch norm of a model, and why not more."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusebn._report import Report, Row, folded
from fusebn.torch import modules
from fusebn.torch._folding import Call
from fusebn.torch._planning import (
    Planned,
    Study,
    check,
    has_plan,
    is_candidate,
    is_norm,
    study_forward,
    walk,
)

__all__ = ["Report", "Row", "explain"]


def explain(model: nn.Module) -> Report:
    """Say of each batch norm what is fused into it, and why not more.

    Parameters
    ----------
    model : torch.nn.Module
        Before :func:`fuse` or after it. It is traced anew and not changed.

    Returns
    -------
    Report
        A tuple of rows ``(name, kind, ours, residual, activation, reason)``, in the order of
        ``named_modules``, which prints as a table: ``ours`` says that it runs on our kernels,
        ``fused`` that anything is folded into it. In the table that is "nothing" for one of ours
        that stands alone, and "-" for one that is not ours. A batch norm that is called in several
        ways has several rows. A call of ``F.batch_norm`` has the name of the module whose forward
        it is in.

    Raises
    ------
    TypeError
        The model is no module.

    Examples
    --------
    >>> import torch
    >>> import fusebn.torch as fbt
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Tanh())
    >>> print(fbt.explain(fbt.fuse(model)))
    batch norm  class        fused with  not more, because
    ----------  -----------  ----------  -----------------
    0           BatchNorm1d  nothing     Tanh '1' follows
    """
    check("explain", model)
    rows: list[Row] = []
    studies = _Studies(model)
    for name, module, closed in walk(model):
        kind = type(module).__name__
        if isinstance(module, _BatchNorm):
            reason = closed or _left_alone(module)
            ours = isinstance(module, modules.Extended)
            if not reason:
                rows += (Row(name, kind, ours, *told) for told in studies.of(name, module))
            elif not studies.functions(name):
                rows.append(Row(name, kind, False, False, None, reason))
        planned = isinstance(module, Planned)
        functions = studies.functions(name)
        rows += (Row(name, "F.batch_norm", planned, *told) for told in functions)
    return Report(rows)


class _Studies:
    """What is known of all forwards of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.studies: dict[str, tuple[nn.Module, Study]] = {}
        for name, module, closed in walk(model):
            if not closed and is_candidate(module):
                self.studies[name] = module, study_forward(module)

    def functions(self, name: str) -> list[tuple[bool, str | None, str]]:
        """Return residual, activation and reason for the calls of F.batch_norm in a forward."""
        if name not in self.studies:
            return []
        parent, study = self.studies[name]
        ours = isinstance(parent, Planned)
        calls = [call for call in study.calls if call.norm is None]
        return list(dict.fromkeys(_told(call, ours, name, parent, study) for call in calls))

    def of(self, name: str, norm: nn.Module) -> list[tuple[bool, str | None, str]]:
        """Return residual, activation and reason for each kind of call of a batch norm."""
        ours = isinstance(norm, modules.Extended)
        found: list[tuple[bool, str | None, str]] = []
        for parent_name, (parent, study) in self.studies.items():
            for call in study.calls:
                if call.norm is norm:
                    found.append(_told(call, ours, parent_name, parent, study))
        found.sort(key=lambda told: not (told[0] or told[1]))  # what is folded comes first
        return list(dict.fromkeys(found)) or [(False, None, self._unseen(name))]

    def _unseen(self, name: str) -> str:
        """Say why no graph has a call of a batch norm; it may be the model."""
        if not name:
            return ""
        while name:
            name = name.rpartition(".")[0]
            if name in self.studies and (refusals := self.studies[name][1].refusals):
                reasons = " / ".join(dict.fromkeys(refusals.values()))
                return f"{_forward_of(name)} cannot be traced: {reasons}"
        return "no forward that was traced calls it"


def _told(
    call: Call, ours: bool, name: str, parent: nn.Module, study: Study
) -> tuple[bool, str | None, str]:
    """Return what a row says of a call: what is folded, or what would be."""
    partly = [f"not in {mode}: {why}" for mode, why in study.refusals.items()]
    folds = Row("", "", True, *call[1:])
    if not (call.residual or call.activation):
        return False, None, call.reason
    if has_plan(parent):
        return call.residual, call.activation, "; ".join([*filter(None, [call.reason]), *partly])
    if ours and isinstance(parent, Planned):
        return False, None, f"{_forward_of(name)} met other attributes or children: fuse again"
    return False, None, f"fuse would fold {folded(folds)} into it"


def _forward_of(name: str) -> str:
    return f"forward of {name!r}" if name else "forward of the model"


def _left_alone(norm: nn.Module) -> str:
    """Say why a batch norm that is not ours stays what it is, or ""."""
    if "forward" in vars(norm):
        return "forward is an attribute of the module itself"
    if isinstance(norm, nn.modules.lazy.LazyModuleMixin):
        return "it has no channels yet: call the model once, then fuse"
    if is_norm(norm):
        return ""
    if isinstance(norm, nn.SyncBatchNorm):
        return "use fusebn.torch.convert_sync_batchnorm, then fuse"
    return "its class is not PyTorch's own"
