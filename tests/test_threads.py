"""The same bits from any number of threads, any caller, any process and, but for v2, any kernel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import cases
import fusebn
from conftest import (
    Array,
    assert_forward,
    assert_gradients,
    assert_moments,
    assert_same_bits,
    away_from_kinks,
    frozen,
    parameters,
    stat,
)
from fusebn import _core
from fusebn import _reference as reference

SETS = _core.instruction_sets()
# Both walks, several runs and chunks, tails in every direction.
BLOCKS = [
    (200_003, 3, 1),
    (10_007, 17, 1),
    (2_001, 257, 1),
    (37, 65, 333),
    (5, 2, 70_001),
    (3, 2048, 49),
]


def everything(
    block: cases.Block, dtype: np.dtype[Any], weighted: bool, activation: str | None
) -> list[Array]:
    """Return what all four verbs make of one block."""
    outer, channels, inner = block
    x, dy, residual = (cases.make("standard_normal", block, dtype, seed) for seed in range(3))
    rng = np.random.default_rng(3)
    scale, offset = parameters(rng, channels, dtype)
    weights = frozen(rng.integers(0, 3, (outer, inner)), stat(dtype)) if weighted else None
    options: dict[str, Any] = {
        "axis": 1, "activation": activation, "residual": residual, "weights": weights,
    }  # fmt: skip
    forward = fusebn.fused_batch_norm(x, scale, offset, **options, correction=0)
    gradients = fusebn.fused_batch_norm_grad(dy, x, scale, offset, *forward[1:], **options)
    inference = fusebn.fused_batch_norm(
        x, scale, offset, offset, np.abs(scale), is_training=False, **options
    )
    return [*forward, *gradients, inference.y, *fusebn.moments(x, (0, 2), weights=weights)]


# --- how many threads -------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize(("weighted", "activation"), [(False, None), (True, "relu")])
def test_same_bits_from_any_number_of_threads(
    block: cases.Block, weighted: bool, activation: str | None, dtype: np.dtype[Any]
) -> None:
    fusebn.set_num_threads(1)
    alone = everything(block, dtype, weighted, activation)
    for count in (2, 3, 8):
        fusebn.set_num_threads(count)
        assert fusebn.get_num_threads() == count
        for a, b in zip(everything(block, dtype, weighted, activation), alone, strict=True):
            assert_same_bits(a, b)


def test_same_bits_again_and_again() -> None:
    fusebn.set_num_threads(4)
    first = everything((10_007, 17, 1), cases.FLOAT32, False, "gelu")
    for _ in range(20):
        again = everything((10_007, 17, 1), cases.FLOAT32, False, "gelu")
        for a, b in zip(again, first, strict=True):
            assert_same_bits(a, b)


def test_the_number_of_threads_is_reported() -> None:
    for count in (1, 5, 2):
        fusebn.set_num_threads(count)
        assert fusebn.info()["threads"] == fusebn.get_num_threads() == count


def in_a_new_process(program: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FUSEBN_")}
    result = subprocess.run(
        [sys.executable, "-c", program], env=clean | environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_environment_sets_the_number_of_threads() -> None:
    program = "import fusebn; print(fusebn.get_num_threads())"
    assert in_a_new_process(program, FUSEBN_NUM_THREADS="3") == "3"
    assert in_a_new_process(program) == str(len(os.sched_getaffinity(0)))
    assert in_a_new_process(program, FUSEBN_NUM_THREADS="") == in_a_new_process(program)


def test_affinity_is_respected() -> None:
    program = (
        "import os\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import fusebn\n"
        "print(fusebn.get_num_threads())\n"
    )
    assert in_a_new_process(program) == "1"


def test_the_environment_sets_the_instruction_set() -> None:
    program = "import fusebn; print(fusebn.info()['instruction_set'])"
    for name in SETS:
        assert in_a_new_process(program, FUSEBN_INSTRUCTION_SET=name) == name
    assert in_a_new_process(program) == SETS[0]


# --- several callers at once ------------------------------------------------------------------


def run_at_once(tasks: list[Callable[[], None]]) -> None:
    """Run the tasks on threads of their own and raise what any of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(tasks))

    def body(task: Callable[[], None]) -> None:
        start.wait()
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a call never came back"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_many_python_threads_call_at_once(count: int) -> None:
    fusebn.set_num_threads(count)
    arguments = [
        ((10_007, 17, 1), cases.FLOAT32, False, None),
        ((37, 65, 333), cases.FLOAT64, True, "silu"),
        ((3, 100, 49), cases.FLOAT16, False, "relu"),
        ((50, 65, 1), cases.BFLOAT16, True, "gelu"),
    ]
    expected = [everything(*a) for a in arguments]

    def task(i: int) -> Callable[[], None]:
        def body() -> None:
            for _ in range(5):
                for a, b in zip(everything(*arguments[i]), expected[i], strict=True):
                    assert_same_bits(a, b)

        return body

    run_at_once([task(i % 4) for i in range(8)])


def test_the_number_of_threads_may_change_during_calls() -> None:
    expected = everything((37, 65, 333), cases.FLOAT32, False, None)
    done = threading.Event()

    def change() -> None:
        count = 0
        while not done.is_set():
            count = count % 5 + 1
            fusebn.set_num_threads(count)
            time.sleep(0.001)

    def compute() -> None:
        try:
            for _ in range(20):
                again = everything((37, 65, 333), cases.FLOAT32, False, None)
                for a, b in zip(again, expected, strict=True):
                    assert_same_bits(a, b)
        finally:
            done.set()

    run_at_once([change, compute])


def test_other_python_threads_run_during_a_call() -> None:
    # While one thread is in a long call, this one goes on, since the lock is released: its longest
    # pause is shorter than the call. A busy machine may pause it all the same, so it tries again;
    # with the lock held, every pause is at least as long as the call.
    fusebn.set_num_threads(1)
    x = np.zeros((1 << 26, 4), np.float32)
    for _ in range(10):
        lasted: list[float] = []

        def call(lasted: list[float] = lasted) -> None:
            start = time.perf_counter()
            fusebn.moments(x, 0)
            lasted.append(time.perf_counter() - start)

        thread = threading.Thread(target=call)
        pause, last = 0.0, time.perf_counter()
        thread.start()
        while thread.is_alive():
            time.sleep(0.0005)
            now = time.perf_counter()
            pause, last = max(pause, now - last), now
        thread.join()
        if pause < lasted[0] / 2:
            return
    raise AssertionError(f"paused for {pause:.3f} s of a call of {lasted[0]:.3f} s")


# --- fork -------------------------------------------------------------------------------------


def in_a_child(body: Callable[[], None]) -> None:
    """Fork; run the body in the child; assert that it ends well, and in time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


# From 3.12 on, Python warns of any fork of a process with threads: the very thing tested here.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_child_computes_the_same_and_so_does_its_parent(count: int) -> None:
    fusebn.set_num_threads(count)
    arguments = (10_007, 17, 1), cases.FLOAT32, False, "relu"
    expected = everything(*arguments)

    def check() -> None:
        assert fusebn.get_num_threads() == count
        for a, b in zip(everything(*arguments), expected, strict=True):
            assert_same_bits(a, b)

    def check_and_fork_again() -> None:
        check()
        in_a_child(check)
        check()

    for _ in range(3):
        in_a_child(check_and_fork_again)
        check()


@pytest.fixture
def busy() -> Iterator[None]:
    """Keep two Python threads inside the core for the time of a test."""
    stop = threading.Event()
    x = cases.make("standard_normal", (10_007, 17, 1), cases.FLOAT32)
    expected = fusebn.fused_batch_norm(x, None, None, axis=1).y.tobytes()
    wrong = []

    def compute() -> None:
        while not stop.is_set():
            if fusebn.fused_batch_norm(x, None, None, axis=1).y.tobytes() != expected:
                wrong.append(1)

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_in_the_middle_of_other_threads_calls(busy: None) -> None:
    fusebn.set_num_threads(3)
    x = cases.make("standard_normal", (37, 65, 333), cases.FLOAT32)
    expected = fusebn.fused_batch_norm(x, None, None, axis=1)

    def check() -> None:
        for _ in range(3):
            actual = fusebn.fused_batch_norm(x, None, None, axis=1)
            for a, b in zip(actual, expected, strict=True):
                assert_same_bits(a, b)

    for _ in range(25):
        in_a_child(check)


def test_a_process_ends_while_threads_wait() -> None:
    program = (
        "import numpy, fusebn\n"
        "fusebn.set_num_threads(4)\n"
        "x = numpy.ones((100000, 8), 'float32')\n"
        "print(fusebn.moments(x, 0)[0][0])\n"
    )
    assert in_a_new_process(program) == "1.0"


# --- instruction sets -------------------------------------------------------------------------


def test_instruction_sets_are_listed_best_first() -> None:
    names = ["x86-64-v4", "x86-64-v3", "x86-64-v2"]
    if any(name.startswith("x86") for name in SETS):
        assert names[names.index(SETS[0]) :] == SETS
    assert len(SETS) >= 1
    assert fusebn.info()["instruction_set"] in SETS


def test_an_unknown_instruction_set_changes_nothing() -> None:
    before = fusebn.info()["instruction_set"]
    for name in ("x86-64-v9", "", "neon2"):
        assert _core.set_instruction_set(name) is False
    assert fusebn.info()["instruction_set"] == before


@pytest.mark.parametrize("block", BLOCKS[1:], ids=str)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_v3_and_v4_agree_to_the_last_bit(
    block: cases.Block, weighted: bool, activation: str | None, dtype: np.dtype[Any]
) -> None:
    names = [name for name in ("x86-64-v3", "x86-64-v4") if name in SETS]
    if len(names) < 2:
        pytest.skip(f"needs x86-64-v3 and v4; this machine runs {SETS}")
    results = []
    for name in names:
        assert _core.set_instruction_set(name)
        results.append(everything(block, dtype, weighted, activation))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("block", [(301, 33, 1), (7, 9, 77), (40, 1, 1), (1, 1, 300)])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_instruction_set_is_right(
    rng: np.random.Generator,
    instruction_set: str,
    activation: str | None,
    block: cases.Block,
    weighted: bool,
    dtype: np.dtype[Any],
) -> None:
    assert _core.set_instruction_set(instruction_set)
    assert fusebn.info()["instruction_set"] == instruction_set
    outer, channels, inner = block
    x, dy, residual = (cases.make("standard_normal", block, dtype, seed) for seed in range(3))
    scale, offset = (frozen(2 * v) for v in parameters(rng, channels, dtype))
    weights = frozen(rng.integers(1, 4, (outer, inner)), stat(dtype)) if weighted else None
    options: dict[str, Any] = {
        "axis": 1, "activation": activation, "residual": residual, "weights": weights,
    }  # fmt: skip
    spread = None if weights is None else weights[:, None]
    assert_moments(fusebn.moments(x, (0, 2), weights=weights), x, (0, 2), spread)
    assert_forward(
        fusebn.fused_batch_norm(x, scale, offset, **options), x, scale, offset, **options
    )
    batch = reference.moments(x, (0, 2), spread)
    statistics = [frozen(v.squeeze((0, 2)), stat(dtype)) for v in (batch.mean, batch.variance())]
    dy = away_from_kinks(dy, x, scale, offset, *statistics, axis=1, residual=residual)
    for is_training in (True, False):
        actual = fusebn.fused_batch_norm_grad(
            dy, x, scale, offset, *statistics, is_training=is_training, **options
        )
        assert_gradients(
            actual, dy, x, scale, offset, *statistics, is_training=is_training, **options
        )


@pytest.mark.parametrize("instruction_set", SETS)
def test_every_half_number_goes_in_and_out_unchanged(instruction_set: str) -> None:
    # With mean 0, variance 1 and epsilon 0, y is x: all 65536 of them, subnormals and infinities.
    assert _core.set_instruction_set(instruction_set)
    zero, one = np.zeros(1), np.ones(1)
    for dtype in (cases.FLOAT16, cases.BFLOAT16):
        x = np.arange(65536, dtype=np.uint16).view(dtype)[:, None]
        y = fusebn.fused_batch_norm(x, None, None, zero, one, 0.0, is_training=False, axis=1).y
        got, want = y.astype(np.float32), x.astype(np.float32)
        nan, zeros = np.isnan(want), want == 0
        assert np.array_equal(np.isnan(got), nan)
        assert ((y.view(np.uint16) == x.view(np.uint16)) | nan | zeros).all()
        assert (got[zeros] == 0).all()  # x - 0 may make -0 a 0


@pytest.mark.parametrize("instruction_set", SETS)
def test_floats_are_rounded_to_halves_like_numpy_does(instruction_set: str) -> None:
    assert _core.set_instruction_set(instruction_set)
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([bits[np.isfinite(bits)], [65519.996, 65520, 3e-8, 2.98e-8, -1e-45]])
    values = values.astype(np.float32)
    channels = values.size
    zero, one = np.zeros(channels), np.ones(channels)
    for dtype in (cases.FLOAT16, cases.BFLOAT16):
        x = np.zeros((1, channels), dtype)
        y = fusebn.fused_batch_norm(x, None, values, zero, one, 0.0, is_training=False, axis=1).y
        with np.errstate(over="ignore", under="ignore"):
            expected = values.astype(dtype)
        assert_same_bits(y[0], expected)
