"""Named sets of cases of linear attention, and of what stands in for softmax attention, with the figures to reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fastattn.bench.case import DATA, grid
from fastattn.bench.linear.baselines import has_naive_form
from fastattn.bench.linear.problem import LinearProblem
from fastattn.bench.preset import Preset
from fastattn.bench.suites import Problem
from fastattn.bench.targets import Target, speedup, time_at

PLAIN = LinearProblem(0, causal=True)
BOTH = ("fwd", "fwdbwd")
RECURRENT = ("retention", "simple-gla", "gla", "delta", "gated-delta")

# A time that stays the same to within so much is flat.
FLAT = 1 / 1.15


def _linear() -> list[LinearProblem]:
    """Normalised causal attention by length, with more features, trained, and step by step; a Performer."""
    wide = replace(PLAIN, value_dim=64)
    step = replace(PLAIN, step=True)
    performer = replace(PLAIN, mechanism="performer")
    return [
        *grid(PLAIN, (1024, 2048, 4096, 8192, 32768)),
        *grid(wide, (2048, 8192), head_dims=(256,)),
        *grid(PLAIN, (1024, 2048, 4096, 8192), modes=("fwdbwd",)),
        *grid(PLAIN, (2048, 8192), causal=(False,)),
        *grid(step, (1024, 4096, 16384, 65536)),
        *grid(performer, (2048, 8192), modes=BOTH),
    ]


def _recurrent() -> list[LinearProblem]:
    return [p for name in RECURRENT for p in grid(replace(PLAIN, mechanism=name), (2048, 8192), modes=BOTH)]


def _picks(seqlen: int, **fields: Any) -> Callable[[LinearProblem], bool]:
    wanted = {"mechanism": "linear", "causal": True, "step": False, "mode": "fwd", "head_dim": 64} | fields
    return lambda p: p.seqlen == seqlen and all(getattr(p, name) == value for name, value in wanted.items())


# On 2 threads of an AVX-512 CPU, head size 64, 4 heads, float32, features given.
LINEAR_TARGETS = (
    Target("causal, 8k, 64 features", 5.0, _picks(8192), speedup("torch")),
    Target("causal, 8k, 64 features", 200.0, _picks(8192), speedup("naive")),
    Target("causal, 8k, 256 features", 5.0, _picks(8192, head_dim=256), speedup("torch")),
    Target("forward + backward, 8k, 64 features", 4.0, _picks(8192, mode="fwdbwd"), speedup("torch")),
    Target("causal, 32k, 64 features", FLAT, _picks(32768), time_at(8192, each_token=True)),
    Target("one step after 64k", FLAT, _picks(65536, step=True), time_at(1024, each_token=False)),
)


def _gpu(seqlens: Sequence[int], heads: int, head_dim: int) -> list[LinearProblem]:
    base = replace(PLAIN, heads=heads, kv_heads=heads, dtype="bfloat16")
    names = ("linear", "linear-sum", *RECURRENT, "performer")
    return [
        *(
            p
            for name in names
            for p in grid(
                replace(base, mechanism=name), seqlens, head_dims=(head_dim,), dtypes=("bfloat16",), modes=BOTH
            )
        ),
        *grid(replace(base, step=True), seqlens, head_dims=(head_dim,), dtypes=("bfloat16",)),
    ]


def _training(*mechanisms: str) -> Callable[[LinearProblem], bool]:
    return lambda p: p.mechanism in mechanisms and p.mode == "fwdbwd"


GPU_TARGETS = tuple(
    Target(f"forward + backward, {what}", 1.2, _training(*names), speedup("fla"))
    for what, names in (
        ("linear", ("linear", "linear-sum")),
        ("simple GLA", ("simple-gla",)),
        ("GLA", ("gla",)),
        ("delta rule", ("delta", "gated-delta")),
    )
)

STAND_INS = ("linear", "retention", "gla", "delta", "performer", "linformer", "nystrom")


def _mechanisms(longest: int, longest_training: int, **fields: Any) -> list[Problem]:
    """Softmax attention by length, doubling from 256."""
    base = Problem(0, **fields)

    def lengths(last: int) -> list[int]:
        return [256 << i for i in range((last // 256).bit_length())]

    return [
        *grid(base, lengths(longest), dtypes=(base.dtype,)),
        *grid(base, lengths(longest_training), dtypes=(base.dtype,), modes=("fwdbwd",)),
        *grid(base, lengths(longest), dtypes=(base.dtype,), causal=(False,)),
    ]


# The time of Nystrom's inverse grows with the cube of its landmarks.
WIDTHS = {"performer": range(4, 11), "linformer": range(4, 11), "nystrom": range(4, 9)}

LINEAR_PRESETS = {
    "linear": Preset(
        _linear,
        300.0,
        "linear attention and Performer on a CPU: by length, trained and step by step",
        implementations=("naive", "torch", "sdpa", "flash", "fastattn"),
        subjects={
            "naive": lambda p: has_naive_form(p) and (p.mechanism == "linear" or p.seqlen <= 2048),
            **{name: lambda p: p.step or (p.mechanism == "linear" and p.seqlen <= 8192) for name in ("sdpa", "flash")},
        },
        targets=LINEAR_TARGETS,
    ),
    "recurrent": Preset(
        _recurrent,
        200.0,
        "retention, GLA and the delta rule on a CPU, forward and trained",
        implementations=("naive", "torch", "fastattn"),
        subjects={"naive": lambda p: p.seqlen <= 2048},
    ),
    "linear-gpu": Preset(
        lambda: _gpu((4096, 16384, 65536), 16, 64),
        450.0,
        "linear attention on a GPU in bfloat16, 4k to 64k tokens, beside flash-linear-attention",
        implementations=("naive", "torch", "sdpa", "flash", "fla", "fastattn"),
        subjects={
            # Thousands of launches a call, or a matrix of 64 GiB: once is enough.
            "naive": lambda p: not p.step and p.seqlen == 4096 and p.mechanism in ("linear", "performer"),
            "torch": lambda p: p.step or p.seqlen <= 16384,
            **{name: lambda p: p.mechanism in ("linear", "performer") for name in ("sdpa", "flash")},
        },
        targets=GPU_TARGETS,
    ),
    "linear-gpu-dry": Preset(
        lambda: _gpu((64, 128), 2, 16),
        30.0,
        "the same kinds of call in a few seconds on a CPU, to try the code that measures them",
        implementations=("naive", "torch", "sdpa", "flash", "fla", "fastattn"),
    ),
    "mechanisms": Preset(
        lambda: _mechanisms(32768, 8192),
        500.0,
        "softmax attention and what stands in for it side by side by length, with the lengths where they cross",
        implementations=("naive", "sdpa", "fastattn", *STAND_INS),
    ),
    "mechanisms-gpu": Preset(
        lambda: _mechanisms(65536, 65536, heads=16, kv_heads=16, dtype="bfloat16"),
        300.0,
        "the same on a GPU in bfloat16",
        implementations=("sdpa", "fastattn", *STAND_INS),
    ),
    "approximation": Preset(
        lambda: [*(Problem(2048, data=data) for data in DATA), Problem(2048, head_dim=16, data="mild")],
        100.0,
        "how far Performer, Linformer and Nystrom attention are from softmax attention by their width, and their time",
        implementations=("fastattn", "mean", *(f"{name}:{1 << n}" for name, powers in WIDTHS.items() for n in powers)),
    ),
}
