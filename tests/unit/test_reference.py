"""The oracle against facts that it did not produce: torch, SciPy, dense einsums, repetition, theorems."""

import ast
import itertools
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import logsumexp

from tensorattn import reference as ref

RTOL, ATOL = 1e-10, 1e-12
close = partial(assert_allclose, rtol=RTOL, atol=ATOL)

SIZES = [(5,), (3, 4), (1, 3), (2, 3, 4), (2, 1, 3, 2)]
BATCHES = [(), (2,), (2, 3)]
linear = partial(ref.additive_attention, interaction="linear")

# Operators that take any queries, then those whose queries lie on a grid.
ANY_QUERY = {
    "flattened": ref.flattened_attention,
    "kao_kv": ref.kao_kv,
    "additive": ref.additive_attention,
    "additive linear": linear,
    "truncated": partial(ref.truncated_attention, interaction_order=1),
    "truncated linear": partial(ref.truncated_attention, interaction_order=1, interaction="linear"),
}
ON_GRID = {
    "axial": ref.axial_attention,
    "kao_qkv": ref.kao_qkv,
    "kao_qkv centered": partial(ref.kao_qkv, centered=True),
    "kronecker_product": ref.kronecker_product_attention,
    "kronecker_product sums": partial(ref.kronecker_product_attention, pool="sum"),
    "kronecker_sum": ref.kronecker_sum_attention,
    "kronecker_sum sums": partial(ref.kronecker_sum_attention, pool="sum"),
}
OPERATORS = ANY_QUERY | ON_GRID


def draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def additive(seed, batch, sizes, dim):
    """A random additive tensor, by broadcasting."""
    total = 0.0
    for mode, (effect, size) in enumerate(zip(draw(seed, *((*batch, n, dim) for n in sizes)), sizes, strict=True)):
        total = total + effect.reshape(*batch, *(size if m == mode else 1 for m in range(len(sizes))), dim)
    return np.asarray(total)


def dense(query, key, value, order, weights=None, scale=None, logits=0.0):
    """Full attention as one softmax over the flattened positions; any (..., positions, P) may add to its logits."""
    batch, sizes, dim = key.shape[: -order - 1], key.shape[-order - 1 : -1], key.shape[-1]
    count = np.ones((*batch, *sizes))
    for mode, w in enumerate(weights or []):
        if w is not None:
            w = np.broadcast_to(w, (*batch, sizes[mode]))
            count = count * w.reshape(*batch, *(sizes[m] if m == mode else 1 for m in range(order)))
    flat = (*batch, -1)
    q = query.reshape(*flat, dim)
    s = dim**-0.5 if scale is None else scale
    scores = s * np.einsum("...qd,...pd->...qp", q, key.reshape(*flat, dim)) + logits
    b = np.broadcast_to(count.reshape(*batch, 1, -1), scores.shape)
    lse = logsumexp(scores, b=b, axis=-1)
    output = np.einsum("...qp,...pe->...qe", b * np.exp(scores - lse[..., None]), value.reshape(*flat, value.shape[-1]))
    return output.reshape(*query.shape[:-1], value.shape[-1]), lse.reshape(query.shape[:-1])


def same(result, expected):
    close(result[0], expected[0])
    close(result[1], expected[1])


# --- independence -----------------------------------------------------------------------------------------


def imported(source):
    """Top-level packages that a source imports, relative imports as '.'."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else (node.module or "").split(".")[0]


def test_imports_neither_the_package_nor_torch():
    allowed = {"__future__", "collections", "functools", "itertools", "math", "numpy", "typing"}
    assert set(imported(Path(ref.__file__).read_text(encoding="utf-8"))) <= allowed


@pytest.mark.parametrize(
    "source", ["import torch.nn", "from torch import nn", "from . import plan", "def f():\n import tensorattn"]
)
def test_the_import_check_can_fail(source):
    assert set(imported(source)) & {"torch", ".", "tensorattn"}


def test_all_is_every_public_function():
    functions = {name for name, f in vars(ref).items() if getattr(f, "__module__", "") == ref.__name__ and callable(f)}
    assert sorted(name for name in functions if not name.startswith("_")) == sorted(ref.__all__)


# --- the adjoint pair -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("sizes", SIZES)
def test_averages_are_numpy_means(sizes, batch):
    order = len(sizes)
    (tensor,) = draw(0, (*batch, *sizes, 3))
    axes = [len(batch) + m for m in range(order)]
    for size in range(order + 1):
        for kept in itertools.combinations(range(order), size):
            dropped = tuple(axes[m] for m in range(order) if m not in kept)
            close(ref.marginal_mean(tensor, kept, order=order), tensor.mean(axis=dropped))
    averages = ref.mode_averages(tensor, order=order)
    assert [a.shape for a in averages] == [(*batch, n, 3) for n in sizes]


def test_weighted_averages_by_hand():
    tensor = np.array([[1.0, 2.0, 6.0], [3.0, 4.0, 8.0]])[..., None]
    rows, columns = ref.mode_averages(tensor, order=2, weights=[[1, 3], [0, 1, 2]])
    close(rows[:, 0], [14 / 3, 20 / 3])
    close(columns[:, 0], [2.5, 3.5, 7.5])
    close(ref.marginal_mean(tensor, (), order=2, weights=[[1, 3], [0, 1, 2]]), [(2 + 12 + 12 + 48) / 12])
    close(ref.marginal_mean(tensor, (1,), order=2, weights=[[0, 0], None]), np.zeros((3, 1)))


def test_kept_modes_come_in_increasing_order():
    (tensor,) = draw(0, (2, 3, 4, 1))
    assert_array_equal(ref.marginal_mean(tensor, (2, 0), order=3), ref.marginal_mean(tensor, (0, 2), order=3))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("sizes", SIZES)
def test_outer_sum_is_the_broadcast_sum_and_the_adjoint_of_the_averages(sizes, batch):
    order, size = len(sizes), math.prod(sizes)
    vectors = draw(1, *((*batch, n, 2) for n in sizes))
    assert_allclose(ref.outer_sum(vectors), additive(1, batch, sizes, 2), rtol=1e-14, atol=1e-14)
    (tensor,) = draw(2, (*batch, *sizes, 2))
    averages = ref.mode_averages(tensor, order=order)
    left = np.sum(tensor * ref.outer_sum(vectors))
    right = sum(size / n * np.sum(a * v) for n, a, v in zip(sizes, averages, vectors, strict=True))
    close(left, right)


@pytest.mark.parametrize("weights", [None, "weighted"])
@pytest.mark.parametrize("sizes", SIZES)
def test_additive_part_is_the_weighted_least_squares_fit(sizes, weights):
    rng = np.random.default_rng(3)
    w = None if weights is None else [rng.uniform(0.5, 2.0, n) for n in sizes]
    tensor = rng.standard_normal((*sizes, 2))
    columns = np.concatenate([np.indices(sizes)[m].ravel()[:, None] == np.arange(n) for m, n in enumerate(sizes)], 1)
    count = np.ones(sizes)
    for m, wm in enumerate(w or []):
        count = count * np.moveaxis(np.broadcast_to(wm, (*np.delete(sizes, m), sizes[m])), -1, m)
    root = np.sqrt(count).reshape(-1, 1)
    solution = np.linalg.lstsq(root * columns, root * tensor.reshape(-1, 2), rcond=None)[0]
    fit = (columns @ solution).reshape(tensor.shape)
    close(ref.additive_part(tensor, order=len(sizes), weights=w), fit)


# --- one softmax ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0.0, 0.7])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", OPERATORS)
def test_order_one_is_torch_attention(name, batch, scale):
    query, key, value = draw(4, (*batch, 5, 4), (*batch, 5, 4), (*batch, 5, 3))
    tensors = [torch.from_numpy(t) for t in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, scale=scale).numpy()
    output, lse = OPERATORS[name](query, key, value, order=1, scale=scale)
    close(output, expected)
    if lse is not None:
        close(lse, dense(query, key, value, 1, scale=scale)[1])
    assert (lse is None) == (name.startswith(("kao_qkv", "kronecker")))


@pytest.mark.parametrize("name", OPERATORS)
def test_order_one_takes_torch_tensors_and_masks(name):
    query, key, value = (torch.from_numpy(t) for t in draw(5, (5, 4), (5, 4), (5, 3)))
    mask = torch.tensor([True, False, True, True, False])
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[None])
    close(OPERATORS[name](query, key, value, order=1, weights=[mask])[0], expected.numpy())


@pytest.mark.parametrize("positions", [(), (7,), (2, 3), (2, 1, 2)])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("sizes", SIZES)
def test_flattened_is_one_dense_softmax(sizes, batch, positions):
    query, key, value = draw(6, (*batch, *positions, 4), (*batch, *sizes, 4), (*batch, *sizes, 3))
    same(ref.flattened_attention(query, key, value, order=len(sizes)), dense(query, key, value, len(sizes)))


def test_flattened_with_weights_of_the_batch():
    rng = np.random.default_rng(7)
    query, key, value = draw(7, (2, 3, 6, 4), (2, 3, 3, 4, 4), (2, 3, 3, 4, 2))
    weights = [rng.uniform(0, 2, (2, 1, 3)), rng.integers(0, 3, (2, 3, 4)) + np.eye(4)[0]]
    same(ref.flattened_attention(query, key, value, order=2, weights=weights), dense(query, key, value, 2, weights))


def test_flattened_causal_and_bias_are_terms_of_the_dense_logits():
    batch, sizes, grid = (2,), (3, 2, 2), (3, 2, 3)
    query, key, value = draw(8, (*batch, *grid, 4), (*batch, *sizes, 4), (*batch, *sizes, 2))
    tables = draw(9, (3, 3), (2, 2, 2))
    logits = np.zeros((*batch, *grid, *sizes))
    logits += tables[0][:, None, None, :, None, None] + tables[1][:, None, :, None, None, :, None]
    frames = np.arange(3)
    logits[:, (frames[:, None] < frames)[:, None, None, :, None, None] & np.ones((*grid, *sizes), bool)] = -np.inf
    expected = dense(query, key, value, 3, logits=logits.reshape(2, 18, 12))
    options = {"order": 3, "bias": [*tables, None]}
    same(ref.flattened_attention(query, key, value, causal=0, **options), expected)
    with pytest.raises(AssertionError):
        same(ref.flattened_attention(query, key, value, **options), expected)


def test_large_logits_do_not_overflow():
    key = np.array([[1e4], [0.0]])
    for operator in OPERATORS.values():
        output, lse = operator(np.ones((2, 1)), key, np.array([[3.0], [5.0]]), order=1, scale=1.0)
        close(output, [[3.0], [3.0]])
        if lse is not None:
            close(lse, [1e4, 1e4])


# --- each operator against its definition, by a second road -----------------------------------------------


@pytest.mark.parametrize("name", ANY_QUERY)
def test_queries_are_independent_of_each_other_and_of_the_batch(name):
    query, key, value = draw(10, (2, 3, 4), (2, 2, 3, 4), (2, 2, 3, 1))
    output, lse = ANY_QUERY[name](query, key, value, order=2)
    for b, i in np.ndindex(2, 3):
        alone = ANY_QUERY[name](query[b, i], key[b], value[b], order=2)
        close(alone[0], output[b, i])
        close(alone[1], lse[b, i])


def test_kao_kv_by_hand():
    key = np.log([[[1.0], [2.0]], [[2.0], [4.0]]])  # mode averages log √2, log 2√2 of both modes
    output, lse = ref.kao_kv([2.0], key, np.exp(key), order=2, scale=1.0, weights=[[1, 1], [1, 3]])
    rows, columns = np.log([2**0.75, 2**1.75]), np.log([2**0.5, 2**1.5])
    mass = np.array([*np.exp(2 * rows), *([1, 3] * np.exp(2 * columns))])
    values = [1.75, 3.5, 1.5, 3.0]
    close(output, [mass @ values / mass.sum()])
    close(lse, np.log(mass.sum()))


@pytest.mark.parametrize("sizes", SIZES)
def test_kao_kv_is_order_one_attention_to_the_concatenated_averages(sizes):
    query, key, value = draw(11, (2, 6, 4), (2, *sizes, 4), (2, *sizes, 3))
    axes = range(1, len(sizes) + 1)
    tokens = [
        np.concatenate([t.mean(axis=tuple(a for a in axes if a != kept)) for kept in axes], axis=1)
        for t in (key, value)
    ]
    same(ref.kao_kv(query, key, value, order=len(sizes)), dense(query, *tokens, 1))


def test_kao_kv_is_a_mixture_of_the_modes():
    query, key, value = draw(12, (5, 4), (3, 4, 4), (3, 4, 2))
    parts = [dense(query, key.mean(1 - m), value.mean(1 - m), 1) for m in range(2)]
    share = np.exp(parts[0][1] - np.logaddexp(parts[0][1], parts[1][1]))[:, None]
    close(ref.kao_kv(query, key, value, order=2)[0], share * parts[0][0] + (1 - share) * parts[1][0])


@pytest.mark.parametrize("sizes", SIZES)
def test_additive_is_one_softmax_a_mode(sizes):
    order = len(sizes)
    query, key, value = draw(13, (6, 4), (*sizes, 4), (*sizes, 3))
    modes = []
    for kept in range(order):
        others = tuple(m for m in range(order) if m != kept)
        modes.append(dense(query, key.mean(others), value.mean(others), 1))
    every = tuple(range(order))
    output = sum(m[0] for m in modes) - (order - 1) * value.mean(every)
    lse = sum(m[1] for m in modes) - (order - 1) * 0.5 * query @ key.mean(every)
    same(ref.additive_attention(query, key, value, order=order), (output, lse))


@pytest.mark.parametrize("centered", [False, True])
def test_kao_qkv_is_an_outer_sum_of_attended_averages(centered):
    query, key, value = draw(14, (2, 3, 4, 4), (2, 3, 4, 4), (2, 3, 4, 2))
    operator = ref.additive_attention if centered else ref.kao_kv
    rows = operator(query.mean(2), key, value, order=2)[0]
    columns = operator(query.mean(1), key, value, order=2)[0]
    mean = operator(query.mean((1, 2)), key, value, order=2)[0]
    expected = rows[:, :, None] + columns[:, None] - (mean[:, None, None] if centered else 0.0)
    close(ref.kao_qkv(query, key, value, order=2, centered=centered)[0], expected)


def test_kao_qkv_at_scale_zero_is_n_means_or_one():
    (tensor,) = draw(15, (2, 3, 4, 2))
    ones, mean = np.ones((2, 3, 4, 1)), tensor.mean((0, 1, 2))
    close(ref.kao_qkv(tensor, tensor, tensor, order=3, scale=0.0, centered=True)[0], ones * mean)
    expected = sum(n * tensor.mean((0, 1, 2)) for n in (2, 3, 4)) / 9 * 3
    close(ref.kao_qkv(tensor, tensor, tensor, order=3, scale=0.0)[0], ones * expected)


@pytest.mark.parametrize("sizes", [(3, 4), (2, 3, 2)])
def test_axial_is_the_mean_of_order_one_attention_along_each_mode(sizes):
    order = len(sizes)
    query, key, value = draw(16, *((2, *sizes, d) for d in (4, 4, 3)))
    expected = 0.0
    for mode in range(order):
        moved = (torch.from_numpy(np.moveaxis(t, 1 + mode, -2).copy()) for t in (query, key, value))
        along = torch.nn.functional.scaled_dot_product_attention(*moved).numpy()
        expected = expected + np.moveaxis(along, -2, 1 + mode) / order
    output, lse = ref.axial_attention(query, key, value, order=order)
    close(output, expected)
    assert lse is None


def kronecker_matrices(query, key, pool):
    """Attention matrix of each mode of one order-2 tensor."""
    for mode in range(2):
        q, k = (getattr(t, pool)(1 - mode) for t in (query, key))
        logits = 0.5 * q @ k.T
        yield np.exp(logits - logsumexp(logits, axis=1, keepdims=True))


@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_kronecker_operators_are_mode_products(pool):
    query, key, value = draw(17, (3, 4, 4), (3, 4, 4), (3, 4, 2))
    a, b = kronecker_matrices(query, key, pool)
    product = (np.kron(a, b) @ value.reshape(12, 2)).reshape(3, 4, 2)
    total = ((np.kron(a, np.eye(4)) + np.kron(np.eye(3), b)) @ value.reshape(12, 2)).reshape(3, 4, 2)
    close(ref.kronecker_product_attention(query, key, value, order=2, pool=pool)[0], product)
    close(ref.kronecker_sum_attention(query, key, value, order=2, pool=pool)[0], total)


def test_kronecker_product_and_kao_qkv_take_queries_on_another_grid():
    query, key, value = draw(18, (2, 5, 4), (3, 4, 4), (3, 4, 2))
    a, b = kronecker_matrices(query, key, "mean")
    expected = np.einsum("ia,jb,abd->ijd", a, b, value)
    close(ref.kronecker_product_attention(query, key, value, order=2)[0], expected)
    assert ref.kao_qkv(query, key, value, order=2)[0].shape == (2, 5, 2)


# --- theorems ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("sizes", SIZES)
def test_additive_tensors_make_additive_attention_exact(sizes, batch):
    order = len(sizes)
    rng = np.random.default_rng(19)
    key, value = additive(20, batch, sizes, 4), additive(21, batch, sizes, 3)
    query = 2 * rng.standard_normal((*batch, 3, 2, 4))
    weights = [rng.integers(0, 3, (*batch, n)) + (np.arange(n) == 0) for n in sizes]
    for w in (None, weights):
        expected = dense(query, key, value, order, w)
        same(ref.additive_attention(query, key, value, order=order, weights=w), expected)
        same(linear(query, key, value, order=order, weights=w), expected)


def test_kao_kv_is_not_exact_on_additive_tensors():
    key, value = additive(20, (), (3, 4), 4), additive(21, (), (3, 4), 3)
    (query,) = draw(22, (2, 4))
    assert np.abs(ref.kao_kv(query, key, value, order=2)[0] - dense(query, key, value, 2)[0]).max() > 0.1


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_causal_additive_attention_is_exact_on_additive_tensors(mode):
    sizes, batch = (3, 2, 4), (2,)
    key, value = additive(23, batch, sizes, 4), additive(24, batch, sizes, 2)
    (query,) = draw(25, (*batch, *sizes, 4))
    options = {"order": 3, "causal": mode, "weights": [[1, 2, 1], None, [0, 1, 1, 3]]}
    same(ref.additive_attention(query, key, value, **options), ref.flattened_attention(query, key, value, **options))


@pytest.mark.parametrize("name", ANY_QUERY)
def test_causal_operators_do_not_read_the_future(name):
    query, key, value = draw(26, (3, 4, 4), (3, 4, 4), (3, 4, 2))
    options = {"order": 2, "causal": 1}
    output, lse = ANY_QUERY[name](query, key, value, **options)
    poisoned = [t.copy() for t in (query, key, value)]
    for tensor in poisoned:
        tensor[:, 2:] = np.nan
    again = ANY_QUERY[name](*poisoned, **options)
    assert_array_equal(again[0][:, :2], output[:, :2])
    assert_array_equal(again[1][:, :2], lse[:, :2])
    whole = ANY_QUERY[name](query, key, value, order=2)
    close(output[:, 3], whole[0][:, 3])
    cropped = ANY_QUERY[name](query[:, 1], key[:, :2], value[:, :2], order=2)
    close(output[:, 1], cropped[0])
    close(lse[:, 1], cropped[1])


def test_causal_additive_attention_uses_running_means():
    query, key, value = draw(27, (3, 2, 4), (3, 2, 4), (3, 2, 1))
    for t in range(3):
        keys, values = key[: t + 1], value[: t + 1]
        frames, running = (
            dense(query[t], keys.mean(1), values.mean(1), 1),
            dense(query[t], keys.mean(0), values.mean(0), 1),
        )
        expected = frames[0] + running[0] - values.mean((0, 1))
        close(ref.additive_attention(query, key, value, order=2, causal=0)[0][t], expected)


@pytest.mark.parametrize("causal", [None, 0])
def test_position_bias_is_exact_on_additive_tensors(causal):
    key, value = additive(28, (2,), (3, 4), 4), additive(29, (2,), (3, 4), 2)
    query, *bias = draw(30, (2, 3, 5, 4), (3, 3), (2, 5, 4))
    bias[1][:, :, 3] = -np.inf  # a box mask
    options = {"order": 2, "bias": bias, "causal": causal}
    expected = ref.flattened_attention(query, key, value, **options)
    same(ref.additive_attention(query, key, value, **options), expected)
    same(ref.truncated_attention(query, key, value, interaction_order=1, **options), expected)


@pytest.mark.parametrize("sizes", SIZES)
def test_truncated_at_the_full_order_is_flattened(sizes):
    order = len(sizes)
    query, key, value = draw(31, (2, 5, 4), (2, *sizes, 4), (2, *sizes, 3))
    weights = [None] * (order - 1) + [np.arange(sizes[-1]) + 0.5]
    for interaction in (None, "linear"):
        options = {"order": order, "weights": weights, "interaction": interaction}
        result = ref.truncated_attention(query, key, value, interaction_order=order, **options)
        same(result, dense(query, key, value, order, weights))


@pytest.mark.parametrize("interaction", [None, "linear"])
def test_truncated_at_order_one_is_additive(interaction):
    query, key, value = draw(32, (5, 4), (2, 3, 4, 4), (2, 3, 4, 2))
    options = {"order": 3, "weights": [None, [1, 0, 2], None], "interaction": interaction, "scale": 0.3}
    result = ref.truncated_attention(query, key, value, interaction_order=1, **options)
    same(result, ref.additive_attention(query, key, value, **options))


def test_independent_groups_of_modes_make_truncated_attention_exact():
    (query,) = draw(33, (6, 4))
    pairs = draw(34, (2, 1, 3, 1, 4), (2, 1, 3, 1, 2))
    others = draw(35, (1, 4, 1, 2, 4), (1, 4, 1, 2, 2))
    key, value = (a + b for a, b in zip(pairs, others, strict=True))
    expected = dense(query, key, value, 4)
    same(ref.truncated_attention(query, key, value, order=4, kept=[(0, 2), (1, 3)]), expected)
    same(ref.truncated_attention(query, key, value, order=4, interaction_order=2), expected)
    grouped = (np.transpose(t, (0, 2, 1, 3, 4)).reshape(6, 8, -1) for t in (key, value))
    same(ref.additive_attention(query, *grouped, order=2), expected)


def test_a_mode_in_no_kept_subset_is_averaged_and_counted():
    query, key, value = draw(36, (5, 4), (3, 1, 4), (3, 1, 2))
    key, value = np.repeat(key, 4, axis=1), np.repeat(value, 4, axis=1)
    weights = [None, [1, 2, 0, 1]]
    result = ref.truncated_attention(query, key, value, order=2, kept=[(0,)], weights=weights)
    same(result, dense(query, key, value, 2, weights))
    options = {"order": 2, "weights": weights, "bias": draw(55, (5, 3), (1, 4))}
    result = ref.truncated_attention(query[:, None], key, value, kept=[(0,)], **options)
    same(result, ref.flattened_attention(query[:, None], key, value, **options))


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_counting_numbers_of_a_truncation_have_a_closed_form(order):
    for r in range(1, order + 1):
        counts = ref.counting_numbers(itertools.combinations(range(order), r), order)
        assert list(counts) == sorted(counts, key=lambda u: (len(u), u))
        for subset, count in counts.items():
            top = order - len(subset) - 1
            binomial = 1 if top == -1 else math.comb(top, r - len(subset))
            assert type(count) is int and count == (-1) ** (r - len(subset)) * binomial


@pytest.mark.parametrize(
    "kept", [[(0, 1), (1, 2)], [(2, 0), (1,)], [()], [(0,), (0, 1, 2)], [(0, 1), (1, 2), (0, 2), (3,)]]
)
def test_counting_numbers_count_every_kept_effect_once(kept):
    counts = ref.counting_numbers(kept, 4)
    closure = {frozenset(c) for u in kept for n in range(len(u) + 1) for c in itertools.combinations(u, n)}
    assert {frozenset(u) for u in counts} == closure
    assert all(sum(c for v, c in counts.items() if u <= set(v)) == 1 for u in closure)


def first_order(operator, query, key, value, **options):
    """Derivative of the output by the scale, at 0, by a central difference."""
    h = 1e-5
    plus, minus = (operator(query, key, value, scale=sign * h, **options)[0] for sign in (1, -1))
    return (plus - minus) / (2 * h)


def moments(key, value, weights):
    """Weighted value-by-key covariance: of the positions, and of each mode's averages, by explicit sums."""
    share = np.einsum("a,b,c->abc", *(np.asarray(w) / np.sum(w) for w in weights))
    k = key - np.einsum("abc,abcd->d", share, key)
    v = value - np.einsum("abc,abcd->d", share, value)
    total = np.einsum("abc,abce,abcd->ed", share, v, k)
    modes = []
    for mode in range(3):
        others = tuple(m for m in range(3) if m != mode)
        p = share.sum(others)
        averages = [(share[..., None] * t).sum(others) / p[:, None] for t in (v, k)]
        modes.append(np.einsum("a,ae,ad->ed", p, *averages))
    return total, modes


@pytest.mark.parametrize("weights", [[[1, 1], [1, 1, 1], [1, 1]], [[1, 3], [2, 1, 0.5], [1, 4]]])
def test_first_order_laws(weights):
    query, key, value = draw(37, (5, 4), (2, 3, 2, 4), (2, 3, 2, 3))
    total, modes = moments(key, value, weights)
    law = partial(first_order, query=query, key=key, value=value, order=3, weights=weights)
    near = partial(assert_allclose, rtol=1e-7, atol=1e-8)
    near(law(ref.flattened_attention), query @ total.T)
    near(law(linear), query @ total.T)
    near(law(partial(linear, saturation=None)), query @ total.T)
    near(law(ref.additive_attention), query @ sum(modes).T)
    pairs = partial(ref.truncated_attention, interaction_order=2)
    near(law(partial(pairs, interaction="linear")), query @ total.T)
    assert np.abs(law(pairs) - query @ total.T).max() > 1e-3
    sums = [np.sum(w) for w in weights]
    near(law(ref.kao_kv), query @ (sum(n * c for n, c in zip(sums, modes, strict=True)) / sum(sums)).T)


def test_linear_interaction_makes_the_log_sum_exp_exact_to_second_order():
    query, key, value = draw(38, (5, 4), (3, 4, 4), (3, 4, 2))
    errors = []
    for scale in (1e-1, 1e-2):
        options = {"order": 2, "scale": scale}
        truth = dense(query, key, value, 2, scale=scale)[1]
        errors.append(
            [
                np.abs(operator(query, key, value, **options)[1] - truth).max()
                for operator in (ref.additive_attention, linear)
            ]
        )
    plain, corrected = np.log10(errors[0]) - np.log10(errors[1])
    assert 1.8 < plain < 2.2 and 2.8 < corrected < 3.2


def test_linear_interaction_on_pure_interaction_by_hand():
    key = np.array([[1.0, -1.0], [-1.0, 1.0]])[..., None]  # exclusive or: all averages are zero, variance one
    for saturation, factor in [(None, 1.0), (1.0, 1 / np.sqrt(5)), (2.0, 1 / np.sqrt(2))]:
        output, lse = linear([2.0], key, 3 * key, order=2, scale=1.0, saturation=saturation)
        close(output, [6 * factor])
        close(lse, np.log(4) + 2)


def test_kronecker_product_is_exact_when_modes_use_channels_of_their_own():
    rotation = np.linalg.qr(draw(39, (4, 4))[0])[0]
    query, key = np.zeros((2, 3, 4, 4))
    for tensor, (rows, columns) in zip(
        (query, key), (draw(40, (3, 1, 2), (1, 4, 2)), draw(41, (3, 1, 2), (1, 4, 2))), strict=True
    ):
        tensor[..., :2], tensor[..., 2:] = rows, columns
    query, key = query @ rotation, key @ rotation
    (value,) = draw(42, (3, 4, 2))
    weights = [[1, 2, 0], [1, 1, 3, 1]]
    for w in (None, weights):
        expected = dense(query, key, value, 2, w)[0]
        close(ref.kronecker_product_attention(query, key, value, order=2, weights=w)[0], expected)
        values = ref.additive_part(value, order=2)
        centered = ref.kao_qkv(query, key, values, order=2, weights=w, centered=True)[0]
        close(centered, dense(query, key, values, 2, w)[0])


# --- weights are multiplicities ---------------------------------------------------------------------------


def repeated(tensor, counts, first):
    for axis, count in enumerate(counts, start=first):
        tensor = np.repeat(tensor, count, axis=axis)
    return tensor


COUNTS = [([2, 1, 3], [1, 0, 2, 1]), ([1, 1, 1], [1, 0, 0, 1]), ([0, 5, 0], [1, 2, 2, 0])]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", ANY_QUERY)
def test_integer_weights_repeat_and_zero_weights_crop(name, counts):
    query, key, value = draw(43, (2, 5, 4), (2, 3, 4, 4), (2, 3, 4, 2))
    longer = [repeated(t, counts, 1) for t in (key, value)]
    expected = ANY_QUERY[name](query, *longer, order=2)
    same(ANY_QUERY[name](query, key, value, order=2, weights=counts), expected)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", ON_GRID)
def test_weights_repeat_and_crop_the_queries_of_grid_operators_too(name, counts):
    tensors = draw(44, (2, 3, 4, 4), (2, 3, 4, 4), (2, 3, 4, 2))
    weighted = ON_GRID[name](*tensors, order=2, weights=counts)[0]
    longer = ON_GRID[name](*(repeated(t, counts, 1) for t in tensors), order=2)[0]
    close(repeated(weighted, counts, 1), longer)


@pytest.mark.parametrize("name", OPERATORS)
def test_absent_positions_are_never_read(name):
    tensors = draw(45, (3, 4, 4), (3, 4, 4), (3, 4, 2))
    weights = [[1, 0, 1], [2, 1, 0, 1]]
    clean = OPERATORS[name](*tensors, order=2, weights=weights)[0]
    for tensor in tensors[0 if name in ON_GRID else 1 :]:
        tensor[1], tensor[:, 2] = np.nan, np.nan
    present = np.ix_([0, 2], [0, 1, 3])
    assert_array_equal(OPERATORS[name](*tensors, order=2, weights=weights)[0][present], clean[present])


@pytest.mark.parametrize("name", OPERATORS)
def test_absent_keys_do_not_leak_to_any_query(name):
    query, key, value = draw(46, (3, 4, 4), (3, 4, 4), (3, 4, 2))
    weights = [[1, 0, 1], [2, 1, 0, 1]]
    clean = OPERATORS[name](query, key, value, order=2, weights=weights)[0]
    for tensor in (key, value):
        tensor[1], tensor[:, 2] = 1e6, -1e6
    assert_array_equal(OPERATORS[name](query, key, value, order=2, weights=weights)[0], clean)


@pytest.mark.parametrize("weights", [[[0, 0, 0], None], [None, np.zeros(4)], [np.zeros(3), np.zeros(4)]])
@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_present_gives_zeros(name, weights):
    query, key, value = draw(47, (3, 4, 4), (3, 4, 4), (3, 4, 2))
    output, lse = OPERATORS[name](query, key, value, order=2, weights=weights)
    assert_array_equal(output, np.zeros((3, 4, 2)))
    if lse is not None:
        assert_array_equal(lse, np.full((3, 4), -np.inf))


@pytest.mark.parametrize("name", ["flattened", "additive", "additive linear", "truncated"])
def test_a_query_whose_bias_masks_everything_gets_zeros(name):
    query, key, value = draw(48, (3, 4, 4), (3, 4, 4), (3, 4, 2))
    (bias,) = draw(49, (3, 3))
    bias[1] = -np.inf
    output, lse = ANY_QUERY[name](query, key, value, order=2, bias=[bias, None])
    assert_array_equal(output[1], np.zeros((4, 2)))
    assert_array_equal(lse[1], np.full(4, -np.inf))
    assert np.isfinite(lse[[0, 2]]).all()


def test_a_batch_element_may_be_empty():
    query, key, value = draw(50, (2, 5, 4), (2, 3, 4, 4), (2, 3, 4, 2))
    weights = [[[0, 0, 0], [1, 0, 2]], None]
    output, lse = ref.additive_attention(query, key, value, order=2, weights=weights)
    assert np.isneginf(lse[0]).all() and not output[0].any()
    close(output[1], ref.additive_attention(query[1], key[1], value[1], order=2, weights=[[1, 0, 2], None])[0])


# --- merging ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_merging_parts_is_attention_to_the_whole(parts):
    query, key, value = draw(51, (2, 5, 4), (2, 6, 4), (2, 6, 3))
    pieces = zip(np.split(key, parts, axis=1), np.split(value, parts, axis=1), strict=True)
    merged = ref.merge_attention([dense(query, k, v, 1) for k, v in pieces])
    same(merged, dense(query, key, value, 1))


def test_merging_additive_attention_with_other_tokens():
    key, value = additive(52, (), (3, 4), 4), additive(53, (), (3, 4), 2)
    query, more_keys, more_values = draw(54, (5, 4), (3, 4), (3, 2))
    grid = ref.additive_attention(query, key, value, order=2)
    tokens = ref.flattened_attention(query, more_keys, more_values, order=1)
    keys, values = np.concatenate([key.reshape(12, 4), more_keys]), np.concatenate([value.reshape(12, 2), more_values])
    same(ref.merge_attention([grid, tokens]), dense(query, keys, values, 1))


def test_merging_nothing_present():
    empty = (np.zeros((2, 3)), np.full(2, -np.inf))
    output, lse = ref.merge_attention([empty, empty])
    assert_array_equal(output, np.zeros((2, 3)))
    assert_array_equal(lse, [-np.inf, -np.inf])
    full = (np.ones((2, 3)), np.array([700.0, -700.0]))
    same(ref.merge_attention([empty, full]), full)


# --- refusals ---------------------------------------------------------------------------------------------

T = np.ones((2, 3, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ref.mode_averages(np.ones(2), order=2), "a tensor of 2 modes cannot have the shape (2,)."),
        (
            lambda: ref.kao_kv(T, T, T[:, :2], order=2),
            "query, key and value do not fit: (2, 3, 4), (2, 3, 4), (2, 2, 4).",
        ),
        (lambda: ref.kao_kv(T, T, T, order=2, weights=[[1, -1], None]), "weights must not be negative."),
        (
            lambda: ref.flattened_attention(T[0], T, T, order=2, causal=0),
            "causal and bias need a query on 2 modes, got the shape (3, 4).",
        ),
        (
            lambda: ref.flattened_attention(T, T, T, order=2, causal=-1),
            "causal must be one of the modes 0 to 1, got -1.",
        ),
        (
            lambda: ref.axial_attention(T[:1], T, T, order=2),
            "query must be on the grid of key, got (1, 3, 4) and (2, 3, 4).",
        ),
        (
            lambda: ref.kronecker_sum_attention(T[:1], T, T, order=2),
            "query must be on the grid of key, got (1, 3, 4) and (2, 3, 4).",
        ),
        (
            lambda: ref.kronecker_sum_attention(T, T, T, order=2, pool="max"),
            "pool must be 'mean' or 'sum', got 'max'.",
        ),
        (
            lambda: ref.additive_attention(T, T, T, order=2, interaction="cubic"),
            "interaction must be None or 'linear', got 'cubic'.",
        ),
        (
            lambda: ref.truncated_attention(T, T, T, order=2),
            "exactly one of kept and interaction_order must be given.",
        ),
        (
            lambda: ref.truncated_attention(T, T, T, order=2, interaction_order=3),
            "kept must be subsets of the modes 0 to 1, got [].",
        ),
        (lambda: ref.counting_numbers([(0, 2)], 2), "kept must be subsets of the modes 0 to 1, got [(0, 2)]."),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError) as refusal:
        call()
    assert str(refusal.value) == message
