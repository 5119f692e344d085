"""Modules."""

from tensorattn.nn.attention import TensorAttention

__all__ = ["TensorAttention"]
