"""What `torch.func` sees of an op.

An op that `torch.library` has given a derivative is refused by the transforms of ``torch.func``:
they ask for an `autograd.Function` that keeps saving apart from computing. So an `Op` is both, and
a call takes the one that fits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# op, how many elements, the axes they lie along, tensors, options -> results, and their axes
Rule = Callable[["Op", int, Any, Any, dict[str, Any]], tuple[tuple[Tensor, ...], Any]]


class Op:
    """An op of `torch.library`, with its derivative and its rule for vmap.

    `save` and `backward` are what `torch.library.register_autograd` takes.
    """

    def __init__(
        self,
        name: str,
        save: Callable[..., None],
        backward: Callable[..., tuple[Tensor | None, ...]],
        rule: Rule,
        library: torch.library.Library,
    ) -> None:
        self._op = getattr(torch.ops.fusebn, name)
        self._function = _function(self, save, backward, rule)

        def mapped(info: Any, in_dims: Any, *tensors: Any, **options: Any) -> Any:
            return rule(self, info.batch_size, in_dims, tensors, options)

        qualified = f"fusebn::{name}"
        torch.library.register_autograd(qualified, backward, setup_context=save, lib=library)
        torch.library.register_vmap(qualified, mapped, lib=library)

    def __call__(self, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
        """Call the op, by the way that whoever watches understands."""
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            return self._op(*tensors, **options)  # type: ignore[no-any-return]
        return self._function.apply(*tensors, options)  # type: ignore[no-any-return]


def _function(op: Op, save: Any, backward: Any, rule: Rule) -> Any:
    """Return the op as an autograd.Function of its tensors, and its options as one dict."""
    derivative = backward

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:  # type: ignore[override]
            *tensors, options = arguments
            return op(*tensors, **options)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            *tensors, options = inputs
            save(ctx, tensors, options, output)

        @staticmethod
        def backward(ctx: Any, *flowing: Any) -> Any:  # type: ignore[override]
            return *derivative(ctx, *flowing), None

        @staticmethod
        def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:  # type: ignore[override]
            *tensors, options = arguments
            return rule(op, info.batch_size, in_dims[:-1], tensors, options)

    return Function
