"""Writes the support matrix, generated from the capability tables, into README.md (between its markers).

python docs/support_matrix.py           rewrite the README
python docs/support_matrix.py --check   exit 1 if the README is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastattn import _extension, ledger
from fastattn.backends import FAMILIES, FEATURES, capabilities
from fastattn.verify import kernel_digests

# Every kernel that csrc/CMakeLists.txt can build of a family, and Triton's, with what they need.
KERNELS = {
    "cpu/v4_bf16": "x86-64-v4 with avx512_bf16 (bfloat16 only; other dtypes as v4)",
    "cpu/v4": "x86-64-v4 (AVX-512)",
    "cpu/v3": "x86-64-v3 (AVX2)",
    "cpu/baseline": "any x86-64",
    "cpu/neon": "aarch64",
    "triton": "a GPU that Triton reaches (NVIDIA sm_80 or newer)",
}
README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- support matrix -->\n", "<!-- end of support matrix -->\n"


def table(family: str) -> str:
    backends = capabilities(family)
    rows = [("", [f"`{b.backend}`" for b in backends])]
    rows.append(("devices", [", ".join(sorted(b.devices)) or "any" for b in backends]))
    rows.append(("dtypes", [b.dtype_names() for b in backends]))
    rows.append(("head_dim", [b.head_dims() for b in backends]))
    for name, text in FEATURES[family].items():
        rows.append((text, ["yes" if name in b.features else "no" for b in backends]))
    lines = ["| " + " | ".join([label, *cells]) + " |" for label, cells in rows]
    lines.insert(1, "|" + " --- |" * (len(backends) + 1))
    return "\n".join(lines) + "\n"


def hardware() -> str:
    """Which kernels the ledger holds a passing record of, and whether it is of their present source."""
    builds = _extension.native().build_info()["digests"]  # of every instruction set, whatever this machine has
    present = kernel_digests("cuda") | {f"{family}/cpu/{isa}": d for family in FAMILIES for isa, d in builds.items()}
    lines = ["| kernel | needs | verified on |", "| --- | --- | --- |"]
    for kernel, needs in ((f"{family}/{name}", needs) for family in FAMILIES for name, needs in KERNELS.items()):
        records = [record for record in ledger.load_records() if kernel in record["kernels"]]
        stale = {r["recorded"] for r in records if present.get(kernel, r["kernels"][kernel]) != r["kernels"][kernel]}
        devices = ", ".join(
            sorted(
                f"{r['device']['name']} ({r['recorded'][:10]}{', its source then' * (r['recorded'] in stale)})"
                for r in records
            )
        )
        lines.append(f"| `{kernel}` | {needs} | {devices or 'not verified on hardware'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    readme = README.read_text()
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    current = head + BEGIN + "\n".join([*map(table, FAMILIES), hardware()]) + END + tail
    if "--check" in sys.argv:
        if readme != current:
            print("README.md: the support matrix is out of date; run python docs/support_matrix.py")
        return int(readme != current)
    README.write_text(current)
    return 0


if __name__ == "__main__":
    sys.exit(main())
