"""What full attention takes longer than operators, on the grids of models that people have: `bench --gain`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorattn.cli.common import Choice, aligned, parse_choices, progress
from tensorattn.cli.contenders import cells_found
from tensorattn.cli.plots import digits
from tensorattn.cli.timing import CPU, interleaved, one_thread
from tensorattn.testing import reference

__all__ = ["GRIDS", "OPERATORS", "Grid", "Measured", "measure_grid", "run", "table"]

OPERATORS = (
    "additive",
    "kao_kv",
    "kao_qkv",
    "kronecker_product",
    "axial",
    "clustered:tokens=32",
    "clustered:cells=blocks:tokens=32",
)
PROBES, TOLERANCE = 3, 1e-3  # queries compared with the definition, and their largest error as a share


@dataclasses.dataclass(frozen=True)
class Grid:
    """The grid of a model.

    Attributes:
        name: What it is.
        sizes: Sizes of the modes.
        heads: Number of heads.
        dim: Size of a head.
    """

    name: str
    sizes: tuple[int, ...]
    heads: int
    dim: int = 64

    @property
    def positions(self) -> int:
        """Number of positions."""
        return math.prod(self.sizes)

    def tensors(self, device: torch.device) -> list[Tensor]:
        """Draw queries, keys and values ``(1, H, n_1, …, n_N, D)`` on the CPU, each of noise and an outer sum."""
        generator, found = torch.Generator().manual_seed(0), []
        for _ in range(3):
            tensor = torch.randn(1, self.heads, *self.sizes, self.dim, generator=generator)
            for mode, size in enumerate(self.sizes):
                along = [size if k == mode else 1 for k in range(len(self.sizes))]
                tensor = tensor + torch.randn(1, self.heads, *along, self.dim, generator=generator)
            found.append(tensor.to(device))
        return found


GRIDS = (
    Grid("UNETR, 96³ by patches of 16", (6, 6, 6), 12),
    Grid("Swin window", (7, 7, 7), 6, 32),
    Grid("ViT-S", (14, 14), 6),
    Grid("DINOv2-S, 518²", (37, 37), 6),
    Grid("VideoMAE-B", (8, 14, 14), 12),
    Grid("ViViT-B", (16, 14, 14), 12),
    Grid("U-Net level of a volume", (24, 24, 24), 4, 32),
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured on a grid.

    Attributes:
        grid: The grid.
        full: Seconds of full attention, forwards, and forwards and backwards.
        gains: For each operator, how many times as long full attention takes, likewise; None where parity failed.
    """

    grid: Grid
    full: tuple[float, float]
    gains: Mapping[str, tuple[float, float] | None]


def _error(choice: Choice, tensors: Sequence[Tensor], output: Tensor) -> float:
    """Return the largest error of an output at some queries, relative to the largest entry."""
    sizes = tensors[0].shape[2:-1]
    places = torch.tensor([[(17 * k) % size for size in sizes] for k in range(PROBES)])
    options = choice.record.with_defaults(choice.options)
    if choice.record.name == "clustered" and options["cells"] == "keys":
        query, key = (tensor.flatten(2, -2) for tensor in tensors[:2])
        labels, spread = cells_found(query, key, options["tokens"])
        if options["tokens"] < math.prod(sizes):
            options |= {"labels": labels.unflatten(-1, sizes), "spread": spread}
    exact = [tensor.cpu() for tensor in tensors]
    expected, _ = reference.attention(choice.record.name, *exact, order=len(sizes), at=places, **options)
    found = output.cpu().movedim((0, 1), (-3, -2))[tuple(places.unbind(-1))].movedim(0, -2).double()
    return float((found - expected).abs().max() / expected.abs().max())


def measure_grid(
    grid: Grid,
    choices: Sequence[Choice],
    timed: Callable[[Mapping[str, Callable[[], Any]]], Mapping[str, tuple[float, float]]],
    started: Callable[[str], None] = lambda words: None,
    device: torch.device = CPU,
) -> Measured:
    """Compare operators with their definitions, and time them and full attention in turn.

    Args:
        grid: The grid.
        choices: Operators and their options.
        timed: From calls by name to seconds of each and their spread.
        started: Called with words when a step starts.
        device: Where it is done.
    """
    tensors, order = grid.tensors(device), len(grid.sizes)
    flat = [tensor.flatten(2, -2) for tensor in tensors]
    gradient = torch.randn_like(tensors[0])

    def training(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Any:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(function(*leaves), leaves, gradient.reshape(inputs[0].shape))

    started(f"parity on {grid.name}")
    functions = {choice.label: functools.partial(choice.record.function, order=order, **choice.options)
                 for choice in choices}  # fmt: skip
    with torch.no_grad():
        errors = {choice.label: _error(choice, tensors, functions[choice.label](*tensors)) for choice in choices}
    right = {name: function for name, function in functions.items() if errors[name] <= TOLERANCE}
    started(f"time on {grid.name}")
    calls: dict[str, Callable[[], Any]] = {"": lambda: F.scaled_dot_product_attention(flat[0], flat[1], flat[2])}
    calls |= {name: functools.partial(function, *tensors) for name, function in right.items()}
    with torch.no_grad():
        forward = timed(calls)
    calls = {"": functools.partial(training, F.scaled_dot_product_attention, flat)}
    calls |= {name: functools.partial(training, function, tensors) for name, function in right.items()}
    both = timed(calls)
    full = forward[""][0], both[""][0]
    gains = {
        name: (full[0] / forward[name][0], full[1] / both[name][0]) if name in right else None for name in functions
    }
    return Measured(grid, full, gains)


def _times(gain: float) -> str:
    """Write how many times, with two digits."""
    return f"{gain:.0f}" if gain >= 9.95 else f"{gain:.1f}" if gain >= 0.995 else f"{gain:.2f}"


def table(measured: Sequence[Measured]) -> list[str]:
    r"""Write what was measured as the lines of a table.

    Args:
        measured: What was measured on each grid.

    Examples:
        >>> print(*table([Measured(GRIDS[2], (2e-3, 6e-3), {"kao_kv": (1.25, 12.0), "axial": None})]), sep="\n")
        grid             P   full attention, ms    kao_kv          axial
        ViT-S, 14×14   196           2.00; 6.00   1.2; 12   parity fails
    """
    names = [choice.label for choice in parse_choices(measured[0].gains)]
    rows: list[tuple[str, ...]] = [("grid", "P", "full attention, ms", *names)]
    for each in measured:
        first = f"{each.grid.name}, {'×'.join(map(str, each.grid.sizes))}"
        times = "; ".join(digits(1e3 * seconds) for seconds in each.full)
        cells = ["; ".join(map(_times, gain)) if gain else "parity fails" for gain in each.gains.values()]
        rows.append((first, f"{each.grid.positions:,}", times, *cells))
    return aligned(rows)


def run(operators: Sequence[str] | None, repeats: int, device: torch.device, where: Mapping[str, str]) -> int:
    """Print how many times as long full attention takes on the grids of known models.

    Args:
        operators: Operators with options, as the command line names them; some by default.
        repeats: Samples of each time.
        device: Where it is done.
        where: What the numbers depend on, by name.

    Returns:
        The exit status: 1 where parity fails.
    """
    choices, scratch = parse_choices(operators or OPERATORS), torch.zeros(1 << 20, device=device)
    timed = functools.partial(interleaved, repeats=repeats, before=lambda: scratch.add_(1), device=device)
    with one_thread(), progress(2 * len(GRIDS), unit="step") as started:
        measured = [measure_grid(grid, choices, timed, started, device) for grid in GRIDS]
    print(*(f"{name}: {words}" for name, words in where.items()), sep="\n")
    print("\nTime of full attention (forwards; forwards and backwards), and how many times the operators are faster.\n")
    print(*table(measured), sep="\n")
    return 0 if all(gain for each in measured for gain in each.gains.values()) else 1
