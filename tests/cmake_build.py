"""How the checks build csrc/ in ways of their own: CMake and Ninja, from this environment or the system."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(name: str, **definitions: object) -> Path:
    """Configure csrc/ with these CMake definitions and build it; the folder build/<name> that it is in."""
    folder = ROOT / "build" / name
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    options = [f"-D{key}={value}" for key, value in {"CMAKE_BUILD_TYPE": "Release", **definitions}.items()]
    for command in (
        ["cmake", "-S", str(ROOT / "csrc"), "-B", str(folder), "-G", "Ninja", *options],
        ["cmake", "--build", str(folder)],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return folder
