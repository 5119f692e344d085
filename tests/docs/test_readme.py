"""README: every block of code runs, every command and number is checked, and the table of operators is true."""

from __future__ import annotations

import ast
import itertools
import math
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from test_floors import APART, FLOORS, read_package
from torch import Tensor

import tensorattn as ta
from tensorattn.__main__ import main
from tensorattn.attend.choices import default_choices, parse_choice
from tensorattn.attend.command import PACKAGED
from tensorattn.attend.embedding import embed
from tensorattn.attend.job import QUERIES, Settings, prepare
from tensorattn.attend.recordings import describe_sizes
from tensorattn.bench.targets import GOALS
from tensorattn.diagnose import additive_fraction, error_estimate, sample_positions
from tensorattn.measuring import count_flops

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CI = ROOT / ".ci" / "run"

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]


def flat(text: str) -> str:
    """A text in one line."""
    return " ".join(text.split())


def section(title: str) -> str:
    """Text of one section."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, flags=re.MULTILINE | re.DOTALL).group(1)


def table_rows(text: str) -> list[list[str]]:
    """Cells of the tables of a text, without headings."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    rules = [place for place, row in enumerate(rows) if set("".join(row)) <= set("-:")]
    return [row for place, row in enumerate(rows) if place not in rules and place + 1 not in rules]


# ---- blocks of code ------------------------------------------------------------------------------------------


def python_sections() -> dict[str, list[Any]]:
    """Examples in Python, by the section that they are in."""
    document = Sybil([PythonCodeBlockParser()]).parse(ROOT / "README.md")
    headings = [(match.start(), match.group(1)) for match in re.finditer(r"^## (.*)$", README, flags=re.MULTILINE)]
    found: dict[str, list[Any]] = {}
    for example in document.examples():
        title = max((place, title) for place, title in headings if place < example.start)[1]
        found.setdefault(title, []).append(example)
    return found


PYTHON = python_sections()


@pytest.mark.parametrize("title", PYTHON)
def test_python_runs(title: str) -> None:
    """The blocks of a section share their names, and need those of no other section."""
    torch.manual_seed(0)
    PYTHON[title][0].document.namespace.clear()
    for example in PYTHON[title]:
        example.evaluate()


def test_no_block_is_left_out() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "sh", "text", "bibtex"}
    examples = [example for part in PYTHON.values() for example in part]
    for block in re.finditer(r"^```python\n.*?^```$", README, flags=re.MULTILINE | re.DOTALL):
        assert any(block.start() <= example.start < block.end() for example in examples), block.group()
    for language, text in BLOCKS:
        assert language != "bibtex" or text.count("{") == text.count("}")


# ---- the goals -----------------------------------------------------------------------------------------------


def test_the_goals_are_those_of_the_benchmark() -> None:
    """Every goal is in the table with what is to be reached, whatever came out; and the plot is there."""
    rows = [re.split(r"  +", line) for line in section("Speed and memory").splitlines()]
    told = {(row[0], row[1][0], row[2].split()[-1]) for row in rows if len(row) > 4 and row[2][:2] in ("<=", ">=")}
    limits = {(goal.title, str(n), f"{limit:g}") for goal in GOALS for n, limit in goal.limits.items()}
    assert told == limits
    (count,) = re.findall(r"^(\d+) of (\d+) reached", README, flags=re.MULTILINE)
    reached = [row for row in rows if row[-1] in ("reached", "stretch")]
    assert count == (str(len(reached)), str(len(limits)))


@pytest.mark.skipif(not CI.exists(), reason="a source distribution has no pictures")
def test_the_pictures_are_there() -> None:
    named = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert named == [".assets/scaling.png"]
    with Image.open(ROOT / named[0]) as picture:
        picture.verify()


# ---- commands ------------------------------------------------------------------------------------------------


def test_the_commands_are_those_of_the_project() -> None:
    extras, pins = PROJECT["optional-dependencies"], []
    for line in COMMANDS:
        for named in re.findall(r"\.\[([\w,]+)\]", line):
            assert set(named.split(",")) <= set(extras)
        pins += re.findall(r"torch==\S+", line)
    assert pins == [requirement for requirement in extras["test"] if requirement.startswith("torch==")]
    oldest = re.search(r"torch>=([\d.]+)", " ".join(PROJECT["dependencies"])).group(1)
    assert f"{oldest} or later" in README and f"The tests run with {pins[0].removeprefix('torch==')}." in flat(README)
    job, tests = (line.split(" && ") for line in COMMANDS if line.startswith("python3 -m venv .venv && "))
    assert job[1] == tests[1] == ". .venv/bin/activate"
    assert job[3:] == ["python -m tensorattn attend"] and tests[3:] == ["pytest -q"]


@pytest.mark.skipif(not CI.exists(), reason="a source distribution has no .ci")
def test_the_tests_run_as_they_do_in_ci() -> None:
    script = CI.read_text(encoding="utf-8")
    assert CI.stat().st_mode & 0o100 and ".ci/run" in COMMANDS
    assert re.search(r"^pip install .*-e '\.\[test\b.*\]'$", script, flags=re.MULTILINE)
    assert re.search(r"^pytest -q\b", script, flags=re.MULTILINE)


def print_help(*words: str) -> None:
    """Let the command line tell what it takes."""
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0


def test_every_subcommand_is_there_and_has_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    print_help()
    commands = re.findall(r"^    (\w+) ", capsys.readouterr().out, flags=re.MULTILINE)
    named = re.findall(r"python -m tensorattn (\w+)([^`\n]*)", README)
    assert {command for command, _ in named} == set(commands)
    for command, words in named:
        print_help(command)
        assert set(re.findall(r"--[\w-]+", words)) <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))


def test_links_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", README, re.M)
    }
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) >= 4
    for link in links:
        assert link[1:] in anchors if link.startswith("#") else (ROOT / link).exists(), link


# ---- the table of operators ----------------------------------------------------------------------------------


class Row(NamedTuple):
    """One operator of the table."""

    operator: str
    options: dict[str, Any]
    exact: str
    cost: str

    def __call__(self, *tensors: Tensor, **settings: Any) -> Tensor:
        return ta.OPERATORS[self.operator].function(*tensors, **self.options, **settings)


def operator_rows() -> dict[str, Row]:
    """The table of operators, by its first column."""
    found = {}
    for name, _, exact, cost in table_rows(section("Operators")):
        operator, *options = re.findall(r"`([^`]+)`", name)
        values = {key: ast.literal_eval(value) for key, value in (option.split("=") for option in options)}
        found[name.replace("`", "")] = Row(operator, values, exact, cost)
    return found


ROWS = operator_rows()
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


def outer_sum(*sizes: int, channels: int = 12) -> Tensor:
    return ta.outer_sum([normal(size, channels) for size in sizes])


def in_orthogonal_channels(*sizes: int) -> Tensor:
    """An additive tensor whose modes live in channels of their own, up to a rotation that is the same in every call."""
    parts = []
    for mode, size in enumerate(sizes):
        part = torch.zeros(size, 12, dtype=torch.float64)
        part[:, 4 * mode : 4 * mode + 4] = normal(size, 4)
        parts.append(part)
    rotation = torch.linalg.qr(torch.linspace(0, 9, 144, dtype=torch.float64).view(12, 12).cos())[0]
    return ta.outer_sum(parts) @ rotation


SIZES = (4, 5, 3)
EXACT: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {  # data on which an operator is exact
    "always": lambda: (normal(*SIZES, 12), normal(*SIZES, 12), normal(*SIZES, 12)),
    "any values; queries and keys additive, their modes in orthogonal channels": lambda: (
        in_orthogonal_channels(*SIZES),
        in_orthogonal_channels(*SIZES),
        normal(*SIZES, 12),
    ),
    "additive values; queries and keys additive, their modes in orthogonal channels": lambda: (
        in_orthogonal_channels(*SIZES),
        in_orthogonal_channels(*SIZES),
        outer_sum(*SIZES),
    ),
    "keys and values additive": lambda: (normal(*SIZES, 12), outer_sum(*SIZES), outer_sum(*SIZES)),
    "keys and values a sum over disjoint groups of modes that are kept": lambda: (
        normal(*SIZES, 12),
        normal(4, 5, 1, 12) + normal(3, 12),
        normal(4, 5, 1, 12) + normal(3, 12),
    ),
    "order 1 only": lambda: (normal(9, 12), normal(9, 12), normal(9, 12)),
}
HARDER = {  # the next kind of data, on which it must not be exact
    "any values; queries and keys additive, their modes in orthogonal channels": "keys and values additive",
    "additive values; queries and keys additive, their modes in orthogonal channels": (
        "any values; queries and keys additive, their modes in orthogonal channels"
    ),
    "keys and values additive": "keys and values a sum over disjoint groups of modes that are kept",
    "keys and values a sum over disjoint groups of modes that are kept": "always",
    "order 1 only": "additive values; queries and keys additive, their modes in orthogonal channels",
}


def distance(row: Row, kind: str) -> float:
    """How far an operator is from full attention on one kind of data."""
    query, key, value = EXACT[kind]()
    settings = {"order": key.dim() - 1, "scale": 0.5}
    return float(
        (row(query, key, value, **settings) - ta.flattened_attention(query, key, value, **settings)).abs().max()
    )


def test_the_table_lists_every_operator() -> None:
    assert list(dict.fromkeys(row.operator for row in ROWS.values())) == list(ta.OPERATORS)
    names = {2: "two", 8: "eight", 9: "nine", 10: "ten"}
    assert f"gives {names[len(ta.OPERATORS)]} operators one interface" in flat(README)


@pytest.mark.parametrize("name", ROWS)
def test_the_table_says_when_an_operator_is_exact(name: str) -> None:
    row = ROWS[name]
    assert distance(row, row.exact) < 1e-12
    assert distance(row, "order 1 only") < 1e-12
    if row.exact in HARDER:
        assert distance(row, HARDER[row.exact]) > 1e-3


COSTS: dict[
    str, Callable[[int, int, int, int], float]
] = {  # of P, S, D, and the number of averages over one or two modes
    "`4SD`": lambda positions, averages, dim, kept: 4 * averages * dim,
    "`4SD + 4D²`": lambda positions, averages, dim, kept: 4 * averages * dim + 4 * dim**2,
    "`4D` for each average kept": lambda positions, averages, dim, kept: 4 * dim * kept,
    "`4S²D / P`": lambda positions, averages, dim, kept: 4 * averages**2 * dim / positions,
    "`2SD`": lambda positions, averages, dim, kept: 2 * averages * dim,
    "`4PD`": lambda positions, averages, dim, kept: 4 * positions * dim,
}


@pytest.mark.parametrize("name", ROWS)
def test_the_table_says_what_a_query_costs(name: str) -> None:
    """Counted operations are those of the table, and at most half as many again for softmax, averages and sums."""
    row, sizes, dim = ROWS[name], (20, 24, 28), 32
    tokens = [torch.empty(*sizes, dim, device="meta") for _ in range(3)]
    positions, averages = math.prod(sizes), sum(sizes)
    kept = averages + sum(math.prod(pair) for pair in itertools.combinations(sizes, 2))
    counted = count_flops(lambda *qkv: row(*qkv, order=3), *tokens) / positions
    stated = COSTS[row.cost](positions, averages, dim, kept)
    reading = 8 * 3 * dim  # a few operations for each number read or written
    assert stated <= counted <= 1.5 * stated + reading


def test_the_text_says_which_outputs_stay_in_the_range_of_the_values() -> None:
    convex = [name for name, each in ta.OPERATORS.items() if ta.Claim.CONVEX in each.claims(**each.options)]
    assert sorted(convex) == ["axial", "flattened", "kao_kv", "kronecker_product"]
    assert "`kao_kv`, `kronecker_product` and `axial` stay inside" in README
    assert ta.Claim.CONVEX not in ta.OPERATORS["additive"].claims(**ta.OPERATORS["additive"].options)


# ---- numbers -------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What `python -m tensorattn attend` finds out about a packaged recording, without times and memory."""

    heading: str
    positions: str
    flops: dict[str, int]
    errors: dict[tuple[str, float], float]
    interaction: float


WIDTHS = (0.25, 1.0, 4.0)
AT_EVERY_WIDTH = ("additive", "additive:interaction=linear", "kao_kv")


@pytest.fixture(scope="module")
def measured() -> dict[str, Measured]:
    found = {}
    for sample, patch, query in PACKAGED:
        recording = sample()
        prepared = prepare(recording, Settings(default_choices(), patch=patch, query=query))
        query, key, value, scale = embed(recording.array, prepared.place.patch, dim=64, heads=4, logit_std=1.0, seed=0)
        positions, averages = math.prod(prepared.grid), sum(prepared.grid)
        chosen = sample_positions(positions, averages, torch.Generator().manual_seed(1))
        sampled = sample_positions(positions, QUERIES, torch.Generator().manual_seed(0))
        some = query.flatten(1, -2)[:, sampled]

        def random_keys(query, key, value, *, order, scale, weights, chosen=chosen):
            few = (each.flatten(1, -2)[:, chosen] for each in (key, value))
            return ta.flattened_attention(query, *few, order=1, scale=scale)

        errors = {}
        for width in WIDTHS:
            for choice in default_choices() if width == 1 else map(parse_choice, AT_EVERY_WIDTH):
                queries = some if choice.any_positions else query
                errors[choice.label, width] = error_estimate(
                    choice.record.name,
                    queries,
                    key,
                    value,
                    order=3,
                    n_queries=QUERIES,
                    scale=width * scale,
                    generator=torch.Generator().manual_seed(0),
                    **choice.options,
                ).error
            errors["random keys", width] = error_estimate(
                random_keys, some, key, value, order=3, n_queries=QUERIES, scale=width * scale
            ).error
        errors["mean of the values", 1.0] = 1.0
        tensor = torch.from_numpy(recording.array.astype("float32"))
        found[recording.name] = Measured(
            f"{recording.source}: {describe_sizes(recording)}",
            f"{'×'.join(map(str, prepared.grid))} = {positions:,} positions, {averages:,} mode averages",
            {choice.label: flops for choice, flops in prepared.flops.items()},
            errors,
            float(additive_fraction(tensor, order=3).interaction),
        )
    return found


def number(text: str) -> float:
    """Read a number with a prefix, ``1.88 T``."""
    value, prefix = (*text.split(), "")[:2]
    return float(value) * 1000 ** " kMGT".index(prefix or " ")


def assert_close(found: float, printed: float, what: str) -> None:
    assert abs(found - printed) <= 0.002 + 0.01 * printed, f"README has {printed} for {what}, but it is {found:.3f}"


def test_the_quoted_report_is_what_the_command_prints(measured: dict[str, Measured]) -> None:
    (report,) = [text for _, text in BLOCKS if "centred error" in text]
    parts = report.strip().split("\n\n")
    tables = [parts[i] + "\n" + parts[i + 1] for i in range(0, len(parts), 2)]
    assert len(tables) == len(measured)
    for text, expected in zip(tables, measured.values(), strict=True):
        lines = text.splitlines()
        assert lines[0] == expected.heading and lines[1].endswith(expected.positions)
        start = next(i for i, line in enumerate(lines) if line.startswith("---"))
        rows = {name: cells for name, *cells in (re.split(r"\s{3,}", line) for line in lines[start + 1 :])}
        errors = {label: error for (label, width), error in expected.errors.items() if width == 1}
        assert [re.sub(r"^\d+ ", "", name) for name in rows] == list(errors)
        for name, (flops, _, _, error) in rows.items():
            label = re.sub(r"^\d+ ", "", name)
            assert_close(errors[label], float(error.split(" ± ")[0]), name)
            if label in expected.flops:
                assert number(flops) == pytest.approx(expected.flops[label], rel=0.1)


def test_the_table_of_sharpness_is_true(measured: dict[str, Measured]) -> None:
    rows = table_rows(section("What it is not"))
    labels = ["additive", "additive:interaction=linear", "kao_kv", "random keys"]
    assert len(rows) == len(labels)
    for label, (_, *cells) in zip(labels, rows, strict=True):
        places = itertools.product(measured.values(), WIDTHS)
        for cell, (expected, width) in zip(cells, places, strict=True):
            assert_close(expected.errors[label, width], float(cell), f"{label} at {width}")


def test_what_is_said_of_the_numbers_is_true(measured: dict[str, Measured]) -> None:
    pairs = sum(math.prod(pair) for pair in itertools.combinations((15, 120, 160), 2))
    assert f"{pairs:,} more of them on the video" in flat(README)
    shares = " and ".join(f"{100 * each.interaction:.0f} %" for each in measured.values())
    assert f"{shares} of the variance" in flat(README)
    for expected in measured.values():
        at = {label: error for (label, width), error in expected.errors.items() if width == 1}
        others = [error for label, error in at.items() if label not in ("truncated", "flattened", "random keys")]
        assert at["random keys"] < min(others)
        assert at["kao_qkv"] > 1 and at["kronecker_sum"] > 1
        assert at["additive"] < at["kao_kv"]
        assert at["truncated"] == min(error for label, error in at.items() if label != "flattened")
        soft, sharp = ({label: e for (label, w), e in expected.errors.items() if w == width} for width in (0.25, 4.0))
        assert soft["additive:interaction=linear"] < min(soft["random keys"], soft["additive"] / 2)
        assert at["additive:interaction=linear"] > at["additive"]
        assert sharp["additive:interaction=linear"] > sharp["additive"] > sharp["random keys"] > 0.1


# ---- the floors ----------------------------------------------------------------------------------------------


def test_the_floors_are_those_of_the_package() -> None:
    (block,) = [text for _, text in BLOCKS if "errors  " in text]
    named: dict[str, int] = {}
    for line in block.splitlines():
        floor, modules, _ = re.split(r"\s{2,}", line, maxsplit=2)
        for module in modules.split():
            if floor == "apart":
                assert module in APART
            else:
                named[module] = int(floor)
    parts = {name.split(".")[0] for name in read_package()}
    assert named.items() <= FLOORS.items() and named.keys() <= parts
    assert {FLOORS[part] for part in named} == set(FLOORS.values())
