"""A stream of one layer: its state is what later frames need to know of the frames before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensorattn.averages import check_whole
from tensorattn.errors import DtypeError, OptionError, ShapeError, TensorAttentionError, WeightsError
from tensorattn.modes import GridShape
from tensorattn.nn import (
    TensorAttention,
)
from tensorattn.nn.layout import channels_last, check_input, check_layer_presence, check_parameters, reading
from tensorattn.nn.projections import added
from tensorattn.operators import get_operator
from tensorattn.presence import Lengths
from tensorattn.running import Past, continued_frames, continued_summary
from tensorattn.weights import GridWeights, Vector, Vectors, accumulation_dtype, check_weights, without_absent

__all__ = ["AttentionStream", "StreamState", "check_window", "counted_frames"]


class AttentionStream:
    r"""Feed a causal `TensorAttention` frame by frame, or chunk by chunk: it returns what the whole tensor would give.

    The state holds averages of the inputs, not keys and values. It is projected at every call, so a change of the
    parameters takes effect on the past too. With S = n_1 + … + n_N without the frames and C channels it takes

    ====================================  =========================================================
    ``additive``, ``kao_kv``              S·C, and C for each frame: its average
    with ``interaction="linear"``         C² more
    ``truncated``                         Σ_U Π n · C over kept subsets, those with frames for each frame
    ``flattened``, ``axial``              P·C for each frame: the frames themselves
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
        AttentionStream(operator='additive', causal='t'; 10 frames, 17,708 bytes)
    """

    def __init__(self, layer: TensorAttention, *, window: int | None = None) -> None:
        try:
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
            check_window(window)
        except TensorAttentionError as cause:
            raise cause.retold("AttentionStream") from None
        self.layer, self.window = layer, window
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
        return f"{type(self).__name__}({told}; {counted_frames(self.frames)}, {self.nbytes:,} bytes)"

    def __call__(
        self,
        x: Tensor,
        *,
        weights: Sequence[Vector] | None = None,
        lengths: Lengths | Mapping[Any, Any] = None,
        skip: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attend from the next frames to themselves and to those before them.

        Args:
            x: The next frames, at least one, in the layout of the layer.
            weights: As in `TensorAttention.forward`, for these frames; those of the other modes are the same at every
                call. A frame of weight 0 is left out.
            lengths: As in `TensorAttention.forward`, for these frames; those of the other modes are the same at every
                call.
            skip: A tensor of the shape of the input that is added to the output.
            out: Where to write the output, of the shape and type of the input. No derivative goes through it.

        Returns:
            The output for these frames.

        Raises:
            ShapeError: If the input has the wrong number of dimensions or channels, no frame, or another batch or other
                sizes than the frames before.
            DtypeError: If a tensor is not floating point, the types differ, or are others than before.
            WeightsError: If weights have the wrong length, are negative or not finite, or those of another mode are all
                zero or others than before.
            OptionError: If ``out`` is given where derivatives are asked for, or the frames before are on another
                device.
        """
        y, self._state = self._advanced(x, weights=weights, lengths=lengths, skip=skip, out=out)
        return y

    def _advanced(
        self,
        x: Tensor,
        context: Any = None,
        *,
        weights: Sequence[Vector] | None = None,
        mask: Any = None,
        lengths: Lengths | Mapping[Any, Any] = None,
        skip: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, StreamState]:
        """Return the output and the state after these frames; the present one stays as it is.

        A mask is refused: whether its parts are a product over modes, and the same one, cannot be told part by part.
        """
        layer, state = self.layer, self._state
        try:
            grid = check_input(x, layer.modes, layer.embed_dim, channels_first=layer.channels_first)
            check_parameters(x, layer.q_proj.weight)
            check_whole(x.shape, (x, *layer.parameters()), skip, out)
            last = channels_last(x, layer.channels_first)
            for name, argument in (("context", context), ("mask", mask)):
                if argument is not None:
                    hint = "Give lengths, or one vector of weights a mode." if name == "mask" else ""
                    raise OptionError(f"{name} has no meaning in a stream.", hint=hint)
            check_weights(weights, grid, last, layer.modes, part_of=self._mode)
            given = check_layer_presence(grid, last, layer.modes, weights=weights, lengths=lengths, part_of=self._mode)
            assert not isinstance(given.weights, GridWeights)
            checked, present = given.weights, given.present
            if state is not None:
                self._check_continued(x, grid, checked, state)
        except TensorAttentionError as cause:
            told = reading(x, layer.modes, channels_first=layer.channels_first)
            raise cause.retold(type(self).__name__, told) from None
        skipped = last if skip is x else None if skip is None else channels_last(skip, layer.channels_first)
        target = None if out is None else channels_last(out, layer.channels_first)
        past = None if state is None else state.past
        if present is None:
            y, past = layer.continued(last, checked, past, window=self.window, skip=skipped, out=target)
        else:
            y, past = layer.continued(without_absent(last, present), checked, past, window=self.window)
            y = added(without_absent(y, present), skipped, target)
        if out is None:
            out = y.movedim(-1, 1) if layer.channels_first else y
        return out, StreamState(grid.batch[0], grid.sizes, x.dtype, past)

    def _check_continued(self, x: Tensor, grid: GridShape, weights: Vectors, state: StreamState) -> None:
        """Check that frames fit to those before."""
        names = self.layer.modes.names
        if grid.batch[0] != state.batch:
            raise ShapeError(f"x has a batch of {grid.batch[0]}, but the frames before had one of {state.batch}.")
        for mode, (size, before) in enumerate(zip(grid.sizes, state.sizes, strict=True)):
            if mode != self._mode and size != before:
                raise ShapeError(f"mode {names[mode]!r} has size {size} in x but {before} in the frames before.")
        if x.dtype != state.dtype:
            raise DtypeError(f"the type is {x.dtype} in x but {state.dtype} in the frames before.", hint=_MOVE)
        device = state.past.weight.device
        if x.device != device:
            raise OptionError(f"x is on {x.device}, but the frames before are on {device}.", hint=_MOVE)
        for mode, (own, held) in enumerate(zip(weights, state.past.mode_weights, strict=True)):
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

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> AttentionStream:
        """Move the state to where later frames will be. The layer is not moved.

        Args:
            device: Device of later frames, or None for the same.
            dtype: Type of later frames, or None for the same. Sums of half precision are held in float32.

        Returns:
            The stream itself.

        Raises:
            DtypeError: If the type is not a floating-point one.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise DtypeError(f"dtype must be floating point, got {dtype}.").retold(f"{type(self).__name__}.to")

        def moved(tensor: Tensor) -> Tensor:
            kind = tensor.dtype
            if dtype is not None:
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
            saved |= {"batch": self._state.batch, "sizes": self._state.sizes, "dtype": str(self._state.dtype)[6:]}
            saved["tensors"] = {name: t.detach().clone() for name, t in self._state.past.tensors.items()}
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state that was saved.

        Args:
            state_dict: What `state_dict` returned, of a stream over a layer of the same shape.

        Raises:
            OptionError: If it is no such state, or that of another layer or window.
            ShapeError: If a tensor in it has another shape than the state says.
        """
        try:
            self._state = self._read(state_dict)
        except TensorAttentionError as cause:
            raise cause.retold(f"{type(self).__name__}.load_state_dict") from None

    def _described(self) -> dict[str, Any]:
        """What a state depends on beyond the frames."""
        layer = self.layer
        needs = get_operator(layer.operator).needs(layer.modes.order, **layer.options)
        return {
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
        if not isinstance(saved, Mapping) or not {"stream", "frames"} <= saved.keys():
            raise OptionError("state_dict is not the state of a stream of attention.")
        for name, own in self._described().items():
            if saved["stream"].get(name) != own:
                raise OptionError(f"{name} is {saved['stream'].get(name)!r} in state_dict but {own!r} in the stream.")
        if not saved["frames"]:
            return None
        if not {"batch", "sizes", "dtype", "tensors"} <= saved.keys():
            raise OptionError("state_dict is not the state of a stream of attention.")
        batch, sizes, dtype = saved["batch"], tuple(saved["sizes"]), getattr(torch, str(saved["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise OptionError(f"dtype is {saved['dtype']!r} in state_dict, which is no type of torch.")
        state = StreamState(batch, sizes, dtype, self._outline(batch, sizes, dtype))
        tensors = dict(saved["tensors"])
        held = saved["frames"] if self.window is None else min(self.window - 1, saved["frames"])
        for name, like in state.past.tensors.items():
            if name not in tensors:
                raise ShapeError(f"{name} is missing in state_dict.")
            shape, found = list(like.shape), tuple(tensors[name].shape)
            if name in ("weight", "total"):
                shape[0] = batch if found[:1] == (batch,) else 1
            if name.split(".")[0] in ("weight", "means") or (name == "moments.0" and self.window is not None):
                shape[1] = held
            if found != tuple(shape):
                raise ShapeError(f"{name} has shape {found} in state_dict, but {tuple(shape)} fits the stream.")
        past = dataclasses.replace(state.past, frames=saved["frames"]).with_tensors(tensors)
        return dataclasses.replace(state, past=past)

    def _outline(self, batch: int, sizes: tuple[int, ...], dtype: torch.dtype) -> Past:
        """Return what a stream of such frames holds after one of them, without values."""
        one = [1 if mode == self._mode else size for mode, size in enumerate(sizes)]
        x = torch.empty(batch, *one, self.layer.embed_dim, dtype=dtype, device="meta")
        operator, nothing = get_operator(self.layer.operator), (None,) * len(sizes)
        if operator.query == "grid":
            return continued_frames(x, nothing, self._mode, past=None, window=self.window)[2]
        needs = operator.needs(len(sizes), **self.layer.options)
        return continued_summary(x, needs, nothing, self._mode, past=None, window=self.window)[1]


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


def check_window(window: Any) -> None:
    """Check a number of frames."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise OptionError(f"window must be a number of frames from 1 up, or None, got {window!r}.")


def counted_frames(frames: int) -> str:
    """Tell a number of frames."""
    return f"{frames:,} frame" + "s" * (frames != 1)


def _same(first: Vector, second: Vector) -> bool:
    """Tell whether two vectors of weights are the same."""
    if first is None or second is None:
        return first is second
    return first.shape == second.shape and torch.equal(first, second.to(first.dtype))
