"""Masks, lengths and weights of positions in the functions: against the oracle, against each other, and poisoned."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

import tensorattn as ta
from tensorattn import presence, reference
from tensorattn.operators import OPERATORS
from tensorattn.testing.variants import variants

VARIANTS = variants()
SIZES = [(5,), (3, 4), (2, 3, 4), (2, 3, 2, 2)]
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
POISONS = [1e6, 3e38, float("inf"), float("nan")]

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
every_size = pytest.mark.parametrize("sizes", SIZES, ids=str)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def holes(*shape, seed=0):
    """A mask that is no product over modes: random, with an empty slice in the first sample."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.35
    mask[0, 0] = False
    mask[..., -1] |= mask.sum() == 0
    mask.view(shape[0], -1)[:, -1] = True
    return mask


def positive(*shape, seed=0):
    return draw(*shape, seed=seed).abs() + 0.1


def fits(variant, sizes):
    """Whether a variant exists at an order, and its keys are what the options name."""
    return max((mode for kept in variant.options.get("kept", ()) for mode in kept), default=0) < len(sizes)


def cases():
    return [
        pytest.param(variant, sizes, id=f"{variant}-{len(sizes)}")
        for variant in VARIANTS
        for sizes in SIZES
        if fits(variant, sizes)
    ]


every_case = pytest.mark.parametrize("variant, sizes", cases())


def tensors(sizes, batch=2, dim=3):
    return [draw(batch, *sizes, dim, seed=seed) for seed in range(3)]


def counts(variant):
    """Whether weights of positions beside a mask have no meaning for a variant."""
    return variant.operator.counts_indices(**variant.operator.with_defaults(variant.options))


def expected(variant, query, key, value, order, weights):
    """Output and log-sum-exp by the oracle, without the own token, which `own_token` adds."""
    options = {name: option for name, option in variant.options.items() if name != "include_self"}
    if variant.name == "truncated" and not {"kept", "interaction_order"} & options.keys():
        options["interaction_order"] = min(2, order)
    function = getattr(reference, variant.operator.function.__name__)
    return function(query.numpy(), key.numpy(), value.numpy(), order=order, weights=weights, **options)


def with_own(output, lse, query, key, value, mask):
    logit = np.where(mask, (query * key).sum(-1).numpy() * query.shape[-1] ** -0.5, -np.inf)
    own = np.where(mask[..., None], value.numpy(), 0.0)
    return reference.merge_attention([(output, lse), (own, logit)])


class TestOracle:
    @every_case
    def test_a_mask(self, variant, sizes):
        query, key, value = tensors(sizes)
        mask = holes(2, *sizes)
        output, lse = expected(variant, query, key, value, len(sizes), mask.numpy().astype(float))
        if variant.options.get("include_self"):
            output, lse = with_own(output, lse, query, key, value, mask.numpy())
        here = mask.unsqueeze(-1)
        poisoned = [tensor.masked_fill(~here, float("nan")) for tensor in (key, value)]
        wants_lse = variant.name in ("additive", "truncated", "kao_kv", "flattened") or len(sizes) == 1
        wants_lse &= variant.name != "kao_qkv"
        ours = variant.function(query, *poisoned, order=len(sizes), mask=mask, return_lse=wants_lse)
        ours, ours_lse = ours[:2] if wants_lse else (ours, None)
        if variant.operator.query == "grid":
            output = np.where(mask[..., None], output, 0.0)
            lse = None if lse is None else np.where(mask, lse, -np.inf)
        np.testing.assert_allclose(ours.numpy(), output, **CLOSE)
        if wants_lse and lse is not None:
            np.testing.assert_allclose(ours_lse.numpy(), lse, **CLOSE)

    @every_case
    def test_weights_of_positions(self, variant, sizes):
        query, key, value = tensors(sizes)
        weights = positive(2, *sizes, seed=5) * holes(2, *sizes)
        call = functools.partial(variant.function, query, key, value, order=len(sizes), weights=weights)
        if len(sizes) > 1 and counts(variant):
            with pytest.raises(ta.OptionError, match="it counts the indices of each mode"):
                call()
            return
        output, lse = expected(variant, query, key, value, len(sizes), weights.numpy())
        if variant.options.get("include_self"):
            output, _ = with_own(output, lse, query, key, value, np.ones(lse.shape, dtype=bool))
        here = weights.numpy() > 0 if variant.operator.query == "grid" else np.ones(weights.shape, dtype=bool)
        np.testing.assert_allclose(call().numpy()[here], output[here], **CLOSE)

    def test_a_wrong_mask_is_noticed(self):
        query, key, value = tensors((3, 4))
        mask = holes(2, 3, 4)
        other = mask.clone()
        other[1, 0, 0] = ~other[1, 0, 0]
        for name, operator in OPERATORS.items():
            ours = operator.function(query, key, value, order=2, mask=mask)
            theirs = operator.function(query, key, value, order=2, mask=other)
            assert not torch.allclose(ours, theirs), name


class TestSameThing:
    """Different ways to say the same."""

    @every_case
    def test_lengths_masks_and_weights(self, variant, sizes):
        query, key, value = tensors(sizes)
        lengths = torch.tensor([[max(1, size - 1) for size in sizes], [max(1, size - 2) for size in sizes]])
        vectors = [torch.arange(size) < lengths[:, mode, None] for mode, size in enumerate(sizes)]
        mask = torch.ones(2, *sizes, dtype=torch.bool)
        for mode, vector in enumerate(vectors):
            mask &= presence.beside(vector, mode, len(sizes))
        call = functools.partial(variant.function, query, key, value, order=len(sizes))
        by_weights = call(weights=vectors)
        told = {
            "lengths": {"lengths": lengths},
            "one a mode": {"lengths": list(lengths.unbind(-1))},
            "nested lists": {"lengths": lengths.T.tolist()},
            "mask": {"mask": mask},
            "array": {"mask": mask.numpy()},
            "both": {"mask": mask, "lengths": lengths},
            "all": {"mask": mask, "lengths": lengths, "weights": vectors},
        }
        if variant.options.get("include_self"):  # the own token counts whatever weights say, but not behind a mask
            by_weights = call(lengths=lengths)
        for name, given in told.items():
            ours, theirs = call(**given), by_weights
            if variant.operator.query == "grid":  # weights leave out keys and values, a mask the queries too
                ours, theirs = ours[mask], theirs[mask]
            torch.testing.assert_close(ours, theirs, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")

    @every_case
    def test_a_product_mask_is_exact_however_it_is_held(self, variant, sizes, monkeypatch):
        query, key, value = tensors(sizes)
        mask = torch.ones(2, *sizes, dtype=torch.bool)
        mask[0, 0] &= sizes[0] == 1
        mask[1, ..., 1:] = False
        call = functools.partial(variant.function, query, key, value, order=len(sizes), mask=mask)
        exact = call()
        monkeypatch.setattr(presence, "_separated", lambda mask, order: (mask,) if order == 1 else None)
        torch.testing.assert_close(call(), exact, **CLOSE)

    @every_case
    def test_vectors_and_their_product(self, variant, sizes):
        if counts(variant):
            pytest.skip("it needs vectors")
        query, key, value = tensors(sizes)
        vectors = [positive(size, seed=size + mode) for mode, size in enumerate(sizes)]
        product = functools.reduce(lambda left, right: left.unsqueeze(-1) * right, vectors)
        call = functools.partial(variant.function, query, key, value, order=len(sizes))
        torch.testing.assert_close(call(weights=product), call(weights=vectors), **CLOSE)
        torch.testing.assert_close(call(weights=product.numpy()), call(weights=vectors), **CLOSE)

    @every_case
    def test_a_mask_of_all_positions(self, variant, sizes):
        query, key, value = tensors(sizes)
        everything = torch.ones(sizes, dtype=torch.bool)
        call = functools.partial(variant.function, query, key, value, order=len(sizes))
        for given in ({"mask": everything}, {"lengths": list(sizes)}, {"lengths": [None] * len(sizes)}):
            torch.testing.assert_close(call(**given), call(), **CLOSE)

    @pytest.mark.parametrize("causal", [0, 1])
    @pytest.mark.parametrize("variant", [v for v in VARIANTS if "causal" not in v.operator.lacks], ids=str)
    def test_causal_with_lengths(self, variant, causal):
        query, key, value = tensors((3, 4))
        if variant.name == "kao_qkv":
            pytest.skip("not causal")
        call = functools.partial(variant.function, order=2, causal=causal)
        ours = call(query, key, value, lengths=[2, [3, 4]])
        for sample, columns in enumerate((3, 4)):
            part = [tensor[sample : sample + 1, :2, :columns] for tensor in (query, key, value)]
            torch.testing.assert_close(ours[sample : sample + 1, :2, :columns], call(*part), **CLOSE)

    @every_variant
    def test_other_layouts_of_memory_and_batch(self, variant):
        query, key, value = (draw(2, 3, 4, 5, 4, seed=seed) for seed in range(3))  # heads are a batch dimension
        mask = holes(2, 4, 5)[:, None]
        ours = variant.function(query, key, value, order=2, mask=mask)
        permuted = [tensor.movedim(-1, 2).contiguous().movedim(2, -1) for tensor in (query, key, value)]
        torch.testing.assert_close(variant.function(*permuted, order=2, mask=mask), ours, **CLOSE)
        for head in range(3):
            alone = [tensor[:, head] for tensor in (query, key, value)]
            theirs = variant.function(*alone, order=2, mask=mask[:, 0])
            torch.testing.assert_close(ours[:, head], theirs, **CLOSE)


class TestPoison:
    @pytest.mark.parametrize("poison", POISONS)
    @every_case
    def test_keys_and_values(self, variant, sizes, poison):
        query, *pair = tensors(sizes)
        mask = holes(2, *sizes)
        call = functools.partial(variant.function, order=len(sizes), mask=mask)
        clean = [tensor.masked_fill(~mask.unsqueeze(-1), 0.0).requires_grad_() for tensor in pair]
        poisoned = [tensor.masked_fill(~mask.unsqueeze(-1), poison).requires_grad_() for tensor in pair]
        if variant.operator.query == "grid":
            query = query.masked_fill(~mask.unsqueeze(-1), poison)
        queries = query.clone().requires_grad_(), query.clone().requires_grad_()
        outputs = [call(q, *kv) for q, kv in zip(queries, (clean, poisoned), strict=True)]
        torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)
        grads = [
            torch.autograd.grad((output * draw(*output.shape, seed=9)).sum(), [q, *kv])
            for output, q, kv in zip(outputs, queries, (clean, poisoned), strict=True)
        ]
        for one, two in zip(*grads, strict=True):
            assert two.isfinite().all()
            torch.testing.assert_close(two, one, **CLOSE)

    @every_case
    @pytest.mark.parametrize("whole", [False, True], ids=["product", "holes"])
    def test_a_sample_without_positions(self, variant, sizes, whole):
        query, key, value = (tensor.requires_grad_() for tensor in tensors(sizes))
        mask = holes(2, *sizes) if whole else torch.ones(2, *sizes, dtype=torch.bool)
        mask[0] = False
        with torch.no_grad():
            key[0], value[0] = float("nan"), float("inf")
        output = variant.function(query, key, value, order=len(sizes), mask=mask)
        assert (output[0] == 0).all()
        assert output[1].abs().sum() > 0
        for grad in torch.autograd.grad(output.sum(), [query, key, value], allow_unused=True):
            assert grad is not None
            assert grad.isfinite().all()

    @every_variant
    @pytest.mark.parametrize("given", [{"lengths": [0, None]}, {"mask": np.zeros((3, 4), dtype=bool)}], ids=str)
    def test_no_position_at_all(self, variant, given):
        query, key, value = tensors((3, 4))
        assert (variant.function(query, key, value, order=2, **given) == 0).all()

    @pytest.mark.parametrize("name", [n for n in OPERATORS if "return_lse" not in OPERATORS[n].lacks])
    def test_the_log_sum_exp_of_nothing(self, name):
        if name == "kao_qkv":
            pytest.skip("it has no log-sum-exp of its own")
        query, key, value = tensors((3, 4))
        result = OPERATORS[name].function(query, key, value, order=2, lengths=[[0, 3], None], return_lse=True)
        assert (result.lse[0] == -torch.inf).all()
        assert result.lse[1].isfinite().all()


class TestPaths:
    """One result whatever path computes it."""

    @every_variant
    def test_fused_and_explicit(self, variant):
        query, key, value = tensors((3, 4))
        call = functools.partial(variant.function, query, key, value, order=2, mask=holes(2, 3, 4))
        torch.testing.assert_close(call(return_attention=True).output, call(), **CLOSE)

    @pytest.mark.parametrize("name", ["additive", "truncated", "flattened", "kao_kv", "axial"])
    def test_no_attention_goes_where_nothing_is(self, name):
        query, key, value = tensors((3, 4))
        mask = holes(2, 3, 4)
        assert not mask[0, 0].any()
        attention = OPERATORS[name].function(query, key, value, order=2, mask=mask, return_attention=True).attention
        if name == "flattened":
            assert (attention[0][0][..., 0, :] == 0).all()
            torch.testing.assert_close(attention[0].sum((-2, -1)), torch.ones(2, 3, 4, dtype=torch.float64), **CLOSE)
        elif name != "truncated":
            assert (attention[0][0][..., 0] == 0).all()

    @every_variant
    def test_gradients(self, variant):
        query, key, value = (tensor.requires_grad_() for tensor in tensors((2, 3), batch=1))
        mask = torch.tensor([[[True, False, True], [False, True, True]]])
        weights = positive(1, 2, 3).requires_grad_()
        assert gradcheck(lambda *t: variant.function(*t, order=2, mask=mask), (query, key, value))
        if not counts(variant):
            call = lambda *t: variant.function(*t[:3], order=2, weights=t[3])  # noqa: E731
            assert gradcheck(call, (query, key, value, weights))

    @every_variant
    def test_compiles(self, variant):
        torch._dynamo.reset()
        query, key, value = tensors((3, 4))
        function = lambda *t, mask: variant.function(*t, order=2, mask=mask)  # noqa: E731
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        product = torch.zeros(2, 3, 4, dtype=torch.bool)
        product[:, :2, 1:] = True
        for mask in (holes(2, 3, 4), product):
            ours = compiled(query, key, value, mask=mask)
            torch.testing.assert_close(ours, function(query, key, value, mask=mask), **CLOSE)
        torch._dynamo.reset()

    @every_variant
    def test_vmap_over_masks(self, variant):
        query, key, value = tensors((3, 4))
        masks = holes(2, 3, 4)
        function = lambda q, k, v, m: variant.function(q, k, v, order=2, mask=m)  # noqa: E731
        ours = torch.vmap(function)(query, key, value, masks)
        torch.testing.assert_close(ours, function(query, key, value, masks), **CLOSE)

    @every_variant
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_types(self, variant, dtype):
        query, key, value = tensors((3, 4))
        mask = holes(2, 3, 4)
        exact = variant.function(query, key, value, order=2, mask=mask)
        ours = variant.function(query.to(dtype), key.to(dtype), value.to(dtype), order=2, mask=mask)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=40 * torch.finfo(dtype).eps)

    @pytest.mark.parametrize("device", ["meta"])
    @every_variant
    def test_without_values(self, variant, device):
        x = torch.empty(2, 3, 4, 5, device=device)
        mask = torch.empty(2, 3, 4, dtype=torch.bool, device=device)
        assert variant.function(x, x, x, order=2, mask=mask).shape == x.shape


class TestFirstOrder:
    """With ``interaction="linear"`` the first order in the scale is that of full attention under any mask."""

    @pytest.mark.parametrize("saturation", [1.0, None])
    @pytest.mark.parametrize("name", ["additive", "truncated", "kao_qkv"])
    @pytest.mark.parametrize("sizes", [(3, 4), (2, 3, 4)], ids=str)
    @pytest.mark.parametrize("weighed", [False, True], ids=["mask", "weights"])
    def test_law(self, name, saturation, sizes, weighed):
        query, key, value = tensors(sizes)
        given = {"weights": positive(2, *sizes) * holes(2, *sizes)} if weighed else {"mask": holes(2, *sizes)}
        options = {"interaction": "linear", "saturation": saturation, "order": len(sizes), **given}
        options |= (
            {"kept": [(0,), (len(sizes) - 1, 1)[: len(sizes) - 1]]}
            if name == "truncated"
            else {"centered": True}
            if name == "kao_qkv"
            else {}
        )

        def difference(scale, **other):
            ours = OPERATORS[name].function(query, key, value, scale=scale, **options | other)
            full = ta.flattened_attention(query, key, value, scale=scale, order=len(sizes), **given)
            here = given.get("mask") if name == "kao_qkv" else None  # its queries are masked too
            return (ours - full)[slice(None) if here is None else here].abs().max()

        small, smaller = difference(1e-3), difference(1e-4)
        assert small < 1e-4
        assert smaller < small / 80  # second order: a hundredth
        plain = {"interaction": None, "saturation": 1.0}
        assert difference(1e-4, **plain) > difference(1e-3, **plain) / 20  # without it, a tenth


class TestSummaries:
    @pytest.mark.parametrize("second_moment", [False, True])
    @pytest.mark.parametrize("mode", [0, 1, 2])
    def test_merge(self, mode, second_moment):
        key, value = draw(2, 4, 3, 5, 3), draw(2, 4, 3, 5, 2, seed=1)
        mask = holes(2, 4, 3, 5)
        mask[1].movedim(mode, 0)[:2] = False  # one part has no position of this sample
        kept = [(0,), (1,), (2,), (0, 2), (), (0, 1, 2)]
        summarize = functools.partial(ta.summarize, order=3, kept=kept, second_moment=second_moment)
        sizes = [2, (4, 3, 5)[mode] - 2]
        parts = zip(*(tensor.split(sizes, 1 + mode) for tensor in (key, value, mask)), strict=True)
        first, second = (summarize(k, v, mask=m) for k, v, m in parts)
        merged, whole = first.merge(second, mode=mode), summarize(key, value, mask=mask)
        for kept_modes in whole.kept:
            place = whole.place(kept_modes)
            here = whole.weights[place] > 0
            torch.testing.assert_close(*torch.broadcast_tensors(merged.weights[place], whole.weights[place]), **CLOSE)
            for side in ("key", "value"):
                ours, theirs = (getattr(summary, side)(kept_modes) for summary in (merged, whole))
                torch.testing.assert_close(ours[here], theirs[here], **CLOSE)
        if second_moment:
            torch.testing.assert_close(merged.covariance, whole.covariance, **CLOSE)
            torch.testing.assert_close(merged.key_covariance, whole.key_covariance, **CLOSE)

    @pytest.mark.parametrize("num_heads", [None, 2])
    def test_project(self, num_heads):
        x, weight, bias = draw(2, 3, 4, 6), draw(4, 6, seed=1), draw(4, seed=2)
        mask = holes(2, 3, 4)
        summary = ta.summarize(x, x, order=2, mask=mask, second_moment=True)
        late = summary.project(weight, weight, key_bias=bias, value_bias=bias, num_heads=num_heads)
        y = x @ weight.T + bias
        y = y if num_heads is None else y.unflatten(-1, (num_heads, -1)).movedim(-2, 1)
        early = ta.summarize(y, y, order=2, mask=mask if num_heads is None else mask[:, None], second_moment=True)
        torch.testing.assert_close(late.covariance, early.covariance, **CLOSE)
        for place in range(len(late.kept)):
            here = early.weights[place].expand(early.keys[place].shape[:-1]) > 0
            torch.testing.assert_close(late.keys[place][here], early.keys[place][here], **CLOSE)

    def test_averages(self):
        x, mask = draw(2, 3, 4, 5), holes(2, 3, 4)
        for mode, mean in enumerate(ta.mode_averages(x, order=2, mask=mask)):
            theirs = reference.marginal_mean(x.numpy(), (mode,), order=2, weights=mask.numpy().astype(float))
            np.testing.assert_allclose(mean.numpy(), theirs, **CLOSE)
        rows, columns = ta.mode_averages(x, order=2, lengths=[2, 3])
        theirs = ta.mode_averages(x[:, :2, :3], order=2)
        torch.testing.assert_close((rows[:, :2], columns[:, :3]), theirs, **CLOSE)


class TestCausal:
    """A mask that is no product over modes, along a causal mode: each frame sees the masked frames up to its own."""

    @pytest.mark.parametrize("sizes", [(3, 4), (2, 3, 4)], ids=str)
    @pytest.mark.parametrize("causal", [0, 1])
    @pytest.mark.parametrize("variant", [v for v in VARIANTS if "causal" not in v.operator.lacks], ids=str)
    def test_a_frame_is_the_tensor_up_to_it(self, variant, causal, sizes):
        query, key, value = tensors(sizes)
        mask = holes(2, *sizes)
        poisoned = [tensor.masked_fill(~mask.unsqueeze(-1), float("nan")) for tensor in (key, value)]
        ours = variant.function(query, *poisoned, order=len(sizes), mask=mask, causal=causal)
        for frame in range(sizes[causal]):
            crop = [tensor.narrow(1 + causal, 0, frame + 1) for tensor in (query, *poisoned, mask)]
            if variant.name == "axial":
                alone = variant.function(*crop[:3], order=len(sizes), mask=crop[3], causal=causal)
            else:
                alone = variant.function(*crop[:3], order=len(sizes), mask=crop[3])
            torch.testing.assert_close(*(t.select(1 + causal, frame) for t in (ours, alone)), **CLOSE)

    @pytest.mark.parametrize("variant", [v for v in VARIANTS if "causal" not in v.operator.lacks], ids=str)
    def test_in_the_layer(self, variant):
        layer = ta.TensorAttention(
            8, 2, modes="t h w", operator=variant.name, causal="t", dtype=torch.float64, **variant.options
        )
        x, mask = draw(2, 3, 2, 4, 8), holes(2, 3, 2, 4)
        x = x.masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
        y = layer(x, mask=mask)
        assert (y[~mask] == 0).all()
        for frame in range(3):
            alone = layer(x[:, : frame + 1], mask=mask[:, : frame + 1])
            torch.testing.assert_close(alone[:, frame], y[:, frame], **CLOSE)
        for grad in torch.autograd.grad(y.sum(), [x, *layer.parameters()]):
            assert grad.isfinite().all()
        (early,) = torch.autograd.grad(layer(x, mask=mask)[:, 0].sum(), x)
        assert (early[:, 1:] == 0).all()
