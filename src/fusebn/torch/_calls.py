"""What a forward of ours asks about its call."""

from typing import Any

import torch
from torch import Tensor

from fusebn import _spec


def is_recomputation() -> bool:
    """Say whether this forward repeats one that has been, for the sake of a running backward.

    Activation checkpointing throws away what a forward made and makes it again when backward asks
    for it. That happens in the thread of the backward and within it, with either value of
    ``use_reentrant`` and in whatever else recomputes (reversible networks); a forward of its own
    does not run there. Compilers decide themselves what they recompute.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_symbol(input: Any) -> bool:
    """Say whether torch.fx traces."""
    return isinstance(input, torch.fx.Proxy)


def node(module: torch.nn.Module, tensors: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """Stay one node where torch.fx traces, as PyTorch's own modules do."""
    tracer = tensors[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), tensors, given)


def condition(operation: str, argument: str, value: Any, beside: Tensor | None = None) -> Any:
    """Return a switch: a bool, or a boolean tensor of rank 0, whose value may be known later."""
    if isinstance(value, Tensor) and value.dtype is torch.bool and value.ndim == 0:
        return value if beside is None else value.to(beside.device)
    return _spec.flag(operation, argument, value)
