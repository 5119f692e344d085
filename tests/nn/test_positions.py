"""Embeddings of positions: values by their definition, other sizes, circles, coordinates, layouts, tools of torch."""

from __future__ import annotations

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from modules import MISSING, by_way_of_meta, draw, reading, refused
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import tensorattn as ta
from tensorattn.errors import DtypeError, ModesError, OptionError, ShapeError
from tensorattn.testing.strategies import mode_sizes

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
CLASSES = [ta.SinCosPositions, ta.LearnedPositions]
HALVES = [torch.bfloat16, torch.float16]

every_class = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)


def make(kind, modes, embed_dim=16, sizes=None, dtype=torch.float64, **settings):
    """A module; its tables, if it has some, are always the same."""
    if kind is ta.SinCosPositions:
        return kind(embed_dim, modes=modes, **settings)
    order = ta.ModeSpec.parse(modes).order
    module = kind(embed_dim, sizes or tuple(range(3, 3 + order)), modes=modes, dtype=dtype, **settings)
    with torch.no_grad():
        for seed, table in enumerate(module.tables):
            table.copy_(draw(*table.shape, seed=seed))
    return module


def alone(module, *sizes, **settings):
    """The embedding itself: what is added to zeros."""
    return module(torch.zeros(1, *sizes, module.embed_dim, dtype=torch.float64), **settings)[0]


class TestSinCos:
    @given(mode_sizes(max_order=8, max_size=5), st.integers(0, 7), st.data())
    def test_is_what_a_loop_says(self, sizes, extra, data):
        """At every position, mode by mode: K sines, then K cosines, of its place."""
        order = len(sizes)
        dim = 2 * order + extra
        circles = data.draw(st.sets(st.integers(0, order - 1)))
        spacing = data.draw(st.sampled_from([None, 0.5]))
        periodic = {mode: 7.5 for mode in circles} if spacing else tuple(circles)
        module = ta.SinCosPositions(dim, modes=order, periodic=periodic, spacing=spacing, base=50.0)
        found = alone(module, *sizes).numpy()
        for position in np.ndindex(*sizes):
            expected = []
            for mode, index in enumerate(position):
                count = dim // 2 // order + (mode < dim // 2 % order)
                if mode in circles:
                    turn = index * 0.5 / 7.5 if spacing else index / sizes[mode]
                    angles = [2 * math.pi * turn * (k + 1) for k in range(count)]
                else:
                    angles = [index * (spacing or 1) * 50.0 ** (-k / count) for k in range(count)]
                expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            np.testing.assert_allclose(found[position], expected + [0.0] * (dim % 2), rtol=0, atol=1e-12)

    def test_positions_differ_and_modes_do_too(self):
        embedding = alone(make(ta.SinCosPositions, 2), 5, 5).flatten(0, 1)
        distances = torch.cdist(embedding, embedding) + 9 * torch.eye(25)
        assert distances.min() > 0.1

    def test_any_size_is_a_part_of_any_larger(self):
        module = make(ta.SinCosPositions, "t h")
        torch.testing.assert_close(alone(module, 4, 3), alone(module, 9, 8)[:4, :3], **CLOSE)

    def test_a_circle_closes(self):
        """The step from the last index to the first is a step as any other, and a whole turn changes nothing."""
        module = make(ta.SinCosPositions, "lat lon", periodic={"lon": 360.0})
        rows = alone(module, 2, 12)[0]
        steps = (rows.roll(-1, 0) - rows).norm(dim=-1)
        torch.testing.assert_close(steps, steps[:1].expand(12), **CLOSE)
        degrees = 30.0 * torch.arange(12, dtype=torch.float64)
        for shift in (0, 360, -720):
            turned = alone(module, 2, 12, coordinates={"lon": degrees + shift})
            torch.testing.assert_close(turned, alone(module, 2, 12), rtol=0, atol=1e-10)
        assert (alone(make(ta.SinCosPositions, "lat lon"), 2, 12)[0].diff(dim=0).norm(dim=-1).std()) < 1e-12
        open_ended = alone(make(ta.SinCosPositions, "lat lon"), 2, 12)[0]
        assert (open_ended[0] - open_ended[-1]).norm() > 1.5 * open_ended.diff(dim=0).norm(dim=-1).max()

    def test_circles_of_any_size_agree_where_they_meet(self):
        module = make(ta.SinCosPositions, 1, periodic=(0,))
        torch.testing.assert_close(alone(module, 12)[::3], alone(module, 4), **CLOSE)

    def test_coordinates_take_the_place_of_spacing(self):
        module = make(ta.SinCosPositions, "t z", spacing={"z": 2.5})
        even = alone(module, 4, 3, coordinates={"z": [0.0, 2.5, 5.0]})
        torch.testing.assert_close(even, alone(module, 4, 3), **CLOSE)
        uneven = alone(module, 4, 3, coordinates=[None, torch.tensor([0.0, 5.0, 2.5], dtype=torch.float64)])
        torch.testing.assert_close(uneven, even[:, [0, 2, 1]], **CLOSE)

    def test_long_time_stamps_keep_their_seconds(self):
        module = ta.SinCosPositions(8, modes="t")
        stamps = torch.tensor([1_795_000_000, 1_795_000_001])
        x = torch.zeros(1, 2, 8)
        found = module(x, coordinates={"t": stamps})
        exact = module(x.double(), coordinates={"t": stamps})
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)
        assert (found[0, 0, 0] - math.sin(1_795_000_000)).abs() < 1e-6


class TestLearned:
    @given(mode_sizes(max_order=8, max_size=4), st.data())
    def test_is_the_outer_sum_of_its_tables(self, sizes, data):
        module = make(ta.LearnedPositions, len(sizes), 3, sizes, periodic=data.draw(st.sets(st.just(0)).map(tuple)))
        torch.testing.assert_close(alone(module, *sizes), ta.outer_sum(list(module.tables)), rtol=0, atol=1e-14)

    @pytest.mark.parametrize("entries", [1, 2, 5])
    @pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 10])
    def test_other_sizes_are_interpolated_linearly(self, entries, size):
        module = make(ta.LearnedPositions, 1, 3, (entries,))
        (table,) = module.tables
        expected = F.interpolate(table.T[None], size=size, mode="linear", align_corners=False)[0].T
        torch.testing.assert_close(alone(module, size), expected, **CLOSE)

    @pytest.mark.parametrize("entries", [1, 2, 5])
    @pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 10])
    def test_circles_are_interpolated_around(self, entries, size):
        module = make(ta.LearnedPositions, 1, 3, (entries,), periodic=0)
        table = module.tables[0].detach().numpy()
        places = np.arange(size) * entries / size
        expected = [np.interp(places, np.arange(2 * entries), column, period=entries)
                    for column in np.concatenate([table, table]).T]  # fmt: skip
        np.testing.assert_allclose(alone(module, size).detach().numpy().T, expected, rtol=0, atol=1e-12)

    def test_a_finer_circle_has_no_jump(self):
        fine, straight = (
            alone(make(ta.LearnedPositions, 1, 3, (5,), periodic=periodic), 500).detach() for periodic in (0, ())
        )
        largest = make(ta.LearnedPositions, 1, 3, (5,)).tables[0]
        step = (largest.roll(-1, 0) - largest).abs().max() / 100
        assert (fine.roll(-1, 0) - fine).abs().max() <= step + 1e-12
        assert (straight[0] - straight[-1]).abs().max() > 10 * step

    def test_resized_gives_the_same_at_its_sizes(self):
        module = make(ta.LearnedPositions, "t lon", 3, (4, 6), periodic="lon")
        module.tables[0].requires_grad_(False)
        twin = module.eval().resized((7, 5))
        assert twin.sizes == (7, 5) and module.sizes == (4, 6)
        assert [table.requires_grad for table in twin.tables] == [False, True]
        assert [table.is_leaf for table in twin.tables] == [True, True]
        assert not twin.training
        torch.testing.assert_close(alone(twin, 7, 5), alone(module, 7, 5), **CLOSE)
        torch.testing.assert_close(module.resized((4, 6)).tables[1], module.tables[1], rtol=0, atol=0)
        with torch.no_grad():
            module.resized((4, 6)).tables[0].fill_(7)
        assert not module.tables[0].eq(7).any()

    def test_coordinates_count_entries(self):
        module = make(ta.LearnedPositions, "t lon", 3, (4, 6), periodic={"lon": 360.0})
        time, longitude = (table.detach() for table in module.tables)
        places = {"t": [0.0, 1.5, 3.0, -2.0, 9.0], "lon": [0.0, 30.0, 330.0, 360.0, 420.0]}
        found = [vector.detach() for vector in module.vectors((5, 5), coordinates=places)]
        expected = torch.stack([time[0], (time[1] + time[2]) / 2, time[3], time[0], time[3]])
        torch.testing.assert_close(found[0], expected, **CLOSE)
        half = [(longitude[0] + longitude[1]) / 2, (longitude[5] + longitude[0]) / 2]
        expected = torch.stack([longitude[0], *half, longitude[0], longitude[1]])
        torch.testing.assert_close(found[1], expected, **CLOSE)
        counted = make(ta.LearnedPositions, "t lon", 3, (4, 6), periodic="lon")
        around = counted.vectors((1, 2), coordinates={"lon": [6.5, -0.5]})[1].detach()
        torch.testing.assert_close(around, torch.stack(half), **CLOSE)

    def test_gradients(self):
        module = make(ta.LearnedPositions, "t lon", 2, (3, 4), periodic="lon")
        x, places = draw(2, 2, 5, 2).requires_grad_(), (torch.tensor([[0.3, 1.6], [1.2, 0.1]]).double())
        tables = tuple(module.tables)

        def run(x, places, *tables):
            named = {f"tables.{mode}": table for mode, table in enumerate(tables)}
            return torch.func.functional_call(module, named, (x,), {"coordinates": {"t": places}})

        assert torch.autograd.gradcheck(run, (x, places.requires_grad_(), *tables), fast_mode=True)
        assert torch.autograd.gradgradcheck(run, (x, places, *tables), fast_mode=True)


@every_class
class TestBoth:
    @pytest.mark.thorough
    @pytest.mark.parametrize("order", range(1, 9))
    def test_every_order_and_layout(self, kind, order):
        sizes = tuple(2 if mode % 3 else 1 for mode in range(order))
        x = draw(2, *sizes, 17)
        last, first = make(kind, order, 17), make(kind, order, 17, channels_first=True)
        y = last(x)
        torch.testing.assert_close(y, x + ta.outer_sum(list(last.vectors(sizes))).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(first(x.movedim(-1, 1)), y.movedim(-1, 1), rtol=0, atol=0)
        assert last(x[:0]).shape == (0, *sizes, 17)

    def test_samples_may_lie_elsewhere(self, kind):
        module = make(kind, "t lon", periodic={"lon": 360.0})
        x, places = draw(2, 3, 4, 16), {"t": draw(2, 3), "lon": 90 * draw(1, 4)}
        y = module(x, coordinates=places)
        for sample in range(2):
            apart = {"t": places["t"][sample], "lon": places["lon"][0]}
            torch.testing.assert_close(
                y[sample : sample + 1], module(x[sample : sample + 1], coordinates=apart), **CLOSE
            )
        assert module(x[:0], coordinates={"t": draw(0, 3)}).shape == (0, 3, 4, 16)

    def test_modes_by_name_or_index(self, kind):
        x, place = draw(2, 3, 4, 16), draw(4)
        module = make(kind, "h w", periodic={"w": 5.0})
        expected = module(x, coordinates=[None, place])
        for key in ("w", 1, -1):
            other = make(kind, "h w", periodic={key: 5.0})
            torch.testing.assert_close(other(x, coordinates={key: place}), expected, rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_precision(self, kind, dtype):
        exact, module = make(kind, "t h"), make(kind, "t h", dtype=dtype)
        x = draw(2, 5, 300, 16, dtype=dtype)  # indices up to 300 are not whole in bfloat16
        y = module(x)
        assert y.dtype == dtype
        assert (y.double() - exact(x.double())).abs().max() <= 4 * torch.finfo(dtype).eps * y.double().abs().max()

    def test_autocast(self, kind):
        module, x = make(kind, "t h", dtype=torch.float32), draw(2, 3, 4, 16, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
            torch.testing.assert_close(module(x.float()), module.double()(x.double()).float())

    def test_gradients_of_the_input(self, kind):
        module = make(kind, "t h", 4, channels_first=True)
        assert torch.autograd.gradcheck(module, (draw(2, 4, 2, 3).requires_grad_(),))

    def test_copies(self, kind):
        module, x = make(kind, "t lon", periodic=("lon",)).eval(), draw(2, 3, 4, 16)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert repr(twin) == repr(module)
            assert twin.training is False
            assert torch.equal(twin(x), module(x))

    @pytest.mark.thorough
    def test_one_graph_for_all_sizes(self, kind):
        torch._dynamo.reset()
        module = make(kind, "t lon", periodic=("lon",))
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
        with torch.no_grad():
            counts = []
            for sizes in ((2, 3, 5), (3, 6, 4), (5, 9, 11)):
                x = draw(*sizes, 16)
                torch.testing.assert_close(compiled(x), module(x), **CLOSE)
                counts.append(counter.frame_count)
        assert 1 <= counts[0] <= 2  # a graph with floats made of sizes is handed to the backend twice
        assert counts[-1] == counts[0]
        torch._dynamo.reset()

    @pytest.mark.thorough
    def test_coordinates_compile(self, kind):
        torch._dynamo.reset()
        module = make(kind, "t lon", periodic={"lon": 360.0}, channels_first=True)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        x, places = draw(2, 16, 3, 4).requires_grad_(), {"lon": 90 * draw(2, 4)}
        leaves = [x, *module.parameters()]
        ours, theirs = (
            torch.autograd.grad((function(x, coordinates=places) ** 2).sum(), leaves) for function in (compiled, module)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        torch._dynamo.reset()

    @pytest.mark.thorough
    def test_export(self, kind):
        module = make(kind, 3, dtype=torch.float32)
        dims = ({place: Dim.DYNAMIC for place in range(4)},)
        program = torch.export.export(module, (draw(2, 3, 5, 7, 16, dtype=torch.float32),), dynamic_shapes=dims)
        for sizes in ((3, 7, 4, 6), (1, 2, 9, 3)):
            x = draw(*sizes, 16, dtype=torch.float32)
            torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-6)

    def test_without_values(self, kind):
        factory = {} if kind is ta.SinCosPositions else {"device": "meta"}
        module = make(kind, 2, dtype=torch.bfloat16, **factory)
        x = torch.empty(2, 5, 6, 16, device="meta", dtype=torch.bfloat16)
        for coordinates in (None, [torch.ones(5), None]):
            y = module(x, coordinates=coordinates)
            assert (y.shape, y.dtype, y.device.type) == (x.shape, torch.bfloat16, "meta")


class TestState:
    def test_no_state_without_tables(self):
        assert make(ta.SinCosPositions, 3).state_dict() == {}

    def test_the_state_is_the_tables(self):
        module = make(ta.LearnedPositions, "t h", 8)
        assert list(module.state_dict()) == ["tables.0", "tables.1"]
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        other = ta.LearnedPositions(8, (3, 4), modes=2, dtype=torch.float64)
        assert str(other.load_state_dict(torch.load(file, weights_only=True))) == "<All keys matched successfully>"
        assert torch.equal(alone(other, 5, 6), alone(module, 5, 6))

    def test_tables_are_drawn_anew(self):
        module = ta.LearnedPositions(64, (100, 100), modes=2)
        before = [table.clone() for table in module.tables]
        module.reset_parameters()
        for old, table in zip(before, module.tables, strict=True):
            assert not torch.equal(old, table)
            assert abs(table.std() / 0.02 - 1) < 0.1
        meta = ta.LearnedPositions(8, (3, 4), modes=2, device="meta", dtype=torch.float16)
        assert {(p.device.type, p.dtype) for p in meta.parameters()} == {("meta", torch.float16)}

    def test_what_they_show(self):
        shown = ta.SinCosPositions(
            8, modes="lat lon", periodic={"lon": 360}, spacing={"lat": 2.5}, base=100.0, channels_first=True
        ).extra_repr()
        assert shown == (
            "embed_dim=8, modes='lat lon', periodic={'lon': 360.0}, spacing={'lat': 2.5}, base=100.0, "
            "channels_first=True"
        )
        assert ta.SinCosPositions(8, modes=2, periodic=1).extra_repr() == "embed_dim=8, modes=2, periodic=('1',)"
        shown = ta.LearnedPositions(8, (3, 4), modes="lat lon", periodic="lon", channels_first=True).extra_repr()
        assert shown == "embed_dim=8, sizes=(3, 4), modes='lat lon', periodic=('lon',), channels_first=True"


@given(mode_sizes(max_order=4), st.sampled_from(CLASSES), st.integers(0, 10**6), st.data())
def test_added_positions_keep_a_tensor_additive_and_attention_exact(sizes, kind, seed, data):
    """Additive attention from any queries to an additive tensor and its positions is full attention to them."""
    order, dim = len(sizes), 2 * len(sizes) + 1
    circles = {mode: 5.0 for mode in data.draw(st.sets(st.integers(0, order - 1)))}
    coordinates = {mode: 3 * draw(size, seed=seed + mode) for mode, size in enumerate(sizes) if (seed + mode) % 2}
    x = ta.outer_sum([draw(2, size, dim, seed=seed + 10 + mode) for mode, size in enumerate(sizes)])
    embedded = make(kind, order, dim, periodic=circles)(x, coordinates=coordinates)
    residual = ta.interaction_residual(embedded, order=order)
    torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=1e-9)
    key, value = embedded @ draw(dim, dim, seed=seed + 20), embedded.flip(-1)
    ours, full = (
        operator(draw(2, 5, dim, seed=seed + 21), key, value, order=order, return_lse=True)
        for operator in (ta.additive_attention, ta.flattened_attention)
    )
    torch.testing.assert_close(ours.output, full.output, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.lse, full.lse, rtol=1e-9, atol=1e-9)


# From the meta device.


def test_the_way_from_the_meta_device():
    module = make(ta.LearnedPositions, "t h", 8)
    twin = by_way_of_meta(lambda: ta.LearnedPositions(8, (3, 4), modes="t h", dtype=torch.float64), module)
    assert torch.equal(alone(twin, 5, 6), alone(module, 5, 6))
    sines = make(ta.SinCosPositions, "t h", 8)
    assert torch.equal(
        alone(by_way_of_meta(lambda: ta.SinCosPositions(8, modes="t h"), sines), 3, 4), alone(sines, 3, 4)
    )


# Messages.


def build(kind, channels=8, **options):
    """A module over the modes ``h w``."""
    sizes = ((3, 4),) if kind is ta.LearnedPositions else ()
    return kind(channels, *sizes, **{"modes": "h w", **options})


PERIOD = "\n  Give it in the unit of the coordinates, such as periodic={'w': 360.0}."
PERIODIC = {
    "no such mode": ("lon", ModesError, "there is no mode 'lon' among 'h w' (order 2)."),
    "one of two": ("h lon", ModesError, "there is no mode 'lon' among 'h w' (order 2)."),
    "no such index": (2, ModesError, "there is no mode 2 among 'h w' (order 2)."),
    "negative": ({"w": -1}, OptionError, "period of mode 'w' must be a positive finite number, got -1."),
    "zero": ({"w": 0.0}, OptionError, "period of mode 'w' must be a positive finite number, got 0.0."),
    "infinite": ({"w": math.inf}, OptionError, "period of mode 'w' must be a positive finite number, got inf."),
    "no number": ({"h": "3"}, OptionError, "period of mode 'h' must be a positive finite number, got '3'."),
    "twice": ({"w": 3.0, 1: 4.0}, ModesError, "periodic names mode 'w' twice."),
    "twice in a list": (("w", -1), ModesError, "periodic names mode 'w' twice."),
}


@pytest.mark.parametrize("case", PERIODIC)
def test_circles(case):
    periodic, error, rule = PERIODIC[case]
    for kind in CLASSES:
        refused(error, f"{kind.__name__}: {rule}", build, kind, periodic=periodic)


SPACING = {
    "zero": ({"spacing": 0}, OptionError, "spacing of mode 'h' must be a positive finite number, got 0."),
    "one of two": (
        {"spacing": (1.0, math.nan)},
        OptionError,
        "spacing of mode 'w' must be a positive finite number, got nan.",
    ),
    "too many": ({"spacing": [1.0, 2, 3]}, ModesError, "spacing has 3 entries, but order 2 needs one a mode."),
    "no such mode": ({"spacing": {"z": 2.0}}, ModesError, "there is no mode 'z' among 'h w' (order 2)."),
    "circle": (
        {"spacing": {"w": 1.25}, "periodic": "w"},
        OptionError,
        f"spacing of periodic mode 'w' needs its period.{PERIOD}",
    ),
    "base": ({"base": 1.0}, OptionError, "base must be a finite number greater than 1, got 1.0."),
    "infinite base": ({"base": math.inf}, OptionError, "base must be a finite number greater than 1, got inf."),
}


@pytest.mark.parametrize("case", SPACING)
def test_frequencies(case):
    options, error, rule = SPACING[case]
    refused(error, f"SinCosPositions: {rule}", build, ta.SinCosPositions, **options)


def test_channels_and_modes():
    told = "SinCosPositions: embed_dim must be at least 6, two channels a mode, got 5."
    refused(OptionError, told, ta.SinCosPositions, 5, modes="t h w")
    refused(OptionError, "LearnedPositions: embed_dim must be at least 1, got 0.", build, ta.LearnedPositions, 0)
    for kind in CLASSES:
        name = kind.__name__
        refused(OptionError, f"{name}: modes must be at least 1, got 0.", build, kind, modes=0)
        refused(OptionError, f"{name}: embed_dim must be an integer, got '8'.", build, kind, "8")
        refused(ModesError, MISSING.format(name), build, kind, modes=None)
    refused(ModesError, MISSING.format("SinCosPositions"), ta.SinCosPositions, 8)
    refused(ModesError, MISSING.format("LearnedPositions"), ta.LearnedPositions, 8, (3, 4))


def test_sizes_of_tables():
    table = ta.LearnedPositions(8, (3, 4), modes="h w")
    cases = [
        ((3, 4, 5), ModesError, "modes names 2 modes, but sizes has 3."),
        ((3, 0), ShapeError, "mode 'w' has size 0 in sizes, but every mode needs at least 1 index."),
    ]
    for sizes, error, rule in cases:
        refused(error, f"LearnedPositions: {rule}", ta.LearnedPositions, 8, sizes, modes="h w")
        refused(error, f"LearnedPositions.resized: {rule}", table.resized, sizes)
        for kind in CLASSES:
            refused(error, f"{kind.__name__}.vectors: {rule}", build(kind).vectors, sizes)
    rule = "coordinates of mode 'h' have batch dimensions (2,), which do not broadcast to ()."
    for kind in CLASSES:
        told = f"{kind.__name__}.vectors: {rule}"
        refused(ShapeError, told, build(kind).vectors, (3, 4), coordinates=[torch.ones(2, 3), None])


INPUTS = {
    "dimensions": ((2, 30, 40), ShapeError, "x has 3 dimensions, but the layout (B h w C) has 4."),
    "channels": ((2, 30, 40, 7), ShapeError, "x has 7 channels, but embed_dim is 8."),
    "empty mode": ((2, 30, 0, 8), ShapeError, "mode 'w' has size 0 in x, but every mode needs at least 1 index."),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs(case):
    shape, error, rule = INPUTS[case]
    for kind in CLASSES:
        refused(error, f"{kind.__name__}: {rule}{reading(*shape)}", build(kind), torch.ones(shape))


def test_inputs_of_other_layouts_and_types():
    first, x = build(ta.SinCosPositions, channels_first=True), torch.ones(2, 30, 40, 8)
    told = f"SinCosPositions: x has 30 channels, but embed_dim is 8.{reading(2, 30, 40, 8, first=True)}"
    refused(ShapeError, told, first, x)
    told = f"SinCosPositions: x has 3 dimensions, but the layout (B C h w) has 4.{reading(2, 30, 40)}"
    refused(ShapeError, told, first, x[..., 0])
    told = f"SinCosPositions: x must be floating point, got torch.int64.{reading(2, 30, 40, 8)}"
    refused(DtypeError, told, build(ta.SinCosPositions), x.long())
    refused(DtypeError, "SinCosPositions: x must be a torch.Tensor, got NoneType.", build(ta.SinCosPositions), None)
    told = "LearnedPositions: the type is torch.float64 in x but torch.float32 in the parameters."
    refused(DtypeError, f"{told}{reading(2, 30, 40, 8)}", build(ta.LearnedPositions), x.double())


def vector(*shape):
    return torch.ones(shape)


COORDINATES = {
    "tensor": (
        vector(4),
        ModesError,
        "coordinates is a single tensor, but order 2 needs 2 vectors, one a mode.",
    ),
    "too few": ([vector(30)], ModesError, "coordinates has 1 entries, but order 2 needs one a mode."),
    "no such mode": ({"z": vector(4)}, ModesError, "there is no mode 'z' among 'h w' (order 2)."),
    "twice": ({"w": vector(40), 1: vector(40)}, ModesError, "coordinates names mode 'w' twice."),
    "length": (
        {"w": vector(3)},
        ShapeError,
        "coordinates of mode 'w' have length 3, but the mode has size 40.",
    ),
    "number": (
        [None, 2.0],
        ShapeError,
        "coordinates of mode 'w' have length no dimension, but the mode has size 40.",
    ),
    "batch": (
        {"w": vector(3, 40)},
        ShapeError,
        "coordinates of mode 'w' have batch dimensions (3,), which do not broadcast to (2,).",
    ),
    "batches": (
        {"w": vector(1, 2, 40)},
        ShapeError,
        "coordinates of mode 'w' have batch dimensions (1, 2), which do not broadcast to (2,).",
    ),
    "infinite": (
        {"h": torch.arange(30) / 0},
        OptionError,
        "coordinates of mode 'h' must be finite, got nan to nan.",
    ),
}


@pytest.mark.parametrize("case", COORDINATES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_coordinates(case, device):
    """Coordinates with values are read even where the input has none."""
    coordinates, error, rule = COORDINATES[case]
    told = f"SinCosPositions: {rule}{reading(2, 30, 40, 8)}"
    x = torch.empty(2, 30, 40, 8, device=device)
    refused(error, told, build(ta.SinCosPositions), x, coordinates=coordinates)


def test_coordinates_of_a_circle_without_period():
    told = f"SinCosPositions: coordinates of periodic mode 'w' need its period.{reading(2, 30, 40, 8)}{PERIOD}"
    circle, x = build(ta.SinCosPositions, periodic="w"), torch.ones(2, 30, 40, 8)
    refused(OptionError, told, circle, x, coordinates={"w": vector(40)})
    told = "coordinates of mode 'h' have length 3, but the mode has size 30."
    told = f"LearnedPositions: {told}{reading(2, 30, 40, 8)}"
    refused(ShapeError, told, build(ta.LearnedPositions), x, coordinates={"h": vector(3)})
