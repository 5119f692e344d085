"""Modules."""

from tensorattn.nn.attention import TensorAttention
from tensorattn.nn.positions import LearnedPositions, SinCosPositions
from tensorattn.nn.rotary import RotaryEmbedding

__all__ = ["LearnedPositions", "RotaryEmbedding", "SinCosPositions", "TensorAttention"]
