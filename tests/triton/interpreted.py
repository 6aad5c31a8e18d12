"""The kernels in Triton's interpreter, on a CPU, each program in a thread of its own.

The interpreter runs programs one after the other; one that waits for the others would wait for
ever. So here it keeps the number of the running program by thread, and a launch that is cooperative
starts all of them at once, in any order.

Every load and store is watched: it may touch the tensors of its launch alone, and `traffic` counts
how often.
"""

import inspect
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl  # noqa: F401  # where a kernel is, the interpreter looks for it
from triton.runtime import interpreter

from fusebn.triton import _fused as fused
from fusebn.triton import _resident_backward, _resident_forward
from fusebn.triton import _verbs as verbs

__all__ = ["fused", "verbs"]

PATIENCE = 60  # seconds, until a program that waits is taken to wait for ever

_patch = interpreter._patch_lang_tensor


class _WithIndex:
    """Lets range() have the interpreter's numbers, which are arrays of length 1: NumPy 2.4 minds.

    In the one assignment that there is: other programs count meanwhile.
    """

    def __init__(self, scope):
        self.scope = scope

    def set_attr(self, of, name, value):
        self.scope.set_attr(of, name, _as_index if name == "__index__" else value)


def _as_index(number):
    return int(number.handle.data.item())


interpreter._patch_lang_tensor = lambda tensor, scope: _patch(tensor, _WithIndex(scope))


class _ByThread(type(interpreter.interpreter_builder)):
    _thread = threading.local()

    @property
    def grid_idx(self):
        return getattr(self._thread, "index", None)

    @grid_idx.setter
    def grid_idx(self, index):
        self._thread.index = index


vars(interpreter.interpreter_builder).pop("grid_idx", None)
interpreter.interpreter_builder.__class__ = _ByThread


@triton.jit
def _itself(v):
    return v


for module in (_resident_forward, _resident_backward):
    module.opaque = _itself  # assembler, which is not interpreted


# ---- what is loaded and stored ----


class Traffic(NamedTuple):
    """How often each element of a tensor has been touched."""

    loads: np.ndarray
    stores: np.ndarray


class _Watched(NamedTuple):
    start: int
    itemsize: int
    counts: Traffic


_touchable: list[range] = []  # addresses of the tensors that the last launch was given
_watched: list[_Watched] = []
_lock = threading.Lock()


def _span(tensor):
    """Return the addresses of a tensor's elements, and what may lie between them."""
    steps = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = (steps + 1) * tensor.element_size() if tensor.numel() else 0
    return range(tensor.data_ptr(), tensor.data_ptr() + size)


_on_host = interpreter.GridExecutor._init_args_hst


def _noting(self, arguments, options):
    on_host = _on_host(self, arguments, options)
    values = (*on_host[0], *on_host[1].values())
    _touchable[:] = [_span(of) for of in values if isinstance(of, torch.Tensor)]
    return on_host


interpreter.GridExecutor._init_args_hst = _noting


def _watching(method, mask_at, which):
    def touch(self, pointers, *rest):
        mask = np.broadcast_to(rest[mask_at].data.astype(bool), pointers.data.shape)
        at = pointers.data[mask].astype(np.int64)
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        outside = np.ones(at.size, bool)
        for of in _touchable:
            outside &= (at < of.start) | (at + width > of.stop)
        if outside.any():
            raise MemoryError(f"{outside.sum()} addresses of no tensor that was given")
        for start, itemsize, counts in _watched:
            first = (at - start) // itemsize
            with _lock:
                for more in range(max(1, width // itemsize)):
                    mine = (first + more >= 0) & (first + more < counts[which].size)
                    np.add.at(counts[which], first[mine] + more, 1)
        return method(self, pointers, *rest)

    return touch


_builder = interpreter.InterpreterBuilder
_builder.create_masked_load = _watching(_builder.create_masked_load, 0, 0)
_builder.create_masked_store = _watching(_builder.create_masked_store, 1, 1)


@contextmanager
def traffic(*tensors) -> Iterator[list[Traffic]]:
    """Count what the kernels do to dense tensors."""
    counts = [Traffic(*np.zeros((2, of.numel()), int)) for of in tensors]
    for of, counted in zip(tensors, counts, strict=True):
        _watched.append(_Watched(of.data_ptr(), of.element_size(), counted))
    yield counts
    _watched.clear()


# ---- programs that run at the same time ----


class Together:
    """A kernel whose programs run at the same time."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments, **options: self._run(grid, arguments, options)

    def _run(self, grid, arguments, options):
        assert options.pop("launch_cooperative_grid")
        del options["num_warps"]
        launch = interpreter.GridExecutor(self.kernel.fn, self.kernel.arg_names, grid)
        on_host, options_on_host = launch._init_args_hst(arguments, options)
        undo = interpreter._patch_lang(launch.fn)
        failed = []
        try:
            bound = inspect.getcallargs(launch.fn, *on_host, **options_on_host)
            bound = {
                name: of if name in launch.constexprs else interpreter._implicit_cvt(of)
                for name, of in bound.items()
            }
            interpreter.interpreter_builder.set_grid_dim(*grid, 1, 1)

            def program(number):
                try:
                    interpreter.interpreter_builder.set_grid_idx(number, 0, 0)
                    launch.fn(**bound)
                except BaseException as error:
                    failed.append(error)

            threads = [
                threading.Thread(target=program, args=(number,), daemon=True)
                for number in range(grid[0])
            ]
            random.Random(grid[0]).shuffle(threads)
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE)
            if failed:
                raise failed[0]
            if any(thread.is_alive() for thread in threads):
                raise TimeoutError("a program waits for ever")
        finally:
            undo.restore()
        launch._restore_args_dev(arguments, on_host, options, options_on_host)


verbs.forward_kernel = Together(_resident_forward.forward_kernel)
verbs.gradient_kernel = Together(_resident_backward.gradient_kernel)


def serve_tensors_of_the_cpu():
    """Have the adapter for PyTorch take them for a CUDA device's, from now on."""
    from fusebn.torch import _batch_statistics, _gpu, _ops

    _gpu.serves = lambda x: x.is_cpu
    # What is shorter on a CPU, and asks for nothing but that.
    _ops.short_way = lambda *_: None
    _batch_statistics._short_way = _batch_statistics._long_way
