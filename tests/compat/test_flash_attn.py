"""flash-attn's interface: signatures, every argument against its documentation, and code as its users write it.

In float64 and to rounding, gradients included; what judges is `documented` (conftest.py) or plain torch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from fastattn.compat import flash_attn
from fastattn.compat.flash_attn import (
    _translate,
    bert_padding,
    flash_attn_func,
    flash_attn_interface,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

EXACT = {"rtol": 1e-9, "atol": 1e-11}
SCORING = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"(q, k, v, {SCORING})",
    "flash_attn_kvpacked_func": f"(q, kv, {SCORING})",
    "flash_attn_qkvpacked_func": f"(qkv, {SCORING})",
    "flash_attn_varlen_func": f"(q, k, v, {LENGTHS}, {SCORING}, block_table=None)",
    "flash_attn_varlen_kvpacked_func": f"(q, kv, {LENGTHS}, {SCORING})",
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {SCORING})",
    "flash_attn_with_kvcache": (
        "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False)"
    ),
    "index_first_axis": "(input, indices)",
    "index_put_first_axis": "(values, indices, first_axis_dim)",
    "pad_input": "(hidden_states, indices, batch, seqlen)",
    "unpad_input": "(hidden_states, attention_mask, unused_mask=None)",
    "unpad_input_for_concatenated_sequences": "(hidden_states, attention_mask_in_length)",
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "left window": {"window_size": (1, -1)},
    "right window": {"window_size": (-1, 0)},
    "causal window": {"causal": True, "window_size": (2, 3)},
    "softcap": {"softcap": 0.7},
    "scale": {"softmax_scale": -0.3, "causal": True},
    "alibi": {"alibi_slopes": (3,), "causal": True},
    "alibi by sequence": {"alibi_slopes": (4, 3), "window_size": [3, -1], "deterministic": True},
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    """Fails if an argument has another name, place or default than in flash-attn, or a function is not where its users
    import it from."""
    module = flash_attn_interface if name.startswith("flash") else bert_padding
    function = getattr(module, name)
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    assert str(inspect.Signature(parameters)) == SIGNATURES[name]
    if name.startswith("flash"):
        assert getattr(flash_attn, name) is function


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "drawing"),
    [(2, 5, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]), (5, 2, [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]])],
)
def test_causal_drawings(seqlen_q: int, seqlen_k: int, drawing: list[list[int]]) -> None:
    """flash-attn's two drawings: equal scores and values that are rows of the identity show what each query sees.

    Fails on another alignment, or if a query without keys gets anything but zero.
    """
    q, k = torch.zeros(1, seqlen_q, 1, 8), torch.zeros(1, seqlen_k, 1, 8)
    out = flash_attn_func(q, k, torch.eye(seqlen_k, 8)[None, :, None], causal=True)
    assert (out[0, :, 0, :seqlen_k] > 0).int().tolist() == drawing


def _options(case: str) -> dict[str, Any]:
    options = dict(CASES[case])
    if shape := options.get("alibi_slopes"):
        options["alibi_slopes"] = torch.rand(shape)
    return options


def _of_sequence(options: dict[str, Any], b: int) -> dict[str, Any]:
    found = {name: value for name, value in options.items() if name != "deterministic"}
    slopes = options.get("alibi_slopes")
    if slopes is not None and slopes.dim() == 2:
        found["alibi_slopes"] = slopes[b]
    return found


def _assert_same(found: list[Tensor], expected: list[Tensor], leaves: list[Tensor]) -> None:
    """Compare results and the gradients that flow back through all of them, but for rows without keys."""
    assert_close(found, expected, **EXACT)
    weights = [torch.randn_like(x) for x in found]
    grads = []
    for results in (found, expected):
        loss = sum((w * x.masked_fill(x == -math.inf, 0)).sum() for w, x in zip(weights, results, strict=True))
        grads.append(torch.autograd.grad(loss, leaves))
    assert_close(grads[0], grads[1], **EXACT)


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("packing", ["none", "kv", "qkv"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "nheads_k"), [(3, 6, 1), (6, 3, 3)])
def test_padded(
    seqlen_q: int, seqlen_k: int, nheads_k: int, packing: str, case: str, documented: Callable[..., Any]
) -> None:
    """out, softmax_lse and gradients of the three functions on (batch, seqlen, ...) tensors; fails if an argument is
    misread or dropped on the way, or the parts of a packed tensor, or their gradients, are mixed up."""
    options = _options(case)
    batch = 4 if case == "alibi by sequence" else 2
    if packing == "qkv":
        leaves = [_leaf(batch, seqlen_k, 3, 3, 5)]
        q, k, v = leaves[0].unbind(2)
        out, lse, pattern = flash_attn_qkvpacked_func(*leaves, **options, return_attn_probs=True)
    elif packing == "kv":
        leaves = [_leaf(batch, seqlen_q, 3, 5), _leaf(batch, seqlen_k, 2, nheads_k, 5)]
        q, k, v = leaves[0], *leaves[1].unbind(2)
        out, lse, pattern = flash_attn_kvpacked_func(*leaves, **options, return_attn_probs=True)
    else:
        leaves = [
            _leaf(batch, seqlen_q, 3, 5),
            _leaf(batch, seqlen_k, nheads_k, 5),
            _leaf(batch, seqlen_k, nheads_k, 5),
        ]
        q, k, v = leaves
        out, lse, pattern = flash_attn_func(*leaves, **options, return_attn_probs=True)
        assert torch.equal(flash_attn_func(*leaves, **options), out)
    assert pattern.numel() == 0
    assert out.is_contiguous()
    each = [documented(q[b], k[b], v[b], **_of_sequence(options, b)) for b in range(batch)]
    expected = [torch.stack([results[n] for results in each]) for n in range(2)]
    _assert_same([out, lse], expected, leaves)


LENGTHS_Q, LENGTHS_K = [3, 0, 1, 6], [5, 2, 0, 4]


def _cumulative(lengths: list[int]) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("packing", ["none", "kv", "qkv"])
def test_varlen(packing: str, case: str, documented: Callable[..., Any]) -> None:
    """The varlen functions, sequences without queries or keys among them; fails if a sequence sees another's keys, is
    aligned by other lengths than its own, or gets another's slopes or gradients."""
    options = _options(case)
    cu_q, cu_k = _cumulative(LENGTHS_Q), _cumulative(LENGTHS_K)
    bounds = (cu_q, cu_k, max(LENGTHS_Q), torch.tensor(max(LENGTHS_K)))
    if packing == "qkv":
        lengths_q = lengths_k = LENGTHS_Q
        leaves = [_leaf(sum(LENGTHS_Q), 3, 3, 5)]
        q, k, v = leaves[0].unbind(1)
        out, lse, pattern = flash_attn_varlen_qkvpacked_func(
            *leaves, cu_q, max(LENGTHS_Q), **options, return_attn_probs=True
        )
    else:
        lengths_q, lengths_k = LENGTHS_Q, LENGTHS_K
        leaves = [_leaf(sum(LENGTHS_Q), 3, 5), _leaf(sum(LENGTHS_K), 2, 1, 5)]
        q, k, v = leaves[0], *leaves[1].unbind(1)
        if packing == "kv":
            out, lse, pattern = flash_attn_varlen_kvpacked_func(*leaves, *bounds, **options, return_attn_probs=True)
        else:
            out, lse, pattern = flash_attn_varlen_func(q, k, v, *bounds, **options, return_attn_probs=True)
            assert torch.equal(flash_attn_varlen_func(q, k, v, *bounds, **options), out)
    assert pattern.numel() == 0
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    each = [documented(*part, **_of_sequence(options, b)) for b, part in enumerate(parts)]
    expected = [torch.cat([results[0] for results in each]), torch.cat([results[1] for results in each], dim=1)]
    _assert_same([out, lse], expected, leaves)


@pytest.mark.parametrize("case", ["plain", "causal", "window", "alibi by sequence"])
def test_varlen_pages(case: str, documented: Callable[..., Any]) -> None:
    """Pages with NaN where no key is, in any order, one shared, and a table with more columns than are used; fails if a
    key is read from another place, the alignment counts empty rows, a page gets another's gradient, or pages are copied
    that no sequence can use."""
    options = _options(case)
    nan = torch.full((7, 2, 1, 5), math.nan, dtype=torch.float64)
    table = torch.tensor([[6, 2, 4, 9], [3, -1, 9, -7], [-1, 8, -1, 9], [6, 2, -5, 9]], dtype=torch.int32)
    rows = [[(table[b, j // 2], j % 2) for j in range(length)] for b, length in enumerate(LENGTHS_K)]
    pages = []
    for _ in range(2):
        page = nan.clone()
        for place in {(int(p), r) for row in rows for p, r in row}:
            page[place] = torch.randn(1, 5)
        pages.append(page.requires_grad_())
    q = _leaf(sum(LENGTHS_Q), 3, 5)
    bounds = (_cumulative(LENGTHS_Q), _cumulative(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K))
    copied = _translate.from_pages(*pages, table, torch.tensor(LENGTHS_K), max(LENGTHS_K))[0]
    assert len(copied) == 4 * 6  # three pages of two keys for each of four sequences
    out, lse, _ = flash_attn_varlen_func(q, *pages, *bounds, **options, block_table=table, return_attn_probs=True)
    each = []
    for b, part in enumerate(q.split(LENGTHS_Q)):
        k, v = (
            torch.stack([page[place] for place in rows[b]]) if rows[b] else page.new_zeros(0, 1, 5) for page in pages
        )
        each.append(documented(part, k, v, **_of_sequence(options, b)))
    expected = [torch.cat([results[0] for results in each]), torch.cat([results[1] for results in each], dim=1)]
    _assert_same([out, lse], expected, [q, *pages])


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("varlen", [False, True])
def test_dropout(varlen: bool, alibi: bool, documented: Callable[..., Any]) -> None:
    """S_dmask is the softmax with the signs of the very mask that out and the gradients were dropped with; fails if it
    is another mask, dropout happens at another rate, or asking for it changes what is drawn."""
    dropout_p, batch, seqlen, heads = 0.3, 2, 40, 2
    options = {"causal": True, "alibi_slopes": torch.rand(batch, heads)} if alibi else {}
    leaves = [_leaf(batch, seqlen, heads, 6) for _ in range(3)]
    lengths, parts, function, bounds = [seqlen] * batch, leaves, flash_attn_func, ()
    if varlen:
        lengths = [seqlen - 7, seqlen]
        parts = [torch.cat([t[b, :length] for b, length in enumerate(lengths)]) for t in leaves]
        function = flash_attn_varlen_func
        bounds = (_cumulative(lengths), _cumulative(lengths), seqlen, seqlen)
    state = torch.get_rng_state()
    out, lse, pattern = function(*parts, *bounds, dropout_p, **options, return_attn_probs=True)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    assert torch.equal(function(*parts, *bounds, dropout_p, **options), out)
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(function(*parts, *bounds, dropout_p, **options), out)

    assert pattern.shape == (batch, heads, seqlen, seqlen)
    assert not pattern.requires_grad
    outs, lses = [], []
    for b, length in enumerate(lengths):
        own = pattern[b, :, :length, :length]
        each = (t[b, :length] for t in leaves)
        kept = {"kept": own >= 0, "dropout_p": dropout_p}
        expected_out, expected_lse, softmax = documented(*each, **_of_sequence(options, b), **kept)
        assert_close(own.abs(), softmax, **EXACT)
        outs.append(expected_out)
        lses.append(expected_lse)
    seen = pattern[pattern != 0]
    rate = (seen < 0).double().mean().item()
    assert abs(rate - dropout_p) < 6 * math.sqrt(dropout_p * (1 - dropout_p) / len(seen))
    joined = [torch.cat(outs), torch.cat(lses, 1)] if varlen else [torch.stack(outs), torch.stack(lses)]
    _assert_same([out, lse], joined, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, documented: Callable[..., Any]) -> None:
    """Fails if a result comes in another dtype than q's and float32, or is less exact than its dtype allows."""
    q, k, v = (torch.randn(1, 40, 2, 16).to(dtype) for _ in range(3))
    out, lse, pattern = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out.dtype, lse.dtype, pattern.dtype) == (dtype, torch.float32, dtype)
    expected = documented(q[0].double(), k[0].double(), v[0].double(), causal=True)
    largest = v.abs().max().item()  # rounding of scores and of the average is relative to it
    assert_close(out[0].double(), expected[0], rtol=0, atol=4 * torch.finfo(dtype).eps * largest)
    assert_close(lse[0].double(), expected[1], rtol=1e-5, atol=1e-5)


def test_compiles_in_one_graph() -> None:
    """Fails on a graph break, or a compiled result that differs from the eager one."""
    q, k, v = (torch.randn(2, 6, 2, 8) for _ in range(3))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cu_seqlens = torch.arange(0, 13, 6, dtype=torch.int32)
        packed = torch.stack((q, k, v), dim=2).flatten(0, 1)
        out = flash_attn_varlen_qkvpacked_func(packed, cu_seqlens, 6, causal=True)
        return flash_attn_func(q, k, v, window_size=(2, 0)) + out.unflatten(0, (2, 6))

    assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), call(q, k, v))


class _Bert(torch.nn.Module):
    """Self-attention as BERT-like models write it for flash-attn."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(12, 36, dtype=torch.float64)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, seqlen, _ = x.shape
        packed, indices, cu_seqlens, longest, _ = bert_padding.unpad_input(x, mask)
        qkv = self.qkv(packed).view(-1, 3, 3, 4)
        out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest, 0.0)
        return bert_padding.pad_input(out.flatten(-2), indices, batch, seqlen)

    def plain(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None].bool())
        return out.transpose(1, 2).flatten(-2) * mask[..., None]


def test_bert() -> None:
    """unpad, varlen attention, pad; fails if padding reaches a token, or a gradient, of x or the weights, differs from
    torch's masked attention."""
    model, x = _Bert(), _leaf(3, 7, 12)
    mask = (torch.arange(7) < torch.tensor([[7], [2], [5]])).long()
    mask[2] = mask[2].flip(0)
    _assert_same([model(x, mask)], [model.plain(x, mask)], [x, *model.parameters()])


def _varlen(x: Tensor, **changed: Any) -> None:
    """One sequence of four queries and keys, the keys as they are or, with block_table, in pages of x (2, 4, 2, 8)."""
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    k = x if "block_table" in changed else x[0]
    arguments = {"q": x[0], "k": k, "v": k, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    flash_attn_varlen_func(**{**arguments, "max_seqlen_q": 4, "max_seqlen_k": 4, **changed})


def _padded(x: Tensor, **changed: Any) -> None:
    flash_attn_func(**{"q": x, "k": x, "v": x, **changed})


PAGE = torch.zeros(1, 1, dtype=torch.int32)
REFUSED: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = [
    (_padded, {"q": torch.ones(4, 2, 8)}, ValueError, r"q must have shape \(batch, seqlen, heads, headdim\)"),
    (_padded, {"window_size": 3}, TypeError, "window_size must be a pair"),
    (_padded, {"window_size": (1.0, 0)}, TypeError, "window_size must be a pair"),
    (_padded, {"softcap": None}, TypeError, "softcap must be a number"),
    (_padded, {"softmax_scale": "1"}, TypeError, "softmax_scale must be a number"),
    (_padded, {"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1"),
    (_padded, {"causal": 1}, TypeError, "causal must be a bool"),
    (_padded, {"deterministic": 1}, TypeError, "deterministic must be a bool"),
    (_padded, {"alibi_slopes": torch.ones(3)}, ValueError, "alibi_slopes must have"),
    (_padded, {"return_attn_probs": 1}, TypeError, "return_attn_probs must be a bool"),
    (
        flash_attn_kvpacked_func,
        {"kv": torch.ones(2, 4, 2, 8)},
        ValueError,
        r"kv must have shape \(batch, seqlen, 2, nh",
    ),
    (
        flash_attn_qkvpacked_func,
        {},
        ValueError,
        r"qkv must have shape \(batch, seqlen, 3, nheads, headdim\), got \(2, 4",
    ),
    (_varlen, {"cu_seqlens_q": torch.tensor([0, 4])}, TypeError, "cu_seqlens_q must be int32"),
    (_varlen, {"cu_seqlens_q": torch.tensor([0, 4]), "block_table": PAGE}, TypeError, "cu_seqlens_q must be int32"),
    (_varlen, {"max_seqlen_k": 4.0}, TypeError, "max_seqlen_k must be an int, got 4.0"),
    (_varlen, {"max_seqlen_q": 3}, ValueError, "max_seqlen_q must be at least the longest sequence"),
    (_varlen, {"block_table": PAGE, "dropout_p": 0.1}, ValueError, "dropout_p must be 0 with block_table"),
    (_varlen, {"block_table": PAGE + 2}, ValueError, r"block_table\[0, 0\] must be a page from 0 to 1, got 2"),
    (_varlen, {"block_table": PAGE[:, :0]}, ValueError, "block_table and max_seqlen_k must have room for the longest"),
    (_varlen, {"block_table": PAGE, "max_seqlen_k": 3}, ValueError, "block_table and max_seqlen_k must have room"),
    (_varlen, {"block_table": PAGE.expand(2, 1)}, ValueError, "block_table must have a row for each of 1 sequences"),
    (_varlen, {"block_table": PAGE, "v": torch.ones(1, 4, 2, 8)}, ValueError, "k and v must agree in all but headdim"),
    (_varlen, {"block_table": PAGE, "max_seqlen_k": -1}, ValueError, "max_seqlen_k must not be negative"),
    (_varlen, {"block_table": PAGE.float()}, TypeError, "block_table must be int32 or int64"),
    (
        _varlen,
        {"block_table": PAGE, "k": torch.ones(4, 2, 8)},
        ValueError,
        r"k must have shape \(pages, page_size, nhe",
    ),
]


@pytest.mark.parametrize(("call", "changed", "error", "match"), REFUSED)
def test_refused(call: Callable[..., Any], changed: dict[str, Any], error: type[Exception], match: str) -> None:
    """Fails if an argument that does not fit is ignored, or refused without its flash-attn name."""
    x = torch.randn(2, 4, 2, 8)
    with pytest.raises(error, match=f"fastattn: {match}"):
        call(torch.stack((x, x), 2) if call is flash_attn_qkvpacked_func else x, **changed)
