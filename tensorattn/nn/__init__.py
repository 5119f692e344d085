"""Modules."""

from tensorattn.nn.attention import TensorAttention
from tensorattn.nn.block import DropPath, GatedMLP, TensorTransformerBlock
from tensorattn.nn.patches import PatchEmbedding, PatchUnembedding
from tensorattn.nn.position_bias import AlibiBias, AxisWindow, PositionBias, RelativePositionBias
from tensorattn.nn.positions import LearnedPositions, SinCosPositions
from tensorattn.nn.rotary import RotaryEmbedding

__all__ = [
    "AlibiBias",
    "AxisWindow",
    "DropPath",
    "GatedMLP",
    "LearnedPositions",
    "PatchEmbedding",
    "PatchUnembedding",
    "PositionBias",
    "RelativePositionBias",
    "RotaryEmbedding",
    "SinCosPositions",
    "TensorAttention",
    "TensorTransformerBlock",
]
