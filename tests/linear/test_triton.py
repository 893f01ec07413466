"""What only the `triton` backend has: chunks and their slots, split sums, exponents in range, triangular systems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import verify
from fastattn.linear import reference, triton, triton_launch
from fastattn.linear.api import problem_of
from fastattn.linear.features import FeatureMap, relu_features, softmax_features
from fastattn.linear.state import LinearState

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif("triton" not in verify.backends_on(DEVICE), reason="Triton is not installed")


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def steps(heads: int, length: int, size: float = 1.0) -> Tensor:
    """Decays, or with size = -1 strengths, of a batch of 1."""
    return -size * torch.rand(1, heads, length, device=DEVICE)


def assert_like_reference(call: Callable[..., Tensor], *leaves: Tensor, tolerance: float = 1e-4) -> None:
    """The outputs of call(*leaves, backend=...) and all gradients agree with the float64 reference.

    tolerance is in units of the largest element, or of 0.1: a gradient may vanish where equal terms cancel.
    """

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        own = [t.to(dtype).requires_grad_() for t in (leaf.detach() for leaf in leaves)]
        found = call(*own, backend=backend)
        results = [found] if isinstance(found, Tensor) else [found[0], found[1].kv]
        torch.manual_seed(0)
        return [*results, *torch.autograd.grad(results, own, [torch.randn(t.shape).to(t) for t in results])]

    for result, exact in zip(run("triton", torch.float32), run("reference", torch.float64), strict=True):
        if exact.numel():
            error = (result.double() - exact).abs().max() / exact.abs().max().clamp_min(0.1)
            assert error <= tolerance


@pytest.mark.parametrize("length", [1, 64, 65, 129])
def test_chunk_boundaries(length: int) -> None:
    """Fails where a step falls between two chunks or into both, or where a last short chunk decays too much."""
    q, k, v, decay = draw(1, 1, length, 8), draw(1, 1, length, 8), draw(1, 1, length, 20), steps(1, length)

    def call(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, backend: str) -> Tensor:
        return fastattn.linear_attention(
            q, k, v, decay=decay, causal=True, feature_map="elu", return_state=True, backend=backend
        )

    assert_like_reference(call, q, k, v, decay)


def test_blocks_of_every_axis() -> None:
    """Features, values and heads wider than a tile, and no multiple of one: fails where a block is lost or doubled."""
    q, k, v = draw(1, 1, 20, 70), draw(1, 1, 20, 70), draw(1, 1, 20, 130)
    kv, normalizer = draw(1, 1, 150, 130), draw(1, 1, 150).abs()
    feature_map = relu_features(draw(150, 70) / 8)

    def call(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, normalizer: Tensor, backend: str) -> Tensor:
        return fastattn.linear_attention(
            q,
            k,
            v,
            causal=True,
            feature_map=feature_map,
            initial_state=LinearState(kv, normalizer),
            return_state=True,
            backend=backend,
        )

    assert_like_reference(call, q, k, v, kv, normalizer)


@pytest.mark.parametrize("bounds", [[0, 63, 63, 64, 130, 140], [0], [0, 0, 1]])
def test_slots_of_packed_sequences(bounds: list[int]) -> None:
    """Sequences that begin and end anywhere in a chunk's length, or are empty, and rows that belong to none.

    Fails where two sequences share a slot, or where a slot is taken for another sequence's.
    """
    q, k, v, decay = draw(1, 1, 145, 8), draw(1, 1, 145, 8), draw(1, 1, 145, 8), steps(1, 145)
    initial = draw(len(bounds) - 1, 1, 8, 8)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)

    def call(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial: Tensor, backend: str) -> Tensor:
        return fastattn.linear_attention(
            q,
            k,
            v,
            decay=decay,
            causal=True,
            feature_map="identity",
            normalize=False,
            initial_state=LinearState(initial),
            return_state=len(bounds) > 1,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )

    assert_like_reference(call, q, k, v, decay, initial)


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_of_a_sum(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an order of steps, chunks split between programs: fails where one falls out, or where the initial state
    counts once a part.
    """
    monkeypatch.setattr(triton_launch, "resident", lambda device: parts)
    q, k, v = draw(1, 1, 30, 8), draw(1, 1, 200, 8), draw(1, 1, 200, 8)
    kv, normalizer = draw(1, 1, 8, 8), draw(1, 1, 8).abs()

    def call(q: Tensor, k: Tensor, v: Tensor, kv: Tensor, normalizer: Tensor, backend: str) -> Tensor:
        return fastattn.linear_attention(
            q,
            k,
            v,
            causal=False,
            feature_map="elu",
            initial_state=LinearState(kv, normalizer),
            return_state=True,
            backend=backend,
        )

    assert_like_reference(call, q, k, v, kv, normalizer)


def test_running_maximum_of_exponents() -> None:
    """Keys that outgrow all before them by far more than float32's range, masked steps, and a state before.

    Fails where exponents are taken without the running maximum, where a masked step moves it or another head's steps
    do, or where the state is not brought to it.
    """
    projection = draw(40, 8) * 6
    q, k, v = draw(1, 2, 80, 8) / 10, draw(1, 2, 80, 8) / 10, draw(1, 2, 80, 8)
    largest = projection[projection.norm(dim=1).argmax()]
    k[:, :, 50] = projection[0]  # its exponent is |projection[0]|^2 / 2
    k[:, :1, 79] = largest
    mask = torch.ones(1, 80, dtype=torch.bool, device=DEVICE)
    mask[:, 60:65] = False
    mask[:, :3] = False
    feature_map = softmax_features(projection, draw(40) / 4)
    state = LinearState(draw(1, 2, 40, 8).abs(), draw(1, 2, 40).abs(), draw(1, 2))

    def call(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        poisoned = torch.where(mask[:, None, :, None], k, float("nan"))
        initial = LinearState(*(t.to(q.dtype) for t in state))
        return fastattn.linear_attention(
            q,
            poisoned,
            v,
            causal=True,
            feature_map=feature_map,
            key_mask=mask,
            initial_state=initial,
            return_state=True,
            scale=1.0,
            backend=backend,
        )

    assert_like_reference(call, q, k, v, tolerance=1e-3)


def test_keys_that_are_not_there() -> None:
    """Rows before the first key that counts give 0, and a call of no keys gives zeros: fails where 0 / 0 is taken."""
    q, k, v = draw(1, 1, 70, 8), draw(1, 1, 70, 8), draw(1, 1, 70, 8)
    mask = torch.zeros(1, 70, dtype=torch.bool, device=DEVICE)
    mask[:, 66] = True
    features = softmax_features(draw(16, 8))
    for causal in (False, True):
        found = fastattn.linear_attention(q, k, v, causal=causal, feature_map=features, key_mask=mask, backend="triton")
        assert found.isfinite().all()
        if causal:
            assert (found[:, :, :66] == 0).all()
            torch.testing.assert_close(found[:, :, 66:], v[:, :, 66:67].expand(-1, -1, 4, -1))
    options = {"causal": False, "feature_map": features, "return_state": True, "backend": "triton"}
    nothing = [(k[:, :, :0], v[:, :, :0], None), (k, v, torch.zeros_like(mask))]
    for keys, values, nowhere in nothing:
        found, state = fastattn.linear_attention(q, keys, values, key_mask=nowhere, **options)
        assert (found == 0).all()
        assert (state.kv == 0).all()
        assert (state.log_scale == float("-inf")).all()


@pytest.mark.parametrize("vector", [False, True], ids=["step", "feature"])
def test_decay_that_forgets_everything(vector: bool) -> None:
    """A decay of -inf, at which the sequence begins anew, and ones whose sums leave float32's range: fails where sums
    of -inf are subtracted, where an exponent is positive, where two steps within a block of 16 are mixed up, or where
    a large step costs those after it their last bits.
    """
    shape = (1, 1, 80, 8) if vector else (1, 1, 80)
    decay = -torch.rand(shape, device=DEVICE)
    decay[:, :, 20:24] *= 90
    decay[:, :, 70] = float("-inf")
    q, k, v = draw(1, 1, 80, 8), draw(1, 1, 80, 8), draw(1, 1, 80, 8)

    def call(q: Tensor, k: Tensor, v: Tensor, backend: str, decay: Tensor) -> Tensor:
        return fastattn.linear_attention(
            q, k, v, decay=decay, causal=True, feature_map="identity", normalize=False, backend=backend
        )

    own = [t.clone().requires_grad_() for t in (q, k, v, decay)]
    found = call(*own[:3], "triton", own[3])
    # The reference takes no -inf: two calls, of which the second knows nothing of the first.
    wide = [t.double().requires_grad_() for t in (q, k, v, decay)]
    parts = [[t[:, :, rows] for t in wide] for rows in (slice(0, 70), slice(70, 80))]
    parts[1][3] = parts[1][3].clamp(min=-1)
    exact = torch.cat([call(*part[:3], "reference", part[3]) for part in parts], 2)
    tolerance = 1e-4 if vector else 5e-6
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
    grad = draw(*found.shape)
    found_grads = torch.autograd.grad(found, own, grad)
    exact_grads = torch.autograd.grad(exact, wide, grad.double())
    for result, truth in zip(found_grads[:3], exact_grads[:3], strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=tolerance, atol=4 * tolerance)
    assert found_grads[3].isfinite().all()


def test_vector_decay_across_blocks() -> None:
    """Decay per feature over two chunks and many blocks, masked keys among them: fails where a block's place within its
    chunk is off, or where the gradient of a masked step's decay is not 0.
    """
    q, k, v, decay = draw(1, 1, 70, 40), draw(1, 1, 70, 40), draw(1, 1, 70, 8), -torch.rand(1, 1, 70, 40).to(DEVICE)
    mask = torch.rand(1, 70, device=DEVICE) > 0.3

    def call(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, backend: str) -> Tensor:
        return fastattn.linear_attention(
            q,
            k,
            v,
            decay=decay,
            causal=True,
            feature_map="elu",
            key_mask=mask,
            return_state=True,
            backend=backend,
        )

    assert_like_reference(call, q, k, v, decay)


def test_delta_rule() -> None:
    """Heads that share keys, decay, masked steps, a state before and after, widths of more than a tile: fails where any
    of them is missing from the chunks' systems or their gradients.
    """
    q, k, v, initial = (
        draw(1, 2, 70, 70),
        F.normalize(draw(1, 1, 70, 70), dim=-1),
        draw(1, 1, 70, 40),
        draw(1, 2, 70, 40),
    )
    mask = torch.rand(1, 70, device=DEVICE) > 0.3

    def call(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, initial: Tensor, backend: str) -> Tensor:
        return fastattn.delta_rule(
            q,
            k,
            v,
            beta,
            decay=decay,
            key_mask=mask,
            initial_state=LinearState(initial),
            return_state=True,
            backend=backend,
        )

    assert_like_reference(call, q, k, v, steps(2, 70, -1.0), steps(2, 70), initial)


def test_delta_rule_of_one_key() -> None:
    """The same key at every step, beta = 2: each step reflects the state, and the system is as far from I as it gets.

    Fails where its inverse is summed as a series, whose terms grow as binomials, and where beta = 0 is divided by.
    """
    k = F.normalize(draw(1, 1, 1, 16), dim=-1).expand(1, 1, 64, 16).contiguous()
    beta = torch.full((1, 1, 64), 2.0, device=DEVICE)
    beta[:, :, 10] = 0

    def call(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, backend: str) -> Tensor:
        return fastattn.delta_rule(q, k, v, beta, backend=backend)

    assert_like_reference(call, draw(1, 1, 64, 16), k, draw(1, 1, 64, 16), beta)


def test_sums_beyond_float16() -> None:
    """States and denominators past 65504 in a float16 call: fails where they are rounded to float16."""
    q, k, v = (t.half() for t in (draw(1, 1, 150, 8) + 3, draw(1, 1, 150, 8) + 500, draw(1, 1, 150, 8) + 5))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    found = fastattn.linear_attention(*leaves, causal=True, feature_map="elu", backend="triton")
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = fastattn.linear_attention(*wide, causal=True, feature_map="elu", backend="reference")
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=2e-3)
    grad = torch.randn_like(found)
    found_grads = torch.autograd.grad(found, leaves, grad)
    assert all(g.isfinite().all() for g in found_grads)
    truth = torch.autograd.grad(exact, wide, grad.double())[2]
    torch.testing.assert_close(found_grads[2].double(), truth, rtol=2e-3, atol=2e-3)


def test_residual_of_a_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 operands take a projection in two parts: fails where their sum is less exact than tf32, or where a
    kernel forgets the second.
    """
    projection = draw(24, 16).to(DEVICE)
    rounded = projection.bfloat16()
    residual = (projection - rounded).bfloat16()
    assert (rounded.double() + residual.double() - projection).abs().max() <= projection.abs().max() * 2**-16
    monkeypatch.setattr(triton_launch.Launch, "_projection", lambda launch: (rounded.float(), residual.float()))
    q, k, v = draw(1, 1, 40, 16) * 3, draw(1, 1, 40, 16) * 3, draw(1, 1, 40, 16)
    options = {"causal": True, "feature_map": softmax_features(projection), "scale": 1.0}
    found = fastattn.linear_attention(q, k, v, **options, backend="triton")
    exact = fastattn.linear_attention(*(t.double() for t in (q, k, v)), **options, backend="reference")
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(DEVICE != "cpu", reason="the contract tests run bfloat16 on a GPU")
@pytest.mark.parametrize("problem", ["performer", "gated", "delta"])
def test_bfloat16_in_the_interpreter(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands of bfloat16, with the interpreter's product, which is one of bit patterns, mended: fails where a sum, a
    state or an exponent is kept in bfloat16 that should not be.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    tl, dot = interpreter.tl, interpreter.InterpreterBuilder.create_dot

    def widened(operand: Any) -> Any:
        if operand.data.dtype != np.uint16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *others: dot(self, widened(a), widened(b), *others),
    )
    q, k, v = (draw(1, 1, 70, 16).bfloat16() for _ in range(3))
    options: dict[str, Any] = {"causal": True, "feature_map": "identity", "normalize": False}
    if problem == "performer":
        options |= {"feature_map": softmax_features(draw(24, 16)), "normalize": True}
    elif problem == "gated":
        options["decay"] = -torch.rand(1, 1, 70, 16)
    else:
        k = F.normalize(k, dim=-1)
        options |= {"decay": steps(1, 70), "beta": steps(1, 70, -1.0)}
    p = problem_of(q, k, v, **options)
    found = triton.forward(p)
    grad = draw(*found.out.shape).bfloat16()
    grads = triton.backward(p, found.out, found.denominator, grad, None, None)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    options |= {name: t.double() for name, t in options.items() if isinstance(t, Tensor)}
    exact = reference.formula(problem_of(*wide, **options)).out
    truths = (exact, *torch.autograd.grad(exact, wide, grad.double()))
    for result, truth in zip((found.out, *grads[:3]), truths, strict=True):
        # Two roundings or so of 2^-8 each, which the interpreter takes down, not to the nearest.
        assert (result.double() - truth).abs().max() <= 0.03 * truth.abs().max()


def test_repeats_bit_for_bit() -> None:
    """Fails where sums depend on the order in which programs run."""
    q, k, v = (draw(1, 2, 130, 16).requires_grad_() for _ in range(3))
    results = []
    for _ in range(2):
        out = fastattn.linear_attention(q, k, v, causal=False, feature_map="elu", backend="triton")
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_projected_identity_trains() -> None:
    """A projection without a nonlinearity, the one map that no name has: fails where its slope is not 1."""
    feature_map = FeatureMap("identity", draw(20, 16))

    def call(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        return fastattn.linear_attention(
            q, k, v, causal=True, feature_map=feature_map, normalize=False, backend=backend
        )

    assert_like_reference(call, draw(1, 1, 20, 16), draw(1, 1, 20, 16), draw(1, 1, 20, 16))
