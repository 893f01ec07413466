"""Random problems: shapes, intervals, masks and head groups mixed as no list of cases would, on every backend.

Fails where some mixture of options breaks a backend in float32 or float64: output, LSE or a gradient differs from the
token-by-token formula by more than rounding, or NaN outside the key interval leaks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, note, target
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from fastattn import verify
from fastattn.backends import capabilities
from fastattn.blockmask import BlockMask

DTYPES = {c.backend: c.dtypes for c in capabilities("dense")}
SIDES = st.none() | st.integers(0, 12)


@st.composite
def attention_problems(draw: st.DrawFn) -> tuple[tuple[int, ...], dict, int]:
    """(B, Hkv, group, Sq, Sk, D, Dv), options of `attention` without the tensors that need values, and a seed."""
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3]))
    q_len, k_len = draw(st.integers(1, 20)), draw(st.integers(1, 40))
    head_dim, value_dim = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    wanted: dict = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        wanted["window"] = (draw(SIDES), draw(SIDES))
    starts = st.integers(-10, 45)
    per_sequence = lambda values: torch.tensor(draw(st.lists(values, min_size=batch, max_size=batch)))  # noqa: E731
    match draw(st.sampled_from(["default", "int", "tensor"])):
        case "int":
            wanted["query_start"] = draw(starts)
        case "tensor":
            wanted["query_start"] = per_sequence(starts)
    if draw(st.booleans()):
        wanted["key_start"] = per_sequence(st.integers(0, k_len + 2))
    if draw(st.booleans()):
        wanted["key_lengths"] = per_sequence(st.integers(0, k_len))
    wanted["scale"] = draw(st.none() | st.sampled_from([0.0, -0.7, 0.05, 1.3]))
    wanted["mask"] = draw(st.sampled_from([None, "bool", "bias", "bias with -inf"]))
    if wanted["mask"]:
        full = (batch, kv_heads * group, q_len, k_len)
        wanted["mask_shape"] = tuple(n if draw(st.booleans()) else 1 for n in full)[draw(st.integers(0, 3)) :]
    if draw(st.booleans()):
        sizes = st.sampled_from([16, 32, 64])
        wanted["blocks"] = (draw(sizes), draw(sizes))
        wanted["blocks_shape"] = (*(n if draw(st.booleans()) else 1 for n in (batch, kv_heads * group)), q_len, k_len)
    return (batch, kv_heads, group, q_len, k_len, head_dim, value_dim), wanted, draw(st.integers(0, 2**31 - 1))


def _tensors(shape: tuple[int, ...], wanted: dict, seed: int) -> tuple[list[Tensor], dict]:
    batch, kv_heads, group, q_len, k_len, head_dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    qkv = [
        normal(batch, kv_heads * group, q_len, head_dim),
        normal(batch, kv_heads, k_len, head_dim),
        normal(batch, kv_heads, k_len, value_dim),
    ]
    kwargs = {name: value for name, value in wanted.items() if not name.startswith(("mask", "blocks"))}
    if "blocks" in wanted:
        keep = torch.rand(wanted["blocks_shape"], generator=generator) < torch.rand((), generator=generator)
        for first in range(0, q_len, 16):  # and whole blocks
            keep[..., first : first + 16, : k_len // 2] |= (
                torch.rand(keep.shape[:2], generator=generator)[..., None, None] < 0.3
            )
            keep[..., first : first + 16, k_len // 2 :] &= (
                torch.rand(keep.shape[:2], generator=generator)[..., None, None] < 0.7
            )
        kwargs["blocks"] = keep, wanted["blocks"]
    if wanted["mask"] == "bool":
        kwargs["attn_mask"] = torch.rand(wanted["mask_shape"], generator=generator) < 0.6
    elif wanted["mask"]:
        bias = normal(*wanted["mask_shape"])
        if wanted["mask"] == "bias with -inf":
            bias = bias.masked_fill(torch.rand(bias.shape, generator=generator) < 0.3, -math.inf)
        kwargs["attn_mask"] = bias
    return qkv, kwargs


def _run(
    function: Callable[..., tuple[Tensor, Tensor]], qkv: list[Tensor], kwargs: dict, dtype: torch.dtype, seed: int
) -> list[Tensor]:
    """Output, LSE and gradients of a weighted sum of both."""
    leaves = [t.to(dtype).requires_grad_() for t in qkv]
    kwargs = dict(kwargs)
    mask = kwargs.get("attn_mask")
    if mask is not None and mask.dtype != torch.bool:
        kwargs["attn_mask"] = mask.to(dtype).requires_grad_()
        leaves.append(kwargs["attn_mask"])
    out, lse = function(*leaves[:3], **kwargs)
    generator = torch.Generator().manual_seed(seed)
    seeds = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (out, lse)]
    pairs = [(t, s) for t, s in zip((out, lse), seeds, strict=True) if t.requires_grad]
    if not pairs:
        return [out, lse, *(torch.zeros_like(t) for t in leaves)]
    grads = torch.autograd.grad(
        [t for t, _ in pairs], leaves, [s for _, s in pairs], allow_unused=True, materialize_grads=True
    )
    return [out.detach(), lse.detach(), *grads]


def _poisoned(qkv: list[Tensor], kwargs: dict, brute_force: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
    """NaN in every key and value that the interval of no row holds, found from the oracle's gradients."""
    q, k, v = qkv
    interval = {n: t for n, t in kwargs.items() if n not in ("attn_mask", "blocks", "scale")}
    value = torch.ones(*v.shape[:3], 1, dtype=torch.float64, requires_grad=True)
    out, _ = brute_force(torch.zeros_like(q), torch.zeros_like(k), value, **interval)
    if not out.requires_grad:
        seen = torch.zeros_like(value)
    else:
        (seen,) = torch.autograd.grad(out.sum(), value, allow_unused=True, materialize_grads=True)
    unseen = seen == 0
    return [q, k.masked_fill(unseen, math.nan), v.masked_fill(unseen, math.nan)]


def _with_blocks(attention: Callable[..., tuple[Tensor, Tensor]], own: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """`blocks` as what `attention` takes beside attn_mask: a BlockMask, or pairs left out of a plain mask."""

    def attend(
        *args: Tensor, blocks: tuple[Tensor, tuple[int, int]] | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        mask = options.pop("attn_mask", None)
        if blocks is None:
            return attention(*args, attn_mask=mask, **options)
        keep, size = blocks
        if own:
            made = BlockMask.from_dense(keep, block_size=size)
            return attention(*args, attn_mask=made if mask is None else (made, mask), **options)
        if mask is not None:
            keep = mask & keep if mask.dtype == torch.bool else mask.where(keep, -math.inf)
        return attention(*args, attn_mask=keep, **options)

    return attend


@pytest.mark.parametrize("backend", verify.backends_on("cpu", own=True))
@given(problem=attention_problems(), data=st.data())
def test_mixtures(
    backend: str,
    brute_force: Callable[..., tuple[Tensor, Tensor]],
    problem: tuple[tuple[int, ...], dict, int],
    data: st.DataObject,
) -> None:
    shape, wanted, seed = problem
    if backend == "triton" and seed % 3:
        return  # the interpreter takes seconds for each: a third of them
    dtype = data.draw(st.sampled_from([d for d in (torch.float32, torch.float64) if d in DTYPES[backend]]))
    qkv, kwargs = _tensors(shape, wanted, seed)
    # The oracle takes the values that the backend gets, so that only arithmetic differs.
    qkv = [t.to(dtype).double() for t in qkv]
    if kwargs.get("attn_mask") is not None and kwargs["attn_mask"].dtype != torch.bool:
        kwargs["attn_mask"] = kwargs["attn_mask"].to(dtype).double()
    exact = _run(_with_blocks(brute_force, own=False), qkv, kwargs, torch.float64, seed)
    attend = _with_blocks(partial(fastattn.attention, return_lse=True, backend=backend), own=True)
    found = _run(attend, _poisoned(qkv, kwargs, brute_force), kwargs, dtype, seed)
    # Scores reach |scale| * sqrt(D) * 9 or so and gradients sum 120 rows: 1e-4 is some hundred roundings of float32.
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    names = ("out", "lse", "grad_query", "grad_key", "grad_value", "grad_mask")[: len(exact)]
    for name, result, truth in zip(names, found, exact, strict=True):
        finite = truth.masked_fill(truth == -math.inf, 0.0)
        size = max(finite.abs().max().item(), 1.0)
        torch.testing.assert_close(
            result.double(), truth, rtol=0.0, atol=tolerance * size, msg=lambda text, name=name: f"{name}: {text}"
        )
        error = (result.double() - truth).nan_to_num(0.0).abs().max().item()
        target(error / size, label=name)
    note(f"backend {backend}, {dtype}")
