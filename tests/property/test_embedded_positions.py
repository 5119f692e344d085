"""What positions do to exactness: added by outer sum they keep it, turned by rotary embedding they need a condition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensorattn as ta
from tensorattn.testing.strategies import additive_tensors, generators, mode_sizes, numbers, queries

CLOSE = {"rtol": 1e-9, "atol": 1e-10}


@st.composite
def embeddings(draw, sizes, dim):
    """An embedding with some modes periodic, and coordinates for some modes."""
    order = len(sizes)
    circles = {mode: 5.0 for mode in draw(st.sets(st.integers(0, order - 1)))}
    placed = draw(st.sets(st.integers(0, order - 1)))
    coordinates = {mode: 3 * numbers(draw(generators(20 + mode)), (sizes[mode],)) for mode in placed}
    if draw(st.booleans()):
        return ta.SinCosPositions(dim, modes=order, periodic=circles), coordinates
    entries = draw(st.lists(st.integers(1, 6), min_size=order, max_size=order))
    module = ta.LearnedPositions(dim, entries, modes=order, periodic=circles, dtype=torch.float64)
    with torch.no_grad():
        for mode, table in enumerate(module.tables):
            table.copy_(numbers(draw(generators(10 + mode)), tuple(table.shape)))
    return module, coordinates


@st.composite
def shares(draw, sizes, pairs, *, batch=(), stream=0):
    """An additive tensor in which the share of every mode depends on that mode alone, but for a constant."""
    parts = []
    for mode, (size, count) in enumerate(zip(sizes, pairs, strict=True)):
        part = numbers(draw(generators(stream + mode)), (*batch, size, 2 * count))
        beside = [size if k == mode else 1 for k in range(len(sizes))]
        parts.append(part.reshape(*batch, *beside, 2 * count).expand(*batch, *sizes, 2 * count))
    return torch.cat(parts, -1)


@given(mode_sizes(max_order=4), st.data())
def test_added_positions_keep_a_tensor_additive_and_attention_exact(sizes, data):
    """Additive attention from any queries to an additive tensor and its positions is full attention to them."""
    order, dim = len(sizes), 2 * len(sizes) + 1
    x = data.draw(additive_tensors(sizes, batch=(2,), dim=dim))
    positions, coordinates = data.draw(embeddings(sizes, dim))
    embedded = positions(x, coordinates=coordinates)
    residual = ta.interaction_residual(embedded, order=order)
    torch.testing.assert_close(residual, torch.zeros_like(residual), **CLOSE)
    key, value = embedded @ numbers(data.draw(generators(1)), (dim, dim)), embedded.flip(-1)
    query = data.draw(queries(sizes, batch=(2,), dim=dim))
    ours, full = (
        operator(query, key, value, order=order, return_lse=True)
        for operator in (ta.additive_attention, ta.flattened_attention)
    )
    torch.testing.assert_close(ours.output, full.output, **CLOSE)
    torch.testing.assert_close(ours.lse, full.lse, **CLOSE)


def test_positions_that_are_not_a_sum_over_modes_would_not():
    """The product of the vectors of two modes in place of their sum: the property above can fail."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (numbers(generator, (size, 4)) for size in (3, 4))
    product = (rows[:, None] * columns)[None]
    ours, full = (op(product, product, product, order=2) for op in (ta.additive_attention, ta.flattened_attention))
    assert (ours - full).abs().max() > 1e-2


@given(mode_sizes(max_order=4), st.integers(0, 3), st.data())
def test_logits_of_turned_vectors_depend_on_differences(sizes, extra, data):
    """Moving all queries and keys along every mode alike changes no logit, and turning keeps lengths."""
    order, dim = len(sizes), 2 * len(sizes) + extra
    circles = data.draw(st.sets(st.integers(0, order - 1)))
    rotary = ta.RotaryEmbedding(dim, modes=order, periodic=dict.fromkeys(circles, 5.0))
    q, k = (numbers(data.draw(generators(stream)), (*sizes, dim)) for stream in (0, 1))
    places = [3 * numbers(data.draw(generators(10 + mode)), (size,)) for mode, size in enumerate(sizes)]
    moved = [place + 1.75 * (mode + 1) for mode, place in enumerate(places)]

    def logits(coordinates):
        turned = (rotary(t, coordinates=coordinates).flatten(0, -2) for t in (q, k))
        return torch.einsum("id,jd->ij", *turned)

    torch.testing.assert_close(logits(moved), logits(places), **CLOSE)
    torch.testing.assert_close(rotary(q, coordinates=places).norm(dim=-1), q.norm(dim=-1), **CLOSE)


@given(mode_sizes(max_order=4, max_positions=36), st.data())
def test_turned_keys_stay_additive_if_every_mode_has_its_share(sizes, data):
    """Keys whose share of mode m depends on mode m alone: turned, they are additive, and attention is exact."""
    order = len(sizes)
    rotary = ta.RotaryEmbedding(4 * order, modes=order)
    key = data.draw(shares(sizes, rotary.pairs))
    value = data.draw(additive_tensors(sizes, dim=2))
    query = data.draw(queries(sizes, dim=4 * order, on_grid=True))
    ours, full = (
        operator(rotary(query), rotary(key), value, order=order)
        for operator in (ta.additive_attention, ta.flattened_attention)
    )
    torch.testing.assert_close(ours, full, **CLOSE)


@given(mode_sizes(max_order=4, max_positions=36), st.data())
def test_pooled_queries_and_keys_turn_each_by_its_own_mode(sizes, data):
    """Queries and keys in shares, any values: the product of one matrix a mode is full attention of turned ones."""
    order = len(sizes)
    rotary = ta.RotaryEmbedding(4 * order, modes=order)
    query, key = (data.draw(shares(sizes, rotary.pairs, stream=stream)) for stream in (0, 10))
    value = numbers(data.draw(generators(30)), (*sizes, 3))
    full = ta.flattened_attention(rotary(query), rotary(key), value, order=order)
    output = value
    for mode in range(order):
        q, k = (rotary.rotate_mode(ta.mode_averages(t, order=order)[mode], mode) for t in (query, key))
        matrix = (q @ k.mT / (4 * order) ** 0.5).softmax(-1)
        output = torch.tensordot(matrix, output, dims=([1], [mode])).movedim(0, mode)
    torch.testing.assert_close(output, full, **CLOSE)
    turned_before = ta.kronecker_product_attention(rotary(query), rotary(key), value, order=order)
    torch.testing.assert_close(turned_before, full, **CLOSE)


def test_other_additive_keys_lose_exactness():
    """What `RotaryEmbedding` says of operators that average keys: additive is not enough once they are turned."""
    generator = torch.Generator().manual_seed(0)
    key = ta.outer_sum([numbers(generator, (size, 8)) for size in (3, 4)])
    value = ta.outer_sum([numbers(generator, (size, 2)) for size in (3, 4)])
    query = numbers(generator, (3, 4, 8))
    rotary = ta.RotaryEmbedding(8, modes=2)
    errors = []
    for turn in (lambda t: t, rotary):
        ours, full = (
            operator(turn(query), turn(key), value, order=2)
            for operator in (ta.additive_attention, ta.flattened_attention)
        )
        errors.append(float((ours - full).norm() / (full - value.mean((0, 1))).norm()))
    assert errors[0] < 1e-12
    assert errors[1] > 0.1


@pytest.mark.parametrize("mode", [0, 1])
def test_along_a_fibre_only_its_own_mode_turns(mode):
    """Axial attention of turned queries and keys is that of ones whose other shares are left as they are."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (numbers(generator, (3, 4, 8)) for _ in range(3))
    rotary = ta.RotaryEmbedding(8, modes=2)
    whole = ta.axial_attention(rotary(q), rotary(k), v, order=2, return_attention=True).attention[mode]
    fibres = [t.movedim(mode, -2) for t in (q, k)]
    logits = rotary.rotate_mode(fibres[0], mode) @ rotary.rotate_mode(fibres[1], mode).mT / 8**0.5
    torch.testing.assert_close(whole, logits.softmax(-1).movedim(-2, mode), **CLOSE)
