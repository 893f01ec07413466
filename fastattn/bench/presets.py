"""Named sets of problems for `fastattn bench --preset`, and the figures that they are to reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fastattn.bench.case import grid
from fastattn.bench.linear.presets import LINEAR_PRESETS
from fastattn.bench.peers import PEERS
from fastattn.bench.preset import Preset
from fastattn.bench.sparse.presets import SPARSE_PRESETS
from fastattn.bench.suites import Problem
from fastattn.bench.targets import Target, fraction, gradient_error_beside_sdpa, speedup

PLAIN = Problem(0)


def _quickstart() -> list[Problem]:
    """Every kind of call at short and middle lengths; the longest only where they say most (causal, as in training)."""
    dtypes, both = ("float32", "bfloat16"), (False, True)
    short = (512, 1024, 2048)
    return [
        *_merge(
            grid(PLAIN, (*short, 4096), dtypes=dtypes, causal=both), grid(PLAIN, (8192,), dtypes=dtypes, causal=(True,))
        ),
        *grid(PLAIN, (*short,), head_dims=(128,), dtypes=dtypes, causal=both),
        *_merge(
            grid(PLAIN, (*short, 4096), dtypes=dtypes, causal=(True,), modes=("fwdbwd",)),
            grid(PLAIN, (8192,), causal=(True,), modes=("fwdbwd",)),
        ),
        *grid(PLAIN, short, dtypes=dtypes, causal=(False,), modes=("fwdbwd",)),
    ]


def _merge(*groups: Sequence[Problem]) -> list[Problem]:
    """One list in which problems that belong to one table stand together, by length."""
    tables: dict[tuple, list[Problem]] = {}
    for problem in (p for group in groups for p in group):
        tables.setdefault((problem.mode, problem.dtype, problem.causal, problem.head_dim), []).append(problem)
    return [problem for table in tables.values() for problem in table]


def _figures() -> list[Problem]:
    lengths = (512, 1024, 2048, 4096, 8192)
    dtypes = ("float32", "bfloat16")
    return [
        *grid(PLAIN, lengths, head_dims=(64, 128), dtypes=dtypes, causal=(False, True)),
        *grid(PLAIN, lengths, head_dims=(64, 128), dtypes=dtypes, causal=(True,), modes=("fwdbwd",)),
    ]


def _cpu() -> list[Problem]:
    """What sets CPUs apart: long and short calls, float16, windows, dropout, decoding and a layer's training step."""
    long, short = (4096, 8192), (512, 1024)
    queries = Problem(16384, head_dim=128, heads=32, kv_heads=32, q_len=1)
    layer = Problem(4096, heads=8, kv_heads=8, causal=True, mode="fwdbwd")
    return [
        *grid(PLAIN, long, dtypes=("float32", "bfloat16", "float16"), causal=(False,)),
        *grid(PLAIN, short, dtypes=("float32", "bfloat16")),
        *grid(PLAIN, (1024,), dtypes=("float16",), modes=("fwdbwd",)),
        *grid(PLAIN, (2048, 4096), dtypes=("bfloat16",), modes=("fwdbwd",)),
        *(replace(p, window=511) for p in grid(PLAIN, long)),
        *(replace(p, dropout=0.1) for p in grid(PLAIN, (2048, 4096), modes=("fwdbwd",))),
        *(replace(queries, dtype=dtype, kv_heads=n) for dtype in ("float32", "bfloat16") for n in (32, 8)),
        *(replace(layer, layer=kind) for kind in ("without weights", "with weights")),
    ]


def _plain(p: Problem) -> bool:
    return not p.feature


# On 2 threads of an AVX-512 AMD CPU.
CPU_TARGETS = (
    Target("full, 8k, float32, of peak", 0.80, lambda p: _long(p) and p.dtype == "float32", fraction),
    Target("full, 8k, bfloat16, of peak", 0.82, lambda p: _long(p) and p.dtype == "bfloat16", fraction),
    Target("full, float16", 3.0, lambda p: _plain(p) and p.dtype == "float16" and p.mode == "fwd"),
    Target("forward + backward, float16", 15.0, lambda p: _plain(p) and p.dtype == "float16" and p.mode == "fwdbwd"),
    Target("causal, 512, float32", 3.5, lambda p: p.seqlen == 512 and p.dtype == "float32"),
    Target("causal, 512, bfloat16", 6.0, lambda p: p.seqlen == 512 and p.dtype == "bfloat16"),
    Target("window 512, 8k", 60.0, lambda p: p.window is not None and p.seqlen == 8192),
    Target("window 512, 8k", 2.5, lambda p: p.window is not None and p.seqlen == 8192, speedup("flex")),
    Target("training step with dropout, 4k", 5.0, lambda p: p.dropout > 0 and p.seqlen == 4096),
    Target("decoding, bfloat16, 32 heads, 32 of keys", 7.0, lambda p: _decoding(p) and p.kv_heads == 32),
    Target("decoding, bfloat16, 32 heads, 8 of keys", 35.0, lambda p: _decoding(p) and p.kv_heads == 8),
    Target("decoding, bfloat16, of read bandwidth", 0.80, lambda p: _decoding(p), fraction),
    Target("a layer's training step", 1.7, lambda p: p.layer == "without weights"),
    Target("a layer's training step, with weights", 2.0, lambda p: p.layer == "with weights"),
    Target(
        "gradients, bfloat16",
        1.0,
        lambda p: _plain(p) and p.dtype == "bfloat16" and p.mode == "fwdbwd",
        gradient_error_beside_sdpa,
    ),
)


def _long(p: Problem) -> bool:
    return _plain(p) and not p.causal and p.seqlen == 8192


def _decoding(p: Problem) -> bool:
    return p.q_len is not None and p.dtype == "bfloat16"


def _kind(mode: str, dtype: str, causal: bool) -> Callable[[Problem], bool]:
    return lambda p: (p.mode, p.dtype, p.causal) == (mode, dtype, causal)


# Lengths 512 to 8192, head sizes 64 and 128, batch x heads 4, on the same CPU.
FIGURES_TARGETS = (
    Target("forward, float32, full", 2.2, _kind("fwd", "float32", False)),
    Target("forward, float32, causal", 2.5, _kind("fwd", "float32", True)),
    Target("forward, bfloat16, full", 4.0, _kind("fwd", "bfloat16", False)),
    Target("forward, bfloat16, causal", 4.5, _kind("fwd", "bfloat16", True)),
    Target("forward + backward, float32, causal", 2.6, _kind("fwdbwd", "float32", True)),
    Target("forward + backward, bfloat16, causal", 3.4, _kind("fwdbwd", "bfloat16", True)),
)

# Every library kept to AVX2, as on CPUs that have no more.
AVX2 = {
    "FASTATTN_CPU_ISA": "v3",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
AVX2_TARGETS = (
    Target("forward, float32, full", 1.2, lambda p: not p.causal),
    Target("forward, float32, causal", 1.35, lambda p: p.causal),
)


def _gpu(seqlens: Sequence[int], window: int, decode: Sequence[int], width: int = 2048) -> list[Problem]:
    """Plain attention over `seqlens`, then the features that few libraries have, then decoding over `decode` keys.

    Every call has as many tokens as the longest sequence, and heads that together are `width` wide.
    """
    base = Problem(0, dtype="bfloat16")

    def cases(lengths: Sequence[int], dims: Sequence[int], masks: Sequence[bool], **feature: Any) -> list[Problem]:
        shapes = grid(
            PLAIN,
            lengths,
            head_dims=dims,
            dtypes=(base.dtype,),
            causal=masks,
            modes=("fwdbwd",) if "dropout" in feature else ("fwd", "fwdbwd"),
        )
        heads = {dim: max(1, width // dim) for dim in dims}
        return [
            replace(p, batch=longest // p.seqlen, heads=heads[p.head_dim], kv_heads=heads[p.head_dim], **feature)
            for p in shapes
        ]

    longest, long = seqlens[-1], seqlens[-2:]
    queries = replace(base, heads=32, kv_heads=8, head_dim=128, q_len=1)
    return [
        *cases(seqlens, (64, 128, 256), (False, True)),
        *cases(long, (512,), (False, True)),
        # A bias is as large as the scores of a sequence: at middle lengths.
        *cases([n for n in seqlens if longest / 8 <= n < longest / 2], (128,), (False,), bias=True),
        *cases(long, (128,), (True,), window=window),
        *cases(seqlens[-1:], (128,), (True,), dropout=0.1),
        *(replace(queries, seqlen=n, batch=decode[-1] // n) for n in decode),
    ]


GPU_IMPLEMENTATIONS = (
    "naive",
    *("sdpa", "sdpa:flash", "sdpa:cudnn", "sdpa:efficient", "sdpa:math"),
    *("flex", *PEERS, "fastattn"),
)

PRESETS = {
    "quickstart": Preset(
        _quickstart,
        115.0,
        "forward and forward + backward, float32 and bfloat16, 512 to 8192, then a memory profile",
        (512, 1024, 2048, 4096, 8192),
    ),
    "quick": Preset(lambda: grid(PLAIN, (256, 512, 1024), modes=("fwd", "fwdbwd")), 10.0, "a first look in seconds"),
    "cpu": Preset(
        _cpu,
        330.0,
        "on a CPU: long and short calls, float16, windows, dropout, decoding and a whole layer",
        implementations=("naive", "sdpa", "flex", "fastattn"),
        subjects={"flex": lambda p: p.window is not None},  # it compiles for ten seconds, every time
        targets=CPU_TARGETS,
    ),
    "cpu-avx2": Preset(
        lambda: grid(PLAIN, (512, 1024, 2048, 4096, 8192), causal=(False, True)),
        60.0,
        "on a CPU, with every library kept to AVX2",
        implementations=("sdpa", "fastattn"),
        environment=AVX2,
        targets=AVX2_TARGETS,
    ),
    "gpu": Preset(
        lambda: _gpu((512, 1024, 2048, 4096, 8192, 16384), 1023, (4096, 8192, 16384, 32768, 65536, 131072)),
        420.0,
        "on a GPU: plain attention and its features in bfloat16, 16k tokens, then decoding, beside every peer",
        implementations=GPU_IMPLEMENTATIONS,
    ),
    "gpu-dry": Preset(
        lambda: _gpu((32, 256), 15, (32, 64), width=128),
        20.0,
        "the same kinds of call in a few seconds on a CPU, to try the code that measures them",
        # flex_attention compiles for ten seconds on a CPU, and has no backward there.
        implementations=tuple(name for name in GPU_IMPLEMENTATIONS if name != "flex"),
    ),
    "figures": Preset(
        _figures,
        900.0,
        "plain attention, as the CPU kernels' speed targets name it",
        implementations=("sdpa", "fastattn"),
        targets=FIGURES_TARGETS,
    ),
    **LINEAR_PRESETS,
    **SPARSE_PRESETS,
}
