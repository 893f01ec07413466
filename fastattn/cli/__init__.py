"""The `fastattn` command."""

from __future__ import annotations

import sys

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit(f"the fastattn command needs {error.name}: pip install 'fastattn[cli]'") from None

from fastattn.cli import bench
from fastattn.cli.checks import explain, info, verify
from fastattn.cli.profile import profile

app = typer.Typer(
    help="Fused attention for PyTorch: look at an installation, check its accuracy, measure its speed and memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (info, explain, verify):
    app.command()(command)
app.add_typer(bench.app, name="bench")
app.command()(profile)


def main() -> None:
    """Entry point of the `fastattn` command."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
