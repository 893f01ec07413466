"""`make check`: builds wheels without network or build isolation, and uses them away from the checkout.

Fails when a wheel takes 10 MB, when a file is missing or `kernels` lands at top level, or when the installed copy
cannot compute attention: with the C++ extension, and in pure Python (FASTATTN_NATIVE=off). Objects that the checkout
has built already are used again, so the time that it prints is not that of a first build.
"""

import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
USE = """
import sys
# The environment's editable install of the checkout would supply what the wheel lacks.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
import torch, fastattn, fastattn.kernels
assert fastattn.__file__.startswith(sys.argv[1]), fastattn.__file__
q, k, v = torch.randn(3, 1, 2, 70, 16).requires_grad_()
out = fastattn.attention(q, k, v, causal=True)
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
torch.testing.assert_close(out, expected)
out.sum().backward()
print("selected:", next(verdict.backend for verdict in fastattn.explain(q, k, v, causal=True) if verdict.selected))
"""


def check(native: str, expected_backend: str) -> None:
    environment = {**os.environ, "FASTATTN_NATIVE": native}
    with tempfile.TemporaryDirectory() as scratch:
        start = time.monotonic()
        build = [*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", scratch, str(ROOT)]
        subprocess.run(build, check=True, env=environment, cwd=scratch)
        seconds = time.monotonic() - start
        (wheel,) = Path(scratch).glob("*.whl")
        megabytes = wheel.stat().st_size / 1e6
        names = zipfile.ZipFile(wheel).namelist()
        assert megabytes < 10, f"the wheel has {megabytes:.1f} MB"
        assert "fastattn/kernels/__init__.py" in names
        assert "fastattn/py.typed" in names
        assert not any(name.startswith("kernels/") for name in names)
        assert any(name.startswith("fastattn/_native") for name in names) == (native == "auto")

        site = Path(scratch) / "site"
        subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
        used = subprocess.run(
            [sys.executable, "-c", USE, str(site)],
            check=True,
            cwd=scratch,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )
        assert f"selected: {expected_backend}" in used.stdout, used.stdout
    print(f"{wheel.name}: built in {seconds:.0f} s, {megabytes:.2f} MB, {used.stdout.strip()}")


if __name__ == "__main__":
    check("auto", "cpu")
    check("off", "reference")
