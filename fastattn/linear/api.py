"""The public functions of linear attention: validate, normalise to a `Problem`, call the op."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from fastattn import backends
from fastattn.dense import arguments as check
from fastattn.dense.problem import LSE_DTYPE, default_scale
from fastattn.linear import arguments
from fastattn.linear.arguments import Options
from fastattn.linear.features import AnyFeatureMap, Cosformer, FeatureMap, relu_features, resolve, softmax_features
from fastattn.linear.op import linear_attention_op
from fastattn.linear.problem import Problem, Results
from fastattn.linear.random_features import hyperbolic
from fastattn.linear.state import LinearState


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    feature_map: AnyFeatureMap,
    normalize: bool = True,
    decay: Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LinearState]:
    r"""Attention through feature maps: time linear in the length, and a state of fixed size instead of a KV cache.

    With features phi of a query and psi of a key, out_i = sum_j w_ij v_j with weights

        w_ij = exp(decay_(j+1) + ... + decay_i) phi(q_i) . psi(k_j)          j <= i if causal

    divided by their sum over j with `normalize` (0 where that sum is 0), else multiplied by `scale`. A causal call is
    the recurrence S <- exp(decay_t) S + psi(k_t) v_t^T, out_t = phi(q_t) S, computed chunk by chunk; features, weights
    and states are float32 (float64 for float64), and nothing of length x length is stored. Results repeat bit for bit.

    Args:
        query: (B, Hq, Nq, D), float32, bfloat16, float16 or float64, any strides.
        key: (B, Hkv, Nk, D), Hq a multiple of Hkv. Causal: Nk = Nq.
        value: (B, Hkv, Nk, Dv).
        causal: step i sees the keys 0..i (and initial_state).
        feature_map: "elu" (elu(x) + 1, Katharopoulos et al. 2020), "relu", "identity", "cosformer" (Qin et al. 2022; of
            the call's own length, `Cosformer(length)` to name one), a `FeatureMap` such as `softmax_features(W)`, which
            the kernels compute, or any callable from (B, H, N, D) to (B, H, N, M).
        decay: natural log of the factor that the state takes before each step, <= 0, floating point. (Hq,) one for each
            head (RetNet, Lightning attention); (B, Hq, N) a gate (simple GLA, Mamba-2); (B, Hq, N, M) one for each
            key feature too (GLA). Causal only.
        scale: without normalize, of the output; default 1 / sqrt(D). With it, only softmax features have one, that
            of softmax attention: they take sqrt(scale) query and sqrt(scale) key.
        key_mask: (B, Nk) bool, True keeps. A masked key changes nothing, whatever it holds; a causal state passes its
            step undecayed.
        initial_state: of an earlier call with the same options: its keys come first.
        return_state: also return the state after the last step.
        cu_seqlens: int (sequences + 1,): query, key and value are (1, H, total, D), sequence s at
            [cu_seqlens[s], cu_seqlens[s + 1]), each with its own state.
        backend: None takes the first that supports the call.

    Returns:
        out (B, Hq, Nq, Dv) in query's dtype; with return_state (out, LinearState). Differentiable in query, key, value,
        decay and initial_state, through out and the returned state.

    Raises:
        TypeError, ValueError: arguments that do not fit, named with what was expected.
        UnsupportedError: the named backend cannot run the call.

    Source: Katharopoulos et al. 2020, "Transformers are RNNs", section 3; Yang et al. 2024, "Gated Linear Attention
    Transformers", section 4 (the chunkwise form).
    """
    p = problem_of(
        query,
        key,
        value,
        causal=causal,
        feature_map=feature_map,
        normalize=normalize,
        decay=decay,
        scale=scale,
        key_mask=key_mask,
        initial_state=initial_state,
        return_state=return_state,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return _returned(p, linear_attention_op(p))


def performer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    projection: Tensor,
    causal: bool = False,
    features: str = "positive",
    bias: Tensor | None = None,
    return_state: bool = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, LinearState]:
    """Performer attention (FAVOR+): softmax attention estimated through random features.

    Args:
        query, key, value: as in `linear_attention`.
        projection: (m, D) random directions, of `random_projection`. More are more accurate and cost more.
        causal: step i sees the keys 0..i.
        features: "positive" (m features); "hyperbolic" (2 m, lower variance than twice as many positive ones); "relu"
            (m; relu(W x) + 0.001, which estimates no softmax but trains well).
        bias: (m,), not with "relu": for FAVOR++, whose projection and bias `oprf` makes.
        return_state, options: as in `linear_attention`.

    Returns, raises: as `linear_attention`.

    Source: Choromanski et al. 2021, "Rethinking Attention with Performers" (arXiv:2009.14794).
    """
    if features not in ("positive", "hyperbolic", "relu"):
        raise ValueError(f"fastattn: features must be positive, hyperbolic or relu, got {features!r}")
    if bias is not None and features == "relu":
        raise ValueError("fastattn: bias goes with positive and hyperbolic features, not with relu")
    check.tensor("projection", projection, 2, "(num_features, head_dim)")
    if bias is not None:
        check.tensor("bias", bias, 1, "(num_features,)")
        if len(bias) != len(projection):
            raise ValueError(
                f"fastattn: bias must have shape (num_features,) = ({len(projection)},), got ({len(bias)},)"
            )
    if features == "hyperbolic":
        projection, bias = hyperbolic(projection), None if bias is None else bias.repeat(2)
    feature_map = relu_features(projection) if features == "relu" else softmax_features(projection, bias)
    return linear_attention(
        query, key, value, causal=causal, feature_map=feature_map, return_state=return_state, **options
    )


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    *,
    decay: Tensor | None = None,
    return_state: bool = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, LinearState]:
    """Causal linear attention that corrects what its state recalls (DeltaNet; with decay, Gated DeltaNet).

    At each step, S <- exp(decay_t) S, then S <- S + beta_t k_t (v_t - S^T k_t)^T, and out_t = scale S^T q_t. Keys
    should have norm 1 and beta lie in [0, 1] (up to 2 for negative eigenvalues), or the state may grow without bound.

    Args:
        query, key, value: as in `linear_attention`.
        beta: (B, Hq, N), how much of the error is corrected.
        decay: (Hq,) or (B, Hq, N), as in `linear_attention`.
        return_state, options: as in `linear_attention`.

    Returns, raises: as `linear_attention`, differentiable in beta too. The state has no normalizer.

    Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length"; Yang et al.
    2025, "Gated Delta Networks".
    """
    if beta is None:
        raise TypeError("fastattn: beta must be a torch.Tensor of shape (B, Hq, N), got NoneType")
    p = problem_of(
        query,
        key,
        value,
        causal=True,
        feature_map="identity",
        normalize=False,
        beta=beta,
        decay=decay,
        return_state=return_state,
        **options,
    )
    return _returned(p, linear_attention_op(p))


def linear_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LinearState | None,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    feature_map: AnyFeatureMap = "identity",
    normalize: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, LinearState]:
    """One step of `linear_attention`, or with beta of `delta_rule`: time and memory do not grow with the steps before.

    Args:
        query, key, value: (B, Hq, D), (B, Hkv, D), (B, Hkv, Dv).
        state: of the step before, or of a call with return_state; None for the first.
        decay: (Hq,), (B, Hq) or (B, Hq, M).
        beta: (B, Hq), with feature_map="identity" and normalize=False.
        feature_map, normalize, scale, backend: as in `linear_attention`. `Cosformer` needs its `start`.

    Returns:
        (out (B, Hq, Dv), state).
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check.tensor(name, tensor, 3, "(batch, heads, head_dim)")
    if isinstance(decay, Tensor) and decay.dim() > 1:
        decay = decay[:, :, None]
    p = problem_of(
        *(t[:, :, None] for t in (query, key, value)),
        causal=True,
        feature_map=feature_map,
        normalize=normalize,
        decay=decay,
        beta=beta[..., None] if isinstance(beta, Tensor) else beta,
        scale=scale,
        initial_state=state,
        return_state=True,
        backend=backend,
    )
    out, new = _returned(p, linear_attention_op(p))
    return out.squeeze(2), new


def problem_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    feature_map: AnyFeatureMap,
    normalize: bool = True,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Problem:
    """The `Problem` of a call of any function of the family."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check.tensor(name, tensor, 4, "(batch, heads, seqlen, head_dim)")
    query, key, value = check.autocast(query, key, value)
    check.qkv(query, key, value)
    check.flag("causal", causal)
    check.flag("normalize", normalize)
    check.flag("return_state", return_state)
    if causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"fastattn: causal linear attention needs a key for each query, got {query.shape[2]} queries and "
            f"{key.shape[2]} keys; keys of the past go into initial_state"
        )
    if decay is not None and not causal:
        raise ValueError("fastattn: decay needs causal=True: without an order of steps nothing decays")
    if beta is not None and not causal:
        raise ValueError("fastattn: beta needs causal=True: the delta rule goes from step to step")
    if beta is not None and normalize:
        raise ValueError("fastattn: beta needs normalize=False: the delta rule has no normaliser")
    accumulate = LSE_DTYPE.get(query.dtype, torch.float32)
    mask = arguments.key_mask(key_mask, key)
    bounds = arguments.cu_seqlens(cu_seqlens, query, key)
    backend = arguments.backend(backend)
    batch, heads, length, head_dim = query.shape
    betas = None if beta is None else arguments.beta(beta, (batch, heads, length), accumulate, query)
    number = default_scale(head_dim) if scale is None else check.number("scale", scale)
    chosen = resolve(feature_map, max(length, key.shape[2]))
    if not isinstance(chosen, FeatureMap):
        query, key = _apply(chosen, query, key, value, mask, bounds)
        chosen = FeatureMap("identity")
    arguments.feature_map(chosen, head_dim, normalize, query)
    if beta is not None and (chosen.kind != "identity" or chosen.projection is not None):
        raise ValueError('fastattn: beta needs feature_map="identity" or a callable')
    softmax = chosen.kind == "softmax"
    if softmax and number <= 0:
        raise ValueError(f"fastattn: scale must be positive with softmax features, got {scale}")
    projection = None if chosen.projection is None else chosen.projection.to(accumulate)
    if projection is not None and softmax:
        projection = projection * number**0.5
    num_features = head_dim if projection is None else projection.shape[0]
    if projection is None:
        num_features = query.shape[3]
    decays = arguments.decay(decay, (batch, heads, length), num_features, accumulate, query)
    if beta is not None and decays is not None and decays.dim() == 4:
        raise ValueError("fastattn: decay must have shape (H,) or (B, H, N) with beta")
    if projection is not None and decays is not None and decays.dim() == 4:
        raise ValueError("fastattn: decay per feature goes with feature maps without projection")
    sequences = batch if bounds is None else bounds.shape[0] - 1
    kv, normalizer, log_scale = arguments.initial_state(
        initial_state, (sequences, heads, num_features, value.shape[3]), normalize, softmax, accumulate, query
    )
    return Problem(
        query=query,
        key=key,
        value=value,
        decay=decays,
        beta=betas,
        key_mask=mask,
        projection=None if projection is None else projection.contiguous(),
        feature_bias=None if chosen.bias is None else chosen.bias.to(accumulate).contiguous(),
        cu_seqlens=bounds,
        initial_kv=kv,
        initial_normalizer=normalizer,
        initial_log_scale=log_scale,
        feature=chosen.kind,
        feature_eps=check.number("feature_map's eps", chosen.eps),
        causal=causal,
        normalize=normalize,
        scale=1.0 if normalize and not softmax else number,
        return_state=return_state,
        backend=backend,
    )


def _apply(
    feature_map: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Query and key through a feature map that kernels do not know, in value's dtype."""
    if mask is not None:  # what masked keys hold must not reach a gradient
        key = torch.where(mask[:, None, :, None], key, 0)
    if isinstance(feature_map, Cosformer):
        last = feature_map.start + max(query.shape[2], key.shape[2])
        if cu_seqlens is None and last > feature_map.length:
            raise ValueError(f"fastattn: Cosformer's length must be at least {last}, got {feature_map.length}")
        found = tuple(feature_map(x, _positions(x, cu_seqlens)) for x in (query, key))
    else:
        found = (feature_map(query), feature_map(key))
    for name, x, mapped in zip(("query", "key"), (query, key), found, strict=True):
        if not isinstance(mapped, Tensor) or mapped.dim() != 4 or mapped.shape[:3] != x.shape[:3]:
            given = tuple(mapped.shape) if isinstance(mapped, Tensor) else type(mapped).__name__
            raise ValueError(
                f"fastattn: feature_map must return (B, H, N, features) = {(*x.shape[:3], 'features')} for {name}, "
                f"got {given}"
            )
    mapped_q, mapped_k = (x.to(value.dtype) for x in found)
    if mapped_q.shape[3] != mapped_k.shape[3]:
        raise ValueError(
            "fastattn: feature_map must return as many features for query as for key, got "
            f"{mapped_q.shape[3]} and {mapped_k.shape[3]}"
        )
    return mapped_q, mapped_k


def _positions(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The position of each step in its sequence, (N,)."""
    positions = torch.arange(x.shape[2], device=x.device)
    if cu_seqlens is None:
        return positions
    return positions - cu_seqlens[torch.searchsorted(cu_seqlens, positions, right=True) - 1]


def _returned(p: Problem, results: Results) -> Any:
    if not p.return_state:
        return results.out
    normalizer = results.normalizer if p.normalize else None
    return results.out, LinearState(results.kv, normalizer, results.log_scale if p.feature == "softmax" else None)


def explain(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> backends.Explanation:
    """Which backends can run `linear_attention(query, key, value, **options)` (or `delta_rule`, with beta and
    feature_map="identity", normalize=False), which one would, and why not the others. Nothing is computed."""
    p = problem_of(query, key, value, **options)
    gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in p.differentiable())
    return backends.explain("linear", p.requirements(*(["backward"] if gradients else [])), p.backend)
