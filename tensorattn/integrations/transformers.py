"""The doors of transformers: its interface for attention, for video and vision transformers whose grid is configured.

Layers that are left out keep the fused kernel of PyTorch, which the interface knows as ``sdpa``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tensorattn.errors import AdapterError
from tensorattn.integrations.doors import Site, Way, attend, by_forward, door_of, own_door, refuse

__all__ = ["PACKAGE", "TESTED", "sites"]

PACKAGE, TESTED = "transformers", ((5, 23, 0), (5, 24))
NAME = "tensorattn"  # of the interface
_MODELS = "transformers.modeling_utils"


def _pair(size: Any) -> tuple[int, int]:
    """Return height and width."""
    return (int(size[-2]), int(size[-1])) if isinstance(size, Sequence) else (int(size), int(size))


def _image(config: Any) -> tuple[int, ...]:
    """Return rows and columns of patches."""
    sizes, patches = _pair(config.image_size), _pair(config.patch_size)
    return tuple([size // patch for size, patch in zip(sizes, patches, strict=True)])


def _vivit(config: Any) -> tuple[int, ...]:
    frames, *patch = config.tubelet_size
    return config.num_frames // frames, *(s // p for s, p in zip(_pair(config.image_size), patch, strict=True))


@dataclass(frozen=True)
class _Layout:
    """How the tokens of a kind of model lie.

    Attributes:
        prefix: Number of tokens before the grid, without registers.
        grid: From the configuration to the sizes of the modes.
        rotary: Whether queries and keys are turned by their places.
    """

    prefix: int
    grid: Callable[[Any], tuple[int, ...]] = _image
    rotary: bool = False


LAYOUTS: Mapping[str, _Layout] = {
    "vit": _Layout(1),
    "deit": _Layout(2),
    "clip_vision_model": _Layout(1),
    "siglip_vision_model": _Layout(0),
    "dinov2": _Layout(1),
    "dinov2_with_registers": _Layout(1),
    "dinov3_vit": _Layout(1, rotary=True),
    "videomae": _Layout(0, lambda config: (config.num_frames // config.tubelet_size, *_image(config))),
    "vivit": _Layout(1, _vivit),
    "timesformer": _Layout(1, lambda config: (*_image(config), config.num_frames)),  # time runs fastest
}
POOLING = "SiglipMultiheadAttentionPoolingHead"


def sites(model: nn.Module) -> Iterator[Site]:
    """Read the attention layers of a model.

    Args:
        model: The model.

    Yields:
        One site for each.
    """
    if _MODELS not in sys.modules:  # there can be no model then
        return
    owners = [each for each in model.modules() if isinstance(each, sys.modules[_MODELS].PreTrainedModel)]
    for owner in owners:
        leaves, partial = _leaves(owner), type(owner).__name__ == "VideoMAEForPreTraining"
        for name, module in model.named_modules():
            if type(module) in leaves or (not leaves and type(module).__name__ == "TimesformerSelfAttention"):
                yield _site(getattr(module, "config", owner.config), name, module, partial)
            elif type(module).__name__ == POOLING:
                yield Site(f"{name}.attention", module.attention, kept="it pools by queries that are learned")
            elif type(owner).__module__ == type(module).__module__ and _unknown(module, leaves):
                yield Site(name, module, refused=f"belongs to {owner.config.model_type!r}, which no adapter knows")


def _leaves(owner: Any) -> tuple[type, ...]:
    """Return the classes that a model names as its attention."""
    named = (getattr(owner, "_can_record_outputs", None) or {}).get("attentions", ())
    found = [getattr(each, "target_class", each) for each in (named if isinstance(named, (tuple, list)) else (named,))]
    return tuple([each for each in found if isinstance(each, type)])


def _unknown(module: nn.Module, leaves: tuple[type, ...]) -> bool:
    """Tell by its name whether a module is attention, of a model that does not tell which of its classes are."""
    kind, known = type(module).__name__, ("TimesformerSelfAttention", "TimeSformerAttention")
    within = any("Attention" in type(each).__name__ for each in list(module.modules())[1:])
    return not leaves and "Attention" in kind and kind not in known and not within


def _site(config: Any, name: str, module: Any, partial: bool) -> Site:
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        return Site(name, module, refused=f"belongs to {config.model_type!r}, which no adapter knows")
    if partial:
        return Site(name, module, refused="sees only some positions of the grid in pre-training")
    if config.output_attentions:
        return Site(name, module, refused="is asked for its weights (output_attentions)")
    if getattr(module, "is_causal", False):
        return Site(name, module, refused="is causal along the list of its tokens")
    kind = getattr(config, "attention_type", "joint_space_time")
    if config.model_type == "timesformer" and kind != "joint_space_time":
        return Site(name, module, refused=f"does not attend over space and time together, but has {kind!r}")
    way = by_forward(_forward_joint) if config.model_type == "timesformer" else _INTERFACE
    names = ("attention_probs_dropout_prob", "attention_dropout")
    dropout = next(float(getattr(config, name)) for name in names if hasattr(config, name))
    prefix = layout.prefix + getattr(config, "num_register_tokens", 0)
    return Site(name, module, way, layout.grid(config), prefix, dropout, layout.rotary)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **asked: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as the interface of transformers asks: through the door of a module, or by the fused kernel without one.

    Args:
        module: The module that attends.
        query: Queries ``(B, H, L, D)``.
        key: Keys, whose heads may be fewer.
        value: Values.
        attention_mask: Mask of the keys ``(B, 1, 1, L)``, the same for all queries.
        dropout: Probability of dropping an attention weight.
        scaling: Factor of the logits.
        **asked: What else is asked.

    Returns:
        The output ``(B, L, H, D)``, and None for the weights.

    Raises:
        AdapterError: If a mask differs from query to query, or something is asked for that has no meaning.
    """
    if door_of(module) is None:
        plain = sys.modules[_MODELS].ALL_ATTENTION_FUNCTIONS["sdpa"]
        return plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **asked)
    names = ("is_causal", "output_attentions", "position_bias", "softcap", "sliding_window", "s_aux", "head_mask")
    refuse(module, **{name: asked.get(name) for name in names})
    mask = None if attention_mask is None else _key_mask(module, attention_mask)
    output = attend(module, query, key, value, scale=scaling, dropout_p=dropout, key_mask=mask)
    return output.transpose(1, 2).contiguous(), None


def _key_mask(module: nn.Module, mask: Tensor) -> Tensor:
    """Return a mask of keys, which must be one for all queries and heads."""
    if mask.is_floating_point() or mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        called = f"{own_door(module).name} was called with an attention_mask"
        raise AdapterError(f"{called} of shape {tuple(mask.shape)}, which is P×P.")
    return mask[:, 0, 0]


def _forward_joint(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
    """Attend as TimeSformer does over space and time together, by the operator."""
    refuse(self, output_attentions=output_attentions)
    rows = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    dropout = self.attn_drop.p if self.training else 0.0
    return (attend(self, *rows.unbind(0), scale=self.scale, dropout_p=dropout).transpose(1, 2).flatten(-2),)


def _enter(module: Any, door: Any) -> None:
    """Have the configuration name the interface, whose name the attention of all layers is looked up by."""
    sys.modules[_MODELS].AttentionInterface.register(NAME, attention_forward)
    masks = sys.modules["transformers.masking_utils"]
    masks.AttentionMaskInterface.register(NAME, masks.sdpa_mask)
    if module.config._attn_implementation != NAME:
        door.before, module.config._attn_implementation = module.config._attn_implementation, NAME


def _leave(module: Any, door: Any) -> None:
    if door.before is not None:
        module.config._attn_implementation, door.before = door.before, None


_INTERFACE = Way(_enter, _leave)
