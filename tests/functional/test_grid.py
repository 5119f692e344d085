"""Attention to a grid behind prefix tokens, against full attention, against softmaxes written out, and by its rules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from grids import close
from modules import draw, refused

import tensorattn as ta
from tensorattn.errors import DtypeError, OptionError, ShapeError
from tensorattn.functional.grid import joins_prefix

GRID, PREFIX = (3, 4, 2), 3
P = math.prod(GRID)
JOINED = ("additive", "truncated", "kao_kv", "clustered", "flattened")
APART = ("axial", "kronecker_product", "kronecker_sum", "kao_qkv")


def tensors(heads=4, kv_heads=4, length=PREFIX + P, dim=6, dim_v=5, seed=0):
    return (
        draw(2, heads, length, dim, seed=seed),
        draw(2, kv_heads, length, dim, seed=seed + 1),
        draw(2, kv_heads, length, dim_v, seed=seed + 2),
    )


def attend(operator, q, k, v, **options):
    return ta.grid_attention(q, k, v, **{"grid": GRID, "prefix": PREFIX, **options}, operator=operator)


def some_mask(length, seed=9):
    return draw(2, length, seed=seed) > -0.5


def test_every_operator_has_a_rule():
    assert {*JOINED, *APART} == set(ta.OPERATORS)
    assert {name: joins_prefix(each) for name, each in ta.OPERATORS.items()} == {
        **dict.fromkeys(JOINED, True),
        **dict.fromkeys(APART, False),
    }


@pytest.mark.parametrize("prefix", [0, 1, PREFIX])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [None, "all", "grid"])
def test_flattened_is_full_attention(prefix, kv_heads, masked):
    q, k, v = tensors(kv_heads=kv_heads, length=prefix + P)
    mask, whole = None, None
    if masked:
        mask = some_mask(prefix + P)
        mask, whole = (mask, mask) if masked == "all" else (mask[:, prefix:], mask.clone())
        whole[:, :prefix] |= masked == "grid"
        whole = whole[:, None, None]
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=whole, scale=0.7, enable_gqa=True)
    close(attend("flattened", q, k, v, prefix=prefix, scale=0.7, key_mask=mask), exact)


@pytest.mark.parametrize("operator", sorted(ta.OPERATORS))
def test_without_a_prefix_it_is_the_operator_alone(operator):
    q, k, v = tensors(length=P)
    mask = some_mask(P)
    over = [each.unflatten(2, GRID) for each in (q, k, v)]
    function = ta.get_operator(operator).function
    alone = function(*over, order=3, scale=0.9, mask=mask.unflatten(1, GRID).unsqueeze(1))
    close(attend(operator, q, k, v, prefix=0, scale=0.9, key_mask=mask), alone.flatten(2, 4))


@pytest.mark.parametrize("operator", sorted(ta.OPERATORS))
@pytest.mark.parametrize("masked", [False, True])
def test_queries_of_the_prefix_have_full_attention(operator, masked):
    q, k, v = tensors()
    mask = some_mask(PREFIX + P) if masked else None
    exact = F.scaled_dot_product_attention(q[:, :, :PREFIX], k, v, attn_mask=mask[:, None, None] if masked else None)
    close(attend(operator, q, k, v, key_mask=mask)[:, :, :PREFIX], exact)


@pytest.mark.parametrize("operator", APART)
def test_where_no_softmaxes_join_the_grid_sees_the_grid(operator):
    q, k, v = tensors()
    behind = [each[:, :, PREFIX:] for each in (q, k, v)]
    close(attend(operator, q, k, v)[:, :, PREFIX:], attend(operator, *behind, prefix=0))


@pytest.mark.parametrize("operator", ["additive", "truncated", "kao_kv", "clustered"])
@pytest.mark.parametrize("masked", [False, True])
def test_at_scale_zero_every_token_weighs_once(operator, masked):
    q, k, v = tensors()
    mask = torch.ones(2, PREFIX + P, dtype=torch.bool)
    if masked:  # a product over modes: of others the averages are not those of the positions
        mask[:, 1] = False
        mask[:, PREFIX:].view(2, *GRID)[:, :, 2] = False
        mask[1, PREFIX:].view(GRID)[0] = False
    mean = (v * mask[:, None, :, None]).sum(2, keepdim=True) / mask.sum(1)[:, None, None, None]
    close(attend(operator, q, k, v, scale=0.0, key_mask=mask if masked else None), mean.expand(-1, -1, PREFIX + P, -1))


def test_the_averages_of_kao_kv_weigh_as_many_as_positions():
    q, k, v = tensors()
    keys, values = (
        torch.cat([each[:, :, :PREFIX], *ta.mode_averages(each[:, :, PREFIX:].unflatten(2, GRID), order=3)], 2)
        for each in (k, v)
    )
    weight = torch.zeros(keys.shape[2], dtype=q.dtype)
    weight[PREFIX:] = math.log(P / sum(GRID))
    found = F.scaled_dot_product_attention(q[:, :, PREFIX:], keys, values, attn_mask=weight.expand(P, -1))
    close(attend("kao_kv", q, k, v)[:, :, PREFIX:], found)


def test_a_mask_that_is_no_product_weighs_the_positions_present():
    q, k, v = tensors()
    mask = some_mask(PREFIX + P)
    share = attend(
        "kao_kv",
        q,
        k,
        torch.cat([torch.ones_like(v[:, :, :PREFIX]), 0 * v[:, :, PREFIX:]], 2),
        scale=0.0,
        key_mask=mask,
    )
    exact = (mask[:, :PREFIX].sum(1) / mask.sum(1)).to(v.dtype)[:, None, None, None].expand(2, 4, P, 5)
    torch.testing.assert_close(share[:, :, PREFIX:], exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_as_many_cells_as_keys_are_full_attention(masked):
    q, k, v = tensors()
    mask = some_mask(PREFIX + P) if masked else None
    close(attend("clustered", q, k, v, key_mask=mask, tokens=P), attend("flattened", q, k, v, key_mask=mask))
    kinds = torch.randint(5, (P,), generator=torch.Generator().manual_seed(1))
    few = [torch.cat([each[:, :, :PREFIX], each[:, :, PREFIX:][:, :, kinds]], 2) for each in (k, v)]
    torch.testing.assert_close(
        attend("clustered", q, *few, tokens=5), attend("flattened", q, *few), rtol=1e-7, atol=1e-8
    )


def test_additive_is_full_attention_where_keys_and_values_are_additive():
    q, k, v = tensors()
    k, v = (
        torch.cat(
            [each[:, :, :PREFIX], ta.additive_part(each[:, :, PREFIX:].unflatten(2, GRID), order=3).flatten(2, 4)], 2
        )
        for each in (k, v)
    )
    close(attend("additive", q, k, v), attend("flattened", q, k, v))


@pytest.mark.parametrize("operator", sorted(ta.OPERATORS))
def test_what_is_masked_has_no_effect_and_no_gradient(operator):
    q, k, v = tensors()
    mask = torch.ones(2, PREFIX + P, dtype=torch.bool)
    mask[:, 0], mask[:, -2:] = False, False
    clean = attend(operator, q, k, v, key_mask=mask)
    k, v = (each.masked_fill(~mask[:, None, :, None], math.nan).requires_grad_() for each in (k, v))
    found = attend(operator, q, k, v, key_mask=mask)
    close(found, clean)
    found.square().sum().backward()
    assert k.grad.isfinite().all() and v.grad.isfinite().all()
    assert k.grad[~mask[:, None].expand(2, 4, -1)].eq(0).all()


@pytest.mark.parametrize("operator", JOINED)
def test_nothing_but_the_prefix_and_nothing_at_all(operator):
    q, k, v = tensors()
    mask = torch.zeros(2, PREFIX + P, dtype=torch.bool)
    mask[0, :PREFIX] = True
    found = attend(operator, q, k, v, key_mask=mask)
    close(found[0], F.scaled_dot_product_attention(q[0], k[0, :, :PREFIX], v[0, :, :PREFIX]))
    assert found[1].eq(0).all()


def test_dropout_drops_and_keeps_the_mean():
    q, k, v = tensors()
    torch.manual_seed(0)
    drawn = torch.stack([attend("kao_kv", q, k, v, dropout_p=0.4) for _ in range(400)])
    assert not torch.equal(drawn[0], drawn[1])
    assert (drawn.mean(0) - attend("kao_kv", q, k, v)).abs().max() < 0.2


@pytest.mark.parametrize("operator", sorted(ta.OPERATORS))
def test_derivatives(operator):
    q, k, v = (each.requires_grad_() for each in tensors(heads=2, kv_heads=1, dim=3, dim_v=2))
    options = {"tokens": 4} if operator == "clustered" else {}
    if operator == "clustered":  # its cells are constants: found once, so that a small step does not move them
        behind = [each[:, :, PREFIX:].unflatten(2, GRID).detach() for each in (q, k.repeat_interleave(2, 1))]
        options = {"cells": ta.find_cells(behind[0], behind[1], order=3, tokens=4)}
    torch.autograd.gradcheck(lambda *each: attend(operator, *each, **options), (q, k, v), fast_mode=True)


@pytest.mark.parametrize(
    "operator",
    ["kao_kv", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("flattened", "clustered", "axial"))],
)
def test_it_compiles_without_a_break(operator):
    torch._dynamo.reset()
    q, k, v = tensors()
    options = {"tokens": 4} if operator == "clustered" else {}
    compiled = torch.compile(lambda *each: attend(operator, *each, **options), backend="aot_eager", fullgraph=True)
    close(compiled(q, k, v), attend(operator, q, k, v, **options))


def test_half_precision():
    q, k, v = (each.bfloat16() for each in tensors())
    exact = attend("flattened", *(each.double() for each in (q, k, v)))
    for operator in ("flattened", "clustered"):
        found = attend(operator, q, k, v)
        assert found.dtype == torch.bfloat16
        assert (found - exact).abs().max() < 0.03


CALL = {"grid": GRID, "prefix": PREFIX, "operator": "kao_kv"}


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"grid": (3, 4)}, ShapeError, "grid (3, 4) has 12 positions, but query has 24 tokens behind a prefix of 3."),
        ({"prefix": 2}, ShapeError, "grid (3, 4, 2) has 24 positions, but query has 25 tokens behind a prefix of 2.\n  Class and register tokens are a prefix: prefix=3."),
        ({"prefix": -1}, OptionError, "prefix must be at least 0, got -1."),
        ({"prefix": 1.0}, OptionError, "prefix must be an integer, got 1.0."),
        ({"grid": 24}, OptionError, "grid must be one size a mode, got 24."),
        ({"grid": ()}, OptionError, "grid must be one size a mode, got ()."),
        ({"grid": (24, 1.0)}, OptionError, "grid must be one size a mode, but the size of mode 1 is 1.0."),
        ({"grid": (24, 0)}, OptionError, "every mode needs at least 1 index, but grid has size 0 for mode 1."),
        ({"operator": "none"}, OptionError, "there is no operator 'none'; the operators are: " + ", ".join(ta.OPERATORS) + "."),
        ({"tokens": 3}, OptionError, "operator 'kao_kv' has no option 'tokens'; its options are: none."),
        ({"return_rho": True}, OptionError, "operator 'kao_kv' has no option 'return_rho'; its options are: none."),
        ({"scale": math.inf}, OptionError, "scale must be finite, got inf."),
        ({"dropout_p": 2}, OptionError, "dropout_p must be between 0 and 1, got 2."),
        (
            {"operator": "clustered", "dropout_p": 0.1},
            OptionError,
            "dropout_p has no meaning for this operator: a cell stands for many positions, which would be dropped together.",
        ),
        ({"key_mask": torch.ones(2, 27)}, DtypeError, "key_mask must be bool, True where a key takes part, but has the type torch.float32."),
        (
            {"key_mask": torch.ones(2, 9, dtype=torch.bool)},
            ShapeError,
            "key_mask has shape (2, 9), but must have (2, 27) or (2, 24).",
        ),
        ({"key": (2, 3, 27, 6)}, ShapeError, "key has 3 heads, but value has 4."),
        ({"key": (2, 3, 27, 6), "value": (2, 3, 27, 6)}, ShapeError, "key has 3 heads, which do not divide the 4 heads of query."),
        ({"key": (2, 4, 26, 6)}, ShapeError, "query has 27 tokens, but key has 26."),
        ({"value": (1, 4, 27, 6)}, ShapeError, "the batch is 2 in query but 1 in value."),
        ({"key": (2, 4, 27, 7)}, ShapeError, "query has head size 6, but key has 7."),
        ({"query": (4, 27, 6)}, ShapeError, "query has 3 dimensions, but (B, H, L, D) needs 4."),
    ],
)  # fmt: skip
def test_refusals(change, kind, message):
    shapes = dict(zip(("query", "key", "value"), tensors(), strict=True))
    given = {name: draw(*each) if isinstance(each, tuple) and name in shapes else each for name, each in change.items()}
    refused(kind, f"grid_attention: {message}", ta.grid_attention, **{**shapes, **CALL, **given})


def test_an_operator_without_a_log_sum_exp_takes_no_prefix():
    def mean(query, key, value, *, order, **shared):
        return ta.AttentionResult(value.mean((-3, -2), keepdim=True).expand_as(query))

    record = ta.Operator("mean", mean, lambda order: ta.Needs(((),)), mean, lambda: frozenset())
    ta.register_operator(record)
    try:
        q = draw(1, 1, 7, 3)
        assert ta.grid_attention(q, q, q, grid=(7, 1), operator="mean").shape == q.shape
        with pytest.raises(OptionError, match="prefix has no meaning for operator 'mean': it returns no log-sum-exp"):
            ta.grid_attention(q, q, q, grid=(3, 2), prefix=1, operator="mean")
    finally:
        del ta.OPERATORS["mean"]
