"""The command `attend`: operators side by side on a real recording, with a table of cost and error, and figures."""

from __future__ import annotations

import argparse
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tensorattn.cli.common import (
    Choice,
    aligned,
    amount,
    check_directory,
    duration,
    number,
    parse_choices,
    png_bytes,
    positive,
    progress,
    require,
    write_files,
)
from tensorattn.cli.embedding import Tokens, choose_patch, embed, grid_of
from tensorattn.cli.figures import Place
from tensorattn.cli.large import Large, bytes_held
from tensorattn.cli.page import page
from tensorattn.cli.readers.contents import MAX_BYTES, Slices
from tensorattn.cli.recordings import Recording, load, parse_modes, sample_video, sample_volume
from tensorattn.cli.view import LARGEST_DEVIATION, MAX_POSITIONS, View, draw, look
from tensorattn.diagnose import ErrorEstimate, centred_error, sample_positions, takes_any_positions
from tensorattn.diagnose.cost import PeakMemory, cost, measure
from tensorattn.errors import OptionError, TensorAttentionError
from tensorattn.functional import OPERATORS, Cells, find_cells
from tensorattn.functional.cells import block_counts, block_labels
from tensorattn.functional.flattened import flattened_attention

__all__ = ["Job", "Report", "add_arguments", "default_choices", "examine", "prepare", "run"]

PACKAGED = (  # the packaged recordings: where they come from, patch, and the query to draw
    (sample_video, "2,2,2", "15,110,153"),  # on the wall between the chambers of the heart
    (sample_volume, "2,2,2", "64,48,12"),
)
VARIANTS = (  # run by default beside every operator; S is the number of mode averages
    "additive:interaction=linear",
    "kao_qkv:centered=True",
    "clustered:tokens=16",
    "clustered:tokens=S",
    "clustered:cells=blocks",
    "clustered:cells=blocks:tokens=16",
    "clustered:cells=blocks:tokens=S",
)
FIRST = "clustered"  # in the table and in figures
CELLS = 64  # of the baselines without second moments
LLOYD_STEPS = 4  # of k-means, over all keys
QUERIES = 64  # sampled queries on which full attention is computed
BUDGET_SECONDS = 12.0  # an operator that would take more CPU time than this is not run over the whole grid
TRIAL = (2048, 32_768)  # queries and keys of the piece of full attention that tells the speed of the machine
STEPS = 4  # pieces of work beside the operators: embedding, sampled queries, baselines, figures

DESCRIPTION = """\
Show what attention operators do on a recording: a table of cost and error, and figures.

Without FILE, two packaged recordings are taken: a video (an echocardiogram) and a volume (a brain).
Otherwise FILE is read, by the package that its kind needs: volumes (NIfTI, MGH, Analyze), DICOM files and folders of a
series, TIFF of any type with the axes of ImageJ and OME, pictures and folders of frames, films, .npy and .npz, HDF5,
zarr. A file without a suffix is told by its first bytes.
"""

EPILOG = """\
How a recording becomes queries, keys and values (nothing is trained): it is cut into patches, padded with its last
entries where sizes are not divisible; every entry of a patch is standardised over the recording; a random affine map
takes each patch to --dim channels, which are layer-normalised; three independent random maps give queries, keys and
values of every head. The logits of a query are scaled so that their standard deviation over the keys is --logit-std,
in root mean square over queries and heads. That choice decides the ranking: what comes close to soft attention need
not come close to sharp attention.

How it is measured: FLOPs are counted from the sizes, averages, softmax and outer sums included. CPU time is on one
thread, the median of a few calls where they are short. Peak extra memory is what the process held more than before
the call, the output included (Linux). The centred error is |O - F| / |F - v| over 64 sampled queries: O the output,
F full attention, v the mean of the values, so that answering with the mean scores 1. rho, for clustered alone, is
the share of the variance of the logits that is left inside cells, the largest over heads: it needs no full attention.
"""

Array = np.ndarray[Any, Any]


# ---- arguments -----------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command.

    Args:
        parser: The parser of the command.
    """
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    deviation = number(float, lambda x: 0 < x <= LARGEST_DEVIATION, f"positive and at most {LARGEST_DEVIATION:,.0f}")
    seed = number(int, lambda n: 0 <= n < 2**63, "a whole number of at least 0 and below 2**63")
    add = parser.add_argument
    add("file", nargs="?", type=Path, metavar="FILE", help="a recording; without it, packaged ones")
    add("--modes", help="names of the modes, 't h w', or their number; one more axis is channels")
    add(
        "--key", help="which to take where there are several: an array of .npz, HDF5 or zarr, a series of DICOM or TIFF"
    )
    limits = parser.add_mutually_exclusive_group()
    limits.add_argument(
        "--max-bytes",
        type=_bytes,
        metavar="SIZE",
        help=f"refuse what takes more memory once unpacked, '2G' (default {amount(MAX_BYTES, 'B')})",
    )
    limits.add_argument(
        "--memory",
        type=_bytes,
        metavar="SIZE",
        help="where FILE and its tokens take more than about this, '300M', read it by slices, apply --operator "
        "(additive) chunk by chunk, and write the output as .npy",
    )
    add(
        "--operator",
        action="append",
        metavar="NAME[:OPTION=VALUE]",
        help=f"run this one only; may be given again; a value S is the number of mode averages: {', '.join(OPERATORS)}",
    )
    add("--dim", type=positive, default=64, help="channels, all heads together (default 64)")
    add("--heads", type=positive, default=4, help="heads (default 4)")
    add("--patch", help="sizes of a patch, '1,8,8' or one number for every mode (default: chosen)")
    add("--logit-std", type=deviation, default=1.0, help="standard deviation of the logits (default 1.0)")
    add("--query", help="element whose attention is drawn, '15,120,160' (default: the middle)")
    add("--out", type=Path, default=Path("attend-out"), help="directory of figures (attend-out)")
    add("--html", action="store_true", help="write report.html, too: one page with the table, figures and a slider")
    add("--json", action="store_true", help="print the report as one JSON object, and nothing else")
    add("--seed", type=seed, default=0, help="seed of the random maps and queries (default 0)")


def _bytes(text: str) -> int:
    """Read a number of bytes with a prefix of ten: ``2G``."""
    found = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([kMGT]?)B?", text.strip())
    if found is None or not (count := int(float(found[1]) * 1000 ** " kMGT".index(found[2] or " "))):
        raise argparse.ArgumentTypeError(f"must be a number of bytes, as in 2G or 500M, got {text}")
    return count


def default_choices() -> tuple[Choice, ...]:
    """Return every registered operator, the closest to full attention first, each followed by its variants."""
    return parse_choices(
        text
        for name in sorted(OPERATORS, key=lambda name: name != FIRST)
        for text in (name, *(each for each in VARIANTS if each.split(":")[0] == name))
    )


def _whole_numbers(text: str) -> list[int]:
    """Read whole numbers apart by commas or spaces; none where anything else is among them."""
    parts = text.replace(",", " ").split()
    return [int(part) for part in parts] if all(re.fullmatch("[0-9]{1,18}", part) for part in parts) else []


def _patch(text: str | None, sizes: Sequence[int]) -> tuple[int, ...]:
    """Read the sizes of a patch, one number for every mode or one a mode, and cut them to the modes; or choose them."""
    if text is None:
        return choose_patch(sizes, MAX_POSITIONS)
    numbers = _whole_numbers(text)
    if not numbers or 0 in numbers:
        raise OptionError(f"--patch must be positive whole numbers, one or one a mode, got {text!r}.")
    if len(numbers) not in (1, len(sizes)):
        raise OptionError(f"--patch has {len(numbers)} numbers, but there are {len(sizes)} modes: {text!r}.")
    return tuple(map(min, numbers * (len(sizes) // len(numbers)), sizes))


def _query(text: str | None, sizes: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Return the patch that holds the query to draw: the one in the middle, or the one the user points at."""
    if text is None:
        return tuple(count // 2 for count in grid_of(sizes, patch))
    numbers = _whole_numbers(text)
    if len(numbers) != len(sizes):
        raise OptionError(f"--query must be {len(sizes)} whole numbers, one index a mode, got {text!r}.")
    for mode, (index, size) in enumerate(zip(numbers, sizes, strict=True)):
        if index >= size:
            raise OptionError(f"--query has index {index} in mode {mode}, but its size is {size}.")
    return tuple(index // part for index, part in zip(numbers, patch, strict=True))


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Args:
        arguments: What the parser read.

    Returns:
        The exit status.
    """
    lenient = arguments.operator is None
    settle = partial(
        prepare,
        choices=default_choices() if lenient else parse_choices(arguments.operator),
        lenient=lenient,
        dim=arguments.dim,
        heads=arguments.heads,
        logit_std=arguments.logit_std,
        seed=arguments.seed,
    )
    check_directory(arguments.out)
    if arguments.memory is not None and (printed := _in_chunks(arguments, settle)) is not None:
        print(printed)
        return 0
    require("matplotlib.figure", extra="examples", purpose="drawing figures")
    jobs = [settle(recording, patch=patch, query=query) for recording, patch, query in _recordings(arguments)]
    files: dict[str, bytes] = {}
    with progress(sum(STEPS + len(job.flops) for job in jobs), unit="step") as step:
        reports = [examine(job, step) for job in jobs]
    for report in reports:
        files.update({name: png_bytes(figure) for name, figure in draw(report.view).items()})
    text = "\n\n".join(map(Report.text, reports)) + "\n"
    if arguments.html:
        files["report.html"] = page(
            [(report.view, report.heading, report.cells, report.footnotes) for report in reports], files
        ).encode(errors="backslashreplace")
    files["report.txt"] = text.encode(errors="backslashreplace")  # not every name of a file is of UTF-8
    written = write_files(arguments.out, files)
    if arguments.json:
        print(json.dumps({"recordings": [report.record() for report in reports], "files": [*map(str, written)]}))
    else:
        print(text)
        print("written:", *(f"  {path}" for path in written), sep="\n")
    return 0


def _in_chunks(arguments: argparse.Namespace, settle: Callable[..., Job]) -> str | None:
    """Apply operators to a file that does not fit into ``--memory``; return what to print, or None where it fits."""
    if arguments.file is None:
        raise OptionError("--memory needs a FILE: the packaged recordings are small.")
    memory = arguments.memory
    recording = load(
        arguments.file,
        modes=None if arguments.modes is None else parse_modes(arguments.modes),
        key=arguments.key,
        max_bytes=memory,
        sliced=True,
        limit="--memory",
    )
    choices = parse_choices(arguments.operator or ["additive"])
    job = settle(recording, choices=choices, lenient=False, patch=arguments.patch, query=arguments.query)
    held = bytes_held(recording, job.place.patch, job.dim)
    if held <= memory:
        return None
    if not isinstance(recording.array, Slices):
        raise OptionError(
            f"{arguments.file}: it and its tokens take {amount(held, 'B')}, but --memory allows "
            f"{amount(memory, 'B')}, and it cannot be read by slices."
        )
    for option, asked in (("--html", arguments.html), ("--query", arguments.query is not None)):
        if asked:
            raise OptionError(
                f"{option} needs all of {amount(held, 'B')} at once, but --memory allows {amount(memory, 'B')}."
            )
    large = Large(recording, job.place.patch, dim=job.dim, heads=job.heads, memory=memory)
    for choice in job.flops:
        large.check(choice)
    with PeakMemory() as peak:
        scale, applied = large.apply(tuple(job.flops), arguments.out, logit_std=job.logit_std, seed=job.seed)
    if arguments.json:
        operators = [{"name": each.name, "file": str(each.file), "seconds": each.seconds} for each in applied]
        told = {"name": recording.name, "source": recording.source, "positions": math.prod(job.grid), "scale": scale}
        return json.dumps(
            {**told, "chunks": len(large.boxes), "needed_bytes": held, "peak_bytes": peak.bytes, "operators": operators}
        )
    return large.report(applied, _heading(job, scale), memory, peak.bytes)


def _recordings(arguments: argparse.Namespace) -> list[tuple[Recording, str | None, str | None]]:
    """Load what was asked for, each with its patch and query."""
    if arguments.file is not None:
        modes = None if arguments.modes is None else parse_modes(arguments.modes)
        return [
            (
                load(
                    arguments.file,
                    modes=modes,
                    key=arguments.key,
                    max_bytes=arguments.memory or arguments.max_bytes or MAX_BYTES,
                ),
                arguments.patch,
                arguments.query,
            )
        ]
    for option in ("modes", "key", "max-bytes", "query"):
        if getattr(arguments, option.replace("-", "_")) is not None:
            raise OptionError(f"--{option} needs a FILE: the packaged recordings have their own.")
    return [
        (sample(), patch if arguments.patch is None else arguments.patch, query) for sample, patch, query in PACKAGED
    ]


# ---- the work ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A recording with everything settled that sizes alone decide.

    Attributes:
        recording: What was read.
        place: Patches, and the query to draw.
        flops: Operations over the whole grid, by choice.
        notes: Why choices were left out.
        dim: Channels, all heads together.
        heads: Number of heads.
        logit_std: Standard deviation of the logits of a query over the keys.
        seed: Seed of the embedding and of the sampled queries.
    """

    recording: Recording
    place: Place
    flops: Mapping[Choice, int]
    notes: tuple[str, ...]
    dim: int
    heads: int
    logit_std: float
    seed: int

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of patches along each mode."""
        return grid_of(self.place.sizes, self.place.patch)


def prepare(
    recording: Recording,
    choices: Iterable[Choice],
    *,
    patch: str | None = None,
    query: str | None = None,
    lenient: bool = True,
    dim: int = 64,
    heads: int = 4,
    logit_std: float = 1.0,
    seed: int = 0,
) -> Job:
    """Settle patches and query, and count operations: all that can be wrong is found before any work is done.

    Args:
        recording: What was read.
        choices: Operators and their options.
        patch: Sizes of a patch as text, or None to choose them.
        query: The query to draw as text, one index a mode, in elements of the recording; None for the middle.
        lenient: Whether an operator that has no meaning for a recording is left out with a note.
        dim: Channels, all heads together.
        heads: Number of heads.
        logit_std: Standard deviation of the logits of a query over the keys.
        seed: Seed of the embedding and of the sampled queries.

    Returns:
        The recording with all that was settled.

    Raises:
        OptionError: If an option has no meaning for the recording.
    """
    if dim % heads:
        raise OptionError(f"--heads must divide --dim, but {heads} do not divide {dim}.")
    if dim < 2:
        raise OptionError(
            f"--dim must be at least 2, got {dim}: a patch of a single channel is layer-normalised to zero."
        )
    sizes = recording.sizes
    parts = _patch(patch, sizes)
    grid = grid_of(sizes, parts)
    if math.prod(grid) == 1:
        told = "the recording" if patch is None else f"--patch {patch!r}"
        raise OptionError(f"{told} leaves a single patch, there is nothing to attend to: {recording.describe()}.")
    place = Place(recording.modes, sizes, parts, _query(query, sizes, parts), recording.steps)
    flops, notes = {}, []
    for choice in (choice.settled(sum(grid)) for choice in choices):
        try:
            flops[choice] = _count(choice, (heads, *grid, dim // heads))
        except TensorAttentionError as cause:
            if not lenient:
                raise OptionError(f"--operator {choice.label!r}: {cause.rule}") from None
            notes.append(f"{choice.label} left out: {cause.rule}")
    return Job(recording, place, flops, tuple(notes), dim, heads, logit_std, seed)


def _count(choice: Choice, shape: Sequence[int]) -> int:
    """Count the operations of an operator over the whole grid."""
    tensors = [torch.empty(shape, device="meta") for _ in range(3)]
    found = cost(choice.record.function, *tensors, order=len(shape) - 2, scale=1.0, **choice.options)
    return found.flops


class _Sample(NamedTuple):
    """Sampled queries ``(H, L, d)``, full attention on them, the mean of the values, and operations a second."""

    positions: Tensor
    query: Tensor
    exact: Tensor
    mean: Tensor
    rate: float
    population: int

    def error(self, output: Tensor, rho: Tensor | None = None) -> ErrorEstimate:
        """Compare outputs with full attention: those of the sampled queries, or of all over the grid."""
        if output.shape != self.exact.shape:
            output = output.flatten(1, -2)[:, self.positions]
        estimate = centred_error(output, self.exact, self.mean, population=self.population)
        return estimate if rho is None else replace(estimate, rho=float(rho.amax()))


def examine(job: Job, step: Callable[[str], object], *, budget: float = BUDGET_SECONDS) -> Report:
    """Run every operator on a recording, and find what one of its queries attends to.

    Args:
        job: The recording and what was settled.
        step: Called with the name of every piece of work before it starts.
        budget: CPU time in seconds; an operator that would take more is run on the sampled queries alone.

    Returns:
        What was found.
    """

    def start(work: str) -> None:
        """Say what starts now."""
        step(f"{job.recording.name}: {work}")

    start("embedding")
    array, patch = job.recording.array, job.place.patch
    tokens = embed(array, patch, dim=job.dim, heads=job.heads, logit_std=job.logit_std, seed=job.seed)
    start(f"full attention of {QUERIES} queries")
    sample = _sample(tokens, job.seed)
    rows = []
    for choice, flops in job.flops.items():
        start(choice.label)
        rows.append(_row(choice, flops, tokens, sample, budget))
    start("baselines")
    rows.extend(_baselines(tokens, sample, job.seed))
    start("figures")
    view = look(job.recording, job.place, tokens, tuple(job.flops))
    notes = (*_footnotes(rows, tokens, sample, budget), *job.notes)
    return Report(job, tokens.scale, tuple(rows), tuple(_heading(job, tokens.scale)), notes, view)


def _sample(tokens: Tokens, seed: int) -> _Sample:
    """Draw queries, compute full attention on them, and time a piece of it."""
    query, key, value = (each.flatten(1, -2) for each in tokens[:3])
    attend: Callable[..., Any] = partial(flattened_attention, order=1, scale=tokens.scale)
    positions = sample_positions(query.shape[1], QUERIES, torch.Generator().manual_seed(seed))
    sampled = query[:, positions].contiguous()
    piece = query[:, : TRIAL[0]], key[:, : TRIAL[1]], value[:, : TRIAL[1]]
    _, spent = measure(lambda: attend(*piece))
    rate = cost(attend, *piece).flops / max(spent.seconds, 1e-9)
    return _Sample(positions, sampled, attend(sampled, key, value), value.mean(dim=1), rate, query.shape[1])


def _row(choice: Choice, flops: int, tokens: Tokens, sample: _Sample, budget: float) -> _Row:
    """Run one operator over the whole grid, or on the sampled queries alone where the grid would take too long."""
    query, key, value, scale = tokens
    attend = partial(choice.record.function, order=key.ndim - 2, scale=scale, **choice.options)
    if flops / sample.rate <= budget:
        whole, (seconds, peak) = measure(lambda: attend(query, key, value))
        rho = attend(query, key, value, return_lse=True).rho if choice.record.condense is not None else None
        return _Row(choice.label, flops, seconds, peak, sample.error(whole, rho))
    alone = takes_any_positions(choice.record, choice.options)
    error = sample.error(attend(sample.query, key, value)) if alone else None
    return _Row(choice.label, flops, flops / sample.rate, None, error, ran=False)


def _baselines(tokens: Tokens, sample: _Sample, seed: int) -> list[_Row]:
    """Return what every operator must be compared with: as many random keys as it has averages, and the mean.

    Clustered attention is compared with blocks and with k-means without its second moments, too.
    """
    query, key, value, scale = tokens
    count = max(2, sum(key.shape[1:-1]))
    chosen = sample_positions(sample.population, count, torch.Generator().manual_seed(seed + 1))
    few = [each.flatten(1, -2)[:, chosen].contiguous() for each in (key, value)]
    attend = partial(flattened_attention, order=1, scale=scale)
    output, spent = measure(lambda: attend(query, *few))
    _, mean_spent = measure(lambda: value.mean(dim=tuple(range(1, value.ndim - 1))))
    mean_error = sample.error(sample.mean.unsqueeze(1).expand_as(sample.exact))
    rows = [_Row(f"{len(chosen)} random keys", cost(attend, query, *few).flops, *spent, sample.error(output))]
    for name, function in means_of_cells(key.shape[1:-1]).items():
        clustered = partial(function, order=key.ndim - 2, scale=scale)
        output, spent = measure(partial(clustered, query, key, value))
        rows.append(_Row(name, cost(clustered, query, key, value).flops, *spent, sample.error(output)))
    return [*rows, _Row("mean of the values", value.numel(), *mean_spent, mean_error)]


def means_of_cells(sizes: Sequence[int]) -> dict[str, Callable[..., Tensor]]:
    """Return full attention to the mean keys and values of cells, with the logarithms of their counts.

    Args:
        sizes: Sizes of the modes.

    Returns:
        Functions with the signature of `additive_attention`, by name: fixed blocks, and k-means.

    Examples:
        >>> list(means_of_cells((15, 120, 160)))
        ['64 blocks without moments', '64 k-means tokens with log counts']
    """
    counts, tokens = block_counts(sizes, CELLS), min(CELLS, math.prod(sizes))

    def blocks(query: Tensor, key: Tensor) -> Tensor:
        """Return the block of each key."""
        return block_labels(sizes, counts, key.device).expand(key.shape[:-1])

    def nearest(query: Tensor, key: Tensor) -> Tensor:
        """Return the nearest centre of each key, after a few steps."""
        cells = find_cells(query, key, order=1, tokens=tokens)
        for _ in range(LLOYD_STEPS):
            mean, count = _cell_means(cells.label(key), key, tokens)
            cells = Cells(torch.where(count.unsqueeze(-1) > 0, mean, cells.centres), cells.metric)
        return cells.label(key)

    def attend(
        label: Callable[[Tensor, Tensor], Tensor],
        count: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend to the means."""
        flat = [each.flatten(1, -2) for each in (query, key, value)]
        rows, weight = _cell_means(label(*flat[:2]), torch.cat(flat[1:], -1), count)
        few = rows.split([key.shape[-1], value.shape[-1]], -1)
        return flattened_attention(query, *few, order=1, scale=scale, weights=weight)

    return {
        f"{math.prod(counts)} blocks without moments": partial(attend, blocks, math.prod(counts)),
        f"{tokens} k-means tokens with log counts": partial(attend, nearest, tokens),
    }


def _cell_means(label: Tensor, rows: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the means ``(H, n, D)`` of rows ``(H, P, D)`` with the same label, and their counts, summed in float64."""
    count = rows.new_zeros(len(rows), tokens).scatter_add(1, label, torch.ones_like(rows[..., 0]))
    heads = zip(label, rows, strict=True)
    total = torch.stack(
        [
            torch.zeros(tokens, rows.shape[-1], dtype=torch.float64, device=rows.device).index_add(
                0, own, each.double()
            )
            for own, each in heads
        ]
    )
    return (total / count.clamp(min=1).unsqueeze(-1)).to(rows.dtype), count


# ---- the report ----------------------------------------------------------------------------------------------


HEADINGS = ("operator", "FLOPs", "CPU time", "peak extra memory", "rho", "centred error")


class _Row(NamedTuple):
    """One line of the table. What did not run over the whole grid has an extrapolated time, and no peak of memory."""

    name: str
    flops: int
    seconds: float
    peak_bytes: int | None
    error: ErrorEstimate | None
    ran: bool = True

    def cells(self) -> tuple[str, ...]:
        """Return the words of the row."""
        rho = None if self.error is None else self.error.rho
        return (
            self.name,
            amount(self.flops),
            duration(self.seconds) if self.ran else f"about {duration(self.seconds)} *",
            ("n/a" if self.ran else "not run *") if self.peak_bytes is None else amount(self.peak_bytes, "B"),
            "-" if rho is None else f"{rho:.3f}",
            "-" if self.error is None else _error_in_words(self.error),
        )

    def record(self) -> dict[str, Any]:
        """Return the row in numbers; None stands for what is not known."""
        error = self.error
        return {
            "name": self.name,
            "flops": self.flops,
            "seconds": self.seconds,
            "ran": self.ran,
            "peak_bytes": self.peak_bytes,
            "rho": _finite(error.rho) if error else None,
            "centred_error": _finite(error.error) if error else None,
            "standard_error": _finite(error.standard_error) if error else None,
        }


@dataclass(frozen=True)
class Report:
    """What was found on one recording.

    Attributes:
        job: The recording and what was settled.
        scale: The scale of the logits.
        rows: The lines of the table.
        heading: What was read and what it was turned into, in lines.
        footnotes: How errors were estimated, and what was left out.
        view: What one query attends to.
    """

    job: Job
    scale: float
    rows: tuple[_Row, ...]
    heading: tuple[str, ...]
    footnotes: tuple[str, ...]
    view: View

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """The table in words, its headings first."""
        return [HEADINGS, *(row.cells() for row in self.rows)]

    def text(self) -> str:
        """Return the report as it is printed."""
        return "\n".join((*self.heading, "", *_ruled(self.cells), *map(_wrapped, self.footnotes)))

    def record(self) -> dict[str, Any]:
        """Return the report in numbers, of the types that JSON has."""
        job, recording, place = self.job, self.job.recording, self.job.place
        steps = recording.steps or (None,) * len(place.sizes)
        return {
            "name": recording.name,
            "source": recording.source,
            "modes": [
                {"name": name, "size": size, "patch": part, "step": step and step.size, "unit": step and step.unit}
                for name, size, part, step in zip(place.names, place.sizes, place.patch, steps, strict=True)
            ],
            "channels": recording.channels,
            "dtype": str(recording.array.dtype),
            "notes": [*recording.notes, *job.notes],
            "positions": math.prod(job.grid),
            "averages": sum(job.grid),
            "query": list(place.element),
            "heads": job.heads,
            "dim": job.dim,
            "seed": job.seed,
            "logit_std": job.logit_std,
            "scale": self.scale,
            "operators": [row.record() for row in self.rows],
        }


def _error_in_words(estimate: ErrorEstimate) -> str:
    """Return an error and its standard error, or the error alone where it is exact to rounding."""
    if math.isnan(estimate.error):
        return "not a number"
    if estimate.error < 5e-4:
        return f"{estimate.error:.0e}" if estimate.error > 0 else "0"
    spread = f" ± {estimate.standard_error:.3f}" if estimate.standard_error >= 5e-4 else ""
    return f"{estimate.error:.3f}{spread}"


def _wrapped(line: str) -> str:
    """Break a long line."""
    return textwrap.fill(line, 110, subsequent_indent="  ", break_on_hyphens=False)


def _ruled(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lay cells out in columns, with a rule under the headings."""
    headings, *lines = aligned(cells)
    return [headings, "-" * max(map(len, (headings, *lines))), *lines]


def _finite(number: float | None) -> float | None:
    """Return a number that JSON has."""
    return None if number is None or not math.isfinite(number) else float(number)


def _heading(job: Job, scale: float) -> list[str]:
    """Say what was read and what it was turned into."""
    place, grid = job.place, job.grid
    padded = [
        f"{name} from {size} to {g * p}"
        for name, size, g, p in zip(place.names, place.sizes, grid, place.patch, strict=True)
        if g * p != size
    ]
    return [
        f"{job.recording.source}: {job.recording.describe()}",
        f"  patches {'×'.join(map(str, place.patch))}: {'×'.join(map(str, grid))} = {math.prod(grid):,} positions, "
        f"{sum(grid):,} mode averages",
        *([f"  {spacing}"] if (spacing := _spacing(job)) else []),
        *([f"  padded with its last entries: {', '.join(padded)}"] if padded else []),
        *(f"  {note}" for note in job.recording.notes),
        f"  {job.heads} heads of {job.dim // job.heads} channels, random maps of seed {job.seed}, "
        f"logit standard deviation {job.logit_std:g} (scale {scale:.3g})",
    ]


def _spacing(job: Job) -> str:
    """Say how far apart elements lie, where the file says so."""
    named = zip(job.place.names, job.recording.steps, strict=False)
    known = [f"{name} {step.size:.4g} {step.unit}" for name, step in named if step and step.unit]
    return f"steps, as the file says: {', '.join(known)}" if known else ""


def _footnotes(rows: Sequence[_Row], tokens: Tokens, sample: _Sample, budget: float) -> list[str]:
    """Say how the errors were estimated, and what full attention would have needed where it was not run."""
    heads, positions = tokens.key.shape[0], sample.population
    lines = [
        "centred error: 0 is full attention, 1 is no better than the mean of the values; |O - F| / |F - v| on "
        f"{len(sample.positions)} sampled queries, F full attention, v the mean; ± a standard error. Random keys: full "
        "attention to as many keys, drawn at random, as there are mode averages, S; it costs as much as kao_kv. rho: "
        "the share of the variance of the logits left inside cells.",
    ]
    (full,) = parse_choices(["flattened"])
    if full.label not in [row.name for row in rows if row.ran]:
        flops, matrix = _count(full, tokens.key.shape), 4 * positions**2
        lines.append(
            f"Full attention over all {positions:,} queries would have needed {amount(flops)}FLOP, about "
            f"{duration(flops / sample.rate)} on one thread at the speed of a piece of it; "
            f"its weights take {amount(matrix, 'B')} a head, {amount(heads * matrix, 'B')} in all, "
            "in an implementation that stores them."
        )
    skipped = [row.name for row in rows if not row.ran]
    if skipped:
        lines.append(
            f"* Not run over the whole grid, it would take more than {budget:.0f} s: {', '.join(skipped)}; "
            "the error is of the sampled queries alone."
        )
    return lines
