"""Patches and the embedding: nothing lost, nothing invented, any order, and logits as wide as asked for."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensorattn.cli.embedding import _patches, choose_patch, embed, grid_of, logit_scale, patchify
from tensorattn.cli.recordings import RecordingError


@st.composite
def cuts(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, ...]]:
    """An array of order 1 to 6 with channels, every entry different, and a patch."""
    order = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, 5 if order < 4 else 3), min_size=order, max_size=order))
    patch = tuple(draw(st.integers(1, size + 1)) for size in sizes)
    channels = draw(st.integers(1, 3))
    return np.arange(np.prod(sizes) * channels).reshape(*sizes, channels), patch


@given(cuts())
def test_patches_hold_what_a_loop_finds(cut: tuple[np.ndarray, tuple[int, ...]]) -> None:
    array, patch = cut
    sizes = array.shape[:-1]
    found = patchify(array, patch)
    assert found.shape == (*grid_of(sizes, patch), np.prod(patch) * array.shape[-1])
    for corner in itertools.product(*map(range, found.shape[:-1])):
        expected = [
            array[tuple(min(c * p + o, n - 1) for c, p, o, n in zip(corner, patch, offset, sizes, strict=True))]
            for offset in itertools.product(*map(range, patch))
        ]
        np.testing.assert_array_equal(found[corner], np.concatenate(expected))


@pytest.mark.parametrize("elements", [1, 40, 100, 1000])
@pytest.mark.parametrize("dtype", ["uint8", "float16", ">f8", "longdouble"])
def test_cutting_some_rows_at_a_time_is_cutting_at_once(elements: int, dtype: str) -> None:
    array = np.arange(7 * 5 * 2).reshape(7, 5, 2).astype(dtype)
    pieces = torch.cat(list(_patches(array, (2, 3), elements)))
    assert pieces.dtype == torch.float64
    np.testing.assert_array_equal(pieces.numpy(), patchify(array, (2, 3)).reshape(-1, 12))


@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.integers(1, 10**6))
def test_a_chosen_patch_leaves_few_enough_positions(sizes: list[int], most: int) -> None:
    patch = choose_patch(sizes, most)
    assert all(part.bit_count() == 1 for part in patch)
    assert math.prod(grid_of(sizes, patch)) <= most
    assert max(patch) == 1 or math.prod(sizes) > most


def test_short_modes_stay_whole() -> None:
    assert choose_patch((3, 1000, 1000), 100_000) == (1, 8, 4)


# ---- embedding -----------------------------------------------------------------------------------------------


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize("order", range(1, 7))
def test_tokens_have_the_grid_of_the_patches(order: int) -> None:
    tokens = embed(noise(*(5,) * order, 2), (2,) * order, dim=12, heads=3, logit_std=1.0, seed=0)
    for each in tokens[:3]:
        assert each.shape == (3, *(3,) * order, 4)
        assert each.isfinite().all() and each.is_contiguous()


@pytest.mark.parametrize("logit_std", [0.25, 1.0, 4.0])
def test_logits_have_the_standard_deviation_asked_for(logit_std: float) -> None:
    query, key, _, scale = embed(noise(6, 7, 3), (1, 1), dim=32, heads=4, logit_std=logit_std, seed=1)
    logits = scale * query.flatten(1, -2) @ key.flatten(1, -2).mT
    assert logits.var(dim=-1, correction=0).mean().sqrt().item() == pytest.approx(logit_std, rel=1e-4)


def test_the_scale_does_not_see_what_all_keys_share() -> None:
    query, key = torch.randn(2, 2, 50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert logit_scale(query, key + 3, 1.0) == pytest.approx(logit_scale(query, key, 1.0))


def test_the_seed_decides() -> None:
    first, again, other = (embed(noise(4, 5, 1), (1, 1), dim=8, heads=2, logit_std=1.0, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.query, again.query) and not torch.equal(first.query, other.query)


def test_units_do_not_matter() -> None:
    array = np.random.default_rng(0).integers(0, 100, (6, 8, 2))
    plain = embed(array, (2, 2), dim=8, heads=2, logit_std=1.0, seed=0)
    scaled = embed(array * 1e6 + 1e9, (2, 2), dim=8, heads=2, logit_std=1.0, seed=0)
    torch.testing.assert_close(plain.key, scaled.key, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("offset", "factor"), [(1e12, 1.0), (101325.0, 1e-6), (0.0, 1e-300)])
def test_small_changes_of_large_numbers_are_seen(offset: float, factor: float) -> None:
    numbers = np.random.default_rng(0).random((6, 8, 1))
    plain, moved = (
        embed(each, (1, 1), dim=8, heads=2, logit_std=1.0, seed=0) for each in (numbers, offset + factor * numbers)
    )
    torch.testing.assert_close(plain.key, moved.key, rtol=1e-2, atol=1e-3)


def test_brightness_survives_layer_normalisation_with_one_number_a_patch() -> None:
    _, key, _, _ = embed(np.linspace(0, 1, 9)[:, None], (1,), dim=16, heads=1, logit_std=1.0, seed=0)
    distances = (key[0, 1:] - key[0, :-1]).norm(dim=-1)
    assert distances.min() > 0.01 * distances.max()


def test_entries_that_never_change_are_harmless() -> None:
    array = noise(5, 6, 3)
    array[..., 1] = 7.0
    assert embed(array, (1, 1), dim=8, heads=2, logit_std=1.0, seed=0).key.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 5, 1e9, True])
def test_a_constant_recording_is_refused(value: float) -> None:
    with pytest.raises(RecordingError, match=r"^every patch is the same to double precision"):
        embed(np.full((4, 5, 1), value), (2, 2), dim=8, heads=2, logit_std=1.0, seed=0)
