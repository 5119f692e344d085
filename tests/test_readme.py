"""README: every block of code runs, every command and number is checked, and the table of operators is true."""

from __future__ import annotations

import ast
import itertools
import math
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from test_structure import ROOMS
from torch import Tensor

import tensorattn as ta
from tensorattn.cli.attend import PACKAGED, QUERIES, default_choices, means_of_cells
from tensorattn.cli.common import parse_choices
from tensorattn.cli.embedding import embed, grid_of
from tensorattn.cli.learn import lines_of, read_results
from tensorattn.cli.main import main
from tensorattn.cli.recordings import sample_video, sample_volume
from tensorattn.diagnose import sample_positions, takes_any_positions

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CI = ROOT / ".ci" / "run"
RESULTS = ROOT / ".assets" / "learn-results.jsonl"

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]


def flat(text: str) -> str:
    """A text in one line."""
    return " ".join(text.split())


def section(title: str) -> str:
    """Text of one section."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, flags=re.MULTILINE | re.DOTALL).group(1)


def table_rows(text: str) -> list[list[str]]:
    """Cells of the table of a text, without headings."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return rows[2:]


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
def test_python_runs(title, capsys):
    """The blocks of a section share their names, and need those of no other section."""
    torch.manual_seed(0)
    PYTHON[title][0].document.namespace.clear()
    for example in PYTHON[title]:
        example.evaluate()


def test_no_block_is_left_out():
    assert {language for language, _ in BLOCKS} == {"python", "sh", "text", "bibtex"}
    examples = [example for part in PYTHON.values() for example in part]
    for block in re.finditer(r"^```python\n.*?^```$", README, flags=re.MULTILINE | re.DOTALL):
        assert any(block.start() <= example.start < block.end() for example in examples), block.group()
    for language, text in BLOCKS:
        assert language != "bibtex" or text.count("{") == text.count("}")


def test_it_is_short():
    assert len(README.splitlines()) <= 220


# ---- commands ------------------------------------------------------------------------------------------------


def test_the_commands_are_those_of_the_project():
    extras, pins = PROJECT["optional-dependencies"], []
    for line in COMMANDS:
        for named in re.findall(r"\.\[([\w,]+)\]", line):
            assert set(named.split(",")) <= set(extras)
        pins += re.findall(r"torch==\S+", line)
    assert pins == [requirement for requirement in extras["test"] if requirement.startswith("torch==")]
    oldest = re.search(r"torch>=([\d.]+)", " ".join(PROJECT["dependencies"])).group(1)
    assert f"{oldest} or later" in README
    assert f"The tests run with {pins[0].removeprefix('torch==')}." in flat(README)
    job, tests = (line.split(" && ") for line in COMMANDS if line.startswith("python3 -m venv .venv && "))
    assert job[1] == tests[1] == ". .venv/bin/activate"
    assert job[3:] == ["python -m tensorattn attend"] and tests[3:] == ["pytest -q -n 2"]


@pytest.mark.skipif(not CI.exists(), reason="a source distribution has no .ci")
def test_the_tests_run_as_they_do_in_ci():
    script = CI.read_text(encoding="utf-8")
    assert CI.stat().st_mode & 0o100 and "`.ci/run`" in README
    assert re.search(r"^pip install .*-e '\.\[test\]' && pytest -q -n 2$", script, flags=re.MULTILINE)
    assert script.splitlines()[-1].startswith("pytest -q -m thorough")


def print_help(*words: str) -> None:
    """Let the command line tell what it takes."""
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0


def test_every_subcommand_is_there_and_has_the_options(capsys):
    print_help()
    commands = re.findall(r"^    (\w+) ", capsys.readouterr().out, flags=re.MULTILINE)
    named = re.findall(r"python -m tensorattn (\w+)([^`\n]*)", README)
    assert {command for command, _ in named} == set(commands)
    for command, words in named:
        print_help(command)
        assert set(re.findall(r"--[\w-]+", words)) <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))


def test_links_lead_somewhere():
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", README, re.M)
    }
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        assert link[1:] in anchors if link.startswith("#") else (ROOT / link).is_file(), link
    for name in re.findall(r"`(\d\d_\w+)`", README):
        assert (ROOT / "notebooks" / f"{name}.ipynb").exists(), name


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
    for name, _, exact, cost in table_rows(section("Which operator when")):
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


SIZES = (4, 5, 4)
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
        normal(4, 5, 1, 12) + normal(4, 12),
        normal(4, 5, 1, 12) + normal(4, 12),
    ),
    "at most 64 distinct keys, the number of `tokens`": lambda: (
        normal(*SIZES, 12),
        normal(64, 12)[torch.arange(80) % 64].view(*SIZES, 12),
        normal(*SIZES, 12),
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
    "at most 64 distinct keys, the number of `tokens`": "always",
    "order 1 only": "additive values; queries and keys additive, their modes in orthogonal channels",
}


def distance(row: Row, kind: str) -> float:
    """How far an operator is from full attention on one kind of data."""
    query, key, value = EXACT[kind]()
    settings = {"order": key.dim() - 1, "scale": 0.5}
    return float(
        (row(query, key, value, **settings) - ta.flattened_attention(query, key, value, **settings)).abs().max()
    )


def test_the_table_lists_every_operator():
    assert list(dict.fromkeys(row.operator for row in ROWS.values())) == list(ta.OPERATORS)
    names = {8: "eight", 9: "nine", 10: "ten"}
    assert f"gives {names[len(ta.OPERATORS)]} operators one interface" in flat(README)


@pytest.mark.parametrize("name", ROWS)
def test_the_table_says_when_an_operator_is_exact(name):
    row = ROWS[name]
    assert distance(row, row.exact) < 1e-12
    assert distance(row, "order 1 only") < 1e-12
    if row.exact in HARDER:
        assert distance(row, HARDER[row.exact]) > 1e-3


COSTS: dict[str, Callable[..., float]] = {  # of P, S, D, and the number of averages over one or two modes
    "`4SD`": lambda positions, averages, dim, kept: 4 * averages * dim,
    "`4SD + 4D²`": lambda positions, averages, dim, kept: 4 * averages * dim + 4 * dim**2,
    "`4D` for each average kept": lambda positions, averages, dim, kept: 4 * dim * kept,
    "`4S²D / P`": lambda positions, averages, dim, kept: 4 * averages**2 * dim / positions,
    "`4nD + 4D²`, and `2nD` a key": lambda positions, averages, dim, kept: 6 * 64 * dim + 4 * dim**2,
    "`2SD`": lambda positions, averages, dim, kept: 2 * averages * dim,
    "`4PD`": lambda positions, averages, dim, kept: 4 * positions * dim,
}


@pytest.mark.parametrize("name", ROWS)
def test_the_table_says_what_a_query_costs(name):
    """Counted operations are those of the table, and at most half as many again for softmax, averages and sums."""
    row, sizes, dim = ROWS[name], (80, 96, 112), 32  # large, so that a search costs little beside
    tokens = [torch.empty(*sizes, dim, device="meta") for _ in range(3)]
    positions, averages = math.prod(sizes), sum(sizes)
    kept = averages + sum(math.prod(pair) for pair in itertools.combinations(sizes, 2))
    counted = ta.cost(row, *tokens, order=3).flops / positions
    stated = COSTS[row.cost](positions, averages, dim, kept)
    reading = 8 * 3 * dim  # a few operations for each number read or written
    assert stated <= counted <= 1.5 * stated + reading


def works(name: str, *inputs: Tensor, call: dict[str, Any] | None = None, **options: Any) -> bool:
    """Whether a layer can be made and called so."""
    try:
        layer = ta.TensorAttention(12, 2, modes=3, operator=name, **options)
        return bool(layer(*inputs, **(call or {})).isfinite().all())
    except ta.OptionError:
        return False


def test_the_text_says_what_works_with_which_operator():
    x, context, names = torch.randn(2, 4, 3, 5, 12), torch.randn(2, 6, 7, 12), list(ta.OPERATORS)
    bias, rotary = ta.AlibiBias(2, modes=3), ta.RotaryEmbedding(6, modes=3)
    anywhere = [name for name in names if works(name, x, context)]
    causal = [name for name in names if works(name, x, causal=0)]
    text = flat(section("Which operator when"))
    assert "context of another grid or order: " + ", ".join(f"`{name}`" for name in anywhere) + "." in text
    assert [name for name in names if ta.OPERATORS[name].query == "positions" and name != "kao_qkv"] == anywhere
    assert causal == [name for name in names if name in (*anywhere, "axial") and name != "clustered"]
    assert works("clustered", x, causal=0, cells="blocks") and not works("clustered", x, causal=0)
    assert 'those and `axial`; `clustered` with `cells="blocks"`. Position biases: the same but `clustered`.' in text
    assert [name for name in names if works(name, x, position_bias=bias)] == causal
    turned = [name for name in names if works(name, x, rotary=rotary)]
    assert "Rotary embeddings: " + ", ".join(f"`{name}`" for name in turned) + "." in text
    mask = torch.rand(2, 4, 3, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    weights = [None, torch.tensor([1.0, 2.0, 0.5]), None]
    for call in ({"weights": weights}, {"mask": mask}, {"lengths": {0: torch.tensor([3, 4])}}):
        assert all(works(name, x, call=call) for name in names)
    assert "Weights of each mode, masks and padding: all." in text


def test_the_text_says_which_outputs_stay_in_the_range_of_the_values():
    convex = [name for name, each in ta.OPERATORS.items() if ta.Claim.CONVEX in each.claims(**each.options)]
    assert sorted(convex) == ["axial", "flattened", "kao_kv", "kronecker_product"]
    assert "`kao_kv`, `kronecker_product` and `axial` stay inside" in README
    assert "The output of `additive` may leave the range of the values" in README


@pytest.mark.thorough
@pytest.mark.parametrize("world", [2, 4])
def test_the_lines_for_a_cluster_run(world, tmp_path):
    (code,) = [text for _, text in BLOCKS if "init_device_mesh" in text]
    code, file = code.replace('mesh("cpu", (2,)', f'mesh("cpu", ({world},)'), tmp_path / "train.py"
    assert f"({world},)" in code
    check = "assert all(p.grad.isfinite().all() for p in model.parameters())"
    file.write_text(f"{code}{check}\ntorch.distributed.destroy_process_group()\n", encoding="utf-8")
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(world),
        "--standalone",
        str(file),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(words, capture_output=True, text=True, timeout=200, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]


# ---- numbers -------------------------------------------------------------------------------------------------


def test_the_numbers_of_the_first_page_are_true():
    sizes = (30, 240, 320)
    positions, averages = math.prod(sizes), sum(sizes)
    assert sample_video().sizes == sizes
    assert f"P = {positions:,} positions" in README and f"S = 30 + 240 + 320 = {averages} keys" in flat(README)
    assert f"{4 * positions**2 / 1e12:.0f} TB in float32" in flat(README)
    assert 1.9 < ta.plan(sizes, dim=64, modes=3).passes < 2.2  # "about two readings of the tensor"


def test_the_shares_of_interactions_are_true():
    shares = []
    for recording in (sample_video(), sample_volume()):
        tensor = torch.from_numpy(recording.array.astype("float32"))
        shares.append(f"{100 * float(ta.additive_fraction(tensor, order=3).interaction):.0f} %")
    assert f"{' and '.join(shares)} of the variance" in flat(README)


@pytest.fixture(scope="module")
def measured() -> list[dict[tuple[str, float], float]]:
    """Errors of what `python -m tensorattn attend` runs on each packaged recording, by label and width of logits."""
    found, few_at_other_widths = [], ("additive", "additive:interaction=linear", "clustered", "clustered:cells=blocks")
    for sample, patch, _ in PACKAGED:
        recording = sample()
        cut = tuple(map(int, patch.split(",")))
        query, key, value, scale = embed(recording.array, cut, dim=64, heads=4, logit_std=1.0, seed=0)
        grid = grid_of(recording.sizes, cut)
        positions = math.prod(grid)
        few = sample_positions(positions, sum(grid), torch.Generator().manual_seed(1))
        some = query.flatten(1, -2)[:, sample_positions(positions, QUERIES, torch.Generator().manual_seed(0))]

        def random_keys(query, key, value, *, order, chosen=few, **settings):
            keys, values = (each.flatten(1, -2)[:, chosen] for each in (key, value))
            return ta.flattened_attention(query, keys, values, order=1, scale=settings["scale"])

        def error(operator, queries, width, recorded=(key, value, scale), **options):
            fresh = torch.Generator().manual_seed(0)
            keys, values, unit = recorded
            return ta.error_estimate(
                operator, queries, keys, values, order=3, scale=unit * width, generator=fresh, **options
            ).error

        errors = {("mean of the values", 1.0): 1.0}
        for width in (0.25, 1.0, 4.0):
            wanted = default_choices() if width == 1 else parse_choices(few_at_other_widths)
            for choice in (each.settled(sum(grid)) for each in wanted):
                queries = some if takes_any_positions(choice.record, choice.options) else query
                errors[choice.label, width] = error(choice.record.name, queries, width, **choice.options)
            errors["random keys", width] = error(random_keys, some, width)
        for name, function in means_of_cells(grid).items():
            errors[name, 1.0] = error(function, query, 1.0)
        found.append(errors)
    return found


@pytest.mark.thorough
def test_the_table_of_errors_is_what_the_command_finds(measured):
    rows = table_rows(section("What it is not"))
    labels = [label for label, width in measured[0] if width == 1]
    printed = {re.sub(r"`|^as many ", "", name): cells for name, *cells in rows}
    shown = {"additive", "truncated", "kao_kv", "clustered", "clustered:cells=blocks", "random keys", "flattened"}
    assert shown | {"64 k-means tokens with log counts"} <= set(printed) <= set(labels)
    for label, (_, video, _, volume) in printed.items():
        for errors, cell in zip(measured, (video, volume), strict=True):
            found, said = errors[label, 1.0], float(cell.split(" ± ")[0])
            assert abs(found - said) <= 0.002 + 0.01 * said, f"README has {said} for {label}, but it is {found:.3f}"


@pytest.mark.thorough
def test_what_is_said_of_the_errors_is_true(measured):
    pairs = sum(math.prod(pair) for pair in itertools.combinations((15, 120, 160), 2))
    assert f"{pairs:,} more of them on the video" in flat(README)
    for errors in measured:
        at = {label: error for (label, width), error in errors.items() if width == 1}
        averages = [at[each] for each in at if re.match("additive|kao|kron|axial|mean", each)]
        assert at["random keys"] < min(averages)
        assert max(at[f"clustered{of}"] for of in ("", ":tokens=16", ":tokens=S")) < 0.01
        assert at["clustered"] < at["64 k-means tokens with log counts"] < at["random keys"]
        assert at["clustered:cells=blocks"] < at["64 blocks without moments"]
        assert at["kao_qkv"] > 1 and at["kronecker_sum"] > 1
        assert at["truncated"] < at["random keys"]
        soft, sharp = ({label: e for (label, w), e in errors.items() if w == width} for width in (0.25, 4.0))
        assert soft["additive:interaction=linear"] < min(soft["random keys"], soft["additive"] / 2)
        assert sharp["additive:interaction=linear"] > sharp["additive"] > sharp["random keys"]
        assert sharp["clustered:cells=blocks"] > sharp["random keys"]
        assert 9 < sharp["clustered"] / at["clustered"] < 45


MIXERS = {
    "`pointwise`: no mixing": "pointwise",
    "`kao_qkv`, `centered=True`": "kao_qkv:centered=True",
    "`kronecker_product`": "kronecker_product",
    "`additive`": "additive",
    'with `interaction="linear"`': "additive:interaction=linear",
    "`clustered`, 32 blocks": "clustered:cells=blocks:tokens=32",
    "`clustered`, 32 tokens": "clustered:cells=keys:tokens=32",
    "`flattened`": "flattened",
}


@pytest.mark.skipif(not RESULTS.exists(), reason="a package without what was measured")
def test_the_table_of_networks_is_what_was_measured():
    lines = {(line.task, line.steps, line.mixer): line for line in lines_of(read_results(RESULTS))}
    rows = {name: cells for name, *cells in table_rows(section("Networks"))}
    assert set(MIXERS) == set(rows) - {"`local`; `mean`"}
    columns = [
        ("gps", 300, 1, 1),
        ("gps", 900, 1, 1),
        ("drift", 400, 1, 2),
        ("drift", 1200, 1, 2),
        ("digits", 400, 100, 1),
    ]
    whole = lines["gps", 900, "flattened"].first("flops")[1]
    for name, mixer in MIXERS.items():
        for (task, steps, unit, digits), cell in zip(columns, rows[name], strict=False):
            values = [unit * value for value in lines[task, steps, mixer].values("unseen", 0)]
            assert len(values) == 3 and cell == f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"
        line = lines["gps", 900, mixer]
        assert float(rows[name][5].removesuffix(" %")) == pytest.approx(
            100 * line.first("flops")[1] / whole, rel=0.05, abs=0.05
        )
        assert rows[name][6] == f"{line.seconds():.0f} s"
    for place, mixer in enumerate(("local", "mean")):
        for (task, steps, unit, digits), cell in zip(columns, rows["`local`; `mean`"], strict=False):
            assert cell.split("; ")[place] == f"{unit * mean(lines[task, steps, mixer].values('unseen', 0)):.{digits}f}"
    told = " ".join(section("Networks").split())
    for name, mixer in (
        ("full attention reaches", "flattened"),
        ("centred `kao_qkv`", "kao_qkv:centered=True"),
        ("`kronecker_product`", "kronecker_product"),
        ("64 blocks", "clustered:cells=blocks:tokens=64"),
    ):
        line = lines["gps:size=26", 300, mixer]
        assert len(line.values("unseen", 0)) == 3
        assert f"{name} {mean(line.values('unseen', 0)):.1f} in {line.seconds():,.0f} s" in told
    assert f"the mean {mean(lines['gps:size=26', 300, 'mean'].values('unseen', 0)):.1f}" in told


# ---- the rooms -----------------------------------------------------------------------------------------------


def test_the_rooms_are_those_of_the_package():
    block = textwrap.dedent(ta.__doc__.partition(":\n\n")[2]).strip()
    named = [word for line in block.splitlines() if line[0] != " " for word in re.split(r"\s{3,}", line)[0].split()]
    assert [*named, "__main__"] == list(ROOMS)
    functional = ROOT / "tensorattn" / "functional"
    files = re.findall(r"(\w+\.py)", block.partition("functional")[2].partition("\nprocesses ")[0])
    assert set(files) | {"__init__.py"} == {path.name for path in functional.glob("*.py")}
