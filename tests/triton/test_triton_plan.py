"""The division of a block among programs: every element once, and nothing too large for a GPU."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusebn.triton._plan import TILE_BYTES, plan, residency

RESNET50 = [
    (n * extent * extent, channels)
    for n in (32, 256)
    for extent, channels in (
        (112, 64), (56, 64), (56, 128), (56, 256), (28, 128), (28, 512), (14, 256), (14, 1024),
        (7, 512), (7, 2048),
    )
]  # fmt: skip


def elements(p, outer, inner):
    """How often each element is visited, by the addresses that the kernels compute."""
    total = outer * p.channels * inner
    seen = np.zeros(total, int)
    for group, part, turn in itertools.product(range(p.groups), range(p.parts), range(p.turns)):
        number = turn * p.parts + part
        if number >= p.tiles:
            continue
        down, across = (number, group) if p.fold else divmod(number, p.chunks)
        row = down * p.tile_rows + np.arange(p.tile_rows)[:, None]
        column = across * p.tile_width + np.arange(p.tile_width)[None, :]
        data = ((row < p.rows) | ((row == p.rows) & (column < p.tail))) & (column < p.width)
        first = 0 if p.fold else group * p.width
        at = (row * p.stride + first + column)[data]
        channel = group if not p.fold else np.broadcast_to(column % p.channels, data.shape)[data]
        assert (at // inner % p.channels == channel).all()
        np.add.at(seen, at, 1)
    return seen


@given(
    outer=st.integers(0, 60),
    channels=st.integers(1, 40),
    inner=st.sampled_from([1, 1, 2, 7, 49, 300]),
    itemsize=st.sampled_from([2, 4, 8]),
    processors=st.sampled_from([1, 4, 132]),
    joins=st.booleans(),
)
def test_every_element_is_visited_once(outer, channels, inner, itemsize, processors, joins):
    p = plan(outer, channels, inner, itemsize, processors, joins=joins)
    assert (elements(p, outer, inner) == 1).all()


@pytest.mark.parametrize("block", [(1000, 513, 1), (3, 2, 5000), (2000, 96, 1), (77, 3, 1)])
def test_wide_ones_too(block):
    outer, _channels, inner = block
    assert (elements(plan(*block, 2, 4, joins=True), outer, inner) == 1).all()


@given(
    outer=st.integers(0, 2**33),
    channels=st.integers(1, 2**16),
    inner=st.sampled_from([1, 1, 49, 12544, 2**24]),
    itemsize=st.sampled_from([2, 4, 8]),
    joins=st.booleans(),
)
def test_nothing_is_too_large(outer, channels, inner, itemsize, joins):
    p = plan(outer, channels, inner, itemsize, 132, joins=joins)
    assert 0 < p.programs < 2**31
    assert p.tiles < 2**31 or outer * channels * inner > 2**40
    assert p.tile_rows * p.tile_width * itemsize <= max(TILE_BYTES, 1024 * itemsize)
    for size in (p.tile_rows, p.tile_width):
        assert size & (size - 1) == 0
    # The columns of a folded row are joined by one program.
    assert p.fold <= 1 or p.chunks == 1


@pytest.mark.parametrize(("outer", "channels"), RESNET50)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("joins", [False, True])
def test_a_resnet_is_read_in_whole_lines_by_the_whole_device(outer, channels, itemsize, joins):
    p = plan(outer, channels, 1, itemsize, 132, joins=joins)
    assert p.fold == 1
    assert p.tile_width * itemsize >= 128
    assert p.width % p.tile_width == 0
    assert p.tail == 0
    assert p.programs >= min(132, p.tiles * p.groups)
    if joins:  # by one program, while the others wait
        assert p.parts * p.tile_width * 24 <= 2**18


@pytest.mark.parametrize("channels", [1, 3, 17, 50, 96, 100])
def test_few_or_odd_channels_are_folded_into_wide_rows(channels):
    p = plan(32 * 56 * 56, channels, 1, 2, 132, joins=True)
    assert p.fold > 1
    assert p.width == p.fold * channels
    assert p.width % 16 == 0
    assert p.width >= 256
    assert p.width / (p.chunks * p.tile_width) >= 0.65


@pytest.mark.parametrize("arrays", [1, 2])
@pytest.mark.parametrize("processors", [2, 80, 108, 132, 148, 160])  # they come in pairs
def test_a_team_that_works_alone_has_no_room_for_another_strip(processors, arrays):
    """So to load the next strip while the team waits is to have fewer teams: see ARCHITECTURE."""

    def held(tiles):
        found = residency(tiles * 32, 64 * 200, 1, 2, processors, arrays)
        assert found.rows == 32
        return found

    most = 32 // arrays  # tiles of a program
    shared = processors // 2 * most  # of a strip, and two teams still hold one each
    assert held(shared).teams == 2
    assert held(shared + 1).teams == 1
    assert 2 * (shared + 1) > processors * most
