"""`MultiheadAttention`: `torch.nn.MultiheadAttention` with fused attention, or another mechanism, inside."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.dense import arguments
from fastattn.dense.api import normalise
from fastattn.dense.op import attention_op
from fastattn.dense.problem import Problem
from fastattn.dense.weights import attention_weights
from fastattn.nn import masks, mechanisms
from fastattn.nn.mixers import Heads, Mechanism, Mixer
from fastattn.nn.sparse_mixers import MaskMixer


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Drop-in for `torch.nn.MultiheadAttention`: same constructor, initialisation, state dict, masks and results.

    The output never goes through an attention matrix, whatever `need_weights` says. What differs, on purpose:

    - A query that may attend to no key gets zeros, and zero weights; never NaN.
    - `is_causal=True` works without `attn_mask`: query i sees keys 0..i (top-left, like torch's own causal masks).
    - With both, the mask is read only where weights are asked for. torch documents `is_causal` as the promise that
      the mask is the causal one, and skips the mask itself where there is no `key_padding_mask`.
    - The keys of `add_bias_kv` and `add_zero_attn` stay visible to all queries under `is_causal` too.
    - Nested inputs (strided layout) also work in training mode.
    - Weights are in the output's dtype, under autocast too.

    torch's fused inference path for encoder layers reads the parameters of the layer and never calls its `forward`.
    It is declined by `_qkv_same_embed_dim`, a private attribute of torch's, which here is always False; whether the
    projection weights are packed is told by `in_proj_weight is not None`.

    Another `mechanism` computes something else between the same projections: torch's state dict then loads with
    strict=False, which leaves what the mechanism adds as it is. "window", "longformer", "bigbird", "strided", "fixed"
    and "topk" are softmax attention to some of the pairs, for query and key of one length: all of the above holds, and
    `is_causal` also says which form of a pattern there is. The others have no attention weights, so the call needs
    need_weights=False (torch's own transformers pass it), no dropout, and no mask but `is_causal` and a
    key_padding_mask that hides keys.

    Args:
        backend: the backend to insist on, of `fastattn.attention` (with a mechanism of the linear family, of
            `fastattn.linear_attention`); None takes the first that supports a call.
        mechanism: "flash", softmax attention; "performer", "nystrom", "linear", "retention", "gla", "delta"; "window",
            "longformer", "bigbird", "strided", "fixed", "lsh", "topk", "nsa"; or options of a class in `fastattn.nn`,
            such as `Performer(num_features=128)` or `Linformer(512, 128)`.

    The other arguments are torch's.

    Attributes:
        mixer: the mechanism's module; None for "flash".

    Raises:
        TypeError, ValueError: embed_dim and num_heads that are not positive; unknown backend or mechanism; add_bias_kv
            or add_zero_attn with a mechanism other than "flash"; dropout with one that has no attention weights.
    """

    mixer: Mixer | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
        mechanism: str | Mechanism = "flash",
    ) -> None:
        options = checked_mechanism(mechanism, backend)
        if options is not None:
            weights = issubclass(options.mixer, MaskMixer)
            for name, given in (("dropout", dropout), ("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
                if given and not (weights and name == "dropout"):
                    raise ValueError(f"fastattn: {name} must be off with {options.mixer.name}, got {given}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self._set_mechanism(options, backend)

    def _set_mechanism(self, options: Mechanism | None, backend: str | None) -> None:
        self.backend = backend
        self.mixer = None
        if options is not None:
            like = self.out_proj.weight
            heads = Heads(self.embed_dim, self.num_heads, self.num_heads, self.head_dim)
            self.mixer = options.build(heads, device=like.device, dtype=like.dtype)
            self.mixer.train(self.training)

    def _reset_parameters(self) -> None:
        # torch picks what to initialise by this attribute, and calls this last in its constructor.
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, batch_first={self.batch_first}, backend={self.backend!r}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` to `key` and `value`; with gates, all three are the same tensor.

        Args:
            query: (N, L, embed_dim) with batch_first, else (L, N, embed_dim); unbatched (L, embed_dim); or nested
                (N, ragged, embed_dim) with batch_first.
            key: like query, with S for L and kdim for embed_dim.
            value: like query, with S for L and vdim for embed_dim.
            key_padding_mask: (N, S), unbatched (S,). Bool: True hides the key. Float: added to the scores.
            need_weights: also return the weights, after dropout. They cost one more query-key product and
                (N, num_heads, L, S) of memory, which goes as soon as nothing refers to the weights.
            attn_mask: (L, S) or (N * num_heads, L, S). Bool: True hides the key. Float: added, differentiable.
            average_attn_weights: weights averaged over the heads.
            is_causal: query i sees keys 0..i only; with attn_mask, the promise that it says the same.

        Returns:
            (output, weights): output shaped like query; weights (N, L, S), or (N, num_heads, L, S) if not averaged,
            without N if unbatched, padded with zeros if nested; None without need_weights.

        Raises:
            ValueError: shapes that do not fit, masks with nested inputs, or what the mechanism cannot do.
            TypeError: masks neither bool nor floating point, or nested inputs mixed with dense ones.
            UnsupportedError: the layer's backend cannot run the call.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            if key_padding_mask is not None or attn_mask is not None:
                raise ValueError("fastattn: nested inputs carry their lengths; pass no key_padding_mask or attn_mask")
            if self.mixer is not None:
                return self._padded_nested(query, key, value, need_weights, average_attn_weights, is_causal)
            return self._forward_nested(query, key, value, need_weights, average_attn_weights, is_causal)
        self._check_shapes(query, key, value, key_padding_mask, attn_mask)
        mixer = self.mixer
        if mixer is not None and not isinstance(mixer, MaskMixer):
            self._check_mixed(mixer, need_weights, attn_mask, is_causal)
            return self._mixed(mixer, query, key, value, masks.kept_keys(key_padding_mask), is_causal), None
        pattern_causal = bool(is_causal)
        if is_causal and not need_weights:
            attn_mask = None
        elif attn_mask is not None:
            is_causal = False  # as in torch, a mask that is read counts alone

        q_NHLD, k_NHSD, v_NHSD = (self._split_heads(x) for x in self._project(query, key, value))
        learned, k_NHSD, v_NHSD = self._prepend_learned(k_NHSD, v_NHSD)
        shape = (q_NHLD.shape[0], self.num_heads, q_NHLD.shape[2], k_NHSD.shape[2])
        mask = masks.merge(
            masks.in_four_dims(attn_mask, shape[:2], learned),
            masks.in_four_dims(key_padding_mask, None, learned),
            q_NHLD.dtype,
        )
        options: dict[str, Any] = {"attn_mask": mask}
        if mixer is not None:
            present = masks.present_keys(key_padding_mask)
            blocks = mixer.block_mask(q_NHLD, k_NHSD, causal=pattern_causal, key_mask=present)
            options["attn_mask"] = blocks if mask is None else (blocks, mask)
            is_causal = False  # which is in the blocks
        problem = self._problem(q_NHLD, k_NHSD, v_NHSD, shape, is_causal, learned, **options)
        out_NHLD, lse_NHL = attention_op(problem, need_weights)
        batched = query.dim() == 3
        out = self._merge_heads(out_NHLD, batched)
        if not need_weights:
            return out, None
        weights = attention_weights(problem, lse_NHL, average_attn_weights)
        if learned:
            weights = weights.roll(-learned, dims=-1)  # to the end, where torch has them
        return out, weights if batched else weights.squeeze(0)

    def _problem(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        shape: tuple[int, int, int, int],
        is_causal: bool,
        query_start: int,
        **options: Any,
    ) -> Problem:
        """The fused call on projected heads; `attention_weights` needs more of it than `attention` returns."""
        return normalise(
            *arguments.autocast(query, key, value),
            shape,
            causal=bool(is_causal),
            query_start=query_start if is_causal else None,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
            **options,
        )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value projected to embed_dim, in as few matrix products as shared inputs allow."""
        width = self.embed_dim
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        elif key is value:
            bias = None if self.in_proj_bias is None else self.in_proj_bias[width:]
            projected = F.linear(key, self.in_proj_weight[width:], bias)
            return F.linear(query, self.in_proj_weight[:width], biases[0]), *projected.chunk(2, dim=-1)
        else:
            weights = self.in_proj_weight.chunk(3)
        return tuple(map(F.linear, (query, key, value), weights, biases))

    def _split_heads(self, x: Tensor) -> Tensor:
        """A projected input as a view (N, num_heads, length, head_dim)."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merge_heads(self, out_NHLD: Tensor, batched: bool) -> Tensor:
        """The layer's output of what `_split_heads` made of its input."""
        out = out_NHLD.transpose(1, 2).flatten(2)
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return F.linear(out, self.out_proj.weight, self.out_proj.bias)

    def _mixed(
        self, mixer: Mixer, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """The output with a mechanism other than softmax attention; key_mask is (N, S), True keeps."""
        heads = [self._split_heads(x) for x in self._project(query, key, value)]
        x_NLE = None
        if query is key:
            x_NLE = query[None] if query.dim() == 2 else query if self.batch_first else query.transpose(0, 1)
        out_NHLD = mixer(*heads, x_NLE, causal=bool(is_causal), key_mask=key_mask, backend=self.backend)
        return self._merge_heads(out_NHLD, query.dim() == 3)

    def _padded_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average_attn_weights: bool, causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Nested inputs through a mixer, padded."""
        lengths = self._nested_lengths(query, key, value)
        if isinstance(self.mixer, MaskMixer):
            self.mixer.check_lengths(*lengths)
        padded = {id(x): x.to_padded_tensor(0.0) for x in (query, key, value)}
        query, key, value = (padded[id(x)] for x in (query, key, value))
        hidden = torch.arange(key.shape[1], device=key.device) >= torch.tensor(lengths[1], device=key.device)[:, None]
        out, weights = self.forward(query, key, value, hidden, need_weights, None, average_attn_weights, causal)
        if weights is not None:  # with lengths that are those of the keys
            weights = weights.masked_fill(hidden[..., None] if average_attn_weights else hidden[:, None, :, None], 0.0)
        rows = [row[:length] for row, length in zip(out, lengths[0], strict=True)]
        return torch.nested.as_nested_tensor(rows), weights

    def _check_mixed(self, mixer: Mixer, need_weights: bool, attn_mask: Tensor | None, is_causal: bool) -> None:
        if need_weights:
            raise ValueError(f"fastattn: need_weights must be False with {mixer.name}, which has no attention weights")
        if attn_mask is not None and not is_causal:
            raise ValueError(
                f"fastattn: attn_mask must be None with {mixer.name}, or come with is_causal=True, the promise that it "
                "is the causal one"
            )
        if self.training and self.dropout:
            raise ValueError(
                f"fastattn: dropout must be off with {mixer.name}, which has no attention weights to drop, got "
                f"{self.dropout} in training; set the layer's `dropout` to 0.0"
            )

    def _prepend_learned(self, k_NHSD: Tensor, v_NHSD: Tensor) -> tuple[int, Tensor, Tensor]:
        """Key and value with the ones of add_bias_kv and add_zero_attn, after the number of those.

        torch appends them. In front, a causal call with that query_start leaves them visible to every query.
        """
        batch, heads, _, head_dim = k_NHSD.shape
        keys, values = [], []
        if self.bias_k is not None and self.bias_v is not None:
            keys.append(self.bias_k.to(k_NHSD.dtype).view(1, heads, 1, head_dim).expand(batch, -1, -1, -1))
            values.append(self.bias_v.to(v_NHSD.dtype).view(1, heads, 1, head_dim).expand(batch, -1, -1, -1))
        if self.add_zero_attn:
            keys.append(k_NHSD.new_zeros(batch, heads, 1, head_dim))
            values.append(v_NHSD.new_zeros(batch, heads, 1, head_dim))
        if not keys:
            return 0, k_NHSD, v_NHSD
        return len(keys), torch.cat([*keys, k_NHSD], dim=2), torch.cat([*values, v_NHSD], dim=2)

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average_attn_weights: bool, causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Nested inputs as packed sequences: no work on padding."""
        lengths_q, lengths_k = self._nested_lengths(query, key, value)
        packed = {id(x): torch.cat(x.unbind()) for x in (query, key, value)}
        q_1HTD, k_1HTD, v_1HTD = (
            x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(0, 1)[None]
            for x in self._project(*(packed[id(x)] for x in (query, key, value)))
        )
        problem = self._problem(
            q_1HTD,
            k_1HTD,
            v_1HTD,
            (len(lengths_q), self.num_heads, max(lengths_q), max(lengths_k)),
            causal,
            0,
            cu_seqlens_q=torch.tensor([0, *accumulate(lengths_q)], dtype=torch.int32, device=query.device),
            cu_seqlens_k=torch.tensor([0, *accumulate(lengths_k)], dtype=torch.int32, device=query.device),
        )
        out_1HTD, lse_1HT = attention_op(problem)
        out_TE = out_1HTD.squeeze(0).transpose(0, 1).flatten(1)
        out_TE = F.linear(out_TE, self.out_proj.weight, self.out_proj.bias)
        out = torch.nested.as_nested_tensor(list(out_TE.split(lengths_q)))
        if not need_weights:
            return out, None
        padded = []
        for rows, keys, sequence in problem.sequences():
            weights = attention_weights(sequence, lse_1HT[..., rows], average_attn_weights)
            padding = (0, max(lengths_k) - (keys.stop - keys.start), 0, max(lengths_q) - (rows.stop - rows.start))
            padded.append(F.pad(weights, padding))
        return out, torch.cat(padded)

    def _nested_lengths(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[list[int], list[int]]:
        """Lengths of the sequences of query and of key, from nested inputs that fit each other and the layer."""
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not x.is_nested or x.layout != torch.strided:
                given = f"nested, {x.layout}" if x.is_nested else "dense"
                raise TypeError(
                    f"fastattn: query, key and value must all be nested with layout torch.strided if one is, "
                    f"got {name} {given}"
                )
        if not self.batch_first or self.bias_k is not None or self.add_zero_attn:
            raise ValueError("fastattn: nested inputs need batch_first, and neither add_bias_kv nor add_zero_attn")
        lengths_q, lengths_k, lengths_v = ([len(s) for s in x.unbind()] for x in (query, key, value))
        if lengths_k != lengths_v or len(lengths_q) != len(lengths_k):
            raise ValueError(
                "fastattn: nested key and value must have the same lengths and query as many sequences, got "
                f"{lengths_q} for query, {lengths_k} for key, {lengths_v} for value"
            )
        return lengths_q, lengths_k

    def _check_shapes(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        dims = query.dim()
        if dims not in (2, 3) or key.dim() != dims or value.dim() != dims:
            raise ValueError(
                "fastattn: query, key and value must all be 3-D (batched) or all 2-D (unbatched), got "
                f"{dims}-D, {key.dim()}-D and {value.dim()}-D"
            )
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.shape[-1] != width:
                raise ValueError(f"fastattn: {name}'s last dimension must be {width}, got {tuple(x.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                "fastattn: key and value must agree in all but the last dimension, got "
                f"{tuple(key.shape)} and {tuple(value.shape)}"
            )
        length_dim = 1 if dims == 3 and self.batch_first else 0
        length_q, length_k = query.shape[length_dim], key.shape[length_dim]
        batch = 1 if dims == 2 else query.shape[1 - length_dim]
        if dims == 3 and key.shape[1 - length_dim] != batch:
            raise ValueError(
                f"fastattn: query and key must have the same batch size, got {tuple(query.shape)} and "
                f"{tuple(key.shape)} with batch_first={self.batch_first}"
            )
        if isinstance(self.mixer, MaskMixer):
            self.mixer.check_lengths(length_q, length_k)
        padding = (length_k,) if dims == 2 else (batch, length_k)
        masks.check("key_padding_mask", key_padding_mask, (padding,))
        masks.check("attn_mask", attn_mask, ((length_q, length_k), (batch * self.num_heads, length_q, length_k)))


def checked_mechanism(mechanism: str | Mechanism, backend: str | None) -> Mechanism | None:
    """The options that `mechanism` is or names, None for "flash"; raises where it has no such backend either."""
    options = mechanisms.resolve(mechanism)
    if options is None:
        arguments.backend(backend)
    else:
        options.mixer.check_backend(backend)
    return options
