"""A peer in a process of its own, called turn by turn.

Frameworks do not share a process well: each brings its threads, and the memory allocator is chosen
when a process starts. A worker stays alive, so that its turns can alternate with everybody else's.

But it stands still until it is asked: thread pools that look for their next job, some for a tenth
of a second, would take the cores from whoever has the next turn.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe
from typing import Any

import fusebn
from fusebn.cli.bench.answers import Answer, sampled
from fusebn.cli.bench.cases import Case, Verb, data_of
from fusebn.cli.bench.peers import Peer, create
from fusebn.cli.bench.suites import Step
from fusebn.cli.bench.timing import turn

# How a peer gets its memory. "warm" is its best case: what it frees is handed out again, as huge
# pages, instead of going back to the system and coming again page by page.
MEMORY = {
    "fresh": {},
    "warm": {
        "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"
        ":glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1",
        "THP_MEM_ALLOC_ENABLE": "1",
    },
}


def memories() -> tuple[str, ...]:
    """Return the kinds of memory that can be had here: the recycling allocator is glibc's."""
    return ("warm", "fresh") if platform.libc_ver()[0] == "glibc" else ("fresh",)


# Only where a stopped process can be told to end with the one that started it.
CAN_STOP = sys.platform == "linux"
_PR_SET_PDEATHSIG = 1  # of prctl(2)


class Unable(Exception):
    """What a peer cannot do, and why."""


class Worker:
    """The near end: one peer with one kind of memory."""

    def __init__(
        self, peer: str, memory: str, threads: int, environment: Mapping[str, str] | None = None
    ) -> None:
        self.peer, self.memory, self.version = peer, memory, ""
        self._pipe, far = Pipe()
        command = [sys.executable, "-m", __name__, str(far.fileno()), peer, str(threads)]
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **quiet, **MEMORY[memory], **(environment or {})},
            pass_fds=[far.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        far.close()

    def wait(self) -> None:
        """Wait until the peer is imported."""
        self.version = self._receive()
        self._stand_still()

    def load(self, case: Case) -> None:
        """Have the peer make its own copy of the data."""
        self._ask("load", (case,))

    def prepare(self, verb: Verb | Step, *, keep: bool = False) -> Answer | None:
        """Make turns of a verb possible; return its answer where it is checked, or None.

        What was prepared before is let go, memory and all, unless told to `keep` it.
        """
        answer: Answer | None = self._ask("prepare", (verb, keep))
        return answer

    def turn(self, verb: Verb | Step, count: int) -> float:
        """Return the median seconds of some calls."""
        seconds: float = self._ask("turn", (verb, count))
        return seconds

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()

    def _ask(self, action: str, arguments: tuple[object, ...]) -> Any:
        try:
            self._go_on()
            self._pipe.send((action, arguments))
        except OSError:
            raise Unable("its process has ended") from None
        try:
            return self._receive()
        finally:
            self._stand_still()

    def _stand_still(self) -> None:
        if CAN_STOP:
            self._process.send_signal(signal.SIGSTOP)

    def _go_on(self) -> None:
        if CAN_STOP:
            self._process.send_signal(signal.SIGCONT)

    def _receive(self) -> Any:
        try:
            fine, value = self._pipe.recv()
        except (EOFError, OSError):
            raise Unable("its process has ended") from None
        if not fine:
            raise Unable(value)
        return value


@contextmanager
def started(
    pairs: Sequence[tuple[str, str]], environment: Mapping[str, str] | None = None
) -> Iterator[list[Worker]]:
    """Start workers, each a peer with one kind of memory, and end them whatever happens."""
    workers: list[Worker] = []
    try:
        for peer, memory in pairs:
            workers.append(Worker(peer, memory, fusebn.get_num_threads(), environment))
        yield workers
    finally:
        for worker in workers:
            worker.close()


class _Desk:
    """The far end: what a peer does when asked."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._case: Case | None = None
        self._calls: dict[Verb | Step, Callable[[], object]] = {}

    def load(self, case: Case) -> None:
        self._case = None
        self._calls.clear()
        self._peer.load(case, data_of(case))
        self._case = case

    def prepare(self, verb: Verb | Step, keep: bool) -> Answer | None:
        if self._case is None:
            raise ValueError("no data")
        if not keep:
            self._calls.clear()
        call = self._peer.call(verb)
        if call is None:
            return None
        answer = sampled(self._peer.answer(verb, call()), self._case)
        self._calls[verb] = call
        return answer

    def turn(self, verb: Verb | Step, count: int) -> float:
        return turn(self._calls[verb], count)


def _serve(pipe: Connection, name: str, threads: int) -> None:
    if CAN_STOP:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if hasattr(os, "sched_setaffinity"):
        # Not every framework takes a number of threads; each counts the cores it may use.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    try:
        peer = create(name, threads)
    except Exception as error:
        pipe.send((False, f"{type(error).__name__}: {error}"))
        return
    desk = _Desk(peer)
    pipe.send((True, peer.version))
    while True:
        try:
            action, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(desk, action)(*arguments)))
        except Exception as error:  # whatever a framework raises is an answer: it cannot
            pipe.send((False, f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), sys.argv[2], int(sys.argv[3]))
