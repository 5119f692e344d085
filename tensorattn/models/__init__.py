"""Models: transformers over tensors of any order."""

from tensorattn.models.transformer import TensorTransformer, TensorTransformerConfig

__all__ = ["TensorTransformer", "TensorTransformerConfig"]
