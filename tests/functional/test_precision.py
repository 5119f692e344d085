"""Types: which a result has, what half precision and extreme numbers lose, and autocast."""

from __future__ import annotations

import pytest
import torch
from grids import CAUSAL, VARIANTS, close, every_causal_variant, every_variant, fits, holes, positive, tensors
from modules import draw

import tensorattn as ta
from tensorattn.functional import OPERATORS

HALVES = [torch.bfloat16, torch.float16]
WITH_LSE = [
    variant
    for variant in VARIANTS
    if variant.name in ("additive", "truncated", "kao_kv", "flattened")
    or (variant.options.get("centered") and "interaction" not in variant.options)
]
NOT_ONE_MEAN = ("kronecker_sum", "kao_qkv")  # their outputs are sums of as many means as there are modes


def given(variant):
    """Arguments that take paths of their own."""
    found = [{}, {"return_attention": True}, {"mask": holes(2, 3, 4)}, {"lengths": [2, [3, 4]]}]
    found += [{"weights": [positive(3), positive(2, 4)]}]
    found += [] if "causal" in variant.lacks else [{"causal": 0}, {"causal": 1, "mask": holes(2, 3, 4)}]
    found += [] if variant not in WITH_LSE else [{"return_lse": True}]
    if "bias" not in variant.lacks and "kept" not in variant.options:
        found += [{"bias": [draw(3, 3), None]}]
    return found


def within(dtype):
    """How close results are: a few units of half precision, more of those that many sums are taken in."""
    tolerance = (4 if dtype.itemsize < 4 else 40) * torch.finfo(dtype).eps
    return {"rtol": tolerance, "atol": tolerance}


def parts(result):
    """The output, and the log-sum-exp, if there is one."""
    return [result] if isinstance(result, torch.Tensor) else [part for part in result[:2] if part is not None]


class TestTypes:
    @pytest.mark.parametrize(
        "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.thorough)]
    )
    @every_variant
    def test_of_results(self, variant, dtype):
        """The output has that of the query, a log-sum-exp that of averages; both are right."""
        for more in given(variant):
            leaves = [tensor.double() for tensor in tensors((3, 4), dim=4, dtype=dtype)]
            found = parts(variant.function(*tensors((3, 4), dim=4, dtype=dtype), order=2, **more))
            exact = parts(variant.function(*leaves, order=2, **more))
            wide = torch.float32 if dtype.itemsize < 4 else dtype
            assert [part.dtype for part in found] == [dtype, wide][: len(found)]
            close([part.double() for part in found], exact, **within(dtype))

    @every_variant
    def test_under_autocast(self, variant):
        """The same types, and results as close as half precision is; gradients come back in the type of the leaves."""
        for more in given(variant):
            leaves = [tensor.requires_grad_() for tensor in tensors((3, 4), dim=4, dtype=torch.float32)]
            exact = parts(variant.function(*leaves, order=2, **more))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = parts(variant.function(*leaves, order=2, **more))
            assert {part.dtype for part in found} == {torch.float32}
            close(found, exact, rtol=0.03, atol=0.03)
            grads = torch.autograd.grad(found[0].sum(), leaves, create_graph=True)
            assert {grad.dtype for grad in grads} == {torch.float32}
            assert torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves[2])[0].isfinite().all()

    @pytest.mark.parametrize("dtype", HALVES)
    @every_causal_variant
    def test_of_one_causal_mode(self, variant, dtype):
        """At order 1 the means of a frame are the tensor itself, in its own type."""
        if not fits(variant, 1):
            pytest.skip("its option names more modes")
        for more in ({}, {"weights": [positive(4)]}, {"lengths": [[3, 4]]}):
            leaves = tensors((4,), dtype=dtype)
            exact = variant.function(*(t.double() for t in leaves), order=1, causal=0, **more)
            ours = variant.function(*leaves, order=1, causal=0, **more)
            assert ours.dtype == dtype
            close([ours.double()], [exact], **within(dtype))

    @every_variant
    def test_whole_numbers_as_weights_leave_single_precision_as_it_is(self, variant):
        """Also where values are narrower than keys, so that tensors are filled up for the kernel."""
        x, weights = torch.ones(1, 1, 3), (None, torch.tensor([1]))
        output = variant.function(x, x, x[..., :2], order=2, weights=weights)
        assert output.dtype == torch.float32 and output.isfinite().all()


class TestExtremes:
    @every_variant
    def test_large_values_do_not_overflow_in_half_precision(self, variant):
        if variant.name in NOT_ONE_MEAN and not variant.options.get("centered"):
            pytest.skip("sums of means")
        value = torch.full((4, 4, 4, 8), 40000.0, dtype=torch.float16)
        for more in ({}, {"return_attention": True}, {"mask": torch.ones(4, 4, 4).bool()}):
            output = parts(variant.function(0 * value, 0 * value, value, order=3, **more))[0]
            close([output], [value], rtol=2e-3, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @every_variant
    def test_large_logits_overflow_nowhere(self, variant, dtype):
        q = 100 * draw(2, 3, 4, 5, 8, dtype=dtype).clamp(-3, 3)
        if variant.options.get("pool") == "sum":
            q = q / 20
        value = draw(2, 3, 4, 5, 8, dtype=dtype)
        assert variant.function(q, q, value, order=3, scale=1.0).isfinite().all()

    @pytest.mark.parametrize("size", [1e5, 1e-16, *(pytest.param(s, marks=pytest.mark.thorough) for s in (1e-5, 1e15))])
    @pytest.mark.parametrize("order", [2, *(pytest.param(order, marks=pytest.mark.thorough) for order in (3, 8))])
    def test_only_the_ratios_of_weights_count(self, order, size):
        """Products of the weights of many modes leave the range of single precision long before their ratios do."""
        x = draw(*(2,) * order, 4, dtype=torch.float32)
        weights = [torch.tensor([1.0, 3.0]) for _ in range(order)]
        for variant in VARIANTS:
            if variant.options.get("pool") == "sum" or variant.options.get("include_self"):
                continue  # where weights count as they are
            cheap = variant.name == "truncated" and order == 8 and "interaction_order" not in variant.options
            options = {"kept": ((0,), (0, 1))} if cheap else {}
            ours, theirs = (
                variant.function(x, x, x, order=order, weights=w, **options)
                for w in ([size * v for v in weights], weights)
            )
            close([ours], [theirs], rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("size", [1e38, 1e-38])
    @every_variant
    def test_only_the_ratios_of_weights_of_positions_count(self, variant, size):
        options = variant.operator.with_defaults(variant.options)
        if options.get("include_self") or variant.operator.needs(2, **options).indices:
            pytest.skip("weights count as they are, or are those of indices")
        x, weights = draw(2, 3, 4, 8, dtype=torch.float32), positive(2, 3, 4).float()
        ours, theirs = (variant.function(x, x, x, order=2, weights=w) for w in (size * weights, weights))
        close([ours], [theirs], rtol=1e-4, atol=1e-4)

    def test_many_positions_under_autocast(self):
        """Neither sums over positions nor the logarithm of how many they are fit into half precision."""
        x, query = draw(256, 264, 4, dtype=torch.float32) + 1, draw(5, 4, seed=1, dtype=torch.float32)
        options = {"order": 2, "interaction": "linear", "return_lse": True}
        with torch.autocast("cpu", torch.float16):
            ours = parts(ta.additive_attention(query, x, x, **options))
        close(ours, parts(ta.additive_attention(query, x, x, **options)), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["kronecker_product", "kronecker_sum"])
    def test_attention_to_gaps_in_half_precision(self, name):
        """What is left to the positions present is too little for half precision."""
        mask, key = torch.tensor([[False, True], [True, True]]), torch.tensor([[0.0, 4.0], [4.0, 0.0]])
        key, value = key.unsqueeze(-1).expand(2, 2, 8), draw(2, 2, 8).half()
        exact, ours = (
            OPERATORS[name].function(4 * key.to(dtype) ** 0, key.to(dtype), value.to(dtype), order=2, mask=mask)
            for dtype in (torch.float64, torch.float16)
        )
        close([ours.double()], [exact], **within(torch.float16))

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("name", ["kao_kv", "kao_qkv"])
    def test_the_logarithm_of_a_weight_is_not_rounded(self, name, dtype):
        layer = ta.TensorAttention(8, 2, modes=2, operator=name).to(dtype)
        x, weights = draw(2, 3, 4, 8, dtype=dtype), [torch.tensor([1e30, 1.7e30, 3e30]), torch.tensor([1.1e30] * 4)]
        ours = layer(x, weights=weights)
        close([ours.double()], [layer.double()(x.double(), weights=weights)], **within(dtype))

    @every_variant
    def test_a_constant_far_from_zero_is_no_loss(self, variant):
        """Values in half precision of which the mean is large: what differs is rounded, not the mean N times."""
        value = (100 + draw(2, 8, 8, 4)).bfloat16()
        query, key = draw(2, 8, 8, 4, dtype=torch.bfloat16), draw(2, 8, 8, 4, seed=1, dtype=torch.bfloat16)
        exact = variant.function(query.double(), key.double(), value.double(), order=2)
        error = (variant.function(query, key, value, order=2).double() - exact).abs().max()
        assert error <= 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()

    def test_channels_that_are_none(self):
        """No channel of queries and keys: all logits are zero, and every query gets the mean value."""
        x, value = torch.empty(2, 3, 4, 0, dtype=torch.float64), draw(2, 3, 4, 5)
        for name in ("additive", "truncated", "flattened", "kronecker_product"):
            output = OPERATORS[name].function(x, x, value, order=2)
            close([output], [value.mean((1, 2), keepdim=True).expand(2, 3, 4, 5)])
        assert ta.additive_attention(value, value, x, order=2).shape == x.shape


def test_all_causal_operators_are_here():
    assert {variant.name for variant in CAUSAL} == {
        "additive",
        "truncated",
        "kao_kv",
        "axial",
        "clustered",
        "flattened",
    }
    with_lse = {"additive", "truncated", "kao_kv", "flattened", "kao_qkv"}
    assert {variant.name for variant in WITH_LSE} == with_lse
