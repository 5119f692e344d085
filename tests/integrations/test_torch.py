"""The door of PyTorch: attention alone, in encoder layers and encoders, whose fast ways go past it."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from contract import Case, every_check, host, made, outputs, swap
from torch import nn

import tensorattn as ta
from tensorattn.errors import AdapterError, OptionError

GRID = (2, 3, 4)
P = math.prod(GRID)


def encoder(**options):
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


class Classifier(nn.Module):
    """A vision transformer of its user's own, sequence first, with a class token."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.attn = nn.MultiheadAttention(16, 2, bias=False)

    def forward(self, x):
        x = torch.cat([self.token.expand(-1, x.shape[1], -1), x])
        return (x + self.attn(x, x, x, need_weights=False)[0]).mean(0)


LAYERS = ("layers.0.self_attn", "layers.1.self_attn")
CASES = {
    "encoder": Case(encoder, lambda: (torch.randn(2, P, 16),), LAYERS, GRID, 0, ("self_attn",), {"grid": GRID}),
    "own": Case(Classifier, lambda: (torch.randn(P + 1, 2, 16),), ("attn",), (5, 5), 1, ("attn",), {"grid": (5, 5), "prefix": 1}),
}  # fmt: skip


@every_check(CASES)
def test_contract(case, check):
    check(case)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_no_fast_way_goes_past_the_operator(nested, grad):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x, padding = torch.randn(2, P, 16), torch.zeros(2, P, dtype=torch.bool)
    padding[1, -4:] = True
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        exact = model(x, src_key_padding_mask=padding)
        ta.swap_attention(model, "flattened", grid=GRID)
        found = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(found[~padding], exact[~padding])
        ta.restore_attention(model)
        ta.swap_attention(model, "kao_kv", grid=GRID)
        cheap = model(x, src_key_padding_mask=padding)
        assert (cheap - found)[~padding].abs().max() > 1e-3
        changed = x.masked_fill(padding.unsqueeze(-1), 9.0)
        torch.testing.assert_close(model(changed, src_key_padding_mask=padding)[~padding], cheap[~padding])
    ta.restore_attention(model)
    assert (model.use_nested_tensor, model.layers[0].activation_relu_or_gelu) == (nested, 1)


def test_a_single_sequence():
    case = CASES["own"]
    attn, x = made(case).attn, torch.randn(26, 16)
    exact = attn(x, x, x, need_weights=False)[0]
    ta.swap_attention(attn, "flattened", grid=(5, 5), prefix=1)
    torch.testing.assert_close(attn(x, x, x, need_weights=False)[0], exact)
    padding = torch.arange(26) > 20
    masked = attn(x, x, x, need_weights=False, key_padding_mask=padding)[0]
    ta.restore_attention(attn)
    torch.testing.assert_close(masked, attn(x, x, x, need_weights=False, key_padding_mask=padding)[0])


NO = "which has no meaning for operators over a grid."


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"need_weights": True}, f"attn was called with need_weights, {NO}"),
        ({"attn_mask": torch.zeros(26, 26)}, f"attn was called with attn_mask, {NO}"),
        ({"is_causal": True}, f"attn was called with is_causal, {NO}"),
        ({"key": torch.zeros(26, 2, 16)}, f"attn was called with keys of another sequence, {NO}"),
        ({"key_padding_mask": torch.ones(2, 26)}, "attn was called with a key_padding_mask that is neither 0 nor minus infinity."),
        ({"query": torch.zeros(25, 2, 16)}, "in attn, grid (5, 5) has 25 positions, but query has 24 tokens behind a prefix of 1."),
    ],
)  # fmt: skip
def test_what_a_call_may_not_ask(asked, message):
    model = made(CASES["own"])
    swap(model, CASES["own"], "kao_kv")
    x = asked.get("query", torch.zeros(26, 2, 16))
    given = {"query": x, "key": x, "value": x, "need_weights": False, **asked}
    with pytest.raises(AdapterError) as error:
        model.attn(**given)
    assert str(error.value) == message


def refused(model, message, *args, **asked):
    before = [(type(each), sorted(vars(each))) for each in model.modules()]
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ta.TensorAttentionError) as error:
        ta.swap_attention(model, *args, **asked)
    assert str(error.value) == f"swap_attention: {message}"
    assert [(type(each), sorted(vars(each))) for each in model.modules()] == before
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())


LEAVE = "\n  Leave it out by layers=, or keep the model."


def test_refusals_of_models():
    whole = nn.Transformer(16, 4, 1, 1, 32, dropout=0.0, batch_first=True)
    refused(
        whole,
        f"decoder.layers.0.self_attn (MultiheadAttention) belongs to a decoder, whose masks are P×P.{LEAVE}",
        grid=GRID,
    )
    report = ta.swap_attention(whole, grid=GRID, layers=lambda name, _: {} if name.startswith("encoder") else None)
    assert [layer.name for layer in report.layers] == ["encoder.layers.0.self_attn"]
    assert dict(report.kept) == {
        "decoder.layers.0.self_attn": "layers leaves it out",
        "decoder.layers.0.multihead_attn": "layers leaves it out",
    }
    refused(
        nn.MultiheadAttention(16, 4, add_zero_attn=True),
        f"the model (MultiheadAttention) adds a key that is no token (add_bias_kv or add_zero_attn).{LEAVE}",
        grid=GRID,
    )
    refused(
        nn.Linear(3, 3),
        "Linear has no attention layer that is known; hosts are: timm, transformers, monai, diffusers, torch.\n"
        "  To add attention to a network of convolutions, put ResidualAttention behind a level.",
    )
    refused(
        encoder(),
        "layers.0.self_attn (MultiheadAttention) does not tell its grid.\n  Give grid=, the sizes of the modes.",
    )
    dropping = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1)
    refused(
        dropping,
        "self_attn (MultiheadAttention) drops attention weights with probability 0.1 in training, which operator "
        "'clustered' cannot.\n  Say attention_dropout=0.0 to train without.",
        grid=GRID,
    )
    ta.swap_attention(dropping, grid=GRID, attention_dropout=0.0)
    refused(dropping, "the attention of the model is swapped already.\n  Call restore_attention(model).", grid=GRID)
    with pytest.raises(AdapterError, match=r"restore_attention: the attention of the model is not swapped\."):
        ta.restore_attention(encoder())


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"operator": "none"}, f"there is no operator 'none'; the operators are: {', '.join(ta.OPERATORS)}."),
        ({"operator": "kao_kv", "tokens": 3}, "operator 'kao_kv' has no option 'tokens'; its options are: none."),
        ({"tokens": 0}, "tokens must be at least 1, got 0."),
        ({"tokens": "auto"}, "tokens='auto' needs verify=: inputs to choose them by."),
        ({"grid": "own"}, "grid must be 'auto' or given in numbers, got 'own'."),
        ({"grid": (2, 0)}, "every mode needs at least 1 index, but grid has size 0 for mode 1."),
        (
            {"attention_dropout": 0.5},
            "attention_dropout drops attention weights with probability 0.5 in training, which operator 'clustered' "
            "cannot.\n  Say attention_dropout=0.0 to train without.",
        ),
        ({"prefix": -1}, "prefix must be at least 0, got -1."),
        (
            {"layers": lambda name, module: True},
            "layers must return None or a dictionary, got True for layers.0.self_attn.",
        ),
        ({"layers": ["layers.0"]}, "layers must be a function of a name and a module, got list."),
        ({"attention_dropout": 2}, "attention_dropout must be between 0 and 1, got 2."),
        ({"verify": torch.zeros(2, P, 16)}, "verify must be a tuple or a dictionary of inputs, got Tensor."),
        (
            {"verify": (torch.zeros(2, P + 1, 16),)},
            "in layers.0.self_attn, grid (2, 3, 4) has 24 positions, but query has 25 tokens.\n"
            "  Class and register tokens are a prefix: prefix=1.",
        ),
    ],
)
def test_refusals_of_arguments(asked, message):
    refused(encoder().eval(), message, **{"grid": GRID, **asked})


def test_refusals_of_what_is_no_model():
    for function in (ta.swap_attention, ta.restore_attention):
        with pytest.raises(OptionError, match=rf"^{function.__name__}: model must be an nn.Module, got NoneType\.$"):
            function(None)


def test_layers_say_what_differs():
    def layers(name, module):
        return {"layers.0.self_attn": {"tokens": 5}, "layers.1.self_attn": {"operator": "kao_kv", "grid": (4, 6)}}[name]

    report = ta.swap_attention(encoder(), grid=GRID, tokens=9, layers=layers)
    found = [(layer.operator, layer.options, layer.grid) for layer in report.layers]
    assert found == [("clustered", {"tokens": 5}, GRID), ("kao_kv", {}, (4, 6))]


def test_lora_may_be_there_before():
    peft, case = host("peft"), CASES["encoder"]
    config = peft.LoraConfig(r=2, target_modules=["self_attn"], init_lora_weights=False)
    tuned = peft.get_peft_model(made(case), config).eval()
    torch.backends.mha.set_fastpath_enabled(False)  # it goes past LoRA
    exact = outputs(tuned, case)
    torch.backends.mha.set_fastpath_enabled(True)
    report = swap(tuned, case, "flattened")
    assert [layer.name for layer in report.layers] == [f"base_model.model.{name}.base_layer" for name in LAYERS]
    torch.testing.assert_close(outputs(tuned, case), exact)
    ta.restore_attention(tuned)


def test_tokens_are_chosen_for_each_layer():
    case = CASES["encoder"]
    model, x = made(case), case.inputs()
    report = swap(model, case, verify=x, tokens="auto", error=0.3)
    assert [8 <= layer.options["tokens"] <= 16 and layer.error < 0.45 for layer in report.layers] == [True, True]
    ta.restore_attention(model)
    report = swap(model, case, verify=x, tokens="auto", error=1e-9, most=8)
    assert report.layers == () and report.difference == 0
    assert not any("_tensorattn" in name for each in model.modules() for name in vars(each))
    assert dict(report.kept) == dict.fromkeys(LAYERS, "no number of tokens up to 8 has an error below 1e-09")
    assert str(report).startswith(
        "TransformerEncoder: 0 attention layers swapped\n  layers.0.self_attn is kept: no number"
    )


def test_an_adapter_that_is_wrong_is_found(monkeypatch):
    plain = ta.integrations.doors.grid_attention
    monkeypatch.setattr(
        "tensorattn.integrations.swap.grid_attention", lambda q, k, v, **asked: plain(q, k, 1.001 * v, **asked)
    )
    model = encoder().eval()
    with pytest.raises(
        AdapterError, match=r"layers\.0\.self_attn .* is not reproduced by full attention over its grid"
    ):
        ta.swap_attention(model, "kao_kv", grid=GRID, verify=(torch.randn(2, P, 16),))
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


def test_a_way_past_the_operator_is_found(monkeypatch):
    monkeypatch.setattr("tensorattn.integrations.torch._BESIDE", ())
    model = encoder().eval()
    refused(
        model,
        "layers.0.self_attn (MultiheadAttention) is bypassed: the model computes its attention elsewhere.",
        "kao_kv",
        grid=GRID,
        verify=(torch.randn(2, P, 16),),
    )


def test_a_layer_that_is_not_called_is_refused():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = encoder(), nn.MultiheadAttention(16, 4)

        def forward(self, x):
            return self.used(x)

    refused(
        Lazy().eval(),
        "unused (MultiheadAttention) was not called with the inputs of verify, so it is not proved.\n"
        "  Give other inputs, or leave it out by layers=.",
        "kao_kv",
        grid=GRID,
        verify=(torch.randn(2, P, 16),),
    )


def test_another_version_must_be_verified(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    refused(
        encoder(),
        "torch 2.99.0 is not a version that was tested: 2.13.0 to 2.14.\n  Give verify= to prove each layer.",
        "kao_kv",
        grid=GRID,
    )
    report = ta.swap_attention(encoder(), "kao_kv", grid=GRID, verify=(torch.randn(2, P, 16),))
    assert len(report.layers) == 2


def test_training_goes_on_in_the_mode_it_was_in():
    model = encoder()
    model.layers[1].eval()
    modes = [each.training for each in model.modules()]
    ta.swap_attention(model, "kao_kv", grid=GRID, verify=(torch.randn(2, P, 16),))
    assert [each.training for each in model.modules()] == modes


@pytest.mark.parametrize(
    "host_drops, asked, drops", [(0.5, None, True), (0.5, 0.0, False), (0.0, 0.5, True), (0.0, None, False)]
)
def test_dropout_is_that_of_the_host_or_another(host_drops, asked, drops):
    attn, x = nn.MultiheadAttention(16, 4, dropout=host_drops, batch_first=True), torch.randn(2, P, 16)
    ta.swap_attention(attn, "kao_kv", grid=GRID, attention_dropout=asked)
    for training in (True, False):
        attn.train(training)
        one, two = (attn(x, x, x, need_weights=False)[0] for _ in range(2))
        assert torch.equal(one, two) is not (drops and training)
