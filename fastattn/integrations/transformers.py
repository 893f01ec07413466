"""Hugging Face transformers: after `register()`, models take attn_implementation="fastattn".

Two functions are registered. `attention_mask_function` is asked for a mask once per forward and answers with an
`IntervalMask`: the numbers that `fastattn.attention` takes, in the guise of a tensor. `attention_function` is called in
every layer with what it answered. Registering only the latter would make transformers drop the padding mask.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.dense.api import attention
from fastattn.dense.varlen import attention_varlen

try:
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise ImportError(f"fastattn: this integration needs transformers, which does not import: {error}") from error

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 17):
    raise ImportError(f"fastattn: this integration needs transformers 5.17 or newer, got {transformers.__version__}")

from fastattn.integrations._transformers_mask import (
    IntervalMask,
    Packing,
    attention_mask_function,
    both,
    same_sequence,
)

# Words by which transformers takes a name for one of its own implementations.
_RESERVED = ("eager", "flash", "flex_attention", "sdpa")

# What models pass along that has done its work before attention, or serves other layers.
_WITHOUT_EFFECT = frozenset({"cache_position", "num_items_in_batch", "output_hidden_states", "position_ids", "seq_idx"})


def register(name: str = "fastattn") -> None:
    """Make `name` an attention implementation of transformers: from_pretrained(..., attn_implementation=name) and
    model.set_attn_implementation(name) then run `fastattn.attention`. Registering again changes nothing.

    Raises:
        ValueError: the name is not free, or transformers would take it for one of its own.
    """
    if not name.isidentifier() or any(word in name for word in _RESERVED):
        raise ValueError(
            f"fastattn: name must be an identifier without any of {', '.join(_RESERVED)} in it, got {name!r}"
        )
    if AttentionInterface().get(name, attention_function) is not attention_function:
        raise ValueError(f"fastattn: name must be free, but transformers already has an implementation {name!r}")
    AttentionInterface.register(name, attention_function)
    AttentionMaskInterface.register(name, attention_mask_function)


def unregister(name: str = "fastattn") -> None:
    """Undo `register(name)`. Models that still use it then fail; give them another implementation first.

    Raises:
        ValueError: the name is not registered to fastattn.
    """
    if AttentionInterface().get(name) is not attention_function:
        raise ValueError(f"fastattn: name must be one that was registered, got {name!r}")
    for interface in (AttentionInterface, AttentionMaskInterface):
        del interface._global_mapping[name]


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    deterministic: bool = False,
    output_attentions: bool = False,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`fastattn.attention` with the signature of transformers' AttentionInterface.

    Args:
        module: its is_causal counts where the argument is None.
        query: (B, Hq, Sq, D), or batch 1 for all keys; key and value: (B, Hkv, Sk, D or Dv). Not copied.
        attention_mask: what `attention_mask_function` returned, or a bool or float mask of the user, (B | 1, Hq | 1,
            Sq, Sk). It decides alone: is_causal and sliding_window count where it is None, aligned top-left as in
            transformers (a static cache that is empty).
        s_aux: (Hq,) sinks.
        position_bias: float (B | 1, Hq, Sq, Sk), added to the scores.
        cu_seq_lens_q, ...: all four or none; boundaries of the sequences that a batch of 1 is packed of.
        output_attentions: warns, as there are no attention weights to return.
        others: what is known to have no effect on attention, flags and None.

    Returns:
        (out (B, Sq, Hq, Dv), None)

    Raises:
        TypeError: an argument that could change the result and is not known.
        ValueError: arguments that contradict each other, and what `fastattn.attention` raises.
    """
    for name, argument in others.items():
        if argument is not None and not isinstance(argument, bool) and name not in _WITHOUT_EFFECT:
            raise TypeError(
                f"fastattn: {type(module).__name__} gives its attention {name}, which fastattn does not implement; "
                "load the model with another attn_implementation"
            )
    if output_attentions:
        warnings.warn("fastattn returns no attention weights; attn_implementation='eager' does", stacklevel=2)
    batch = key.shape[0]
    if query.shape[0] == 1:
        query = query.expand(batch, -1, -1, -1)
    shape = torch.Size((batch, 1, query.shape[2], key.shape[2]))
    options: dict[str, Any] = {}
    packing = _given_packing(batch, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)

    if attention_mask is None:
        if shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            options["window"] = (None if sliding_window is None else sliding_window - 1, 0)
            if shape[2] != shape[3]:
                options["query_start"] = 0
    elif not isinstance(attention_mask, IntervalMask):
        options["attn_mask"] = attention_mask
    elif attention_mask.shape != shape:
        options["attn_mask"] = attention_mask.dense()
    else:
        if is_causal is False and attention_mask.window[1] == 0 and shape[2] > 1:
            raise ValueError(
                "fastattn: is_causal must agree with the mask, which is causal, got False; for attention in both "
                "directions set model.config.is_causal = False"
            )
        options = attention_mask.options
        packing = packing or attention_mask.packing

    options["attn_mask"] = both(position_bias, options.get("attn_mask"))
    if packing and any(
        options.get(name) is not None for name in ("attn_mask", "query_start", "key_start", "key_lengths")
    ):
        options["attn_mask"] = both(options["attn_mask"], same_sequence(packing[0], packing[1], shape))
        packing = None
    mask = options["attn_mask"]
    if mask is not None and mask.is_floating_point() and mask.dtype != query.dtype:
        options["attn_mask"] = mask.float()
    options |= {
        "scale": scaling,
        "softcap": softcap,
        "sinks": s_aux,
        "dropout_p": dropout,
        "deterministic": deterministic,
    }
    if packing is None:
        return attention(query, key, value, **options).transpose(1, 2), None
    query, key, value = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    return attention_varlen(query, key, value, *packing, **options).unflatten(0, (batch, shape[2])), None


def _given_packing(batch: int, *given: Any) -> Packing | None:
    """(cu_seqlens_q, cu_seqlens_k, longest query, longest key) as `attention_varlen` takes them."""
    if all(argument is None for argument in given):
        return None
    if batch != 1 or any(argument is None for argument in given):
        raise ValueError(
            "fastattn: cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k must be given together and with a "
            f"batch of 1, got a batch of {batch} and {', '.join('None' if a is None else 'a value' for a in given)}"
        )
    cu_seqlens_q, cu_seqlens_k, longest_q, longest_k = given
    return cu_seqlens_q.to(torch.int32), cu_seqlens_k.to(torch.int32), int(longest_q), int(longest_k)
