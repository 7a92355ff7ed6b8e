"""Groups of warps, their barriers, and who may know of what: for `gluon_emulator.py`.

Each group is a thread, of which one runs at a time, until it waits for a barrier. What a group knows of the others'
progress is a vector clock that barriers hand on, so that a read or a write that nothing orders is found whatever the
order in which the groups happen to run. A copy lands when somebody waits for it, and never before.
"""

from __future__ import annotations

import linecache
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_GROUPS = 8


class Hazard(Exception):
    """What a GPU might do wrong some day: a race, a barrier used wrongly, a deadlock."""


class _Stopped(BaseException):
    """Ends the other groups after one has failed."""


@dataclass
class Knowledge:
    """How far every group is known to have come, and which copies are known to have landed."""

    clocks: list[int] = field(default_factory=lambda: [0] * MAX_GROUPS)
    copies: int = 0  # a bit of each

    def join(self, other: Knowledge) -> None:
        self.clocks = [max(x, y) for x, y in zip(self.clocks, other.clocks, strict=True)]
        self.copies |= other.copies


class Group:
    """Warps that run the same function, and the asynchronous work that they have issued."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.knowledge = Knowledge()
        self.knowledge.clocks[number] = 1
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] | None = None  # what it waits for
        self.waits_at = ""
        self.done = False
        self.products: list[Any] = []  # issued to the tensor cores and not waited for
        self.copies_out: list[Any] = []  # to global memory, not waited for
        self.stores: list[Any] = []  # to shared memory, not fenced

    @property
    def clock(self) -> int:
        return self.knowledge.clocks[self.number]

    def tick(self) -> None:
        self.knowledge.clocks[self.number] += 1


class Machine:
    """One program of a grid. `order`: the groups' numbers, those first that run whenever they can."""

    def __init__(self, order: Sequence[int] = ()) -> None:
        self.order = list(order)
        self.main = self.current = Group(MAX_GROUPS - 1)
        self.groups: list[Group] = []
        self.error: BaseException | None = None
        self.num_copies = 0
        self.events: list[Any] = [None]  # what wrote to shared memory; number 0: nothing has
        self.buffers: list[Any] = []

    def specialize(self, functions_and_arguments: Sequence[tuple[Callable[..., Any], Sequence[Any]]]) -> Any:
        """Run every function in a group of its own; the first one's result."""
        self.groups = [Group(i) for i in range(len(functions_and_arguments))]
        results: list[Any] = [None] * len(self.groups)
        self.main.tick()
        for group in self.groups:
            clock = group.clock
            group.knowledge.join(self.main.knowledge)
            group.knowledge.clocks[group.number] = clock

        def run(group: Group, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
            group.turn.acquire()
            try:
                if self.error is None:
                    results[group.number] = function(*arguments)
                    if group.products or group.copies_out:
                        raise Hazard(f"group {group.number} ends with asynchronous work that it has not waited for")
            except _Stopped:
                pass
            except BaseException as error:
                self.error = self.error or error
            group.done = True
            self._pass_on()

        threads = [
            threading.Thread(target=run, args=(group, *work), daemon=True)
            for group, work in zip(self.groups, functions_and_arguments, strict=True)
        ]
        for thread in threads:
            thread.start()
        self._pass_on()
        self.main.turn.acquire()
        for thread in threads:
            thread.join()
        self.current = self.main
        if self.error is not None:
            raise self.error
        for group in self.groups:
            self.main.knowledge.join(group.knowledge)
        return results[0]

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Let other groups run until it is so."""
        if ready():
            return
        group = self.current
        if group is self.main:
            raise Hazard(f"nobody can end this wait: {_kernel_line()}")
        group.ready, group.waits_at = ready, _kernel_line()
        self._pass_on()
        group.turn.acquire()
        if self.error is not None:
            raise _Stopped
        group.ready = None

    def _pass_on(self) -> None:
        """Wake the next group, or with all done, or one failed, the main program."""
        running = [group for group in self.groups if not group.done]
        ranked = sorted(running, key=lambda g: self.order.index(g.number) if g.number in self.order else g.number)
        chosen = next((group for group in ranked if group.ready is None or group.ready()), None)
        if running and chosen is None and self.error is None:
            waits = "\n".join(f"  group {group.number}: {group.waits_at}" for group in running)
            self.error = Hazard(f"deadlock:\n{waits}")
        if self.error is not None and running:
            chosen = running[0]
        self.current = chosen or self.main
        self.current.turn.release()


def _kernel_line() -> str:
    """The line of the kernel that has called the emulator."""
    frame: Any = sys._getframe(1)
    while frame is not None and "_emulated" not in frame.f_globals:
        frame = frame.f_back
    if frame is None:
        return "?"
    name, line = frame.f_code.co_filename, frame.f_lineno
    return f"{name.rsplit('/', 1)[-1]}:{line}: {linecache.getline(name, line).strip()}"


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes that were announced have."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.count = 0
        self.phase = self.pending = self.bytes = 0
        self.copies: list[Any] = []
        self.arriving, self.completed = Knowledge(), Knowledge()

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int = 1) -> None:
        group = self.machine.current
        if self.count == 0:
            raise Hazard(f"arrives at a barrier before it is initialised: {_kernel_line()}")
        if self.pending < count:
            raise Hazard(f"arrives once more than the barrier's phase expects: {_kernel_line()}")
        self.pending -= count
        self.arriving.join(group.knowledge)
        group.tick()
        if self.pending == 0 and self.bytes == 0 and not self.copies:
            self._complete()

    def expect(self, num_bytes: int) -> None:
        """Announce bytes and arrive."""
        self.bytes += num_bytes
        self.arrive()

    def wait(self, phase: int) -> None:
        """Until the phase of this parity is over."""
        self.machine.wait_until(lambda: self._is_over(int(phase)))
        self.machine.current.knowledge.join(self.completed)

    def _is_over(self, parity: int) -> bool:
        if self.phase & 1 == parity and self.count and self.pending == 0:
            arrived = sum(copy.num_bytes for copy in self.copies)
            if arrived > self.bytes:
                raise Hazard(f"{arrived} bytes arrive at a barrier that expects {self.bytes}: {_kernel_line()}")
            if arrived == self.bytes:
                for copy in self.copies:
                    self.arriving.copies |= copy.bit
                self._complete()
        return self.phase & 1 != parity

    def _complete(self) -> None:
        self.completed.join(self.arriving)
        self.arriving = Knowledge()
        self.phase += 1
        self.pending, self.bytes, self.copies = self.count, 0, []
