"""Contenders: who works on a workload. One record each; whoever has no place on a workload says why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorattn.attend.choices import Choice, parse_choice
from tensorattn.attend.optional import MissingPackageError, require
from tensorattn.bench.job import AveragesJob, Job, LayerJob, OuterSumJob, SomeQueriesJob, UnitJob
from tensorattn.bench.peers import AxialPackage, KroneckerPackage, PlainLayer, expected_of
from tensorattn.bench.workload import Workload
from tensorattn.nn import TensorAttention

__all__ = ["PEERS", "PRIMITIVES", "UNITS", "Contender", "contender", "operator_contender"]

LONGEST = 20_000  # positions of a batch entry above which attention among all of them is not run


def _always(work: Workload) -> str:
    """Take any workload."""
    return ""


@dataclass(frozen=True)
class Contender:
    """Who works.

    Attributes:
        name: What it is called.
        build: Sets it to work on a workload.
        absence: Why it has no place on a workload, or nothing.
        choice: The operator, where it is a module of this package that runs as it is.
        weighed: Whether its memory is measured.
    """

    name: str
    build: Callable[[Workload, Tensor], Job]
    absence: Callable[[Workload], str] = _always
    choice: Choice | None = None
    weighed: bool = True


def _module(work: Workload, operator: str, **options: Any) -> TensorAttention:
    """Make the module, with biases that are not zero."""
    torch.manual_seed(4)
    module = TensorAttention(
        work.dim, work.heads, modes=work.order, operator=operator, channels_first=work.channels_first, **options
    )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return module


def operator_contender(choice: Choice, *, compiled: bool = False) -> Contender:
    """Return the module with an operator.

    Args:
        choice: The operator with its options.
        compiled: Whether it is compiled. Its memory is then not measured, as compiling takes more than running.

    Returns:
        The contender.
    """
    name, options = choice.record.name, dict(choice.options)

    def build(work: Workload, x: Tensor) -> Job:
        expected = functools.partial(expected_of, name, work.heads, options)
        return LayerJob(work, x, _module(work, name, **options), expected, fuses=True, compiled=compiled)

    absence = _too_long if name == "flattened" else _always
    if compiled:
        return Contender(f"{choice.label}, compiled", build, absence, weighed=False)
    return Contender(choice.label, build, absence, choice)


def _plain(operator: str, way: str) -> Callable[[Workload, Tensor], Job]:
    """Return the builder of a plain layer."""

    def build(work: Workload, x: Tensor) -> Job:
        expected = functools.partial(expected_of, operator, work.heads, {})
        return LayerJob(work, x, PlainLayer(_module(work, operator), way), expected, fuses=False)

    return build


def _axial_package(work: Workload, x: Tensor) -> Job:
    """Build the package."""
    layer = AxialPackage(work.dim, work.heads, work.order, work.channels_first)
    return LayerJob(work, x, layer, layer.expected, fuses=False)


def _kronecker_package(work: Workload, x: Tensor) -> Job:
    """Build the package."""
    layer = KroneckerPackage(work.dim, work.heads)
    return LayerJob(work, x, layer, layer.expected, fuses=False)


def _too_long(work: Workload) -> str:
    """Say that attention among all positions takes too long."""
    positions = work.positions // work.batch
    return f"{positions:,} positions are more than {LONGEST:,}" if positions > LONGEST else ""


def _uninstalled(module: str) -> str:
    """Say that a package is not installed."""
    try:
        require(module, extra="bench", purpose="comparing")
    except MissingPackageError:
        return "not installed: pip install 'tensorattn[bench]'"
    return ""


def _no_kronecker(work: Workload) -> str:
    """Say where the Kronecker package has no place."""
    if work.order != 2 or not work.channels_first:
        return "it takes images with channels first only"
    return _uninstalled("kronecker_attention_pytorch")


UNITS = tuple(Contender(kind, functools.partial(UnitJob, kind=kind)) for kind in ("read", "copy", "fresh copy"))
PRIMITIVES = (
    Contender("averages", AveragesJob),
    Contender("outer sum", OuterSumJob),
    Contender("flattened SDPA, 1/64 of the queries", SomeQueriesJob),
)
PEERS = (
    Contender("naive kao_qkv", _plain("kao_qkv", "naive")),
    Contender("naive kao_kv", _plain("kao_kv", "naive")),
    Contender("linear-SDPA-linear", _plain("kao_kv", "fused")),
    Contender("axial by SDPA", _plain("axial", "fused")),
    Contender("axial-attention", _axial_package, lambda work: _uninstalled("axial_attention")),
    Contender("kronecker-attention-pytorch", _kronecker_package, _no_kronecker),
    Contender("flattened SDPA", _plain("flattened", "fused"), _too_long),
)


def contender(name: str) -> Contender:
    """Return the contender of a name: a unit, a primitive, a peer, or an operator with its options.

    Args:
        name: Its name, or an operator as the command line writes it.

    Returns:
        The contender.
    """
    known = {each.name: each for each in (*UNITS, *PRIMITIVES, *PEERS)}
    return known[name] if name in known else operator_contender(parse_choice(name))
