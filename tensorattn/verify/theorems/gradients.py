"""Gradients: what averages cannot see gets none, mass is kept, layers learn as in full attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tensorattn.nn import TensorAttention
from tensorattn.operators.additive import additive_attention
from tensorattn.operators.flattened import flattened_attention
from tensorattn.operators.kao_kv import kao_kv
from tensorattn.testing import Case, Subject, additive_tensors, allowed
from tensorattn.testing.drawing import generators, numbers
from tensorattn.testing.tolerances import exact, largest
from tensorattn.verify.means import residual
from tensorattn.verify.statement import Statement, called, drawn_cases, st

__all__ = ["STATEMENTS"]


def additive_gradients(subject: Subject, case: Case, draw: Any) -> None:
    """The gradient of keys and of values is a sum of one term a mode; without weights, since they weigh it too."""
    cotangent = _cotangent(case, draw)
    for function in (additive_attention, kao_kv):
        _, *gradients = _gradients(function, case, cotangent)
        for name, gradient in zip(("keys", "values"), gradients, strict=True):
            rest = residual(gradient, case)
            tolerance = 2 * case.order * allowed("average", case.dtype, magnitude=largest(gradient))
            statement = f"the gradient that {function.__name__} gives the {name} must be additive"
            subject.expect_close(rest, torch.zeros_like(rest), tolerance, statement, case, size=largest(gradient))


def mass(subject: Subject, case: Case, draw: Any) -> None:
    """Over all positions, gradients of the keys add up to zero, and those of the values to that of the output."""
    cotangent = _cotangent(case, draw)
    modes = [len(case.batch) + mode for mode in range(case.order)]
    places = [len(case.batch) + place for place in range(len(case.positions))]
    arriving = exact(cotangent).sum(places) if places else exact(cotangent)
    size = _arriving(cotangent, case) * case.order
    for function in (additive_attention, kao_kv, flattened_attention):
        _, of_keys, of_values = (exact(gradient) for gradient in _gradients(function, case, cotangent))
        tolerance = allowed("gradient", case.dtype, logit=case.logit, magnitude=size * (1 + case.magnitude))
        statement = f"the gradients that {function.__name__} gives the values must add up to that of its output"
        subject.expect_close(of_values.sum(modes), arriving, tolerance, statement, case)
        tolerance *= max(1.0, abs(case.factor) * largest(case.query))
        total = of_keys.sum(modes)
        statement = f"the gradients that {function.__name__} gives the keys must add up to zero"
        subject.expect_close(total, torch.zeros_like(total), tolerance, statement, case, size=largest(of_keys))


def projected_gradients(subject: Subject, case: Case, draw: Any) -> None:
    """On additive data the gradient of the query is that of full attention, of keys and values its additive part."""
    cotangent = _cotangent(case, draw)
    query, *ours = _gradients(additive_attention, case, cotangent)
    full_query, *theirs = _gradients(flattened_attention, case, cotangent)
    reach = 1 + abs(case.factor) * (largest(case.query) + largest(case.key))
    size = _arriving(cotangent, case) * reach * (1 + case.magnitude)
    tolerance = allowed("gradient", case.dtype, logit=case.logit, magnitude=size)
    statement = "on additive data the gradient of the query must be that of full attention"
    subject.expect_close(query, full_query, tolerance, statement, case)
    for left, right in zip(ours, theirs, strict=True):
        statement = "on additive data gradients of keys and values must be the additive part of those of full attention"
        subject.expect_close(left, exact(right) - residual(right, case), tolerance, statement, case)


def layers(subject: Subject, case: Case, draw: Any) -> None:
    """Self-attention of an additive input with heads and biased projections: outputs, gradients of parameters.

    The gradient of the input is that of full attention along additive tensors, which its slice means are.
    """
    heads, generator = draw(st.integers(1, 3)), draw(generators(7))
    channels = heads * draw(st.integers(1, 3))
    batch = (math.prod(case.batch),)
    channels_first = draw(st.booleans())
    x = draw(additive_tensors(case.sizes, batch=batch, dim=channels, stream=8))
    weights = None if case.weights is None else [_one_batch(case, mode) for mode in range(case.order)]
    made: list[TensorAttention] = []
    for name in ("additive", "flattened"):
        how: dict[str, Any] = {"operator": name, "channels_first": channels_first, "dtype": torch.float64}
        made.append(TensorAttention(channels, heads, modes=case.order, **how))
    with torch.no_grad():
        for parameter in made[0].parameters():
            parameter.copy_(numbers(generator, parameter.shape) / math.sqrt(channels))
    made[1].load_state_dict(made[0].state_dict())
    q, k, v = (getattr(made[0], name)(x).detach() for name in ("q_proj", "k_proj", "v_proj"))
    logit = largest(q.norm(dim=-1)) * largest(k.norm(dim=-1))
    size = (1 + channels * largest(*made[0].parameters())) ** 2 * (1 + largest(v)) * (1 + largest(x))
    leaves = [(x.movedim(-1, 1) if channels_first else x).detach().clone().requires_grad_() for _ in made]
    ours, full = outputs = [layer(leaf, weights=weights) for layer, leaf in zip(made, leaves, strict=True)]
    tolerance = case.order * allowed("output", torch.float64, logit=logit, magnitude=size)
    subject.expect_close(ours, full, tolerance, "a layer on an additive input must be full self-attention", case)
    cotangent = numbers(generator, full.shape)
    for output in outputs:
        output.backward(cotangent)
    size *= 1 + max(largest(leaf.grad) for leaf in (*made[1].parameters(), leaves[1]) if leaf.grad is not None)
    tolerance = case.order * allowed("gradient", torch.float64, logit=logit, magnitude=size)
    for (name, parameter), other in zip(made[0].named_parameters(), made[1].parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None
        statement = f"on an additive input the gradient of {name} must be that of full attention"
        subject.expect_close(parameter.grad, other.grad, tolerance, statement, case)
    axes = [mode + (2 if channels_first else 1) for mode in range(case.order)]
    for mode, axis in enumerate(axes):
        others = [other for other in axes if other != axis]
        left, right = (leaf.grad.sum(others) if others else leaf.grad for leaf in leaves if leaf.grad is not None)
        statement = f"on an additive input the gradient of the effect of mode {mode} must be that of full attention"
        subject.expect_close(left, right, tolerance * math.prod(case.sizes), statement, case)


def _one_batch(case: Case, mode: int) -> Tensor:
    """The weights of a mode with all batch dimensions in one."""
    return case.mode_weights(mode).reshape(math.prod(case.batch), case.sizes[mode])


def _cotangent(case: Case, draw: Any) -> Tensor:
    """The gradient that arrives at the output."""
    shape = (*case.query.shape[:-1], case.value.shape[-1])
    return numbers(draw(generators(5)), shape, case.dtype).to(case.value.device)


def _arriving(cotangent: Tensor, case: Case) -> float:
    """The most that arrives at the outputs of a batch entry: gradients of keys and values are sums over its queries."""
    return float(exact(cotangent).abs().flatten(len(case.batch)).sum(-1).max())


def _gradients(function: Any, case: Case, cotangent: Tensor) -> tuple[Tensor, ...]:
    """Gradients of query, key and value."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (case.query, case.key, case.value)]
    output = called(function, case.replace(query=leaves[0], key=leaves[1], value=leaves[2]))
    return torch.autograd.grad(output, leaves, cotangent)


STATEMENTS = (
    Statement(
        "gradients of keys and values through averages are additive, whatever the data",
        "R(∂L/∂k) = R(∂L/∂v) = 0",
        additive_gradients,
        drawn_cases(weighted=False),
    ),
    Statement(
        "gradients keep mass: of keys they add up to zero, of values to that of the output",
        "Σ_j ∂L/∂k_j = 0, Σ_j ∂L/∂v_j = Σ_i ∂L/∂O_i",
        mass,
        drawn_cases(),
    ),
    Statement(
        "on additive data gradients are those of full attention, less interactions of keys and values",
        "∂A/∂q = ∂F/∂q, ∂A/∂k = (1 − R) ∂F/∂k",
        projected_gradients,
        drawn_cases(additive=True, weighted=False),
    ),
    Statement(
        "on an additive input a layer is full self-attention, and so are the gradients of its parameters",
        "∂A/∂W = ∂F/∂W for W_q, W_k, W_v, W_o and biases",
        layers,
        drawn_cases(dtype=torch.float64, max_positions=24),
        double=True,
    ),
)
