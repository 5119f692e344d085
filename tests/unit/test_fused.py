"""The fused kernel wrapped: values, derivatives of every kind, and transforms, against attention written out."""

from __future__ import annotations

import inspect
from unittest.mock import Mock

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tensorattn import contraction, positionwise
from tensorattn import fused as kernel
from tensorattn.fused import fused_attention, is_differentiated, positional

CLOSE = {"rtol": 1e-11, "atol": 1e-12}
BATCHES = [(), (2,), (2, 3), (2, 1, 3)]

# torch scripts some decompositions the first time that it differentiates forward.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(batch=(2,)):
    """Queries, keys, values and a bias of the tokens."""
    return draw(*batch, 5, 4), draw(*batch, 6, 4, seed=1), draw(*batch, 6, 4, seed=2), draw(*batch, 1, 6, seed=3)


def written_out(query, key, value, bias, scale=0.3):
    logits = scale * query @ key.mT
    return torch.softmax(logits if bias is None else logits + bias, -1) @ value


def fused(query, key, value, bias, scale=0.3):
    return fused_attention(query, key, value, bias, scale)


@pytest.fixture(params=[False, True], ids=["as they are", "filled up"])
def filled(request, monkeypatch):
    """Give the kernel tokens as they are, or filled up to whole vectors."""
    monkeypatch.setattr(kernel, "_leaves_a_tail", lambda query, key: request.param)
    return request.param


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_values(batch, biased, filled):
    *tensors, bias = arguments(batch)
    bias = bias if biased else None
    torch.testing.assert_close(fused(*tensors, bias), written_out(*tensors, bias), **CLOSE)
    apart = [t.mT.contiguous().mT for t in tensors]
    torch.testing.assert_close(fused(*apart, bias), written_out(*tensors, bias), **CLOSE)


@forward_mode
@pytest.mark.parametrize("biased", [False, True])
def test_first_and_second_derivatives_in_both_directions(biased, filled):
    *tensors, bias = (tensor[:1, :3].requires_grad_() for tensor in arguments())
    inputs = (*tensors, bias[..., :3]) if biased else (*tensors, None)
    function = lambda q, k, v, b: fused(q, k, v, b)  # noqa: E731
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs)


def test_first_derivatives_are_those_of_the_kernel():
    *tensors, bias = arguments()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    for function in (fused, written_out):
        output = function(*leaves, bias)
        ours = torch.autograd.grad(output, leaves, draw(*output.shape, seed=4), retain_graph=True)
        again = torch.autograd.grad(output, leaves, draw(*output.shape, seed=4))
        for one, two in zip(ours, again, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)
        if function is fused:
            kept = ours
    for one, two in zip(kept, ours, strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


@forward_mode
def test_transforms(filled):
    query, key, value, bias = arguments()
    queries = torch.stack([query, draw(*query.shape, seed=5), draw(*query.shape, seed=6)])
    results = []
    for function in (fused, written_out):
        loss = lambda q, f=function: f(q, key, value, bias).square().sum()  # noqa: E731
        over_keys = torch.vmap(lambda k, b, f=function: f(query, k, value, b), in_dims=(0, None))
        results.append(
            (
                torch.vmap(lambda q, f=function: f(q, key, value, bias), in_dims=0)(queries),
                over_keys(torch.stack([key, 2 * key]), bias),
                torch.func.grad(loss)(query),
                torch.vmap(torch.func.grad(loss))(queries),
                torch.func.grad(lambda q, f=loss: torch.vmap(f)(q).sum())(queries),
                torch.func.jvp(loss, (query,), (queries[1],))[1],
                torch.func.hessian(loss)(query),
                torch.func.jacrev(torch.func.jacrev(loss))(query),
            )
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_what_is_differentiated():
    plain, leaf = torch.ones(2), torch.ones(2, requires_grad=True)
    assert not is_differentiated(plain)
    assert is_differentiated(plain, leaf)
    with torch.no_grad():
        assert not is_differentiated(leaf)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        assert is_differentiated(torch.autograd.forward_ad.make_dual(plain, plain))


FUNCTIONS = [
    function
    for module in (contraction, kernel, positionwise)
    for function in vars(module).values()
    if isinstance(function, type) and issubclass(function, torch.autograd.Function)
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_no_signature_is_looked_into_at_every_call(function):
    assert str(inspect.signature(function.forward)) == "(*arguments)"


def test_a_positional_function_is_what_it_was():
    def forward(one, two):
        return one - two

    assert positional(forward) is forward
    assert forward(5, 3) == 2


@pytest.mark.parametrize(
    ("length", "size", "given"),
    [
        (128, 14, 16),
        (4096, 28, 32),
        (128, 32, 32),
        (512, 100, 100),  # a rest of four is taken one by one
        (512, 101, 112),
        (4096, 200, 200),  # a small part
        (100, 14, 14),  # few queries
        (128, 56, 56),
    ],
)
def test_tokens_are_filled_up_to_whole_vectors(length, size, given, monkeypatch):
    seen = Mock(wraps=kernel.F.scaled_dot_product_attention)
    monkeypatch.setattr(kernel.F, "scaled_dot_product_attention", seen)
    query, key = draw(2, length, 4), draw(2, size, 4, seed=1)
    hidden = torch.zeros(2, 1, size, dtype=torch.float64)
    hidden[..., ::2] = -torch.inf
    for bias in (None, hidden):
        torch.testing.assert_close(fused(query, key, key, bias), written_out(query, key, key, bias), **CLOSE)
        assert [part.shape[-2] for part in seen.call_args.args] == [length, given, given]
