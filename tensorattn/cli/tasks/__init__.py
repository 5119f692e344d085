"""Tasks to learn, each a file or a part of one; no data is downloaded."""

from tensorattn.cli.tasks.brain import Drift, Gps
from tensorattn.cli.tasks.task import Batch, Metric, Task

__all__ = ["TASKS", "Batch", "Metric", "Task"]

TASKS: dict[str, type[Task]] = {"gps": Gps, "drift": Drift}
