"""Noise that is not Gaussian: no covariance stands for its tilted mean, which the theorems say is the limit."""

import torch

import tensorattn as ta

DIM = 4


def rms(size, tilted):
    """Root mean square error of additive attention plus a tilt on exponential noise of rate 1."""
    squares = []
    for seed in range(4):
        draw = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
        rows, columns = torch.randn(size, 1, DIM, **draw), torch.randn(size, DIM, **draw)
        x = (rows + columns) / 2 - torch.rand(size, size, DIM, **draw).log()
        query = 0.6 * (2 * torch.rand(64, DIM, **draw) - 1)
        additive, truth = (f(query, x, x, order=2, scale=1.0) for f in (ta.additive_attention, ta.flattened_attention))
        squares.append((additive + tilted(query) - truth).square().mean())
    return torch.stack(squares).mean().sqrt().item()


def test_the_gaussian_tilt_is_not_the_limit_of_skewed_noise():
    gaussian = rms(96, lambda query: query)
    assert gaussian > 0.8 * rms(32, lambda query: query)
    assert gaussian > 2 * rms(96, lambda query: 1 / (1 - query) - 1)


def test_the_interaction_correction_is_not_the_limit_of_skewed_noise_either():
    generator = torch.Generator().manual_seed(0)
    noise = -torch.rand(128, 128, DIM, generator=generator, dtype=torch.float64).log()
    query, options = torch.full((1, DIM), 0.5, dtype=torch.float64), {"order": 2, "scale": 1.0}
    corrected = ta.additive_attention(query, noise, noise, interaction="linear", saturation=None, **options)
    truth = ta.flattened_attention(query, noise, noise, **options)
    assert (truth - corrected).mean() > 0.3  # 1 / (1 − ½) − 1 is 1, the Gaussian tilt ½
