"""Mode averages and outer sums against plain torch: every order, memory layout, type, weight and derivative."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.profiler import ProfilerActivity, profile

import tensorattn as ta
from tensorattn import reference, slabs
from tensorattn.contraction_tree import folding
from tensorattn.planning import make_plan

ORDERS = range(1, 9)
LARGEST = {1: 9, 2: 7, 3: 5, 4: 4, 5: 4, 6: 3, 7: 3, 8: 2}
HALVES = [torch.bfloat16, torch.float16]
DOUBLE = {"rtol": 1e-12, "atol": 1e-13}

# torch scripts some decompositions the first time that it differentiates forward.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def positive(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


def grid(order, batch=(2,), dim=3, one=False):
    """Shape of a tensor of an order, with neighbouring modes of different sizes, one of them of size 1 if wanted."""
    sizes = [max(1, LARGEST[order] - mode % 3) for mode in range(order)]
    if one:
        sizes[order // 2] = 1
    return (*batch, *sizes, dim)


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
                share = share.reshape(*share.shape[:-1], *(1,) * mode, share.shape[-1], *(1,) * after)
                mean = (mean * share).sum(dim)
        results.append(mean)
    return results


def close(ours, theirs, **tolerance):
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, **(tolerance or DOUBLE))


def permuted(tensor, dims):
    """The same values, laid out in memory in another order of dimensions."""
    return tensor.permute(dims).contiguous().permute([dims.index(d) for d in range(len(dims))])


def sliced(tensor):
    """The same values as every second element, from the second on, of a larger tensor in each dimension."""
    larger = torch.full([2 * size + 1 for size in tensor.shape], math.nan, dtype=tensor.dtype)
    view = larger[(slice(1, None, 2),) * tensor.dim()]
    return view.copy_(tensor)


LAYOUTS = {
    "dense": lambda x, order: x.contiguous(),
    "channels first": lambda x, order: permuted(x, [0, x.dim() - 1, *range(1, x.dim() - 1)]),
    "reversed": lambda x, order: permuted(x, list(range(x.dim()))[::-1]),
    "channels between": lambda x, order: permuted(x, [*range(x.dim() - 2), x.dim() - 1, x.dim() - 2]),
    "batch last": lambda x, order: permuted(x, [*range(1, x.dim()), 0]),
    "sliced": lambda x, order: sliced(x),
    "cropped": lambda x, order: torch.nn.functional.pad(x, (1, 1) * x.dim())[(slice(1, -1),) * x.dim()],
    "sliced and reversed": lambda x, order: sliced(x.permute(*range(x.dim())[::-1])).permute(*range(x.dim())[::-1]),
}  # fmt: skip


@pytest.fixture(params=[None, 7, 1 << 14, "few"], ids=["whole", "slabs", "long slabs", "few"])
def slab(request, monkeypatch):
    """Read and write tensors at once, or in slabs of a few elements, or in slabs of a few long rows, or unplanned."""
    if request.param == "few":
        monkeypatch.setattr(slabs, "SMALL", 1 << 15)
        yield
    elif request.param is not None:
        monkeypatch.setattr(slabs, "CACHED", 0)
        monkeypatch.setattr(slabs, "ELEMENTS", request.param)
        make_plan.cache_clear()  # plans know which tensors are read slab by slab
        yield
        make_plan.cache_clear()
    else:
        yield


@pytest.fixture(params=[0, 1 << 15], ids=["planned", "few"])
def few(request, monkeypatch):
    """Take tensors for large ones, or for small ones that need no plan."""
    monkeypatch.setattr(slabs, "SMALL", request.param)


class TestMeans:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("order", ORDERS)
    def test_equal_weights(self, order, layout, slab):
        for one in (False, True):
            x = draw(*grid(order, one=one))
            close(ta.mode_averages(LAYOUTS[layout](x, order), order=order), plain(x, order))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("order", ORDERS)
    def test_weights(self, order, layout, slab):
        x = draw(*grid(order))
        sizes = x.shape[1:-1]
        weights = [[None, positive(n, seed=k), positive(2, n, seed=k)][(k + order) % 3] for k, n in enumerate(sizes)]
        close(ta.mode_averages(LAYOUTS[layout](x, order), order=order, weights=weights), plain(x, order, weights))

    @pytest.mark.parametrize(("sizes", "fold"), [((257, 130), 16), ((1061, 63), 33), ((40, 600), 4), ((9, 2100), 1)])
    def test_rows_that_are_read_several_at_a_time(self, sizes, fold):
        """Products of a few long rows, with a rest of rows that fill none, where the middle of a tensor is reduced."""
        assert folding(*sizes) == fold
        x = draw(2, 2, *sizes)
        assert "matmul" in {step.primitive for step in ta.plan(sizes, dim=2, batch=(2,), layout="channels_first").steps}
        close(ta.mode_averages(x.movedim(1, -1), order=2), plain(x.movedim(1, -1), 2))

    @pytest.mark.parametrize("batch", [(), (1,), (2, 3), (1, 2, 1, 2)], ids=str)
    def test_batch(self, batch, slab):
        x = draw(*grid(3, batch))
        close(ta.mode_averages(x, order=3), plain(x, 3))

    @pytest.mark.parametrize("slab", [None, 1 << 14], indirect=True, ids=["whole", "long slabs"])
    @pytest.mark.parametrize("dim", [1, 2, 17])
    @pytest.mark.parametrize(
        "sizes",
        [(1,), (1, 1, 1), (40,), (33, 1), (1, 33), (17, 18), (2, 33, 3), (33, 2, 20), (90, 200), (30, 4200), (4200, 9)],
        ids=str,
    )
    def test_sizes_on_both_sides_of_every_choice(self, sizes, dim, slab):
        """Short and long groups, rows of one element, few and many: each primitive in turn."""
        x = draw(2, *sizes, dim)
        for layout in LAYOUTS.values():
            close(ta.mode_averages(layout(x, len(sizes)), order=len(sizes)), plain(x, len(sizes)))

    @pytest.mark.parametrize("order", ORDERS)
    def test_empty_batch(self, order):
        x = torch.empty(grid(order, (0, 2)))
        for weights in (None, [torch.ones(n) for n in x.shape[2:-1]]):
            results = ta.mode_averages(x, order=order, weights=weights)
            assert [tuple(r.shape) for r in results] == [(0, 2, n, 3) for n in x.shape[2:-1]]
            assert ta.interaction_residual(x, order=order, weights=weights).shape == x.shape

    @pytest.mark.parametrize("place", range(4))
    @pytest.mark.parametrize("weighted", [False, True])
    def test_an_empty_batch_anywhere_in_memory(self, place, weighted):
        x = torch.empty(2, 3, 4, 5).narrow(0, 0, 0).movedim(0, place).contiguous().movedim(place, 0)
        weights = [torch.ones(3), torch.ones(4)] if weighted else None
        assert [r.shape for r in ta.mode_averages(x, order=2, weights=weights)] == [(0, 3, 5), (0, 4, 5)]
        assert str(ta.plan((3, 4), dim=2, batch=(0,))).endswith(
            "0 elements read and 0 written, 0.00 times one read of the tensor"
        )

    @pytest.mark.parametrize("dim", [0, 5])
    @pytest.mark.parametrize("batch", [(0,), (0, 2), (2, 0)], ids=str)
    @pytest.mark.parametrize("place", range(5))
    def test_nothing_at_all(self, place, batch, dim):
        x = torch.empty(*batch, 3, 4, 5, dim)
        for layout in (x, x.movedim(0, place).contiguous().movedim(place, 0)):
            assert [r.shape for r in ta.mode_averages(layout, order=3)] == [(*batch, n, dim) for n in (3, 4, 5)]

    def test_long_sums_are_added_up_in_parts(self, monkeypatch):
        """One running total of thousands of rows would be off by 5e-5."""
        monkeypatch.setattr(slabs, "CACHED", 0)
        x = 0.1 + 1e-3 * torch.randn(4096, 32, 64, generator=torch.Generator().manual_seed(0))
        exact = x.double().mean(0)
        _, mean = ta.mode_averages(x, order=2)
        assert ((mean - exact) / exact).abs().max() < 3e-6

    def test_large_values_do_not_overflow_over_slabs(self, monkeypatch):
        monkeypatch.setattr(slabs, "CACHED", 0)
        monkeypatch.setattr(slabs, "ELEMENTS", 64)
        x = torch.full((64, 64, 8), 1e37)
        for mean in ta.mode_averages(x, order=2):
            close([mean], [torch.full((64, 8), 1e37)], rtol=1e-5, atol=0)

    def test_gradients_in_batches(self, slab):
        x = draw(*grid(3)).requires_grad_()
        means, cotangents = ta.mode_averages(x, order=3), draw(4, *grid(3), seed=5)
        y = ta.outer_sum(means) * x
        (found,) = torch.autograd.grad(y, x, cotangents, is_grads_batched=True, retain_graph=True)
        close(list(found), [torch.autograd.grad(y, x, each, retain_graph=True)[0] for each in cotangents])

    def test_expanded_tensors(self, slab):
        row = draw(2, 1, 5, 1)
        x = row.expand(2, 4, 5, 3)
        close(ta.mode_averages(x, order=2), plain(x, 2))
        close(ta.mode_averages(row.expand(2, 4, 5, 3)[:, 1:, ::2], order=2), plain(x[:, 1:, ::2], 2))
        point = torch.ones(1, dtype=torch.float64).expand(2, 3, 4, 5)
        close(ta.mode_averages(point, order=3), [torch.ones(n, 5, dtype=torch.float64) for n in (2, 3, 4)])

    def test_overlapping_windows(self, slab):
        x = draw(3, 20).unfold(1, 6, 2).unsqueeze(-1)  # (3, 8, 6, 1), most elements twice or more
        assert x.stride() == (20, 2, 1, 1)
        close(ta.mode_averages(x, order=2), plain(x, 2))
        close(ta.mode_averages(x, order=3), plain(x, 3))

    def test_the_input_is_left_alone(self, slab):
        for layout in LAYOUTS.values():
            x = layout(draw(*grid(3)), 3)
            before = x.clone()
            ta.mode_averages(x, order=3, weights=[None, positive(x.shape[2]), None])
            ta.interaction_residual(x, order=3)
            assert torch.equal(x, before)


class TestWeights:
    x = draw(2, 3, 4, 5, 6)  # batch (2, 3), modes 4 and 5

    def test_multiplicities_repeat(self):
        counts = torch.tensor([2, 0, 1, 3])
        repeated = self.x.repeat_interleave(counts, dim=2)
        rows, columns = ta.mode_averages(self.x, order=2, weights=[counts, None])
        again = ta.mode_averages(repeated, order=2)
        close([rows.repeat_interleave(counts, dim=2), columns], again)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("order", [1, 2, 3, 4])
    def test_every_layout(self, order, layout, slab):
        x = LAYOUTS[layout](draw(*grid(order)), order)
        for weights in ([positive(n) for n in x.shape[1:-1]], [positive(2, n, seed=n) for n in x.shape[1:-1]]):
            close(ta.mode_averages(x, order=order, weights=weights), plain(x, order, weights))
            if order == 1:
                continue  # the one average is the tensor, whatever its weights
            absent = [w.clone() for w in weights]
            for w in absent:
                w[..., 0] = 0 if w.shape[-1] > 1 else 1
            dirty = x.clone()
            for mode, w in enumerate(absent):
                if w.shape[-1] > 1:
                    dirty.select(1 + mode, 0).fill_(math.nan)
            clean = torch.where(dirty.isfinite(), dirty, 0.0)
            close(ta.mode_averages(dirty, order=order, weights=absent), plain(clean, order, absent))

    def test_zero_is_absent(self):
        keep = torch.tensor([True, False, True, True, False])
        rows, columns = ta.mode_averages(self.x, order=2, weights=[None, keep])
        close([rows, columns[..., keep, :]], ta.mode_averages(self.x[..., keep, :], order=2))

    @pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 4), (1, 1, 4), (2, 1, 4), (1, 3, 4), (2, 3, 4)], ids=str)
    def test_batch_dimensions(self, shape, slab):
        weights = positive(*shape)
        expected = plain(self.x, 2, [weights.expand(2, 3, 4), None])
        close(ta.mode_averages(self.x, order=2, weights=[weights, None]), expected)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
    def test_types(self, dtype):
        weights = torch.tensor([1, 0, 1, 1]).to(dtype)
        close(ta.mode_averages(self.x, order=2, weights=[weights, None]), plain(self.x, 2, [weights.double(), None]))

    @pytest.mark.parametrize("kind", [list, tuple, np.array])
    def test_numbers_are_read_in_full_precision(self, kind):
        numbers = [0.1, 0.2, 0.3, 0.7]
        expected = plain(self.x, 2, [torch.tensor(numbers, dtype=torch.float64), None])
        close(ta.mode_averages(self.x, order=2, weights=(kind(numbers), None)), expected)

    def test_only_ratios_count(self):
        weights = [positive(4), positive(5)]
        scaled = [1e3 * weights[0], 1e-3 * weights[1]]
        close(ta.mode_averages(self.x, order=2, weights=scaled), ta.mode_averages(self.x, order=2, weights=weights))
        equal = [torch.full((4,), 7.0), torch.ones(5)]
        close(ta.mode_averages(self.x, order=2, weights=equal), ta.mode_averages(self.x, order=2))

    def test_a_sample_without_any_weight_has_zero_means(self):
        weights = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]])[:, None]
        rows, columns = ta.mode_averages(self.x, order=2, weights=[weights, None])
        assert columns[1].eq(0).all()
        assert columns[0].ne(0).all()
        close([rows], [self.x.mean(3)])


@pytest.mark.usefixtures("few")
class TestTypes:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_single_precision(self, layout):
        x = draw(*grid(3), dtype=torch.float32)
        results = ta.mode_averages(LAYOUTS[layout](x, 3), order=3)
        close([r.double() for r in results], plain(x.double(), 3), rtol=1e-5, atol=1e-6)
        assert {r.dtype for r in results} == {torch.float32}

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision_is_rounded_once(self, dtype, layout, slab):
        x = draw(2, 5, 6, 7, 3, dtype=dtype)
        for weights in (None, [None, positive(6), positive(2, 7)]):
            results = ta.mode_averages(LAYOUTS[layout](x, 3), order=3, weights=weights)
            assert {r.dtype for r in results} == {dtype}
            exact = plain(x.double(), 3, weights)
            close(results, [e.to(dtype) for e in exact], rtol=torch.finfo(dtype).eps, atol=1e-5)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_half_precision_does_not_overflow(self, layout):
        x = torch.full((1, 64, 64, 2), 100.0, dtype=torch.float16)
        ones = [torch.full((64,), 1000.0), None]
        for weights in (None, ones):
            for result in ta.mode_averages(LAYOUTS[layout](x, 2), order=2, weights=weights):
                assert torch.equal(result, torch.full((1, 64, 2), 100.0, dtype=torch.float16))
        part = ta.additive_part(x, order=2)
        assert torch.equal(part, x)

    def test_half_precision_does_not_stall(self):
        x = torch.ones(1, 300, 300, 1, dtype=torch.bfloat16)
        x[:, :, ::2] = 1.0078125  # the next number after 1: a sum in bfloat16 would stop at 256
        rows, _ = ta.mode_averages(x, order=2, dtype=torch.float32)
        close([rows], [torch.full((1, 300, 1), 1.00390625)], rtol=1e-6, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("source", [torch.bfloat16, torch.float32, torch.float64])
    def test_the_type_of_the_results(self, source, dtype):
        x = draw(*grid(2), dtype=source)
        results = ta.mode_averages(x, order=2, dtype=dtype)
        assert {r.dtype for r in results} == {dtype}
        accurate = [r.to(dtype) for r in plain(x.double(), 2)]
        worst = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if source != torch.float64 else 0)
        close(results, accurate, rtol=4 * worst, atol=2 * worst)

    @pytest.mark.parametrize("dtype", HALVES)
    def test_outer_sums_and_parts_keep_their_type(self, dtype):
        x = draw(*grid(3), dtype=dtype)
        assert ta.outer_sum(ta.mode_averages(x, order=3)).dtype == dtype
        part, residual = ta.additive_part(x, order=3), ta.interaction_residual(x, order=3)
        assert part.dtype == residual.dtype == dtype
        exact = torch.from_numpy(reference.additive_part(x.double(), order=3))
        close([part], [exact.to(dtype)], rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.usefixtures("few")
class TestOuterSum:
    @pytest.mark.parametrize("order", ORDERS)
    def test_is_the_broadcast_sum(self, order):
        shape = grid(order, (2, 2))
        vectors = [draw(2, 2, n, 3, seed=k) for k, n in enumerate(shape[2:-1])]
        expected = sum(
            v.reshape(2, 2, *(n if k == mode else 1 for k, n in enumerate(shape[2:-1])), 3)
            for mode, v in enumerate(vectors)
        )
        result = ta.outer_sum(vectors)
        assert result.shape == shape
        close([result], [expected.expand(shape)])
        close([ta.outer_sum([v.mT.contiguous().mT for v in vectors])], [expected.expand(shape)])

    def test_is_fresh_memory(self):
        for vectors in ([draw(4, 3)], [draw(1, 3), draw(1, 3, seed=1)], [draw(4, 3), draw(5, 3)]):
            before = [v.clone() for v in vectors]
            result = ta.outer_sum(vectors)
            assert result.is_contiguous()
            result.add_(1)
            close(vectors, before)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("order", [1, 2, 3, 5])
    def test_adds_a_tensor_and_writes_where_it_is_told(self, order, layout, slab):
        skip = LAYOUTS[layout](draw(*grid(order)), order)
        vectors = [draw(2, n, 3, seed=k) for k, n in enumerate(skip.shape[1:-1])]
        plain = ta.outer_sum(vectors)
        close([ta.outer_sum(vectors, skip=skip)], [plain + skip])
        for source, expected in ((None, plain), (skip, plain + skip)):
            out = LAYOUTS[layout](torch.full_like(plain, math.nan), order)
            assert ta.outer_sum(vectors, skip=source, out=out) is out
            close([out], [expected])
        expected = plain + skip
        assert ta.outer_sum(vectors, skip=skip, out=skip) is skip
        close([skip], [expected])

    @pytest.mark.parametrize("sizes", [(1, 1), (1, 1, 5), (1, 5, 1), (5, 1, 1), (1, 1, 1)], ids=str)
    def test_adds_in_place_whatever_else_is_as_large(self, sizes, slab):
        vectors = [draw(2, n, 3, seed=k) for k, n in enumerate(sizes)]
        skip = draw(2, *sizes, 3, seed=9)
        expected = ta.outer_sum(vectors) + skip
        ta.outer_sum(vectors, skip=skip, out=skip)
        close([skip], [expected])

    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision_is_rounded_once(self, dtype, slab):
        skip = draw(*grid(3), dtype=dtype)
        vectors = [draw(2, n, 3, seed=k, dtype=dtype) for k, n in enumerate(skip.shape[1:-1])]
        exact = ta.outer_sum([v.double() for v in vectors], skip=skip.double()).to(dtype)
        result = ta.outer_sum(vectors, skip=skip)
        assert result.dtype == dtype
        close([result], [exact], rtol=torch.finfo(dtype).eps, atol=0)

    @pytest.mark.parametrize("place", ["first", "second", "last"])
    def test_goes_where_a_vector_lies(self, place):
        out, other = draw(3, 4, 8), draw(4, 8, seed=2)
        vectors = {
            "first": lambda out: [out[:, 0], other],
            "second": lambda out: [draw(3, 8, seed=3), out[0]],
            "last": lambda out: [draw(3, 8, seed=3), out.flatten()[-32:].view(4, 8)],
        }[place]
        expected = ta.outer_sum([vector.clone() for vector in vectors(out)])
        close([ta.outer_sum(vectors(out), out=out)], [expected])

    def test_lies_in_memory_as_what_is_added(self):
        skip = LAYOUTS["channels first"](draw(*grid(3)), 3)
        vectors = [draw(2, n, 3, seed=k) for k, n in enumerate(skip.shape[1:-1])]
        assert ta.outer_sum(vectors, skip=skip).stride() == skip.stride()

    @forward_mode
    def test_derivatives_through_what_is_added(self):
        skip, vectors = draw(2, 3, 2, 2).requires_grad_(), [draw(2, n, 2, seed=n).requires_grad_() for n in (3, 2)]
        function = lambda skip, *vectors: ta.outer_sum(vectors, skip=skip) ** 2  # noqa: E731
        assert gradcheck(function, (skip, *vectors), check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(function, (skip, *vectors))
        over = torch.vmap(lambda skip: ta.outer_sum([v.detach() for v in vectors], skip=skip))
        skips = torch.stack([skip.detach(), 2 * skip.detach()])
        close([over(skips)], [ta.outer_sum(vectors).detach() + skips])

    @pytest.mark.parametrize("order", ORDERS)
    def test_is_the_transpose_of_the_averages(self, order):
        x = draw(*grid(order))
        sizes = x.shape[1:-1]
        vectors = [draw(2, n, 3, seed=k) for k, n in enumerate(sizes)]
        left = (ta.outer_sum(vectors) * x).sum()
        averages = ta.mode_averages(x, order=order)
        right = sum((v * a).sum() * (math.prod(sizes) / n) for v, a, n in zip(vectors, averages, sizes, strict=True))
        torch.testing.assert_close(left, right, **DOUBLE)


@pytest.mark.usefixtures("few")
class TestAdditivePart:
    @pytest.mark.parametrize("order", range(1, 5))
    def test_against_the_oracle(self, order):
        x = draw(*grid(order))
        for weights in (
            None,
            [positive(2, n, seed=k) if k % 2 else positive(n, seed=k) for k, n in enumerate(x.shape[1:-1])],
        ):
            expected = torch.from_numpy(reference.additive_part(x, order=order, weights=weights))
            close([ta.additive_part(x, order=order, weights=weights)], [expected])
            close([ta.interaction_residual(x, order=order, weights=weights)], [x - expected], rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("order", ORDERS)
    def test_the_residual_has_no_averages_and_the_part_keeps_them(self, order):
        x = draw(*grid(order))
        weights = [positive(n, seed=k) for k, n in enumerate(x.shape[1:-1])]
        averages = ta.mode_averages(x, order=order, weights=weights)
        part = ta.additive_part(x, order=order, weights=weights)
        close(ta.mode_averages(part, order=order, weights=weights), averages)
        residual = ta.interaction_residual(x, order=order, weights=weights)
        for mean in ta.mode_averages(residual, order=order, weights=weights):
            assert mean.abs().max() < 1e-13
        if order > 1 and residual.numel() > 60:
            assert residual.abs().max() > 0.1
        close([ta.additive_part(part, order=order, weights=weights)], [part])

    def test_is_the_nearest_additive_tensor(self):
        x, weights = draw(3, 4, 1), [positive(3), positive(4, seed=1)]
        mass = (weights[0][:, None] * weights[1]).flatten().sqrt()
        columns = torch.cat(
            [torch.eye(3, dtype=torch.float64).repeat_interleave(4, 0), torch.eye(4, dtype=torch.float64).repeat(3, 1)],
            1,
        )
        solution = torch.linalg.lstsq(
            mass[:, None] * columns, mass[:, None] * x.reshape(12, 1), driver="gelsd"
        ).solution
        close(
            [ta.additive_part(x, order=2, weights=weights)],
            [(columns @ solution).reshape(3, 4, 1)],
            rtol=1e-10,
            atol=1e-12,
        )


def functions(weights=None):
    """The functions of this file, each as one from a tensor to a tuple of tensors."""
    return {
        "mode_averages": lambda x: ta.mode_averages(x, order=2, weights=weights),
        "additive_part": lambda x: (ta.additive_part(x, order=2, weights=weights),),
        "interaction_residual": lambda x: (ta.interaction_residual(x, order=2, weights=weights),),
        "outer_sum": lambda x: (ta.outer_sum([x[..., 0, :], x[..., 0, :, :]]),),
    }


@pytest.mark.usefixtures("few")
class TestDerivatives:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("order", ORDERS)
    def test_gradients_are_those_of_plain_means(self, order, layout, slab):
        x = draw(*grid(order))
        weights = [
            [None, positive(n, seed=k), positive(2, n, seed=k)][(k + order) % 3] for k, n in enumerate(x.shape[1:-1])
        ]
        gradients = []
        for function in (ta.mode_averages, plain):
            leaf = LAYOUTS[layout](x, order).detach().requires_grad_()
            outputs = function(leaf, order=order, weights=weights)
            upstream = [draw(*o.shape, seed=k) for k, o in enumerate(outputs)]
            torch.autograd.backward(outputs, upstream)
            gradients.append(leaf.grad)
        close(gradients[:1], gradients[1:])

    @pytest.mark.parametrize("order", range(1, 6))
    def test_gradients_of_weights_are_those_of_plain_means(self, order):
        x = draw(*grid(order))
        gradients = []
        for function in (ta.mode_averages, plain):
            leaves = [x.clone(), *(positive(*(2,) * (k % 2), n, seed=k) for k, n in enumerate(x.shape[1:-1]))]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            outputs = function(leaves[0], order=order, weights=leaves[1:])
            torch.autograd.backward(outputs, [draw(*o.shape, seed=k) for k, o in enumerate(outputs)])
            gradients.append([torch.zeros(()) if leaf.grad is None else leaf.grad for leaf in leaves])
        close(*gradients)

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
    @pytest.mark.parametrize("name", functions())
    def test_first_derivatives(self, name):
        x = draw(2, 3, 2, 2).requires_grad_()
        weights = [positive(3), positive(2, 2)]
        for function in (functions()[name], functions(weights)[name]):
            assert gradcheck(
                function, (x,), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=False
            )

    @forward_mode
    @pytest.mark.parametrize("name", functions())
    def test_second_derivatives(self, name):
        x = draw(2, 3, 2, 2).requires_grad_()
        function = functions([positive(3), None])[name]
        assert gradgradcheck(lambda x: [o**2 for o in function(x)], (x,), check_fwd_over_rev=True)

    @forward_mode
    @pytest.mark.parametrize("function", [ta.mode_averages, ta.additive_part, ta.interaction_residual])
    def test_derivatives_in_the_weights(self, function):
        x, weights = draw(2, 3, 2, 2).requires_grad_(), [positive(3).requires_grad_(), positive(2, 2).requires_grad_()]
        assert gradcheck(lambda x, *w: function(x, order=2, weights=w), (x, *weights), check_forward_ad=True)
        assert gradgradcheck(lambda x, *w: function(x, order=2, weights=w), (x, *weights))

    def test_nothing_of_the_size_of_the_tensor_is_kept(self):
        def keeps_its_input(function, layout):
            x = draw(2, 40, 50, 3).requires_grad_()
            inner = layout(x * 1, 2)
            gone = weakref.ref(inner)
            outputs = function(inner)
            del inner
            return gone() is not None and outputs is not None

        assert keeps_its_input(lambda x: x.square(), LAYOUTS["dense"])
        for layout in LAYOUTS.values():
            assert not keeps_its_input(lambda x: ta.mode_averages(x, order=2), layout)
            assert not keeps_its_input(lambda x: ta.additive_part(x, order=2, weights=[positive(40), None]), layout)


@forward_mode
@pytest.mark.usefixtures("few")
class TestTransforms:
    x = draw(2, 3, 4, 5)
    weights = (positive(3), positive(2, 4))

    @pytest.mark.parametrize("place", [0, 1, 2, 3, -1])
    @pytest.mark.parametrize("name", functions())
    def test_vmap_over_the_tensor(self, name, place):
        many = torch.stack([self.x, 2 * self.x + 1, -self.x], place)
        function = functions(self.weights)[name]
        results = torch.vmap(function, in_dims=place)(many)
        expected = [torch.stack(parts) for parts in zip(*(function(x) for x in many.unbind(place)), strict=True)]
        close(results, expected)

    @pytest.mark.parametrize("place", [0, 1])
    def test_vmap_over_the_weights(self, place):
        many = torch.stack([self.weights[0], positive(3, seed=5)], place)
        for other in (None, self.weights[1]):

            def means(weights, other=other):
                return ta.mode_averages(self.x, order=2, weights=[weights, other])

            expected = [torch.stack(parts) for parts in zip(*map(means, many.unbind(place)), strict=True)]
            close(torch.vmap(means, in_dims=place)(many), expected)

    def test_vmap_over_both_and_twice(self):
        def means(x, weights):
            return ta.mode_averages(x, order=2, weights=[None, weights])

        close(torch.vmap(means)(self.x, self.weights[1]), means(self.x, self.weights[1]))
        twice = torch.vmap(torch.vmap(lambda x: ta.mode_averages(x, order=1)[0], in_dims=1, out_dims=1))
        close([twice(self.x)], [self.x])

    def test_vmap_of_gradients(self):
        def loss(x):
            return sum(mean.square().sum() for mean in ta.mode_averages(x, order=2))

        close([torch.vmap(torch.func.grad(loss))(self.x)], [torch.func.grad(loss)(self.x)])

    @pytest.mark.parametrize("name", functions())
    def test_jvp_is_the_map_itself(self, name):
        function, tangent = functions(self.weights)[name], draw(*self.x.shape, seed=1)
        outputs, tangents = torch.func.jvp(function, (self.x,), (tangent,))
        close(outputs, function(self.x))
        close(tangents, function(tangent))

    @pytest.mark.parametrize("name", functions())
    def test_jacobians_agree(self, name):
        function = functions(self.weights)[name]
        close(torch.func.jacrev(function)(self.x), torch.func.jacfwd(function)(self.x))

    def test_forward_derivatives_in_the_weights(self):
        tangent = draw(3, seed=1)

        def derivatives(function):
            def means(weights):
                return tuple(function(self.x, order=2, weights=[weights, self.weights[1]]))

            return torch.func.jvp(means, (self.weights[0],), (tangent,))[1]

        close(derivatives(ta.mode_averages), derivatives(plain))

    def test_hessians(self):
        def hessian(function, place):
            def loss(x, weights):
                return sum(mean.square().sum() for mean in function(x, order=2, weights=[weights, None]))

            return torch.func.hessian(loss, argnums=place)(self.x[:1, :, :2, :1], self.weights[0])

        for place in (0, 1):
            close([hessian(ta.mode_averages, place)], [hessian(plain, place)])


class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

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

    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision(self, dtype):
        x = torch.full((1, 64, 64, 2), 100.0, dtype=dtype)
        compiled = torch.compile(ta.mode_averages, backend="aot_eager", fullgraph=True)
        close(compiled(x, order=2), [torch.full((1, 64, 2), 100.0, dtype=dtype)] * 2)


@pytest.mark.usefixtures("few")
class TestMeta:
    @pytest.mark.parametrize("order", ORDERS)
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
    """Tensors of about 64 MB are read where they are."""

    TENSORS = {  # noqa: RUF012
        "channels last": lambda: torch.ones(4, 64, 64, 1024),
        "channels first": lambda: torch.ones(4, 1024, 64, 64).movedim(1, -1),
        "one mode": lambda: torch.ones(4, 64, 64, 1024).flatten(1, 2),
        "cropped": lambda: torch.ones(4, 66, 66, 1026)[:, 1:-1, 1:-1, 1:-1],
        "every second": lambda: torch.ones(4, 64, 128, 1024)[:, :, ::2],
        "expanded": lambda: torch.ones(1, 64, 64, 1024).expand(4, 64, 64, 1024),
        "bfloat16": lambda: torch.ones(8, 64, 64, 1024, dtype=torch.bfloat16),
        "bfloat16 channels first": lambda: torch.ones(8, 1024, 64, 64, dtype=torch.bfloat16).movedim(1, -1),
        "bfloat16 cropped": lambda: torch.ones(8, 66, 64, 1026, dtype=torch.bfloat16)[:, 1:-1, :, 1:-1],
        "float64": lambda: torch.ones(2, 64, 64, 1024, dtype=torch.float64),
    }

    @pytest.mark.parametrize("kind", TENSORS)
    def test_no_copy(self, kind):
        x = self.TENSORS[kind]()
        order = 1 if kind == "one mode" else 2
        size = x.numel() * x.element_size()
        results = size if order == 1 else 0  # the averages over no other mode are the tensor once more
        allowance = results + 0.05 * size + 8e6
        assert 60e6 < size < 80e6
        weights = [torch.rand(n) for n in x.shape[1:-1]]
        per_sample = [torch.rand(x.shape[0], n) for n in x.shape[1:-1]]
        for given in (None, weights, per_sample):
            assert peak(lambda given=given: ta.mode_averages(x, order=order, weights=given)) < allowance

    def test_the_meter_sees_a_copy(self):
        x = torch.ones(4, 64, 64, 1024)
        size = x.numel() * x.element_size()
        assert peak(lambda: x.movedim(1, -1).contiguous().sum()) >= size
        assert peak(lambda: (x * 2).sum()) >= size

    def test_backward_holds_one_gradient(self):
        for kind in ("channels last", "channels first"):
            x = self.TENSORS[kind]().requires_grad_()
            size = x.numel() * x.element_size()

            def train(x=x):
                torch.autograd.backward(
                    averages := ta.mode_averages(x, order=2), [torch.ones_like(a) for a in averages]
                )

            assert peak(train) < 1.05 * size + 8e6

    def test_writing_holds_one_tensor(self):
        vectors = [torch.ones(4, 64, 1024), torch.ones(4, 64, 1024)]
        x = self.TENSORS["channels last"]()
        size = x.numel() * x.element_size()
        assert peak(lambda: ta.outer_sum(vectors)) < 1.05 * size + 8e6
        assert peak(lambda: ta.additive_part(x, order=2)) < 1.05 * size + 8e6
