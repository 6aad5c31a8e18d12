"""Recycled buffers: bounded, aligned, and never in two hands."""

import gc
import os
import queue
import random
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

import fusebn
from fusebn import memory

MIB = 1 << 20


@pytest.fixture(autouse=True)
def an_empty_cache() -> Iterator[None]:
    limit = memory.stats()["limit"]
    memory.empty_cache()
    memory.set_limit(256 * MIB)
    yield
    memory.set_limit(limit)
    memory.empty_cache()


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_a_dead_array_is_recycled():
    first = memory.empty((4, MIB))
    where = address(first)
    assert where % (2 * MIB) == 0
    del first
    assert memory.stats()["cached"] == 16 * MIB
    again = memory.empty((16 * MIB,), np.uint8)
    assert address(again) == where
    assert memory.stats()["cached"] == 0


def test_the_last_view_counts():
    before = memory.stats()["in_use"]
    view = memory.empty((4, MIB))[1:2, ::3]
    gc.collect()
    assert memory.stats()["in_use"] == before + 16 * MIB
    del view
    assert memory.stats()["in_use"] == before


def test_small_arrays_are_numpys_own():
    before = memory.stats()
    small = memory.empty((1000,))
    assert small.flags.owndata
    assert memory.stats() == before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_any_type_and_shape(dtype):
    array = memory.empty((3, 700_001, 1), dtype)
    array[:] = 1
    assert array.dtype == np.dtype(dtype)
    assert array.sum(dtype=np.float64) == 3 * 700_001


def test_the_cache_keeps_its_limit_and_drops_the_oldest():
    memory.set_limit(8 * MIB)
    arrays = [memory.empty((n * MIB,), np.uint8) for n in (2, 4, 6)]
    newest = address(arrays[2])
    while arrays:
        del arrays[0]
    assert memory.stats()["cached"] == 6 * MIB
    assert address(memory.empty((6 * MIB,), np.uint8)) == newest


def test_zero_switches_it_off():
    memory.set_limit(0)
    assert memory.stats()["cached"] == 0
    assert memory.empty((4 * MIB,), np.uint8).flags.owndata


def test_the_environment_switches_it_off():
    code = "import fusebn; print(fusebn.memory.stats()['limit'])"
    environment = os.environ | {"FUSEBN_POOL_BYTES": "0"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert result.stdout == b"0\n"
    environment["FUSEBN_POOL_BYTES"] = "-1"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert b"`FUSEBN_POOL_BYTES` must be a number of bytes; got '-1'" in result.stderr


@pytest.mark.parametrize("wrong", [-1, 1.5, "1"])
def test_a_wrong_limit_is_refused(wrong):
    with pytest.raises((TypeError, ValueError), match="set_limit: `bytes` must"):
        memory.set_limit(wrong)
    assert memory.stats()["limit"] == 256 * MIB


def test_outputs_come_from_it():
    x = np.ones((3 * MIB, 1), np.float32)
    fresh = memory.stats()["fresh"]
    for _ in range(4):
        fusebn.fused_batch_norm(x, None, None, axis=1)
    assert memory.stats()["fresh"] == fresh + 1


def test_no_buffer_is_in_two_hands():
    """Threads take buffers, sign them, pass them on to die elsewhere, and check the signature."""
    passed: queue.Queue[tuple[int, np.ndarray] | None] = queue.Queue(maxsize=8)
    wrong: list[int] = []

    def take(seed: int) -> None:
        rng = random.Random(seed)
        for i in range(150):
            array = memory.empty((rng.choice([2, 4, 6]) * MIB // 8,), np.int64)
            signature = seed * 1000 + i
            array[::512] = signature
            if rng.random() < 0.5:
                passed.put((signature, array))
            elif (array[::512] != signature).any():
                wrong.append(signature)

    def bury() -> None:
        while (item := passed.get()) is not None:
            signature, array = item
            if (array[::512] != signature).any():
                wrong.append(signature)

    takers = [threading.Thread(target=take, args=(seed,)) for seed in range(4)]
    buriers = [threading.Thread(target=bury) for _ in range(2)]
    for thread in takers + buriers:
        thread.start()
    for thread in takers:
        thread.join()
    for _ in buriers:
        passed.put(None)
    for thread in buriers:
        thread.join()
    assert not wrong
    assert memory.stats()["cached"] <= 256 * MIB


def test_a_fork_shares_nothing():
    """The child inherits arrays and cache; what it writes and frees is its own."""
    held = memory.empty((4, MIB))
    held[:] = 1
    spare = memory.empty((4, MIB))
    spare[:] = 2
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            memory.empty((2, MIB))

    thread = threading.Thread(target=churn)
    thread.start()
    del spare
    for _ in range(20):
        child = os.fork()
        if child == 0:
            held[:] = 7
            mine = [memory.empty((4, MIB)) for _ in range(2)]
            for array in mine:
                array[:] = 8
            ok = address(mine[0]) != address(mine[1]) != address(held)
            os._exit(0 if ok and (held == 7).all() else 1)
        _, status = os.waitpid(child, 0)
        assert status == 0
        assert (held == 1).all()
    stop.set()
    thread.join()


def test_memory_that_does_not_exist_is_an_error():
    with pytest.raises(MemoryError):
        memory.empty((1 << 50,), np.uint8)
