"""Doors into models that people have: their attention swapped for an operator, and restored. No host is imported."""

from tensorattn.integrations.monai import ResidualAttention
from tensorattn.integrations.swap import LayerReport, SwapReport, restore_attention, swap_attention, swapped

__all__ = ["LayerReport", "ResidualAttention", "SwapReport", "restore_attention", "swap_attention", "swapped"]
