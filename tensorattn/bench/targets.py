"""Targets: the goals of this package, what each is about and how its numbers come about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from tensorattn.bench.goals import Goal, Lookup, Numbers, Works
from tensorattn.bench.scaling import LAST, curves
from tensorattn.bench.workload import LAYOUTS, Workload

__all__ = ["GOALS", "SCALED"]

LARGE = (  # beyond the caches, 48 MB and more
    Workload(1, (512, 512), 64),
    Workload(1, (32, 112, 112), 64),
    Workload(1, (16, 24, 32, 32), 32),
    Workload(1, (12, 12, 12, 12, 12), 64),
)
MEDIUM = (Workload(4, (56, 56), 96), Workload(8, (56, 56), 96), Workload(1, (8, 24, 24, 24), 32))
HALF = (Workload(1, (512, 512), 64, dtype="bfloat16"), Workload(1, (32, 112, 112), 64, dtype="bfloat16"))
ATTENDED = (Workload(1, (448, 448), 64), Workload(1, (32, 112, 112), 64), Workload(1, (16, 24, 32, 32), 32))
CUBES = tuple(Workload(1, (size,) * 3, 32) for size in (48, 64, 80, 112))  # the last three beyond the caches
TRAINED = (Workload(1, (32, 112, 112), 64),)
FLAT = Workload(1, (16, 64, 64), 64)  # 65 536 positions
PLAIN, AXIAL, FLAT_SDPA = "linear-SDPA-linear", "axial by SDPA", "flattened SDPA, 1/64 of the queries"


def _ratios(goal: Goal, row: Lookup) -> Numbers:
    """Time of every contender but the last as a multiple of that of the last, or how many times as fast it is."""
    *ours, other = goal.names
    found = []
    for work in goal.works:
        for name in ours:
            ratio = row(work, name).seconds / row(work, other).seconds
            found.append((f"{name} on {work}", 1 / ratio if goal.at_least else ratio))
    return found


def _extra(goal: Goal, row: Lookup, *, free: float = 0.0) -> Numbers:
    """Extra memory as a share of the tensor, some bytes being free."""
    found = []
    for work in goal.works:
        for name in goal.names:
            peak = row(work, name).peak
            extra = math.nan if peak is None or peak.extra is None else peak.extra
            found.append((f"{name} on {work}", max(0.0, extra - free) / work.bytes if extra == extra else extra))
    return found


def _overhead(goal: Goal, row: Lookup) -> Numbers:
    """Microseconds more than another."""
    ours, other = goal.names
    return [(str(work), 1e6 * (row(work, ours).seconds - row(work, other).seconds)) for work in goal.works]


def _exponents(goal: Goal, row: Lookup) -> Numbers:
    """Exponent of time in positions, a layout; others are there to be drawn beside it."""
    found = []
    for layout in LAYOUTS:
        rows = [row(work, goal.names[0]) for work in goal.works if work.layout == layout]
        exponent = curves(rows)[goal.names[0]].exponent if all(each.timed for each in rows) else math.nan
        found.append(
            (
                f"{layout.replace('_', ' ')}, {rows[-LAST:][0].workload.positions:,} to "
                f"{rows[-1].workload.positions:,} positions",
                exponent,
            )
        )
    return found


def _both(works: Sequence[Workload], *, skip: bool = False, into: bool = False, backward: bool = False) -> Works:
    """Every workload in both layouts."""
    return tuple(
        replace(work, layout=layout, skip=skip, into=into, backward=backward) for work in works for layout in LAYOUTS
    )


KAO = ("kao_kv", "additive")
SCALED = tuple(replace(work, layout=LAYOUTS[0]) for work in CUBES)  # what is drawn
GOALS = (
    Goal("all averages, orders 2-5", "R", {1: 2.2, 2: 2.5}, 1.5, _both(LARGE), ("averages", "read"), _ratios),
    Goal("all averages, from 4 MB", "R", {1: 3.0, 2: 3.0}, 1.5, _both(MEDIUM), ("averages", "read"), _ratios),
    Goal("all averages, bfloat16 in, float32 out", "R", {1: 2.7}, 1.6, _both(HALF), ("averages", "read"), _ratios),
    Goal(
        "outer sum with skip, into out",
        "M",
        {1: 1.55, 2: 1.8},
        1.1,
        _both(LARGE, skip=True, into=True),
        ("outer sum", "copy"),
        _ratios,
    ),
    Goal("outer sum, into out", "M", {1: 1.1, 2: 1.2}, 0.9, _both(LARGE, into=True), ("outer sum", "copy"), _ratios),
    Goal(
        "kao_qkv forward with skip, into out",
        "M",
        {1: 2.6, 2: 3.2},
        1.75,
        _both(LARGE, skip=True, into=True),
        ("kao_qkv", "copy"),
        _ratios,
    ),
    Goal(
        "kao_qkv forward with skip, fresh output",
        "Ma",
        {1: 1.7, 2: 1.9},
        None,
        _both(LARGE, skip=True),
        ("kao_qkv", "fresh copy"),
        _ratios,
    ),
    Goal(
        "kao_qkv forward and backward with skip",
        "Ma",
        {1: 3.2, 2: 3.5},
        2.6,
        _both(LARGE, skip=True, backward=True),
        ("kao_qkv", "fresh copy"),
        _ratios,
    ),
    Goal(
        "extra memory of kao_qkv beyond 8 MB",
        "|X|",
        {1: 0.05},
        0.0,
        (*_both(LARGE, skip=True), *_both(LARGE, skip=True, backward=True)),
        ("kao_qkv",),
        partial(_extra, free=8e6),
        memory=True,
    ),
    Goal("forward against linear-SDPA-linear", "x its time", {1: 1.0}, 0.8, _both(ATTENDED), (*KAO, PLAIN), _ratios),
    Goal("extra memory forward", "|X|", {1: 0.08}, None, _both(ATTENDED), KAO, _extra, memory=True),
    Goal("additive against kao_kv", "x its time", {1: 1.3}, 1.1, _both(ATTENDED), ("additive", "kao_kv"), _ratios),
    Goal(
        "against axial by SDPA, order 2",
        "x as fast",
        {1: 1.3},
        5.0,
        _both(ATTENDED[:1]),
        (*KAO, AXIAL),
        _ratios,
        at_least=True,
    ),
    Goal(
        "against axial by SDPA, orders 3 and 4",
        "x as fast",
        {1: 3.0},
        5.0,
        _both(ATTENDED[1:]),
        (*KAO, AXIAL),
        _ratios,
        at_least=True,
    ),
    Goal(
        "training against linear-SDPA-linear",
        "x its time",
        {1: 1.2},
        None,
        _both(TRAINED, backward=True),
        (*KAO, PLAIN),
        _ratios,
    ),
    Goal("extra memory in training", "|X|", {1: 0.2}, None, _both(TRAINED, backward=True), KAO, _extra, memory=True),
    Goal(
        "kao_kv against flattened SDPA, 65 536 positions",
        "x as fast",
        {1: 100.0},
        None,
        _both((FLAT,)),
        ("kao_kv", FLAT_SDPA),
        _ratios,
        at_least=True,
    ),
    Goal(
        "kao_qkv against flattened SDPA, 65 536 positions",
        "x as fast",
        {1: 2000.0},
        None,
        _both((FLAT,)),
        ("kao_qkv", FLAT_SDPA),
        _ratios,
        at_least=True,
    ),
    Goal(
        "scaling exponent of kao_qkv, order 3", "", {1: 1.0}, None, _both(CUBES), ("kao_qkv", "fresh copy"), _exponents
    ),
    Goal(
        "scaling exponent of kao_kv, order 3", "", {1: 1.35}, None, _both(CUBES), ("kao_kv", "fresh copy"), _exponents
    ),
    Goal(
        "small input: kao_qkv more than plain operations",
        "µs",
        {1: 60.0},
        None,
        _both((Workload(1, (14, 14), 64),)),
        ("kao_qkv", "naive kao_qkv"),
        _overhead,
    ),
)
