"""The feature grid of the dense family, as data: what a backend must get right before it counts as verified.

Each feature of the contract of ``fastattn.attention`` appears alone, then in the combinations that break kernels:
intervals that end inside a tile, rows and sequences that see no key, masks that broadcast, heads that share keys.
The sizes straddle the tile edges that kernels like (16, 32, 64, 128) and stay small, so that the whole grid runs in
seconds on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Mask = Literal["bool", "bias", "bias_float32"]
Fill = Literal["random", "empty_rows", "neg_inf", "finite_mask"]
Layout = Literal["bhsd", "bshd", "bhds", "packed_qkv", "sliced", "expanded"]
Blocks = Literal["random", "band", "global", "empty_rows", "none"]
Window = tuple[int | None, int | None]


@dataclass(frozen=True)
class Case:
    """One problem of the grid: shapes and options, independent of dtype, device and backend.

    Attributes:
        name: unique, readable; names the test and the row of the record.
        batch, heads, kv_heads, q_len, k_len, head_dim, value_dim: the shapes; ``kv_heads`` and ``value_dim`` default
            to ``heads`` and ``head_dim``.
        causal, window, query_start, key_start, key_lengths, scale, softcap, dropout_p, deterministic: as in
            ``fastattn.attention``; a tuple becomes an integer tensor with one entry per sequence.
        mask: kind of ``attn_mask``; "bias" has the query's dtype.
        mask_shape: its axes, each letter one of B, H, Q, K, or 1 where it broadcasts ("1HQ1", "QK", "").
        mask_fill: what it holds. "empty_rows": some rows keep no key. "neg_inf": some entries are -inf.
            "finite_mask": some entries are -1e4, as models write that mask in float16.
        mask_grad: whether the gradient of the bias is asked for.
        blocks: what a ``BlockMask`` keeps, beside ``mask``. "random": blocks, some full, of others random pairs.
            "band": keys near the diagonal. "global": those, and the first rows and columns. "empty_rows": random
            blocks, but rows and whole blocks of rows keep no key. "none": nothing.
        block_size: queries and keys of its blocks.
        block_axes: "BH", "B1", "1H" or "11": whether each sequence and head has its own.
        alibi: shape of ``alibi_slopes``, "H" or "BH".
        sinks: whether each head has a sink (with gradient).
        lse: whether the LSE is returned, compared and differentiated.
        layout: how the inputs lie in memory.
        magnitude: standard deviation of query and key.
        packed: (query lengths, key lengths) of the sequences of an ``attention_varlen`` problem.
        page_size: rows of a page of an ``attention_with_kvcache`` problem, forward only. ``query_start`` is then
            ``key_lengths`` less ``q_len`` (see ``_paged``), so that the case means the same without pages.
    """

    family: ClassVar[str] = "dense"

    name: str
    batch: int = 2
    heads: int = 2
    kv_heads: int | None = None
    q_len: int = 65
    k_len: int = 65
    head_dim: int = 64
    value_dim: int | None = None
    causal: bool = False
    window: Window | None = None
    query_start: int | tuple[int, ...] | None = None
    key_start: tuple[int, ...] | None = None
    key_lengths: tuple[int, ...] | None = None
    mask: Mask | None = None
    mask_shape: str = "BHQK"
    mask_fill: Fill = "random"
    mask_grad: bool = True
    blocks: Blocks | None = None
    block_size: tuple[int, int] = (64, 64)
    block_axes: str = "11"
    scale: float | None = None
    softcap: float | None = None
    alibi: Literal["H", "BH"] | None = None
    sinks: bool = False
    dropout_p: float = 0.0
    lse: bool = False
    deterministic: bool = False
    layout: Layout = "bhsd"
    magnitude: float = 1.0
    packed: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    page_size: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def hkv(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def dv(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def sequences(self) -> int:
        """Number of sequences, packed or batched."""
        return self.batch if self.packed is None else len(self.packed[0])

    @property
    def longest(self) -> tuple[int, int]:
        """Largest number of queries and of keys of a sequence."""
        return (self.q_len, self.k_len) if self.packed is None else (max(self.packed[0]), max(self.packed[1]))

    @property
    def features(self) -> frozenset[str]:
        """The names of the features (keys of ``fastattn.backends.FEATURES``) that a backend needs for it."""
        present = {
            "backward": self.page_size is None,
            "causal": self.causal,
            "window": self.window is not None,
            "alignment": self._off_the_diagonal,
            "query_start": isinstance(self.query_start, tuple),
            "key_start": self.key_start is not None,
            "key_lengths": self.key_lengths is not None,
            "packed": self.packed is not None,
            "paged": self.page_size is not None,
            "bool_mask": self.mask == "bool",
            "float_bias": self.mask not in (None, "bool"),
            "bias_grad": self.mask not in (None, "bool") and self.mask_grad,
            "block_mask": self.blocks is not None,
            "lse_grad": self.lse and self.page_size is None,
            "gqa": self.hkv != self.heads,
            "value_dim": self.dv != self.head_dim,
            "softcap": self.softcap is not None,
            "alibi": self.alibi is not None,
            "sinks": self.sinks,
            "dropout": self.dropout_p > 0,
            "deterministic": self.deterministic,
        }
        return frozenset(name for name, needed in present.items() if needed)

    @property
    def _off_the_diagonal(self) -> bool:
        moved = isinstance(self.query_start, int) and self.query_start != 0
        return (self.causal or self.window is not None) and (self.q_len != self.k_len or moved)


_LENGTHS = [
    Case("lengths_1x1", q_len=1, k_len=1),
    Case("lengths_1x200", q_len=1, k_len=200),
    Case("lengths_5x1", q_len=5, k_len=1),
    Case("lengths_63x65", q_len=63, k_len=65),
    Case("lengths_64x64", q_len=64, k_len=64),
    Case("lengths_127x200", q_len=127, k_len=200),
    Case("lengths_200x127", q_len=200, k_len=127),
    Case("lengths_300x300", batch=1, q_len=300, k_len=300),
]

_HEAD_SIZES = [
    *(Case(f"head_dim_{d}", head_dim=d, q_len=37, k_len=70, causal=True) for d in (1, 3, 16, 33, 80, 128, 256)),
    Case("value_dim_smaller", head_dim=64, value_dim=33),
    Case("value_dim_larger", head_dim=16, value_dim=128, causal=True),
    Case("value_dim_1", head_dim=128, value_dim=1),
    Case("value_dim_256", head_dim=3, value_dim=256),
]

_INTERVALS = [
    Case("causal", causal=True),
    Case("causal_300", batch=1, q_len=300, k_len=300, causal=True),
    Case("causal_5x200", q_len=5, k_len=200, causal=True, lse=True),
    Case("causal_200x63_empty_rows", q_len=200, k_len=63, causal=True, lse=True),
    Case("window_left", q_len=127, k_len=127, window=(16, None)),
    Case("window_right", q_len=127, k_len=127, window=(None, 4)),
    Case("window_both", q_len=200, k_len=200, window=(33, 17)),
    Case("window_asymmetric", q_len=65, k_len=127, window=(0, 31)),
    Case("window_diagonal", window=(0, 0)),
    Case("window_causal", batch=1, q_len=300, k_len=300, causal=True, window=(40, None)),
    Case("window_wide", batch=1, q_len=300, k_len=300, causal=True, window=(200, None)),  # whole tiles within it
    Case("window_causal_right_ignored", causal=True, window=(5, 9)),
    Case("window_empty_rows", q_len=200, k_len=63, window=(7, 7), lse=True),
    Case("query_start_0", q_len=65, k_len=127, causal=True, query_start=0),
    Case("query_start_beyond", q_len=65, k_len=65, window=(70, 3), query_start=40, lse=True),
    Case("query_start_negative", q_len=65, k_len=65, causal=True, query_start=-20, lse=True),
    Case("query_start_tensor", q_len=63, k_len=127, causal=True, query_start=(0, 37)),
    Case("query_start_tensor_window", q_len=63, k_len=127, window=(20, 5), query_start=(90, -3)),
    Case("key_start", k_len=127, key_start=(3, 70)),
    Case("key_start_causal", causal=True, key_start=(0, 17), lse=True),
    Case("key_lengths", k_len=127, key_lengths=(100, 0), lse=True),
    Case("key_lengths_causal", causal=True, key_lengths=(64, 20), query_start=0),
    Case("key_lengths_decode", q_len=1, k_len=200, causal=True, key_lengths=(200, 71), query_start=(199, 70)),
    Case("key_start_past_key_lengths", key_start=(10, 60), key_lengths=(40, 30), lse=True),
    Case(
        "interval_all",
        batch=3,
        q_len=65,
        k_len=200,
        causal=True,
        window=(50, 2),
        query_start=(100, 3, 20),
        key_start=(70, 0, 30),
        key_lengths=(180, 40, 25),
        lse=True,
    ),
]

_MASKS = [
    Case("bool_dense", mask="bool"),
    *(Case(f"bool_{shape}", k_len=70, mask="bool", mask_shape=shape) for shape in ("QK", "B1QK", "1HQK", "B11K")),
    Case("bool_H1K", k_len=70, mask="bool", mask_shape="H1K"),
    Case("bool_rows", mask="bool", mask_shape="B1Q1", lse=True),
    Case("bool_empty_rows", q_len=127, mask="bool", mask_shape="B1QK", mask_fill="empty_rows", lse=True),
    Case("bool_interval", k_len=127, mask="bool", causal=True, key_lengths=(127, 90), key_start=(9, 0), lse=True),
    *(
        Case(f"bias_{shape or 'scalar'}", q_len=63, k_len=70, mask="bias", mask_shape=shape)
        for shape in ("BHQK", "QK", "B1QK", "1HQK", "B11K", "1HQ1", "BH11", "")
    ),
    Case("bias_without_gradient", mask="bias", mask_shape="HQK", mask_grad=False),
    Case("bias_neg_inf", mask="bias", mask_shape="BHQK", mask_fill="neg_inf", lse=True),
    Case("bias_finite_mask", mask="bias_float32", mask_shape="HQK", mask_fill="finite_mask", lse=True),
    Case("bias_float32", mask="bias_float32", mask_shape="1HQK", causal=True),
    Case("bias_float32_broadcast", k_len=127, mask="bias_float32", mask_shape="B11K"),
    Case(
        "bias_interval",
        heads=4,
        kv_heads=2,
        q_len=100,
        k_len=127,
        mask="bias",
        mask_shape="B1QK",
        causal=True,
        window=(60, None),
        key_lengths=(120, 0),
        query_start=(20, 5),
    ),
]

_HEADS = [
    Case("gqa_2", heads=4, kv_heads=2),
    Case("gqa_8_causal", batch=1, heads=16, kv_heads=2, q_len=70, k_len=70, head_dim=16, causal=True, lse=True),
    Case("mqa", heads=8, kv_heads=1, q_len=33, k_len=127, head_dim=32),
    Case("mqa_many_rows", batch=1, heads=8, kv_heads=1, q_len=1500, k_len=16, head_dim=16),
    Case("mqa_decode", heads=8, kv_heads=1, q_len=1, k_len=300, key_lengths=(300, 65)),
    Case("decode_long", heads=4, kv_heads=2, q_len=1, k_len=1100, head_dim=32, key_lengths=(1100, 513), lse=True),
    Case(
        "decode_long_extras",
        heads=4,
        kv_heads=1,
        q_len=3,
        k_len=1100,
        head_dim=40,
        causal=True,
        window=(800, None),
        key_start=(0, 700),
        softcap=3.0,
        alibi="H",
        sinks=True,
        dropout_p=0.2,
    ),
    Case("gqa_bias", heads=4, kv_heads=2, mask="bias", mask_shape="HQK"),
    Case("gqa_deterministic", heads=4, kv_heads=2, causal=True, deterministic=True),
]

_NUMBERS = [
    Case("scale_0", scale=0.0),
    Case("scale_negative", scale=-0.3, causal=True),
    Case("scale_custom", scale=0.5, lse=True),
    Case("one_hot_softmax", magnitude=6.0, causal=True, lse=True),
    Case("lse_gradient", q_len=127, lse=True),
    Case("lse_gradient_gqa", heads=4, kv_heads=2, causal=True, lse=True, head_dim=33),
]

_LAYOUTS = [
    Case("layout_bshd", layout="bshd", causal=True),
    Case("layout_bhds", layout="bhds", k_len=70),
    Case("layout_packed_qkv", layout="packed_qkv"),
    Case("layout_sliced", layout="sliced", head_dim=33, k_len=70),
    Case("layout_expanded", layout="expanded", k_len=70, mask="bias", mask_shape="BHQK"),
]

_EXTRAS = [
    Case("softcap", softcap=2.0),
    Case("softcap_bias_causal", softcap=5.0, scale=0.7, mask="bias", mask_shape="HQK", causal=True, lse=True),
    Case("alibi", alibi="H", k_len=127),
    Case("alibi_batch", alibi="BH", k_len=127, causal=True, window=(40, None), query_start=(60, 10)),
    Case("sinks", sinks=True, lse=True),
    Case("sinks_empty_rows", sinks=True, k_len=40, causal=True, key_lengths=(40, 0), lse=True),
    Case("sinks_gqa", sinks=True, heads=4, kv_heads=2, causal=True),
    Case("dropout", dropout_p=0.2, k_len=70),
    Case("dropout_gqa_causal", dropout_p=0.5, heads=4, kv_heads=2, causal=True, lse=True),
    Case("dropout_bias", dropout_p=0.1, mask="bias", mask_shape="B1QK", key_lengths=(65, 30)),
    Case(
        "everything",
        heads=4,
        kv_heads=2,
        q_len=70,
        k_len=100,
        causal=True,
        window=(60, None),
        query_start=(30, 25),
        key_start=(5, 0),
        key_lengths=(100, 90),
        mask="bias",
        mask_shape="HQK",
        softcap=4.0,
        alibi="H",
        sinks=True,
        dropout_p=0.1,
        lse=True,
        scale=0.4,
    ),
]

_EMPTY = [
    Case("batch_0", batch=0),
    Case("q_len_0", q_len=0, lse=True),
    Case("k_len_0", k_len=0, lse=True),
    Case("k_len_0_causal", q_len=5, k_len=0, causal=True, heads=4, kv_heads=2),
]

_PACKED = [
    Case("packed", packed=((65, 1, 30), (65, 1, 30))),
    Case("packed_causal", packed=((5, 64, 0, 31), (5, 64, 0, 31)), causal=True, lse=True),
    Case("packed_cross", packed=((5, 20, 7, 0), (70, 3, 0, 9)), causal=True, lse=True),
    Case("packed_gqa_window", packed=((40, 33), (40, 70)), heads=4, kv_heads=2, window=(9, 4), value_dim=33),
    Case(
        "packed_limits",
        packed=((30, 9, 12), (30, 50, 20)),
        window=(20, 3),
        query_start=(4, 0, -5),
        key_start=(2, 0, 0),
        key_lengths=(30, 41, 0),
        lse=True,
    ),
    Case("packed_bias", packed=((33, 20), (40, 33)), causal=True, mask="bias", mask_shape="B1QK"),
    Case(
        "packed_extras",
        packed=((20, 33), (40, 33)),
        causal=True,
        softcap=3.0,
        alibi="H",
        sinks=True,
        dropout_p=0.3,
        lse=True,
    ),
]


def _paged(name: str, page_size: int, q_len: int, key_lengths: tuple[int, ...], **options: Any) -> Case:
    return Case(
        name,
        batch=len(key_lengths),
        q_len=q_len,
        key_lengths=key_lengths,
        query_start=tuple(length - q_len for length in key_lengths),
        page_size=page_size,
        lse=True,
        **options,
    )


_PAGED = [
    _paged("paged_decode", 16, 1, (130, 33), heads=8, kv_heads=2, k_len=130),
    _paged("paged_chunk", 32, 5, (100, 64), k_len=100, causal=True, head_dim=80),
    _paged("paged_small_pages", 3, 7, (70, 8), k_len=70, window=(20, 2)),
    _paged("paged_ragged", 64, 9, (200, 0, 64, 5), k_len=200, heads=4, kv_heads=2, value_dim=33, causal=True),
    _paged("paged_blocks", 16, 5, (96, 50), k_len=96, blocks="random", block_size=(16, 32), block_axes="B1"),
    _paged("paged_bias", 16, 6, (96, 50), k_len=96, mask="bias", mask_shape="B1QK", mask_grad=False),
    _paged(
        "paged_extras",
        8,
        4,
        (90, 41),
        heads=4,
        kv_heads=1,
        k_len=90,
        causal=True,
        key_start=(11, 0),
        softcap=3.0,
        alibi="H",
        sinks=True,
    ),
]

_BLOCKS = [
    Case("blocks", q_len=200, k_len=200, blocks="random"),
    Case("blocks_16", q_len=70, k_len=100, blocks="random", block_size=(16, 16), block_axes="BH", lse=True),
    Case("blocks_32x128", q_len=127, k_len=200, blocks="random", block_size=(32, 128), block_axes="1H"),
    Case("blocks_256", batch=1, q_len=300, k_len=300, head_dim=32, blocks="band", block_size=(256, 256)),
    Case("blocks_band_causal", q_len=200, k_len=200, blocks="band", causal=True, lse=True),
    Case("blocks_global", q_len=200, k_len=200, blocks="global", block_size=(32, 32), value_dim=33),
    Case(
        "blocks_empty_rows", q_len=150, k_len=127, blocks="empty_rows", block_size=(32, 64), block_axes="B1", lse=True
    ),
    Case("blocks_none", q_len=65, k_len=70, blocks="none", lse=True, sinks=True),
    Case("blocks_gqa", heads=4, kv_heads=2, q_len=130, k_len=130, blocks="random", block_axes="1H", deterministic=True),
    Case("blocks_decode", heads=4, kv_heads=2, q_len=1, k_len=300, blocks="random", block_axes="1H", lse=True),
    Case("blocks_bias", q_len=100, k_len=130, blocks="random", block_axes="BH", mask="bias", mask_shape="HQK"),
    Case("blocks_bias_rows", q_len=100, k_len=130, blocks="global", mask="bias", mask_shape="1HQ1", sinks=True),
    Case("blocks_bool", q_len=100, k_len=130, blocks="band", mask="bool", mask_shape="B11K", lse=True),
    Case("blocks_packed", packed=((65, 1, 130), (65, 9, 130)), blocks="random", block_axes="B1", causal=True),
    Case(
        "blocks_everything",
        heads=4,
        kv_heads=2,
        q_len=130,
        k_len=140,
        blocks="random",
        block_axes="BH",
        block_size=(32, 64),
        causal=True,
        window=(90, None),
        query_start=(30, 25),
        key_start=(5, 0),
        key_lengths=(140, 90),
        mask="bias",
        mask_shape="HQK",
        softcap=4.0,
        alibi="H",
        sinks=True,
        dropout_p=0.1,
        lse=True,
    ),
]

GRID: tuple[Case, ...] = (
    Case("full"),
    *_LENGTHS,
    *_HEAD_SIZES,
    *_INTERVALS,
    *_MASKS,
    *_HEADS,
    *_NUMBERS,
    *_LAYOUTS,
    *_EXTRAS,
    *_EMPTY,
    *_PACKED,
    *_PAGED,
    *_BLOCKS,
)
"""Every case, in the order in which a report lists them."""
