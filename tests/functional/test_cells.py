"""Cells: what is drawn and found among keys, blocks of the grid, sums that add up, and how accurate they are."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from grids import close, holes, positive
from modules import draw as drawn
from modules import refused

import tensorattn as ta
from tensorattn.errors import DtypeError, OptionError, ShapeError
from tensorattn.functional.cells import (
    CANDIDATES,
    CellSums,
    block_counts,
    block_labels,
    draw,
    draw_queries,
    draw_rows,
    metric_of,
    search,
)
from tensorattn.masks import Part

CPU = torch.device("cpu")


def sums(key, value, label, tokens=4, weight=None, factor=None):
    return CellSums.of(key, value, weight, lambda places: label[..., places], tokens, factor).about_zero(factor)


class TestDraws:
    def test_all_where_they_are_few(self):
        for length in (1, 7, 64):
            assert torch.equal(draw(length, 64, None, CPU).index, torch.arange(length))

    def test_one_of_each_equal_part(self):
        index = draw(10_000, 64, None, CPU).index
        assert torch.equal((index * 64 / 10_000).floor().long(), torch.arange(64))

    def test_no_column_of_a_grid_alone(self):
        """A plain stride of a multiple of the width of a grid would meet one column in every row."""
        columns = draw(256 * 160, 256, None, CPU).index % 160
        assert len(columns.unique()) > 100 and columns.double().mean().sub(79.5).abs() < 5

    def test_as_often_as_weights_say_and_never_what_is_absent(self):
        weight = positive(2, 3000) * (torch.arange(3000) % 7 != 3) * holes(2, 3000)
        found = draw(3000, 500, weight, CPU)
        assert (weight.gather(-1, found.index) > 0).all() and found.weight.eq(1).all()
        part = weight.cumsum(-1).gather(-1, found.index) / weight.sum(-1, keepdim=True)
        assert (part - (torch.arange(500) + 0.5) / 500).abs().max() < 0.005

    def test_nothing_where_all_is_absent(self):
        weight = torch.stack([torch.zeros(3000), torch.ones(3000)]).double()
        found = draw(3000, 500, weight, CPU)
        assert found.weight[0].eq(0).all() and found.weight[1].eq(1).all() and found.index.max() < 3000

    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("most", [300, 5000])
    def test_of_parts_are_those_of_the_whole(self, weighted, most):
        """Each part knows some of the rows, and zeros for the others; an empty one knows none."""
        sizes, tensor = (7, 16, 20), drawn(2, 3, 7, 16, 20, 4)
        weight = positive(2, 1, *sizes) * holes(2, 1, *sizes) if weighted else None
        expected, count = draw_rows(tensor.flatten(2, -2), None if weight is None else weight.flatten(2), most)
        found = []
        for start, length in ((0, 4), (4, 3), (7, 0)):
            part = Part(
                *(sizes, (start, 0, 0), (length, 16, 20)),
                lambda make, _: make(),
                lambda own, mode, dim, one: own if mode else weight.unsqueeze(-1),  # what gathering gives
            )
            own = tensor.narrow(2, start, length).flatten(2, -2)
            told = None if weight is None else weight.narrow(2, start, length).flatten(2)
            rows, counts = draw_rows(own, told, most, part)
            assert (counts is None) == (count is None) and (count is None or torch.equal(counts, count))
            found.append(rows)
        assert torch.equal(sum(found), expected)


class TestMetric:
    def test_is_the_mean_of_squares_of_queries(self):
        query, weight = drawn(2, 9, 3), positive(2, 9).round()
        query[0, 3] = math.nan
        ours = metric_of(*draw_queries(query, weight))
        for sample in range(2):
            rows = query[sample][(weight[sample] > 0) & query[sample].isfinite().all(-1)]
            moment = rows.mT @ rows
            close([ours[sample]], [moment / moment.trace() * 3 + 1e-4 * torch.eye(3).double()])

    def test_is_one_where_queries_are_not_known(self):
        close(
            [ta.find_cells(None, drawn(2, 5, 3), order=1, tokens=2).metric],
            [1.0001 * torch.eye(3).double().expand(2, -1, -1)],
        )


class TestSearch:
    def test_finds_every_distinct_key(self):
        key = drawn(2, 5, 3)[:, torch.arange(60) * 7 % 5]
        for tokens in (5, 8, 64):
            cells, spread = search(key, None, torch.eye(3).double(), tokens)
            close([spread], [torch.zeros(2, tokens).double()], atol=1e-9, rtol=0)
            label = cells.labels(key)
            for sample in range(2):
                pairs = torch.stack([label[sample], torch.arange(60) * 7 % 5], 1).unique(dim=0)
                assert len(pairs) == 5

    def test_of_float32_keys_far_from_zero(self):
        key = drawn(1, 5, 3, dtype=torch.float32)[:, torch.arange(60) % 5] + 100
        cells = ta.find_cells(None, key, order=1, tokens=8)
        assert len(cells.label(key).unique()) == 5

    @pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 64])
    def test_is_as_good_as_known(self, tokens):
        """The spread is that of candidates about their centres, and falls with the number of tokens."""
        key = drawn(2, 300, 3)
        cells, spread = search(key, None, torch.eye(3).double(), tokens)
        label = cells.labels(key)
        square = (key - cells.centres.gather(1, label.unsqueeze(-1).expand(key.shape))).square().sum(-1)
        member = F.one_hot(label, tokens).mT.double()
        mean = (member @ square.unsqueeze(-1)).squeeze(-1) / member.sum(-1).clamp_min(1)
        close([spread], [mean], rtol=1e-9, atol=1e-10)
        assert square.mean() < 3.2 * min(1, 1.5 * tokens ** (-2 / 3))

    def test_equal_keys_make_one_cell(self):
        key = torch.ones(1, 40, 3).double()
        cells, spread = search(key, None, torch.eye(3).double(), 4)
        close([cells.centres, spread], [torch.ones(1, 4, 3).double(), torch.zeros(1, 4).double()])

    @pytest.mark.parametrize("held", [0.0, math.nan, math.inf])
    @pytest.mark.parametrize("count", [60, 4000])
    def test_never_finds_an_absent_key(self, count, held):
        """Whatever it holds, and however far it is from the others; neither where all keys are candidates nor not."""
        key, mask = drawn(2, count, 3), holes(2, count)
        key[~mask] = held if held else 1000.0
        far = ta.find_cells(None, key, order=1, tokens=8, mask=mask)
        assert count <= CANDIDATES * 32 or len(draw(count, 2048, None, CPU).index) == 2048
        assert far.centres.isfinite().all() and far.centres.abs().max() < 6
        key[~mask] = 0.0
        near = ta.find_cells(None, key, order=1, tokens=8, mask=mask)
        close([far.centres, far.metric], [near.centres, near.metric])

    def test_weights_masks_and_lengths_are_cropping(self):
        key, query = drawn(1, 6, 5, 3), drawn(1, 4, 3, seed=1)
        expected = ta.find_cells(query, key[:, :4, :3], order=2, tokens=4)
        there = torch.zeros(6, 5).double()
        there[:4, :3] = 1
        for said in (
            {"mask": there > 0},
            {"weights": [(torch.arange(6) < 4).double() * 2, (torch.arange(5) < 3).double()]},
            {"lengths": [4, 3]},
        ):
            cells = ta.find_cells(query, key, order=2, tokens=4, **said)
            close([cells.centres, cells.metric], [expected.centres, expected.metric])

    def test_absent_queries_do_not_count(self):
        x, mask = drawn(2, 5, 4, 3), holes(2, 5, 4)
        spoiled = x.clone()
        spoiled[~mask] = math.nan
        one, other = (ta.find_cells(each, x, order=2, tokens=4, mask=mask) for each in (x, spoiled))
        close([one.centres, one.metric], [other.centres, other.metric])

    def test_is_the_search_of_the_operator(self):
        """Cells that are found before, among all keys, are those that the operator finds."""
        query, key, value = drawn(2, 5, 3), drawn(2, 6, 7, 3, seed=1), drawn(2, 6, 7, 2, seed=2)
        cells = ta.find_cells(query, key, order=2, tokens=6)
        ours = ta.clustered_attention(query, key, value, order=2, cells=cells, return_attention=True)
        theirs = ta.clustered_attention(query, key, value, order=2, tokens=6, return_attention=True)
        assert torch.equal(ours.attention[1], theirs.attention[1])
        assert torch.equal(cells.label(key), ours.attention[1])

    def test_is_not_differentiated(self):
        x = drawn(2, 30, 3).requires_grad_()
        cells = ta.find_cells(x, x, order=1, tokens=4)
        assert not cells.centres.requires_grad and not cells.metric.requires_grad

    def test_of_no_queries_all_directions_count_alike(self):
        key = drawn(2, 5, 6, 3)
        found, expected = ta.find_cells(key[:, :0], key, order=2, tokens=4), ta.find_cells(None, key, order=2, tokens=4)
        assert torch.equal(found.centres, expected.centres) and torch.equal(found.metric, expected.metric)

    @pytest.mark.parametrize("masked", [False, True])
    def test_of_an_empty_batch(self, masked):
        key, mask = drawn(2, 5, 6, 3)[:0], holes(1, 5, 6)[0] if masked else None
        found = ta.find_cells(key, key, order=2, tokens=4, mask=mask)
        assert found.centres.shape == (0, 4, 3) and found.metric.shape == (0, 3, 3)

    def test_is_always_the_same(self):
        x = drawn(1, 5000, 3)
        one, other = (ta.find_cells(x, x, order=1, tokens=16) for _ in range(2))
        assert torch.equal(one.centres, other.centres)

    def test_labels_are_the_nearest_centres(self):
        key, root = drawn(2, 50, 3), drawn(2, 3, 3, seed=1)
        cells = ta.Cells(drawn(2, 7, 3, seed=2) + 5, root @ root.mT + 0.1 * torch.eye(3).double())
        apart = key.unsqueeze(-2) - cells.centres.unsqueeze(1)
        square = torch.einsum("btnd,bde,btne->btn", apart, cells.metric, apart)
        assert torch.equal(cells.labels(key), square.argmin(-1))

    def test_of_bad_input(self):
        key = drawn(2, 7, 6, 3)
        reading = "  modes    0 1\n  key      (2, 7, 6, 3)   batch=(2,) 0=7 1=6 D=3"
        for message, tokens in (("tokens must be at least 1, got 0.", 0), ("tokens must be an integer, got 1.5.", 1.5)):
            refused(OptionError, f"find_cells: {message}\n{reading}", ta.find_cells, None, key, order=2, tokens=tokens)
        with pytest.raises(DtypeError, match=r"the type is torch\.float32 in query but torch\.float64 in key"):
            ta.find_cells(key.float(), key, order=2)
        modes, grid = reading.split("\n")
        query = "  query    (2, 6, 4)      batch=(2,) positions=(6,) D=4"
        told = "\n".join(("find_cells: head size is 4 in query but 3 in key.", modes, query, grid))
        refused(ShapeError, told, ta.find_cells, drawn(2, 6, 4), key, order=2)


class TestCells:
    @pytest.mark.parametrize(
        ("centres", "metric", "kind", "message"),
        [
            ([1.0], torch.eye(3), DtypeError, "centres of cells must be a torch.Tensor, got list."),
            (torch.zeros(2, 3), None, DtypeError, "metric of cells must be a torch.Tensor, got NoneType."),
            (torch.zeros(2, 3).long(), torch.eye(3), DtypeError, "centres of cells must be floating point, got torch.int64."),
            (torch.zeros(3), torch.eye(3), ShapeError, "centres of cells has 1 dimensions, but needs at least 2."),
            (torch.zeros(0, 3), torch.eye(3), ShapeError, "centres of cells has 0 rows, but needs at least 1."),
            (
                torch.zeros(2, 3),
                torch.eye(4),
                ShapeError,
                "metric of cells has shape (4, 4), but centres of 3 channels need (3, 3).",
            ),
        ],
    )  # fmt: skip
    def test_of_bad_input(self, centres, metric, kind, message):
        refused(kind, message, ta.Cells, centres, metric)


class TestBlocks:
    @pytest.mark.parametrize(
        ("sizes", "tokens", "causal", "counts"),
        [
            ((15, 120, 160), 64, None, (1, 8, 8)),
            ((64, 48, 12), 64, None, (8, 8, 1)),
            ((15, 120, 160), 64, 1, (2, 1, 32)),
            ((5,), 64, None, (5,)),
            ((5,), 1, None, (1,)),
            ((2, 2, 2), 8, None, (2, 2, 2)),
            ((4, 4), 64, 0, (1, 4)),
            ((3,), 8, 0, (1,)),
        ],
    )
    def test_are_near_to_cubes(self, sizes, tokens, causal, counts):
        assert block_counts(sizes, tokens, None, causal) == counts

    def test_are_no_more_than_tokens(self):
        for tokens in range(1, 70):
            for sizes in ((7, 5, 3), (40, 3), (9,), (2, 2, 2, 30)):
                for causal in (None, 0):
                    found = block_counts(sizes, tokens, None, causal)
                    assert math.prod(found) <= tokens and all(b <= n for b, n in zip(found, sizes, strict=True))
                    assert causal is None or found[causal] == 1

    def test_that_are_asked_for_are_no_more_than_positions(self):
        assert block_counts((7, 3), 64, (4, 9)) == (4, 3)

    def test_labels(self):
        assert block_labels((5, 3), (2, 2), CPU).reshape(5, 3).tolist() == [[0, 0, 1]] * 3 + [[2, 2, 3]] * 2

    def test_of_bad_input(self):
        cut = "blocks cuts mode 0 into 2, but it is causal: a block spans all frames so far."
        for message, counts, causal in (
            ("blocks has 1 counts, but order 2 needs one a mode.", (2,), None),
            ("blocks has 3 counts, but order 2 needs one a mode.", (2, 2, 2), None),
            (cut, (2, 2), 0),
        ):
            refused(OptionError, message, block_counts, (4, 4), 64, counts, causal)


class TestSums:
    def test_are_sums(self):
        key, value, weight, label = drawn(2, 30, 3), drawn(2, 30, 2, seed=1), positive(2, 30), torch.arange(30) % 4
        root = torch.linalg.cholesky(torch.eye(3).double() * 2 + 0.3)
        found = sums(key, value, label.expand(2, -1), 4, weight, root)
        member = F.one_hot(label, 4).mT * weight.unsqueeze(1)
        rows = torch.cat([key, value, (key @ root).square().sum(-1, keepdim=True)], -1)
        close(found.cells, [member.sum(-1), member @ rows])
        close(found.products, [weight.sum(-1), rows[..., :5].mT @ (weight.unsqueeze(-1) * key)])

    def test_of_parts_add_up_to_those_of_the_whole(self):
        key, value, weight = drawn(2, 30, 3), drawn(2, 30, 2, seed=1), positive(2, 30)
        label, root = (torch.arange(30) * 7 % 4).expand(2, -1), torch.eye(3).double()
        whole = sums(key, value, label, 4, weight, root)
        for places in (1, 11, 29):
            parts = [
                sums(*(t[:, p] for t in (key, value, label)), 4, weight[:, p], root)
                for p in (slice(places), slice(places, None))
            ]
            close((parts[0] + parts[1]).tensors, whole.tensors)

    def test_run_over_frames(self):
        key, value = drawn(2, 5, 6, 3), drawn(2, 5, 6, 2, seed=1)
        label = (torch.arange(6) % 4).expand(2, 5, 6)
        frames = sums(key, value, label)
        running, windowed = frames.running(1), frames.windowed(1, 2)
        before = sums(key, value, label).map(lambda part: part[:, 0])
        for frame in range(5):
            seen = sums(*(t[:, : frame + 1].flatten(1, 2) for t in (key, value, label)))
            close(running.map(lambda part, at=frame: part[:, at]).tensors, seen.tensors)
            after = frames.running(1, before).map(lambda part, at=frame: part[:, at])
            close(after.tensors, (seen + before).tensors)
            if frame < 4:
                two = sums(*(t[:, frame : frame + 2].flatten(1, 2) for t in (key, value, label)))
                close(windowed.map(lambda part, at=frame: part[:, at]).tensors, two.tensors)

    def test_round_trip_through_tensors(self):
        frames = sums(drawn(2, 6, 3), drawn(2, 6, 2), (torch.arange(6) % 4).expand(2, 6))
        assert all(map(torch.equal, CellSums.from_tensors(frames.tensors).tensors, frames.tensors))

    @pytest.mark.parametrize("tokens", [1, 2])
    @pytest.mark.parametrize("shift", [0.0, 100.0])
    def test_of_one_big_cell_of_float32_are_accurate(self, tokens, shift):
        """Means and covariances within 1e-6 of those in float64, in the units of the spread of keys."""
        generator = torch.Generator().manual_seed(0)
        key, value = (torch.randn(1, 200_000, width, generator=generator) + shift for width in (4, 3))
        key[..., 1] *= 2
        label = (torch.arange(200_000) < 199_000).long() * (tokens - 1)
        for graph in (False, True):
            found = sums(key.requires_grad_(graph), value, label.expand(1, -1), tokens)
            key = key.detach()
            assert found.products[0] == 200_000
            rows = torch.cat([key, value], -1).double()
            member = F.one_hot(label, tokens).mT.double()
            means = found.cells[1].detach() / found.cells[0].unsqueeze(-1)
            assert (means - member @ rows / member.sum(-1, keepdim=True)).abs().max() < 1e-6 * (1 + shift)
            own = found.cells[1].detach().sum(-2, keepdim=True) / 200_000
            covariance = found.products[1].detach() / 200_000 - own.mT @ own[..., :4]
            apart = rows - rows.mean(1, keepdim=True)
            exact = apart.mT @ apart[..., :4] / 200_000
            assert (covariance - exact).abs().max() < 1e-6 * (4 + shift)  # the variance of a channel of keys is 4


# ---- recorded mistakes -------------------------------------------------------------------------------------------


@pytest.mark.thorough
class TestMistakes:
    """Each mistake that was made or thought of breaks a law that is tested above."""

    def test_a_plain_stride_meets_few_columns(self):
        columns = torch.arange(256) * (256 * 160 // 256) % 160
        assert len(columns.unique()) == 1

    def test_a_plain_stride_misses_cells_that_jittered_places_find(self):
        """Keys that depend on the column alone: one in each row, at the same column, knows one of them."""
        rows, tokens = CANDIDATES * 32, 8
        key = drawn(1, 1, tokens, 3).expand(1, rows, tokens, 3).reshape(1, -1, 3)
        strided = key[:, torch.arange(rows) * tokens]
        assert len(ta.find_cells(None, key, order=1, tokens=tokens).label(key).unique()) == tokens
        assert len(ta.find_cells(None, strided, order=1, tokens=tokens).label(key).unique()) == 1

    def test_float32_sums_of_one_big_cell_are_not_accurate(self):
        key = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0)) + 100
        total = torch.zeros(1, 4).index_add(0, torch.zeros(200_000, dtype=torch.int64), key)
        error = (total / 200_000 - key.double().mean(0)).abs().max()
        assert error > 1e-6 * 100
        found = sums(key[None], key[None], torch.zeros(1, 200_000, dtype=torch.int64), 1)
        assert (found.cells[1][0, 0, :4] / 200_000 - key.double().mean(0)).abs().max() < 1e-6 * 100
