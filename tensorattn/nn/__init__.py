"""Modules."""

from tensorattn.nn.attention import TensorAttention
from tensorattn.nn.block import DropPath, GatedMLP, TensorTransformerBlock
from tensorattn.nn.patches import PatchEmbedding, PatchUnembedding
from tensorattn.nn.positions import LearnedPositions, SinCosPositions
from tensorattn.nn.rotary import RotaryEmbedding

__all__ = [
    "DropPath",
    "GatedMLP",
    "LearnedPositions",
    "PatchEmbedding",
    "PatchUnembedding",
    "RotaryEmbedding",
    "SinCosPositions",
    "TensorAttention",
    "TensorTransformerBlock",
]
