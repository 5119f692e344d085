"""Swap the attention of a trained model for an operator, prove and measure it, and restore it.

Nothing here knows a host library: the adapters read models, and give their attention layers as sites.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tensorattn.diagnose.cost import Spent, measure
from tensorattn.diagnose.error import TokenChoice, choose_tokens
from tensorattn.errors import AdapterError, OptionError, check, retells
from tensorattn.functional.grid import attend_grid, check_grid, grid_attention, joins_prefix
from tensorattn.functional.operator import get_operator
from tensorattn.integrations import diffusers, monai, timm, transformers
from tensorattn.integrations import torch as own
from tensorattn.integrations.doors import BESIDE, DOOR, Beside, Door, Site, door_of, leave
from tensorattn.masks import counting_dtype

__all__ = ["LayerReport", "SwapReport", "restore_attention", "swap_attention", "swapped"]

HOSTS = {each.PACKAGE: each for each in (timm, transformers, monai, diffusers, own)}
Layers = Callable[[str, nn.Module], Mapping[str, Any] | None]
Inputs = tuple[Any, ...] | Mapping[str, Any]
TOLERANCE = 1e-4  # of the output of a layer through its adapter, relative to the largest entry of the original


@dataclass(frozen=True)
class LayerReport:
    """What was swapped in one layer, and what that changes in it.

    Attributes:
        name: Name of the module in the model.
        operator: Name of the operator.
        options: Its options.
        grid: Sizes of the modes.
        prefix: Number of tokens before the grid.
        joined: Whether queries of the grid see the prefix: see `grid_attention`.
        parity: Largest difference of the output of the layer with full attention through the adapter from that of the
            original, relative to the largest entry; None without ``verify``.
        error: Centred error of the attention output, for the inputs that the layer has in the original model; likewise.
        rho: Of ``clustered``, the share of the variance of the logits that is left inside cells, the largest.

    Examples:
        >>> print(LayerReport("blocks.0.attn", "kao_kv", {}, (14, 14), 1, True).operator)
        kao_kv
    """

    name: str
    operator: str
    options: Mapping[str, Any]
    grid: tuple[int, ...] | None
    prefix: int
    joined: bool
    parity: float | None = None
    error: float | None = None
    rho: float | None = None

    def cells(self) -> tuple[str, ...]:
        """Return what a table shows of it."""
        options = "".join(f" {name}={value}" for name, value in self.options.items())
        grid = "×".join(map(str, self.grid)) if self.grid else "of the input"
        seen = "" if not self.prefix else " seen" if self.joined else " apart"
        numbers = [f"{self.parity:.0e}" if self.parity is not None else "-"]
        numbers += ["-" if each is None else f"{each:.3f}" for each in (self.error, self.rho)]
        return self.name, grid, f"{self.prefix}{seen}", self.operator + options, *numbers


@dataclass(frozen=True)
class SwapReport:
    """What a swap did to a model.

    Attributes:
        model: Name of the class of the model.
        layers: The layers that were swapped.
        kept: Layers of attention that were left as they are, each with the reason.
        difference: Norm of the change of the output of the model, relative to the norm of the output; None without
            ``verify``.
        before: Time and peak memory of a call before the swap, on one thread of a CPU or on a GPU; likewise.
        after: The same after it.

    Examples:
        >>> layer = LayerReport("blocks.0.attn", "clustered", {"tokens": 64}, (14, 14), 1, True, 2e-7, 0.0123, 0.04)
        >>> print(SwapReport("ViT", (layer,), {}, 0.004))
        ViT: 1 attention layer swapped
          layer          grid   prefix  operator             parity  error    rho
          blocks.0.attn  14×14  1 seen  clustered tokens=64   2e-07  0.012  0.040
        parity: what the layer changes with full attention in it; error: 0 is full attention, 1 the mean value
        output changed by 0.4 %
    """

    model: str
    layers: tuple[LayerReport, ...]
    kept: Mapping[str, str]
    difference: float | None = None
    before: Spent | None = None
    after: Spent | None = None

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "grid", "prefix", "operator", "parity", "error", "rho")]
        rows += [layer.cells() for layer in self.layers]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{self.model}: {len(self.layers)} attention layer{'s' * (len(self.layers) != 1)} swapped"]
        for row in rows if self.layers else ():
            words = [cell.ljust(width) for cell, width in zip(row[:4], widths, strict=False)]
            lines.append("  " + "  ".join([*words, *(c.rjust(w) for c, w in zip(row[4:], widths[4:], strict=True))]))
        lines += [f"  {name} is kept: {reason}" for name, reason in self.kept.items()]
        if any(layer.parity is not None for layer in self.layers):
            lines.append(
                "parity: what the layer changes with full attention in it; error: 0 is full attention, 1 the mean value"
            )
        if self.difference is not None:
            lines.append(f"output changed by {100 * self.difference:.1f} %")
        if self.before is not None and self.after is not None:
            if self.after.seconds > self.before.seconds:
                lines.append("slower: with so few tokens full attention is as fast; restore_attention undoes the swap")
            lines.append(f"time {self.before.seconds:.3f} s before, {self.after.seconds:.3f} s after")
            if self.before.peak_bytes is not None and self.after.peak_bytes is not None:
                before, after = (each / 1e6 for each in (self.before.peak_bytes, self.after.peak_bytes))
                lines.append(f"peak memory {before:.0f} MB before, {after:.0f} MB after")
        return "\n".join(lines)


@retells
def swap_attention(
    model: nn.Module,
    operator: str = "clustered",
    *,
    grid: Sequence[int] | str = "auto",
    prefix: int | str = "auto",
    layers: Layers | None = None,
    verify: Inputs | None = None,
    attention_dropout: float | None = None,
    **options: Any,
) -> SwapReport:
    """Give the self-attention layers of a trained model an operator over the grid of their tokens, in place.

    Parameters and the keys of the state dict do not change, so checkpoints, optimizers, LoRA and averages of weights go
    on. Known hosts are `torch.nn.MultiheadAttention`; the vision transformers of timm; of transformers VideoMAE, ViViT,
    TimeSformer with joint attention, ViT, DeiT, DINOv2, DINOv3 and the vision models of CLIP and SigLIP; the blocks of
    MONAI; the U-Nets, autoencoders and DiT of diffusers.
    What would be changed silently is refused by the name of its module, before anything is changed: masks of P×P,
    causal and window attention, relative positions, attention weights that are asked for, unknown attention, versions
    of a host that were not tested (but with ``verify``, which proves them). After any refusal the model is as it was.

    Below about 1,000 tokens full attention is as fast as any operator.

    Args:
        model: The model.
        operator: Name in the registry.
        grid: Sizes of the modes, or ``"auto"`` for what the model tells: by its configuration, or in each call where
            it takes inputs of any size.
        prefix: Number of tokens before the grid, class and register tokens, or ``"auto"`` for what the model tells.
            `grid_attention` tells what they see.
        layers: From the name of an attention layer and its module to None, to leave it as it is, or to what is special
            about it: ``operator``, ``grid``, ``prefix`` and options. Options are those of its operator: where it has
            another operator, those given for the model do not hold.
        verify: Inputs of the model, a tuple or a dictionary. The model is called in evaluation mode without gradients.
            First every layer is proved: with ``flattened``, the adapter must give the output of the original up to
            1e-4. Then the differences that the operator makes are measured. That a grid is given in the order of its
            tokens is not proved: full attention is the same for any.
        attention_dropout: Probability of dropping an attention weight in training, in place of that of the host. A
            host that drops some is refused for an operator that cannot, unless this is 0.0.
        **options: Options of the operator. With ``verify``, ``tokens="auto"`` has `choose_tokens` choose for each
            layer, whose ``error`` and ``most`` are options then; a layer where no number is enough is left as it is.

    Returns:
        What was swapped, and with ``verify`` what that changes. It prints as a table.

    Raises:
        AdapterError: If the model has no attention that is known, or some that is refused, a layer is not proved, or
            the model is swapped already.
        OptionError: If there is no such operator or option, or an argument is out of its range.

    Examples:
        >>> import torch, tensorattn as ta
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, dropout=0.0, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 2).eval()
        >>> clip = torch.randn(2, 4 * 6 * 6, 32)  # 4 frames of 6×6 patches
        >>> report = ta.swap_attention(model, "clustered", grid=(4, 6, 6), verify=(clip,), tokens=32)
        >>> [layer.name for layer in report.layers], report.layers[0].parity < 1e-5, report.layers[0].error < 1
        (['layers.0.self_attn', 'layers.1.self_attn'], True, True)
        >>> ta.restore_attention(model)
    """
    _check_model(model)
    if layers is not None and not callable(layers):
        raise OptionError(f"layers must be a function of a name and a module, got {type(layers).__name__}.")
    if attention_dropout is not None:
        check(attention_dropout, "attention_dropout", "probability")
    if verify is not None and not isinstance(verify, (tuple, Mapping)):
        raise OptionError(f"verify must be a tuple or a dictionary of inputs, got {type(verify).__name__}.")
    if any(door_of(module) is not None for module in model.modules()):
        raise AdapterError("the attention of the model is swapped already.", hint="Call restore_attention(model).")
    asked = {"operator": operator, "grid": grid, "prefix": prefix, **options}
    plans, kept = _plan(model, asked, layers, attention_dropout, verified=verify is not None)
    call = functools.partial(_call, model, verify) if verify is not None else None
    known: dict[str, LayerReport] = {}
    difference = before = after = None
    try:
        with _evaluating(model):
            if call is not None:
                original, before = _spent(call, model)
            _attach(plans)
            if call is not None:
                plans = _prove(plans, call, known, kept)
                leave(model)
                _attach(plans)  # without those that are kept
            for plan in plans:
                plan.door.way.enter(plan.site.module, plan.door)
            if call is not None:
                _check_called(plans, call)
                output, after = _spent(call, model)
                difference = _difference(output, original)
    except BaseException:
        leave(model)
        raise
    reports = tuple([known.get(plan.site.name, plan.report()) for plan in plans])
    return SwapReport(type(model).__name__, reports, kept, difference, before, after)


@retells
def restore_attention(model: nn.Module) -> None:
    """Give a model its own attention back.

    Args:
        model: A model that was swapped, or that contains one.

    Raises:
        AdapterError: If nothing in it is swapped.
        OptionError: If it is no module.

    Examples:
        >>> import torch, tensorattn as ta
        >>> model = torch.nn.TransformerEncoderLayer(32, 4, dropout=0.0, batch_first=True)
        >>> report = ta.swap_attention(model, "kao_kv", grid=(6, 6))
        >>> ta.restore_attention(model)
        >>> type(model.self_attn).__name__
        'MultiheadAttention'
    """
    _check_model(model)
    if not leave(model):
        raise AdapterError("the attention of the model is not swapped.")


def swapped(
    model: nn.Module, operator: str = "clustered", **asked: Any
) -> contextlib.AbstractContextManager[SwapReport]:
    """Swap the attention of a model for as long as a block lasts.

    Args:
        model: The model.
        operator: Name in the registry.
        **asked: As `swap_attention` takes it.

    Returns:
        A context, which gives the report.

    Examples:
        >>> import torch, tensorattn as ta
        >>> model = torch.nn.TransformerEncoderLayer(32, 4, dropout=0.0, batch_first=True).eval()
        >>> x = torch.randn(2, 36, 32)
        >>> with ta.swapped(model, "kao_kv", grid=(6, 6)) as report:
        ...     cheap = model(x)
        >>> torch.allclose(model(x), cheap, atol=1e-6)
        False
    """
    return _swapped(model, operator, **asked)


@contextlib.contextmanager
def _swapped(model: nn.Module, operator: str, **asked: Any) -> Iterator[SwapReport]:
    """Swap, and restore."""
    report = swap_attention(model, operator, **asked)
    try:
        yield report
    finally:
        leave(model)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise OptionError(f"model must be an nn.Module, got {type(model).__name__}.")


@dataclass(frozen=True)
class _Plan:
    """A site and the door that it is to get; with ``auto``, what `choose_tokens` is asked."""

    site: Site
    door: Door
    auto: Mapping[str, Any] | None

    def report(self, **measured: Any) -> LayerReport:
        """Return what is known of the layer."""
        door = self.door
        grid = None if door.told else door.grid
        joined = joins_prefix(get_operator(door.operator))
        return LayerReport(door.name, door.operator, door.options, grid, door.prefix, joined, **measured)


def _plan(
    model: nn.Module, asked: Mapping[str, Any], layers: Layers | None, dropout: float | None, *, verified: bool
) -> tuple[list[_Plan], dict[str, str]]:
    """Read a model, and decide what every layer gets; refuse what has to be, without changing anything."""
    _chosen(asked, verified)
    sites, kept, plans = _sites(model), {}, []
    for package, site in sites:
        given = {} if layers is None else layers(site.name, site.module)
        if given is not None and not isinstance(given, Mapping):
            raise OptionError(f"layers must return None or a dictionary, got {given!r} for {site.name}.")
        if given is None:
            kept[site.name] = "layers leaves it out"
        elif site.kept:
            kept[site.name] = site.kept
        else:
            if site.refused:
                raise AdapterError(f"{_told(site)} {site.refused}.", hint="Leave it out by layers=, or keep the model.")
            _check_version(package, verified)
            own = {**asked, **given}
            if own["operator"] != asked["operator"]:
                own = {"grid": asked["grid"], "prefix": asked["prefix"], **given}
            plans.append(_decide(site, own, dropout, verified))
    if not sites:
        hosts = ", ".join(HOSTS)
        raise AdapterError(
            f"{type(model).__name__} has no attention layer that is known; hosts are: {hosts}.",
            hint="To add attention to a network of convolutions, put ResidualAttention behind a level.",
        )
    return plans, kept


def _sites(model: nn.Module) -> list[tuple[str, Site]]:
    """Return all attention layers of a model with the package of their host, those of one host behind each other."""
    found: dict[str, tuple[str, Site]] = {}
    for package, host in HOSTS.items():
        if package in sys.modules:
            for site in host.sites(model):
                found.setdefault(site.name, (package, site))
    return list(found.values())


def _told(site: Site) -> str:
    kind = getattr(type(site.module), "swapped_from", type(site.module))
    return f"{site.name or 'the model'} ({kind.__name__})"


def _check_version(package: str, verified: bool) -> None:
    """Refuse a version of a host that was not tested, unless each layer is to be proved."""
    version = str(getattr(sys.modules[package], "__version__", ""))
    numbers = tuple([int(number) for number in re.findall(r"\d+", version)[:3]])
    first, last = HOSTS[package].TESTED
    if not (first <= numbers and numbers[: len(last)] <= last) and not verified:
        tested = f"{'.'.join(map(str, first))} to {'.'.join(map(str, last))}"
        raise AdapterError(
            f"{package} {version} is not a version that was tested: {tested}.", hint="Give verify= to prove each layer."
        )


def _chosen(given: Mapping[str, Any], verified: bool) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """Check the operator and its options; return them, and with tokens="auto" what `choose_tokens` is asked."""
    options = {name: each for name, each in given.items() if name not in ("operator", "grid", "prefix")}
    record = get_operator(given["operator"])
    auto: dict[str, Any] | None = None
    if options.get("tokens") == "auto":
        if not verified:
            raise OptionError("tokens='auto' needs verify=: inputs to choose them by.")
        auto = {name: options.pop(name) for name in ("error", "most") if name in options}
        record.with_defaults(options)
        del options["tokens"]
    record.with_defaults(options)
    return record.name, options, auto


def _decide(site: Site, given: Mapping[str, Any], dropout: float | None, verified: bool) -> _Plan:
    """Decide what one layer gets."""
    operator, options, auto = _chosen(given, verified)
    record = get_operator(operator)
    grid = site.grid if isinstance(given["grid"], str) else given["grid"]
    prefix = (site.prefix or 0) if given["prefix"] == "auto" else given["prefix"]
    for name in ("grid", "prefix"):
        if isinstance(given[name], str) and given[name] != "auto":
            raise OptionError(f"{name} must be 'auto' or given in numbers, got {given[name]!r}.")
    if grid is None and not site.tells:
        raise AdapterError(f"{_told(site)} does not tell its grid.", hint="Give grid=, the sizes of the modes.")
    check(prefix, "prefix", "integer", least=0)
    if grid is not None:
        grid = check_grid(grid, prefix)
        record.needs(len(grid), **record.with_defaults(options))
    if site.rotary:
        _check_rotary(site, operator, options, 2 if grid is None else len(grid))
    dropped = site.dropout if dropout is None else dropout
    if dropped > 0 and "dropout_p" in record.lacking(record.with_defaults(options)):
        whose = _told(site) if dropout is None else "attention_dropout"
        raise AdapterError(
            f"{whose} drops attention weights with probability {dropped:g} in training, which operator {operator!r} "
            f"cannot.",
            hint="Say attention_dropout=0.0 to train without.",
        )
    assert site.way is not None
    told = site.tells and grid is None
    return _Plan(site, Door(site.name, site.way, operator, options, grid, prefix, dropout, told), auto)


def _check_rotary(site: Site, operator: str, options: Mapping[str, Any], order: int) -> None:
    """Refuse an operator that averages keys, where they are turned by their places."""
    record = get_operator(operator)
    if record.needs(order, **record.with_defaults(options)).averages_keys(order):
        raise AdapterError(
            f"{_told(site)} turns keys by their places (rotary), and operator {operator!r} averages keys of different "
            f"turns."
        )


def _attach(plans: Sequence[_Plan]) -> None:
    """Give every module its door, and change the modules beside."""
    for plan in plans:
        vars(plan.site.module)[DOOR] = plan.door
        for module, way in plan.site.beside:
            beside = vars(module).get(BESIDE)
            if beside is None:
                beside = vars(module)[BESIDE] = Beside(way)
                way.enter(module, beside)
            if plan.door.told:
                beside.doors.append(plan.door)


def _call(model: nn.Module, inputs: Inputs) -> Any:
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _spent(call: Callable[[], Any], model: nn.Module) -> tuple[Any, Spent]:
    """Call a model a few times; return its output, the time and the peak memory of a call."""
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        return measure(call)
    call()
    torch.cuda.reset_peak_memory_stats(device)
    held, seconds, output = torch.cuda.memory_allocated(device), [], None
    for _ in range(5):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        output = call()
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return output, Spent(statistics.median(seconds), torch.cuda.max_memory_allocated(device) - held)


def _tensors(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of what a model returned."""
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        output = list(vars(output).values())
    return [each for each in tree_leaves(output) if isinstance(each, Tensor) and each.is_floating_point()]


def _difference(output: Any, original: Any) -> float:
    """Return the norm of a change relative to the norm of the original, over all tensors."""
    pairs = [(_precise(new), _precise(old)) for new, old in zip(_tensors(output), _tensors(original), strict=True)]
    change = math.hypot(*(float((new - old).norm()) for new, old in pairs))
    whole = math.hypot(*(float(old.norm()) for _, old in pairs))
    return _share(change, whole)


def _share(part: float, whole: float) -> float:
    """Divide; nothing of nothing is zero, and anything else of it infinite."""
    return part / whole if whole else (0.0 if part == 0 else math.inf)


def _precise(tensor: Tensor) -> Tensor:
    """Return a tensor in the widest type of its device."""
    return tensor.to(counting_dtype(tensor.device))


def _prove(
    plans: list[_Plan], call: Callable[[], Any], known: dict[str, LayerReport], kept: dict[str, str]
) -> list[_Plan]:
    """Call the original; prove and measure each layer on the inputs that it has there. Return the layers to swap."""
    readings: dict[str, _Reading] = {plan.site.name: _Reading(plan) for plan in plans}
    handles = [plan.site.module.register_forward_hook(readings[plan.site.name], with_kwargs=True) for plan in plans]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    left = []
    for plan in plans:
        reading = readings[plan.site.name]
        if not reading.parity:
            raise AdapterError(
                f"{_told(plan.site)} was not called with the inputs of verify, so it is not proved.",
                hint="Give other inputs, or leave it out by layers=.",
            )
        if reading.lacking:
            most = max(reading.lacking.tried)
            kept[plan.site.name] = f"no number of tokens up to {most} has an error below {reading.lacking.wish:g}"
            continue
        if plan.auto is not None:
            plan.door.options = {**plan.door.options, "tokens": reading.tokens}
        known[plan.site.name] = plan.report(
            parity=max(reading.parity), error=max(reading.errors), rho=max(reading.rhos, default=None)
        )
        left.append(plan)
    return left


class _Reading:
    """A hook that proves and measures a layer in each of its calls."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.parity: list[float] = []
        self.errors: list[float] = []
        self.rhos: list[float] = []
        self.tokens = 0
        self.lacking: TokenChoice | None = None

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        door = self.plan.door
        door.probe = self._attend
        door.way.enter(module, door)
        try:
            twin = module.forward(*args, **kwargs)
        finally:
            door.way.leave(module, door)
            door.probe = None
        new, old = (_tensors(each)[0] for each in (twin, output))
        if new.shape != old.shape:
            shapes = f"the shape {tuple(new.shape)}, not {tuple(old.shape)}"
            raise AdapterError(f"{_told(self.plan.site)} is not reproduced by full attention: its output has {shapes}.")
        distance = float((new - old).abs().amax() / old.abs().amax().clamp_min(torch.finfo(old.dtype).tiny))
        if not distance <= max(TOLERANCE, 4 * torch.finfo(old.dtype).eps):
            raise AdapterError(
                f"{_told(self.plan.site)} is not reproduced by full attention over its grid: its output differs by "
                f"{distance:.1e} of its largest entry.",
                hint="The adapter and the host do not fit; keep the original, or leave the layer out by layers=.",
            )
        self.parity.append(distance)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **asked: Any) -> Tensor:
        """Return full attention; measure how far the operator is from it."""
        door, plan = self.plan.door, self.plan
        shared = {name: asked[name] for name in ("grid", "prefix", "scale", "key_mask") if name in asked}
        exact = grid_attention(query, key, value, operator="flattened", **shared)
        options = dict(door.options)
        if plan.auto is not None:
            choice = self._choose(query, key, value, **shared)
            if choice.tokens is None:
                self.lacking, self.tokens = choice, 0
                return exact
            self.tokens = options["tokens"] = max(self.tokens, choice.tokens)
        found = attend_grid(query, key, value, operator=door.operator, return_rho=True, **shared, **options)
        mask = shared.get("key_mask")
        shown = torch.ones_like(value[..., :1]) if mask is None else _over_tokens(mask, value)
        mean = (value * shown).sum(-2, keepdim=True) / shown.sum(-2, keepdim=True).clamp_min(1)
        mean = mean.repeat_interleave(query.shape[1] // key.shape[1], 1)
        off, spread = (float(_precise(each).norm()) for each in (found.output - exact, exact - mean))
        self.errors.append(_share(off, spread))
        if found.rho is not None:
            self.rhos.append(float(found.rho.amax()))
        return exact

    def _choose(self, query: Tensor, key: Tensor, value: Tensor, **shared: Any) -> TokenChoice:
        """Have the number of tokens chosen for the grid."""
        grid, prefix, mask = shared["grid"], shared["prefix"], shared.get("key_mask")
        groups = query.shape[1] // key.shape[1]
        rows = [query, *(each.repeat_interleave(groups, 1) for each in (key, value))]
        rows = [each[..., prefix:, :].unflatten(-2, grid) for each in rows]
        if mask is not None:
            mask = mask[:, mask.shape[1] - math.prod(grid) :].unflatten(-1, grid).unsqueeze(1)
        assert self.plan.auto is not None
        asked = {"scale": shared.get("scale"), "mask": mask, **self.plan.auto, **self.plan.door.options}
        return choose_tokens(*rows, order=len(grid), **asked)


def _over_tokens(mask: Tensor, value: Tensor) -> Tensor:
    """Return a mask of keys as numbers ``(B, 1, L, 1)``."""
    missing = value.shape[-2] - mask.shape[-1]
    whole = torch.cat([mask.new_ones(mask.shape[0], missing), mask], -1)
    return whole[:, None, :, None].to(value.dtype)


def _check_called(plans: Sequence[_Plan], call: Callable[[], Any]) -> None:
    """Check that a call of the model goes through every door."""
    seen: set[str] = set()

    def noticed(name: str, *tensors: Tensor, **asked: Any) -> Tensor:
        seen.add(name)
        return grid_attention(*tensors, **asked)

    for plan in plans:
        plan.door.probe = functools.partial(noticed, plan.site.name)
    try:
        call()
    finally:
        for plan in plans:
            plan.door.probe = None
    for plan in plans:
        if plan.site.name not in seen:
            raise AdapterError(f"{_told(plan.site)} is bypassed: the model computes its attention elsewhere.")
