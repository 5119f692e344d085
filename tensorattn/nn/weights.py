"""Weights of other libraries: read from their state dicts, and settings from their modules, which are not imported.

`torch.nn.MultiheadAttention` packs queries, keys and values into ``in_proj_weight``, timm and MONAI into ``qkv``; the
output map is called ``out_proj`` or ``proj``. In all three the rows are those of all heads of the queries, then of the
keys, then of the values.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from tensorattn.errors import OptionError, TensorAttentionError
from tensorattn.functional.cells import Cells
from tensorattn.nn.parameters import parameter_of

__all__ = ["settings_of", "unpack"]

PACKED = {"in_proj_weight": "weight", "in_proj_bias": "bias", "qkv.weight": "weight", "qkv.bias": "bias"}
CELLS = ("cell_centres", "cell_metric")
RENAMED = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "proj": "out_proj"}
MAPS = (("qkv",), ("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj"))
OUTPUTS = ("proj", "out_proj")
NORMS = ("q_norm", "k_norm")
DROPOUTS = {"dropout": ("attn_drop", "drop_weights"), "proj_drop": ("proj_drop", "drop_output")}
RESHAPING = ("input_rearrange", "out_rearrange")
TAKEN = (
    "x",
    "attn_mask",
    "mask",
    "is_causal",
)  # what a forward may take: the input, and what is refused by its absence
FLAGS = ("causal", "is_causal", "save_attn", "attention_dtype")


def unpack(layer: Any, state_dict: dict[str, Any], prefix: str, *told: Any) -> None:
    """Read packed weights, those of other names, and held cells, before a state dict is loaded: a hook of the layer.

    A layer that holds no cells takes those of a layer that did.

    Args:
        layer: The layer.
        state_dict: The state, which is changed.
        prefix: What names of the layer begin with.
        *told: What hooks are told further; the last are messages of errors.
    """
    for packed, kind in PACKED.items():
        tensor = state_dict.pop(prefix + packed, None)
        if tensor is None:
            continue
        rows = [layer.head_dim * count for count in (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)]
        if len(tensor) != sum(rows):
            needed = " + ".join(map(str, rows))
            told[-1].append(f"{prefix}{packed} has {len(tensor)} rows, but queries, keys and values have {needed}.")
            continue
        for name, part in zip("qkv", tensor.split(rows), strict=True):
            state_dict[f"{prefix}{name}_proj.{kind}"] = part
    renamed = {f"{old}.{kind}": f"{new}.{kind}" for old, new in RENAMED.items() for kind in ("weight", "bias")}
    renamed.update({f"{name}_proj_weight": f"{name}_proj.weight" for name in "qkv"})
    for old, new in renamed.items():
        if prefix + old in state_dict:
            state_dict[prefix + new] = state_dict.pop(prefix + old)
    held = [part for name in CELLS if isinstance(part := state_dict.get(prefix + name), Tensor)]
    if len(held) == len(CELLS) and "cells" in layer.options and CELLS[0] not in layer._buffers:
        parameter = parameter_of(layer)
        try:
            layer.hold_cells(Cells(*held) if parameter is None else Cells(*held).to(parameter.device))
        except TensorAttentionError as cause:
            told[-1].append(f"{prefix}{CELLS[0]} does not fit: {cause.rule}")


def settings_of(module: Any) -> dict[str, Any]:
    """Read the settings of a `TensorAttention` from an attention module of another library.

    Args:
        module: A `torch.nn.MultiheadAttention`, or a module that has ``num_heads``, linear maps called ``qkv``, or
            ``to_q``, ``to_k`` and ``to_v``, or ``q_proj``, ``k_proj`` and ``v_proj``, and another one called ``proj``
            or ``out_proj``, as those of timm and MONAI.

    Returns:
        Arguments by name.

    Raises:
        OptionError: If it is no such module, or has something that the layer has not.
    """
    return _of_torch(module) if isinstance(module, nn.MultiheadAttention) else _of_others(module)


def _of_torch(module: nn.MultiheadAttention) -> dict[str, Any]:
    """Read `torch.nn.MultiheadAttention`."""
    if type(module).forward is not nn.MultiheadAttention.forward:
        raise _lost(["a forward of its own"], module)
    added = {"add_bias_kv": module.bias_k is not None, "add_zero_attn": module.add_zero_attn}
    if any(added.values()):
        raise _lost([name for name, given in added.items() if given], module)
    found = {name: getattr(module, name) for name in ("embed_dim", "num_heads", "dropout")}
    found["qkv_bias"] = module.in_proj_bias is not None
    found["out_bias"] = module.out_proj.bias is not None
    dims = {name: getattr(module, name) for name in ("kdim", "vdim")}
    found.update({name: dim for name, dim in dims.items() if dim != module.embed_dim})
    return {**found, **_place(module.out_proj.weight)}


def _of_others(module: Any) -> dict[str, Any]:
    """Read a module of timm or MONAI, or one that is made alike."""
    maps, output = _linears(module), _linears(module, OUTPUTS)
    heads = getattr(module, "num_heads", None)
    if not isinstance(module, nn.Module) or not maps or not output or heads is None:
        raise OptionError(
            "module must be an nn.MultiheadAttention, or have num_heads and linear maps called qkv (or to_q, to_k, "
            f"to_v, or q_proj, k_proj, v_proj) and proj or out_proj, got {type(module).__name__}."
        )
    if lost := list(_not_kept(module)):
        raise _lost(lost, module)
    first, (out, *_) = maps[0], output
    rows = [linear.out_features for linear in maps] if len(maps) > 1 else [first.out_features // 3] * 3
    if out.out_features != first.in_features:
        channels = f"{out.out_features} channels of output beside {first.in_features} of input"
        raise _lost([channels], module)
    head_dim, scale = rows[0] // heads, getattr(module, "scale", None)
    found: dict[str, Any] = {
        "embed_dim": first.in_features,
        "num_heads": heads,
        "qkv_bias": first.bias is not None,
        "out_bias": out.bias is not None,
    }
    if head_dim * heads != first.in_features:
        found["head_dim"] = head_dim
    if rows[1] != rows[0]:
        found["num_kv_heads"] = rows[1] // head_dim
    if scale is not None and scale != head_dim**-0.5:
        found["scale"] = scale
    for name, called in DROPOUTS.items():
        given = next((part for part in (getattr(module, each, None) for each in called) if part is not None), 0.0)
        found[name] = float(getattr(given, "p", given))
    norms = [getattr(module, name, None) for name in NORMS]
    if not all(norm is None or isinstance(norm, nn.Identity) for norm in norms):
        found["qk_norm"] = _copies(norms)
    return {**found, **_place(out.weight)}


def _linears(module: Any, names: tuple[str, ...] | None = None) -> list[nn.Linear]:
    """Return the linear maps of an input, or that of an output; an empty list if there are none."""
    wanted = MAPS if names is None else [(name,) for name in names]
    for each in wanted:
        found = [getattr(module, name, None) for name in each]
        if all(isinstance(part, nn.Linear) for part in found):
            return [part for part in found if isinstance(part, nn.Linear)]
    return []


def _not_kept(module: nn.Module) -> Iterator[str]:
    """Name everything that a module has and the layer has not."""
    yield from (flag for flag in FLAGS if getattr(module, flag, None) not in (None, False))
    yield from (name for name, _ in module.named_parameters(recurse=False))
    yield from (name for name, _ in module.named_buffers(recurse=False))
    known = {name for names in (*MAPS, OUTPUTS, NORMS, RESHAPING, *DROPOUTS.values()) for name in names}
    parts = {name: part for name, part in module.named_children() if not isinstance(part, nn.Identity)}
    yield from (name for name in parts if name not in known)
    for name in inspect.signature(module.forward).parameters:
        if name not in TAKEN:
            yield f"the argument {name} of forward"


def _copies(norms: list[Any]) -> Callable[..., nn.Module]:
    """Return what gives copies of the norms of queries and keys, one after the other."""
    remaining = iter(norms)

    def make(*_: Any, **__: Any) -> nn.Module:
        norm = next(remaining)
        return nn.Identity() if norm is None else copy.deepcopy(norm)

    return make


def _place(weight: Tensor) -> dict[str, Any]:
    """Return the device and the type of a weight."""
    return {"device": weight.device, "dtype": weight.dtype}


def _lost(what: list[str], module: nn.Module) -> OptionError:
    """Return the error that tells what cannot be kept."""
    return OptionError(f"module is {type(module).__name__} with {', '.join(what)}, which a layer cannot keep.")
