"""`fuse` and `unfuse`: batch norms of a whole model, with what surrounds them, in place.

A batch norm becomes ours by its class, and whatever calls it gets a forward with what can be folded
(see `_planning`). Nothing else of a model changes.
"""

from typing import Any, TypeVar

from torch import nn

from fusebn.torch._planning import OURS, Planned, become, check, is_norm, restore, rewrite, walk

__all__ = ["fuse", "unfuse"]

M = TypeVar("M", bound=nn.Module)

_THEIRS = {ours: theirs for theirs, ours in OURS.items()}
_CHANGED = "_by_fuse"  # what fuse leaves in the __dict__ of a batch norm


def fuse(model: M) -> M:
    """Replace the batch norms of a model, and fold into them what surrounds them; in place.

    Every ``torch.nn.BatchNorm1d``, ``2d`` and ``3d`` becomes ours, and where a forward computes

    ::

        activation(norm(x) + residual)      norm(x) + residual      activation(norm(x))

    with an activation we have (ReLU, ReLU6, LeakyReLU of slope 0.01, SiLU, exact GELU; as modules,
    functions or methods, in place or not), it becomes one call of the batch norm. So does a call of
    ``F.batch_norm`` in a forward that is rewritten, of a subclass of a batch norm for instance.

    The model computes the same to rounding, in training and in evaluation. Its modules, parameters,
    buffers, hooks, names, modes and the keys of its state_dict stay, so optimizers and checkpoints
    do too. A batch norm changes its class, and a module whose forward was rewritten becomes an
    instance of a subclass of its class, with the same name. Copies, pickles and wrappers work;
    a pickle needs fusebn to be loaded, a state_dict does not. Fusing twice is fusing once.

    A forward is rewritten by tracing it with `torch.fx <https://pytorch.org/docs/stable/fx.html>`_,
    in both modes, which runs its Python a few times without data. It is left as it is if its
    control flow depends on tensors, or if it sets attributes or ``no_grad``, draws random numbers
    in Python, or reads a list or an object whose changes could not be seen: :func:`explain` says
    which.
    A rewritten forward is used where optional arguments have their defaults, and while the
    attributes and children that the trace met are what they were; otherwise the old one runs, so
    fuse again after such a change.
    Hooks are respected whenever they are added. Not seen is what a forward does outside of the
    module without a tensor, such as printing a word.

    A batch norm with a residual is called where the sum was, and keeps the residual for backward.

    Parameters
    ----------
    model : torch.nn.Module
        Also a single batch norm. Fuse before ``torch.compile`` or ``torch.jit.trace``
        (``torch.jit.script`` knows PyTorch's own modules only: `unfuse` first); after converting
        to ``SyncBatchNorm``; and while no other thread uses modules.

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError
        The model is no module.

    Examples
    --------
    >>> import torch
    >>> import fusebn.torch as fbt
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    ... )
    >>> fbt.fuse(model) is model
    True
    >>> print(fbt.explain(model))
    batch norm  class        fused with  not more, because
    ----------  -----------  ----------  -----------------
    1           BatchNorm2d  relu
    """
    check("fuse", model)
    for _, module, closed in walk(model):
        if not closed and type(module) in OURS and is_norm(module):
            become(module, OURS[type(module)])
            vars(module)[_CHANGED] = True
    for _, module, closed in walk(model):
        if not closed:
            rewrite(module)
    return model


def unfuse(model: M) -> M:
    """Undo :func:`fuse`; in place.

    Every class is again what it was. Parameters and running statistics stay what they have become,
    and batch norms that were ours before, or are frozen or have transforms now, stay ours.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        The model itself.

    Raises
    ------
    TypeError
        The model is no module.

    Examples
    --------
    >>> import torch
    >>> import fusebn.torch as fbt
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    >>> type(fbt.unfuse(fbt.fuse(model))[0])
    <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    check("unfuse", model)
    for module in model.modules():
        if isinstance(module, Planned):
            restore(module)
        changed = vars(module).pop(_CHANGED, False) and type(module) in _THEIRS
        if changed and not _only_ours(module):
            become(module, _THEIRS[type(module)])
    return model


def _only_ours(module: Any) -> bool:
    """Say whether a batch norm has become what PyTorch's cannot be."""
    return bool(module.frozen or module.transforms)
