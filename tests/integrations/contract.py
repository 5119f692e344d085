"""What every host must pass, with random weights: the same checks of one model after another."""

from __future__ import annotations

import copy
import importlib
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import tensorattn as ta

PARITY = 1e-5


def host(name: str) -> Any:
    """Import a package that may not be installed, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name)
        return importlib.import_module(name)


@dataclass(frozen=True)
class Case:
    """A model of a host.

    Attributes:
        make: From nothing to a model with random weights.
        inputs: What it is called with.
        layers: Names of the layers that are swapped.
        grid: What the report tells of the grid of the first one; None where each call tells.
        prefix: What it tells of the prefix.
        lora: Names of the modules that LoRA adapts.
        asked: What the swap must be told.
        fullgraph: Whether the host compiles without a break.
        backend: What it is compiled by.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...] | dict[str, Any]]
    layers: tuple[str, ...]
    grid: tuple[int, ...] | None
    prefix: int
    lora: tuple[str, ...]
    asked: dict[str, Any] = field(default_factory=dict)
    fullgraph: bool = True
    backend: str = "aot_eager"


def made(case: Case, *, train: bool = False) -> nn.Module:
    """The model, always with the same weights, none of them zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = case.make()
        with torch.no_grad():
            for parameter in model.parameters():  # many hosts begin with gates and outputs of zero
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train(train)


def drawn(case: Case) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return case.inputs()


def outputs(model: nn.Module, case: Case) -> list[torch.Tensor]:
    """The floating-point tensors that a model returns."""
    inputs = drawn(case)
    found = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    if not isinstance(found, (torch.Tensor, tuple, list, dict)):
        found = list(vars(found).values())
    found = list(found.values()) if isinstance(found, dict) else found
    return [each for each in tree_leaves(found) if isinstance(each, torch.Tensor) and each.is_floating_point()]


def distance(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """Largest difference relative to the largest entry."""
    assert len(some) == len(others) > 0
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(some, others, strict=True))


def swap(model: nn.Module, case: Case, operator: str = "clustered", **asked: Any) -> Any:
    if operator == "clustered":
        asked = {"attention_dropout": 0.0, "tokens": 4, **asked}
    return ta.swap_attention(model, operator, **case.asked, **asked)


def loss(model: nn.Module, case: Case) -> torch.Tensor:
    return torch.stack([each.square().mean() for each in outputs(model, case)]).sum()


def check_parity(case: Case) -> float:
    """Full attention through the door is the original; gradients too; the state dict is the same."""
    model, plain = made(case), made(case)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        exact = outputs(plain, case)
        report = swap(model, case, "flattened")
        off = distance(outputs(model, case), exact)
    assert [layer.name for layer in report.layers] == list(case.layers)
    assert off <= PARITY
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())
    for each in (model, plain):
        loss(each, case).backward()
    for (name, one), two in zip(model.named_parameters(), plain.parameters(), strict=True):
        if two.grad is not None:
            size = max(float(each.grad.abs().max()) for each in plain.parameters() if each.grad is not None)
            assert (one.grad - two.grad).abs().max() <= 1e-4 * size, name
    return off


def check_prefix(case: Case) -> int:
    """The report tells grid and prefix, and measures every layer."""
    report = swap(made(case), case, verify=drawn(case))
    assert all(layer.grid == case.grid and layer.prefix == case.prefix for layer in report.layers[:1])
    assert all(layer.parity <= PARITY and 0 < layer.error < 1.5 and 0 <= layer.rho <= 1 for layer in report.layers)
    assert 0 < report.difference and report.before.seconds > 0 and report.after.seconds > 0
    assert str(report).count("clustered tokens=4") == len(case.layers)
    return report.layers[0].prefix


def check_training(case: Case) -> float:
    """Steps of training go down."""
    model = made(case, train=True)
    swap(model, case)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(2)
    first = loss(model, case)
    first.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert norm.isfinite() and norm > 0
    for name in case.layers:
        grads = [each.grad for each in model.get_submodule(name).parameters()]
        assert all(each is not None and each.isfinite().all() for each in grads)
    optimizer.step()
    torch.manual_seed(2)
    last = loss(model, case)
    assert last < first
    return float((first - last).detach())


def check_lora(case: Case) -> int:
    """LoRA adapts the swapped model: it changes the output, has gradients, and merges."""
    peft = host("peft")
    model = made(case)
    swap(model, case, "kao_kv")
    with torch.no_grad():
        plain = outputs(model, case)
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=list(case.lora), init_lora_weights=False)
    tuned = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        adapted = outputs(tuned, case)
    assert distance(adapted, plain) > 1e-3
    loss(tuned, case).backward()
    grads = [each.grad for name, each in tuned.named_parameters() if "lora_" in name]
    assert len(grads) >= 2 * len(case.layers)
    assert all(each is not None and each.abs().max() > 0 for each in grads)
    merged = tuned.merge_and_unload()
    with torch.no_grad():
        assert distance(outputs(merged, case), adapted) < 1e-4
    ta.restore_attention(merged)
    return len(grads)


def check_compile(case: Case, operator: str = "kao_kv") -> str:
    """It compiles."""
    torch._dynamo.reset()
    model = made(case)
    swap(model, case, operator)
    with torch.no_grad():
        eager = outputs(model, case)
        compiled = torch.compile(model, backend=case.backend, fullgraph=case.fullgraph)
        assert distance(outputs(compiled, case), eager) < 1e-4
    return "whole" if case.fullgraph else "parts"


def check_saved(case: Case) -> bool:
    """A state dict goes from swapped to plain and back; a swapped model is copied and saved whole."""
    model = made(case)
    swap(model, case, "kao_kv")
    with torch.no_grad():
        exact = outputs(model, case)
        other = case.make().eval()
        swap(other, case, "kao_kv")
        other.load_state_dict(model.state_dict(), strict=True)
        assert distance(outputs(other, case), exact) == 0
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twins = [copy.deepcopy(model), torch.load(file, weights_only=False)]
        for twin in twins:
            assert distance(outputs(twin, case), exact) == 0
            ta.restore_attention(twin)
            assert distance(outputs(twin, case), outputs(made(case), case)) == 0
        assert distance(outputs(model, case), exact) == 0  # the original is swapped still
    return True


def check_restored(case: Case) -> bool:
    """After a swap, a block and a refusal the model is the very same."""
    model, plain = made(case), made(case)
    kinds = [type(each) for each in model.modules()]
    keys = [sorted(vars(each)) for each in model.modules()]
    with torch.no_grad():
        exact = outputs(plain, case)
        swap(model, case, "kao_kv")
        assert distance(outputs(model, case), exact) > 1e-6
        ta.restore_attention(model)
        assert distance(outputs(model, case), exact) == 0
        with ta.swapped(model, "kao_kv", **case.asked, verify=drawn(case)):
            assert distance(outputs(model, case), exact) > 1e-6
        with pytest.raises(ta.AdapterError):
            swap(model, case, layers=lambda name, module: {"grid": (3, 1, 1)}, verify=drawn(case))
        assert distance(outputs(model, case), exact) == 0
    assert [type(each) for each in model.modules()] == kinds
    assert [sorted(vars(each)) for each in model.modules()] == keys
    assert all(each.training is False for each in model.modules())
    return True


CHECKS: dict[str, Callable[[Case], Any]] = {
    "parity": check_parity,
    "prefix": check_prefix,
    "training step": check_training,
    "LoRA": check_lora,
    "compile": check_compile,
    "saved": check_saved,
    "restore": check_restored,
}


def every_check(cases: dict[str, Case], *quick: str) -> pytest.MarkDecorator:
    """Each check of each case; beside those of the first case, only the quick ones are tried by default, and none compiles."""
    first = next(iter(cases))
    return pytest.mark.parametrize(
        "case, check",
        [
            pytest.param(
                case,
                check,
                id=f"{name}-{called}",
                marks=()
                if called in ("parity", "prefix", *quick) or (name == first and called != "compile")
                else pytest.mark.thorough,
            )
            for name, case in cases.items()
            for called, check in CHECKS.items()
        ],
    )
