"""Clustered attention: where it is exact, what its search meets, and how it adds up."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tensorattn.testing.check import Comparison, Comparisons, Draw, law
from tensorattn.testing.laws import full_attention
from tensorattn.testing.strategies import Case, allowed, exact, generators, largest, masks, numbers
from tensorattn.testing.theorems.common import called, only_case

__all__ = ["all_columns", "cropping", "distinct_keys", "large_cells"]

WIDE_GRID = (1024, 64)  # more positions than are searched for two tokens, and rows as long as a stride would be
LARGE_GRID = (512, 512)  # so many positions in a cell that plain sums in single precision lose digits
FAR = 100.0  # how far from zero what is added up lies, in units of what it varies by
SUMMED = 4  # units of the type by which a mean over many positions may err, in units of what is added up


@law("clustered attention is exact with a token for each distinct key, whatever the values",
     "n ≥ |{k_j}|: O = F, LSE = LSE_F", max_positions=40, empty=True)  # fmt: skip
def distinct_keys(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Keys take a few values that are spread over the grid at random."""
    generator, distinct = draw(generators(9)), draw(st.integers(1, 6))
    kinds = numbers(generator, (*case.batch, distinct, case.key.shape[-1]))
    which = torch.randint(distinct, case.key.shape[:-1], generator=generator)
    index = which.flatten(len(case.batch)).unsqueeze(-1).expand(*case.batch, -1, kinds.shape[-1])
    key = kinds.gather(-2, index).reshape(case.key.shape).to(case.key)
    case = case.replace(key=key, scale=min(abs(case.factor), 1.0))
    output, lse, *_ = called(ta.clustered_attention, case, tokens=distinct, return_lse=True)
    expected, expected_lse = full_attention(case)
    told = f"with {distinct} tokens for as many distinct keys clustered attention must"
    yield Comparison(f"{told} equal full attention", output, expected, case.allowed())
    yield Comparison(f"{told} have its log-sum-exp", lse, expected_lse, case.allowed_lse)


@law("any mask crops what clustered attention sees, whatever stands in absent positions",
     "O(x; mask) = O(x_j, mask_j = 1)", weighted=False, max_positions=40)  # fmt: skip
def cropping(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """A mask over the grid that is no product of modes, against what it leaves as a row of positions."""
    mask = draw(masks(case.sizes, batch=case.batch, device=case.key.device)).expand(case.key.shape[:-1])
    tokens, on_grid = draw(st.integers(1, 4)), case.positions == case.sizes
    key, value = (tensor.masked_fill(~mask.unsqueeze(-1), math.nan) for tensor in (case.key, case.value))
    found = called(ta.clustered_attention, case.replace(key=key, value=value), tokens=tokens, mask=mask)
    for entry in map(tuple, torch.ones(case.batch).nonzero().tolist()):
        there = mask[entry]
        if there.any():
            asking = there if on_grid else slice(None)  # absent queries have no part in the metric
            left = (case.query[entry][asking], case.key[entry][there], case.value[entry][there])
            row = ta.clustered_attention(*left, order=1, scale=case.scale, tokens=tokens)
            told = "what a mask leaves out must be as if it were not there"
            yield Comparison(told, found[entry][asking], exact(row), case.allowed(case.magnitude))


@law("the search meets all columns of a grid whose rows are as long as a stride through it would be",
     "k[i, j] = a_(j mod 2): O = F for n = 2, P = 2¹⁶ > 64·32", strategy=only_case, once=True)  # fmt: skip
def all_columns(ta: Any, case: tuple[int, torch.dtype, Any], draw: Draw) -> Comparisons:
    """Two kinds of columns that alternate: candidates that are all of one column would show one kind of key only."""
    seed, dtype, device = case
    generator = torch.Generator().manual_seed(seed)
    parity = torch.arange(WIDE_GRID[1]) % 2
    key = numbers(generator, (2, 4))[parity].expand(*WIDE_GRID, 4).to(device, dtype)
    value = (numbers(generator, (2, 2))[parity] + numbers(generator, (*WIDE_GRID, 2))).to(device, dtype)
    query = numbers(generator, (8, 4)).to(device, dtype)
    output = ta.clustered_attention(query, key, value, order=2, tokens=2)
    expected = ta.flattened_attention(exact(query), exact(key), exact(value), order=2)
    told = "with two tokens for two kinds of columns clustered attention must equal full attention"
    yield Comparison(told, output, expected, allowed("output", dtype, magnitude=largest(value)))


@law("means of many positions are as exact in single precision as those of few",
     "s = 0: |O − v̄| ≤ 4 ε |v|, P = 2¹⁸", strategy=only_case, once=True)  # fmt: skip
def large_cells(ta: Any, case: tuple[int, torch.dtype, Any], draw: Draw) -> Comparisons:
    """All positions of a large grid in one block, far from zero, in single precision."""
    seed, _, device = case
    generator = torch.Generator().manual_seed(seed)
    value = (FAR + numbers(generator, (*LARGE_GRID, 2))).float().to(device)
    key, query = numbers(generator, (*LARGE_GRID, 2)).float().to(device), numbers(generator, (4, 2)).float().to(device)
    output = ta.clustered_attention(query, key, value, order=2, cells="blocks", blocks=(1, 1), scale=0.0)
    mean: Tensor = exact(value).mean((0, 1))
    told = "the mean of a large block must be that of its positions"
    size = torch.finfo(torch.float32).eps * FAR
    yield Comparison(told, output, mean.expand(output.shape), SUMMED * size, FAR)
