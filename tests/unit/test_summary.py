"""Summaries against sums over positions written out: means, weights, moments; projected, merged, sent."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tensorattn as ta
from tensorattn import summarizing

SIZES = {1: (5,), 2: (4, 3), 3: (3, 4, 2), 4: (2, 3, 2, 3)}
EVERY = [(order, mode) for order in SIZES for mode in range(order)]
CLOSE = {"rtol": 1e-11, "atol": 1e-12}
TYPES = [torch.float32, torch.float64, torch.bfloat16]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def positive(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


def subsets(order):
    return [kept for size in range(order + 1) for kept in itertools.combinations(range(order), size)]


def every_weight(weights, batch, sizes):
    """Weight of every position, ``(*batch, *sizes)``, the product of those of its indices."""
    total = torch.ones(*batch, *sizes, dtype=torch.float64)
    for mode, vector in enumerate(weights or [None] * len(sizes)):
        if vector is not None:
            shape = (*vector.shape[:-1], *(vector.shape[-1] if m == mode else 1 for m in range(len(sizes))))
            total = total * vector.reshape(shape)
    return total


def check(summary, key, value, weight):
    """Compare a summary with sums over all positions, wherever any position is present."""
    order, batch = summary.order, key.dim() - summary.order - 1
    assert summary.sizes == tuple(key.shape[batch:-1])
    assert summary.batch == tuple(key.shape[:batch])
    for kept, mean_key, mean_value, weights in zip(
        summary.kept, summary.keys, summary.values, summary.weights, strict=True
    ):
        gone = [batch + mode for mode in range(order) if mode not in kept]
        counts = weight.sum(gone) if gone else weight
        for tensor, mean in ((key, mean_key), (value, mean_value)):
            sums = (weight.unsqueeze(-1) * tensor).sum(gone) if gone else weight.unsqueeze(-1) * tensor
            assert mean.isfinite().all()
            present = (counts > 0).unsqueeze(-1)
            assert mean.shape == sums.shape
            expected = torch.where(present, sums / counts.unsqueeze(-1), 0)
            torch.testing.assert_close(torch.where(present, mean, 0), expected, **CLOSE)
        behind = counts.new_full((), math.prod(summary.sizes) / math.prod(counts.shape[batch:]))
        behind = behind if weights is None else weights
        torch.testing.assert_close(behind.expand(counts.shape), counts, **CLOSE)
    if summary.covariance is not None:
        modes = list(range(batch, batch + order))
        total = weight.sum(modes)
        share = weight / torch.where(total > 0, total, 1).reshape(*total.shape, *(1,) * order)
        centred = []
        for tensor in (key, value):
            mean = (share.unsqueeze(-1) * tensor).sum(modes)
            centred.append((tensor - mean.reshape(*mean.shape[:-1], *(1,) * order, -1)).flatten(batch, -2))
        expected = (centred[1] * share.flatten(batch).unsqueeze(-1)).mT @ centred[0]
        here = (total > 0)[..., None, None]
        torch.testing.assert_close(torch.where(here, summary.covariance, 0), expected, **CLOSE)


def same(ours, theirs):
    """Compare all parts of two summaries."""
    assert (ours.sizes, ours.kept, ours.batch) == (theirs.sizes, theirs.kept, theirs.batch)
    parts = []
    for summary in (ours, theirs):
        like = summary.keys[0]
        of_modes = [
            like.new_ones(n) if w is None else w for w, n in zip(summary.mode_weights, summary.sizes, strict=True)
        ]
        moments = [summary.covariance, summary.key_covariance]
        parts.append([*summary.keys, *summary.values, *summary.weights, *of_modes, *moments])
    for our, their in zip(*parts, strict=True):
        assert (our is None) == (their is None)
        if our is not None:
            torch.testing.assert_close(*torch.broadcast_tensors(our, their), **CLOSE)


WEIGHTS = {
    "equal": lambda n, batch: None,
    "shared": lambda n, batch: [positive(size, seed=m) for m, size in enumerate(n)],
    "some": lambda n, batch: [positive(size, seed=m) if m % 2 == 0 else None for m, size in enumerate(n)],
    "by sample": lambda n, batch: [positive(*batch, size, seed=m) for m, size in enumerate(n)],
    "by part of the batch": lambda n, batch: [positive(1, batch[-1], size, seed=m) for m, size in enumerate(n)],
    "integers": lambda n, batch: [(torch.arange(size) + 1) % 3 for size in n],
}


class TestSummarize:
    @pytest.mark.parametrize("order", SIZES)
    @pytest.mark.parametrize("kind", WEIGHTS)
    def test_every_family(self, order, kind):
        batch, sizes = (2, 3), SIZES[order]
        key, value = draw(*batch, *sizes, 4), draw(*batch, *sizes, 2, seed=1)
        weights = WEIGHTS[kind](sizes, batch)
        weight = every_weight(weights, batch, sizes)
        families = [
            None,
            subsets(order),
            [tuple(range(order))],
            list(itertools.combinations(range(order), min(2, order))),
        ]
        for kept in families:
            summary = ta.summarize(key, value, order=order, kept=kept, weights=weights, second_moment=kept is None)
            assert summary.kept == tuple(kept or (*((mode,) for mode in range(order)), ()))
            check(summary, key, value, weight)

    def test_kept_subsets_are_read_in_any_order(self):
        x = draw(3, 4, 2, 5)
        summary = ta.summarize(x, x, order=3, kept=[[2, 0], (-1,), {1, 0}])
        assert summary.kept == ((0, 2), (2,), (0, 1))
        check(summary, x, x, torch.ones(3, 4, 2))

    def test_the_full_set_is_the_tensor_itself(self):
        key, value = draw(2, 3, 4, 5), draw(2, 3, 4, 5, seed=1)
        summary = ta.summarize(key, value, order=2, kept=[(0, 1)])
        assert summary.keys[0] is key
        assert summary.values[0] is value

    @pytest.mark.parametrize("block", [1, 7, 1 << 18])
    def test_second_moments_against_numpy(self, block, monkeypatch):
        monkeypatch.setattr(summarizing, "BLOCK", block)
        key, value = draw(2, 3, 5, 4) + 100, draw(2, 3, 5, 2, seed=1) - 50
        rows, columns = torch.tensor([1, 2, 0]), torch.tensor([3, 1, 1, 0, 2])
        for weights in (None, [rows, columns]):
            summary = ta.summarize(key, value, order=2, weights=weights, second_moment=True)
            counts = None if weights is None else np.outer(rows, columns).ravel()
            for b in range(2):
                joint = np.cov(
                    np.concatenate([value[b].reshape(15, 2), key[b].reshape(15, 4)], axis=1),
                    rowvar=False,
                    bias=True,
                    fweights=counts,
                )
                np.testing.assert_allclose(summary.covariance[b], joint[:2, 2:], rtol=1e-10, atol=1e-11)
                np.testing.assert_allclose(summary.key_covariance[b], joint[2:, 2:], rtol=1e-10, atol=1e-11)

    def test_second_moments_ask_for_the_grand_mean(self):
        x = draw(3, 4, 5)
        assert ta.summarize(x, x, order=2, kept=[(0,)], second_moment=True).kept == ((0,), ())
        assert ta.summarize(x, x, order=2, kept=[(), (0,)], second_moment=True).kept == ((), (0,))
        assert ta.summarize(x, x, order=2).covariance is None

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_summarised_in_single(self, dtype):
        key, value = draw(2, 8, 9, 4, dtype=dtype), draw(2, 8, 9, 3, seed=1, dtype=dtype)
        summary = ta.summarize(key, value, order=2, second_moment=True)
        exact = ta.summarize(key.double(), value.double(), order=2, second_moment=True)
        for ours, theirs in zip(
            (*summary.keys, *summary.values, summary.covariance),
            (*exact.keys, *exact.values, exact.covariance),
            strict=True,
        ):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)

    def test_an_empty_batch(self):
        x = torch.empty(0, 3, 4, 5)
        summary = ta.summarize(x, x, order=2, second_moment=True, weights=[torch.ones(0, 3), None])
        assert [tuple(mean.shape) for mean in summary.keys] == [(0, 3, 5), (0, 4, 5), (0, 5)]
        assert summary.covariance.shape == (0, 5, 5)

    def test_without_values(self):
        x = torch.empty(8, 1000, 1000, 1000, 64, device="meta")
        summary = ta.summarize(x, x, order=3, kept=[(0,), (1, 2), ()], second_moment=False)
        assert [tuple(mean.shape) for mean in summary.keys] == [(8, 1000, 64), (8, 1000, 1000, 64), (8, 64)]


class Reads(TorchDispatchMode):
    """Count the operations that take a tensor of a given number of elements; views do not read."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.count += not func.is_view and any(leaf.numel() == self.elements for leaf in leaves)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weights", [None, [positive(6), None, positive(8)]], ids=["equal", "weighted"])
def test_one_tensor_for_keys_and_values_is_read_once(weights):
    x = draw(2, 6, 7, 8, 5)
    other = x.clone()
    counts = []
    for value in (x, other):
        with Reads(x.numel()) as reads:
            summary = ta.summarize(x, value, order=3, weights=weights)
        counts.append(reads.count)
        check(summary, x, other, every_weight(weights, (2,), (6, 7, 8)))
    assert 0 < 2 * counts[0] == counts[1]


class TestTokens:
    @pytest.mark.parametrize("order", SIZES)
    def test_all_weight_stands_behind_the_tokens(self, order):
        batch, sizes = (2, 3), SIZES[order]
        x = draw(*batch, *sizes, 4)
        for kind, make in WEIGHTS.items():
            weights = make(sizes, batch)
            summary = ta.summarize(x, x, order=order, kept=subsets(order), weights=weights)
            total = every_weight(weights, batch, sizes).flatten(2).sum(-1)
            for kept in summary.kept:
                tokens = summary.tokens(kept, 3)
                count = math.prod(sizes[mode] for mode in kept)
                assert tokens.key.shape == tokens.value.shape == (*batch, count, 4)
                assert tokens.coefficient == 3
                place = summary.kept.index(kept)
                torch.testing.assert_close(tokens.key, summary.keys[place].reshape(tokens.key.shape))
                if kind == "equal":
                    assert tokens.log_weight is None
                    assert tokens.multiplicity * count == math.prod(sizes)
                else:
                    behind = tokens.log_weight.exp().sum(-1).expand(batch)
                    torch.testing.assert_close(behind, total, **CLOSE)

    def test_weights_of_the_indices_of_a_mode(self):
        x = draw(3, 4, 5, 2)
        assert ta.summarize(x, x, order=2).mode_log_weight(0) is None
        columns = torch.tensor([[1.0, 2, 0, 1, 3], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
        summary = ta.summarize(x, x, order=2, weights=[None, columns])
        expected = torch.where(columns.sum(-1, keepdim=True) > 0, torch.ones(3, 4), 0.0).log()
        torch.testing.assert_close(summary.mode_log_weight(0).expand(3, 4), expected.double())
        torch.testing.assert_close(summary.mode_log_weight(1), columns.double().log())


class TestProject:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("heads", [None, 1, 3])
    @pytest.mark.parametrize("kind", WEIGHTS)
    def test_is_the_summary_of_the_projected(self, kind, heads, bias):
        batch, sizes = (2, 2), (3, 4)
        key, value = draw(*batch, *sizes, 5), draw(*batch, *sizes, 4, seed=1)
        to_key, to_value = draw(6, 5, seed=2), draw(9, 4, seed=3)
        biases = {"key_bias": draw(6, seed=4), "value_bias": draw(9, seed=5)} if bias else {}
        weights = WEIGHTS[kind](sizes, batch)
        summary = ta.summarize(key, value, order=2, kept=subsets(2), weights=weights, second_moment=True)
        late = summary.project(to_key, to_value, num_heads=heads, **biases)
        early = [key @ to_key.T + biases.get("key_bias", 0), value @ to_value.T + biases.get("value_bias", 0)]
        if heads is not None:
            early = [t.unflatten(-1, (heads, -1)).movedim(-2, 2) for t in early]
            weights = weights and [None if w is None else w if w.dim() == 1 else w.unsqueeze(-2) for w in weights]
        same(late, ta.summarize(*early, order=2, kept=subsets(2), weights=weights, second_moment=True))
        same(
            summary,
            ta.summarize(key, value, order=2, kept=subsets(2), weights=WEIGHTS[kind](sizes, batch), second_moment=True),
        )

    @pytest.mark.parametrize("types", list(itertools.product(TYPES, repeat=2)), ids=str)
    def test_maps_of_any_type(self, types):
        weight, bias = draw(6, 5, seed=2).to(types[0]), draw(6, seed=4).to(types[1])
        summary = ta.summarize(*(draw(2, 3, 4, 5, dtype=torch.float32) for _ in range(2)), order=2, kept=[(0,), (1,)])
        late = summary.project(weight, weight, key_bias=bias, num_heads=2)
        assert isinstance(late.keys, tuple) and isinstance(late.values, tuple)
        for mean, mapped in zip(summary.keys, late.keys, strict=True):
            expected = (mean @ weight.float().T + bias.float()).unflatten(-1, (2, 3)).movedim(-2, 1)
            torch.testing.assert_close(mapped, expected)

    @pytest.mark.parametrize("place", [None, 0, 1])
    def test_means_that_keys_and_values_share(self, place):
        x, to_key, to_value = draw(2, 3, 4, 5), draw(6, 5, seed=1), draw(6, 5, seed=2)
        summary = ta.summarize(x, x, order=2, kept=[(0,), (1,)])
        others = list(summary.values)
        if place is not None:
            others[place] = others[place] + 1
        summary = dataclasses.replace(summary, values=tuple(others))
        late = summary.project(to_key, to_value, num_heads=2)
        for key, value, mean, other in zip(late.keys, late.values, summary.keys, others, strict=True):
            torch.testing.assert_close(key.movedim(1, -2).flatten(-2), mean @ to_key.T, **CLOSE)
            torch.testing.assert_close(value.movedim(1, -2).flatten(-2), other @ to_value.T, **CLOSE)

    def test_weights_of_another_type(self):
        x = draw(3, 4, 5, dtype=torch.bfloat16)
        weight = draw(6, 5, dtype=torch.bfloat16)
        late = ta.summarize(x, x, order=2).project(weight, weight, key_bias=draw(6, dtype=torch.bfloat16))
        exact = ta.summarize(x.double(), x.double(), order=2).project(weight.double(), weight.double())
        assert late.keys[0].dtype == torch.float32
        torch.testing.assert_close(late.values[0].double(), exact.values[0], rtol=1e-5, atol=1e-5)


class TestMerge:
    @pytest.mark.parametrize(("order", "mode"), EVERY)
    @pytest.mark.parametrize("kind", WEIGHTS)
    def test_parts_make_the_whole(self, order, mode, kind):
        batch, sizes = (2, 3), tuple(5 if m == mode else n for m, n in enumerate(SIZES[order]))
        key, value = draw(*batch, *sizes, 4) + 3, draw(*batch, *sizes, 2, seed=1)
        weights = WEIGHTS[kind](sizes, batch)
        whole = ta.summarize(key, value, order=order, kept=subsets(order), weights=weights, second_moment=True)
        pieces = []
        for start, length in ((0, 1), (1, 2), (3, 2)):
            part = None
            if weights is not None:
                part = [
                    w.narrow(-1, start, length) if w is not None and m == mode else w for m, w in enumerate(weights)
                ]
            k, v = (t.narrow(2 + mode, start, length) for t in (key, value))
            pieces.append(ta.summarize(k, v, order=order, kept=subsets(order), weights=part, second_moment=True))
        left = functools.reduce(lambda one, two: one.merge(two, mode=mode), pieces)
        right = functools.reduce(lambda two, one: one.merge(two, mode=mode - order), reversed(pieces))
        check(left, key, value, every_weight(weights, batch, sizes))
        same(left, whole)
        same(right, whole)

    @pytest.mark.parametrize(("order", "mode"), EVERY)
    @pytest.mark.parametrize("weighted", [0, 1])
    @pytest.mark.parametrize("kind", ["shared", "some", "by sample"])
    def test_one_part_weighted_and_one_not(self, order, mode, weighted, kind):
        """The whole then has no weights that are a product over modes, but its means are those of the positions."""
        batch, sizes = (2, 3), SIZES[order]
        parts, weight = [], []
        for place in range(2):
            x, y = draw(*batch, *sizes, 4, seed=place), draw(*batch, *sizes, 2, seed=place + 5)
            weights = WEIGHTS[kind](sizes, batch) if place == weighted else None
            parts.append(
                (x, y, ta.summarize(x, y, order=order, kept=subsets(order), weights=weights, second_moment=True))
            )
            weight.append(every_weight(weights, batch, sizes))
        keys, values, (first, second) = zip(*parts, strict=True)
        joined = [torch.cat(tensors, 2 + mode) for tensors in (keys, values, weight)]
        check(first.merge(second, mode=mode), *joined)

    @pytest.mark.parametrize("mode", [0, 1])
    def test_samples_of_which_a_part_is_absent(self, mode):
        """Absent in the first part, in the second, in none, in both: zero weight counts nothing and breaks nothing."""
        here = [torch.tensor([0.0, 1, 1, 0]), torch.tensor([1.0, 0, 1, 0])]
        parts, weight = [], []
        for place in range(2):
            x = draw(4, 3, 3, 2, seed=place)
            weights = [None, None]
            weights[1 - mode] = positive(4, 3, seed=place) * here[place][:, None]
            parts.append((x, ta.summarize(x, x, order=2, weights=weights, second_moment=True)))
            weight.append(every_weight(weights, (4,), (3, 3)))
        whole = torch.cat([x for x, _ in parts], 1 + mode)
        merged = parts[0][1].merge(parts[1][1], mode=mode)
        check(merged, whole, whole, torch.cat(weight, 1 + mode))
        assert all(mean.isfinite().all() for mean in (*merged.keys, merged.covariance))

    def test_gradients(self):
        x = draw(5, 3, 4).requires_grad_()
        first, second = (ta.summarize(part, part, order=2, second_moment=True) for part in x.split([2, 3]))
        gradients = []
        for summary in (first.merge(second, mode=0), ta.summarize(x, x, order=2, second_moment=True)):
            loss = sum(part.square().sum() for part in (*summary.keys, *summary.values, summary.covariance))
            gradients += torch.autograd.grad(loss, x)
        torch.testing.assert_close(*gradients, **CLOSE)


def test_a_summary_can_be_kept_and_sent():
    x = draw(2, 3, 4, 5)
    summary = ta.summarize(x, x, order=2, weights=[positive(3), None], second_moment=True)
    same(pickle.loads(pickle.dumps(summary)), summary)
    same(copy.deepcopy(summary), summary)
    assert summary.positions == 12
    with pytest.raises(AttributeError):
        summary.sizes = (1, 2)


def test_what_a_summary_holds_is_small():
    x = torch.zeros(1, 20, 30, 40, 2)
    summary = ta.summarize(x, x, order=3, second_moment=True)
    held = {id(t): t.numel() for t in (*summary.keys, *summary.values, summary.covariance)}
    assert sum(held.values()) == 2 * (20 + 30 + 40 + 1) + 4
