"""What only the `triton` backend has: split keys, latent attention, tiles for wide heads, launches, CUDA graphs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import backends, verify
from fastattn.backends import FEATURES, Requirements
from fastattn.dense import triton, triton_launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif("triton" not in verify.backends_on(DEVICE), reason="Triton is not installed")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def assert_like_reference(found: tuple[Tensor, Tensor], *args: Tensor, **options) -> None:
    """Output and LSE agree with the float64 reference to float32's precision."""
    wide = [t.double() for t in args]
    truth = fastattn.attention_with_kvcache(*wide, return_lse=True, backend="reference", **options)
    for result, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


def test_splits_keep_the_device_busy() -> None:
    """Fails where few programs do not split, where many do, or where there are more parts than allowed."""
    assert 0.85 * 264 <= 8 * triton._splits(8, 264, 128) <= 264  # nearly a full wave, and only one
    assert triton._splits(8, 264, 4) == 4
    assert triton._splits(264, 264, 128) == 1
    assert triton._splits(10_000, 264, 128) == 1
    assert triton._splits(1, 264, 0) == 1


@pytest.mark.parametrize("keys", [1, 63, 65, 700])
@pytest.mark.parametrize("deterministic", [False, True])
def test_splits_of_every_length(keys: int, deterministic: bool) -> None:
    """Fails where a key falls between two parts or into both, where an empty part counts, or where the sink counts
    once a part.
    """
    q, k, v = draw(2, 4, 2, 16), draw(2, 2, 700, 16), draw(2, 2, 700, 16)
    options = {
        "key_lengths": torch.tensor([keys, 0], device=DEVICE),
        "key_start": torch.tensor([keys // 3, 0], device=DEVICE),
        "sinks": draw(4),
        "causal": True,
        "deterministic": deterministic,
    }
    found = fastattn.attention_with_kvcache(q, k, v, return_lse=True, backend="triton", **options)
    assert_like_reference(found, q, k, v, **options)


def test_batch_invariance() -> None:
    """With deterministic=True a sequence's result has the same bits alone, in a batch, and in a longer cache."""
    q, k, v = draw(3, 4, 1, 32), draw(3, 2, 1200, 32), draw(3, 2, 1200, 32)
    lengths = torch.tensor([1100, 5, 600], device=DEVICE)

    def decode(batch: slice, capacity: int) -> tuple[Tensor, Tensor]:
        return fastattn.attention_with_kvcache(
            q[batch],
            k[batch, :, :capacity],
            v[batch, :, :capacity],
            key_lengths=lengths[batch],
            causal=True,
            return_lse=True,
            deterministic=True,
            backend="triton",
        )

    together = decode(slice(0, 3), 1200)
    for b in range(3):
        alone = decode(slice(b, b + 1), int(lengths[b]))
        assert all(torch.equal(a[0], t[b]) for a, t in zip(alone, together, strict=True))


@pytest.mark.parametrize("pages", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("shared", [False, True], ids=["own_values", "latent"])
def test_latent_attention(pages: bool, shared: bool) -> None:
    """MLA's 576 columns, 512 of them the values too: fails where the 64 behind those, or the shared read, are off."""
    q = draw(1, 16, 1, 576) / 5
    k = draw(1, 1, 128, 576) / 5
    v = k[..., :512] if shared else draw(1, 1, 128, 512)
    options = {"key_lengths": torch.tensor([71], device=DEVICE), "scale": 0.1}
    if pages:
        k, v = (t.view(1, 2, 64, t.shape[-1]).transpose(0, 1) for t in (k, v))
        options["block_table"] = torch.tensor([[0, 1]], device=DEVICE)
    found = fastattn.attention_with_kvcache(q, k, v, return_lse=True, backend="triton", **options)
    assert_like_reference(found, q, k, v, **options)


def test_head_dim_512() -> None:
    """Forward and backward of the widest head that trains; wider ones are refused where gradients are asked for."""
    leaves = [draw(1, 2, 70, 512).mul_(0.3).requires_grad_() for _ in range(3)]
    grad = draw(1, 2, 70, 512)
    found = fastattn.attention(*leaves, causal=True, backend="triton")
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = fastattn.attention(*wide, causal=True, backend="reference")
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(found, leaves, grad)
    for result, exact in zip(grads, torch.autograd.grad(truth, wide, grad.double()), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-4)
    beyond = [draw(1, 2, 70, 576).requires_grad_() for _ in range(3)]
    verdicts = {v.backend: v for v in fastattn.explain(*beyond)}
    assert "512 with gradients" in "; ".join(verdicts["triton"].reasons)
    with pytest.raises(fastattn.UnsupportedError, match="512 with gradients"):
        fastattn.attention(*beyond, backend="triton")
    with torch.no_grad():
        assert {v.backend: v for v in fastattn.explain(*beyond)}["triton"].supported


@pytest.mark.parametrize(("features", "widest"), [((), 576), (("backward",), 512), (("packed",), 512)])
def test_head_size_limits(features: tuple[str, ...], widest: int) -> None:
    """Fails where wider heads than there are tiles for are taken, or refused without naming what makes the limit."""
    table = triton.CAPABILITY
    for head_dim in (widest, widest + 1):
        needs = Requirements(DEVICE, torch.float32, head_dim, frozenset(features))
        reasons = "; ".join(backends.reasons_against(table, needs))
        assert bool(reasons) == (head_dim > widest)
        assert not reasons or all(text in reasons for text in (str(widest), *(FEATURES["dense"][f] for f in features)))


@pytest.mark.parametrize(("capability", "supported"), [((7, 5), False), ((8, 0), True), ((10, 3), True)])
def test_gpus_that_triton_no_longer_supports(
    capability: tuple[int, int], supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where a GPU before compute capability 8.0 is offered kernels that do not compile for it."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    triton_launch.compute_capability.cache_clear()
    try:
        needs = Requirements("cuda", torch.float16, 64, frozenset(), device_index=5)
        reasons = backends.reasons_against(triton.CAPABILITY, needs)
    finally:
        triton_launch.compute_capability.cache_clear()
    assert (reasons == ()) == supported
    assert supported or "compute capability 8.0, Some GPU has 7.5" in reasons[0]


def test_packed_sequences_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where sequences are launched one by one."""
    from fastattn.kernels import dense_forward

    launches = []

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]):
            launches.append(grid)
            return dense_forward_kernel[grid]

    dense_forward_kernel = dense_forward.forward_kernel
    monkeypatch.setattr(dense_forward, "forward_kernel", Spy())
    q, cu = draw(30, 2, 16), torch.tensor([0, 10, 12, 30], dtype=torch.int32, device=DEVICE)
    fastattn.attention_varlen(q, q, q, cu, cu, 18, 18, backend="triton")
    assert len(launches) == 1


def test_importing_fastattn_leaves_triton_alone() -> None:
    """Fails where `import fastattn`, or asking what could run, imports Triton."""
    code = (
        "import sys, torch, fastattn\n"
        "q = torch.zeros(1, 1, 2, 8)\n"
        "fastattn.explain(q, q, q)\n"
        "fastattn.attention(q, q, q)\n"
        "print([m for m in sys.modules if m == 'triton' or m.startswith('fastattn.kernels')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_cuda_graph() -> None:
    """Forward, backward and a decoding step replay from CUDA graphs with new contents."""
    leaves = [draw(2, 4, 128, 64, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    cache_k, cache_v = draw(2, 4, 512, 64, dtype=torch.bfloat16), draw(2, 4, 512, 64, dtype=torch.bfloat16)
    new = [draw(2, 4, 1, 64, dtype=torch.bfloat16) for _ in range(3)]
    lengths = torch.tensor([7, 300], device=DEVICE, dtype=torch.int32)

    def step() -> list[Tensor]:
        out = fastattn.attention(*leaves, causal=True, backend="triton")
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
        with torch.no_grad():
            decoded = fastattn.attention_with_kvcache(
                new[0], cache_k, cache_v, key=new[1], value=new[2], key_lengths=lengths, causal=True, backend="triton"
            )
        return [out.detach(), *grads, decoded]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compile and warm up outside the graph
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in (*leaves, *new):
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    torch.cuda.synchronize()
    replayed = [t.clone() for t in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))
