"""What is particular to the C++ kernels of linear attention: instruction sets, threads, chunks, working memory.
What every backend must do is in test_contract.py.

Everything here runs the launcher itself, `fastattn.linear.native`, beside the formulas in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastattn import _extension
from fastattn.linear import LinearState, native, reference, relu_features, softmax_features
from fastattn.linear.api import problem_of
from fastattn.linear.problem import Problem

pytestmark = pytest.mark.skipif(_extension.unavailable() is not None, reason="needs the native extension")

CHUNK = 64  # csrc/cpu/linear.h
Made = Callable[..., Problem]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Kind:
    """A kind of problem: which code of the kernels it runs."""

    features: str = "elu"
    causal: bool = True
    decay: str | None = None
    masked: bool = False
    packed: bool = False

    def __str__(self) -> str:
        flags = ("causal" * self.causal, self.decay or "", "masked" * self.masked, "packed" * self.packed)
        return "-".join([self.features, *filter(None, flags)])


KINDS = [
    Kind("identity"),
    Kind("elu", masked=True),
    Kind("relu", decay="step"),
    Kind("softmax"),
    Kind("softmax", decay="head", masked=True, packed=True),
    Kind("elu", decay="feature"),
    Kind("identity", decay="feature", masked=True, packed=True),
    Kind("elu", causal=False),
    Kind("softmax", causal=False, masked=True),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def make(
    kind: Kind,
    length: int,
    dtype: torch.dtype = torch.float32,
    *,
    heads: tuple[int, int] = (2, 1),
    dims: tuple[int, int, int] = (16, 16, 24),
    strength: float = 0.3,
    state: bool = True,
) -> Problem:
    """A problem of this kind; dims are D, Dv and, with a projection, M."""
    query_heads, key_heads = heads
    dim, value_dim, num_features = dims
    query, key = (torch.randn(1, h, length, dim).to(dtype) for h in heads)
    value = torch.randn(1, key_heads, length, value_dim).to(dtype)
    maps = {
        "relu": relu_features(torch.randn(num_features, dim)),
        "softmax": softmax_features(torch.randn(num_features, dim) / 2),
    }
    if kind.features not in maps:
        num_features = dim
    shapes = {
        "head": (query_heads,),
        "step": (1, query_heads, length),
        "feature": (1, query_heads, length, num_features),
    }
    bounds = torch.tensor([0, length // 3, length // 3, length]) if kind.packed else None
    sequences = 3 if kind.packed else 1
    normalize = kind.features != "identity"
    before = LinearState(
        torch.randn(sequences, query_heads, num_features, value_dim),
        torch.rand(sequences, query_heads, num_features) + 0.5 if normalize else None,
        torch.randn(sequences, query_heads) if kind.features == "softmax" else None,
    )
    return problem_of(
        query,
        key,
        value,
        causal=kind.causal,
        feature_map=maps.get(kind.features, kind.features),
        normalize=normalize,
        decay=-strength * torch.rand(shapes[kind.decay]) if kind.decay else None,
        key_mask=torch.rand(1, length) < 0.8 if kind.masked else None,
        cu_seqlens=bounds,
        initial_state=before if state else None,
        return_state=state,
    )


def tensors_as(p: Problem, dtype: torch.dtype) -> Problem:
    """The problem with its floating-point tensors in another dtype."""
    names = [name for name in p.__slots__ if isinstance(t := getattr(p, name), Tensor) and t.is_floating_point()]
    return replace(p, **{name: getattr(p, name).to(dtype) for name in names})


def cotangents(p: Problem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Fixed gradients of out, kv and normalizer."""
    out = torch.cos(torch.arange(p.query.shape[2])[:, None] + torch.arange(p.value.shape[3]))
    states = (p.num_sequences, p.query.shape[1], p.num_features)
    kv = torch.ones(*states, p.value.shape[3]) / 8 if p.return_state else None
    normalizer = torch.ones(states) / 16 if p.return_state and p.normalize else None
    accumulate = p.accumulate_dtype
    return (
        out.to(p.query.dtype).expand(1, p.query.shape[1], -1, -1),
        None if kv is None else kv.to(accumulate),
        None if normalizer is None else normalizer.to(accumulate),
    )


def run(p: Problem, launcher=native) -> dict[str, Tensor]:
    """Every result and gradient by name."""
    results = launcher.forward(p)
    gradients = launcher.backward(p, results.out, results.denominator, *cotangents(p))
    return {**results._asdict(), **{f"grad_{n}": g for n, g in gradients._asdict().items()}}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, truth in expected.items():
        if truth.numel():
            error = (found[name].double() - truth).nan_to_num(nan=torch.inf).abs().max()
            assert error <= tolerance * (1 + truth.abs().max()), f"{name}: {error:.2e}, largest {truth.abs().max():.2e}"


@every_kind
@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_chunk_edges(kind: Kind, length: int) -> None:
    """Lengths around whole chunks in float64, to 1e-10. Fails where a chunk's last steps, its first, or the state
    between chunks are wrong in output, state or any gradient."""
    p = make(kind, length, torch.float64)
    assert_close(run(p), run(p, reference), 1e-10)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_instruction_sets(kind: Kind, dtype: torch.dtype, cpu_isa: str) -> None:
    """Each instruction set against the formulas in float64, with sizes that fill no vector of any of them. Fails where
    the code of one vector length reads or writes padding, or a conversion of one dtype is wrong."""
    p = make(kind, CHUNK + 5, dtype, dims=(7, 13, 19))
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2, torch.float16: 3e-3}
    assert_close(run(p), run(tensors_as(p, torch.float64), reference), tolerance[dtype])


@every_kind
@pytest.mark.parametrize("heads", [(1, 1), (6, 3)], ids=["fewer heads than threads", "more heads"])
def test_threads_repeat_bit_for_bit(
    kind: Kind, heads: tuple[int, int], cpu_isa: str, threads: Callable[[int], None]
) -> None:
    """1, 2 and 5 threads, the last twice, on each instruction set. Fails where a sum's order or its rounding depends on
    how threads share a head, or a chunk does not wait for the one before it."""
    p = make(kind, 700, heads=heads, dims=(64, 64, 64))
    found = []
    for count in (1, 2, 5, 5):
        threads(count)
        found.append(run(p))
    assert all(torch.equal(other[name], found[0][name]) for other in found[1:] for name in other)


@pytest.mark.parametrize("kind", [Kind("identity"), Kind("softmax"), Kind("elu", decay="feature")], ids=str)
def test_groups_of_chunks(kind: Kind, threads: Callable[[int], None]) -> None:
    """A head whose states are more than the backward keeps at once: it computes those of a group again, on 1 and 3
    threads. Fails where a group starts from a wrong state, or overwrites one that is still needed."""
    p = make(kind, 1100, torch.float64, heads=(1, 1), dims=(192, 192, 192))
    expected = run(p, reference)
    found = []
    for count in (1, 3):
        threads(count)
        found.append(run(p))
        assert_close(found[-1], expected, 1e-10)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def scratch(p: Problem, which: str) -> int:
    """Bytes of working memory of a launch."""
    seen = []
    core = _extension.native()
    launch, native.launch = (
        native.launch,
        lambda kernel, size, params: seen.append(size(params)) or launch(kernel, size, params),
    )
    try:
        results = native.forward(p)
        if which == "backward":
            native.backward(p, results.out, results.denominator, *cotangents(p))
    finally:
        native.launch = launch
    assert core is not None
    return seen[-1]


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_working_memory(which: str, threads: Callable[[int], None]) -> None:
    """Features and states are never stored for every step, nor every head's at once. Fails where working memory grows
    with length times features, or with the number of heads beyond a wave."""
    threads(1)
    kind, dims = Kind("softmax"), (16, 64, 256)
    short, long = (scratch(make(kind, n, heads=(1, 1), dims=dims, state=False), which) for n in (2048, 8192))
    assert long < 8192 * 256 * 4 * 2  # features of every step, and the states of every 64th, would be 16 MiB
    assert long - short <= 3 * short
    few, many = (scratch(make(Kind(), 64, heads=(n, n), dims=(64, 64, 64), state=False), which) for n in (400, 800))
    assert few == many


@every_kind
def test_unread_memory(kind: Kind) -> None:
    """NaN in masked keys and values, and in rows past the last sequence. Fails where one of them is read into a result
    or a gradient, or a masked key's gradient is not 0."""
    p = make(kind, 200)
    mask = p.key_mask
    expected = run(p)
    key, value = p.key.clone(), p.value.clone()
    if mask is not None:
        for tensor in (key, value):
            tensor.masked_fill_(~mask[:, None, :, None], torch.nan)
    poisoned = replace(p, key=key, value=value)
    if p.cu_seqlens is not None:
        tail = torch.full((1, 1, 50, 16), torch.nan)
        longer = {
            n: torch.cat([getattr(poisoned, n), tail.expand(1, getattr(p, n).shape[1], 50, 16)], 2)
            for n in ("query", "key", "value")
        }
        assert p.decay is not None
        more = p.decay.new_full((*p.decay.shape[:2], 50, *p.decay.shape[3:]), torch.nan)
        longer |= {
            "decay": torch.cat([p.decay, more], 2),
            "key_mask": torch.cat([p.key_mask, torch.ones(1, 50) > 0], 1),
        }
        poisoned = replace(poisoned, **longer)
    found = run(poisoned)
    for name, truth in expected.items():
        part = found[name]
        if p.cu_seqlens is not None and part.dim() >= 3 and part.shape[2] == 250:
            assert not part[:, :, 200:].any(), f"{name}: rows of no sequence must be 0"
            part = part[:, :, :200]
        assert torch.equal(part, truth), name
    if mask is not None:
        assert not found["grad_key"][:, :, :200][:, :, ~mask[0]].any()
        assert not found["grad_value"][:, :, :200][:, :, ~mask[0]].any()


@pytest.mark.parametrize("decay", ["head", "step", "feature"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decays_to_nothing(decay: str, dtype: torch.dtype) -> None:
    """Decays of -50, -1e4 and minus infinity among weak ones: what came before is forgotten, what comes after is exact.
    Fails where a difference of prefix sums is NaN, or a strong decay's rounding reaches the weak ones."""
    p = make(Kind("elu", decay=decay), 150, dtype, state=False)
    assert p.decay is not None
    strong = p.decay.clone()
    if decay == "head":
        strong.fill_(-torch.inf)
    else:
        for step, value in ((20, -50.0), (70, -1e4), (71, -torch.inf), (100, -torch.inf)):
            strong[:, :, step] = value
    p = replace(p, decay=strong)
    weights = torch.exp(strong.double())
    phi, psi = (torch.where(x > 0, x + 1, x.exp()) for x in (p.query.double(), p.key.double()))
    if weights.dim() == 3:
        weights = weights[..., None]
    kv, z, rows = 0.0, 0.0, []
    for t in range(150):
        kv = weights[:, :, t, :, None] * kv + psi[:, :, t, :, None] * p.value.double()[:, :, t, None]
        z = weights[:, :, t] * z + psi[:, :, t]
        rows.append((phi[:, :, t, None] @ kv).squeeze(2) / (phi[:, :, t] * z).sum(-1, keepdim=True))
    found = run(p)
    truth = torch.stack(rows, 2)
    assert_close(found, {"out": truth}, 1e-5 if dtype == torch.float32 else 1e-12)
    assert all(t.isfinite().all() for t in found.values())


@pytest.mark.parametrize("kind", [Kind("elu", decay="step"), Kind("elu", decay="feature")], ids=str)
def test_gradient_of_strong_decays(kind: Kind) -> None:
    """The gradient of a decay of -30 is about e^-30 and right to 1e-9 of that, where autograd through prefix sums has
    lost it. Fails where what a step has with itself enters and is only taken out again."""
    p = make(kind, 70, torch.float64, heads=(1, 1), dims=(4, 4, 4), state=False)
    assert p.decay is not None
    p = replace(p, decay=torch.full_like(p.decay, -30.0) - torch.rand_like(p.decay))
    leaf = p.decay.clone().requires_grad_()
    weights = torch.exp(leaf)[..., None] if leaf.dim() == 3 else torch.exp(leaf)
    phi, psi = (torch.where(x > 0, x + 1, x.exp()) for x in (p.query, p.key))
    kv, z, rows = torch.zeros(1, 1, 4, 4).double(), torch.zeros(1, 1, 4).double(), []
    for t in range(70):
        kv = weights[:, :, t, :, None] * kv + psi[:, :, t, :, None] * p.value[:, :, t, None]
        z = weights[:, :, t] * z + psi[:, :, t]
        rows.append((phi[:, :, t, None] @ kv).squeeze(2) / (phi[:, :, t] * z).sum(-1, keepdim=True))
    (truth,) = torch.autograd.grad(torch.stack(rows, 2), leaf, cotangents(p)[0])
    found = run(p)["grad_decay"]
    assert 0 < truth.abs().max() < 1e-11
    assert (found - truth).abs().max() <= 1e-3 * truth.abs().max()


@pytest.mark.parametrize("causal", [True, False])
def test_strides(causal: bool) -> None:
    """Tensors in (B, N, H, D) memory, with a column stride, and broadcast. Fails where a stride is assumed."""
    p = make(Kind("elu", causal=causal, decay="feature" if causal else None), 100)
    expected = run(p)

    def spread(t: Tensor) -> Tensor:
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan)
        wide[..., ::2] = t
        return wide[..., ::2]

    turned = {n: getattr(p, n).transpose(1, 2).contiguous().transpose(1, 2) for n in ("query", "key")}
    states = {n: spread(getattr(p, n)) for n in ("initial_kv", "initial_normalizer")}
    found = run(
        replace(p, **turned, value=spread(p.value), decay=None if p.decay is None else spread(p.decay), **states)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    broadcast = replace(p, value=p.value[:, :, :1].expand_as(p.value))
    whole = replace(p, value=broadcast.value.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(run(broadcast).values(), run(whole).values(), strict=True))


@pytest.mark.parametrize(("batch", "length"), list(itertools.product((0, 1), (0, 3))))
def test_nothing_to_do(batch: int, length: int) -> None:
    """Batch size 0 and length 0: empty results, the state passes. Fails on a division by zero or a stray write."""
    p = make(Kind("elu"), length)
    p = replace(p, **{n: getattr(p, n)[:batch] for n in ("query", "key", "value", "initial_kv", "initial_normalizer")})
    found = run(p)
    if not length:
        assert torch.equal(found["kv"], p.initial_kv)
        assert torch.equal(found["grad_initial_kv"], cotangents(p)[1])
    assert found["out"].shape == (batch, 2, length, 16)


def test_softmax_state_of_masked_start() -> None:
    """Keys masked from the start leave the maximum at minus infinity and rows at 0, and do not disturb what follows."""
    p = make(Kind("softmax", masked=True), 150, torch.float64, state=False)
    mask = torch.ones(1, 150, dtype=torch.bool)
    mask[:, :80] = False
    p = replace(p, key_mask=mask, return_state=True)
    found = run(p)
    assert not found["out"][:, :, :80].any()
    assert_close(found, run(p, reference), 1e-10)
    empty = run(replace(p, key_mask=torch.zeros_like(mask)))
    assert (empty["log_scale"] == -torch.inf).all()
    assert not empty["out"].any()
