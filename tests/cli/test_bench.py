"""The command `bench`: parity before time, its tables and files, plain layers and peers, and what it refuses."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorattn.cli import bench as module
from tensorattn.cli import gain
from tensorattn.cli.bench import PEERS, Contender, Curve, Work, contenders, examine, interleaved
from tensorattn.cli.common import parse_choices
from tensorattn.cli.main import main
from tensorattn.cli.plain import PLAIN, PlainLayer
from tensorattn.diagnose.cost import count_calls
from tensorattn.functional import OPERATORS
from tensorattn.nn import TensorAttention
from tensorattn.testing import reference

PROGRAM = "python -m tensorattn bench"
SMALL = ("--heads", "2", "--repeats", "1", "--shape", "2,4,5,8")
PLANE = Work(2, (4, 5), 8, heads=2)


def bench(*words: str | Path) -> int:
    return main(["bench", *map(str, words)])


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    """The rows of a CSV file by contender; the first of each."""
    rows: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO(path.read_text())):
        rows.setdefault(row["contender"], row)
    return rows


def contender(name: str) -> Contender:
    (found,) = (each for each in contenders(parse_choices(OPERATORS), peers=True) if each.name == name)
    return found


# ---- what is printed and written -----------------------------------------------------------------------------


@pytest.mark.thorough
def test_what_processes_send_is_counted(capsys: Any, tmp_path: Path) -> None:
    words = (*SMALL, "--operator", "kao_kv", "--operator", "axial", "--cubes", "none", "--world", "2")
    assert bench(*words, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "--repeats 1 --cubes none --world 2\n" in printed
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


def test_a_run_from_end_to_end(capsys: Any, tmp_path: Path) -> None:
    words = (*SMALL, "--operator", "kao_kv", "--operator", "kao_qkv:centered=True", "--cubes", "2,3,4")
    assert bench(*words, "--out", tmp_path / "a/b") == 0
    printed = capsys.readouterr().out
    names = {"bench.txt", "bench.csv", "bench.json", "bench-scaling.png"}
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == names
    assert all(str(tmp_path / "a/b" / name) in printed for name in names)
    assert printed.startswith((tmp_path / "a/b/bench.txt").read_text().rstrip())
    for words_ in ("processor: ", "environment: ", f"torch {torch.__version__}", "date: "):
        assert words_ in printed
    assert (
        "command: python -m tensorattn bench --shape 2,4,5,8 --operator kao_kv --operator kao_qkv:centered=True "
        "--heads 2 --dtype float32 --layout channels_last --repeats 1 --cubes 2,3,4\n" in printed
    )
    assert "2×4×5×8, float32, channels last, 2 heads" in printed
    rows = rows_of(tmp_path / "a/b/bench.csv")
    assert list(rows) == ["kao_kv", "kao_qkv:centered=True", "plain kao_kv", "plain kao_qkv"]
    for row in rows.values():
        assert float(row["error"]) < 1e-5
        for kind in ("forward", "training"):
            assert float(row[f"{kind}_seconds"]) > 0 and int(row[f"{kind}_calls"]) > 0
            assert int(row[f"{kind}_peak"]) >= 4 * 2 * 4 * 5 * 8 and int(row[f"{kind}_flops"]) > 0
    found = json.loads((tmp_path / "a/b/bench.json").read_text())
    assert found["machine"]["command"].startswith(PROGRAM)
    assert list(found["scaling"]) == ["kao_kv"] and found["scaling"]["kao_kv"]["positions"] == [8, 27, 64]
    ratios = next(line.split() for line in printed.splitlines() if line.startswith("  kao_kv "))
    ours, plain = rows["kao_kv"], rows["plain kao_kv"]
    assert float(ratios[1]) == round(float(ours["forward_seconds"]) / float(plain["forward_seconds"]), 2)
    assert ratios[-6:] == [
        ours["forward_calls"],
        "/",
        plain["forward_calls"],
        ours["training_calls"],
        "/",
        plain["training_calls"],
    ]


@pytest.mark.thorough
def test_everyone_in_both_layouts_in_float64(capsys: Any, tmp_path: Path) -> None:
    words = ("--heads", "2", "--repeats", "1", "--shape", "2,4,5,8", "--shape", "1,3,4,2,8", "--layout", "both")
    assert bench(*words, "--dtype", "float64", "--cubes", "none", "--out", tmp_path) == 0
    table = list(csv.DictReader(io.StringIO((tmp_path / "bench.csv").read_text())))
    names = [*OPERATORS, *(f"plain {name}" for name in PLAIN), *(peer.name for peer in PEERS)]
    assert [row["contender"] for row in table] == 4 * names
    for row in table:
        assert bool(row["forward_seconds"]) != bool(row["note"]), row
        assert row["note"] or float(row["error"]) < 1e-9
    installed = importlib.util.find_spec("kronecker_attention_pytorch") is not None  # else that is what is told
    told = "kronecker-attention-pytorch: it takes images with channels first only" in capsys.readouterr().out
    assert told == installed
    assert {path.suffix for path in tmp_path.iterdir()} == {".txt", ".csv", ".json"}


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of the compiler itself
def test_compiled_operators_stand_beside_the_others(tmp_path: Path) -> None:
    assert bench(*SMALL, "--operator", "kao_qkv", "--compile", "--cubes", "none", "--out", tmp_path) == 0
    rows = rows_of(tmp_path / "bench.csv")
    assert list(rows) == ["kao_qkv", "kao_qkv, compiled", "plain kao_qkv"]
    compiled = rows["kao_qkv, compiled"]
    assert float(compiled["training_seconds"]) > 0 and float(compiled["error"]) < 1e-5
    assert compiled["training_peak"] == compiled["training_calls"] == ""


def test_without_matplotlib_there_is_no_plot_and_it_says_so(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert bench(*SMALL, "--operator", "kao_qkv", "--cubes", "2", "--out", tmp_path) == 0
    assert "no plot: the scaling plot needs matplotlib" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.iterdir()} == {".txt", ".csv", ".json"}


# ---- parity --------------------------------------------------------------------------------------------------


class Unseen(torch.autograd.Function):
    """Passes a tensor on, and a part of its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 0.95 * gradient


class Wrong(TensorAttention):
    """A layer with a wrong output."""

    mistake: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor, *given: Any, **told: Any) -> Tensor:
        return self.mistake(super().forward(x, *given, **told))


MISTAKES: dict[str, Callable[[Tensor], Tensor]] = {
    "a hundredth too much": lambda y: 1.01 * y,
    "not a number": lambda y: y * math.nan,
    "another shape": lambda y: y[..., :1],
    "less gradient": Unseen.apply,
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_layer_gets_no_time(name: str) -> None:
    class Mistaken(Wrong):
        mistake = staticmethod(MISTAKES[name])

    wrong = dataclasses.replace(contender("kao_kv"), build=lambda work: Mistaken(8, 2, modes=2, operator="kao_kv"))
    row, other = examine(PLANE, [wrong, contender("plain kao_kv")], repeats=1)
    assert row.forward is row.training is None and other.forward is not None
    assert row.note.startswith("parity fails, error ") and row.note.endswith(" above 1e-03: not timed")


def test_a_parameter_with_a_wrong_gradient_is_found() -> None:
    def build(work: Work) -> nn.Module:
        layer = TensorAttention(8, 2, modes=2, operator="kao_kv")
        layer.v_proj.weight.register_hook(lambda gradient: 1.05 * gradient)
        return layer

    (row,) = examine(PLANE, [dataclasses.replace(contender("kao_kv"), build=build)], repeats=1)
    assert row.training is None and row.note.startswith("parity fails")


@pytest.mark.parametrize("name", [peer.name for peer in PEERS])
@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_peers_compute_what_they_say(name: str, layout: str) -> None:
    for sizes in ((7,), (5, 6), (4, 3, 5)):
        (row,) = examine(Work(2, sizes, 8, 2, "float64", layout), [contender(name)], repeats=1)
        if "not installed" in row.note:
            pytest.skip(row.note)
        if name.startswith("kronecker") and (len(sizes) != 2 or layout == "channels_last"):
            assert row.note == "it takes images with channels first only"
        else:
            assert row.error is not None and row.error < 1e-9 and not row.note


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("channels_first", [False, True])
def test_plain_layers_are_those_of_the_operators(name: str, channels_first: bool) -> None:
    for sizes in ((5,), (3, 4), (2, 3, 4), (2, 3, 2, 2)):
        layer = TensorAttention(6, 2, modes=len(sizes), operator=name, channels_first=channels_first).double()
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        x = torch.randn(2, *sizes, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found = PlainLayer(layer)(x.movedim(-1, 1) if channels_first else x)
        found = found.movedim(1, -1) if channels_first else found
        torch.testing.assert_close(found, reference.layer(layer, x), rtol=1e-10, atol=1e-12)


def test_every_operator_has_a_plain_layer_of_few_calls() -> None:
    assert set(PLAIN) == set(OPERATORS) - {"clustered"}  # a search is no few calls
    for name, calls in {"kao_kv": 10, "additive": 17, "kao_qkv": 13}.items():
        plain = PlainLayer(TensorAttention(8, 2, modes=3, operator=name))
        for sizes in ((2, 3, 4), (9, 8, 10)):
            assert count_calls(lambda: plain(torch.zeros(2, *sizes, 8))) == calls + 1  # noqa: B023


def test_long_attention_is_left_out_and_told() -> None:
    rows = examine(Work(1, (300, 300), 8, 2), [contender("flattened"), contender("plain flattened")], repeats=1)
    assert [row.note for row in rows] == 2 * ["90,000 positions are more than 20,000"]


# ---- times ---------------------------------------------------------------------------------------------------


def test_calls_are_run_in_turn() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = interleaved(calls, repeats=2, before=lambda: order.append("-"))
    counted = "".join(order)
    assert counted.startswith("aabb-") and counted.count("-") == 4
    assert [part[0] for part in counted.split("-")[1:]] == ["a", "b", "a", "b"]
    assert all(0 < median < 1e-3 and spread >= 0 for median, spread in times.values())


def test_threads_are_those_before() -> None:
    before = torch.get_num_threads()
    threads: list[int] = []
    examine(
        PLANE, [contender("kao_qkv")], repeats=1, whole=False, started=lambda _: threads.append(torch.get_num_threads())
    )
    assert set(threads) == {1} and torch.get_num_threads() == before


def test_exponents_are_those_of_a_power() -> None:
    assert Curve((8, 27, 64, 125), tuple(3e-6 * n**1.25 for n in (8, 27, 64, 125))).exponent == pytest.approx(1.25)
    assert math.isnan(Curve((8,), (1.0,)).exponent)


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
        (("--shape", "1,3,4", "--heads", "3"), "--heads must divide the channels, but 3 do not divide 4 of 1,3,4."),
        (("--dtype", "int8"), "--dtype must be one of float64, float32, bfloat16, float16, got 'int8'."),
        (("--layout", "nhwc"), "--layout must be one of channels_last, channels_first, both, got 'nhwc'."),
        (("--cubes", "3,x"), "--cubes must be whole numbers of at least 1, or none, got '3,x'."),
        (("--operator", "dense"), f"--operator 'dense' is not one of: {', '.join(OPERATORS)}."),
        (
            ("--operator", "truncated:interaction_order=3", "--shape", "1,3,4,8"),
            "interaction_order must be an integer between 1 and order 2, got 3.",
        ),
    ],
)
def test_bad_arguments_are_told_in_one_line(capsys: Any, tmp_path: Path, words: tuple[str, ...], line: str) -> None:
    assert bench(*words, "--out", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert printed.err == f"{PROGRAM}: {line}\n" and printed.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [("--repeats", "0"), ("--heads", "two"), ("--goals",), ("file",)])
def test_what_the_parser_refuses(capsys: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench(*words)
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_directory_is_checked_before_any_work(capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert bench("--out", tmp_path / "file") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_gains_are_told_for_grids_of_known_models(capsys, monkeypatch):
    """After parity: an operator that is wrong gets no time."""
    monkeypatch.setattr(module, "GRIDS", gain.GRIDS[2:3])
    assert main(["bench", "--gain", "--repeats", "1", "--operator", "kao_kv", "--operator", "clustered:tokens=16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == ["grid", "P", "full", "attention", "kao_kv", "clustered:tokens=16"]
    assert re.fullmatch(r"ViT-S, 14×14 +196 +[\d.]+ ms; [\d.]+ ms( +[\d.]+; [\d.]+){2}", lines[-1])


def test_what_fails_parity_is_not_timed(capsys, monkeypatch):
    monkeypatch.setattr(module, "GRIDS", gain.GRIDS[2:3])
    monkeypatch.setattr(gain, "TOLERANCE", 0.0)
    assert main(["bench", "--gain", "--repeats", "1", "--operator", "kao_kv"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("parity fails")
