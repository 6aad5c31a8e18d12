"""Kernels that do one thing, to learn what a device can do at best.

In Triton, as ours: what these reach, ours could. They take words of 4 bytes, four of them a thread
and load, four loads on their way before the first is used, as the kernels of the library do; and
programs enough that no multiprocessor idles.
"""

import triton
import triton.language as tl

from fusebn.cli.bench.inside import grid_barrier

WARPS = 8
WORDS = 4096  # of a program: 4 loads of 16 bytes for each of its 256 threads

wait_for_all = grid_barrier()


@triton.jit
def copy_kernel(X, Y, size, WORDS: tl.constexpr):
    """Copy X to Y."""
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    tl.store(Y + at, tl.load(X + at, mask=at < size), mask=at < size)


@triton.jit
def read_kernel(X, FOUND, size, programs, times, WORDS: tl.constexpr):
    """Read X some times; keep one word of what a program reads, so that it must.

    Each time another part of it, and past the cache of the multiprocessor (.cg): all that may be
    found again is what the L2 cache holds.
    """
    number = tl.program_id(0)
    found = tl.zeros([WORDS], tl.int32)
    for time in range(times):
        part = (number + time * 61) % programs
        at = part.to(tl.int64) * WORDS + tl.arange(0, WORDS)
        found = tl.maximum(found, tl.load(X + at, mask=at < size, other=0, cache_modifier=".cg"))
    tl.store(FOUND + number, tl.max(found, 0))


@triton.jit
def write_kernel(Y, size, WORDS: tl.constexpr):
    """Write Y."""
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    tl.store(Y + at, at.to(tl.int32), mask=at < size)


@triton.jit
def empty_kernel(X):
    """Do nothing."""


@triton.jit
def barrier_kernel(ARRIVED, rounds, members):
    """Wait for each other so many times."""
    for _ in range(rounds):
        wait_for_all(ARRIVED, tl.program_id(0), members)
