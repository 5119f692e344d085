"""The roofline of many processes: what one of them computes and sends, and from how many on sending takes longer.

A layer runs on the meta device as one process of a mesh that is imagined: what it would send is counted as it is sent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensorattn.diagnose.traffic import CollectiveCounter, Sent
from tensorattn.errors import OptionError, check
from tensorattn.modes import ModeSpec
from tensorattn.sharding import Sharding

__all__ = ["Machines", "Roofline", "imagined_sharding", "imagined_traffic"]


@dataclass(frozen=True)
class Machines:
    """What processes run on.

    Attributes:
        bandwidth: Bytes that a process sends in a second.
        flop_rate: Operations of a device in a second.
        memory_bandwidth: Bytes that a device reads and writes in a second.
    """

    bandwidth: float
    flop_rate: float
    memory_bandwidth: float

    @classmethod
    def read(cls, world: Any, **rates: Any) -> Machines | None:
        """Check what was given; None where nothing was.

        Args:
            world: Number of processes.
            **rates: Each of the attributes.

        Raises:
            OptionError: If something is missing, or not positive.
        """
        given = {"world": world, **rates}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return None
        if missing:
            raise OptionError(f"{', '.join(given)} go together, but {missing[0]} is missing.")
        check(world, "world", "integer", least=1)
        for name, rate in rates.items():
            check(rate, name, "number")
            if not 0 < rate < math.inf:
                raise OptionError(f"{name} must be positive and finite, got {rate}.")
        return cls(**rates)

    def compute_seconds(self, flops: int, moved: int) -> float:
        """Return the time of work: of its operations, or of its traffic to and from memory if that is longer."""
        return max(flops / self.flop_rate, moved / self.memory_bandwidth)


@dataclass(frozen=True)
class Roofline:
    """What one of many processes does, all of which hold a part of a tensor.

    Attributes:
        cuts: From each mode that is cut to the number of processes along it.
        sent: Collectives, and bytes that the process sends.
        compute_seconds: Time that it computes.
        communication_seconds: Time that it sends, without the latency of each collective.
        crossing: Number of processes, the smallest power of two, from which sending takes longer than computing; None
            if it does for none that the modes can be cut for.
    """

    cuts: Mapping[str, int]
    sent: Sent
    compute_seconds: float
    communication_seconds: float
    crossing: int | None

    @property
    def world(self) -> int:
        """Number of processes."""
        return math.prod(self.cuts.values())

    def __str__(self) -> str:
        cuts = " ".join(f"{mode}÷{count}" for mode, count in self.cuts.items())
        several = f"one of {self.world} processes ({cuts})" if cuts else "one process"
        passes = "never" if self.crossing is None else f"from {self.crossing:,} processes on"
        return (
            f"{several}: computes {_shown(self.compute_seconds)}, sends {self.sent.nbytes:,.0f} bytes in "
            f"{self.sent.calls} calls for {_shown(self.communication_seconds)}\n"
            f"sending takes longer than computing: {passes}"
        )


def _shown(seconds: float) -> str:
    """Show a time to three digits."""
    unit, factor = next(((u, f) for u, f in (("s", 1), ("ms", 1e3)) if seconds * f >= 1), ("µs", 1e6))
    return f"{seconds * factor:.3g} {unit}"


def imagined_traffic() -> CollectiveCounter:
    """Return what counts what an imagined process sends."""
    return CollectiveCounter(int)


def imagined_sharding(modes: ModeSpec, sizes: Sequence[int], sides: Sequence[int], world: int) -> Sharding:
    """Share a grid out over processes that are imagined, of which this is the first, whose part is the largest.

    The prime factors of their number, the largest first, each cut the mode that is longest then; parts are as even as
    can be.

    Args:
        modes: The modes.
        sizes: Their sizes.
        sides: How many indices of each mode stay together.
        world: Number of processes.

    Raises:
        OptionError: If the modes cannot be cut for so many.
    """
    places, counts = [-(-size // side) for size, side in zip(sizes, sides, strict=True)], [1] * len(sizes)
    for factor in _prime_factors(world):
        free = [mode for mode, count in enumerate(counts) if count * factor <= places[mode]]
        if not free:
            shown = "×".join(map(str, places))
            raise OptionError(f"world is {world}, which does not divide a grid of {shown} into so many parts.")
        longest = max(free, key=lambda mode: places[mode] / counts[mode])
        counts[longest] *= factor
    cut = {mode: count for mode, count in enumerate(counts) if count > 1}
    splits: dict[int | str, Sequence[int]] = {}
    for mode, count in cut.items():
        ends = [min(sizes[mode], sides[mode] * -(-places[mode] * place // count)) for place in range(count + 1)]
        splits[mode] = [end - start for start, end in itertools.pairwise(ends)]
    mesh: Any = _Mesh({modes.names[mode]: count for mode, count in cut.items()})
    return Sharding(mesh, {mode: dim for dim, mode in enumerate(cut)}, sizes=tuple(sizes), splits=splits)


def _prime_factors(number: int) -> list[int]:
    """Return the prime factors of a number, the largest first."""
    found, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return [*([number] if number > 1 else []), *reversed(found)]


class _Mesh:
    """A mesh of processes that are imagined, from the first of them: as much of a DeviceMesh as `Sharding` asks for."""

    device_type = "meta"

    def __init__(self, counts: Mapping[str, int]) -> None:
        self.counts = dict(counts)
        self.mesh_dim_names, self.ndim = tuple(counts), len(counts)

    def size(self, dim: int | None = None) -> int:
        """Number of processes along a dimension, or of all."""
        counts = list(self.counts.values())
        return math.prod(counts) if dim is None else counts[dim]

    def get_local_rank(self, dim: int) -> int:
        """Place of the first process."""
        return 0

    def get_group(self, dim: int = 0) -> _Mesh:
        """Return the processes along a dimension."""
        return self[self.mesh_dim_names[dim],]

    def __getitem__(self, names: tuple[str, ...]) -> _Mesh:
        """Return the processes along some dimensions."""
        return _Mesh({name: self.counts[name] for name in names})

    def _flatten(self) -> _Mesh:
        """Return them along one dimension."""
        return _Mesh({"": self.size()})

    @property
    def group_name(self) -> str:
        """Name that tells how many they are."""
        return str(self.size())
