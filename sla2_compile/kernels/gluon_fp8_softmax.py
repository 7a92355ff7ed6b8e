"""The softmax of `gluon_fp8_stream.py`: weights of a tile's scores, as FP8 codes for the product with the values.

Of what a step does little is needed for every tile. Peaks are raised seldom, and sums shrink in the same branch. Means
of kept blocks are left out where weights are codes already, four at a time; until then they weigh like others, but
raise no peak. Numbers of a row are (64, 4): its four threads have one each.
"""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sla2_compile.kernels.gluon_codes import in_stored_order
from sla2_compile.kernels.gluon_stream import TOP_CODE, max_in_thread

# By so many powers of two a score may exceed the peak before that is raised. Weights that are 0 then may be 2^-14.8 of
# the largest, in place of 2^-17.8; but of normal scores 2 % of a warp's steps raise a peak and not 27 %.
HEADROOM = gl.constexpr(3)
_SHIFT = gl.constexpr(math.log2(TOP_CODE.value) - HEADROOM.value)
# Of `_raise_peak`: peaks, what sums shrink by, and the sums of 128 channels.
_RESULTS = gl.constexpr((gl.float32,) * (2 + 128 // 4))
# PTX that makes a word of four FP8 codes of float32, and keeps of them the bits that are not set in another word.
_MASKED_FP8_WORD = gl.constexpr("""{
.reg .b16 low, high;
.reg .b32 word, kept;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 word, {low, high};
not.b32 kept, $5;
and.b32 $0, word, kept;
}""")


@gluon.constexpr_function
def _largest_assembly(row, means, inputs):
    """PTX: in x the largest score of a thread's row; of means that of blocks which are not kept."""
    if not means:
        return f"mov.f32 x, ${inputs + row};"
    columns = "\n".join(
        f"""
        and.b32 bit, ${inputs + 4 + 2 * (column // 8)}, {1 << (8 * (column // 2 % 4) + column % 2)};
        setp.eq.u32 tail, bit, 0;
        @tail max.f32 x, x, ${inputs + 12 + 2 * (column // 2 + 8 * (column % 2)) + row};"""
        for column in range(16)
    )
    return f"""
        mov.f32 x, 0fFF800000;
        {columns}
        fma.rn.f32 x, x, ${inputs + 8}, ${inputs + 10};"""


@gluon.constexpr_function
def _raise_assembly(headroom, means, num_sums):
    """PTX: peaks of a thread's two rows, raised where they must be, what sums shrink by, and the sums, less by that.

    A warp none of whose scores is too large looks at no other thread's, nor at which means are those of kept blocks.
    """
    inputs = 4 + 2 * num_sums
    rows = "\n".join(
        f"""
        {_largest_assembly(row, means, inputs)}
        shfl.sync.bfly.b32 y, x, 2, 0x1f, 0xffffffff;
        max.f32 x, x, y;
        shfl.sync.bfly.b32 y, x, 1, 0x1f, 0xffffffff;
        max.f32 x, x, y;
        cvt.rpi.f32.f32 x, x;
        add.f32 y, ${inputs + 2 + row}, {headroom}.0;
        setp.gt.f32 above, x, y;
        selp.f32 ${row}, x, ${inputs + 2 + row}, above;
        sub.f32 y, ${inputs + 2 + row}, ${row};
        ex2.approx.ftz.f32 ${2 + row}, y;"""
        for row in range(2)
    )
    sums = "\n".join(f"mul.f32 ${4 + i}, ${4 + i}, ${2 + i % 2};" for i in range(2 * num_sums))
    return f"""{{
    .reg .pred above, any, tail;
    .reg .f32 x, y;
    .reg .b32 bit;
    add.f32 x, ${inputs + 2}, {headroom}.0;
    setp.gt.f32 above, ${inputs}, x;
    add.f32 x, ${inputs + 3}, {headroom}.0;
    setp.gt.or.f32 above, ${inputs + 1}, x, above;
    vote.sync.any.pred any, above, 0xffffffff;
    mov.f32 $0, ${inputs + 2};
    mov.f32 $1, ${inputs + 3};
    mov.f32 $2, 0f3F800000;
    mov.f32 $3, 0f3F800000;
    @!any bra done;
    {rows}
    {sums}
    done:
    }}"""


@gluon.constexpr_function
def _raise_constraints(means, num_sums):
    others = ["f"] * 4 + (["r"] * 4 + ["f"] * 36 if means else [])
    return ",".join(["=&f"] * 4 + ["=f"] * (2 * num_sums) + others + [str(4 + i) for i in range(2 * num_sums)])


@gluon.jit
def _pieces(x, layout: gl.constexpr):
    """(64, N, 4) as a tuple of N times (64, 4), in a layout in which nothing moves."""
    if x.shape[1] == 1:
        return (gl.convert_layout(gl.reshape(x, [64, 4]), layout),)
    else:
        first, second = gl.split(gl.permute(gl.reshape(x, [64, 2, x.shape[1] // 2, 4]), (0, 2, 3, 1)))
        return _pieces(first, layout) + _pieces(second, layout)


@gluon.jit
def _joined(pieces, first: gl.constexpr, count: gl.constexpr):
    """`_pieces` undone, for `count` of them from a first one on."""
    if count == 1:
        return gl.reshape(pieces[first], [64, 1, 4])
    else:
        a, b = _joined(pieces, first, count // 2), _joined(pieces, first + count // 2, count // 2)
        return gl.reshape(gl.permute(gl.join(a, b), (0, 3, 1, 2)), [64, count, 4])


@gluon.jit
def _raise_peak(scores, largest, peak, acc, low, high, factor, bias, MEANS: gl.constexpr):
    """Peaks (64, 4), whole numbers, what sums shrink by, 2^(old - new), and the sums `acc` (64, D), less by that.

    Args:
        scores: (64, 64), to be looked at for MEANS, for those whose bits in the two words are not set.
        largest: (64, 4) of each thread's columns, of all.
    """
    layout: gl.constexpr = peak.type.layout
    NUM: gl.constexpr = acc.shape[1] // 4
    ASSEMBLY: gl.constexpr = _raise_assembly(HEADROOM, MEANS, NUM)
    CONSTRAINTS: gl.constexpr = _raise_constraints(MEANS, NUM)
    even, odd = gl.split(gl.reshape(acc, [64, acc.shape[1] // 8, 4, 2]))
    sums = _pieces(even, layout) + _pieces(odd, layout)
    arguments = (largest, peak)
    if MEANS:
        even_scores, odd_scores = gl.split(gl.reshape(scores, [64, 8, 4, 2]))
        arguments = arguments + (low, high, factor, bias) + _pieces(even_scores, layout) + _pieces(odd_scores, layout)
    found = gl.inline_asm_elementwise(ASSEMBLY, CONSTRAINTS, arguments + sums, dtype=_RESULTS, is_pure=False, pack=2)
    even, odd = _joined(found, 2, NUM // 2), _joined(found, 2 + NUM // 2, NUM // 2)
    acc = gl.convert_layout(gl.reshape(gl.join(even, odd), acc.shape), acc.type.layout)
    return found[0], found[1], acc


@gluon.jit
def _for_columns(x, wide_layout: gl.constexpr):
    """(64, 4), a number for each thread of a row, for the columns that are the thread's: (64, 1, 4, 1)."""
    return gl.convert_layout(x, gl.SliceLayout(1, gl.SliceLayout(3, wide_layout)))[:, None, :, None]


@gluon.jit
def softmax(scores, peak, acc, low, high, factor, bias, MEANS: gl.constexpr):
    """One step of an online softmax in base 2: weights (64, 64), of kept blocks' means too, peaks, what sums shrink by.

    Peaks are (64, 4), of a row the same ones in its four threads.
    """
    layout: gl.constexpr = peak.type.layout
    largest = gl.convert_layout(max_in_thread(scores), layout) * factor + bias
    peak, shrinks, acc = _raise_peak(scores, largest, peak, acc, low, high, factor, bias, MEANS)
    wide = gl.reshape(scores, [64, 8, 4, 2])
    wide_layout: gl.constexpr = wide.type.layout
    weights = gl.exp2(wide * factor - _for_columns(peak - (bias + _SHIFT), wide_layout))
    return gl.convert_layout(gl.reshape(weights, [64, 64]), scores.type.layout), peak, shrinks, acc


@gluon.jit
def own_bits(word, peak):
    """(64, 4) words like `peak`, a thread's columns' bits first of every eight: those of 8 i and 8 i + 1."""
    thread = gl.arange(0, 4, layout=gl.SliceLayout(0, peak.type.layout))
    bits, _ = gl.broadcast((word >> (2 * thread))[None, :], peak)
    return bits


@gluon.jit
def _kept_bytes(weights, low, high):
    """(64, 64) words like `weights`, the same for four that become one word of codes: bits of those of kept blocks."""
    wide = gl.reshape(weights, [64, 8, 4, 2])
    wide_layout: gl.constexpr = wide.type.layout
    of_column: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, wide_layout)))
    column = gl.arange(0, 8, layout=of_column)[None, :, None, None]
    word = gl.where(column < 4, _for_columns(low, wide_layout), _for_columns(high, wide_layout))
    # Of four codes in a word, even columns' bits as the uppermost of its bytes, odd ones' of another's.
    which = gl.where((column & 2) == 0, 0xD9C8, 0xFBEA)
    kept = gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [word << 7, word << 6, which], dtype=gl.int32, is_pure=True, pack=1
    )
    _, kept = gl.broadcast(wide, kept)
    return gl.convert_layout(gl.reshape(kept, [64, 64]), weights.type.layout)


@gluon.jit
def to_operand_of_tail(weights, low, high, layout: gl.constexpr):
    """As `to_operand`, 0 for means of kept blocks, whose bits in words (64, 4) are set; see `_own_bits`."""
    words = gl.convert_layout(in_stored_order(_kept_bytes(weights, low, high)), layout)
    weights = gl.convert_layout(in_stored_order(weights), layout)
    return gl.inline_asm_elementwise(
        _MASKED_FP8_WORD, "=r,r,r,r,r,r,r,r,r", [weights, words], dtype=gl.float8e4nv, is_pure=True, pack=4
    )


@gluon.jit
def weigh_last(scores, factor, place, last_bias):
    """Scores with `last_bias`, in base 2, added for the mean in the column `place`.

    As bits of words, like `gluon_stream._mask_means`: columns compared with the place would be held in registers
    through the loop.
    """
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, scores.type.layout))
    bit = 1 << (place & 31)
    low, high = gl.where(place < 32, bit, 0), gl.where(place < 32, 0, bit)
    word = (gl.where(column < 32, low, high) >> (column & 6)) >> (column & 25)
    return gl.where(((word & 1) == 1)[None, :], scores + last_bias / factor, scores)
