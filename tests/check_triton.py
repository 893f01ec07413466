"""Compiles the Triton kernels for sm_80 and sm_90 without a GPU and reports what they need of one.

Fails where a kernel does not compile, where its shared memory does not fit the architecture, where one of the core
(16-bit, head sizes 64 and 128, full and causal, forward and backward; 256 forward) spills registers, or where any other
spills more than triton_resources.txt records for the same version of Triton.

python tests/check_triton.py [words that a line must contain]
python tests/check_triton.py --record
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastattn.kernels import dense_append, dense_backward, dense_config, dense_decode, dense_forward

KERNELS = {
    "forward": (dense_forward.forward_kernel, dense_config.FORWARD),
    "key_value": (dense_backward.key_value_kernel, dense_config.KEY_VALUE),
    "query": (dense_backward.query_kernel, dense_config.QUERY),
    "bias": (dense_backward.bias_kernel, dense_config.BIAS),
    "split": (dense_decode.split_kernel, dense_config.SPLIT),
    "combine": (dense_decode.combine_kernel, None),
    "append": (dense_append.append_kernel, None),
    "delta": (dense_backward.delta_kernel, None),
}
SHARED_MEMORY_KIB = {80: 163, 90: 227}
RECORD = Path(__file__).with_name("triton_resources.txt")
VERSION = f"Triton {triton.__version__}"
TENSORS = (
    *("query", "key", "value", "out", "grad_out", "grad_key", "grad_value", "grad_query"),
    *("rotated", "key_cache", "value_cache", "cos", "sin"),
)
# None where a feature does not pass them.
OPTIONAL = (
    *("mask", "sinks", "alibi_slopes", "query_start", "key_start", "key_lengths", "cu_seqlens_q", "cu_seqlens_k"),
    *("rng", "query_offset", "window_left", "window_right", "cap", "block_table", "chunk", "grad_lse"),
)
TRITON_DTYPES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}

# feature -> the optional arguments that it passes, with their types
FEATURES: dict[str, dict[str, str]] = {
    "full": {},
    "causal": {"window_right": "i32"},
    "window": {"window_left": "i32", "window_right": "i32"},
    "packed": {"cu_seqlens_q": "*i32", "cu_seqlens_k": "*i32", "window_right": "i32"},
    "bool mask": {"mask": "*i8"},
    "bias": {"mask": "*bf16"},
    "softcap": {"cap": "fp32"},
    "alibi": {"alibi_slopes": "*fp32"},
    "dropout": {"rng": "*i64", "dropout_threshold": "i64"},
    "cache": {"key_lengths": "*i32", "query_start": "*i32", "window_right": "i32"},
    "pages": {"key_lengths": "*i32", "query_start": "*i32", "window_right": "i32", "block_table": "*i32"},
    "small pages": {"key_lengths": "*i32", "query_start": "*i32", "window_right": "i32", "block_table": "*i32"},
    "latent": {"key_lengths": "*i32", "query_start": "*i32", "value": "constexpr"},
    "rotary": {"key_lengths": "*i32", "block_table": "*i32"},
}
PAGE_SIZES = {"pages": 256, "small pages": 16, "rotary": 16}
TRAINING = ("window", "packed", "bool mask", "bias", "softcap", "alibi", "dropout")


@dataclass(frozen=True)
class Build:
    """One compilation. core: no register may spill."""

    kernel: str
    feature: str
    dtype: str
    head_dim: int
    capability: int

    def __str__(self) -> str:
        return f"sm_{self.capability} {self.kernel:<9} {self.dtype:<8} D {self.head_dim:<3} {self.feature:<11}"

    @property
    def core(self) -> bool:
        plain = self.dtype == "bfloat16" and self.feature in ("full", "causal")
        return plain and (self.head_dim <= 128 or (self.kernel == "forward" and self.head_dim == 256))


def builds() -> list[Build]:
    found = []
    for capability in SHARED_MEMORY_KIB:
        for kernel in ("forward", "key_value", "query"):
            for feature in ("full", "causal"):
                found += [Build(kernel, feature, "bfloat16", d, capability) for d in (64, 128, 256)]
            found += [Build(kernel, "causal", "bfloat16", 512, capability)]
            found += [Build(kernel, "causal", "float32", d, capability) for d in (64, 256, 512)]
            if capability == 90:
                found += [Build(kernel, feature, "bfloat16", 64, capability) for feature in TRAINING]
        found += [Build("bias", "bias", "bfloat16", d, capability) for d in (64, 128, 512)]
        found += [Build("split", "cache", "bfloat16", d, capability) for d in (64, 128, 256, 512)]
        found += [Build("split", "cache", "float32", d, capability) for d in (64, 128, 256, 512)]
        found += [Build("split", feature, "bfloat16", 128, capability) for feature in ("pages", "small pages")]
        found += [Build("split", "latent", "bfloat16", 576, capability)]
        found += [Build("combine", "full", "bfloat16", 128, capability)]
        found += [Build("append", "rotary", "bfloat16", 128, capability)]
        found += [Build("delta", "full", "bfloat16", 128, capability)]
    return found


def tile(build: Build) -> dense_config.Config | None:
    _, table = KERNELS[build.kernel]
    if table is None:
        return None
    found = dense_config.config(table, build.head_dim, 4 if build.dtype == "float32" else 2, build.capability)
    # One query and eight heads a key, as when decoding; latent attention has many.
    return found._replace(block_m=16) if build.kernel == "split" and build.feature != "latent" else found


def compile_kernel(build: Build) -> Any:
    kernel, _ = KERNELS[build.kernel]
    types: dict[str, Any] = dict.fromkeys(TENSORS, TRITON_DTYPES[build.dtype])
    types |= dict.fromkeys(OPTIONAL) | dict.fromkeys(("lse", "delta", "partial_out", "partial_lse"), "*fp32")
    types |= dict.fromkeys(("scale", "factor", "dropout_scale"), "fp32")
    types |= {name: None if kind == "constexpr" else kind for name, kind in FEATURES[build.feature].items()}
    types["grad_mask"] = types["mask"]
    main = min(build.head_dim, 512)
    constants = {"D": main, "BLOCK_D": main, "DV": main, "BLOCK_DV": main}
    constants |= {"TAIL": build.head_dim - main, "BLOCK_TAIL": max(16, build.head_dim - main)}
    constants |= {"GROUP": 1, "PACKED": build.feature == "packed", "PRECISION": "ieee", "BLOCK_SPLITS": 16}
    constants |= {"HALF": 64, "BLOCK_HALF": 64, "INTERLEAVED": False, "PAGE": PAGE_SIZES.get(build.feature)}
    sizes = tile(build) or dense_config.Config(64, 64, 4, 1)
    constants |= {"BLOCK_M": sizes.block_m, "BLOCK_N": sizes.block_n}
    if build.kernel == "split":
        constants["GROUP"] = 8
    signature, fixed, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind = types.get(name, "i32")  # lengths, counts and strides
        if name in constants or kind is None:
            signature[name], fixed[(index,)] = "constexpr", constants.get(name)
            continue
        signature[name] = kind
        if kind.startswith("*") or "_stride_" in name:  # as in real calls: aligned, whole vectors
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    options = {"num_warps": sizes.num_warps, "num_stages": sizes.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", build.capability, 32), options=options)


def registers_and_stack(compiled: Any) -> tuple[int, int]:
    """Registers a thread, and bytes of stack a thread, which spilled registers take."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", run.stdout)
    assert usage, run.stdout
    return int(usage[1]), int(usage[2])


def recorded_spills() -> dict[str, int]:
    """build -> bytes spilled, as recorded; empty where another version of Triton was."""
    version, *lines = RECORD.read_text().splitlines()
    if version != VERSION:
        return {}
    found = [re.fullmatch(r"(.*?) +\d+ registers +(\d+) B spilled.*", line) for line in lines]
    return {match[1].split("Config")[0].strip(): int(match[2]) for match in found if match}


def report(build: Build, allowed: int | None) -> tuple[str, bool]:
    """One line on a build, and whether it is as it should be; allowed: bytes that it may spill, None for any."""
    try:
        compiled = compile_kernel(build)
    except Exception as error:
        return f"{build} DOES NOT COMPILE: {error}", False
    registers, stack = registers_and_stack(compiled)
    shared = compiled.metadata.shared / 1024
    trouble = []
    if allowed is not None and stack > allowed:
        trouble.append(f"SPILLS MORE THAN {allowed} B")
    if shared > SHARED_MEMORY_KIB[build.capability]:
        trouble.append("TOO MUCH SHARED MEMORY")
    usage = f"{registers:>3} registers {stack:>4} B spilled {shared:>5.0f} KiB"
    return " ".join([f"{build} {tile(build) or ''}", usage, *trouble]), not trouble


def main() -> int:
    words = sys.argv[1:]
    record = words == ["--record"]
    print("a thread's registers and spilled bytes, a block's shared memory", VERSION, sep="\n", flush=True)
    wanted = [build for build in builds() if record or all(word in str(build).split() for word in words)]
    spills = {} if record else recorded_spills()
    allowed = [0 if build.core else spills.get(str(build).strip()) for build in wanted]
    good, lines = True, [VERSION]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for line, fine in pool.map(report, wanted, allowed):
            good &= fine
            lines.append(line)
            print(line, flush=True)
    if record and good:
        RECORD.write_text("\n".join(lines) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
