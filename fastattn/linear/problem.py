"""`Problem`: one linear attention call, validated and normalised. Its fields are the arguments of the ops."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import compress, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.backends import Requirements
from fastattn.dense.problem import LSE_DTYPE

FEATURE_KINDS = ("identity", "elu", "relu", "softmax")  # the order of csrc/linear_params.h
_OPTIONAL_FEATURES = ("causal", "normalize", "decay", "vector_decay", "delta", "projection", "key_mask", "packed")


class Results(NamedTuple):
    """What a forward returns; an empty tensor stands for what the problem has not."""

    out: Tensor  # (B, Hq, Nq, Dv) in query's dtype, over (B, Nq, Hq, Dv) memory
    denominator: Tensor  # (B, Hq, Nq), with normalize
    kv: Tensor  # (sequences, Hq, M, Dv), the state after the last step, with return_state
    normalizer: Tensor  # (sequences, Hq, M), with return_state and normalize
    log_scale: Tensor  # (sequences, Hq), with return_state and softmax features


class Gradients(NamedTuple):
    """What a backward returns, each like its input; an empty tensor where that is absent."""

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor
    beta: Tensor
    initial_kv: Tensor
    initial_normalizer: Tensor


@dataclass(slots=True)
class Problem:
    r"""Linear attention over query (B, Hq, Nq, D), key (B, Hkv, Nk, D) and value (B, Hkv, Nk, Dv).

    Query and key become M features each, f(W x) with W = projection (the identity where there is none) and f =
    feature: x, elu(x) + 1, relu(x) + feature_eps, or exp(W x + feature_bias - scale |x|^2 / 2) ("softmax"). With
    phi_i and psi_j the features of query i and key j, and the state S (M, Dv), z (M,) of a head:

        causal, for each step t:   S <- exp(decay_t) S + psi_t v_t^T,    z <- exp(decay_t) z + psi_t
        with beta (delta rule):    S <- exp(decay_t) S,  then  S <- S + beta_t psi_t (v_t - S^T psi_t)^T
        not causal:                S, z = sums over all keys
        out_t = S^T phi_t / (phi_t . z)   with normalize (0 where |phi_t . z| < least_denominator), else scale S^T phi_t

    from S, z = initial_kv, initial_normalizer or zero. Steps whose key_mask is False leave the state as it is.

    Softmax features are kept within range by factors that cancel in the quotient. Those of a query are divided by their
    maximum over the M features (and lack exp(-scale |x|^2 / 2)); those of the keys, S and z by exp(c), where c is the
    maximum over the M features of the exponents of all keys not masked, of those up to the present step if causal,
    and of the initial_log_scale: after step t, c_t = max(c_(t-1), max_m exponent_tm). `denominator` is the sum of these
    scaled terms, final and initial states are S / exp(c), z / exp(c) and c. Where no key was seen c is -inf. No
    gradient flows through c.

    Packed sequences have B = 1, the total length as Nq = Nk, and a state for each.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor | None  # (B, Hq, N), or (B, Hq, N, M); accumulate_dtype; any strides, 0 where constant over N
    beta: Tensor | None  # (B, Hq, N), accumulate_dtype
    key_mask: Tensor | None  # (B, Nk) bool
    projection: Tensor | None  # (M, D), accumulate_dtype, contiguous
    feature_bias: Tensor | None  # (M,), accumulate_dtype, contiguous; softmax features only
    cu_seqlens: Tensor | None  # (sequences + 1,) int32
    initial_kv: Tensor | None  # (sequences, Hq, M, Dv), accumulate_dtype
    initial_normalizer: Tensor | None  # (sequences, Hq, M)
    initial_log_scale: Tensor | None  # (sequences, Hq)
    feature: str
    feature_eps: float
    causal: bool
    normalize: bool
    scale: float
    return_state: bool
    backend: str | None

    def args(self) -> tuple:
        """The arguments of `fastattn::linear_forward`, in schema order."""
        return tuple([getattr(self, name) for name in ARGUMENTS])

    @property
    def num_features(self) -> int:
        """M."""
        return self.key.shape[3] if self.projection is None else self.projection.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.query.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return LSE_DTYPE.get(self.query.dtype, torch.float32)

    @property
    def least_denominator(self) -> float:
        """What is less counts as no weight at all: its inverse, or a gradient divided by it, may overflow."""
        return torch.finfo(self.accumulate_dtype).tiny * 2**26  # 2^-100 in float32

    def requirements(self, *extra: str) -> Requirements:
        decay = self.decay
        present = (
            self.causal,
            self.normalize,
            decay is not None and decay.dim() == 3,
            decay is not None and decay.dim() == 4,
            self.beta is not None,
            self.projection is not None and self.feature != "softmax",
            self.key_mask is not None,
            self.cu_seqlens is not None,
        )
        features = [*extra, *compress(_OPTIONAL_FEATURES, present)]
        if self.feature == "softmax":
            features.append("softmax_features")
        if self.initial_kv is not None or self.return_state:
            features.append("state")
        if self.query.shape[1] != self.key.shape[1]:
            features.append("gqa")
        if self.query.shape[3] != self.value.shape[3]:
            features.append("value_dim")
        device = self.query.device
        head_dim = max(self.query.shape[3], self.value.shape[3])
        return Requirements(device.type, self.query.dtype, head_dim, frozenset(features), device.index)

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The inputs that gradients flow to, in the order of `Gradients`."""
        return tuple(getattr(self, name) for name in Gradients._fields)

    def check_values(self) -> None:
        """Raise ValueError for boundaries that do not fit the tensors.

        Runs on the CPU; elsewhere only under FASTATTN_CHECK=1, because reading the values would wait for the device.
        """
        if self.cu_seqlens is None or (self.query.device.type != "cpu" and os.environ.get("FASTATTN_CHECK") != "1"):
            return
        bounds, total = self.cu_seqlens.tolist(), self.query.shape[2]
        if bounds[0] != 0 or bounds[-1] > total or any(b < a for a, b in pairwise(bounds)):
            raise ValueError(f"fastattn: cu_seqlens must rise from 0 and end at most at {total}, got {bounds}")

    def sequences(self) -> Iterator[tuple[slice, slice, Problem]]:
        """A packed problem's sequences, each as (its rows, its place among states, a problem of batch size 1)."""
        assert self.cu_seqlens is not None
        rows_of = {"query": 2, "key": 2, "value": 2, "decay": 2, "beta": 2, "key_mask": 1}
        states = ("initial_kv", "initial_normalizer", "initial_log_scale")
        for b, (begin, end) in enumerate(pairwise(self.cu_seqlens.tolist())):
            parts = {
                name: tensor.narrow(dim, begin, end - begin)
                for name, dim in rows_of.items()
                if (tensor := getattr(self, name)) is not None
            }
            parts |= {n: tensor[b : b + 1] for n in states if (tensor := getattr(self, n)) is not None}
            yield slice(begin, end), slice(b, b + 1), replace(self, cu_seqlens=None, **parts)


ARGUMENTS = tuple(field.name for field in fields(Problem))
TENSORS = ARGUMENTS[: ARGUMENTS.index("feature")]


def allocate_forward(p: Problem) -> Results:
    batch, heads, length, _ = p.query.shape
    width, features, sequences = p.value.shape[3], p.num_features, p.num_sequences
    strides = (length * heads * width, width, heads * width, 1)

    def scaled(present: bool, *shape: int) -> Tensor:
        return p.query.new_empty(shape if present else (0,), dtype=p.accumulate_dtype)

    return Results(
        p.query.new_empty_strided((batch, heads, length, width), strides),
        scaled(p.normalize, batch, heads, length),
        scaled(p.return_state, sequences, heads, features, width),
        scaled(p.return_state and p.normalize, sequences, heads, features),
        scaled(p.return_state and p.feature == "softmax", sequences, heads),
    )


def allocate_backward(p: Problem) -> Gradients:
    return Gradients(*(p.query.new_empty(0) if t is None else t.new_empty(t.shape) for t in p.differentiable()))
