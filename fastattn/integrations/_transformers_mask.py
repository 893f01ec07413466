"""The masks of transformers models as the numbers that `fastattn.attention` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

Interval = tuple[int | None, int | None]
Packing = tuple[Tensor, Tensor, int, int]
MaskFunction = Callable[..., Any]


class IntervalMask(Tensor):
    """A bool mask (B, 1, Sq, Sk), True where a key is seen, that is kept as arguments of `fastattn.attention`.

    It needs no memory of its own until somebody computes with it (some models slice and concatenate masks): then it
    becomes the dense mask. A model that adds it to its scores does not go through transformers' AttentionInterface,
    takes it for a float mask and would attend to everything: that raises.

    Attributes:
        window, query_start, key_start, key_lengths, attn_mask: as in `fastattn.attention`; query_start is a tensor or
            None, attn_mask bool.
        cu_seqlens, longest: boundaries and longest of the sequences that the B * Sq tokens consist of, or None and 0.
    """

    window: Interval
    query_start: Tensor | None
    key_start: Tensor | None
    key_lengths: Tensor | None
    attn_mask: Tensor | None
    cu_seqlens: Tensor | None
    longest: int
    anchor: Tensor  # empty; torch.compile takes no subclass without tensors
    is_dense: bool

    _OPTIONS = ("query_start", "key_start", "key_lengths", "attn_mask")
    _TENSORS = (*_OPTIONS, "cu_seqlens", "anchor")

    @staticmethod
    def __new__(
        cls: type[IntervalMask],
        shape: Sequence[int],
        window: Interval,
        longest: int = 0,
        *,
        anchor: Tensor,
        **tensors: Tensor | None,
    ) -> IntervalMask:
        mask = cast(IntervalMask, Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=anchor.device))
        mask.anchor, mask.is_dense = anchor, False
        mask._set(window, longest, **tensors)
        return mask

    def _set(self, window: Interval, longest: int = 0, **tensors: Tensor | None) -> None:
        self.window, self.longest = window, longest
        for name in self._TENSORS[:-1]:
            setattr(self, name, tensors.get(name))

    @property
    def packing(self) -> Packing | None:
        """The boundaries and maximal lengths for `fastattn.attention_varlen`."""
        return None if self.cu_seqlens is None else (self.cu_seqlens, self.cu_seqlens, self.longest, self.longest)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments for `fastattn.attention`, but for packing."""
        return {name: getattr(self, name) for name in ("window", *self._OPTIONS)}

    def dense(self) -> Tensor:
        """The mask that this stands for, bool (B, 1, Sq, Sk). From now on it is that tensor, whoever writes into it."""
        if not self.is_dense:
            self._set((None, None), attn_mask=self._evaluate())
            self.is_dense = True
        return cast(Tensor, self.attn_mask)

    def _evaluate(self) -> Tensor:
        length_q, length_k = self.shape[2:]
        queries, keys = (_arange(length, self.anchor) for length in (length_q, length_k))
        start = length_k - length_q if self.query_start is None else self.query_start[:, None, None, None]
        distance = keys - (queries[:, None] + start)
        kept = self.anchor.new_ones(self.shape, dtype=torch.bool)
        left, right = self.window
        if left is not None:
            kept = kept & (distance >= -left)
        if right is not None:
            kept = kept & (distance <= right)
        if self.key_start is not None:
            kept = kept & (keys >= self.key_start[:, None, None, None])
        if self.key_lengths is not None:
            kept = kept & (keys < self.key_lengths[:, None, None, None])
        if self.cu_seqlens is not None:
            kept = kept & same_sequence(self.cu_seqlens, self.cu_seqlens, self.shape)
        return kept if self.attn_mask is None else kept & self.attn_mask

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        given = [name for name in self._TENSORS[:-1] if getattr(self, name) is not None]
        return f"IntervalMask(shape={tuple(self.shape)}, {', '.join([f'window={self.window}', *given])})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [name for name in self._TENSORS if getattr(self, name) is not None], (self.window, self.longest)

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Any], rest: Any, shape: Any, stride: Any) -> IntervalMask:
        return IntervalMask(shape, *rest, **tensors)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        aten = torch.ops.aten
        kwargs = kwargs or {}
        as_float = func is aten._to_copy.default and (kwargs.get("dtype") or torch.bool).is_floating_point
        if as_float or func in (aten.add.Tensor, aten.add_.Tensor):
            raise NotImplementedError(
                "fastattn: this model computes with the attention mask itself, so at least part of it does not use "
                "transformers' AttentionInterface; load it with attn_implementation='eager'"
            )
        args, kwargs = tree_map_only(IntervalMask, IntervalMask.dense, (args, kwargs))
        return func(*args, **kwargs)


def attention_mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **unused: Any,
) -> Tensor | None:
    """The mask of one forward as an `IntervalMask`, or None where every key is seen and transformers allows None.

    mask_function is a conjunction. Its causal, sliding-window and packed-sequence parts become numbers; transformers
    evaluates what is not recognised (chunks, images, functions of the user) into a dense part. Padding becomes one run
    of keys per sequence, or a mask (B, 1, 1, Sk) where it has holes. Telling these apart reads the padding mask, which
    on a GPU means waiting once. Nothing can be read while a graph is traced: there the mask is transformers' dense one.

    Args:
        q_offset, kv_offset: positions of the first query and of the first key.
        attention_mask: (B, keys so far) bool, False on padding; missing keys at its end are padding.
        The rest: see transformers.masking_utils.sdpa_mask.
    """
    whole: dict[str, Any] = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "device": device}
    # Never None for a causal mask: models may slice its queries, and then nothing says which ones remain.
    whole |= {"q_offset": q_offset, "kv_offset": kv_offset, "use_vmap": use_vmap, "allow_is_causal_skip": False}
    if is_tracing(attention_mask):
        return masking_utils.sdpa_mask(
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **whole,
        )

    tensors: dict[str, Any] = {}
    parts = list(_conjuncts(mask_function))
    if not (attention_mask is not None or isinstance(q_offset, Tensor) or q_offset or kv_offset):
        packing, parts = _packing(parts, (batch_size, q_length, kv_length))
        tensors.update(packing)
    window, unknown = _window(parts)

    if attention_mask is not None:
        padding = cast(Tensor, masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset))
        padding = padding[:batch_size, kv_offset : kv_offset + kv_length].to(torch.bool)
        if padding.shape != (batch_size, kv_length):
            raise ValueError(
                f"fastattn: attention_mask must have shape ({batch_size}, at most {kv_offset + kv_length}), "
                f"got {tuple(attention_mask.shape)}"
            )
        tensors.update(_keys_of(padding))
    if unknown:
        dense = masking_utils.sdpa_mask(mask_function=masking_utils.and_masks(*unknown), **whole)
        tensors["attn_mask"] = both(tensors.get("attn_mask"), dense)
    if window != (None, None):
        start = q_offset - kv_offset
        if isinstance(start, Tensor):
            # A new tensor: a static cache advances its own in place before the layers read this one.
            tensors["query_start"] = start.reshape(-1).to(torch.int32).expand(batch_size).contiguous()
        elif start != kv_length - q_length:
            tensors["query_start"] = torch.full((batch_size,), start, dtype=torch.int32, device=device)
    elif allow_is_bidirectional_skip and not tensors:
        return None
    tensors["anchor"] = torch.empty(0, device=device)
    return IntervalMask((batch_size, 1, q_length, kv_length), window, **tensors)


def _code_of(function: MaskFunction) -> object:
    return getattr(function, "__code__", function)


def _code_with(example: Any, *captured: str) -> CodeType | None:
    """The code of a function that captures these names; None, which no function has, where it captures others."""
    code: CodeType = example.__code__
    return code if set(code.co_freevars) == set(captured) else None


# The functions that transformers' factories return are told by their code, which is one object per factory.
_NOTHING = torch.empty(0)
_CONJUNCTION = _code_with(masking_utils.and_masks(), "mask_functions")
_WINDOW = _code_with(masking_utils.sliding_window_overlay(1), "sliding_window")
_BAND = _code_with(masking_utils.sliding_window_bidirectional_overlay(1), "sliding_window")
_PACKED = _code_with(masking_utils.packed_sequence_mask_function(_NOTHING), "packed_sequence_mask")
# Older versions of transformers have no such function: they leave positions as they are.
_remap = getattr(masking_utils, "remap_positions_for_packed_sequence", lambda function, positions: lambda: None)
_REMAPPED = _code_with(_remap(masking_utils.causal_mask_function, _NOTHING), "mask_function", "position_ids")


def _captured(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _conjuncts(function: MaskFunction) -> Iterator[MaskFunction]:
    if _code_of(function) is _CONJUNCTION:
        for part in _captured(function, "mask_functions"):
            yield from _conjuncts(part)
    else:
        yield function


def _window(parts: list[MaskFunction]) -> tuple[Interval, list[MaskFunction]]:
    """The interval of keys around the query's position in which all parts hold, and the parts that are none."""
    lefts, rights, unknown = [], [], []
    for part in parts:
        if part is masking_utils.causal_mask_function:
            rights.append(0)
        elif part is masking_utils.bidirectional_mask_function:
            pass
        elif _code_of(part) is _WINDOW and (size := _captured(part, "sliding_window")) >= 1:
            lefts.append(size - 1)
        elif _code_of(part) is _BAND and (size := _captured(part, "sliding_window")) >= 0:
            lefts.append(size)
            rights.append(size)
        else:
            unknown.append(part)
    return (min(lefts, default=None), min(rights, default=None)), unknown


def _packing(parts: list[MaskFunction], shape: tuple[int, int, int]) -> tuple[dict[str, Any], list[MaskFunction]]:
    """The packed sequences in parts, and what holds within each of them; ({}, parts) where there are none."""
    batch, length_q, length_k = shape
    packed = [part for part in parts if _code_of(part) is _PACKED]
    remapped = [part for part in parts if _code_of(part) is _REMAPPED]
    if len(packed) != 1 or len(remapped) > 1 or length_q != length_k:
        return {}, parts
    sequence = _captured(packed[0], "packed_sequence_mask")
    positions = [_captured(part, "position_ids") for part in remapped]
    if any(t.shape != (batch, length_q) for t in (sequence, *positions)):
        return {}, parts
    inner = [part for part in parts if part not in packed + remapped]
    for part in remapped:
        inner.extend(_conjuncts(_captured(part, "mask_function")))
    steps = sequence.diff(dim=-1)
    in_order = (steps >= 0).all()
    for p in positions:
        # Positions that count up by one within a sequence have the distances that the unmapped ones have.
        in_order &= ((p.diff(dim=-1) == 1) | (steps > 0)).all() & (p >= 0).all()
    if _window(inner)[1] or not in_order:
        return {}, parts
    first = torch.nn.functional.pad(steps > 0, (1, 0), value=True)
    cu_seqlens = torch.nn.functional.pad(first.flatten().nonzero()[:, 0], (0, 1), value=first.numel())
    return {"cu_seqlens": cu_seqlens.to(torch.int32), "longest": int(cu_seqlens.diff().max())}, inner


def _keys_of(padding: Tensor) -> dict[str, Tensor]:
    """The keys that a padding mask (B, Sk) keeps, as arguments of `attention`."""
    count = padding.sum(-1, dtype=torch.int32)
    start = padding.to(torch.int32).argmax(-1).to(torch.int32)
    keys = torch.arange(padding.shape[-1], device=padding.device)
    run = (keys >= start[:, None]) & (keys < (start + count)[:, None])
    everything, runs = torch.stack([padding.all(), (run == padding).all()]).tolist()
    if everything:
        return {}
    return {"key_start": start, "key_lengths": start + count} if runs else {"attn_mask": padding[:, None, None]}


def _arange(length: int, like: Tensor) -> Tensor:
    """0 to length - 1, int64; fake where `like` is fake (torch.compile)."""
    return like.new_ones(length, dtype=torch.int64).cumsum(0) - 1


def both(mask: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The two masks in one: bool keeps, float is added."""
    if mask is None or other is None:
        return other if mask is None else mask
    if mask.dtype == other.dtype == torch.bool:
        return mask & other
    if torch.bool not in (mask.dtype, other.dtype):
        return mask + other
    kept, bias = (mask, other) if mask.dtype == torch.bool else (other, mask)
    return torch.where(kept, bias, float("-inf"))


def same_sequence(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, shape: torch.Size) -> Tensor:
    """bool (B, 1, Sq, Sk): query and key belong to the same packed sequence."""
    batch, _, *lengths = shape
    of_query, of_key = (
        torch.searchsorted(cu.long(), _arange(batch * length, cu), right=True).view(batch, 1, length)
        for cu, length in zip((cu_seqlens_q, cu_seqlens_k), lengths, strict=True)
    )
    return of_query[..., None] == of_key[..., None, :]
