"""Running summaries: absent frames are never looked at, whatever they hold."""

from __future__ import annotations

import pytest
import torch
from test_nn import CLOSE, draw, make

from tensorattn.testing.variants import variants


@pytest.mark.parametrize("variant", [v for v in variants() if "causal" not in v.operator.lacks], ids=str)
@pytest.mark.parametrize("absent", [0, 1, 3])
def test_absent_frames_may_hold_anything(variant, absent):
    layer, x = make(variant, "t h", causal="t"), draw(2, 4, 3, 8)
    weights = [torch.ones(4, dtype=torch.float64).index_fill(0, torch.tensor(absent), 0), None]
    there = [frame for frame in range(4) if frame != absent]
    poisoned = x.clone()
    poisoned[:, absent] = torch.nan
    torch.testing.assert_close(layer(poisoned, weights=weights)[:, there], layer(x, weights=weights)[:, there], **CLOSE)
    torch.testing.assert_close(layer(poisoned, weights=weights)[:, there], layer(x[:, there]), **CLOSE)
