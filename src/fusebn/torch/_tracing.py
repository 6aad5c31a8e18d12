"""A module's forward as a graph, and what that graph takes for granted.

`torch.fx` runs forward once, with stand-ins for the tensors, and records what is done to them. The
record is forward only as long as the Python around the tensors would do the same again. So this
writes down what that Python read (`Terms`), and refuses a forward whose Python reads what may
change unseen, changes something, or draws random numbers.

The children of the module are called and not looked into, but for those that are to be opened.
"""

import builtins
import dis
import enum
import inspect
import operator
import random
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn


class Refusal(Exception):
    """A forward cannot be traced; says why."""


class Terms(NamedTuple):
    """What a graph takes for granted."""

    inputs: tuple[tuple[type, ...], ...]  # types of the arguments; the rest have their defaults
    read: tuple[tuple[Any, str, Any], ...]  # (object, attribute, value)
    parts: tuple[tuple[nn.Module, tuple[Any, ...]], ...]  # of these modules, in order
    opened: tuple[nn.Module, ...]  # what they do is in the graph, but not their hooks

    def fit(self, arguments: tuple[Any, ...]) -> bool:
        """Say whether a call with these arguments, now, would do what was traced."""
        return (
            len(arguments) == len(self.inputs)
            and all(map(isinstance, arguments, self.inputs))
            and self.hold()
        )

    def hold(self) -> bool:
        """Say whether all that the trace met is as it was."""
        _, read, parts, opened = self
        return (
            all(_is_same(getattr(holder, name, None), value) for holder, name, value in read)
            and all(_parts_of(each) == then for each, then in parts)
            and not any(map(is_watched, opened))
        )


def _is_same(now: Any, then: Any) -> bool:
    return now is then or (type(now) is type(then) and bool(now == then))


def _parts_of(module: nn.Module) -> tuple[Any, ...]:
    """Return the children of a module, and which of its parameters and buffers are None."""
    tensors = *module._parameters.values(), *module._buffers.values()
    return *module._modules.values(), *(tensor is None for tensor in tensors)


def is_watched(module: nn.Module) -> bool:
    """Say whether a module has hooks that run when it is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class Trace(NamedTuple):
    """A graph of forward, when it holds, and whether forward asked for the types of arguments."""

    graph: fx.Graph
    terms: Terms
    by_type: bool


def trace(module: nn.Module, opened: tuple[nn.Module, ...] = (), kind: type = Tensor) -> Trace:
    """Return the graph of a module's forward in its present mode, or raise Refusal.

    A forward that asks whether an argument is a tensor or a list is told `kind`. It is traced twice
    in opposite surroundings, which must not show: once with gradients, once without them and under
    autocast.
    """
    traces = []
    before = _random_states()
    try:
        for opposite in (False, True):
            with warnings.catch_warnings(), _surroundings(opposite):
                warnings.simplefilter("ignore")
                traces.append(_trace(module, opened, kind))
    except Refusal:
        raise
    except fx.proxy.TraceError as error:
        raise Refusal(_EXPLAINED.get(str(error)[:8], str(error))) from error
    except Exception as error:  # whatever forward raises when it is handed a stand-in
        first = (str(error).splitlines() or [""])[0]
        raise Refusal(f"{type(error).__name__}: {first}") from error
    finally:
        drawn = _restore(before)
    if drawn:
        raise Refusal("it draws random numbers itself")
    if len({_source(each) for each in traces}) > 1:
        raise Refusal("what it does depends on more than its input: on autocast or the grad mode?")
    return traces[0]


_EXPLAINED = {
    "symbolic": "its control flow depends on the values or the shape of its input",
    "Proxy ob": "it iterates over its input",
}


def _source(trace: Trace) -> str:
    return str(trace.graph.python_code("self").src)


# ---- one trace ----


def _trace(module: nn.Module, opened: tuple[nn.Module, ...], kind: type) -> Trace:
    tracer = _Tracer()
    tracer.opened, tracer.kind, tracer.asked = opened, kind, set()
    read: dict[tuple[int, str], tuple[Any, str, Any]] = {}
    forward = inspect.unwrap(type(module).forward)
    names = _globals_named(forward)
    for name in sorted(names & forward.__globals__.keys()):
        _note(read, sys.modules[forward.__module__], name, forward.__globals__[name])
    for name, value in inspect.getclosurevars(forward).nonlocals.items():
        _note({}, forward, name, value)
    with _watching(module, read):
        graph = tracer.trace(module)
    # Where nobody asks, the graph does to a list what forward does to it.
    unasked = (Tensor,) if names & {"type", "hasattr"} else (Tensor, list, tuple)
    inputs = tuple(
        (kind,) if node.name in tracer.asked else unasked
        for node in graph.nodes
        if node.op == "placeholder"
    )
    terms = Terms(inputs, tuple(read.values()), _containers(module, graph), opened)
    return Trace(graph, terms, bool(tracer.asked))


def _containers(module: nn.Module, graph: fx.Graph) -> Any:
    """Return whose children or tensors the graph calls or reads, and those."""
    paths = {""} | {name for name, child in module.named_children() if type(child) in _LISTS}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            parts = node.target.split(".")
            paths |= {".".join(parts[:i]) for i in range(len(parts))}
    found = [module.get_submodule(path) for path in sorted(paths)]
    return tuple((each, _parts_of(each)) for each in found)


_LISTS = (nn.ModuleList, nn.ModuleDict)


class _Value(fx.Proxy):
    """A stand-in for what an operation returns. In place stays in place, and nobody may look."""

    def __str__(self) -> str:
        raise Refusal("it makes text of a tensor")

    def __format__(self, _: str) -> str:
        return str(self)


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    # fx.Proxy has no such methods, and Python takes x = x + y for x += y where there are none.
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy(
        "call_function", function, (self, other), {}
    )


for _name in (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
):
    setattr(_Value, f"__{_name}__", _in_place(_name))


class _Input(_Value):
    """A stand-in for an argument, whose type is known when the graph is used."""


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # or what forward does to a buffer would happen now
    opened: tuple[nn.Module, ...]
    kind: type
    asked: set[str]

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        self.around = _state()
        return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.opened

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Return forward and what to call it with: it is left to fill in its defaults itself."""
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        required = [p for p in parameters if p.default is p.empty and p.kind not in _REST]
        if any(p.kind is p.KEYWORD_ONLY for p in required):
            raise Refusal("it has keyword-only parameters without a default")
        inputs = [self.create_proxy("placeholder", p.name, (), {}) for p in required]
        return root_fn, [self.root, *inputs]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return (_Input if node.op == "placeholder" else _Value)(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _state() != self.around:
            raise Refusal("it sets no_grad, autocast, checkpointing or the like for a part of it")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            raise Refusal("it uses a tensor that is no parameter, buffer or input of its own")
        return super().create_arg(a)

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return super().path_of_module(mod)
        except NameError:
            raise Refusal(
                f"it calls a {type(mod).__name__} that is not among its children"
            ) from None


_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


# ---- what the Python of forward reads and does ----


@contextmanager
def _watching(root: nn.Module, read: dict[tuple[int, str], Any]) -> Iterator[None]:
    """Note the attributes of modules that are read, and refuse that one is set."""
    thread = threading.get_ident()

    def getattribute(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        if name not in _INTERNAL and threading.get_ident() == thread:
            _note(read, module, name, value)
        return value

    def setattribute(module: nn.Module, name: str, value: Any) -> None:
        if threading.get_ident() == thread:
            raise Refusal(f"it sets {name!r}")
        original(module, name, value)

    def is_instance(value: Any, kinds: Any) -> bool:
        if type(value) is _Input:
            assert isinstance(value.tracer, _Tracer)
            value.tracer.asked.add(value.node.name)
            return issubclass(value.tracer.kind, kinds)
        if issubclass(type(value), fx.Proxy):
            raise Refusal("it asks for the type of what an operation returned")
        return builtins.isinstance(value, kinds)

    original = nn.Module.__setattr__
    homes = {kind.__module__ for kind in type(root).__mro__} - {"builtins", *_OWN}
    with ExitStack() as undo:
        for home in (sys.modules[name] for name in homes if name in sys.modules):
            if "isinstance" not in vars(home):
                home.isinstance = is_instance  # type: ignore[attr-defined]
                undo.callback(delattr, home, "isinstance")
        nn.Module.__getattribute__ = getattribute  # type: ignore[method-assign, assignment]
        undo.callback(delattr, nn.Module, "__getattribute__")
        nn.Module.__setattr__ = setattribute  # type: ignore[method-assign, assignment]
        undo.callback(setattr, nn.Module, "__setattr__", original)
        yield


# What every module has, and fx and PyTorch read all the time; but for the mode.
_INTERNAL = {*dir(nn.Module()), "_fused", "_by_fuse"} - {"training"}

_OWN = ("fusebn.torch._planning", __name__)

_FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    type,
)
_CONSTANTS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    enum.Enum,
    torch.dtype,
    torch.device,
    torch.memory_format,
)


def _note(read: dict[tuple[int, str], Any], holder: Any, name: str, value: Any) -> None:
    """Note a value that was read, but for methods, functions of a file, and what fx handed out."""
    own = isinstance(holder, nn.Module) and name in vars(holder)
    if not own and isinstance(value, (*_FUNCTIONS, nn.Module, fx.Proxy)):
        return
    if not _is_constant(value):
        kind = type(value).__name__
        raise Refusal(f"it reads {name!r}, a {kind}, whose changes could not be seen")
    read[id(holder), name] = (holder, name, value)


def _is_constant(value: Any) -> bool:
    """Say whether a value is what it is for good, or is compared by identity."""
    if type(value) in (tuple, frozenset):
        return all(map(_is_constant, value))
    return isinstance(value, (*_CONSTANTS, *_FUNCTIONS, nn.Module))


def _globals_named(function: Any) -> set[str]:
    """Return the names of the globals and builtins that a function's own code reads."""
    steps = dis.get_instructions(function.__code__)
    return {step.argval for step in steps if step.opname == "LOAD_GLOBAL"}


# ---- what surrounds a call ----


def _state() -> tuple[Any, ...]:
    """Return what no graph records, though a part of forward may set it for itself."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in _AUTOCAST),
        *(torch.get_autocast_dtype(device) for device in _AUTOCAST),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
    )


_AUTOCAST = ("cpu", "cuda")


@contextmanager
def _surroundings(opposite: bool) -> Iterator[None]:
    before = {device: torch.is_autocast_enabled(device) for device in _AUTOCAST}
    try:
        for device in _AUTOCAST:
            torch.set_autocast_enabled(device, opposite)
        with torch.set_grad_enabled(not opposite):
            yield
    finally:
        for device in _AUTOCAST:
            torch.set_autocast_enabled(device, before[device])


def _random_states() -> tuple[Any, ...]:
    # The generators that forward would draw from by the functions of the three modules.
    numpy = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpy, torch.get_rng_state()


def _restore(states: tuple[Any, ...]) -> bool:
    """Give the generators back the states they had; say whether they had changed."""
    python, numpy, pytorch = states
    now = _random_states()
    unchanged = (
        now[0] == python
        and all(np.array_equal(a, b) for a, b in zip(now[1], numpy, strict=True))
        and torch.equal(now[2], pytorch)
    )
    if not unchanged:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(pytorch)
    return not unchanged
