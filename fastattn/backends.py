"""What each backend can do, and which one runs a problem.

A backend of a family declares one `Capability`. Selection, `explain`, error messages, the support matrix and the grid
that the tests walk are all derived from it; nothing else in the package says what a backend supports.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from types import ModuleType

import torch

from fastattn import ledger
from fastattn.errors import UnsupportedError

# family -> backend -> the module that declares its CAPABILITY and launches it; in selection order
FAMILIES = {
    "dense": {
        "cpu": "fastattn.dense.native",
        "triton": "fastattn.dense.triton",
        "reference": "fastattn.dense.reference",
        "sdpa": "fastattn.dense.delegate",
    },
    "linear": {
        "cpu": "fastattn.linear.native",
        "triton": "fastattn.linear.triton",
        "reference": "fastattn.linear.reference",
    },
}

DELEGATE = "sdpa"  # PyTorch's own attention: named, or taken where the ledger records it as faster

# family -> feature -> how messages and the support matrix name it
FEATURES = {
    "dense": {
        "backward": "gradients",
        "causal": "causal",
        "window": "window",
        "alignment": "causal or window off the diagonal of equal lengths",
        "query_start": "query_start per sequence",
        "key_start": "key_start",
        "key_lengths": "key_lengths",
        "packed": "packed sequences (attention_varlen)",
        "paged": "paged KV cache (attention_with_kvcache)",
        "bool_mask": "bool attn_mask",
        "float_bias": "float attn_mask",
        "block_mask": "BlockMask as attn_mask",
        "bias_grad": "gradient of attn_mask",
        "lse_grad": "gradient through the LSE",
        "gqa": "grouped-query heads",
        "value_dim": "value head_dim different from query's",
        "softcap": "softcap",
        "alibi": "alibi_slopes",
        "sinks": "sinks",
        "dropout": "dropout",
        "deterministic": "deterministic=True",
        "transforms": "torch.func transforms and forward-mode AD",
    },
    "linear": {
        "backward": "gradients",
        "causal": "causal",
        "normalize": "normalize=True",
        "decay": "decay per head, or per head and step",
        "vector_decay": "decay per step and key dimension",
        "delta": "delta rule",
        "projection": "projected features",
        "softmax_features": "positive softmax features (Performer)",
        "state": "initial_state and return_state",
        "key_mask": "key_mask",
        "packed": "packed sequences (cu_seqlens)",
        "gqa": "grouped-query heads",
        "value_dim": "value head_dim different from query's",
        "transforms": "torch.func transforms and forward-mode AD",
    },
}


def _always(device: str, index: int | None) -> None:
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
    # (device type, its index or None) -> the reason why it cannot run there on this machine, or None
    unavailable: Callable[[str, int | None], str | None] = _always
    not_on: frozenset[tuple[str, torch.dtype]] = frozenset()  # device types where it lacks one of its dtypes
    narrower: frozenset[tuple[str, int]] = frozenset()  # features with which max_head_dim is less

    def has_dtype(self, dtype: torch.dtype, device: str) -> bool:
        """Whether it computes in the dtype on that type of device."""
        return dtype in self.dtypes and (device, dtype) not in self.not_on

    def head_dims(self) -> str:
        """Its head sizes for people to read."""
        if self.max_head_dim is None:
            return "any"
        less: dict[int, list[str]] = {}
        for feature, widest in sorted(self.narrower):
            less.setdefault(widest, []).append(FEATURES[self.family][feature])
        notes = ", ".join(f"{widest} with {' or '.join(names)}" for widest, names in less.items())
        return f"1 to {self.max_head_dim}" + (f" ({notes})" if notes else "")

    def dtype_names(self) -> str:
        """Its dtypes for people to read, in order, with the devices that lack one."""
        lacking = {dtype: [device for device, d in sorted(self.not_on, key=str) if d == dtype] for dtype in self.dtypes}
        names = {
            str(dtype).removeprefix("torch.") + (f" (not on {', '.join(devices)})" if devices else "")
            for dtype, devices in lacking.items()
        }
        return ", ".join(sorted(names))


@dataclass(frozen=True)
class Requirements:
    """What a problem asks of a backend."""

    device: str
    dtype: torch.dtype
    head_dim: int
    features: frozenset[str]
    device_index: int | None = None
    seqlen: int = 0  # Sq and Sk, rounded up to the same power of two (so that few problems differ); 0: they differ


@dataclass(frozen=True)
class Verdict:
    """Whether one backend can run a problem; `reasons` says why not, `note` what else there is to say."""

    backend: str
    supported: bool
    selected: bool
    reasons: tuple[str, ...]
    note: str = ""


class Explanation(tuple[Verdict, ...]):
    """The verdict on every backend of a family, in selection order."""

    __slots__ = ()

    def __str__(self) -> str:
        width = max(len(v.backend) for v in self)
        lines = []
        for v in self:
            state = "selected" if v.selected else "supported" if v.supported else "no: " + "; ".join(v.reasons)
            lines.append(f"{v.backend:<{width}}  {state}" + (f" ({v.note})" if v.note else ""))
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
    texts = FEATURES[capability.family]
    missing = capability.unavailable(needs.device, needs.device_index)
    if missing:
        reasons.append(missing)
    if capability.devices and needs.device not in capability.devices:
        reasons.append(f"runs on {', '.join(sorted(capability.devices))}, the tensors are on {needs.device}")
    if needs.dtype not in capability.dtypes:
        reasons.append(f"does not support {needs.dtype}")
    elif not capability.has_dtype(needs.dtype, needs.device):
        reasons.append(f"does not support {needs.dtype} on {needs.device}")
    if capability.max_head_dim is not None:
        limits = {capability.max_head_dim: ""}
        limits |= {most: f" with {texts[name]}" for name, most in capability.narrower if name in needs.features}
        widest = min(limits)
        if needs.head_dim > widest:
            reasons.append(f"head_dim must be at most {widest}{limits[widest]}, got {needs.head_dim}")
    lacking = [text for f, text in texts.items() if f in needs.features and f not in capability.features]
    if lacking:
        reasons.append("does not support " + ", ".join(lacking))
    return tuple(reasons)


@lru_cache(maxsize=1024)
def select(family: str, needs: Requirements, backend: str | None) -> ModuleType:
    """The module that runs the problem: the named backend or, for None, the delegate where it is recorded as faster,
    else the first that supports it.

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
    if delegated(family, needs):
        return candidates[DELEGATE][1]
    refusals = []
    for name, (capability, module) in candidates.items():
        reasons = reasons_against(capability, needs)
        if not reasons:
            return module
        refusals.append(f"{name}: {'; '.join(reasons)}")
    raise UnsupportedError("fastattn: no backend can run this call. " + " | ".join(refusals))


_delegating = True


@contextmanager
def own_backends() -> Iterator[None]:
    """Within it nothing is delegated: what fastattn's kernels are measured under.

    For the whole process, because the backward runs in autograd's own threads.
    """
    global _delegating
    before, _delegating = _delegating, False
    select.cache_clear()
    try:
        yield
    finally:
        _delegating = before
        select.cache_clear()


def device_name(device: str, index: int | None = None) -> str | None:
    """The name that the ledger knows a device by; None where it has none."""
    if device == "cuda":
        return torch.cuda.get_device_name(index)
    return ledger.cpu_name() if device == "cpu" else None


def delegated(family: str, needs: Requirements) -> float | None:
    """How many times as fast PyTorch's own attention is recorded to be, where a call is delegated to it; else None.

    The forward and the backward are selected one by one, each by its own recorded time: out and LSE of one backend
    serve the backward of every other.
    """
    if not _delegating or DELEGATE not in FAMILIES[family] or not needs.seqlen:
        return None
    if reasons_against(_modules(family)[DELEGATE][0], needs):
        return None
    name = device_name(needs.device, needs.device_index)
    record = None if name is None else ledger.find_record(name)
    if record is None:
        return None
    return ledger.sdpa_advantage(
        record["timings"],
        dtype=str(needs.dtype).removeprefix("torch."),
        head_dim=needs.head_dim,
        causal="causal" in needs.features,
        backward="backward" in needs.features,
        seqlen=needs.seqlen,
    )


def explain(family: str, needs: Requirements, backend: str | None) -> Explanation:
    """Every backend's verdict on a problem. Where the two passes differ, the forward's backend is the selected one."""
    advantages: dict[str, float] = {}
    if backend is None:
        forward = replace(needs, features=needs.features - {"backward", "bias_grad", "lse_grad"})
        passes = {"forward": forward, "backward": needs} if "backward" in needs.features else {"forward": needs}
        found = {name: delegated(family, asked) for name, asked in passes.items()}
        advantages = {name: advantage for name, advantage in found.items() if advantage}
    wanted = DELEGATE if "forward" in advantages else backend
    verdicts: list[Verdict] = []
    chosen = False
    for capability in capabilities(family):
        reasons = reasons_against(capability, needs)
        selected = not reasons and not chosen and wanted in (None, capability.backend)
        chosen |= selected
        note = ""
        if advantages and capability.backend == DELEGATE:
            ratios = " and ".join(f"{ratio:.2f}" for ratio in advantages.values())
            where = device_name(needs.device, needs.device_index)
            note = f"PyTorch's own, for the {' and the '.join(advantages)}: recorded {ratios} x as fast on {where}"
        verdicts.append(Verdict(capability.backend, not reasons, selected, reasons, note))
    return Explanation(verdicts)
