"""The kernels in Triton's interpreter, on a CPU, each program in a thread of its own.

The interpreter runs programs one after the other; one that waits for the others would wait for
ever. So here it keeps the number of the running program by thread, and a launch that is cooperative
starts all of them at once, in any order.
"""

import inspect
import random
import threading

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
