"""``activation(norm(x) + residual)`` in the graph of a forward, and the one call it becomes.

What is found when a graph is made is a pattern of calls. Whether they may be one call is looked at
again in every call (`fused`, `fused_sum`): a hook, a module that was exchanged, a residual that
broadcasts or promotes, and the calls are made one by one, as they were written.
"""

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as hooks

from fusebn.torch._tracing import is_watched
from fusebn.torch.functional import batch_norm
from fusebn.torch.modules import Extended

# ---- activations by all their names ----

# Module -> its name here, and what its attributes must be.
_MODULES: dict[type, tuple[str, dict[str, Any]]] = {
    nn.ReLU: ("relu", {}),
    nn.ReLU6: ("relu6", {}),
    nn.Hardtanh: ("relu6", {"min_val": 0, "max_val": 6}),
    nn.LeakyReLU: ("leaky_relu", {"negative_slope": 0.01}),
    nn.SiLU: ("silu", {}),
    nn.GELU: ("gelu", {"approximate": "none"}),
}
# Function -> its name here, its parameters after the input with their defaults, what they must be.
_FUNCTIONS: dict[Any, tuple[str, dict[str, Any], dict[str, Any]]] = {
    F.relu: ("relu", {"inplace": False}, {}),
    F.relu6: ("relu6", {"inplace": False}, {}),
    F.hardtanh: (
        "relu6",
        {"min_val": -1.0, "max_val": 1.0, "inplace": False},
        {"min_val": 0, "max_val": 6},
    ),
    F.leaky_relu: (
        "leaky_relu",
        {"negative_slope": 0.01, "inplace": False},
        {"negative_slope": 0.01},
    ),
    F.silu: ("silu", {"inplace": False}, {}),
    F.gelu: ("gelu", {"approximate": "none"}, {"approximate": "none"}),
    torch.relu: ("relu", {}, {}),
    torch.relu_: ("relu", {}, {}),
    "relu": ("relu", {}, {}),
    "relu_": ("relu", {}, {}),
}
_APPLIED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
}
_SUMS = {operator.add: False, torch.add: False, "add": False, operator.iadd: True, "add_": True}


def activation_of(module: nn.Module | None) -> str | None:
    """Return the name of a module that is an activation we have, or None."""
    name, wanted = _MODULES.get(type(module), (None, {}))
    return name if all(getattr(module, key) == value for key, value in wanted.items()) else None


def activation_called(node: fx.Node, parent: nn.Module) -> str | None:
    """Return the name of the activation that a node applies to its first argument, or None."""
    if node.op == "call_module":
        plain = len(node.args) == 1 and not node.kwargs
        return activation_of(_child(node, parent)) if plain else None
    if node.op not in ("call_function", "call_method") or node.target not in _FUNCTIONS:
        return None
    name, defaults, wanted = _FUNCTIONS[node.target]
    given = {**defaults, **dict(zip(defaults, node.args[1:], strict=False)), **node.kwargs}
    known = given.keys() == defaults.keys() and len(node.args) <= 1 + len(defaults)
    return name if known and all(given[key] == value for key, value in wanted.items()) else None


# ---- the calls of a rewritten forward ----

Activation = nn.Module | str | None


def fused(norm: nn.Module, x: Tensor, activation: Activation) -> Tensor:
    """Return activation(norm(x)), in one call if nobody could tell."""
    name = _fusible(norm, activation)
    if name is not None:
        return norm(x, activation=name)  # type: ignore[no-any-return]
    return _apply(activation, norm(x))


def fused_sum(
    norm: nn.Module, x: Tensor, residual: Any, in_place: bool, activation: Activation
) -> Tensor:
    """Return activation(norm(x) + residual), in one call if nobody could tell."""
    name = _fusible(norm, activation)
    if name is not None and _are_alike(x, residual):
        return norm(x, residual, activation=name or None)  # type: ignore[no-any-return]
    return _apply(activation, _add(norm(x), residual, in_place))


def fused_function(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    residual: Any,
    in_place: bool,
    activation: Activation,
    **options: Any,
) -> Tensor:
    """Return activation(F.batch_norm(x, ...) + residual), in one call if nobody could tell.

    A residual of None is none.
    """
    name = _name_of(activation)
    if name is not None and (residual is None or _are_alike(x, residual)):
        options = {**options, "residual": residual, "activation": name or None}
        return batch_norm(x, mean, variance, **options)
    y = batch_norm(x, mean, variance, **options)
    return _apply(activation, y if residual is None else _add(y, residual, in_place))


def _fusible(norm: nn.Module, activation: Activation) -> str | None:
    """Return the name of the activation, "" for none, or None where the calls must stay apart."""
    return None if not isinstance(norm, Extended) or why_not(norm) else _name_of(activation)


def _name_of(activation: Activation) -> str | None:
    if _any_global_hook():
        return None
    if isinstance(activation, nn.Module):
        return None if is_watched(activation) else activation_of(activation)
    return activation or ""


def _add(y: Tensor, residual: Any, in_place: bool) -> Tensor:
    if in_place:
        y += residual
        return y
    return y + residual  # type: ignore[no-any-return]


def _apply(activation: Activation, y: Tensor) -> Tensor:
    if isinstance(activation, nn.Module):
        return activation(y)  # type: ignore[no-any-return]
    return y if activation is None else _APPLIED[activation](y)


def _are_alike(x: Any, residual: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


def why_not(norm: nn.Module) -> str:
    """Say what in a batch norm itself forbids that its call does more than it, or ""."""
    if "forward" in vars(norm):
        return "its forward is an attribute of its own"
    if is_watched(norm):
        return "it has hooks, which would see other values"
    if getattr(norm, "activation", None) is not None:
        return f"it has an activation already, {norm.activation}"
    return ""


def _any_global_hook() -> bool:
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


# ---- the pattern ----


class Call(NamedTuple):
    """One call of a batch norm in a graph: what goes into it, or why not (more)."""

    norm: nn.Module | None  # None is F.batch_norm
    residual: bool
    activation: str | None
    reason: str


def fold(graph: fx.Graph, parent: nn.Module, is_norm: Callable[[nn.Module], bool]) -> list[Call]:
    """Fold what can be folded in a graph of a parent's forward; return all calls of batch norms."""
    calls = []
    for node in list(graph.nodes):
        if node.op == "call_module" and is_norm(_child(node, parent)):
            norm = _child(node, parent)
            reason = why_not(norm)
            if len(node.args) != 1 or node.kwargs:
                reason = "it is called with more than its input"
            told = (False, None, reason) if reason else _fold_one(graph, parent, node)
            calls.append(Call(norm, *told))
        elif _is_function(node):
            calls.append(Call(None, *_fold_one(graph, parent, node)))
    return calls


def _is_function(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is F.batch_norm and len(node.args) == 3


def skip_identities(graph: fx.Graph, parent: nn.Module) -> tuple[nn.Module, ...]:
    """Take the calls of nn.Identity out of a graph; return those modules."""
    skipped = []
    for node in list(graph.nodes):
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            child = _child(node, parent)
            if type(child) is nn.Identity and not is_watched(child):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
                skipped.append(child)
    return tuple(skipped)


def _fold_one(graph: fx.Graph, parent: nn.Module, node: fx.Node) -> tuple[bool, str | None, str]:
    """Fold what follows a call of a batch norm; return what a Call says of it."""
    last, residual, in_place, reason = _sum_after(node, parent)
    activation, name, why = _activation_after(last, parent)
    found = residual is not None, name, reason or why
    if node.op == "call_module" and activation is None and residual is None:
        return found
    with graph.inserting_before(node if residual is None else last):
        by: Any = name
        if activation is not None and activation.op == "call_module":
            by = graph.get_attr(str(activation.target))
        if node.op == "call_function":
            arguments = (*node.args, residual, in_place, by)
            new = graph.call_function(fused_function, arguments, node.kwargs)
        elif residual is None:
            ours = graph.get_attr(str(node.target))
            new = graph.call_function(fused, (ours, node.args[0], by))
        else:
            ours = graph.get_attr(str(node.target))
            new = graph.call_function(fused_sum, (ours, node.args[0], residual, in_place, by))
    (activation or last).replace_all_uses_with(new)
    for old in (activation, last if residual is not None else None, node):
        if old is not None:
            graph.erase_node(old)
    return found


def _sum_after(node: fx.Node, parent: nn.Module) -> tuple[fx.Node, fx.Node | None, bool, str]:
    """Return the last node of norm(x) + residual, the residual, how they are added; or why not."""
    user = _only_user(node)
    if user is None or not _is_sum(user):
        return node, None, False, ""
    first, second = user.args
    other, in_place = (second if first is node else first), _SUMS[user.target]
    if not isinstance(other, fx.Node) or other is node:
        return node, None, False, "what is added to it is no other tensor"
    if in_place and first is not node:
        return node, None, False, "it is added in place to another tensor"
    reason = _obstacle(node, user, parent) or _change_after(user, other, parent)
    return (node, None, False, reason) if reason else (user, other, in_place, "")


def _is_sum(node: fx.Node) -> bool:
    called = node.op in ("call_function", "call_method")
    return called and node.target in _SUMS and len(node.args) == 2 and not node.kwargs


def _activation_after(node: fx.Node, parent: nn.Module) -> tuple[fx.Node | None, str | None, str]:
    """Return the activation of a node's value and its name; or why there is none."""
    user = _only_user(node)
    if user is not None and user.target in (fused_sum, fused_function):
        return None, None, "it is the residual of another"
    if user is None:
        return None, None, "its output is used more than once" if node.users else "it is unused"
    name = activation_called(user, parent) if user.args and user.args[0] is node else None
    if name is None:
        return None, None, f"{_shown(user, parent)} follows"
    if user.op == "call_module" and is_watched(_child(user, parent)):
        return None, None, f"{user.target!r} has hooks, which would not run"
    return user, name, ""


def _child(node: fx.Node, parent: nn.Module) -> nn.Module:
    return parent.get_submodule(str(node.target))


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _shown(node: fx.Node, parent: nn.Module) -> str:
    if node.op == "output":
        return "the end of forward"
    if node.op == "call_module":
        kind = type(_child(node, parent)).__name__
        return f"{kind} {node.target!r}"
    return str(getattr(node.target, "__name__", node.target))


def openable(graph: fx.Graph, parent: nn.Module, is_norm: Callable[[nn.Module], bool]) -> set[str]:
    """Return the paths of the Sequentials whose last module is a batch norm, before a sum.

    The sum can be folded into it when the graph holds what the Sequential does.
    """
    found: set[str] = set()
    for node in graph.nodes:
        user = _only_user(node)
        if node.op == "call_module" and user is not None and _is_sum(user):
            path, paths = str(node.target), set()
            while is_sequential(last := parent.get_submodule(path)) and len(last):
                paths.add(path)
                path = f"{path}.{next(reversed(last._modules))}"
            found |= paths if is_norm(last) else set()
    return found


def is_sequential(module: nn.Module) -> TypeGuard[nn.Sequential]:
    plain = inspect.unwrap(type(module).forward) is nn.Sequential.forward
    return plain and not is_watched(module)


# ---- whether a call may wait ----


def _obstacle(node: fx.Node, until: fx.Node, parent: nn.Module) -> str:
    """Say what forbids that a batch norm is called only where its output is added, or "".

    Nothing in between may change its input or its parameters, or call it, whose running
    statistics would be updated in another order.
    """
    norm = _child(node, parent) if node.op == "call_module" else None
    x = node.args[0]
    own = norm is not None and isinstance(x, fx.Node) and _is_fresh(x, parent) and len(x.users) == 1
    for between in _between(node, until):
        if norm is None and (between.op == "call_module" or between.target is F.batch_norm):
            # The running statistics are arguments, and might be anybody's.
            return f"{_shown(between, parent)} might change its statistics before the sum"
        if between.op == "get_attr":
            if str(between.target).startswith(f"{node.target}."):
                return "its parameters are read before the sum"
        elif between.op == "call_module" and _calls(parent, between, norm):
            return "it is called once more before the sum"
        elif not own and _may_write(between, parent):
            return f"{_shown(between, parent)} might change its input before the sum"
    return ""


def _change_after(node: fx.Node, residual: fx.Node, parent: nn.Module) -> str:
    """Say what changes the residual in place after the sum, or "": backward still needs it."""
    for later in _between(node, None):
        if residual in later.all_input_nodes and later.op != "output":
            opaque = later.op == "call_module" and list(_child(later, parent).children())
            if not opaque and _may_write(later, parent):
                return f"{_shown(later, parent)} might change its residual after the sum"
    return ""


def _between(first: fx.Node, last: fx.Node | None) -> Iterator[fx.Node]:
    node = first.next
    while node is not last and node.op != "root":
        yield node
        node = node.next


def _calls(parent: nn.Module, node: fx.Node, norm: nn.Module | None) -> bool:
    return any(m is norm for m in _child(node, parent).modules())


def _is_fresh(node: fx.Node, parent: nn.Module) -> bool:
    """Say whether a value lies in memory of its own: that of a layer which computes it anew."""
    if node.op != "call_module":
        return False
    kind = type(_child(node, parent))
    layers = ("torch.nn.modules.conv", "torch.nn.modules.linear")
    return kind.__module__ in layers and kind is not nn.Identity


def _may_write(node: fx.Node, parent: nn.Module) -> bool:
    """Say whether a node might change one of its inputs, or what shares memory with it."""
    if node.op == "call_module":
        modules = list(_child(node, parent).modules())
        return not all(_is_known(m) and not getattr(m, "inplace", False) for m in modules)
    if node.op == "call_method":
        return str(node.target).endswith("_")
    function: Any = node.target
    writes = function.__name__.endswith("_") or node.kwargs.get("inplace") or "out" in node.kwargs
    return bool(writes) or not (function in _PURE or _is_of_torch(function))


_PURE = {operator.add, operator.sub, operator.mul, operator.truediv, operator.neg}
_PURE |= {operator.getitem, getattr, fused, fused_sum, fused_function}


def _is_of_torch(function: Any) -> bool:
    home = (getattr(function, "__module__", None) or "").partition(".")[0]
    return home == "torch" or getattr(torch, function.__name__, None) is function


def _is_known(module: nn.Module) -> bool:
    return type(module).__module__.startswith(("torch.nn.modules.", "fusebn.torch."))
