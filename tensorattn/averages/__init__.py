"""Mode averages and the outer sum, an adjoint pair; and the plans by which a tensor is averaged."""

from tensorattn.averages.means import additive_part, interaction_residual, mode_averages, outer_sum
from tensorattn.averages.plan import Plan, Step, plan

__all__ = ["Plan", "Step", "additive_part", "interaction_residual", "mode_averages", "outer_sum", "plan"]
