"""Low-bit codes in the kernels for Hopper, made and put in order in registers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# 1.5 * 2^23, around which float32's numbers are the integers.
INTEGER_FLOAT = gl.constexpr(12582912.0)
# PTX that makes a word of four codes: of float32 in FP8 e4m3, and of integers that float32 holds in its last byte.
FP8_WORD = gl.constexpr("""{
.reg .b16 low, high;
cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
mov.b32 $0, {low, high};
}""")
INTEGER_WORD = gl.constexpr("""{
.reg .b32 low, high;
prmt.b32 low, $1, $2, 0x0040;
prmt.b32 high, $3, $4, 0x0040;
prmt.b32 $0, low, high, 0x5410;
}""")


@gluon.jit
def pack_fp8(x):
    """float32 to FP8 e4m3, four at a time: the compiler packs pairs byte by byte."""
    return gl.inline_asm_elementwise(FP8_WORD, "=r,r,r,r,r", [x], dtype=gl.float8e4nv, is_pure=True, pack=4)


@gluon.jit
def quotient(x, scale):
    """x / scale as `triton_key_codes.to_codes` finds it, before it is rounded to a code."""
    inverse = gl.minimum(1 / scale, 1e38)
    quotient = x * inverse
    return gl.fma(gl.fma(-quotient, scale, x), inverse, quotient)


@gluon.jit
def to_codes(x, scale, dtype: gl.constexpr):
    """Float32 tokens as codes, rounded to nearest even like `triton_key_codes.to_codes`, packed four at a time."""
    x = quotient(x, scale)
    if dtype == gl.float8e4nv:
        return pack_fp8(x)
    else:
        x = gl.minimum(gl.maximum(x, -127.0), 127.0) + INTEGER_FLOAT
        return gl.inline_asm_elementwise(INTEGER_WORD, "=r,r,r,r,r", [x], dtype=gl.int8, is_pure=True, pack=4)


@gluon.jit
def quarters(x):
    """Of every four neighbouring columns (R, C) the first ones, the second, the third and the fourth, (R, C / 4) each.

    Moves nothing where a thread has all four. Words of four codes come of it: alone, a code takes a register too.
    """
    even, odd = gl.split(gl.reshape(x, [x.shape[0], x.shape[1] // 4, 2, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return first, second, third, fourth


@gluon.jit
def to_code_words(x, scale, FP8: gl.constexpr):
    """As `to_codes`, four codes in a word of 32 bits: (R, C) to (R, C / 4). No quotient rounds to more than a code."""
    x = quotient(x, scale)
    if FP8:
        a, b, c, d = quarters(x)
        return gl.inline_asm_elementwise(FP8_WORD, "=r,f,f,f,f", [a, b, c, d], dtype=gl.int32, is_pure=True, pack=1)
    else:
        a, b, c, d = quarters(x + INTEGER_FLOAT)
        return gl.inline_asm_elementwise(INTEGER_WORD, "=r,f,f,f,f", [a, b, c, d], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def in_stored_order(x):
    """Columns of `x` in the order of `triton_value_codes.stored_key`; moves nothing between threads."""
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    x = gl.permute(gl.reshape(x, [ROWS, COLUMNS // 16, 2, 4, 2]), (0, 1, 3, 2, 4))
    return gl.reshape(x, [ROWS, COLUMNS])


@gluon.jit
def halves(x):
    """The left and the right half of the columns of a tile, where no thread gives any away."""
    return gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))
