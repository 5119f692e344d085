"""Attention to one set of tokens by the fused kernel of PyTorch, with the derivatives that the kernel lacks.

The kernel can be differentiated backwards once. Second derivatives and forward ones are written out as plain
operations, only where they are asked for.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["fused_attention", "is_differentiated", "is_transformed", "positional"]

LANES = 16  # exponentials that the kernel takes at once; it takes the rest one by one
TAIL = 5  # of the rest, from which on it is worth adding tokens to fill up
FEW = 128  # tokens from which on the rest is a small part

P = ParamSpec("P")
R = TypeVar("R")


def fused_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Softmax attention, unchecked, of tensors of one type and one head size.

    Args:
        query: ``(*batch, L, D)``.
        key: ``(*batch, S, D)``.
        value: ``(*batch, S, D)``.
        bias: Added to the logits, ``(*batch, 1, S)`` or broadcastable to ``(*batch, L, S)``; or None.
        scale: Factor of the logits.

    Returns:
        The output ``(*batch, L, D)``.
    """
    tensors = (query, key, value) if bias is None else (query, key, value, bias)
    if torch.compiler.is_compiling() or not is_transformed(*tensors):
        return _kernel(query, key, value, bias, scale)
    record = is_differentiated(query, key, value) and (bias is None or not bias.requires_grad)
    return _Fused.apply(query, key, value, bias, scale, record)[0]


def is_differentiated(*tensors: Tensor) -> bool:
    """Tell whether derivatives by some of the tensors are asked for, backwards or forwards.

    Args:
        *tensors: The tensors.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    level = getattr(forward_ad, "_current_level", 0)  # negative while no tensor has a forward derivative; else look
    return level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def is_transformed(*tensors: Tensor) -> bool:
    """Tell whether a function of some tensors is differentiated, or transformed by `torch.func`.

    Otherwise it can be called as it is, without the cost of an autograd function. Where torch does not tell, assume so.

    Args:
        *tensors: The tensors.
    """
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is None or active() or is_differentiated(*tensors)


def positional(forward: Callable[P, R]) -> Callable[P, R]:
    """Make the ``forward`` of an autograd function one that takes everything by position, and fills nothing in.

    PyTorch reads the signature of ``forward`` at every call to fill in defaults, which takes it longer than to compute
    with small tensors; this signature is read at once.

    Args:
        forward: The function, which has no defaults.
    """
    everything = inspect.Parameter("arguments", inspect.Parameter.VAR_POSITIONAL)
    vars(forward)["__signature__"] = inspect.Signature([everything])
    return forward


def _kernel(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Call the kernel, which is fused for exactly two batch dimensions and contiguous channels alone."""
    if query.dim() != 4:
        batch = query.shape[:-2]

        def four(tensor: Tensor) -> Tensor:
            if len(batch) > 2:
                return tensor.expand(*batch, *tensor.shape[-2:]).flatten(0, -4)
            return tensor.reshape(*(1,) * (2 - len(batch)), *tensor.shape)

        output = _kernel(four(query), four(key), four(value), None if bias is None else four(bias), scale)
        return output.reshape(*batch, *output.shape[-2:])
    if _leaves_a_tail(query, key):
        key, value, bias = _without_a_tail(key, value, bias)
    query, key, value = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value)]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def _leaves_a_tail(query: Tensor, key: Tensor) -> bool:
    """Tell whether the kernel takes long over the tokens that fill no vector, for many queries to few tokens."""
    if torch.compiler.is_compiling() or query.is_meta:  # what is compiled should not depend on sizes
        return False
    length, size = query.shape[-2], key.shape[-2]
    return size < FEW and length >= max(FEW, 4 * size) and size % LANES >= TAIL


def _without_a_tail(key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Add tokens that nothing attends to, so that all fill vectors."""
    missing = -key.shape[-2] % LANES
    bias = key.new_zeros(1, key.shape[-2]) if bias is None else bias
    key, value = (F.pad(tensor, (0, 0, 0, missing)) for tensor in (key, value))
    return key, value, F.pad(bias, (0, missing), value=-math.inf)


class _Recorded(NamedTuple):
    """One run of the kernel as autograd recorded it."""

    leaves: tuple[Tensor, ...]
    output: Tensor


class _Fused(torch.autograd.Function):
    """The kernel; its own backward pass for first derivatives, plain operations for second ones."""

    @staticmethod
    @positional
    def forward(
        query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, record: bool
    ) -> tuple[Tensor, _Recorded | None]:
        if not record:
            return _kernel(query, key, value, bias, scale), None
        with torch.enable_grad():
            query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
            output = _kernel(query, key, value, None if bias is None else bias.detach(), scale)
        return output.detach(), _Recorded((query, key, value), output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, ctx.scale, _ = inputs
        ctx.recorded = output[1]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        query, key, value, bias = ctx.saved_tensors
        wants_bias = bias is not None and ctx.needs_input_grad[3]
        if ctx.recorded is not None and not torch.is_grad_enabled() and not wants_bias:
            leaves, output = ctx.recorded
            return *torch.autograd.grad(output, leaves, grad, retain_graph=True), None, None, None
        weights = _weights(query, key, bias, ctx.scale)
        of_weights = grad @ value.mT
        of_logits = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
        of_bias = of_logits.sum_to_size(bias.shape) if wants_bias else None
        return of_logits @ key * ctx.scale, of_logits.mT @ query * ctx.scale, weights.mT @ grad, of_bias, None, None

    @staticmethod
    def jvp(ctx: Any, query_t: Any, key_t: Any, value_t: Any, bias_t: Any, *_: None) -> tuple[Tensor, None]:
        query, key, value, bias = ctx.saved_tensors
        weights = _weights(query, key, bias, ctx.scale)
        of_logits = ctx.scale * (query_t @ key.mT + query @ key_t.mT)
        of_logits = of_logits if bias_t is None else of_logits + bias_t
        of_weights = weights * (of_logits - (of_logits * weights).sum(-1, keepdim=True))
        return of_weights @ value + weights @ value_t, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        scale: float,
        record: bool,
    ) -> Any:
        query, key, value = (
            _to_front(tensor, dim, info.batch_size) for tensor, dim in zip((query, key, value), in_dims, strict=False)
        )
        bias = None if bias is None else _to_front(bias, in_dims[3], info.batch_size)
        return (_kernel(query, key, value, bias, scale), None), (0, None)


def _weights(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Write out the attention weights ``(*batch, L, S)``."""
    logits = (query * scale) @ key.mT
    return torch.softmax(logits if bias is None else logits + bias, -1)


def _to_front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Make the dimension that `vmap` maps over the first batch dimension."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
