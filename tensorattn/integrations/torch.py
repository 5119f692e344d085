"""The door of `torch.nn.MultiheadAttention`, alone or in encoder layers.

An encoder layer in evaluation mode computes attention itself, past the forward of the module, and an encoder packs
padded inputs into nested tensors; both ways are closed while the attention is swapped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn.errors import AdapterError
from tensorattn.integrations.doors import Site, Way, above, attend, by_forward, own_door, refuse
from tensorattn.masks import is_recorded

__all__ = ["PACKAGE", "TESTED", "sites"]

PACKAGE, TESTED = "torch", ((2, 13, 0), (2, 14))


def sites(model: nn.Module) -> Iterator[Site]:
    """Read the attention layers of a model.

    Args:
        model: The model.

    Yields:
        One site for each.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            yield _site(model, name, module)


def _site(model: nn.Module, name: str, module: nn.MultiheadAttention) -> Site:
    modules = list(above(model, name))
    parent = modules[0] if modules else None
    if isinstance(parent, nn.TransformerDecoderLayer):
        if module is parent.multihead_attn:
            return Site(name, module, kept="it attends to another sequence")
        return Site(name, module, refused="belongs to a decoder, whose masks are P×P")
    if not module._qkv_same_embed_dim:
        return Site(name, module, kept="it attends to a sequence with other channels")
    if module.bias_k is not None or module.add_zero_attn:
        return Site(name, module, refused="adds a key that is no token (add_bias_kv or add_zero_attn)")
    beside = tuple([(each, way) for each in modules for kind, way in _BESIDE if isinstance(each, kind)])
    return Site(name, module, _WAY, prefix=None, dropout=module.dropout, beside=beside)


def _forward(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """Attend as `torch.nn.MultiheadAttention` does, by the operator."""
    refuse(self, attn_mask=attn_mask, is_causal=is_causal, need_weights=need_weights)
    if query is not key or key is not value:
        refuse(self, **{"keys of another sequence": True})
    refuse(self, **{"nested tensors": query.is_nested})
    single = query.dim() == 2
    x = query.unsqueeze(0) if single else query if self.batch_first else query.transpose(0, 1)
    rows = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.num_heads, -1))
    mask = None if key_padding_mask is None else _key_mask(self, key_padding_mask)
    mask = mask.unsqueeze(0) if mask is not None and single else mask
    dropout = self.dropout if self.training else 0.0
    output = attend(self, *rows.permute(2, 0, 3, 1, 4).unbind(0), dropout_p=dropout, key_mask=mask)
    output = self.out_proj(output.transpose(1, 2).flatten(-2))
    return output.squeeze(0) if single else output if self.batch_first else output.transpose(0, 1), None


def _key_mask(module: nn.Module, mask: Tensor) -> Tensor:
    """Return which keys take part: the padding is True, or minus infinity, in what the module is given."""
    if not mask.is_floating_point():
        return ~mask
    if not is_recorded() and not bool(((mask == 0) | (mask == -math.inf)).all()):
        called = f"{own_door(module).name} was called with a key_padding_mask"
        raise AdapterError(f"{called} that is neither 0 nor minus infinity.")
    return mask == 0


def _closing(name: str, closed: Any) -> Way:
    """Return the way of a module beside that an attribute of it keeps from going past the operator."""
    return Way(functools.partial(_close, name, closed), functools.partial(_open, name))


def _close(name: str, closed: Any, module: nn.Module, beside: Any) -> None:
    beside.before = getattr(module, name)
    setattr(module, name, closed)


def _open(name: str, module: nn.Module, beside: Any) -> None:
    setattr(module, name, beside.before)


_WAY = by_forward(_forward)
_BESIDE = (
    (nn.TransformerEncoderLayer, _closing("activation_relu_or_gelu", 0)),  # what its fused kernel could compute
    (nn.TransformerEncoder, _closing("use_nested_tensor", False)),
)
