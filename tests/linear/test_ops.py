"""The linear family's ops inside PyTorch's machinery: compilers, autograd to any order, autocast, transforms.

Each test states what would make it fail; those that run attention do so on every backend that has what they need.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import verify
from fastattn.backends import capabilities
from fastattn.linear import LinearState, op, softmax_features
from fastattn.linear.problem import Gradients
from fastattn.verify.check import missing_features
from fastattn.verify.linear import call, make_inputs
from fastattn.verify.linear.cases import Case
from fastattn.verify.linear.inputs import Inputs

# Triton's kernels are the same ops; what only they can get wrong is in the contract, and their interpreter is slow.
BACKENDS = [backend for backend in verify.backends_on("cpu", family="linear") if backend != "triton"]
TABLES = {c.backend: c for c in capabilities("linear")}
# One of each kind of argument: with and without a denominator, decay, beta, projection, mask, state, boundaries.
NAMES = ("elu", "state_softmax_decay", "vector_decay", "delta_state", "key_mask_full", "packed_key_mask")

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def small(name: str) -> Case:
    """A case of the grid in a few steps."""
    case = replace(verify.find_case(name, "linear"), head_dim=4, value_dim=3, kv_heads=None)
    case = replace(case, q_len=7, num_features=case.num_features and 5, batch=2)
    return replace(case, k_len=case.k_len and 9, packed=case.packed and (4, 0, 3))


def every_case(*names: str, dtype: torch.dtype = torch.float32) -> Any:
    """Parametrise over backends and those cases that each can run."""
    pairs = [(b, n) for b in BACKENDS for n in names or NAMES]
    return pytest.mark.parametrize(
        ("backend", "name"), [p for p in pairs if not missing_features(small(p[1]), dtype, TABLES[p[0]], "cpu")]
    )


def prepared(name: str, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Case, Inputs, dict[str, Tensor]]:
    case = small(name)
    return case, *make_inputs(case, dtype, "cpu", seed).leaves(case)


def gradients(results: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    wanted = [r for r in results.values() if r.requires_grad]
    seeds = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in wanted]
    grads = torch.autograd.grad(wanted, list(leaves.values()), seeds, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def assert_equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


def problem(case: Case, inputs: Inputs, backend: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The problem that the public function makes of a case."""
    made = []
    monkeypatch.setattr(
        fastattn.linear.api, "linear_attention_op", lambda p: made.append(p) or op.linear_attention_op(p)
    )
    call(case, inputs, backend)
    return made[0]


@every_case()
def test_opcheck(backend: str, name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where an op writes or aliases an input, or fake and real disagree in shape, stride or dtype."""
    case, inputs, _ = prepared(name, seed)
    p = problem(case, inputs, backend, monkeypatch)
    args = tuple(a.detach() if isinstance(a, Tensor) else a for a in p.args())
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fastattn.linear_forward, args, test_utils=utils)
    out, denominator, kv, normalizer, _ = torch.ops.fastattn.linear_forward(*args)
    states = [torch.randn_like(t) if t.numel() else None for t in (kv, normalizer)]
    args = (out, denominator, torch.randn_like(out), *states, *args)
    torch.library.opcheck(torch.ops.fastattn.linear_backward, args, test_utils=utils)


@every_backend
@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "sliced", "expanded"])
def test_strides_are_those_of_the_fake(backend: str, layout: str, seed: int) -> None:
    """The output lies over (B, N, H, D) memory; fails where real and fake disagree on a stride, forward or backward."""
    case = replace(small("elu"), layout=layout, state_out=True)
    inputs = verify.check.FAMILIES["linear"].disguise(case, make_inputs(case, torch.float32, "cpu", seed))
    real = call(case, inputs, backend)
    names = ("query", "key", "value")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call(case, inputs.map(mode.from_tensor, *names), backend)
    for result, imagined in zip(real.values(), fake.values(), strict=True):
        assert (result.shape, result.stride(), result.dtype) == (imagined.shape, imagined.stride(), imagined.dtype)
    assert real["out"].transpose(1, 2).is_contiguous()


@every_case()
def test_compile_matches_eager(backend: str, name: str, seed: int) -> None:
    """Fails where tracing breaks the graph, or a compiled result or gradient has other bits than eager's."""
    case, inputs, leaves = prepared(name, seed)
    eager = call(case, inputs, backend)
    compiled = torch.compile(partial(call, case), fullgraph=True, backend="aot_eager")(inputs, backend)
    assert_equal(compiled, eager)
    assert compiled["out"].stride() == eager["out"].stride()
    assert_equal(gradients(compiled, leaves), gradients(eager, leaves))


@every_backend
def test_compile_of_self_attention(backend: str) -> None:
    """Fails where one tensor as query, key and value is more than tracing of an autograd Function can take."""
    x = torch.randn(2, 2, 9, 8, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        return fastattn.linear_attention(x, x, x, causal=True, feature_map="elu", backend=backend)

    eager, compiled = layer(x), torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert_equal(compiled, eager)
    grad = torch.randn_like(eager)
    # Three gradients are added up, in an order that is the compiler's.
    torch.testing.assert_close(torch.autograd.grad(compiled, x, grad), torch.autograd.grad(eager, x, grad))


@every_backend
def test_compile_with_dynamic_shapes(backend: str) -> None:
    """Fails where another length or batch size compiles again, breaks the graph or gets another result."""
    frames = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        frames.append(graph)
        return graph.forward

    def layer(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        out = fastattn.linear_attention(q, k, v, causal=True, feature_map="elu", decay=decay, backend=backend)
        return out.transpose(1, 2).flatten(2)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for batch, length in ((2, 10), (3, 70), (5, 33)):
        leaves = [torch.randn(batch, 4, length, 8, requires_grad=True) for _ in range(3)]
        leaves.append(torch.rand(batch, 4, length).neg().requires_grad_())
        eager, found = layer(*leaves), compiled(*leaves)
        assert_equal(found, eager)
        grad = torch.randn_like(eager)
        assert_equal(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(eager, leaves, grad))
    assert len(frames) == 1


def test_compile_with_inductor() -> None:
    """The default compiler, forward and backward, with work around the op that it fuses: fails where it breaks."""
    leaves = [torch.randn(2, 2, 20, 8, requires_grad=True) for _ in range(3)]
    projection = torch.randn(16, 8)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (
            fastattn.performer_attention(q * 1.5, k, v + 1, projection=projection, causal=True).transpose(1, 2).relu()
        )

    eager, compiled = layer(*leaves), torch.compile(layer, fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, eager)
    grad = torch.randn_like(eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves, grad), torch.autograd.grad(eager, leaves, grad))


def test_compile_a_decoding_step() -> None:
    """Fails where a step with a state compiles again for each token, or gets another result."""
    step = torch.compile(
        partial(fastattn.linear_attention_step, feature_map="elu"), fullgraph=True, backend="aot_eager"
    )
    compiled = eager = LinearState(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4))
    for _ in range(3):
        qkv = [torch.randn(1, 2, 4) for _ in range(3)]
        found, compiled = step(*qkv, compiled)
        exact, eager = fastattn.linear_attention_step(*qkv, eager, feature_map="elu")
        assert_equal(found, exact)
        assert_equal(tuple(compiled[:2]), tuple(eager[:2]))


@every_backend
def test_autocast(backend: str) -> None:
    """Fails where autocast does not cast q, k and v (gradients return in their own dtype), or casts the state."""
    leaves = [torch.randn(2, 2, 9, 8, requires_grad=True) for _ in range(3)]
    projection = torch.randn(16, 8)
    options: dict[str, Any] = {"causal": True, "return_state": True, "backend": backend}
    with torch.autocast("cpu", torch.bfloat16):
        out, state = fastattn.performer_attention(*leaves, projection=projection, **options)
    assert (out.dtype, state.kv.dtype, state.log_scale.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    low = [t.detach().bfloat16() for t in leaves]
    expected, same = fastattn.performer_attention(*low, projection=projection, **options)
    assert_equal(out, expected)
    assert_equal(tuple(state), tuple(same))
    with torch.autocast("cpu", torch.bfloat16):
        assert {g.dtype for g in torch.autograd.grad(out.float().sum(), leaves)} == {torch.float32}
        wide = [t.double() for t in leaves]
        assert fastattn.linear_attention(*wide, causal=True, feature_map="elu", backend=backend).dtype == torch.float64
        mapped = fastattn.linear_attention(*leaves, causal=True, feature_map=lambda x: x.exp(), backend=backend)
    assert mapped.dtype == torch.bfloat16  # though autocast computes exp in float32


@every_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(backend: str, reentrant: bool) -> None:
    """Fails where the forward that a checkpoint repeats, or its gradients, have other bits than the first."""
    leaves = [torch.randn(2, 2, 20, 8, requires_grad=True) for _ in range(3)]

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fastattn.linear_attention(q, k, v, causal=True, feature_map="elu", backend=backend).sin()

    plain = layer(*leaves)
    expected = torch.autograd.grad(plain.sum(), leaves)
    saved = checkpoint(layer, *leaves, use_reentrant=reentrant)
    assert_equal(saved, plain)
    saved.sum().backward()
    assert_equal(tuple(leaf.grad for leaf in leaves), expected)


@every_case(dtype=torch.float64)
def test_gradcheck(backend: str, name: str, seed: int) -> None:
    """Fails where first or second derivatives, through states too, differ from finite differences in float64."""
    case = replace(small(name), q_len=4, head_dim=2, value_dim=2, batch=1, heads=1)
    case = replace(case, num_features=case.num_features and 3, k_len=case.k_len and 3, packed=case.packed and (3, 0, 1))
    inputs, leaves = make_inputs(case, torch.float64, "cpu", seed).leaves(case)

    def results(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = call(case, replace(inputs, **dict(zip(leaves, tensors, strict=True))), backend)
        log_scale = found.pop("log_scale", None)
        if log_scale is not None:  # finite differences see it move, which by contract is a constant: multiplied back in
            found["kv"] = found["kv"] * log_scale.exp()[..., None, None]
            found["normalizer"] = found["normalizer"] * log_scale.exp()[..., None]
        return tuple(found.values())

    assert gradcheck(results, tuple(leaves.values()), fast_mode=True)
    assert gradgradcheck(results, tuple(leaves.values()), fast_mode=True)


@every_case("elu", "delta_state", dtype=torch.float64)
def test_double_backward(backend: str, name: str, seed: int) -> None:
    """Double backward in use: fails where the gradient of a squared gradient norm is not plain PyTorch's."""
    case, inputs, leaves = prepared(name, seed, torch.float64)

    def penalty(out: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(out.square().sum(), list(leaves.values()), create_graph=True)
        norm = torch.stack([g.square().sum() for g in grads]).sum()
        return torch.autograd.grad(norm, list(leaves.values()), materialize_grads=True)

    naive = verify.check.FAMILIES["linear"].NAIVE[0]
    torch.testing.assert_close(penalty(call(case, inputs, backend)["out"]), penalty(naive(case, inputs, 0)["out"]))


MAPS = {"elu": "elu", "softmax": softmax_features(torch.randn(6, 8))}


@pytest.mark.parametrize("feature_map", MAPS.values(), ids=MAPS.keys())
@pytest.mark.parametrize("causal", [False, True])
def test_forward_mode(causal: bool, feature_map: Any) -> None:
    """Fails where forward-mode AD is not the directional derivative (a finite difference), or a silent zero."""
    leaves = [torch.randn(2, 2, 9, 8, dtype=torch.float64) for _ in range(3)]
    tangents = [torch.randn_like(t) for t in leaves]
    apply = partial(fastattn.linear_attention, causal=causal, feature_map=feature_map)
    with forward_ad.dual_level():
        out = apply(*(forward_ad.make_dual(t, d) for t, d in zip(leaves, tangents, strict=True)))
        found = forward_ad.unpack_dual(out).tangent
    step = 1e-6
    ahead, behind = (apply(*(t + sign * step * d for t, d in zip(leaves, tangents, strict=True))) for sign in (1, -1))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)
    _, tangent = torch.func.jvp(apply, tuple(leaves), tuple(tangents))
    torch.testing.assert_close(tangent, found)


@pytest.mark.parametrize("feature_map", MAPS.values(), ids=MAPS.keys())
def test_func_grad_and_vmap(feature_map: Any) -> None:
    """Fails where torch.func.grad is not autograd's, vmap over a new axis no loop, or per-sample gradients neither."""
    stacked = [torch.randn(3, 2, 2, 9, 8) for _ in range(3)]
    apply = partial(fastattn.linear_attention, causal=True, feature_map=feature_map)
    torch.testing.assert_close(
        torch.vmap(apply)(*stacked), torch.stack([apply(*t) for t in zip(*stacked, strict=True)])
    )
    per_sample = torch.vmap(torch.func.grad(lambda q, k, v: apply(q, k, v).square().sum()))
    expected = []
    for q, k, v in zip(*stacked, strict=True):
        query = q.clone().requires_grad_()
        expected.append(torch.autograd.grad(apply(query, k, v).square().sum(), query)[0])
    torch.testing.assert_close(per_sample(*stacked), torch.stack(expected))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if "transforms" not in TABLES[b].features])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transform_of_a_backend_without_them(backend: str, transform: str) -> None:
    """Fails where a kernel that no transform sees through, when named, returns garbage instead of saying so."""
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    apply = partial(fastattn.linear_attention, causal=True, feature_map="elu", backend=backend)
    transformed = {
        "vmap": lambda: torch.vmap(apply)(*(t[None] for t in (q, k, v))),
        "grad": lambda: torch.func.grad(lambda q: apply(q, k, v).sum())(q),
        "jvp": lambda: torch.func.jvp(lambda q: apply(q, k, v), (q,), (q,)),
    }[transform]
    with pytest.raises(fastattn.UnsupportedError, match=r"torch\.func"):
        transformed()


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "nothing requires a gradient"])
def test_autograd_is_skipped_where_nothing_needs_it(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a call without gradients enters the autograd.Function, which costs several microseconds."""
    monkeypatch.setattr(op._LinearAttention, "apply", lambda *_: pytest.fail("the autograd.Function was entered"))
    leaves = [torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3)]
    apply = partial(fastattn.linear_attention, causal=True, feature_map="elu")
    match how:
        case "no_grad":
            with torch.no_grad():
                out = apply(*leaves)
        case "inference_mode":
            with torch.inference_mode():
                out = apply(*leaves)
        case _:
            out = apply(*(t.detach() for t in leaves))
    assert not out.requires_grad


@every_case("state_decay", "delta_state")
def test_one_input_alone_requires_a_gradient(backend: str, name: str, seed: int) -> None:
    """Fails where a gradient depends on which others are asked for, or an unasked one is filled in."""
    case, inputs, leaves = prepared(name, seed)
    together = gradients(call(case, inputs, backend), leaves)
    assert set(leaves) <= set(Gradients._fields)
    for wanted in leaves:
        alone = {n: t.detach().requires_grad_(n == wanted) for n, t in leaves.items()}
        found = gradients(call(case, replace(inputs, **alone), backend), {wanted: alone[wanted]})
        assert_equal(found[wanted], together[wanted])


@every_case("state_decay", "state_softmax", "delta_state")
def test_gradient_of_one_result_alone(backend: str, name: str, seed: int) -> None:
    """Fails where the absent gradient of the output, the state or the normaliser is not taken for zero."""
    case, inputs, leaves = prepared(name, seed)
    results = {n: t for n, t in call(case, inputs, backend).items() if t.requires_grad}
    together = torch.autograd.grad(
        list(results.values()),
        list(leaves.values()),
        [torch.ones_like(t) for t in results.values()],
        retain_graph=True,
        materialize_grads=True,
    )
    alone = [
        torch.autograd.grad(t.sum(), list(leaves.values()), retain_graph=True, materialize_grads=True)
        for t in results.values()
    ]
    for whole, *parts in zip(together, *alone, strict=True):
        torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-4, atol=1e-4)


@every_backend
@pytest.mark.parametrize("kind", ["transposed", "expanded", "sliced", "scalar"])
def test_gradient_of_any_strides(backend: str, kind: str, seed: int) -> None:
    """Fails where the backward misreads the strides of a gradient that it is given (expanded ones have stride 0)."""
    case, inputs, leaves = prepared("state_decay", seed)
    results = call(case, inputs, backend)

    def strided(result: Tensor) -> Tensor:
        match kind:
            case "transposed":
                return torch.randn(result.shape[::-1]).permute(*reversed(range(result.ndim)))
            case "expanded":
                return torch.randn(1, *result.shape[1:-1], 1).expand(result.shape)
            case "sliced":
                wider = torch.randn([size + 3 for size in result.shape])
                return wider[tuple(slice(1, size + 1) for size in result.shape)]
        return torch.tensor(2.0).expand(result.shape)

    grads = [strided(r) for r in results.values()]
    tensors = (list(results.values()), list(leaves.values()))
    found = torch.autograd.grad(*tensors, grads, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(*tensors, [g.contiguous() for g in grads]))


@every_backend
def test_saved_tensors_cannot_be_changed_unseen(backend: str) -> None:
    """Fails where an input modified in place between forward and backward does not raise."""
    leaves = [torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3)]
    key = leaves[1] * 1.0
    out = fastattn.linear_attention(leaves[0], key, leaves[2], causal=True, feature_map="elu", backend=backend)
    key.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@every_case()
def test_meta_tensors(backend: str, name: str, seed: int) -> None:
    """Shape inference on the meta device: fails where something is computed, or a shape or dtype differs."""
    case, inputs, _ = prepared(name, seed)
    if case.packed is not None:
        return  # the boundaries are on the CPU
    real = call(case, inputs, backend)
    fake = call(case, inputs.map(lambda t: t.to("meta"), *(n for n in vars(inputs))), None)
    for key, result in real.items():
        assert fake[key].device.type == "meta"
        assert (fake[key].shape, fake[key].dtype) == (result.shape, result.dtype)


@every_backend
def test_no_packed_sequence_at_all(backend: str) -> None:
    """Fails where rows that belong to no sequence, all of them, are not zero, or the states not none."""
    q, k, v = (torch.full((1, 2, 5, 4), torch.nan, requires_grad=True) for _ in range(3))
    out, state = fastattn.linear_attention(
        q, k, v, causal=True, feature_map="elu", cu_seqlens=torch.tensor([0]), return_state=True, backend=backend
    )
    assert torch.equal(out, torch.zeros_like(out))
    assert state.kv.shape == (0, 2, 4, 4)
    for grad in torch.autograd.grad(out.sum() + state.kv.sum(), (q, k, v), materialize_grads=True):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_explain_agrees_with_what_runs() -> None:
    """Fails where `explain` calls a backend able that then refuses, or the other way round."""
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    options: dict[str, Any] = {"causal": True, "feature_map": "identity", "normalize": False}
    options["decay"] = -torch.rand(1, 2, 5, 4)
    verdicts = fastattn.linear.explain(q, k, v, **options)
    assert [v.backend for v in verdicts] == list(TABLES)
    assert sum(v.selected for v in verdicts) == 1
    for verdict in verdicts:
        if verdict.supported:
            fastattn.linear_attention(q, k, v, backend=verdict.backend, **options)
            continue
        with pytest.raises(fastattn.UnsupportedError) as refusal:
            fastattn.linear_attention(q, k, v, backend=verdict.backend, **options)
        assert all(reason in str(refusal.value) for reason in verdict.reasons)


def test_a_backend_without_the_backward_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a named backend that lacks the backward runs the forward first, or explain does not count it."""
    from fastattn import backends

    table = replace(TABLES["reference"], features=TABLES["reference"].features - {"backward"})
    monkeypatch.setattr(backends, "_modules", lambda family: {"reference": (table, fastattn.linear.reference)})
    backends.select.cache_clear()
    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    try:
        (verdict,) = fastattn.linear.explain(q, k, v, causal=True, feature_map="elu")
        assert "gradients" in verdict.reasons[0]
        with pytest.raises(fastattn.UnsupportedError, match="gradients"):
            fastattn.linear_attention(q, k, v, causal=True, feature_map="elu", backend="reference")
        with torch.no_grad():
            fastattn.linear_attention(q, k, v, causal=True, feature_map="elu", backend="reference")
    finally:
        backends.select.cache_clear()
