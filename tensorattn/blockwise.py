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
import pickle
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
from torch.utils._pytree import tree_leaves

from tensorattn.errors import DtypeError, OptionError, ShapeError, check, is_integer, retells
from tensorattn.functional.operator import get_operator
from tensorattn.masks import (
    Part,
    Weights,
    accumulation_dtype,
    counting_dtype,
    one_a_mode,
    read_weights,
    without_absent,
)
from tensorattn.modes import GridShape
from tensorattn.nn.attention import TensorAttention
from tensorattn.nn.checks import check_parts
from tensorattn.nn.parameters import parameter_of

__all__ = ["attend_blockwise"]

CHUNK = 1 << 22  # elements of a chunk where none is told
SECONDS = 1.0  # between two states that are saved
SPOT = 8  # indices a mode, in the middle of a chunk, that tell one array from another
FORMAT = "tensorattn.attend_blockwise 1"

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
        state: A file to go on from, which is there while the sink is incomplete; None for none. It knows layer, source,
            mask and sink again, by parts of what was read and written, so that the sink must be readable, too.
        progress: Whether to count chunks on the standard error where that is a terminal.
        device: Where to work; that of the layer if None. A layer elsewhere is copied.

    Raises:
        OptionError: If the layer or its operator cannot work in parts, source and sink are the same or cannot be
            sliced, the source is masked or the sink read-only, chunks are no positive integers or cut the causal mode,
            or the state is that of another run, is no state at all, or would be in a folder that does not exist.
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
        _check_mask(mask, sizes)
    lengths = _chunk_lengths(layer, chunks, sizes, channels)
    if state is not None:
        _check_state(state, sink)
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
        self.facts: dict[str, Any] = {}
        self.seen = ["", ""]  # spots of the source in the first chunk and in the last that was read
        self.mark = _Mark(files.sink)

    def run(self) -> None:
        """Add up, attend, and take the mark off the sink."""
        self._load()
        try:
            self.mark.set()
            self.files.flush()  # before a row of the sink changes
        except (OSError, KeyError, RuntimeError, ValueError) as cause:  # h5py and zarr have one each
            raise OptionError(f"sink cannot be written to: {cause}.") from cause
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
        self.mark.clear()
        self.files.flush()

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
                spot = _spot_of(x)
                self.seen = [self.seen[0] if self.done else spot, spot]
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

    def _find_facts(self) -> dict[str, Any]:
        """What must be the same to go on."""
        files = self.files
        layer = [
            part
            for name, held in files.layer.state_dict().items()
            for each in tree_leaves(held)  # quantised maps hold more than tensors
            for part in (name.encode(), _bytes_of(each) if isinstance(each, Tensor) else repr(each).encode())
        ]
        masks = None if files.mask is None else (np.packbits(files.read_mask(box)).tobytes() for box in self.boxes)
        return {
            "layer": f"{files.layer!r}, weights {_digest(layer)}",
            "source": f"{tuple(files.source.shape)} {files.source.dtype}",
            "chunks": _digest([repr(self.boxes).encode()]),
            "mask": None if masks is None else _digest(masks),
            "channel_mode": files.channel_mode,
        }

    def _save(self) -> None:
        """Save what is known, after what was written: whatever happens the file is an old state or this one."""
        if self.state is None:
            return
        self.files.flush()
        temporary = self.state.with_name(f"{self.state.name}.new")
        written = self.files.read_back(self.boxes[self.done - 1]) if self.known and self.done else None
        saved: dict[str, Any] = {"format": FORMAT, "facts": self.facts, "seen": self.seen, "written": written}
        saved.update({"known": self.known, "done": self.done, "sums": self.sums})
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
        self.facts = self._find_facts()
        if not self.state.exists():
            return
        device = parameter_of(self.files.layer)
        try:
            saved = torch.load(self.state, weights_only=True, map_location=None if device is None else device.device)
        except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError):
            saved = None
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise OptionError(f"state {str(self.state)!r} is a file, but no state of attend_blockwise.")
        for name, fact in self.facts.items():
            self._require(saved["facts"][name] == fact, name)
        self.known, self.done, self.sums, self.seen = (saved[name] for name in ("known", "done", "sums", "seen"))
        spots = [_spot_of(self.files.read(self.boxes[place])[0]) for place in (0, self.done - 1)]
        self._require(spots == self.seen, "source")
        if saved["written"] is not None:
            same = self.mark.is_set() and self.files.read_back(self.boxes[self.done - 1]) == saved["written"]
            self._require(same, "sink")

    def _require(self, same: bool, name: str) -> None:
        """Refuse a state of a run with another of something."""
        if not same:
            raise OptionError(
                f"state {str(self.state)!r} is that of a run with another {name}.", hint="Delete it to start anew."
            )


def _digest(parts: Iterable[bytes]) -> str:
    """Return a short digest of bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _bytes_of(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor."""
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _middle(box: Box) -> Box:
    """Return a small part in the middle of a chunk."""
    return tuple([(start + max(0, length - SPOT) // 2, min(length, SPOT)) for start, length in box])


def _spot_of(x: Tensor) -> str:
    """Return a digest of the middle of a chunk ``(1, l_1, …, l_N, C)``."""
    middle = _middle(tuple([(0, length) for length in x.shape[1:-1]]))
    places = tuple([slice(start, start + length) for start, length in middle])
    return _digest([_bytes_of(x[0][places])])


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
        like = torch.empty(0) if parameter is None else parameter  # of quantised maps there is none
        kind = np.float64 if like.dtype == torch.float64 else np.float32
        found = self.source[self._slices(box)]
        found = found.detach() if isinstance(found, Tensor) else torch.from_numpy(np.array(found, dtype=kind))
        x = found.to(like.device, like.dtype).unsqueeze(0)
        x = x.unsqueeze(-1) if self.channel_mode is None else x.movedim(1 + self.channel_mode % (len(box) + 1), -1)
        lengths, mask = tuple([length for _, length in box]), None
        if self.mask is not None:
            mask = torch.from_numpy(self.read_mask(box))
        grid = GridShape((1,), lengths, x.shape[-1])
        weights = read_weights(None, mask, None, grid, x, self.layer.modes, of="source", part_of=range(len(box)))
        return without_absent(x, weights.present), weights

    def read_mask(self, box: Box) -> Any:
        """Read the mask of a chunk."""
        return np.array(self.mask[tuple([slice(start, start + length) for start, length in box])])

    def read_back(self, box: Box) -> str:
        """Return a digest of the middle of a chunk that was written."""
        return _digest([np.array(self.sink[self._slices(_middle(box))]).tobytes()])

    def write(self, box: Box, y: Tensor) -> None:
        """Write the output of a chunk."""
        y = y.squeeze(0)
        y = y.squeeze(-1) if self.channel_mode is None else y.movedim(-1, self.channel_mode % (len(box) + 1))
        self.sink[self._slices(box)] = y.to("cpu", accumulation_dtype(y.dtype)).numpy()

    def flush(self) -> None:
        """Bring what was written to the disk, where the sink has a way to."""
        for owner in (getattr(self.sink, "file", None), self.sink):  # a file of h5py flushes attributes, too
            if callable(flush := getattr(owner, "flush", None)):
                flush()
                return


class _Mark:
    """What tells that a sink is incomplete, where something can."""

    def __init__(self, sink: Any) -> None:
        self.attributes = getattr(sink, "attrs", None)
        name = sink.filename if isinstance(sink, np.memmap) else None
        self.file = None if name is None else Path(f"{name}.incomplete")

    def set(self) -> None:
        """Mark it."""
        if self.attributes is not None:
            self.attributes["incomplete"] = True
        if self.file is not None:
            self.file.touch()

    def is_set(self) -> bool:
        """Whether a sink is marked, or nothing could mark it."""
        if self.attributes is not None:
            return "incomplete" in self.attributes
        return self.file is None or self.file.exists()

    def clear(self) -> None:
        """Take the mark off."""
        if self.attributes is not None:
            del self.attributes["incomplete"]
        if self.file is not None:
            self.file.unlink(missing_ok=True)


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
    real = not source.dtype.is_complex if isinstance(source, Tensor) else np.dtype(source.dtype).kind in "biuf"
    if not real:
        raise DtypeError(f"source must hold real numbers, got {source.dtype}.")
    if isinstance(sink, Tensor):
        raise OptionError("sink must take NumPy arrays, got Tensor.", hint="Give its .numpy().")
    if isinstance(source, np.ma.MaskedArray):
        raise OptionError("source has masked values.", hint="Give its data, and mask=, True where it is not masked.")
    if isinstance(sink, np.ndarray) and not sink.flags.writeable:
        raise OptionError("sink is read-only.")
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
    if not np.issubdtype(np.dtype(sink.dtype), np.floating):
        raise DtypeError(f"sink must be floating point, got {sink.dtype}.")
    if _is_same(source, sink):
        raise OptionError("sink is the source, which is read after parts of the output are written.")
    return sizes, channels


def _is_same(source: Any, sink: Any) -> bool:
    """Whether two arrays are one, or share memory or a file."""
    if sink is source:
        return True
    arrays = [isinstance(each, np.ndarray) for each in (source, sink)]
    if all(arrays):
        files = [_file_of(each) for each in (source, sink)]
        return np.may_share_memory(source, sink) or (
            all(file is not None and os.path.exists(file) for file in files) and os.path.samefile(*files)
        )
    return not any(arrays) and type(sink) is type(source) and (sink == source) is True  # two handles of h5py or zarr


def _file_of(array: Any) -> Any:
    """Return the name of the file that an array is a part of; None where there is none."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap) and array.filename is not None:
            return array.filename
        array = array.base
    return None


def _check_state(state: Any, sink: Any) -> None:
    """Check that a state can be kept."""
    if not isinstance(state, (str, os.PathLike)):
        raise OptionError(f"state must be a path, got {type(state).__name__}.")
    path = Path(state)
    if not path.parent.is_dir():
        raise OptionError(f"state {str(path)!r} is in a folder that does not exist.")
    if path.exists() and not path.is_file():
        raise OptionError(f"state {str(path)!r} is no file.")
    if not hasattr(sink, "__getitem__"):
        raise OptionError(f"sink has no __getitem__, which a state needs, got {type(sink).__name__}.")


def _check_mask(mask: Any, sizes: tuple[int, ...]) -> None:
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
