"""The command `bench`: parity before time, its table and files, its goals, and what it tells where it cannot."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tensorattn import progress
from tensorattn.__main__ import main
from tensorattn.attend.optional import MissingPackageError, require
from tensorattn.bench import command, examine, goals, peers, report, scaling, targets, timing
from tensorattn.bench.contenders import PEERS, contender
from tensorattn.bench.job import Parity, distance
from tensorattn.bench.peak import Peak, peaks
from tensorattn.bench.plain import PLAIN, Maps, plain_layer
from tensorattn.bench.timing import Timed, interleaved
from tensorattn.bench.workload import Workload, parse_shape
from tensorattn.errors import OptionError
from tensorattn.operators import OPERATORS, AttentionResult
from tensorattn.testing.variants import Variant, variants

PROGRAM = "python -m tensorattn bench"
SMALL = ("--heads", "2", "--repeats", "1", "--shape", "2,4,5,8")


@pytest.fixture(autouse=True)
def small_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cubes of a few positions."""
    monkeypatch.setattr(command, "CUBES", (2, 3, 4))


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No helper process, which takes seconds to start."""
    monkeypatch.setattr(examine, "peaks", lambda jobs: [Peak(1_000_000, 400_000) for _ in jobs])


@pytest.fixture
def registry() -> Any:
    """The registry, as it was when the test is over."""
    before = dict(OPERATORS)
    yield OPERATORS
    OPERATORS.clear()
    OPERATORS.update(before)


def bench(*words: str | Path) -> int:
    return main(["bench", *map(str, words)])


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    """The rows of a CSV file by contender; the first of each."""
    rows: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO(path.read_text())):
        rows.setdefault(row["contender"], row)
    return rows


# ---- what is printed and written -----------------------------------------------------------------------------


def test_a_run_from_end_to_end(capsys, tmp_path):
    assert bench(*SMALL, "--operator", "kao_kv", "--operator", "kao_qkv:centered=True", "--out", tmp_path / "a/b") == 0
    printed = capsys.readouterr().out
    names = {"bench.txt", "bench.csv", "bench.json", "bench-scaling.png"}
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == names
    assert all(str(tmp_path / "a/b" / name) in printed for name in names)
    assert printed.startswith((tmp_path / "a/b/bench.txt").read_text().rstrip())
    for words in ("processor: ", "malloc and threads: ", "torch: ", "date: ", "Where others are faster:"):
        assert words in printed
    assert "2×4×5×8 (0.0 MB), float32, channels last, forward, 2 heads; CPU time of 1 thread" in printed
    rows = rows_of(tmp_path / "a/b/bench.csv")
    assert list(rows) == ["kao_kv", "kao_qkv:centered=True", "fresh copy"]
    for row in rows.values():
        assert 0 < float(row["first_quartile"]) <= float(row["seconds"]) <= float(row["third_quartile"])
        assert float(row["parity_error"]) < 1e-5
        if row["contender"] == "fresh copy":
            continue  # is there for the plot
        assert int(row["predicted_peak_bytes"]) > 0
        assert not sys.platform.startswith("linux") or int(row["peak_bytes"]) >= int(row["extra_bytes"]) >= 0
    found = json.loads((tmp_path / "a/b/bench.json").read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert list(found["scaling"]) == ["kao_kv", "fresh copy"] and found["scaling"]["kao_kv"]["positions"] == [8, 27, 64]
    with Image.open(tmp_path / "a/b/bench-scaling.png") as picture:
        picture.verify()


@pytest.mark.usefixtures("no_memory")
def test_without_arguments_everyone_works(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SHAPES", ("1,3,4,8", "1,2,3,2,8"))
    assert bench("--repeats", "1", "--out", tmp_path) == 0
    rows = rows_of(tmp_path / "bench.csv")
    assert list(rows) == ["averages", "outer sum", *OPERATORS, *(peer.name for peer in PEERS), "fresh copy"]
    for name, row in rows.items():
        assert bool(row["seconds"]) != bool(row["note"]), name
    assert "kronecker-attention-pytorch: it takes images with channels first only" in capsys.readouterr().out


@pytest.mark.usefixtures("no_memory")
def test_training_in_both_layouts_with_peers(tmp_path):
    words = (*SMALL, "--operator", "additive", "--peers", "--backward", "--skip", "--layout", "both")
    assert bench(*words, "--dtype", "float64", "--out", tmp_path) == 0
    table = list(csv.DictReader(io.StringIO((tmp_path / "bench.csv").read_text())))
    shaped = [row for row in table if row["sizes"] == "4x5"]
    assert {row["layout"] for row in shaped} == {"channels_last", "channels_first"}
    for row in shaped:
        if row["seconds"]:
            assert (row["dtype"], row["backward"], row["skip"], row["threads"]) == ("float64", "True", "True", "1")
            assert float(row["parity_error"]) < 1e-9
    assert {"linear-SDPA-linear", "naive kao_qkv", "axial by SDPA"} <= {r["contender"] for r in shaped if r["seconds"]}


@pytest.mark.usefixtures("no_memory")
def test_compiled_operators_stand_beside_the_others(tmp_path, monkeypatch):
    calls: list[Any] = []
    right = torch.compile

    def counted(layer):
        calls.append(layer)
        return right(layer, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", counted)
    words = (*SMALL, "--operator", "kao_qkv", "--operator", "additive", "--backward", "--skip", "--compile")
    assert bench(*words, "--out", tmp_path) == 0
    rows = rows_of(tmp_path / "bench.csv")
    assert list(rows)[:4] == ["kao_qkv", "additive", "kao_qkv, compiled", "additive, compiled"]
    assert len(calls) == 2
    for name in list(rows)[:4]:
        assert float(rows[name]["seconds"]) > 0 and float(rows[name]["parity_error"]) < 1e-5
        assert bool(rows[name]["extra_bytes"]) == (not name.endswith("compiled"))


@pytest.mark.usefixtures("no_memory")
def test_without_matplotlib_there_is_no_plot_and_it_says_so(capsys, tmp_path, monkeypatch):
    def without(module, **how):
        if module.startswith(("matplotlib", "tqdm")):
            raise MissingPackageError(f"{module} is not here")
        return require(module, **how)

    monkeypatch.setattr(scaling, "require", without)
    monkeypatch.setattr(progress, "require", without)
    assert bench(*SMALL, "--operator", "kao_kv", "--out", tmp_path) == 0
    printed = capsys.readouterr()
    assert "no plot: matplotlib.figure is not here" in printed.out
    assert {path.suffix for path in tmp_path.iterdir()} == {".txt", ".csv", ".json"}
    assert all(line.startswith("trying: ") for line in printed.err.splitlines())


# ---- parity --------------------------------------------------------------------------------------------------


def scaled(result: AttentionResult, factor: float) -> AttentionResult:
    output = result.output
    product = output * factor if isinstance(output, torch.Tensor) else tuple(part * factor for part in output)
    return result._replace(output=product)


class Unseen(torch.autograd.Function):
    """Passes a tensor on, and half of its gradient."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


MUTILATIONS: dict[str, tuple[str, Callable[..., Any], tuple[str, ...]]] = {
    "a hundredth too much": ("kao_kv", lambda result: scaled(result, 1.01), ()),
    "an outer sum too small": ("kao_qkv", lambda result: scaled(result, 0.99), ()),
    "not a number": ("additive", lambda result: scaled(result, math.nan), ()),
    "half the gradient": ("axial", lambda result: result._replace(output=Unseen.apply(result.output)), ("--backward",)),
}


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("name", MUTILATIONS)
def test_a_mutilated_operator_gets_no_time(capsys, tmp_path, registry, name):
    operator, mutilate, words = MUTILATIONS[name]
    right = registry[operator].attend

    def attend(*given, **settings):
        return mutilate(right(*given, **settings))

    registry[operator] = dataclasses.replace(registry[operator], attend=attend)
    other = "kronecker_sum"
    assert bench(*SMALL, *words, "--operator", operator, "--operator", other, "--out", tmp_path) == 0
    rows = rows_of(tmp_path / "bench.csv")
    assert rows[operator]["seconds"] == rows[operator]["peak_bytes"] == "" and rows[other]["seconds"] != ""
    assert rows[operator]["note"].startswith("parity fails, error ") and "not timed" in rows[operator]["note"]
    assert f"{operator}: parity fails" in capsys.readouterr().out


def test_a_parameter_with_a_wrong_gradient_is_found():
    work = Workload(2, (4, 5), 8, heads=2, backward=True)
    job = contender("kao_kv").build(work, work.tensor())
    assert job.check().holds
    job.layer.v_proj.weight.register_hook(lambda gradient: 1.05 * gradient)
    assert not job.check().holds


def test_outputs_are_compared_with_their_shape_and_without_not_a_number():
    one = torch.ones(3, dtype=torch.float64)
    assert not Parity(math.nan, 1.0).holds and Parity(0.5, 1.0).holds
    assert math.isinf(distance(torch.ones(4), one))
    assert distance(torch.tensor([1.0, 1.0, 1.5]), one) == 0.5


@pytest.mark.parametrize("variant", variants(), ids=str)
def test_plain_definitions_are_those_of_the_operators(variant: Variant) -> None:
    """The outputs of the functional forms, in float64, where the maps are identities."""
    name, options = variant
    identity = torch.eye(6, dtype=torch.float64)
    for sizes in ((5,), (3, 4), (2, 3, 4)):
        if max((mode for kept in options.get("kept", ()) for mode in kept), default=0) >= len(sizes):
            continue
        x = torch.randn(2, *sizes, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        heads = x.unflatten(-1, (2, 3)).movedim(-2, 1)
        expected = OPERATORS[name].function(heads, heads, heads, order=len(sizes), **options)
        index = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).reshape(-1, len(sizes))
        maps = Maps((identity, None), (identity, None), (identity, None), 2, 3**-0.5)
        complete = {**OPERATORS[name].with_defaults(options), "gain": torch.ones(2, dtype=torch.float64)}
        found = plain_layer(name, x, maps, (identity, None), index, complete)
        torch.testing.assert_close(found, expected.movedim(1, -2).flatten(-2).flatten(1, -2), rtol=1e-10, atol=1e-12)


def test_every_operator_has_a_plain_definition():
    assert list(PLAIN) == list(OPERATORS)


@pytest.mark.parametrize("name", [peer.name for peer in PEERS])
@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_peers_compute_what_they_say(name, layout):
    work = Workload(2, (5, 6), 8, heads=2, layout=layout, backward=True)
    peer = contender(name)
    if peer.absence(work):
        pytest.skip(peer.absence(work))
    assert peer.build(work, work.tensor()).check().holds


def test_a_peer_that_raises_is_told(capsys, monkeypatch):
    monkeypatch.setattr(peers.PlainLayer, "_axial", lambda self, x: x.reshape(7))
    work = Workload(2, (4, 5), 8, heads=2)
    (row,) = examine.examine(work, [contender("axial by SDPA")], repeats=1, memory=False)
    assert row.timed is None and row.note.startswith("fails: shape '[7]' is invalid")


def test_long_attention_is_left_out_and_told():
    work = Workload(1, (300, 300), 8, heads=2)
    assert contender("flattened SDPA").absence(work) == "90,000 positions are more than 20,000"
    assert contender("flattened").absence(work) == "90,000 positions are more than 20,000"


# ---- times and memory ----------------------------------------------------------------------------------------


def test_calls_are_run_in_turn():
    order = []
    timed = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        repeats=2,
        threads=1,
        before=lambda: order.append("-"),
    )
    assert [each.samples for each in timed.values()] == [2, 2]
    counted = "".join(order)
    assert counted.startswith("aabb-") and counted.count("-") == 4
    assert [part[0] for part in counted.split("-")[1:]] == ["a", "b", "a", "b"]
    assert timed["a"].median < 1e-3 and timed["a"].undisturbed


def test_disturbed_samples_are_taken_again(monkeypatch):
    waits = iter([0.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0])
    monkeypatch.setattr(timing, "_waited", lambda: next(waits))
    timed = interleaved({"a": lambda: None}, repeats=3, threads=2)["a"]
    assert (timed.samples, timed.undisturbed) == (3, True)


def test_a_busy_machine_is_told(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(timing, "_waited", lambda: float(next(ticks)))
    timed = interleaved({"a": lambda: None}, repeats=3, threads=2)["a"]
    assert (timed.samples, timed.undisturbed) == (timing.TRIES * 3, False)
    row = dataclasses.replace(a_row("kao_kv", 1.0), timed=timed)
    assert " ms !" in report.tables([row])


def test_threads_are_those_before():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        interleaved({"a": lambda: 1 / 0}, repeats=1, threads=2)
    assert torch.get_num_threads() == before


def test_memory_is_measured_in_processes_of_their_own():
    """A fresh copy of 8 MB holds 8 MB; a job that fails takes none of the others along."""
    work = Workload(1, (128, 128), 128)
    copied, failed, read = peaks([("fresh copy", work), ("kao_kv", Workload(1, (4,), 6)), ("read", work)])
    if copied is None or copied.bytes is None:
        pytest.skip("this system does not tell")
    assert copied.bytes == pytest.approx(work.bytes, rel=0.1) and copied.extra < 1e6
    assert failed is None
    assert read.bytes < 1e6
    assert peaks([]) == []


# ---- goals ---------------------------------------------------------------------------------------------------


PLANE = Workload(1, (4, 4), 8)


def a_row(name: str, seconds: float, work: Workload = PLANE, **more: Any) -> examine.Row:
    timed = Timed(seconds, (seconds, seconds), 5, True)
    return examine.Row(work, name, 1, Parity(0.0, 1e-3), timed, (1.0, 2.0, 4.0), **more)


def a_goal(limit: float, stretch: float | None = None, **more: Any) -> goals.Goal:
    numbers = targets.GOALS[0].numbers
    return goals.Goal(
        "speed", "R", {1: limit}, stretch, (Workload(1, (4, 4), 8),), ("averages", "read"), numbers, **more
    )


@pytest.mark.parametrize(
    ("goal", "seconds", "verdict"),
    [
        (a_goal(2.0), 1.9, "reached"),
        (a_goal(2.0), 2.1, "NOT REACHED"),
        (a_goal(2.0, 1.5), 1.5, "stretch"),
        (a_goal(2.0, at_least=True), 0.4, "reached"),
        (a_goal(2.0, at_least=True), 0.6, "NOT REACHED"),
        (a_goal(2.0), math.nan, "NOT REACHED"),
        (a_goal(2.0, at_least=True), math.nan, "NOT REACHED"),
    ],
)
def test_verdicts(goal, seconds, verdict):
    (outcome,) = goals.judge([goal], [a_row("averages", seconds), a_row("read", 1.0)])
    assert outcome.verdict == verdict
    assert verdict in goals.verdicts([outcome])


def test_a_verdict_on_a_busy_machine_has_a_mark():
    busy = dataclasses.replace(a_row("read", 1.0), timed=Timed(1.0, (1.0, 1.0), 5, False))
    (outcome,) = goals.judge([a_goal(2.0)], [a_row("averages", 1.0), busy])
    assert outcome.verdict == "reached !" and "the machine was too busy" in goals.verdicts([outcome])
    (missed,) = goals.judge([a_goal(0.5)], [a_row("averages", 1.0), busy])
    assert missed.verdict == "NOT REACHED !"
    assert "1 of 2 reached" in goals.verdicts([outcome, missed])
    assert "Not reached, all cases:" in goals.verdicts([missed])


def test_memory_counts_beyond_what_is_free():
    work = Workload(1, (512, 512), 64)
    goal = next(goal for goal in targets.GOALS if goal.title.startswith("extra memory of kao_qkv"))
    goal = dataclasses.replace(goal, works=(work,))
    for extra, share in ((8_000_000, 0.0), (8_000_000 + work.bytes // 10, 0.1)):
        row = a_row("kao_qkv", 1.0, work, peak=Peak(work.bytes + extra, work.bytes))
        (outcome,) = goals.judge([goal], [row])
        assert outcome.worst[1] == pytest.approx(share)
    (outcome,) = goals.judge([goal], [a_row("kao_qkv", 1.0, work)])
    assert outcome.verdict == "NOT REACHED"


def test_exponents_are_those_of_a_power():
    curve = scaling.Curve((8, 27, 64, 125), tuple(3e-6 * n**1.25 for n in (8, 27, 64, 125)))
    assert curve.exponent == pytest.approx(1.25)
    assert math.isnan(scaling.Curve((8,), (1.0,)).exponent)


def test_what_is_compared_is_examined_together():
    found = goals.pieces(targets.GOALS)
    assert len(set(found)) == len(found)
    for goal in targets.GOALS:
        for work in goal.works:
            fitting = [p for p in found if p.workload == work and set(goal.names) <= set(p.names)]
            assert any(set(goal.limits) <= set(piece.threads) and piece.memory >= goal.memory for piece in fitting)


def test_goals_from_end_to_end(capsys, tmp_path, monkeypatch, no_memory):
    def shrunk(work: Workload) -> Workload:
        return dataclasses.replace(work, sizes=tuple(min(size, 3 + i) for i, size in enumerate(work.sizes)), dim=8)

    small = [
        dataclasses.replace(goal, works=tuple(dict.fromkeys(map(shrunk, goal.works))))
        for goal in targets.GOALS
        if "65 536" not in goal.title and "scaling" not in goal.title
    ]
    monkeypatch.setattr(targets, "GOALS", small)
    assert bench("--goals", "--repeats", "1", "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"goals.txt", "goals.csv", "goals.json"}
    found = json.loads((tmp_path / "goals.json").read_text())["goals"]
    assert len(found) == sum(len(goal.limits) for goal in small)
    for entry in found:
        assert f"{entry['goal']}  " in printed and entry["numbers"]
        assert entry["worst"] in entry["numbers"].values()


def test_losses_are_told():
    rows = [a_row("kao_kv", 2.0), a_row("linear-SDPA-linear", 1.0), a_row("kao_qkv", 1.0), a_row("naive kao_qkv", 3.0)]
    assert report.losses(rows) == [
        "kao_kv takes 2.00 times as long as linear-SDPA-linear on 1×4×4×8 (0.0 MB), float32, channels last, forward, "
        "1 thread"
    ]


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
        (
            ("--shape", "1,3,4", "--heads", "3"),
            "--heads must divide the channels, but 3 do not divide 4 of 1,3,4.",
        ),
        (("--dtype", "int8"), "--dtype must be one of float64, float32, bfloat16, float16, got 'int8'."),
        (("--layout", "nhwc"), "--layout must be one of channels_last, channels_first, both, got 'nhwc'."),
        (("--threads", "257"), "--threads must be at most 256, got 257."),
        (("--operator", "dense"), f"--operator 'dense' is not one of: {', '.join(OPERATORS)}."),
        (
            ("--operator", "kao_kv:centered=True"),
            "--operator 'kao_kv:centered=True': operator 'kao_kv' has no option 'centered'; its options are: none.",
        ),
        (
            ("--operator", "truncated:interaction_order=3", "--shape", "1,3,4,8"),
            "interaction_order must be an integer between 1 and order 2, got 3.",
        ),
        (("--goals", "--backward"), "--backward has no meaning with --goals, which has its own."),
        (("--goals", "--compile"), "--compile has no meaning with --goals, which has its own."),
    ],
)
def test_bad_arguments_are_told_in_one_line(capsys, tmp_path, words, line):
    assert bench(*words, "--out", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert printed.err == f"{PROGRAM}: {line}\n" and printed.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [("--repeats", "0"), ("--heads", "two"), ("--threads", "-1"), ("file",)])
def test_numbers_must_be_numbers(capsys, words):
    with pytest.raises(SystemExit) as ended:
        bench(*words)
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_directory_is_checked_before_any_work(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert bench("--out", tmp_path / "file") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_shapes_are_read():
    assert parse_shape("2,16,56,56,96") == (2, (16, 56, 56), 96)
    with pytest.raises(OptionError):
        parse_shape("")
