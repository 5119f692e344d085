"""Noise of the same law at every position, added to an additive tensor, tilts attention by a fixed vector.

For keys and values x_j = (additive) + ξ_j with independent ξ_j of one law, full attention tends to additive attention
plus
E[exp(s q·ξ) ξ] / E[exp(s q·ξ)] − E[ξ] as the grid grows, whatever the law. For Gaussian noise that is the interaction
correction; for skewed noise it is not, and no covariance can replace it.
"""

import pytest
import torch

import tensorattn as ta

SEEDS = range(8)
DIM = 4


def errors(size, exact, seed):
    """Error of additive attention plus a tilt: that of the law, or the Gaussian one; noise is exponential."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    rows, columns = torch.randn(size, 1, DIM, **draw), torch.randn(size, DIM, **draw)
    noise = -torch.rand(size, size, DIM, **draw).log()  # exponential of rate 1: tilted by t its mean is 1 / (1 − t)
    x = (rows + columns) / 2 + noise
    query = 0.6 * (2 * torch.rand(64, DIM, **draw) - 1)
    additive = ta.additive_attention(query, x, x, order=2, scale=1.0)
    tilt = 1 / (1 - query) - 1 if exact else query
    truth = ta.flattened_attention(query, x, x, order=2, scale=1.0)
    return (additive + tilt - truth).square().mean()


def rms(size, exact):
    """Root mean square over the seeds."""
    return torch.stack([errors(size, exact, seed) for seed in SEEDS]).mean().sqrt().item()


@pytest.mark.thorough
def test_the_gaussian_tilt_is_not_the_limit_of_skewed_noise():
    assert rms(128, exact=False) > 0.8 * rms(32, exact=False)
    assert rms(128, exact=False) > 3 * rms(128, exact=True)


def test_the_interaction_correction_is_not_the_limit_of_skewed_noise_either():
    generator = torch.Generator().manual_seed(0)
    noise = -torch.rand(128, 128, DIM, generator=generator, dtype=torch.float64).log()
    query = torch.full((1, DIM), 0.5, dtype=torch.float64)
    options = {"order": 2, "scale": 1.0}
    corrected = ta.additive_attention(query, noise, noise, interaction="linear", saturation=None, **options)
    truth = ta.flattened_attention(query, noise, noise, **options)
    assert (truth - corrected).mean() > 0.3  # 1 / (1 − ½) − 1 is 1, the Gaussian tilt ½
