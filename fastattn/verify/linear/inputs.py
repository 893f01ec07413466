"""Random tensors for the cases of the grid, laid out and poisoned as a case asks, and the calls that take them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fastattn.linear import FeatureMap, LinearState, relu_features, softmax_features
from fastattn.verify.bar import accumulator_of
from fastattn.verify.linear.cases import Case

DIFFERENTIABLE = ("query", "key", "value", "decay", "beta", "initial_kv", "initial_normalizer")
RELU_EPS = 1e-3  # of projected relu features


@dataclass
class Inputs:
    """The tensors of a case, contiguous and without poison, in the shapes that ``fastattn.linear_attention`` takes."""

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor | None
    beta: Tensor | None
    key_mask: Tensor | None
    projection: Tensor | None
    bias: Tensor | None
    initial_kv: Tensor | None
    initial_normalizer: Tensor | None
    initial_log_scale: Tensor | None
    grad_out: Tensor
    grad_kv: Tensor
    grad_normalizer: Tensor

    def map(self, change: Any, *names: str) -> Inputs:
        """With change(tensor) for each of those tensors that is not None."""
        given = {name: getattr(self, name) for name in names}
        return replace(self, **{name: change(t) for name, t in given.items() if t is not None})

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another floating-point dtype (the mask stays)."""
        return self.map(lambda t: t.to(dtype), *(f.name for f in fields(self) if f.name != "key_mask"))

    def leaves(self, case: Case) -> tuple[Inputs, dict[str, Tensor]]:
        """Fresh tensors that require gradients, and those tensors by name."""
        named = {name: getattr(self, name) for name in DIFFERENTIABLE}
        wanted = {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}
        return replace(self, **wanted), wanted


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int) -> Inputs:
    """Unit-normal tensors (query and key times ``case.magnitude``) drawn on the CPU from ``seed``.

    Decays and states are in the accumulation dtype, as models keep them; the feature map is in the inputs' dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = accumulator_of(dtype)
    batch, q_len, k_len = case.rows

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    query = normal(batch, case.heads, q_len, case.head_dim) * case.magnitude
    key = normal(batch, case.hkv, k_len, case.head_dim) * case.magnitude
    value = normal(batch, case.hkv, k_len, case.dv)
    if case.positive:
        query, key = query.abs(), key.abs()
    if case.delta:
        key = torch.nn.functional.normalize(key, dim=-1)
    if case.layout == "expanded":
        key, value = key[:1].expand_as(key), value[:1].expand_as(value)

    steps = (batch, case.heads, q_len)
    decay: Tensor | None = None
    if case.decay == "constant":
        decay = torch.tensor(-case.decay_size, dtype=torch.float64).expand(steps)
    elif case.decay is not None:
        shape = {"head": steps[1:2], "step": steps, "vector": (*steps, case.m)}[case.decay]
        decay = -case.decay_size * uniform(*shape)
    states = (case.sequences, case.heads, case.m)
    held = case.state_in, case.state_in and case.normalize, case.state_in and case.feature == "softmax"
    return Inputs(
        query=query.to(device, dtype),
        key=key.to(device, dtype),
        value=value.to(device, dtype),
        decay=None if decay is None else decay.to(device, wide),
        beta=uniform(*steps).to(device, dtype) if case.delta else None,
        key_mask=None if case.key_mask is None else _random_mask(case, generator).to(device),
        projection=None if case.num_features is None else normal(case.m, case.head_dim).to(device, dtype),
        bias=normal(case.m).to(device, dtype) if case.bias else None,
        initial_kv=normal(*states, case.dv).to(device, wide) if held[0] else None,
        initial_normalizer=(0.5 + normal(*states).abs()).to(device, wide) if held[1] else None,
        initial_log_scale=normal(*states[:2]).to(device, wide) if held[2] else None,
        grad_out=normal(*steps, case.dv).to(device, dtype),
        grad_kv=normal(*states, case.dv).to(device, wide),
        grad_normalizer=normal(*states).to(device, wide),
    )


def _random_mask(case: Case, generator: torch.Generator) -> Tensor:
    batch, _, k_len = case.rows
    if case.key_mask == "random":
        return torch.rand((batch, k_len), generator=generator) < 0.7
    mask = torch.ones(batch, k_len, dtype=torch.bool)
    if case.key_mask == "sequence":
        mask[-1] = False
    for b in range(batch) if case.key_mask == "padding" else ():
        mask[b, k_len // (b + 2) :] = False
    return mask


def boundaries(case: Case) -> list[int]:
    """Where packed sequences begin and the last one ends."""
    return [0, *accumulate(case.packed or ())]


def alone(case: Case, inputs: Inputs) -> Iterator[Inputs]:
    """Each packed sequence as inputs of batch size 1 (the results' gradients stay whole); else the inputs."""
    if case.packed is None:
        yield inputs
        return
    for b, (begin, end) in enumerate(pairwise(boundaries(case))):

        def rows(t: Tensor, begin: int = begin, end: int = end) -> Tensor:
            return t[:, begin:end] if t.dtype == torch.bool else t if t.ndim == 1 else t[:, :, begin:end]

        of_sequence = inputs.map(rows, "query", "key", "value", "decay", "beta", "key_mask")
        states = ("initial_kv", "initial_normalizer", "initial_log_scale")
        yield of_sequence.map(lambda t, b=b: t[b : b + 1], *states)


def poison(case: Case, inputs: Inputs) -> Inputs:
    """NaN in every masked step's key, value, decay and beta, and in all rows that belong to no packed sequence."""
    batch, q_len, k_len = case.rows
    unused = torch.zeros(batch, k_len, dtype=torch.bool, device=inputs.key.device)
    if inputs.key_mask is not None:
        unused = ~inputs.key_mask

    def poisoned(steps: Tensor) -> Any:
        def fill(t: Tensor) -> Tensor:
            if t.ndim < 3:  # a decay of each head
                return t
            return t.masked_fill(steps[:, None, :, None] if t.ndim == 4 else steps[:, None], torch.nan)

        return fill

    found = inputs.map(poisoned(unused), "key", "value", *(("decay", "beta") if case.causal else ()))
    if case.tail:
        outside = (torch.arange(q_len, device=unused.device) >= boundaries(case)[-1])[None]
        found = found.map(poisoned(outside), "query", "key", "value", "decay", "beta", "grad_out")
    return found


def lay_out(case: Case, inputs: Inputs) -> Inputs:
    """The same values in the memory layout of the case."""

    def bnhd(t: Tensor) -> Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2) if t.ndim > 2 else t

    def sliced(t: Tensor) -> Tensor:
        wider = t.new_full([size + 3 for size in t.shape], torch.nan)
        inner = wider[tuple(slice(2, size + 2) for size in t.shape)]
        return inner.copy_(t)

    steps = ("query", "key", "value", "decay", "beta")
    match case.layout:
        case "bnhd":
            return inputs.map(bnhd, *steps)
        case "packed_qkv":
            qkv_BN3HD = torch.stack([t.transpose(1, 2) for t in (inputs.query, inputs.key, inputs.value)], 2)
            query, key, value = (qkv_BN3HD[:, :, n].transpose(1, 2) for n in range(3))
            return replace(inputs, query=query, key=key, value=value)
        case "sliced":
            return inputs.map(sliced, *steps, "initial_kv", "initial_normalizer", "initial_log_scale", "grad_out")
        case "expanded":
            return inputs.map(lambda t: t[:1].expand_as(t), "key", "value")
    return inputs


def signs(x: Tensor) -> Tensor:
    """A feature map of which kernels know nothing."""
    return torch.cat([torch.relu(x), torch.relu(-x)], -1)


def feature_map(case: Case, inputs: Inputs) -> Any:
    """The argument of the public function."""
    if case.feature == "softmax":
        assert inputs.projection is not None
        return softmax_features(inputs.projection, inputs.bias)
    if case.feature == "signs":
        return signs
    if inputs.projection is None:
        return case.feature
    if case.feature == "relu":
        return relu_features(inputs.projection, RELU_EPS)
    return FeatureMap(case.feature, inputs.projection)


def call(case: Case, inputs: Inputs, backend: str | None) -> dict[str, Tensor]:
    """The results of the public function by name; those of the state where the case asks for it."""
    import fastattn

    state = None
    if inputs.initial_kv is not None:
        state = LinearState(inputs.initial_kv, inputs.initial_normalizer, inputs.initial_log_scale)
    cu_seqlens = None
    if case.packed is not None:
        cu_seqlens = torch.tensor(boundaries(case), dtype=torch.int32, device=inputs.query.device)
    options: dict[str, Any] = {
        "decay": inputs.decay,
        "scale": case.scale,
        "key_mask": inputs.key_mask,
        "initial_state": state,
        "return_state": case.state_out,
        "cu_seqlens": cu_seqlens,
        "backend": backend,
    }
    result: Any
    if inputs.beta is not None:
        result = fastattn.delta_rule(inputs.query, inputs.key, inputs.value, inputs.beta, **options)
    else:
        result = fastattn.linear_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            causal=case.causal,
            feature_map=feature_map(case, inputs),
            normalize=case.normalize,
            **options,
        )
    if not case.state_out:
        return {"out": result}
    out, new = result
    return {"out": out, **{name: part for name, part in new._asdict().items() if part is not None}}
