"""What a layer sends between processes: collectives counted as they are called, and what others would send on paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode

from tensorattn.processes import size_of

__all__ = ["CollectiveCounter", "Sent", "sent_by_others"]

KINDS = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")


class Sent(NamedTuple):
    """What one process sends.

    Attributes:
        calls: Number of collectives.
        nbytes: Bytes, where collectives go around a ring, which no algorithm undercuts; of an exchange, the share that
            goes to others where it is even, of what is given or of what is got, whichever is more.
    """

    calls: int
    nbytes: float


class CollectiveCounter(TorchDispatchMode):
    """Count the functional collectives that are called inside, forwards and backwards, by their kind.

    Args:
        size_of: From the name of a group of processes to their number.

    Attributes:
        sent: For each kind of collective, what one process sent; for all-reduces by a maximum, where processes meet,
            ``"meeting"``.

    Examples:
        >>> import torch, tensorattn as ta
        >>> from tensorattn.diagnose.traffic import CollectiveCounter
        >>> with CollectiveCounter() as counter:
        ...     y = ta.TensorAttention(8, 2, modes=2)(torch.randn(1, 3, 4, 8))  # alone
        >>> counter.total
        Sent(calls=0, nbytes=0)
    """

    def __init__(self, size_of: Callable[[str], int] = size_of) -> None:
        super().__init__()
        self.size_of = size_of
        self.sent: dict[str, Sent] = {}

    @property
    def total(self) -> Sent:
        """What was sent in all."""
        found = self.sent.values()
        return Sent(sum(each.calls for each in found), sum(each.nbytes for each in found))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation, and call it."""
        result, kind = func(*args, **(kwargs or {})), func._schema.name.removeprefix("_c10d_functional::")
        if kind in KINDS:
            world = self.size_of(args[-1])
            most = max(args[0].nbytes, result.nbytes)  # what is gathered, or scattered
            share = most * (world - 1) / world * (2 if kind == KINDS[0] else 1)
            kind = "meeting" if kind == KINDS[0] and args[1] == "max" else kind
            calls, nbytes = self.sent.get(kind, Sent(0, 0))
            self.sent[kind] = Sent(calls + 1, nbytes + share)
        return result


def sent_by_others(batch: int, sizes: Sequence[int], channels: int, itemsize: int, world: int) -> dict[str, Sent]:
    """Return what full attention sends forwards, by formula, where positions are cut evenly.

    Args:
        batch: Size of the batch B.
        sizes: Sizes of the modes, P positions in all.
        channels: Channels C of queries, keys and values.
        itemsize: Bytes of a number.
        world: Number of processes R.

    Returns:
        For gathering inputs, (R−1)/R of B·P·C numbers; for Ulysses, which changes positions for heads and back, four
        times (R−1)/R² of them; and for ring attention, which passes keys and values on, 2(R−1)/R of them.

    Examples:
        >>> for name, sent in sent_by_others(1, (16, 24, 32), 32, 4, 4).items():
        ...     print(f"{name}: {sent.calls} calls, {sent.nbytes:,.0f} bytes")
        gathering: 1 calls, 1,179,648 bytes
        Ulysses: 4 calls, 1,179,648 bytes
        ring attention: 3 calls, 2,359,296 bytes
    """
    own = batch * math.prod(sizes) * channels * itemsize / world
    return {
        "gathering": Sent(1, own * (world - 1)),
        "Ulysses": Sent(4, 4 * own * (world - 1) / world),
        "ring attention": Sent(world - 1, 2 * own * (world - 1)),
    }
