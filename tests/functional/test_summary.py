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
from grids import close, holes, over_grid, positive
from modules import draw, refused
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tensorattn as ta
from tensorattn.errors import DtypeError, ModesError, OptionError, ShapeError

SIZES = {1: (5,), 2: (4, 3), 3: (3, 4, 2), 4: (2, 3, 2, 3)}
EVERY = [(order, mode) for order in SIZES for mode in range(order)]


def subsets(order):
    return [kept for size in range(order + 1) for kept in itertools.combinations(range(order), size)]


def check(summary, key, value, weight):
    """Compare a summary with sums over all positions; where no position is present, means only have to be finite."""
    order, batch = summary.order, key.dim() - summary.order - 1
    assert (summary.sizes, summary.batch) == (tuple(key.shape[batch:-1]), tuple(key.shape[:batch]))
    weight, modes = weight.expand(key.shape[:-1]), list(range(batch, batch + order))
    clean = [torch.where(weight.unsqueeze(-1) > 0, tensor, 0.0) for tensor in (key, value)]
    for kept, *means, weights in zip(summary.kept, summary.keys, summary.values, summary.weights, strict=True):
        gone = [batch + mode for mode in range(order) if mode not in kept]
        counts = weight.sum(gone) if gone else weight
        present = (counts > 0).unsqueeze(-1)
        for tensor, mean in zip(clean, means, strict=True):
            sums = weight.unsqueeze(-1) * tensor
            sums = sums.sum(gone) if gone else sums
            if gone:  # the tensor itself may hold anything where it is absent
                assert mean.isfinite().all()
            expected = torch.where(present, sums / counts.unsqueeze(-1), 0)
            close([torch.where(present, mean, 0).to(expected)], [expected])
        each = math.prod(summary.sizes) / math.prod(counts.shape[batch:])
        behind = counts.new_full((), each) if weights is None else weights
        close([behind.expand(counts.shape).to(counts)], [counts])
    if summary.covariance is not None:
        total = weight.sum(modes)
        share = weight / torch.where(total > 0, total, 1)[(..., *(None,) * order)]
        centred = []
        for tensor in clean:
            mean = (share.unsqueeze(-1) * tensor).sum(modes)
            centred.append((tensor - mean[(..., *(None,) * order, slice(None))]).flatten(batch, -2))
        here, share = (total > 0)[..., None, None], share.flatten(batch).unsqueeze(-1)
        for found, left in ((summary.covariance, centred[1]), (summary.key_covariance, centred[0])):
            expected = (left * share).mT @ centred[0]
            close([torch.where(here, found, 0).to(expected)], [torch.where(here, expected, 0)])


def same(ours, theirs, **tolerance):
    """Compare all parts of two summaries."""
    assert (ours.sizes, ours.kept, ours.batch) == (theirs.sizes, theirs.kept, theirs.batch)
    parts = [
        [*summary.keys, *summary.values, *summary.weights, summary.covariance, summary.key_covariance]
        for summary in (ours, theirs)
    ]
    for our, their in zip(*parts, strict=True):
        assert (our is None) == (their is None)
        if our is not None:
            close(*[[t] for t in torch.broadcast_tensors(our.double(), their.double())], **tolerance)


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
    def test_every_family(self, order):
        batch, sizes = (2, 3), SIZES[order]
        key, value = draw(*batch, *sizes, 4), draw(*batch, *sizes, 2, seed=1)
        pairs = list(itertools.combinations(range(order), min(2, order)))
        for make in WEIGHTS.values():
            weights = make(sizes, batch)
            weight = over_grid(weights, sizes, batch)
            for kept in (None, subsets(order), [tuple(range(order))], pairs):
                summary = ta.summarize(key, value, order=order, kept=kept, weights=weights, second_moment=kept is None)
                assert summary.kept == tuple(kept or (*((mode,) for mode in range(order)), ()))
                check(summary, key, value, weight)

    def test_masks(self):
        key, value, mask = draw(2, 3, 4, 5), draw(2, 3, 4, 2, seed=1), holes(2, 3, 4)
        key[~mask], value[~mask] = math.nan, math.inf
        summary = ta.summarize(key, value, order=2, kept=subsets(2), mask=mask, second_moment=True)
        check(summary, key, value, mask.double())
        lengths = torch.tensor([[3, 0], [1, 4]])
        summary = ta.summarize(key, value, order=2, kept=[(0,), (1,)], mask=mask, lengths=lengths)
        here = over_grid([torch.arange(n) < lengths[:, mode, None] for mode, n in enumerate((3, 4))], (3, 4), (2,))
        check(summary, key, value, mask * here)

    def test_kept_subsets_are_read_in_any_order(self):
        x = draw(3, 4, 2, 5)
        summary = ta.summarize(x, x, order=3, kept=[[2, 0], (-1,), {1, 0}])
        assert summary.kept == ((0, 2), (2,), (0, 1))
        check(summary, x, x, torch.ones(3, 4, 2).double())
        assert ta.summarize(x, x, order=3, kept=[(0,)], second_moment=True).kept == ((0,), ())
        assert ta.summarize(x, x, order=3, kept=[(), (0,)], second_moment=True).kept == ((), (0,))
        assert ta.summarize(x, x, order=3).covariance is None

    def test_second_moments_against_numpy(self):
        key, value = draw(2, 3, 5, 4) + 100, draw(2, 3, 5, 2, seed=1) - 50
        rows, columns = torch.tensor([1, 2, 0]), torch.tensor([3, 1, 1, 0, 2])
        for weights in (None, [rows, columns]):
            summary = ta.summarize(key, value, order=2, weights=weights, second_moment=True)
            counts = None if weights is None else np.outer(rows, columns).ravel()
            for b in range(2):
                both = np.concatenate([value[b].reshape(15, 2), key[b].reshape(15, 4)], axis=1)
                joint = np.cov(both, rowvar=False, bias=True, fweights=counts)
                np.testing.assert_allclose(summary.covariance[b], joint[:2, 2:], rtol=1e-10, atol=1e-11)
                np.testing.assert_allclose(summary.key_covariance[b], joint[2:, 2:], rtol=1e-10, atol=1e-11)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_summarised_in_single(self, dtype):
        key, value = draw(2, 8, 9, 4, dtype=dtype), draw(2, 8, 9, 3, seed=1, dtype=dtype)
        for weights in (None, [positive(8), None], holes(2, 8, 9).float()):
            summary, exact = (
                ta.summarize(k, v, order=2, second_moment=True, weights=weights)
                for k, v in ((key, value), (key.double(), value.double()))
            )
            held = (*summary.keys, *summary.values, summary.covariance, summary.key_covariance)
            assert {tensor.dtype for tensor in held} == {torch.float32}
            same(summary, exact, rtol=1e-5, atol=1e-6)

    def test_an_empty_batch_and_no_values(self):
        x = torch.empty(0, 3, 4, 5)
        summary = ta.summarize(x, x, order=2, second_moment=True, weights=[torch.ones(0, 3), None])
        assert [tuple(mean.shape) for mean in summary.keys] == [(0, 3, 5), (0, 4, 5), (0, 5)]
        assert summary.covariance.shape == (0, 5, 5)
        x = torch.empty(8, 1000, 1000, 1000, 64, device="meta")
        summary = ta.summarize(x, x, order=3, kept=[(0,), (1, 2), ()])
        assert [tuple(mean.shape) for mean in summary.keys] == [(8, 1000, 64), (8, 1000, 1000, 64), (8, 64)]

    def test_what_it_holds_is_small_kept_and_sent(self):
        x = torch.zeros(1, 20, 30, 40, 2)
        summary = ta.summarize(x, x, order=3, second_moment=True)
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in summary.keys + summary.values}
        assert sum(held.values()) == 4 * 2 * (20 + 30 + 40 + 1)
        x = draw(2, 3, 4, 5)
        summary = ta.summarize(x, x, order=2, weights=[positive(3), None], second_moment=True)
        same(pickle.loads(pickle.dumps(summary)), summary)
        same(copy.deepcopy(summary), summary)
        assert (summary.positions, summary.order, summary.batch) == (12, 2, (2,))
        with pytest.raises(dataclasses.FrozenInstanceError):
            summary.sizes = (1, 2)
        assert isinstance(summary.keys, tuple) and isinstance(summary.weights, tuple)

    def test_means_of_one_subset(self):
        x = draw(2, 3, 4, 5)
        summary = ta.summarize(x, 2 * x, order=2, kept=[(0,), ()], weights=[positive(3), None])
        close([summary.key((0,)), summary.value(())], [summary.keys[0], summary.values[1]])
        close([summary.count((0,))], [4 * positive(3)[None]])
        for ask in (summary.key, summary.value, summary.count):
            refused(OptionError, "the summary does not hold the means of the kept modes (1,).", ask, (1,))


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
    x, counts = draw(2, 6, 7, 8, 5), []
    for value in (x, x.clone()):
        with Reads(x.numel()) as reads:
            ta.summarize(x, value, order=3, weights=weights)
        counts.append(reads.count)
    assert 0 < 2 * counts[0] <= counts[1] + 1  # the weights of the positions are put together once


class TestTokens:
    @pytest.mark.parametrize("order", SIZES)
    def test_all_weight_stands_behind_the_tokens(self, order):
        batch, sizes = (2, 3), SIZES[order]
        x = draw(*batch, *sizes, 4)
        for kind, make in WEIGHTS.items():
            weights = make(sizes, batch)
            summary = ta.summarize(x, x, order=order, kept=subsets(order), weights=weights)
            total = over_grid(weights, sizes, batch).flatten(2).sum(-1)
            tokens = summary.tokens({kept: place + 1 for place, kept in enumerate(summary.kept)})
            added = tokens.added(torch.float64)
            rows = zip(summary.kept, tokens.sets, tokens.split(tokens.key), added, strict=True)
            for place, (kept, each, key, log_weight) in enumerate(rows):
                count = math.prod(sizes[mode] for mode in kept)
                assert (each.length, each.coefficient, each.constant) == (count, place + 1, not kept)
                assert key.shape == (*batch, count, 4)
                if kind == "equal":
                    assert log_weight is None and each.multiplicity * count == math.prod(sizes)
                else:
                    close([log_weight.squeeze(-2).exp().sum(-1).expand(batch)], [total])

    def test_weights_of_the_indices_of_a_mode(self):
        x = draw(3, 4, 5, 2)
        columns = torch.tensor([[1.0, 2, 0, 1, 3], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).double()
        summary = ta.summarize(x, x, order=2, weights=[None, columns])
        expected = torch.where(columns.sum(-1, keepdim=True) > 0, torch.ones(3, 4).double(), 0.0).log()
        found = [summary.mode_log_weight(mode).double() for mode in (0, 1)]
        close([found[0].expand(3, 4), found[1]], [expected, columns.log()])
        mask = torch.tensor([[True, True, False], [True, False, False]])  # no product: two rows, two columns, present
        summary = ta.summarize(x[:1, :2, :3], x[:1, :2, :3], order=2, mask=mask)
        close([summary.mode_log_weight(0)[0].exp()], [torch.tensor([4 / 3, 2 / 3], dtype=torch.float64)])
        close([summary.mode_log_weight(1)[0].exp()], [torch.tensor([4 / 3, 2 / 3, 0], dtype=torch.float64)])


class TestProject:
    @pytest.mark.parametrize("heads", [None, 1, 3])
    def test_is_the_summary_of_the_projected(self, heads):
        batch, sizes = (2, 2), (3, 4)
        key, value = draw(*batch, *sizes, 5), draw(*batch, *sizes, 4, seed=1)
        to_key, to_value = draw(6, 5, seed=2), draw(9, 4, seed=3)
        for kind in ("equal", "by sample", "by part of the batch", "mask"):
            for biases in ({}, {"key_bias": draw(6, seed=4), "value_bias": draw(9, seed=5)}):
                given = {"mask": holes(*batch, *sizes)} if kind == "mask" else {"weights": WEIGHTS[kind](sizes, batch)}
                summarize = functools.partial(ta.summarize, order=2, kept=subsets(2)[:-1], second_moment=True)
                late = summarize(key, value, **given).project(to_key, to_value, num_heads=heads, **biases)
                early = [key @ to_key.T + biases.get("key_bias", 0), value @ to_value.T + biases.get("value_bias", 0)]
                if heads is not None:
                    early = [t.unflatten(-1, (heads, -1)).movedim(-2, 2) for t in early]
                    if kind == "mask":
                        given = {"mask": given["mask"].unsqueeze(2)}
                    elif given["weights"] is not None:
                        given = {"weights": [w.unsqueeze(-2) for w in given["weights"]]}
                expected = summarize(*early, **given)
                for place, count in enumerate(expected.weights):  # where nothing is, it holds the bias
                    present = True if count is None else (count > 0).unsqueeze(-1)
                    for ours, theirs in ((late.keys, expected.keys), (late.values, expected.values)):
                        close([torch.where(torch.as_tensor(present), ours[place], 0)], [theirs[place]])
                close([late.covariance, late.key_covariance], [expected.covariance, expected.key_covariance])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_maps_of_any_type(self, dtype):
        weight, bias = draw(6, 5, seed=2, dtype=dtype), draw(6, seed=4).float()
        for source in (torch.float32, torch.bfloat16):
            x = draw(2, 3, 4, 5, dtype=source)
            summary = ta.summarize(x, x, order=2)
            late = summary.project(weight, weight, key_bias=bias, num_heads=2)
            for mean, mapped in zip(summary.keys, late.keys, strict=True):
                expected = (mean @ weight.float().T + bias).unflatten(-1, (2, 3)).movedim(-2, 1)
                assert mapped.dtype == torch.float32
                torch.testing.assert_close(mapped, expected)

    def test_keys_and_values_that_are_one_tensor(self):
        x, to_key, to_value = draw(2, 3, 4, 5), draw(6, 5, seed=1), draw(6, 5, seed=2)
        late = ta.summarize(x, x, order=2).project(to_key, to_value)
        same(late, ta.summarize(x @ to_key.T, x @ to_value.T, order=2))

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_messages(self, device):
        make = lambda *shape, dtype=torch.float32: torch.ones(shape, device=device, dtype=dtype)  # noqa: E731
        summary = ta.summarize(make(2, 30, 40, 5), make(2, 30, 40, 7), order=2)
        good, told = (make(6, 5), make(4, 7)), "{} must be a floating-point tensor, got {}."
        cases = [
            ((make(6, 4), good[1]), {}, ShapeError, "key_weight has 4 columns, but the keys have head size 5."),
            ((good[0], make(4, 5)), {}, ShapeError, "value_weight has 5 columns, but the values have head size 7."),
            ((make(5), good[1]), {}, ShapeError, "key_weight has 1 dimensions, but needs 2."),
            ((make(6, 5, dtype=torch.int64), good[1]), {}, DtypeError, told.format("key_weight", "torch.int64")),
            ((good[0], [[1.0]]), {}, DtypeError, told.format("value_weight", "list")),
            (good, {"key_bias": make(4)}, ShapeError, "key_bias has 4 entries, but key_weight has 6 rows."),
            (good, {"value_bias": make(6)}, ShapeError, "value_bias has 6 entries, but value_weight has 4 rows."),
            (good, {"value_bias": make(1, 4)}, ShapeError, "value_bias has 2 dimensions, but needs 1."),
            (good, {"num_heads": 3}, ShapeError, "value_weight has 4 rows, which num_heads=3 does not divide."),
            (good, {"num_heads": 4}, ShapeError, "key_weight has 6 rows, which num_heads=4 does not divide."),
            (good, {"num_heads": 0}, OptionError, "num_heads must be at least 1, got 0."),
            (good, {"num_heads": 2.0}, OptionError, "num_heads must be an integer, got 2.0."),
        ]
        for weights, options, kind, rule in cases:
            refused(kind, f"Summary.project: {rule}", summary.project, *weights, **options)


def merged(parts, mode, *, from_the_left=True):
    """Merge summaries of parts that follow each other."""
    if from_the_left:
        return functools.reduce(lambda one, two: one.merge(two, mode=mode), parts)
    return functools.reduce(lambda two, one: one.merge(two, mode=mode), reversed(parts))


class TestMerge:
    @pytest.mark.parametrize(("order", "mode"), EVERY)
    def test_parts_make_the_whole_in_whatever_order_they_are_added(self, order, mode):
        """It is associative, in float64 up to rounding."""
        batch, sizes = (2, 3), tuple(5 if m == mode else n for m, n in enumerate(SIZES[order]))
        key, value = draw(*batch, *sizes, 4) + 3, draw(*batch, *sizes, 2, seed=1)
        summarize = functools.partial(ta.summarize, order=order, kept=subsets(order), second_moment=True)
        for make in WEIGHTS.values():
            weights, pieces = make(sizes, batch), []
            for start, length in ((0, 1), (1, 2), (3, 2)):
                part = weights and [
                    w.narrow(-1, start, length) if w is not None and m == mode else w for m, w in enumerate(weights)
                ]
                k, v = (t.narrow(2 + mode, start, length) for t in (key, value))
                pieces.append(summarize(k, v, weights=part))
            left, right = merged(pieces, mode), merged(pieces, mode - order, from_the_left=False)
            whole = summarize(key, value, weights=weights)
            check(left, key, value, over_grid(weights, sizes, batch))
            same(left, right)
            if weights is None:
                same(left, whole)
                assert left.counts is None

    @pytest.mark.parametrize("mode", [0, 1, 2])
    def test_parts_with_masks_of_their_own(self, mode):
        """Each part has a mask that is no product, or is a product, or none; the whole is the tensor under all."""
        key, value = draw(2, 6, 6, 6, 3), draw(2, 6, 6, 6, 2, seed=1)
        mask = holes(2, 6, 6, 6)
        mask.narrow(1 + mode, 2, 2).fill_(True)
        product = mask.narrow(1 + mode, 4, 2)
        product.fill_(True)
        product[0, 1:, :1] = False
        mask[1].movedim(mode, 0)[:2] = False  # the first part has no position of this sample
        key[~mask], value[~mask] = math.nan, math.inf
        kept = [(0,), (1,), (2,), (0, 2), ()]
        summarize = functools.partial(ta.summarize, order=3, kept=kept, second_moment=True)
        parts = list(zip(*(tensor.split(2, 1 + mode) for tensor in (key, value, mask)), strict=True))
        summaries = [summarize(k, v, mask=m if not m.all() else None) for k, v, m in parts]
        for left in (True, False):
            check(merged(summaries, mode, from_the_left=left), key, value, mask.double())
        check(summarize(key, value, mask=mask), key, value, mask.double())

    @pytest.mark.parametrize("mode", [0, 1])
    @pytest.mark.parametrize("weighted", [0, 1])
    def test_one_part_weighted_and_one_not(self, weighted, mode):
        """The whole then has no weights that are a product over modes, but its means are those of the positions."""
        parts, weight = [], []
        for place in range(2):
            x, y = draw(2, 4, 4, 4, seed=place), draw(2, 4, 4, 2, seed=place + 5)
            weights = WEIGHTS["by sample"]((4, 4), (2,)) if place == weighted else None
            parts.append((x, y, ta.summarize(x, y, order=2, kept=subsets(2), weights=weights, second_moment=True)))
            weight.append(over_grid(weights, (4, 4), (2,)))
        keys, values, (first, second) = zip(*parts, strict=True)
        check(first.merge(second, mode=mode), *(torch.cat(each, 1 + mode) for each in (keys, values, weight)))

    @pytest.mark.parametrize("mode", [0, 1])
    def test_samples_of_which_a_part_is_absent(self, mode):
        """Absent in the first part, in the second, in none, in both: zero weight counts nothing and breaks nothing."""
        here = [torch.tensor([0.0, 1, 1, 0]), torch.tensor([1.0, 0, 1, 0])]
        parts, weight = [], []
        for place in range(2):
            weights = [None, None]
            weights[1 - mode] = positive(4, 3, seed=place) * here[place][:, None]
            x = draw(4, 3, 3, 2, seed=place)
            x[here[place] == 0] = math.nan
            parts.append((x, ta.summarize(x, x, order=2, weights=weights, second_moment=True)))
            weight.append(over_grid(weights, (3, 3), (4,)))
        whole = torch.cat([x for x, _ in parts], 1 + mode)
        found = parts[0][1].merge(parts[1][1], mode=mode)
        check(found, whole, whole, torch.cat(weight, 1 + mode))
        assert all(mean.isfinite().all() for mean in (*found.keys, found.covariance))

    @pytest.mark.parametrize("count", [256, pytest.param(4096, marks=pytest.mark.thorough)])
    def test_many_parts_add_up_without_loss(self, count):
        """Parts in single precision, one after the other: within 1e-6 of float64, where a chain drifts."""
        x = draw(count, 3, 2, dtype=torch.float32) + 10
        summarize = functools.partial(ta.summarize, order=2, kept=[(1,), ()], second_moment=True)
        found = merged([summarize(part, part) for part in x.split(1)], 0)
        exact = summarize(x.double(), x.double())
        for ours, theirs in zip((*found.keys, *found.values), (*exact.keys, *exact.values), strict=True):
            assert ((ours - theirs) / theirs).abs().max() < 1e-6
        assert (found.covariance - exact.covariance).abs().max() < 1e-5
        half = x.split(count // 2)
        close(
            summarize(half[0], half[0]).merge(summarize(half[1], half[1]), mode=0).keys, exact.keys, rtol=1e-6, atol=0
        )

    def test_gradients(self):
        x = draw(5, 3, 4).requires_grad_()
        first, second = (ta.summarize(part, part, order=2, second_moment=True) for part in x.split([2, 3]))
        gradients = []
        for summary in (first.merge(second, mode=0), ta.summarize(x, x, order=2, second_moment=True)):
            loss = sum(part.square().sum() for part in (*summary.keys, *summary.values, summary.covariance))
            gradients += torch.autograd.grad(loss, x)
        close(gradients[:1], gradients[1:])

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_messages(self, device):
        make = lambda *shape, dtype=torch.float32: torch.ones(shape, device=device, dtype=dtype)  # noqa: E731
        x, longer, double = make(2, 30, 40, 5), make(2, 30, 40, 6), make(2, 30, 40, 5, dtype=torch.float64)
        half = make(2, 30, 40, 5, dtype=torch.float64)

        def of(key, value=None, **options):
            return ta.summarize(key, key if value is None else value, **{"order": 2, **options})

        whole = of(x)
        no_values = dataclasses.replace(whole, value_means=of(x, kept=[(1,), ()]).value_means)
        sizes = "the {} have head size 5 in one summary but 6 in the other."
        kinds = "the type of the keys is torch.float32 in one summary but torch.float16 in the other."
        cases = [
            (of(x, order=3), ShapeError, "the summaries have different orders: 2 and 3."),
            (of(x, kept=[(0,)]), ShapeError, "the summaries hold different kept modes: ((0,), (1,), ()) and ((0,),)."),
            (of(make(3, 30, 40, 5)), ShapeError, "the summaries have different batch dimensions: (2,) and (3,)."),
            (of(make(2, 30, 41, 5)), ShapeError, "mode 1 has size 40 in one summary but 41 in the other."),
            (
                of(x, second_moment=True),
                ShapeError,
                "second moments merge only if both summaries hold them, and their grand means.",
            ),
            (of(longer, x), ShapeError, sizes.format("keys")),
            (of(x, longer), ShapeError, sizes.format("values")),
            (no_values, ShapeError, "only one of the summaries holds the mean values of the kept modes (0,)."),
            (whole.in_type(torch.float16), DtypeError, kinds),
            (x.shape, OptionError, "other must be a Summary, got Size."),
        ]
        for other, kind, rule in cases:
            refused(kind, f"Summary.merge: {rule}", whole.merge, other, mode=0)
        told = "Summary.merge: there is no mode {} among '0 1' (order 2)."
        refused(ModesError, told.format(2), whole.merge, whole, mode=2)
        refused(ModesError, told.format("'t'"), whole.merge, whole, mode="t")
        if device == "meta":
            near = of(torch.ones(2, 30, 40, 5))
            rule = "the device of the keys is meta in one summary but cpu in the other."
            refused(DtypeError, f"Summary.merge: {rule}", whole.merge, near, mode=0)
        assert whole.merge(of(double), mode=0).keys[0].dtype == half.dtype  # what is merged is held so


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_messages(device):
    x = torch.ones(2, 3, 4, 5, device=device)
    hint = "\n  Write [(0,), (1, 2)] for the modes 0, 1 and 2, the last two together."
    cases = [
        (x[..., :3, :], {}, ShapeError, "mode 1 has size 4 in key but 3 in value.", ""),
        (x[:1], {}, ShapeError, "batch dimensions are (2,) in key but (1,) in value.", ""),
        (x.long(), {}, DtypeError, "value must be floating point, got torch.int64.", ""),
        (x, {"kept": [(0,), (2,)]}, ModesError, "there is no mode 2 among '0 1' (order 2).", ""),
        (x, {"kept": []}, ModesError, "kept is empty, but a summary needs at least one subset of modes.", ""),
        (x, {"kept": 1}, ModesError, "kept must hold subsets of modes, got 1.", hint),
        (x, {"second_moment": "no"}, OptionError, "second_moment must be True or False, got 'no'.", ""),
    ]
    for value, options, kind, rule, more in cases:
        shape = tuple(value.shape)
        reading = "\n  modes    0 1\n  key      (2, 3, 4, 5)   batch=(2,) 0=3 1=4 D=5"
        reading += f"\n  value    {shape}   batch=({shape[0]},) 0=3 1={shape[2]} D=5"
        refused(kind, f"summarize: {rule}{reading}{more}", ta.summarize, x, value, order=2, **options)
    refused(OptionError, "summarize: order must be at least 1, got 0.", ta.summarize, x, x, order=0)
