"""One case of a family's grid on one backend, forward and backward, held to the accuracy bar."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastattn.backends import FEATURES, Capability, capabilities
from fastattn.errors import UnsupportedError
from fastattn.verify import dense, linear
from fastattn.verify.bar import accumulator_of, finite, largest_error
from fastattn.verify.family import Case, Family, Inputs
from fastattn.verify.poison import poisoned_allocations

# Their backward sums each score in the order in which the forward did. Triton's products are of other shapes there, and
# how PyTorch's own kernels sum is theirs to choose.
IN_ORDER = ("cpu", "reference")

FAMILIES: dict[str, Family] = {"dense": dense, "linear": linear}


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
    reordered_bar: dict[str, float]  # for backends that are not IN_ORDER
    zero: dict[str, Tensor]


def _differentiate(results: dict[str, Tensor], inputs: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results and the gradient of every leaf, from the gradients of the results that the inputs hold."""
    found = {name: result.detach() for name, result in results.items()}
    if not leaves:
        return found
    outputs = {name: result for name, result in results.items() if result.requires_grad}
    grads = torch.autograd.grad(
        list(outputs.values()),
        list(leaves.values()),
        [getattr(inputs, f"grad_{name}").to(result.dtype) for name, result in outputs.items()],
        allow_unused=True,
        materialize_grads=True,
    )
    return found | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def run_backend(case: Case, inputs: Inputs, backend: str | None, seed: int) -> dict[str, Tensor]:
    """The public function, forward and backward; torch's generator is seeded first, so dropout repeats."""
    tensors, leaves = inputs.leaves(case)
    torch.manual_seed(seed)
    return _differentiate(FAMILIES[case.family].call(case, tensors, backend), tensors, leaves)


def run_naive(case: Case, inputs: Inputs, seed: int, form: int = 0) -> dict[str, Tensor]:
    """Plain PyTorch math in the inputs' dtype, forward and backward by autograd. In float64 the first is the truth."""
    tensors, leaves = inputs.leaves(case)
    return _differentiate(FAMILIES[case.family].NAIVE[form](case, tensors, seed), tensors, leaves)


def _errors(results: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: largest_error(finite(results[name]), finite(exact)) for name, exact in truth.items()}


@lru_cache(maxsize=4)
def expected(case: Case, dtype: torch.dtype, device: str, seed: int) -> tuple[Inputs, Expected]:
    """Inputs of the case, the float64 truth and the bars; cached, because backends and instruction sets share them."""
    family = FAMILIES[case.family]
    inputs = family.make_inputs(case, dtype, device, seed)
    truth = run_naive(case, inputs.to(torch.float64), seed)
    errors = dict.fromkeys(truth, 0.0)
    for form in range(len(family.NAIVE)):
        found = _errors(run_naive(case, inputs, seed, form), truth)
        if math.inf in found.values():  # beyond the range of the dtype: who writes it by hand takes a wider one
            found = _errors(run_naive(case, inputs.to(accumulator_of(dtype)), seed, form), truth)
        errors = {name: max(error, found[name]) for name, error in errors.items()}
    bar, reordered_bar = (family.allowed(case, inputs, truth, errors, reordered) for reordered in (False, True))
    return inputs, Expected(truth, bar, reordered_bar, family.zeros(case, inputs))


def missing_features(case: Case, dtype: torch.dtype, capability: Capability, device: str) -> list[str]:
    """How messages name what the case needs and the backend's table lacks."""
    names = FEATURES[case.family]
    lacking = sorted(case.features - capability.features)
    named = [names[name] for name in lacking if name not in ("bias_grad", "lse_grad")]
    if not capability.has_dtype(dtype, torch.device(device).type):
        named.append(str(dtype))
    # What refuses the forward hides what only the backward needs.
    return named or [names[name] for name in lacking]


def run_case(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu", seed: int = 0) -> CaseResult:
    """Run one case, forward and (unless it is forward only) backward, on a named backend and hold it to the bar.

    The bar is that of the family's ``allowed``. What no result may depend on is NaN (keys and values outside the
    interval or masked), and so is every buffer that the backend allocates. Where the backend's capability table lacks a
    feature of the case, the call must raise ``UnsupportedError`` naming it.

    Args:
        device: a torch device, as a string.
        seed: of the inputs and of the dropout.
    """
    capability = {c.backend: c for c in capabilities(case.family)}[backend]
    lacking = missing_features(case, dtype, capability, device)
    if lacking:
        return _expect_refusal(case, dtype, backend, device, seed, lacking)
    inputs, wanted = expected(case, dtype, device, seed)
    bar = wanted.bar if backend in IN_ORDER else wanted.reordered_bar
    try:
        with poisoned_allocations():
            found = run_backend(case, FAMILIES[case.family].disguise(case, inputs), backend, seed)
    except Exception as crash:  # a failed case, and the others still run
        return CaseResult(case, backend, dtype, {}, False, f"{type(crash).__name__}: {crash}")
    errors: dict[str, float] = {}
    trouble: list[str] = []
    for name, exact in wanted.truth.items():
        result = found[name]
        if result.shape != exact.shape:
            trouble.append(f"{name} has shape {tuple(result.shape)}, expected {tuple(exact.shape)}")
            errors[name] = math.inf
            continue
        error = largest_error(result, exact)
        errors[name] = error / bar[name] if math.isfinite(bar[name]) else math.inf
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
    family = FAMILIES[case.family]
    try:
        run_backend(case, family.disguise(case, family.make_inputs(case, dtype, device, seed)), backend, seed)
    except UnsupportedError as error:
        unnamed = [feature for feature in lacking if feature not in str(error)]
        if unnamed:
            return CaseResult(case, backend, dtype, {}, False, f"{error} -- does not name {', '.join(unnamed)}")
        return CaseResult(case, backend, dtype, {}, True, f"not supported: {', '.join(lacking)}")
    except Exception as error:
        return CaseResult(case, backend, dtype, {}, False, f"expected UnsupportedError, got {error!r}")
    return CaseResult(case, backend, dtype, {}, False, f"ran although the table says no {', '.join(lacking)}")
