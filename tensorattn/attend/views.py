"""Views: what one query attends to, under full attention and under every operator that tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensorattn.attend.choices import Choice, parse_choice
from tensorattn.attend.embedding import Tokens
from tensorattn.attend.figures import Place, input_figure, maps_figure, weights_figure
from tensorattn.attend.recordings import Recording
from tensorattn.errors import OptionError
from tensorattn.operators.maps import attention_map

__all__ = ["choose_query", "draw"]

FULL = parse_choice("flattened")

Array = np.ndarray[Any, Any]


def choose_query(text: str | None, sizes: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Return the patch that holds the query to draw: the one in the middle, or the one the user points at.

    Args:
        text: One index a mode, in elements of the recording, or None.
        sizes: Sizes of the modes.
        patch: Sizes of a patch.

    Raises:
        OptionError: If there is not one index a mode, or one lies outside.

    Examples:
        >>> choose_query(None, (30, 240, 320), (1, 2, 2)), choose_query("0, 239, 17", (30, 240, 320), (1, 2, 2))
        ((15, 60, 80), (0, 119, 8))
    """
    if text is None:
        return tuple(-(-size // part) // 2 for size, part in zip(sizes, patch, strict=True))
    parts = text.replace(",", " ").split()
    if len(parts) != len(sizes) or not all(part.isascii() and part.isdigit() for part in parts):
        raise OptionError(f"--query must be {len(sizes)} whole numbers, one index a mode, got {text!r}.")
    for mode, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        if int(part) >= size:
            raise OptionError(f"--query has index {part} in mode {mode}, but its size is {size}.")
    return tuple(int(part) // p for part, p in zip(parts, patch, strict=True))


def _attention(choice: Choice, query: Tensor, tokens: Tokens) -> tuple[Tensor, ...]:
    """Return the attention of one query, without the dimension that counts queries."""
    call = choice.bind(order=tokens.key.ndim - 2, scale=tokens.scale)
    result = call(query, tokens.key, tokens.value, return_attention=True)
    return tuple(weights.squeeze(1) for weights in result.attention)


def _mode_weights(choices: Sequence[Choice], query: Tensor, tokens: Tokens) -> dict[str, list[Array]]:
    """Return the weights ``(H, n_m)`` along each mode, of every operator that gives one vector a mode."""
    wanted = [(tokens.key.shape[0], size) for size in tokens.key.shape[1:-1]]
    plain = [choice.record for choice in choices if not choice.options]
    found = {}
    for choice in choices:
        repeated = choice.options and choice.record in plain  # options change the output around the same weights
        if repeated or not choice.any_positions or choice.record is FULL.record:
            continue
        try:
            attention = _attention(choice, query, tokens)
        except OptionError:  # its attention is no set of weights
            continue
        if [tuple(weights.shape) for weights in attention] == wanted:
            found[choice.label] = [weights.numpy() for weights in attention]
    return found


def sharpest_head(attention: Array) -> int:
    """Return the head whose attention is farthest from uniform: the one of least entropy.

    Args:
        attention: Weights ``(H, n_1, …, n_N)``, each head summing to one.

    Examples:
        >>> sharpest_head(np.array([[0.5, 0.5], [1.0, 0.0], [0.9, 0.1]]))
        1
    """
    flat = attention.reshape(attention.shape[0], -1).astype(np.float64)
    return int(np.argmax((flat * np.log(np.maximum(flat, 1e-300))).sum(axis=1)))


def draw(recording: Recording, place: Place, tokens: Tokens, choices: Sequence[Choice]) -> Mapping[str, Any]:
    """Draw the figures of one recording.

    Args:
        recording: What was read.
        place: Where the query is.
        tokens: Its queries, keys and values.
        choices: Operators, of which those are drawn that attend with one vector of weights a mode.

    Returns:
        Figures by file name.
    """
    token = int(np.ravel_multi_index(place.query, tokens.query.shape[1:-1]))
    query = tokens.query.flatten(1, -2)[:, token : token + 1]
    exact = _attention(FULL, query, tokens)[0].numpy()
    weights = _mode_weights(choices, query, tokens)
    head = sharpest_head(exact)
    maps: dict[str, Array] = {"exact attention": exact[head]}
    drawn: dict[str, tuple[list[str], Array]] = {}
    by_label = {choice.label: choice for choice in choices}
    for name, each in weights.items():
        of_head, choice = [torch.from_numpy(vectors[head]) for vectors in each], by_label[name]
        spread = attention_map(of_head, exact.shape[1:], operator=choice.record.name, **choice.options).numpy()
        same = next((key for key, (_, other) in drawn.items() if np.allclose(spread, other, rtol=1e-3, atol=0)), name)
        drawn.setdefault(same, ([], spread))[0].append(name)
    for alike, spread in drawn.values():
        maps[", ".join(alike)] = spread
    heads = exact.shape[0]
    which = f"head {head + 1}" + (f", the sharpest of {heads}" if heads > 1 else "")
    return {
        f"{recording.name}-input.png": input_figure(recording, place),
        f"{recording.name}-weights.png": weights_figure(recording, place, exact, weights),
        f"{recording.name}-maps.png": maps_figure(recording, place, which, maps),
    }
