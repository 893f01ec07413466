"""One case of the grid on one backend, forward and backward, held to the accuracy bar."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from fastattn.backends import DELEGATE, FEATURES, Capability, capabilities
from fastattn.errors import UnsupportedError
from fastattn.verify.bar import allowed, finite, largest_error
from fastattn.verify.cases import Case
from fastattn.verify.inputs import Inputs, call, join, lay_out, make_inputs, poison, problems
from fastattn.verify.naive import naive_attention
from fastattn.verify.poison import poisoned_allocations


@dataclass(frozen=True)
class CaseResult:
    """How one backend did on one case.

    Attributes:
        errors: of "out", "lse", "grad_query", "grad_key", ...: largest error divided by the bar; at most 1 passes.
            Empty where the backend does not support the case.
        passed: every error is within its bar, or the backend refused as its capability table says.
        message: what went wrong, or how the backend refused.
    """

    case: Case
    backend: str
    dtype: torch.dtype
    errors: dict[str, float] = field(default_factory=dict)
    passed: bool = True
    message: str = ""

    @property
    def supported(self) -> bool:
        return bool(self.errors) or not self.passed

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)


@dataclass
class Expected:
    """What a result is held against, by quantity: the truth, the error allowed, and where it must be exactly zero."""

    truth: dict[str, Tensor]
    bar: dict[str, float]
    delegate_bar: dict[str, float]  # for PyTorch's own kernels
    zero: dict[str, Tensor]


def _differentiate(
    case: Case, results: tuple[Tensor, Tensor | None], inputs: Inputs, leaves: dict[str, Tensor]
) -> dict[str, Tensor]:
    out, lse = results
    found = {"out": out.detach()}
    if case.lse and lse is not None:
        found["lse"] = lse.detach()
    if not leaves:
        return found
    outputs, seeds = [out], [inputs.grad_out.to(out.dtype)]
    if case.lse and lse is not None:
        outputs, seeds = [out, lse], [*seeds, inputs.grad_lse.to(lse.dtype)]
    pairs = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in pairs],
        list(leaves.values()),
        [s for _, s in pairs],
        allow_unused=True,
        materialize_grads=True,
    )
    return found | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def run_backend(case: Case, inputs: Inputs, backend: str | None, seed: int) -> dict[str, Tensor]:
    """The public function, forward and backward; torch's generator is seeded first, so dropout repeats."""
    tensors, leaves = inputs.leaves(case)
    torch.manual_seed(seed)
    return _differentiate(case, call(case, tensors, backend), tensors, leaves)


def _kept(case: Case, inputs: Inputs, seed: int) -> list[Tensor] | None:
    if not case.dropout_p:
        return None
    from fastattn.dense.philox import draw_rng, dropout_keep

    torch.manual_seed(seed)
    rng = draw_rng(inputs.query.device)
    if case.packed is None:
        return [dropout_keep(rng, case.dropout_p, (case.batch, case.heads, case.q_len, case.k_len))]
    lengths = zip(*case.packed, strict=True)
    return [dropout_keep(rng, case.dropout_p, (1, case.heads, q, k), b) for b, (q, k) in enumerate(lengths)]


def run_naive(case: Case, inputs: Inputs, seed: int) -> dict[str, Tensor]:
    """Plain PyTorch math in the inputs' dtype, forward and backward by autograd."""
    tensors, leaves = inputs.leaves(case)
    parts = [
        naive_attention(p, scale=case.scale, softcap=case.softcap, dropout_p=case.dropout_p)
        for p in problems(case, tensors, _kept(case, inputs, seed))
    ]
    out = join(case, [out for out, _ in parts], rows_at=2)
    lse = join(case, [lse for _, lse in parts], rows_at=2)
    return _differentiate(case, (out, lse), tensors, leaves)


def _structural_zeros(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Where out and the gradients are zero by definition: rows that see no key, keys that no row sees."""
    rows, keys = [], []
    for p in problems(case, inputs):
        allowed = p.seen.expand(p.query.shape[0], p.query.shape[1], *p.seen.shape[2:])
        if p.mask is not None:
            allowed = allowed & (p.mask if p.mask.dtype == torch.bool else p.mask != -torch.inf)
        rows.append(~allowed.any(3)[..., None])
        keys.append(~allowed.any(2).unflatten(1, (case.hkv, -1)).any(2)[..., None])
    row, key = join(case, rows, rows_at=2), join(case, keys, rows_at=2)
    return {"out": row, "grad_query": row, "grad_key": key, "grad_value": key}


@lru_cache(maxsize=4)
def expected(case: Case, dtype: torch.dtype, device: str, seed: int) -> tuple[Inputs, Expected]:
    """Inputs of the case, the float64 truth and the bars; cached, because backends and instruction sets share them."""
    inputs = make_inputs(case, dtype, device, seed)
    truth = run_backend(case, inputs.to(torch.float64), "reference", seed)
    if dtype == torch.float64:
        errors = None
    else:
        plain = run_naive(case, inputs, seed)
        errors = {name: largest_error(finite(plain[name]), finite(exact)) for name, exact in truth.items()}
    _, lse = call(replace(case, lse=True), inputs.to(torch.float64), "reference")
    assert lse is not None
    bar, delegate_bar = (
        {name: allowed(case, inputs, truth, lse, name, errors, torchs) for name in truth} for torchs in (False, True)
    )
    return inputs, Expected(truth, bar, delegate_bar, _structural_zeros(case, inputs))


def missing_features(case: Case, dtype: torch.dtype, capability: Capability, device: str) -> list[str]:
    """How messages name what the case needs and the backend's table lacks."""
    lacking = sorted(case.features - capability.features)
    named = [FEATURES[name] for name in lacking if name not in ("bias_grad", "lse_grad")]
    if not capability.has_dtype(dtype, torch.device(device).type):
        named.append(str(dtype))
    # What refuses the forward hides what only the backward needs.
    return named or [FEATURES[name] for name in lacking]


def run_case(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu", seed: int = 0) -> CaseResult:
    """Run one case, forward and (unless it is forward only) backward, on a named backend and hold it to the bar.

    The bar is that of ``bar.allowed``. Keys and values outside the interval are NaN, and so is every buffer that the
    backend allocates. Where the backend's capability table lacks a feature of the case, the call must raise
    ``UnsupportedError`` naming it.

    Args:
        device: a torch device, as a string.
        seed: of the inputs and of the dropout.
    """
    capability = {c.backend: c for c in capabilities("dense")}[backend]
    lacking = missing_features(case, dtype, capability, device)
    if lacking:
        return _expect_refusal(case, dtype, backend, device, seed, lacking)
    inputs, wanted = expected(case, dtype, device, seed)
    truth, bar = wanted.truth, wanted.delegate_bar if backend == DELEGATE else wanted.bar
    if backend == "reference" and dtype == torch.float64:
        truth = run_naive(case, inputs, seed)  # or the reference would be its own judge
    try:
        with poisoned_allocations():
            found = run_backend(case, lay_out(case, poison(case, inputs)), backend, seed)
    except Exception as crash:  # a failed case, and the others still run
        return CaseResult(case, backend, dtype, {}, False, f"{type(crash).__name__}: {crash}")
    errors: dict[str, float] = {}
    trouble: list[str] = []
    for name, exact in truth.items():
        result = found[name]
        if result.shape != exact.shape:
            trouble.append(f"{name} has shape {tuple(result.shape)}, expected {tuple(exact.shape)}")
            errors[name] = float("inf")
            continue
        error = largest_error(result, exact)
        errors[name] = error / bar[name]
        if not errors[name] <= 1.0:
            trouble.append(f"{name}: error {error:.3g} is {errors[name]:.3g} times the bar {bar[name]:.3g}")
        zero = wanted.zero.get(name)
        if zero is not None and result.masked_select(zero).count_nonzero():
            trouble.append(f"{name} is not zero where no key is seen")
    if trouble:
        trouble.append(f"(case {case.name}, {dtype}, backend {backend}, seed {seed})")
    return CaseResult(case, backend, dtype, errors, not trouble, "; ".join(trouble))


def _expect_refusal(
    case: Case, dtype: torch.dtype, backend: str, device: str, seed: int, lacking: list[str]
) -> CaseResult:
    try:
        run_backend(case, lay_out(case, make_inputs(case, dtype, device, seed)), backend, seed)
    except UnsupportedError as error:
        unnamed = [feature for feature in lacking if feature not in str(error)]
        if unnamed:
            return CaseResult(case, backend, dtype, {}, False, f"{error} -- does not name {', '.join(unnamed)}")
        return CaseResult(case, backend, dtype, {}, True, f"not supported: {', '.join(lacking)}")
    except Exception as error:
        return CaseResult(case, backend, dtype, {}, False, f"expected UnsupportedError, got {error!r}")
    return CaseResult(case, backend, dtype, {}, False, f"ran although the table says no {', '.join(lacking)}")
