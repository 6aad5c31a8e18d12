"""What `torch.func` sees of an op.

An op that `torch.library` has given a derivative is refused by the transforms of ``torch.func``:
they ask for an `autograd.Function` that keeps saving apart from computing. So an `Op` is both, and
a call takes the one that fits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# op, how many elements, the axes they lie along, tensors, options -> results, and their axes
Rule = Callable[["Op", int, Any, Any, dict[str, Any]], tuple[tuple[Tensor, ...], Any]]


class Op:
    """An op of `torch.library`, with its derivatives and its rule for vmap.

    `save` and `backward` are what `torch.library.register_autograd` takes; `composite` does what
    the op does with PyTorch's own, for derivatives in forward mode and compiled transforms.
    """

    def __init__(
        self,
        name: str,
        save: Callable[..., None],
        backward: Callable[..., tuple[Tensor | None, ...]],
        composite: Callable[..., tuple[Tensor, ...]],
        rule: Rule,
        library: torch.library.Library,
    ) -> None:
        self._op = getattr(torch.ops.fusebn, name)
        self._composite = composite
        self._function = _function(self, save, backward, composite, rule)

        def mapped(info: Any, in_dims: Any, *tensors: Any, **options: Any) -> Any:
            return rule(self, info.batch_size, in_dims, tensors, options)

        qualified = f"fusebn::{name}"
        torch.library.register_autograd(qualified, backward, setup_context=save, lib=library)
        torch.library.register_vmap(qualified, mapped, lib=library)

    def __call__(self, *tensors: Tensor | None, **options: Any) -> Any:
        """Call the op, by the way that whoever watches understands."""
        transformed = torch._C._are_functorch_transforms_active()
        if torch.compiler.is_compiling():
            # Compilers cannot follow a function that has all these rules.
            way = self._composite if transformed else self._op
            return way(*tensors, **options)
        if transformed and _forward_mode_is_nested():
            # PyTorch takes 0 for the inner derivative of any function that has a jvp of its own.
            return self._composite(*tensors, **options)
        if transformed or forward_ad._current_level >= 0:
            return self._function.apply(*tensors, options)
        return self._op(*tensors, **options)


def _forward_mode_is_nested() -> bool:
    levels = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels) > 1


def pushed_forward(
    composite: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    options: dict[str, Any],
    tangents: Sequence[Tensor | None],
) -> Any:
    """Return what tangents become.

    The backward is linear in what flows into it, and its own backward is the answer: so forward
    mode need not be entered a second time, which PyTorch does not allow.
    https://j-towns.github.io/2017/06/12/A-new-trick.html
    """
    moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

    def of_moving(*values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(moving, values, strict=True))
        return tuple(composite(*(given.get(i, v) for i, v in enumerate(tensors)), **options))

    results, back = torch.func.vjp(  # type: ignore[misc]
        of_moving, *(tensors[i] for i in moving)
    )
    zeros = tuple(torch.zeros_like(result) for result in results)
    _, forth = torch.func.vjp(back, zeros)  # type: ignore[misc]
    (answer,) = forth(tuple(tangents[i] for i in moving))
    return answer


def _function(op: Op, save: Any, backward: Any, composite: Any, rule: Rule) -> Any:
    """Return the op as an autograd.Function of its tensors, and its options as one dict."""
    derivative = backward

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            *tensors, options = arguments
            with forward_ad._set_fwd_grad_enabled(False):
                return op._op(*tensors, **options)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            *tensors, ctx.all_options = inputs
            save(ctx, tensors, ctx.all_options, output)
            ctx.save_for_forward(*tensors)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            return pushed_forward(composite, ctx.saved_tensors, ctx.all_options, tangents[:-1])

        @staticmethod
        def backward(ctx: Any, *flowing: Any) -> Any:
            return *derivative(ctx, *flowing), None

        @staticmethod
        def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
            *tensors, options = arguments
            return rule(op, info.batch_size, in_dims[:-1], tensors, options)

    return Function
