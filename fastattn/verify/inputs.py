"""Random tensors for the cases of the grid, laid out and poisoned as a case asks, and the calls that take them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn.blockmask import BlockMask
from fastattn.verify.cases import Case
from fastattn.verify.naive import Dense, distances, visible_keys

DIFFERENTIABLE = ("query", "key", "value", "attn_mask", "sinks")


@dataclass
class Inputs:
    """The tensors of a case, contiguous and without poison; packed cases have (total, H, D) query, key and value."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    grad_out: Tensor
    grad_lse: Tensor
    block_mask: Tensor | None = None  # what a BlockMask keeps, (B or 1, H or 1, Sq, Sk) bool
    block_table: Tensor | None = None  # with it, key and value are pages

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another floating-point dtype (slopes and bool masks stay)."""
        names = ("query", "key", "value", "sinks", "attn_mask", "grad_out", "grad_lse")
        tensors = {n: getattr(self, n) for n in names}
        return replace(self, **{n: t.to(dtype) for n, t in tensors.items() if t is not None and t.dtype != torch.bool})

    def leaves(self, case: Case) -> tuple[Inputs, dict[str, Tensor]]:
        """Fresh tensors that require gradients, and those tensors by name: none where the case is forward only."""
        wanted: dict[str, Tensor] = {}
        for name in DIFFERENTIABLE if "backward" in case.features else ():
            tensor = getattr(self, name)
            if tensor is None or tensor.dtype == torch.bool or (name == "attn_mask" and not case.mask_grad):
                continue
            wanted[name] = tensor.detach().requires_grad_()
        return replace(self, **wanted), wanted


def _random_mask(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Tensor | None:
    if case.mask is None:
        return None
    q_len, k_len = case.longest
    sizes = {"B": case.sequences, "H": case.heads, "Q": q_len, "K": k_len, "1": 1}
    shape = tuple(sizes[axis] for axis in case.mask_shape)
    if case.mask == "bool":
        mask = torch.rand(shape, generator=generator) < 0.7
        if case.mask_fill == "empty_rows":
            mask &= (torch.arange(q_len) % 5 != 2)[:, None]
        return mask
    bias = torch.randn(shape, generator=generator, dtype=torch.float64)
    if case.mask_fill == "neg_inf":
        bias = bias.masked_fill(torch.rand(shape, generator=generator) < 0.3, -torch.inf)
        bias[..., 3, :] = -torch.inf
    elif case.mask_fill == "finite_mask":
        bias = bias.masked_fill(torch.rand(shape, generator=generator) < 0.3, -1e4)
    return bias.to(torch.float32 if case.mask == "bias_float32" and dtype != torch.float64 else dtype)


def _random_blocks(case: Case, generator: torch.Generator) -> Tensor | None:
    if case.blocks is None:
        return None
    q_len, k_len = case.longest
    batch, heads = case.sequences if case.block_axes[0] == "B" else 1, case.heads if case.block_axes[1] == "H" else 1
    if case.blocks in ("band", "global", "none"):
        row, key = torch.arange(q_len)[:, None], torch.arange(k_len)
        keep = (row + k_len - q_len - key).abs() <= (-1 if case.blocks == "none" else 40)
        keep |= (case.blocks == "global") & ((row < 8) | (key < 8))
        return keep.expand(batch, heads, q_len, k_len)
    rows, columns = (-(-length // size) for length, size in zip(case.longest, case.block_size, strict=True))
    kept, full = (torch.rand((batch, heads, rows, columns), generator=generator) < share for share in (0.6, 0.5))
    if case.blocks == "empty_rows":
        kept[:, :, 1::3] = False

    def spread(blocks: Tensor) -> Tensor:
        wide = blocks.repeat_interleave(case.block_size[0], 2).repeat_interleave(case.block_size[1], 3)
        return wide[:, :, :q_len, :k_len]

    keep = spread(kept) & (spread(full) | (torch.rand((batch, heads, q_len, k_len), generator=generator) < 0.6))
    return keep & (torch.arange(q_len) % 5 != 2)[:, None] if case.blocks == "empty_rows" else keep


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int) -> Inputs:
    """Unit-normal tensors (query and key times ``case.magnitude``) drawn on the CPU from ``seed``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if case.packed is None:
        rows = (case.batch, case.heads, case.q_len)
        query = normal(*rows, case.head_dim)
        key = normal(case.batch, case.hkv, case.k_len, case.head_dim)
        value = normal(case.batch, case.hkv, case.k_len, case.dv)
        grad_out, grad_lse = normal(*rows, case.dv), normal(*rows)
    else:
        total_q, total_k = sum(case.packed[0]), sum(case.packed[1])
        query = normal(total_q, case.heads, case.head_dim)
        key = normal(total_k, case.hkv, case.head_dim)
        value = normal(total_k, case.hkv, case.dv)
        grad_out, grad_lse = normal(total_q, case.heads, case.dv), normal(case.heads, total_q)
    if case.layout == "expanded":
        key, value = key[:1].expand_as(key), value[:1].expand_as(value)
    slopes = None
    if case.alibi is not None:
        slopes = torch.rand((case.sequences, case.heads) if case.alibi == "BH" else (case.heads,), generator=generator)
        slopes = slopes.to(device)
    mask = _random_mask(case, dtype, generator)
    blocks = _random_blocks(case, generator)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Inputs(
        query=(query * case.magnitude).to(device, dtype),
        key=(key * case.magnitude).to(device, dtype),
        value=value.to(device, dtype),
        attn_mask=None if mask is None else mask.to(device),
        sinks=normal(case.heads).to(device, wide) if case.sinks else None,
        alibi_slopes=slopes,
        grad_out=grad_out.to(device, dtype),
        grad_lse=grad_lse.to(device, wide),
        block_mask=None if blocks is None else blocks.to(device),
    )


def problems(case: Case, inputs: Inputs, kept: list[Tensor] | None = None) -> list[Dense]:
    """The case as explicit dense problems: one, or one for each packed sequence (tensors are views)."""
    device = inputs.query.device
    lengths = [(case.q_len, case.k_len)] * case.batch if case.packed is None else list(zip(*case.packed, strict=True))
    seen = [visible_keys(case, b, *lengths[b]).to(device) for b in range(case.sequences)]
    distance = [distances(case, b, *lengths[b]).to(device) for b in range(case.sequences)]
    slopes = inputs.alibi_slopes
    if slopes is not None and slopes.ndim == 1:
        slopes = slopes.expand(case.sequences, case.heads)
    if case.packed is None:
        empty = torch.zeros(0, case.q_len, case.k_len, device=device)
        return [
            Dense(
                inputs.query,
                inputs.key,
                inputs.value,
                seen=(torch.stack(seen) if seen else empty.bool())[:, None],
                mask=inputs.attn_mask,
                blocks=inputs.block_mask,
                slopes=slopes,
                distance=(torch.stack(distance) if distance else empty.long())[:, None],
                sinks=inputs.sinks,
                kept=kept[0] if kept else None,
            )
        ]
    found = []
    row = column = 0
    for b, (q_len, k_len) in enumerate(lengths):

        def of_sequence(mask: Tensor | None, b: int = b, q_len: int = q_len, k_len: int = k_len) -> Tensor | None:
            if mask is None:
                return None
            mask = mask[b : b + 1] if mask.shape[0] > 1 else mask
            mask = mask[:, :, :q_len] if mask.shape[2] > 1 else mask
            return mask[..., :k_len] if mask.shape[3] > 1 else mask

        found.append(
            Dense(
                inputs.query[row : row + q_len].transpose(0, 1)[None],
                inputs.key[column : column + k_len].transpose(0, 1)[None],
                inputs.value[column : column + k_len].transpose(0, 1)[None],
                seen=seen[b][None, None],
                mask=of_sequence(inputs.attn_mask),
                blocks=of_sequence(inputs.block_mask),
                slopes=None if slopes is None else slopes[b : b + 1],
                distance=distance[b][None, None],
                sinks=inputs.sinks,
                kept=kept[b] if kept else None,
            )
        )
        row, column = row + q_len, column + k_len
    return found


def join(case: Case, parts: list[Tensor], rows_at: int) -> Tensor:
    """Results of ``problems`` in the shape of the public function's; ``rows_at``: their axis of queries or keys."""
    if case.packed is None:
        return parts[0]
    joined = torch.cat(parts, rows_at)[0]
    return joined.transpose(0, 1) if joined.ndim == 3 else joined


def poison(case: Case, inputs: Inputs) -> Inputs:
    """NaN in every key and value that the interval of no row contains, or that lies in blocks that no row keeps."""

    seen = [p.seen.any(2) for p in problems(case, inputs)]
    if inputs.block_mask is not None:
        kept, size = inputs.block_mask.any(2), case.block_size[1]
        kept = torch.nn.functional.pad(kept, (0, -kept.shape[2] % size)).unflatten(2, (-1, size)).any(3)
        kept = kept.repeat_interleave(size, 2).expand(case.sequences, case.heads, -1)
        kept = kept.unflatten(1, (case.hkv, -1)).any(2)[..., : inputs.block_mask.shape[3]]
        each = (
            [kept] if case.packed is None else [k[..., : s.shape[-1]] for k, s in zip(kept.split(1), seen, strict=True)]
        )
        seen = [s & k for s, k in zip(seen, each, strict=True)]
    unseen = join(case, [~s[..., None] for s in seen], rows_at=2)
    nan = float("nan")
    return replace(inputs, key=inputs.key.masked_fill(unseen, nan), value=inputs.value.masked_fill(unseen, nan))


def lay_out(case: Case, inputs: Inputs) -> Inputs:
    """The same values in the memory layout of the case."""
    if case.layout == "bshd":

        def bshd(t: Tensor) -> Tensor:
            return t.transpose(1, 2).contiguous().transpose(1, 2)

        return replace(inputs, query=bshd(inputs.query), key=bshd(inputs.key), value=bshd(inputs.value))
    if case.layout == "bhds":  # columns apart

        def bhds(t: Tensor) -> Tensor:
            return t.mT.contiguous().mT

        return replace(inputs, query=bhds(inputs.query), key=bhds(inputs.key), value=bhds(inputs.value))
    if case.layout == "packed_qkv":
        qkv_BS3HD = torch.stack([t.transpose(1, 2) for t in (inputs.query, inputs.key, inputs.value)], 2)
        query, key, value = (qkv_BS3HD[:, :, n].transpose(1, 2) for n in range(3))
        return replace(inputs, query=query, key=key, value=value)
    if case.layout == "sliced":

        def sliced(t: Tensor) -> Tensor:
            batch, heads, rows, dim = t.shape
            wider = t.new_full((batch, heads, rows + 3, dim + 5), float("nan"))
            wider[:, :, 2 : rows + 2, 3 : dim + 3] = t
            return wider[:, :, 2 : rows + 2, 3 : dim + 3]

        return replace(inputs, query=sliced(inputs.query), key=sliced(inputs.key), value=sliced(inputs.value))
    if case.layout == "expanded":
        return replace(inputs, key=inputs.key[:1].expand_as(inputs.key), value=inputs.value[:1].expand_as(inputs.value))
    if case.page_size is not None:
        assert case.key_lengths is not None
        return _in_pages(inputs, case.page_size, case.key_lengths)
    return inputs


def _in_pages(inputs: Inputs, page_size: int, key_lengths: tuple[int, ...]) -> Inputs:
    """Key and value in shuffled pages; NaN in the rows and pages that no key uses, nonsense in such table entries."""
    columns = -(-inputs.key.shape[2] // page_size)
    used = [-(-length // page_size) for length in key_lengths]
    count = sum(used) + 2
    order = iter(torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist())
    table = torch.full((len(key_lengths), columns), -1, dtype=torch.int32)
    table[:, 1::2] = 2**30
    for b, pages in enumerate(used):
        table[b, :pages] = torch.tensor([next(order) for _ in range(pages)], dtype=torch.int32)

    def paged(rows_BHSD: Tensor) -> Tensor:
        _, heads, _, dim = rows_BHSD.shape
        pages = rows_BHSD.new_full((count, heads, page_size, dim), float("nan"))
        for b, length in enumerate(key_lengths):
            for j in range(length):
                pages[table[b, j // page_size], :, j % page_size] = rows_BHSD[b, :, j]
        return pages

    return replace(inputs, key=paged(inputs.key), value=paged(inputs.value), block_table=table.to(inputs.key.device))


def options(case: Case, inputs: Inputs) -> dict[str, Any]:
    """The keyword arguments of the public function that the case sets."""
    device = inputs.query.device

    def per_sequence(value: int | tuple[int, ...] | None) -> int | Tensor | None:
        return torch.tensor(value, dtype=torch.int32, device=device) if isinstance(value, tuple) else value

    mask: Any = inputs.attn_mask
    if inputs.block_mask is not None:
        blocks = BlockMask.from_dense(inputs.block_mask, block_size=case.block_size)
        mask = blocks if mask is None else (blocks, mask)
    chosen = {
        "attn_mask": mask,
        "causal": case.causal,
        "window": case.window,
        "query_start": per_sequence(case.query_start),
        "key_start": per_sequence(case.key_start),
        "key_lengths": per_sequence(case.key_lengths),
        "softcap": case.softcap,
        "alibi_slopes": inputs.alibi_slopes,
        "sinks": inputs.sinks,
        "dropout_p": case.dropout_p,
        "scale": case.scale,
        "return_lse": case.lse,
        "deterministic": case.deterministic,
    }
    return {name: value for name, value in chosen.items() if value is not None and value is not False}


def call(case: Case, inputs: Inputs, backend: str | None) -> tuple[Tensor, Tensor | None]:
    """The public function on the case: (out, lse or None)."""
    import fastattn

    result: Any
    if inputs.block_table is not None:
        chosen = options(case, inputs)
        del chosen["query_start"], chosen["dropout_p"]  # it places the queries itself, and drops nothing
        result = fastattn.attention_with_kvcache(
            inputs.query, inputs.key, inputs.value, block_table=inputs.block_table, backend=backend, **chosen
        )
    elif case.packed is None:
        result = fastattn.attention(inputs.query, inputs.key, inputs.value, backend=backend, **options(case, inputs))
    else:
        cu_q, cu_k = (
            torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=inputs.query.device)
            for lengths in case.packed
        )
        result = fastattn.attention_varlen(
            inputs.query,
            inputs.key,
            inputs.value,
            cu_q,
            cu_k,
            max(case.packed[0]),
            max(case.packed[1]),
            backend=backend,
            **options(case, inputs),
        )
    return result if case.lse else (result, None)
