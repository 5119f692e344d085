"""The command `bench`: layers of the library against plain PyTorch and other attention, timed after parity."""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import functools
import io
import itertools
import json
import math
import os
import platform
import shlex
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn import __version__
from tensorattn.cli.common import (
    Choice,
    MissingPackageError,
    aligned,
    check_directory,
    duration,
    parse_choices,
    png_bytes,
    positive,
    progress,
    require,
    write_files,
)
from tensorattn.cli.gain import GRIDS, cells_found, measure_grid, table
from tensorattn.cli.gain import OPERATORS as GAINING
from tensorattn.cli.plain import PLAIN, PlainLayer, PooledLayer
from tensorattn.cli.traffic import traffic
from tensorattn.diagnose.cost import DTYPES, LAYOUTS, cost, count
from tensorattn.errors import OptionError
from tensorattn.functional import OPERATORS
from tensorattn.nn import TensorAttention
from tensorattn.testing import reference

__all__ = ["Contender", "Row", "Work", "add_arguments", "contenders", "examine", "interleaved", "run"]

SHAPES = ("8,14,14,64", "8,56,56,96", "1,16,40,40,64")
CUBES = "8,16,24,32,48,64"
SCALED = ("kao_qkv", "kao_kv", "additive", "plain axial", "plain flattened")
SCALED_SETTING = "order 3, equal modes, 32 channels, 4 heads, float32, forward"
FITTED = 3  # largest sizes that an exponent is fitted to
LONGEST = 20_000  # positions of a batch entry above which attention among all of them is not run
PROBES = 12  # positions at which outputs are compared
TOLERANCES = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}  # of the largest entry
SHORTEST = 2e-3  # seconds of a sample; shorter calls are repeated within it
PATIENCE, FEWEST = 3.0, 3  # what has taken so many seconds is sampled so many times only
SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "MKL_", "KMP_")  # of the environment; they decide
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # for the colour-blind

DESCRIPTION = """\
Time, memory and kernel calls of layers of the library, of plain PyTorch in their place, and of other attention.

Every contender is first compared with the definition of its operator in float64, outputs and gradients; whoever fails
is not timed. Times are CPU times on one thread, medians of runs in turn. Plain layers have the same parameters and do
the same in a few lines of PyTorch: means in two steps, one fused attention a mode, linear maps of all positions.

Writes tables, the same as CSV and JSON, and a log-log plot of time against positions with fitted exponents.
"""
NOTES = (
    "library against plain: time of the library's layer over that of the plain one; peak memory of both in tensors, "
    "beyond input and parameters and with the results, in inputs; kernel calls of both, with gradients enabled, views "
    "left out.",
    "parity: largest error of outputs and gradients against float64, as a share of the largest entry.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command.

    Args:
        parser: The parser of the command.
    """
    parser.description, add = DESCRIPTION, parser.add_argument
    add("--shape", action="append", metavar="B,n_1,...,n_N,C", help=f"may be given again (default {' '.join(SHAPES)})")
    add(
        "--operator",
        action="append",
        metavar="NAME[:OPTION=VALUE]",
        help=f"this one only, and its plain form; may be given again: {', '.join(OPERATORS)}",
    )
    add("--peers", action="store_true", help="other attention too, where --operator is given")
    add("--heads", type=positive, default=4, help="heads (default 4)")
    add("--dtype", default="float32", help=f"{', '.join(DTYPES)} (default float32)")
    add("--layout", default="channels_last", help=f"{', '.join(LAYOUTS)} or both (default channels_last)")
    add("--compile", action="store_true", help="time each operator compiled by torch.compile too")
    add("--repeats", type=positive, default=5, help="samples of each time (default 5)")
    add("--cubes", default=CUBES, metavar="SIZES", help=f"cubes of the scaling plot, or none (default {CUBES})")
    add("--gain", action="store_true", help="what full attention takes longer than operators, on grids of known models")
    add("--world", type=positive, default=1, help="processes that share each tensor out: count what they send")
    add("--out", type=Path, default=Path("bench-out"), help="directory of the files (bench-out)")


# ---- what is worked on ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A tensor to attend to.

    Attributes:
        batch: Batch entries.
        sizes: Sizes of the modes.
        dim: Channels.
        heads: Number of heads.
        dtype: Name of the type.
        layout: Where the channels lie in memory.
    """

    batch: int
    sizes: tuple[int, ...]
    dim: int
    heads: int = 4
    dtype: str = "float32"
    layout: str = "channels_last"

    @property
    def channels_first(self) -> bool:
        """Whether channels lie before the modes."""
        return self.layout == "channels_first"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return (self.batch, self.dim, *self.sizes) if self.channels_first else (self.batch, *self.sizes, self.dim)

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{'×'.join(map(str, self.shape))}, {self.dtype}, {self.layout.replace('_', ' ')}, {self.heads} heads"

    def last(self, x: Tensor) -> Tensor:
        """View a tensor with its channels last."""
        return x.movedim(1, -1) if self.channels_first else x

    def tensor(self) -> Tensor:
        """Draw the tensor: noise about an outer sum, so that averages tell positions apart."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.shape, generator=generator)
        for mode, size in enumerate(self.sizes):
            along = [size if k == mode else 1 for k in range(len(self.sizes))]
            self.last(x).add_(torch.randn(self.batch, *along, self.dim, generator=generator))
        return x.to(DTYPES[self.dtype])


# ---- who works -----------------------------------------------------------------------------------------------

Definition = Callable[[Any, Tensor, Tensor], Tensor]  # of a layer in float64, an input (B, n_1, …, n_N, C) and places


def _always(work: Work) -> str:
    """Take anything."""
    return ""


@dataclass(frozen=True)
class Contender:
    """Who works.

    Attributes:
        name: What it is called.
        build: Makes the layer.
        definition: What the layer has to return at some places.
        absence: Why it has no place on a tensor, or nothing.
        plain: Name of the plain form, where it is a layer of the library that has one.
        compiled: Whether the layer is compiled.
    """

    name: str
    build: Callable[[Work], nn.Module]
    definition: Definition
    absence: Callable[[Work], str] = _always
    plain: str = ""
    compiled: bool = False


def _library(work: Work, operator: str, **options: Any) -> TensorAttention:
    """Make the layer of the library."""
    first = work.channels_first
    return TensorAttention(
        work.dim, work.heads, modes=len(work.sizes), operator=operator, channels_first=first, **options
    )


def _of_operator(choice: Choice, *, compiled: bool = False) -> Contender:
    """The layer of the library."""
    name = choice.record.name
    return Contender(
        f"{choice.label}, compiled" if compiled else choice.label,
        lambda work: _library(work, name, **choice.options),
        _defined,
        _too_long if name == "flattened" else _always,
        "" if choice.options or name not in PLAIN else f"plain {name}",
        compiled,
    )


def _defined(layer: TensorAttention, x: Tensor, places: Tensor) -> Tensor:
    """The definition of a layer, for the cells that it finds among keys in single precision, if it searches for any."""
    cells = None
    if layer.options.get("cells") == "keys" and layer.options["tokens"] < math.prod(x.shape[1:-1]):
        query, key = (_heads(to(x).detach(), layer.num_heads).float() for to in (layer.q_proj, layer.k_proj))
        labels, spread = cells_found(query.flatten(2, -2), key.flatten(2, -2), layer.options["tokens"])
        labels = labels.unflatten(-1, x.shape[1:-1])
        cells = [{"labels": labels[:, head], "spread": spread[:, head]} for head in range(layer.num_heads)]
    return reference.layer(layer, x, at=places, cells=cells)


def _of_plain(operator: str) -> Contender:
    """The plain form of an operator."""
    return Contender(
        f"plain {operator}",
        lambda work: PlainLayer(_library(work, operator)),
        lambda plain, x, places: reference.layer(plain.layer, x, at=places),
        _too_long if operator == "flattened" else _always,
    )


def _too_long(work: Work) -> str:
    """Say that attention among all positions takes too long."""
    positions = math.prod(work.sizes)
    return f"{positions:,} positions are more than {LONGEST:,}" if positions > LONGEST else ""


def _heads(x: Tensor, heads: int) -> Tensor:
    """Split heads: ``(B, *, C)`` to ``(B, H, *, D)``."""
    return x.unflatten(-1, (heads, -1)).movedim(-2, 1)


def _pooled(pooled: Any, x: Tensor, places: Tensor) -> Tensor:
    """Full attention to the pooled tensor."""
    layer, tokens = pooled.layer, pooled.pooled(x)
    maps = ((layer.q_proj, x), (layer.k_proj, tokens), (layer.v_proj, tokens))
    parts = [_heads(projection(source), layer.num_heads) for projection, source in maps]
    output, _ = reference.attention("flattened", *parts, order=x.dim() - 2, at=places)
    return layer.out_proj(output.movedim(1, -2).flatten(-2))


def _axial_package(package: Any, x: Tensor, places: Tensor) -> Tensor:
    """One attention a mode along the fibre through each place, each with maps of its own, added up."""
    total = torch.zeros((), dtype=x.dtype)
    for mode, attends in enumerate(each.fn for each in package.axial_attentions):
        others: Any = [places[:, k] for k in range(places.shape[1]) if k != mode]
        fibres = x.movedim(1 + mode, -2)[:, *others]  # (B, L, n, C)
        fibres = fibres if others else fibres.unsqueeze(1).expand(-1, len(places), -1, -1)
        own = fibres.gather(2, places[:, mode, None, None].expand(len(fibres), -1, 1, x.shape[-1]))
        key, value = attends.to_kv(fibres).chunk(2, -1)
        parts = [_heads(part, attends.heads) for part in (attends.to_q(own), key, value)]
        output, _ = reference.attention("flattened", *parts, order=1)
        total = total + attends.to_out(output.squeeze(-2).movedim(1, -2).flatten(-2))
    return total


def _kronecker_package(package: Any, x: Tensor, places: Tensor) -> Tensor:
    """`kao_qkv` without a scale; its bias is added once for each mode."""
    query, key, value = (
        _heads(part, package.heads) for part in (x @ package.to_qkv.weight.squeeze(-1).mT).chunk(3, -1)
    )
    output, _ = reference.attention("kao_qkv", query, key, value, order=2, at=places, scale=1.0)
    return F.linear(output.movedim(1, -2).flatten(-2), package.to_out.weight.squeeze(-1), 2 * package.to_out.bias)


def _from_package(
    module: str, build: Callable[[Any, Work], nn.Module], definition: Definition, refuses: Any
) -> Contender:
    """The layer of another package, where it is installed."""
    name = module.replace("_", "-")
    need = functools.partial(require, module, extra="bench", purpose=f"comparing with {name}")

    def absence(work: Work) -> str:
        """Say why it is not there."""
        try:
            need()
        except MissingPackageError:
            return "not installed: pip install 'tensorattn[bench]'"
        return str(refuses(work))

    return Contender(name, lambda work: build(need(), work), definition, absence)


PEERS = (
    Contender(
        "pooled SDPA",
        lambda work: PooledLayer(_library(work, "additive")),
        _pooled,
        lambda work: "" if len(work.sizes) <= 3 else "it takes up to three modes",
    ),
    _from_package(
        "axial_attention",
        lambda package, work: package.AxialAttention(
            dim=work.dim,
            num_dimensions=len(work.sizes),
            heads=work.heads,
            dim_index=1 if work.channels_first else -1,
        ),
        _axial_package,
        _always,
    ),
    _from_package(
        "kronecker_attention_pytorch",
        lambda package, work: package.KroneckerSelfAttention(
            dim=work.dim, heads=work.heads, dim_heads=work.dim // work.heads
        ),
        _kronecker_package,
        lambda work: "" if len(work.sizes) == 2 and work.channels_first else "it takes images with channels first only",
    ),
)


def contenders(choices: Sequence[Choice], *, peers: bool, compiled: bool = False) -> list[Contender]:
    """Say who works: operators and their plain forms, and other attention.

    Args:
        choices: Operators with their options.
        peers: Whether other attention works too.
        compiled: Whether each operator also works compiled.

    Returns:
        The contenders, each once.
    """
    ours = [_of_operator(choice) for choice in choices]
    ours += [_of_operator(choice, compiled=True) for choice in choices] if compiled else []
    names = [choice.record.name for choice in choices] + (["axial", "flattened"] if peers else [])
    return [*ours, *(_of_plain(name) for name in dict.fromkeys(names) if name in PLAIN), *(PEERS if peers else ())]


# ---- parity --------------------------------------------------------------------------------------------------


class Runner:
    """A contender at work on a tensor.

    Args:
        who: The contender.
        work: The tensor.
        x: Its values, for which there are gradients.
        gradient: The gradient of the output.
    """

    def __init__(self, who: Contender, work: Work, x: Tensor, gradient: Tensor) -> None:
        torch.manual_seed(4)
        self.definition, self.work, self.x, self.gradient = who.definition, work, x, gradient
        self.layer = who.build(work)
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
        self.layer = self.layer.to(DTYPES[work.dtype])
        self.call: Callable[[Tensor], Tensor] = torch.compile(self.layer) if who.compiled else self.layer

    def forward(self) -> Tensor:
        """Run the layer without gradients."""
        with torch.no_grad():
            return self.call(self.x)

    def training(self, gradient: Tensor | None = None) -> Tensor:
        """Run the layer and its backward pass."""
        self.clear()
        y = self.call(self.x)
        y.backward(self.gradient if gradient is None else gradient)
        return y

    def clear(self) -> None:
        """Let go of all gradients."""
        self.x.grad = None
        self.layer.zero_grad(set_to_none=True)

    def parity(self, *, training: bool) -> float:
        """Compare with the definition: outputs at some places, and all gradients of what depends on these.

        Args:
            training: Whether gradients are compared too.

        Returns:
            The largest error as a share of the largest entry; not a number where something is none.
        """
        generator, work = torch.Generator().manual_seed(3), self.work
        some = [torch.randint(size, (PROBES,), generator=generator) for size in work.sizes]
        ends = torch.tensor([[0] * len(some), [size - 1 for size in work.sizes]])
        places = torch.unique(torch.cat([ends, torch.stack(some, -1)]), dim=0)
        at = (slice(None), *places.unbind(-1))
        twin, x = copy.deepcopy(self.layer).double(), work.last(self.x.detach()).double().requires_grad_()
        expected = self.definition(twin, x, places)
        errors = [_distance(work.last(self.forward())[at], expected.detach())]
        if training and errors[0] < math.inf:
            gradient = torch.zeros_like(self.gradient)
            work.last(gradient)[at] = work.last(self.gradient)[at]
            errors.append(_distance(work.last(self.training(gradient).detach())[at], expected.detach()))
            expected.backward(work.last(gradient)[at].double())
            assert self.x.grad is not None and x.grad is not None
            of_input = [work.last(self.x.grad).clone(), x.grad]
            errors.append(_distance(*(each[at] for each in of_input)))
            for each in of_input:
                each[at] = 0  # elsewhere it is smaller
            ours, theirs = (
                torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in layer.parameters()])
                for layer in (self.layer, twin)
            )
            errors += [_distance(*of_input), _distance(ours, theirs)]
            self.clear()
        return max(errors, key=lambda error: (math.isnan(error), error))


def _distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest entry that is expected; infinite for a wrong shape."""
    if found.shape != expected.shape:
        return math.inf
    error, size = (each.abs().max().item() for each in (found.double() - expected, expected))
    return error if size == 0 else error / size


# ---- time and memory -----------------------------------------------------------------------------------------


def interleaved(
    calls: Mapping[str, Callable[[], Any]], *, repeats: int, before: Callable[[], Any]
) -> dict[str, tuple[float, float]]:
    """Time calls in turn on one thread: one sample of each, then again, so that disturbances meet all alike.

    It is the CPU time of the thread, which waiting for a processor does not enter. The first runs do not count.

    Args:
        calls: What to time, by name.
        repeats: Samples of each; three of what takes seconds.
        before: Called before every sample, so that all find the caches alike.

    Returns:
        Seconds of each call: the median of its samples, and half the distance of their quartiles.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    counts = {name: 1 for name in calls}
    for name, call in calls.items():
        call()
        counts[name] = math.ceil(SHORTEST / max(_seconds(call, 1), SHORTEST / 100))
    for _ in range(repeats):
        for name, call in calls.items():
            if len(times[name]) < FEWEST or counts[name] * sum(times[name]) < PATIENCE:
                before()
                times[name].append(_seconds(call, counts[name]))
    return {name: _summary(samples) for name, samples in times.items()}


def _seconds(call: Callable[[], Any], count: int) -> float:
    """CPU time of a call, the mean of a few."""
    start = time.thread_time()
    for _ in range(count):
        call()
    return (time.thread_time() - start) / count


def _summary(samples: Sequence[float]) -> tuple[float, float]:
    """Median, and half the distance of the quartiles."""
    first, middle, third = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
    return middle, (third - first) / 2


@dataclass(frozen=True)
class Phase:
    """What a pass took: forwards without gradients, or forwards and backwards.

    Attributes:
        seconds: Median of its CPU times.
        spread: Half the distance of their quartiles.
        calls: Kernel calls, with gradients enabled; None if compiled.
        peak: Most bytes in tensors at once beyond input and parameters; None if compiled.
        flops: Operations, as `tensorattn.cost` counts them; None if compiled.
    """

    seconds: float
    spread: float
    calls: int | None = None
    peak: int | None = None
    flops: int | None = None


@dataclass(frozen=True)
class Row:
    """What became of one contender on one tensor.

    Attributes:
        work: The tensor.
        name: The contender.
        plain: The contender that is its plain form, if any.
        error: How far it is from its definition; None if it did not run.
        forward: Its pass without gradients; None unless parity holds.
        training: Its pass with gradients, likewise.
        note: Why something is missing.
    """

    work: Work
    name: str
    plain: str = ""
    error: float | None = None
    forward: Phase | None = None
    training: Phase | None = None
    note: str = ""


def examine(
    work: Work,
    who: Sequence[Contender],
    *,
    repeats: int,
    whole: bool = True,
    started: Callable[[str], Any] = lambda words: None,
) -> list[Row]:
    """Check, time and measure contenders on one tensor, on one thread.

    Args:
        work: The tensor.
        who: Who works on it.
        repeats: Samples of each time.
        whole: Whether training, memory and kernel calls are part of it; otherwise only the time of a forward pass.
        started: Called with words for each piece of work when it starts.

    Returns:
        A row for each contender. Who fails parity has no time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return list(_examined(work, who, repeats, whole, started))
    finally:
        torch.set_num_threads(threads)


def _examined(
    work: Work, who: Sequence[Contender], repeats: int, whole: bool, started: Callable[[str], Any]
) -> Iterator[Row]:
    """Examine on the threads that there are."""
    x, tolerance = work.tensor().requires_grad_(), TOLERANCES[work.dtype]
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)
    runners, errors, notes = {}, {}, {}
    for each in who:
        started(f"parity of {each.name}")
        if note := each.absence(work):
            notes[each.name] = note
            continue
        runner = Runner(each, work, x, gradient)
        error = errors[each.name] = runner.parity(training=whole)
        if error <= tolerance:  # not so if it is not a number
            runners[each.name] = runner
        else:
            notes[each.name] = f"parity fails, error {error:.0e} above {tolerance:.0e}: not timed"
    passes = ("forward", "training") if whole else ("forward",)
    started(f"time of {work}")
    calls = {f"{name} {kind}": getattr(runner, kind) for name, runner in runners.items() for kind in passes}
    times = interleaved(calls, repeats=repeats, before=x.detach().sum)
    started(f"kernel calls and memory of {work}")
    for each in who:
        phases: dict[str, Phase] = {}
        for kind in passes if each.name in runners else ():
            told = _counted(runners[each.name], kind) if whole and not each.compiled else {}
            phases[kind] = Phase(*times[f"{each.name} {kind}"], **told)
        yield Row(work, each.name, each.plain, errors.get(each.name), note=notes.get(each.name, ""), **phases)


def _counted(runner: Runner, kind: str) -> dict[str, int]:
    """Count kernel calls, memory and operations of a pass."""
    runner.clear()
    found = count(getattr(runner, kind))
    with_gradients = found if kind == "training" else count(lambda: runner.call(runner.x))
    runner.clear()
    return {"calls": with_gradients.calls, "peak": found.peak, "flops": found.flops}


# ---- scaling -------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """Seconds of a forward pass against positions."""

    positions: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def exponent(self) -> float:
        """Slope of log time against log positions over the largest sizes; not a number for a single size."""
        if len(self.positions) < 2:
            return math.nan
        logs = np.log(np.array([self.positions[-FITTED:], self.seconds[-FITTED:]]))
        return float(np.polyfit(logs[0], logs[1], 1)[0])


def curves(rows: Sequence[Row]) -> dict[str, Curve]:
    """Turn rows of growing size into one curve for each contender that has times.

    Args:
        rows: What was measured.

    Returns:
        The curves, by contender.
    """
    timed = [(row.name, math.prod(row.work.sizes), row.forward.seconds) for row in rows if row.forward is not None]
    points = {name: sorted(point[1:] for point in timed if point[0] == name) for name, *_ in timed}
    return {name: Curve(*zip(*found, strict=True)) for name, found in points.items()}


def _plot(found: Mapping[str, Curve], title: str) -> Any:
    """Draw time against positions, both in logarithms."""
    module = require("matplotlib.figure", extra="bench", purpose="the scaling plot")
    figure = module.Figure(figsize=(8.5, 5.8), layout="constrained", dpi=120)
    axes = figure.subplots()
    styles = itertools.cycle(COLOURS)
    for name, curve in sorted(found.items(), key=lambda item: -item[1].seconds[-1]):
        words = name if math.isnan(curve.exponent) else f"{name}: exponent {curve.exponent:.2f}"
        axes.loglog(curve.positions, [1000 * s for s in curve.seconds], marker="o", label=words, color=next(styles))
    axes.set_xlabel(f"positions ({SCALED_SETTING})")
    axes.set_ylabel("time, ms")
    axes.grid(True, which="both", color="0.9")
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


# ---- what is told --------------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """Describe what the numbers depend on beyond the code: processor, versions, and settings of the environment.

    Returns:
        Words by what they describe.
    """
    named = [
        line.partition(":")[2].strip()
        for path in [Path("/proc/cpuinfo")]
        if path.exists()
        for line in path.read_text().splitlines()
        if line.startswith("model name")
    ]
    set_here = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{named[0] if named else platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()) if hasattr(os, "getloadavg") else "not known",
        "versions": f"tensorattn {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "system": platform.platform(),
        "environment": " ".join(set_here) or "the default heap and threads",
    }


def _gain(arguments: argparse.Namespace) -> int:
    """Print how many times as long full attention takes on the grids of known models."""
    choices = parse_choices(arguments.operator or GAINING)
    scratch = torch.zeros(1 << 20)
    timed = functools.partial(interleaved, repeats=arguments.repeats, before=lambda: scratch.add_(1))
    with progress(2 * len(GRIDS), unit="step") as started:
        measured = [measure_grid(grid, choices, timed, started) for grid in GRIDS]
    for name, words in {"command": "python -m tensorattn bench --gain", **machine()}.items():
        print(f"{name}: {words}")
    print("\nTime of full attention (forwards; forwards and backwards), and how many times the operators are faster.\n")
    print(*table(measured), sep="\n")
    return 0 if all(gain for each in measured for gain in each.gains.values()) else 1


def _against_plain(rows: Sequence[Row]) -> list[str]:
    """The main table: each operator against its plain form."""
    headings = (
        "library against plain",
        "forward",
        "training",
        "peak forward",
        "peak training",
        "calls",
        "calls training",
    )
    cells: list[tuple[str, ...]] = [headings]
    for work in dict.fromkeys(row.work for row in rows):
        known = {row.name: row for row in rows if row.work == work}
        cells.append((str(work),))
        for ours in (row for row in known.values() if row.plain in known):
            pairs = [(getattr(ours, kind), getattr(known[ours.plain], kind)) for kind in ("forward", "training")]
            if any(phase is None for pair in pairs for phase in pair):
                continue
            times = [f"{a.seconds / b.seconds:.2f}" for a, b in pairs]
            peaks = [" / ".join(_inputs(phase.peak, work) for phase in pair) for pair in pairs]
            calls = [" / ".join(str(phase.calls) for phase in pair) for pair in pairs]
            cells.append((f"  {ours.name}", *times, *peaks, *calls))
    return aligned(cells)


def _inputs(peak: int | None, work: Work) -> str:
    """Write memory as a multiple of the input."""
    return "-" if peak is None else f"{peak / work.bytes:.1f}"


def _everyone(rows: Sequence[Row]) -> list[str]:
    """The long table: every contender on every tensor."""
    headings = (
        "",
        "parity",
        "forward",
        "±",
        "training",
        "±",
        "peak forward",
        "peak training",
        "calls",
        "calls training",
    )
    cells: list[tuple[str, ...]] = [headings]
    for work, group in itertools.groupby(rows, key=lambda row: row.work):
        cells.append((f"{work}; input {work.bytes / 1e6:.1f} MB",))
        for row in group:
            if row.note:
                cells.append((f"  {row.name}: {row.note}",))
                continue
            phases = [row.forward, row.training]
            times = [text for phase in phases for text in _time(phase)]
            peaks = ["-" if phase is None else _inputs(phase.peak, work) for phase in phases]
            calls = ["-" if phase is None or phase.calls is None else str(phase.calls) for phase in phases]
            cells.append((f"  {row.name}", f"{row.error:.0e}", *times, *peaks, *calls))
    return aligned(cells)


def _sent(work: Work, choices: Sequence[Choice], world: int) -> list[str]:
    """What each operator sends where processes share a tensor out."""
    layers = [(choice.label, choice.record.name, dict(choice.options)) for choice in choices]
    headings, *rows = traffic(work.batch, work.sizes, work.dim, work.heads, DTYPES[work.dtype], layers, world)
    return aligned([headings, (str(work),), *rows])


def _time(phase: Phase | None) -> tuple[str, str]:
    """Write a time and its spread."""
    if phase is None:
        return "-", "-"
    return duration(phase.seconds), f"{100 * phase.spread / max(phase.seconds, 1e-12):.0f} %"


def _record(row: Row) -> dict[str, Any]:
    """Plain numbers and words by name."""
    record = {
        "contender": row.name,
        **asdict(row.work),
        "sizes": "x".join(map(str, row.work.sizes)),
        "error": row.error,
    }
    for kind in ("forward", "training"):
        phase = getattr(row, kind)
        record |= {f"{kind}_{name}": getattr(phase, name, None) for name in Phase.__dataclass_fields__}
    return {**record, "note": row.note}


def _as_csv(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Write records as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


# ---- the command ---------------------------------------------------------------------------------------------


def _parse_shape(text: str) -> tuple[int, tuple[int, ...], int]:
    """Read a shape ``B,n_1,…,n_N,C``."""
    try:
        batch, *sizes, dim = (int(number) for number in text.split(","))
    except ValueError:
        raise OptionError(f"--shape must be B,n_1,...,n_N,C in whole numbers, got {text!r}.") from None
    if not sizes or min(batch, dim, *sizes) < 1:
        raise OptionError(f"--shape must be B,n_1,...,n_N,C with at least one mode and no size below 1, got {text!r}.")
    return batch, tuple(sizes), dim


def _parse_cubes(text: str) -> list[Work]:
    """Read the sizes of the cubes."""
    if text == "none":
        return []
    try:
        sizes = [int(number) for number in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise OptionError(f"--cubes must be whole numbers of at least 1, or none, got {text!r}.")
    return [Work(1, (size, size, size), 32) for size in sizes]


def _works(arguments: argparse.Namespace) -> list[Work]:
    """Read the tensors to work on."""
    for name, known in (("dtype", tuple(DTYPES)), ("layout", (*LAYOUTS, "both"))):
        if getattr(arguments, name) not in known:
            raise OptionError(f"--{name} must be one of {', '.join(known)}, got {getattr(arguments, name)!r}.")
    works = []
    for text in arguments.shape or SHAPES:
        batch, sizes, dim = _parse_shape(text)
        if dim % arguments.heads:
            raise OptionError(f"--heads must divide the channels, but {arguments.heads} do not divide {dim} of {text}.")
        layouts = LAYOUTS if arguments.layout == "both" else (arguments.layout,)
        works += [Work(batch, sizes, dim, arguments.heads, arguments.dtype, layout) for layout in layouts]
    return works


def _command(arguments: argparse.Namespace) -> str:
    """Write the command with all its arguments."""
    words = ["python", "-m", "tensorattn", "bench"]
    for name in ("shape", "operator", "peers", "heads", "dtype", "layout", "compile", "repeats", "cubes", "world"):
        value = getattr(arguments, name)
        value = None if name == "world" and value == 1 else value
        for each in value if isinstance(value, list) else [value] if value else []:
            words += [f"--{name}"] if each is True else [f"--{name}", str(each)]
    return shlex.join(words)


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Args:
        arguments: What the parser read.

    Returns:
        The exit status.
    """
    if arguments.gain:
        return _gain(arguments)
    check_directory(arguments.out)
    works, cubes = _works(arguments), _parse_cubes(arguments.cubes)
    choices = parse_choices(arguments.operator or OPERATORS)
    for choice, work in itertools.product(choices, works):  # refuses options that have no meaning for a shape
        cost(choice.record.name, work.sizes, dim=work.dim, num_heads=work.heads, **choice.options)
    peers = arguments.peers or not arguments.operator
    who = contenders(choices, peers=peers, compiled=arguments.compile)
    scaled = [each for each in who if each.name in SCALED and cubes]
    where = {"command": _command(arguments), **machine()}
    with progress(len(works) * (len(who) + 2) + len(cubes) * (len(scaled) + 2), unit="step") as started:
        rows = [row for work in works for row in examine(work, who, repeats=arguments.repeats, started=started)]
        growing = [
            row for work in cubes if scaled for row in examine(work, scaled, repeats=3, whole=False, started=started)
        ]
    found = curves(growing)
    exponents = [(f"scaling: {SCALED_SETTING}", "positions", f"exponent, last {FITTED}")]
    for name, curve in found.items():
        exponents.append((name, f"{curve.positions[0]:,} to {curve.positions[-1]:,}", f"{curve.exponent:.2f}"))
    heading = [*(f"{name}: {words}" for name, words in where.items()), ""]
    heading += [textwrap.fill(note, 110, subsequent_indent="  ") for note in NOTES]
    parts = [heading, _against_plain(rows), _everyone(rows), *([aligned(exponents)] if found else [])]
    parts += [_sent(work, choices, arguments.world) for work in works if arguments.world > 1]
    text = "\n\n".join("\n".join(part) for part in parts)
    records = [_record(row) for row in (*rows, *growing)]
    shown = {"machine": where, "rows": records, "scaling": {name: curve._asdict() for name, curve in found.items()}}
    files = {
        "bench.txt": f"{text}\n".encode(),
        "bench.csv": _as_csv(records),
        "bench.json": (json.dumps(shown, indent=1) + "\n").encode(),
    }
    if found:
        title = f"One thread, {where['processor']}, torch {torch.__version__}, {where['date']}"
        try:
            files["bench-scaling.png"] = png_bytes(_plot(found, title))
        except MissingPackageError as cause:
            text = f"{text}\n\nno plot: {cause}"
    written = write_files(arguments.out, files)
    print(text)
    print("\nwritten:", *(f"  {path}" for path in written), sep="\n")
    return 0
