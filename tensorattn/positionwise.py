"""Functions of each position alone, run slab by slab: what they compute on the way is never there for all positions.

For derivatives each slab is computed again, so that the memory of a backward pass is that of one slab too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensorattn.fused import is_transformed, positional
from tensorattn.handover import hand_over
from tensorattn.slabs import positions_at_a_time, slabs_of
from tensorattn.weights import accumulation_dtype, in_autocast

__all__ = ["map_positions"]

Slab = tuple[slice, ...]
Body = Callable[..., Tensor]


def map_positions(
    body: Body,
    x: Tensor,
    tensors: Sequence[Tensor],
    *,
    batch: int,
    random: bool = False,
    skip: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Apply a function of each position, unchecked.

    Args:
        body: From part of the positions ``(*batch, *part of the positions, C)``, and the tensors, to a tensor of the
            same shape. It must not look at where the part stands, and depend on no other tensor that has derivatives.
        x: Input ``(*batch, *positions, C)``.
        tensors: What else the function needs.
        batch: Number of batch dimensions.
        random: Whether the function draws random numbers, which must be the same when it is computed again.
        skip: A tensor of the shape of the result that is added to it.
        out: Where to write the result, without derivatives.

    Returns:
        The result: ``out``, or a new tensor that lies in memory as ``x`` does.
    """
    slabs: list[Slab] = []
    if not torch.compiler.is_compiling():  # what is compiled should not depend on sizes
        most = positions_at_a_time(math.prod(x.shape[:batch]), math.prod(x.shape[batch:-1]))
        slabs = [(*(slice(None),) * batch, *slab) for slab in slabs_of(x.shape[batch:-1], most)]
    if not slabs or (len(slabs) == 1 and out is None):
        y = body(x, *tensors)
        y = y if skip is None else y + skip
        return y if out is None else out.copy_(y)
    if out is None and is_transformed(x, *tensors, *(() if skip is None else (skip,))):
        adds_input = skip is x  # then its two derivatives join in one pass
        run = _Run(_Adding(body) if adds_input else body, tuple(slabs), _Circumstances.here(x.device, random))
        return _Mapped.apply(run, x, None if adds_input else skip, *tensors)
    return _write(body, slabs, x, skip, tensors, out)


def _write(
    body: Body, slabs: Sequence[Slab], x: Tensor, skip: Tensor | None, tensors: Sequence[Tensor], out: Tensor | None
) -> Tensor:
    """Compute all slabs, each into its place in the result."""
    for slab in slabs:
        part = body(x[slab], *tensors)
        if out is None:
            dtype = part.dtype if skip is None else torch.promote_types(part.dtype, skip.dtype)
            out = torch.empty_like(x, dtype=dtype)
        if skip is None:
            out[slab] = part
        else:
            torch.add(part, skip[slab], out=out[slab])
    assert out is not None
    return out


class _Adding:
    """A function that adds its input to its output."""

    def __init__(self, body: Body) -> None:
        self.body = body

    def __call__(self, part: Tensor, *tensors: Tensor) -> Tensor:
        return self.body(part, *tensors) + part


class _Circumstances(NamedTuple):
    """What a function depends on beyond its arguments: automatic types, and the state of the random numbers."""

    device: torch.device
    autocast: torch.dtype | None
    states: tuple[Tensor, ...] | None

    @classmethod
    def here(cls, device: torch.device, random: bool) -> _Circumstances:
        """Note them down."""
        kind = device.type
        autocast = torch.get_autocast_dtype(kind) if in_autocast(device) else None
        states = None
        if random:
            accelerator = (torch.get_device_module(kind).get_rng_state(device),) if kind != "cpu" else ()
            states = (torch.get_rng_state(), *accelerator)
        return cls(device, autocast, states)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Bring them about again for a while."""
        kind = self.device.type
        with contextlib.ExitStack() as stack:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None))
            if self.states is not None:
                devices = [] if kind == "cpu" else [self.device]
                stack.enter_context(torch.random.fork_rng(devices, device_type=kind if devices else "cuda"))
                torch.set_rng_state(self.states[0])
                if devices:
                    torch.get_device_module(kind).set_rng_state(self.states[1], self.device)
            yield


class _Run(NamedTuple):
    """A function, the slabs that it is applied to, and under what circumstances."""

    body: Body
    slabs: tuple[Slab, ...]
    circumstances: _Circumstances


class _Mapped(torch.autograd.Function):
    """All slabs, each computed again for its derivatives; written out at once where these are differentiated too."""

    @staticmethod
    @positional
    def forward(run: _Run, x: Tensor, skip: Tensor | None, *tensors: Tensor) -> Tensor:
        return _write(run.body, run.slabs, x, skip, tensors, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.run, x, skip, *tensors = inputs
        ctx.skip_dtype = None if skip is None else skip.dtype
        ctx.save_for_backward(x, *tensors)
        ctx.save_for_forward(x, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        wanted = [ctx.needs_input_grad[1], *ctx.needs_input_grad[3:]]
        run, sources = ctx.run, ctx.saved_tensors
        places = [place for place, wants in enumerate(wanted) if wants]
        grads: list[Tensor | None] = [None] * len(wanted)
        found: tuple[Tensor | None, ...]
        if torch.is_grad_enabled():
            views = [source.view_as(source) for source in sources]  # one source may be a function of another
            with run.circumstances.again():
                y = run.body(*views)
            leaves = [views[place] for place in places]
            found = torch.autograd.grad(y, leaves, grad.to(y.dtype), create_graph=True, allow_unused=True)
        else:
            found = _backward_by_slabs(run, sources, places, grad)
            if places and places[0] == 0 and found[0] is not None:
                hand_over(found[0])
        for place, of_source in zip(places, found, strict=True):
            grads[place] = of_source
        skip = None if ctx.skip_dtype is None else grad.to(ctx.skip_dtype)
        return None, grads[0], skip, *grads[1:]

    @staticmethod
    def jvp(ctx: Any, _: Any, x: Tensor, skip: Tensor | None, *tensors: Tensor) -> Tensor:
        with ctx.run.circumstances.again():
            tangent = torch.func.jvp(ctx.run.body, tuple(ctx.saved_tensors), (x, *tensors))[1]
        return tangent if skip is None else tangent + skip

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], run: _Run, x: Tensor, skip: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, int]:
        def whole(x: Tensor, skip: Tensor | None, *tensors: Tensor) -> Tensor:
            y = run.body(x, *tensors)
            return y if skip is None else y + skip

        return torch.vmap(whole, in_dims[1:], randomness=info.randomness)(x, skip, *tensors), 0


def _backward_by_slabs(
    run: _Run, sources: Sequence[Tensor], places: Sequence[int], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Derivatives by the input and by the tensors at some places, the latter summed over slabs."""
    x, *tensors = sources
    leaves = [
        tensor.detach().requires_grad_() if place in places else tensor for place, tensor in enumerate(tensors, 1)
    ]
    of_x = torch.empty_like(x) if 0 in places else None
    sums: list[Tensor | None] = [None] * len(places)
    with run.circumstances.again():
        for slab in run.slabs:
            part = x[slab].detach().requires_grad_(of_x is not None)
            with torch.enable_grad():
                y = run.body(part, *leaves)
            by = [part if place == 0 else leaves[place - 1] for place in places]
            found = torch.autograd.grad(y, by, grad[slab].to(y.dtype), allow_unused=True)
            for number, (place, of_part) in enumerate(zip(places, found, strict=True)):
                if of_part is None:
                    continue
                if of_x is not None and place == 0:
                    of_x[slab] = of_part
                    continue
                total = sums[number]
                of_part = of_part.to(accumulation_dtype(of_part.dtype))
                if total is None:  # in memory of its own: two leaves, or the gradient that was given, may share it
                    sums[number] = of_part.clone()
                else:
                    total.add_(of_part)
    results: list[Tensor | None] = []
    for place, total in zip(places, sums, strict=True):
        results.append(of_x if place == 0 else None if total is None else total.to(sources[place].dtype))
    return tuple(results)
