"""The reference backend, which judges every kernel, judged itself: in float64, by two implementations written apart.

Fails where the reference departs from the contract by more than rounding: `verify.naive` (whole matrices, all cases of
the grid) and `brute_force` (token by token, small shapes) would both have to be wrong the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.verify.bar import largest_error
from fastattn.verify.cases import GRID, Case
from fastattn.verify.check import run_backend, run_naive
from fastattn.verify.inputs import call, make_inputs, options

Brute = Callable[..., tuple[Tensor, Tensor]]

DENSE = [case for case in GRID if case.packed is None and not case.dropout_p]


def attend(*args: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
    return fastattn.attention(*args, return_lse=True, backend="reference", **kwargs)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_whole_matrices_agree(case: Case, seed: int) -> None:
    """Output, LSE and every gradient against plain PyTorch with autograd."""
    inputs = make_inputs(case, torch.float64, "cpu", seed)
    found, truth = run_backend(case, inputs, "reference", seed), run_naive(case, inputs, seed)
    assert found.keys() == truth.keys()
    for name, exact in truth.items():
        finite = exact.masked_fill(exact == -math.inf, 0.0)
        size = finite.abs().max().item() if exact.numel() else 0.0
        assert largest_error(found[name], exact) <= 1e-12 * max(size, 1.0), name


@pytest.mark.parametrize("case", [c for c in DENSE if c.batch * c.heads * c.q_len <= 140], ids=str)
def test_token_by_token(case: Case, brute_force: Brute, seed: int) -> None:
    """Output and LSE against one query at a time."""
    inputs = make_inputs(case, torch.float64, "cpu", seed)
    wanted = options(case, inputs)
    wanted.pop("return_lse", None), wanted.pop("deterministic", None)
    mask = wanted.get("attn_mask")
    plain = {"attn_mask": mask.to_dense()} if isinstance(mask, fastattn.BlockMask) else {}
    out, lse = brute_force(inputs.query, inputs.key, inputs.value, **wanted | plain)
    found_out, found_lse = attend(inputs.query, inputs.key, inputs.value, **wanted)
    torch.testing.assert_close(found_out, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_lse, lse, rtol=1e-12, atol=1e-12)


# One option each, on the smallest shapes that show it: (kwargs)
HAND_MADE = {
    "bottom_right_short": {"causal": True},
    "window_both_ends_included": {"window": (1, 2)},
    "window_zero": {"window": (0, 0)},
    "window_is_relative_to_query_start": {"window": (1, 0), "query_start": 1},
    "causal_beats_right": {"causal": True, "window": (2, 5)},
    "query_start_tensor": {"causal": True, "query_start": torch.tensor([0, 3])},
    "key_limits_do_not_move_the_diagonal": {
        "causal": True,
        "key_start": torch.tensor([1, 0]),
        "key_lengths": torch.tensor([4, 2]),
    },
    "softcap": {"softcap": 0.7, "scale": 2.0},
    "softcap_then_bias": {"softcap": 0.7, "attn_mask": torch.linspace(-3, 3, 30).double().view(5, 6)},
    "alibi_per_head": {"alibi_slopes": torch.tensor([0.5, 0.25, 2.0, 1.0])},
    "alibi_follows_query_start": {"alibi_slopes": torch.tensor([0.5, 0.25, 2.0, 1.0]), "query_start": 4},
    "sinks": {"sinks": torch.tensor([0.3, -1.0, 4.0, 0.0]).double()},
    "sinks_are_not_scaled": {"sinks": torch.tensor([0.3, -1.0, 4.0, 0.0]).double(), "scale": 3.0, "softcap": 1.0},
    "negative_scale": {"scale": -1.5},
    "bool_mask": {"attn_mask": (torch.arange(30).view(5, 6) % 3 != 0)},
    "minus_infinity": {"attn_mask": torch.zeros(5, 6).double().masked_fill(torch.arange(6) % 2 == 0, -math.inf)},
}


@pytest.mark.parametrize("kwargs", HAND_MADE.values(), ids=HAND_MADE.keys())
@pytest.mark.parametrize("shape", [(5, 6)], ids=str)
def test_each_option_with_gradients(kwargs: dict, shape: tuple[int, int], brute_force: Brute) -> None:
    """Gradients of every differentiable input, with a gradient through the LSE too, against the token-level formula."""
    q = torch.randn(2, 4, shape[0], 3, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 2, shape[1], 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 2, shape[1], 5, dtype=torch.float64, requires_grad=True)
    leaves = [q, k, v]
    kwargs = dict(kwargs)
    for name in ("attn_mask", "sinks"):
        if name in kwargs and kwargs[name].is_floating_point():
            kwargs[name] = kwargs[name].clone().requires_grad_()
            leaves.append(kwargs[name])
    seeds = torch.randn(2, 4, shape[0], 5, dtype=torch.float64), torch.randn(2, 4, shape[0], dtype=torch.float64)

    def differentiate(results: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return (*results, *torch.autograd.grad(results, leaves, seeds, allow_unused=True, materialize_grads=True))

    for found, exact in zip(
        differentiate(attend(q, k, v, **kwargs)), differentiate(brute_force(q, k, v, **kwargs)), strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-12)


def test_causal_pictures() -> None:
    """The two drawings of the docstring: bottom-right alignment for Sq < Sk and for Sq > Sk."""
    short = attend(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 5, 1), torch.eye(5)[None, None], causal=True)[0][0, 0]
    assert torch.equal((short > 0).int(), torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.int32))
    tall = attend(torch.zeros(1, 1, 5, 1), torch.zeros(1, 1, 2, 1), torch.eye(2)[None, None], causal=True)[0][0, 0]
    assert torch.equal((tall > 0).int(), torch.tensor([[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]], dtype=torch.int32))


def test_softcap_formula() -> None:
    """One query, two keys: softmax(cap * tanh(score / cap))."""
    q, k = torch.ones(1, 1, 1, 1).double(), torch.tensor([1.0, 3.0]).double().view(1, 1, 2, 1)
    out, lse = attend(q, k, torch.eye(2).double()[None, None], softcap=2.0, scale=2.0)
    capped = [2.0 * math.tanh(s / 2.0) for s in (2.0, 6.0)]
    total = sum(math.exp(s) for s in capped)
    assert out.flatten().tolist() == pytest.approx([math.exp(s) / total for s in capped], rel=1e-14)
    assert lse.item() == pytest.approx(math.log(total), rel=1e-14)


def test_alibi_formula() -> None:
    """Scores of zero: the weights are exp(-slope * distance), on both sides of the diagonal."""
    q = torch.zeros(1, 2, 1, 1).double()
    out, _ = attend(
        q, torch.zeros(1, 2, 4, 1).double(), torch.eye(4).double().expand(1, 2, 4, 4),
        alibi_slopes=torch.tensor([0.5, 2.0]), query_start=1,
    )  # fmt: skip
    for h, slope in enumerate((0.5, 2.0)):
        weights = [math.exp(-slope * abs(1 - j)) for j in range(4)]
        assert out[0, h, 0].tolist() == pytest.approx([w / sum(weights) for w in weights], rel=1e-14)


def test_sink_formula() -> None:
    """The sink takes probability and counts in the LSE, but adds no value."""
    q = torch.zeros(1, 1, 1, 1).double()
    out, lse = attend(
        q, torch.zeros(1, 1, 3, 1).double(), torch.ones(1, 1, 3, 1).double(), sinks=torch.tensor([math.log(2.0)])
    )
    assert out.item() == pytest.approx(3 / 5, rel=1e-6)
    assert lse.item() == pytest.approx(math.log(5.0), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rows_without_keys(dtype: torch.dtype) -> None:
    """Output 0, LSE -inf (the sink where there is one), and no gradient to query, key or value, NaN or otherwise."""
    q, k, v = (torch.randn(1, 2, n, 8, dtype=dtype, requires_grad=True) for n in (6, 4, 4))
    out, lse = attend(q, k, v, causal=True)
    assert torch.equal(out[:, :, :2], torch.zeros_like(out[:, :, :2]))
    assert (lse[:, :, :2] == -math.inf).all()
    assert lse[:, :, 2:].isfinite().all()
    grads = torch.autograd.grad([out[:, :, :2], lse[:, :, :2]], [q, k, v], [torch.ones(1, 2, 2, 8, dtype=dtype),
                                torch.ones(1, 2, 2, dtype=lse.dtype)])  # fmt: skip
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    sinks = torch.tensor([0.5, -3.0])
    out, lse = attend(q, k, v, causal=True, sinks=sinks)
    assert torch.equal(out[:, :, :2], torch.zeros_like(out[:, :, :2]))
    assert torch.equal(lse[0, :, 0], sinks.to(lse.dtype))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_lse_is_the_natural_log_in_the_accumulation_dtype(dtype: torch.dtype, expected: torch.dtype) -> None:
    """Five equal scores of zero: ln 5, in float32 (float64 for float64)."""
    zeros = torch.zeros(1, 3, 2, 4, dtype=dtype), torch.zeros(1, 3, 5, 4, dtype=dtype)
    _, lse = attend(zeros[0], zeros[1], zeros[1])
    assert lse.dtype == expected
    assert lse.shape == (1, 3, 2)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(5.0)))


def test_packed_equals_each_sequence_alone(seed: int) -> None:
    """Fails where sequences of a packed batch see each other or are aligned by the wrong lengths."""
    case = Case("packed", packed=((5, 9, 1), (7, 3, 4)), causal=True, window=(4, None), head_dim=8, lse=True)
    inputs = make_inputs(case, torch.float64, "cpu", seed)
    out, lse = call(case, inputs, "reference")
    row = column = 0
    for q_len, k_len in zip(*case.packed, strict=True):
        q, k, v = (
            t.transpose(0, 1)[None]
            for t in (inputs.query[row : row + q_len], inputs.key[column : column + k_len],
                      inputs.value[column : column + k_len])
        )  # fmt: skip
        alone, lse_alone = attend(q, k, v, causal=True, window=(4, None))
        assert torch.equal(out[row : row + q_len].transpose(0, 1), alone[0])
        assert torch.equal(lse[:, row : row + q_len], lse_alone[0])
        row, column = row + q_len, column + k_len
