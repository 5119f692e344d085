"""Models: transformers, classifiers and U-Nets over tensors of any order."""

from tensorattn.models.kanet import KANet
from tensorattn.models.transformer import TensorTransformer, TensorTransformerConfig
from tensorattn.models.unet import TensorUNet

__all__ = ["KANet", "TensorTransformer", "TensorTransformerConfig", "TensorUNet"]
