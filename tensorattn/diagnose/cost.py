"""Cost: operations, traffic and memory of a call, counted while the code itself runs on the meta device.

Beside it stand the tools that measure a call which does compute: its kernel calls, CPU time and peak memory.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import functools
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from tensorattn.diagnose.roofline import Machines, Roofline, imagined_sharding, imagined_traffic
from tensorattn.diagnose.traffic import Sent
from tensorattn.errors import OptionError, ShapeError, is_integer, retells
from tensorattn.functional import get_operator
from tensorattn.models import TensorTransformer
from tensorattn.modes import ModeSpec, check_order
from tensorattn.nn import TensorAttention, TensorTransformerBlock
from tensorattn.processes import in_backward

__all__ = ["Cost", "Part", "PeakMemory", "Spent", "cost", "count", "count_calls", "measure", "one_thread"]

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
LAYOUTS = ("channels_last", "channels_first")
ENOUGH_SECONDS = 0.3  # calls are repeated up to this much CPU time, and at most REPEATS times
REPEATS = 5

aten = torch.ops.aten
FUSED, FUSED_BACKWARD = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
)
BATCHED_PRODUCTS = {aten.bmm, aten.baddbmm}
VECTOR_PRODUCTS = {aten.mv, aten.addmv, aten.dot}  # the registry knows products of matrices only
SOFTMAX = {
    *(aten._softmax, aten._safe_softmax, aten._log_softmax, aten.logsumexp),
    *(aten._softmax_backward_data, aten._log_softmax_backward_data),
}
SOFTMAX_FLOPS = 5  # an element: maximum, difference, exponential, sum, quotient
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_}  # they do not read what they write into
MOVES = {
    *OVERWRITES,
    *(
        aten.clone,
        aten._to_copy,
        aten.cat,
        aten.stack,
        aten.index,
        aten.index_select,
        aten.gather,
        aten.flip,
        aten.roll,
    ),
    *(aten.constant_pad_nd, aten.slice_backward, aten.select_backward, aten.fill, aten.repeat),
}


@dataclass(frozen=True)
class Part:
    """Work of one kind, a row of the table.

    Attributes:
        name: What is done: ``"linear maps"`` (products with one matrix, convolutions), ``"attention"`` (products of
            stacks of matrices), ``"softmax"``, ``"sums"`` (means, sums, and all that returns less than it reads),
            ``"elementwise"`` or ``"moves"``, which compute nothing.
        phase: When: ``"forward"`` or ``"backward"``.
        flops: Floating-point operations; two for a multiplication with an addition.
        read: Bytes read, each operand once for each time that it is used.
        written: Bytes written.
        calls: Kernel calls.
    """

    name: str
    phase: str
    flops: int = 0
    read: int = 0
    written: int = 0
    calls: int = 0


@dataclass(frozen=True)
class Cost:
    """What one call costs. Frozen; printing it shows a table.

    Attributes:
        title: What it is the cost of.
        parts: Operations, traffic and kernel calls of each kind of work, forwards and, in training, backwards.
        peak: Most bytes held at once beyond what the caller holds: beyond inputs and parameters, and in training beyond
            the gradient of the output. It holds the results themselves, and until the backward pass is over all that
            is kept for it. Buffers inside kernels and libraries are not known and not counted.
        results: Bytes of the results alone: the output, and in training the gradients of inputs and parameters.
        roofline: With ``world``, what one of the processes takes and sends, whose cost it then is.

    Examples:
        >>> import tensorattn as ta
        >>> whole, layer = (ta.cost(name, (16, 28, 28), dim=32, modes="t h w") for name in ("flattened", "kao_kv"))
        >>> whole.flops > 50 * layer.flops
        True
    """

    title: str
    parts: tuple[Part, ...]
    peak: int
    results: int
    roofline: Roofline | None = None

    def _total(self, field: str, *names: str) -> int:
        """Add up one field of the parts of some names, or of all."""
        return sum(getattr(part, field) for part in self.parts if not names or part.name in names)

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        return self._total("flops")

    @property
    def product_flops(self) -> int:
        """Those in matrix products, which is all that most counters see."""
        return self._total("flops", "linear maps", "attention")

    @property
    def attention_flops(self) -> int:
        """Those of the attention itself, without linear maps: products of stacks of matrices, and softmaxes."""
        return self._total("flops", "attention", "softmax")

    @property
    def read(self) -> int:
        """Bytes read."""
        return self._total("read")

    @property
    def written(self) -> int:
        """Bytes written."""
        return self._total("written")

    @property
    def calls(self) -> int:
        """Kernel calls."""
        return self._total("calls")

    @property
    def extra(self) -> int:
        """Bytes held at the peak beyond the results."""
        return self.peak - self.results

    def __str__(self) -> str:
        rows = [(f"{p.name}, {p.phase}", p.flops, p.read, p.written, p.calls) for p in self.parts]
        rows.append(("total", self.flops, self.read, self.written, self.calls))
        headings = ("", "FLOPs", "bytes read", "bytes written", "kernel calls")
        cells = [headings, *((name, *(f"{n:,}" for n in numbers)) for name, *numbers in rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
        lines = [f"cost of {self.title}"]
        for name, *numbers in cells:
            right = (number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True))
            lines.append("  " + "   ".join((name.ljust(widths[0]), *right)))
        lines.append(
            f"peak memory: {self.peak / 1e6:.1f} MB beyond what is given, "
            f"{self.results / 1e6:.1f} MB of it the results and {self.extra / 1e6:.1f} MB extra"
        )
        return "\n".join([*lines, *([] if self.roofline is None else [str(self.roofline)])])


def _tensors(values: Any) -> list[Tensor]:
    """Return the tensors among some values."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _elements(tensor: Tensor) -> int:
    """Return the number of elements in memory: one of a dimension that is expanded."""
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)


class _Counter(TorchDispatchMode):
    """Counts operations, traffic, kernel calls and live memory of what runs inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[tuple[str, str], Part] = {}
        self.live = self.peak = 0
        self.known: dict[int, Any] = {}  # what is held, by its place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator, and look at it."""
        kwargs = kwargs or {}
        with self:  # in inference mode what is made of other operators arrives whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        given = _tensors((args, kwargs))
        before = [self._hold(tensor, of_caller=True) for tensor in given]  # made in here they would be known
        out = func(*args, **kwargs)
        made = _tensors(out)
        after = [self._hold(tensor) for tensor in made]
        views = made and not func._schema.is_mutable and set(after) <= set(before)
        views = views or func.namespace == "_c10d_functional"  # what is sent is told apart
        if not views and not func._schema.name.removeprefix("aten::").startswith(("empty", "new_empty")):
            self._see(func, args, kwargs, out, given, made)
        return out

    def _hold(self, tensor: Tensor, *, of_caller: bool = False) -> int:
        """Let the memory of a tensor live until the last tensor on it is gone; return its place."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, 0 if of_caller else storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.ref(storage, functools.partial(self._drop, key, size))
            self.live += size
            self.peak = max(self.peak, self.live)
        return key

    def _drop(self, key: int, size: int, reference: Any) -> None:
        """Let memory go."""
        del self.known[key]
        self.live -= size

    def _see(
        self, func: Any, args: Any, kwargs: Any, out: Any, given: Sequence[Tensor], made: Sequence[Tensor]
    ) -> None:
        """Add up what an operator does."""
        packet, name = func._overloadpacket, func._schema.name
        read = given[1:] if packet in OVERWRITES else () if name.endswith("_like") or "::new_" in name else given
        moved = sum(_elements(t) * t.element_size() for t in read), sum(_elements(t) * t.element_size() for t in made)
        most, most_made = (max((_elements(tensor) for tensor in some), default=0) for some in ([*given, *made], made))
        if packet in (FUSED, FUSED_BACKWARD):
            count = sdpa_flop_count if packet is FUSED else sdpa_backward_flop_count
            shapes = [tensor.shape for tensor in given[: 3 if packet is FUSED else 4]]
            self._add("attention", count(*shapes), *moved, 1)
            query, key = shapes[-3:-1]
            self._add("softmax", SOFTMAX_FLOPS * math.prod(query[:-1]) * key[-2])
        elif packet in flop_registry:
            kind = "attention" if packet in BATCHED_PRODUCTS or "attention" in name else "linear maps"
            self._add(kind, flop_registry[packet](*args, **kwargs, out_val=out), *moved, 1)
        elif packet in SOFTMAX:
            self._add("softmax", SOFTMAX_FLOPS * most, *moved, 1)
        elif packet in MOVES or not read:
            self._add("moves", 0, *moved, 1)
        else:
            kind = "sums" if most_made < most else "elementwise"
            self._add(kind, (2 if packet in VECTOR_PRODUCTS else 1) * most, *moved, 1)

    def _add(self, name: str, flops: int, read: int = 0, written: int = 0, calls: int = 0) -> None:
        """Add to one part."""
        key = name, "backward" if in_backward() else "forward"
        known = self.parts.get(key, Part(*key))
        self.parts[key] = Part(
            *key, known.flops + flops, known.read + read, known.written + written, known.calls + calls
        )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend on the meta device as on a CPU: by the fused kernel where that would be taken, else by plain products."""
    fits = query.dim() == 4 and query.shape[-1] == key.shape[-1] == value.shape[-1]
    if not fits or dropout_p or enable_gqa or (attn_mask is not None and attn_mask.requires_grad):
        plain = aten._scaled_dot_product_attention_math.default
        return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]
    return FUSED.default(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


@retells
def cost(
    subject: str | Callable[..., Any],
    *inputs: Tensor | Sequence[int],
    dtype: str | torch.dtype | None = None,
    training: bool = False,
    world: int | None = None,
    bandwidth: float | None = None,
    flop_rate: float | None = None,
    memory_bandwidth: float | None = None,
    **options: Any,
) -> Cost:
    """Tell what a call costs, without computing it: the layer of an operator by its name, a model, or any function.

    The code itself runs, on the meta device, where tensors have no values: masks, weights, causality, position biases
    and operators of your own are counted as they are.

    - Matrix products count two operations a multiply-add, as `torch.utils.flop_counter` has them.
    - A softmax counts five operations an element.
    - All else counts one operation an element of its largest tensor: an element read by means and sums, an element
      written by broadcast sums and elementwise functions, whatever the function. Copies count none.
    - Bytes are those of all operands and results of every kernel call, as if nothing stayed in a cache.
    - `torch.nn.functional.scaled_dot_product_attention` is counted as the fused kernel, which holds no logits and
      computes them again in the backward pass; where no fused kernel would be taken, as with dropout, it is counted as
      the plain products, with logits.
    - Memory is that of plain tensors: where a layer goes through the queries in chunks, as it does without gradients on
      a CPU, its peak is an upper bound.

    With a ``world`` it is the cost of one of so many processes that share the input out, each with a box of the grid,
    and tells the roofline too: a process computes for as long as its operations take, or its traffic to and from memory
    if that is longer, and sends for as long as its bytes take, one after the other. What is sent is counted as the
    layer sends it; what gradients of parameters take to add up is not in it, nor the latency of each collective.

    Args:
        subject: Name of an operator, a module, or a function of tensors.
        *inputs: For a module or a function its inputs: tensors, of which only shapes, strides and types are used, or
            shapes. For an operator the sizes of its modes ``(n_1, …, n_N)``.
        dtype: Type of inputs that are given by shape: ``"float64"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``. By
            default that of the parameters, or float32.
        training: Whether the backward pass is part of it. Inputs that are given by shape have gradients then, as have
            all tensors that require them. The module stays in the mode it is in.
        world: Number of processes, whose prime factors each cut the mode that is longest then, the largest first; for
            an operator, or a layer, a block or a transformer whose input is given whole.
        bandwidth: Bytes that a process sends in a second, as the other rates told with ``world``.
        flop_rate: Operations of its device in a second.
        memory_bandwidth: Bytes that its device reads and writes in a second.
        **options: For a module or a function its keyword arguments. For an operator:

            - ``dim``: channels, all heads together; ``num_heads`` and ``batch``: 1 by default;
            - ``layout``: ``"channels_last"`` or ``"channels_first"``, where channels lie before the modes;
            - ``modes``: names of the modes;
            - options of the operator, and all else that the constructor of `TensorAttention` takes.

    Returns:
        The cost.

    Raises:
        OptionError: If there is no such operator or option, an argument is out of its range or has no meaning, or
            nothing has a gradient in training; if ``world`` and rates are not told together, or the modes cannot be cut
            for so many processes.
        ModesError: If ``modes`` does not fit the sizes.

    Examples:
        >>> import torch, tensorattn as ta
        >>> from torch import nn
        >>> print(ta.cost(nn.Linear(64, 8), (2, 100, 64), training=True))
        cost of Linear of 2×100×64, training
                                    FLOPs   bytes read   bytes written   kernel calls
          linear maps, forward    204,800       53,280           6,400              1
          linear maps, backward   409,600       66,048          53,248              2
          sums, backward            1,600        6,400              32              1
          total                   616,000      125,728          59,680              4
        peak memory: 0.1 MB beyond what is given, 0.1 MB of it the results and 0.0 MB extra
        >>> small, large = (ta.cost(name, (32, 112, 112), dim=64, num_heads=4) for name in ("kao_kv", "flattened"))
        >>> large.attention_flops > 500 * small.attention_flops
        True
        >>> layer = ta.TensorAttention(8, 2, modes="h w")
        >>> mask = torch.ones(5, 6, dtype=torch.bool)
        >>> ta.cost(layer, (2, 5, 6, 8), mask=mask).flops > ta.cost(layer, (2, 5, 6, 8)).flops
        True
        >>> rates = {"bandwidth": 40e9, "flop_rate": 500e12, "memory_bandwidth": 3e12}
        >>> print(ta.cost("additive", (64, 256, 256), dim=512, modes="t h w", world=64, **rates).roofline)
        one of 64 processes (t÷2 h÷8 w÷4): computes 904 µs, sends 2,326,511 bytes in 2 calls for 58.2 µs
        sending takes longer than computing: from 2,048 processes on
    """
    machines = Machines.read(world, bandwidth=bandwidth, flop_rate=flop_rate, memory_bandwidth=memory_bandwidth)
    if dtype is not None and dtype not in DTYPES and dtype not in DTYPES.values():
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if isinstance(subject, str):
        title, subject, shape = _layer(subject, *inputs, dtype=kind or torch.float32, **options)
        inputs, options = (shape,), {}
    else:
        title = _title(subject, inputs)
    if machines is None:
        return _count(title, subject, inputs, options, kind, training)
    assert world is not None
    found, cuts, sent = _count_one_of(world, title, subject, inputs, options, kind, training)
    times = _seconds(machines, found, sent)
    roofline = Roofline(cuts, sent, *times, None)
    for power in range(1, 64):
        try:
            told = _count_one_of(1 << power, title, subject, inputs, options, kind, training)
        except OptionError:  # so many cannot cut it
            break
        compute, communication = _seconds(machines, told[0], told[2])
        if communication > compute:
            roofline = dataclasses.replace(roofline, crossing=1 << power)
            break
    return dataclasses.replace(found, roofline=roofline)


def _seconds(machines: Machines, found: Cost, sent: Sent) -> tuple[float, float]:
    """Return how long a process computes, and how long it sends."""
    return machines.compute_seconds(found.flops, found.read + found.written), sent.nbytes / machines.bandwidth


def _count_one_of(
    world: int, title: str, subject: Any, inputs: Sequence[Any], options: dict[str, Any], kind: Any, training: bool
) -> tuple[Cost, Mapping[str, int], Sent]:
    """Count what one of many processes does; return how they cut the input, and what it sends, too."""
    if not isinstance(subject, (TensorAttention, TensorTransformerBlock, TensorTransformer)):
        raise OptionError(f"world has no meaning for {type(subject).__name__}: it takes no sharding.")
    shape = tuple(inputs[0].shape if isinstance(inputs[0], Tensor) else inputs[0]) if len(inputs) == 1 else ()
    modes, first = subject.modes, subject.channels_first
    if len(shape) != modes.order + 2:
        raise ShapeError(f"world needs one input of order {modes.order}, got {_title(subject, inputs)}.")
    sizes = shape[2:] if first else shape[1:-1]
    sides = subject.embedding.patch if isinstance(subject, TensorTransformer) else (1,) * modes.order
    sharding = imagined_sharding(modes, sizes, sides, world)
    lengths = sharding.part(modes).lengths
    own = (*shape[:2], *lengths) if first else (shape[0], *lengths, shape[-1])
    told, counter = {**options, "sharding": sharding}, imagined_traffic()
    with counter:
        found = _count(f"{title}, one of {world} processes", subject, (own,), told, kind, training)
    cuts = {modes.names[int(mode)]: sharding.mesh.size(int(dim)) for mode, dim in sharding.modes.items()}
    return found, cuts, counter.total


def _count(title: str, subject: Any, inputs: Sequence[Any], options: dict[str, Any], kind: Any, training: bool) -> Cost:
    """Count what a call costs on the meta device."""
    known: dict[int, Tensor] = {}  # what is one tensor stays one
    if isinstance(subject, nn.Module):  # a copy that shares no values
        state = (*subject.parameters(), *subject.buffers())
        subject = copy.deepcopy(subject, {id(tensor): _on_meta(known, tensor) for tensor in state})
    kind = kind or next((each.dtype for each in known.values() if each.is_floating_point()), torch.float32)
    shaped = [
        torch.empty(*each, dtype=kind, requires_grad=True, device="meta") if _is_shape(each) else each
        for each in inputs
    ]
    arguments, options = tree_map_only(Tensor, functools.partial(_on_meta, known), (tuple(shaped), options))
    counter = _Counter()
    with (
        torch.library._scoped_library("aten", "IMPL") as library,
        torch.inference_mode(False),
        torch.set_grad_enabled(training),
    ):
        library.impl("scaled_dot_product_attention", _attend, "AutogradMeta")
        with counter:
            output = subject(*arguments, **options)
        if training:
            ends = [tensor for tensor in _tensors(output) if tensor.requires_grad]
            if not ends:
                raise OptionError("training=True has no meaning: nothing that is returned has a gradient.")
            gradients = [torch.empty_like(tensor) for tensor in ends]
            with counter:
                torch.autograd.backward(ends, gradients)
    words = f"{title}, training" if training else title
    return Cost(words, tuple(counter.parts.values()), counter.peak, counter.live)


def count(function: Callable[[], Any]) -> Cost:
    """Count what a call costs while it computes: as `cost` does, on the tensors and the device that there are.

    Args:
        function: What to call, without arguments. What it runs backwards counts too.

    Returns:
        The cost; its results are what the call leaves behind. Memory is that of tensors.

    Examples:
        >>> x = torch.ones(3, 5)
        >>> found = count(lambda: torch.softmax(x.T @ x, -1).mean().reshape(1))
        >>> found.calls, found.product_flops, found.peak
        (3, 150, 200)
    """
    counter = _Counter()
    with counter:
        output = function()
    found = Cost(getattr(function, "__name__", "a call"), tuple(counter.parts.values()), counter.peak, counter.live)
    del output
    return found


def _is_shape(value: Any) -> bool:
    """Tell whether something is a shape."""
    return isinstance(value, (tuple, list, torch.Size)) and len(value) > 0 and all(is_integer(each) for each in value)


def _on_meta(known: dict[int, Tensor], tensor: Tensor) -> Tensor:
    """Return a tensor like another one, without values; the same one for the same."""
    if id(tensor) not in known:
        known[id(tensor)] = tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
    return known[id(tensor)]


def _title(subject: Callable[..., Any], inputs: Sequence[Any]) -> str:
    """Say in one line what the cost is of."""
    name = getattr(getattr(subject, "func", subject), "__name__", type(subject).__name__)
    shapes = [each.shape if isinstance(each, Tensor) else each for each in inputs]
    return f"{name} of {', '.join('×'.join(map(str, shape)) for shape in shapes if _is_shape(shape))}"


def _layer(
    operator: str,
    *given: Any,
    dtype: torch.dtype,
    dim: Any = None,
    batch: int = 1,
    num_heads: int = 1,
    layout: str = "channels_last",
    modes: int | str | Sequence[str] | None = None,
    **options: Any,
) -> tuple[str, nn.Module, tuple[int, ...]]:
    """Return what the layer of an operator is called, the layer, and the shape of its input."""
    get_operator(operator)
    sizes = given[0] if len(given) == 1 else given
    if not isinstance(sizes, Sequence) or (sizes is given and given):
        shown = ", ".join(map(repr, given))
        raise OptionError(f"an operator needs the sizes of its modes as one tuple (n_1, …, n_N), got {shown}.")
    check_order(len(sizes), "the number of sizes")
    spec = ModeSpec.parse(len(sizes) if modes is None else modes)
    if spec.order != len(sizes):
        raise OptionError(f"modes names {spec.order} modes, but sizes has {len(sizes)}.")
    counts = [*(("every size", size) for size in sizes), ("dim", dim), ("batch", batch), ("num_heads", num_heads)]
    for name, number in counts:
        if not is_integer(number) or number < 1:
            raise OptionError(f"{name} must be a whole number of at least 1, got {number!r}.")
    if layout not in LAYOUTS:
        raise OptionError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}.")
    if dim % num_heads:
        raise OptionError(f"dim must be divisible by num_heads, got {dim} and {num_heads}.")
    first, names = layout == "channels_first", len(sizes) if modes is None else modes
    layer = TensorAttention(
        dim, num_heads, modes=names, operator=operator, channels_first=first, device="meta", dtype=dtype, **options
    )
    words = [operator, *(f"{name}={value!r}" for name, value in options.items() if not isinstance(value, nn.Module))]
    grid = " ".join(map("{}={}".format, spec.names, sizes))
    title = (
        f"{', '.join(words)}: batch={batch} {grid} C={dim} heads={num_heads}, {str(dtype).removeprefix('torch.')}, "
        f"{layout.replace('_', ' ')}, {batch * math.prod(sizes) * dim * dtype.itemsize / 1e6:.1f} MB"
    )
    return title, layer, (batch, dim, *sizes) if first else (batch, *sizes, dim)


def count_calls(function: Callable[[], Any]) -> int:
    """Count the kernel calls of a call that computes: operators that are neither views nor ``detach`` nor ``empty``.

    Args:
        function: What to call, without arguments. What it runs backwards counts too.

    Returns:
        The number of calls.
    """
    return count(function).calls


class Spent(NamedTuple):
    """What one call took.

    Attributes:
        seconds: CPU time, the median of the calls.
        peak_bytes: Most memory held at once beyond what was held before the call, its result included; None where
            the system does not tell.
    """

    seconds: float
    peak_bytes: int | None


class PeakMemory:
    """Measures the most memory that the process holds at once, above what it held at the start, as ``bytes``.

    On Linux the kernel keeps the high-water mark of resident memory and resets it on request
    (``/proc/self/clear_refs``), so buffers of every library count, whether Python knows them or not. Free memory is
    handed back to the system first: otherwise the call would reuse it unseen. Elsewhere ``bytes`` stays None.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = self._read("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            self.bytes = max(0, self._read("VmHWM") - self._before)

    def _read(self, field: str) -> int:
        """Return one line of the status of the process, in bytes."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Work on one thread of the CPU; afterwards on as many as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure(call: Callable[[], Any]) -> tuple[Any, Spent]:
    """Call a function a few times on one thread, and return its result, its CPU time and its peak memory.

    One thread, because threads that wait for each other burn CPU time, the more the busier the machine is. A call of
    less than 0.3 seconds is repeated, up to five times, after a first one that does not count: it also loads code and
    fills caches.

    Args:
        call: What to call.

    Returns:
        The result of the last call, and what a call took.

    Examples:
        >>> result, spent = measure(lambda: torch.ones(8).sum())
        >>> float(result), spent.seconds < 1
        (8.0, True)
    """
    with one_thread():
        result, seconds, peak = _once(call)
        timed = [seconds]
        while sum(timed) < ENOUGH_SECONDS and len(timed) <= REPEATS:
            result = None  # let go of the result before, or two would be held at once
            start = time.process_time()
            result = call()
            timed.append(time.process_time() - start)
        if len(timed) > 1:  # the first call warmed up, for time and for memory
            result, timed = None, timed[1:]
            result, _, peak = _once(call)
    return result, Spent(statistics.median(timed), peak)


def _once(call: Callable[[], Any]) -> tuple[Any, float, int | None]:
    """Call a function once; return its result, CPU time and peak memory."""
    with PeakMemory() as memory:
        start = time.process_time()
        result = call()
        seconds = time.process_time() - start
    return result, seconds, memory.bytes
