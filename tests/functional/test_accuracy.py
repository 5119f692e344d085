"""How close `clustered` comes to full attention on recordings. The table: pytest -m thorough -s tests/functional/test_accuracy.py

Nothing is trained: queries, keys and values are those of the command `attend`. All numbers are centred errors.
"""

from __future__ import annotations

import itertools
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from tensorattn.cli.embedding import choose_patch, embed
from tensorattn.cli.recordings import load, sample_video, sample_volume
from tensorattn.diagnose import error_estimate

pytestmark = pytest.mark.thorough
STDS = (0.25, 1.0, 2.0, 4.0)


def nifti(name):
    return load(Path(str(files("nibabel") / "tests" / "data" / name))).array


def picture(name):
    image = pytest.importorskip("PIL.Image")
    folder = pytest.importorskip("skimage").data_dir
    return np.asarray(image.open(Path(folder) / name).convert("RGB")).astype(np.float32)


def elevation():
    folder = pytest.importorskip("matplotlib").get_data_path()
    return np.load(Path(folder) / "sample_data" / "jacksboro_fault_dem.npz")["elevation"].astype(np.float32)[..., None]


# A recording, the sizes of a patch, and the largest error allowed with 64 tokens at each width of the logits.
RECORDINGS = {
    "echocardiogram": (lambda: sample_video().array, (2, 2, 2), (0.001, 0.004, 0.03, 0.08)),
    "brain": (lambda: sample_volume().array, (2, 2, 2), (0.001, 0.0015, 0.015, 0.06)),
    "functional.nii": (lambda: nifti("functional.nii"), None, (None, 0.001, None, None)),
    "anatomical.nii": (lambda: nifti("anatomical.nii"), None, (None, 0.001, None, None)),
    "astronaut": (lambda: picture("astronaut.png"), None, (None, 0.007, None, None)),
    "coffee": (lambda: picture("coffee.png"), None, (None, 0.012, None, None)),
    "elevation": (elevation, (2, 2), (None, 0.005, None, 0.03)),
}


def errors(array, patch, std, seed, **options):
    patch = patch or choose_patch(array.shape[:-1], 100_000)
    query, key, value, scale = embed(array, patch, dim=64, heads=4, logit_std=std, seed=seed)
    sampled = torch.Generator().manual_seed(seed)
    order = key.dim() - 2
    return error_estimate("clustered", query, key, value, order=order, scale=scale, generator=sampled, **options)


@pytest.mark.parametrize("name", RECORDINGS)
def test_is_close_to_full_attention(name):
    read, patch, limits = RECORDINGS[name]
    array, found = read(), []
    for std in STDS:
        found.append(errors(array, patch, std, 0, tokens=64))
    print(f"\n{name:16}", *(f"std {s:g}: {e.error:.4f} (ρ {e.rho:.3f})" for s, e in zip(STDS, found, strict=True)))
    for estimate, limit in zip(found, limits, strict=True):
        assert limit is None or estimate.error <= limit


@pytest.mark.parametrize("name", ["echocardiogram", "brain"])
def test_whatever_the_maps(name):
    read, patch, _ = RECORDINGS[name]
    array = read()
    for seed in range(1, 6):
        found = [errors(array, patch, std, seed, tokens=64).error for std in STDS[1:]]
        print(
            f"\n{name:16} seed {seed}", *(f"std {s:g}: {e:.4f}" for s, e in zip(STDS[1:], found, strict=True)), end=""
        )
        assert all(error <= limit for error, limit in zip(found, (0.006, 0.04, 0.15), strict=True))


@pytest.mark.parametrize(
    ("name", "limits"), [("brain", (0.012, 0.09, 0.2)), ("echocardiogram", (0.04, 0.14, 0.26))], ids=str
)
def test_of_blocks(name, limits):
    read, patch, _ = RECORDINGS[name]
    array = read()
    found = [errors(array, patch, std, 0, tokens=64, cells="blocks").error for std in STDS[:3]]
    print(f"\n{name:16} 64 blocks", *(f"std {s:g}: {e:.4f}" for s, e in zip(STDS, found, strict=False)))
    assert all(error <= limit for error, limit in zip(found, limits, strict=True))


@pytest.mark.parametrize("name", ["brain", "anatomical.nii", "elevation"])
def test_falls_with_the_number_of_tokens(name):
    read, patch, _ = RECORDINGS[name]
    array, counts = read(), (8, 16, 32, 64, 128, 256)
    found = [errors(array, patch, 1.0, 0, tokens=tokens).error for tokens in counts]
    print(f"\n{name:16}", *(f"{tokens}: {e:.4f}" for tokens, e in zip(counts, found, strict=True)))
    assert all(more < fewer for fewer, more in itertools.pairwise(found))
