"""The doors of diffusers: a processor for the self-attention of its U-Nets, autoencoders and image transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from tensorattn.integrations.doors import Site, Way, above, attend, by_forward, class_name, own_door, refuse, tell

__all__ = ["PACKAGE", "TESTED", "sites"]

PACKAGE, TESTED = "diffusers", ((0, 42, 1), (0, 42))
KNOWN = "diffusers.models.attention_processor.Attention"
PLAIN = tuple([f"diffusers.models.attention_processor.{name}" for name in ("AttnProcessor", "AttnProcessor2_0")])
SPATIAL = tuple(  # which are called with ``(B, C, h, w)``
    [
        f"diffusers.models.transformers.{name}"
        for name in (
            "transformer_2d.Transformer2DModel",
            "dit_transformer_2d.DiTTransformer2DModel",
            "pixart_transformer_2d.PixArtTransformer2DModel",
        )
    ]
)


def sites(model: nn.Module) -> Iterator[Site]:
    """Read the attention layers of a model.

    Args:
        model: The model.

    Yields:
        One site for each.
    """
    for name, module in model.named_modules():
        if class_name(module) == KNOWN:
            yield _site(model, name, module)
        elif class_name(module).startswith("diffusers.") and hasattr(module, "set_processor"):
            yield Site(name, module, refused="is attention that no adapter knows")


def _site(model: nn.Module, name: str, module: Any) -> Site:
    if module.is_cross_attention:
        return Site(name, module, kept="it attends to another sequence")
    if module.added_kv_proj_dim is not None:
        return Site(name, module, refused="attends to text and image together")
    if class_name(module.processor) not in PLAIN:
        return Site(name, module, refused=f"has a processor of its own, {type(module.processor).__name__}")
    for each in above(model, name):
        if class_name(each) in SPATIAL:
            return Site(name, module, _WAY, beside=((each, by_forward(_forward_spatial)),), tells=True)
    alone = module.group_norm is not None or module.spatial_norm is not None  # called with ``(B, C, h, w)`` itself
    return Site(name, module, _WAY, tells=alone)


def _forward_spatial(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Tell the grid of patches, and go on."""
    patch = (getattr(self, "patch_size", None) or 1) if getattr(self, "is_input_patches", True) else 1
    tell(self, tuple([size // patch for size in hidden_states.shape[2:]]))
    return type(self).swapped_from.forward(self, hidden_states, *args, **kwargs)


class Processor:
    """Attends as ``AttnProcessor2_0`` does, through the door of the module."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            attn: The module.
            hidden_states: Tokens ``(B, L, C)``, or an image ``(B, C, h, w)``.
            encoder_hidden_states: Another sequence, which is refused.
            attention_mask: A mask, which is refused.
            temb: What the norm of an autoencoder takes.

        Returns:
            The output, shaped like the input.
        """
        refuse(attn, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
        x, door, shape = hidden_states, own_door(attn), None
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        if x.dim() == 4:
            shape = x.shape
            x = x.flatten(2).transpose(1, 2)
            if door.told:
                door.grid = tuple(shape[2:])
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        size = key.shape[-1] // attn.heads
        query, key, value = (each.unflatten(-1, (-1, size)).transpose(1, 2) for each in (query, key, value))
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        scale = None if type(door.before).__name__ == "AttnProcessor2_0" else attn.scale
        output = attend(attn, query, key, value, scale=scale).transpose(1, 2).flatten(-2).to(query.dtype)
        output = attn.to_out[1](attn.to_out[0](output))
        if shape is not None:
            output = output.transpose(-1, -2).reshape(shape)
        output = output + hidden_states if attn.residual_connection else output
        return output / attn.rescale_output_factor


def _enter(module: Any, door: Any) -> None:
    door.before = module.processor
    module.set_processor(Processor())


def _leave(module: Any, door: Any) -> None:
    if door.before is not None:
        module.set_processor(door.before)
        door.before = None


_WAY = Way(_enter, _leave)
