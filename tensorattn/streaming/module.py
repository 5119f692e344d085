"""A stream of a whole module: one stream for each causal layer in it, which advance together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensorattn.errors import OptionError, ShapeError, TensorAttentionError
from tensorattn.nn import (
    LearnedPositions,
    PatchEmbedding,
    SinCosPositions,
    TensorAttention,
    TensorTransformerBlock,
)
from tensorattn.nn.coordinates import Coordinates
from tensorattn.nn.layout import one_a_mode
from tensorattn.streaming.attention import AttentionStream, StreamState, check_window, counted_frames
from tensorattn.weights import accumulation_dtype

__all__ = ["ModuleStream"]


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
        OptionError: If the module has no causal attention, or one along other modes or without a causal mode, or the
            window is not a whole number of frames.

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
        ModuleStream(TensorTransformer, 4 layers; 6 frames, 21,616 bytes)
    """

    def __init__(self, module: nn.Module, *, window: int | None = None) -> None:
        self.module = module
        try:
            check_window(window)
            self._streams = _find_streams(module, window)
        except TensorAttentionError as cause:
            raise cause.retold("ModuleStream") from None

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
        told = f"{type(self.module).__name__}, {count}; {counted_frames(self.frames)}, {self.nbytes:,} bytes"
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

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from states that were saved.

        Args:
            state_dict: What `state_dict` returned, of a stream over a module of the same shape.

        Raises:
            OptionError: If it has other layers, or the state of another layer or window.
            ShapeError: If a tensor in it has another shape than the state says.
        """
        try:
            if not isinstance(state_dict, Mapping):
                raise OptionError(f"state_dict must be a mapping, got {type(state_dict).__name__}.")
            if list(state_dict) != list(self._streams):
                raise OptionError(
                    f"state_dict has the layers {list(state_dict)}, but the module has {list(self._streams)}."
                )
            states = {path: stream._read(state_dict[path]) for path, stream in self._streams.items()}
        except TensorAttentionError as cause:
            raise cause.retold("ModuleStream.load_state_dict") from None
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
        if isinstance(module, SinCosPositions | LearnedPositions) and module.axes.modes == self.modes:
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
