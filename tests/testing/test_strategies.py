"""Strategies draw what they promise, and all of it: orders, ones, zeros, batches, layouts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorattn as ta
from tensorattn.testing import (
    additive_tensors,
    allowed,
    batch_sizes,
    biases,
    cases,
    masks,
    mode_partitions,
    mode_sizes,
    queries,
    reference,
    tensor_normals,
    tensors,
    weights,
)
from tensorattn.testing.strategies import largest

SMALL = settings(max_examples=10)
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def seen(strategy, feature, examples=100):
    """Every value of a feature that occurs."""
    found = set()

    @settings(max_examples=examples)
    @given(strategy)
    def look(drawn):
        found.add(feature(drawn))

    look()
    return found


def test_all_orders_and_sizes_are_drawn():
    assert seen(mode_sizes(), len) == {1, 2, 3, 4}
    assert seen(mode_sizes(order=2), lambda sizes: sizes[1]) == {1, 2, 3, 4, 5, 6}
    assert seen(batch_sizes(), len) == {0, 1, 2}


@given(st.integers(1, 64), st.data())
def test_the_number_of_positions_is_capped(cap, data):
    assert math.prod(data.draw(mode_sizes(max_positions=cap))) <= cap
    case = data.draw(cases(max_positions=cap))
    assert math.prod(case.sizes) <= cap
    assert math.prod(case.batch) * math.prod(case.sizes) <= max(cap, 9)


@given(st.integers(1, 4), st.data())
def test_partitions_hold_every_mode_once(order, data):
    groups = data.draw(mode_partitions(order))
    assert sorted(mode for group in groups for mode in group) == list(range(order))
    assert all(group == tuple(sorted(group)) and group for group in groups)


def test_all_partitions_are_drawn():
    assert len(seen(mode_partitions(3), lambda groups: frozenset(groups), 200)) == 5


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@SMALL
@given(mode_sizes(), st.data())
def test_additive_tensors_have_no_interaction_in_any_type(dtype, sizes, data):
    tensor = data.draw(additive_tensors(sizes, batch=(2,), dtype=dtype))
    assert tensor.dtype == dtype
    rest = tensor.double() - reference.additive_part(tensor, order=len(sizes))
    rounded = torch.float64 if dtype.itemsize < 4 else dtype  # in half precision sums are exact
    assert rest.abs().max() <= allowed("average", rounded, magnitude=4 * largest(tensor))


@given(mode_sizes(), st.data())
def test_samples_of_tensor_normal_laws_have_no_interaction(sizes, data):
    sample = data.draw(tensor_normals(sizes, batch=(2,)))
    rest = ta.interaction_residual(sample, order=len(sizes))
    assert rest.abs().max() <= allowed("average", torch.float64, magnitude=8 * largest(sample))


@pytest.mark.thorough
def test_samples_of_tensor_normal_laws_have_the_covariance_of_one_mode():
    """A term is constant along every other mode, and correlated along its own."""
    ranks = seen(tensor_normals((3, 4), dim=1), lambda x: int(torch.linalg.matrix_rank(x[..., 0] - x.mean())))
    assert max(ranks) <= 2
    assert ranks & {1, 2}


def test_all_layouts_are_drawn_and_hold_the_same_numbers():
    def layout(tensor):
        assert tensor.isfinite().all()
        if tensor.is_contiguous():
            return "dense"
        if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.itemsize:
            return "sliced"
        return "channels first" if tensor.movedim(-1, 1).is_contiguous() else "permuted"

    strategy = tensors((2, 3, 4, 5))
    assert seen(strategy, layout, 200) == {"dense", "sliced", "channels first", "permuted"}


def test_streams_differ_where_seeds_do_not():
    drawn = st.data()

    @settings(max_examples=5)
    @given(drawn)
    def look(data):
        first, second = (data.draw(tensors((3,), stream=stream)) for stream in (0, 1))
        assert not torch.equal(first, second)

    look()


def test_queries_are_drawn_on_the_grid_and_elsewhere():
    assert seen(queries((2, 3)), lambda query: query.dim() - 1) == {0, 1, 2, 3}
    assert seen(queries((2, 3), on_grid=True), lambda query: tuple(query.shape)) == {(2, 3, 3)}


@pytest.mark.thorough
def test_weights_are_none_whole_real_boolean_shared_and_batched():
    drawn = weights((3, 2), batch=(2, 2))
    assert {None, tuple} == seen(drawn, lambda w: w if w is None else tuple)
    kinds = seen(drawn, lambda w: None if w is None or w[0] is None else (w[0].dtype, tuple(w[0].shape[:-1])), 300)
    assert {kind[0] for kind in kinds if kind} == {torch.int64, torch.bool, torch.float64}
    assert {(), (1,), (2,), (1, 2), (2, 1), (2, 2)} <= {kind[1] for kind in kinds if kind}
    assert seen(drawn, lambda w: w is not None and any(v is not None and (v == 0).any() for v in w)) == {True, False}
    whole = seen(weights((3,), integer=True), lambda w: w is None or w[0] is None or bool((w[0] % 1 == 0).all()))
    assert whole == {True}


@given(weights((3, 2), batch=(2,)))
def test_every_batch_entry_has_a_position(drawn):
    assert all(w is None or bool((w > 0).any(-1).all()) for w in drawn or ())


def test_empty_batch_entries_are_drawn_if_asked_for():
    empty = weights((3,), batch=(3,), empty=True)
    assert seen(empty, lambda w: w is not None and w[0] is not None and not (w[0] > 0).any(-1).all()) == {True, False}


@pytest.mark.thorough
def test_biases_are_none_tables_windows_and_batched_and_may_hide_everything():
    drawn = biases((3, 2), (4, 1), batch=(2,))
    assert seen(drawn, lambda bias: bias[0] if bias[0] is None else tuple(bias[0].shape)) == {None, (4, 3), (2, 4, 3)}
    hidden = seen(drawn, lambda bias: None if bias[0] is None else _how_many(bias[0].isinf().all(-1)), 300)
    assert hidden == {None, "none", "some", "all"}
    assert seen(drawn, lambda bias: any(part is not None and bool(part.isnan().any()) for part in bias)) == {False}


def _how_many(mask):
    return "all" if bool(mask.all()) else "some" if bool(mask.any()) else "none"


@given(st.sampled_from(TYPES), st.data())
def test_no_logit_exceeds_what_the_type_has_digits_for(dtype, data):
    case = data.draw(cases(dtype=dtype))
    limit = {torch.float64: 1e4, torch.float32: 1e2, torch.float16: 4.0, torch.bfloat16: 2.0}[dtype]
    assert case.logit <= limit * (1 + 1e-12)


def test_masks_are_lengths_products_and_any_shared_or_not_and_may_be_empty():
    drawn = masks((3, 2), batch=(2,))
    assert seen(drawn, lambda mask: tuple(mask.shape)) == {(3, 2), (2, 3, 2)}
    assert seen(drawn, lambda mask: bool(mask.flatten(-2).any(-1).all())) == {True, False}

    def product(mask):
        return bool((mask == mask.any(-1, keepdim=True) & mask.any(-2, keepdim=True)).all())

    assert seen(drawn, product) == {True, False}
