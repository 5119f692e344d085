"""Training a network of a task with a mixer: one recipe for all mixers, with the same data and first weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensorattn.cli.tasks.task import Batch, Task, drawn
from tensorattn.diagnose.cost import cost
from tensorattn.errors import ModesError, OptionError

__all__ = ["RECIPE", "Mixer", "attention_flops", "make_network", "train"]

PIECES = 20  # of a training, each with one point of its learning curve
RECIPE: dict[str, Any] = {
    "optimizer": "AdamW",
    "weight decay": 0.01,
    "schedule": "one cycle",
    "warm-up": 0.15,
    "revision": 1,
}


@dataclass(frozen=True)
class Mixer:
    """A mixer with its options, as the command line names it.

    Attributes:
        label: What the user called it.
        name: Its name.
        options: Its options.
    """

    label: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def make_network(task: Task, mixer: Mixer, seed: int) -> nn.Module:
    """Make a network; what is not of its mixer has the same first weights for all mixers.

    Args:
        task: The task.
        mixer: The mixer.
        seed: What the weights are drawn with.

    Returns:
        The network.

    Raises:
        OptionError: If the mixer refuses its options for the task.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shared = task.network("identity", {}).state_dict()
        torch.manual_seed(seed)
        try:
            network = task.network(mixer.name, mixer.options)
        except (ModesError, OptionError) as cause:
            raise OptionError(f"--mixers {mixer.label!r}: {cause.rule}") from None
    network.load_state_dict(shared, strict=False)
    return network


def attention_flops(task: Task, mixer: Mixer) -> tuple[int, int]:
    """Count the operations of the mixers of a network for one sample, without linear maps.

    Args:
        task: The task.
        mixer: The mixer.

    Returns:
        Those of products and softmaxes between queries and what they attend to, and those of all that the network
        without mixing does not do: means, the search of cells, filters.
    """
    (batch,) = drawn(task, 1, 0)
    x = batch.x[:1]

    def counted(name: str, options: Mapping[str, Any]) -> Any:
        """Count the network with a mixer."""
        return cost(task.network(name, options), x)

    found, bare = counted(mixer.name, mixer.options), counted("identity", {})
    core = found
    if mixer.name == "clustered" and mixer.options.get("cells", "keys") == "keys":  # as many cells, without a search
        core = counted("clustered", {**mixer.options, "cells": "blocks"})
    maps = [sum(part.flops for part in each.parts if part.name == "linear maps") for each in (found, bare)]
    return core.attention_flops, (found.flops - maps[0]) - (bare.flops - maps[1])


def train(
    task: Task, mixer: Mixer, *, seed: int, steps: int, started: Callable[[str], None], words: str
) -> dict[str, Any]:
    """Train a network, and test it.

    Args:
        task: The task.
        mixer: Its mixer.
        seed: Of the first weights and of the data.
        steps: Steps of the optimizer.
        started: Called with words when a piece of work starts, `PIECES` times.
        words: Those words.

    Returns:
        Metrics by split, learning curve, CPU seconds of the training, and number of parameters.
    """
    network = make_network(task, mixer, seed)
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=task.rate, weight_decay=RECIPE["weight decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, task.rate, total_steps=max(steps, 2), pct_start=RECIPE["warm-up"]
    )
    ends = [steps * (piece + 1) // PIECES for piece in range(PIECES)]
    curve: list[tuple[int, float]] = []
    data, done, begun = drawn(task, steps, seed), 0, time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for end in ends:
            started(words)
            losses: list[Tensor] = []
            for _ in range(end - done):
                batch = next(data)
                loss = task.loss(network(batch.x, **batch.told), batch.target)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
            done = end
            if losses:
                curve.append((done, torch.stack(losses).mean().item()))
    seconds = time.process_time() - begun
    network.eval()
    tested = {split: task.measure(*_answers(network, batches)) for split, batches in task.tests().items()}
    return {
        "metrics": tested,
        "curve": curve,
        "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in parameters),
    }


@torch.no_grad()
def _answers(network: nn.Module, batches: Any) -> tuple[Tensor, Tensor]:
    """Return what a network says of all batches, and what it should say."""
    outputs: list[Tensor] = []
    given: list[Batch] = list(batches)
    for batch in given:
        outputs.append(network(batch.x, **batch.told))
    return torch.cat(outputs), torch.cat([batch.target for batch in given])
