"""The README tells the truth: its Python runs, and its support matrix is what the capability tables say.

Fails when an example raises or computes nonsense, or when a table changed and the README did not.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def test_python_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["out"].shape == (2, 1024, 512)
    assert torch.isfinite(names["out"]).all()


def test_support_matrix_is_current() -> None:
    command = [sys.executable, str(ROOT / "docs" / "support_matrix.py"), "--check"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
