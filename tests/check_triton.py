"""Compiles what calls launch, for GPUs that need not be there, and reports what the kernels need of one.

Fails where a kernel does not compile, where its shared memory does not fit the architecture, where one of the core
(bfloat16, head sizes 64 and 128, full and causal, forward and backward; dense 256 forward; every linear problem) spills
registers, or where any other spills more than triton_resources.txt records for the same version of Triton.

python tests/check_triton.py [words that a line must contain]
python tests/check_triton.py --record
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import fastattn
from fastattn.dense import triton as backend
from fastattn.dense import triton_launch
from fastattn.linear import triton as linear_backend
from fastattn.sparse import sliding_window

SHARED_MEMORY_KIB = {80: 163, 90: 227}
RECORD = Path(__file__).with_name("triton_resources.txt")
VERSION = f"Triton {triton.__version__}"
LENGTH = 256

# The CPU's tensors stand for a GPU's.
for module in (backend, linear_backend):
    module.CAPABILITY = replace(module.CAPABILITY, devices=frozenset({"cpu"}))  # type: ignore[attr-defined]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def train(head_dim: int, dtype: torch.dtype, options: Callable[[], dict[str, Any]] = dict) -> None:
    """Forward and all gradients."""
    found = options()
    leaves = [draw(2, heads, LENGTH, head_dim, dtype=dtype) for heads in (4, found.pop("kv_heads", 4), 4)]
    leaves[2] = leaves[2][:, : leaves[1].shape[1]].contiguous()
    out = fastattn.attention(*leaves, backend="triton", **found)
    leaves += [t for t in found.values() if isinstance(t, Tensor) and t.requires_grad]
    torch.autograd.grad(out, leaves, torch.empty_like(out))


def train_packed(head_dim: int, dtype: torch.dtype) -> None:
    leaves = [draw(LENGTH, 4, head_dim, dtype=dtype) for _ in range(3)]
    cu = torch.tensor([0, 100, LENGTH], dtype=torch.int32)
    out = fastattn.attention_varlen(*leaves, cu, cu, 156, 156, causal=True, backend="triton")
    torch.autograd.grad(out, leaves, torch.empty_like(out))


@torch.no_grad()
def decode(head_dim: int, dtype: torch.dtype, page_size: int | None = None) -> None:
    """One new token for 8 heads that share keys, with rotary embeddings, in a cache."""
    query, key, value = (draw(2, heads, 1, head_dim, dtype=dtype) for heads in (8, 1, 1))
    rows = 4096 if page_size is None else page_size
    caches = [draw(2 * 4096 // rows, 1, rows, head_dim, dtype=dtype) for _ in range(2)]
    table = None if page_size is None else torch.arange(2 * 4096 // rows, dtype=torch.int32).view(2, -1)
    fastattn.attention_with_kvcache(
        query,
        *caches,
        key=key,
        value=value,
        key_lengths=torch.tensor([7, 4000], dtype=torch.int32),
        block_table=table,
        rotary=(draw(4096, head_dim // 2, dtype=dtype), draw(4096, head_dim // 2, dtype=dtype)),
        causal=True,
        backend="triton",
    )


@torch.no_grad()
def decode_latent(head_dim: int, dtype: torch.dtype) -> None:
    """DeepSeek-V2's latent attention: many heads, one key, whose first columns are the value."""
    query, cache = draw(2, 128, 1, head_dim, dtype=dtype), draw(2, 1, 4096, head_dim, dtype=dtype)
    lengths = torch.tensor([7, 4000], dtype=torch.int32)
    fastattn.attention_with_kvcache(query, cache, cache[..., :512], key_lengths=lengths, backend="triton")


def train_linear(
    head_dim: int,
    dtype: torch.dtype,
    function: Callable[..., Tensor],
    steps: Callable[[int], dict[str, tuple[int, ...]]] = lambda head_dim: {},
    num_features: int | None = None,
) -> None:
    """Forward and all gradients. steps: of a head size, the arguments per step and the shape that each has there."""
    leaves = [draw(2, 4, LENGTH, head_dim, dtype=dtype) for _ in range(3)]
    options = {name: draw(2, 4, LENGTH, *width, dtype=torch.float32) for name, width in steps(head_dim).items()}
    if num_features is not None:
        options["projection"] = torch.empty(num_features, head_dim)
    out = function(*leaves, **options, backend="triton")
    torch.autograd.grad(out, [*leaves, *(t for t in options.values() if t.requires_grad)], torch.empty_like(out))


LINEAR: dict[str, Callable[[int, torch.dtype], None]] = {
    "linear": partial(train_linear, function=partial(fastattn.linear_attention, causal=True, feature_map="elu")),
    "linear full": partial(train_linear, function=partial(fastattn.linear_attention, causal=False, feature_map="elu")),
    "retention": partial(
        train_linear,
        function=partial(fastattn.linear_attention, causal=True, feature_map="identity", normalize=False),
        steps=lambda head_dim: {"decay": ()},
    ),
    "gated": partial(
        train_linear,
        function=partial(fastattn.linear_attention, causal=True, feature_map="identity", normalize=False),
        steps=lambda head_dim: {"decay": (head_dim,)},
    ),
    "delta rule": partial(train_linear, function=fastattn.delta_rule, steps=lambda head_dim: {"beta": (), "decay": ()}),
    "performer": partial(
        train_linear,
        function=partial(fastattn.performer_attention, causal=True),
        steps=lambda head_dim: {"decay": ()},
        num_features=256,
    ),
    "relu": partial(train_linear, function=partial(fastattn.performer_attention, features="relu"), num_features=256),
}
PROBLEMS: dict[str, Callable[[int, torch.dtype], None]] = {
    "full": train,
    "causal": partial(train, options=lambda: {"causal": True}),
    "window": partial(train, options=lambda: {"window": (100, 20)}),
    "grouped": partial(train, options=lambda: {"causal": True, "kv_heads": 1}),
    "packed": train_packed,
    "blocks": partial(train, options=lambda: {"attn_mask": sliding_window(LENGTH, window=100)}),
    "bool mask": partial(train, options=lambda: {"attn_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool)}),
    "bias": partial(train, options=lambda: {"attn_mask": draw(4, LENGTH, LENGTH)}),
    "softcap": partial(train, options=lambda: {"softcap": 30.0}),
    "alibi": partial(train, options=lambda: {"alibi_slopes": torch.ones(4)}),
    "dropout": partial(train, options=lambda: {"dropout_p": 0.1}),
    "decode": decode,
    "pages": partial(decode, page_size=256),
    "small pages": partial(decode, page_size=16),
    "latent": decode_latent,
    **LINEAR,
}
FEATURES = [name for name in PROBLEMS if name not in ("full", "causal", "decode", "latent", *LINEAR)]


@dataclass(frozen=True)
class Call:
    problem: str
    dtype: torch.dtype
    head_dim: int
    capability: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"sm_{self.capability} {self.problem:<11} {dtype:<8} D {self.head_dim:<3}"


def calls() -> list[Call]:
    found = []
    for capability in SHARED_MEMORY_KIB:
        bfloat16 = [(problem, d) for problem in ("full", "causal") for d in (64, 128, 256)]
        bfloat16 += [("decode", d) for d in (64, 128, 256, 512)]
        bfloat16 += [("causal", 512), ("bias", 64), ("bias", 512), ("latent", 576)]
        bfloat16 += [("blocks", 64)]
        bfloat16 += [(problem, 128) for problem in (FEATURES if capability == 90 else ())]
        float32 = [(problem, d) for problem in ("causal", "decode") for d in (64, 256, 512)]
        bfloat16 += [(problem, d) for problem in LINEAR for d in (64, 128)]
        bfloat16 += [(problem, 256) for problem in ("performer", "delta rule")]
        float32 += [("performer", 64), ("delta rule", 64), ("retention", 256)]
        found += [Call(problem, torch.bfloat16, d, capability) for problem, d in bfloat16]
        found += [Call(problem, torch.float32, d, capability) for problem, d in float32]
        found += [Call(problem, torch.float16, 64, capability) for problem in ("performer", "delta rule")]
    return found


class Absent:
    """A driver for a GPU that is not there. Triton keeps what it compiled by device: one for each architecture."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Kernel:
    """What one kernel needs: registers and spilled bytes a thread, shared memory a block."""

    call: Call
    name: str
    digest: str
    sizes: str
    registers: int
    spilled: int
    shared_kib: float

    @property
    def key(self) -> str:
        return f"{self.call} {self.name}"

    @property
    def core(self) -> bool:
        plain = self.call.dtype == torch.bfloat16 and self.call.problem in ("full", "causal", *LINEAR)
        return plain and (self.call.head_dim <= 128 or (self.name == "forward" and self.call.head_dim == 256))

    def __str__(self) -> str:
        needs = f"{self.registers:>3} registers {self.spilled:>4} B spilled {self.shared_kib:>4.0f} KiB"
        return f"{self.call} {self.name:<9} {needs}  {self.sizes}".rstrip()


def compiled(call: Call) -> list[Kernel] | str:
    """The kernels that a call launches, compiled and not launched; or why they were not."""
    triton.runtime.driver.set_active(Absent(call.capability))
    triton_launch.compute_capability = lambda device: call.capability
    found = []

    def compile_only(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **constants)
        tile = {"BLOCK_M": "rows", "BLOCK_N": "keys"}
        if "CHUNK" in constants:
            tile = {"CHUNK": "steps", "BLOCK_M": "features", "BLOCK_V": "columns"}
        names = {**tile, "num_warps": "warps", "num_stages": "stages"}
        sizes = ", ".join(f"{constants[name]} {word}" for name, word in names.items() if name in constants)
        name = self.fn.__name__.removesuffix("_kernel") + (" in reverse" if constants.get("REVERSE") else "")
        shared = kernel.metadata.shared / 1024
        found.append(Kernel(call, name, kernel.hash, sizes, *registers_and_stack(kernel), shared))
        return kernel

    run, JITFunction.run = JITFunction.run, compile_only
    try:
        PROBLEMS[call.problem](call.head_dim, call.dtype)
    except Exception as error:
        return f"{call} DOES NOT COMPILE: {type(error).__name__}: {error} {error.__cause__ or ''}"
    finally:
        JITFunction.run = run
    return found


def registers_and_stack(kernel: Any) -> tuple[int, int]:
    """Registers a thread, and bytes of stack a thread, which spilled registers take."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", run.stdout)
    assert usage, run.stdout
    return int(usage[1]), int(usage[2])


def recorded_spills() -> dict[str, int]:
    """`Kernel.key` -> bytes spilled, as recorded; empty where another version of Triton was."""
    version, *lines = RECORD.read_text().splitlines()
    if version != VERSION:
        return {}
    found = [re.fullmatch(r"(.*\S) +\d+ registers +(\d+) B spilled.*", line) for line in lines]
    return {match[1]: int(match[2]) for match in found if match}


def trouble(kernel: Kernel, spills: dict[str, int]) -> str:
    allowed = 0 if kernel.core else spills.get(kernel.key, kernel.spilled)
    if kernel.spilled > allowed:
        return f" SPILLS MORE THAN {allowed} B"
    if kernel.shared_kib > SHARED_MEMORY_KIB[kernel.call.capability]:
        return " TOO MUCH SHARED MEMORY"
    return ""


def main() -> int:
    words = sys.argv[1:]
    record = words == ["--record"]
    wanted = [call for call in calls() if record or all(word in str(call).split() for word in words)]
    spills = {} if record else recorded_spills()
    print(VERSION, flush=True)
    good, lines, seen = True, [VERSION], set()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(compiled, wanted):
            if isinstance(result, str):
                good = False
                print(result, flush=True)
                continue
            for kernel in result:
                if kernel.digest in seen:
                    continue
                seen.add(kernel.digest)
                found = trouble(kernel, spills)
                good &= not found
                lines.append(str(kernel))
                print(f"{kernel}{found}", flush=True)
    if record and good:
        RECORD.write_text("\n".join(lines) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
