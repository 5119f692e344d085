"""A computation as a tape of steps: operations, traffic and memory, known from sizes alone.

A value is what a step writes and later steps read. It lives from the step that writes it to the last one that reads
it, or to the backward pass where that needs it; the peak is the largest sum of what lives at once. The backward pass
is the tape in reverse: a step reads the gradients of what it wrote and writes those of what it read. A step that the
result does not depend on has no backward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

__all__ = ["BACKWARD", "FORWARD", "RECOMPUTED", "Part", "Step", "Tape", "Value"]

FORWARD, RECOMPUTED, BACKWARD = "forward", "recomputed", "backward"


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of which only the size matters. Told apart by identity.

    Attributes:
        elements: Number of elements.
        itemsize: Bytes an element.
        held: Whether the caller holds it before and after, so that it is no part of the peak.
    """

    elements: int
    itemsize: int
    held: bool = False

    @property
    def bytes(self) -> int:
        """Bytes that it takes."""
        return self.elements * self.itemsize


@dataclass(frozen=True)
class Part:
    """Work of one kind, a row of the table.

    Attributes:
        name: What is done.
        phase: When: ``"forward"``, ``"recomputed"`` or ``"backward"``.
        flops: Floating-point operations; two for a multiplication with an addition.
        read: Bytes read, each operand once for each time that it is used.
        written: Bytes written.
    """

    name: str
    phase: str
    flops: int
    read: int
    written: int


@dataclass(frozen=True)
class Step:
    """One step of a tape.

    Attributes:
        reads: What it reads and has a gradient for.
        writes: What it writes.
        forward: The work that it is.
        backward: The work of its backward pass.
        keeps: What its backward pass needs.
        passes: Those of `reads` whose gradient is that of the result itself, and takes no memory.
        joins: Those of `reads` whose gradient is added where a step that hands over its own has written it.
        hands_over: Whether the gradients that it writes are nobody else's, so that others can be added to them.
        saves: What it makes for its backward pass alone.
        lasting: Whether it holds what it saves until the result is let go.
        scratch: Bytes that it holds while it runs.
        saving_scratch: Bytes that it holds while it runs, beside what it saves, where a backward pass follows.
        backward_scratch: Bytes that its backward pass holds while it runs.
    """

    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    forward: tuple[Part, ...] = ()
    backward: tuple[Part, ...] = ()
    keeps: tuple[Value, ...] = ()
    passes: tuple[Value, ...] = ()
    joins: tuple[Value, ...] = ()
    hands_over: bool = False
    saves: tuple[Value, ...] = ()
    lasting: bool = False
    scratch: int = 0
    saving_scratch: int = 0
    backward_scratch: int = 0


@dataclass
class Tape:
    """Steps in the order in which they run.

    Attributes:
        steps: The steps so far.
    """

    steps: list[Step] = field(default_factory=list)

    def parts(self, result: Value, *, backward: bool) -> tuple[Part, ...]:
        """Add up the work of each name and phase, in the order in which they first appear.

        Args:
            result: What the computation returns.
            backward: Whether the backward pass runs too.
        """
        done = [part for step in self.steps for part in step.forward]
        if backward:
            done += [part for step in reversed(self._needed(result)) for part in step.backward]
        sums: dict[tuple[str, str], Part] = {}
        for part in done:
            key = part.name, part.phase
            known = sums.get(key, Part(*key, 0, 0, 0))
            sums[key] = Part(*key, known.flops + part.flops, known.read + part.read, known.written + part.written)
        phases = (FORWARD, RECOMPUTED, BACKWARD)
        return tuple(sorted(sums.values(), key=lambda part: phases.index(part.phase)))

    def _needed(self, result: Value) -> list[Step]:
        """Return the steps that the result depends on."""
        values, steps = {result}, []
        for step in reversed(self.steps):
            if values.intersection(step.writes):
                values.update(step.reads)
                steps.append(step)
        return steps[::-1]

    def given(self, result: Value) -> tuple[Value, ...]:
        """Return what the result depends on and no step writes.

        Args:
            result: What the computation returns.
        """
        written = {value for step in self.steps for value in step.writes}
        return tuple(dict.fromkeys(v for step in self._needed(result) for v in step.reads if v not in written))

    def peak(self, result: Value, *, backward: bool) -> int:
        """Return the most bytes that live at once, those that the caller holds left out.

        Args:
            result: What the computation returns; it lives to the end.
            backward: Whether the backward pass runs too. The caller holds the gradient of the result.
        """
        needed = self._needed(result) if backward else []
        holders: dict[Value, Step] = {}  # of a value that is kept, the step whose backward pass needs it last
        for step in needed:
            for value in step.keeps:
                holders.setdefault(value, step)
        memory = _Memory()
        last = {value: step for step in self.steps for value in (*step.writes, *step.reads)}
        for step in self.steps:
            memory.take(value for value in step.writes if not value.held)
            if step in needed:
                memory.take(step.saves)
            memory.reach(step.saving_scratch if step in needed else step.scratch)
            memory.drop(
                value
                for value in (*step.reads, *step.writes)
                if last[value] is step and value not in holders and value is not result
            )
        gradients: dict[Value, Value] = {}
        for step in reversed(needed):
            memory.run_backwards(step, gradients)
            memory.drop(value for value in step.keeps if holders[value] is step and value is not result)
            memory.drop(() if step.lasting else step.saves)
        return memory.peak


class _Memory:
    """What lives at a time, and the most that ever did."""

    def __init__(self) -> None:
        self.live: set[Value] = set()
        self.handed_over: set[Value] = set()
        self.peak = 0

    def take(self, values: Iterable[Value]) -> None:
        """Let values live."""
        self.live.update(values)
        self.reach(0)

    def drop(self, values: Iterable[Value]) -> None:
        """Let values go, if they live."""
        self.live.difference_update(values)

    def reach(self, scratch: int) -> None:
        """Record what lives now, and some bytes more."""
        self.peak = max(self.peak, sum(value.bytes for value in self.live) + scratch)

    def run_backwards(self, step: Step, gradients: dict[Value, Value]) -> None:
        """Turn the gradients of what a step wrote into those of what it read; those of given values last."""
        own = [gradients.pop(value) for value in step.writes if value in gradients]
        joined = {v for v in step.joins if gradients.get(v) in self.handed_over}
        fresh = {
            v: Value(v.elements, v.itemsize) for v in dict.fromkeys(step.reads) if v not in {*step.passes, *joined}
        }
        self.take(fresh.values())
        if step.hands_over:
            self.handed_over.update(fresh.values())
        self.reach(step.backward_scratch)
        for value, gradient in fresh.items():  # a second gradient of a value is added to the first
            if gradients.setdefault(value, gradient) is not gradient:
                self.drop([gradient])
        for value in step.passes if own else ():
            gradients.setdefault(value, own[0])
        lasting: Collection[Value] = gradients.values()
        self.drop(gradient for gradient in own if gradient not in lasting)
