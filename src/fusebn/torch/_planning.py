"""Modules whose forward is rewritten: which they are, what becomes of them, and when that holds.

A module whose forward holds something to fold becomes an instance of a subclass of its own class
(`_planned`), in which forward runs the rewritten graph as long as what the trace took for granted
holds, and otherwise what it always was.
"""

import contextlib
import functools
import inspect
import itertools
import linecache
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fusebn import _spec
from fusebn.torch import _folding, modules
from fusebn.torch._folding import Call
from fusebn.torch._tracing import Refusal, Terms, Trace, trace

# PyTorch's batch norms, and what `fuse` makes of them.
OURS: dict[type, type] = {
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
}
PLANS = "_fused"  # where a module keeps its plans


def check(operation: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        _spec.fail(TypeError, operation, "model", "be a torch.nn.Module", got)


# ---- which modules ----


def walk(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
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


def is_norm(module: nn.Module) -> bool:
    """Say whether something can be folded into a module, once it is ours."""
    ours = isinstance(module, modules.Extended) or type(module) in OURS
    return ours and "forward" not in vars(module)


def is_candidate(module: nn.Module) -> bool:
    """Say whether the forward of a module may call batch norms."""
    parts = itertools.islice(module.modules(), 1, None)
    forward = inspect.unwrap(type(module).forward)
    return forward is not nn.Module.forward and (any(map(is_norm, parts)) or _is_own(forward))


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


def study_forward(module: nn.Module) -> Study:
    """Trace and fold forward in the mode of the module, and in the other if that matters."""
    study = Study([], [], {})
    if reason := unplanned(module):
        study.refusals.update(dict.fromkeys(MODES.values(), reason))
        return study
    for training in (module.training, not module.training):
        try:
            with in_mode(module, training):
                found = _study_mode(module, study, Tensor)
                if found.by_type:
                    with contextlib.suppress(Refusal):  # it may be for tensors alone
                        _study_mode(module, study, list)
        except Refusal as refusal:
            study.refusals[MODES[training]] = str(refusal)
            continue
        if not any(holder is module and name == "training" for holder, name, _ in found.terms.read):
            break
    return study


@contextlib.contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
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


MODES = {True: "training", False: "evaluation"}


def unplanned(module: nn.Module) -> str:
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
    paths = _folding.openable(found.graph, module, is_norm)
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
    calls = _folding.fold(found.graph, module, is_norm)
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


class Planned:
    """What comes before the class of a module: how it is copied and pickled."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Reduce to an instance of the original class, and to fusing what comes out."""
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or not reduced[1] or reduced[1][0] is not type(self):
            return reduced  # it makes itself anew in a way of its own
        make, (_, *rest), state, *more = reduced
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name != PLANS}
        return _remade, (make, _original(type(self)), *rest), state, *more

    def __setstate__(self, state: Any) -> None:
        """Take the state, and make plans for the modules that came with it."""
        super().__setstate__(state)  # type: ignore[misc]
        vars(self)[PLANS] = study_forward(self).plans  # type: ignore[arg-type]


def _remade(make: Callable[..., nn.Module], kind: type, *rest: Any) -> nn.Module:
    module = make(kind, *rest)
    become(module, _planned(kind))
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
            for plan in vars(self).get(PLANS, ()):
                if given is not None and plan.terms.fit(given):
                    return plan.run(self, *given)
        return now(self, *args, **kwargs)

    body = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "forward": forward,
    }
    return type(kind)(kind.__name__, (Planned, kind), body)


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
    return kind.__mro__[2] if issubclass(kind, Planned) else kind


def restore(module: nn.Module) -> None:
    become(module, _original(type(module)))
    vars(module).pop(PLANS, None)


def become(module: nn.Module, kind: type) -> None:
    object.__setattr__(module, "__class__", kind)  # some modules watch what is set


def rewrite(module: nn.Module) -> None:
    """Give a module the plans of its forward, or take away those of an earlier time."""
    plans = study_forward(module).plans if is_candidate(module) else []
    if isinstance(module, Planned) and not plans:
        restore(module)
    elif plans:
        with contextlib.suppress(TypeError):  # some classes do not take a subclass like ours
            become(module, _planned(_original(type(module))))
            vars(module)[PLANS] = plans


def has_plan(module: nn.Module) -> bool:
    for training in (True, False):
        with in_mode(module, training):
            if any(plan.terms.hold() for plan in vars(module).get(PLANS, ())):
                return True
    return False
