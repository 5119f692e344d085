"""The doors of MONAI: the self-attention of its transformers and U-Nets; and a block that its U-Nets take instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from tensorattn.errors import OptionError, retells
from tensorattn.integrations.doors import Site, above, attend, by_forward, class_name, refuse, tell
from tensorattn.nn.attention import TensorAttention

__all__ = ["PACKAGE", "TESTED", "ResidualAttention", "sites"]

PACKAGE, TESTED = "monai", ((1, 6, 1), (1, 6))
KNOWN = "monai.networks.blocks.selfattention.SABlock"
EMBEDDING = "monai.networks.blocks.patchembedding.PatchEmbeddingBlock"
SPATIAL = (  # which are called with ``(B, C, *sizes)``
    "monai.networks.blocks.spatialattention.SpatialAttentionBlock",
    "monai.networks.nets.diffusion_model_unet.SpatialTransformer",
    "monai.networks.nets.spade_diffusion_model_unet.SpatialTransformer",
)
KEPT = {"monai.networks.blocks.crossattention.CrossAttentionBlock": "it attends to another sequence"}
REFUSED = {
    "monai.networks.nets.swin_unetr.WindowAttention": "attends within windows",
    "monai.networks.nets.vista3d.Attention": "is attention that no adapter knows",
    "monai.networks.nets.navit._NaViTAttention": "has a mask of P×P",
    "monai.networks.nets.transchex.BertAttention": "is attention that no adapter knows",
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
        if known == KNOWN:
            yield _site(model, name, module)
        elif known in KEPT:
            yield Site(name, module, kept=KEPT[known])
        elif known in REFUSED:
            yield Site(name, module, refused=REFUSED[known])


def _site(model: nn.Module, name: str, module: Any) -> Site:
    if module.causal:
        return Site(name, module, refused="is causal along the list of its tokens")
    if module.rel_positional_embedding is not None:
        return Site(name, module, refused="adds decomposed relative positions to the logits")
    if module.save_attn:
        return Site(name, module, refused="is asked for its weights (save_attn)")
    settings: dict[str, Any] = {"way": by_forward(_forward), "dropout": module.dropout_rate}
    for each in above(model, name):
        embedding = getattr(each, "patch_embedding", None)
        if class_name(each) in SPATIAL:
            return Site(name, module, beside=((each, by_forward(_forward_spatial)),), tells=True, **settings)
        if embedding is not None and class_name(embedding) == EMBEDDING:
            beside, prefix = ((embedding, by_forward(_forward_embedding)),), int(hasattr(each, "cls_token"))
            return Site(name, module, prefix=prefix, beside=beside, tells=True, **settings)
    return Site(name, module, prefix=None, **settings)


def _forward(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Attend as the block of MONAI does, by the operator."""
    if self.use_flash_attention:
        refuse(self, attn_mask=attn_mask)
    if self.use_combined_linear:
        query, key, value = self.input_rearrange(self.qkv(x)).unbind(0)
    else:
        query, key, value = (self.input_rearrange(each(x)) for each in (self.to_q, self.to_k, self.to_v))
    if self.attention_dtype is not None:
        query, key, value = (each.to(self.attention_dtype) for each in (query, key, value))
    # The fused attention of this host drops weights in evaluation too.
    dropout = self.dropout_rate if self.training or self.use_flash_attention else 0.0
    mask = None if attn_mask is None else attn_mask != 0
    output = attend(self, query, key, value, scale=self.scale, dropout_p=dropout, key_mask=mask)
    output = self.out_rearrange(output.to(x.dtype))
    return self.drop_output(self.out_proj(output) if self.include_fc else output)


def _forward_spatial(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tell the grid, and go on."""
    tell(self, tuple(x.shape[2:]))
    return type(self).swapped_from.forward(self, x, *args, **kwargs)


def _forward_embedding(self: Any, x: Tensor) -> Tensor:
    """Tell the grid of patches, and embed them."""
    order = x.dim() - 2
    embed: Any = self.patch_embeddings
    if isinstance(embed, nn.Sequential):
        lengths: Any = embed[0].axes_lengths
        patch = [dict(lengths)[f"p{mode + 1}"] for mode in range(order)]
    else:
        patch = embed.kernel_size
    tell(self, tuple([size // own for size, own in zip(x.shape[2:], patch, strict=True)]))
    return type(self).swapped_from.forward(self, x)


class ResidualAttention(nn.Module):
    """Group norm, attention over all positions of a volume by an operator, and a skip connection; channels first.

    It is made and called like ``monai.networks.blocks.SpatialAttentionBlock``, in whose place a U-Net takes it.

    Args:
        spatial_dims: Number of modes N.
        num_channels: Channels C.
        num_head_channels: Channels a head; all of them, for one head, if None.
        norm_num_groups: Groups of the norm, which divide the channels.
        norm_eps: Added to the variance.
        **options: ``operator``, ``clustered`` by default, and all else that `TensorAttention` takes.

    Raises:
        OptionError: If groups or channels of a head do not divide the channels, or `TensorAttention` refuses one.

    Shape:
        - input and output: :math:`(B, C, n_1, …, n_N)`

    Examples:
        >>> import torch, tensorattn as ta
        >>> block = ta.ResidualAttention(3, 32, num_head_channels=16, norm_num_groups=8, tokens=16)
        >>> block(torch.randn(1, 32, 6, 7, 8)).shape
        torch.Size([1, 32, 6, 7, 8])
    """

    @retells
    def __init__(
        self,
        spatial_dims: int,
        num_channels: int,
        num_head_channels: int | None = None,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, number in (("num_head_channels", num_head_channels), ("norm_num_groups", norm_num_groups)):
            if number is not None and num_channels % number:
                raise OptionError(f"{name} is {number}, which does not divide the {num_channels} channels.")
        heads = 1 if num_head_channels is None else num_channels // num_head_channels
        self.norm = nn.GroupNorm(norm_num_groups, num_channels, eps=norm_eps)
        settings = {"operator": "clustered", **options}
        self.attn = TensorAttention(num_channels, heads, modes=spatial_dims, channels_first=True, **settings)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all positions.

        Args:
            x: Input.

        Returns:
            Output of the same shape.
        """
        return x + self.attn(self.norm(x))
