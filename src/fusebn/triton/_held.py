"""A strip of a batch in the registers of a team of programs, and how they wait for each other.

Batch norm is independent per channel, so it can be done strip by strip: 128 bytes of every row. A
strip of all rows often fits into the registers of the device, though the tensor does not. A team of
programs loads it, finds out what is to be known of it, waits for each other, and goes on with what
it holds; then comes the next strip. So memory is read once. (Apex does this for float16, in
`nhwc_batch_norm_kernel.h`, with 64 channels as here.)

Values of 16 bits are held as they come, two in a word of 4 bytes; unpacked they would not fit. The
compiler must not see that they are the same after the barrier as before, or it would keep them
unpacked: `opaque`.

The barrier is a counter of the team. Everybody adds 1 (release), but one adds what brings the sum
of all to 2^31, so that the top bit flips exactly when the last has come; everybody waits for that
(acquire). It needs no reset. Waiting is safe because all programs run at the same time: the launch
is cooperative, and the driver refuses it if they do not fit. Partial results of a strip have a
place of their own, so nobody writes what others may still read.
"""

import triton
import triton.language as tl


@triton.jit
def opaque(v):
    """Return v, of which the compiler does not know that it is v."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [v], dtype=v.dtype, is_pure=False, pack=1
    )


@triton.jit
def wait_for_all(ARRIVED, member, members):
    """Wait until every program of the team has come here; what they stored before can be read."""
    tl.debug_barrier()
    step = tl.where(member == 0, -2147483648 - (members - 1), 1)
    before = tl.atomic_add(ARRIVED, step, sem="release", scope="gpu")
    flipped = before != before
    while not flipped:
        now = tl.atomic_add(ARRIVED, 0, sem="acquire", scope="gpu")
        flipped = (before ^ now) < 0
    tl.debug_barrier()


@triton.jit
def first_half(v, ELEMENT: tl.constexpr):
    """Return the value in the low half of each word, or that is the word, as float32."""
    if ELEMENT == tl.float32:
        return v.to(tl.float32, bitcast=True)
    elif ELEMENT == tl.bfloat16:
        return (v << 16).to(tl.float32, bitcast=True)
    else:
        return v.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def second_half(v, ELEMENT: tl.constexpr):
    """Return the value in the high half of each word, as float32."""
    if ELEMENT == tl.bfloat16:
        return (v & -65536).to(tl.float32, bitcast=True)
    else:
        return (v >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def packed(low, high, ELEMENT: tl.constexpr):
    """Return two values in a word."""
    low = low.to(ELEMENT).to(tl.int16, bitcast=True).to(tl.int32) & 65535
    return low | (high.to(ELEMENT).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def place_of(strip, member, words, ROWS: tl.constexpr, WORDS: tl.constexpr, HELD: tl.constexpr):
    """Return where a program's part of a strip begins, and its first tile from there."""
    # A tensor may have more words than 32 bits can count.
    base = (member * (HELD * ROWS)).to(tl.int64) * words + strip * WORDS
    return base, tl.arange(0, ROWS).to(tl.int64)[:, None] * words + tl.arange(0, WORDS)[None, :]


@triton.jit
def rows_of(K: tl.constexpr, member, rows, ROWS: tl.constexpr, HELD: tl.constexpr):
    """Return which rows of a program's tile number K are there, [rows, 1]."""
    return ((member * HELD + K) * ROWS + tl.arange(0, ROWS) < rows)[:, None]


@triton.jit
def load_strip(
    X, strip, member, rows, words,
    ROWS: tl.constexpr, WORDS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Return the tiles that a program holds of a strip."""
    base, offsets = place_of(strip, member, words, ROWS, WORDS, HELD)
    held = ()
    for k in tl.static_range(HELD):
        at = X + base + k * ROWS * words.to(tl.int64) + offsets
        data = rows_of(k, member, rows, ROWS, HELD)
        held = held + (tl.load(at, mask=data, other=0, eviction_policy="evict_first"),)
    return held


@triton.jit
def halves(vector, WORDS: tl.constexpr):
    """Return the even and the odd channels of [1, channels]."""
    low, high = tl.split(tl.reshape(vector, [WORDS, 2]))
    return low[None, :], high[None, :]
