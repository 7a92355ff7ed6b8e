"""Shared memory, the copy engine and Hopper's matrix products on CPU tensors, for `gluon_emulator.py`.

Every element of shared memory knows what wrote it last and how far each group had come when it last read it. A read
needs a write that the group knows to be over: a copy by waiting for its barrier, another group's store by some barrier
since. A write needs every read before it to be over and known to be: a slot that is handed back too early is found
even where the copy that follows comes late. Products and copies to memory read from their issue until they are waited
for, and see a group's own stores only behind a fence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from emulated_machine import MAX_GROUPS, Barrier, Group, Hazard, Machine, _kernel_line
from emulated_values import DTYPES, NAMES, Pointer, Value, lift, load
from torch import Tensor

# Of a read that is not over.
IN_FLIGHT = 1 << 30


@dataclass
class Copy:
    """A tile on its way into shared memory."""

    bit: int
    num_bytes: int

    def is_known_to(self, group: Group) -> bool:
        return bool(group.knowledge.copies & self.bit)


@dataclass
class Store:
    """A tile stored by a group's threads."""

    writer: int
    clock: int
    fenced: bool = False

    def is_known_to(self, group: Group) -> bool:
        return group.knowledge.clocks[self.writer] >= self.clock


@dataclass
class RowCopy(Store):
    """Elements that a group's threads copy asynchronously: stored when the group has waited for them."""

    landed: bool = False

    def is_known_to(self, group: Group) -> bool:
        return self.landed and super().is_known_to(group)


class SharedMemory:
    """A view of an allocation: elements, the events that wrote them, and when each group read them."""

    def __init__(self, machine: Machine, planes: list[Tensor], layout: Any = None) -> None:
        self.machine, self.planes, self.layout = machine, planes, layout

    @classmethod
    def allocate(cls, machine: Machine, dtype: Any, shape: Sequence[int], layout: Any) -> SharedMemory:
        size = [int(x) for x in shape]
        data = torch.empty(size, dtype=DTYPES[dtype])
        clocks = [torch.zeros(size, dtype=torch.int32) for _ in range(1 + MAX_GROUPS)]
        return cls(machine, [data, *clocks], layout)

    @property
    def dtype(self) -> Any:
        return NAMES[self.planes[0].dtype]

    @property
    def shape(self) -> list[int]:
        return list(self.planes[0].shape)

    @property
    def rank(self) -> int:
        return self.planes[0].dim()

    @property
    def numel(self) -> int:
        return self.planes[0].numel()

    @property
    def nbytes(self) -> int:
        return self.planes[0].nbytes

    @property
    def type(self) -> SharedMemory:
        return self

    def _view(self, function: Callable[[Tensor], Tensor]) -> SharedMemory:
        return SharedMemory(self.machine, [function(plane) for plane in self.planes], self.layout)

    def index(self, index: Any) -> SharedMemory:
        number = int(index)
        assert 0 <= number < self.shape[0], f"slot {number} of {self.shape[0]}"
        return self._view(lambda plane: plane[number])

    def slice(self, start: Any, length: int, dim: int = 0) -> SharedMemory:
        return self._view(lambda plane: plane.narrow(dim, int(start), length))

    def permute(self, order: Sequence[int]) -> SharedMemory:
        return self._view(lambda plane: plane.permute(list(order)))

    def reshape(self, shape: Sequence[int]) -> SharedMemory:
        return self._view(lambda plane: plane.view(list(shape)))

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> SharedMemory:
        """The first bytes as another type; where an element was several, or several are one, they share events."""
        size = [int(x) for x in shape]
        before, after = self.planes[0].dtype.itemsize, DTYPES[dtype].itemsize
        data, *events = (plane.reshape(-1) for plane in self.planes)
        data = data.view(DTYPES[dtype])[: math.prod(size)].view(size)
        if after > before:
            events = [x[:: after // before] for x in events]
        else:
            size[-1] //= before // after
        return SharedMemory(self.machine, [data, *(x[: math.prod(size)].view(size) for x in events)], layout)

    def load(self, layout: Any = None) -> Value:
        self.check_read(asynchronous=False)
        self.mark_read(self.machine.current.clock)
        return Value(self.planes[0].clone(), layout)

    def store(self, value: Value) -> None:
        assert value.shape == self.shape, f"{value.shape} into {self.shape}"
        assert value.dtype == self.dtype, f"{value.dtype} into {self.dtype}"
        group = self.machine.current
        event = Store(group.number, group.clock)
        group.stores.append(event)
        self.write(value.data, event)

    def write(self, data: Tensor, event: Any) -> None:
        """Put `data` here, in the name of an event that begins now."""
        group = self.machine.current
        for number in range(MAX_GROUPS):
            last = int(self.planes[2 + number].max())
            known = IN_FLIGHT - 1 if number == group.number else group.knowledge.clocks[number]
            if last > known:
                what = "still reads" if last >= IN_FLIGHT else "may still read"
                raise Hazard(f"overwrites what group {number} {what}: {_kernel_line()}")
        for previous in self._events():
            if previous is not None and not previous.is_known_to(group):
                raise Hazard(f"overwrites a tile that may not have arrived yet: {_kernel_line()}")
        self.machine.events.append(event)
        self.planes[0].copy_(data)
        self.planes[1].fill_(len(self.machine.events) - 1)

    def check_read(self, *, asynchronous: bool) -> None:
        """Whether all that is here has certainly been written, as far as the group at work can know."""
        group = self.machine.current
        for event in self._events():
            if event is None:
                raise Hazard(f"reads shared memory that nothing has written: {_kernel_line()}")
            if not event.is_known_to(group):
                what = "a copy" if isinstance(event, Copy) else f"group {event.writer}'s store"
                raise Hazard(f"reads {what} without having waited for it: {_kernel_line()}")
            if asynchronous and isinstance(event, Store) and not event.fenced:
                raise Hazard(f"reads a store without a fence behind it: {_kernel_line()}")

    def mark_read(self, clock: int) -> None:
        self.planes[2 + self.machine.current.number].fill_(clock)

    def _events(self) -> list[Any]:
        low, high = (int(x) for x in self.planes[1].aminmax())
        numbers = [low] if low == high else self.planes[1].unique().tolist()
        return [self.machine.events[number] for number in numbers]


class Barriers:
    """An allocation of barriers; `index` chooses one, and one alone is a barrier itself."""

    def __init__(self, barriers: list[Barrier]) -> None:
        self.barriers = barriers

    def index(self, index: Any) -> Barriers:
        number = int(index)
        assert 0 <= number < len(self.barriers), f"barrier {number} of {len(self.barriers)}"
        return Barriers([self.barriers[number]])

    @property
    def shape(self) -> list[int]:
        return [len(self.barriers), 1]

    @property
    def one(self) -> Barrier:
        assert len(self.barriers) == 1, "index the barriers first"
        return self.barriers[0]


class Tiles:
    """A tensor descriptor: tiles of a matrix, zeros beyond its edges."""

    def __init__(self, descriptor: Any) -> None:
        base = descriptor.base
        self.matrix = base.as_strided(descriptor.shape, descriptor.strides, base.storage_offset())
        self.block_shape, self.layout = list(descriptor.block_shape), descriptor.layout
        self.dtype = NAMES[base.dtype]
        self.shape, self.strides = descriptor.shape, descriptor.strides

    @property
    def block_type(self) -> Any:
        return _BlockType(self.block_shape, self.dtype)

    @property
    def nbytes_per_cta(self) -> int:
        return self.block_type.nbytes

    def inside(self, corner: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where the part of a tile that exists lies in the matrix and in the tile."""
        starts = [int(x) for x in corner]
        ends = [start + size for start, size in zip(starts, self.block_shape, strict=True)]
        spans = [(max(0, a), min(b, n)) for a, b, n in zip(starts, ends, self.matrix.shape, strict=True)]
        spans = [(a, max(a, b)) for a, b in spans]
        tile = tuple(slice(a - start, b - start) for (a, b), start in zip(spans, starts, strict=True))
        return tuple(slice(a, b) for a, b in spans), tile


@dataclass
class _BlockType:
    shape: list[int]
    element_ty: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.element_ty.primitive_bitwidth // 8


def copy_in(tiles: Tiles, corner: Sequence[Any], barrier: Barriers, target: SharedMemory, pred: Any = True) -> None:
    """tma.async_copy_global_to_shared."""
    if not pred:
        return
    machine = target.machine
    assert target.shape == tiles.block_shape, f"a tile {tiles.block_shape} into {target.shape}"
    data = torch.zeros(tiles.block_shape, dtype=tiles.matrix.dtype)
    source, place = tiles.inside(corner)
    data[place] = tiles.matrix[source]
    copy = Copy(1 << machine.num_copies, data.nbytes)
    machine.num_copies += 1
    target.write(data, copy)
    barrier.one.copies.append(copy)


def copy_rows(machine: Machine, target: SharedMemory, pointer: Pointer, mask: Any = None, **_: Any) -> None:
    """async_copy.async_copy_global_to_shared."""
    value = load(pointer, mask)
    assert value.shape == target.shape, f"{value.shape} into {target.shape}"
    group = machine.current
    event = RowCopy(group.number, group.clock)
    target.write(value.data, event)
    group.row_copies[-1].append(event)


def commit_row_copies(machine: Machine) -> None:
    """async_copy.commit_group."""
    machine.current.row_copies.append([])


def wait_for_row_copies(machine: Machine, num_outstanding: Any) -> None:
    """async_copy.wait_group: all but the last groups are stores now, which the tensor cores see behind a fence."""
    group = machine.current
    committed = group.row_copies[:-1]
    finished = committed[: max(0, len(committed) - int(num_outstanding))]
    for event in (event for events in finished for event in events):
        event.landed, event.clock = True, group.clock
        group.stores.append(event)
    del group.row_copies[: len(finished)]


@dataclass
class CopyOut:
    """A tile on its way to memory, where it arrives when it is waited for."""

    tiles: Tiles
    corner: Sequence[Any]
    sources: list[SharedMemory]

    def finish(self) -> None:
        target, place = self.tiles.inside(self.corner)
        self.tiles.matrix[target] = self.sources[0].planes[0][place]


def copy_out(tiles: Tiles, corner: Sequence[Any], source: SharedMemory) -> None:
    """tma.async_copy_shared_to_global."""
    assert source.shape == tiles.block_shape, f"a tile {tiles.block_shape} from {source.shape}"
    source.check_read(asynchronous=True)
    source.mark_read(IN_FLIGHT)
    source.machine.current.copies_out.append(CopyOut(tiles, [int(x) for x in corner], [source]))


def wait_for_copies_out(machine: Machine, pendings: int) -> None:
    """tma.store_wait."""
    for copy in _end(machine.current, machine.current.copies_out, int(pendings)):
        copy.finish()


def _end(group: Group, work: list[Any], num_outstanding: int) -> list[Any]:
    """Take from asynchronous work all but the last items, whose reads end now."""
    finished = max(0, len(work) - num_outstanding)
    ended = work[:finished]
    del work[:finished]
    for item in ended:
        for source in item.sources:
            source.mark_read(group.clock)
    # What is read by two at once is read until the last of them is done.
    for item in (*group.products, *group.copies_out):
        for source in item.sources:
            source.mark_read(IN_FLIGHT)
    return ended


class Product:
    """The accumulator of a matrix product: no value before it has been waited for."""

    def __init__(self, result: Tensor, layout: Any, sources: list[SharedMemory]) -> None:
        self.result, self.layout, self.sources, self.done = result, layout, sources, False


def warpgroup_mma(
    machine: Machine, a: Any, b: SharedMemory, acc: Any, *, use_acc: Any = True, is_async: bool = False, **_: Any
) -> Any:
    """a b, and acc with use_acc; of 16-bit or 8-bit numbers, summed in float32 or int32."""
    sources = [x for x in (a, b) if isinstance(x, SharedMemory)]
    for source in sources:
        source.check_read(asynchronous=True)
        source.mark_read(IN_FLIGHT)
    left, right = (x.planes[0] if isinstance(x, SharedMemory) else x.data for x in (a, b))
    both_fp8 = left.dtype.itemsize == right.dtype.itemsize == 1 and left.dtype.is_floating_point
    assert left.dtype == right.dtype or both_fp8, f"{left.dtype} times {right.dtype}"
    before = acc.result if isinstance(acc, Product) else acc.data
    # int8 products of at most 256 terms are exact in float32 too.
    result = (left.float() @ right.float()).to(before.dtype)
    assert result.shape == before.shape, f"{tuple(result.shape)} onto {tuple(before.shape)}"
    product = Product(result + before if lift(use_acc) else result, acc.layout, sources)
    machine.current.products.append(product)
    return product if is_async else wait_for_products(machine, 0, [product])


def wait_for_products(machine: Machine, num_outstanding: int, deps: Sequence[Any]) -> Any:
    """warpgroup_mma_wait: the values of `deps`, those still in flight as they are."""
    for product in _end(machine.current, machine.current.products, int(num_outstanding)):
        product.done = True
    values = [Value(x.result, x.layout) if isinstance(x, Product) and x.done else x for x in deps]
    return values[0] if len(values) == 1 else tuple(values)


def fence(machine: Machine) -> None:
    """fence_async_shared."""
    for event in machine.current.stores:
        event.fenced = True
    machine.current.stores.clear()
