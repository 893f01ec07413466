"""What each backend can do, and which one runs a problem.

A backend of a family declares one `Capability`. Selection, `explain`, error messages, the support matrix and the grid
that the tests walk are all derived from it; nothing else in the package says what a backend supports.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType

import torch

from fastattn.errors import UnsupportedError

# family -> backend -> the module that declares its CAPABILITY and launches it; in selection order
FAMILIES = {
    "dense": {"cpu": "fastattn.dense.native", "reference": "fastattn.dense.reference"},
}

# feature -> how messages and the support matrix name it
FEATURES = {
    "backward": "gradients",
    "causal": "causal",
    "window": "window",
    "query_start": "query_start per sequence",
    "key_start": "key_start",
    "key_lengths": "key_lengths",
    "packed": "packed sequences (attention_varlen)",
    "bool_mask": "bool attn_mask",
    "float_bias": "float attn_mask",
    "bias_grad": "gradient of attn_mask",
    "gqa": "grouped-query heads",
    "value_dim": "value head_dim different from query's",
    "softcap": "softcap",
    "alibi": "alibi_slopes",
    "sinks": "sinks",
    "dropout": "dropout",
    "deterministic": "deterministic=True",
    "transforms": "torch.func transforms and forward-mode AD",
}


def _always() -> None:
    return None


@dataclass(frozen=True)
class Capability:
    """One backend of one family: what it runs, and why it may be missing on this machine."""

    backend: str
    family: str
    devices: frozenset[str]  # torch device types; empty = any
    dtypes: frozenset[torch.dtype]
    max_head_dim: int | None
    features: frozenset[str]
    unavailable: Callable[[], str | None] = _always  # the reason why it cannot run here at all, or None


@dataclass(frozen=True)
class Requirements:
    """What a problem asks of a backend."""

    device: str
    dtype: torch.dtype
    head_dim: int
    features: frozenset[str]


@dataclass(frozen=True)
class Verdict:
    """Whether one backend can run a problem; `reasons` says why not."""

    backend: str
    supported: bool
    selected: bool
    reasons: tuple[str, ...]


class Explanation(tuple[Verdict, ...]):
    """The verdict on every backend of a family, in selection order."""

    __slots__ = ()

    def __str__(self) -> str:
        width = max(len(v.backend) for v in self)
        lines = []
        for v in self:
            state = "selected" if v.selected else "supported" if v.supported else "no: " + "; ".join(v.reasons)
            lines.append(f"{v.backend:<{width}}  {state}")
        return "\n".join(lines)


@cache
def _modules(family: str) -> dict[str, tuple[Capability, ModuleType]]:
    modules = {backend: importlib.import_module(path) for backend, path in FAMILIES[family].items()}
    return {backend: (module.CAPABILITY, module) for backend, module in modules.items()}


def capabilities(family: str) -> tuple[Capability, ...]:
    """The capability tables of a family's backends, in selection order."""
    return tuple(capability for capability, _ in _modules(family).values())


def backend_names(family: str) -> tuple[str, ...]:
    return tuple(FAMILIES[family])


def reasons_against(capability: Capability, needs: Requirements) -> tuple[str, ...]:
    """Everything that keeps a backend from running a problem; empty where it can."""
    reasons = []
    missing = capability.unavailable()
    if missing:
        reasons.append(missing)
    if capability.devices and needs.device not in capability.devices:
        reasons.append(f"runs on {', '.join(sorted(capability.devices))}, the tensors are on {needs.device}")
    if needs.dtype not in capability.dtypes:
        reasons.append(f"does not support {needs.dtype}")
    if capability.max_head_dim is not None and needs.head_dim > capability.max_head_dim:
        reasons.append(f"head_dim must be at most {capability.max_head_dim}, got {needs.head_dim}")
    lacking = [FEATURES[f] for f in FEATURES if f in needs.features and f not in capability.features]
    if lacking:
        reasons.append("does not support " + ", ".join(lacking))
    return tuple(reasons)


@lru_cache(maxsize=1024)
def select(family: str, needs: Requirements, backend: str | None) -> ModuleType:
    """The module that runs the problem: the named backend or, for None, the first that supports it.

    Raises:
        UnsupportedError: the named backend (or every backend) cannot run it; the message says why.
    """
    candidates = _modules(family)
    if backend is not None:
        capability, module = candidates[backend]
        reasons = reasons_against(capability, needs)
        if reasons:
            raise UnsupportedError(
                f"fastattn: backend='{backend}' cannot run this call: {'; '.join(reasons)}. "
                "Leave backend=None for one that can, or see fastattn.explain(...)."
            )
        return module
    refusals = []
    for name, (capability, module) in candidates.items():
        reasons = reasons_against(capability, needs)
        if not reasons:
            return module
        refusals.append(f"{name}: {'; '.join(reasons)}")
    raise UnsupportedError("fastattn: no backend can run this call. " + " | ".join(refusals))


def explain(family: str, needs: Requirements, backend: str | None) -> Explanation:
    """Every backend's verdict on a problem."""
    verdicts: list[Verdict] = []
    chosen = False
    for capability in capabilities(family):
        reasons = reasons_against(capability, needs)
        wanted = not reasons and not chosen and backend in (None, capability.backend)
        chosen |= wanted
        verdicts.append(Verdict(capability.backend, not reasons, wanted, reasons))
    return Explanation(verdicts)
