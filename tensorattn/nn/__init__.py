"""Modules."""

from tensorattn.nn.attention import TensorAttention
from tensorattn.nn.bias import AlibiBias, AxisWindow, PositionBias, RelativePositionBias
from tensorattn.nn.block import DropPath, GatedMLP, TensorTransformerBlock
from tensorattn.nn.patches import PatchEmbedding, PatchUnembedding
from tensorattn.nn.positions import LearnedPositions, SinCosPositions
from tensorattn.nn.rotary import RotaryEmbedding
from tensorattn.nn.stream import AttentionStream, ModuleStream

__all__ = [
    "AlibiBias",
    "AttentionStream",
    "AxisWindow",
    "DropPath",
    "GatedMLP",
    "LearnedPositions",
    "ModuleStream",
    "PatchEmbedding",
    "PatchUnembedding",
    "PositionBias",
    "RelativePositionBias",
    "RotaryEmbedding",
    "SinCosPositions",
    "TensorAttention",
    "TensorTransformerBlock",
]
