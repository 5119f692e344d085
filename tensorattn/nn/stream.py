"""Streams: a causal layer, or a whole module, fed frame by frame.

The state of a layer is what later frames need to know of the frames before, the sums of `tensorattn.functional.causal`.
A module is streamed by one stream for each causal layer in it, which advance together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensorattn.averages.means import check_same_shape
from tensorattn.errors import DtypeError, OptionError, ShapeError, WeightsError, is_integer, retells
from tensorattn.functional.causal import Past, causal_summary, frames_beside
from tensorattn.functional.cells import Cells
from tensorattn.functional.operator import get_operator
from tensorattn.functional.summary import make_summary
from tensorattn.masks import (
    Lengths,
    Vector,
    Weights,
    accumulation_dtype,
    counting_dtype,
    one_a_mode,
    read_weights,
    without_absent,
)
from tensorattn.nn.attention import TensorAttention
from tensorattn.nn.block import TensorTransformerBlock
from tensorattn.nn.coordinates import Coordinates
from tensorattn.nn.layout import channels_last, check_input, check_parameters
from tensorattn.nn.parameters import parameter_of
from tensorattn.nn.patches import PatchEmbedding
from tensorattn.nn.positions import LearnedPositions, SinCosPositions

__all__ = ["AttentionStream", "ModuleStream"]


class AttentionStream:
    r"""Feed a causal `TensorAttention` frame by frame, or chunk by chunk: it returns what the whole tensor would give.

    The state holds averages of the inputs, not keys and values. It is projected at every call, so a change of the
    parameters takes effect on the past too; for ``clustered`` it holds sums of keys and values, on which it does not.
    With S = n_1 + … + n_N without the frames and C channels it takes

    ====================================  =========================================================
    ``additive``, ``kao_kv``              S·C, and C for each frame: its average
    with ``interaction="linear"``         C² more
    ``truncated``                         Σ_U Π n · C over kept subsets, those with frames for each frame
    ``flattened``, ``axial``              P·C for each frame: the frames themselves
    ``clustered``, n tokens, H heads      2n(C + H) + 2C²/H + H, in float64
    ====================================  =========================================================

    a sample. With a window W it takes S·C for each of W − 1 frames, and C² more with an interaction, but no longer
    grows. Gradients flow through the state until it is detached.

    Args:
        layer: A layer with a causal mode. It is not copied.
        window: How many frames are seen, the own one included; None for all. The output of a frame is then that of the
            layer on the last W frames alone.

    Raises:
        OptionError: If the layer is no `TensorAttention`, has no causal mode, or has a position bias or a rotary
            embedding, or the window is not a whole number of frames.

    Shape:
        - input and output: those of the layer, with any number of frames along its causal mode

    Examples:
        >>> import torch, tensorattn as ta
        >>> layer = ta.TensorAttention(96, 4, modes="t h w", causal="t")
        >>> video = torch.randn(2, 10, 7, 5, 96)
        >>> stream = ta.AttentionStream(layer)
        >>> with torch.no_grad():
        ...     frames = [stream(frame) for frame in video.split(1, dim=1)]
        ...     torch.allclose(torch.cat(frames, 1), layer(video), atol=1e-5)
        True
        >>> stream
        AttentionStream(operator='additive', causal='t'; 10 frames, 27,696 bytes)
    """

    @retells
    def __init__(self, layer: TensorAttention, *, window: int | None = None) -> None:
        if not isinstance(layer, TensorAttention):
            raise OptionError(f"layer must be a TensorAttention, got {type(layer).__name__}.")
        if layer.causal is None:
            raise OptionError(
                "layer has no causal mode to stream along.",
                hint=f"Make it with one of its modes, such as causal={layer.modes.names[0]!r}.",
            )
        for name in ("position_bias", "rotary"):
            if getattr(layer, name) is not None:
                raise OptionError(f"layer has {name}, which would need the place of every frame so far.")
        _check_window(window)
        self.layer, self.window = layer, window
        self.modes, self.channels_first = layer.modes, layer.channels_first  # for messages
        self._mode = layer.causal
        self._state: StreamState | None = None

    @property
    def frames(self) -> int:
        """Number of frames so far."""
        return 0 if self._state is None else self._state.past.frames

    @property
    def nbytes(self) -> int:
        """Number of bytes that the state takes."""
        return 0 if self._state is None else sum(t.nbytes for t in self._state.past.tensors.values())

    def __repr__(self) -> str:
        names, layer = self.layer.modes.names, self.layer
        window = "" if self.window is None else f", window={self.window}"
        told = f"operator={layer.operator!r}, causal={names[self._mode]!r}{window}"
        return f"{type(self).__name__}({told}; {_counted_frames(self.frames)}, {self.nbytes:,} bytes)"

    def __call__(
        self,
        x: Tensor,
        *,
        weights: Sequence[Vector] | None = None,
        lengths: Lengths | Mapping[Any, Any] = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """Attend from the next frames to themselves and to those before them.

        Args:
            x: The next frames, at least one, in the layout of the layer.
            weights: As in `TensorAttention.forward`, for these frames; those of the other modes are the same at every
                call. A frame of weight 0 is left out.
            lengths: As in `TensorAttention.forward`, for these frames; those of the other modes are the same at every
                call.
            skip: A tensor of the shape of the input that is added to the output.

        Returns:
            The output for these frames.

        Raises:
            ShapeError: If the input has the wrong number of dimensions or channels, no frame, or another batch or other
                sizes than the frames before.
            DtypeError: If a tensor is not floating point, the types differ, or are others than before.
            WeightsError: If weights have the wrong length, are negative or not finite, or those of another mode are all
                zero or others than before.
            OptionError: If the frames before are on another device.
        """
        y, self._state = self._advanced(x, weights=weights, lengths=lengths, skip=skip)
        return y

    def _advanced(
        self,
        x: Tensor,
        context: Any = None,
        *,
        weights: Sequence[Vector] | None = None,
        mask: Any = None,
        lengths: Lengths = None,
        skip: Tensor | None = None,
        prefix: Any = None,
        sharding: Any = None,
    ) -> tuple[Tensor, StreamState]:
        """Return the output and the state after these frames; the present one stays as it is."""
        layer, state = self.layer, self._state
        refused = {"context": context, "mask": mask, "prefix": prefix, "sharding": sharding}
        spoken = self._checked(x, weights=weights, lengths=lengths, skip=skip, refused=refused)
        present = spoken.present
        last = without_absent(channels_last(x, layer.channels_first), present)
        y, past = layer.continued(last, spoken, None if state is None else state.past, window=self.window)
        return layer.finished(y, present, skip), StreamState(x.shape[0], tuple(last.shape[1:-1]), x.dtype, past)

    @retells
    def _checked(
        self, x: Tensor, *, weights: Any, lengths: Any, skip: Tensor | None, refused: Mapping[str, Any]
    ) -> Weights:
        """Check the next frames, and return the weights of their positions.

        A mask is refused: whether its parts are a product over modes, and the same one, cannot be told part by part.
        """
        layer = self.layer
        grid = check_input(x, layer.modes, layer.embed_dim, channels_first=layer.channels_first)
        check_parameters(x, parameter_of(layer))
        if skip is not None:
            check_same_shape("skip", skip, x.shape, x)
        for name, argument in refused.items():
            if argument is not None:
                hint = "Give lengths, or one vector of weights a mode." if name == "mask" else ""
                raise OptionError(f"{name} has no meaning in a stream.", hint=hint)
        if isinstance(weights, Tensor):
            order = layer.modes.order
            raise WeightsError(f"weights has a single tensor, but order {order} needs {order} vectors, one a mode.")
        spoken = read_weights(weights, None, lengths, grid, x, layer.modes, of="x", part_of=(self._mode,))
        if self._state is not None:
            self._check_continued(x, grid.sizes, spoken, self._state)
        return spoken

    def _check_continued(self, x: Tensor, sizes: Sequence[int], weights: Weights, state: StreamState) -> None:
        """Check that frames fit to those before."""
        names = self.layer.modes.names
        if x.shape[0] != state.batch:
            raise ShapeError(f"x has a batch of {x.shape[0]}, but the frames before had one of {state.batch}.")
        for mode, (size, before) in enumerate(zip(sizes, state.sizes, strict=True)):
            if mode != self._mode and size != before:
                raise ShapeError(f"mode {names[mode]!r} has size {size} in x but {before} in the frames before.")
        if x.dtype != state.dtype:
            raise DtypeError(f"the type is {x.dtype} in x but {state.dtype} in the frames before.", hint=_MOVE)
        device = state.past.weight.device
        if x.device != device:
            raise OptionError(f"x is on {x.device}, but the frames before are on {device}.", hint=_MOVE)
        for mode, (own, held) in enumerate(zip(weights.vectors, state.past.mode_weights, strict=True)):
            if mode != self._mode and not _same(own, held):
                raise WeightsError(
                    f"weights of mode {names[mode]!r} are not those of the frames before.",
                    hint="Give the same at every call; only the weights of frames may differ.",
                )

    def reset(self) -> None:
        """Forget all frames; the next ones are the first, of any sizes and type."""
        self._state = None

    def detach(self) -> None:
        """Let no gradient flow further back than here: later losses do not reach the frames so far."""
        self._map(lambda tensor: tensor.detach())

    @retells
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> AttentionStream:
        """Move the state to where later frames will be. The layer is not moved.

        Args:
            device: Device of later frames, or None for the same.
            dtype: Type of later frames, or None for the same. Sums are held in float64.

        Returns:
            The stream itself.

        Raises:
            DtypeError: If the type is not a floating-point one.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise DtypeError(f"dtype must be floating point, got {dtype}.")
        here = None if self._state is None else self._state.past.weight.device
        wide = counting_dtype(torch.device(device) if device is not None else here or torch.device("cpu"))
        old = None if self._state is None else self._state.dtype

        def moved(tensor: Tensor) -> Tensor:
            kind = tensor.dtype
            if tensor.dtype == torch.float64 and old != torch.float64:
                kind = wide  # sums
            elif dtype is not None:
                kind = dtype if tensor.dtype.itemsize < 4 else accumulation_dtype(dtype)
            return tensor.to(device=device, dtype=kind)

        self._map(moved)
        if self._state is not None and dtype is not None:
            self._state = dataclasses.replace(self._state, dtype=dtype)
        return self

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor of the state."""
        if self._state is not None:
            tensors = {name: change(tensor) for name, tensor in self._state.past.tensors.items()}
            self._state = dataclasses.replace(self._state, past=self._state.past.with_tensors(tensors))

    def state_dict(self) -> dict[str, Any]:
        """Return the state, detached, as ``torch.save`` can save it and ``torch.load`` load it."""
        saved: dict[str, Any] = {"stream": self._described(), "frames": self.frames}
        if self._state is not None:
            saved.update(batch=self._state.batch, sizes=self._state.sizes, dtype=str(self._state.dtype)[6:])
            saved["tensors"] = {name: t.detach().clone() for name, t in self._state.past.tensors.items()}
        return saved

    @retells
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state that was saved, by this version or an earlier one.

        Args:
            state_dict: What `state_dict` returned, of a stream over a layer of the same shape.

        Raises:
            OptionError: If it is no such state, or that of another layer or window.
            ShapeError: If a tensor in it has another shape than the state says.
        """
        self._state = self._read(state_dict)

    def _described(self) -> dict[str, Any]:
        """What a state depends on beyond the frames."""
        layer = self.layer
        record = get_operator(layer.operator)
        needs = record.needs(layer.modes.order, **layer.options)
        condensed = record.condense is not None
        return {
            **({name: repr(value) for name, value in layer.options.items()} if condensed else {}),
            "embed_dim": layer.embed_dim,
            "modes": layer.modes.order,
            "causal": self._mode,
            "operator": layer.operator,
            "kept": needs.kept,
            "second_moment": needs.second_moment,
            "window": self.window,
        }

    def _read(self, saved: Mapping[str, Any]) -> StreamState | None:
        """Check a state that was saved, and read it."""
        refusal = "state_dict is not the state of a stream of attention."
        if not isinstance(saved, Mapping) or not {"stream", "frames"} <= saved.keys():
            raise OptionError(refusal)
        if not isinstance(saved["stream"], Mapping) or not is_integer(saved["frames"]) or saved["frames"] < 0:
            raise OptionError(refusal)
        for name, own in self._described().items():
            if saved["stream"].get(name) != own:
                raise OptionError(f"{name} is {saved['stream'].get(name)!r} in state_dict but {own!r} in the stream.")
        if not saved["frames"]:
            return None
        if not {"batch", "sizes", "dtype", "tensors"} <= saved.keys() or not isinstance(saved["tensors"], Mapping):
            raise OptionError(refusal)
        batch, sizes = saved["batch"], saved["sizes"]
        if not is_integer(batch) or batch < 0:
            raise OptionError(f"batch must be a number of samples in state_dict, got {batch!r}.")
        if not isinstance(sizes, Sequence) or len(sizes) != self.layer.modes.order or not all(map(is_integer, sizes)):
            raise OptionError(f"sizes must be {self.layer.modes.order} integers in state_dict, got {sizes!r}.")
        if min(sizes) < 1:
            raise OptionError(f"sizes must be at least 1 in state_dict, got {tuple(sizes)}.")
        dtype = getattr(torch, str(saved["dtype"]), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise OptionError(f"dtype is {saved['dtype']!r} in state_dict, which is no floating-point type of torch.")
        state = StreamState(int(batch), tuple(map(int, sizes)), dtype, self._outline(batch, tuple(sizes), dtype))
        tensors = dict(saved["tensors"])
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise DtypeError(f"{name} must be a floating-point tensor in state_dict, got {got}.")
        held = saved["frames"] if self.window is None else min(self.window - 1, saved["frames"])
        outline = {**state.past.tensors, **self._mode_weights(tensors, state)}
        for name in tensors:
            if name not in outline:
                raise OptionError(f"state_dict has a tensor {name!r}, which the stream has not.")
        for name, like in outline.items():
            if name not in tensors:
                raise ShapeError(f"{name} is missing in state_dict.")
            shape, found = list(like.shape), tuple(tensors[name].shape)
            if name in ("weight", "total"):
                shape[0] = batch if found[:1] == (batch,) else 1
            if name.split(".")[0] in ("weight", "means") or (name == "moments.0" and self.window is not None):
                shape[1] = held if self.window is not None or like.shape[1] else 0
            if found != tuple(shape):
                raise ShapeError(f"{name} has shape {found} in state_dict, but {tuple(shape)} fits the stream.")
            tensors[name] = tensors[name].to(torch.promote_types(like.dtype, tensors[name].dtype))
        past = dataclasses.replace(state.past, frames=saved["frames"]).with_tensors(tensors)
        return dataclasses.replace(state, past=past)

    def _mode_weights(self, tensors: Mapping[str, Tensor], state: StreamState) -> dict[str, Tensor]:
        """Return what weights of the other modes may be, where there are any."""
        found = {}
        for mode, size in enumerate(state.sizes):
            tensor = tensors.get(f"mode_weights.{mode}")
            if tensor is not None and mode != self._mode:
                shape = (state.batch, size) if tensor.dim() == 2 else (size,)
                found[f"mode_weights.{mode}"] = torch.empty(shape, dtype=tensor.dtype, device="meta")
        return found

    def _outline(self, batch: int, sizes: tuple[int, ...], dtype: torch.dtype) -> Past:
        """Return what a stream of such frames holds after one of them, without values."""
        one = [1 if mode == self._mode else size for mode, size in enumerate(sizes)]
        x = torch.empty(batch, *one, self.layer.embed_dim, dtype=dtype, device="meta")
        record, plain = get_operator(self.layer.operator), Weights((None,) * len(sizes))
        if record.query == "grid":
            return frames_beside(x, plain, self._mode, past=None, window=self.window)[2]
        needs = record.needs(len(sizes), **self.layer.options)
        if record.condense is not None:
            heads = x.new_empty(batch, self.layer.num_kv_heads, *one, self.layer.head_dim)
            options = {n: v.to("meta") if isinstance(v, Cells) else v for n, v in self.layer.options.items()}
            how = {"causal": self._mode, "window": self.window, **options}
            _, after = record.condense(None, make_summary(heads, heads, needs, plain), **how)
            return dataclasses.replace(after(), mode_weights=plain.vectors)
        return causal_summary(x, x, needs, plain, self._mode, window=self.window)[1]()


@dataclass(frozen=True)
class StreamState:
    """The frames so far: what later ones have to agree with, and what they need to know.

    Attributes:
        batch: Number of samples.
        sizes: Sizes of the modes.
        dtype: Type of the frames.
        past: What later frames need to know.
    """

    batch: int
    sizes: tuple[int, ...]
    dtype: torch.dtype
    past: Past


_MOVE = "Move the state of the stream with its method to, or forget it with reset."


def _check_window(window: Any) -> None:
    """Check a number of frames."""
    if window is not None and (not is_integer(window) or window < 1):
        raise OptionError(f"window must be a number of frames from 1 up, or None, got {window!r}.")


def _counted_frames(frames: int) -> str:
    """Tell a number of frames."""
    return f"{frames:,} frame" + "s" * (frames != 1)


def _same(first: Vector, second: Vector) -> bool:
    """Tell whether two vectors of weights are the same."""
    if first is None or second is None:
        return first is second
    return first.shape == second.shape and torch.equal(first, second.to(first.dtype))


class ModuleStream:
    """Feed a module frame by frame: every causal `TensorAttention` in it becomes a stream, all else acts on frames.

    The other parts of the module must act on each frame by itself, as norms, linear maps and `TensorTransformerBlock`
    do. `SinCosPositions` and `LearnedPositions` along the causal mode go on counting; the table of the latter is read
    entry by entry, as for a tensor of its size. A `PatchEmbedding` along it needs whole patches at every call. Blocks
    with ``checkpoint=True`` keep what is inside. The module itself is not changed, and what is trained or moved in it
    later takes effect.

    Args:
        module: A module such as `TensorTransformer`. It is not copied.
        window: How many frames each attention sees, the own one included; None for all.

    Raises:
        OptionError: If it is no module, has no causal attention, or one along other modes or without a causal mode, or
            the window is not a whole number of frames.

    Examples:
        >>> import torch, tensorattn as ta
        >>> config = ta.TensorTransformerConfig(modes="t h w", in_channels=3, patch=(1, 8, 8), options={"causal": "t"})
        >>> model, video = ta.TensorTransformer(config), torch.randn(1, 6, 32, 24, 3)
        >>> stream = ta.ModuleStream(model)
        >>> with torch.no_grad():
        ...     chunks = [stream(chunk) for chunk in video.split([1, 3, 2], dim=1)]
        ...     torch.allclose(torch.cat(chunks, 1), model(video), atol=1e-5)
        True
        >>> stream
        ModuleStream(TensorTransformer, 4 layers; 6 frames, 33,920 bytes)
    """

    @retells
    def __init__(self, module: nn.Module, *, window: int | None = None) -> None:
        if not isinstance(module, nn.Module):
            raise OptionError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
        self.module = module
        _check_window(window)
        self._streams = _find_streams(module, window)

    @property
    def frames(self) -> int:
        """Number of frames so far, or of patches of frames."""
        return next(iter(self._streams.values())).frames

    @property
    def nbytes(self) -> int:
        """Number of bytes that the states of all layers take."""
        return sum(stream.nbytes for stream in self._streams.values())

    def __repr__(self) -> str:
        count = f"{len(self._streams)} layer" + "s" * (len(self._streams) != 1)
        told = f"{type(self.module).__name__}, {count}; {_counted_frames(self.frames)}, {self.nbytes:,} bytes"
        return f"{type(self).__name__}({told})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module on the next frames. Where it raises an error, no layer has moved on.

        Args:
            *args: What the module takes, with the next frames only.
            **kwargs: What else it takes.

        Returns:
            What the module returns for these frames.

        Raises:
            OptionError: If the module calls one attention twice, or again after it has returned.
        """
        step = _Step(self._streams, self.frames)
        result = step.twin(self.module, "")(*args, **kwargs)
        step.over = True
        for path, state in step.states.items():
            self._streams[path]._state = state
        return result

    def reset(self) -> None:
        """Forget all frames."""
        for stream in self._streams.values():
            stream.reset()

    def detach(self) -> None:
        """Let no gradient flow further back than here."""
        for stream in self._streams.values():
            stream.detach()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ModuleStream:
        """Move the states to where later frames will be. The module is not moved.

        Args:
            device: Device of later frames, or None for the same.
            dtype: Type of later frames, or None for the same.

        Returns:
            The stream itself.

        Raises:
            DtypeError: If the type is not a floating-point one.
        """
        for stream in self._streams.values():
            stream.to(device, dtype)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all layers, by their names in the module, as ``torch.save`` can save them."""
        return {path: stream.state_dict() for path, stream in self._streams.items()}

    @retells
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from states that were saved.

        Args:
            state_dict: What `state_dict` returned, of a stream over a module of the same shape.

        Raises:
            OptionError: If it has other layers, or the state of another layer or window.
            ShapeError: If a tensor in it has another shape than the state says.
        """
        if not isinstance(state_dict, Mapping):
            raise OptionError(f"state_dict must be a mapping, got {type(state_dict).__name__}.")
        if list(state_dict) != list(self._streams):
            raise OptionError(
                f"state_dict has the layers {list(state_dict)}, but the module has {list(self._streams)}."
            )
        states = {path: stream._read(state_dict[path]) for path, stream in self._streams.items()}
        for path, stream in self._streams.items():
            stream._state = states[path]


def _find_streams(module: nn.Module, window: int | None) -> dict[str, AttentionStream]:
    """Make a stream for every causal attention in a module, by its name."""
    layers = [
        (path, layer)
        for path, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, TensorAttention)
    ]
    causal = [(path, layer) for path, layer in layers if layer.causal is not None]
    if not causal:
        raise OptionError("module has no TensorAttention with a causal mode.", hint="Make it with causal=....")
    first, one = causal[0]
    name = one.modes.names[one.causal or 0]
    for path, layer in layers:
        if layer.causal is None and not (one.modes.named and layer.modes.named and name not in layer.modes.names):
            raise OptionError(f"attention {path!r} has no causal mode, so it may see later frames.")
        if layer.causal is not None and (layer.modes, layer.causal) != (one.modes, one.causal):
            raise OptionError(f"attention {path!r} is not causal along the same mode of the same modes as {first!r}.")
    return {path: AttentionStream(layer, window=window) for path, layer in causal}


class _Step:
    """One call of a module that is streamed: twins of its parts that hold streams in place of layers.

    Attributes:
        streams: The streams, by the name of their layer.
        start: Number of frames before.
        states: What each stream holds after these frames.
        over: Whether the call has returned.
    """

    def __init__(self, streams: Mapping[str, AttentionStream], start: int) -> None:
        self.streams, self.start = streams, start
        self.states: dict[str, StreamState | None] = {}
        self.over = False
        layer = next(iter(streams.values())).layer
        self.modes, self.mode = layer.modes, layer.causal or 0

    def twin(self, module: nn.Module, path: str) -> Any:
        """Return what acts as a part of the module does, on the next frames."""
        if path in self.streams:
            return _Layer(self, path)
        if isinstance(module, (SinCosPositions, LearnedPositions)) and module.axes.modes == self.modes:
            return _StandIn(module, self._positions)
        if isinstance(module, PatchEmbedding) and module.modes == self.modes:
            return _StandIn(module, self._patches)
        children = {
            name: child if child is None else self.twin(child, f"{path}.{name}" if path else name)
            for name, child in module._modules.items()
        }
        if all(children[name] is child for name, child in module._modules.items()):
            return module
        twin = object.__new__(type(module))
        twin.__dict__.update(module.__dict__, _modules=children, _compiled_call_impl=None)
        if isinstance(twin, TensorTransformerBlock):
            twin.checkpoint = False  # computing a block again would feed its frames twice
        return twin

    def attend(self, path: str, x: Tensor, **options: Any) -> Tensor:
        """Attend from the next frames, once."""
        if self.over:
            rule = f"attention {path!r} is called after the module has returned, as when activations are recomputed."
            raise OptionError(rule, hint="A stream cannot be checkpointed.").retold("ModuleStream")
        if path in self.states:
            rule = f"attention {path!r} is called twice, but one stream follows one sequence of frames."
            raise OptionError(rule).retold("ModuleStream")
        y, self.states[path] = self.streams[path]._advanced(x, **options)
        return y

    def _positions(
        self, module: SinCosPositions | LearnedPositions, x: Tensor, *, coordinates: Coordinates | None = None
    ) -> Tensor:
        """Embed positions that go on counting along the causal mode."""
        if isinstance(coordinates, Tensor) or not isinstance(x, Tensor) or x.dim() != self.modes.order + 2:
            return module(x, coordinates=coordinates)  # which tells what is wrong
        given = one_a_mode(self.modes, coordinates, "coordinates")
        name, axes = self.modes.names[self.mode], module.axes
        if given[self.mode] is None:
            size = x.shape[self.mode + (2 if module.channels_first else 1)]
            end, spacing = self.start + size, axes.spacings[self.mode]
            if axes.periodic[self.mode] and spacing is None:
                rule = f"positions along mode {name!r} close a circle of a number of frames that a stream cannot know."
                raise OptionError(rule, hint="Give coordinates.").retold("ModuleStream")
            if isinstance(module, LearnedPositions) and end > module.sizes[self.mode]:
                rule = f"mode {name!r} has {module.sizes[self.mode]} learned positions, but this is frame {end}."
                raise ShapeError(rule, hint="Give coordinates, or stretch the table with resized.").retold(
                    "ModuleStream"
                )
            places = torch.arange(self.start, end, device=x.device, dtype=accumulation_dtype(x.dtype))
            given[self.mode] = places if spacing is None else places * spacing
        return module(x, coordinates=given)

    def _patches(self, module: PatchEmbedding, x: Tensor) -> Tensor:
        """Embed whole patches."""
        size, part = x.shape[self.mode + (2 if module.channels_first else 1)], module.patch[self.mode]
        if module.pad and size % part:
            rule = f"mode {self.modes.names[self.mode]!r} has size {size} in x, which patches of {part} do not divide."
            raise ShapeError(rule, hint="A stream cannot pad in the middle; give whole patches.").retold("ModuleStream")
        return module(x)


class _StandIn:
    """What stands in for a module during one step: another function with the attributes of the module."""

    def __init__(self, module: nn.Module, function: Callable[..., Tensor]) -> None:
        self._module, self._function = module, function

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._function(self._module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Layer:
    """What stands in for a layer during one step."""

    def __init__(self, step: _Step, path: str) -> None:
        self._step, self._path = step, path

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        return self._step.attend(self._path, x, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step.streams[self._path].layer, name)
