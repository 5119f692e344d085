"""Gradients: what the averages let through, and when they are those of full attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tensorattn.testing.check import Comparison, Comparisons, Draw, law
from tensorattn.testing.strategies import Case, additive_tensors, allowed, exact, generators, largest, numbers, rows
from tensorattn.testing.theorems.common import called, residual_of, vanishes

__all__ = ["additive_gradients", "layers", "mass", "projected_gradients"]


def _gradients(function: Callable[..., Any], case: Case, cotangent: Tensor) -> tuple[Tensor, ...]:
    """Gradients of query, key and value."""
    query, key, value = leaves = [t.detach().clone().requires_grad_() for t in (case.query, case.key, case.value)]
    output = called(function, case.replace(query=query, key=key, value=value))
    return torch.autograd.grad(output, leaves, cotangent)


def _arriving(case: Case, draw: Draw) -> tuple[Tensor, float]:
    """The gradient that arrives at the output, and the most that does at those of a batch entry."""
    shape = (*case.query.shape[:-1], case.value.shape[-1])
    cotangent = numbers(draw(generators(5)), shape, case.dtype).to(case.value.device)
    return cotangent, float(exact(cotangent).abs().flatten(len(case.batch)).sum(-1).max())


@law("gradients of keys and values through averages are additive, whatever the data", "R(∂L/∂k) = R(∂L/∂v) = 0",
     weighted=False)  # fmt: skip
def additive_gradients(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """The gradient of keys and of values is a sum of one term a mode; without weights, since they weigh it too."""
    cotangent, _ = _arriving(case, draw)
    for function in ("additive_attention", "kao_kv"):
        _, *gradients = _gradients(getattr(ta, function), case, cotangent)
        for name, gradient in zip(("keys", "values"), gradients, strict=True):
            tolerance = 2 * case.order * allowed("average", case.dtype, magnitude=largest(gradient))
            told = f"the gradient that {function} gives the {name} must be additive"
            yield vanishes(told, residual_of(gradient, case), tolerance, largest(gradient))


@law("gradients keep mass: of keys they add up to zero, of values to that of the output",
     "Σ_j ∂L/∂k_j = 0, Σ_j ∂L/∂v_j = Σ_i ∂L/∂O_i")  # fmt: skip
def mass(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Over all positions, gradients of the keys add up to zero, and those of the values to that of the output."""
    cotangent, size = _arriving(case, draw)
    batch = len(case.batch)
    modes, arriving = range(batch, batch + case.order), rows(exact(cotangent), batch).sum(-2)
    magnitude = size * case.order * (1 + case.magnitude)
    for name in ("additive_attention", "kao_kv", "clustered_attention", "flattened_attention"):
        attention = getattr(ta, name)
        attention = functools.partial(attention, tokens=3) if name == "clustered_attention" else attention
        _, of_keys, of_values = (exact(gradient) for gradient in _gradients(attention, case, cotangent))
        tolerance = allowed("gradient", case.dtype, logit=case.logit, magnitude=magnitude)
        told = f"the gradients that {name} gives the values must add up to that of its output"
        yield Comparison(told, of_values.sum([*modes]), arriving, tolerance)
        tolerance *= max(1.0, abs(case.factor) * largest(case.query))
        told = f"the gradients that {name} gives the keys must add up to zero"
        yield vanishes(told, of_keys.sum([*modes]), tolerance, largest(of_keys))


@law("on additive data gradients are those of full attention, less interactions of keys and values",
     "∂A/∂q = ∂F/∂q, ∂A/∂k = (1 − R) ∂F/∂k", additive=True, weighted=False)  # fmt: skip
def projected_gradients(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """On additive data the gradient of the query is that of full attention, of keys and values its additive part."""
    cotangent, size = _arriving(case, draw)
    query, *ours = _gradients(ta.additive_attention, case, cotangent)
    full_query, *theirs = _gradients(ta.flattened_attention, case, cotangent)
    size *= (1 + abs(case.factor) * (largest(case.query) + largest(case.key))) * (1 + case.magnitude)
    tolerance = allowed("gradient", case.dtype, logit=case.logit, magnitude=size)
    told = "on additive data the gradient of the query must be that of full attention"
    yield Comparison(told, query, full_query, tolerance)
    for left, right in zip(ours, theirs, strict=True):
        told = "on additive data gradients of keys and values must be the additive part of those of full attention"
        yield Comparison(told, left, exact(right) - residual_of(right, case), tolerance)


@law("on an additive input a layer is full self-attention, and so are the gradients of its parameters",
     "∂A/∂W = ∂F/∂W for W_q, W_k, W_v, W_o and biases",
     double=True, dtype=torch.float64, max_positions=24)  # fmt: skip
def layers(ta: Any, case: Case, draw: Draw) -> Comparisons:
    """Self-attention of an additive input with heads and biased projections: outputs, gradients of parameters.

    The gradient of the input is that of full attention along additive tensors, which its slice means are.
    """
    heads, generator = draw(st.integers(1, 3)), draw(generators(7))
    channels, first = heads * draw(st.integers(1, 3)), draw(st.booleans())
    x = draw(additive_tensors(case.sizes, batch=(math.prod(case.batch),), dim=channels, stream=8))
    given = case.all_weights()
    given = None if given is None else [w.reshape(-1, w.shape[-1]) for w in given]
    how: dict[str, Any] = {"modes": case.order, "channels_first": first, "dtype": torch.float64}
    made = [ta.TensorAttention(channels, heads, operator=name, **how) for name in ("additive", "flattened")]
    with torch.no_grad():
        for parameter in made[0].parameters():
            parameter.copy_(numbers(generator, parameter.shape) / math.sqrt(channels))
    made[1].load_state_dict(made[0].state_dict())
    q, k, v = (getattr(made[0], name)(x).detach() for name in ("q_proj", "k_proj", "v_proj"))
    logit = largest(q.norm(dim=-1)) * largest(k.norm(dim=-1))
    size = (1 + channels * largest(*made[0].parameters())) ** 2 * (1 + largest(v)) * (1 + largest(x))
    leaves = [(x.movedim(-1, 1) if first else x).detach().clone().requires_grad_() for _ in made]
    ours, full = outputs = [module(leaf, weights=given) for module, leaf in zip(made, leaves, strict=True)]
    tolerance = case.order * allowed("output", torch.float64, logit=logit, magnitude=size)
    yield Comparison("a layer on an additive input must be full self-attention", ours, full, tolerance)
    cotangent = numbers(generator, full.shape)
    for output in outputs:
        output.backward(cotangent)
    size *= 1 + max(largest(leaf.grad) for leaf in (*made[1].parameters(), leaves[1]) if leaf.grad is not None)
    tolerance = case.order * allowed("gradient", torch.float64, logit=logit, magnitude=size)
    for (name, parameter), other in zip(made[0].named_parameters(), made[1].parameters(), strict=True):
        told = f"on an additive input the gradient of {name} must be that of full attention"
        yield Comparison(told, parameter.grad, other.grad, tolerance)
    axes = [mode + (2 if first else 1) for mode in range(case.order)]
    for mode, axis in enumerate(axes):
        others = [other for other in axes if other != axis]
        left, right = (leaf.grad.sum(others) if others else leaf.grad for leaf in leaves if leaf.grad is not None)
        told = f"on an additive input the gradient of the effect of mode {mode} must be that of full attention"
        yield Comparison(told, left, right, tolerance * math.prod(case.sizes))
