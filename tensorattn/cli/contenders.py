"""Who works in `bench`, on what, and the parity of both: no layer is timed that does not do what it says.

The library's layers stand beside what one would write in PyTorch in their place, linear maps about
`scaled_dot_product_attention`: full attention, attention to a pooled tensor, attention along each mode; and beside
layers of other packages. Every one is compared, outputs and gradients, with its definition in float64 on the CPU.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorattn.cli.common import Choice, MissingPackageError, require
from tensorattn.cli.plain import PLAIN, PlainLayer, PooledLayer
from tensorattn.diagnose.cost import DTYPES, Cost, cost
from tensorattn.functional.cells import draw_queries, metric_of, search
from tensorattn.nn import TensorAttention
from tensorattn.nn.layout import channels_last
from tensorattn.nn.sources import join_heads, split_heads
from tensorattn.testing import reference

__all__ = ["FULL", "LIBRARY", "Contender", "Runner", "Work", "cells_found", "contenders"]

LIBRARY, PLAINLY, PACKAGES = "tensorattn", "plain PyTorch: linear maps, SDPA, a linear map", "other packages"
FULL = "full attention"
PROBES = 12  # positions at which outputs are compared


@dataclass(frozen=True)
class Work:
    """A tensor to attend to.

    Attributes:
        batch: Batch entries.
        sizes: Sizes of the modes.
        dim: Channels.
        heads: Number of heads.
        dtype: Name of the type.
        layout: Where the channels lie in memory.
        device: Name of the device.
    """

    batch: int
    sizes: tuple[int, ...]
    dim: int
    heads: int = 4
    dtype: str = "float32"
    layout: str = "channels_last"
    device: str = "cpu"

    @property
    def channels_first(self) -> bool:
        """Whether channels lie before the modes."""
        return self.layout == "channels_first"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return (self.batch, self.dim, *self.sizes) if self.channels_first else (self.batch, *self.sizes, self.dim)

    @property
    def positions(self) -> int:
        """Positions of a batch entry."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        words = f"{self.dtype}, {self.layout.replace('_', ' ')}, {self.heads} heads, on {self.device}"
        return f"{'×'.join(map(str, self.shape))}, {words}"

    def last(self, x: Tensor) -> Tensor:
        """View a tensor with its channels last."""
        return channels_last(x, self.channels_first)

    def place(self, x: Tensor) -> Tensor:
        """Return a tensor in the type and on the device, in this order: not every device has float64."""
        return x.to(DTYPES[self.dtype]).to(self.device)

    def tensor(self) -> Tensor:
        """Draw the tensor, on the CPU: noise about an outer sum, so that averages tell positions apart."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.shape, generator=generator)
        for mode, size in enumerate(self.sizes):
            along = [size if k == mode else 1 for k in range(len(self.sizes))]
            self.last(x).add_(torch.randn(self.batch, *along, self.dim, generator=generator))
        return self.place(x)


# ---- who works -----------------------------------------------------------------------------------------------

Definition = Callable[[Any, Tensor, Tensor, Any], Tensor]
"""Of a layer in float64, an input ``(B, n_1, …, n_N, C)``, places, and the layer that is measured."""


@dataclass(frozen=True)
class Contender:
    """Who works.

    Attributes:
        name: What it is called.
        group: Whose it is.
        build: Makes the layer.
        definition: What the layer has to return at some places.
        absence: Why it has no place on a tensor, or nothing.
        compiled: Whether the layer is compiled.
    """

    name: str
    group: str
    build: Callable[[Work], nn.Module]
    definition: Definition
    absence: Callable[[Work], str] = lambda work: ""
    compiled: bool = False


def _library(work: Work, operator: str, **options: Any) -> TensorAttention:
    """Make the layer of the library."""
    first = work.channels_first
    return TensorAttention(
        work.dim, work.heads, modes=len(work.sizes), operator=operator, channels_first=first, **options
    )


def _of_operator(choice: Choice, *, compiled: bool = False) -> Contender:
    """The layer of the library."""
    name, build = choice.label, functools.partial(_library, operator=choice.record.name, **choice.options)
    return Contender(f"{name}, compiled" if compiled else name, LIBRARY, build, _defined, compiled=compiled)


def _of_plain(operator: str, name: str) -> Contender:
    """The plain form of an operator."""
    return Contender(
        name,
        PLAINLY,
        lambda work: PlainLayer(_library(work, operator)),
        lambda plain, x, places, measured: reference.layer(plain.layer, x, at=places),
    )


def _defined(layer: TensorAttention, x: Tensor, places: Tensor, measured: TensorAttention) -> Tensor:
    """The definition of a layer, for the cells that it finds among its keys, if it searches for any."""
    cells = None
    if layer.options.get("cells") == "keys" and layer.options["tokens"] < math.prod(x.shape[1:-1]):
        weight, heads = measured.q_proj.weight, layer.num_heads
        rounded = x.detach().to(weight.dtype).to(weight.device)
        query, key = (split_heads(to(rounded), heads, 1).flatten(2, -2) for to in (measured.q_proj, measured.k_proj))
        labels, spread = cells_found(query, key, layer.options["tokens"])
        labels = labels.unflatten(-1, x.shape[1:-1])
        cells = [{"labels": labels[:, head], "spread": spread[:, head]} for head in range(heads)]
    return reference.layer(layer, x, at=places, cells=cells)


def cells_found(query: Tensor, key: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Search as clustered attention does, and return the cell of each position and the spread of each cell.

    Args:
        query: Queries ``(*batch, L, D)``.
        key: Keys ``(*batch, T, D)``.
        tokens: Number of cells n.

    Returns:
        Labels ``(*batch, T)``, and spreads in units of the mean one ``(*batch, n)``, as the definition takes them, on
        the CPU.
    """
    with torch.no_grad():
        found, spread = search(key, None, metric_of(*draw_queries(query, None)), tokens)
        labels, spread = found.label(key).cpu(), spread.cpu()
        count = F.one_hot(labels, tokens).double().mean(-2)
        typical = (count * spread).sum(-1, keepdim=True)
        return labels, torch.where(typical > 0, spread / typical, 1.0)


def _pooled(pooled: Any, x: Tensor, places: Tensor) -> Tensor:
    """Full attention to the pooled tensor."""
    layer, tokens = pooled.layer, pooled.pooled(x)
    maps = ((layer.q_proj, x), (layer.k_proj, tokens), (layer.v_proj, tokens))
    parts = [split_heads(projection(source), layer.num_heads, 1) for projection, source in maps]
    output, _ = reference.attention("flattened", *parts, order=x.dim() - 2, at=places)
    return layer.out_proj(join_heads(output, 1))


def _axial_package(package: Any, x: Tensor, places: Tensor) -> Tensor:
    """One attention a mode along the fibre through each place, each with maps of its own, added up."""
    total = torch.zeros((), dtype=x.dtype)
    for mode, attends in enumerate(each.fn for each in package.axial_attentions):
        others: Any = [places[:, k] for k in range(places.shape[1]) if k != mode]
        fibres = x.movedim(1 + mode, -2)[:, *others]  # (B, L, n, C)
        fibres = fibres if others else fibres.unsqueeze(1).expand(-1, len(places), -1, -1)
        own = fibres.gather(2, places[:, mode, None, None].expand(len(fibres), -1, 1, x.shape[-1]))
        key, value = attends.to_kv(fibres).chunk(2, -1)
        parts = [split_heads(part, attends.heads, 1) for part in (attends.to_q(own), key, value)]
        output, _ = reference.attention("flattened", *parts, order=1)
        total = total + attends.to_out(join_heads(output.squeeze(-2), 1))
    return total


def _kronecker_package(package: Any, x: Tensor, places: Tensor) -> Tensor:
    """`kao_qkv` without a scale; its bias is added once for each mode."""
    query, key, value = (
        split_heads(part, package.heads, 1) for part in (x @ package.to_qkv.weight.squeeze(-1).mT).chunk(3, -1)
    )
    output, _ = reference.attention("kao_qkv", query, key, value, order=2, at=places, scale=1.0)
    return F.linear(join_heads(output, 1), package.to_out.weight.squeeze(-1), 2 * package.to_out.bias)


def _from_package(
    module: str,
    build: Callable[[Any, Work], nn.Module],
    definition: Callable[[Any, Tensor, Tensor], Tensor],
    refuses: Callable[[Work], str] = lambda work: "",
) -> Contender:
    """The layer of another package, where it is installed."""
    name = module.replace("_", "-")
    need = functools.partial(require, module, extra="bench", purpose=f"comparing with {name}")

    def absence(work: Work) -> str:
        """Say why it is not there."""
        try:
            need()
        except MissingPackageError:
            return "not installed: pip install 'tensorattn[bench]'"
        return refuses(work)

    return Contender(
        name,
        PACKAGES,
        lambda work: build(need(), work),
        lambda layer, x, places, measured: definition(layer, x, places),
        absence,
    )


OTHERS = (
    _of_plain("flattened", FULL),
    Contender(
        "pooled attention",
        PLAINLY,
        lambda work: PooledLayer(_library(work, "additive")),
        lambda pooled, x, places, measured: _pooled(pooled, x, places),
        lambda work: "" if len(work.sizes) <= 3 else "it takes up to three modes",
    ),
    _of_plain("axial", "axial attention"),
)
PEERS = (
    _from_package(
        "axial_attention",
        lambda package, work: package.AxialAttention(
            dim=work.dim,
            num_dimensions=len(work.sizes),
            heads=work.heads,
            dim_index=1 if work.channels_first else -1,
        ),
        _axial_package,
    ),
    _from_package(
        "kronecker_attention_pytorch",
        lambda package, work: package.KroneckerSelfAttention(
            dim=work.dim, heads=work.heads, dim_heads=work.dim // work.heads
        ),
        _kronecker_package,
        lambda work: "" if len(work.sizes) == 2 and work.channels_first else "it takes images with channels first only",
    ),
)


def contenders(
    choices: Sequence[Choice], *, peers: bool = False, plain: bool = False, compiled: bool = False
) -> list[Contender]:
    """Say who works: operators, and full, pooled and axial attention in plain PyTorch.

    Args:
        choices: Operators with their options.
        peers: Whether layers of other packages work too.
        plain: Whether the plain form of each operator works too.
        compiled: Whether each operator also works compiled.

    Returns:
        The contenders, each once.
    """
    ours = [_of_operator(choice) for choice in choices]
    ours += [_of_operator(choice, compiled=True) for choice in choices] if compiled else []
    names = dict.fromkeys(choice.record.name for choice in choices if choice.record.name not in ("flattened", "axial"))
    forms = [_of_plain(name, f"plain {name}") for name in names if plain and name in PLAIN]
    return [*ours, *OTHERS, *forms, *(PEERS if peers else ())]


# ---- parity --------------------------------------------------------------------------------------------------


class Runner:
    """A contender at work on a tensor.

    Args:
        who: The contender.
        work: The tensor.
        x: Its values, for which there are gradients.
        gradient: The gradient of the output.
    """

    def __init__(self, who: Contender, work: Work, x: Tensor, gradient: Tensor) -> None:
        torch.manual_seed(4)
        self.who, self.work, self.x, self.gradient = who, work, x, gradient
        self.layer = who.build(work)
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
        self.layer, self.costs = self.layer.to(DTYPES[work.dtype]).to(work.device), dict[str, Cost]()
        self.call: Callable[[Tensor], Tensor] = torch.compile(self.layer) if who.compiled else self.layer

    def forward(self) -> Tensor:
        """Run the layer without gradients."""
        with torch.no_grad():
            return self.call(self.x)

    def training(self, gradient: Tensor | None = None) -> Tensor:
        """Run the layer and its backward pass."""
        self.clear()
        y = self.call(self.x)
        y.backward(self.gradient if gradient is None else gradient)
        return y

    def clear(self) -> None:
        """Let go of all gradients."""
        self.x.grad = None
        self.layer.zero_grad(set_to_none=True)

    def cost(self, kind: str) -> Cost:
        """What a pass costs, counted without running it."""
        if kind not in self.costs:
            self.costs[kind] = cost(self.layer, self.work.shape, training=kind == "training")
        return self.costs[kind]

    def parity(self, *, training: bool) -> float:
        """Compare with the definition: outputs at some places, and all gradients of what depends on these.

        Args:
            training: Whether gradients are compared too.

        Returns:
            The largest error as a share of the largest entry; not a number where something is none.
        """
        generator, last = torch.Generator().manual_seed(3), self.work.last
        some = [torch.randint(size, (PROBES,), generator=generator) for size in self.work.sizes]
        ends = torch.tensor([[0] * len(some), [size - 1 for size in self.work.sizes]])
        places = torch.unique(torch.cat([ends, torch.stack(some, -1)]), dim=0)
        at = (slice(None), *places.unbind(-1))
        twin, x = copy.deepcopy(self.layer).cpu().double(), last(self.x.detach()).cpu().double().requires_grad_()
        expected = self.who.definition(twin, x, places, self.layer)
        errors = [_distance(last(self.forward())[at], expected)]
        if training and errors[0] < math.inf:
            gradient = torch.zeros_like(self.gradient)
            last(gradient)[at] = last(self.gradient)[at]
            errors.append(_distance(last(self.training(gradient))[at], expected))
            expected.backward(last(gradient)[at].cpu().double())
            assert self.x.grad is not None and x.grad is not None
            of_input = [last(self.x.grad).clone(), x.grad]
            errors.append(_distance(*(each[at] for each in of_input)))
            for each in of_input:
                each[at] = 0  # elsewhere it is smaller
            errors += [_distance(*of_input), _distance(*map(_gradients, (self.layer, twin)))]
            self.clear()
        return max(errors, key=lambda error: (math.isnan(error), error))


def _gradients(layer: nn.Module) -> Tensor:
    """All gradients of parameters, one after the other."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in layer.parameters()])


def _distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest entry that is expected; infinite for a wrong shape."""
    if found.shape != expected.shape:
        return math.inf
    found, expected = found.detach().cpu().double(), expected.detach()
    error, size = (each.abs().max().item() for each in (found - expected, expected))
    return error if size == 0 else error / size
