"""Clustered attention: its definition, the laws that follow, causal frames, transforms, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from grids import LAYOUTS, close, forward_mode, grid, holes, over_grid, positive
from modules import draw, refused
from torch.autograd import gradcheck, gradgradcheck

import tensorattn as ta
from tensorattn.errors import OptionError, ShapeError
from tensorattn.functional.cells import block_counts, draw_queries, metric_of, search

thorough = pytest.mark.thorough
KINDS = ("blocks", "keys", "Cells")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_order = pytest.mark.parametrize("order", [1, pytest.param(2, marks=thorough), 3, pytest.param(4, marks=thorough)])
quick = {"fast_mode": True}  # differences along one direction
SCALE = 0.7


def drawn(order, width=2, batch=(2,)):
    """Queries anywhere, keys over a grid, and values of another width."""
    shape = grid(order, batch)
    return draw(*batch, 6, shape[-1]), draw(*shape, seed=1), draw(*shape[:-1], width, seed=2)


def options(kind, key, order, tokens=4):
    """Cells of a kind; those that are given have centres anywhere."""
    if kind != "Cells":
        return {"cells": kind, "tokens": tokens}
    batch, dim = key.shape[: key.dim() - order - 1], key.shape[-1]
    root = draw(*batch, dim, dim, seed=8)
    metric = root @ root.mT + 0.1 * torch.eye(dim).double()
    return {"cells": ta.Cells(draw(*batch, tokens, dim, seed=9), metric)}


def spoken(kind, sizes):
    """Nothing, a mask that is no product over modes, lengths, or weights of modes and a mask together."""
    return {
        "nothing": {},
        "mask": {"mask": holes(2, *sizes)},
        "lengths": {"lengths": [sizes[0], *[[max(1, size - 1), size] for size in sizes[1:]]]},
        "weights": {"weights": [positive(2, sizes[0]), *[None] * (len(sizes) - 1)], "mask": holes(2, *sizes, seed=3)},
    }[kind]


def counted(said, sizes, batch=2):
    """Weights of the positions, ``(batch, P)``, of what is said of them."""
    total = over_grid(said.get("weights"), sizes, (batch,))
    total = total * said.get("mask", 1.0)
    for mode, length in enumerate(said.get("lengths", ())):
        index = (torch.arange(sizes[mode]) < torch.as_tensor(length).reshape(-1, 1)).double()
        total = total * over_grid([index if k == mode else None for k in range(len(sizes))], sizes, (len(index),))
    return total.expand(batch, *sizes).flatten(1)


def moments(key, value, label, tokens, weight):
    """Weights, mean keys and values, and the covariances inside cells, of positions ``(B, T)``."""
    member = F.one_hot(label, tokens).mT * weight.unsqueeze(1)
    count = member.sum(-1, keepdim=True)
    live = weight.unsqueeze(-1) > 0
    key, value = (torch.where(live, tensor, 0.0) for tensor in (key, value))
    keys, values = (torch.where(count > 0, member @ tensor / count, 0.0) for tensor in (key, value))
    apart, off = (t - each.gather(1, label.unsqueeze(-1).expand(t.shape)) for t, each in ((key, keys), (value, values)))
    share = (weight / weight.sum(-1, keepdim=True)).unsqueeze(-1)
    kk, vk = apart.mT @ (share * apart), off.mT @ (share * apart)
    return count.squeeze(-1), keys, values, kk, vk, apart, member


def spreads(apart, member, metric):
    """Mean square of the distances in each cell, in units of that of all."""
    square = torch.einsum("btd,bde,bte->bt", apart, metric, apart)
    own = (member @ square.unsqueeze(-1)).squeeze(-1)
    count = member.sum(-1)
    mean = own.sum(-1, keepdim=True) / count.sum(-1, keepdim=True)
    return torch.where(mean > 0, own / count.clamp_min(1e-300) / mean, 1.0)


def defined(query, key, value, label, tokens, weight, metric, scale, spread=None):
    """Attention from ``(B, L, D)`` to cells of ``(B, T, D)``, written out; and the log-sum-exp."""
    count, keys, values, kk, vk, apart, member = moments(key, value, label, tokens, weight)
    spread = spreads(apart, member, metric) if spread is None else spread
    square = scale**2 * torch.einsum("bld,bde,ble->bl", query, kk, query).unsqueeze(-1)
    logits = scale * query @ keys.mT + count.log().unsqueeze(1) + torch.log1p(square) * spread.unsqueeze(1) / 2
    share = logits.softmax(-1)
    term = scale * query @ vk.mT / (1 + square).sqrt()
    return share @ values + (share @ spread.unsqueeze(-1)) * term, logits.logsumexp(-1)


def found_cells(kind, query, key, weight, tokens, given):
    """The metric of the spread, and the spread itself where it is that of candidates."""
    unit = torch.eye(key.shape[-1]).double().expand(len(key), -1, -1)
    if kind == "Cells":
        return given["cells"].metric, None
    if kind == "blocks":
        return unit, None
    key = torch.where(weight.unsqueeze(-1) > 0, key, 0.0)
    shown = weight if query.shape[1] == weight.shape[1] else None
    metric = metric_of(*draw_queries(query, shown))
    spread = search(key, weight, metric, tokens)[1]
    whole = weight / weight.sum(-1, keepdim=True)
    return metric, (spread, whole)


class TestDefinition:
    @pytest.mark.parametrize("what", ["nothing", "mask", "weights", "lengths"])
    @every_kind
    @every_order
    def test_is_met(self, order, kind, what):
        query, key, value = drawn(order)
        sizes = tuple(key.shape[1:-1])
        given, said = options(kind, key, order), spoken(what, sizes)
        for rows in (query, draw(2, *sizes, 3, seed=5)):
            ours = ta.clustered_attention(
                rows, key, value, order=order, scale=SCALE, return_lse=True, return_attention=True, **given, **said
            )
            weight, label = counted(said, sizes), ours.attention[1].flatten(1)
            flat, k, v = rows.flatten(1, -2), key.flatten(1, -2), value.flatten(1, -2)
            metric, spread = found_cells(kind, flat, k, weight, 4, given)
            if spread is not None:
                count = F.one_hot(label, 4).mT.double() @ spread[1].unsqueeze(-1)
                typical = (spread[0].unsqueeze(-1) * count).sum(1)
                spread = torch.where(typical > 0, spread[0] / typical, 1.0)
            output, lse = defined(flat, k, v, label, 4, weight, metric, SCALE, spread)
            close([ours.output, ours.lse], [output.reshape(ours.output.shape), lse.reshape(ours.lse.shape)])

    @every_order
    def test_blocks_are_parts_of_the_grid(self, order):
        query, key, value = drawn(order)
        sizes = tuple(key.shape[1:-1])
        counts = [min(2, size) for size in sizes]
        result = ta.clustered_attention(
            query, key, value, order=order, cells="blocks", blocks=counts, return_attention=True
        )
        index = [torch.arange(n) // -(-n // b) for n, b in zip(sizes, counts, strict=True)]
        label = torch.zeros(sizes, dtype=torch.int64)
        for mode, (each, count) in enumerate(zip(index, counts, strict=True)):
            label = label * count + each.reshape([-1 if k == mode else 1 for k in range(order)])
        assert torch.equal(result.attention[1], label.expand(2, *sizes))
        assert result.attention[0].shape == (2, 6, math.prod(counts))
        close([result.attention[0].sum(-1)], [torch.ones(2, 6).double()])

    @every_kind
    def test_the_share_of_variance_inside_cells(self, kind):
        query, key, value = drawn(2)
        given, weight = options(kind, key, 2), torch.ones(2, 42).double()
        result = ta.clustered_attention(query, key, value, order=2, return_attention=True, **given)
        metric, _ = found_cells(kind, query, key.flatten(1, 2), weight, 4, given)
        k, label = key.flatten(1, 2), result.attention[1].flatten(1)
        inside = moments(k, value.flatten(1, 2), label, 4, weight)[3]
        whole = moments(k, value.flatten(1, 2), torch.zeros_like(label), 1, weight)[3]
        close([result.rho], [torch.einsum("bij,bij->b", inside, metric) / torch.einsum("bij,bij->b", whole, metric)])

    def test_cells_for_all_samples_have_no_batch_dimensions_of_their_own(self):
        query, key, value = drawn(2)
        one = options("Cells", key, 2)["cells"]
        shared = ta.Cells(one.centres[:1], one.metric[:1])
        both = ta.Cells(*[part.expand(2, -1, -1) for part in (shared.centres, shared.metric)])
        close(
            [ta.clustered_attention(query, key, value, order=2, cells=shared)],
            [ta.clustered_attention(query, key, value, order=2, cells=both)],
        )


def error(query, key, value, scale, order=2, **given):
    """How far an output is from full attention, and the log-sum-exp."""
    ours = ta.clustered_attention(query, key, value, order=order, scale=scale, return_lse=True, **given)
    given = {name: each for name, each in given.items() if name in ("mask", "weights")}
    theirs = ta.flattened_attention(query, key, value, order=order, scale=scale, return_lse=True, **given)
    return (ours.output - theirs.output).norm(), (ours.lse - theirs.lse).norm()


def second_order(function):
    """Whether an error falls by four, and that of the log-sum-exp by eight at least, where the scale is halved."""
    coarse, fine = function(0.02), function(0.01)
    return 3.7 < coarse[0] / fine[0] < 4.3 and coarse[1] / fine[1] > 7


class TestLaws:
    @pytest.mark.parametrize("what", ["nothing", "weights"])
    @every_kind
    @every_order
    def test_the_error_is_of_second_order_in_the_scale(self, order, kind, what):
        query, key, value = drawn(order)
        given = options(kind, key, order) | spoken(what, tuple(key.shape[1:-1]))
        assert second_order(lambda scale: error(query, key, value, scale, order, **given))

    @pytest.mark.parametrize("distinct", [1, 2, 5])
    def test_is_full_attention_with_a_token_for_each_distinct_key(self, distinct):
        query, key, value = drawn(2)
        key = draw(2, distinct, 3)[:, torch.arange(42).reshape(7, 6) * 5 % distinct]
        for said in ({}, spoken("weights", (7, 6))):
            assert max(error(query, key, value, 3.0, cells="keys", tokens=max(distinct, 3), **said)) < 1e-12

    @every_order
    def test_is_full_attention_with_a_token_for_each_position(self, order):
        query, key, value = drawn(order)
        sizes = tuple(key.shape[1:-1])
        ones = {"cells": "blocks", "blocks": sizes}
        for said in ({}, spoken("mask", sizes)):
            for given in ({"tokens": math.prod(sizes)}, {"tokens": 300}, ones):
                assert max(error(query, key, value, 2.0, order, **given, **said)) < 1e-11

    @pytest.mark.parametrize("kind", ["keys", "Cells"])
    def test_integer_weights_are_repetition(self, kind):
        query, key, value = drawn(1)
        times = torch.tensor([1, 3, 0, 2, 1, 1, 4, 2, 1])
        given = options(kind, key, 1)
        close(
            [ta.clustered_attention(query, key, value, order=1, weights=[times.double()], **given)],
            [ta.clustered_attention(query, *(t.repeat_interleave(times, 1) for t in (key, value)), order=1, **given)],
        )

    def test_integer_weights_are_repetition_in_blocks_that_are_equally_long(self):
        query, key, value = draw(2, 6, 3), draw(2, 4, 3, seed=1), draw(2, 4, 2, seed=2)
        times = torch.tensor([2, 1, 1, 2])
        given = {"order": 1, "cells": "blocks", "blocks": [2]}
        close(
            [ta.clustered_attention(query, key, value, weights=[times.double()], **given)],
            [ta.clustered_attention(query, *(t.repeat_interleave(times, 1) for t in (key, value)), **given)],
        )

    @pytest.mark.parametrize("held", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("kind", ["keys", "Cells"])
    @every_order
    def test_a_mask_is_cropping(self, order, kind, held):
        query, key, value = drawn(order)
        given, mask = options(kind, key, order), holes(2, *key.shape[1:-1])
        expected = []
        for sample, there in enumerate(mask):
            own = given
            if kind == "Cells":
                own = {"cells": ta.Cells(*(t[sample : sample + 1] for t in vars(given["cells"]).values()))}
            left = (query[sample : sample + 1], key[sample][there][None], value[sample][there][None])
            expected.append(ta.clustered_attention(*left, order=1, return_lse=True, **own)[:2])
        key[~mask], value[~mask] = held, held
        ours = ta.clustered_attention(query, key, value, order=order, mask=mask, return_lse=True, **given)
        close(ours[:2], [torch.cat(parts) for parts in zip(*expected, strict=True)])

    def test_a_mask_is_cropping_in_blocks_of_the_same_cut(self):
        query, key, value = draw(2, 6, 3), draw(2, 4, 6, 3, seed=1), draw(2, 4, 6, 2, seed=2)
        rows, columns = torch.tensor([0, 2]), torch.tensor([0, 1, 4, 5])
        mask = torch.zeros(2, 4, 6, dtype=torch.bool)
        mask[:, rows[:, None], columns] = True
        given = {"order": 2, "cells": "blocks", "blocks": [2, 2]}
        expected = ta.clustered_attention(query, *(t[:, rows][:, :, columns] for t in (key, value)), **given)
        key[~mask], value[~mask] = math.nan, math.inf
        close([ta.clustered_attention(query, key, value, mask=mask, **given)], [expected])

    @pytest.mark.parametrize("kind", ["keys", "Cells"])
    def test_a_permutation_of_positions_changes_nothing(self, kind):
        query, key, value = drawn(2)
        given, order = options(kind, key, 2), torch.randperm(42, generator=torch.Generator().manual_seed(0))
        moved = [t.flatten(1, 2)[:, order].reshape(t.shape) for t in (key, value)]
        mask = positive(2, 42) > 0.5
        masks = {"mask": mask.reshape(2, 7, 6)}, {"mask": mask[:, order].reshape(2, 7, 6)}
        for one, other in (({}, {}), masks):
            close(
                [ta.clustered_attention(query, key, value, order=2, **given, **one)],
                [ta.clustered_attention(query, *moved, order=2, **given, **other)],
            )

    @every_kind
    def test_a_shift_of_all_keys_changes_nothing(self, kind):
        query, key, value = drawn(2)
        given, far = options(kind, key, 2), 10 * draw(3)
        moved = options(kind, key, 2)
        if kind == "Cells":
            moved = {"cells": ta.Cells(given["cells"].centres + far, given["cells"].metric)}
        one = ta.clustered_attention(query, key, value, order=2, return_lse=True, **given)
        other = ta.clustered_attention(query, key + far, value, order=2, return_lse=True, **moved)
        close([other.output, other.lse - 3**-0.5 * query @ far], one[:2], rtol=1e-9, atol=1e-10)

    @every_kind
    def test_an_affine_map_of_values_is_one_of_the_output(self, kind):
        query, key, value = drawn(2)
        given, to, by = options(kind, key, 2), draw(2, 5, seed=6), draw(5, seed=7)
        close(
            [ta.clustered_attention(query, key, value @ to + by, order=2, **given)],
            [ta.clustered_attention(query, key, value, order=2, **given) @ to + by],
        )

    @every_kind
    def test_turning_queries_and_keys_together_changes_nothing(self, kind):
        query, key, value = drawn(2)
        turn = torch.linalg.qr(draw(3, 3, seed=6))[0]
        given = turned = options(kind, key, 2)
        if kind == "Cells":
            turned = {"cells": ta.Cells(given["cells"].centres @ turn, turn.mT @ given["cells"].metric @ turn)}
        close(
            [ta.clustered_attention(query @ turn, key @ turn, value, order=2, **turned)],
            [ta.clustered_attention(query, key, value, order=2, **given)],
        )

    @every_kind
    def test_the_scale_may_stand_in_the_queries(self, kind):
        query, key, value = drawn(2)
        given = options(kind, key, 2)
        one, other = (
            ta.clustered_attention(query * factor, key, value, order=2, scale=SCALE / factor, return_lse=True, **given)
            for factor in (1, 8)
        )
        close(one[:2], other[:2])

    @every_kind
    def test_at_scale_zero_it_is_the_mean(self, kind):
        query, key, value = drawn(2)
        given, said = options(kind, key, 2), spoken("weights", (7, 6))
        weight = counted(said, (7, 6)).unsqueeze(-1)
        result = ta.clustered_attention(query, key, value, order=2, scale=0.0, return_lse=True, **given, **said)
        mean = (weight * value.flatten(1, 2)).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        close([result.output, result.lse], [mean.expand(2, 6, 2), weight.sum((1, 2))[:, None].log().expand(2, 6)])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @every_kind
    def test_is_finite_at_any_scale(self, kind, dtype):
        for scale in (1e2, 1e4, 1e8):
            leaves = [tensor.to(dtype).requires_grad_() for tensor in drawn(2)]
            given = options(kind, leaves[1], 2)
            result = ta.clustered_attention(*leaves, order=2, scale=scale, return_lse=True, **given)
            assert result.output.isfinite().all() and result.lse.isfinite().all()
            assert result.output.abs().max() < 100  # values, and a term that ends where logits are sharp
            grads = torch.autograd.grad(result.output.sum(), leaves)
            assert all(grad.isfinite().all() for grad in grads)

    @pytest.mark.parametrize("kind", ["keys", "Cells"])
    @every_order
    def test_modes_do_not_matter(self, order, kind):
        query, key, value = drawn(order)
        given, mask = options(kind, key, order), holes(2, *key.shape[1:-1])
        flat = ta.clustered_attention(
            query, key.flatten(1, -2), value.flatten(1, -2), order=1, mask=mask.flatten(1), **given
        )
        close([ta.clustered_attention(query, key, value, order=order, mask=mask, **given)], [flat])

    @every_kind
    def test_all_equal_keys_give_the_mean(self, kind):
        query, key, value = drawn(2)
        key = key[:, :1, :1].expand(key.shape)
        close(
            [ta.clustered_attention(query, key, value, order=2, **options(kind, key, 2))],
            [value.mean((1, 2)).unsqueeze(1).expand(2, 6, 2)],
        )


class TestAbsence:
    @pytest.mark.parametrize("control", [False, True])
    @every_kind
    def test_of_all_keys_gives_zero(self, kind, control):
        query, key, value = (tensor.requires_grad_() for tensor in drawn(2))
        mask = torch.ones(2, 7, 6, dtype=torch.bool)
        mask[0] = False
        with torch.no_grad():
            key[0], value[0] = math.nan, math.inf
        given = options(kind, draw(2, 7, 6, 3), 2) | {"additive_control": control, "return_lse": True}
        result = ta.clustered_attention(query, key, value, order=2, mask=mask, return_attention=True, **given)
        alone = given | (
            {"cells": ta.Cells(*(t[1:] for t in vars(given["cells"]).values()))} if kind == "Cells" else {}
        )
        expected = ta.clustered_attention(query[1:], key[1:], value[1:], order=2, **alone)
        assert result.output[0].eq(0).all() and result.lse[0].eq(-math.inf).all() and result.attention[0][0].eq(0).all()
        assert result.rho[0] == 0
        close([result.output[1:], result.lse[1:], result.rho[1:]], [expected.output, expected.lse, expected.rho])
        for grad in torch.autograd.grad(result.output.sum(), [query, key, value]):
            assert grad[0].eq(0).all() and grad[1].isfinite().all()

    @pytest.mark.parametrize("which", [0, 1])
    @every_kind
    def test_what_is_not_a_number_shows_in_its_sample(self, kind, which):
        query, *leaves = drawn(2)
        given = options(kind, leaves[0], 2)
        expected = ta.clustered_attention(query, *leaves, order=2, **given)
        leaves[which][0, 3, 2] = math.nan
        output = ta.clustered_attention(query, *leaves, order=2, **given)
        assert output[0].isnan().all()
        close([output[1]], [expected[1]])

    @every_kind
    def test_of_all_queries_or_of_the_whole_batch_gives_nothing(self, kind):
        q, k, v = draw(2, 0, 4), draw(2, 5, 6, 4).requires_grad_(), draw(2, 5, 6, 3)
        result = ta.clustered_attention(q, k, v, order=2, return_lse=True, **options(kind, k.detach(), 2))
        assert result.output.shape == (2, 0, 3) and result.lse.shape == (2, 0) and result.rho.shape == (2,)
        result.output.sum().backward()
        assert k.grad.eq(0).all()
        q, k, v = draw(2, 7, 4)[:0], k.detach()[:0], v[:0]
        result = ta.clustered_attention(q, k, v, order=2, return_lse=True, **options(kind, k, 2))
        assert result.output.shape == (0, 7, 3) and result.lse.shape == (0, 7) and result.rho.shape == (0,)

    @every_kind
    def test_a_query_that_is_not_a_number_spoils_itself_alone(self, kind):
        query, key, value = drawn(2)
        given = options(kind, key, 2)
        spoiled = torch.cat([query, torch.full((2, 1, 3), math.nan).double()], 1)
        output = ta.clustered_attention(spoiled, key, value, order=2, **given)
        assert output[:, 6].isnan().all()
        close([output[:, :6]], [ta.clustered_attention(query, key, value, order=2, **given)])


def at_cells(given):
    """The function, at cells that do not move with what is differentiated."""
    return lambda q, k, v: ta.clustered_attention(q, k, v, order=2, scale=SCALE, **given)


class TestGradients:
    @pytest.mark.parametrize("what", ["nothing", "mask"])
    @pytest.mark.parametrize("kind", ["blocks", "Cells"])
    def test_are_those_of_differences(self, kind, what):
        query, key, value = draw(2, 3, 2), draw(2, 3, 3, 2, seed=1), draw(2, 3, 3, 2, seed=2)
        given = options(kind, key, 2, 3) | spoken(what, (3, 3))
        function = at_cells(given)
        leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
        lse = lambda *x: ta.clustered_attention(*x, order=2, return_lse=True, **given).lse  # noqa: E731
        assert gradcheck(function, leaves, **quick) and gradcheck(lse, leaves, **quick)

    @pytest.mark.parametrize("kind", ["blocks", pytest.param("Cells", marks=thorough)])
    def test_of_gradients_are_those_of_differences(self, kind):
        leaves = [draw(1, 2, 2).requires_grad_(), *(draw(1, 2, 3, 2, seed=s).requires_grad_() for s in (1, 2))]
        given = options(kind, leaves[1], 2, 2)
        assert gradgradcheck(at_cells(given), leaves, **quick)

    def test_of_weights_are_those_of_differences(self):
        query, key, value = draw(1, 3, 2), draw(1, 4, 3, 2, seed=1), draw(1, 4, 3, 2, seed=2)
        for kind in ("blocks", "Cells"):
            given = options(kind, key, 2, 3)
            function = lambda w: ta.clustered_attention(query, key, value, order=2, weights=[w, None], **given)  # noqa: E731, B023
            assert gradcheck(function, positive(4).requires_grad_())

    @every_kind
    def test_of_keys_add_up_to_zero_and_of_values_to_those_of_the_output(self, kind):
        leaves = [tensor.requires_grad_() for tensor in drawn(2)]
        given = options(kind, leaves[1], 2)
        for said in ({}, spoken("weights", (7, 6))):
            output = ta.clustered_attention(*leaves, order=2, **given, **said)
            above = draw(*output.shape, seed=5)
            _, of_keys, of_values = torch.autograd.grad(output, leaves, above)
            close([of_keys.sum((1, 2)), of_values.sum((1, 2))], [torch.zeros(2, 3).double(), above.sum(1)])


def additive(order, seed, width=3):
    """A tensor that is additive over its modes."""
    shape = grid(order)
    total = draw(2, *[1] * order, width, seed=seed)
    for mode, size in enumerate(shape[1:-1]):
        total = total + draw(2, *[size if k == mode else 1 for k in range(order)], width, seed=10 * seed + mode)
    return total.expand(*shape[:-1], width).contiguous()


class TestAdditiveControl:
    @pytest.mark.parametrize("what", ["nothing", "weights", "product mask", "lengths"])
    @every_kind
    @every_order
    def test_is_exact_on_additive_tensors(self, order, kind, what):
        query, key, value = draw(2, 6, 3), additive(order, 1), additive(order, 2, 2)
        sizes = tuple(key.shape[1:-1])
        there = [torch.arange(size) % 3 != 1 for size in sizes]
        said = {
            "nothing": {},
            "weights": {"weights": [positive(2, size, seed=size) for size in sizes]},
            "product mask": {"mask": over_grid([each.double() for each in there], sizes, (2,)) > 0},
            "lengths": spoken("lengths", sizes).copy(),
        }[what]
        given = options(kind, key, order) | {"additive_control": True, "scale": 2.0, "return_lse": True}
        ours = ta.clustered_attention(query, key, value, order=order, **given, **said)
        theirs = ta.flattened_attention(query, key, value, order=order, scale=2.0, return_lse=True, **said)
        close(ours[:2], theirs[:2], rtol=1e-8, atol=1e-9)

    @every_kind
    def test_keeps_the_second_order(self, kind):
        query, key, value = drawn(2)
        given = options(kind, key, 2) | {"additive_control": True}
        coarse, fine = (error(query, key, value, scale, **given)[0] for scale in (0.02, 0.01))
        assert 3.7 < coarse / fine < 4.3

    def test_does_not_matter_at_order_one_beyond_exactness(self):
        """At order 1 each tensor is additive."""
        query, key, value = drawn(1)
        given = {"order": 1, "cells": "blocks", "tokens": 3}
        close(
            [ta.clustered_attention(query, key, value, additive_control=True, **given)],
            [ta.flattened_attention(query, key, value, order=1)],
        )

    def test_gradients_are_those_of_differences(self):
        leaves = [draw(1, 2, 2).requires_grad_(), *(draw(1, 3, 2, 2, seed=s).requires_grad_() for s in (1, 2))]
        assert gradcheck(at_cells({"cells": "blocks", "tokens": 2, "additive_control": True}), leaves, **quick)

    def test_nearly_additive_tensors_are_met_better_than_without(self):
        query = draw(2, 6, 3)
        key, value = (additive(3, s) + 0.1 * draw(*grid(3), seed=s) for s in (1, 2))
        for kind in KINDS:
            given = options(kind, key, 3)
            plain, controlled = (
                error(query, key, value, 0.5, 3, additive_control=control, **given)[0] for control in (False, True)
            )
            assert controlled < plain / 2


class TestCausal:
    """A frame is the last frame of the tensor cropped behind it."""

    @pytest.mark.parametrize("what", ["nothing", "mask", "weights"])
    @pytest.mark.parametrize("kind", ["blocks", "Cells"])
    @pytest.mark.parametrize("sizes", [(4,), (3, 4), (2, 4, 3)], ids=str)
    def test_frames_see_the_tensor_up_to_themselves(self, sizes, kind, what):
        order = len(sizes)
        query, key, value = draw(2, *sizes, 3), draw(2, *sizes, 3, seed=1), draw(2, *sizes, 2, seed=2)
        said, given = spoken(what, sizes), options(kind, key, order)
        for mode in range(order):
            ours = ta.clustered_attention(query, key, value, order=order, causal=mode, return_lse=True, **given, **said)
            counts = {} if kind == "Cells" else {"blocks": block_counts(sizes, 4, None, mode)}
            for frame in range(sizes[mode]):
                first = [t.narrow(1 + mode, 0, frame + 1) for t in (query, key, value)]
                own = {"mask": said["mask"].narrow(1 + mode, 0, frame + 1)} if "mask" in said else {}
                if "weights" in said:
                    first_of = frame + 1 if mode == 0 else None
                    own["weights"] = [said["weights"][0][:, :first_of], *said["weights"][1:]]
                part = ta.clustered_attention(*first, order=order, return_lse=True, **given, **counts, **own)
                close(
                    [ours.output.select(1 + mode, frame), ours.lse.select(1 + mode, frame)],
                    [part.output.select(1 + mode, frame), part.lse.select(1 + mode, frame)],
                )
                close([ours.rho[:, frame]], [part.rho])

    @pytest.mark.parametrize("kind", ["blocks", "Cells"])
    def test_nothing_of_later_frames_leaks(self, kind):
        for mode in (0, 1):
            outputs, grads = [], []
            for held in (0.0, math.nan, math.inf):
                leaves = [draw(2, 4, 5, 3, seed=s).narrow(0, 0, 2).clone() for s in range(3)]
                given = options(kind, leaves[1], 2)
                for tensor in leaves:
                    tensor.narrow(1 + mode, 2, tensor.shape[1 + mode] - 2).fill_(held)
                first = [tensor.requires_grad_() for tensor in leaves]
                output = ta.clustered_attention(*first, order=2, causal=mode, **given).narrow(1 + mode, 0, 2)
                outputs.append(output)
                grads.append(torch.autograd.grad(output.sum(), first))
            assert all(torch.equal(output, outputs[0]) for output in outputs)
            assert all(grad.narrow(1 + mode, 2, 2).eq(0).all() for grad in grads[0])

    def test_gradients_are_those_of_differences(self):
        leaves = [draw(1, 3, 2, 2, seed=s).requires_grad_() for s in range(3)]
        for kind in ("blocks", "Cells"):
            given = options(kind, leaves[1], 2, 2) | {"causal": 0}
            assert gradcheck(at_cells(given), leaves, **quick)

    def test_an_absent_first_frame_gives_zero(self):
        leaves, mask = [draw(2, 3, 4, 3, seed=s) for s in range(3)], torch.ones(2, 3, 4, dtype=torch.bool)
        mask[0, 0] = False
        result = ta.clustered_attention(*leaves, order=2, cells="blocks", causal=0, mask=mask, return_lse=True)
        assert result.output[0, 0].eq(0).all() and result.lse[0, 0].eq(-math.inf).all()
        assert result.output[0, 1:].ne(0).all() and result.output[1].ne(0).all()


class TestTools:
    @every_kind
    def test_vmap_and_forward_mode(self, kind):
        xs = draw(3, 2, 4, 4, 2)
        given = options(kind, xs[0], 2, 3)
        function = lambda x: ta.clustered_attention(x, x, x, order=2, **given)  # noqa: E731
        loss = lambda x: function(x).square().sum()  # noqa: E731
        close([torch.vmap(function)(xs)], [torch.stack([function(x) for x in xs])])
        gradients = torch.stack([torch.func.grad(loss)(x) for x in xs])
        close([torch.vmap(torch.func.grad(loss))(xs)], [gradients])

    @forward_mode
    @pytest.mark.parametrize("kind", ["blocks", "Cells"])
    def test_jvp(self, kind):
        x, along, step = draw(2, 4, 4, 2), draw(2, 4, 4, 2, seed=1), 1e-6
        given = options(kind, x, 2, 3)
        function = lambda x: ta.clustered_attention(x, x, x, order=2, **given)  # noqa: E731
        tangent = (function(x + step * along) - function(x - step * along)) / (2 * step)
        close([torch.func.jvp(function, (x,), (along,))[1]], [tangent], rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @every_kind
    def test_in_every_layout_of_memory(self, kind, layout):
        leaves = [draw(2, 3, 4, 4, seed=s) for s in range(3)]
        given = options(kind, leaves[1], 2)
        expected = ta.clustered_attention(*leaves, order=2, **given)
        close([ta.clustered_attention(*map(LAYOUTS[layout], leaves), order=2, **given)], [expected])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @every_kind
    def test_other_types(self, kind, dtype):
        leaves = [tensor.to(dtype) for tensor in drawn(2)]
        given = options(kind, leaves[1], 2)
        exact = ta.clustered_attention(*[t.double() for t in leaves], order=2, return_lse=True, **given)
        found = ta.clustered_attention(*leaves, order=2, return_lse=True, **given)
        wide = torch.float32
        assert [part.dtype for part in found[:2]] == [dtype, wide] and found.rho.dtype == wide
        tolerance = 8 * torch.finfo(dtype).eps
        close([found.output.double(), found.lse.double()], exact[:2], rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("control", [False, True])
    @every_kind
    def test_under_autocast(self, kind, control):
        leaves = [tensor.float().requires_grad_() for tensor in drawn(2)]
        given = options(kind, leaves[1], 2) | {"additive_control": control}
        exact = ta.clustered_attention(*leaves, order=2, **given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = ta.clustered_attention(*leaves, order=2, **given)
        assert found.dtype == torch.float32
        close([found], [exact], rtol=0.03, atol=0.03)
        assert {grad.dtype for grad in torch.autograd.grad(found.sum(), leaves)} == {torch.float32}

    @every_kind
    def test_on_the_meta_device(self, kind):
        leaves = [tensor.to("meta") for tensor in drawn(2)]
        given = options(kind, drawn(2)[1], 2)
        given = given | ({"cells": given["cells"].to("meta")} if kind == "Cells" else {})
        result = ta.clustered_attention(*leaves, order=2, return_lse=True, **given)
        assert result.output.shape == (2, 6, 2) and result.lse.shape == (2, 6) and result.rho.shape == (2,)

    @pytest.mark.parametrize("kind", ["blocks", "keys"])
    def test_chunks_of_a_cpu_are_the_whole(self, kind):
        """Without gradients positions and queries are taken a part at a time."""
        query, key, value = draw(1, 5000, 3), draw(1, 90, 70, 3, seed=1), draw(1, 90, 70, 2, seed=2)
        given = {"order": 2, "cells": kind, "tokens": 64, "return_lse": True}
        with torch.no_grad():
            parts = ta.clustered_attention(query, key, value, **given)
        whole = ta.clustered_attention(query, key.requires_grad_(), value, **given)
        close([p for p in parts if p is not None], [w.detach() for w in whole if w is not None], rtol=1e-9, atol=1e-11)

    def test_no_batch_dimension_and_several(self):
        for batch in ((), (2, 3)):
            query, key, value = drawn(2, batch=batch)
            for kind in KINDS:
                given = options(kind, key, 2)
                output = ta.clustered_attention(query, key, value, order=2, **given)
                flat = [t.reshape(math.prod(batch), *t.shape[len(batch) :]) for t in (query, key, value)]
                own = given
                if kind == "Cells":
                    parts = vars(given["cells"]).values()
                    own = {"cells": ta.Cells(*(t.reshape(-1, *t.shape[-2:]) for t in parts))}
                close([output.reshape(-1, 6, 2)], [ta.clustered_attention(*flat, order=2, **own)])


READING = """\
  modes    0 1
  query    (2, 6, 3)      batch=(2,) positions=(6,) D=3
  key      (2, 7, 6, 3)   batch=(2,) 0=7 1=6 D=3
  value    (2, 7, 6, 2)   batch=(2,) 0=7 1=6 D=2"""


class TestRefusals:
    def test_of_options(self):
        leaves = drawn(2)
        cells = options("Cells", leaves[1], 2)["cells"]
        for message, given in {
            "tokens must be at least 1, got 0.": {"tokens": 0},
            "tokens must be an integer, got 2.5.": {"tokens": 2.5},
            "cells must be 'keys', 'blocks' or Cells, got 'trees'.": {"cells": "trees"},
            "tokens is 8, but cells has 4.\n  Leave tokens out.": {"cells": cells, "tokens": 8},
            "blocks has no meaning with cells='keys': it needs cells='blocks'.": {"blocks": [2, 2]},
            "blocks must be one count a mode, got 4.": {"cells": "blocks", "blocks": 4},
            "blocks of mode 1 must be at least 1, got 0.": {"cells": "blocks", "blocks": [2, 0]},
            "blocks cut the grid into 6, but tokens is 4.": {"cells": "blocks", "blocks": [2, 3], "tokens": 4},
            "blocks has 3 counts, but order 2 needs one a mode.": {"cells": "blocks", "blocks": [2, 2, 1]},
            "additive_control must be True or False, got 'yes'.": {"additive_control": "yes"},
            "bias has no meaning for this operator: keys of one cell share a logit; what depends on the key alone is a "
            "weight.": {"bias": [None, None]},
            "dropout_p has no meaning for this operator: a cell stands for many positions, which would be dropped "
            "together.": {"dropout_p": 0.5},
            "causal has no meaning for this operator: the search among keys would see later frames; take "
            "cells='blocks', or those of find_cells.": {"causal": 0},
            "causal has no meaning for this operator: additive_control takes averages over all frames.": {
                "cells": "blocks",
                "causal": 0,
                "additive_control": True,
            },
        }.items():
            rule, _, hint = message.partition("\n")
            told = f"clustered_attention: {rule}\n{READING}" + (f"\n{hint}" if hint else "")
            refused(OptionError, told, ta.clustered_attention, *leaves, order=2, **given)

    def test_of_blocks_that_cut_the_causal_mode(self):
        leaves = [draw(2, 3, 4, 3, seed=s) for s in range(3)]
        message = "blocks cuts mode 1 into 2, but it is causal: a block spans all frames so far."
        with pytest.raises(OptionError, match=message):
            ta.clustered_attention(*leaves, order=2, cells="blocks", blocks=[2, 2], causal=1)

    @pytest.mark.parametrize("shape", [(2, 4, 5), (3, 4, 3), (1, 2, 4, 3)])
    def test_of_cells_of_another_width_or_batch(self, shape):
        cells = ta.Cells(draw(*shape), torch.eye(shape[-1]).double().expand(*shape[:-2], -1, -1))
        message = f"cells have centres of shape {shape}, which do not broadcast to (2, 4, 3)."
        told = f"clustered_attention: {message}\n{READING}"
        refused(ShapeError, told, ta.clustered_attention, *drawn(2), order=2, cells=cells)

    def test_of_a_metric_of_another_width(self):
        message = r"metric of cells has shape \(2, 2\), but centres of 3 channels need \(3, 3\)"
        with pytest.raises(ShapeError, match=message):
            ta.Cells(draw(4, 3), torch.eye(2).double())
