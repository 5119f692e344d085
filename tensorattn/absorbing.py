"""When one head is better off with its linear maps absorbed in the averages: what layers do and costs know.

A map of queries and one of outputs take four operations a position for each pair of channels; absorbed, they take them
once an average. A bias of queries becomes one of logits, which takes time in the softmax.
"""

from __future__ import annotations

__all__ = ["absorbing_pays"]

SAVED = 1 << 22  # pairs of channels, all positions together, that repay the calls it takes
WIDE = 64  # channels from which on the maps of a position take longer than a bias of its logits


def absorbing_pays(positions: int, tokens: int, dim: int, *, biased: bool) -> bool:
    """Tell whether it does.

    Args:
        positions: Positions of a batch entry that queries are made of.
        tokens: Averages of a batch entry that they attend to.
        dim: Channels.
        biased: Whether queries have a bias.

    Examples:
        >>> absorbing_pays(16 * 56 * 56, 16 + 56 + 56, 96, biased=True), absorbing_pays(14 * 14, 28, 64, biased=True)
        (True, False)
    """
    return (positions - tokens) * dim**2 >= SAVED and (dim >= WIDE or not biased)
