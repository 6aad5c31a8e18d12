"""How programs of a GPU go through a block `[outer, channels, inner]`: pure arithmetic, no GPU.

A program takes tiles of `tile_rows` x `tile_width` of one group, and what the programs of a group
find is joined at the end. There are two views of a block, and the kernels know both:

    channels last (inner is 1)   rows of fold * channels columns; a group is a strip of the columns
                                 of one tile's width, its tiles lie below each other
    channels first               rows of inner columns; a group is a channel, its tiles cover the
                                 planes of all rows

`fold` rows side by side are one wide row of the same memory. It makes rows of few or odd channels
wide enough for the tile, and begin where 16 bytes can be loaded at once.

Programs take tiles in turns: tile t of part p is number t * parts + p of its group. So at any time
the whole device is at one place of the tensor, and the second pass, walked backwards, begins with
what the first one left in the cache.
"""

from math import gcd
from typing import NamedTuple

# A tile is one load of 16 bytes for each thread. What a thread keeps of it, whatever the size of
# the tensor, is then little, and registers are left for several tiles that are on their way.
_LOAD = 16
WARPS = 8
TILE_BYTES = 32 * WARPS * _LOAD
_WIDEST = 1024  # columns
_WIDE = 512  # enough that a tile is one piece of memory of some lines a row
# Triton loads 16 bytes at once where it sees that rows begin, and data ends, at a multiple of this.
_ALIGNED = 16
# How much of a tile's width must be data for a view to be taken as it comes.
_USED = 0.9
# Programs for each multiprocessor: two hide each other's latency. But where one program joins what
# all of a group found, it should not find much: one, and strips of one line of memory.
_PROGRAMS, _JOINED_PROGRAMS = 2, 1
_LINE = 128


class Plan(NamedTuple):
    """A view of a block, and its division among programs. Sizes in elements."""

    channels: int
    fold: int  # how often the channels stand side by side in a row; 0: channels first
    rows: int  # whole ones
    tail: int  # columns of one row more
    width: int
    stride: int  # from row to row
    tile_rows: int
    tile_width: int
    chunks: int  # tiles side by side
    groups: int
    tiles: int  # of a group
    parts: int  # programs of a group

    @property
    def programs(self) -> int:
        """The size of the grid, which has one axis: only that may be longer than 65535."""
        return self.groups * self.parts

    @property
    def turns(self) -> int:
        """How many tiles a program takes at most."""
        return -(-self.tiles // self.parts)


def plan(
    outer: int, channels: int, inner: int, itemsize: int, processors: int, *, joins: bool
) -> Plan:
    """Divide a block among the programs of a device with so many multiprocessors.

    `joins` says whether the programs find something of their group, and one joins it.
    """
    if inner == 1:
        fold = _fold(outer, channels)
        width = stride = fold * channels
        rows, tail = divmod(outer * channels, width)
    else:
        fold, width, stride = 0, inner, channels * inner
        rows, tail = outer, 0
    tile_width = _tile_width(width)
    if joins and fold == 1:
        tile_width = min(tile_width, _LINE // itemsize)
    most = max(1, TILE_BYTES // itemsize // tile_width)
    tile_rows = min(most, _power_of_two(rows + (tail > 0)))
    chunks = -(-width // tile_width)
    down = -(-(rows + (tail > 0)) // tile_rows)
    groups, tiles = (chunks, down) if fold else (channels, down * chunks)
    programs = (_JOINED_PROGRAMS if joins else _PROGRAMS) * processors
    parts = max(1, min(tiles, -(-programs // groups)))
    return Plan(
        channels,
        fold,
        rows,
        tail,
        width,
        stride,
        tile_rows,
        tile_width,
        chunks,
        groups,
        tiles,
        parts,
    )


def _fold(outer: int, channels: int) -> int:
    """Return how many rows make a wide one."""
    least = _ALIGNED // gcd(channels, _ALIGNED)
    plain = least == 1 and _used(channels) >= _USED
    if plain or channels > _WIDE or least * channels > _WIDEST:
        return 1  # the columns of a folded row are in one group: a tile holds them all

    def fitness(fold: int) -> tuple[bool, bool, int, float]:
        """Whole loads to the end, tiles full of data, then wide enough, then the fullest."""
        width = fold * channels
        aligned = outer * channels % width % _ALIGNED == 0
        return aligned, _used(width) >= _USED, min(width, _WIDE), _used(width)

    return max(range(least, _WIDEST // channels + 1, least), key=fitness)


def _used(width: int) -> float:
    """Return which share of the tiles' columns is data."""
    tile = _tile_width(width)
    return width / (tile * -(-width // tile))


def _tile_width(width: int) -> int:
    """Return the columns of a tile, a power of two."""
    least = _power_of_two(width)
    if least <= _WIDEST:
        return least
    # The widest of which little is beside the data, if there is one.
    wide = (_WIDEST, _WIDEST // 2, _WIDEST // 4)
    full = [tile for tile in wide if width / (tile * -(-width // tile)) >= _USED]
    return full[0] if full else wide[-1]


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


class Residency(NamedTuple):
    """A block held by the programs of a device, strip by strip: see `_resident.py`."""

    strips: int  # of one line of every row
    teams: int  # each with a strip at a time
    members: int  # programs of a team
    held: int  # tiles of a program
    rows: int  # of a tile
    words: int  # of 4 bytes, of a row of a tile

    @property
    def programs(self) -> int:
        """The size of the grid: all of them run at the same time."""
        return self.teams * self.members


# What a program holds at most: more tiles than these do not fit into 255 registers a thread, beside
# what is needed to work on them (found by compiling for compute capability 9.0).
_HELD = (2, 4, 8, 12, 16, 20, 24, 28, 32)


def residency(
    outer: int, channels: int, inner: int, itemsize: int, processors: int, arrays: int
) -> Residency | None:
    """Return how so many arrays like a block are held, or None if they are not to be.

    That is where a strip does not fit, where rows are no whole lines, and for channels first.
    """
    if inner != 1 or itemsize > 4 or channels * itemsize % _LINE or not outer:
        return None
    strips, words = channels * itemsize // _LINE, _LINE // 4
    rows = TILE_BYTES // _LINE
    tiles = -(-outer // rows)
    # As many programs to a team as leave none idle, and as few as hold the strip.
    most = _HELD[-1] // arrays
    members = max(-(-tiles // most), min(tiles, processors // strips))
    if members > processors:
        return None
    held = next(held for held in _HELD if held * members >= tiles)
    members = -(-tiles // held)
    return Residency(strips, min(strips, processors // members), members, held, rows, words)
