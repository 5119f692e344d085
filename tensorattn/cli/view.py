"""What one query of a recording attends to, by full attention and by operators; and `show`, for notebooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tensorattn.cli.common import Choice, parse_choices
from tensorattn.cli.embedding import Tokens, choose_patch, embed, grid_of
from tensorattn.cli.figures import Array, Place, input_figure, maps_figure, read_numbers, weights_figure
from tensorattn.cli.recordings import FileArray, Recording, RecordingError, load, make_recording
from tensorattn.diagnose import takes_any_positions
from tensorattn.errors import DtypeError, ModesError, OptionError, ShapeError, check, integers, is_integer, retells
from tensorattn.functional import OPERATORS, Operator, find_cells
from tensorattn.functional.flattened import flattened_attention
from tensorattn.functional.maps import attention_map, place_on
from tensorattn.modes import ModeSpec

__all__ = ["LARGEST_DEVIATION", "MAX_POSITIONS", "View", "draw", "look", "show"]

FULL = "full attention"
MAX_POSITIONS = 100_000  # patches are chosen so that a recording has at most so many
LARGEST_DEVIATION = 1e6  # of logits: beyond it float32 rounds them by more than a tenth
MAX_GRID_POSITIONS = 20_000  # where an operator keeps its weights of all queries


class View(NamedTuple):
    """What one query attends to.

    Attributes:
        recording: The recording.
        place: Where the query is.
        head: The head whose maps are shown, the sharpest: the one of least entropy.
        exact: Weights of full attention ``(H, g_1, …, g_N)``.
        weights: Weights ``(H, g_m)`` along each mode, by operator.
        maps: Weights ``(g_1, …, g_N)`` of the head by operator, those with the same map together; full attention first.
    """

    recording: Recording
    place: Place
    head: int
    exact: Array
    weights: Mapping[str, Sequence[Array]]
    maps: Mapping[str, Array]

    @property
    def which(self) -> str:
        """The head in words."""
        return _which(self.head, len(self.exact))


def _which(head: int, heads: int) -> str:
    """Say which of the heads is shown."""
    return f"head {head + 1}" + (f" of {heads}, the sharpest" if heads > 1 else "")


def look(recording: Recording, place: Place, tokens: Tokens, choices: Sequence[Choice], *, every: bool = False) -> View:
    """Find what a query attends to: for every kind of cells, and for operators with one vector of weights a mode.

    Args:
        recording: The recording.
        place: Where the query is.
        tokens: Queries, keys and values of the recording.
        choices: Operators.
        every: Whether all of them are looked at, those too whose weights are known for all queries together only.

    Returns:
        The weights.

    Raises:
        OptionError: If one of ``every`` operator has no map.
    """
    token = int(np.ravel_multi_index(place.query, tokens.query.shape[1:-1]))
    query = tokens.query.flatten(1, -2)[:, token : token + 1]
    (exact,) = _attention(flattened_attention, query, tokens)
    cells, vectors = _cell_maps(choices, query, tokens, every), _mode_weights(choices, query, tokens, every)
    head = int(torch.special.entr(exact.flatten(1)).sum(dim=1).argmin())
    drawn: list[tuple[list[str], Tensor]] = [([FULL], exact[head])]
    drawn.extend(([choice.label], spread[head]) for choice, spread in cells.items())
    for choice, along in vectors.items():
        spread = attention_map(
            [vector[head] for vector in along], exact.shape[1:], operator=choice.record.name, **choice.options
        )
        alike = (names for names, other in drawn[1:] if torch.allclose(spread, other, rtol=1e-3, atol=0))
        names = next(alike, None)
        if names is None:
            drawn.append(([choice.label], spread))
        else:
            names.append(choice.label)
    for choice in choices:
        if every and choice not in cells and choice not in vectors and choice.record.name != "flattened":
            drawn.append(([choice.label], _grid_map(choice, place, tokens)[head]))
    weights = {choice.label: _marginals(spread) for choice, spread in cells.items()}
    weights |= {choice.label: [vector.numpy() for vector in along] for choice, along in vectors.items()}
    maps = {", ".join(names): spread.numpy() for names, spread in drawn}
    return View(recording, place, head, exact.numpy(), weights, maps)


def draw(view: View) -> dict[str, Any]:
    """Draw the figures of a view.

    Args:
        view: What a query attends to.

    Returns:
        Figures of matplotlib, by file name.
    """
    recording, place = view.recording, view.place
    return {
        f"{recording.name}-input.png": input_figure(recording, place),
        f"{recording.name}-weights.png": weights_figure(recording, place, view.exact, view.weights),
        f"{recording.name}-maps.png": maps_figure(recording, place, view.which, view.maps),
    }


def _weights(function: Callable[..., Any], query: Tensor, tokens: Tokens, /, **options: Any) -> Sequence[Tensor]:
    """Return the attention weights of some queries."""
    settings = {"order": tokens.key.ndim - 2, "scale": tokens.scale, "return_attention": True, **options}
    return function(query, tokens.key, tokens.value, **settings).attention


def _attention(function: Callable[..., Any], query: Tensor, tokens: Tokens, /, **options: Any) -> list[Tensor]:
    """Return the attention of one query, without the dimension that counts queries."""
    return [weights.squeeze(1) for weights in _weights(function, query, tokens, **options)]


def _marginals(spread: Tensor) -> list[Array]:
    """Return the sums ``(H, g_m)`` of maps ``(H, g_1, …, g_N)`` over the other modes, for every mode."""
    modes = range(1, spread.ndim)
    return [
        spread.sum(dim=[m for m in modes if m != mode]).numpy() if spread.ndim > 2 else spread.numpy() for mode in modes
    ]


def _mode_weights(choices: Sequence[Choice], query: Tensor, tokens: Tokens, every: bool) -> dict[Choice, list[Tensor]]:
    """Return the weights ``(H, n_m)`` along each mode, of every operator that gives one vector a mode."""
    wanted = [(tokens.key.shape[0], size) for size in tokens.key.shape[1:-1]]
    plain = [choice.record for choice in choices if not choice.options]
    found = {}
    for choice in choices:
        repeated = (
            choice.options and choice.record in plain and not every
        )  # options change the output around the same weights
        alone = takes_any_positions(choice.record, choice.options)
        if repeated or not alone or choice.record.name == "flattened":
            continue
        try:
            attention = _attention(choice.record.function, query, tokens, **choice.options)
        except OptionError:  # its attention is no set of weights
            continue
        if [tuple(weights.shape) for weights in attention] == wanted:
            found[choice] = attention
    return found


def _grid_map(choice: Choice, place: Place, tokens: Tokens) -> Tensor:
    """Return the map ``(H, g_1, …, g_N)`` of an operator whose queries must be those of the whole grid."""
    attention = _weights(choice.record.function, tokens.query, tokens, **choice.options)
    return attention_map(
        attention, tokens.key.shape[1:-1], operator=choice.record.name, at=place.query, **choice.options
    )


def _cell_maps(choices: Sequence[Choice], query: Tensor, tokens: Tokens, every: bool) -> dict[Choice, Tensor]:
    """Return the maps ``(H, g_1, …, g_N)`` of every choice, or the first, of each kind of cells."""
    seen, found = set(), {}
    for choice in choices:
        if choice.record.condense is None:
            continue
        options = choice.record.with_defaults(choice.options)
        if options["cells"] in seen and not every:
            continue
        seen.add(options["cells"])
        if options["cells"] == "keys":
            options["cells"] = find_cells(tokens.query, tokens.key, order=tokens.key.ndim - 2, tokens=options["tokens"])
        attention = _weights(choice.record.function, query, tokens, **options)
        found[choice] = attention_map(attention, tokens.key.shape[1:-1], operator=choice.record.name, at=[0])
    return found


# ---- for notebooks -----------------------------------------------------------------------------------------------


@retells
@torch.no_grad()
def show(
    what: str | Operator | Callable[..., Any] | nn.Module | Sequence[str],
    data: Any,
    *,
    at: Sequence[int] | None = None,
    modes: int | str | Sequence[str] | None = None,
    patch: int | Sequence[int] | None = None,
    dim: int = 64,
    heads: int = 4,
    logit_std: float = 1.0,
    seed: int = 0,
) -> Any:
    r"""Draw what one position attends to: full attention, and an operator or a layer beside it, under the data.

    A layer is drawn as it is, on the input that it is given. An operator has no weights: its queries, keys and values
    are made of the data by fixed random maps, as ``python -m tensorattn attend`` makes them.

    Args:
        what: A layer, as `TensorAttention`; or an operator with its options, as ``"clustered:tokens=32"``, its
            function, its record, or several names.
        data: For a layer, its input, one sample of it or the first of a batch. For an operator a video, a volume, an
            image, a series: an array, a `Path` or a name of a file that ``attend`` reads.
        at: The query, one index a mode of the data; the middle by default.
        modes: Names of the modes, as in ``"t h w"``; those of the layer or of the file by default. Without either,
            every axis is a mode.
        patch: For an operator, how many elements a mode make one position; chosen by default.
        dim: For an operator, channels of all heads together.
        heads: For an operator, heads; the sharpest is drawn.
        logit_std: For an operator, standard deviation of the logits over the keys.
        seed: For an operator, seed of the random maps.

    Returns:
        A ``matplotlib.figure.Figure``: the last line of a cell shows it, ``figure.savefig("maps.png")`` keeps it.

    Raises:
        OptionError: If there is no such operator or option, ``at`` does not name a position, or a layer is given what
            is for an operator.
        ShapeError: If the data do not fit the layer or the modes.
        ModesError: If modes are named badly, or ``modes`` does not fit the layer or the data.
        DtypeError: If the input of a layer holds no real numbers, or no array can be made of the data.
        RecordingError: If the data hold no numbers that differ, for a layer one that is not finite, or cannot be read.
        MissingPackageError: If matplotlib is not installed.

    Shape:
        - data: :math:`(n_1, \dots, n_N)` or :math:`(n_1, \dots, n_N, C)`, for a layer also with a batch in front

    Examples:
        >>> import torch, tensorattn
        >>> figure = show("clustered", torch.rand(6, 16, 16, 3), at=(3, 8, 8), modes="t h w")
        >>> layer = tensorattn.TensorAttention(8, num_heads=2, modes="h w")
        >>> figure = show(layer, torch.randn(12, 10, 8), at=(3, 4))
    """
    if isinstance(what, nn.Module):
        given = {"patch": patch, "dim": dim, "heads": heads, "logit_std": logit_std, "seed": seed}
        for name, value in given.items():
            if np.any(value != inspect.signature(show).parameters[name].default):
                raise OptionError(f"{name} has no meaning for a layer, which is drawn as it is, got {value!r}.")
        return _show_layer(what, data, at, modes)
    try:
        choices = parse_choices(_labels(what))
    except OptionError as cause:
        raise OptionError(cause.rule.replace("--operator", "operator")) from None
    _check_embedding(dim, heads, logit_std, seed)
    recording = _recording(data, None if modes is None else ModeSpec.parse(modes))
    sizes = recording.sizes
    alone = all(takes_any_positions(choice.record, choice.options) or choice.record.condense for choice in choices)
    most = MAX_POSITIONS if alone else MAX_GRID_POSITIONS
    parts = choose_patch(sizes, most) if patch is None else _parts(patch, sizes)
    element = tuple(size // 2 for size in sizes) if at is None else place_on(sizes, integers(at, "at"))
    query = tuple(index // part for index, part in zip(element, parts, strict=True))
    if max(grid_of(sizes, parts)) == 1:
        raise OptionError(f"patch {parts} leaves a single position of data {sizes}, there is nothing to attend to.")
    averages = sum(grid_of(sizes, parts))
    tokens = embed(recording.array, parts, dim=dim, heads=heads, logit_std=logit_std, seed=seed)
    place = Place(recording.modes, sizes, parts, query, recording.steps)
    view = look(recording, place, tokens, [choice.settled(averages) for choice in choices], every=True)
    return maps_figure(recording, place, view.which, view.maps)


def _labels(what: Any) -> list[str]:
    """Return the names of operators."""
    if isinstance(what, str):
        return [what]
    if isinstance(what, Operator):
        return [what.name]
    if callable(what):
        named = [name for name, record in OPERATORS.items() if record.function is what]
        if not named:
            raise OptionError(f"what must be an operator or a layer, got {what!r}.")
        return named
    if isinstance(what, Sequence) and what and all(isinstance(each, str) for each in what):
        return list(what)
    raise OptionError(f"what must be an operator or a layer, got {what!r}.")


def _check_embedding(dim: Any, heads: Any, logit_std: Any, seed: Any) -> None:
    """Check what decides the random maps."""
    for name, number in (("dim", dim), ("heads", heads), ("seed", seed)):
        check(number, name, "integer")
    check(logit_std, "logit_std", "number")
    if not 0 < logit_std <= LARGEST_DEVIATION:
        raise OptionError(f"logit_std must be positive and at most {LARGEST_DEVIATION:,.0f}, got {logit_std}.")
    if dim < 2 or heads < 1 or dim % heads:
        raise OptionError(f"dim must be at least 2 and a multiple of heads, got dim={dim} and heads={heads}.")
    if not 0 <= seed < 2**63:
        raise OptionError(f"seed must be at least 0 and below 2**63, got {seed}.")


def _recording(data: Any, modes: ModeSpec | None) -> Recording:
    """Read an array or a file."""
    if isinstance(data, str | PathLike):
        return load(Path(data), modes=modes)
    array = read_numbers(data)
    if modes is not None and array.ndim not in (modes.order, modes.order + 1):
        raise ShapeError(
            f"data has {array.ndim} dimensions, but {modes.order} modes need {modes.order}, or {modes.order + 1} with "
            "channels."
        )
    return make_recording(FileArray(array), name="data", source="data", modes=modes)


def _parts(patch: int | Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """Read the sizes of a patch."""
    parts = tuple(patch) if isinstance(patch, Sequence) else (patch,) * len(sizes)
    if len(parts) != len(sizes) or not all(is_integer(part) and part > 0 for part in parts):
        raise OptionError(f"patch must be one positive integer, or {len(sizes)} of them, got {patch!r}.")
    return tuple(map(min, parts, sizes))


def _show_layer(layer: Any, data: Any, at: Sequence[int] | None, modes: Any) -> Any:
    """Draw what a layer attends to."""
    if not hasattr(layer, "attention_map"):
        raise OptionError(f"what must be a layer with attention_map, as TensorAttention, got {type(layer).__name__}.")
    order, weight = layer.modes.order, layer.k_proj.weight
    spec = layer.modes if modes is None else ModeSpec.parse(modes)
    if spec.order != order:
        raise ModesError(f"modes names {spec.order} modes, but the layer has {order}.")
    array = read_numbers(data)
    if array.dtype.kind not in "biuf":
        raise DtypeError(f"data must hold real numbers, got the type {array.dtype}.")
    x = torch.from_numpy(array.astype(np.float64))
    if x.ndim not in (order + 1, order + 2):
        raise ShapeError(
            f"data has {x.ndim} dimensions, but the layer has {order} modes: "
            f"it needs {order + 1}, or {order + 2} with a batch in front."
        )
    if x.shape[0] == 0:
        raise ShapeError(f"data has shape {tuple(x.shape)}, there is nothing in it.")
    x = (x if x.ndim == order + 1 else x[0]).unsqueeze(0).to(weight)
    if missing := x.numel() - int(x.isfinite().sum()):
        raise RecordingError(f"data: {missing} of its {x.numel()} numbers are not finite, so the layer has no weights")
    last = x.movedim(1, -1) if layer.channels_first else x
    sizes = tuple(last.shape[1:-1])
    place = Place(
        spec,
        sizes,
        (1,) * order,
        tuple(size // 2 for size in sizes) if at is None else place_on(sizes, integers(at, "at")),
    )
    spread = layer.attention_map(x, at=place.query)[0]
    exact = _full_attention(layer, last, place.query)
    chosen = spread if exact is None else exact
    head = int(torch.special.entr(chosen.flatten(1).float()).sum(dim=1).argmin())
    maps = {} if exact is None else {FULL: exact[head]}
    maps[layer.operator if layer.operator != "flattened" else FULL] = spread[head]
    recording = Recording(type(layer).__name__, "data", last[0].float().cpu().numpy(), place.modes)
    which = _which(head, len(spread))
    return maps_figure(recording, place, which, {name: each.float().cpu().numpy() for name, each in maps.items()})


def _full_attention(layer: Any, x: Tensor, at: Sequence[int]) -> Tensor | None:
    """Return what full attention of the same queries and keys gives, where a layer has nothing else in its logits."""
    others = ("position_bias", "rotary", "q_norm", "causal")
    if any(getattr(layer, name) is not None for name in others) or layer.mode_projections:
        return None
    query = layer.q_proj(x[0][tuple(at)]).unflatten(-1, (layer.num_heads, -1)).unsqueeze(-2)
    key = layer.k_proj(x[0]).unflatten(-1, (layer.num_kv_heads, -1)).movedim(-2, 0)
    key = key.repeat_interleave(layer.num_heads // layer.num_kv_heads, 0).contiguous()  # heads of a group share it
    settings = {"order": len(at), "scale": layer.scale, "return_attention": True}
    (weights,) = flattened_attention(query, key, key, **settings).attention
    return weights.squeeze(1)
