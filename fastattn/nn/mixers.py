"""What stands between an attention layer's projections where it is not softmax attention: heads in, heads out.

A mixer is made by the options of its mechanism (`fastattn.nn.mechanisms`) and called by a layer with projected heads.
It holds what the mechanism needs beyond those projections: gates, norms, random directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.dense import arguments as dense_arguments
from fastattn.linear import arguments as linear_arguments
from fastattn.linear.api import delta_rule, linear_attention, performer_attention
from fastattn.linear.features import Cosformer, resolve
from fastattn.linear.lowrank import accumulable, causal_error, without_masked
from fastattn.linear.nystrom import nystrom_attention
from fastattn.linear.random_features import random_projection
from fastattn.linear.state import LinearState
from fastattn.nn.linformer import LinformerProjection

if TYPE_CHECKING:
    from fastattn.nn.mechanisms import GLA, Delta, Linear, Linformer, Nystrom, Performer


class Heads(NamedTuple):
    """The sizes of the layer that a mixer is for."""

    embed_dim: int  # of the layer's input
    num_heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Mechanism:
    """The options of one mechanism, which make its mixer for a layer."""

    mixer: ClassVar[type[Any]]  # a Mixer whose constructor takes these options

    def build(
        self, heads: Heads, *, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None
    ) -> Mixer:
        return self.mixer(self, heads, device=device, dtype=dtype)


class CallOptions(TypedDict, total=False):
    """Keyword arguments of a mixer's call, those of `linear_attention`; a state needs causal=True."""

    key_mask: Tensor | None
    initial_state: LinearState | None
    return_state: bool
    backend: str | None


class Mixer(nn.Module):
    """`mixer(query, key, value, x, causal=...)`: (B, Hq, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, D) to (B, Hq, Nq, D).

    x is the layer's input (B, N, E) in self-attention, where gates read it, and None where queries and keys come from
    different inputs. With return_state the result is (out, LinearState).

    Raises:
        ValueError: causal, or an x of None, where the mechanism cannot have it.
    """

    name: ClassVar[str]
    family: ClassVar[str] = "linear"  # whose backends run it
    recurrent: ClassVar[bool] = False  # causal only, with gates that read x
    rotary: ClassVar[bool] = True  # whether a model with rotary positions turns its queries and keys

    def __init__(self, options: Mechanism, heads: Heads) -> None:
        super().__init__()
        self.options = options
        self.heads = heads
        self.output: GatedNorm | None = None

    @classmethod
    def check_causal(cls, causal: bool) -> None:
        """Raise ValueError where the mechanism has no form with this `causal`."""
        if cls.recurrent and not causal:
            raise ValueError(
                f"fastattn: causal (in a layer's call is_causal) must be True with {cls.name}, got False: it runs "
                "through the positions in their order"
            )

    @classmethod
    def check_backend(cls, backend: Any) -> None:
        """Raise ValueError for what is no backend of this mechanism's."""
        (linear_arguments if cls.family == "linear" else dense_arguments).backend(backend)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        x: Tensor | None,
        *,
        causal: bool,
        **options: Unpack[CallOptions],
    ) -> Any:
        self.check_causal(causal)
        if x is None and self.recurrent:
            raise ValueError(f"fastattn: query and key must be the same tensor with {self.name}: its gates read it")
        result = self.mix(query, key, value, x, causal=causal, **options)
        if self.output is None:
            return result
        if not options.get("return_state"):
            return self.output(result, x)
        out, state = result
        return self.output(out, x), state

    def mix(self, query: Tensor, key: Tensor, value: Tensor, x: Any, *, causal: bool, **options: Any) -> Any:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return repr(self.options)


class GatedNorm(nn.Module):
    """RMSNorm of each head's output, times silu(W x): what RetNet, GLA and Gated DeltaNet have before the projection.

    RetNet's paper has a group norm of one head a group, its authors' code this RMSNorm, which subtracts no mean.
    """

    def __init__(self, heads: Heads, *, gated: bool = True, **factory: Any) -> None:
        super().__init__()
        self.shape = (heads.num_heads, heads.head_dim)
        self.weight = nn.Parameter(torch.ones(heads.head_dim, **factory))
        self.gate = None
        if gated:
            self.gate = nn.Linear(heads.embed_dim, heads.num_heads * heads.head_dim, bias=False, **factory)

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """(B, H, N, D) and the layer's input (B, N, E) to (B, H, N, D)."""
        y = F.rms_norm(out.transpose(1, 2), self.weight.shape, self.weight.to(out.dtype), eps=1e-5)
        if self.gate is not None:
            y = y * F.silu(self.gate(x)).unflatten(-1, self.shape)
        return y.transpose(1, 2)


class PerformerMixer(Mixer):
    """Random features, redrawn every so many calls in training mode where the options say so.

    Attributes:
        projection: (num_features, head_dim), a buffer. The state dict has it, the seed and where the schedule stands.
    """

    name = "performer"
    options: Performer
    projection: Tensor

    def __init__(self, options: Performer, heads: Heads, **factory: Any) -> None:
        super().__init__(options, heads)
        self.register_buffer("projection", torch.empty(options.num_features, heads.head_dim, **factory))
        self.seed = int(torch.randint(2**31, ())) if options.seed is None else options.seed
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin the sequence of projections anew."""
        self.draws = self.steps = 0
        self.redraw()

    @torch.no_grad()
    def redraw(self) -> None:
        """Take the next projection of the seed's sequence, the same on every device and in every process."""
        old = self.projection
        generator = torch.Generator().manual_seed(self.seed + self.draws)
        drawn = random_projection(*old.shape, orthogonal=self.options.orthogonal, generator=generator, dtype=old.dtype)
        self.draws += 1
        self.projection = drawn.to(old.device)  # not in place: a backward to come needs the old one

    @torch.compiler.disable
    def _count(self, interval: int) -> None:
        # A checkpointed forward runs again in the backward, and then must see what it saw.
        if torch._C._current_graph_task_id() != -1:
            return
        if self.steps and self.steps % interval == 0:
            self.redraw()
        self.steps += 1

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.seed, self.draws, self.steps])

    def set_extra_state(self, state: Tensor) -> None:
        self.seed, self.draws, self.steps = state.tolist()

    def mix(self, query: Tensor, key: Tensor, value: Tensor, x: Any, *, causal: bool, **options: Any) -> Any:
        # A state is a sum of features: what carries one keeps its directions.
        if self.training and self.options.redraw_interval is not None and not carries_state(options):
            self._count(self.options.redraw_interval)
        return performer_attention(
            query, key, value, projection=self.projection, causal=causal, features=self.options.features, **options
        )


class LinearMixer(Mixer):
    name = "linear"
    options: Linear

    def __init__(self, options: Linear, heads: Heads, **_: Any) -> None:
        super().__init__(options, heads)
        self.feature_map = options.feature_map  # a module then belongs to this one

    def mix(self, query: Tensor, key: Tensor, value: Tensor, x: Any, *, causal: bool, **options: Any) -> Any:
        if carries_state(options) and isinstance(resolve(self.feature_map, 1), Cosformer):
            raise ValueError("fastattn: feature_map must not be cosformer where a state is carried: it has positions")
        return linear_attention(
            query,
            key,
            value,
            causal=causal,
            feature_map=self.feature_map,
            normalize=self.options.normalize,
            **options,
        )


class RetentionMixer(Mixer):
    name = "retention"
    recurrent = True

    def __init__(self, options: Mechanism, heads: Heads, **factory: Any) -> None:
        super().__init__(options, heads)
        self.output = GatedNorm(heads, **factory)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, x: Any, *, causal: bool, **options: Any) -> Any:
        head = torch.arange(self.heads.num_heads, device=query.device)
        decay = torch.log1p(-torch.exp2(-5 - accumulable(head.to(query.dtype))))
        return linear_attention(
            query, key, value, causal=causal, feature_map="identity", normalize=False, decay=decay, **options
        )


class GLAMixer(Mixer):
    name = "gla"
    recurrent = True
    rotary = False
    options: GLA

    def __init__(self, options: GLA, heads: Heads, **factory: Any) -> None:
        super().__init__(options, heads)
        self.decay = nn.Sequential(
            nn.Linear(heads.embed_dim, options.gate_rank, bias=False, **factory),
            nn.Linear(options.gate_rank, heads.num_heads * heads.head_dim, **factory),
        )
        self.output = GatedNorm(heads, **factory)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, x: Any, *, causal: bool, **options: Any) -> Any:
        logits = accumulable(self.decay(x)).unflatten(-1, (self.heads.num_heads, -1)).transpose(1, 2)
        decay = F.logsigmoid(logits) / self.options.temperature
        return linear_attention(
            query, key, value, causal=causal, feature_map="identity", normalize=False, decay=decay, **options
        )


class DeltaMixer(Mixer):
    name = "delta"
    recurrent = True
    rotary = False
    options: Delta

    def __init__(self, options: Delta, heads: Heads, **factory: Any) -> None:
        super().__init__(options, heads)
        self.beta = nn.Linear(heads.embed_dim, heads.num_heads, bias=False, **factory)
        self.step: nn.Linear | None = None
        if options.gated:
            self.step = nn.Linear(heads.embed_dim, heads.num_heads, **factory)
            self.log_rate = nn.Parameter(torch.empty(heads.num_heads, **factory))
        self.output = GatedNorm(heads, gated=options.gated, **factory)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mamba-2's: rates uniform up to 16, steps log-uniform from 0.001 to 0.1 (the bias is softplus's inverse)."""
        if self.step is None:
            return
        self.log_rate.uniform_(1e-3, 16).log_()
        bias = self.step.bias
        bias.copy_(bias.uniform_(-6.9, -2.3).exp_().expm1().log())

    def mix(self, query: Tensor, key: Tensor, value: Tensor, x: Any, *, causal: bool, **options: Any) -> Any:
        decay = None
        if self.step is not None:
            steps = F.softplus(accumulable(self.step(x)))
            decay = (-accumulable(self.log_rate).exp() * steps).mT
        beta = torch.sigmoid(accumulable(self.beta(x))).mT
        return delta_rule(_unit(query), _unit(key), value, beta, decay=decay, scale=1.0, **options)


def carries_state(options: dict[str, Any]) -> bool:
    return options.get("initial_state") is not None or bool(options.get("return_state"))


def _unit(x: Tensor) -> Tensor:
    """Vectors of norm 1; a zero one stays zero, with a gradient that is bounded."""
    wide = accumulable(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


class LinformerMixer(Mixer):
    name = "linformer"
    family = "dense"
    options: Linformer

    def __init__(self, options: Linformer, heads: Heads, **factory: Any) -> None:
        super().__init__(options, heads)
        if options.projection is not None:
            self.projection = options.projection
            return
        assert options.seq_len is not None
        assert options.num_keys is not None
        self.projection = LinformerProjection(
            options.seq_len,
            options.num_keys,
            num_heads=heads.kv_heads,
            kind=options.kind,
            share=options.share,
            **factory,
        )

    @classmethod
    def check_causal(cls, causal: bool) -> None:
        if causal:
            raise causal_error("Linformer", "projected keys")

    def mix(self, query: Tensor, key: Tensor, value: Tensor, x: Any, *, causal: bool, **options: Any) -> Tensor:
        return self.projection(query, key, value, **options)


class NystromMixer(Mixer):
    name = "nystrom"
    family = "dense"
    options: Nystrom

    def __init__(self, options: Nystrom, heads: Heads, **factory: Any) -> None:
        super().__init__(options, heads)
        self.conv: nn.Conv2d | None = None
        if options.conv_kernel is not None:
            width, kernel = heads.kv_heads, (options.conv_kernel, 1)
            self.conv = nn.Conv2d(width, width, kernel, padding="same", groups=width, bias=False, **factory)

    @classmethod
    def check_causal(cls, causal: bool) -> None:
        if causal:
            raise causal_error("Nystrom", "landmarks")

    def mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        x: Any,
        *,
        causal: bool,
        key_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        if self.conv is not None and x is None:
            raise ValueError("fastattn: conv_kernel must be None where query and key are not the same tensor")
        out = nystrom_attention(
            query,
            key,
            value,
            num_landmarks=self.options.num_landmarks,
            key_mask=key_mask,
            query_mask=None if x is None else key_mask,
            iterations=self.options.iterations,
            **options,
        )
        if self.conv is None:
            return out
        group = self.heads.num_heads // self.heads.kv_heads
        return out + self.conv(without_masked(value, key_mask)).repeat_interleave(group, 1)
