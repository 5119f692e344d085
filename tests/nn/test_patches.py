"""Patches as modules: what they hold, the way back, padding and cropping, layouts, types, tools of torch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from modules import MISSING, by_way_of_meta, draw, reading, refused
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import tensorattn as ta
from tensorattn.cli.embedding import patchify
from tensorattn.errors import DtypeError, ModesError, OptionError, ShapeError
from tensorattn.nn.patches import grid_of
from tensorattn.testing.strategies import mode_sizes

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
KINDS = [ta.PatchEmbedding, ta.PatchUnembedding]

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def make(kind, channels, out, patch, dtype=torch.float64, **settings):
    """A module with a bias, always the same."""
    module = kind(channels, out, patch, dtype=dtype, **settings)
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed))
    return module


def identity(channels, patch, modes, **settings):
    """Embedding and unembedding that keep every number of a patch."""
    count = channels
    for part in patch:
        count *= part
    pair = (
        ta.PatchEmbedding(channels, count, patch, modes=modes, dtype=torch.float64, pad=True, **settings),
        ta.PatchUnembedding(count, channels, patch, modes=modes, dtype=torch.float64, **settings),
    )
    with torch.no_grad():
        for module in pair:
            module.proj.weight.copy_(torch.eye(count))
    return pair


@given(mode_sizes(max_order=6, max_size=5), st.data())
def test_a_patch_is_what_the_command_line_cuts(sizes, data):
    """For every order, with sizes divisible or not: the numbers of a patch, mapped linearly."""
    patch = tuple(data.draw(st.integers(1, size + 1)) for size in sizes)
    channels = data.draw(st.integers(1, 3))
    module = make(ta.PatchEmbedding, channels, 4, patch, modes=len(sizes), pad=True)
    x = draw(2, *sizes, channels)
    expected = torch.stack([torch.from_numpy(patchify(sample.numpy(), patch)) for sample in x])
    torch.testing.assert_close(module(x), F.linear(expected, module.proj.weight, module.proj.bias), **CLOSE)


@given(mode_sizes(max_order=6, max_size=5), st.data())
def test_there_and_back(sizes, data):
    patch = tuple(data.draw(st.integers(1, size + 1)) for size in sizes)
    first = data.draw(st.booleans())
    embedding, unembedding = identity(2, patch, len(sizes), channels_first=first)
    x = draw(2, *sizes, 2)
    x = x.movedim(-1, 1) if first else x
    torch.testing.assert_close(unembedding(embedding(x), sizes=sizes), x, rtol=0, atol=0)
    whole = unembedding(embedding(x))
    spatial = whole.shape[2:] if first else whole.shape[1:-1]
    assert tuple(spatial) == tuple(n * p for n, p in zip(grid_of(sizes, patch), patch, strict=True))
    same = whole[(slice(None), *[slice(None)] * first, *(slice(0, n) for n in sizes))]
    torch.testing.assert_close(same, x, rtol=0, atol=0)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_is_a_convolution_whose_stride_is_its_kernel(order):
    patch, sizes = (2, 3, 1)[:order], (4, 9, 5)[:order]
    module = make(ta.PatchEmbedding, 3, 5, patch, modes=order, channels_first=True)
    weight = module.proj.weight.unflatten(1, (*patch, 3)).movedim(-1, 1)
    x = draw(2, 3, *sizes)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[order - 1]
    torch.testing.assert_close(module(x), convolution(x, weight, module.proj.bias, stride=patch), **CLOSE)


@pytest.mark.thorough
@pytest.mark.parametrize("order", range(1, 9))
def test_every_order(order):
    sizes = tuple(2 if mode % 3 else 1 for mode in range(order))
    patch = tuple(2 if mode % 2 and size == 2 else 1 for mode, size in enumerate(sizes))
    x = draw(2, *sizes, 3)
    last, first = (make(ta.PatchEmbedding, 3, 5, patch, modes=order, channels_first=first) for first in (False, True))
    y = last(x)
    assert y.shape == (2, *grid_of(sizes, patch), 5)
    torch.testing.assert_close(first(x.movedim(-1, 1)), y.movedim(-1, 1), **CLOSE)
    back, ahead = (make(ta.PatchUnembedding, 5, 3, patch, modes=order, channels_first=first) for first in (False, True))
    assert back(y).shape == x.shape
    torch.testing.assert_close(ahead(y.movedim(-1, 1)), back(y).movedim(-1, 1), **CLOSE)
    assert last(x[:0]).shape == (0, *y.shape[1:]) and back(y[:0]).shape == (0, *x.shape[1:])


def test_padding_repeats_the_last_index():
    embedding, _ = identity(1, (2, 3), 2)
    x = torch.arange(12, dtype=torch.float64).reshape(1, 3, 4, 1)
    assert embedding(x)[0, 1, 1].tolist() == [11.0] * 6
    assert embedding(x)[0, 0, 1].tolist() == [3.0] * 3 + [7.0] * 3
    padded = make(ta.PatchEmbedding, 1, 2, (2, 3), modes=2, pad=True)
    plain = make(ta.PatchEmbedding, 1, 2, (2, 3), modes=2)
    torch.testing.assert_close(padded(draw(2, 4, 6, 1)), plain(draw(2, 4, 6, 1)), rtol=0, atol=0)


def test_ways_to_give_a_patch():
    for patch in ((1, 8, 8), [1, 8, 8], {"h": 8, "w": 8}, {1: 8, -1: 8}):
        assert ta.PatchEmbedding(3, 8, patch, modes="t h w").patch == (1, 8, 8)
        assert ta.PatchUnembedding(8, 3, patch, modes="t h w").patch == (1, 8, 8)
    assert ta.PatchEmbedding(3, 8, 4, modes=2).patch == (4, 4)


def test_gradients():
    embedding = make(ta.PatchEmbedding, 2, 3, (2, 3), modes=2, pad=True, channels_first=True)
    unembedding = make(ta.PatchUnembedding, 3, 2, (2, 3), modes=2, channels_first=True)
    x = draw(2, 2, 3, 4).requires_grad_()
    run = lambda x: unembedding(embedding(x).sin(), sizes=(3, 4))  # noqa: E731
    assert torch.autograd.gradcheck(run, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x,), fast_mode=True)
    run(x).sum().backward()
    for parameter in (*embedding.parameters(), *unembedding.parameters()):
        assert parameter.grad.abs().max() > 0


@every_kind
class TestBoth:
    def test_state_and_copies(self, kind):
        module, x = make(kind, 4, 6, (1, 2), modes="t h").eval(), draw(2, 3, 4, 4)
        assert list(module.state_dict()) == ["proj.weight", "proj.bias"]
        assert list(kind(4, 6, 2, modes=2, bias=False).state_dict()) == ["proj.weight"]
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert repr(twin) == repr(module)
            assert twin.training is False
            assert torch.equal(twin(x), module(x))

    def test_drawn_anew(self, kind):
        module = kind(48, 64, 1, modes=2)
        before = module.proj.weight.clone()
        with torch.no_grad():
            module.proj.bias.fill_(7)
        module.reset_parameters()
        assert module.proj.bias.eq(0).all()
        assert not torch.equal(before, module.proj.weight)
        assert abs(module.proj.weight.std() / (2 / 112) ** 0.5 - 1) < 0.1

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, kind, dtype):
        module, x = make(kind, 4, 6, (1, 2), modes=2, dtype=dtype), draw(2, 3, 4, 4, dtype=dtype)
        exact = copy.deepcopy(module).double()(x.double())
        assert module(x).dtype == dtype
        assert (module(x).double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()

    def test_autocast(self, kind):
        module, x = make(kind, 4, 6, (1, 2), modes=2, dtype=torch.float32), draw(2, 3, 4, 4, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), module(x), rtol=5e-2, atol=5e-2)

    def test_without_values(self, kind):
        module = kind(4, 6, (1, 2), modes=2, device="meta", dtype=torch.bfloat16)
        x = torch.empty(2, 3, 4, 4, device="meta", dtype=torch.bfloat16)
        y = module(x)
        assert (y.dtype, y.device.type) == (torch.bfloat16, "meta")

    @pytest.mark.thorough
    def test_one_graph_for_all_sizes(self, kind):
        torch._dynamo.reset()
        settings = {"pad": True} if kind is ta.PatchEmbedding else {}
        module = make(kind, 4, 6, (1, 2), modes=2, **settings)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
        counts = []
        with torch.no_grad():
            for sizes in ((2, 3, 5), (3, 6, 4), (5, 9, 11)):
                x = draw(*sizes, 4)
                torch.testing.assert_close(compiled(x), module(x), **CLOSE)
                counts.append(counter.frame_count)
        assert counts[-1] == counts[0] == 1
        torch._dynamo.reset()

    def test_what_it_shows(self, kind):
        shown = kind(4, 6, {"h": 2}, modes="t h", channels_first=True).extra_repr()
        channels = "in_channels=4, embed_dim=6" if kind is ta.PatchEmbedding else "embed_dim=4, out_channels=6"
        assert shown == f"{channels}, patch=(1, 2), modes='t h', channels_first=True"


def test_padding_shows():
    assert "pad=True" in ta.PatchEmbedding(4, 6, 2, modes=2, pad=True).extra_repr()
    assert "pad" not in ta.PatchEmbedding(4, 6, 2, modes=2).extra_repr()


@pytest.mark.thorough
def test_export_of_multiples():
    module = make(ta.PatchEmbedding, 3, 6, (1, 4), modes="t h", dtype=torch.float32)
    rows = Dim("rows", min=1, max=100)
    dims = {"x": {0: Dim("batch"), 1: Dim("t"), 2: 4 * rows}}
    program = torch.export.export(module, (draw(2, 3, 8, 3, dtype=torch.float32),), dynamic_shapes=dims)
    x = draw(5, 7, 20, 3, dtype=torch.float32)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
@every_kind
def test_export_of_any_size(kind):
    settings = {"pad": True} if kind is ta.PatchEmbedding else {}
    module = make(kind, 3, 6, (1, 4), modes="t h", dtype=torch.float32, **settings)
    dims = ({place: Dim.DYNAMIC for place in range(3)},)
    program = torch.export.export(module, (draw(2, 3, 10, 3, dtype=torch.float32),), dynamic_shapes=dims)
    for sizes in ((5, 7, 21), (2, 1, 5)):  # a number of patches is computed, and one that is takes torch for not 1
        x = draw(*sizes, 3, dtype=torch.float32)
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-6)


@every_kind
def test_the_map_is_called(kind):
    """Hooks, quantisation, and what else stands in place of a linear map."""
    module, x, seen = kind(4, 6, (1, 2), modes=2), draw(2, 3, 4, 4, dtype=torch.float32), []
    module.proj.register_forward_hook(lambda *_: seen.append(1))
    y = module(x)
    assert seen == [1]
    module.proj = nn.Sequential(module.proj, nn.Identity())
    assert torch.equal(module(x), y)
    module.proj = Parameterless(module.proj)
    assert torch.equal(module(x), y)


class Parameterless(nn.Module):
    """A linear map whose weight is no parameter, as a quantised one."""

    def __init__(self, linear):
        super().__init__()
        self.run = (linear,)

    def forward(self, x):
        return self.run[0](x)


@every_kind
def test_the_way_from_the_meta_device(kind):
    module, x = make(kind, 4, 6, (1, 2), modes=2), draw(2, 3, 4, 4)
    twin = by_way_of_meta(lambda: kind(4, 6, (1, 2), modes=2, dtype=torch.float64), module)
    assert torch.equal(twin(x), module(x))


# Messages.


PATCHES = {
    "zero": (0, OptionError, "patch of mode 'h' must be a positive whole number, got 0."),
    "part": ((2, 2.5), OptionError, "patch of mode 'w' must be a positive whole number, got 2.5."),
    "truth value": ((True, 2), OptionError, "patch of mode 'h' must be a positive whole number, got True."),
    "word": ("2", OptionError, "patch of mode 'h' must be a positive whole number, got '2'."),
    "too many": ((1, 2, 3), ModesError, "patch has 3 entries, but order 2 needs one a mode."),
    "no such mode": ({"t": 2}, ModesError, "there is no mode 't' among 'h w' (order 2)."),
    "twice": ({"w": 2, 1: 2}, ModesError, "patch names mode 'w' twice."),
}


@pytest.mark.parametrize("case", PATCHES)
def test_bad_patches(case):
    patch, error, rule = PATCHES[case]
    for kind in KINDS:
        refused(error, f"{kind.__name__}: {rule}", kind, 3, 4, patch, modes="h w")


def test_channels_and_modes():
    for kind, names in zip(KINDS, (("in_channels", "embed_dim"), ("embed_dim", "out_channels")), strict=True):
        refused(ModesError, MISSING.format(kind.__name__), kind, 3, 4, 2)
        for place, name in enumerate(names):
            told = f"{kind.__name__}: {name} must be at least 1, got 0."
            refused(OptionError, told, kind, *[0 if k == place else 4 for k in range(2)], 2, modes=2)


def test_sizes_that_patches_do_not_divide():
    module = ta.PatchEmbedding(8, 4, (2, 8), modes="h w")
    hint = "\n  Crop it, choose another patch, or repeat its last index with pad=True."
    told = f"PatchEmbedding: mode 'w' has size 30 in x, which patches of 8 do not divide.{reading(2, 4, 30, 8)}{hint}"
    refused(ShapeError, told, module, torch.ones(2, 4, 30, 8))
    first = ta.PatchEmbedding(8, 4, (2, 8), modes="h w", channels_first=True)
    told = "PatchEmbedding: mode 'h' has size 3 in x, which patches of 2 do not divide."
    told += reading(2, 8, 3, 32, first=True) + hint
    refused(ShapeError, told, first, torch.ones(2, 8, 3, 32))


def test_inputs_of_patches():
    embedding, unembedding = (
        ta.PatchEmbedding(8, 8, 1, modes="h w"),
        ta.PatchUnembedding(8, 4, (2, 8), modes="h w"),
    )
    for module, called in ((embedding, "in_channels"), (unembedding, "embed_dim")):
        name = type(module).__name__
        cases = [
            (torch.ones(2, 30, 4, 7), ShapeError, f"x has 7 channels, but {called} is 8.{reading(2, 30, 4, 7)}"),
            (
                torch.ones(2, 30, 0, 8),
                ShapeError,
                f"mode 'w' has size 0 in x, but every mode needs at least 1 index.{reading(2, 30, 0, 8)}",
            ),
            (
                torch.ones(2, 30, 4, 8, dtype=torch.float64),
                DtypeError,
                f"the type is torch.float64 in x but torch.float32 in the parameters.{reading(2, 30, 4, 8)}",
            ),
        ]
        for x, error, told in cases:
            refused(error, f"{name}: {told}", module, x)
    cases = [
        ((60, 24), "mode 'w' has size 24 in sizes, but 4 patches of 8 in x hold 25 to 32."),
        ((61, 32), "mode 'h' has size 61 in sizes, but 30 patches of 2 in x hold 59 to 60."),
    ]
    for sizes, rule in cases:
        told = f"PatchUnembedding: {rule}{reading(2, 30, 4, 8)}"
        refused(ShapeError, told, unembedding, torch.ones(2, 30, 4, 8), sizes=sizes)
    told = f"PatchUnembedding: sizes has 1 entries, but order 2 needs one a mode.{reading(2, 30, 4, 8)}"
    refused(ModesError, told, unembedding, torch.ones(2, 30, 4, 8), sizes=(60,))
