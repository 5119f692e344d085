"""Attention over tensors of any order, without flattening them.

The rooms of the package, each importing those above it alone, as a test says:

    errors modes masks   every message; names and sizes of the modes; weights, masks and lengths as one object
    averages             mode averages and outer sums, the adjoint pair, and the plan they go by
    functional           operator.py: what a call passes through (read, summarise, attend); summary.py: sums over
                         positions; causal.py; softmax.py: attention to sets of tokens; grid.py: tokens beside a grid;
                         parts.py: parts of a grid; maps.py: attention weights; then one file an operator: additive.py,
                         kao.py, kronecker.py, axial.py, clustered.py (its cells: cells.py), flattened.py
    processes sharding   processes that talk; a tensor that is shared out over them
    nn                   attention.py: the layer, and pipeline.py: how it attends; mixers, bias, positions, blocks
    models               networks made of blocks: an encoder, KANet, U-Net
    blockwise            a file larger than memory
    diagnose             cost, error against full attention, the tensor-normal law
    integrations         swap.py, and one file for each host library
    testing              the oracle in float64, laws and theorems, and strategies that draw cases
    cli                  attend, bench, learn, verify
"""

from tensorattn.averages import Plan, additive_part, interaction_residual, mode_averages, outer_sum, plan
from tensorattn.blockwise import attend_blockwise
from tensorattn.cli.figures import draw_attention_maps
from tensorattn.cli.view import show
from tensorattn.diagnose import (
    AdditiveFraction,
    Cost,
    CrossCovariance,
    ErrorEstimate,
    TensorNormal,
    TokenChoice,
    additive_fraction,
    additive_mean_law,
    choose_tokens,
    cost,
    error_bound,
    error_estimate,
    gls_weights,
    marginal_cross_covariance,
    marginal_mean_law,
)
from tensorattn.errors import (
    AdapterError,
    DtypeError,
    ModesError,
    OptionError,
    ShapeError,
    TensorAttentionError,
    WeightsError,
)
from tensorattn.functional import (
    OPERATORS,
    AttentionResult,
    Cells,
    Claim,
    Needs,
    Operator,
    Summary,
    additive_attention,
    attention_map,
    axial_attention,
    clustered_attention,
    find_cells,
    flattened_attention,
    get_operator,
    grid_attention,
    kao_kv,
    kao_qkv,
    kronecker_product_attention,
    kronecker_sum_attention,
    merge_attention,
    register_operator,
    summarize,
    truncated_attention,
)
from tensorattn.integrations import (
    LayerReport,
    ResidualAttention,
    SwapReport,
    restore_attention,
    swap_attention,
    swapped,
)
from tensorattn.models import KANet, TensorTransformer, TensorTransformerConfig, TensorUNet
from tensorattn.modes import ModeSpec
from tensorattn.nn import (
    AlibiBias,
    AttentionStream,
    AxisWindow,
    DropPath,
    GatedMLP,
    LearnedPositions,
    ModuleStream,
    PatchEmbedding,
    PatchUnembedding,
    PositionBias,
    RelativePositionBias,
    RotaryEmbedding,
    SinCosPositions,
    TensorAttention,
    TensorTransformerBlock,
)
from tensorattn.sharding import Sharding

__version__ = "0.2.0"

__all__ = [
    "OPERATORS",
    "AdapterError",
    "AdditiveFraction",
    "AlibiBias",
    "AttentionResult",
    "AttentionStream",
    "AxisWindow",
    "Cells",
    "Claim",
    "Cost",
    "CrossCovariance",
    "DropPath",
    "DtypeError",
    "ErrorEstimate",
    "GatedMLP",
    "KANet",
    "LayerReport",
    "LearnedPositions",
    "ModeSpec",
    "ModesError",
    "ModuleStream",
    "Needs",
    "Operator",
    "OptionError",
    "PatchEmbedding",
    "PatchUnembedding",
    "Plan",
    "PositionBias",
    "RelativePositionBias",
    "ResidualAttention",
    "RotaryEmbedding",
    "ShapeError",
    "Sharding",
    "SinCosPositions",
    "Summary",
    "SwapReport",
    "TensorAttention",
    "TensorAttentionError",
    "TensorNormal",
    "TensorTransformer",
    "TensorTransformerBlock",
    "TensorTransformerConfig",
    "TensorUNet",
    "TokenChoice",
    "WeightsError",
    "additive_attention",
    "additive_fraction",
    "additive_mean_law",
    "additive_part",
    "attend_blockwise",
    "attention_map",
    "axial_attention",
    "choose_tokens",
    "clustered_attention",
    "cost",
    "draw_attention_maps",
    "error_bound",
    "error_estimate",
    "find_cells",
    "flattened_attention",
    "get_operator",
    "gls_weights",
    "grid_attention",
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
    "restore_attention",
    "show",
    "summarize",
    "swap_attention",
    "swapped",
    "truncated_attention",
]
