"""Masks, lengths and weights: however they are said and held, what is absent gets nowhere; and how they are read."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from grids import CAUSAL, CLOSE, LAYOUTS, VARIANTS, at_sizes, close, every_variant, holes, over_grid, positive, tensors
from modules import draw, refused
from torch.autograd import gradcheck
from torch.overrides import TorchFunctionMode

import tensorattn as ta
from tensorattn.errors import ModesError, OptionError
from tensorattn.functional import OPERATORS
from tensorattn.masks import one_a_mode, read_weights
from tensorattn.modes import GridShape, ModeSpec
from tensorattn.testing import reference

SIZES = [(5,), (3, 4), (2, 3, 4), (2, 3, 2, 2)]
GRID = GridShape((2,), (3, 4), 5)


def counts(variant, order=2):
    """Whether weights of whole positions have no meaning for a variant."""
    options = variant.operator.with_defaults(variant.options)
    return variant.operator.needs(order, **options).indices


def owns(variant):
    return bool(variant.options.get("include_self"))


class TestSaidInDifferentWays:
    @at_sizes(*SIZES)
    def test_lengths_masks_and_weights(self, variant, sizes):
        query, key, value = tensors(sizes)
        lengths = torch.tensor([[max(1, size - 1) for size in sizes], [max(1, size - 2) for size in sizes]])
        vectors = [torch.arange(size) < lengths[:, mode, None] for mode, size in enumerate(sizes)]
        mask = over_grid(vectors, sizes, (2,)) > 0
        call = functools.partial(variant.function, query, key, value, order=len(sizes))
        told = {
            "lengths": {"lengths": lengths},
            "one a mode": {"lengths": list(lengths.unbind(-1))},
            "nested lists": {"lengths": lengths.T.tolist()},
            "array": {"lengths": lengths.numpy()[::-1][::-1]},
            "other integers": {"lengths": lengths.to(torch.uint16)},
            "mask": {"mask": mask},
            "array of bool": {"mask": mask.numpy()},
            "both": {"mask": mask, "lengths": lengths},
            "all": {"mask": mask, "lengths": lengths, "weights": vectors},
        }
        # Weights leave out keys and values alone, a mask queries and own tokens too.
        expected = call(lengths=lengths) if owns(variant) else call(weights=vectors)
        here = mask if variant.operator.query == "grid" else torch.ones_like(mask)
        for name, given in told.items():
            torch.testing.assert_close(call(**given)[here], expected[here], **CLOSE, msg=lambda s, n=name: f"{n}: {s}")

    @at_sizes(*SIZES)
    def test_a_mask_that_is_a_product_gives_the_same_where_its_values_cannot_be_read(self, variant, sizes):
        query, key, value = tensors(sizes)
        mask = torch.ones(2, *sizes, dtype=torch.bool)
        mask[0, 0] &= sizes[0] == 1
        mask[1, ..., 1:] = False
        function = lambda q, k, v, m: variant.function(q, k, v, order=len(sizes), mask=m)  # noqa: E731
        expected = function(query, key, value, mask)
        close([torch.vmap(function)(query, key, value, mask)], [expected])
        cropped = variant.operator.query == "positions" and not owns(variant) and not variant.by_place
        if cropped:  # the queries see what is left
            first = [tensor[:1, 1 if sizes[0] > 1 else 0 :] for tensor in (key, value)]
            close([expected[:1]], [variant.function(query[:1], *first, order=len(sizes))])

    @at_sizes(*SIZES)
    def test_vectors_and_their_product(self, variant, sizes):
        query, key, value = tensors(sizes)
        vectors = [positive(size, seed=size + mode) for mode, size in enumerate(sizes)]
        product = over_grid(vectors, sizes)
        call = functools.partial(variant.function, query, key, value, order=len(sizes))
        if len(sizes) > 1 and counts(variant, len(sizes)):
            with pytest.raises(OptionError, match="it counts the indices of each mode"):
                call(weights=product)
            return
        for given in (product, product.numpy(), product.expand(2, *sizes), product.numpy()[::-1][::-1]):
            close([call(weights=given)], [call(weights=vectors)])

    @at_sizes(*SIZES)
    def test_a_mask_of_all_positions(self, variant, sizes):
        call = functools.partial(variant.function, *tensors(sizes), order=len(sizes))
        everything = torch.ones(sizes, dtype=torch.bool)
        for given in ({"mask": everything}, {"lengths": list(sizes)}, {"lengths": [None] * len(sizes)}):
            close([call(**given)], [call()])

    @every_variant
    def test_in_any_layout_and_batch(self, variant):
        query, key, value = (draw(2, 3, 4, 5, 4, seed=seed) for seed in range(3))  # heads are a batch dimension
        mask = holes(2, 4, 5)[:, None]
        ours = variant.function(query, key, value, order=2, mask=mask)
        for layout in LAYOUTS.values():
            laid = mask.mT.contiguous().mT
            close([variant.function(*map(layout, (query, key, value)), order=2, mask=laid)], [ours])
        for head in range(3):
            alone = [tensor[:, head] for tensor in (query, key, value)]
            close([ours[:, head]], [variant.function(*alone, order=2, mask=mask[:, 0])])

    def test_another_mask_is_noticed(self):
        mask = holes(2, 3, 4)
        other = mask.clone()
        other[1, 0, 0] = ~other[1, 0, 0]
        for name, operator in OPERATORS.items():
            ours, theirs = (operator.function(*tensors((3, 4)), order=2, mask=each) for each in (mask, other))
            assert not torch.allclose(ours, theirs), name


def absent(route, sizes, seed=0):
    """Arguments that leave positions out, weights that ask for gradients, and where positions are present."""
    generator = torch.Generator().manual_seed(seed)

    def vector(*shape):
        keep = torch.rand(shape, generator=generator) > 0.4
        keep[..., 0] = True
        return (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.2) * keep

    mask = torch.rand(2, *sizes, generator=generator) > 0.5
    lengths = torch.stack([torch.randint(0, size + 1, (2,), generator=generator) for size in sizes], -1)
    if route == "mask":
        return {"mask": mask}, mask
    if route == "lengths":
        vectors = [torch.arange(size) < lengths[:, mode, None] for mode, size in enumerate(sizes)]
        return {"lengths": lengths}, over_grid(vectors, sizes, (2,)) > 0
    if route == "weights of positions":
        weights = (torch.rand(2, *sizes, generator=generator, dtype=torch.float64) + 0.1) * mask
        weights.view(2, -1)[0, 0] = 1.0
        return {"weights": weights.requires_grad_()}, weights.detach() > 0
    batch = () if route in ("weights", "weights and a mask") else (2,)
    weights = [vector(*batch, size) for size in sizes]
    if route == "no position of a sample":
        weights[0][1] = 0.0
    present = over_grid(weights, sizes, (2,)) > 0
    given = {"weights": [weight.requires_grad_() for weight in weights]}
    return ({**given, "mask": mask}, present & mask) if route == "weights and a mask" else (given, present)


ROUTES = ["weights", "weights of samples", "no position of a sample", "weights of positions", "mask", "lengths",
          "weights and a mask"]  # fmt: skip


class TestWhatIsAbsent:
    """Whatever stands where no position takes part reaches no output, no log-sum-exp and no gradient."""

    def compare(self, variant, sizes, route, held=(math.nan,), causal=None, biased=False, return_lse=False):
        order, said_to_queries = len(sizes), route in ("mask", "lengths")
        found = []
        for number in (0.0, *held):
            given, present = absent(route, sizes, seed=len(sizes) + len(route))
            gone, own = ~present.unsqueeze(-1), owns(variant) and not said_to_queries
            hidden = torch.zeros_like(gone) if own else gone  # an own token is there whatever weights say
            query, key, value = tensors(sizes)
            if variant.operator.query == "grid" and said_to_queries:
                query = query.masked_fill(gone, number)
            leaves = [query, key.masked_fill(hidden, number), value.masked_fill(hidden, number)]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            if biased:
                kept = {mode for subset in variant.options.get("kept", [range(order)]) for mode in subset}
                bias = [draw(n, n, seed=mode) if mode in kept else None for mode, n in enumerate(sizes)]
                for part in bias:
                    if part is not None and len(part) > 1:
                        part[-1] = -math.inf  # queries that see nothing
                given["bias"] = [part if part is None else part.requires_grad_() for part in bias]
            if causal is not None:
                given["causal"] = causal
            if return_lse:
                given["return_lse"] = True
            result = variant.function(*leaves, order=order, **given)
            outputs = [result] if isinstance(result, torch.Tensor) else [part for part in result if part is not None]
            assert not outputs[0].isnan().any()
            loss = sum((torch.where(o.isfinite(), o, 0.0) * draw(*o.shape, seed=7)).sum() for o in outputs)
            weights = given.get("weights", [])
            leaves += [weights] if isinstance(weights, torch.Tensor) else weights
            leaves += [part for part in given.get("bias", []) if part is not None]
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            found.append([*outputs, *(t if g is None else g for t, g in zip(leaves, grads, strict=True))])
            assert all(g is None or g.isfinite().all() for g in grads)
        for other in found[1:]:
            for one, two in zip(found[0], other, strict=True):
                same = (one == two) | torch.isclose(one, two, rtol=1e-9, atol=1e-11)
                assert same.all()

    @pytest.mark.parametrize("route", ROUTES)
    @every_variant
    def test_reaches_nothing(self, variant, route):
        if route in ("weights of positions", "weights and a mask") and counts(variant):
            pytest.skip("no meaning for this operator")
        causal = "causal" not in variant.lacks
        self.compare(variant, (3, 4), route, causal=len(route) % 2 if causal and len(str(variant)) % 2 else None)

    @pytest.mark.parametrize("route", ["weights of samples", "lengths"])
    @pytest.mark.parametrize("variant", CAUSAL, ids=str)
    def test_reaches_nothing_along_a_causal_mode(self, variant, route):
        biased = variant.name in ("kao_kv", "additive")
        self.compare(variant, (3, 4), route, causal=0, biased=biased)

    @pytest.mark.thorough
    @pytest.mark.parametrize("route", ROUTES)
    @at_sizes((4,), (3, 4), (2, 3, 2), (1, 3), (1, 1), default=((4,), (3, 4), (2, 3, 2), (1, 3), (1, 1)))
    def test_in_every_way(self, variant, sizes, route):
        order, lacks = len(sizes), variant.lacks
        if order > 1 and route in ("weights of positions", "weights and a mask") and counts(variant, order):
            pytest.skip("no meaning for this operator")
        no_lse = order > 1 and (
            "return_lse" in lacks
            or (variant.name == "kao_qkv" and (not variant.options.get("centered") or "interaction" in variant.options))
        )
        for causal in {None} if "causal" in lacks else {None, 0, order - 1}:
            for biased in {False, "bias" not in lacks}:
                for lse in {False, not no_lse}:
                    self.compare(variant, sizes, route, (math.nan, math.inf), causal, biased, lse)

    @pytest.mark.parametrize(
        "held", [math.nan, *(pytest.param(number, marks=pytest.mark.thorough) for number in (math.inf, 1e6))]
    )
    @every_variant
    def test_samples_without_positions(self, variant, held):
        """Zero, and a log-sum-exp of minus infinity, on every path and whatever the query holds."""
        options = variant.operator.with_defaults(variant.options)
        lse = variant.name in ("additive", "truncated", "kao_kv", "flattened") or (
            options.get("centered") and options["interaction"] is None
        )
        for whole in (False, True):
            mask = holes(2, 3, 4) if whole else torch.ones(2, 3, 4, dtype=torch.bool)
            mask[0] = False
            query, key, value = tensors((3, 4))
            key[0], value[0] = held, held
            for more in ({}, {"return_lse": True} if lse else {"return_attention": True}):
                poisoned = query.clone()
                poisoned[0] = held
                result = variant.function(poisoned, key, value, order=2, mask=mask, **more)
                output = result if isinstance(result, torch.Tensor) else result.output
                assert output[0].eq(0).all()
                leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
                result = variant.function(*leaves, order=2, mask=mask, **more)
                output = result if isinstance(result, torch.Tensor) else result.output
                assert output[0].eq(0).all() and output[1].ne(0).any()
                if more.get("return_lse"):
                    assert result.lse[0].eq(-math.inf).all() and result.lse[1].amax() > -math.inf
                for grad in torch.autograd.grad(output.sum(), leaves):
                    assert grad.isfinite().all() and grad[0].eq(0).all()

    @every_variant
    @pytest.mark.parametrize("given", [{"lengths": [0, None]}, {"mask": np.zeros((3, 4), dtype=bool)}], ids=str)
    def test_no_position_at_all(self, variant, given):
        assert variant.function(*tensors((3, 4)), order=2, **given).eq(0).all()

    @pytest.mark.parametrize("name", ["additive", "truncated", "flattened", "kao_kv", "axial"])
    def test_no_attention_goes_there(self, name):
        mask = holes(2, 3, 4)
        attention = OPERATORS[name].function(*tensors((3, 4)), order=2, mask=mask, return_attention=True).attention
        if name == "flattened":
            assert attention[0][0][..., 0, :].eq(0).all()
            close([attention[0].sum((-2, -1))], [torch.ones(2, 3, 4, dtype=torch.float64)])
        elif name != "truncated":
            assert attention[0][0][..., 0].eq(0).all()

    @pytest.mark.thorough
    @every_variant
    def test_gradients(self, variant):
        query, key, value = (tensor.requires_grad_() for tensor in tensors((2, 3), batch=1))
        mask = torch.tensor([[[True, False, True], [False, True, True]]])
        assert gradcheck(lambda *t: variant.function(*t, order=2, mask=mask), (query, key, value))
        if not counts(variant):
            weights = positive(1, 2, 3).requires_grad_()
            call = lambda *t: variant.function(*t[:3], order=2, weights=t[3])  # noqa: E731
            assert gradcheck(call, (query, key, value, weights))

    @pytest.mark.thorough
    @every_variant
    def test_compiled(self, variant):
        torch._dynamo.reset()
        function = lambda *t, mask: variant.function(*t, order=2, mask=mask)  # noqa: E731
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        product = torch.zeros(2, 3, 4, dtype=torch.bool)
        product[:, :2, 1:] = True
        for mask in (holes(2, 3, 4), product):
            close([compiled(*tensors((3, 4)), mask=mask)], [function(*tensors((3, 4)), mask=mask)])
        torch._dynamo.reset()

    @every_variant
    def test_without_values(self, variant):
        x = torch.empty(2, 3, 4, 5, device="meta")
        mask = torch.empty(2, 3, 4, dtype=torch.bool, device="meta")
        assert variant.function(x, x, x, order=2, mask=mask).shape == x.shape


class TestFirstOrder:
    """With ``interaction="linear"`` the first order in the scale is that of full attention under any mask."""

    @pytest.mark.parametrize("weighed", [False, True], ids=["mask", "weights"])
    @pytest.mark.parametrize(
        ("name", "options"),
        [("additive", {}), ("truncated", {"kept": [(0,), (2, 1)]}), ("kao_qkv", {"centered": True})],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_law(self, name, options, weighed):
        query, key, value = tensors((2, 3, 4))
        mask = holes(2, 2, 3, 4)
        given = {"weights": positive(2, 2, 3, 4) * mask} if weighed else {"mask": mask}
        seen = mask if name == "kao_qkv" else torch.ones_like(mask)  # its queries are masked too

        def difference(scale, **interaction):
            ours = OPERATORS[name].function(
                query, key, value, scale=scale, order=3, **given, **options, **interaction
            )  # fmt: skip
            full = ta.flattened_attention(query, key, value, scale=scale, order=3, **given)
            return (ours - full)[seen].abs().max()

        small, smaller = (difference(scale, interaction="linear") for scale in (1e-3, 1e-4))
        assert small < 1e-4 and smaller < small / 80  # second order: a hundredth
        assert difference(1e-4) > difference(1e-3) / 20  # without it, a tenth


class Reads(TorchFunctionMode):
    """Count the reads of values by the host."""

    NAMES = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "equal", "allclose", "nonzero",
             "unique", "is_nonzero", "cpu")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class TestReads:
    """Each read of a value waits for the device."""

    @pytest.mark.parametrize("interacts", [False, True], ids=["", "causal or with more"])
    @every_variant
    def test_none_without_weights_one_with_them(self, variant, interacts):
        query, key, value = tensors((3, 4))
        dropout = {} if "dropout_p" in variant.lacks else {"dropout_p": 0.5}
        more = {"return_attention": True, **dropout} if interacts else {}
        if interacts and "causal" not in variant.lacks:
            more |= {"causal": 1}
        if interacts and "bias" not in variant.lacks and "kept" not in variant.options:
            more |= {"bias": [draw(3, 3), None]}
        vectors = [positive(3), positive(2, 4)]
        given = [
            ({}, 0),
            ({"mask": holes(2, 3, 4)}, 1),
            ({"lengths": torch.tensor([[3, 2], [1, 4]]), "weights": vectors}, 1),
            ({"weights": vectors, "mask": torch.ones(2, 3, 4).bool(), "lengths": torch.tensor([3, 2])}, 1),
        ]
        for arguments, expected in given:
            leaf = query.clone().requires_grad_(interacts)
            with Reads() as reads:
                variant.function(leaf, key, value, order=2, **arguments, **more)
            assert len(reads.seen) == expected, reads.seen

    def test_none_of_averages_and_summaries(self):
        x = draw(2, 3, 4, 5)
        with Reads() as reads:
            ta.summarize(x, x, order=2, second_moment=True)
            ta.outer_sum(ta.mode_averages(x, order=2), skip=x)
            ta.interaction_residual(x, order=2)
        assert reads.seen == []

    def test_reads_are_seen(self):
        x = torch.ones(1)
        with Reads() as reads:
            [x.item(), x.tolist(), bool(x), float(x)]
        assert reads.seen == ["item", "tolist", "__bool__", "__float__"]


NUMBERS = np.array([0.1, 0.2, 0.3, 0.7])
ARRAYS = {
    "list": NUMBERS.tolist(),
    "tuple": tuple(NUMBERS),
    "array": NUMBERS,
    "backwards": NUMBERS[::-1].copy()[::-1],
    "every other": NUMBERS.repeat(2)[::2],
    "a field of records": np.array([(n, 1) for n in NUMBERS], dtype=[("a", "f8"), ("b", "i1")])["a"],
    "of the other order of bytes": NUMBERS.astype(NUMBERS.dtype.newbyteorder()),
    "that cannot be written": np.frombuffer(NUMBERS.tobytes()),
}


class TestReadingNumbers:
    @pytest.mark.parametrize("kind", ARRAYS)
    def test_arrays_of_any_strides(self, kind):
        """In full precision, as weights and as a bias."""
        x, numbers = draw(2, 3, 4, 5), torch.from_numpy(NUMBERS)
        expected = ta.mode_averages(x, order=2, weights=[None, numbers])
        close(ta.mode_averages(x, order=2, weights=[None, ARRAYS[kind]]), expected, rtol=0, atol=0)
        query = draw(2, 1, 4, 5)
        rows = np.asarray(ARRAYS[kind])[None].repeat(4, 0)
        rows = np.broadcast_to(ARRAYS[kind], (4, 4)) if kind in ("array", "backwards") else rows
        ours, theirs = (
            ta.additive_attention(query, x, x, order=2, bias=[None, bias]) for bias in (rows, numbers.expand(4, 4))
        )
        close([ours], [theirs], rtol=0, atol=0)

    def test_masks_and_lengths_of_any_strides(self):
        x, mask, lengths = draw(2, 3, 4, 5), holes(2, 3, 4), torch.tensor([[3, 2], [1, 4]])
        expected = [
            ta.additive_attention(x, x, x, order=2, **given) for given in ({"mask": mask}, {"lengths": lengths})
        ]
        turned = mask.numpy()[:, ::-1].copy()[:, ::-1]
        for given in (turned, turned.transpose(0, 2, 1).copy().transpose(0, 2, 1), mask.tolist()):
            close([ta.additive_attention(x, x, x, order=2, mask=given)], expected[:1], rtol=0, atol=0)
        for given in (lengths.numpy()[::-1].copy()[::-1], lengths.numpy().astype(">i4"), lengths.to(torch.uint8)):
            close([ta.additive_attention(x, x, x, order=2, lengths=given)], expected[1:], rtol=0, atol=0)

    @pytest.mark.parametrize(
        "dtype", [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.int64, torch.float32, torch.bfloat16]
    )
    def test_types(self, dtype):
        x = draw(2, 3, 4, 5)
        expected = ta.mode_averages(x, order=2, weights=[torch.tensor([1.0, 0, 1]).double(), None])
        close(ta.mode_averages(x, order=2, weights=[torch.tensor([1, 0, 1]).to(dtype), None]), expected)
        weights = torch.tensor([1, 0, 1])[:, None].expand(3, 4).to(dtype)
        close(ta.mode_averages(x, order=2, weights=weights)[1:], expected[1:])


def test_what_is_known_of_weights():
    like = torch.ones((), dtype=torch.float64)
    read = functools.partial(read_weights, grid=GRID, like=like)
    everything, product, gaps = torch.ones(3, 4).bool(), torch.ones(2, 3, 4).bool(), holes(2, 3, 4)
    product[0, 2], product[1, :, 3:] = False, False
    plain = read(None, None, None)
    assert plain.plain and plain.over_grid() is None and plain.present is None
    assert not read(None, everything, None).plain  # nothing is known of it before it is read
    known = read(None, product, [2, None])
    assert known.grid is None and known.binary and known.indices
    assert torch.equal(known.shown(), product & (torch.arange(3) < 2)[:, None])
    assert torch.equal(known.over_grid(), known.shown().double())
    held = read(None, gaps, None)
    assert held.vectors == (None, None) and held.indices and torch.equal(held.shown(), gaps)
    both = read([positive(3), None], gaps, None)
    assert not both.indices and not both.binary
    expected = positive(3)[:, None] * gaps
    close([both.over_grid()], [expected / expected.amax((1, 2), keepdim=True)])
    tiny = read([torch.full((3,), 1e-300).double() + 1e-300, torch.tensor([0.0, 1, 1, 2]).double() * 1e300], None, None)
    close([tiny.over_grid()], [torch.tensor([0.0, 0.5, 0.5, 1]).double().expand(3, 4)])
    assert torch.equal(tiny.shown(), torch.tensor([False, True, True, True]).expand(3, 4))


def test_something_for_each_mode():
    modes = ModeSpec.parse("t h w")
    assert one_a_mode(modes, {"w": 1, 0: 2}, "it") == [2, None, 1]
    assert one_a_mode(modes, (1, None, 3), "it") == [1, None, 3]
    assert one_a_mode(modes, "word", "it") == ["word"] * 3
    refused(ModesError, "there is no mode 'c' among 't h w' (order 3).", one_a_mode, modes, {"c": 1}, "it")
    refused(ModesError, "it names mode 'w' twice.", one_a_mode, modes, {"w": 1, 2: 1}, "it")
    refused(ModesError, "it has 2 entries, but order 3 needs one a mode.", one_a_mode, modes, [1, 2], "it")


def test_the_definition_agrees_with_weights_of_positions():
    """The same numbers from the definition, for every operator to which they say something."""
    weights = positive(2, 3, 4, seed=5) * holes(2, 3, 4)
    for variant in VARIANTS:
        if counts(variant) or owns(variant):
            continue
        query, key, value = tensors((3, 4))
        expected, _ = reference.attention(
            variant.name, query, key, value, order=2, weights=weights, **variant.options
        )  # fmt: skip
        here = weights > 0 if variant.operator.query == "grid" else torch.ones_like(weights).bool()
        ours = variant.function(query, key, value, order=2, weights=weights)
        close([ours[here]], [expected[here]])
