"""The feature grid of the linear family, as data: what a backend must get right before it counts as verified.

Each feature of the contract of ``fastattn.linear.problem`` appears alone, then in the combinations that break kernels:
chunks that end inside a sequence, states that pass between calls, rows and sequences that see no key, decay that
forgets everything, heads that share keys. The sizes straddle the chunks that kernels like (16, 32, 64, 128).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Feature = Literal["identity", "elu", "relu", "softmax", "cosformer", "signs"]
Decay = Literal["head", "step", "constant", "vector"]
Mask = Literal["random", "padding", "sequence"]
Layout = Literal["bhnd", "bnhd", "packed_qkv", "sliced", "expanded"]


@dataclass(frozen=True)
class Case:
    """One problem of the grid: shapes and options, independent of dtype, device and backend.

    Attributes:
        name: unique, readable; names the test and the row of the record.
        batch, heads, kv_heads, q_len, k_len, head_dim, value_dim: the shapes; ``kv_heads``, ``k_len`` and ``value_dim``
            default to ``heads``, ``q_len`` and ``head_dim``.
        causal, normalize, scale: as in ``fastattn.linear_attention``.
        feature: the feature map; "signs" is a callable, relu(x) and relu(-x), of which kernels know nothing.
        num_features: rows of the feature map's projection; None: it has none.
        bias: whether softmax features have one.
        decay: its shape: (H,), (B, H, N), that expanded from one number, (B, H, N, M).
        decay_size: decays lie between -decay_size and 0; "constant" is -decay_size.
        delta: ``fastattn.delta_rule``, with keys of norm 1 and beta between 0 and 1.
        key_mask: which keys it drops: 30 % anywhere, a tail of each sequence, or all of the last sequence's.
        state_in, state_out: whether the call starts from a state, and whether it returns one.
        packed: lengths of packed sequences; ``batch`` and ``q_len`` do not count.
        tail: rows past the last packed sequence.
        layout: how the inputs lie in memory.
        magnitude: standard deviation of query and key.
        positive: query and key have no negative elements.
    """

    family: ClassVar[str] = "linear"

    name: str
    batch: int = 2
    heads: int = 2
    kv_heads: int | None = None
    q_len: int = 65
    k_len: int | None = None
    head_dim: int = 32
    value_dim: int | None = None
    causal: bool = True
    feature: Feature = "elu"
    num_features: int | None = None
    bias: bool = False
    normalize: bool = True
    scale: float | None = None
    decay: Decay | None = None
    decay_size: float = 0.3
    delta: bool = False
    key_mask: Mask | None = None
    state_in: bool = False
    state_out: bool = False
    packed: tuple[int, ...] | None = None
    tail: int = 0
    layout: Layout = "bhnd"
    magnitude: float = 1.0
    positive: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def hkv(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def dv(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def rows(self) -> tuple[int, int, int]:
        """(batch size of the tensors, their query length, their key length)."""
        if self.packed is not None:
            return 1, sum(self.packed) + self.tail, sum(self.packed) + self.tail
        return self.batch, self.q_len, self.q_len if self.k_len is None else self.k_len

    @property
    def sequences(self) -> int:
        return self.batch if self.packed is None else len(self.packed)

    @property
    def mapped_dim(self) -> int:
        """Head size of the query and key that a backend sees: feature maps that kernels do not know come before."""
        return self.head_dim * (2 if self.feature in ("cosformer", "signs") else 1)

    @property
    def m(self) -> int:
        """Features of a query or key."""
        return self.mapped_dim if self.num_features is None else self.num_features

    @property
    def features(self) -> frozenset[str]:
        """The names of the features (keys of ``fastattn.backends.FEATURES``) that a backend needs for it."""
        present = {
            "backward": True,
            "causal": self.causal,
            "normalize": self.normalize,
            "decay": self.decay not in (None, "vector"),
            "vector_decay": self.decay == "vector",
            "delta": self.delta,
            "projection": self.num_features is not None and self.feature != "softmax",
            "softmax_features": self.feature == "softmax",
            "state": self.state_in or self.state_out,
            "key_mask": self.key_mask is not None,
            "packed": self.packed is not None,
            "gqa": self.hkv != self.heads,
            "value_dim": self.dv != self.mapped_dim,
        }
        return frozenset(name for name, needed in present.items() if needed)


PLAIN: dict[str, Any] = {"feature": "identity", "normalize": False}
SOFTMAX: dict[str, Any] = {"feature": "softmax", "num_features": 48}
DELTA: dict[str, Any] = {**PLAIN, "delta": True}

_FEATURES = [
    Case("identity", **PLAIN),
    Case("identity_normalized", feature="identity", positive=True),
    Case("elu"),
    Case("elu_unnormalized", normalize=False, scale=0.4),
    Case("relu", feature="relu"),
    Case("relu_zero_denominators", feature="relu", head_dim=1, q_len=40),
    Case("relu_projected", feature="relu", num_features=48),
    Case("relu_projected_unnormalized", feature="relu", num_features=24, normalize=False),
    Case("elu_projected", feature="elu", num_features=16),
    Case("identity_projected", num_features=40, **PLAIN),
    Case("softmax", **SOFTMAX),
    Case("softmax_bias", bias=True, **SOFTMAX),
    Case("softmax_scale", scale=0.7, **SOFTMAX),
    Case("softmax_large", magnitude=3.0, **SOFTMAX),
    Case("softmax_small", magnitude=0.25, **SOFTMAX),
    Case("softmax_one_feature", feature="softmax", num_features=1),
    Case("softmax_wide", feature="softmax", num_features=300, head_dim=64, batch=1, heads=1),
    Case("softmax_130", feature="softmax", num_features=130, q_len=130, value_dim=80, batch=1, heads=1),
    Case("projection_wide", feature="relu", num_features=257, head_dim=16),
    Case("cosformer", feature="cosformer"),
    Case("callable", feature="signs", normalize=False),
]

_FULL = [
    Case("full_identity", causal=False, **PLAIN),
    Case("full_elu", causal=False),
    Case("full_relu_projected", causal=False, feature="relu", num_features=48),
    Case("full_softmax", causal=False, **SOFTMAX),
    Case("full_softmax_bias_large", causal=False, bias=True, magnitude=3.0, **SOFTMAX),
    Case("full_softmax_wide", causal=False, feature="softmax", num_features=300, head_dim=64),
    Case("full_cosformer", causal=False, feature="cosformer"),
    *(
        Case(f"full_{q_len}x{k_len}", causal=False, q_len=q_len, k_len=k_len)
        for q_len, k_len in ((1, 200), (130, 1), (63, 65), (200, 64))
    ),
    Case("full_softmax_15x130", causal=False, q_len=15, k_len=130, **SOFTMAX),
    Case("full_state", causal=False, q_len=20, k_len=70, state_in=True, state_out=True),
    Case("full_softmax_state", causal=False, state_in=True, state_out=True, key_mask="random", **SOFTMAX),
]

_LENGTHS = [
    *(Case(f"length_{n}", q_len=n, **PLAIN) for n in (1, 15, 63, 64, 130)),
    Case("length_200", q_len=200, batch=1),
    Case("length_300", q_len=300, batch=1, head_dim=16),
    *(Case(f"softmax_length_{n}", q_len=n, **SOFTMAX) for n in (1, 15, 64)),
    Case("softmax_length_200", q_len=200, batch=1, **SOFTMAX),
]

_HEAD_SIZES = [
    *(Case(f"head_dim_{d}", head_dim=d, q_len=70) for d in (1, 3, 16, 33, 64)),
    Case("head_dim_80", head_dim=80, batch=1),
    Case("head_dim_128", head_dim=128, batch=1, heads=1),
    Case("head_dim_256", head_dim=256, batch=1, heads=1),
    Case("head_dim_256_full", head_dim=256, q_len=33, heads=1, causal=False),
    *(Case(f"softmax_head_dim_{d}", head_dim=d, q_len=33, **SOFTMAX) for d in (1, 33, 128)),
    Case("value_dim_smaller", head_dim=64, value_dim=33),
    Case("value_dim_larger", head_dim=16, value_dim=128, **PLAIN),
    Case("value_dim_1", head_dim=80, value_dim=1),
    Case("value_dim_256", head_dim=3, value_dim=256, causal=False),
]

_DECAYS = [
    Case("decay_head", decay="head", **PLAIN),
    Case("decay_head_elu", decay="head", q_len=130),
    Case("decay_step", decay="step", **PLAIN),
    Case("decay_step_elu", decay="step", q_len=130),
    Case("decay_step_odd", decay="step", q_len=15, head_dim=33, value_dim=80, **PLAIN),
    Case("decay_constant", decay="constant", decay_size=0.05, q_len=100, **PLAIN),
    Case("decay_zero", decay="step", decay_size=0.0),
    Case("decay_strong", decay="step", decay_size=30.0, q_len=130, **PLAIN),
    Case("decay_strong_constant", decay="constant", decay_size=30.0),
    Case("decay_relu_projected", decay="step", feature="relu", num_features=24),
    Case("decay_softmax", decay="step", **SOFTMAX),
    Case("decay_softmax_strong", decay="head", decay_size=30.0, **SOFTMAX),
    Case("vector_decay", decay="vector", **PLAIN),
    Case("vector_decay_elu", decay="vector", head_dim=16),
    Case("vector_decay_130", decay="vector", q_len=130, batch=1, head_dim=33, value_dim=16, **PLAIN),
    Case("vector_decay_strong", decay="vector", decay_size=30.0, **PLAIN),
    Case("vector_decay_1", decay="vector", q_len=1, head_dim=64, **PLAIN),
    Case("vector_decay_80", decay="vector", q_len=33, head_dim=80, **PLAIN),
]

_DELTA = [
    Case("delta", **DELTA),
    Case("delta_odd", q_len=15, head_dim=33, value_dim=16, **DELTA),
    Case("delta_1", q_len=1, head_dim=3, **DELTA),
    Case("delta_130", q_len=130, batch=1, head_dim=64, **DELTA),
    Case("delta_decay", decay="step", **DELTA),
    Case("delta_decay_head", decay="head", q_len=100, batch=1, **DELTA),
    Case("delta_decay_strong", decay="step", decay_size=30.0, q_len=70, batch=1, **DELTA),
    Case("delta_state", state_in=True, state_out=True, decay="step", q_len=70, batch=1, **DELTA),
    Case("delta_key_mask", key_mask="random", decay="step", state_out=True, **DELTA),
    Case("delta_packed", packed=(20, 1, 0, 33), decay="step", state_in=True, state_out=True, **DELTA),
    Case("delta_gqa", heads=4, kv_heads=2, q_len=33, scale=1.0, **DELTA),
]

_STATES = [
    Case("state_out", state_out=True),
    Case("state_in", state_in=True),
    Case("state_both", state_in=True, state_out=True, q_len=130, batch=1, **PLAIN),
    Case("state_1", state_in=True, state_out=True, q_len=1),
    Case("state_decay", state_in=True, state_out=True, decay="step", q_len=100, batch=1),
    Case("state_decay_strong", state_in=True, state_out=True, decay="step", decay_size=30.0),
    Case("state_vector_decay", state_in=True, state_out=True, decay="vector", value_dim=16, **PLAIN),
    Case("state_relu_projected", state_in=True, state_out=True, feature="relu", num_features=40),
    Case("state_softmax", state_in=True, state_out=True, **SOFTMAX),
    Case("state_softmax_decay", state_in=True, state_out=True, decay="head", bias=True, **SOFTMAX),
    Case("state_softmax_1", state_in=True, state_out=True, q_len=1, **SOFTMAX),
]

_MASKS = [
    Case("key_mask", key_mask="random"),
    Case("key_mask_identity", key_mask="random", state_out=True, **PLAIN),
    Case("key_mask_full", key_mask="random", causal=False, k_len=130),
    Case("key_mask_padding", key_mask="padding", q_len=130, state_out=True),
    Case("key_mask_sequence", key_mask="sequence", state_out=True),
    Case("key_mask_sequence_full", key_mask="sequence", causal=False),
    Case("key_mask_decay", key_mask="random", decay="step", state_in=True, state_out=True),
    Case("key_mask_vector_decay", key_mask="padding", decay="vector", state_out=True, **PLAIN),
    Case("key_mask_relu_projected", key_mask="random", feature="relu", num_features=24),
    Case("key_mask_softmax", key_mask="random", state_out=True, **SOFTMAX),
    Case("key_mask_softmax_padding", key_mask="padding", causal=False, **SOFTMAX),
    Case("key_mask_softmax_sequence", key_mask="sequence", state_out=True, **SOFTMAX),
]

_HEADS = [
    Case("gqa", heads=4, kv_heads=2),
    Case("gqa_full", heads=4, kv_heads=2, causal=False, k_len=70),
    Case("mqa_decay", heads=4, kv_heads=1, decay="step", batch=1, state_out=True, **PLAIN),
    Case("gqa_vector_decay", heads=4, kv_heads=2, decay="vector", batch=1, q_len=33, head_dim=16, **PLAIN),
    Case("gqa_softmax", heads=6, kv_heads=2, batch=1, state_in=True, state_out=True, **SOFTMAX),
]

_PACKED = [
    Case("packed", packed=(65, 1, 30)),
    Case("packed_tail", packed=(5, 64, 0, 31), tail=7, **PLAIN),
    Case("packed_full", packed=(20, 40, 0, 3), causal=False),
    Case("packed_state", packed=(40, 0, 70), state_in=True, state_out=True, decay="step"),
    Case("packed_head_decay", packed=(15, 64), decay="head", heads=4, kv_heads=2, value_dim=16, **PLAIN),
    Case("packed_vector_decay", packed=(15, 33), decay="vector", state_out=True, tail=2, **PLAIN),
    Case("packed_key_mask", packed=(30, 9, 40), key_mask="random", feature="relu", num_features=24),
    Case("packed_cosformer", packed=(30, 9), feature="cosformer"),
    Case("packed_softmax", packed=(33, 0, 20, 65), state_in=True, state_out=True, tail=3, **SOFTMAX),
    Case("packed_softmax_full", packed=(33, 0, 20), causal=False, **SOFTMAX),
]

_LAYOUTS = [
    Case("layout_bnhd", layout="bnhd", decay="step"),
    Case("layout_packed_qkv", layout="packed_qkv", **PLAIN),
    Case("layout_sliced", layout="sliced", head_dim=33, decay="vector", state_in=True, **PLAIN),
    Case("layout_sliced_softmax", layout="sliced", state_in=True, state_out=True, key_mask="random", **SOFTMAX),
    Case("layout_expanded", layout="expanded", causal=False, k_len=70),
    Case("layout_delta", layout="bnhd", decay="step", q_len=33, **DELTA),
]

_EMPTY = [
    Case("batch_0", batch=0, state_out=True),
    Case("length_0", q_len=0, state_in=True, state_out=True),
    Case("length_0_decay", q_len=0, decay="step", state_in=True, state_out=True, **PLAIN),
    Case("length_0_softmax", q_len=0, state_in=True, state_out=True, **SOFTMAX),
    Case("full_0x5", causal=False, q_len=0, k_len=5),
    Case("full_5x0", causal=False, q_len=5, k_len=0),
    Case("full_softmax_5x0", causal=False, q_len=5, k_len=0, **SOFTMAX),
    Case("delta_0", q_len=0, state_in=True, state_out=True, **DELTA),
]

_EVERYTHING = [
    Case(
        "everything",
        heads=4,
        kv_heads=2,
        head_dim=33,
        value_dim=40,
        packed=(70, 1, 0, 31),
        tail=2,
        decay="step",
        key_mask="random",
        state_in=True,
        state_out=True,
        bias=True,
        scale=0.2,
        layout="sliced",
        **SOFTMAX,
    ),
]

GRID: tuple[Case, ...] = (
    *_FEATURES,
    *_FULL,
    *_LENGTHS,
    *_HEAD_SIZES,
    *_DECAYS,
    *_DELTA,
    *_STATES,
    *_MASKS,
    *_HEADS,
    *_PACKED,
    *_LAYOUTS,
    *_EMPTY,
    *_EVERYTHING,
)
"""Every case, in the order in which a report lists them."""
