"""Attention maps: what each operator's weights say of every position, against its output and full attention."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from grids import close
from modules import draw, refused

import tensorattn as ta
from tensorattn.errors import DtypeError, OptionError, ShapeError, WeightsError
from tensorattn.functional import OPERATORS

SIZES = (4, 3, 5, 2, 3)
ORDERS = [1, 2, 3, *(pytest.param(order, marks=pytest.mark.thorough) for order in (4, 5))]
ON_THE_GRID = ("kao_qkv", "kronecker_product", "kronecker_sum", "axial")

every_order = pytest.mark.parametrize("order", ORDERS)


def additive(sizes, seed):
    """A sum of one random term a mode."""
    return ta.outer_sum([draw(2, size, 4, seed=seed + mode) for mode, size in enumerate(sizes)])


def weights_of(sizes):
    """Multiplicities: none for one mode, the same for all samples, of each sample, an index that is absent."""
    found = [None, torch.arange(3.0) + 1, torch.arange(10.0).view(2, 5) + 0.5, torch.tensor([0.0, 2.0]), None]
    return [None if weight is None else weight.double() for weight in found[: len(sizes)]]


def attend(operator, q, k, v, order, weights=None, **options):
    return OPERATORS[operator].function(q, k, v, order=order, weights=weights, return_attention=True, **options)


def weighed(weights, values):
    """Sum of values over the grid by a map ``(B, *grid)``."""
    return (weights.unsqueeze(-1) * values).flatten(1, -2).sum(1)


def last(sizes):
    return tuple(size - 1 for size in sizes)


@pytest.mark.parametrize("weighted", [False, True])
@every_order
class TestWhatMapsMean:
    def test_the_output_is_the_sum_of_values_by_the_map(self, order, weighted):
        sizes, at = SIZES[:order], last(SIZES[:order])
        q, k, v = (draw(2, *sizes, 4, seed=seed) for seed in range(3))
        weights = weights_of(sizes) if weighted else None
        for operator in ("kao_kv", "kao_qkv", "kronecker_product", "kronecker_sum", "axial", "flattened"):
            result = attend(operator, q, k, v, order, weights)
            found = ta.attention_map(result.attention, sizes, operator=operator, at=at, weights=weights)
            times = order if operator in ("kao_qkv", "kronecker_sum") else 1
            close([times * weighed(found, v)], [result.output[(slice(None), *at)]])

    def test_on_additive_keys_it_is_that_of_full_attention(self, order, weighted):
        sizes = SIZES[:order]
        weights = weights_of(sizes) if weighted else None
        q, k, v = draw(2, 7, 4), additive(sizes, 1), draw(2, *sizes, 4, seed=9)
        exact = attend("flattened", q, k, v, order, weights).attention
        for operator in ("additive", "truncated"):
            ours = attend(operator, q, k, v, order, weights).attention
            for at in (None, (6,)):
                found = ta.attention_map(ours, sizes, operator=operator, at=at, weights=weights)
                close([found], [ta.attention_map(exact, sizes, operator="flattened", at=at)])

    def test_centred_mean_queries_attend_as_the_additive_part_of_the_query(self, order, weighted):
        sizes = SIZES[:order]
        weights = weights_of(sizes) if weighted else None
        q, k = draw(2, *sizes, 4), additive(sizes, 1)
        ours = attend("kao_qkv", q, k, k, order, weights, centered=True).attention
        part = ta.additive_part(q, order=order, weights=weights)
        exact = attend("flattened", part, k, k, order, weights).attention[0]
        for at in ((0,) * order, last(sizes)):
            found = ta.attention_map(ours, sizes, operator="kao_qkv", at=at, weights=weights, centered=True)
            close([found], [exact[(slice(None), *at)]])

    def test_it_sums_to_one_and_is_not_negative(self, order, weighted):
        sizes = SIZES[:order]
        weights = weights_of(sizes) if weighted else None
        q = draw(2, *sizes, 4)
        for operator in OPERATORS:
            attention = attend(operator, 3 * q, q, q, order, weights).attention
            found = ta.attention_map(attention, sizes, operator=operator, at=last(sizes), weights=weights)
            assert found.shape == (2, *sizes) and found.ge(0).all()
            close([found.flatten(1).sum(1)], [torch.ones(2, dtype=torch.float64)])
            if weighted and order > 3 and operator not in ("kao_qkv", "kronecker_sum", "axial"):
                assert found.select(4, 0).eq(0).all()  # an index of weight 0


@every_order
def test_all_modes_kept_it_is_that_of_full_attention(order):
    sizes, q = SIZES[:order], draw(2, 7, 4)
    k = draw(2, *sizes, 4, seed=1)
    ours = attend("truncated", q, k, k, order, interaction_order=order).attention
    found = ta.attention_map(ours, sizes, operator="truncated", interaction_order=order)
    close([found], attend("flattened", q, k, k, order).attention)


def test_groups_as_modes():
    groups, q = draw(2, 4, 3, 1, 4, seed=1) + draw(2, 1, 1, 5, 4, seed=2), draw(2, 7, 4)
    ours = attend("truncated", q, groups, groups, 3, kept=[(0, 1), (2,)]).attention
    found = ta.attention_map(ours, (4, 3, 5), operator="truncated", kept=[(0, 1), (2,)])
    close([found], attend("flattened", q, groups, groups, 3).attention)


@pytest.mark.parametrize("order", [2, pytest.param(3, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("binary", [True, False])
def test_gaps_that_are_no_product_of_modes(order, binary):
    """The output is the sum of the values by the map; both samples with a mask of their own."""
    sizes = SIZES[:order]
    q, k, v = (draw(2, *sizes, 4, seed=seed) for seed in range(3))
    mask = draw(2, *sizes, seed=5) > -0.5
    given = {"mask": mask} if binary else {"weights": mask * draw(2, *sizes, seed=6).abs()}
    for operator in ("kronecker_product", "kronecker_sum", "axial", "flattened", *(("kao_kv",) if binary else ())):
        result = OPERATORS[operator].function(q, k, v, order=order, return_attention=True, **given)
        times = order if operator == "kronecker_sum" else 1
        for at in itertools.product(*map(range, sizes)):
            found = ta.attention_map(result.attention, sizes, operator=operator, at=at, **given)
            seen = mask[(slice(None), *at)] if operator in ON_THE_GRID else torch.ones(2, dtype=torch.bool)
            close([(times * weighed(found, v))[seen]], [result.output[(slice(None), *at)][seen]])


def test_lengths_and_weights_of_positions_are_weights():
    sizes, q, k, lengths = (4, 3), draw(2, 7, 4), draw(2, 4, 3, 4, seed=1), torch.tensor([[4, 2], [3, 3]])
    attention = ta.additive_attention(q, k, k, order=2, lengths=lengths, return_attention=True).attention
    weights = [(torch.arange(n) < lengths[:, mode, None]).double() for mode, n in enumerate(sizes)]
    ours = ta.attention_map(attention, sizes, lengths=lengths)
    close([ours], [ta.attention_map(attention, sizes, weights=weights)], rtol=0, atol=0)
    assert ours[0, :, :, 2].eq(0).all() and ours[1, :, 3].eq(0).all()
    whole = weights[0][:, :, None] * weights[1][:, None]
    close([ours], [ta.attention_map(attention, sizes, weights=whole)])


def test_where_nothing_takes_part_it_is_zero():
    absent = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]]).double()
    none = [torch.zeros(2, 7, 4).double(), torch.ones(2, 7, 3).double() / 3]
    assert ta.attention_map(none, (4, 3), weights=[absent, None]).eq(0).all()
    q, k = draw(2, 7, 4), draw(2, 4, 3, 4, seed=1)
    some = attend("additive", q, k, k, 2).attention
    expected = functools.reduce(lambda a, b: a.unsqueeze(-1) * b.unsqueeze(-2), some)
    close([ta.attention_map(some, (4, 3))], [expected])


def test_a_negative_index_counts_from_the_end_and_gradients_go_through():
    q, k = draw(1, 2, 3, 2).requires_grad_(), draw(1, 2, 3, 2, seed=1).requires_grad_()
    for operator in OPERATORS:
        attention = attend(operator, q, k, k, 2).attention
        maps = [ta.attention_map(attention, (2, 3), operator=operator, at=at) for at in ((-1, -3), (1, 0))]
        assert torch.equal(*maps)

        def of(q, k, operator=operator):
            return ta.attention_map(attend(operator, q, k, k, 2).attention, (2, 3), operator=operator, at=(1, 2))

        assert torch.autograd.gradcheck(of, (q, k), fast_mode=True)


class TestMessages:
    q = draw(2, 4, 3, 4)
    attention = ta.additive_attention(q, q, q, order=2, return_attention=True).attention

    def test_the_query_is_missing(self):
        rule = "at is missing: the weights of this operator are spread by where the query stands."
        for operator in ON_THE_GRID:
            attention = attend(operator, self.q, self.q, self.q, 2).attention
            refused(OptionError, f"attention_map: {rule}", ta.attention_map, attention, (4, 3), operator=operator)
            told = "attention_map: at has 1 indices, but there are 2 modes."
            refused(OptionError, told, ta.attention_map, attention, (4, 3), operator=operator, at=(1,))

    def test_options(self):
        dims = "at has 4 indices, but the weights have 3 dimensions of batch and positions."
        operators = f"there is no operator 'fast'; the operators are: {', '.join(OPERATORS)}."
        options = "operator 'additive' has no option 'kept'; its options are: interaction, saturation, include_self."
        cases = [
            ({"at": (4, 0)}, "at has index 4 at place 0, but the size there is 4."),
            ({"at": (0, -4)}, "at has index -4 at place 1, but the size there is 3."),
            ({"at": (0, 0, 0, 0)}, dims),
            ({"at": (0.5, 1)}, "at must be integers, got (0.5, 1)."),
            ({"at": 3}, "at must be integers, got 3."),
            ({"operator": "fast"}, operators),
            ({"kept": [(0,)]}, options),
            ({"interaction": "cubic"}, "interaction must be None or 'linear', got 'cubic'."),
        ]
        for given, rule in cases:
            refused(OptionError, f"attention_map: {rule}", ta.attention_map, self.attention, (4, 3), **given)

    def test_sizes_and_weights(self):
        published = attend("kao_qkv", self.q, self.q, self.q, 2).attention
        shape = "attention has shape (2, 4, 3, 4), but its last sizes must be (5,)."
        entries = "attention has 2 entries, but 3 are needed."
        centred = {"operator": "kao_qkv", "at": (0, 0), "centered": True}
        lengths = "weights of mode 1 have length 4, but the mode has size 3."
        kind = "mask must be bool, True where a position takes part, but has the type torch.float32."
        hint = "\n  Numbers that say how much a position counts are weights: give them as weights."
        cases = [
            (self.attention, (5, 3), {}, ShapeError, shape),
            (self.attention, (4, 3), {"weights": [None, torch.ones(4)]}, WeightsError, lengths),
            (self.attention, (4, 3), {"weights": torch.ones(4, 4)}, WeightsError,
             "mode 1 has size 4 in weights but 3 in sizes."),
            (self.attention, (4, 3), {"mask": torch.ones(4, 3)}, DtypeError, kind + hint),
            (None, (4, 3), {}, OptionError, "attention must be what an operator returned as its attention, a tuple."),
            (published, (4, 3), centred, ShapeError, entries),
            (self.attention, (), {}, OptionError, "the number of sizes must be at least 1, got 0."),
        ]  # fmt: skip
        for attention, sizes, given, error, rule in cases:
            refused(error, f"attention_map: {rule}", ta.attention_map, attention, sizes, **given)

    def test_an_operator_without_a_map(self):
        assert all(record.spread for record in OPERATORS.values())
        mine = ta.register_operator(dataclasses.replace(OPERATORS["additive"], name="mine", spread=None))
        try:
            rule = "attention_map: operator 'mine' has no map."
            refused(OptionError, rule, ta.attention_map, self.attention, (4, 3), operator="mine")
        finally:
            del OPERATORS[mine.name]
