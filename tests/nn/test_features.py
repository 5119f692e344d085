"""What works with which operator: every cell of the table is tried, and what the README says in words is the table.

Run this file to print what was found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from modules import draw
from torch import Tensor

import tensorattn as ta
from nn.layers import heads_of, joined, make

README = Path(__file__).parents[2] / "README.md"
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
SIZES = (4, 3, 5)
YES, NO, ABOUT = "yes", "raises", "approximate"


def attend(name: str, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    return ta.OPERATORS[name].function(q, k, v, order=len(SIZES), **options)


def layer(name: str, channels: int = 8, **options: object) -> ta.TensorAttention:
    return make(name, len(SIZES), channels, **options)


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, **CLOSE)


def claims(name: str) -> frozenset[ta.Claim]:
    record = ta.OPERATORS[name]
    return record.claims(**record.with_defaults({}))


def queries(name: str) -> Tensor:
    """Queries of a grid, or of a list where they may stand anywhere."""
    return draw(2, *SIZES, 4, seed=9) if ta.OPERATORS[name].query == "grid" else draw(2, 7, 4, seed=9)


def still_exact(name: str, **given: object) -> str:
    """Compare with full attention where the operator is exact without what is given; where it is never, say yes."""
    additive = ta.outer_sum([draw(2, size, 4, seed=mode) for mode, size in enumerate(SIZES)])
    values, q = draw(2, *SIZES, 4) if ta.Claim.EXACT in claims(name) else additive, queries(name)
    ours = attend(name, q, values, 2 * values, **given)
    assert ours.isfinite().all()
    if not claims(name) & {ta.Claim.EXACT, ta.Claim.EXACT_ON_ADDITIVE}:
        return YES
    exact = attend("flattened", q, values, 2 * values, **given)
    return YES if torch.allclose(ours, exact, **CLOSE) else ABOUT


def anywhere(name: str) -> str:
    q, k = draw(2, 7, 4), draw(2, *SIZES, 4, seed=1)
    same(attend(name, q, k, k)[:, 3:5], attend(name, q[:, 3:5], k, k))
    return YES


def mode_weights(name: str) -> str:
    q, k, v = (draw(2, *SIZES, 4, seed=seed) for seed in range(3))
    counts = torch.tensor([1, 2, 0, 1])
    repeated = [part.repeat_interleave(counts, 1) for part in (q, k, v)]
    ours = attend(name, q, k, v, weights=[counts.double(), None, None])
    same(ours.repeat_interleave(counts, 1), attend(name, *repeated))
    return YES


def grid_weights(name: str) -> str:
    return still_exact(name, weights=draw(2, *SIZES, seed=5).abs())


def product_mask(name: str) -> str:
    module, x = layer(name), draw(2, *SIZES, 8)
    x[0, 3:], x[0, :, :, 2:] = torch.nan, torch.inf
    y = module(x, lengths=torch.tensor([[3, 3, 2], [4, 3, 5]]))
    mask = torch.stack([torch.zeros(SIZES, dtype=torch.bool), torch.ones(SIZES, dtype=torch.bool)])
    mask[0, :3, :, :2] = True
    same(module(x, mask=mask), y)
    same(y[:1, :3, :, :2], module(x[:1, :3, :, :2]))
    same(y[1:], module(x[1:]))
    assert y[~mask].eq(0).all()
    return YES


def any_mask(name: str) -> str:
    module, x, mask = layer(name), draw(2, *SIZES, 8), draw(2, *SIZES, seed=5) > -0.5
    same(module(x.masked_fill(~mask.unsqueeze(-1), torch.nan), mask=mask), module(x, mask=mask))
    return still_exact(name, mask=mask)


def causal(name: str) -> str:
    module, x = layer(name, causal=0), draw(2, *SIZES, 8)
    later = x.clone()
    later[:, 2:] = 1e3
    assert torch.equal(module(later)[:, :2], module(x)[:, :2])
    return YES


def stream(name: str) -> str:
    module, x = layer(name, causal=0), draw(2, *SIZES, 8)
    config = ta.TensorTransformerConfig(
        modes=3, in_channels=8, embed_dim=8, depth=2, num_heads=2, operator=name, options={"causal": 0}
    )
    for whole, kind in ((module, ta.AttentionStream), (ta.TensorTransformer(config).double(), ta.ModuleStream)):
        for lengths in (None, [None, torch.tensor([2, 3]), None]):
            state = kind(whole)
            frames = [state(frames, lengths=lengths) for frames in x.split(3, 1)]
            same(torch.cat(frames, 1), whole(x, lengths=lengths))
    return YES


def position_bias(name: str) -> str:
    x, q, bias = draw(2, *SIZES, 8), draw(2, 2, *SIZES, 4, seed=9), ta.AlibiBias(2, modes=3).double()
    for each in (bias, ta.RelativePositionBias(2, modes=3, max_distance=2).double(), ta.AxisWindow(modes=3, window=1)):
        assert not torch.allclose(layer(name, position_bias=each)(x), layer(name)(x))
    if ta.Claim.EXACT_ON_ADDITIVE in claims(name):
        k = ta.outer_sum([draw(2, 2, size, 4, seed=mode) for mode, size in enumerate(SIZES)])
        same(attend(name, q, k, k, bias=bias(SIZES)), attend("flattened", q, k, k, bias=bias(SIZES)))
    return YES


def rotary(name: str) -> str:
    turns, x = ta.RotaryEmbedding(6, modes=3, base=2.0), draw(2, *SIZES, 12)
    assert not torch.allclose(layer(name, 12, rotary=turns)(x), layer(name, 12)(x))
    return YES


def context(name: str) -> str:
    module, x, other = layer(name, kdim=6, vdim=6), draw(2, *SIZES, 8), draw(2, 3, 4, 6, seed=1)
    y = module(x, other)
    same(y, module(x, module.summarize(other)))
    same(y, joined(module, ta.OPERATORS[name].function(*heads_of(module, x, other), order=2)))
    return YES


def include_self(name: str) -> str:
    layer(name, include_self=True)  # refuses an option that the operator has not
    q, k, v = (draw(2, *SIZES, 4, seed=seed) for seed in range(3))
    all_others = attend(name, q, k, v, return_lse=True)
    own = (v, (q * k).sum(-1) / 2)
    same(attend(name, q, k, v, include_self=True), ta.merge_attention([all_others[:2], own])[0])
    return YES


def interaction(name: str) -> str:
    extra = {"centered": True} if "centered" in ta.OPERATORS[name].options else {}
    layer(name, interaction="linear", **extra)  # refuses an option that the operator has not
    q, k, v = (draw(2, *SIZES, 4, seed=seed) for seed in range(3))
    errors = []
    for scale in (1e-2, 1e-3):
        ours = attend(name, q, k, v, scale=scale, interaction="linear", **extra)
        errors.append((ours - attend("flattened", q, k, v, scale=scale)).norm())
    assert errors[1] < errors[0] / 50
    return YES


def log_sum_exp(name: str) -> str:
    extra = {"centered": True} if "centered" in ta.OPERATORS[name].options else {}
    q, k = queries(name), draw(2, *SIZES, 4)
    assert attend(name, q, k, k, return_lse=True, **extra).lse.shape == q.shape[:-1]
    return YES


def maps(name: str) -> str:
    module, x = layer(name), draw(2, *SIZES, 8)
    same(module.attention_map(x, (1, 2, 3)).flatten(2).sum(2), torch.ones(2, 2, dtype=torch.float64))
    return YES


def skip_and_checkpoint(name: str) -> str:
    x = draw(2, *SIZES, 8)
    same(layer(name, checkpoint=True, project="positions")(x, skip=x), layer(name)(x) + x)
    return YES


def own_projections(name: str) -> str:
    module, x = layer(name, mode_projections=True, qk_norm=True), draw(2, *SIZES, 8)
    assert module.q_proj.out_features == 24 and module(x).isfinite().all()
    return YES


FEATURES: dict[str, Callable[[str], str]] = {
    "queries anywhere": anywhere,
    "weights a mode": mode_weights,
    "weights over the grid": grid_weights,
    "lengths, product masks": product_mask,
    "masks of any shape": any_mask,
    "causal": causal,
    "streams": stream,
    "position bias": position_bias,
    "rotary": rotary,
    "context": context,
    "include_self": include_self,
    "interaction": interaction,
    "return_lse": log_sum_exp,
    "attention maps": maps,
    "skip, checkpoint, project": skip_and_checkpoint,
    "mode_projections, qk_norm": own_projections,
}
TABLE = """
                           additive     truncated    kao_kv  kao_qkv  kronecker_product  kronecker_sum  axial   clustered  flattened
queries anywhere           yes          yes          yes     raises   raises             raises         raises  yes        yes
weights a mode             yes          yes          yes     yes      yes                yes            yes     yes        yes
weights over the grid      approximate  approximate  raises  raises   yes                yes            yes     yes        yes
lengths, product masks     yes          yes          yes     yes      yes                yes            yes     yes        yes
masks of any shape         approximate  approximate  yes     yes      yes                yes            yes     yes        yes
causal                     yes          yes          yes     raises   raises             raises         yes     raises     yes
streams                    yes          yes          yes     raises   raises             raises         yes     raises     yes
position bias              yes          yes          yes     raises   raises             raises         yes     raises     yes
rotary                     raises       raises       raises  raises   yes                yes            yes     yes        yes
context                    yes          yes          yes     raises   raises             raises         raises  yes        yes
include_self               yes          yes          raises  raises   raises             raises         raises  raises     raises
interaction                yes          yes          raises  yes      raises             raises         raises  raises     raises
return_lse                 yes          yes          yes     yes      raises             raises         raises  yes        yes
attention maps             yes          yes          yes     yes      yes                yes            yes     yes        yes
skip, checkpoint, project  yes          yes          yes     yes      yes                yes            yes     yes        yes
mode_projections, qk_norm  raises       raises       raises  raises   yes                yes            raises  raises     raises
"""


def tried(feature: str, name: str) -> str:
    """Try a feature with an operator; it refuses one by an error of options, or of queries off the grid."""
    try:
        return FEATURES[feature](name)
    except ta.OptionError:
        return NO
    except ta.ShapeError as error:
        assert "query must be on the grid of key" in str(error)
        return NO


def render() -> str:
    """The table as it stands above."""
    rows = [["", *ta.OPERATORS], *([feature, *(tried(feature, name) for name in ta.OPERATORS)] for feature in FEATURES)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def cells() -> dict[tuple[str, str], str]:
    """The cells of the table."""
    names, *lines = TABLE.strip("\n").splitlines()
    width = len(names) - len(names.lstrip())
    rows = {line[:width].rstrip(): line[width:].split() for line in lines}
    assert names.split() == list(ta.OPERATORS) and list(rows) == list(FEATURES)
    return {
        (feature, name): cell for feature, row in rows.items() for name, cell in zip(ta.OPERATORS, row, strict=True)
    }


@pytest.mark.parametrize("name", ta.OPERATORS)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_cell_says_what_happens(feature: str, name: str) -> None:
    assert cells()[feature, name] == tried(feature, name)


def test_the_readme_says_what_the_table_says() -> None:
    found, text = cells(), " ".join(README.read_text().split())

    def where(feature: str, *, but: str = "") -> str:
        return ", ".join(f"`{n}`" for n in ta.OPERATORS if found[feature, n] != NO and (not but or found[but, n] == NO))

    assert where("queries anywhere") == where("context") and where("causal") == where("streams") == where(
        "position bias"
    )
    for said in (
        f"Queries anywhere, and a context of another grid or order: {where('context')}.",
        f"Causality along a mode and streams: those and {where('causal', but='context')};",  # of clustered, blocks
        "Position biases: the same but `clustered`.",
        f"Rotary embeddings: {where('rotary')}.",
        "Weights of each mode, masks and padding: all.",
    ):
        assert said in text
    assert NO not in {found[feature, name] for feature in list(FEATURES)[3:5] for name in ta.OPERATORS}


if __name__ == "__main__":
    sys.stdout.write(render() + "\n")
