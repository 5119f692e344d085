"""The job behind `attend`: every operator on a recording, measured and compared with full attention."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensorattn.attend import views
from tensorattn.attend.choices import Choice, parse_choice
from tensorattn.attend.embedding import Tokens, embed
from tensorattn.attend.figures import Place
from tensorattn.attend.patches import choose_patch, parse_patch
from tensorattn.attend.recordings import Recording, describe_sizes
from tensorattn.attend.report import Row, bytes_in_words, flops_in_words, seconds_in_words, table
from tensorattn.diagnose import centred_error, sample_positions
from tensorattn.errors import OptionError, TensorAttentionError
from tensorattn.measuring import count_flops, measure
from tensorattn.patching import grid_of

__all__ = ["Examination", "Prepared", "Settings", "examine", "prepare"]

QUERIES = 64  # sampled queries on which full attention is computed
MAX_POSITIONS = 100_000  # patches are chosen so that a recording has at most so many
BUDGET_SECONDS = 12.0  # an operator that would take more CPU time than this is not run over the whole grid
TRIAL = (2048, 32_768)  # queries and keys of the piece of full attention that tells the speed of the machine

FULL = parse_choice("flattened")


@dataclass(frozen=True)
class Settings:
    """What the user chose.

    Attributes:
        choices: Operators and their options.
        lenient: Whether an operator that has no meaning for a recording is left out with a note.
        dim: Channels, all heads together.
        heads: Number of heads.
        logit_std: Standard deviation of the logits of a query over the keys.
        seed: Seed of the embedding and of the sampled queries.
        patch: Sizes of a patch as text, or None to choose them.
        query: The query to draw as text, or None for the middle.
    """

    choices: tuple[Choice, ...]
    lenient: bool = False
    dim: int = 64
    heads: int = 4
    logit_std: float = 1.0
    seed: int = 0
    patch: str | None = None
    query: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A recording with everything settled that sizes alone decide.

    Attributes:
        recording: What was read.
        settings: What the user chose.
        place: Patches, and the query to draw.
        flops: Operations over the whole grid, by choice.
        notes: Why choices were left out.
    """

    recording: Recording
    settings: Settings
    place: Place
    flops: Mapping[Choice, int]
    notes: tuple[str, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of patches along each mode."""
        return grid_of(self.place.sizes, self.place.patch)


class Examination(NamedTuple):
    """What came out: the text to print, and figures by file name."""

    text: str
    figures: Mapping[str, Any]


class _Sample(NamedTuple):
    """Sampled queries ``(H, L, d)``, full attention on them, the mean of the values, and operations a second."""

    positions: Tensor
    query: Tensor
    exact: Tensor
    mean: Tensor
    rate: float


def prepare(recording: Recording, settings: Settings) -> Prepared:
    """Settle patches and query, and count operations: all that can be wrong is found before any work is done.

    Args:
        recording: What was read.
        settings: What the user chose.

    Returns:
        The recording with all that was settled.

    Raises:
        TensorAttentionError: If a choice has no meaning for the recording.
    """
    if settings.dim % settings.heads:
        raise OptionError(f"--heads must divide --dim, but {settings.heads} do not divide {settings.dim}.")
    if settings.dim < 2:
        raise OptionError(
            f"--dim must be at least 2, got {settings.dim}: a patch of a single channel is layer-normalised to zero."
        )
    sizes = recording.sizes
    patch = choose_patch(sizes, MAX_POSITIONS) if settings.patch is None else parse_patch(settings.patch, sizes)
    if math.prod(grid_of(sizes, patch)) == 1:
        told = "the recording" if settings.patch is None else f"--patch {settings.patch!r}"
        raise OptionError(f"{told} leaves a single patch, there is nothing to attend to: {describe_sizes(recording)}.")
    place = Place(recording.modes, sizes, patch, views.choose_query(settings.query, sizes, patch))
    shape = (settings.heads, *grid_of(sizes, patch), settings.dim // settings.heads)
    flops, notes = {}, []
    for choice in settings.choices:
        try:
            flops[choice] = _flops(choice, torch.empty(shape, device="meta"), len(sizes))
        except TensorAttentionError as cause:
            if not settings.lenient:
                raise OptionError(f"--operator {choice.label!r}: {cause.rule}") from None
            notes.append(f"{choice.label} left out: {cause.rule}")
    return Prepared(recording, settings, place, flops, tuple(notes))


def _flops(choice: Choice, tokens: Tensor, order: int) -> int:
    """Count the operations over the whole grid. Where queries are independent, two short lists of them tell."""
    call = choice.bind(order=order, scale=1.0)
    key, value = torch.empty_like(tokens), torch.empty_like(tokens)  # not one tensor: that would be summarised once
    if not choice.any_positions:
        return count_flops(call, tokens, key, value)
    heads, positions, dim = tokens.shape[0], math.prod(tokens.shape[1:-1]), tokens.shape[-1]
    some, twice = (count_flops(call, tokens.new_empty(heads, n, dim), key, value) for n in (64, 128))
    return some + (twice - some) * (positions - 64) // 64


def examine(prepared: Prepared, step: Callable[[str], object]) -> Examination:
    """Run every operator on a recording, and draw what one of its queries attends to.

    Args:
        prepared: The recording and what was settled.
        step: Called with the name of every piece of work before it starts.

    Returns:
        The text to print, and the figures.
    """
    recording, settings, place = prepared.recording, prepared.settings, prepared.place
    step("embedding")
    tokens = embed(
        recording.array,
        place.patch,
        dim=settings.dim,
        heads=settings.heads,
        logit_std=settings.logit_std,
        seed=settings.seed,
    )
    step(f"full attention of {QUERIES} queries")
    sample = _sample(tokens, settings.seed)
    rows = []
    for choice, flops in prepared.flops.items():
        step(choice.label)
        rows.append(_examine_choice(choice, flops, tokens, sample))
    step("baselines")
    rows.extend(_baselines(tokens, sample, settings.seed))
    step("figures")
    figures = views.draw(recording, place, tokens, tuple(prepared.flops))
    lines = (*_heading(prepared, tokens), "", table(rows), *_footnotes(rows, tokens, sample), *prepared.notes)
    return Examination("\n".join(lines), figures)


def _order(tokens: Tokens) -> int:
    """Return the number of modes."""
    return tokens.key.ndim - 2


def _sample(tokens: Tokens, seed: int) -> _Sample:
    """Draw queries, compute full attention on them, and time a piece of it."""
    query, key, value, scale = tokens
    lists = [tensor.flatten(1, -2) for tensor in (query, key, value)]
    positions = sample_positions(lists[0].shape[1], QUERIES, torch.Generator().manual_seed(seed))
    sampled = lists[0][:, positions].contiguous()
    exact = FULL.bind(order=_order(tokens), scale=scale)(sampled, key, value)
    piece = [lists[0][:, : TRIAL[0]], *(each[:, : TRIAL[1]] for each in lists[1:])]
    plain = FULL.bind(order=1, scale=scale)
    _, cost = measure(lambda: plain(*piece))
    rate = count_flops(plain, *piece) / max(cost.seconds, 1e-9)
    return _Sample(positions, sampled, exact, lists[2].mean(dim=1), rate)


def _examine_choice(choice: Choice, flops: int, tokens: Tokens, sample: _Sample) -> Row:
    """Run one operator over the whole grid, or on the sampled queries alone where the grid would take too long."""
    call = choice.bind(order=_order(tokens), scale=tokens.scale)
    query, key, value, _ = tokens
    population = math.prod(key.shape[1:-1])
    if flops / sample.rate > BUDGET_SECONDS:
        output = call(sample.query, key, value) if choice.any_positions else None
        seconds, peak, ran = flops / sample.rate, None, False
    else:
        whole, (seconds, peak) = measure(lambda: call(query, key, value))
        output, ran = whole.flatten(1, -2)[:, sample.positions], True
    estimate = None if output is None else centred_error(output, sample.exact, sample.mean, population=population)
    return Row(choice.label, flops, seconds, peak, estimate, ran)


def _baselines(tokens: Tokens, sample: _Sample, seed: int) -> list[Row]:
    """Return what every operator must be compared with: as many random keys as it has averages, and the mean."""
    query, key, value, scale = tokens
    sizes = key.shape[1:-1]
    population = math.prod(sizes)
    chosen = sample_positions(population, max(2, sum(sizes)), torch.Generator().manual_seed(seed + 1))
    keys, values = (each.flatten(1, -2)[:, chosen].contiguous() for each in (key, value))
    plain = FULL.bind(order=1, scale=scale)
    few, few_cost = measure(lambda: plain(query, keys, values))
    _, mean_cost = measure(lambda: value.mean(dim=tuple(range(1, value.ndim - 1))))
    outputs = (few.flatten(1, -2)[:, sample.positions], sample.mean.unsqueeze(1).expand_as(sample.exact))
    errors = [centred_error(output, sample.exact, sample.mean, population=population) for output in outputs]
    flops = count_flops(plain, query, keys, values)
    return [
        Row(f"{len(chosen)} random keys", flops, few_cost.seconds, few_cost.peak_bytes, errors[0]),
        Row("mean of the values", value.numel(), mean_cost.seconds, mean_cost.peak_bytes, errors[1]),
    ]


def _heading(prepared: Prepared, tokens: Tokens) -> list[str]:
    """Say what was read and what it was turned into."""
    recording, settings, place, grid = prepared.recording, prepared.settings, prepared.place, prepared.grid
    padded = [
        f"{name} from {size} to {g * p}"
        for name, size, g, p in zip(place.names, place.sizes, grid, place.patch, strict=True)
        if g * p != size
    ]
    times = "×".join
    return [
        f"{recording.source}: {describe_sizes(recording)}",
        f"  patches {times(map(str, place.patch))}: {times(map(str, grid))} = {math.prod(grid):,} positions, "
        f"{sum(grid):,} mode averages",
        *([f"  padded with its last entries: {', '.join(padded)}"] if padded else []),
        *(f"  {note}" for note in recording.notes),
        f"  {settings.heads} heads of {settings.dim // settings.heads} channels, random maps of seed {settings.seed}, "
        f"logit standard deviation {settings.logit_std:g} (scale {tokens.scale:.3g})",
    ]


def _footnotes(rows: Sequence[Row], tokens: Tokens, sample: _Sample) -> list[str]:
    """Say how the errors were estimated, and what full attention would have needed where it was not run."""
    positions, heads = math.prod(tokens.key.shape[1:-1]), tokens.key.shape[0]
    count = len(sample.positions)
    lines = [
        f"centred error: |O - F| / |F - v| on {count} sampled queries, F full attention, v the mean of the values; "
        "± one standard error. Random keys: full attention to as many keys, drawn at random, as there are mode "
        "averages; it costs as much as kao_kv.",
    ]
    if FULL.label not in [row.name for row in rows if row.ran]:
        flops, matrix = _flops(FULL, torch.empty_like(tokens.key, device="meta"), _order(tokens)), 4 * positions**2
        lines.append(
            f"Full attention over all {positions:,} queries would have needed {flops_in_words(flops)}FLOP, about "
            f"{seconds_in_words(flops / sample.rate)} on one thread at the speed of a piece of it; "
            f"its weights take {bytes_in_words(matrix)} a head, {bytes_in_words(heads * matrix)} in all, "
            "in an implementation that stores them."
        )
    skipped = [row.name for row in rows if not row.ran]
    if skipped:
        lines.append(
            f"* Not run over the whole grid, it would take more than {BUDGET_SECONDS:.0f} s: {', '.join(skipped)}; "
            "the error is of the sampled queries alone."
        )
    return [textwrap.fill(line, 110, subsequent_indent="  ", break_on_hyphens=False) for line in lines]
