"""Attention mechanisms and their options: what `mechanism=` takes, as a name or as one of these classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from fastattn.dense import arguments as check
from fastattn.linear import features, lowrank
from fastattn.linear.features import AnyFeatureMap
from fastattn.nn import mixers
from fastattn.nn.linformer import Kind, LinformerProjection, Share
from fastattn.nn.mixers import Mechanism
from fastattn.nn.sparse_mechanisms import LSH, NSA, BigBird, Fixed, Longformer, Strided, TopK, Window

Features = Literal["positive", "hyperbolic", "relu"]


@dataclass(frozen=True)
class Performer(Mechanism):
    """Softmax attention estimated through random features (FAVOR+, arXiv:2009.14794), causal or not.

    Attributes:
        num_features: random directions of each head; "hyperbolic" makes two features of each.
        features: "positive", "hyperbolic" or "relu", as in `performer_attention`.
        orthogonal: directions orthogonal in blocks of head_dim, which lowers the variance.
        redraw_interval: calls in training mode after which the directions are drawn anew; None keeps them, and
            `redraw()` of the layer's `mixer` draws at any time. Breaks a compiled graph in two.
        seed: of the sequence of draws. None takes one from torch's generator, so that layers differ and
            `torch.manual_seed` fixes them all.
    """

    mixer = mixers.PerformerMixer
    num_features: int = 256
    features: Features = "positive"
    orthogonal: bool = True
    redraw_interval: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        lowrank.positive("num_features", self.num_features)
        _one_of("features", self.features, get_args(Features))
        check.flag("orthogonal", self.orthogonal)
        if self.redraw_interval is not None:
            lowrank.positive("redraw_interval", self.redraw_interval)
        if self.seed is not None and not (check.is_integer(self.seed) and 0 <= self.seed < 2**62):
            raise ValueError(f"fastattn: seed must be None or an int from 0 to 2**62 - 1, got {self.seed!r}")


@dataclass(frozen=True)
class Linear(Mechanism):
    """Linear attention through a feature map (arXiv:2006.16236), causal or not.

    Attributes:
        feature_map: as in `linear_attention`. A module may be learned; all layers with these options then share it.
        normalize: divide by the sum of the weights.
    """

    mixer = mixers.LinearMixer
    feature_map: AnyFeatureMap = "elu"
    normalize: bool = True

    def __post_init__(self) -> None:
        features.resolve(self.feature_map, 1)
        check.flag("normalize", self.normalize)


@dataclass(frozen=True)
class Retention(Mechanism):
    """RetNet's retention (arXiv:2307.08621): head h forgets by 1 - 2^(-5-h) a step. Causal, self-attention.

    Each head's output is normalised and gated by silu of a projection of the layer's input. The paper's rotation of
    queries and keys is that of rotary positions, which the model has to apply.
    """

    mixer = mixers.RetentionMixer


@dataclass(frozen=True)
class GLA(Mechanism):
    """Gated linear attention (arXiv:2312.06635): the input gates each key channel's memory. Causal, self-attention.

    The state's channels decay by sigmoid(W2 W1 x)^(1 / temperature) a step; the output is normalised and gated as
    retention's is.

    Attributes:
        gate_rank: rows of W1.
        temperature: the larger, the longer the memory.
    """

    mixer = mixers.GLAMixer
    gate_rank: int = 16
    temperature: float = 16.0

    def __post_init__(self) -> None:
        lowrank.positive("gate_rank", self.gate_rank)
        if check.number("temperature", self.temperature) <= 0:
            raise ValueError(f"fastattn: temperature must be above 0, got {self.temperature}")


@dataclass(frozen=True)
class Delta(Mechanism):
    """The delta rule: a write replaces what the state held for that key. Causal, self-attention.

    Queries and keys are brought to norm 1, and sigmoid(W x) says how much of the old value is replaced. The papers'
    short convolutions of queries, keys and values are not part of it.

    Attributes:
        gated: Gated DeltaNet (arXiv:2412.06464): the state also decays, by exp(-a softplus(W x + b)) with a learned
            rate a for each head as in Mamba-2, and the normalised output is gated as retention's is. False: DeltaNet
            (arXiv:2406.06484), whose output is normalised only.
    """

    mixer = mixers.DeltaMixer
    gated: bool = True

    def __post_init__(self) -> None:
        check.flag("gated", self.gated)


@dataclass(frozen=True)
class Linformer(Mechanism):
    """Attention to num_keys learned mixtures of up to seq_len keys (arXiv:2006.04768). Not causal.

    Attributes:
        seq_len, num_keys, kind, share: of a `LinformerProjection` for each layer.
        projection: in their place, one `LinformerProjection` for all layers with these options (the paper's layer-wise
            sharing).
    """

    mixer = mixers.LinformerMixer
    seq_len: int | None = None
    num_keys: int | None = None
    kind: Kind = "linear"
    share: Share = "heads"
    projection: LinformerProjection | None = None

    def __post_init__(self) -> None:
        if self.projection is not None:
            if not isinstance(self.projection, LinformerProjection):
                raise TypeError(
                    f"fastattn: projection must be a LinformerProjection, got {type(self.projection).__name__}"
                )
            if (self.seq_len, self.num_keys, self.kind, self.share) != (None, None, "linear", "heads"):
                raise ValueError("fastattn: projection must come alone: it has sizes, a kind and sharing of its own")
        else:  # which checks them
            LinformerProjection(self.seq_len, self.num_keys, kind=self.kind, share=self.share, device="meta")  # type: ignore[arg-type]


@dataclass(frozen=True)
class Nystrom(Mechanism):
    """Softmax attention from what a few landmarks see and are seen by (Nystromformer, arXiv:2102.03902). Not causal.

    Padding changes nothing in self-attention; elsewhere queries that are padding count towards their landmarks.

    Attributes:
        num_landmarks, iterations: as in `nystrom_attention`.
        conv_kernel: length of the paper's depthwise convolution of the values, one kernel a head, which is added to the
            result; None for none. Self-attention only.
    """

    mixer = mixers.NystromMixer
    num_landmarks: int = 64
    iterations: int = 6
    conv_kernel: int | None = None

    def __post_init__(self) -> None:
        lowrank.positive("num_landmarks", self.num_landmarks)
        lowrank.positive("iterations", self.iterations)
        if self.conv_kernel is not None:
            lowrank.positive("conv_kernel", self.conv_kernel)


_OPTIONS: tuple[type[Mechanism], ...] = (
    *(Performer, Linformer, Nystrom, Linear, Retention, GLA, Delta),
    *(Window, Longformer, BigBird, Strided, Fixed, LSH, TopK, NSA),
)
#: The names that `mechanism=` knows. "flash" is softmax attention itself.
NAMES = ("flash", *(options.mixer.name for options in _OPTIONS))


def resolve(mechanism: Any, seq_len: int | None = None) -> Mechanism | None:
    """The options that a `mechanism=` argument names or is; None for "flash".

    seq_len is the longest input, where a model knows it: Linformer by name then has a quarter as many keys, as in the
    paper's experiments.

    Raises:
        TypeError, ValueError: an unknown name, or neither a name nor options.
    """
    if isinstance(mechanism, Mechanism):
        return mechanism
    if not isinstance(mechanism, str):
        raise TypeError(
            f"fastattn: mechanism must be a name or options such as Performer(), got {type(mechanism).__name__}"
        )
    if mechanism not in NAMES:
        raise ValueError(f"fastattn: mechanism must be one of {', '.join(NAMES)}, got {mechanism!r}")
    if mechanism == "flash":
        return None
    options = _OPTIONS[NAMES.index(mechanism) - 1]
    if options is not Linformer:
        return options()
    if seq_len is None:
        raise ValueError(
            "fastattn: mechanism must be Linformer(seq_len, num_keys), because these have no default, got 'linformer'"
        )
    return Linformer(seq_len, max(1, seq_len // 4))


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"fastattn: {name} must be one of {', '.join(choices)}, got {value!r}")
