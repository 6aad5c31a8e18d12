"""`fuse`, `unfuse` and `explain`: batch norms of a whole model, with what surrounds them.

A batch norm becomes ours by its class. A module whose forward holds something to fold becomes an
instance of a subclass of its own class (`_planned`), in which forward runs the rewritten graph as
long as that holds, and otherwise what it always was. Nothing else of a model changes.
"""

import contextlib
import functools
import inspect
import itertools
import linecache
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from fusebn import _spec
from fusebn.torch import _folding, modules
from fusebn.torch._folding import Call
from fusebn.torch._tracing import Refusal, Terms, Trace, trace

__all__ = ["Report", "Row", "explain", "fuse", "unfuse"]

M = TypeVar("M", bound=nn.Module)

_OURS: dict[type, type] = {
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_PLANS, _CHANGED = "_fused", "_by_fuse"  # what fuse leaves in the __dict__ of a module


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
    _check("fuse", model)
    for _, module, closed in _walk(model):
        if not closed and type(module) in _OURS and _is_norm(module):
            _become(module, _OURS[type(module)])
            vars(module)[_CHANGED] = True
    for _, module, closed in _walk(model):
        if not closed:
            _rewrite(module)
    return model


def unfuse(model: M) -> M:
    """Undo :func:`fuse`; in place.

    Every class is again what it was. Parameters and running statistics stay what they have become,
    and batch norms that were ours before, or are frozen, stay ours.

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
    _check("unfuse", model)
    for module in model.modules():
        if isinstance(module, _Planned):
            _restore(module)
        changed = vars(module).pop(_CHANGED, False) and type(module) in _THEIRS
        if changed and not module.frozen:  # which PyTorch's cannot be
            _become(module, _THEIRS[type(module)])
    return model


def _check(operation: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        _spec.fail(TypeError, operation, "model", "be a torch.nn.Module", got)


# ---- which modules ----


def _walk(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield every module once: its name, itself, and why it is left alone, or ""."""
    seen: set[nn.Module] = set()

    def walk(name: str, module: nn.Module, closed: str) -> Iterator[tuple[str, nn.Module, str]]:
        if module in seen:
            return
        seen.add(module)
        closed = closed or _closed(module)
        yield name, module, closed
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child, closed)

    return walk("", module, "")


def _closed(module: nn.Module) -> str:
    """Say why a module and all within it are left alone, or ""."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is in a ScriptModule: fuse before scripting"
    home = type(module).__module__
    # By name: PyTorch takes a second to import what compiles.
    if home.startswith("torch._dynamo.") or module._compiled_call_impl is not None:
        return "it is in a compiled module: fuse before compiling"
    if home.startswith(("torch.ao.", "torchao.")):
        return "it is in a module for quantization"
    return ""


def _is_norm(module: nn.Module) -> bool:
    """Say whether something can be folded into a module, once it is ours."""
    ours = isinstance(module, modules.Extended) or type(module) in _OURS
    return ours and "forward" not in vars(module)


def _is_candidate(module: nn.Module) -> bool:
    """Say whether the forward of a module may call batch norms."""
    parts = itertools.islice(module.modules(), 1, None)
    forward = inspect.unwrap(type(module).forward)
    return forward is not nn.Module.forward and (any(map(_is_norm, parts)) or _is_own(forward))


def _is_own(forward: Callable[..., Any]) -> bool:
    """Say whether a forward that is neither PyTorch's nor ours calls F.batch_norm."""
    foreign = not forward.__module__.startswith(("torch.", "fusebn."))
    return foreign and "batch_norm" in forward.__code__.co_names


# ---- plans: rewritten forwards, and when they hold ----


class Plan(NamedTuple):
    """A rewritten forward, in one mode or in both, and when it may stand for the original."""

    run: Callable[..., Any]
    terms: Terms


class Study(NamedTuple):
    """What a forward could become, and what stands in the way."""

    plans: list[Plan]
    calls: list[Call]
    refusals: dict[str, str]  # by mode


def _study(module: nn.Module) -> Study:
    """Trace and fold forward in the mode of the module, and in the other if that matters."""
    study = Study([], [], {})
    if reason := _unplanned(module):
        study.refusals.update(dict.fromkeys(_MODES.values(), reason))
        return study
    for training in (module.training, not module.training):
        try:
            with _in_mode(module, training):
                found = _study_mode(module, study, Tensor)
                if found.by_type:
                    with contextlib.suppress(Refusal):  # it may be for tensors alone
                        _study_mode(module, study, list)
        except Refusal as refusal:
            study.refusals[_MODES[training]] = str(refusal)
            continue
        if not any(holder is module and name == "training" for holder, name, _ in found.terms.read):
            break
    return study


@contextlib.contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    # Not by train(), which reaches the children and which others may have overridden.
    before, vars(module)["training"] = module.training, training
    try:
        yield
    finally:
        vars(module)["training"] = before


def _study_mode(module: nn.Module, study: Study, kind: type) -> Trace:
    """Add to a study what forward does in the present mode; return its trace."""
    found, calls = _folded(module, kind)
    study.calls.extend(calls)
    if any(call.norm is None or call.residual or call.activation for call in calls):
        study.plans.append(Plan(_compiled(found.graph, module), found.terms))
    return found


_MODES = {True: "training", False: "evaluation"}


def _unplanned(module: nn.Module) -> str:
    """Say why the forward of a module is not even traced, or ""."""
    if "forward" in vars(module):
        return "forward is an attribute of the module itself"
    if isinstance(module, fx.GraphModule):
        return "it is a graph already, of torch.fx"
    if parametrize.is_parametrized(module):
        return "it has parametrizations"
    return ""


def _folded(module: nn.Module, kind: type) -> tuple[Trace, list[Call]]:
    """Return a trace whose graph is folded, and its calls of batch norms."""
    found, calls = _folded_once(module, (), kind)
    paths = _folding.openable(found.graph, module, _is_norm)
    if paths:
        opened = tuple(module.get_submodule(path) for path in sorted(paths))
        with contextlib.suppress(Refusal):
            return _folded_once(module, opened, kind)
    return found, calls


def _folded_once(
    module: nn.Module, opened: tuple[nn.Module, ...], kind: type
) -> tuple[Trace, list[Call]]:
    found = trace(module, opened, kind)
    skipped = _folding.skip_identities(found.graph, module)
    calls = _folding.fold(found.graph, module, _is_norm)
    terms = found.terms._replace(opened=opened + skipped)
    return found._replace(terms=terms), calls


_numbers = itertools.count()


def _compiled(graph: fx.Graph, module: nn.Module) -> Callable[..., Any]:
    """Return the function of a graph, whose source tracebacks can show."""
    code = graph.python_code("self")
    name = f"<fused forward {next(_numbers)} of {type(module).__qualname__}>"
    source = code.src.strip() + "\n"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    names = dict(code.globals)
    exec(compile(source, name, "exec"), names)
    run: Callable[..., Any] = names["forward"]
    weakref.finalize(run, linecache.cache.pop, name, None)
    return run


# ---- the class of a module whose forward was rewritten ----


class _Planned:
    """What comes before the class of a module: how it is copied and pickled."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Reduce to an instance of the original class, and to fusing what comes out."""
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or not reduced[1] or reduced[1][0] is not type(self):
            return reduced  # it makes itself anew in a way of its own
        make, (_, *rest), state, *more = reduced
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name != _PLANS}
        return _remade, (make, _original(type(self)), *rest), state, *more

    def __setstate__(self, state: Any) -> None:
        """Take the state, and make plans for the modules that came with it."""
        super().__setstate__(state)  # type: ignore[misc]
        vars(self)[_PLANS] = _study(self).plans  # type: ignore[arg-type]


def _remade(make: Callable[..., nn.Module], kind: type, *rest: Any) -> nn.Module:
    module = make(kind, *rest)
    _become(module, _planned(kind))
    return module


@functools.cache
def _planned(kind: type) -> type:
    """Return the subclass of a class of modules that uses plans."""
    original = kind.forward  # type: ignore[attr-defined]
    names = _positional(original)

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        now = kind.forward  # type: ignore[attr-defined]
        if now is original:
            given = _in_order(names, args, kwargs) if kwargs else args
            for plan in vars(self).get(_PLANS, ()):
                if given is not None and plan.terms.fit(given):
                    return plan.run(self, *given)
        return now(self, *args, **kwargs)

    body = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "forward": forward,
    }
    return type(kind)(kind.__name__, (_Planned, kind), body)


def _positional(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the arguments, but for self, that may be given by position."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)


def _in_order(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...] | None:
    """Return all arguments by position, or None if they leave a gap."""
    named = names[len(args) : len(args) + len(kwargs)]
    if len(named) != len(kwargs) or any(name not in kwargs for name in named):
        return None
    return *args, *(kwargs[name] for name in named)


def _original(kind: type) -> type:
    return kind.__mro__[2] if issubclass(kind, _Planned) else kind


def _restore(module: nn.Module) -> None:
    _become(module, _original(type(module)))
    vars(module).pop(_PLANS, None)


def _become(module: nn.Module, kind: type) -> None:
    object.__setattr__(module, "__class__", kind)  # some modules watch what is set


def _rewrite(module: nn.Module) -> None:
    """Give a module the plans of its forward, or take away those of an earlier time."""
    plans = _study(module).plans if _is_candidate(module) else []
    if isinstance(module, _Planned) and not plans:
        _restore(module)
    elif plans:
        with contextlib.suppress(TypeError):  # some classes do not take a subclass like ours
            _become(module, _planned(_original(type(module))))
            vars(module)[_PLANS] = plans


# ---- the report ----


class Row(NamedTuple):
    """One batch norm in a report."""

    name: str
    """As in ``named_modules``."""
    kind: str
    """Its class."""
    ours: bool
    """Whether it runs on our kernels."""
    residual: bool
    """Whether a sum is folded into it."""
    activation: str | None
    """The activation that is folded into it."""
    reason: str
    """Why not more, or ""."""

    @property
    def fused(self) -> bool:
        """Whether anything is folded into it."""
        return self.residual or self.activation is not None


class Report(tuple[Row, ...]):
    """The rows of :func:`explain`; as a string, a table."""

    __slots__ = ()

    def __str__(self) -> str:
        """Return the table."""
        heads = ("batch norm", "class", "fused with", "not more, because")
        lines = [heads, tuple("-" * len(head) for head in heads)]
        lines += [(row.name or "(itself)", row.kind, _with(row), row.reason) for row in self]
        widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
        lines[1] = tuple("-" * width for width in widths)
        shown = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
        return "\n".join(shown)

    __repr__ = __str__


def _with(row: Row) -> str:
    parts = [part for part in ("residual" * row.residual, row.activation) if part]
    return " + ".join(parts) if parts else "nothing" if row.ours else "-"


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
    _check("explain", model)
    rows: list[Row] = []
    studies = _Studies(model)
    for name, module, closed in _walk(model):
        kind = type(module).__name__
        if isinstance(module, _BatchNorm):
            reason = closed or _left_alone(module)
            ours = isinstance(module, modules.Extended)
            if not reason:
                rows += (Row(name, kind, ours, *told) for told in studies.of(name, module))
            elif not studies.functions(name):
                rows.append(Row(name, kind, False, False, None, reason))
        planned = isinstance(module, _Planned)
        functions = studies.functions(name)
        rows += (Row(name, "F.batch_norm", planned, *told) for told in functions)
    return Report(rows)


class _Studies:
    """What is known of all forwards of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.studies: dict[str, tuple[nn.Module, Study]] = {}
        for name, module, closed in _walk(model):
            if not closed and _is_candidate(module):
                self.studies[name] = module, _study(module)

    def functions(self, name: str) -> list[tuple[bool, str | None, str]]:
        """Return residual, activation and reason for the calls of F.batch_norm in a forward."""
        if name not in self.studies:
            return []
        parent, study = self.studies[name]
        ours = isinstance(parent, _Planned)
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
    if _has_plan(parent):
        return call.residual, call.activation, "; ".join([*filter(None, [call.reason]), *partly])
    if ours and isinstance(parent, _Planned):
        return False, None, f"{_forward_of(name)} met other attributes or children: fuse again"
    return False, None, f"fuse would fold {_with(folds)} into it"


def _has_plan(module: nn.Module) -> bool:
    for training in (True, False):
        with _in_mode(module, training):
            if any(plan.terms.hold() for plan in vars(module).get(_PLANS, ())):
                return True
    return False


def _forward_of(name: str) -> str:
    return f"forward of {name!r}" if name else "forward of the model"


def _left_alone(norm: nn.Module) -> str:
    """Say why a batch norm that is not ours stays what it is, or ""."""
    if "forward" in vars(norm):
        return "forward is an attribute of the module itself"
    if isinstance(norm, nn.modules.lazy.LazyModuleMixin):
        return "it has no channels yet: call the model once, then fuse"
    if _is_norm(norm):
        return ""
    if isinstance(norm, nn.SyncBatchNorm):
        return "use fusebn.torch.convert_sync_batchnorm, then fuse"
    return "its class is not PyTorch's own"
