"""Attention of queries to sets of tokens, one softmax a set. It has never heard of modes.

A set goes through `torch.nn.functional.scaled_dot_product_attention`, unless log-sum-exps or attention weights are
asked for: then logits are written out, with all sets in one product. The kernel can be differentiated backwards once;
second derivatives and forward ones are written out as plain operations, where they are asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorattn.errors import ShapeError, retells
from tensorattn.masks import accumulation_dtype, check_floating, is_recorded, is_transformed, matmul

__all__ = ["Attended", "TokenSet", "Tokens", "attend_tokens", "in_chunks", "merge_attention"]

# Of fewer tokens than this, the kernel for CPUs returns zero where all logits of a query are NaN, as if it saw nothing.
# They are therefore repeated, which does not change their softmax; where some tokens are hidden, NaN is added instead.
LANES = 16

CHUNK = 1 << 20  # elements that are worked on at a time, where nothing is kept


class TokenSet(NamedTuple):
    """Consecutive tokens that share one softmax.

    Attributes:
        length: How many they are.
        coefficient: How often the softmax of this set enters the sum over sets.
        multiplicity: How often each token counts where all count alike. It moves the log-sum-exp alone.
        constant: Whether it is a single token, to which every query attends fully.
        bias: Added to the logits, ``(*batch, R, S)`` or broadcastable to it; minus infinity hides a token.
        rows: For each query, its row of ``bias``, ``(L,)``.
    """

    length: int
    coefficient: int = 1
    multiplicity: int = 1
    constant: bool = False
    bias: Tensor | None = None
    rows: Tensor | None = None


class Tokens(NamedTuple):
    """What queries attend to: sets of tokens, one behind the other.

    Attributes:
        key: Keys of all tokens ``(*batch, S, D)``.
        value: Their values ``(*batch, S, D_v)``.
        log_weight: Logarithm of how often each token counts, ``(*batch, S)`` or broadcastable to it, minus infinity
            for an absent token, whose key and value are zero. None if all tokens of a set count alike.
        sets: The sets.
    """

    key: Tensor
    value: Tensor
    log_weight: Tensor | None
    sets: tuple[TokenSet, ...]

    def split(self, tensor: Tensor, dim: int = -2) -> Sequence[Tensor]:
        """Split what belongs to all tokens into what belongs to each set."""
        return (tensor,) if len(self.sets) == 1 else tensor.split_with_sizes([each.length for each in self.sets], dim)

    def beside(self, key: Tensor, value: Tensor, log_weight: Tensor | None = None) -> Tokens:
        """Return them with more tokens in the last set, ``(*batch, R, D)`` and ``(*batch, R, D_v)``, without a bias.

        Args:
            key: Keys.
            value: Values.
            log_weight: Logarithm of how often each of them counts, broadcastable to ``(*batch, R)``; None for once.
        """
        *before, last = self.sets
        more, weights = key.shape[-2], None
        given = (self.log_weight, log_weight)
        like = next((part for part in given if part is not None), None)
        if like is not None:
            own, lengths = key.shape[:-2], (self.key.shape[-2], more)
            parts = [like.new_zeros(()) if part is None else part for part in given]
            weights = torch.cat([part.expand(*own, n) for part, n in zip(parts, lengths, strict=True)], -1)
        bias = None if last.bias is None else F.pad(last.bias, (0, more))
        last = last._replace(length=last.length + more, bias=bias)
        keys, values = torch.cat([self.key, key], -2), torch.cat([self.value, value], -2)
        return Tokens(keys, values, weights, (*before, last))

    def added(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Return for each set what is added to its logits, broadcastable to ``(*batch, L, S)``; None for nothing."""
        found: list[Tensor | None] = []
        none = (None,) * len(self.sets)
        weights = none if self.log_weight is None else self.split(self.log_weight, -1)
        for each, weight in zip(self.sets, weights, strict=True):
            added = None if weight is None else weight.unsqueeze(-2).to(dtype)
            if each.bias is not None and each.rows is not None:
                bias = each.bias.index_select(-2, each.rows).to(dtype)
                added = bias if added is None else bias + added
            found.append(added)
        return found


class Attended(NamedTuple):
    """What attention to sets of tokens gives.

    Attributes:
        output: ``(*batch, L, D_v)``.
        lse: Sum over sets of coefficient times log-sum-exp ``(*batch, L)``, if asked for.
        attention: Attention weights ``(*batch, L, S)`` of each set, if asked for.
        alive: Whether a query sees a token of every set, broadcastable to ``(*batch, L)``; None if all do.
    """

    output: Tensor
    lse: Tensor | None = None
    attention: tuple[Tensor, ...] | None = None
    alive: Tensor | None = None


def attend_tokens(
    query: Tensor,
    tokens: Tokens,
    *,
    scale: float,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_attention: bool = False,
) -> Attended:
    """Add up softmax attention over sets of tokens, each with its own softmax and coefficient.

    A query that sees no token of some set gives zeros and a log-sum-exp of minus infinity. A NaN in a query or in a key
    shows in the output, whatever the kernel makes of it.

    Args:
        query: ``(*batch, L, D)``.
        tokens: The tokens, with the batch dimensions of the query.
        scale: Factor of the logits.
        dropout_p: Probability of dropping an attention weight; sets of one token are constants and never dropped.
        return_lse: Whether to return the log-sum-exp.
        return_attention: Whether to return the attention weights.
    """
    explicit = return_lse or return_attention

    def attend(part: slice) -> tuple[Tensor | None, ...]:
        """Attend from some of the queries, to rows of the biases that are theirs."""
        chunk, own = query, tokens
        if part != slice(None):
            chunk = query[..., part, :]
            own = tokens._replace(
                sets=tuple([s if s.rows is None else s._replace(rows=s.rows[part]) for s in tokens.sets])
            )
        added = own.added(accumulation_dtype(query.dtype))
        seen = [each.amax(-1, keepdim=True) > -math.inf for each in added if each is not None]
        alive = functools.reduce(torch.logical_and, seen) if seen else None
        if not explicit:
            return _fused(chunk, own, added, scale, dropout_p, alive), alive
        output, lse, weights = _explicit(chunk, own, added, scale, dropout_p, alive)
        return output, alive, lse, *(weights if return_attention else ())

    parts = [tokens.key, tokens.value, *[each.bias for each in tokens.sets if each.bias is not None]]
    width = math.prod(query.shape[:-2]) * (tokens.key.shape[-2] if explicit else query.shape[-1])
    output, alive, *further = in_chunks(attend, query.shape[-2], width, query, *parts)
    assert output is not None
    lse = further[0].squeeze(-1) if return_lse and further[0] is not None else None
    weights = tuple([part for part in further[1:] if part is not None])
    return Attended(output, lse, weights if return_attention else None, None if alive is None else alive.squeeze(-1))


def in_chunks(
    attend: Callable[[slice], tuple[Tensor | None, ...]], length: int, width: int, *tensors: Tensor
) -> tuple[Tensor | None, ...]:
    """Attend from queries a chunk at a time, where nothing is differentiated on a CPU; from all at once elsewhere.

    It bounds the memory that is in use beside the results.

    Args:
        attend: From a range of queries to results ``(*, L, *)``, or to None, or to results that all queries share
            ``(*, 1, *)``.
        length: Number of queries L.
        width: Elements in use for each of them.
        *tensors: What the results are computed from.

    Returns:
        The results for all queries.
    """
    step = max(64, CHUNK // max(1, width))
    eager = not is_recorded() and tensors[0].device.type == "cpu" and not is_transformed(*tensors)
    if not eager or step >= length:
        return attend(slice(None))
    first = attend(slice(0, step))
    results = [
        None
        if part is None
        else part.new_empty(*part.shape[:-2], length, part.shape[-1])
        if part.shape[-2] == step
        else part
        for part in first
    ]
    for start in range(0, length, step):
        found = first if start == 0 else attend(slice(start, start + step))
        for whole, part in zip(results, found, strict=True):
            if whole is not None and part is not None and whole is not part and whole.shape[-2] == length:
                whole[..., start : start + step, :] = part
    return tuple(results)


def _fused(
    query: Tensor, tokens: Tokens, added: Sequence[Tensor | None], scale: float, dropout_p: float, alive: Tensor | None
) -> Tensor:
    """Attend to each set through the kernel, and add up what they give beyond a value that all share.

    Softmaxes add up as differences from a common value, so that half precision rounds the differences alone.
    """
    values, centre, total = tokens.split(tokens.value), None, None
    if dropout_p == 0 and (len(values) > 1 or tokens.sets[0].coefficient != 1):
        constant = [value for each, value in zip(tokens.sets, values, strict=True) if each.constant]
        centre = constant[0] if constant else tokens.value.mean(-2, keepdim=True)
        values = tokens.split(tokens.value - centre)
    for each, key, value, bias in zip(tokens.sets, tokens.split(tokens.key), values, added, strict=True):
        if centre is not None and each.constant:  # it gives the common value
            continue
        if bias is not None:
            if bias.dtype != query.dtype:  # half precision would round the logarithm of a large count
                bias = bias - bias.amax(-1, keepdim=True).clamp_min(torch.finfo(bias.dtype).min)
            bias = bias.to(query.dtype)
        elif query.device.type == "cpu" and not torch.compiler.is_compiling():
            times = math.ceil(LANES / key.shape[-2])  # tokens count alike, as often as they may be there
            key, value = _Repeated.apply(key, times), _Repeated.apply(value, times)
        dropped = 0.0 if each.constant else dropout_p
        part = _attention(query, key.to(query.dtype), value.to(query.dtype), bias, scale, dropped)
        part = part if each.coefficient == 1 else part * each.coefficient
        total = part if total is None else total + part
    assert total is not None
    if centre is not None:
        count = sum([each.coefficient for each in tokens.sets])
        total = total + (centre if count == 1 else count * centre).to(total.dtype)
    if alive is None:
        return total
    total = total + _nan_of(query, tokens.key) if query.device.type == "cpu" else total
    return torch.where(alive, total, 0.0)


class _Repeated(torch.autograd.Function):
    """Tokens put several times behind each other, by the same operations however often."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tokens: Tensor, times: int) -> Tensor:
        return tokens.repeat(*(1,) * (tokens.dim() - 2), times, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.times = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        *batch, length, dim = grad.shape
        return grad.reshape(*batch, ctx.times, length // ctx.times, dim).sum(-3), None

    @staticmethod
    def jvp(ctx: Any, tokens: Tensor, _: None) -> Tensor:
        return _Repeated.apply(tokens, ctx.times)


@torch.no_grad()
def _nan_of(query: Tensor, key: Tensor) -> Tensor:
    """Return NaN for queries that are NaN or meet such a key, else zero, ``(*batch, L, 1)``: see `LANES`."""
    nothing = key.detach().clamp(0.0, 0.0).sum(-2, keepdim=True)  # NaN stays, all else is zero
    return (query.detach() * nothing.to(query.dtype)).sum(-1, keepdim=True)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    """Softmax attention to one set, unchecked, of tensors of one type."""
    tensors = (query, key, value) if bias is None else (query, key, value, bias)
    if is_recorded() or dropout_p > 0 or not is_transformed(*tensors):
        return _kernel(query, key, value, bias, scale, dropout_p)
    with torch.no_grad():
        transformed = is_transformed()  # by torch.func, or forwards
    if transformed:
        return _Attention.apply(query, key, value, bias, scale)
    return _TwiceDifferentiable.apply(_kernel(query, key, value, bias, scale), query, key, value, bias, scale)


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """Call the kernel, fused for two batch dimensions, contiguous channels, and as many in keys as in values."""
    batch, dim = query.shape[:-2], value.shape[-1]
    missing = query.shape[-1] - dim
    if missing > 0:
        value = F.pad(value, (0, missing))
    elif missing < 0:
        query, key = F.pad(query, (0, -missing)), F.pad(key, (0, -missing))

    def four(tensor: Tensor) -> Tensor:
        if len(batch) > 2:
            return tensor.expand(*batch, *tensor.shape[-2:]).flatten(0, -4)
        return tensor[(None,) * (4 - tensor.dim())]

    query, key, value = [four(each if each.stride(-1) == 1 else each.contiguous()) for each in (query, key, value)]
    mask = None if bias is None else four(bias)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    output = output[..., :dim] if missing > 0 else output
    return output.reshape(*batch, *output.shape[-2:]) if len(batch) != 2 else output


class _TwiceDifferentiable(torch.autograd.Function):
    """Pass on what the kernel gives; a backward pass that is to be differentiated itself goes around the kernel."""

    @staticmethod
    def forward(output: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias = ctx.saved_tensors  # read in any case, so that a checkpoint keeps them no longer
        if not torch.is_grad_enabled():
            return grad, None, None, None, None, None
        return None, *_gradients(query, key, value, bias, ctx.scale, grad), None


class _Attention(torch.autograd.Function):
    """The kernel with all derivatives written out, for forward ones and the transforms of `torch.func`."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        return _kernel(query, key, value, bias, scale).clone()  # no view, whose tangent would have to be one

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias = ctx.saved_tensors
        return *_gradients(query, key, value, bias, ctx.scale, grad), None

    @staticmethod
    def jvp(ctx: Any, query_t: Any, key_t: Any, value_t: Any, bias_t: Any, *_: None) -> Tensor:
        query, key, value, bias = ctx.saved_tensors
        weights = _weights(query, key, bias, ctx.scale)
        of_logits = ctx.scale * (query_t @ key.mT + query @ key_t.mT)
        of_logits = of_logits if bias_t is None else of_logits + bias_t
        of_weights = weights * (of_logits - (of_logits * weights).sum(-1, keepdim=True))
        return of_weights @ value + weights @ value_t

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        """Take what is mapped over as a batch dimension; a generated rule would call the kernel for each entry."""
        moved: list[Any] = [
            tensor
            if tensor is None
            else tensor.expand(info.batch_size, *tensor.shape)
            if dim is None
            else tensor.movedim(dim, 0)
            for tensor, dim in zip(inputs[:4], in_dims, strict=False)
        ]
        query, key, value, bias = moved
        if bias is not None:
            bias = bias[(slice(None), *(None,) * (query.dim() - bias.dim()))]
        return _Attention.apply(query, key, value, bias, inputs[4]), 0


def _gradients(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Write out the derivatives of the kernel by queries, keys, values and bias."""
    weights, grad = _weights(query, key, bias, scale), grad.to(query.dtype)  # the kernel has its own under autocast
    of_weights = grad @ value.mT
    of_logits = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
    of_bias = None if bias is None else of_logits.sum_to_size(bias.shape)
    return of_logits @ key * scale, of_logits.mT @ query * scale, weights.mT @ grad, of_bias


def _weights(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Write out the attention weights ``(*batch, L, S)``; zeros for a query that sees nothing."""
    logits = (query * scale) @ key.mT
    if bias is None:
        return torch.softmax(logits, -1)
    logits = logits + bias
    present = logits.amax(-1, keepdim=True) > -math.inf
    return torch.softmax(torch.where(present, logits, 0.0), -1) * present


def _explicit(
    query: Tensor, tokens: Tokens, added: Sequence[Tensor | None], scale: float, dropout_p: float, alive: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Attend to all sets by one product with the keys and one with the values."""
    dtype = accumulation_dtype(query.dtype)
    logits = matmul(query.to(dtype) * scale, tokens.key.to(dtype).mT)
    weights, signed, lse = [], [], logits.new_zeros(())
    for each, part, bias in zip(tokens.sets, tokens.split(logits, -1), added, strict=True):
        part = part if bias is None else part + bias
        if alive is not None:
            part = torch.where(alive, part, 0.0)  # a softmax over nothing would be NaN
        weight, term = torch.softmax(part, -1), torch.logsumexp(part, -1, keepdim=True)
        if tokens.log_weight is None:
            term = term + part.new_full((), each.multiplicity).log()
        lse = lse + each.coefficient * term
        dropped = F.dropout(weight, dropout_p) if dropout_p > 0 and not each.constant else weight
        signed.append(dropped if each.coefficient == 1 else dropped * each.coefficient)
        weights.append(weight)
    output = matmul(signed[0] if len(signed) == 1 else torch.cat(signed, -1), tokens.value.to(dtype))
    if alive is not None:
        output, lse = torch.where(alive, output, 0.0), torch.where(alive, lse, -math.inf)
        weights = [weight * alive for weight in weights]
    return output.to(query.dtype), lse, weights


@retells
def merge_attention(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    r"""Join the attention of the same queries to several sets of tokens, exactly.

    .. math:: o = \sum_p e^{L_p - L} o_p, \qquad L = \log \sum_p e^{L_p}

    is attention to all sets together, where :math:`o_p` and :math:`L_p` are output and log-sum-exp of each: class and
    register tokens, a second tensor, memory. Where all parts are empty, the output is zero.

    Args:
        parts: Output and log-sum-exp of each set, pairs or results of an operator with ``return_lse=True``.

    Returns:
        Output, in the type of the first, and log-sum-exp of the union.

    Raises:
        ShapeError: If there is no part, one is no pair, or shapes disagree.
        DtypeError: If an output or a log-sum-exp is no tensor of a floating-point type.

    Shape:
        - outputs: :math:`(*, D_v)`, log-sum-exps: :math:`(*)`

    Examples:
        >>> import torch, tensorattn as ta
        >>> q, k = torch.randn(5, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
        >>> halves = [ta.flattened_attention(q, part, part, order=1, return_lse=True) for part in k.split(3)]
        >>> output, lse = ta.merge_attention([(half.output, half.lse) for half in halves])
        >>> torch.allclose(output, ta.flattened_attention(q, k, k, order=1))
        True
    """
    if not isinstance(parts, Iterable):
        raise ShapeError(f"parts must hold outputs with their log-sum-exps, got {parts!r}.")
    pairs = []
    for place, part in enumerate(parts):
        if not isinstance(part, (tuple, list)) or len(part) < 2:
            raise ShapeError(f"parts[{place}] must be an output and its log-sum-exp, got {type(part).__name__}.")
        check_floating(**{f"the output of parts[{place}]": part[0]})
        check_floating(**{f"the log-sum-exp of parts[{place}]": part[1]})
        pairs.append((part[0], part[1]))
    if not pairs:
        raise ShapeError("parts is empty, but at least one output with its log-sum-exp is needed.")
    for place, (output, lse) in enumerate(pairs):
        if output.shape != pairs[0][0].shape:
            shapes = tuple(pairs[0][0].shape), tuple(output.shape)
            raise ShapeError(f"outputs have shape {shapes[0]} in parts[0] but {shapes[1]} in parts[{place}].")
        if output.shape[:-1] != lse.shape:
            shapes = tuple(output.shape), tuple(lse.shape)
            raise ShapeError(f"parts[{place}] has output {shapes[0]} but log-sum-exp {shapes[1]}.")
    lses = torch.stack([lse for _, lse in pairs], -1)
    present = lses.amax(-1, keepdim=True) > -math.inf
    safe = torch.where(present, lses, 0.0)
    shares = torch.softmax(safe, -1) * present
    output = functools.reduce(torch.add, (o.to(lses.dtype) * shares[..., p, None] for p, (o, _) in enumerate(pairs)))
    lse = torch.where(present.squeeze(-1), torch.logsumexp(safe, -1), -math.inf)
    return output.to(pairs[0][0].dtype), lse
