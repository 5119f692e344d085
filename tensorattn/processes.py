"""Processes that talk: sums, gathering, exchange, and a place to meet, where all raise what one of them refuses.

An error on one process alone would let the others wait for its part of the next sum. So a call in which processes take
part, `in_common`, remembers that they have not met; before its first sum all say whether all is well, and what they are
about to add up. Who raises an error before says so there instead. That is one sum of three numbers where all is well.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensorattn import errors
from tensorattn.errors import OptionError, TensorAttentionError
from tensorattn.masks import is_recorded

if torch.distributed.is_available():
    import torch.distributed._functional_collectives  # it tells the derivatives of the operators below

__all__ = ["Meeting", "Peers", "in_backward", "meet", "size_of", "take_part"]

NOTHING = -(1 << 62)  # less than what any process says that is well


class Peers(NamedTuple):
    """Processes that talk to each other.

    The operators of torch for this that are differentiated have no public name, so they are called here alone.

    Attributes:
        name: Name of the group of processes, for torch.
        size: How many they are.
        group: The group.
    """

    name: str
    size: int
    group: Any = None

    @classmethod
    def of(cls, group: Any) -> Peers:
        """Return the processes of a group."""
        return cls(group.group_name, group.size(), group)

    def add(self, tensor: Tensor, how: str = "sum") -> Tensor:
        """Add up a tensor over the processes: all hold the same bits afterwards."""
        operators: Any = torch.ops._c10d_functional
        return operators.wait_tensor(operators.all_reduce(tensor, how, self.name))

    def gather(self, tensor: Tensor) -> Tensor:
        """Put the tensors of the processes, of one shape, behind each other along the first dimension."""
        operators: Any = torch.ops._c10d_functional
        return operators.wait_tensor(operators.all_gather_into_tensor(tensor.contiguous(), self.size, self.name))

    def swap(self, tensor: Tensor, received: Sequence[int], sent: Sequence[int]) -> Tensor:
        """Give each process its share of a vector, and put what they give behind each other; lengths are told."""
        operators: Any = torch.ops._c10d_functional
        return operators.wait_tensor(operators.all_to_all_single(tensor, [*received], [*sent], self.name))


def size_of(name: Any) -> int:
    """Return the number of processes of a group by its name, which has no public name either."""
    return int(torch.distributed.distributed_c10d._get_group_size_by_name(name))


def in_backward() -> bool:
    """Tell whether this runs in a backward pass, as what is computed again does; torch has no public name for it."""
    return torch._C._current_graph_task_id() >= 0


@dataclass
class Meeting:
    """One call of many processes, until they have met.

    Attributes:
        peers: The processes.
        device: Where they talk.
        caller: What is called, for messages.
        facts: What it is called with, as far as it must be the same.
        ahead: Whether they are still going to meet.
    """

    peers: Peers
    device: torch.device
    caller: str
    facts: tuple[str, ...]
    ahead: bool = field(default=True, init=False)

    def hold(self, facts: Sequence[str], *, last: bool) -> None:
        """Meet where all is well here; raise what another process refuses, or that two are about to do other things."""
        self.ahead = not last
        told = (*self.facts, *facts)
        number = int.from_bytes(hashlib.sha256(repr(told).encode()).digest()[:7])
        for kind, rule, hint in self._say([0, number, -number], told, ()):
            self.ahead = False
            raise kind(rule, hint=hint, teller=self.caller)

    def call_off(self, error: Exception) -> None:
        """Meet where something is refused here, for the others to know."""
        self.ahead = False
        name, rule, hint = type(error).__name__, str(error), ""
        if isinstance(error, TensorAttentionError):
            rule, hint = error.rule, error.hint
        else:
            rule = f"{name}: {rule}"
        self._say([1, NOTHING, NOTHING], (), (name, rule, hint))

    def _say(
        self, numbers: list[int], facts: tuple[str, ...], error: tuple[str, ...]
    ) -> list[tuple[type[TensorAttentionError], str, str]]:
        """Say one's own to all, and return what is to be raised; tell it all only where something is wrong."""
        heard = self.peers.add(torch.tensor(numbers, device=self.device), "max")
        if heard.is_meta:
            return []
        failed, most, least = heard.tolist()
        if not failed and most == -least:
            return []
        found: list[Any] = [None] * self.peers.size
        own = torch.distributed.get_rank(), facts, error
        torch.distributed.all_gather_object(found, own, group=self.peers.group)
        for rank, _, other in found:
            if other:
                kind = getattr(errors, other[0], TensorAttentionError)
                return [(kind, f"process {rank} refuses the call: {other[1]}", other[2])]
        one, two = next((one, two) for one, two in itertools.pairwise(found) if one[1] != two[1])
        pairs = itertools.zip_longest(one[1], two[1], fillvalue="nothing")
        mine, other = next((mine, other) for mine, other in pairs if mine != other)
        hint = "All processes must call the same, with the same batch, type, and kinds of masks and weights."
        return [(OptionError, f"process {one[0]} has {mine} where process {two[0]} has {other}.", hint)]


_MEETING: ContextVar[Meeting | None] = ContextVar("meeting", default=None)


def take_part(meeting: Meeting, call: Callable[[], Any]) -> Any:
    """Call something in which processes meet once, whatever it raises; what is called inside of it meets there too.

    Args:
        meeting: The meeting.
        call: What is called.

    Raises:
        TensorAttentionError: What another process refuses.
    """
    if _MEETING.get() is not None:
        return call()
    token = _MEETING.set(meeting)
    try:
        result = call()
        if meeting.ahead:  # nothing was added up
            meeting.hold((), last=True)
    except Exception as error:
        if meeting.ahead:
            meeting.call_off(error)
        raise
    finally:
        _MEETING.reset(token)
    return result


def meet(facts: Callable[[], Sequence[str]] = tuple, *, last: bool = True) -> None:
    """Meet the other processes of the call that runs, if there is one, and they have not met.

    Args:
        facts: What returns what is about to be done, as far as it must be the same.
        last: Whether they do not meet again.

    Raises:
        TensorAttentionError: What another process refuses.
        OptionError: If processes are about to do different things.
    """
    if is_recorded():
        return
    meeting = _MEETING.get()
    if meeting is not None and meeting.ahead:
        meeting.hold(facts(), last=last)
