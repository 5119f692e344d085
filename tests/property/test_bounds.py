"""The error bound where an adversary looks for a violation, and where the limit of how fast outputs move is attained.

That no drawn tensors violate them is among the laws that `verify` tries.
"""

from __future__ import annotations

import functools

import pytest
import torch

import tensorattn as ta

SLACK = 1e-9  # relative, for bounds
SCALE = 0.7  # of logits, where the limit of how fast outputs move is attained


def written_out(query, key, value, logs):
    """Errors of additive attention and their bounds, from the definitions, with gradients; the diameter is exact.

    Queries ``(L, D)``, keys ``(n_1, …, n_N, D)`` and values; logarithms of weights, one vector a mode.
    """
    order = len(logs)
    view = [[-1 if m == mode else 1 for m in range(order)] for mode in range(order)]
    vectors = [log.softmax(-1) for log in logs]
    uniform = [vector.reshape(*where, 1) for vector, where in zip(vectors, view, strict=True)]

    def average(tensor, kept):
        for mode, share in enumerate(uniform):
            tensor = tensor if mode in kept else (tensor * share).sum(mode, keepdim=True)
        return tensor

    def additive(tensor):
        return sum(average(tensor, (m,)) for m in range(order)) - (order - 1) * average(tensor, ())

    modes = tuple(range(1, order + 1))
    log_share = sum(vector.log().reshape(where) for vector, where in zip(vectors, view, strict=True))
    share = log_share.exp()
    residual = value - additive(value)
    tilt = torch.einsum("ld,...d->l...", query, key - additive(key))
    tilted = torch.einsum("ld,...d->l...", query, key) + log_share
    full = tilted.flatten(1).softmax(-1) @ value.flatten(0, -2)
    straight = (torch.einsum("ld,...d->l...", query, additive(key)) + log_share).flatten(1).softmax(-1)
    error = (full - straight @ (value - residual).flatten(0, -2)).norm(dim=-1)

    density = straight.reshape(tilt.shape) / share
    chi = [((density * share).sum([m for m in modes if m != mode + 1]) ** 2 / vectors[mode]).sum(-1) - 1
           for mode in range(order)]  # fmt: skip
    interaction = functools.reduce(torch.mul, (1 + x for x in chi)) - 1 - sum(chi)
    covariance = torch.einsum("...a,...b,...->ab", residual, residual, share)
    deviation = torch.linalg.matrix_norm(covariance, 2).sqrt()
    remainder = torch.minimum(residual.norm(dim=-1).max(), deviation * interaction.clamp(min=1e-30).sqrt())
    points = value.flatten(0, -2)
    diameter = (points[:, None] - points[None]).square().sum(-1).clamp(min=1e-30).sqrt().max()
    return error, diameter * ((tilt.amax(modes) - tilt.amin(modes)) / 4).tanh() + remainder


def ascend(sizes, dim, value_dim, seed, steps=25):
    """Tensors for which the error is as large a part of its bound as a few steps uphill make it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, dim), (*sizes, dim), (*sizes, value_dim), *((size,) for size in sizes)]
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    climber = torch.optim.Adam(leaves, lr=0.1, maximize=True)
    for _ in range(steps):
        climber.zero_grad()
        error, limit = written_out(*leaves[:3], leaves[3:])
        (error / limit).log().sum().backward()
        climber.step()
    return [leaf.detach() for leaf in leaves]


@pytest.mark.parametrize(
    ("sizes", "dim", "value_dim"),
    [((2, 2), 1, 1), ((2, 2), 2, 2), ((3, 2), 2, 1), ((2, 2, 2), 2, 2), ((4, 3), 3, 2), ((2, 2, 1, 2), 1, 1)],
    ids=str,
)
def test_the_error_bound_is_not_violated_where_an_adversary_looks_for_a_violation(sizes, dim, value_dim):
    """Queries, keys, values and weights move uphill along the gradient of the ratio of error and bound."""
    assert max(climb(ta.error_bound, sizes, dim, value_dim)) > 1.1  # it did look


def climb(error_bound, sizes, dim, value_dim):
    """Compare error, bound and its own formula before and after the climb; how far it went."""
    climbed = []
    for seed in range(2):
        before, after = (ascend(sizes, dim, value_dim, seed, steps) for steps in (0, 25))
        ratios = []
        for query, key, value, *logs in (before, after):
            given = {"order": len(sizes), "scale": 1.0, "weights": [log.exp() for log in logs]}
            error, limit = written_out(query, key, value, logs)
            bound = error_bound(query, key, value, oscillation="exact", **given)
            difference = ta.flattened_attention(query, key, value, **given) - ta.additive_attention(
                query, key, value, **given
            )
            assert torch.allclose(difference.norm(dim=-1), error, rtol=1e-9, atol=1e-13)
            assert (error <= limit * (1 + SLACK)).all() and (limit <= bound * (1 + SLACK)).all()
            if value_dim == 1:  # a range is known exactly
                assert torch.allclose(limit, bound, rtol=1e-9)
            ratios.append((error / limit).min())
        climbed.append(ratios[1] / ratios[0])
    return climbed


@pytest.mark.parametrize("factor", [0.999, 1.001, 0.0])
def test_the_adversary_would_find_a_violation(factor):
    with pytest.raises(AssertionError):
        climb(lambda *tensors, **given: factor * ta.error_bound(*tensors, **given), (2, 2), 1, 1)


def test_two_opposite_tokens_move_as_fast_as_the_limit():
    """One mode, keys and values 1 and -1: the output is tanh(s q), whose slope at zero is s = s/4 · 2 · 2."""
    token = torch.tensor([[1.0], [-1.0]]).double()
    query = torch.tensor([[-1e-3], [1e-3]], dtype=torch.float64)
    for operator in (ta.additive_attention, ta.kao_kv):
        change = operator(query, token, token, order=1, scale=SCALE).diff(dim=0)
        assert float(change.norm() / (SCALE * 2e-3)) == pytest.approx(1, abs=1e-6)
