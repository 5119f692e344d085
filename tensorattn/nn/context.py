"""Cross-attention: a context on a grid of its own, of any order, checked against a layer and summarised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorattn.errors import DtypeError, OptionError, ShapeError
from tensorattn.functional.operator import Operator, check_indices
from tensorattn.functional.parts import summary_of_parts
from tensorattn.functional.summary import Needs, Summary
from tensorattn.masks import Part, accumulation_dtype, in_autocast, read_weights, without_absent
from tensorattn.modes import GridShape, ModeSpec
from tensorattn.nn.layout import channels_last, check_input, check_parameters
from tensorattn.sharding import Sharding

__all__ = ["Context", "ContextReader", "check_crossing"]

Context = Tensor | tuple[Tensor, Tensor] | Summary  # keys and values, both or one for each, or what is known of them


def check_crossing(operator: Operator, options: Mapping[str, Any], causal: int | None, what: str) -> None:
    """Check that keys and values may come from another tensor than the queries.

    Args:
        operator: The operator.
        options: All its options.
        causal: The causal mode, or None.
        what: Name of the argument that says so.

    Raises:
        OptionError: If they may not.
    """
    if operator.query != "positions":
        raise OptionError(
            f"{what} has no meaning for operator {operator.name!r}: its queries stand on the grid of the keys."
        )
    if options.get("include_self"):
        raise OptionError(f"{what} has no meaning with include_self=True: a query has no key of its own in a context.")
    if causal is not None:
        raise OptionError(f"{what} has no meaning with causal: frames of x are not those of a context.")


@dataclass(frozen=True)
class ContextReader:
    """What a layer knows of every context.

    Attributes:
        operator: Operator of the layer.
        options: All its options.
        causal: Its causal mode, or None.
        modes: Its modes; those of a context too if there are as many.
        dims: Channels that keys and values are made of.
        channels_first: Whether channels come first.
    """

    operator: Operator
    options: Mapping[str, Any]
    causal: int | None
    modes: ModeSpec
    dims: tuple[int, int]
    channels_first: bool

    def summarize(self, context: Any, parameter: Tensor | None, **spoken: Any) -> Summary:
        """Check a context that is a tensor, or one for the keys and one for the values, and summarise it.

        Args:
            context: The context.
            parameter: A parameter of the layer, if it has any.
            **spoken: Weights, mask, lengths and sharding of the context.

        Raises:
            DtypeError: If a tensor is not floating point, or not of the type of the parameters.
            ShapeError: If one has the wrong number of dimensions or channels, or an empty mode, or two do not fit.
            OptionError: If the operator takes no context, options name modes and the context has others, or keys and
                values have different channels and there is only one tensor.
        """
        check_crossing(self.operator, self.options, self.causal, "context")
        key, value, grid, modes, part = self._check_tensors(context, parameter, spoken.get("sharding"))
        needs = self._needs(modes.order)
        told: dict[str, Any] = {name: spoken.get(name) for name in ("weights", "mask", "lengths")}
        weights = read_weights(**told, grid=grid, like=key, modes=modes, of="context", part=part)
        check_indices(needs, weights)
        shown, alone = weights.shown(), value is key
        key = without_absent(key, shown)  # what it holds must not meet a zero, not even that of a gradient
        return summary_of_parts(key, key if alone else without_absent(value, shown), needs, weights)

    def read(self, context: Any, x: Tensor, parameter: Tensor | None, **spoken: Any) -> Summary:
        """Return the summary of a context, made here or before, checked against the input.

        Args:
            context: Tensor, pair of tensors, or summary.
            x: Input of the layer.
            parameter: A parameter of the layer, if it has any.
            **spoken: Weights, mask and lengths of the context.

        Raises:
            ShapeError: If its batch or channels are not those of the layer.
            DtypeError: If a summary is of another type or on another device.
            OptionError: If a summary lacks something, or weights, mask or lengths are given beside it.
        """
        if isinstance(context, Summary):
            check_crossing(self.operator, self.options, self.causal, "context")
            for name, argument in spoken.items():
                if argument is not None:
                    raise OptionError(f"{name} has no meaning with a summary of the context: give it to summarize.")
            self._check_summary(context, x)
            return context
        first = context[0] if isinstance(context, (tuple, list)) and context else context
        if isinstance(first, Tensor) and first.dim() and first.shape[0] != x.shape[0]:
            raise ShapeError(f"the batch is {x.shape[0]} in x but {first.shape[0]} in context.")
        return self.summarize(context, parameter, **spoken)

    def _needs(self, order: int) -> Needs:
        """What the operator needs to know of a context of an order."""
        if self.options.get("kept") is not None and order != self.modes.order:
            raise OptionError(f"kept names modes of order {self.modes.order}, but context has order {order}.")
        return self.operator.needs(order, **self.options)

    def _check_tensors(
        self, context: Any, parameter: Tensor | None, sharding: Sharding | None
    ) -> tuple[Tensor, Tensor, GridShape, ModeSpec, Part | None]:
        """Check tensors; return what keys and values are made of, channels last, shape, modes and place in a whole."""
        pair = isinstance(context, (tuple, list))
        parts = tuple(context) if pair else (context,)
        if pair and len(parts) != 2:
            raise ShapeError(f"context has {len(parts)} tensors, but a pair of keys and values has 2.")
        if not pair and self.dims[0] != self.dims[1]:
            raise OptionError(
                f"context must be a pair of tensors for keys and values, as kdim is {self.dims[0]} but vdim is "
                f"{self.dims[1]}."
            )
        names = ("context[0]", "context[1]") if pair else ("context",)
        first = parts[0]
        if isinstance(first, Tensor) and first.dim() < 3:
            raise ShapeError(f"{names[0]} has {first.dim()} dimensions, but one mode needs at least 3.")
        order = first.dim() - 2 if isinstance(first, Tensor) else self.modes.order
        modes = self.modes if order == self.modes.order else ModeSpec.parse(order)
        own = None if sharding is None else sharding.part(modes)
        grids = []
        for part, name, dim, called in zip(parts, names, self.dims, ("kdim", "vdim"), strict=False):
            channels_first = self.channels_first
            told: dict[str, Any] = {"called": called, "argument": name, "part": own}
            grids.append(check_input(part, modes, dim, channels_first=channels_first, **told))
            check_parameters(part, parameter, name)
        if grids[0].batch != grids[-1].batch:
            raise ShapeError(f"the batch is {grids[0].batch[0]} in context[0] but {grids[-1].batch[0]} in context[1].")
        for mode, (one, two) in enumerate(zip(grids[0].sizes, grids[-1].sizes, strict=True)):
            if one != two:
                raise ShapeError(f"mode {modes.label(mode)} has size {one} in context[0] but {two} in context[1].")
        last = [channels_last(part, self.channels_first) for part in parts]
        return last[0], last[-1], grids[0], modes, own

    def _check_summary(self, summary: Summary, x: Tensor) -> None:
        """Check that a summary holds what the layer needs of a context."""
        needs = self._needs(summary.order)
        if summary.batch != (x.shape[0],):
            raise ShapeError(f"the batch is {(x.shape[0],)} in x but {summary.batch} in the summary of the context.")
        if needs.second_moment and (summary.covariance is None or summary.key_covariance is None):
            raise OptionError(
                "the summary of the context holds no second moments, but interaction='linear' needs them."
            )
        casts = in_autocast(x.device)
        for kept in needs.held:
            sides = ((summary.key(kept), self.dims[0], "kdim"), (summary.value(kept), self.dims[1], "vdim"))
            for mean, dim, called in sides:
                if mean.shape[-1] != dim:
                    raise ShapeError(
                        f"the summary of the context has {mean.shape[-1]} channels, but {called} is {dim}."
                    )
                if mean.device != x.device:
                    raise DtypeError(f"the device is {x.device} in x but {mean.device} in the summary of the context.")
                if mean.dtype not in (x.dtype, accumulation_dtype(x.dtype), torch.float64) and not casts:
                    raise DtypeError(f"the type is {x.dtype} in x but {mean.dtype} in the summary of the context.")
