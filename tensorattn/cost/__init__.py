"""What operators cost: operations, traffic and memory, from sizes alone."""

from tensorattn.cost.costing import Cost, cost
from tensorattn.cost.formulas import FORMULAS
from tensorattn.cost.tape import Part

__all__ = ["FORMULAS", "Cost", "Part", "cost"]
