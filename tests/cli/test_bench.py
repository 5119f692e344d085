"""The command `bench`: its tables, answer and files, and what it refuses."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tensorattn.cli import bench as commands
from tensorattn.cli import gain, traffic
from tensorattn.cli.bench import Phase, Row, answer, curves, examine, table
from tensorattn.cli.common import parse_choices
from tensorattn.cli.contenders import FULL, LIBRARY, OTHERS, PEERS, PLAINLY, Work, contenders
from tensorattn.cli.main import main
from tensorattn.cli.plain import PLAIN
from tensorattn.cli.plots import Curve
from tensorattn.errors import OptionError
from tensorattn.functional import OPERATORS
from tensorattn.nn import TensorAttention

PROGRAM = "python -m tensorattn bench"
SMALL = ("--heads", "2", "--repeats", "1", "--shape", "2,4,5,8")
PLANE = Work(2, (4, 5), 8, heads=2)
BESIDE = [each.name for each in OTHERS]


def bench(*words: str | Path) -> int:
    return main(["bench", *map(str, words)])


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    """The rows of a CSV file by contender; the first of each."""
    rows: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO(path.read_text())):
        rows.setdefault(row["contender"], row)
    return rows


# ---- what is printed and written -----------------------------------------------------------------------------


def phase(milliseconds: float, spread: float = 0.0, peak: int | None = 2_500_000) -> Phase:
    return Phase(milliseconds / 1e3, spread / 1e3, 1_200_000_000, peak, 17)


def test_a_table_is_in_ms_and_mb_beside_full_attention():
    rows = [
        Row(PLANE, "additive", LIBRARY, 3e-7, phase(2, 0.1), phase(5, peak=None)),
        Row(PLANE, "clustered", LIBRARY, 0.2, note="parity fails, error 2e-01 above 1e-03: not timed"),
        Row(PLANE, FULL, PLAINLY, 1e-6, phase(24), phase(1234)),
    ]
    assert table(rows) == [
        "2×4×5×8, float32, channels last, 2 heads, on cpu: 20 positions, 0.00128 MB",
        "",
        "                     forward                             training                           parity",
        "                          ms   × full     MB   GFLOP           ms   × full     MB   GFLOP    error",
        "tensorattn",
        "  additive         2.00 ± 5%     12.0   2.50    1.20    5.00 ± 0%      247      -    1.20    3e-07",
        "  clustered: parity fails, error 2e-01 above 1e-03: not timed",
        "plain PyTorch: linear maps, SDPA, a linear map",
        "  full attention   24.0 ± 0%     1.00   2.50    1.20   1,234 ± 0%     1.00   2.50    1.20    1e-06",
        "",
        "Fastest here: forwards additive (12.0 × full attention), in training additive (247 × full attention).",
    ]


def test_the_answer_claims_no_more_than_was_measured():
    def said(**times: tuple[float, float]) -> str:
        return answer([Row(PLANE, name.replace("_", " "), forward=phase(*of)) for name, of in times.items()])

    assert said(a=(2, 0.3), b=(2.5, 0.3), c=(4, 0.1), full_attention=(9, 0)) == (
        "Fastest here: forwards a and b (4.50 × full attention)."
    )
    assert said(a=(2, 0), full_attention=(1, 0)) == "Fastest here: forwards full attention (nothing is gained)."
    assert said(a=(2, 0.6), full_attention=(3, 0.6)) == (
        "Fastest here: forwards a and full attention (nothing is gained)."
    )
    assert said(a=(2, 0)) == "Fastest here: forwards a. Full attention was not timed."
    assert answer([Row(PLANE, "a", note="not run")]) == "Nothing was timed."


def test_a_run_from_end_to_end(capsys, tmp_path):
    words = (*SMALL, "--operator", "kao_kv", "--operator", "kao_qkv:centered=True", "--plain", "--cubes", "2,3,4")
    assert bench(*words, "--out", tmp_path / "a/b") == 0
    printed, told = capsys.readouterr()
    names = {"bench.txt", "bench.csv", "bench.json", "bench.png", "bench-scaling.png"}
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == names
    assert all(str(tmp_path / "a/b" / name) in printed for name in names)
    assert printed.startswith((tmp_path / "a/b/bench.txt").read_text().rstrip())
    assert (
        "command: python -m tensorattn bench --shape 2,4,5,8 --operator kao_kv --operator kao_qkv:centered=True "
        "--heads 2 --plain --repeats 1 --cubes 2,3,4\n" in printed
    )
    assert "2×4×5×8, float32, channels last, 2 heads, on cpu: 20 positions, 0.00128 MB\n" in printed
    assert "trying: time on 2×4×5×8, float32, channels last, 2 heads, on cpu\n" in told
    rows = rows_of(tmp_path / "a/b/bench.csv")
    assert list(rows) == ["kao_kv", "kao_qkv:centered=True", *BESIDE, "plain kao_kv", "plain kao_qkv"]
    for row in rows.values():
        assert float(row["error"]) < 1e-5 and row["device"] == "cpu"
        for kind in ("forward", "training"):
            assert float(row[f"{kind}_seconds"]) > 0 and int(row[f"{kind}_calls"]) > 0
            assert int(row[f"{kind}_peak"]) >= 4 * 2 * 4 * 5 * 8 and int(row[f"{kind}_flops"]) > 0
    found = json.loads((tmp_path / "a/b/bench.json").read_text())
    assert found["machine"]["command"].startswith(PROGRAM)
    assert list(found["scaling"]) == list(rows) and found["scaling"]["kao_kv"]["positions"] == [8, 27, 64]


@pytest.mark.thorough
def test_everyone_in_both_layouts_in_float64(capsys, tmp_path):
    words = ("--heads", "2", "--repeats", "1", "--shape", "2,4,5,8", "--shape", "1,3,4,2,8", "--layout", "both")
    assert bench(*words, "--dtype", "float64", "--peers", "--plain", "--out", tmp_path) == 0
    found = list(csv.DictReader(io.StringIO((tmp_path / "bench.csv").read_text())))
    forms = [f"plain {name}" for name in OPERATORS if name in PLAIN and name not in ("axial", "flattened")]
    assert [row["contender"] for row in found] == 4 * [*OPERATORS, *BESIDE, *forms, *(peer.name for peer in PEERS)]
    for row in found:
        assert bool(row["forward_seconds"]) != bool(row["note"]), row
        assert row["note"] or float(row["error"]) < 1e-9
    installed = importlib.util.find_spec("kronecker_attention_pytorch") is not None  # else that is what is told
    told = "kronecker-attention-pytorch: it takes images with channels first only" in capsys.readouterr().out
    assert told == installed
    assert {path.name for path in tmp_path.iterdir()} == {"bench.txt", "bench.csv", "bench.json", "bench.png"}


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_operators_are_timed_in_half_precision(tmp_path, dtype):
    words = ("--repeats", "1", "--shape", "1,8,14,14,64", "--dtype", dtype)
    assert bench(*words, "--out", tmp_path) == 0
    notes = {name: row["note"] for name, row in rows_of(tmp_path / "bench.csv").items() if row["note"]}
    assert set(notes) <= {"pooled attention"}  # PyTorch pools no volumes of these types on a CPU


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of the compiler itself
def test_compiled_operators_stand_beside_the_others(tmp_path):
    assert bench(*SMALL, "--operator", "kao_qkv", "--compile", "--out", tmp_path) == 0
    rows = rows_of(tmp_path / "bench.csv")
    assert list(rows) == ["kao_qkv", "kao_qkv, compiled", *BESIDE]
    compiled = rows["kao_qkv, compiled"]
    assert float(compiled["training_seconds"]) > 0 and float(compiled["error"]) < 1e-5
    assert compiled["training_peak"] == compiled["training_calls"] == ""


@pytest.mark.thorough
def test_what_processes_send_is_counted(capsys, tmp_path):
    words = (*SMALL, "--operator", "kao_kv", "--operator", "axial", "--world", "2")
    assert bench(*words, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "--repeats 1 --world 2\n" in printed
    lines = [line.split() for line in printed.partition("2 processes, one sends")[2].splitlines()]
    found = {line[0]: line[1:3] for line in lines if line[-1:] == ["counted"]}
    # B S C numbers, each way around a ring of two; queries, keys, values and outputs of 4 rows in 3 of 5 columns.
    assert found == {"kao_kv": ["576", "(1)"], "axial": ["1,536", "(2)"], "a": ["call", "of"]}
    assert "  a call of any, to refuse together" in printed
    told = [" ".join(line) for line in lines if line[-1:] == ["formula"]]
    assert told == [
        "full attention by gathering 640 (1) - formula",
        "full attention by Ulysses 1,280 (4) - formula",
        "full attention by ring attention 1,280 (1) - formula",
    ]


@pytest.mark.thorough
def test_processes_that_all_refuse_do_not_meet():
    rows = traffic.traffic(PLANE, [("control", "clustered", {"additive_control": True})], 2)
    assert [row[0].strip() for row in rows if "by" not in row[0]][1:] == ["control"]


def test_what_processes_send_is_counted_before_anything_is_timed(capsys, tmp_path, monkeypatch):
    """So that nothing measured is lost where processes do not meet."""
    measured: list[Any] = []

    def lost(*given: Any) -> Any:
        raise OptionError("the processes do not meet.")

    monkeypatch.setattr(commands, "traffic", lost)
    monkeypatch.setattr(commands, "examine", lambda *given, **named: measured.append(given))
    assert bench(*SMALL, "--operator", "kao_kv", "--world", "2", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"{PROGRAM}: the processes do not meet.\n" and measured == []


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_what_is_counted_has_the_layout_that_is_told(tmp_path, monkeypatch, layout):
    work, seen = dataclasses.replace(PLANE, layout=layout), []

    class Watched(TensorAttention):
        def forward(self, x: torch.Tensor, **named: Any) -> torch.Tensor:
            seen.append((self.channels_first, tuple(x.shape)))
            return super().forward(x, **named)

    monkeypatch.setattr(traffic, "TensorAttention", Watched)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    traffic._process(0, 1, str(tmp_path), work, [("kao_kv", "kao_kv", {})])
    assert seen == [(work.channels_first, work.shape)]


def test_without_matplotlib_there_is_no_plot_and_it_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert bench(*SMALL, "--operator", "kao_qkv", "--out", tmp_path) == 0
    assert "no plot: the figure needs matplotlib" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.iterdir()} == {".txt", ".csv", ".json"}


# ---- what is not run -----------------------------------------------------------------------------------------


def test_what_takes_too_long_is_left_out_and_told():
    who = contenders(parse_choices(["flattened", "kao_qkv"]))
    rows = {row.name: row for row in examine(Work(1, (150, 150), 64), who, repeats=1, whole=False)}
    for name in ("flattened", FULL):
        assert rows[name].note == "not run: a forward pass takes 140 GFLOP, --limit is 100"
        assert rows[name].error is rows[name].forward is None
    assert rows["kao_qkv"].forward is not None
    assert rows["kao_qkv"].training is None


def test_the_limit_is_that_of_the_user(capsys, tmp_path):
    words = ("--repeats", "1", "--shape", "1,70,70,64", "--operator", "kao_qkv", "--limit", "6", "--out", tmp_path)
    assert bench(*words) == 0
    printed = capsys.readouterr().out
    assert "  full attention: not run: a forward pass takes 7 GFLOP, --limit is 6\n" in printed
    assert "Full attention was not timed." in " ".join(printed.split())


@pytest.mark.parametrize("cause", [torch.OutOfMemoryError("CUDA out of memory."), NotImplementedError("No pooling.")])
def test_what_a_device_cannot_do_ends_one_contender_only(cause):
    class Large(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.device.type != "meta":
                raise cause
            return super().forward(x)

    large, other = contenders(parse_choices(["kao_kv"]))[:2]
    large = dataclasses.replace(large, build=lambda work: Large(8, 8), definition=lambda layer, x, places, measured: x)
    row, full = examine(PLANE, [large, other], repeats=1)
    assert row.note == f"not run: {cause}" and full.training is not None


def test_curves_are_of_those_who_were_timed():
    works = [Work(1, (n, n), 8) for n in (3, 2)]
    rows = [Row(work, "a", forward=phase(work.positions)) for work in works] + [Row(works[0], "b", note="not run")]
    assert curves(rows) == {"a": Curve((4, 9), (0.004, 0.009))}


# ---- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--shape", "3,4"), "--shape must be B,n_1,...,n_N,C with at least one mode and no size below 1, got '3,4'."),
        (
            ("--shape", "1,0,4"),
            "--shape must be B,n_1,...,n_N,C with at least one mode and no size below 1, got '1,0,4'.",
        ),
        (("--shape", "1,x,4"), "--shape must be B,n_1,...,n_N,C in whole numbers, got '1,x,4'."),
        (("--shape", "2,3,4", "--world", "4"), "--world 4 processes cut the first mode, of size 3 in 2,3,4."),
        (("--shape", "1,3,4", "--heads", "3"), "--heads must divide the channels, but 3 do not divide 4 of 1,3,4."),
        (("--dtype", "int8"), "--dtype must be one of float64, float32, bfloat16, float16, got 'int8'."),
        (("--layout", "nhwc"), "--layout must be one of channels_last, channels_first, both, got 'nhwc'."),
        (("--cubes", "3,x"), "--cubes must be whole numbers of at least 1, got '3,x'."),
        (("--cubes", "0"), "--cubes must be whole numbers of at least 1, got '0'."),
        (("--operator", "dense"), f"--operator 'dense' is not one of: {', '.join(OPERATORS)}."),
        (("--device", "cuda"), "--device must be one of those that are here, cpu, got 'cuda'."),
        (("--gain", "--device", "mps"), "--device must be one of those that are here, cpu, got 'mps'."),
        (
            ("--gain", "--shape", "1,3,4"),
            "--gain has grids and settings of its own: --shape has no meaning beside it.",
        ),
        (
            ("--operator", "truncated:interaction_order=3", "--shape", "1,3,4,8"),
            "interaction_order must be an integer between 1 and order 2, got 3.",
        ),
    ],
)
def test_bad_arguments_are_told_in_one_line(capsys, tmp_path, monkeypatch, words, line):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    words = words if "--gain" in words else (*words, "--out", tmp_path / "out")
    assert bench(*words) == 2
    printed = capsys.readouterr()
    assert printed.err == f"{PROGRAM}: {line}\n" and printed.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--dtype", "float64"), "--dtype float64 is not there on mps."),
        (
            ("--world", "2"),
            "--world counts what processes on the CPU send; --device mps has no meaning beside it.",
        ),
    ],
)
def test_what_is_not_there_on_a_device_is_told(capsys, tmp_path, monkeypatch, words, line):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert bench("--device", "mps", *words, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"{PROGRAM}: {line}\n"


@pytest.mark.parametrize("words", [("--repeats", "0"), ("--heads", "two"), ("--limit", "0"), ("--goals",), ("file",)])
def test_what_the_parser_refuses(capsys, words):
    with pytest.raises(SystemExit) as ended:
        bench(*words)
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_directory_is_checked_before_any_work(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert bench("--out", tmp_path / "file") == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- gain ----------------------------------------------------------------------------------------------------


def test_gains_are_told_for_grids_of_known_models(capsys: Any, monkeypatch):
    """After parity: an operator that is wrong gets no time."""
    monkeypatch.setattr(gain, "GRIDS", gain.GRIDS[2:3])
    assert bench("--gain", "--repeats", "1", "--operator", "kao_kv", "--operator", "clustered:tokens=16") == 0
    lines = capsys.readouterr().out.splitlines()
    words = "--operator kao_kv --operator clustered:tokens=16 --repeats 1 --gain"
    assert lines[0] == f"command: python -m tensorattn bench {words}" and "device: cpu, CPU time of one thread" in lines
    assert lines[-2].split() == ["grid", "P", "full", "attention,", "ms", "kao_kv", "clustered:tokens=16"]
    assert re.fullmatch(r"ViT-S, 14×14 +196 +[\d.]+; [\d.]+( +[\d.]+; [\d.]+){2}", lines[-1])


@pytest.mark.parametrize("operator", ["clustered", "clustered:tokens=16"])
def test_parity_is_found_with_the_options_by_default(operator: str):
    (choice,) = parse_choices([operator])
    tensors = gain.Grid("a grid", (9, 9), 2, 8).tensors(torch.device("cpu"))
    output = choice.record.function(*tensors, order=2, **choice.options)
    assert gain._error(choice, tensors, output) < gain.TOLERANCE


def test_what_fails_parity_is_not_timed(capsys, monkeypatch):
    monkeypatch.setattr(gain, "GRIDS", gain.GRIDS[2:3])
    monkeypatch.setattr(gain, "TOLERANCE", 0.0)
    assert bench("--gain", "--repeats", "1", "--operator", "kao_kv") == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("parity fails")
