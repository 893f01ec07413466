"""`make sanitize` and `make check`: the C++ core's own tests (csrc/tests), without torch and Python, in three builds.

    address   AddressSanitizer and UndefinedBehaviorSanitizer; with the bfloat16 dot product emulated
    thread    ThreadSanitizer, on threads of the standard library: it cannot follow GCC's OpenMP
    aarch64   cross-compiled, with the system's compiler for it or, where there is none, with one that pip installs; run
              where there is an emulator (qemu-aarch64): no hardware has run it yet

Fails when a check of the core's tests fails, when a sanitizer reports anything, or when a build fails.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable

from cmake_build import ROOT, build

# Random problems per instruction set: some twenty seconds of each build on two cores.
PROBLEMS = {"address": 100, "thread": 60, "aarch64": 60}


def address() -> list[str]:
    folder = build(
        "core-address",
        FASTATTN_CORE_TESTS="ON",
        FASTATTN_SANITIZE="address,undefined",
        FASTATTN_EMULATE_BF16_DOT="ON",
    )
    return [str(folder / "core_tests")]


def thread() -> list[str]:
    folder = build("core-thread", FASTATTN_CORE_TESTS="ON", FASTATTN_SANITIZE="thread", FASTATTN_OPENMP="OFF")
    return [str(folder / "core_tests")]


def aarch64() -> list[str]:
    folder = build(
        "core-aarch64",
        FASTATTN_CORE_TESTS="ON",
        FASTATTN_OPENMP="OFF",
        CMAKE_SYSTEM_NAME="Linux",
        CMAKE_SYSTEM_PROCESSOR="aarch64",
        CMAKE_CXX_COMPILER=shutil.which("aarch64-linux-gnu-g++") or _zig("aarch64-linux-musl"),
        CMAKE_EXE_LINKER_FLAGS="-static",
    )
    emulator = shutil.which("qemu-aarch64")
    return [emulator, str(folder / "core_tests")] if emulator else []


def _zig(target: str) -> str:
    """Zig's C++ compiler for another machine, in CMake's notation. Its first use builds a C++ library: minutes."""
    tools = ROOT / "build" / "zig"
    if not tools.exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tools), "ziglang"], check=True
        )
    return f"{tools / 'ziglang' / 'zig'};c++;-target;{target}"


BUILDS: dict[str, Callable[[], list[str]]] = {"address": address, "thread": thread, "aarch64": aarch64}


def main(names: list[str]) -> int:
    failed = []
    for name in names or BUILDS:
        start = time.monotonic()
        command = BUILDS[name]()
        print(f"== {name}: built in {time.monotonic() - start:.0f} s", flush=True)
        if not command:
            print("compiled, not run: no emulator here", flush=True)
        elif subprocess.run([*command, str(PROBLEMS[name])], check=False).returncode:
            failed.append(name)
        print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
