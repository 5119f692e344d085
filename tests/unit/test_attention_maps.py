"""Attention maps: what each operator's weights say of every position, against its output and full attention."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import pytest
import torch

import tensorattn as ta

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
SIZES = (4, 3, 5, 2, 3)
ORDERS = range(1, 6)
ON_THE_GRID = ("kao_qkv", "kronecker_product", "kronecker_sum", "axial")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def additive(sizes, seed):
    """A sum of one random term a mode."""
    return ta.outer_sum([draw(2, size, 4, seed=seed + mode) for mode, size in enumerate(sizes)])


def weights_of(sizes):
    """Multiplicities: none for one mode, the same for all samples, of each sample, an index that is absent."""
    found = [None, torch.arange(3.0) + 1, torch.arange(10.0).view(2, 5) + 0.5, torch.tensor([0.0, 2.0]), None]
    return [None if weight is None else weight.double() for weight in found[: len(sizes)]]


def attend(operator, q, k, v, sizes, weights, **options):
    function = ta.OPERATORS[operator].function
    return function(q, k, v, order=len(sizes), weights=weights, return_attention=True, **options)


def weighed(weights, values):
    """Sum of values over the grid by a map ``(B, *grid)``."""
    return (weights.unsqueeze(-1) * values).flatten(1, -2).sum(1)


def last(sizes):
    return tuple(size - 1 for size in sizes)


@pytest.mark.parametrize("order", ORDERS)
class TestWhatMapsMean:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize(
        "operator", ["kao_kv", "kao_qkv", "kronecker_product", "kronecker_sum", "axial", "flattened"]
    )
    def test_the_output_is_the_sum_of_values_by_the_map(self, operator, order, weighted):
        sizes = SIZES[:order]
        q, k, v = (draw(2, *sizes, 4, seed=seed) for seed in range(3))
        weights = weights_of(sizes) if weighted else None
        result = attend(operator, q, k, v, sizes, weights)
        at = last(sizes)
        found = ta.attention_map(result.attention, sizes, operator=operator, at=at, weights=weights)
        times = order if operator in ("kao_qkv", "kronecker_sum") else 1
        torch.testing.assert_close(times * weighed(found, v), result.output[(slice(None), *at)], **CLOSE)

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("operator", ["additive", "truncated"])
    def test_on_additive_keys_it_is_that_of_full_attention(self, operator, order, weighted):
        sizes, weights = SIZES[:order], weights_of(SIZES[:order]) if weighted else None
        q, k, v = draw(2, 7, 4), additive(sizes, 1), draw(2, *sizes, 4, seed=9)
        ours, exact = (attend(name, q, k, v, sizes, weights).attention for name in (operator, "flattened"))
        for at in (None, (6,)):
            torch.testing.assert_close(
                ta.attention_map(ours, sizes, operator=operator, at=at, weights=weights),
                ta.attention_map(exact, sizes, operator="flattened", at=at),
                **CLOSE,
            )

    def test_all_modes_kept_it_is_that_of_full_attention(self, order):
        sizes = SIZES[:order]
        q, k = draw(2, 7, 4), draw(2, *sizes, 4, seed=1)
        ours = attend("truncated", q, k, k, sizes, None, interaction_order=order).attention
        exact = attend("flattened", q, k, k, sizes, None).attention[0]
        torch.testing.assert_close(
            ta.attention_map(ours, sizes, operator="truncated", interaction_order=order), exact, **CLOSE
        )

    @pytest.mark.parametrize("weighted", [False, True])
    def test_centred_mean_queries_attend_as_the_additive_part_of_the_query(self, order, weighted):
        sizes, weights = SIZES[:order], weights_of(SIZES[:order]) if weighted else None
        q, k = draw(2, *sizes, 4), additive(sizes, 1)
        ours = attend("kao_qkv", q, k, k, sizes, weights, centered=True).attention
        part = ta.additive_part(q, order=order, weights=weights)
        exact = attend("flattened", part, k, k, sizes, weights).attention[0]
        for at in ((0,) * order, last(sizes)):
            found = ta.attention_map(ours, sizes, operator="kao_qkv", at=at, weights=weights, centered=True)
            torch.testing.assert_close(found, exact[(slice(None), *at)], **CLOSE)

    @pytest.mark.parametrize("operator", ta.OPERATORS)
    def test_it_sums_to_one_and_is_not_negative(self, operator, order):
        sizes, weights = SIZES[:order], weights_of(SIZES[:order])
        q = draw(2, *sizes, 4)
        attention = attend(operator, 3 * q, q, q, sizes, weights).attention
        found = ta.attention_map(attention, sizes, operator=operator, at=last(sizes), weights=weights)
        assert found.shape == (2, *sizes)
        assert found.ge(0).all()
        torch.testing.assert_close(found.flatten(1).sum(1), torch.ones(2, dtype=torch.float64), **CLOSE)
        if order > 3 and operator in ("additive", "truncated", "kao_kv", "flattened", "kronecker_product"):
            assert found.select(4, 0).eq(0).all()  # an index of weight 0


def test_groups_as_modes():
    sizes = (4, 3, 5)
    groups = draw(2, 4, 3, 1, 4, seed=1) + draw(2, 1, 1, 5, 4, seed=2)
    q = draw(2, 7, 4)
    ours = attend("truncated", q, groups, groups, sizes, None, kept=[(0, 1), (2,)]).attention
    exact = attend("flattened", q, groups, groups, sizes, None).attention[0]
    found = ta.attention_map(ours, sizes, operator="truncated", kept=[(0, 1), (2,)])
    torch.testing.assert_close(found, exact, **CLOSE)


def test_weights_of_whole_positions():
    sizes, q = (4, 3), draw(2, 7, 4)
    k, weights = draw(2, *sizes, 4, seed=1), [torch.tensor([1.0, 0, 2, 3]).double(), torch.tensor([2.0, 1, 1]).double()]
    attention = attend("additive", q, k, k, sizes, weights).attention
    grid = weights[0][:, None] * weights[1]
    torch.testing.assert_close(
        ta.attention_map(attention, sizes, weights=grid), ta.attention_map(attention, sizes, weights=weights), **CLOSE
    )


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("operator", ["kao_kv", "kronecker_product", "kronecker_sum", "axial", "flattened"])
def test_gaps_that_are_no_product_of_modes(operator, order, binary):
    """The output is the sum of the values by the map; both samples with a mask of their own."""
    sizes = SIZES[:order]
    q, k, v = (draw(2, *sizes, 4, seed=seed) for seed in range(3))
    mask = draw(2, *sizes, seed=5) > -0.5
    given = {"mask": mask} if binary else {"weights": mask * draw(2, *sizes, seed=6).abs()}
    if operator == "kao_kv" and not binary:
        pytest.skip("its one softmax counts indices, which weights of positions do not tell")
    result = ta.OPERATORS[operator].function(q, k, v, order=order, return_attention=True, **given)
    times = order if operator == "kronecker_sum" else 1
    for at in itertools.product(*map(range, sizes)):
        found = ta.attention_map(result.attention, sizes, operator=operator, at=at, **given)
        seen = mask[(slice(None), *at)] if operator in ON_THE_GRID else torch.ones(2, dtype=torch.bool)
        expected = result.output[(slice(None), *at)]
        torch.testing.assert_close((times * weighed(found, v))[seen], expected[seen], **CLOSE)


def test_lengths_are_weights():
    sizes, q, lengths = (4, 3), draw(2, 7, 4), torch.tensor([[4, 2], [3, 3]])
    k = draw(2, *sizes, 4, seed=1)
    attention = ta.additive_attention(q, k, k, order=2, lengths=lengths, return_attention=True).attention
    weights = [(torch.arange(n) < lengths[:, mode, None]).double() for mode, n in enumerate(sizes)]
    ours = ta.attention_map(attention, sizes, lengths=lengths)
    torch.testing.assert_close(ours, ta.attention_map(attention, sizes, weights=weights), rtol=0, atol=0)
    assert ours[0, :, :, 2].eq(0).all() and ours[1, :, 3].eq(0).all()


def test_where_nothing_takes_part_it_is_zero():
    sizes, q = (4, 3), draw(2, 7, 4)
    absent = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]]).double()
    none = [torch.zeros(2, 7, 4).double(), torch.ones(2, 7, 3).double() / 3]
    found = ta.attention_map(none, sizes, weights=[absent, None])
    assert found.eq(0).all()
    k = draw(2, *sizes, 4, seed=1)
    some = attend("additive", q, k, k, sizes, None).attention
    found = ta.attention_map(some, sizes)
    torch.testing.assert_close(found, functools.reduce(lambda a, b: a.unsqueeze(-1) * b.unsqueeze(-2), some), **CLOSE)


def test_a_negative_index_counts_from_the_end():
    sizes, q = (4, 3), draw(2, 4, 3, 4)
    for operator in ta.OPERATORS:
        attention = attend(operator, q, q, q, sizes, None).attention
        maps = [ta.attention_map(attention, sizes, operator=operator, at=at) for at in ((-1, -3), (3, 0))]
        assert torch.equal(*maps)


def test_gradients_go_through():
    q, k = draw(1, 2, 3, 2).requires_grad_(), draw(1, 2, 3, 2, seed=1).requires_grad_()

    def of(operator, q, k):
        return ta.attention_map(attend(operator, q, k, k, (2, 3), None).attention, (2, 3), operator=operator, at=(1, 2))

    for operator in ta.OPERATORS:
        assert torch.autograd.gradcheck(functools.partial(of, operator), (q, k))


class TestMessages:
    q = draw(2, 4, 3, 4)
    attention = ta.additive_attention(q, q, q, order=2, return_attention=True).attention

    @pytest.mark.parametrize("operator", ON_THE_GRID)
    def test_the_query_is_missing(self, operator):
        attention = attend(operator, self.q, self.q, self.q, (4, 3), None).attention
        with pytest.raises(ta.OptionError, match="at is missing"):
            ta.attention_map(attention, (4, 3), operator=operator)
        with pytest.raises(ta.OptionError, match="at has 1 indices, but there are 2 modes"):
            ta.attention_map(attention, (4, 3), operator=operator, at=(1,))

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"at": (4, 0)}, "at has index 4 at place 0, but the size there is 4"),
            ({"at": (0, -4)}, "at has index -4 at place 1, but the size there is 3"),
            ({"at": (0, 0, 0, 0)}, "at has 4 indices, but the weights have 3 dimensions"),
            ({"at": (0.5, 1)}, "at must be integers"),
            ({"at": 3}, "at must be integers"),
            ({"operator": "fast"}, "there is no operator 'fast'"),
            ({"kept": [(0,)]}, "operator 'additive' has no option 'kept'"),
            ({"interaction": "cubic"}, "interaction must be"),
        ],
    )
    def test_options(self, given, message):
        with pytest.raises(ta.OptionError, match=message):
            ta.attention_map(self.attention, (4, 3), **given)

    def test_sizes_and_weights(self):
        with pytest.raises(
            ta.ShapeError, match=r"attention has shape \(2, 4, 3, 4\), but its last sizes must be \(5,\)"
        ):
            ta.attention_map(self.attention, (5, 3))
        with pytest.raises(ta.WeightsError, match="weights of mode 1 have length 4, but the mode has size 3"):
            ta.attention_map(self.attention, (4, 3), weights=[None, torch.ones(4)])
        with pytest.raises(ta.WeightsError, match="mode 1 has size 4 in weights but 3 in sizes"):
            ta.attention_map(self.attention, (4, 3), weights=torch.ones(4, 4))
        with pytest.raises(ta.OptionError, match="attention must be"):
            ta.attention_map(None, (4, 3))
        with pytest.raises(ta.ShapeError, match="attention has 2 entries, but 3 are needed"):
            published = attend("kao_qkv", self.q, self.q, self.q, (4, 3), None).attention
            ta.attention_map(published, (4, 3), operator="kao_qkv", at=(0, 0), centered=True)

    def test_an_operator_without_a_map(self):
        mine = ta.register_operator(dataclasses.replace(ta.OPERATORS["additive"], name="mine", spread=None))
        try:
            with pytest.raises(ta.OptionError, match="operator 'mine' has no map"):
                ta.attention_map(self.attention, (4, 3), operator="mine")
        finally:
            del ta.OPERATORS[mine.name]


def test_every_operator_has_a_map():
    assert all(record.spread for record in ta.OPERATORS.values())
    assert math.prod(SIZES) == 360  # small enough for full attention
