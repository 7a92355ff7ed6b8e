"""Gluon's tensors, pointers and arithmetic on CPU tensors, for `gluon_emulator.py`.

A `Value` stands for a tensor or scalar in registers. Layouts are carried along where they are simple and not checked:
the compiler does that. 16-bit numbers are rounded where the kernel rounds them.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from sla2_compile.kernels.gluon_fp8_softmax import HEADROOM

DTYPES = {
    gl.int1: torch.bool, gl.int8: torch.int8, gl.uint8: torch.uint8, gl.int16: torch.int16, gl.int32: torch.int32,
    gl.int64: torch.int64, gl.float16: torch.float16, gl.bfloat16: torch.bfloat16, gl.float32: torch.float32,
    gl.float64: torch.float64, gl.float8e4nv: torch.float8_e4m3fn, gl.float8e5: torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Value:
    """A tensor, or a scalar: its data has no dimension then."""

    def __init__(self, data: Tensor, layout: Any = None) -> None:
        self.data, self.layout = data, layout

    @property
    def dtype(self) -> Any:
        return NAMES[self.data.dtype]

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=self.layout, shape=self.shape, element_ty=self.dtype, scalar=self.dtype)

    def to(self, dtype: Any, bitcast: bool = False) -> Value:
        target = DTYPES[dtype]
        if bitcast:
            return Value(self.data.view(target), self.layout)
        if self.data.dtype.is_floating_point and not target.is_floating_point:
            return Value(self.data.trunc().to(target), self.layout)
        return Value(self.data.to(target), self.layout)

    cast = to

    def __getitem__(self, key: Any) -> Value:
        key = key if isinstance(key, tuple) else (key,)
        assert all(k is None or k == slice(None) for k in key), "only [:, None] and the like"
        parent = self.layout.parent if isinstance(self.layout, gl.SliceLayout) and None in key else self.layout
        return Value(self.data[key], parent)

    def __bool__(self) -> bool:
        assert self.data.dim() == 0, "a branch on a tensor"
        return bool(self.data)

    def __index__(self) -> int:
        assert self.data.dim() == 0, "an index from a tensor"
        return int(self.data)

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.data)

    def __neg__(self) -> Value:
        return Value(-self.data, self.layout)

    def __invert__(self) -> Value:
        return Value(~self.data, self.layout)

    __hash__ = None  # type: ignore[assignment]

    def reshape(self, *shape: Any) -> Value:
        return reshape(self, *shape)

    def permute(self, *order: Any) -> Value:
        return permute(self, *order)

    def trans(self, *order: Any) -> Value:
        return permute(self, *(order or (1, 0)))

    def split(self) -> tuple[Value, Value]:
        return split(self)


def lift(x: Any) -> Value:
    """A Python number as the scalar that the compiler makes of it."""
    if isinstance(x, Value):
        return x
    if isinstance(x, bool):
        return Value(torch.tensor(x))
    if isinstance(x, int):
        return Value(torch.tensor(x, dtype=torch.int32 if -(2**31) <= x < 2**31 else torch.int64))
    assert isinstance(x, float), f"not a number: {x!r}"
    return Value(torch.tensor(x, dtype=torch.float32))


def promoted(*values: Any) -> list[Tensor]:
    """Operands in the type in which they meet; a Python number takes the other operand's."""
    typed = [x.data.dtype for x in values if isinstance(x, Value)]
    if not typed:
        typed = [lift(x).data.dtype for x in values]
    dtype = typed[0]
    for other in typed[1:]:
        dtype = torch.promote_types(dtype, other)
    numbers = [x for x in values if not isinstance(x, Value)]
    if any(isinstance(x, float) for x in numbers) and not dtype.is_floating_point:
        dtype = torch.float32
    if dtype == torch.bool and any(not isinstance(x, bool) for x in numbers):
        dtype = torch.int32
    return [x.data.to(dtype) if isinstance(x, Value) else torch.tensor(x, dtype=dtype) for x in values]


def layout_of(result: Tensor, *values: Any) -> Any:
    found = [x.layout for x in values if isinstance(x, Value) and x.data.dim() == result.dim() and x.layout is not None]
    return found[0] if found else None


def elementwise(function: Callable[..., Tensor], *values: Any) -> Value:
    result = function(*promoted(*values))
    return Value(result, layout_of(result, *values))


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode="trunc")


def _true_divide(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.float32
    return a / b if a.is_floating_point() else a.to(wide) / b.to(wide)


_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": _true_divide, "floordiv": _divide,
    "mod": torch.fmod, "and": operator.and_, "or": operator.or_, "xor": operator.xor, "lshift": operator.lshift,
    "rshift": operator.rshift, "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip


def _define_operators() -> None:
    for name, function in _OPERATORS.items():

        def forward(self: Value, other: Any, f: Callable[..., Tensor] = function) -> Any:
            return NotImplemented if isinstance(other, Pointer) else elementwise(f, self, other)

        def reflected(self: Value, other: Any, f: Callable[..., Tensor] = function) -> Any:
            return elementwise(f, other, self)

        setattr(Value, f"__{name}__", forward)
        if name not in ("eq", "ne", "lt", "le", "gt", "ge"):
            setattr(Value, f"__r{name}__", reflected)


class Pointer:
    """Elements of a tensor's storage, counted from the tensor's first one."""

    def __init__(self, memory: Tensor, offset: Value | None = None) -> None:
        self.memory, self.offset = memory, lift(0).to(gl.int64) if offset is None else offset

    @classmethod
    def of(cls, tensor: Tensor) -> Pointer:
        first = tensor.storage_offset()
        size = tensor.untyped_storage().nbytes() // tensor.element_size() - first
        return cls(tensor.as_strided((size,), (1,), first))

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=NAMES[self.memory.dtype])

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset - other)

    def __getitem__(self, key: Any) -> Pointer:
        return Pointer(self.memory, self.offset[key])

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Elements meant and which of them are; any other than the tensor's is an error."""
        place = self.offset.data.long()
        chosen = torch.ones_like(place, dtype=torch.bool) if mask is None else lift(mask).data
        place, chosen = torch.broadcast_tensors(place, chosen)
        outside = chosen & ((place < 0) | (place >= len(self.memory)))
        assert not outside.any(), f"outside of memory: {place[outside].tolist()[:4]} of {len(self.memory)}"
        return place, chosen


def load(pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Value:
    place, chosen = pointer.places(mask)
    found = pointer.memory[torch.where(chosen, place, 0)]
    fill = other if other is not None else math.nan if found.is_floating_point() else 0
    rest = promoted(Value(found), fill)[1] if not isinstance(fill, Value) else fill.data.to(found.dtype)
    return Value(torch.where(chosen, found, rest), pointer.offset.layout)


def store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    place, chosen = pointer.places(mask)
    value = torch.broadcast_to(lift(value).data.to(pointer.memory.dtype), place.shape)
    pointer.memory[place[chosen]] = value[chosen]


def arange(start: int, end: int, layout: Any = None) -> Value:
    return Value(torch.arange(start, end, dtype=torch.int32), layout)


def full(shape: Sequence[int], value: Any, dtype: Any, layout: Any = None) -> Value:
    return Value(torch.full(list(shape), lift(value).data.item(), dtype=DTYPES[dtype]), layout)


def zeros(shape: Sequence[int], dtype: Any, layout: Any = None) -> Value:
    return full(shape, 0, dtype, layout)


def where(condition: Any, x: Any, y: Any) -> Value:
    x, y = promoted(x, y)
    result = torch.where(lift(condition).data, x, y)
    return Value(result, layout_of(result, condition))


def convert_layout(x: Value, layout: Any, assert_trivial: bool = False) -> Value:
    return Value(x.data, layout)


def _sizes(arguments: Sequence[Any]) -> list[int]:
    """A shape or an order, given as a list or as several arguments."""
    items = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], (list, tuple)) else arguments
    return [int(x) for x in items]


def reshape(x: Value, *shape: Any) -> Value:
    return Value(x.data.reshape(_sizes(shape)))


def permute(x: Value, *order: Any) -> Value:
    return Value(x.data.permute(_sizes(order)))


def split(x: Value) -> tuple[Value, Value]:
    return Value(x.data[..., 0]), Value(x.data[..., 1])


def join(x: Value, y: Value) -> Value:
    return Value(torch.stack(torch.broadcast_tensors(x.data, y.data), -1))


def expand_dims(x: Value, axis: int) -> Value:
    return Value(x.data.unsqueeze(axis), x.layout.parent if isinstance(x.layout, gl.SliceLayout) else None)


def broadcast(x: Any, y: Any) -> tuple[Value, Value]:
    a, b = torch.broadcast_tensors(lift(x).data, lift(y).data)
    return Value(a), Value(b)


def _slice(x: Value, axis: int | None) -> Any:
    return gl.SliceLayout(axis, x.layout) if x.layout is not None and x.data.dim() > 1 and axis is not None else None


def maximum_over(x: Value, axis: int | None = None, **_: Any) -> Value:
    return Value(x.data.amax() if axis is None else x.data.amax(axis), _slice(x, axis))


def minimum_over(x: Value, axis: int | None = None, **_: Any) -> Value:
    return Value(x.data.amin() if axis is None else x.data.amin(axis), _slice(x, axis))


def sum_over(x: Value, axis: int | None = None, **_: Any) -> Value:
    dtype = torch.int32 if x.data.dtype in (torch.bool, torch.int8, torch.int16) else x.data.dtype
    total = x.data.sum(dtype=dtype) if axis is None else x.data.sum(axis, dtype=dtype)
    return Value(total, _slice(x, axis))


def reduce(x: Any, axis: int, combine: Callable[..., Any], **_: Any) -> Any:
    """Of one value, or of several that are combined together."""
    values = x if isinstance(x, tuple) else (x,)
    parts = [tuple(Value(part) for part in row) for row in zip(*(v.data.unbind(axis) for v in values), strict=True)]
    while len(parts) > 1:
        half = len(parts) // 2
        pairs = [combine(*a, *b) for a, b in zip(parts[:half], parts[half:], strict=True)]
        parts = [pair if isinstance(pair, tuple) else (pair,) for pair in pairs]
    found = tuple(Value(part.data, _slice(v, axis)) for part, v in zip(parts[0], values, strict=True))
    return found if isinstance(x, tuple) else found[0]


def associative_scan(x: Value, axis: int, combine: Callable[[Value, Value], Value], **_: Any) -> Value:
    parts = [Value(part) for part in x.data.unbind(axis)]
    for i in range(1, len(parts)):
        parts[i] = combine(parts[i - 1], parts[i])
    return Value(torch.stack([part.data for part in parts], axis), x.layout)


def _ballot(flags: Tensor) -> Tensor:
    """Of a warp whose lanes are the last dimension."""
    words = ((flags != 0).long() << torch.arange(32)).sum(-1, keepdim=True)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).expand(flags.shape)


def _popcount(words: Tensor) -> Tensor:
    return (words[..., None] >> torch.arange(32) & 1).sum(-1, dtype=torch.int32)


def _words_of(parts: Sequence[Tensor]) -> Tensor:
    """Two or four numbers as words of 32 bits, the first as the lowest bits."""
    return torch.stack([part.contiguous() for part in parts], -1).view(torch.int32)[..., 0]


def _to_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


def _last_byte(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32).bitwise_and(255).to(torch.uint8).view(torch.int8)


def _packed(convert: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Codes of one tensor, of which the assembly takes four elements at a time, or words of four tensors' codes."""
    return lambda *parts: convert(parts[0]) if len(parts) == 1 else _words_of([convert(x) for x in parts])


def _halves_of_words(pairs: Tensor) -> tuple[Tensor, Tensor]:
    codes = pairs.contiguous().view(torch.float8_e4m3fn).unflatten(-1, (-1, 2))
    return codes[..., 0], codes[..., 1]


def _round_state(a: Tensor, b: Tensor, c: Tensor, d: Tensor, rest: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """`gluon_states._round_state`: in float16, of which e5m2 is the upper byte."""
    x = torch.stack([a, b, c, d], -1).half()
    upper = rest.contiguous()[..., None].view(torch.uint8).int() << 8
    before = upper.to(torch.uint16).view(torch.float16)
    # Both numbers of 11 bits: their product is exact in float32, and so is the sum but for float32's own last bits.
    x = (before.float() * ratio.half().float() + x.float()).half()
    codes = _to_e4m3(x.float())
    left = (x - codes.half()).view(torch.int16).int() >> 8 & 255
    return _words_of(codes.unbind(-1)), _words_of(left.to(torch.uint8).unbind(-1))


def _raise_peak(largest: Tensor, peak: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """`gluon_fp8_softmax._raise_peak`: four threads have a row; of means the scores come before the sums."""
    if others[0].dtype == torch.int32:
        (low, high, factor, bias), scores, others = others[:4], others[4:20], others[20:]
        largest = torch.full_like(largest, -math.inf)
        for number, score in enumerate(scores):
            word, bit = (low, high)[number % 8 // 4], 8 * (number % 4) + number // 8
            largest = torch.where((word >> bit & 1) == 0, largest.maximum(score * factor + bias), largest)
    found = largest.amax(1, keepdim=True).ceil()
    raised = torch.where(found > peak + HEADROOM.value, found, peak)
    shrinks = torch.exp2(peak - raised)
    return raised, shrinks, *(x * shrinks for x in others)


def _signs_of_bytes(x: Tensor, y: Tensor, chosen: Tensor) -> Tensor:
    """PRMT where all of the four choices ask for a byte's uppermost bit, eight times."""
    source = torch.stack([*(x.int() >> 8 * i for i in range(4)), *(y.int() >> 8 * i for i in range(4))], -1)
    picked = [source.gather(-1, (chosen.long() >> 4 * i & 7)[..., None])[..., 0] >> 7 & 1 for i in range(4)]
    assert all((chosen >> 4 * i & 8).all() for i in range(4))
    return _words_of([(-bit).to(torch.int8) for bit in picked])


def _codes_without(x: Tensor, kept: Tensor) -> Tensor:
    """FP8 codes but for the bits that are set in the words, of which every four elements in a row have the same."""
    byte = kept.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))
    place = torch.arange(x.shape[-1]) % 4
    byte = byte.gather(-1, place.expand(x.shape)[..., None])[..., 0]
    return (_to_e4m3(x).view(torch.uint8) & ~byte).view(torch.float8_e4m3fn)


# How the assembly that kernels embed is told apart, and what it makes of one element. More may be added by a test.
ASSEMBLY: dict[str, Callable[..., Any]] = {
    "vote.sync.ballot.b32": _ballot,
    "%lanemask_lt": lambda words: _popcount(words & ((1 << torch.arange(32)) - 1).to(torch.int32)),
    "popc.b32": _popcount,
    "sub.f16x2": _round_state,
    "cvt.rpi.f32.f32": _raise_peak,
    "mov.b32 $0, $1;": lambda x: x,
    "prmt.b32 $0, $1, $2, $3;": lambda *x: _signs_of_bytes(*torch.broadcast_tensors(*x)),
    "not.b32 kept": _codes_without,
    "cvt.rn.satfinite.e4m3x2.f32": _packed(_to_e4m3),
    "cvt.rn.bf16x2.f32 $0, $1, $2; // one word": lambda high, low: _words_of(
        [x.to(torch.bfloat16) for x in (low, high)]
    ),
    "cvt.rn.f16x2.f32 $0, $1, $2; // one word": lambda high, low: _words_of([x.to(torch.float16) for x in (low, high)]),
    "cvt.rn.bf16x2.f32": lambda x: x.to(torch.bfloat16),
    "cvt.rn.f16x2.f32": lambda x: x.to(torch.float16),
    "prmt.b32 $0, $2, $3, 0x6420": _halves_of_words,
    # Warps for whose rows all factors are 1 leave it out.
    "vote.sync.any.pred any, apart": torch.mul,
    # The last byte of a float32.
    "prmt.b32 low, $1, $2, 0x0040": _packed(_last_byte),
}


def inline_asm_elementwise(assembly: str, constraints: str, arguments: Sequence[Any], dtype: Any, **_: Any) -> Any:
    if "prefetch.global" in assembly:
        # Nothing comes of it, and its arguments are pointers.
        return None
    known = [function for text, function in ASSEMBLY.items() if text in assembly]
    assert known, f"unknown to emulated_values.ASSEMBLY: {assembly}"
    found = known[0](*(lift(x).data for x in arguments))
    results = found if isinstance(found, tuple) else (found,)
    assert [x.dtype for x in results] == [DTYPES[x] for x in (dtype if isinstance(dtype, tuple) else (dtype,))]
    values = tuple(Value(x, arguments[0].layout) for x in results)
    return values if isinstance(found, tuple) else values[0]


def _fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Rounded once, as the instruction does."""
    return (x.double() * y.double() + z.double()).to(x.dtype)


_UNARY = ("abs", "ceil", "cos", "exp", "exp2", "floor", "log", "log2", "rsqrt", "sigmoid", "sin", "sqrt")
FUNCTIONS: dict[str, Any] = {
    "arange": arange, "associative_scan": associative_scan, "broadcast": broadcast, "convert_layout": convert_layout,
    "expand_dims": expand_dims, "full": full, "inline_asm_elementwise": inline_asm_elementwise, "join": join,
    "load": load, "max": maximum_over, "min": minimum_over, "permute": permute, "reduce": reduce, "reshape": reshape,
    "split": split, "store": store, "sum": sum_over, "where": where, "zeros": zeros, "set_auto_layout": convert_layout,
    "cast": lambda x, dtype, bitcast=False: lift(x).to(dtype, bitcast), "to_tensor": lift, "constexpr": lambda x: x,
    "fma": lambda x, y, z: elementwise(_fma, x, y, z), "div_rn": lambda x, y: elementwise(operator.truediv, x, y),
    # Unlike the hardware's, these keep a NaN, which then shows.
    "maximum": lambda x, y, **_: elementwise(torch.maximum, x, y),
    "minimum": lambda x, y, **_: elementwise(torch.minimum, x, y),
    "assume": lambda condition: None, "static_assert": lambda condition, *_: None, "static_range": range,
    "multiple_of": lambda x, *_: x, "max_contiguous": lambda x, *_: x, "max_constancy": lambda x, *_: x,
    "zeros_like": lambda x: Value(torch.zeros_like(x.data), x.layout),
    **{name: functools.partial(elementwise, getattr(torch, name)) for name in _UNARY},
}  # fmt: skip
_define_operators()
