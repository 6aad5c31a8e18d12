"""Kernels on the threads of PyTorch's OpenMP runtime, and what happens where they are of no use."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fusebn.torch
from fusebn import _core
from fusebn.torch import _kernels

pytestmark = pytest.mark.of_the_cpu

SHAPE = (8, 24, 40, 40)  # some tasks in every verb

# void parallel(void (*work)(void*), void* context, unsigned threads, unsigned flags)
Runtime = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
)  # fmt: skip
Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Lender:
    """A runtime whose threads come one after another, and that counts how often it was asked."""

    def __init__(self, come: int = 2) -> None:
        self.asked: list[int] = []
        self.late = 0.0  # seconds until the barrier opens
        self._come = come
        self._pointer = Runtime(self._parallel)

    @property
    def address(self) -> int:
        return ctypes.cast(self._pointer, ctypes.c_void_p).value or 0

    def _parallel(self, work: int, context: int, threads: int, flags: int) -> None:
        assert flags == 0
        self.asked.append(threads)
        for _ in range(self._come):
            Work(work)(context)
        time.sleep(self.late)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def lend(two_threads: None) -> Iterator[Callable[[Lender], Lender]]:
    lenders = []  # alive while they are lent

    def lend(lender: Lender) -> Lender:
        lenders.append(lender)
        _core.lend_threads(lender.address)
        return lender

    yield lend
    _core.lend_threads(_kernels.openmp())


def step(seed: int = 0) -> list[Tensor]:
    """Return y, the statistics and all gradients of a training step."""
    torch.manual_seed(seed)
    x, residual = (torch.randn(SHAPE, requires_grad=True) for _ in range(2))
    module = fusebn.torch.BatchNorm2d(SHAPE[1], activation="relu")
    y = module(x, residual)
    y.backward(torch.randn(SHAPE))
    found = [y, x.grad, residual.grad, module.weight.grad, module.bias.grad]
    return [*(t for t in found if t is not None), module.running_mean, module.running_var]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) == 7
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_pytorchs_runtime_is_found() -> None:
    if "OpenMP" in torch.__config__.parallel_info().split("ATen parallel backend:")[1]:
        assert _kernels.openmp()


@pytest.mark.parametrize("come", [1, 2, 5])
def test_lent_threads_give_the_same_bits(lend: Callable[[Lender], Lender], come: int) -> None:
    pytorchs = step()
    _core.lend_threads(0)
    own = step()
    lender = lend(Lender(come))
    assert_equal(step(), own)
    assert_equal(pytorchs, own)
    # Two verbs forward, two backward; fewer where something else held the machine up.
    assert set(lender.asked) == {2}
    assert len(lender.asked) <= 4


def test_numpy_arrays_stay_on_our_own(lend: Callable[[Lender], Lender]) -> None:
    lender = lend(Lender())
    x = torch.randn(SHAPE).numpy()
    fusebn.fused_batch_norm(x, None, None, data_format="NCHW")
    assert lender.asked == []
    fusebn.fused_batch_norm(torch.from_numpy(x), None, None, data_format="NCHW")
    assert lender.asked


def test_one_thread_asks_nobody(lend: Callable[[Lender], Lender]) -> None:
    lender = lend(Lender())
    torch.set_num_threads(1)
    step()
    assert lender.asked == []


def test_who_was_kept_waiting_works_without_them_for_a_while(
    lend: Callable[[Lender], Lender],
) -> None:
    lender = lend(Lender())
    lender.late = 0.01
    expected = step()
    assert len(lender.asked) == 1  # once bitten
    lender.late = 0
    start = time.monotonic()
    found = step()
    if time.monotonic() - start < 0.1:
        assert len(lender.asked) == 1
    assert_equal(found, expected)
    time.sleep(0.25)
    assert_equal(step(), expected)
    assert len(lender.asked) > 1


def test_a_child_of_a_fork_does_not_use_its_parents_threads(two_threads: None) -> None:
    x = torch.randn(SHAPE)

    def bits() -> bytes:
        # No op of PyTorch's: GCC's OpenMP hangs in a child, and so would they.
        return fusebn.torch.batch_norm(x, None, None, training=True).numpy().tobytes()

    with torch.no_grad():
        expected = bits()
        child = os.fork()
        if child == 0:
            os._exit(0 if bits() == expected else 1)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended == (child, 0)


def test_python_threads_may_call_at_once(two_threads: None) -> None:
    expected = [step(seed) for seed in range(4)]
    x = torch.randn(SHAPE)
    y = torch.nn.functional.batch_norm(x, None, None, training=True)
    wrong = []

    def work() -> None:
        for _ in range(20):
            found = fusebn.torch.batch_norm(x, None, None, training=True)
            if not torch.allclose(found, y, atol=1e-5):
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for seed, before in enumerate(expected):
        assert_equal(step(seed), before)


def lent_in_a_new_process(**environment: str) -> str:
    """Return what is lent when fusebn.torch is imported, and how many threads work then."""
    program = (
        "from fusebn import _core\n"
        "lent = []\n"
        "_core.lend_threads = lent.append\n"
        "import torch, fusebn.torch\n"
        "fusebn.torch.BatchNorm2d(3)(torch.randn(8, 3, 9, 9))\n"
        "pytorchs = [fusebn.torch._kernels.openmp()]\n"
        'print("PyTorch\'s" if lent == pytorchs else lent, _core.get_num_threads())\n'
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


def test_pytorch_lends_its_threads() -> None:
    assert lent_in_a_new_process() == "PyTorch's 2"


def test_the_environments_number_of_threads_is_of_our_own() -> None:
    assert lent_in_a_new_process(FUSEBN_NUM_THREADS="3") == "[] 3"
