"""The table of features in the README: every cell is tried here, and the table must say what was found.

Run this file to print the table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tensorattn as ta

README = Path(__file__).parents[2] / "README.md"
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
SIZES = (4, 3, 5)
YES, NO, ABOUT = "yes", "raises", "approximate"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attend(name: str, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    return ta.OPERATORS[name].function(q, k, v, order=len(SIZES), **options)


def layer(name: str, channels: int = 8, **options: object) -> ta.TensorAttention:
    torch.manual_seed(0)
    return ta.TensorAttention(channels, 2, modes=len(SIZES), operator=name, dtype=torch.float64, **options)


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, **CLOSE)


def queries(name: str) -> Tensor:
    """Queries of a grid, or of a list where they may stand anywhere."""
    return draw(2, *SIZES, 4, seed=9) if ta.OPERATORS[name].query == "grid" else draw(2, 7, 4, seed=9)


def still_exact(name: str, **given: object) -> str:
    """Compare with full attention where the operator is exact without what is given; where it is never, say yes."""
    claims = ta.OPERATORS[name].claims(**ta.OPERATORS[name].with_defaults({}))
    x = ta.outer_sum([draw(2, size, 4, seed=mode) for mode, size in enumerate(SIZES)])
    values = x if ta.Claim.EXACT not in claims else draw(2, *SIZES, 4)
    q = queries(name)
    ours = attend(name, q, values, 2 * values, **given)
    assert ours.isfinite().all()
    if not claims & {ta.Claim.EXACT, ta.Claim.EXACT_ON_ADDITIVE}:
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
    weights = [counts.double(), None, None]
    repeated = [part.repeat_interleave(counts, 1) for part in (q, k, v)]
    ours = attend(name, q, k, v, weights=weights).repeat_interleave(counts, 1)
    same(ours, attend(name, *repeated))
    return YES


def grid_weights(name: str) -> str:
    return still_exact(name, weights=draw(2, *SIZES, seed=5).abs())


def product_mask(name: str) -> str:
    module, x = layer(name), draw(2, *SIZES, 8)
    x[0, 3:], x[0, :, :, 2:] = torch.nan, torch.inf
    lengths = torch.tensor([[3, 3, 2], [4, 3, 5]])
    y = module(x, lengths=lengths)
    mask = torch.stack([torch.zeros(SIZES, dtype=torch.bool), torch.ones(SIZES, dtype=torch.bool)])
    mask[0, :3, :, :2] = True
    same(module(x, mask=mask), y)
    same(y[:1, :3, :, :2], module(x[:1, :3, :, :2]))
    same(y[1:], module(x[1:]))
    assert y[~mask].eq(0).all()
    return YES


def any_mask(name: str) -> str:
    module, x = layer(name), draw(2, *SIZES, 8)
    mask = draw(2, *SIZES, seed=5) > -0.5
    poisoned = x.masked_fill(~mask.unsqueeze(-1), torch.nan)
    same(module(poisoned, mask=mask), module(x, mask=mask))
    return still_exact(name, mask=mask)


def causal(name: str) -> str:
    module, x = layer(name, causal=0), draw(2, *SIZES, 8)
    later = x.clone()
    later[:, 2:] = 1e3
    assert torch.equal(module(later)[:, :2], module(x)[:, :2])
    return YES


def stream(name: str) -> str:
    module, x = layer(name, causal=0), draw(2, *SIZES, 8)
    lengths = [None, torch.tensor([2, 3]), None]
    config = ta.TensorTransformerConfig(
        modes=3, in_channels=8, embed_dim=8, depth=2, num_heads=2, operator=name, options={"causal": 0}
    )
    model = ta.TensorTransformer(config).double()
    for whole, stream in ((module, ta.AttentionStream), (model, ta.ModuleStream)):
        for chunk in (1, 3):
            state = stream(whole)
            same(torch.cat([state(frames) for frames in x.split(chunk, 1)], 1), whole(x))
            state.reset()
            frames = [state(frames, lengths=lengths) for frames in x.split(chunk, 1)]
            same(torch.cat(frames, 1), whole(x, lengths=lengths))
    return YES


def position_bias(name: str) -> str:
    x, q = draw(2, *SIZES, 8), draw(2, 2, *SIZES, 4, seed=9)
    for bias in (ta.RelativePositionBias(2, modes=3, max_distance=2).double(), ta.AxisWindow(modes=3, window=1)):
        assert not torch.allclose(layer(name, position_bias=bias)(x), layer(name)(x))
    bias = ta.AlibiBias(2, modes=3).double()
    assert not torch.allclose(layer(name, position_bias=bias)(x), layer(name)(x))
    if ta.Claim.EXACT_ON_ADDITIVE in ta.OPERATORS[name].claims(**ta.OPERATORS[name].with_defaults({})):
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
    q, k, v = (
        linear(part).unflatten(-1, (2, -1)).movedim(-2, 1)
        for linear, part in ((module.q_proj, x), (module.k_proj, other), (module.v_proj, other))
    )
    same(y, module.out_proj(ta.OPERATORS[name].function(q, k, v, order=2).movedim(1, -2).flatten(-2)))
    return YES


def include_self(name: str) -> str:
    layer(name, include_self=True)  # refuses an option that the operator has not
    q, k, v = (draw(2, *SIZES, 4, seed=seed) for seed in range(3))
    lse = attend(name, q, k, v, return_lse=True)
    own = (v, (q * k).sum(-1) / 2)
    same(attend(name, q, k, v, include_self=True), ta.merge_attention([(lse.output, lse.lse), own])[0])
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


def skip_and_out(name: str) -> str:
    module, x = layer(name), draw(2, *SIZES, 8)
    with torch.no_grad():
        out = torch.empty_like(x)
        assert module(x, skip=x, out=out) is out
        same(out, module(x) + x)
    return YES


def own_projections(name: str) -> str:
    module, x = layer(name, mode_projections=True, qk_norm=True), draw(2, *SIZES, 8)
    assert module.q_proj.out_features == 24
    assert module(x).isfinite().all()
    return YES


FEATURES: dict[str, Callable[[str], str]] = {
    "queries anywhere, not only on the grid of the keys": anywhere,
    "`weights`, one vector a mode": mode_weights,
    "`weights` over the grid": grid_weights,
    "`lengths`; `mask` that is a product over modes": product_mask,
    "`mask` of any shape": any_mask,
    "`causal` along one mode": causal,
    "`AttentionStream`, `ModuleStream`": stream,
    "`position_bias`: tables, slopes, windows": position_bias,
    "`rotary`": rotary,
    "`context` of another grid or order, `kdim`, `vdim`": context,
    "`include_self`": include_self,
    '`interaction="linear"`': interaction,
    "`return_lse`, `merge_attention`": log_sum_exp,
    "`attention`, `attention_map`": maps,
    "`skip=`, `out=`": skip_and_out,
    "`mode_projections`, `qk_norm`": own_projections,
}


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
    """The table as the README has it."""
    names = list(ta.OPERATORS)
    lines = ["| | " + " | ".join(f"`{name}`" for name in names) + " |", "|---|" + "---|" * len(names)]
    lines += [f"| {feature} | " + " | ".join(tried(feature, name) for name in names) + " |" for feature in FEATURES]
    return "\n".join(lines)


def cells() -> dict[tuple[str, str], str]:
    """The cells of the table in the README."""
    lines = README.read_text().splitlines()
    start = lines.index("| | " + " | ".join(f"`{name}`" for name in ta.OPERATORS) + " |")
    found = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        feature, *row = [cell.strip() for cell in line.strip("|").split(" | ")]
        found |= {(feature, name): cell for name, cell in zip(ta.OPERATORS, row, strict=True)}
    return found


def test_the_table_has_every_feature_and_operator() -> None:
    assert list(cells()) == [(feature, name) for feature in FEATURES for name in ta.OPERATORS]


@pytest.mark.parametrize("name", ta.OPERATORS)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_cell_says_what_happens(feature: str, name: str) -> None:
    assert cells()[feature, name] == tried(feature, name)


if __name__ == "__main__":
    print(render())
