"""Attention over tensors of any order, without flattening them."""

from tensorattn.attend.drawing import draw_attention_maps
from tensorattn.averages import additive_part, interaction_residual, mode_averages, outer_sum
from tensorattn.cost import Cost, cost
from tensorattn.diagnose import AdditiveFraction, ErrorEstimate, additive_fraction, error_bound, error_estimate
from tensorattn.errors import (
    DtypeError,
    ModesError,
    OptionError,
    ShapeError,
    TensorAttentionError,
    WeightsError,
)
from tensorattn.models import TensorTransformer, TensorTransformerConfig
from tensorattn.modes import ModeSpec
from tensorattn.nn import (
    AlibiBias,
    AxisWindow,
    DropPath,
    GatedMLP,
    LearnedPositions,
    PatchEmbedding,
    PatchUnembedding,
    PositionBias,
    RelativePositionBias,
    RotaryEmbedding,
    SinCosPositions,
    TensorAttention,
    TensorTransformerBlock,
)
from tensorattn.operators import OPERATORS, AttentionResult, Claim, Operator, get_operator, register_operator
from tensorattn.operators.additive import additive_attention
from tensorattn.operators.axial import axial_attention
from tensorattn.operators.flattened import flattened_attention
from tensorattn.operators.kao_kv import kao_kv
from tensorattn.operators.kao_qkv import kao_qkv
from tensorattn.operators.kronecker_product import kronecker_product_attention
from tensorattn.operators.kronecker_sum import kronecker_sum_attention
from tensorattn.operators.maps import attention_map
from tensorattn.operators.truncated import truncated_attention
from tensorattn.planning import Plan, plan
from tensorattn.softmax import merge_attention
from tensorattn.stats import (
    CrossCovariance,
    TensorNormal,
    additive_mean_law,
    gls_weights,
    marginal_cross_covariance,
    marginal_mean_law,
)
from tensorattn.streaming import AttentionStream, ModuleStream
from tensorattn.summarizing import summarize
from tensorattn.summary import Summary

__version__ = "0.1.0"

__all__ = [
    "OPERATORS",
    "AdditiveFraction",
    "AlibiBias",
    "AttentionResult",
    "AttentionStream",
    "AxisWindow",
    "Claim",
    "Cost",
    "CrossCovariance",
    "DropPath",
    "DtypeError",
    "ErrorEstimate",
    "GatedMLP",
    "LearnedPositions",
    "ModeSpec",
    "ModesError",
    "ModuleStream",
    "Operator",
    "OptionError",
    "PatchEmbedding",
    "PatchUnembedding",
    "Plan",
    "PositionBias",
    "RelativePositionBias",
    "RotaryEmbedding",
    "ShapeError",
    "SinCosPositions",
    "Summary",
    "TensorAttention",
    "TensorAttentionError",
    "TensorNormal",
    "TensorTransformer",
    "TensorTransformerBlock",
    "TensorTransformerConfig",
    "WeightsError",
    "additive_attention",
    "additive_fraction",
    "additive_mean_law",
    "additive_part",
    "attention_map",
    "axial_attention",
    "cost",
    "draw_attention_maps",
    "error_bound",
    "error_estimate",
    "flattened_attention",
    "get_operator",
    "gls_weights",
    "interaction_residual",
    "kao_kv",
    "kao_qkv",
    "kronecker_product_attention",
    "kronecker_sum_attention",
    "marginal_cross_covariance",
    "marginal_mean_law",
    "merge_attention",
    "mode_averages",
    "outer_sum",
    "plan",
    "register_operator",
    "summarize",
    "truncated_attention",
]
