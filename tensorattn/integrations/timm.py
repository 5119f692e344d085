"""The doors of timm: its vision transformers, with class and register tokens, with and without rotary embeddings."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tensorattn.integrations.doors import Site, above, attend, by_forward, class_name, refuse, tell

__all__ = ["PACKAGE", "TESTED", "sites"]

PACKAGE, TESTED = "timm", ((1, 0, 31), (1, 0))
PLAIN = "timm.layers.attention.Attention"
ROTARY = ("timm.layers.attention.AttentionRope", "timm.models.eva.EvaAttention")
KEPT = {
    "timm.layers.attention_pool.AttentionPoolLatent": "it pools by queries that are learned",
    "timm.layers.attention_pool.AttentionPoolPrr": "it pools all positions",
}
REFUSED = {  # words in the name of a class, and why it is refused
    "Window": "attends within windows",
    "MaskUnit": "attends within windows",
    "RelPos": "adds relative positions to the logits",
    "timm.models.beit": "adds relative positions to the logits",
    "timm.models.vision_transformer_sam": "adds decomposed relative positions to the logits",
    "timm.models.levit": "adds relative positions to the logits",
    "timm.models.mvitv2": "adds decomposed relative positions to the logits",
    "Att": "is attention that no adapter knows",
    "ParallelScalingBlock": "computes its attention itself, and no adapter knows it",
}


def sites(model: nn.Module) -> Iterator[Site]:
    """Read the attention layers of a model.

    Args:
        model: The model.

    Yields:
        One site for each.
    """
    for name, module in model.named_modules():
        known = class_name(module)
        if known == PLAIN or known in ROTARY:
            yield _site(model, name, module, rotary=known in ROTARY)
        elif known in KEPT:
            yield Site(name, module, kept=KEPT[known])
        elif known.startswith("timm.") and _attends(known):
            yield Site(name, module, refused=next(reason for word, reason in REFUSED.items() if word in known))


def _attends(known: str) -> bool:
    """Tell by its name whether a class is attention, and not what contains it."""
    kind = known.rpartition(".")[2]
    return "ParallelScalingBlock" in kind or ("Att" in kind and "Block" not in kind)


def _site(model: nn.Module, name: str, module: Any, *, rotary: bool) -> Site:
    settings: dict[str, Any] = {"dropout": module.attn_drop.p, "rotary": rotary}
    way = by_forward(_forward_rotary if rotary else _forward)
    for each in above(model, name):
        embed: Any = getattr(each, "patch_embed", None)
        prefix: Any = getattr(each, "num_prefix_tokens", None)
        if prefix is None or not hasattr(embed, "grid_size"):
            continue
        if getattr(getattr(each, "patch_drop", None), "prob", 0.0) > 0:
            return Site(name, module, refused="sees only some of the patches in training (patch_drop_rate)")
        if getattr(each, "dynamic_img_size", False):
            beside = ((embed, by_forward(_forward_embed)),)
            return Site(name, module, way, prefix=prefix, beside=beside, tells=True, **settings)
        grid = None if embed.grid_size is None else tuple(embed.grid_size)
        return Site(name, module, way, grid=grid, prefix=prefix, **settings)
    return Site(name, module, way, prefix=None, **settings)


def _forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Attend as the attention of timm does, by the operator."""
    refuse(self, attn_mask=attn_mask, is_causal=is_causal)
    query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return _attended(self, x, self.q_norm(query), self.k_norm(key), value)


def _forward_rotary(
    self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Attend as the attention of timm with rotary embeddings does, by the operator."""
    refuse(self, attn_mask=attn_mask, is_causal=is_causal)
    if self.qkv is None:
        maps = self.q_proj, self.k_proj, self.v_proj
        heads = self.num_heads, *(getattr(self, "num_kv_heads", self.num_heads),) * 2
        query, key, value = (
            each(x).unflatten(-1, (n, -1)).transpose(1, 2) for each, n in zip(maps, heads, strict=True)
        )
    else:
        packed = self.qkv(x)
        if getattr(self, "q_bias", None) is not None:
            packed = packed + torch.cat((self.q_bias, self.k_bias, self.v_bias))
        query, key, value = packed.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    query, key = self.q_norm(query), self.k_norm(key)
    if rope is not None:
        query, key = (_turned(self, each, rope).type_as(value) for each in (query, key))
    return _attended(self, x, query, key, value)


def _turned(self: Any, rows: Tensor, rope: Tensor) -> Tensor:
    """Turn what lies behind the prefix."""
    turn, first = sys.modules["timm.layers"].apply_rot_embed_cat, self.num_prefix_tokens
    half = getattr(self, "rotate_half", False)
    return torch.cat([rows[:, :, :first], turn(rows[:, :, first:], rope, half=half)], 2)


def _attended(self: Any, x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend, and project the output."""
    dropout = self.attn_drop.p if self.training else 0.0
    output = attend(self, query, key, value, scale=self.scale, dropout_p=dropout).transpose(1, 2).flatten(-2)
    output = self.norm(output)
    if getattr(self, "gate", None) is not None:
        output = output * self.gate(x).sigmoid()
    return self.proj_drop(self.proj(output))


def _forward_embed(self: Any, x: Tensor) -> Tensor:
    """Tell the grid of an image, and embed its patches."""
    tell(self, tuple(self.dynamic_feat_size(x.shape[-2:])))
    return type(self).swapped_from.forward(self, x)
