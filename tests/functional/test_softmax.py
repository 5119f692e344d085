"""Attention to sets of tokens against softmaxes written out, one query at a time; its derivatives; and merging."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from grids import close, forward_mode
from modules import draw, refused
from torch.autograd import gradcheck, gradgradcheck

import tensorattn as ta
from tensorattn.errors import DtypeError, ShapeError
from tensorattn.functional.softmax import CHUNK, Tokens, TokenSet, attend_tokens

BATCHES = [(), (2,), (2, 3), (2, 1, 2)]


def log_weights(*shape, seed=0):
    return draw(*shape, seed=seed + 30).sigmoid().log()


def tokens(*sets, batch=(2,), dim=4, dim_v=4, dtype=torch.float64, log_weight=None):
    """Tokens of some sets, drawn at random."""
    count = sum(each.length for each in sets)
    key, value = draw(*batch, count, dim, seed=10, dtype=dtype), draw(*batch, count, dim_v, seed=20, dtype=dtype)
    return Tokens(key, value, log_weight, sets)


def written_out(query, given, scale=0.7):
    """Outputs, log-sum-exps and weights from the definition, batch entry by batch entry and query by query."""
    batch, length = query.shape[:-2], query.shape[-2]
    outputs, lses, weights = [], [], [[] for _ in given.sets]
    starts = [0, *itertools.accumulate(each.length for each in given.sets)]
    for place in itertools.product(*map(range, batch), range(length)):
        *b, i = place
        output, lse = 0.0, 0.0
        for each, start, end, rows in zip(given.sets, starts, starts[1:], weights, strict=False):
            logits = scale * given.key[*b, start:end] @ query[place]
            if given.log_weight is not None:
                logits = logits + given.log_weight.expand(*batch, -1)[*b, start:end]
            if each.bias is not None:
                logits = logits + each.bias.expand(*batch, *each.bias.shape[-2:])[*b, each.rows[i]]
            mass = logits.exp()
            rows.append(mass / mass.sum())
            output = output + each.coefficient * (rows[-1] @ given.value[*b, start:end])
            count = each.multiplicity if given.log_weight is None else 1
            lse = lse + each.coefficient * (mass.sum() * count).log()
        outputs.append(output)
        lses.append(lse)

    def stacked(rows, *sizes):
        return torch.stack(rows).reshape(*batch, length, *sizes)

    by_set = [stacked(rows, each.length) for each, rows in zip(given.sets, weights, strict=True)]
    return stacked(outputs, given.value.shape[-1]), stacked(lses), by_set


def check(query, given, scale=0.7):
    """Compare what is fused and what is written out with the definition."""
    output, lse, weights = written_out(query, given, scale)
    alone = attend_tokens(query, given, scale=scale)
    assert alone.lse is None and alone.attention is None
    full = attend_tokens(query, given, scale=scale, return_lse=True, return_attention=True)
    close([alone.output, full.output, full.lse, *full.attention], [output, output, lse, *weights])


SETS = {
    "one": (TokenSet(6, multiplicity=3),),
    "with a coefficient": (TokenSet(6, coefficient=-2),),
    "several": (TokenSet(4, multiplicity=5), TokenSet(1, -2, 20, constant=True), TokenSet(3, 3)),
}


class TestValues:
    @pytest.mark.parametrize("sets", SETS)
    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    def test_against_the_definition(self, batch, sets):
        """Head sizes of values smaller and larger than those of keys, weights of none, of all and of each sample."""
        count = sum(each.length for each in SETS[sets])
        query = draw(*batch, 5, 4)
        for dim_v, shape in ((4, None), (3, (1,) * len(batch)), (6, batch)):
            weight = None if shape is None else log_weights(*shape, count)
            check(query, tokens(*SETS[sets], batch=batch, dim_v=dim_v, log_weight=weight))
            check(draw(*batch, 4, 5).mT, tokens(*SETS[sets], batch=batch, dim_v=dim_v, log_weight=weight))

    @pytest.mark.parametrize("scale", [0.0, -1.5, 3.0])
    def test_any_scale(self, scale):
        check(draw(2, 5, 4), tokens(*SETS["several"]), scale)

    def test_large_logits(self):
        query, given = 1e3 * draw(1, 5, 4), tokens(TokenSet(6), batch=(1,))
        fused = attend_tokens(query, given, scale=1.0).output
        explicit = attend_tokens(query, given, scale=1.0, return_lse=True)
        winners = (query @ given.key.mT).max(-1)
        close([fused, explicit.output, explicit.lse], [given.value[0, winners.indices[0]][None]] * 2 + [winners.values])

    def test_rows_of_a_bias(self):
        bias = draw(2, 3, 6, seed=7)
        bias[0, 1, 2:] = -math.inf
        for weight in (None, log_weights(2, 6)):
            check(draw(2, 10, 4), tokens(TokenSet(6, bias=bias, rows=torch.arange(10) % 3), log_weight=weight))
            other = TokenSet(2, -1)
            weight = None if weight is None else log_weights(2, 8)
            check(draw(2, 10, 4), tokens(TokenSet(6, bias=bias, rows=torch.arange(10) % 3), other, log_weight=weight))

    def test_a_chunk_at_a_time(self):
        """Where nothing is differentiated many queries attend in parts; the numbers are those of all at once."""
        length, bias = 2 * CHUNK // 12 + 3, draw(1, 4, 5, seed=7)
        query, rows = draw(1, length, 6), torch.arange(length) % 4
        given = tokens(TokenSet(5, bias=bias, rows=rows), TokenSet(1, -1, constant=True), batch=(1,), dim=6, dim_v=6)
        leaf = query.clone().requires_grad_()
        for more in ({}, {"return_lse": True, "return_attention": True}):
            parts, whole = (attend_tokens(each, given, scale=0.7, **more) for each in (query, leaf))
            close([parts.output, *(parts.attention or ())], [whole.output, *(whole.attention or ())])
            if more:
                close([parts.lse], [whole.lse])

    @pytest.mark.parametrize(("batch", "length"), [((0,), 5), ((3,), 0), ((2, 0), 4)], ids=str)
    def test_nothing_to_attend_from(self, batch, length):
        for weight in (None, torch.zeros(*batch, 8)):
            given, query = tokens(*SETS["several"], batch=batch, log_weight=weight), draw(*batch, length, 4)
            full = attend_tokens(query, given, scale=1.0, return_lse=True, return_attention=True)
            assert (full.output.shape, full.lse.shape) == ((*batch, length, 4), (*batch, length))
            assert [part.shape for part in full.attention] == [(*batch, length, n) for n in (4, 1, 3)]
            assert attend_tokens(query, given, scale=1.0).output.shape == (*batch, length, 4)


class TestAbsentTokens:
    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    def test_count_nothing(self, batch):
        weight = log_weights(*batch, 6)
        weight[..., 3:] = -math.inf
        given = tokens(TokenSet(6), batch=batch, log_weight=weight)
        query = draw(*batch, 5, 4)
        check(query, given)
        left = Tokens(given.key[..., :3, :], given.value[..., :3, :], weight[..., :3], (TokenSet(3),))
        for more in (False, True):
            ours, theirs = (attend_tokens(query, each, scale=0.7, return_lse=more) for each in (given, left))
            close([ours.output], [theirs.output])
            if more:
                close([ours.lse], [theirs.lse])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("sets", ["one", "several"])
    def test_nothing_at_all_gives_zeros(self, sets, dtype):
        weight = torch.zeros(3, sum(each.length for each in SETS[sets]))
        weight[1] = -math.inf
        query = draw(3, 5, 4, dtype=dtype).requires_grad_()
        given = tokens(*SETS[sets], batch=(3,), dtype=dtype, log_weight=weight)
        leaves = [query, given.key.requires_grad_(), given.value.requires_grad_()]
        for more in (False, True):
            found = attend_tokens(query, given, scale=0.7, return_lse=more, return_attention=more)
            assert found.output[1].eq(0).all() and found.output[[0, 2]].ne(0).any(-1).all()
            loss = found.output.float().square().sum()
            if more:
                assert found.lse[1].eq(-math.inf).all() and found.lse[[0, 2]].isfinite().all()
                assert found.attention[0][1].eq(0).all()
                loss = loss + found.lse[0].sum()
            for grad in torch.autograd.grad(loss, leaves):
                assert grad.isfinite().all() and grad[1].eq(0).all() and grad[0].ne(0).any()

    def test_a_row_of_the_bias_that_hides_everything(self):
        bias = torch.zeros(3, 6, dtype=torch.float64)
        bias[1] = -math.inf
        query = draw(2, 6, 4).requires_grad_()
        given = tokens(TokenSet(6, bias=bias, rows=torch.tensor([0, 1, 2, 2, 1, 0])))
        hidden, seen = [1, 4], [0, 2, 3, 5]
        plain = attend_tokens(query, given._replace(sets=(TokenSet(6),)), scale=0.7).output
        for more in (False, True):
            found = attend_tokens(query, given, scale=0.7, return_lse=more, return_attention=more)
            assert found.output[:, hidden].eq(0).all()
            close([found.output[:, seen]], [plain[:, seen]])
            if more:
                assert found.attention[0][:, hidden].eq(0).all() and found.lse[:, hidden].eq(-math.inf).all()
            (grad,) = torch.autograd.grad(found.output.sum(), query)
            assert grad.isfinite().all()

    @pytest.mark.parametrize("held", [math.nan])
    @pytest.mark.parametrize("count", [1, 2, 40])
    def test_what_is_not_a_number_is_not_taken_for_absent(self, count, held):
        """The kernel for CPUs gives zeros where all logits are NaN, which hides the mistake."""
        for sets in ((TokenSet(count),), (TokenSet(count), TokenSet(2, -1))):
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                for of_all in (True, False):
                    given, query = tokens(*sets, dtype=dtype), draw(2, 5, 4, dtype=dtype)
                    given.key[0, slice(0, count) if of_all else 0, 0] = held
                    plain = attend_tokens(query, given, scale=0.7)
                    more = attend_tokens(query, given, scale=0.7, return_lse=True)
                    for output in (plain.output, more.output):
                        assert output[0].isnan().all() and output[1].isfinite().all()


class TestDerivatives:
    def inputs(self, batch=(1,)):
        """Queries, keys, values, a bias of the tokens."""
        return [
            tensor.requires_grad_()
            for tensor in (draw(*batch, 3, 3), draw(*batch, 4, 3, seed=1), draw(*batch, 4, 3, seed=2),
                           draw(*batch, 2, 4, seed=3))
        ]  # fmt: skip

    def attend(self, query, key, value, bias, function=None, more=False, coefficient=1):
        own = TokenSet(4, coefficient, bias=bias, rows=torch.tensor([0, 1, 0]))
        given = Tokens(key, value, None, (own,))
        if function is not None:
            return function(query, given)[0]
        found = attend_tokens(query, given, scale=0.7, return_lse=more)
        return (found.output, found.lse) if more else found.output

    @forward_mode
    @pytest.mark.parametrize("more", [False, True], ids=["kernel", "written out"])
    def test_of_first_and_second_order_in_both_directions(self, more):
        function = lambda *t: self.attend(*t, more=more)  # noqa: E731
        assert gradcheck(function, self.inputs(), check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(function, self.inputs())

    def test_are_those_of_the_definition(self):
        gradients = []
        for function in (None, written_out):
            leaves = self.inputs(batch=(2,))
            output = self.attend(*leaves, function=function, coefficient=-2)
            gradients.append(torch.autograd.grad((output * draw(*output.shape, seed=9)).sum(), leaves))
        close(*gradients)

    @forward_mode
    def test_under_transforms(self):
        query, key, value, bias = (tensor.detach() for tensor in self.inputs(batch=(2,)))
        queries = torch.stack([query, draw(*query.shape, seed=5), draw(*query.shape, seed=6)])

        def plain(query, key, value, bias):
            logits = 0.7 * query @ key.mT + bias[..., [0, 1, 0], :]
            return torch.softmax(logits, -1) @ value

        results = []
        for function in (self.attend, plain):
            loss = lambda q, f=function: f(q, key, value, bias).square().sum()  # noqa: E731
            over_keys = torch.vmap(lambda k, b, f=function: f(query, k, value, b), in_dims=(0, None))
            results.append(
                (
                    torch.vmap(lambda q, f=function: f(q, key, value, bias))(queries),
                    over_keys(torch.stack([key, 2 * key]), bias),
                    torch.vmap(torch.func.grad(loss))(queries),
                    torch.func.grad(lambda q, f=loss: torch.vmap(f)(q).sum())(queries),
                    torch.func.jvp(loss, (query,), (queries[1],))[1],
                    torch.func.hessian(loss)(query),
                    torch.func.jacrev(torch.func.jacrev(loss))(query),
                )
            )
        close(*results, rtol=1e-9, atol=1e-10)


class TestHalfPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("several", [False, True])
    @pytest.mark.parametrize("single", [False, True], ids=["half tokens", "single tokens"])
    def test_is_as_good_as_the_kernel_of_torch(self, dtype, several, single):
        """Means arrive in single precision, as summaries hold them, or in half."""
        query = draw(2, 40, 16, dtype=dtype)
        sets = (TokenSet(30), TokenSet(1, -1, constant=True)) if several else (TokenSet(30),)
        given = tokens(*sets, dim=16, dim_v=16, dtype=torch.float32 if single else dtype)
        exact = given._replace(key=given.key.double(), value=given.value.double())
        first = exact._replace(key=exact.key[:, :30], value=exact.value[:, :30], sets=sets[:1])
        found = attend_tokens(query, given, scale=0.25, return_lse=several)
        truth = attend_tokens(query.double(), exact, scale=0.25, return_lse=True)
        assert found.output.dtype == dtype
        kernel = torch.nn.functional.scaled_dot_product_attention(
            query[:, None], first.key[:, None].to(dtype), first.value[:, None].to(dtype), scale=0.25
        )[:, 0]
        theirs = (kernel.double() - attend_tokens(query.double(), first, scale=0.25).output).abs().max()
        assert (found.output.double() - truth.output).abs().max() <= 2 * theirs + 2 * torch.finfo(dtype).eps
        if several:
            close([found.lse.double()], [truth.lse], rtol=1e-5, atol=1e-5)

    def test_counts_that_half_precision_does_not_hold(self):
        """Only the ratios of weights decide; 1e6 positions behind a mean are not rounded away."""
        weight = torch.tensor([1e6, 1.001e6, 0.999e6]).log().expand(2, 3)
        given, query = tokens(TokenSet(3), dtype=torch.float16, log_weight=weight), draw(2, 5, 4, dtype=torch.float16)
        exact = attend_tokens(
            query.double(), Tokens(given.key.double(), given.value.double(), weight, given.sets), scale=0.5
        ).output
        assert (attend_tokens(query, given, scale=0.5).output.double() - exact).abs().max() < 4e-3


class TestDropout:
    """Fixed seeds and a fixed number of draws: a mean that is off by 3 % of its noiseless value is seen."""

    DRAWS, DROPPED = 40000, 0.3

    def scores(self, dim_v, seed=0, bias=1.0):
        """How many standard errors the mean of many outputs is from the output without dropout, by channel."""
        given, query = tokens(TokenSet(5), batch=(1,), dim_v=dim_v), draw(1, 1, 4)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            many = query.expand(1, self.DRAWS, 4)
            outputs = bias * attend_tokens(many, given, scale=0.7, dropout_p=self.DROPPED).output[0]
        exact = attend_tokens(query, given, scale=0.7).output[0, 0]
        return ((outputs.mean(0) - exact) / (outputs.std(0) / self.DRAWS**0.5)).abs().max()

    def test_mean(self):
        assert self.scores(dim_v=3) <= 5
        assert self.scores(dim_v=4, seed=1) <= 5
        assert self.scores(dim_v=3, bias=1.03) > 5

    def test_what_is_never_dropped(self):
        query = draw(2, 50, 4)
        found = attend_tokens(query, tokens(TokenSet(6)), scale=0.7, dropout_p=0.5, return_attention=True)
        kept = attend_tokens(query, tokens(TokenSet(6)), scale=0.7, return_attention=True)
        close(found.attention, kept.attention)  # as they are returned
        given = tokens(TokenSet(5), TokenSet(1, -2, constant=True))
        for more in (False, True):
            output = attend_tokens(query, given, scale=0.7, dropout_p=1.0, return_lse=more).output
            close([output], [-2 * given.value[:, 5:].expand(2, 50, 4)])
        once, twice = (attend_tokens(query, given, scale=0.7, dropout_p=0.0).output for _ in range(2))
        assert torch.equal(once, twice)


class TestMerge:
    def parts(self):
        query, given = draw(2, 5, 4), tokens(TokenSet(7))
        cut = [(slice(0, 3), TokenSet(3)), (slice(3, 4), TokenSet(1)), (slice(4, 7), TokenSet(3))]
        parts = [Tokens(given.key[:, s], given.value[:, s], None, (each,)) for s, each in cut]
        found = [attend_tokens(query, part, scale=0.7, return_lse=True) for part in parts]
        whole = attend_tokens(query, given, scale=0.7, return_lse=True)
        return [(part.output, part.lse) for part in found], (whole.output, whole.lse)

    def test_is_attention_to_all(self):
        parts, whole = self.parts()
        close(ta.merge_attention(parts), whole)
        close(ta.merge_attention([ta.merge_attention(parts[:2]), parts[2]]), whole)
        close(ta.merge_attention(parts[:1]), parts[0])

    def test_of_empty_parts(self):
        (first, second, _), _ = self.parts()
        nothing = torch.zeros_like(first[0]), torch.full_like(first[1], -math.inf)
        close(ta.merge_attention([first, nothing, second]), ta.merge_attention([first, second]))
        leaf = [tensor.clone().requires_grad_() for tensor in nothing]
        output, lse = ta.merge_attention([leaf, nothing])
        assert output.eq(0).all() and lse.eq(-math.inf).all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), leaf))

    def test_types_and_derivatives(self):
        (first, second, _), _ = self.parts()
        half = [(output.bfloat16(), lse.float()) for output, lse in (first, second)]
        output, lse = ta.merge_attention(half)
        assert (output.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        inputs = [tensor[:1, :2, :2].clone().requires_grad_() if tensor.dim() == 3 else
                  tensor[:1, :2].clone().requires_grad_() for tensor in (*first, *second)]  # fmt: skip
        assert gradcheck(lambda a, b, c, d: ta.merge_attention([(a, b), (c, d)]), inputs)

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_messages(self, device):
        make = lambda *shape: torch.ones(shape, device=device)  # noqa: E731
        output, lse = make(2, 30, 5), make(2, 30)
        shapes = "outputs have shape (2, 30, 5) in parts[0] but (2, 31, 5) in parts[1]."
        cases = [
            ([], "parts is empty, but at least one output with its log-sum-exp is needed."),
            ([(output, lse), (make(2, 31, 5), make(2, 31))], shapes),
            ([(output, lse), output], "parts[1] must be an output and its log-sum-exp, got Tensor."),
            (3, "parts must hold outputs with their log-sum-exps, got 3."),
            ([(output, make(2, 1))], "parts[0] has output (2, 30, 5) but log-sum-exp (2, 1)."),
        ]
        for parts, rule in cases:
            refused(ShapeError, f"merge_attention: {rule}", ta.merge_attention, parts)
        for wrong, rule in (
            ([(output, None)], "the log-sum-exp of parts[0] must be a torch.Tensor, got NoneType."),
            ([(output, lse), (output.int(), lse)], "the output of parts[1] must be floating point, got torch.int32."),
        ):
            refused(DtypeError, f"merge_attention: {rule}", ta.merge_attention, wrong)
