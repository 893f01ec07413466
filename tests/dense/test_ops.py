"""The registered ops inside PyTorch's machinery: compilers, autograd to any order, autocast, checkpoints, transforms.

Each test states what would make it fail; those that run attention do so on every backend of this machine.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import verify
from fastattn.backends import capabilities
from fastattn.dense import op
from fastattn.dense.api import problem_of

BACKENDS = verify.backends_on("cpu", own=True)  # PyTorch's own attention: test_delegate.py
TABLES = {c.backend: c for c in capabilities("dense")}

every_backend = pytest.mark.parametrize("backend", BACKENDS)
in_float64 = pytest.mark.parametrize("backend", verify.backends_on("cpu", torch.float64, own=True))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Dynamo counts recompilations of a function over the whole process; each test is to count its own."""
    torch._dynamo.reset()


def random_qkv(
    q_len: int = 10, k_len: int = 14, dtype: torch.dtype = torch.float32, heads: int = 4, kv_heads: int = 2
) -> list[Tensor]:
    return [
        torch.randn(2, heads, q_len, 8, dtype=dtype, requires_grad=True),
        torch.randn(2, kv_heads, k_len, 8, dtype=dtype, requires_grad=True),
        torch.randn(2, kv_heads, k_len, 6, dtype=dtype, requires_grad=True),
    ]


OPTIONS: dict[str, Any] = {
    "causal": {"causal": True},
    "window_lengths": {"window": (4, 2), "key_lengths": torch.tensor([14, 5]), "query_start": torch.tensor([3, 0])},
    "bias": {"attn_mask": torch.randn(4, 1, 14)},
    "bool": {"attn_mask": torch.rand(2, 1, 10, 14) < 0.7},
}
EXTRAS: dict[str, Any] = {
    "softcap_alibi_sinks": {"softcap": 3.0, "alibi_slopes": torch.rand(4), "sinks": torch.randn(4)},
    "dropout": {"dropout_p": 0.25},
}


def every_option(*names: str, dtype: torch.dtype = torch.float32) -> Any:
    """Parametrise over the backends that run in the dtype and those options they support."""
    chosen = {name: value for name, value in (OPTIONS | EXTRAS).items() if not names or name in names}
    pairs = [
        (b, n)
        for b in verify.backends_on("cpu", dtype, own=True)
        for n in chosen
        if n in OPTIONS or "softcap" in TABLES[b].features
    ]
    return pytest.mark.parametrize(("backend", "option"), pairs)


def chosen(option: str) -> dict[str, Any]:
    return (OPTIONS | EXTRAS)[option]


def gradients(results: Tensor | tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    results = (results,) if isinstance(results, Tensor) else results
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
    return torch.autograd.grad(results, leaves, seeds)


def assert_equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


@every_option("causal", "bias", "dropout")
def test_opcheck(backend: str, option: str) -> None:
    """Fails where an op writes or aliases an input, or fake and real disagree in shape, stride or dtype."""
    q, k, v = (t.detach() for t in random_qkv())
    p = problem_of(q, k, v, backend=backend, **chosen(option))
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fastattn.dense_forward, p.args(), test_utils=utils)
    out, lse = torch.ops.fastattn.dense_forward(*p.args())
    for grad_lse in (None, torch.randn_like(lse)):
        mask_grad = option == "bias"
        args = (out, lse, torch.randn_like(out), grad_lse, mask_grad, *p.args())
        torch.library.opcheck(torch.ops.fastattn.dense_backward, args, test_utils=utils)


@every_backend
@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sliced", "expanded"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_strides_are_those_of_the_fake(backend: str, layout: str, packed: bool) -> None:
    """The output lies over (B, S, H, D) memory; real and fake agree on every stride, forward and backward."""
    q, k, v = (t.detach() for t in random_qkv(q_len=14, kv_heads=4))
    match layout:
        case "bshd":
            q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
        case "sliced":
            q, k, v = (torch.randn(2, 4, 20, 9)[:, :, 3:17, 1:] for _ in range(3))
        case "expanded":
            q, k, v = q, k[:1].expand_as(k), v[:, :1].expand_as(v)
    if packed:
        q, k, v = (t[:1].transpose(1, 2)[0] for t in (q, k, v))
        cu = torch.tensor([0, 6, 14], dtype=torch.int32)
        call = partial(fastattn.attention_varlen, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=8, max_seqlen_k=8)
    else:
        call = fastattn.attention
    real = call(q, k, v, return_lse=True, backend=backend)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call(*(mode.from_tensor(t) for t in (q, k, v)), return_lse=True, backend=backend)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)
    assert real[0].is_contiguous() if packed else real[0].transpose(1, 2).is_contiguous()
    if not packed:
        p = problem_of(q, k, v, backend=backend)
        args = (*torch.ops.fastattn.dense_forward(*p.args()), torch.randn_like(real[0]), None, False, *p.args())
        real_grads = torch.ops.fastattn.dense_backward(*args)
        with torch._subclasses.FakeTensorMode() as mode:
            fake_args = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
            fake_grads = torch.ops.fastattn.dense_backward(*fake_args)
        assert [g.stride() for g in real_grads] == [g.stride() for g in fake_grads]


@every_option()
def test_compile_matches_eager(backend: str, option: str) -> None:
    """Fails where tracing breaks the graph, or the compiled output or a gradient has other bits than eager's."""
    leaves = random_qkv()
    options = dict(chosen(option))
    if option == "bias":
        options["attn_mask"] = options["attn_mask"].clone().requires_grad_()
        leaves.append(options["attn_mask"])
    call = partial(fastattn.attention, return_lse=True, backend=backend)
    torch.manual_seed(5)
    eager = call(*leaves[:3], **options)
    compiled_call = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    compiled = compiled_call(*leaves[:3], **options)
    assert_equal(compiled, eager)
    assert compiled[0].stride() == eager[0].stride()
    assert_equal(gradients(compiled, leaves), gradients(eager, leaves))


@every_backend
def test_compile_with_dynamic_shapes(backend: str) -> None:
    """Fails where another length or batch size compiles again, breaks the graph or gets another result."""
    frames = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        frames.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = fastattn.attention(q, k, v, causal=True, window=(5, None), backend=backend)
        return out.transpose(1, 2).flatten(2)

    for q_len, k_len in ((10, 14), (7, 33), (21, 21)):
        leaves = random_qkv(q_len, k_len)
        eager = fastattn.attention(*leaves, causal=True, window=(5, None), backend=backend)
        eager = eager.transpose(1, 2).flatten(2)
        compiled = layer(*leaves)
        assert_equal(compiled, eager)
        assert_equal(gradients(compiled, leaves), gradients(eager, leaves))
    assert len(frames) <= 2  # the square case may specialise


def test_compile_with_inductor() -> None:
    """The default compiler, forward and backward, with work around the op that it fuses."""
    leaves = random_qkv()

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.attention(q * 1.5, k, v + 1, causal=True).transpose(1, 2).flatten(2).relu()

    eager, compiled = layer(*leaves), torch.compile(layer, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradients(compiled, leaves), gradients(eager, leaves))


def test_compile_varlen() -> None:
    """Packed sequences trace too, whatever their boundaries hold."""
    cu = torch.tensor([0, 4, 10], dtype=torch.int32)
    q, k, v = (torch.randn(10, 2, 8, requires_grad=True) for _ in range(3))
    call = partial(fastattn.attention_varlen, max_seqlen_q=6, max_seqlen_k=6, causal=True)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for boundary in (4, 5):
        cu = torch.tensor([0, boundary, 10], dtype=torch.int32)
        eager, found = call(q, k, v, cu, cu), compiled(q, k, v, cu, cu)
        assert_equal(found, eager)
        assert_equal(gradients(found, [q, k, v]), gradients(eager, [q, k, v]))


@pytest.mark.parametrize("backend", verify.backends_on("cpu", torch.bfloat16, torch.float64, own=True))
def test_autocast(backend: str) -> None:
    """Fails where autocast does not cast q, k and v (gradients return in their own dtype), or casts more."""
    q, k, v = random_qkv()
    bias = torch.randn(10, 14, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = fastattn.attention(q, k, v, attn_mask=bias, return_lse=True, backend=backend)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    low = [t.detach().bfloat16() for t in (q, k, v)]
    assert_equal(out, fastattn.attention(*low, attn_mask=bias, backend=backend))
    grads = torch.autograd.grad(out.float().sum(), [q, k, v, bias])
    assert {g.dtype for g in grads} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert fastattn.attention(*(t.double() for t in (q, k, v)), backend=backend).dtype == torch.float64
        mixed = fastattn.attention(q.bfloat16(), k, v, backend=backend)  # autocast evens them out
        assert mixed.dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_replays_dropout(reentrant: bool) -> None:
    """Fails where the recomputed forward of a checkpoint drops other weights than the first one did."""
    leaves = random_qkv()

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, dropout_p=0.5, causal=True).sin()

    torch.manual_seed(11)
    plain = layer(*leaves)
    expected = torch.autograd.grad(plain.sum(), leaves)
    torch.manual_seed(11)
    saved = checkpoint(layer, *leaves, use_reentrant=reentrant)
    assert_equal(saved, plain)
    for leaf in leaves:
        leaf.grad = None
    torch.randn(3)  # moves the generator on; the replay must not start here
    saved.sum().backward()
    assert_equal(tuple(leaf.grad for leaf in leaves), expected)


DIFFERENTIABLE = ["causal", "window_lengths", "bias", "softcap_alibi_sinks"]


@every_option(*DIFFERENTIABLE, dtype=torch.float64)
def test_gradcheck(backend: str, option: str) -> None:
    """First and second derivatives against finite differences in float64, LSE included."""
    leaves = [t.detach()[..., :3, :2].clone().requires_grad_() for t in random_qkv(5, 14, torch.float64)]
    options = {
        n: (t.double() if isinstance(t, Tensor) and t.is_floating_point() else t) for n, t in chosen(option).items()
    }
    names = [n for n in ("attn_mask", "sinks") if n in options]
    for name in names:
        options[name] = options[name][..., :3].clone() if name == "attn_mask" else options[name].clone()
        leaves.append(options[name].requires_grad_())
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor([3, 1])

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        given = options | dict(zip(names, rest, strict=True))
        out, lse = fastattn.attention(q, k, v, return_lse=True, backend=backend, **given)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert gradcheck(call, leaves, fast_mode=True)
    assert gradgradcheck(call, leaves, fast_mode=True)


@in_float64
def test_gradient_penalty(backend: str) -> None:
    """Double backward in use: the gradient of a squared gradient norm equals plain PyTorch's."""
    leaves = random_qkv(dtype=torch.float64, kv_heads=4)

    def penalty(out: Tensor) -> tuple[Tensor, ...]:
        (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaves)

    found = penalty(fastattn.attention(*leaves, backend=backend))
    expected = penalty(torch.softmax(leaves[0] @ leaves[1].mT / math.sqrt(8), -1) @ leaves[2])
    torch.testing.assert_close(found, expected)


def test_flop_counter() -> None:
    """2 * (D + Dv) a pair of query and key forward; backward adds the scores again and four products."""
    q, k, v = random_qkv()
    pairs = 2 * 4 * 10 * 14
    with FlopCounterMode(display=False) as counter:
        out = fastattn.attention(q, k, v)
    assert counter.get_total_flops() == 2 * pairs * (8 + 6)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (3 * 8 + 2 * 6)


def test_flop_counter_of_packed_sequences() -> None:
    """Only pairs within a sequence count."""
    cu = torch.tensor([0, 4, 10], dtype=torch.int32)
    x = torch.randn(10, 2, 8)
    with FlopCounterMode(display=False) as counter:
        fastattn.attention_varlen(x, x, x, cu, cu, 6, 6)
    assert counter.get_total_flops() == 2 * 2 * (16 + 36) * (8 + 8)


def test_forward_mode() -> None:
    """Forward-mode AD gives the directional derivative (against a finite difference), never a silent zero."""
    leaves = [t.detach() for t in random_qkv(dtype=torch.float64)]
    tangents = [torch.randn_like(t) for t in leaves]
    call = partial(fastattn.attention, causal=True)
    with forward_ad.dual_level():
        out = call(*(forward_ad.make_dual(t, d) for t, d in zip(leaves, tangents, strict=True)))
        found = forward_ad.unpack_dual(out).tangent
    step = 1e-6
    ahead, behind = (call(*(t + sign * step * d for t, d in zip(leaves, tangents, strict=True))) for sign in (1, -1))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)
    _, tangent = torch.func.jvp(call, tuple(leaves), tuple(tangents))
    torch.testing.assert_close(tangent, found)


def test_func_grad_and_vmap() -> None:
    """torch.func.grad equals autograd; vmap over a new axis equals a loop; per-sample gradients, their product, too."""
    leaves = random_qkv()
    plain = torch.autograd.grad(fastattn.attention(*leaves).square().sum(), leaves)
    detached = [t.detach() for t in leaves]
    found = torch.func.grad(lambda *t: fastattn.attention(*t).square().sum(), argnums=(0, 1, 2))(*detached)
    torch.testing.assert_close(found, plain)
    stacked = [torch.randn(3, *t.shape) for t in detached]
    looped = torch.stack([fastattn.attention(*(t[n] for t in stacked)) for n in range(3)])
    torch.testing.assert_close(torch.vmap(fastattn.attention)(*stacked), looped)
    per_sample = torch.vmap(torch.func.grad(lambda q, k, v: fastattn.attention(q, k, v).square().sum()))
    expected = []
    for n in range(3):
        q, k, v = (t[n].clone().requires_grad_() for t in stacked)
        expected.append(torch.autograd.grad(fastattn.attention(q, k, v).square().sum(), q)[0])
    torch.testing.assert_close(per_sample(*stacked), torch.stack(expected))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native extension")
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transform_of_a_backend_without_them(transform: str) -> None:
    """A kernel that no transform sees through says so when named, instead of returning garbage."""
    q, k, v = (t.detach() for t in random_qkv())
    call = partial(fastattn.attention, backend="cpu")
    transformed = {
        "vmap": lambda: torch.vmap(call)(*(t[None] for t in (q, k, v))),
        "grad": lambda: torch.func.grad(lambda q: call(q, k, v).sum())(q),
        "jvp": lambda: torch.func.jvp(lambda q: call(q, k, v), (q,), (q,)),
    }[transform]
    with pytest.raises(fastattn.UnsupportedError, match=r"torch\.func"):
        transformed()


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "nothing requires a gradient"])
def test_autograd_is_skipped_where_nothing_needs_it(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a call without gradients enters the autograd.Function, which costs several microseconds."""
    monkeypatch.setattr(op._Attention, "apply", lambda *_: pytest.fail("the autograd.Function was entered"))
    leaves = random_qkv()
    match how:
        case "no_grad":
            with torch.no_grad():
                out = fastattn.attention(*leaves)
        case "inference_mode":
            with torch.inference_mode():
                out = fastattn.attention(*leaves)
        case _:
            out = fastattn.attention(*(t.detach() for t in leaves))
    assert not out.requires_grad


@every_backend
@pytest.mark.parametrize("wanted", ["query", "key", "value", "attn_mask"])
def test_one_input_alone_requires_a_gradient(backend: str, wanted: str) -> None:
    """Fails where a gradient depends on which others are asked for, or an unasked one is filled in."""
    tensors = dict(zip(("query", "key", "value"), random_qkv(), strict=True))
    tensors["attn_mask"] = torch.randn(4, 10, 14, requires_grad=True)
    together = gradients(fastattn.attention(**tensors, backend=backend), list(tensors.values()))
    alone = {name: t.detach().requires_grad_(name == wanted) for name, t in tensors.items()}
    (found,) = gradients(fastattn.attention(**alone, backend=backend), [alone[wanted]])
    assert_equal(found, together[list(tensors).index(wanted)])
    assert all(t.grad is None for t in alone.values())


@in_float64
def test_gradient_of_lse_alone_or_output_alone(backend: str) -> None:
    """Fails where an absent gradient of one result is not taken for zero."""
    leaves = random_qkv(dtype=torch.float64, kv_heads=4)
    out, lse = fastattn.attention(*leaves, return_lse=True, backend=backend)
    expected_lse = torch.logsumexp(leaves[0] @ leaves[1].mT / math.sqrt(8), -1)
    torch.testing.assert_close(lse, expected_lse)
    for found, exact in (
        (lse, expected_lse),
        (out, torch.softmax(leaves[0] @ leaves[1].mT / math.sqrt(8), -1) @ leaves[2]),
    ):
        grads = torch.autograd.grad(found.sin().sum(), leaves, retain_graph=True, materialize_grads=True)
        truth = torch.autograd.grad(exact.sin().sum(), leaves, retain_graph=True, materialize_grads=True)
        torch.testing.assert_close(grads, truth)


@every_backend
@pytest.mark.parametrize("kind", ["transposed", "expanded", "sliced", "scalar"])
def test_gradient_of_any_strides(backend: str, kind: str) -> None:
    """Fails where the backward misreads the strides of the gradient it is given (expanded ones have stride 0)."""
    leaves = random_qkv()
    out, lse = fastattn.attention(*leaves, causal=True, return_lse=True, backend=backend)
    grad_lse = torch.randn(*lse.shape[::-1]).permute(2, 1, 0)
    match kind:
        case "transposed":
            grad = torch.randn(6, 10, 4, 2).permute(3, 2, 1, 0)
        case "expanded":
            grad = torch.randn(1, 4, 1, 6).expand(2, 4, 10, 6)
        case "sliced":
            grad = torch.randn(2, 4, 13, 9)[:, :, 2:12, 2:8]
        case _:
            grad, grad_lse = torch.tensor(2.0).expand(out.shape), torch.tensor(0.5).expand(lse.shape)
    found = torch.autograd.grad([out, lse], leaves, [grad, grad_lse], retain_graph=True)
    expected = torch.autograd.grad([out, lse], leaves, [grad.contiguous(), grad_lse.contiguous()])
    torch.testing.assert_close(found, expected)


@every_backend
def test_saved_tensors_cannot_be_changed_unseen(backend: str) -> None:
    """An input modified in place between forward and backward raises, as it does in PyTorch's own functions."""
    q, k, v = random_qkv()
    key = k * 1.0
    out = fastattn.attention(q, key, v, backend=backend)
    key.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_meta_tensors() -> None:
    """Shape inference on the meta device: nothing is computed."""
    q, k, v = (t.detach().to("meta") for t in random_qkv())
    out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True)
    assert (out.device.type, out.shape, lse.shape) == ("meta", (2, 4, 10, 6), (2, 4, 10))
