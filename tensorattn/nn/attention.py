"""One module for every operator: project, attend, project back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tensorattn.averages import check_whole
from tensorattn.errors import OptionError, TensorAttentionError
from tensorattn.modes import GridShape
from tensorattn.nn.context import Context, ContextReader
from tensorattn.nn.core import AttentionCore
from tensorattn.nn.layout import channels_last, check_input, check_layer_presence, check_parameters, reading
from tensorattn.nn.projections import added
from tensorattn.operators import get_operator
from tensorattn.operators.operator import check_grid_weights
from tensorattn.presence import GivenWeights, Lengths, Mask, Presence
from tensorattn.summary import Summary
from tensorattn.weights import without_absent

__all__ = ["TensorAttention"]


class TensorAttention(AttentionCore):
    r"""Multi-head attention over a tensor of any order, without flattening it: to itself, or to a context.

    Queries, keys and values are linear maps of the input. As averages of a linear map are the linear map of the
    averages, the module averages its input once and projects the averages: S = n_1 + … + n_N rows instead of
    P = n_1 ⋯ n_N, wherever the operator works on averages. It keeps nothing that depends on the sizes of the modes, so
    one module takes inputs of any size.

    Given a context, which may be on another grid and of another order, keys and values are made of that: once for each
    context, by `summarize`. Operators whose queries may stand anywhere take one.

    Args:
        embed_dim: Channels C of input and output.
        num_heads: Number of heads H; they divide the channels.
        modes: Modes of the input: their number, or their names as in ``"t h w"``.
        operator: Name of the operator in `OPERATORS`.
        channels_first: Whether inputs are ``(B, C, n_1, …, n_N)`` instead of ``(B, n_1, …, n_N, C)``.
        bias: Whether the four linear maps have a bias.
        dropout: Probability of dropping an attention weight in training.
        kdim: Channels of a context that keys are made of; C if None.
        vdim: Channels of a context that values are made of; C if None.
        causal: A mode, by name or index, whose frames see their past and themselves only; None for none.
        position_bias: A bias of the logits by position, one matrix a mode: a `RelativePositionBias`, `AlibiBias` or
            `AxisWindow`, or your own `PositionBias`. With one, all positions attend at once, which holds queries and
            outputs of all heads as an operator does, instead of slab by slab.
        rotary: A `RotaryEmbedding` that turns queries and keys by their places; for full and axial attention, and for
            the Kronecker operators, which turn pooled queries and keys by their mode. All positions attend at once.
        mode_projections: Whether queries and keys have a linear map of their own for each mode; for the Kronecker
            operators.
        qk_norm: Whether pooled queries and keys go through a LayerNorm each; for the Kronecker operators.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **options: Options of the operator, such as ``centered=True`` for ``"kao_qkv"``, or
            ``kept=[("t",), ("h", "w")]`` for ``"truncated"``. With ``interaction="linear"`` the correction has a
            learnable factor a head, which starts at one.

    Raises:
        OptionError: If ``num_heads`` does not divide ``embed_dim``, ``dropout`` is not a probability, there is no
            such operator or option, or an argument has no meaning for the operator.
        ModesError: If modes are named badly, or an option names a mode that does not exist.

    Shape:
        - input and output: :math:`(B, n_1, \dots, n_N, C)`, or :math:`(B, C, n_1, \dots, n_N)` with
          ``channels_first``
        - context: :math:`(B, m_1, \dots, m_M, C)` with any order M, or :math:`(B, C, m_1, \dots, m_M)`

    Examples:
        >>> import torch, tensorattn as ta
        >>> layer = ta.TensorAttention(96, num_heads=4, modes="t h w")
        >>> layer(torch.randn(2, 4, 14, 14, 96)).shape
        torch.Size([2, 4, 14, 14, 96])
        >>> layer
        TensorAttention(
          embed_dim=96, num_heads=4, modes='t h w', operator='additive'
          (q_proj): Linear(in_features=96, out_features=96, bias=True)
          (k_proj): Linear(in_features=96, out_features=96, bias=True)
          (v_proj): Linear(in_features=96, out_features=96, bias=True)
          (out_proj): Linear(in_features=96, out_features=96, bias=True)
        )
    """

    def forward(
        self,
        x: Tensor,
        context: Context | None = None,
        *,
        weights: GivenWeights = None,
        mask: Mask = None,
        lengths: Lengths | Mapping[Any, Any] = None,
        skip: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attend: from each position of the input to the input itself, or to a context.

        Without a context, weights, mask and lengths speak of the input: where a mask or lengths leave a position out,
        it may hold anything, and the output is zero before ``skip`` is added. With a context they speak of the context,
        and a sample without any position gives what the output map makes of zero: its bias.

        Args:
            x: Input, channels last or first as the module was told.
            context: What keys and values are made of, in the same layout, on another grid or even of another order; or
                a pair of tensors, for keys and for values; or what `summarize` returned. The input itself if None.
            weights: One non-negative vector a mode, ``(n_m,)`` or ``(B, n_m)``, or None for equal weights, or one
                tensor over the grid ``(B, n_1, …, n_N)``: multiplicities, so 2 counts an index or a position twice and
                0 leaves it out.
            mask: True where a position takes part, ``(n_1, …, n_N)`` or ``(B, n_1, …, n_N)`` in either layout. A mask
                that is a product over modes gives what each sample gives when it is cropped. Another one is an
                approximation for operators that work on averages, as their functions tell.
            lengths: How many leading indices of each mode take part: integers ``(B, N)``, or one entry a mode, None
                for all, or a mapping from modes as in ``{"t": torch.tensor([5, 7])}``.
            skip: A tensor of the shape of the input that is added to the output while that is written, as for a skip
                connection; ``x`` itself or another one.
            out: Where to write the output, of the shape and type of the input. No derivative goes through it.

        Returns:
            The output, of the shape of the input: ``out`` where it is given.

        Raises:
            ShapeError: If a tensor has the wrong number of dimensions or channels, or an empty mode, if ``skip`` or
                ``out`` has another shape than the input, or the mask or lengths do not fit.
            DtypeError: If a tensor is not floating point, the types differ, the mask is not bool, or lengths are not
                integers.
            WeightsError: If weights have the wrong length, are negative, not finite, or all zero, or a length is
                negative or longer than its mode.
            OptionError: If ``out`` is given where derivatives are asked for, or an argument has no meaning for the
                operator or with another one.

        Examples:
            >>> import torch, tensorattn as ta
            >>> layer, image = ta.TensorAttention(8, 2, modes="h w"), torch.randn(2, 5, 6, 8)
            >>> mask = torch.ones(2, 5, 6, dtype=torch.bool)
            >>> mask[0, 3:] = False
            >>> padded, cropped = layer(image, mask=mask)[:1, :3], layer(image[:1, :3])
            >>> torch.allclose(padded, cropped, atol=1e-6)
            True
            >>> summary = layer.summarize(torch.randn(2, 3, 4, 4, 8), lengths=[3, 4, [2, 4]])
            >>> layer(image, summary).shape
            torch.Size([2, 5, 6, 8])
        """
        try:
            grid = check_input(x, self.modes, self.embed_dim, channels_first=self.channels_first)
            check_parameters(x, self.q_proj.weight)
            if skip is not None or out is not None:
                sources = (x,) if out is None else (x, *self.parameters())  # only out asks for their derivatives
                check_whole(x.shape, sources, skip, out)
            last = channels_last(x, self.channels_first)
            given, summary = self._read(x, grid, context, weights=weights, mask=mask, lengths=lengths)
        except TensorAttentionError as cause:
            told = reading(x, self.modes, channels_first=self.channels_first)
            raise cause.retold("TensorAttention", told) from None
        added_last = last if skip is x else None if skip is None else channels_last(skip, self.channels_first)
        target = None if out is None else channels_last(out, self.channels_first)
        if summary is not None:
            y = self.attend_from(last, summary, added_last, target)
        elif given.present is None:
            y = self.attend(last, grid, given.weights, added_last, target)
        else:  # what an absent position holds must not meet a zero, not even that of a gradient: it may be NaN
            y = self.attend(without_absent(last, given.present), grid, given.weights, None, None)
            y = added(without_absent(y, given.present), added_last, target)
        if out is not None:
            return out
        return y.movedim(-1, 1) if self.channels_first else y

    def summarize(
        self,
        context: Tensor | tuple[Tensor, Tensor],
        *,
        weights: GivenWeights = None,
        mask: Mask = None,
        lengths: Lengths | Mapping[Any, Any] = None,
    ) -> Summary:
        """Summarise a context once, to attend to it often.

        It is the summary of the context itself, before the linear maps: it stays right while they are trained, and
        serves every layer of the same operator, options and channels.

        Args:
            context: What keys and values are made of, as in `forward`.
            weights: Weights of the context, as in `forward`.
            mask: Mask of the context.
            lengths: Lengths of the context.

        Returns:
            What `forward` takes as its context.

        Raises:
            ShapeError: If a tensor has the wrong number of dimensions or channels, or an empty mode, or the mask or
                lengths do not fit.
            DtypeError: If a tensor is not floating point, the types differ, the mask is not bool, or lengths are not
                integers.
            WeightsError: If weights are refused, or a length is negative or longer than its mode.
            OptionError: If the operator takes no context, or an argument has no meaning for it.

        Examples:
            >>> import torch, tensorattn as ta
            >>> layer, volume = ta.TensorAttention(8, 2, modes="h w"), torch.randn(2, 3, 4, 5, 8)
            >>> layer.summarize(volume).sizes
            (3, 4, 5)
        """
        try:
            spoken = {"weights": weights, "mask": mask, "lengths": lengths}
            return self._context_reader().summarize(context, self.k_proj.weight, **spoken)
        except TensorAttentionError as cause:
            raise cause.retold("TensorAttention.summarize") from None

    def attention(
        self,
        x: Tensor,
        context: Context | None = None,
        *,
        weights: GivenWeights = None,
        mask: Mask = None,
        lengths: Lengths | Mapping[Any, Any] = None,
    ) -> Any:
        """Return the attention weights of every head, without those dropped in training.

        Args:
            x: Input, as in `forward`.
            context: Context, as in `forward`.
            weights: Weights, as in `forward`.
            mask: Mask, as in `forward`; the weights of queries that it leaves out mean nothing.
            lengths: Lengths, as in `forward`.

        Returns:
            What the function of the operator returns as ``attention``, with the heads as last batch dimension: for
            operators with one softmax a mode a tensor ``(B, H, n_1, …, n_N, n_m)`` a mode.

        Raises:
            ShapeError: If a tensor has the wrong number of dimensions or channels, or an empty mode.
            DtypeError: If a tensor is not floating point, or the types differ.
            WeightsError: If weights are refused.
            OptionError: If an argument has no meaning for the operator or with another one.

        Examples:
            >>> import torch, tensorattn as ta
            >>> layer = ta.TensorAttention(8, num_heads=2, modes="h w")
            >>> rows, columns = layer.attention(torch.randn(1, 4, 5, 8))
            >>> rows.shape, columns.shape
            (torch.Size([1, 2, 4, 5, 4]), torch.Size([1, 2, 4, 5, 5]))
        """
        try:
            grid = check_input(x, self.modes, self.embed_dim, channels_first=self.channels_first)
            check_parameters(x, self.q_proj.weight)
            given, summary = self._read(x, grid, context, weights=weights, mask=mask, lengths=lengths)
        except TensorAttentionError as cause:
            raise cause.retold("TensorAttention.attention") from None
        last = channels_last(x, self.channels_first)
        last = last if given.present is None else without_absent(last, given.present)
        return self.attention_weights(last, given.weights, summary)

    def attention_map(
        self,
        x: Tensor,
        at: Sequence[int],
        *,
        weights: GivenWeights = None,
        mask: Mask = None,
        lengths: Lengths | Mapping[Any, Any] = None,
    ) -> Tensor:
        """Return what one query attends to, over the whole grid, in every head: as `tensorattn.attention_map` tells.

        Args:
            x: Input, as in `forward`.
            at: The query, one index a mode.
            weights: Weights, as in `forward`.
            mask: Mask, as in `forward`.
            lengths: Lengths, as in `forward`.

        Returns:
            The maps ``(B, H, n_1, …, n_N)``, each with sum one.

        Raises:
            ShapeError: If the input has the wrong number of dimensions or channels, or an empty mode.
            DtypeError: If a tensor is not floating point, or the types differ.
            WeightsError: If weights are refused.
            OptionError: If ``at`` does not have one index a mode, or one is out of range.

        Examples:
            >>> import torch, tensorattn as ta
            >>> layer = ta.TensorAttention(8, num_heads=2, modes="h w")
            >>> maps = layer.attention_map(torch.randn(1, 4, 5, 8), at=(1, 2))
            >>> maps.shape, torch.allclose(maps.sum((2, 3)), torch.ones(1, 2))
            (torch.Size([1, 2, 4, 5]), True)
        """
        attention = self.attention(x, weights=weights, mask=mask, lengths=lengths)
        last = channels_last(x, self.channels_first)
        grid = GridShape((x.shape[0],), tuple(last.shape[1:-1]), self.embed_dim)
        given, _ = self._read(x, grid, None, weights=weights, mask=mask, lengths=lengths)
        try:
            return self.map_of(attention, given.weights, grid.sizes, at)
        except TensorAttentionError as cause:
            raise cause.retold("TensorAttention.attention_map") from None

    def _read(
        self, x: Tensor, grid: GridShape, context: Context | None, **spoken: Any
    ) -> tuple[Presence, Summary | None]:
        """Check what was said of the positions of the input, or of a context, and summarise that."""
        if context is not None:
            for name in ("position_bias", "rotary"):
                if getattr(self, name) is not None:
                    raise OptionError(f"context has no meaning with {name}: its positions are not those of x.")
            return Presence((None,) * self.modes.order, None, True), self._context_reader().read(
                context, x, self.k_proj.weight, **spoken
            )
        if (self.kdim, self.vdim) != (self.embed_dim, self.embed_dim):
            raise OptionError(
                f"context is missing: keys are made of {self.kdim} channels and values of {self.vdim}, but x has "
                f"{self.embed_dim}."
            )
        if all([each is None for each in spoken.values()]):
            return Presence((None,) * self.modes.order, None, True), None
        given = check_layer_presence(grid, x, self.modes, **spoken)
        check_grid_weights(get_operator(self.operator), self.options, given)
        return given, None

    def _context_reader(self) -> ContextReader:
        """Return what reads a context."""
        operator, dims = get_operator(self.operator), (self.kdim, self.vdim)
        return ContextReader(operator, self.options, self.causal, self.modes, dims, self.channels_first)
