"""The oracle against facts that it did not produce: torch, dense sums, numbers by hand, and the laws of operators."""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tensorattn as ta
from tensorattn.testing import check_finite, check_operator, check_precision, reference
from tensorattn.testing.variants import variants

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
close = functools.partial(torch.testing.assert_close, **CLOSE)
INF = math.inf


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_imports_nothing_of_the_package():
    names = set()
    for node in ast.walk(ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." if node.level else node.module.split(".")[0])
    assert names <= {"__future__", "collections", "functools", "itertools", "math", "operator", "torch", "typing"}


def test_it_needs_no_hypothesis_and_the_checks_say_that_they_do():
    code = (
        "import sys\nsys.modules['hypothesis'] = None\nfrom tensorattn.testing import reference\n"
        "from tensorattn.testing import check_operator"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    told = "ImportError: tensorattn.testing needs Hypothesis; install it by: pip install hypothesis"
    assert ran.stderr.splitlines()[-1] == told


FEW = ("truncated kept=((0,),(0,1))", "kronecker_sum")
SEVERAL = [pytest.param(v, marks=() if str(v) in FEW else pytest.mark.thorough, id=str(v)) for v in variants()]


@pytest.mark.parametrize("variant", SEVERAL)
def test_it_obeys_the_laws_of_operators(variant):
    """All that an operator claims holds of its definition alone, with the definition in the place of the operator."""

    def defined(*tensors, return_lse=False, **given):
        output, lse = reference.attention(variant.name, *tensors, **given)
        output = output.to(tensors[0])
        return (output, lse) if return_lse else output

    record = dataclasses.replace(variant.operator, function=defined)
    check_operator(record, examples=3, skip=(check_precision, check_finite), **variant.options)


@pytest.mark.parametrize("causal", [None, 0, 1])
@pytest.mark.parametrize("biased", [False, True])
def test_flattened_is_attention_of_torch_with_all_that_hides(causal, biased):
    q, k, v = (drawn(2, 3, 4, 5, seed=seed) for seed in range(3))
    counts, mask = torch.tensor([2.0, 1.0, 0.0, 3.0]).double(), drawn(2, 3, 4, seed=3) > -0.5
    rows, columns = drawn(3, 3, seed=4), drawn(2, 4, 4, seed=5)
    terms = (counts * mask).log().reshape(2, 1, 12).expand(2, 12, 12)
    i, j = torch.cartesian_prod(torch.arange(3), torch.arange(4)).T
    if biased:
        terms = terms + rows[i[:, None], i] + columns[:, j[:, None], j]
    if causal is not None:
        place = (i, j)[causal]
        terms = terms.masked_fill(place > place[:, None], -INF)
    found, lse = reference.attention(
        "flattened", q, k, v, order=2, weights=[None, counts], mask=mask, causal=causal,
        bias=[rows, columns] if biased else None,
    )  # fmt: skip
    flat = [tensor.flatten(1, 2) for tensor in (q, k, v)]
    logits = flat[0] @ flat[1].mT * 5**-0.5 + terms
    seen = (terms > -INF).any(-1, keepdim=True)
    expected = torch.where(seen, F.scaled_dot_product_attention(*flat, attn_mask=torch.where(seen, terms, 0.0)), 0.0)
    close(found.flatten(1, 2), expected)
    close(lse.flatten(1), logits.logsumexp(-1))


def test_averages_are_written_out():
    x, w = drawn(2, 3, 4, 5), torch.tensor([[1.0, 2.0, 0.0, 1.0], [0.5, 0.0, 1.0, 0.0]]).double()
    close(reference.marginal_mean(x, (0,), order=2), x.mean(2))
    close(reference.marginal_mean(x, (), order=2), x.mean((1, 2)))
    weighed = torch.einsum("btwc,bw->btc", x, w) / w.sum(-1)[:, None, None]
    close(reference.marginal_mean(x, (0,), order=2, weights=[None, w]), weighed)
    mask = drawn(3, 4, seed=1) > 0
    cut = torch.einsum("btwc,tw->bwc", x, mask.double()) / mask.sum(0).clamp(min=1)[:, None]
    close(reference.marginal_mean(x, (1,), order=2, mask=mask), cut)
    close(reference.marginal_mean(x, (1,), order=2, lengths=[torch.tensor([2, 3]), None])[0], x[0, :2].mean(0))
    rows, columns = reference.mode_averages(x, order=2)
    close(reference.outer_sum([rows, columns]), rows[:, :, None] + columns[:, None])
    rest = x - reference.additive_part(x, order=2, weights=[None, w])
    assert torch.einsum("btwc,bw->btc", rest, w).abs().max() < 1e-12 and rest.mean(1).abs().max() < 1e-12


def test_one_joint_softmax_by_hand():
    key = torch.tensor([[[1.0], [2.0]], [[2.0], [4.0]]]).log()  # averages log √2, log 2√2 of both modes
    given = {"order": 2, "scale": 1.0, "weights": [[1, 1], [1, 3]]}
    output, lse = reference.attention("kao_kv", [2.0], key, key.exp(), **given)
    sums = torch.tensor([2**1.5, 2**3.5, 2.0, 3 * 2**3.0]).double()
    close(lse, sums.sum().log(), rtol=1e-6)
    close(output, (sums @ torch.tensor([1.75, 3.5, 1.5, 3.0]).double() / sums.sum())[None], rtol=1e-6)


def test_the_interaction_of_the_exclusive_or_by_hand():
    key = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double()[..., None]  # all averages are zero, the variance one
    for saturation, factor in ((None, 1.0), (1.0, 5**-0.5), (2.0, 2**-0.5)):
        how = {"order": 2, "scale": 1.0, "interaction": "linear", "saturation": saturation}
        output, lse = reference.attention("additive", [2.0], key, 3 * key, **how)
        close(output, torch.tensor([6 * factor], dtype=torch.float64))
        close(lse, torch.tensor(math.log(4) + 2, dtype=torch.float64))
        halved, _ = reference.attention("additive", [2.0], key, 3 * key, gain=0.5, **how)
        close(halved, output / 2)


@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_kronecker_operators_are_mode_products(pool):
    q, k, v = (drawn(3, 4, 2, seed=seed) for seed in range(3))
    count = (4, 3) if pool == "sum" else (1, 1)
    matrices = [
        torch.softmax(count[m] ** 2 * q.mean(1 - m) @ k.mean(1 - m).T / 2**0.5, -1) for m in range(2)
    ]  # fmt: skip
    product, _ = reference.attention("kronecker_product", q, k, v, order=2, pool=pool)
    close(product, torch.einsum("ia,jb,abc->ijc", *matrices, v))
    total, _ = reference.attention("kronecker_sum", q, k, v, order=2, pool=pool)
    close(total, torch.einsum("ia,ajc->ijc", matrices[0], v) + torch.einsum("jb,ibc->ijc", matrices[1], v))


def test_axial_and_averaged_queries_are_written_out():
    q, k, v = (drawn(3, 4, 2, seed=seed) for seed in range(3))
    along = [F.scaled_dot_product_attention(*(t.movedim(m, -2) for t in (q, k, v))).movedim(-2, m) for m in range(2)]
    close(reference.attention("axial", q, k, v, order=2)[0], (along[0] + along[1]) / 2)
    keys, values = (torch.cat([t.mean(1), t.mean(0)]) for t in (k, v))
    parts = [F.scaled_dot_product_attention(t, keys, values) for t in (q.mean(1), q.mean(0))]
    close(reference.attention("kao_qkv", q, k, v, order=2)[0], parts[0][:, None] + parts[1])


@pytest.mark.parametrize("kept", [[(0,), (1,)], [(0, 1), (1, 2)], [(0, 1, 2)], [(2,), (0, 1), (1,)]])
def test_counting_numbers_count_every_kept_effect_once(kept):
    counts = reference.counting_numbers(kept, 3)
    for subset in counts:
        assert sum(count for larger, count in counts.items() if set(subset) <= set(larger)) == 1


@pytest.mark.parametrize("variant", variants(), ids=str)
def test_some_places_are_those_of_all(variant):
    q, k, v = (drawn(2, 2, 3, 2, seed=seed) for seed in range(3))
    how = {"order": 2, "weights": [None, [1.0, 0.0, 2.0]], **variant.options}
    at = torch.tensor([(1, 2), (0, 0), (1, 2)])
    some, some_lse = reference.attention(variant.name, q, k, v, at=at, **how)
    output, lse = reference.attention(variant.name, q, k, v, **how)
    close(some, output[:, at[:, 0], at[:, 1]])
    assert (lse is None) == (some_lse is None)
    if lse is not None:
        close(some_lse, lse[:, at[:, 0], at[:, 1]])


@pytest.mark.parametrize("name", reference.OPERATORS)
def test_a_query_that_sees_nothing_gets_nothing(name):
    q, k, v = (drawn(2, 2, 3, 2, seed=seed) for seed in range(3))
    for gone in (
        {"lengths": torch.tensor([[2, 3], [0, 3]])},
        {"mask": torch.tensor([True, False]).reshape(2, 1, 1).expand(2, 2, 3)},
    ):
        output, lse = reference.attention(
            name, q, k.masked_fill(~torch.tensor([True, False]).reshape(2, 1, 1, 1), math.nan), v, order=2, **gone
        )
        assert (output[1] == 0).all() and output[0].isfinite().all() and (lse is None or (lse[1] == -INF).all())
    if name not in reference.POOLED and name not in ("axial", "clustered"):
        bias = [torch.tensor([[0.0, 0.0], [-INF, -INF]]), torch.tensor([[-INF] * 3] * 3)]
        output, lse = reference.attention(name, q, k, v, order=2, bias=bias)
        assert (output[:, 1] == 0).all() and (lse[:, 1] == -INF).all()


LAYERS = [
    ("additive", {"interaction": "linear"}),
    ("additive", {"causal": "b", "include_self": True}),
    ("truncated", {"kept": [("a",), ("b", "c")]}),
    ("kao_qkv", {"centered": True, "interaction": "linear"}),
    ("kronecker_sum", {"pool": "sum"}),
    ("axial", {"causal": "a", "position_bias": True}),
    ("flattened", {"rotary": True}),
]


@pytest.mark.parametrize(("name", "options"), LAYERS, ids=str)
def test_a_layer_is_its_projections_and_the_definition(name, options):
    options = dict(options)
    if options.get("position_bias"):
        options["position_bias"] = ta.AlibiBias(2, modes="a b c")
    if options.get("rotary"):
        options["rotary"] = ta.RotaryEmbedding(8, modes="a b c")
    module = ta.TensorAttention(16, 2, modes="a b c", operator=name, dtype=torch.float64, **options)
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=seed))
    x, at = drawn(2, 2, 3, 2, 16).requires_grad_(), torch.tensor([(0, 1, 1), (1, 2, 0)])
    for told in ({}, {"mask": drawn(2, 2, 3, 2) > -0.5}, {"lengths": torch.tensor([[2, 3, 1], [1, 2, 2]])}):
        ours, theirs = module(x, **told), reference.layer(module, x, **told)
        close(ours, theirs, rtol=1e-9)
        close(reference.layer(module, x, at=at, **told), theirs[:, at[:, 0], at[:, 1], at[:, 2]])
        sources = [x, *module.parameters()]
        wanted = drawn(*ours.shape, seed=9)
        pairs = (torch.autograd.grad((y * wanted).sum(), sources, allow_unused=True) for y in (ours, theirs))
        for own, other in zip(*pairs, strict=True):
            if own is not None:
                close(own, other, rtol=1e-8, atol=1e-8)


def test_a_layer_attends_to_a_context():
    module = ta.TensorAttention(8, 2, modes="a b", dtype=torch.float64)
    x, context = drawn(2, 2, 3, 8), drawn(2, 4, 2, 2, 8, seed=1)
    close(reference.layer(module, x, context, lengths=[3, 2, 1]), module(x, context, lengths=[3, 2, 1]))


T = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reference.mode_averages(torch.ones(2), order=2), "a tensor of 2 modes cannot have the shape (2,)."),
        (
            lambda: reference.attention("kao_kv", T, T, T[:, :2], order=2),
            "query, key and value do not fit: [(2, 3, 4), (2, 3, 4), (2, 2, 4)].",
        ),
        (
            lambda: reference.attention("kao_kv", T, T, T, order=2, weights=[[1, -1], None]),
            "weights must not be negative.",
        ),
        (
            lambda: reference.attention("flattened", T[0], T, T, order=2, causal=0),
            "flattened with (3,) queries takes neither causal nor bias.",
        ),
        (
            lambda: reference.attention("axial", T[:1], T, T, order=2),
            "query must be on the grid (2, 3) of key, got (1, 3).",
        ),
        (
            lambda: reference.attention("dense", T, T, T, order=2),
            f"there is no operator 'dense'; the operators are: {', '.join(reference.OPERATORS)}.",
        ),
        (
            lambda: reference.counting_numbers([(0, 2)], 2),
            "kept must be subsets of the modes 0 to 1, got [(0, 2)].",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError) as refusal:
        call()
    assert str(refusal.value) == message
