"""A tensor larger than memory: a file is read twice, once to add up what is known of it, once to attend.

A chunk is a part of the grid (`tensorattn.functional.parts`) whose sums are added to those of the chunks before, in
float64. Then each chunk attends to what they make, as the whole would.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensorattn.errors import DtypeError, OptionError, ShapeError, check, is_integer, retells
from tensorattn.functional.operator import get_operator
from tensorattn.masks import Part, Weights, accumulation_dtype, counting_dtype, one_a_mode, read_weights
from tensorattn.modes import GridShape
from tensorattn.nn.attention import TensorAttention
from tensorattn.nn.checks import check_parts
from tensorattn.nn.parameters import parameter_of

__all__ = ["attend_blockwise"]

CHUNK = 1 << 22  # elements of a chunk where none is told
SECONDS = 1.0  # between two states that are saved

Box = tuple[tuple[int, int], ...]  # start and length a mode


@retells
@torch.no_grad()
def attend_blockwise(
    layer: TensorAttention,
    source: Any,
    sink: Any,
    *,
    chunks: int | Sequence[int | None] | Mapping[Any, int] | None = None,
    mask: Any = None,
    channel_mode: int | None = -1,
    state: str | os.PathLike[str] | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> None:
    """Attend over one tensor that is larger than memory, such as a file, and write the output into another.

    The source is read twice: statistics are sums, so they are added up chunk by chunk, in float64; then each chunk
    attends to what all have in common. The output is that of ``layer(source)``, whatever the chunks. The next chunk is
    read while one is worked on, and a few chunks are in memory at a time.

    It serves the operators whose statistics are small: ``additive``, ``truncated``, ``kao_kv``, ``kao_qkv``, and
    ``clustered`` with blocks or held cells. Others need all positions at once, and are refused.

    While it runs, the sink is marked as incomplete: by a file beside it with the ending ``.incomplete`` where it is a
    `numpy.memmap`, by the attribute ``incomplete`` where it has attributes as those of zarr and h5py have. What was
    stopped or killed leaves the mark, and with a ``state`` goes on from there when it is called again.

    Args:
        layer: The layer. In training mode nothing may be dropped.
        source: A tensor ``(n_1, …, n_N, C)`` with ``shape``, ``dtype`` and slices: a `numpy.memmap`, an array of zarr
            or h5py, the ``dataobj`` of nibabel. It must not change while this runs, or until it goes on.
        sink: Where the output goes: of the same shape, of a floating-point type, written by slices. Not the source.
        chunks: Number of indices of a chunk: one for every mode, one a mode or None for the whole mode, or a mapping
            from modes as in ``{"t": 4}``; by default the first modes are cut until a chunk has about four million
            elements. Chunks of a file that is stored in such are best read whole.
        mask: True where a position takes part, ``(n_1, …, n_N)``, read by slices as the source is; None for all.
        channel_mode: Which dimension of source and sink holds the channels; None where there are none, for a layer
            with one.
        state: A file to go on from, which is there while the sink is incomplete; None for none.
        progress: Whether to count chunks on the standard error where that is a terminal.
        device: Where to work; that of the layer if None. A layer elsewhere is copied.

    Raises:
        OptionError: If the layer or its operator cannot work in parts, source and sink are the same or cannot be
            sliced, the source has masked values, the sink is read-only, chunks are no positive integers or cut the
            causal mode, or the state is no state, or that of another run.
        ShapeError: If source, sink or mask do not fit.
        DtypeError: If the source holds no real numbers, the sink no floating-point numbers, or the mask is not bool.
        ModesError: If chunks name a mode that does not exist, or are not one a mode.

    Examples:
        >>> import numpy as np, torch, tensorattn as ta
        >>> layer = ta.TensorAttention(16, 4, modes="t h w")
        >>> video, output = np.random.rand(2, 12, 9, 7, 16).astype(np.float32)
        >>> ta.attend_blockwise(layer, video, output, chunks={"t": 5})
        >>> torch.allclose(torch.tensor(output), layer(torch.tensor(video)[None])[0], atol=1e-5)
        True
    """
    check(progress, "progress", "switch")
    _check_layer(layer)
    sizes, channels = _sizes_of(layer, source, sink, channel_mode)
    if mask is not None:
        _check_mask(layer, mask, sizes)
    lengths = _chunk_lengths(layer, chunks, sizes, channels)
    _check_state(state)
    parameter = parameter_of(layer)
    if device is not None and parameter is not None and parameter.device != torch.device(device):
        layer = copy.deepcopy(layer).to(device)
    files = _Files(layer, source, sink, mask, channel_mode)
    spans = [
        [(start, min(length, size - start)) for start in range(0, size, length)]
        for length, size in zip(lengths, sizes, strict=True)
    ]
    _Run(files, sizes, list(itertools.product(*spans)), state, progress).run()


class _Run:
    """Two loops over the chunks, which may go on from a state that was saved."""

    def __init__(self, files: _Files, sizes: tuple[int, ...], boxes: list[Box], state: Any, shown: bool) -> None:
        self.files, self.sizes, self.boxes = files, sizes, boxes
        self.state = None if state is None else Path(state)
        self.shown = shown and sys.stderr.isatty()
        self.sums: list[list[Tensor]] = []  # of each time that the layer asks for the total
        self.known, self.done, self.asked, self.saved = False, 0, 0, 0.0
        self.facts: dict[str, Any] = {}  # what must be the same to go on

    def run(self) -> None:
        """Add up, attend, and take the mark off the sink."""
        self._load()
        mark = _Mark(self.files.sink)
        mark.set()
        try:
            if not self.known:
                for box, x, weights in self._chunks("summarise"):
                    self.files.layer.add_up(x, self._in_whole(weights, box))
                self.known, self.done = True, 0
                self._save()
            for box, x, weights in self._chunks("attend"):
                self.files.write(box, self.files.layer.attended(x, self._in_whole(weights, box)))
        except BaseException as error:
            attended = self.done if self.known else 0
            error.add_note(f"The sink is incomplete: {attended} of {len(self.boxes)} chunks are written.")
            raise
        self.files.flush()
        if self.state is not None:
            self.state.unlink(missing_ok=True)
        mark.clear()

    def _chunks(self, what: str) -> Iterator[tuple[Box, Tensor, Weights]]:
        """Read chunks that are not done, each while the one before is worked on, and count those that are."""
        with ThreadPoolExecutor(1) as reader:
            left = self.boxes[self.done :]
            coming = [reader.submit(self.files.read, box) for box in left[:1]]
            for place, box in enumerate(left):
                x, weights = coming.pop().result()
                coming += [reader.submit(self.files.read, following) for following in left[place + 1 : place + 2]]
                self.asked = 0
                yield box, x, weights
                self.done += 1
                if self.shown:
                    end = "\n" if self.done == len(self.boxes) else ""
                    print(f"\r{what} {self.done}/{len(self.boxes)} chunks", end=end, file=sys.stderr, flush=True)
                if time.monotonic() - self.saved >= SECONDS and self.done < len(self.boxes):
                    self._save()

    def _in_whole(self, weights: Weights, box: Box) -> Weights:
        """Say where a chunk stands."""
        start, lengths = zip(*box, strict=True)
        return dataclasses.replace(weights, part=Part(self.sizes, start, lengths, self._total))

    def _total(self, make: Callable[[], list[Tensor]], _: int | None) -> list[Tensor]:
        """Add the sums of a chunk to those of the chunks before; return them once they are known."""
        place, self.asked = self.asked, self.asked + 1
        if self.known:
            return self.sums[place]
        found = make()
        wide = [each.to(counting_dtype(each.device)) for each in found]
        if place == len(self.sums):
            self.sums.append(wide)
        else:
            self.sums[place] = [one + other for one, other in zip(self.sums[place], wide, strict=True)]
        return found

    def _found(self) -> dict[str, Any]:
        """Return what must be the same to go on; of the source its first chunk stands for all."""
        files, state = self.files, self.files.layer.state_dict()
        x, _ = files.read(self.boxes[0])
        return {
            "layer": f"{files.layer.extra_repr()}, weights {' '.join(state)} {_digest(map(_bytes, state.values()))}",
            "chunks": _digest([repr(self.boxes).encode()]),
            "mask": files.mask is not None,
            "channel_mode": files.channel_mode,
            "source": f"{tuple(files.source.shape)} {files.source.dtype} {_digest([_bytes(x)])}",
        }

    def _written(self) -> str:
        """Tell the first and the last chunk that are written from others, where the sink can be read."""
        if not (self.known and self.done and hasattr(self.files.sink, "__getitem__")):
            return ""
        return _digest(self.files.written(self.boxes[place]) for place in (0, self.done - 1))

    def _save(self) -> None:
        """Save what is known, after what was written: whatever happens the file is an old state or this one."""
        if self.state is None:
            return
        self.files.flush()
        temporary = self.state.with_name(f"{self.state.name}.new")
        saved = {"facts": self.facts, "known": self.known, "done": self.done, "sums": self.sums}
        saved["written"] = self._written()
        with temporary.open("wb") as file:
            torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.state)
        self.saved = time.monotonic()

    def _load(self) -> None:
        """Go on from a state that was saved."""
        self.saved = time.monotonic()
        if self.state is None:
            return
        self.facts = self._found()
        if not self.state.exists():
            return
        told, hint = f"state {str(self.state)!r} is", "Delete it to start anew."
        device = parameter_of(self.files.layer)
        try:
            saved = torch.load(self.state, weights_only=True, map_location=None if device is None else device.device)
            facts, written = saved["facts"], saved["written"]
            self.known, self.done, self.sums = saved["known"], saved["done"], saved["sums"]
        except Exception as cause:  # there are many ways to be another file
            raise OptionError(f"{told} no state of this function.", hint=hint) from cause
        for name, fact in self.facts.items():
            if facts.get(name) != fact:
                raise OptionError(f"{told} that of a run with another {name}.", hint=hint)
        if self._written() != written:  # the sink was made anew
            self.done = 0


def _digest(parts: Iterable[bytes]) -> str:
    """Return a short word for bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor of any type."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class _Files:
    """What is read and written by slices: from an array to a chunk ``(1, l_1, …, l_N, C)``, and back."""

    layer: TensorAttention
    source: Any
    sink: Any
    mask: Any
    channel_mode: int | None

    def _slices(self, box: Box) -> tuple[slice, ...]:
        """Return where a chunk is."""
        found = [slice(start, start + length) for start, length in box]
        if self.channel_mode is not None:
            found.insert(self.channel_mode % (len(box) + 1), slice(None))
        return tuple(found)

    def read(self, box: Box) -> tuple[Tensor, Weights]:
        """Read a chunk and its mask; what takes no part becomes zero."""
        parameter = parameter_of(self.layer)
        assert parameter is not None
        kind = np.float64 if parameter.dtype == torch.float64 else np.float32
        part = self.source[self._slices(box)]
        if np.ma.is_masked(part):
            raise OptionError(
                "source has masked values.", hint="Give its data, and mask=, True where it is not masked."
            )
        array = np.array(part, dtype=kind)
        x = torch.from_numpy(array).to(parameter.device, parameter.dtype).unsqueeze(0)
        x = x.unsqueeze(-1) if self.channel_mode is None else x.movedim(1 + self.channel_mode % (len(box) + 1), -1)
        lengths, mask = tuple([length for _, length in box]), None
        if self.mask is not None:
            mask = torch.from_numpy(np.array(self.mask[tuple([slice(start, start + n) for start, n in box])]))
        grid = GridShape((1,), lengths, x.shape[-1])
        weights = read_weights(None, mask, None, grid, x, self.layer.modes, of="source", part_of=range(len(box)))
        return x if mask is None else torch.where(weights.present.unsqueeze(-1), x, 0.0), weights  # type: ignore[union-attr]

    def write(self, box: Box, y: Tensor) -> None:
        """Write the output of a chunk."""
        y = y.squeeze(0)
        y = y.squeeze(-1) if self.channel_mode is None else y.movedim(-1, self.channel_mode % (len(box) + 1))
        self.sink[self._slices(box)] = y.to("cpu", accumulation_dtype(y.dtype)).numpy()

    def written(self, box: Box) -> bytes:
        """Return what the sink holds of a chunk."""
        return np.asarray(self.sink[self._slices(box)]).tobytes()

    def flush(self) -> None:
        """Bring what was written to the disk, where the sink has a way to."""
        for owner in (_memmap_of(self.sink), self.sink, getattr(self.sink, "file", None)):
            if callable(flush := getattr(owner, "flush", None)):
                flush()
                return


class _Mark:
    """What tells that a sink is incomplete, where something can."""

    def __init__(self, sink: Any) -> None:
        self.attributes = getattr(sink, "attrs", None)
        file = _memmap_of(sink)
        self.file = None if file is None else Path(f"{file.filename}.incomplete")

    def set(self) -> None:
        """Mark it."""
        if self.attributes is not None:
            self.attributes["incomplete"] = True
        if self.file is not None:
            self.file.touch()

    def clear(self) -> None:
        """Take the mark off."""
        if self.attributes is not None:
            del self.attributes["incomplete"]
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def _memmap_of(array: Any) -> np.memmap[Any, Any] | None:
    """Return the file that an array is, or is a view of."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap) and array.filename is not None:
            return array
        array = array.base
    return None


def _check_state(state: Any) -> None:
    """Check that a state can be written."""
    if state is None:
        return
    if not isinstance(state, (str, os.PathLike)):
        raise OptionError(f"state must be a path or None, got {type(state).__name__}.")
    if Path(state).is_dir() or not Path(state).parent.is_dir():
        raise OptionError(f"state {os.fspath(state)!r} must be a file in a folder that exists.")


def _check_layer(layer: Any) -> None:
    """Check that a layer can work in parts."""
    if not isinstance(layer, TensorAttention):
        raise OptionError(f"layer must be a TensorAttention, got {type(layer).__name__}.")
    if layer.training and (layer.dropout > 0 or layer.proj_drop > 0):
        raise OptionError("layer is in training mode and drops.", hint="Call layer.eval().")
    if (layer.kdim, layer.vdim) != (layer.embed_dim, layer.embed_dim):
        raise OptionError(f"layer takes a context: kdim is {layer.kdim} and vdim {layer.vdim}, not {layer.embed_dim}.")
    order = layer.modes.order
    check_parts(get_operator(layer.operator), layer.options, order, layer.causal, what="attend_blockwise")


def _sizes_of(layer: TensorAttention, source: Any, sink: Any, channel_mode: int | None) -> tuple[tuple[int, ...], int]:
    """Check source and sink, and return the sizes of the modes and the number of channels."""
    for name, array, needed in (("source", source, "__getitem__"), ("sink", sink, "__setitem__")):
        for attribute in ("shape", "dtype", needed):
            if not hasattr(array, attribute):
                raise OptionError(f"{name} has no {attribute}, got {type(array).__name__}.")
        if isinstance(array, Tensor):
            raise OptionError(f"{name} must be an array, got a tensor of torch.", hint="Give tensor.numpy().")
    shape, order, dims = tuple(source.shape), layer.modes.order, layer.modes.order + (channel_mode is not None)
    if channel_mode is not None and not (is_integer(channel_mode) and -dims <= channel_mode < dims):
        raise OptionError(f"channel_mode must be an integer from {-dims} to {dims - 1} or None, got {channel_mode!r}.")
    if len(shape) != dims:
        kind = "modes" if channel_mode is None else "modes and channels"
        raise ShapeError(f"source has {len(shape)} dimensions, but {order} {kind} need {dims}.")
    place = None if channel_mode is None else channel_mode % dims
    channels = 1 if place is None else shape[place]
    sizes = tuple([int(size) for dim, size in enumerate(shape) if dim != place])
    if channels != layer.embed_dim:
        raise ShapeError(f"source has {channels} channels, but embed_dim is {layer.embed_dim}.")
    for mode, size in enumerate(sizes):
        if size == 0:
            label = layer.modes.label(mode)
            raise ShapeError(f"mode {label} has size 0 in source, but every mode needs at least 1 index.")
    if tuple(sink.shape) != shape:
        raise ShapeError(f"sink has shape {tuple(sink.shape)}, but source has {shape}.")
    if np.dtype(source.dtype).kind not in "biuf":
        raise DtypeError(f"source must hold real numbers, got {source.dtype}.")
    if isinstance(sink, np.ndarray) and not sink.flags.writeable:
        raise OptionError("sink is read-only.")
    if not np.issubdtype(np.dtype(sink.dtype), np.floating):
        raise DtypeError(f"sink must be floating point, got {sink.dtype}.")
    files = [
        None if (file := _memmap_of(each)) is None else os.path.realpath(str(file.filename)) for each in (source, sink)
    ]
    arrays = isinstance(source, np.ndarray) and isinstance(sink, np.ndarray)
    if (
        sink is source
        or (files[0] is not None and files[0] == files[1])
        or (arrays and np.may_share_memory(source, sink))
    ):
        raise OptionError("sink is the source, which is read after parts of the output are written.")
    return sizes, channels


def _check_mask(layer: TensorAttention, mask: Any, sizes: tuple[int, ...]) -> None:
    """Check what is known of a mask before it is read."""
    if not hasattr(mask, "shape") or not hasattr(mask, "dtype") or not hasattr(mask, "__getitem__"):
        raise OptionError(f"mask must be an array, got {type(mask).__name__}.")
    if tuple(mask.shape) != sizes:
        raise ShapeError(f"mask has shape {tuple(mask.shape)}, but the modes have the sizes {sizes}.")
    if mask.dtype not in (np.bool_, torch.bool):
        raise DtypeError(f"mask must be bool, True where a position takes part, but has the type {mask.dtype}.")


def _chunk_lengths(layer: TensorAttention, chunks: Any, sizes: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """Return the number of indices of a chunk along each mode."""
    causal, modes = layer.causal, layer.modes
    if chunks is None:
        found = list(sizes)
        for mode, size in enumerate(sizes):
            rest = math.prod(found) // found[mode] * channels
            if mode != causal and rest * found[mode] > CHUNK:
                found[mode] = min(size, max(1, CHUNK // rest))
        return tuple(found)
    lengths = []
    for mode, (given, size) in enumerate(zip(one_a_mode(modes, chunks, "chunks"), sizes, strict=True)):
        if given is not None:
            check(given, f"chunks of mode {modes.label(mode)}", "integer", least=1)
        lengths.append(size if given is None or (is_integer(chunks) and mode == causal) else min(int(given), size))
        if mode == causal and lengths[mode] < size:
            raise OptionError(
                f"chunks cuts mode {modes.label(mode)} into {lengths[mode]} of {size}, but it is causal.",
                hint="Leave it whole and cut others, or feed an AttentionStream.",
            )
    return tuple(lengths)
