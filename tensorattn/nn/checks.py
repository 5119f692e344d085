"""Whether what a layer is made of has a meaning for its operator, and fits together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorattn.errors import OptionError, check
from tensorattn.functional.operator import Operator, get_operator
from tensorattn.functional.summary import Summary
from tensorattn.masks import Part
from tensorattn.modes import ModeSpec
from tensorattn.nn.bias import PositionBias
from tensorattn.nn.rotary import RotaryEmbedding
from tensorattn.sharding import Sharding

__all__ = ["check_heads", "check_meaning", "check_parts", "check_position_bias", "check_rotary", "check_sharding"]


def check_meaning(record: Operator, options: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Check that arguments of a layer have a meaning for its operator and with each other.

    Args:
        record: The operator.
        options: All its options.
        given: What the layer was given, by the names of its arguments.

    Raises:
        OptionError: If one has none.
    """
    if given["mode_projections"] and given["project"] == "positions":
        raise OptionError("mode_projections has no meaning with project='positions': it maps the averages of a mode.")
    if given["mode_projections"] and not record.pools:
        raise OptionError(
            f"mode_projections has no meaning for operator {record.name!r}: it does not pool its queries."
        )
    for name, reason in (("interaction", "covariances"), ("additive_control", "averages")):
        if given["qk_norm"] and options.get(name):
            told = f"{name}={options[name]!r}: {reason} of normed keys are not those of linear maps"
            raise OptionError(f"qk_norm has no meaning with {told}.")
    lacking = record.lacking(options)
    for name, lacked in (("causal", "causal"), ("dropout", "dropout_p")):
        if given[name] and lacked in lacking:
            raise OptionError(f"{name} has no meaning for operator {record.name!r}: {lacking[lacked]}.")


def check_parts(
    record: Operator, options: Mapping[str, Any], order: int, causal: int | None, *, what: str, gathers: bool = False
) -> None:
    """Check that an operator can work on a tensor that is there in parts: on sums over their positions.

    Args:
        record: The operator.
        options: All its options.
        order: Number of modes N.
        causal: The causal mode, or None.
        what: What has the parts, for messages.
        gathers: Whether positions of the keys may be gathered.

    Raises:
        OptionError: If it cannot.
    """
    rule = hint = ""
    if record.condense is not None:
        if options.get("additive_control"):
            rule = "additive_control needs the cells of all positions at once"
        elif options.get("cells") == "keys" and not gathers:
            rule = "its search needs the keys of all positions at once"
            hint = "Take cells='blocks', or find cells once and hold them: layer.hold_cells(layer.find_cells(sample))."
    elif not gathers or not (record.gathers or record.query == "positions"):
        held = record.needs(order, **options).held
        if any([len({*kept, *(() if causal is None else (causal,))}) == order for kept in held]):
            rule = "it needs all positions at once"
    if rule:
        raise OptionError(f"{what} has no meaning for operator {record.name!r}: {rule}.", hint=hint)


def check_sharding(layer: Any, sharding: Any, *, context: Any, prefix: Any) -> Part:
    """Check that a layer can attend over what is shared out, from what all processes know.

    Args:
        layer: The layer.
        sharding: How its input is shared out.
        context: Its context, or None.
        prefix: Tokens beside the input, or None.

    Returns:
        Where the input of this process stands.

    Raises:
        OptionError: If it cannot.
        ShapeError: If splits do not add up.
        ModesError: If a mode does not exist.
    """
    if not isinstance(sharding, Sharding):
        raise OptionError(f"sharding must be a Sharding, got {type(sharding).__name__}.")
    if not hasattr(layer, "operator"):
        raise OptionError(f"sharding has no meaning for {type(layer).__name__}, which is no attention.")
    for name, given in (("context", context), ("prefix", prefix)):
        if given is not None and not isinstance(given, Summary):
            hint = "Give its sharding to summarize, and the summary as context." if name == "context" else ""
            raise OptionError(f"{name} has no meaning with sharding, which is that of x.", hint=hint)
    record, part = get_operator(layer.operator), sharding.part(layer.modes)
    check_parts(record, layer.options, layer.modes.order, layer.causal, what="sharding", gathers=True)
    if layer.training and layer.dropout > 0 and record.query == "grid":
        raise OptionError(
            f"sharding has no meaning with dropout in training for operator {record.name!r}: each process would drop "
            "weights of its own from what all share."
        )
    return part


def check_heads(embed_dim: int, num_heads: int, head_dim: int | None, num_kv_heads: int | None) -> tuple[int, int]:
    """Check that heads divide the channels, unless their size is given, and return their size and those of keys."""
    for name, count in (("embed_dim", embed_dim), ("num_heads", num_heads)):
        check(count, name, "integer")
    if embed_dim < 1 or num_heads < 1:
        raise OptionError(f"embed_dim and num_heads must be at least 1, got {embed_dim} and {num_heads}.")
    for name, given in (("head_dim", head_dim), ("num_kv_heads", num_kv_heads)):
        if given is not None:
            check(given, name, "integer", least=1)
    if head_dim is None and embed_dim % num_heads:
        raise OptionError(f"embed_dim must be divisible by num_heads, got {embed_dim} and {num_heads}.")
    groups = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % groups:
        raise OptionError(f"num_heads must be divisible by num_kv_heads, got {num_heads} and {groups}.")
    return int(embed_dim // num_heads if head_dim is None else head_dim), int(groups)


def check_position_bias(
    position_bias: Any, record: Operator, options: Mapping[str, Any], modes: ModeSpec, num_heads: int
) -> None:
    """Check that a position bias fits the layer."""
    lacking = record.lacking(options)
    if "bias" in lacking:
        raise OptionError(f"position_bias has no meaning for operator {record.name!r}: {lacking['bias']}.")
    if not isinstance(position_bias, PositionBias):
        raise OptionError(f"position_bias must be a PositionBias, got {type(position_bias).__name__}.")
    if position_bias.modes.names != modes.names:
        raise OptionError(f"position_bias has the modes {position_bias.modes}, but the layer has {modes}.")
    heads = getattr(position_bias, "num_heads", num_heads)
    if heads != num_heads:
        raise OptionError(f"position_bias has {heads} heads, but the layer has {num_heads}.")


def check_rotary(rotary: Any, record: Operator, options: Mapping[str, Any], modes: ModeSpec, head_dim: int) -> None:
    """Check that a rotary embedding fits the layer."""
    if not isinstance(rotary, RotaryEmbedding):
        raise OptionError(f"rotary must be a RotaryEmbedding, got {type(rotary).__name__}.")
    if rotary.axes.modes.names != modes.names:
        raise OptionError(f"rotary has the modes {rotary.axes.modes}, but the layer has {modes}.")
    if rotary.head_dim != head_dim:
        raise OptionError(
            f"rotary has head_dim {rotary.head_dim}, but the heads of the layer have {head_dim} channels."
        )
    rotary.check_operator(record.name, **options)
