"""A tensor that is shared out over processes: each holds a box of its grid.

Statistics are sums, so a layer adds up what the processes know in one all-reduce, and each attends from its own
positions. Losses are added: the gradients of the processes, added up, are those of the sum of their losses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tensorattn.errors import OptionError, ShapeError, check, retells
from tensorattn.masks import Part, is_recorded
from tensorattn.modes import ModeSpec
from tensorattn.processes import Meeting, Peers, in_backward, meet, take_part

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Sharding", "call_shared_out", "in_common", "is_shared_out", "own_tensor"]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Sharding:
    """Which box of a grid each process holds: the modes that are cut, each along one dimension of a mesh of processes.

    It is an argument of `TensorAttention`, `TensorTransformerBlock` and `TensorTransformer`, which are then given the
    box of each process and return that of the output. What is said of positions is said of the box, as a mask and
    weights, but for ``lengths``, which count indices of the whole. Processes along dimensions of the mesh that cut no
    mode, such as those of data parallelism, are not asked.

    The loss is the sum of the losses of the processes, so gradients of parameters are added up, not averaged: with
    FSDP2 ``set_gradient_divide_factor(1.0)``. A mean over all positions is a sum divided by their number.

    All processes of the mesh make it together, and call the same things in the same order. What one refuses all refuse:
    before its first sum a call of a layer or block, or ``summarize`` of a layer, adds up whether all is well, and a
    model once more before its blocks. That is a sum of 24 bytes, whose result is read, as ``lengths`` are, so a GPU is
    waited for; ``checked=False`` leaves it out, as does what is compiled. Then, and where a process leaves out its
    backward pass or is gone, the others wait for it up to the time limit of their group.

    Args:
        mesh: The processes.
        modes: From each mode that is cut, by name or index, to the dimension of the mesh, by name or index.
        sizes: Sizes of the modes of the whole.
        splits: From modes to the number of indices of each process along it, in their order, which may be zero; by
            default as `torch.chunk` and DTensor cut.
        checked: Whether all processes raise what one of them refuses.

    Raises:
        OptionError: If the mesh has no such dimension, or one cuts two modes.

    Examples:
        >>> import torch, tensorattn as ta
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> store = torch.distributed.HashStore()
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("time",))
        >>> sharding = ta.Sharding(mesh, {"t": "time"}, sizes=(6, 5))
        >>> layer, video = ta.TensorAttention(8, 2, modes="t h"), torch.randn(2, 6, 5, 8)
        >>> own = sharding.own(video, modes="t h")  # all of it, where there is one process
        >>> torch.allclose(layer(own, sharding=sharding), layer(video), atol=1e-6)
        True
        >>> torch.distributed.destroy_process_group()
    """

    mesh: DeviceMesh
    modes: Mapping[int | str, int | str]
    sizes: tuple[int, ...] = field(kw_only=True)
    splits: Mapping[int | str, Sequence[int]] | None = field(default=None, kw_only=True)
    checked: bool = field(default=True, kw_only=True)
    peers: Peers | None = field(init=False, repr=False)  # the processes that add up
    _others: dict[int, Peers | None] = field(init=False, repr=False)  # those that hold the same along a dimension

    @retells
    def __post_init__(self) -> None:
        """Check what can be checked without a layer, and put the processes of all cuts into one group."""
        for name in ("modes", "splits"):
            given = getattr(self, name)
            if not isinstance(given, Mapping) and (name == "modes" or given is not None):
                raise OptionError(f"{name} must be a mapping from modes, got {given!r}.")
        check(self.checked, "checked", "switch")
        if not hasattr(self.mesh, "mesh_dim_names"):
            raise OptionError(f"mesh must be a DeviceMesh, got {type(self.mesh).__name__}.")
        for name, numbers in (
            ("sizes", self.sizes),
            *((f"splits of mode {m!r}", n) for m, n in (self.splits or {}).items()),
        ):
            if isinstance(numbers, str) or not isinstance(numbers, Sequence):
                raise OptionError(f"{name} must be a sequence of integers, got {numbers!r}.")
        object.__setattr__(self, "sizes", tuple(self.sizes))
        for mode, size in enumerate(self.sizes):
            check(size, f"sizes of mode {mode}", "integer", least=1)
        dims = [self._mesh_dim(dim) for dim in self.modes.values()]
        for dim in dims:
            if dims.count(dim) > 1:
                raise OptionError(f"dimension {self._called(dim)} of the mesh cuts {dims.count(dim)} modes.")
        names = self.mesh.mesh_dim_names
        if len(dims) > 1 and names is None:
            raise OptionError("mesh has no mesh_dim_names, which cutting more than one mode needs.")
        object.__setattr__(self, "peers", self._peers_along(dims))
        object.__setattr__(self, "_others", {dim: self._peers_along([k for k in dims if k != dim]) for dim in dims})

    @classmethod
    @retells
    def of(cls, tensor: Any, *, channels_first: bool = False) -> Sharding:
        """Return how a DTensor ``(B, n_1, …, n_N, C)`` is shared out.

        Args:
            tensor: The DTensor.
            channels_first: Whether it is ``(B, C, n_1, …, n_N)``.

        Raises:
            OptionError: If it is none, holds partial sums, its channels are cut, or a mode is cut twice.

        Examples:
            >>> import torch, tensorattn as ta
            >>> from torch.distributed.device_mesh import init_device_mesh
            >>> from torch.distributed.tensor import Shard, distribute_tensor
            >>> store = torch.distributed.HashStore()
            >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            >>> mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("time",))
            >>> video = distribute_tensor(torch.randn(2, 6, 5, 8), mesh, [Shard(1)])
            >>> ta.Sharding.of(video)
            Sharding({0: 'time'}, sizes=(6, 5))
            >>> torch.distributed.destroy_process_group()
        """
        if not is_shared_out(tensor):
            raise OptionError(f"tensor must be a DTensor, got {type(tensor).__name__}.")
        first = 2 if channels_first else 1
        sizes = tuple(tensor.shape[2:] if channels_first else tensor.shape[1:-1])
        modes: dict[int | str, int | str] = {}
        for dim, placement in enumerate(tensor.placements):
            if placement.is_partial():
                raise OptionError(
                    f"tensor holds partial sums along dimension {dim} of the mesh.", hint="Redistribute it."
                )
            if placement.is_replicate() or placement.dim == 0:
                continue
            mode = placement.dim - first
            if not 0 <= mode < len(sizes):
                raise OptionError(f"tensor has its channels cut along dimension {dim} of the mesh.", hint="Cut a mode.")
            if not placement.is_shard():
                raise OptionError(f"tensor is cut by {placement} along dimension {dim} of the mesh.", hint="Use Shard.")
            if mode in modes:
                raise OptionError(f"mode {mode} is cut along two dimensions of the mesh, {modes[mode]} and {dim}.")
            modes[mode] = dim
        return cls(tensor.device_mesh, modes, sizes=sizes)

    def __repr__(self) -> str:
        cuts = ", ".join(f"{mode!r}: {self._called(self._mesh_dim(dim))}" for mode, dim in self.modes.items())
        splits = "" if self.splits is None else f", splits={dict(self.splits)}"
        checked = "" if self.checked else ", checked=False"
        return f"{type(self).__name__}({{{cuts}}}, sizes={self.sizes}{splits}{checked})"

    @retells
    def own(self, tensor: Tensor, *, modes: int | str | Sequence[str] | None = None, dim: int = 1) -> Tensor:
        """Return the box that this process holds of a tensor that is whole, as in the example of `Sharding`.

        Args:
            tensor: The tensor.
            modes: Names of the modes, where they were cut by name.
            dim: The dimension of the first mode.

        Raises:
            ShapeError: If it has other sizes, or splits do not add up.
            ModesError: If a mode does not exist.
            OptionError: If a mode is cut twice, or there are not as many splits as processes.
        """
        spec = ModeSpec.parse(len(self.sizes) if modes is None else modes)
        part = self.part(spec)
        if not isinstance(tensor, Tensor):
            raise OptionError(f"tensor must be a torch.Tensor, got {type(tensor).__name__}.")
        found = tuple(tensor.shape[dim : dim + spec.order])
        if found != self.sizes:
            raise ShapeError(f"tensor has the sizes {found} from dimension {dim}, but sizes is {self.sizes}.")
        return part.box(tensor, dim)

    def part(self, spec: ModeSpec) -> Part:
        """Return where the box of this process stands, and how sums are added up: see the example of `patched`.

        Args:
            spec: The modes.

        Raises:
            ShapeError: If there are other modes than sizes, or splits do not add up.
            ModesError: If a mode does not exist.
            OptionError: If a mode is cut twice, or there are not as many splits as processes.
        """
        splits = self._splits(spec)
        start, lengths, places = [0] * spec.order, list(self.sizes), [0] * spec.order
        for mode, (dim, split) in splits.items():
            places[mode] = place = self.mesh.get_local_rank(dim)
            start[mode], lengths[mode] = sum(split[:place]), split[place]
        total = functools.partial(
            _total, {None: self.peers, **{m: self._others[dim] for m, (dim, _) in splits.items()}}
        )
        cuts = {m: (Peers.of(self.mesh.get_group(dim)), split) for m, (dim, split) in splits.items()}
        gather, exchange = functools.partial(_gathered, cuts), functools.partial(_exchanged, cuts, places)
        return Part(
            self.sizes,
            tuple(start),
            tuple(lengths),
            total,
            gather,
            exchange,
            {m: split for m, (_, split) in splits.items()},
        )

    def patched(self, spec: ModeSpec, patch: Sequence[int], pad: bool) -> Sharding:
        """Return how the grid of patches is shared out.

        Args:
            spec: The modes.
            patch: Size of a patch along each mode.
            pad: Whether the last patch may be cut short.

        Raises:
            ShapeError: If a patch is not in one process.
            OptionError: If a process has no patch.

        Examples:
            >>> import torch, tensorattn as ta
            >>> from torch.distributed.device_mesh import init_device_mesh
            >>> from tensorattn.modes import ModeSpec
            >>> store = torch.distributed.HashStore()
            >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            >>> mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("time",))
            >>> sharding = ta.Sharding(mesh, {"t": "time"}, sizes=(6, 5))
            >>> part = sharding.part(ModeSpec.parse("t h"))
            >>> part.start, part.lengths
            ((0, 0), (6, 5))
            >>> sharding.patched(ModeSpec.parse("t h"), (2, 2), pad=True)
            Sharding({0: 'time'}, sizes=(3, 3), splits={0: [3]})
            >>> torch.distributed.destroy_process_group()
        """
        splits: dict[int | str, Sequence[int]] = {}
        for mode, (_, split) in self._splits(spec).items():
            label, side = spec.label(mode), patch[mode]
            for place, length in enumerate(split):
                if length == 0:
                    raise OptionError(f"process {place} along mode {label} has no index, but a model needs a patch.")
                if length % side and not (pad and place == len(split) - 1):
                    told = f"{length} indices, which patches of {side} do not divide."
                    raise ShapeError(f"process {place} along mode {label} has {told}")
            splits[mode] = [-(-length // side) for length in split]
        sizes = tuple([-(-size // side) for size, side in zip(self.sizes, patch, strict=True)])
        modes: dict[int | str, int | str] = {spec.index(mode): dim for mode, dim in self.modes.items()}
        return Sharding(self.mesh, modes, sizes=sizes, splits=splits, checked=self.checked)

    def _splits(self, spec: ModeSpec) -> dict[int, tuple[int, tuple[int, ...]]]:
        """Return for each mode that is cut its dimension of the mesh, and the lengths of all processes along it."""
        if len(self.sizes) != spec.order:
            raise ShapeError(f"sharding has sizes for {len(self.sizes)} modes, but there are {spec.order}.")
        told = {spec.index(mode): tuple(split) for mode, split in (self.splits or {}).items()}
        found: dict[int, tuple[int, tuple[int, ...]]] = {}
        for given, along in self.modes.items():
            mode, dim = spec.index(given), self._mesh_dim(along)
            size, count, label = self.sizes[mode], self.mesh.size(dim), spec.label(mode)
            if mode in found:
                raise OptionError(f"mode {label} is cut twice.")
            side = -(-size // count)
            split = told.pop(mode, tuple([max(0, min(side, size - place * side)) for place in range(count)]))
            if len(split) != count:
                raise OptionError(f"splits of mode {label} has {len(split)} lengths, but {count} processes cut it.")
            for length in split:
                check(length, f"splits of mode {label}", "integer", least=0)
            if sum(split) != size:
                raise ShapeError(f"splits of mode {label} add up to {sum(split)}, but its size is {size}.")
            found[mode] = dim, split
        for mode in told:
            raise OptionError(f"splits names mode {spec.label(mode)}, which is not cut.")
        return found

    def _peers_along(self, dims: Sequence[int]) -> Peers | None:
        """Return the processes that differ from this one along some dimensions of the mesh alone; None along none."""
        mesh: Any = self.mesh
        if len(dims) < 2:
            return Peers.of(mesh.get_group(dims[0])) if dims else None
        names = tuple([mesh.mesh_dim_names[dim] for dim in sorted(dims)])
        return Peers.of(mesh[names]._flatten().get_group())  # no public name makes one dimension of two

    def _mesh_dim(self, dim: int | str) -> int:
        """Return the index of a dimension of the mesh."""
        names, count = self.mesh.mesh_dim_names or (), self.mesh.ndim
        if dim in names:
            return names.index(dim)
        if isinstance(dim, int) and -count <= dim < count:
            return dim % count
        raise OptionError(f"the mesh has no dimension {dim!r} among {names or tuple(range(count))}.")

    def _called(self, dim: int) -> str:
        """Return how messages call a dimension of the mesh."""
        return str(dim) if self.mesh.mesh_dim_names is None else repr(self.mesh.mesh_dim_names[dim])


def is_shared_out(tensor: Any) -> bool:
    """Tell whether something is a DTensor, without importing what DTensors are."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def own_tensor(tensor: Any) -> Any:
    """Return what this process holds of a DTensor; anything else as it is."""
    return tensor.to_local() if is_shared_out(tensor) else tensor


def call_shared_out(
    call: Callable[..., Tensor],
    x: Any,
    sharding: Sharding | None,
    spoken: Mapping[str, Any],
    *,
    channels_first: bool,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Call a module with what this process holds of a DTensor, and return a DTensor that is cut in the same way.

    Args:
        call: The module.
        x: The DTensor.
        sharding: What was told beside it.
        spoken: What else the module is called with; of other DTensors what this process holds.
        channels_first: Whether its channels come before its modes.
        shape: Shape of the result; that of ``x`` if None.

    Raises:
        OptionError: If it is told how to be cut, or is cut in a way that has no meaning.
    """
    if sharding is not None:
        raise OptionError("sharding has no meaning with a DTensor, which tells its own.")
    found = Sharding.of(x, channels_first=channels_first)
    y = call(x.to_local(), sharding=found, **tree_map(own_tensor, dict(spoken)))
    whole = torch.empty(x.shape if shape is None else tuple(shape), device="meta")
    return type(x).from_local(y, x.device_mesh, x.placements, run_check=False, shape=whole.shape, stride=whole.stride())


def in_common(function: Callable[P, R]) -> Callable[P, R]:
    """Make a method that takes a ``sharding`` raise on all processes what one of them raises before its first sum.

    Args:
        function: The method.
    """

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        sharding = kwargs.get("sharding")
        if not isinstance(sharding, Sharding) or sharding.peers is None or not sharding.checked:
            return function(*args, **kwargs)
        if is_recorded() or in_backward():  # what is computed again was checked before
            return function(*args, **kwargs)
        spoken = [name for name, given in sorted(kwargs.items()) if given is not None]
        inputs = [f"{t.dtype} of batch {t.shape[0]}" for t in tree_leaves(args) if isinstance(t, Tensor) and t.dim()]
        counts = [
            t.tolist() if isinstance(t, Tensor) and not t.is_meta else t for t in tree_leaves(kwargs.get("lengths"))
        ]
        facts = (repr(sharding), f"the arguments {', '.join(spoken)}", f"the lengths {counts}", *inputs)
        meeting = Meeting(sharding.peers, torch.device(sharding.mesh.device_type), type(args[0]).__name__, facts)
        return take_part(meeting, functools.partial(function, *args, **kwargs))

    return called


def _total(
    groups: Mapping[int | None, Peers | None], make: Callable[[], list[Tensor]], but: int | None
) -> list[Tensor]:
    """Add up what all processes of a group know, in one call for each type: all hold the same bits afterwards."""
    tensors, peers = make(), groups.get(but, groups[None])
    if peers is None or not tensors:
        return tensors
    meet(functools.partial(_told, tensors, whole=but is None))
    found = list(tensors)
    for dtype in dict.fromkeys([each.dtype for each in tensors]):
        places = [place for place, each in enumerate(tensors) if each.dtype == dtype]
        added = peers.add(torch.cat([tensors[place].reshape(-1) for place in places]))
        for place, part in zip(places, added.split([tensors[place].numel() for place in places]), strict=True):
            found[place] = part.view(tensors[place].shape)
    return found


def _gathered(
    cuts: Mapping[int, tuple[Peers, Sequence[int]]], tensor: Tensor, mode: int, dim: int, one: bool
) -> Tensor:
    """Put the parts of a tensor along a mode behind each other; all are padded to the longest on the way.

    Each has its indices of the mode, or only one.
    """
    if mode not in cuts:
        return tensor
    meet(functools.partial(_told, [tensor], whole=False))
    peers, split = cuts[mode]
    split = (1,) * peers.size if one else split
    longest, moved = max(split), tensor.movedim(dim, 0)
    padded = torch.nn.functional.pad(moved, (*(0, 0) * (moved.dim() - 1), 0, longest - moved.shape[0]))
    whole = peers.gather(padded)
    parts = [whole.narrow(0, place * longest, length) for place, length in enumerate(split)]
    return torch.cat(parts).movedim(0, dim)


def _exchanged(
    cuts: Mapping[int, tuple[Peers, Sequence[int]]],
    places: Sequence[int],
    tensor: Tensor,
    mode: int,
    dim: int,
    back: int | None,
) -> Tensor:
    """Cut the next dimension in place of a mode, so that each process has whole fibres; or back, to a length."""
    meet(functools.partial(_told, [tensor], whole=False))
    (peers, split), place = cuts[mode], places[mode]
    moved = tensor.movedim((dim, dim + 1), (0, 1))
    columns = moved.shape[1] if back is None else back
    if is_recorded() and columns < peers.size:  # a graph leaves out what is empty, and the others would wait
        raise OptionError(
            f"mode {mode} has {columns} columns for {peers.size} processes, which compiled code cannot exchange.",
            hint="Call it without torch.compile.",
        )
    shares = [len(range(first, columns, peers.size)) for first in range(peers.size)]  # as even as can be
    if back is None:
        sent, shapes = moved.split(shares, 1), [(length, shares[place]) for length in split]
    else:
        sent, shapes = moved.split([*split]), [(split[place], share) for share in shares]
    width = math.prod(moved.shape[2:])
    lengths = [rows * share * width for rows, share in shapes]
    found = peers.swap(torch.cat([each.reshape(-1) for each in sent]), lengths, [each.numel() for each in sent])
    parts = [each.view(*shape, *moved.shape[2:]) for each, shape in zip(found.split(lengths), shapes, strict=True)]
    return torch.cat(parts, 0 if back is None else 1).movedim((0, 1), (dim, dim + 1))


def _told(tensors: Sequence[Tensor], *, whole: bool) -> list[str]:
    """Say what is sent, as far as it must be the same: shapes too where they are those of the whole."""
    shapes = [str(tuple(each.shape)) if whole else f"{each.dim()} dimensions" for each in tensors]
    grads = [" with a gradient" if each.requires_grad else "" for each in tensors]
    return [f"{each.dtype} {shape}{grad}" for each, shape, grad in zip(tensors, shapes, grads, strict=True)]
