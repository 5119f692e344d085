"""Attention over sets of tokens against softmaxes written out, one query at a time where that is clearest."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tensorattn import softmax
from tensorattn.softmax import TokenSet, attend_tokens, join_sets, join_tokens, merge_attention

CLOSE = {"rtol": 1e-12, "atol": 1e-13}
BATCHES = [(), (2,), (2, 3), (2, 1, 3), (2, 1, 2, 2)]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tokens(batch=(2,), count=6, dim=4, dim_v=4, seed=0, dtype=torch.float64, **fields):
    return TokenSet(
        draw(*batch, count, dim, seed=seed + 10, dtype=dtype),
        draw(*batch, count, dim_v, seed=seed + 20, dtype=dtype),
        **fields,
    )


def log_weights(*shape, seed=0):
    return draw(*shape, seed=seed + 30).sigmoid().log()


def written_out(query, sets, scale):
    """Outputs, log-sum-exps and weights from the definition, batch entry by batch entry and query by query."""
    batch, length = query.shape[:-2], query.shape[-2]
    outputs, lses, weights = [], [], [[] for _ in sets]
    for place in itertools.product(*map(range, batch), range(length)):
        *b, i = place
        output, lse = 0.0, 0.0
        for part, rows in zip(sets, weights, strict=True):
            logits = scale * part.key[*b] @ query[place]
            if part.log_weight is not None:
                logits = logits + part.log_weight.expand(*batch, -1)[*b]
            if part.bias is not None:
                logits = logits + part.bias.expand(*batch, *part.bias.shape[-2:])[*b, part.rows[i]]
            mass = logits.exp()
            rows.append(mass / mass.sum())
            output = output + part.coefficient * (rows[-1] @ part.value[*b])
            count = part.multiplicity if part.log_weight is None else 1
            lse = lse + part.coefficient * (mass.sum() * count).log()
        outputs.append(output)
        lses.append(lse)

    def stacked(rows, *sizes):
        return torch.stack(rows).reshape(*batch, length, *sizes) if rows else query.new_empty(*batch, length, *sizes)

    by_set = [stacked(rows, part.key.shape[-2]) for part, rows in zip(sets, weights, strict=True)]
    return stacked(outputs, sets[0].value.shape[-1]), stacked(lses), by_set


def check(query, sets, scale=0.7):
    output, lse, weights = written_out(query, sets, scale)
    alone, no_lse, no_weights = attend_tokens(query, sets, scale=scale)
    assert no_lse is None
    assert no_weights is None
    torch.testing.assert_close(alone, output, **CLOSE)
    full, our_lse, our_weights = attend_tokens(query, sets, scale=scale, return_lse=True, return_attention=True)
    torch.testing.assert_close(full, output, **CLOSE)
    torch.testing.assert_close(our_lse, lse, **CLOSE)
    torch.testing.assert_close(list(our_weights), weights, **CLOSE)


@pytest.fixture(params=["whole", "chunks"])
def chunks(request, monkeypatch):
    """All queries at once, and 64 at a time, the fewest that a chunk has."""
    if request.param == "chunks":
        monkeypatch.setattr(softmax, "CHUNK", 1)


class TestOneSet:
    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    @pytest.mark.parametrize("dim_v", [4, 3])
    @pytest.mark.parametrize("weighted", [None, "shared", "by sample"])
    def test_against_the_definition(self, batch, dim_v, weighted):
        """The fused kernel where head sizes agree, the explicit path where they do not, or more is asked for."""
        log_weight = {
            None: None,
            "shared": log_weights(*(1,) * len(batch), 6),
            "by sample": log_weights(*batch, 6),
        }[weighted]
        check(draw(*batch, 5, 4), [tokens(batch, dim_v=dim_v, log_weight=log_weight, multiplicity=3)])

    @pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 200])
    def test_chunks_of_queries(self, length, chunks):
        query = draw(2, length, 4)
        check(query, [tokens()])
        check(draw(2, 4, length).mT, [tokens()])  # queries whose channels are apart in memory
        check(query, [tokens(dim_v=3), tokens(count=2, dim_v=3, seed=1, coefficient=-2)])

    @pytest.mark.parametrize("scale", [0.0, -1.5, 3.0])
    def test_any_scale(self, scale):
        check(draw(2, 5, 4), [tokens()], scale)

    def test_large_logits(self):
        query, part = 1e3 * draw(1, 5, 4), tokens((1,))
        fused = attend_tokens(query, [part], scale=1.0)[0]
        explicit, lse, _ = attend_tokens(query, [part], scale=1.0, return_lse=True)
        winners = (query @ part.key.mT).max(-1)
        torch.testing.assert_close(fused, part.value[0, winners.indices[0]][None], **CLOSE)
        torch.testing.assert_close(explicit, fused, **CLOSE)
        torch.testing.assert_close(lse, winners.values, **CLOSE)

    def test_rows_of_a_bias(self, chunks):
        rows = torch.arange(100) % 3
        bias = draw(2, 3, 6, seed=7)
        bias[0, 1, 2:] = -math.inf
        for log_weight in (None, log_weights(2, 6)):
            check(draw(2, 100, 4), [tokens(bias=bias, rows=rows, log_weight=log_weight)])

    def test_a_single_token_is_its_value(self):
        part = tokens(count=1)
        output, lse, (weights,) = attend_tokens(
            draw(2, 5, 4), [part], scale=1.0, return_lse=True, return_attention=True
        )
        torch.testing.assert_close(output, part.value.expand(2, 5, 4), **CLOSE)
        torch.testing.assert_close(lse, (draw(2, 5, 4) @ part.key.mT).squeeze(-1), **CLOSE)
        assert weights.eq(1).all()


class TestSeveralSets:
    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    @pytest.mark.parametrize("dim_v", [4, 3])
    def test_against_the_definition(self, batch, dim_v):
        sets = [
            tokens(batch, 6, 4, dim_v, multiplicity=5),
            tokens(batch, 1, 4, dim_v, seed=1, coefficient=-2, multiplicity=30),
            tokens(batch, 3, 4, dim_v, seed=2, coefficient=3, log_weight=log_weights(*batch, 3)),
        ]
        check(draw(*batch, 5, 4), sets)

    @pytest.mark.parametrize("coefficient", [2, -1, 0])
    def test_one_set_with_a_coefficient(self, coefficient):
        check(draw(2, 5, 4), [tokens(coefficient=coefficient)])

    def test_joint_sets_share_one_softmax(self):
        query = draw(2, 5, 4)
        for weighted in (False, True):
            fields = [{"log_weight": log_weights(2 if k else 1, 3 + k)} if weighted else {} for k in range(2)]
            sets = [tokens(count=3 + k, seed=k, **fields[k]) for k in range(2)]
            joint = join_sets(sets)
            assert joint.key.shape == (2, 7, 4)
            torch.testing.assert_close(joint.value, join_tokens([part.value for part in sets]))
            check(query, [joint])
            parts = [attend_tokens(query, [part], scale=0.7, return_lse=True)[:2] for part in sets]
            merged, lse = merge_attention(parts)
            output, expected, _ = attend_tokens(query, [joint], scale=0.7, return_lse=True)
            torch.testing.assert_close(merged, output, **CLOSE)
            torch.testing.assert_close(lse, expected, **CLOSE)


class TestAbsentTokens:
    def absent(self, *shape):
        """Log weights of which the second half is minus infinity."""
        weights = log_weights(*shape)
        weights[..., shape[-1] // 2 :] = -math.inf
        return weights

    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    def test_count_nothing(self, batch):
        part = tokens(batch, log_weight=self.absent(*batch, 6))
        check(draw(*batch, 5, 4), [part])
        left = TokenSet(part.key[..., :3, :], part.value[..., :3, :], part.log_weight[..., :3])
        for more in (False, True):
            ours, theirs = (
                attend_tokens(draw(*batch, 5, 4), [p], scale=0.7, return_lse=more)[: 1 + more] for p in (part, left)
            )
            torch.testing.assert_close(ours, theirs, **CLOSE)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("sets", ["fused", "explicit", "several"])
    def test_nothing_at_all_gives_zeros(self, sets, dtype):
        gone = torch.zeros(3, 6)
        gone[1] = -math.inf
        first = tokens((3,), dtype=dtype, log_weight=gone)
        others = [tokens((3,), 2, seed=1, dtype=dtype, coefficient=-1)] if sets == "several" else []
        query = draw(3, 5, 4, dtype=dtype)
        leaves = [query, first.key, first.value]
        for leaf in leaves:
            leaf.requires_grad_()
        more = sets != "fused"
        output, lse, weights = attend_tokens(query, [first, *others], scale=0.7, return_lse=more, return_attention=more)
        assert output[1].eq(0).all()
        assert output[[0, 2]].ne(0).any(-1).all()
        output.float().square().sum().backward()
        for leaf in leaves:
            assert leaf.grad.isfinite().all()
            assert leaf.grad[1].eq(0).all()
            assert leaf.grad[0].ne(0).any()
        if more:
            assert lse[1].eq(-math.inf).all()
            assert lse[[0, 2]].isfinite().all()
            assert weights[0][1].eq(0).all()
            torch.testing.assert_close(weights[0][0].sum(-1), torch.ones(5, dtype=weights[0].dtype))

    def test_the_gradient_of_the_log_sum_exp_is_finite(self):
        gone = torch.zeros(2, 6, dtype=torch.float64)
        gone[1] = -math.inf
        query = draw(2, 5, 4).requires_grad_()
        lse = attend_tokens(query, [tokens(log_weight=gone)], scale=0.7, return_lse=True)[1]
        lse[0].sum().backward()
        assert query.grad.isfinite().all()

    def test_a_row_of_the_bias_that_hides_everything(self):
        bias = torch.zeros(3, 6, dtype=torch.float64)
        bias[1] = -math.inf
        query = draw(2, 6, 4).requires_grad_()
        part = tokens(bias=bias, rows=torch.tensor([0, 1, 2, 2, 1, 0]))
        output, lse, (weights,) = attend_tokens(query, [part], scale=0.7, return_lse=True, return_attention=True)
        hidden, seen = [1, 4], [0, 2, 3, 5]
        assert output[:, hidden].eq(0).all()
        assert weights[:, hidden].eq(0).all()
        assert lse[:, hidden].eq(-math.inf).all()
        plain = TokenSet(part.key, part.value)
        torch.testing.assert_close(output[:, seen], attend_tokens(query, [plain], scale=0.7)[0][:, seen], **CLOSE)
        output.sum().backward()
        assert query.grad.isfinite().all()


class TestGradients:
    @pytest.mark.parametrize("dim_v", [4, 3])
    @pytest.mark.parametrize("several", [False, True])
    def test_against_the_definition(self, dim_v, several, chunks):
        gradients = []
        for attend in (attend_tokens, written_out):
            query = draw(2, 70, 4).requires_grad_()
            sets = [tokens(dim_v=dim_v, log_weight=log_weights(2, 6))]
            if several:
                sets.append(tokens(count=2, dim_v=dim_v, seed=1, coefficient=-1))
            leaves = [query, *(t for part in sets for t in (part.key, part.value))]
            for leaf in leaves:
                leaf.requires_grad_()
            output = attend(query, sets, scale=0.7)[0]
            gradients.append(torch.autograd.grad((output * draw(*output.shape, seed=9)).sum(), leaves))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-11)

    def test_explicit_attention_has_second_derivatives(self):
        query, part = draw(1, 3, 2).requires_grad_(), tokens((1,), 3, 2, 3)
        inputs = (query, part.key.requires_grad_(), part.value.requires_grad_())
        assert torch.autograd.gradgradcheck(
            lambda q, k, v: attend_tokens(q, [TokenSet(k, v)], scale=0.7, return_lse=True)[:2], inputs
        )


class TestHalfPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("several", [False, True])
    @pytest.mark.parametrize("single", [False, True], ids=["half tokens", "single tokens"])
    def test_is_as_good_as_the_kernel_of_torch(self, dtype, several, single):
        """Means arrive in single precision, as summaries hold them, or in half."""
        query = draw(2, 40, 16, dtype=dtype)
        made = [tokens(count=n, dim=16, dim_v=16, seed=n, dtype=torch.float32 if single else dtype) for n in (30, 1)]
        sets = [made[0], made[1]._replace(coefficient=-1)] if several else made[:1]
        output, lse, _ = attend_tokens(query, sets, scale=0.25, return_lse=several)
        assert output.dtype == dtype
        exact = [part._replace(key=part.key.double(), value=part.value.double()) for part in sets]
        truth, true_lse, _ = attend_tokens(query.double(), exact, scale=0.25, return_lse=several)
        kernel = torch.nn.functional.scaled_dot_product_attention(
            query[:, None], made[0].key[:, None].to(dtype), made[0].value[:, None].to(dtype), scale=0.25
        )[:, 0]
        theirs = (kernel.double() - attend_tokens(query.double(), exact[:1], scale=0.25)[0]).abs().max()
        assert (output.double() - truth).abs().max() <= 2 * theirs + 2 * torch.finfo(dtype).eps
        if several:
            torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)


class TestDropout:
    """Fixed seeds and a fixed number of draws: a mean that is off by 3 % of its noiseless value is seen."""

    DRAWS, DROPPED = 40000, 0.3

    def scores(self, attend, seed):
        """How many standard errors the mean of many outputs is from the output without dropout, by channel."""
        part = tokens((1,), 5, 4, 3)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            outputs = attend(draw(1, 1, 4).expand(1, self.DRAWS, 4), part)[0]
        exact = attend_tokens(draw(1, 1, 4), [part], scale=0.7)[0][0, 0]
        return (outputs.mean(0) - exact) / (outputs.std(0) / self.DRAWS**0.5)

    @pytest.mark.parametrize("seed", [0, 1, 2])
    @pytest.mark.parametrize("fused", [True, False])
    def test_mean(self, seed, fused):
        def attend(query, part):
            part = part if not fused else part._replace(value=torch.nn.functional.pad(part.value, (0, 1)))
            return attend_tokens(query, [part], scale=0.7, dropout_p=self.DROPPED)[0][..., :3]

        assert self.scores(attend, seed).abs().max() <= 5

    def test_a_biased_mean_is_seen(self):
        def attend(query, part):
            return 1.03 * attend_tokens(query, [part], scale=0.7, dropout_p=self.DROPPED)[0]

        assert self.scores(attend, 0).abs().max() > 5

    def test_attention_weights_are_returned_undropped(self):
        query, part = draw(2, 50, 4), tokens()
        _, _, (weights,) = attend_tokens(query, [part], scale=0.7, dropout_p=0.5, return_attention=True)
        expected = attend_tokens(query, [part], scale=0.7, return_attention=True)[2][0]
        torch.testing.assert_close(weights, expected, **CLOSE)

    def test_a_set_of_one_token_is_never_dropped(self):
        query, constant = draw(2, 50, 4), tokens(count=1)
        sets = [tokens(seed=1), constant._replace(coefficient=-2)]
        output = attend_tokens(query, sets, scale=0.7, dropout_p=1.0)[0]
        torch.testing.assert_close(output, -2 * constant.value.expand(2, 50, 4), **CLOSE)
        for more in (True, False):
            output = attend_tokens(query, [constant], scale=0.7, dropout_p=1.0, return_lse=more)[0]
            torch.testing.assert_close(output, constant.value.expand(2, 50, 4), **CLOSE)

    def test_none_without_it(self):
        query = draw(2, 50, 4)
        for sets in ([tokens()], [tokens(), tokens(seed=1)]):
            once, twice = (attend_tokens(query, sets, scale=0.7, dropout_p=0.0)[0] for _ in range(2))
            assert torch.equal(once, twice)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=["no batch", "no queries"])
def test_nothing_to_attend_from(shape):
    batch, length = shape
    for fields in ({}, {"log_weight": torch.zeros(batch, 6)}):
        for sets in ([tokens((batch,), **fields)], [tokens((batch,), **fields), tokens((batch,), 2, seed=1)]):
            output, lse, weights = attend_tokens(
                draw(batch, length, 4), sets, scale=1.0, return_lse=True, return_attention=True
            )
            assert (output.shape, lse.shape, weights[0].shape) == ((batch, length, 4), shape, (batch, length, 6))
            assert attend_tokens(draw(batch, length, 4), sets, scale=1.0)[0].shape == (batch, length, 4)
