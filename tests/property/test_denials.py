"""What an operator does not claim, it does not have: each denial has an example, and no claim is left unmade."""

from __future__ import annotations

import math

import pytest
import torch

import tensorattn as ta
from tensorattn.errors import OptionError
from tensorattn.functional import Claim
from tensorattn.testing import CLAIMED, Case, again
from tensorattn.testing.variants import Variant, variants

VARIANTS = variants()

# Held without being claimed, by chance: the pair holds the single mode, which is then not counted.
UNCLAIMED = {
    "truncated kept=((0,),(0,1))": {Claim.CONVEX},
    "clustered": set(Claim) - {Claim.INVISIBLE_INTERACTION},  # there are more tokens than positions
    "clustered cells=blocks tokens=4 additive_control=True": {Claim.LOG_SUM_EXP},  # on additive data
}


def written(*shape, step):
    """Numbers without any structure, the same everywhere."""
    return torch.sin(step * torch.arange(1.0, 1 + math.prod(shape), dtype=torch.float64).square()).reshape(shape)


def additive(*sizes, step):
    """A sum of one term a mode."""
    return ta.outer_sum([written(size, 2, step=step + mode) for mode, size in enumerate(sizes)])


SIZES = (2, 3, 2)
ANY = Case(*(2 * written(*SIZES, 2, step=step) for step in (1.3, 1.5, 1.7)), 3, 1.0)
ADDITIVE = ANY.replace(key=additive(*SIZES, step=1.5), value=additive(*SIZES, step=1.7))
ANYTHING = torch.Generator  # stands for a source of random numbers: what is made of them does not matter

# The one case on which every operator that does not claim a property is seen not to have it, and what its law draws.
EXAMPLES = {
    Claim.EXACT: (ANY, []),
    Claim.EXACT_ON_ADDITIVE: (ADDITIVE, []),
    Claim.KEY_SHIFT: (ANY, [ANYTHING]),
    Claim.VALUE_AFFINE: (ANY, [ANYTHING, 2]),
    Claim.ROTATION: (ANY, [ANYTHING]),
    Claim.FIRST_ORDER: (ANY, [ANYTHING]),
    Claim.CONSTANT_MODE: (ANY, [0, 3, None]),
    Claim.REFINEMENT: (ANY, [1, 2]),
    Claim.INVISIBLE_INTERACTION: (ANY, [ANYTHING]),
    Claim.CONVEX: (ANY, [100.0]),
    Claim.ZERO_SCALE_MEAN: (ANY, []),
    Claim.LOG_SUM_EXP: (ADDITIVE, [1, torch.ones(1, 2).double(), torch.ones(1, 2).double()]),
}


def claims(variant):
    return variant.operator.claims(**variant.operator.with_defaults(variant.options))


def denied(variant):
    return [claim for claim in Claim if claim not in claims(variant) | UNCLAIMED.get(str(variant), set())]


def attempt(variant, claim):
    """Try the law of a claim on its example."""
    case, drawn = EXAMPLES[claim]
    answers = [torch.Generator().manual_seed(1) if answer is ANYTHING else answer for answer in drawn]
    case = case.replace(on_grid=True, pooled=variant.options.get("pool") == "sum")
    again(CLAIMED[claim], case, answers, variant.name, **variant.options)


DENIED = [(variant, claim) for variant in VARIANTS for claim in denied(variant)]
CLAIMED_PAIRS = [(variant, claim) for variant in VARIANTS for claim in Claim if claim in claims(variant)]


@pytest.mark.parametrize(("variant", "claim"), DENIED, ids=[f"{v}: {claim.name}" for v, claim in DENIED])
def test_what_is_not_claimed_fails_on_a_fixed_example(variant, claim):
    raised = (AssertionError, OptionError) if claim is Claim.LOG_SUM_EXP else AssertionError  # some have none at all
    with pytest.raises(raised):
        attempt(variant, claim)


@pytest.mark.parametrize(("variant", "claim"), CLAIMED_PAIRS, ids=[f"{v}: {claim.name}" for v, claim in CLAIMED_PAIRS])
def test_what_is_claimed_holds_on_the_same_example(variant, claim):
    attempt(variant, claim)


@pytest.mark.parametrize(("variant", "claims"), UNCLAIMED.items(), ids=list(UNCLAIMED))
def test_what_holds_by_chance_holds(variant, claims):
    (found,) = (known for known in VARIANTS if str(known) == variant)
    for claim in claims:
        attempt(found, claim)


def test_every_claim_has_an_example():
    assert set(EXAMPLES) == set(Claim)


# The examples of the theory.


def column(*rows):
    return torch.tensor(rows, dtype=torch.float64).unsqueeze(-1)


def test_additive_attention_leaves_the_range_of_the_values():
    """Values 1, 1, 1, 0 and keys that lead to the largest mean of each mode give 1 + 1 - 3/4 = 1.25."""
    value = column([1.0, 1.0], [1.0, 0.0])
    output = ta.additive_attention(torch.tensor([1.0]).double(), value, value, order=2, scale=1e4)
    assert output.item() == pytest.approx(1.25, abs=1e-12)
    assert ta.kao_kv(torch.tensor([1.0]).double(), value, value, order=2, scale=1e4).item() == pytest.approx(1.0)


def test_a_mode_of_size_one_changes_the_joint_softmax():
    """It adds a token, the mean, with the weight of all others: at rows 0 and 1 and logits 0 and 1 it is 1/2."""
    value = column([0.0, 1.0]).squeeze(0)
    query = torch.tensor([1.0]).double()
    alone = ta.kao_kv(query, value, value, order=1, scale=1.0).item()
    with_one_more = ta.kao_kv(query, value.unsqueeze(0), value.unsqueeze(0), order=2, scale=1.0).item()
    e = torch.e
    assert alone == pytest.approx(e / (1 + e), abs=1e-12)
    assert with_one_more == pytest.approx((e + 0.5 * e**0.5) / (1 + e + e**0.5), abs=1e-12)
    kept = [
        ta.additive_attention(query, v, v, order=v.dim() - 1, scale=1.0).item() for v in (value, value.unsqueeze(0))
    ]
    assert kept == pytest.approx([alone, alone], abs=1e-12)


def test_repeating_one_mode_changes_the_joint_softmax_and_repeating_all_does_not():
    value, query = column([0.0, 2.0], [1.0, 5.0]), torch.tensor([1.0]).double()
    plain = ta.kao_kv(query, value, value, order=2, scale=1.0)
    one, both = value.repeat_interleave(2, 0), value.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert (ta.kao_kv(query, one, one, order=2, scale=1.0) - plain).abs() > 0.01
    torch.testing.assert_close(ta.kao_kv(query, both, both, order=2, scale=1.0), plain, rtol=0, atol=1e-14)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_outer_sums_as_published_count_the_mean_once_a_mode(order):
    generator = torch.Generator().manual_seed(order)
    q, k, v = torch.randn(3, *[3] * order, 4, dtype=torch.float64, generator=generator).unbind()
    mean = v.flatten(0, -2).mean(0).expand_as(q)
    published, centered = (ta.kao_qkv(q, k, v, order=order, scale=0.0, centered=c) for c in (False, True))
    torch.testing.assert_close(published, order * mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(centered, mean, rtol=0, atol=1e-14)


def test_the_joint_softmax_damps_additive_data_about_as_often_as_there_are_modes():
    """At small logits the deviation from the mean is 1/N of that of full attention, for modes of equal size."""
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(2, 2, 8, 4, dtype=torch.float64, generator=generator)
    k, v = (rows.unsqueeze(1) + columns for rows, columns in terms)
    q = torch.randn(64, 4, dtype=torch.float64, generator=generator)
    mean = v.flatten(0, 1).mean(0)
    joint, full = (f(q, k, v, order=2, scale=1e-4) - mean for f in (ta.kao_kv, ta.flattened_attention))
    torch.testing.assert_close(joint, full / 2, rtol=1e-2, atol=1e-7)


def test_full_attention_sees_interactions_and_averages_do_not():
    """Exclusive or: every average is zero, so operators on averages return zero; full attention does not."""
    tensor, query = column([1.0, -1.0], [-1.0, 1.0]), torch.tensor([1.0]).double()
    assert ta.additive_attention(query, tensor, tensor, order=2, scale=1.0).item() == 0.0
    assert ta.kao_kv(query, tensor, tensor, order=2, scale=1.0).item() == 0.0
    expected = torch.tanh(torch.tensor(1.0)).item()
    assert ta.flattened_attention(query, tensor, tensor, order=2, scale=1.0).item() == pytest.approx(expected)


def test_the_joint_softmax_lets_a_long_mode_drown_a_short_one():
    """To first order mode m counts n_m / S: of 4 and 64 indices, the short mode keeps 1/17 of its effect."""
    rows = torch.randn(4, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tensor, query = rows.expand(4, 64, 3), torch.randn(3, generator=torch.Generator().manual_seed(1)).double()
    mean = rows.mean((0, 1))
    joint, full = (f(query, tensor, tensor, order=2, scale=1e-5) - mean for f in (ta.kao_kv, ta.flattened_attention))
    torch.testing.assert_close(joint / full, torch.full((3,), 4 / 68).double(), rtol=1e-3, atol=0)


def test_averaged_queries_are_not_exact_on_all_additive_tensors():
    """Keys and values 1 and -1 along one mode, queries ±.8 ±.8: 2 tanh .8 - tanh 1.6 = .41 too much."""
    token = column([1.0, 1.0], [-1.0, -1.0])
    query = 0.8 * column([2.0, 0.0], [0.0, -2.0])
    how = {"order": 2, "scale": 1.0}
    error = ta.kao_qkv(query, token, token, centered=True, **how) - ta.flattened_attention(query, token, token, **how)
    expected = 2 * math.tanh(0.8) - math.tanh(1.6)
    assert error.abs().max().item() == pytest.approx(expected, abs=1e-12)
    assert round(expected, 2) == 0.41


PLAIN = Variant("additive", {})
SEEING = [
    Variant("flattened", {}),
    Variant("kronecker_product", {}),
    Variant("kronecker_sum", {}),
    Variant("additive", {"interaction": "linear"}),
]


def square(*sizes):
    """Queries, keys and values on a grid with more channels than modes have effects, and how they are attended to."""
    tensors = [written(*sizes, 8, step=step) for step in (1.3, 1.5, 1.7)]
    return tensors, {"order": len(sizes), "scale": 1.0}


def excess_rank(variant):
    """Singular value of the outputs, less the mean value, that follows those of as many effects as modes have."""
    (query, key, value), how = square(3, 3)
    output = variant.function(query, key, value, **how)
    deviation = (output - value.mean((0, 1))).flatten(0, 1)
    return torch.linalg.svdvals(deviation)[4].item()


def gradient_interaction(variant):
    """Largest interaction in the gradient of the values and of the keys."""
    (query, key, value), how = square(2, 3)
    leaves = [key.requires_grad_(), value.requires_grad_()]
    output = variant.function(query, key, value, **how)
    cotangent = written(*output.shape, step=1.9)
    gradients = torch.autograd.grad(output, leaves, cotangent)
    return max(ta.interaction_residual(gradient, order=2).abs().max().item() for gradient in gradients)


@pytest.mark.parametrize("measure", [excess_rank, gradient_interaction], ids=lambda f: f.__name__)
def test_what_sees_interactions_has_a_larger_rank_and_gradients_with_interactions(measure):
    assert measure(PLAIN) < 1e-14
    for variant in SEEING:
        assert measure(variant) > 1e-3, variant
