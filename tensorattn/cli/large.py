"""A recording that does not fit into memory: operators are applied chunk by chunk, from a file into a file."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensorattn.blockwise import attend_blockwise
from tensorattn.cli.common import Choice, amount, duration
from tensorattn.cli.embedding import Embedding, grid_of, make_embedding, patchify, scale_of_moments
from tensorattn.cli.readers.contents import one_line
from tensorattn.cli.recordings import LARGEST, Recording, RecordingError
from tensorattn.errors import OptionError
from tensorattn.nn.attention import TensorAttention
from tensorattn.nn.checks import check_parts

__all__ = ["Applied", "Large", "bytes_held"]

HELD = 5  # embedding, queries, keys, values and output, of four bytes a channel
COPIES, WIDE = 5, 36  # copies of a patch, and bytes an entry in float64, that are held while the next chunk is read
WORKED = 24  # numbers of four bytes a channel that a chunk takes while it is attended to and the next is read
LIES_ABOUT = 6  # times what is held: what each thread freed stays with the allocator (measured: up to 4 times)


def bytes_held(recording: Recording, patch: Sequence[int], dim: int) -> int:
    """Return how much memory a recording and what it becomes would take at once.

    Args:
        recording: What was read, or stays in its file.
        patch: Sizes of a patch.
        dim: Channels, all heads together.
    """
    array = recording.array
    return int(array.size * array.dtype.itemsize + 4 * HELD * dim * math.prod(grid_of(recording.sizes, patch)))


@dataclass(frozen=True)
class Applied:
    """What came of one operator: its name, the file of its output, and wall-clock seconds."""

    name: str
    file: Path
    seconds: float


class Large:
    """A recording in its file, cut into chunks of patches that fit into memory.

    Args:
        recording: What stays in its file.
        patch: Sizes of a patch, one a mode.
        dim: Channels, all heads together.
        heads: Number of heads.
        memory: How many bytes may be held.

    Raises:
        OptionError: If a single patch does not fit.
    """

    def __init__(self, recording: Recording, patch: Sequence[int], *, dim: int, heads: int, memory: int) -> None:
        self.recording, self.patch, self.dim, self.heads = recording, tuple(patch), dim, heads
        self.grid = grid_of(recording.sizes, patch)
        features = math.prod(patch) * recording.channels
        position = LIES_ABOUT * (features * (COPIES * recording.array.dtype.itemsize + WIDE) + 4 * WORKED * dim)
        if position > memory:
            raise OptionError(
                f"--memory allows {amount(memory, 'B')}, but a single patch takes {amount(position, 'B')} to work on."
            )
        self.lengths = list(self.grid)
        for mode, size in enumerate(self.grid):
            rest = math.prod(self.lengths) // size
            self.lengths[mode] = min(size, max(1, memory // position // rest))
        starts = [range(0, size, length) for size, length in zip(self.grid, self.lengths, strict=True)]
        self.boxes = [
            tuple([slice(start, start + length) for start, length in zip(box, self.lengths, strict=True)])
            for box in itertools.product(*starts)
        ]

    def check(self, choice: Choice) -> None:
        """Refuse an operator that needs all positions at once.

        Raises:
            OptionError: If it does.
        """
        options = choice.record.with_defaults(choice.options)
        check_parts(choice.record, options, len(self.grid), None, what=f"--memory {choice.label!r}")

    def apply(
        self, choices: Sequence[Choice], out: Path, *, logit_std: float, seed: int
    ) -> tuple[float, list[Applied]]:
        """Apply operators, each into a file ``.npy`` of its own, and go on with what was stopped.

        Args:
            choices: Operators that were checked.
            out: Directory of the files; it is made.
            logit_std: Standard deviation of the logits.
            seed: Seed of the random maps.

        Returns:
            The scale of the logits, and what came of each operator.

        Raises:
            RecordingError: If the recording is constant, a part of it cannot be read, or a number in it is not finite
                or too large.
            OptionError: If the files cannot be written.
        """
        embedding = make_embedding(self._cuts, math.prod(self.grid), dim=self.dim, seed=seed)
        scale = self._scale(embedding, logit_std)
        try:
            out.mkdir(parents=True, exist_ok=True)
            return scale, [self._applied(choice, out, embedding, scale) for choice in choices]
        except OSError as cause:
            raise OptionError(f"--out {out}: {cause.strerror or cause}") from cause

    def _applied(self, choice: Choice, out: Path, embedding: Embedding, scale: float) -> Applied:
        """Apply one operator."""
        source = _Embedded(self, embedding)
        name = "".join(letter if letter.isalnum() else "-" for letter in choice.label)
        file = out / f"{self.recording.name}-{name}.npy"
        state = file.with_name(f"{file.name}.state")
        mode = "r+" if state.exists() and file.exists() else "w+"
        sink = np.lib.format.open_memmap(file, mode, np.float32, source.shape)
        start = time.perf_counter()
        layer = self._layer(choice, embedding, scale)
        attend_blockwise(layer, source, sink, chunks=self.lengths, state=state)
        return Applied(choice.label, file, time.perf_counter() - start)

    def report(self, applied: Sequence[Applied], heading: Sequence[str], memory: int, peak: int | None) -> str:
        """Return the report as it is printed.

        Args:
            applied: What came of each operator.
            heading: What was read and what it was turned into, in lines.
            memory: How many bytes may be held.
            peak: How many were, if known.
        """
        held = amount(bytes_held(self.recording, self.patch, self.dim), "B")
        lines = [
            f"  it and its tokens take {held} at once, but --memory allows {amount(memory, 'B')}: "
            f"{len(self.boxes)} chunks of {'×'.join(map(str, self.lengths))} patches",
            "",
        ]
        for each in applied:
            lines.append(f"{each.name}: {duration(each.seconds)}, into {each.file}")
        notes = (
            "",
            f"Peak extra memory {'n/a' if peak is None else amount(peak, 'B')}, with pages of what is written, which "
            "the system takes back.",
            "Each output is an array of patches and channels, all heads together, in float32.",
            "The table of errors and the figures are left out: they need the whole at once.",
        )
        return "\n".join((*heading, *lines, *notes))

    def read(self, box: Sequence[slice]) -> Tensor:
        """Read the patches ``(l_1, …, l_N, F)`` of a chunk, in float64."""
        places = [slice(each.start * part, each.stop * part) for each, part in zip(box, self.patch, strict=True)]
        ends = zip(places, self.recording.sizes, strict=True)
        inside = [slice(place.start, min(place.stop, size)) for place, size in ends]
        try:
            part = self.recording.array[(*inside, slice(0, self.recording.channels))]
        except Exception as cause:  # a file that is cut short or damaged: packages have their own errors
            raise RecordingError(f"{self.recording.source}: a part cannot be read ({one_line(cause)})") from cause
        if part.dtype.kind == "f" and not float(np.abs(part).max()) <= LARGEST:
            raise RecordingError(
                f"{self.recording.source}: a number in it is not finite or larger than {LARGEST:.0e}; "
                "gaps are filled only where --memory holds the whole"
            )
        return torch.from_numpy(patchify(part, self.patch).astype(np.float64, copy=False))

    def _cuts(self) -> Iterator[Tensor]:
        """Read the patches of all chunks, one chunk after the other."""
        for box in self.boxes:
            yield self.read(box).flatten(0, -2)

    def _scale(self, embedding: Embedding, logit_std: float) -> float:
        """Return the scale of the logits, from sums over all chunks."""
        first = torch.zeros(self.dim, dtype=torch.float64)
        second = torch.zeros(self.dim, self.dim, dtype=torch.float64)
        for cut in self._cuts():
            embedded = embedding(cut).double()
            first += embedded.sum(0)
            second += embedded.mT @ embedded
        count = math.prod(self.grid)
        mean, second = first / count, second / count
        query, key = (
            each.double().unflatten(1, (self.heads, -1)).movedim(1, 0) for each in embedding.maps[:2]
        )  # (H, dim, d)
        covariance = key.mT @ (second - mean.outer(mean)) @ key
        return scale_of_moments(covariance, query.mT @ second @ query, logit_std)

    def _layer(self, choice: Choice, embedding: Embedding, scale: float) -> TensorAttention:
        """Return a layer with the random maps, whose output is that of its heads."""
        layer = TensorAttention(
            self.dim,
            self.heads,
            modes=self.recording.modes.names,
            operator=choice.record.name,
            bias=False,
            scale=scale,
            **choice.options,
        )
        maps = (*embedding.maps, torch.eye(self.dim))
        with torch.no_grad():
            for linear, weight in zip((layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj), maps, strict=True):
                linear.weight.copy_(weight.T)
        return layer.eval()


class _Embedded:
    """The embedded patches ``(g_1, …, g_N, dim)`` of a recording, made where they are read."""

    dtype = np.dtype(np.float32)

    def __init__(self, large: Large, embedding: Embedding) -> None:
        self.large, self.embedding = large, embedding
        self.shape = (*large.grid, large.dim)

    def __getitem__(self, places: tuple[slice, ...]) -> Any:
        """Read a chunk, with all channels."""
        return self.embedding(self.large.read(places[:-1])).numpy()
