"""The README's support matrix is what the capability tables say. Fails when a table changed and the README did not."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_support_matrix_is_current() -> None:
    command = [sys.executable, str(ROOT / "docs" / "support_matrix.py"), "--check"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
