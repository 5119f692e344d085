"""Mode averages and outer sums against plain torch: every order, memory layout, type, weight and derivative."""

from __future__ import annotations

import functools
import itertools
import math
import weakref

import numpy as np
import pytest
import torch
from grids import LAYOUTS, close, forward_mode, grid, positive
from modules import draw, refused
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile

import tensorattn as ta
from tensorattn.errors import OptionError
from tensorattn.testing import reference

ORDERS = [1, 2, 3, pytest.param(4, marks=pytest.mark.thorough), 5, *(
    pytest.param(order, marks=pytest.mark.thorough) for order in (6, 7, 8)
)]  # fmt: skip
HALVES = [torch.bfloat16, torch.float16]
FUNCTIONS = [ta.mode_averages, ta.additive_part, ta.interaction_residual]

every_order = pytest.mark.parametrize("order", ORDERS)


def plain(tensor, order, weights=None):
    """Mode averages by one mean, or weighted sum, after another."""
    weights = [None] * order if weights is None else weights
    results = []
    for kept in range(order):
        mean = tensor
        for mode in reversed([m for m in range(order) if m != kept]):
            dim = tensor.dim() - order - 1 + mode
            if weights[mode] is None:
                mean = mean.mean(dim)
            else:
                share = weights[mode] / weights[mode].sum(-1, keepdim=True)
                after = mean.dim() - dim - 1
                mean = (mean * share.reshape(*share.shape[:-1], *(1,) * mode, share.shape[-1], *(1,) * after)).sum(dim)
        results.append(mean)
    return results


def some_weights(x, order):
    """No weights for some modes, weights for others, weights of each sample for others."""
    sizes = x.shape[1:-1]
    return [[None, positive(n, seed=k), positive(2, n, seed=k)][(k + order) % 3] for k, n in enumerate(sizes)]


class TestAverages:
    @every_order
    def test_every_layout(self, order):
        for one in (False, True):
            shape = list(grid(order))
            shape[1 + order // 2] = 1 if one else shape[1 + order // 2]
            x = draw(*shape)
            for weights in (None, some_weights(x, order)):
                expected = plain(x, order, weights)
                for layout in LAYOUTS.values():
                    close(ta.mode_averages(layout(x), order=order, weights=weights), expected)

    def test_the_layout_decides_nothing_with_absent_indices(self):
        """In every order of dimensions in memory, with weights that samples share and such that are theirs."""
        x = draw(2, 3, 4, 5)
        weights = [torch.tensor([2.0, 0, 1]), torch.tensor([[1.0, 1, 1, 0], [1, 0, 3, 1]])]
        expected = plain(x, 2, [w.double() for w in weights])
        dirty = x.clone()
        dirty[:, 1], dirty[0, :, 3], dirty[1, :, 1] = math.nan, math.inf, -math.inf
        there = [weights[0] > 0, weights[1] > 0]
        for dims in itertools.permutations(range(4)):
            laid = dirty.permute(dims).contiguous().permute([dims.index(d) for d in range(4)])
            rows, columns = ta.mode_averages(laid, order=2, weights=weights)
            close([rows[:, there[0]], columns[there[1]]], [expected[0][:, there[0]], expected[1][there[1]]])

    @pytest.mark.parametrize("batch", [(), (1,), (2, 3), (1, 2, 1, 2)], ids=str)
    def test_batch_dimensions(self, batch):
        x = draw(*grid(3, batch))
        close(ta.mode_averages(x, order=3), plain(x, 3))

    @pytest.mark.parametrize("batch", [(0,), (0, 2), (2, 0)], ids=str)
    @pytest.mark.parametrize("dim", [0, 5])
    def test_nothing_at_all(self, batch, dim):
        x = torch.empty(*batch, 3, 4, dim)
        for place in range(x.dim()):
            laid = x.movedim(0, place).contiguous().movedim(place, 0)
            for weights in (None, [torch.ones(3), torch.ones(4)], torch.ones(3, 4)):
                results = ta.mode_averages(laid, order=2, weights=weights)
                assert [r.shape for r in results] == [(*batch, 3, dim), (*batch, 4, dim)]
            assert ta.interaction_residual(laid, order=2).shape == x.shape

    def test_expanded_tensors_and_overlapping_windows(self):
        row = draw(2, 1, 5, 1)
        x = row.expand(2, 4, 5, 3)
        close(ta.mode_averages(x, order=2), plain(x, 2))
        close(ta.mode_averages(x[:, 1:, ::2], order=2), plain(x[:, 1:, ::2], 2))
        windows = draw(3, 20).unfold(1, 6, 2).unsqueeze(-1)  # (3, 8, 6, 1), most elements twice or more
        for order in (2, 3):
            close(ta.mode_averages(windows, order=order), plain(windows, order))

    @pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_results_share_no_memory_with_what_is_given(self, function, layout):
        """Not where there is nothing to average either, as at order 1 and over modes of size 1."""
        for shape in ((2, 3, 4), (9000, 2), (2, 1, 4), (2, 3, 1), (2, 1, 1)):
            for order in (1, 2)[: len(shape) - 1]:
                x = LAYOUTS[layout](draw(*shape))
                before = x.clone()
                for weights in (None, [torch.ones(n) for n in shape[-order - 1 : -1]]):
                    results = function(x, order=order, weights=weights)
                    for result in results if isinstance(results, tuple) else [results]:
                        assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
                        result.zero_()
                    assert torch.equal(x, before)

    def test_two_results_share_no_memory(self):
        first, second = ta.mode_averages(draw(2, 1, 1, 3), order=2)
        kept = second.clone()
        first.zero_()
        assert torch.equal(second, kept)

    def test_the_average_of_everything_else_is_not_expanded(self):
        """A result that is written to has a number of its own in every place."""
        for x in (draw(1, 3).expand(4, 3), draw(1, 1, 3).expand(4, 5, 3)):
            for order in range(1, x.dim()):
                for result in (*ta.mode_averages(x, order=order), ta.additive_part(x, order=order)):
                    before = result.clone()
                    result[..., 0, :] += 1
                    assert torch.equal(result[..., 1:, :], before[..., 1:, :])

    def test_long_sums_are_added_up_in_parts(self):
        """One running total of thousands of rows would be off by 5e-5."""
        x = 0.1 + 1e-3 * draw(4096, 32, 8, dtype=torch.float32)
        exact = x.double().mean(0)
        for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
            _, mean = ta.mode_averages(given, order=2)
            assert ((mean - exact) / exact).abs().max() < 3e-6

    def test_integers_of_numpy(self):
        x = draw(2, 3, 4)
        close(ta.mode_averages(x, order=np.int64(2)), ta.mode_averages(x, order=2), rtol=0, atol=0)


class TestWeights:
    x = draw(2, 3, 4, 5, 6)  # batch (2, 3), modes 4 and 5

    def test_multiplicities_repeat_and_zero_is_absent(self):
        counts = torch.tensor([2, 0, 1, 3])
        repeated = self.x.repeat_interleave(counts, dim=2)
        rows, columns = ta.mode_averages(self.x, order=2, weights=[counts, None])
        close([rows.repeat_interleave(counts, dim=2), columns], ta.mode_averages(repeated, order=2))

    @pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 4), (1, 1, 4), (2, 1, 4), (1, 3, 4), (2, 3, 4)], ids=str)
    def test_batch_dimensions(self, shape):
        weights = positive(*shape)
        expected = plain(self.x, 2, [weights.expand(2, 3, 4), None])
        close(ta.mode_averages(self.x, order=2, weights=[weights, None]), expected)

    def test_only_ratios_count(self):
        weights = [positive(4), positive(5)]
        expected = ta.mode_averages(self.x, order=2, weights=weights)
        close(ta.mode_averages(self.x, order=2, weights=[1e3 * weights[0], 1e-3 * weights[1]]), expected)
        equal = [torch.full((4,), 7.0), torch.ones(5)]
        close(ta.mode_averages(self.x, order=2, weights=equal), ta.mode_averages(self.x, order=2))

    def test_a_sample_without_any_weight_has_zero_means(self):
        weights = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]])[:, None]
        for of_it in (1.0, math.nan):
            x = self.x.clone()
            x[1] *= of_it
            rows, columns = ta.mode_averages(x, order=2, weights=[weights, None])
            assert columns[1].eq(0).all() and columns[0].ne(0).all()
            close([rows[0]], [self.x[0].mean(2)])

    def test_one_weight_a_position(self):
        weights = positive(2, 1, 4, 5) * (positive(2, 1, 4, 5, seed=1) > 0.5)
        dirty = self.x.masked_fill(weights.unsqueeze(-1) == 0, math.nan)
        share = weights.unsqueeze(-1)
        total = (share * self.x).sum(3), (share * self.x).sum(2)
        counts = weights.sum(3, keepdim=False).unsqueeze(-1), weights.sum(2).unsqueeze(-1)
        expected = [torch.where(c > 0, t / c, 0.0) for t, c in zip(total, counts, strict=True)]
        close(ta.mode_averages(dirty, order=2, weights=weights), expected)


class TestTypes:
    def test_single_precision(self):
        x = draw(*grid(3), dtype=torch.float32)
        for layout in LAYOUTS.values():
            results = ta.mode_averages(layout(x), order=3)
            close([r.double() for r in results], plain(x.double(), 3), rtol=1e-5, atol=1e-6)
            assert {r.dtype for r in results} == {torch.float32}

    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision_is_rounded_once(self, dtype):
        x = draw(2, 5, 6, 7, 3, dtype=dtype)
        for weights in (None, [None, positive(6), positive(2, 7)], positive(5, 6, 7)):
            exact = reference.mode_averages(x.double(), order=3, weights=weights)
            for layout in LAYOUTS.values():
                results = ta.mode_averages(layout(x), order=3, weights=weights)
                assert {r.dtype for r in results} == {dtype}
                close(results, [e.to(dtype) for e in exact], rtol=torch.finfo(dtype).eps, atol=1e-5)

    def test_half_precision_does_not_overflow(self):
        x = torch.full((1, 64, 64, 2), 100.0, dtype=torch.float16)
        for weights in (None, [torch.full((64,), 1000.0), None]):
            for layout in LAYOUTS.values():
                for result in ta.mode_averages(layout(x), order=2, weights=weights):
                    assert torch.equal(result, torch.full((1, 64, 2), 100.0, dtype=torch.float16))
        assert torch.equal(ta.additive_part(x, order=2), x)

    def test_half_precision_does_not_stall(self):
        x = torch.ones(1, 300, 300, 1, dtype=torch.bfloat16)
        x[:, :, ::2] = 1.0078125  # the next number after 1: a sum in bfloat16 would stop at 256
        rows, _ = ta.mode_averages(x, order=2, dtype=torch.float32)
        close([rows], [torch.full((1, 300, 1), 1.00390625)], rtol=1e-6, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("source", [torch.bfloat16, torch.float32, torch.float64])
    def test_the_type_of_the_results(self, source, dtype):
        for order in (1, 2):
            x = draw(*grid(order), dtype=source)
            results = ta.mode_averages(x, order=order, dtype=dtype)
            assert {r.dtype for r in results} == {dtype}
            accurate = [r.to(dtype) for r in plain(x.double(), order)]
            worst = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if source != torch.float64 else 0)
            close(results, accurate, rtol=4 * worst, atol=2 * worst)

    @pytest.mark.parametrize("dtype", HALVES)
    def test_outer_sums_and_parts_keep_their_type(self, dtype):
        x = draw(*grid(3), dtype=dtype)
        assert ta.outer_sum(ta.mode_averages(x, order=3)).dtype == dtype
        part, residual = ta.additive_part(x, order=3), ta.interaction_residual(x, order=3)
        assert part.dtype == residual.dtype == dtype
        exact = reference.additive_part(x.double(), order=3)
        close([part], [exact.to(dtype)], rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


class TestOuterSum:
    @every_order
    def test_is_the_broadcast_sum(self, order):
        shape = grid(order, (2, 2))
        vectors = [draw(2, 2, n, 3, seed=k) for k, n in enumerate(shape[2:-1])]
        expected = reference.outer_sum(vectors)
        result = ta.outer_sum(vectors)
        assert result.shape == shape
        close([result, ta.outer_sum([v.mT.contiguous().mT for v in vectors])], [expected, expected])

    def test_is_fresh_memory(self):
        for sizes in ((4,), (1, 1), (4, 5), (1, 5), (5, 1), (1, 5, 1)):
            vectors = [draw(n, 3, seed=k) for k, n in enumerate(sizes)]
            vectors += [draw(1, 3).expand(4, 3)] * (len(sizes) == 1)
            before = [v.clone() for v in vectors]
            result = ta.outer_sum(vectors)
            assert result.is_contiguous()
            result.add_(1)
            close(vectors, before)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("sizes", [(4,), (4, 5), (1, 1, 5), (1, 5, 1), (1, 1, 1), (2, 3, 4)], ids=str)
    def test_adds_a_tensor_and_writes_where_it_is_told(self, sizes, layout):
        skip = LAYOUTS[layout](draw(2, *sizes, 3))
        vectors = [draw(2, n, 3, seed=k) for k, n in enumerate(sizes)]
        sum_ = ta.outer_sum(vectors)
        close([ta.outer_sum(vectors, skip=skip)], [sum_ + skip])
        for source, expected in ((None, sum_), (skip, sum_ + skip)):
            out = LAYOUTS[layout](torch.full_like(sum_, math.nan))
            assert ta.outer_sum(vectors, skip=source, out=out) is out
            close([out], [expected])
        expected = sum_ + skip
        assert ta.outer_sum(vectors, skip=skip, out=skip) is skip
        close([skip], [expected])

    def test_writes_over_nothing_that_is_still_to_be_read(self):
        hint = "\n  Give a tensor with memory of its own."
        out, vectors = draw(2, 30, 40, 5), [draw(2, 30, 5, seed=1), draw(2, 40, 5, seed=2)]
        larger, square = draw(2, 31, 40, 5), draw(2, 30, 30, 5)
        cases = [
            ([out[:, :, 0], vectors[1]], {"out": out}, "vectors[0]"),
            ([vectors[0], out[:, 0]], {"out": out}, "vectors[1]"),
            (vectors, {"skip": larger[:, :-1], "out": larger[:, 1:]}, "skip"),
            ([vectors[0]] * 2, {"skip": square, "out": square.transpose(1, 2)}, "skip"),
        ]
        for given, where, name in cases:
            refused(OptionError, f"outer_sum: out overlaps with {name} in memory.{hint}", ta.outer_sum, given, **where)
        rule = "out is expanded: several of its elements are one in memory."
        refused(OptionError, f"outer_sum: {rule}", ta.outer_sum, vectors, out=draw(2, 30, 1, 5).expand(2, 30, 40, 5))

    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision(self, dtype):
        skip = draw(*grid(3), dtype=dtype)
        vectors = [draw(2, n, 3, seed=k, dtype=dtype) for k, n in enumerate(skip.shape[1:-1])]
        exact = ta.outer_sum([v.double() for v in vectors], skip=skip.double()).to(dtype)
        result = ta.outer_sum(vectors, skip=skip)
        assert result.dtype == dtype
        close([result], [exact], rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)

    def test_lies_in_memory_as_what_is_added(self):
        skip = LAYOUTS["channels first"](draw(*grid(3)))
        vectors = [draw(2, n, 3, seed=k) for k, n in enumerate(skip.shape[1:-1])]
        assert ta.outer_sum(vectors, skip=skip).stride() == skip.stride()

    @every_order
    def test_is_the_transpose_of_the_averages(self, order):
        x = draw(*grid(order))
        sizes = x.shape[1:-1]
        vectors = [draw(2, n, 3, seed=k) for k, n in enumerate(sizes)]
        averages = ta.mode_averages(x, order=order)
        right = sum((v * a).sum() * (math.prod(sizes) / n) for v, a, n in zip(vectors, averages, sizes, strict=True))
        close([(ta.outer_sum(vectors) * x).sum()], [right])


class TestAdditivePart:
    @pytest.mark.parametrize("order", range(1, 5))
    def test_against_the_definition(self, order):
        x = draw(*grid(order))
        for weights in (None, some_weights(x, order), [positive(2, n) for n in x.shape[1:-1]]):
            expected = reference.additive_part(x, order=order, weights=weights)
            part = ta.additive_part(x, order=order, weights=weights)
            residual = ta.interaction_residual(x, order=order, weights=weights)
            close([part, residual], [expected, x - expected])
            averages = ta.mode_averages(x, order=order, weights=weights)
            close(ta.mode_averages(part, order=order, weights=weights), averages)
            for mean in ta.mode_averages(residual, order=order, weights=weights):
                assert mean.abs().max() < 1e-13
            close([ta.additive_part(part, order=order, weights=weights)], [part])

    def test_is_the_nearest_additive_tensor(self):
        x, weights = draw(3, 4, 1), [positive(3), positive(4, seed=1)]
        mass = (weights[0][:, None] * weights[1]).flatten().sqrt()[:, None]
        eyes = torch.eye(3).double().repeat_interleave(4, 0), torch.eye(4).double().repeat(3, 1)
        columns = torch.cat(eyes, 1)
        found = torch.linalg.lstsq(mass * columns, mass * x.reshape(12, 1), driver="gelsd").solution
        close([ta.additive_part(x, order=2, weights=weights)], [(columns @ found).reshape(3, 4, 1)])

    def test_lies_in_memory_as_the_tensor(self):
        for layout in ("channels first", "reversed", "batch last"):
            x = LAYOUTS[layout](draw(*grid(3)))
            assert ta.additive_part(x, order=3).stride() == x.stride()


def functions(weights=None):
    """The functions of this file, each as one from a tensor to a tuple of tensors."""
    return {
        "mode_averages": lambda x: ta.mode_averages(x, order=2, weights=weights),
        "additive_part": lambda x: (ta.additive_part(x, order=2, weights=weights),),
        "interaction_residual": lambda x: (ta.interaction_residual(x, order=2, weights=weights),),
        "outer_sum": lambda x: (ta.outer_sum([x[..., 0, :], x[..., 0, :, :]]),),
    }


some_functions = pytest.mark.parametrize(
    "name",
    [name if name == "mode_averages" else pytest.param(name, marks=pytest.mark.thorough) for name in functions()],
)


class TestDerivatives:
    @every_order
    def test_gradients_are_those_of_plain_means(self, order):
        """Of the tensor and of the weights, in every layout."""
        x = draw(*grid(order))
        for weights in ([None] * order, some_weights(x, order)):
            for layout in LAYOUTS.values():
                gradients = []
                for function in (ta.mode_averages, plain):
                    leaf = layout(x).detach().requires_grad_()
                    own = [None if w is None else w.clone().requires_grad_() for w in weights]
                    outputs = function(leaf, order=order, weights=own)
                    torch.autograd.backward(outputs, [draw(*o.shape, seed=k) for k, o in enumerate(outputs)])
                    grads = [leaf.grad, *(w.grad for w in own if w is not None)]
                    gradients.append([torch.zeros(()) if g is None else g for g in grads])
                close(*gradients)

    def test_gradients_lie_in_memory_as_the_tensor(self):
        for layout in ("channels first", "reversed", "batch last"):
            x = LAYOUTS[layout](draw(*grid(3))).requires_grad_()
            sum(mean.square().sum() for mean in ta.mode_averages(x, order=3)).backward()
            assert x.grad.stride() == x.stride()

    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision(self, dtype):
        x = draw(*grid(3), dtype=dtype).requires_grad_()
        outputs = ta.mode_averages(x, order=3)
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
        assert x.grad.dtype == dtype
        sizes = x.shape[1:-1]
        expected = torch.full_like(x, sum(n / math.prod(sizes) for n in sizes))
        close([x.grad], [expected], rtol=2 * torch.finfo(dtype).eps, atol=0)

    def test_only_some_results_used(self):
        x = draw(*grid(3)).requires_grad_()
        ta.mode_averages(x, order=3)[1].sum().backward()
        close([x.grad], [torch.full_like(x, 1 / (x.shape[1] * x.shape[3]))])

    @forward_mode
    @some_functions
    def test_first_and_second_derivatives_in_both_directions(self, name):
        x = draw(2, 3, 2, 2).requires_grad_()
        for weights in (None, [positive(3), positive(2, 2)]):
            function = functions(weights)[name]
            assert gradcheck(
                function, (x,), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=False
            )
            squared = lambda x, f=function: [o**2 for o in f(x)]  # noqa: E731
            assert gradgradcheck(squared, (x[..., :1].detach().requires_grad_(),), check_fwd_over_rev=True)

    @forward_mode
    @pytest.mark.parametrize(
        "function", [ta.mode_averages, *(pytest.param(f, marks=pytest.mark.thorough) for f in FUNCTIONS[1:])]
    )
    def test_derivatives_in_the_weights(self, function):
        x, weights = draw(2, 3, 2, 2).requires_grad_(), [positive(3).requires_grad_(), positive(2, 2).requires_grad_()]
        assert gradcheck(lambda x, *w: function(x, order=2, weights=w), (x, *weights), check_forward_ad=True)
        small = x[:1, :, :, :1].detach().requires_grad_()
        assert gradgradcheck(lambda x, w: function(x, order=2, weights=[w, None]), (small, weights[0]))

    def test_absent_indices_that_hold_anything_reach_no_gradient_of_weights(self):
        grads = []
        for held in (0.0, math.nan, math.inf):
            x = draw(2, 3, 4, 5)
            x[:, 1], x[0, :, 2] = held, held
            x.requires_grad_()
            weights = [torch.tensor([1.0, 0, 2]), torch.tensor([[1.0, 1, 0, 1], [2, 1, 1, 1]])]
            weights = [w.double().requires_grad_() for w in weights]
            means = ta.mode_averages(x, order=2, weights=weights)
            loss = sum(
                (m * draw(*m.shape, seed=3)).sum() for m in (means[0][:, [0, 2]], means[1][1], means[1][0, [0, 3]])
            )
            grads.append(torch.autograd.grad(loss, [x, *weights]))
        for other in grads[1:]:
            close(other, grads[0])

    @forward_mode
    def test_derivatives_through_what_is_added(self):
        skip, vectors = draw(2, 3, 2, 2).requires_grad_(), [draw(2, n, 2, seed=n).requires_grad_() for n in (3, 2)]
        function = lambda skip, *vectors: ta.outer_sum(vectors, skip=skip) ** 2  # noqa: E731
        assert gradcheck(function, (skip, *vectors), check_forward_ad=True, check_batched_grad=True)
        over = torch.vmap(lambda skip: ta.outer_sum([v.detach() for v in vectors], skip=skip))
        skips = torch.stack([skip.detach(), 2 * skip.detach()])
        close([over(skips)], [ta.outer_sum(vectors).detach() + skips])

    def test_nothing_of_the_size_of_the_tensor_is_kept(self):
        def keeps_its_input(function, layout):
            inner = layout(draw(2, 40, 50, 3).requires_grad_() * 1)
            gone = weakref.ref(inner)
            outputs = function(inner)
            del inner
            return gone() is not None and outputs is not None

        assert keeps_its_input(lambda x: x.square(), LAYOUTS["dense"])
        for layout in LAYOUTS.values():
            for function in FUNCTIONS:
                assert not keeps_its_input(functools.partial(function, order=2), layout)


@forward_mode
class TestTransforms:
    x = draw(2, 3, 4, 5)
    weights = (positive(3), positive(2, 4))

    @pytest.mark.parametrize("name", functions())
    def test_of_the_tensor(self, name):
        function, tangent = functions(self.weights)[name], draw(*self.x.shape, seed=1)
        for place in (0, 2, -1):
            many = torch.stack([self.x, 2 * self.x + 1, -self.x], place)
            expected = [torch.stack(parts) for parts in zip(*(function(x) for x in many.unbind(place)), strict=True)]
            close(torch.vmap(function, in_dims=place)(many), expected)
        outputs, tangents = torch.func.jvp(function, (self.x,), (tangent,))
        close(outputs, function(self.x))
        close(tangents, function(tangent))  # it is linear
        close(torch.func.jacrev(function)(self.x), torch.func.jacfwd(function)(self.x))

    def test_of_the_weights(self):
        many = torch.stack([self.weights[0], positive(3, seed=5)])
        for other in (None, self.weights[1]):
            means = lambda w, other=other: ta.mode_averages(self.x, order=2, weights=[w, other])  # noqa: E731
            expected = [torch.stack(parts) for parts in zip(*map(means, many), strict=True)]
            close(torch.vmap(means)(many), expected)
        means = lambda x, w: ta.mode_averages(x, order=2, weights=[None, w])  # noqa: E731
        close(torch.vmap(means)(self.x, self.weights[1]), means(self.x, self.weights[1]))
        twice = torch.vmap(torch.vmap(lambda x: ta.mode_averages(x, order=1)[0], in_dims=1, out_dims=1))
        close([twice(self.x)], [self.x])

    def test_of_losses(self):
        def loss(x, weights=None, function=ta.mode_averages):
            weights = None if weights is None else [weights, None]
            return sum(mean.square().sum() for mean in function(x, order=2, weights=weights))

        close([torch.vmap(torch.func.grad(loss))(self.x)], [torch.func.grad(loss)(self.x)])
        small = self.x[:1, :, :2, :1]
        for place in (0, 1):
            ours, theirs = (
                torch.func.hessian(functools.partial(loss, function=f), argnums=place)(small, self.weights[0])
                for f in (ta.mode_averages, plain)
            )
            close([ours], [theirs])


@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    @pytest.mark.thorough
    @pytest.mark.parametrize("order", [1, 2, 3])
    def test_one_graph_for_all_sizes(self, order):
        def both(x, *weights):
            averages = ta.mode_averages(x, order=order, weights=weights)
            return (*averages, ta.interaction_residual(x, order=order, weights=weights), ta.outer_sum(averages))

        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(both, backend=counter, fullgraph=True, dynamic=True)
        for size in (4, 5):
            sizes = [size + 3 * k for k in range(order)]
            leaves = [draw(size + 2, *sizes, 19), *(positive(n, seed=k) for k, n in enumerate(sizes))]
            results = []
            for function in (both, compiled):
                leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
                outputs = function(*leaves)
                torch.autograd.backward(outputs, [draw(*o.shape, seed=k) for k, o in enumerate(outputs)])
                results.append([*outputs, *(torch.zeros(()) if leaf.grad is None else leaf.grad for leaf in leaves)])
            close(*results)
        assert counter.frame_count == 1

    def test_equal_weights(self):
        """In half precision, which is not added up in its own type there either."""
        x = torch.full((1, 64, 64, 2), 100.0, dtype=torch.float16)
        compiled = torch.compile(ta.mode_averages, backend="aot_eager", fullgraph=True)
        close(compiled(x, order=2), [torch.full((1, 64, 2), 100.0, dtype=torch.float16)] * 2)


class TestMeta:
    @every_order
    def test_shapes_without_values(self, order):
        shape = grid(order)
        x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
        weights = [torch.ones(2, n) if k % 2 else None for k, n in enumerate(shape[1:-1])]
        results = ta.mode_averages(x, order=order, weights=weights)
        whole = [ta.additive_part(x, order=order), ta.interaction_residual(x, order=order), ta.outer_sum(results)]
        assert {(t.device.type, t.dtype) for t in (*results, *whole)} == {("meta", torch.bfloat16)}
        assert [tuple(r.shape) for r in results] == [(2, n, 3) for n in shape[1:-1]]
        assert {tuple(t.shape) for t in whole} == {shape}

    def test_a_tensor_larger_than_any_memory(self):
        x = torch.empty(8, 10000, 10000, 10000, 64, device="meta")
        assert [tuple(r.shape) for r in ta.mode_averages(x, order=3)] == [(8, 10000, 64)] * 3


def peak(function):
    """Bytes that a function holds at most at one time, beyond what was there, as the allocator of torch counts."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


class TestMemory:
    """Tensors of about 8 MB are read where they are."""

    TENSORS = {  # noqa: RUF012
        "channels last": lambda: torch.ones(2, 32, 32, 1024),
        "channels first": lambda: torch.ones(2, 1024, 32, 32).movedim(1, -1),
        "cropped": lambda: torch.ones(2, 34, 34, 1026)[:, 1:-1, 1:-1, 1:-1],
        "every second": lambda: torch.ones(2, 32, 64, 1024)[:, :, ::2],
        "expanded": lambda: torch.ones(1, 32, 32, 1024).expand(2, 32, 32, 1024),
        "float64": lambda: torch.ones(1, 32, 32, 1024, dtype=torch.float64),
    }

    @pytest.mark.parametrize("kind", TENSORS)
    def test_no_copy(self, kind):
        x = self.TENSORS[kind]()
        size = x.numel() * x.element_size()
        assert 8e6 < size < 9e6
        assert peak(lambda: ta.mode_averages(x, order=2)) < 0.2 * size

    def test_the_meter_sees_a_copy(self):
        x = self.TENSORS["channels last"]()
        size = x.numel() * x.element_size()
        assert peak(lambda: x.movedim(1, -1).contiguous().sum()) >= size

    @pytest.mark.parametrize("kind", ["channels last", "channels first"])
    def test_writing_holds_one_tensor(self, kind):
        x = self.TENSORS[kind]()
        size = x.numel() * x.element_size()
        leaf, vectors = x.detach().requires_grad_(), ta.mode_averages(x, order=2)

        def train():
            averages = ta.mode_averages(leaf, order=2)
            torch.autograd.backward(averages, [torch.ones_like(each) for each in averages])

        for function in (train, lambda: ta.outer_sum(vectors), lambda: ta.additive_part(x, order=2)):
            assert peak(function) < 1.5 * size  # the averages themselves are a quarter of it
