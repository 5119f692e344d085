r"""One head: the linear maps of queries and outputs are absorbed in the averages, S rows, in place of all positions.

The logits of a query :math:`q = W x + b` are :math:`q \cdot k = x \cdot W^\top k + b \cdot k`, and the output map of a
mean of values is the mean of their output maps. So attention from the input itself, to keys :math:`W^\top k` with
:math:`s\, b \cdot k` added to their logits and to mapped values, is the same. It takes heads as wide as the input,
which is what a single head is; several would each attend from all channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensorattn.absorbing import absorbing_pays
from tensorattn.contraction_tree import Kept
from tensorattn.operators.operator import Operator
from tensorattn.softmax import TokenSet
from tensorattn.summary import Summary, joined_linear
from tensorattn.weights import in_autocast

__all__ = ["absorbed", "absorbs"]

FIELDS = tuple(field.name for field in dataclasses.fields(Summary))


@dataclass(frozen=True, eq=False)
class _Absorbed(Summary):
    """Means of keys and values with the maps of queries and outputs absorbed.

    Attributes:
        offsets: For each kept subset, what is added to the logits of its means, ``(*batch, *n_U)``; none without bias.
    """

    offsets: tuple[Tensor, ...] = ()

    def _tensors(self) -> tuple[Tensor, ...]:
        """All tensors that it holds."""
        return *super()._tensors(), *self.offsets

    def with_tensors(self, tensors: Sequence[Tensor]) -> Summary:
        """Return the same with other tensors in place of its own."""
        count = len(tensors) - len(self.offsets)
        return _extended(super().with_tensors(tensors[:count]), tuple(tensors[count:]))

    def tokens(self, kept: Kept, coefficient: int = 1) -> TokenSet:
        """Return the means of one kept subset as a set of tokens."""
        tokens = super().tokens(kept, coefficient)
        return tokens._replace(log_weight=self._shifted(kept, tokens.log_weight))

    def mode_log_weight(self, mode: int) -> Tensor | None:
        """Return the logarithm of the weights of the indices of a mode, and what is added to their logits."""
        return self._shifted((mode,), super().mode_log_weight(mode))

    def _shifted(self, kept: Kept, log_weight: Tensor | None) -> Tensor | None:
        """Add the offsets of the means of a kept subset to the logarithms of their weights."""
        if not self.offsets:
            return log_weight
        offset, batch = self.offsets[self.place(kept)], len(self.batch)
        offset = offset.flatten(batch) if kept else offset.unsqueeze(-1)
        return offset if log_weight is None else offset + log_weight


def absorbs(
    operator: Operator, options: Mapping[str, Any], summary: Summary, x: Tensor, num_heads: int, q_proj: nn.Linear
) -> bool:
    """Tell whether a layer absorbs its maps: one head that knows nothing but averages, and it pays.

    With a bias it does so only where averages have no gradient: the fused kernel has none of a bias of logits, so that
    all weights would be written out. Under autocast the maps make the type of the output. What is compiled does not
    depend on sizes.

    Args:
        operator: The operator.
        options: Its options.
        summary: Means of projected keys and values.
        x: Where queries are made of.
        num_heads: Number of heads.
        q_proj: Linear map to queries.
    """
    if num_heads > 1 or not operator.absorbs(**options):
        return False
    if tuple(range(summary.order)) in summary.kept or in_autocast(x.device) or torch.compiler.is_compiling():
        return False
    bias = q_proj.bias
    if bias is not None and torch.is_grad_enabled() and any(part.requires_grad for part in (bias, *summary.tensors)):
        return False
    tokens = sum([math.prod([summary.sizes[mode] for mode in kept]) for kept in summary.kept])
    positions = math.prod(x.shape[len(summary.batch) - 1 : -1])
    return absorbing_pays(positions, tokens, x.shape[-1], biased=bias is not None)


def absorbed(summary: Summary, q_proj: nn.Linear, out_proj: nn.Linear, scale: float) -> Summary:
    """Return a summary to attend to from the input itself, in one head; the bias of the output map is still to come.

    Args:
        summary: Means of projected keys and values, with one head as last batch dimension.
        q_proj: Linear map to queries.
        out_proj: Linear map of outputs.
        scale: Factor of the logits.
    """
    keys, values = ([of(kept) for kept in summary.kept] for of in (summary.key, summary.value))
    batch, bias = len(summary.batch), q_proj.bias
    offsets = () if bias is None else tuple((key * (bias.to(key.dtype) * scale)).sum(-1) for key in keys)
    (keys_to_inputs,) = joined_linear(keys, batch, [(q_proj.weight.mT, None)], None)
    (outputs,) = joined_linear(values, batch, [(out_proj.weight, None)], None)
    mapped = dataclasses.replace(summary, keys=keys_to_inputs, values=outputs)
    return _extended(mapped, offsets)


def _extended(summary: Summary, offsets: tuple[Tensor, ...]) -> _Absorbed:
    """Put a summary and what is added to its logits together."""
    fields: dict[str, Any] = {name: getattr(summary, name) for name in FIELDS}
    return _Absorbed(**fields, offsets=offsets)
