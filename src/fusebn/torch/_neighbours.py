"""Which linear layer stands beside each batch norm of a model, and alone with it.

Every forward of a model is traced, with the plain Sequentials in it opened up. A layer and a batch
norm belong together if, wherever either is called, what passes between them goes from the one to
the other and nowhere else. So a pair may be called more than once.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import fx, nn

from fusebn.torch import _folding, modules, sync
from fusebn.torch._planning import MODES, in_mode, unplanned, walk
from fusebn.torch._tracing import Refusal, Trace, is_watched, trace

_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(modules.BatchNorm1d, modules.BatchNorm2d, modules.BatchNorm3d, sync.SyncBatchNorm),
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


# ---- the calls in a model ----


class Call(NamedTuple):
    """One call of a module, in the forward of a parent."""

    node: fx.Node
    parent: nn.Module

    @property
    def x(self) -> fx.Node | None:
        """The node of the first argument."""
        first = self.node.args[0] if self.node.args else None
        return first if isinstance(first, fx.Node) else None

    @property
    def is_plain(self) -> bool:
        """Whether nothing is handed over but the input."""
        return len(self.node.args) == 1 and not self.node.kwargs

    def callee(self, node: fx.Node | None) -> nn.Module | None:
        """Return the module that a node of the same graph calls, if it does."""
        if node is None or node.op != "call_module":
            return None
        return self.parent.get_submodule(str(node.target))

    def reader(self) -> fx.Node | None:
        """Return the only call that takes what this one returns, and takes it once, or None."""
        if len(self.node.users) != 1:
            return None
        (user,) = self.node.users
        inputs: list[fx.Node] = []
        fx.node.map_arg((user.args, user.kwargs), inputs.append)
        return user if inputs.count(self.node) == 1 and user.args[:1] == (self.node,) else None


class _Calls:
    """The calls that the forwards of a model make, in these modes, where they can be traced."""

    def __init__(self, model: nn.Module, modes: tuple[bool, ...]) -> None:
        self.of: dict[nn.Module, list[Call]] = {}
        self.read: set[nn.Module] = set()  # modules whose tensors a forward reads itself
        self.refusals: dict[str, str] = {}
        opened: set[nn.Module] = set()
        for name, module, closed in walk(model):
            if not closed and module not in opened and _is_parent(module):
                inside = tuple(_sequentials(module))
                try:
                    for found in list(_traces(module, inside, modes)):
                        self._take(found.graph, module)
                    opened |= {*inside}
                except Refusal as refusal:
                    self.refusals[name] = str(refusal)

    def _take(self, graph: fx.Graph, parent: nn.Module) -> None:
        _folding.skip_identities(graph, parent)
        for node in graph.nodes:
            call = Call(node, parent)
            if (module := call.callee(node)) is not None:
                self.of.setdefault(module, []).append(call)
            elif node.op == "get_attr":
                self.read.add(parent.get_submodule(str(node.target).rpartition(".")[0]))

    def why_unseen(self, name: str) -> str:
        """Say why no graph has a call of a module."""
        while name:
            name = name.rpartition(".")[0]
            if name in self.refusals:
                forward = f"forward of {name!r}" if name else "forward of the model"
                return f"{forward} cannot be traced: {self.refusals[name]}"
        return "no forward that was traced calls it"


def _is_parent(module: nn.Module) -> bool:
    """Say whether a forward may call layers and batch norms; these have transforms at most."""
    single = (nn.modules.batchnorm._BatchNorm, nn.modules.conv._ConvNd, nn.Linear)
    own = type(module).forward is not nn.Module.forward
    return own and any(module.children()) and not isinstance(module, single)


def _sequentials(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the Sequentials in a module that it calls itself, or that one of them calls."""
    for child in module.children():
        if _folding.is_sequential(child):
            yield child
            yield from _sequentials(child)
        elif not _is_parent(child):  # a list of modules
            yield from _sequentials(child)


def _traces(
    module: nn.Module, opened: tuple[nn.Module, ...], modes: tuple[bool, ...]
) -> Iterator[Trace]:
    if reason := unplanned(module):
        raise Refusal(reason)
    for training in modes:
        with in_mode(module, training):
            try:
                found = trace(module, opened)
            except Refusal as refusal:
                raise Refusal(f"in {MODES[training]}, {refusal}") from None
            yield found
            if found.by_type:
                with contextlib.suppress(Refusal):  # it may be for tensors alone
                    yield trace(module, opened, list)


# ---- pairs ----


class Neighbour(NamedTuple):
    """A batch norm and the layer beside it; or why there is none."""

    name: str
    norm: nn.Module
    layer: nn.Module | None
    layer_name: str | None
    before: bool  # the batch norm is before the layer, rather than after it
    calls: tuple[Call, ...]  # of the batch norm
    reason: str


class _No(Exception):
    """There is no such layer; says why."""


class Neighbours:
    """What stands beside the batch norms of a model, in these modes."""

    def __init__(
        self,
        model: nn.Module,
        layers: tuple[type, ...] = LAYERS,
        modes: tuple[bool, ...] = (False,),
    ) -> None:
        self.model = model
        self.layers = layers
        self.calls = _Calls(model, modes)
        self.names = {module: name for name, module, _ in walk(model)}
        self.owners: dict[nn.Parameter, set[nn.Module]] = {}
        for module in self.names:
            for tensor in module._parameters.values():
                if tensor is not None:
                    self.owners.setdefault(tensor, set()).add(module)

    def find(self, before: bool = False) -> list[Neighbour]:
        """Return every batch norm, with the layer that it comes after, or why there is none.

        With `before`, where there is none, the layer that it comes before.
        """
        norm = nn.modules.batchnorm._BatchNorm
        return [self._of(*each, before) for each in walk(self.model) if isinstance(each[1], norm)]

    def _of(self, name: str, norm: nn.Module, closed: str, before: bool) -> Neighbour:
        reason = closed or _why_not_norm(norm)
        if not reason and norm not in self.calls.of:
            reason = self.calls.why_unseen(name)
        if not reason and norm in self.calls.read:
            reason = "a forward reads its parameters or statistics"
        if not reason and any("transforms_active" in c.node.kwargs for c in self.calls.of[norm]):
            reason = "whether its transforms are active is said in its call"
        if reason:
            return Neighbour(name, norm, None, None, False, (), reason)
        reasons = []
        for first in (False, True) if before else (False,):
            try:
                layer = self._beside(norm, first)
            except _No as no:
                reasons.append(str(no))
            else:
                calls = tuple(self.calls.of[norm])
                return Neighbour(name, norm, layer, self.names[layer], first, calls, "")
        return Neighbour(name, norm, None, None, False, (), "; ".join(reasons))

    def _beside(self, norm: nn.Module, before: bool) -> nn.Module:
        """Return the layer that every call of a batch norm is beside, and no other call."""
        place = "after" if before else "before"
        nodes = [call.reader() if before else call.x for call in self.calls.of[norm]]
        found = {
            call.callee(node): node for call, node in zip(self.calls.of[norm], nodes, strict=True)
        }
        if len(found) > 1:
            raise _No(f"what is {place} it differs from call to call")
        ((layer, node),) = found.items()
        if layer is None or node is None:
            raise _No("its output goes elsewhere too" if before else "no layer is right before it")
        shown = repr(self.names[layer])
        if type(layer) not in self.layers:
            raise _No(f"{type(layer).__name__} {shown} is right {place} it")
        first, second = (norm, layer) if before else (layer, norm)
        if any(call.callee(call.reader()) is not second for call in self.calls.of[first]):
            raise _No(f"the output of {self.names[first]!r} goes elsewhere too")
        if any(call.callee(call.x) is not first for call in self.calls.of[second]):
            raise _No(f"{self.names[second]!r} has another input too")
        reason = self._why_not_layer(layer) or _why_apart(norm, layer, before)
        if not reason and before and not _is_bare(norm, self.calls.of[norm]):
            reason = "it does more than normalize"
        if reason:
            raise _No(reason.format(shown))
        return layer

    def _why_not_layer(self, layer: nn.Module) -> str:
        """Say what in a layer, {}, forbids that it takes over a batch norm, or ""."""
        if is_watched(layer) or "forward" in vars(layer):
            return "{} has hooks, or a forward of its own"
        if layer in self.calls.read:
            return "a forward reads the parameters of {}"
        for key, tensor in layer._parameters.items():
            others = set() if tensor is None else self.owners[tensor] - {layer}
            if others:
                other = min(self.names[each] for each in others)
                return f"the {key} of {{}} is that of {other!r} too"
        return ""


def _why_not_norm(norm: Any) -> str:
    """Say what in a batch norm forbids that a layer takes it over, or ""."""
    if isinstance(norm, nn.modules.lazy.LazyModuleMixin):
        return "it has no channels yet: call the model once"
    if type(norm) not in _NORMS:
        return "its class is not PyTorch's own"
    if is_watched(norm) or "forward" in vars(norm):
        return "it has hooks, or a forward of its own"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics: every batch is normalized by its own"
    return ""


def _is_bare(norm: nn.Module, calls: Iterable[Call]) -> bool:
    return getattr(norm, "activation", None) is None and all(call.is_plain for call in calls)


def _why_apart(norm: Any, layer: Any, before: bool) -> str:
    """Say what between a batch norm and a layer, {}, keeps them apart, or ""."""
    if isinstance(layer, nn.Linear):
        channels = layer.in_features if before else layer.out_features
    else:
        channels = layer.in_channels if before else layer.out_channels
    if norm.num_features != channels:
        return f"it has {norm.num_features} channels, and {{}} {channels}"
    axis = getattr(norm, "axis", 1)
    if isinstance(layer, nn.Linear):
        if axis not in (1, -1):
            return f"its axis is {axis}, and {{}} has its channels last"
    elif axis % (2 + len(layer.kernel_size)) != 1:
        return f"its axis is {axis}, and {{}} has its channels second"
    if before and isinstance(layer, TRANSPOSED):
        return "{} is transposed: its borders see less of what the batch norm shifts"
    if before and not isinstance(layer, nn.Linear) and _pads_zeros(layer):
        return "{} pads with zeros, which the batch norm would shift"
    return ""


def _pads_zeros(layer: nn.modules.conv._ConvNd) -> bool:
    return layer.padding_mode == "zeros" and any(layer._reversed_padding_repeated_twice)


def rank_between(norm: Any, layer: Any) -> int | None:
    """Return the rank that what passes between them must have; None where no other is possible.

    PyTorch's batch norms take axis 1 for the channels. After a layer whose input may have a batch
    or not, or more than one, that may be another axis than the layer's.
    """
    if isinstance(layer, nn.Linear):
        return 2 if getattr(norm, "axis", 1) == 1 else None
    kernel = len(layer.kernel_size)
    return 2 + kernel if kernel == 1 or isinstance(norm, nn.SyncBatchNorm) else None


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, in its mode."""
    new.train(old.training)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
