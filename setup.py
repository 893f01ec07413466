"""Builds fastattn: the Python package, the Triton sources of kernels/ as fastattn.kernels, and the C++ extension.

CMake and Ninja build `fastattn._native` from csrc/, which needs a C++17 compiler and no torch. Environment:
    FASTATTN_NATIVE=off          pure Python: the reference backend only
    MAX_JOBS=N                   parallel compile jobs
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE_PLATFORMS = {("Linux", "x86_64"), ("Linux", "aarch64")}


def wants_native() -> bool:
    setting = os.environ.get("FASTATTN_NATIVE", "auto")
    if setting not in ("auto", "off"):
        sys.exit(f"FASTATTN_NATIVE must be auto or off, got {setting!r}")
    return setting == "auto" and (platform.system(), platform.machine()) in NATIVE_PLATFORMS


def tool(name: str) -> str:
    """A build tool's path, preferring the one of this environment (its package) over the system's."""
    beside_python = Path(sys.executable).parent / name
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if found is None:
        sys.exit(f"fastattn: building the C++ extension needs {name}; install it, or set FASTATTN_NATIVE=off")
    return found


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{platform.machine()}"
        # Build isolation moves cmake, ninja and pybind11 from one build to the next: configure anew, keep the objects.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            tool("cmake"),
            "-S",
            str(ROOT / "csrc"),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
        ]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([tool("cmake"), "--build", str(build), "--parallel", jobs], check=True)


setup(
    packages=[*find_packages(include=["fastattn", "fastattn.*"]), "fastattn.kernels"],
    package_dir={"fastattn.kernels": "kernels"},
    package_data={"fastattn": ["py.typed"], "fastattn.ledger": ["*.json"]},
    ext_modules=[Extension("fastattn._native", sources=[])] if wants_native() else [],
    cmdclass={"build_ext": CMakeBuild},
)
