"""What a task to learn is: data, a network around a mixer, a loss, a metric on data that training never sees."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tensorattn.cli.common import MissingPackageError
from tensorattn.errors import OptionError, check
from tensorattn.models import TensorTransformer, TensorTransformerConfig

__all__ = ["Batch", "Metric", "Task", "drawn", "package_file", "transformer"]

TEST_SEED = 1_000_003  # of what is drawn to be tested on; seeds of training are smaller


class Batch(NamedTuple):
    """Some samples.

    Attributes:
        x: Input of the network.
        target: What it should say.
        told: What the network is told beside the input.
    """

    x: Tensor
    target: Tensor
    told: Mapping[str, Any] = {}


class Metric(NamedTuple):
    """What is measured.

    Attributes:
        name: What it is called, with its unit.
        lower: Whether lower is better.
        digits: Digits after the point that are shown.
    """

    name: str
    lower: bool = False
    digits: int = 3


@dataclass(frozen=True)
class Task(ABC):
    """A task. Its fields are its options: ``gps:size=26``, ``digits:rate=0.004:validate=True``.

    Attributes:
        rate: Largest learning rate.
        validate: Whether to leave a part of the training data out and to measure on that part alone, never on test
            data: rates are chosen so.
        about: What is learned from what, in a line.
        splits: What each set of test data is.
        metrics: What is measured, the one that counts first.
        budgets: Steps of the short and of the long training.
        batch: Samples a step.
    """

    rate: float = 3e-3
    validate: bool = False

    about: ClassVar[str]
    splits: ClassVar[Mapping[str, str]]
    metrics: ClassVar[tuple[Metric, ...]]
    budgets: ClassVar[Mapping[str, int]]
    batch: ClassVar[int] = 16

    def __post_init__(self) -> None:
        """Refuse rates that are none."""
        check(self.rate, "rate", "number", rule="a positive number")
        if not 0 < self.rate < math.inf:
            raise OptionError(f"rate must be a positive number, got {self.rate}.")
        check(self.validate, "validate", "switch")

    @abstractmethod
    def network(self, mixer: str, options: Mapping[str, Any]) -> nn.Module:
        """Make the network.

        Args:
            mixer: Name of its mixer.
            options: Options of the mixer.
        """

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Batch:
        """Draw samples to train on.

        Args:
            generator: Where the randomness comes from.
        """

    @abstractmethod
    def tests(self) -> Mapping[str, Sequence[Batch]]:
        """Return what to measure on by the name of each split, always the same: ``"validation"`` alone to validate."""

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return what training makes small.

        Args:
            output: What the network says.
            target: What it should say.
        """

    @abstractmethod
    def measure(self, output: Tensor, target: Tensor) -> tuple[float, ...]:
        """Return each metric.

        Args:
            output: What the network says of all samples of a split.
            target: What it should say.
        """

    @abstractmethod
    def constant(self) -> Tensor:
        """Return the best output that does not look at the input, from training data; it broadcasts to outputs."""

    def recipe(self) -> dict[str, Any]:
        """Return all that decides a result beside mixer, seed and steps."""
        decides = {"batch": self.batch, **dataclasses.asdict(self)}
        return {name: value for name, value in decides.items() if name != "validate" or value}


def transformer(
    modes: str, patch: int | Sequence[int], mixer: str, options: Mapping[str, Any], **head: Any
) -> TensorTransformer:
    """Make a transformer of two blocks of 32 channels, whose patches meet in the mixer only.

    Args:
        modes: Names of the modes.
        patch: Size of a patch along each mode.
        mixer: Where patches meet.
        options: Options of the mixer.
        **head: What it ends with; nothing for channels at every patch.

    Returns:
        The transformer.
    """
    settings: dict[str, Any] = {"in_channels": 1, "embed_dim": 32, "depth": 2, "num_heads": 4, "options": dict(options)}
    return TensorTransformer(TensorTransformerConfig(modes=modes, patch=patch, mixer=mixer, **settings, **head))


def drawn(task: Task, count: int, seed: int) -> Iterator[Batch]:
    """Draw batches to train on, or to test on.

    Args:
        task: The task.
        count: How many.
        seed: Seed of the generator.

    Yields:
        The batches.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield task.draw(generator)


def package_file(package: str, *parts: str, purpose: str) -> Path:
    """Find a file that another package carries, without importing the package.

    Args:
        package: Name of the package.
        *parts: Where the file lies in it.
        purpose: What it is needed for, as the subject of a sentence.

    Returns:
        Its path.

    Raises:
        MissingPackageError: If the package is not installed, or does not carry the file.
    """
    found = find_spec(package)
    places = [] if found is None else [Path(place, *parts) for place in found.submodule_search_locations or ()]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        reason = "is not installed" if found is None else f"carries no {'/'.join(parts)} as it is installed here"
        raise MissingPackageError(f"{purpose} needs {package}, which {reason}: pip install 'tensorattn[learn]'")
    return path
