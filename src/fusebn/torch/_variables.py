"""The transforms of a layer, and its variables as these have them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusebn import _transforms
from fusebn._quantization import choose
from fusebn._transforms import VARIABLES, Transform
from fusebn.torch._array_ops import array_ops


class Transforms(torch.nn.Module):
    """Functions by the names of the variables they transform: a mapping that keeps its modules.

    A function that is a module is a child, of the name of its variable, with all that this means:
    its parameters are the layer's, and its buffers are saved.
    """

    def __init__(self, functions: Mapping[str, Callable[..., Tensor]]) -> None:
        super().__init__()
        self._functions = {}
        for name in VARIABLES:
            function = functions.get(name)
            if isinstance(function, torch.nn.Module):
                self.add_module(name, function)
            elif function is not None:
                self._functions[name] = function

    def get(self, name: str) -> Any:
        """Return the function of a variable, or None."""
        module = self._modules.get(name)
        return self._functions.get(name) if module is None else module

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return self.get(name)

    def keys(self) -> list[str]:
        """Return the names of the variables that are transformed."""
        return [name for name in VARIABLES if self.get(name) is not None]

    def items(self) -> list[tuple[str, Any]]:
        """Return the names and their functions."""
        return [(name, self.get(name)) for name in self.keys()]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def state(self) -> Iterator[Tensor]:
        """Yield the tensors in which modules write down what they observed."""
        for module in self._modules.values():
            if module is not None and _has_state(module):
                yield from module.buffers()

    def extra_repr(self) -> str:
        """Return the functions that are no modules, which are shown as children."""
        return "\n".join(f"({name}): {function!r}" for name, function in self._functions.items())


Mapping.register(Transforms)


def _has_state(transform: Any) -> bool:
    return getattr(transform, "has_state", True)


class Through(NamedTuple):
    """What stands between a layer's variables and what normalizes, in one call."""

    operation: str
    transforms: Transforms
    active: Any  # a bool, or a boolean tensor of rank 0
    training: bool  # whether transforms with a state observe

    def __call__(self, name: str, vector: Tensor | None) -> Any:
        """Return a variable as it is to normalize."""
        return _transforms.apply(
            array_ops,
            self.operation,
            self.transforms,  # type: ignore[arg-type]  # registered as a mapping
            name,
            vector,
            self.active,
            self.training,
        )

    def wholly(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a step that leaves the states of the transforms as they are if it raises."""
        # A program writes nothing before it is through.
        if not self.training or torch.compiler.is_compiling():
            return step

        def whole(*arguments: Any) -> Tensor:
            before = [(buffer, buffer.clone()) for buffer in self.transforms.state()]
            try:
                return step(*arguments)
            except BaseException:
                for buffer, value in before:
                    buffer.data = value  # its shape, too
                raise

        return whole

    def observe(self, mean: Tensor | None, variance: Tensor | None) -> None:
        """Show running statistics that do not normalize to the transforms with a state."""
        unused = self._replace(active=False)
        for name, vector in (("moving_mean", mean), ("moving_variance", variance)):
            transform = self.transforms.get(name)
            if isinstance(transform, Transform) and _has_state(transform):
                unused(name, vector)

    def of_batch(self, mean: Tensor, variance: Tensor, stat: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return a batch's statistics as they are to normalize, in float64.

        Transforms get them in the type of statistics; untransformed they are not rounded.
        """
        used = []
        for name, exact in (("moving_mean", mean), ("moving_variance", variance)):
            if self.transforms.get(name) is not None:
                new = self(name, exact.to(stat)).double()
                exact = choose(array_ops, self.active, new, exact)
            used.append(exact)
        return used[0], used[1]
