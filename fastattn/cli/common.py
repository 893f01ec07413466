"""What the commands share: common options, errors, the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

# Plots, tables and the measuring code take long to import: each command imports what it needs itself.

Device = Annotated[str, typer.Option(help="auto (the GPU where there is one), cpu or cuda")]
Lengths = Annotated[str, typer.Option(help="lengths: 512,1k,2k or doublings 512..8k")]
Heads = Annotated[int, typer.Option(min=1, help="query heads")]
Batch = Annotated[int, typer.Option(min=1, help="batch size")]


@contextmanager
def user_errors() -> Iterator[None]:
    """Mistakes of the caller end the command with one line instead of a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("matplotlib", "numpy", "rich"):
            raise
        typer.echo(f"error: this needs {error.name}: pip install 'fastattn[cli]'", err=True)
        raise typer.Exit(2) from None
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def pick_device(name: str) -> torch.device:
    import torch

    from fastattn.bench.suites import default_device

    if name == "auto":
        return default_device()
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: torch finds no GPU here")
    return torch.device(name)
