"""`make check`: the bfloat16 dot-product kernels (v4_bf16), with their dot product emulated, on any AVX-512 machine.

Builds the extension with FASTATTN_EMULATE_BF16_DOT and runs the dense contract tests of bfloat16 on it. Fails when the
packed layouts or the tile loops of that instruction set are wrong; it says nothing about the instruction itself, which
only hardware with avx512_bf16 runs.
"""

import importlib.machinery
import importlib.util
import sys

import pybind11
import pytest
from cmake_build import ROOT, build


def main() -> int:
    folder = build(
        "emulated-bf16",
        Python_EXECUTABLE=sys.executable,
        pybind11_DIR=pybind11.get_cmake_dir(),
        CMAKE_LIBRARY_OUTPUT_DIRECTORY=ROOT / "build" / "emulated-bf16",
        FASTATTN_EMULATE_BF16_DOT="ON",
    )
    (path,) = folder.glob("_native*.so")
    loader = importlib.machinery.ExtensionFileLoader("fastattn._native", str(path))
    spec = importlib.util.spec_from_loader("fastattn._native", loader, origin=str(path))
    assert spec is not None
    native = importlib.util.module_from_spec(spec)
    loader.exec_module(native)
    if "v4_bf16" not in native.cpu_isas():
        print("skipped: this machine has no AVX-512")
        return 0
    native.set_cpu_isa("v4_bf16")
    sys.modules["fastattn._native"] = native
    return pytest.main(["-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "dense"), "-k", "bfloat16"])


if __name__ == "__main__":
    sys.exit(main())
