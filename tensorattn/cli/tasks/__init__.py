"""Tasks to learn, each a file or a part of one; no data is downloaded."""

from tensorattn.cli.tasks.brain import Drift, Gps
from tensorattn.cli.tasks.classification import Digits, Vowels
from tensorattn.cli.tasks.parcellation import Parcellation
from tensorattn.cli.tasks.task import Batch, Metric, Task

__all__ = ["TASKS", "Batch", "Metric", "Task"]

TASKS: dict[str, type[Task]] = {
    "gps": Gps,
    "digits": Digits,
    "drift": Drift,
    "vowels": Vowels,
    "parcellation": Parcellation,
}
