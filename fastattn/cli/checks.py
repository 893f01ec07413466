"""`fastattn info`, `explain` and `verify`: what an installation has, what runs a call, and how accurate it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastattn.cli.common import Batch, Device, Heads, pick_device, user_errors


def info() -> None:
    """Versions, device, instruction sets, backends and why one is missing, and what was verified on this hardware."""
    with user_errors():
        from rich.text import Text

        from fastattn.bench.info import sections
        from fastattn.bench.report import make_console

        console = make_console()
        for title, lines in sections():
            console.print(Text(title, "bold"))
            for name, value in lines:
                console.print(Text.assemble((f"  {name:<16} ", "dim"), value))


def explain(
    seqlen: Annotated[str, typer.Option(help="query length")] = "1k",
    seqlen_k: Annotated[str | None, typer.Option(help="key length; default: the query length")] = None,
    batch: Batch = 1,
    heads: Heads = 4,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="key and value heads; default: heads")] = None,
    head_dim: Annotated[int, typer.Option(min=1, help="head size of query and key")] = 64,
    value_dim: Annotated[int | None, typer.Option(min=1, help="head size of value; default: head-dim")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, float64")] = "float32",
    device: Device = "auto",
    grad: Annotated[bool, typer.Option("--grad/--no-grad", help="gradients are needed")] = True,
    causal: Annotated[bool, typer.Option("--causal/--full")] = False,
    window: Annotated[str | None, typer.Option(help="LEFT,RIGHT keys around the query; none = no limit")] = None,
    mask: Annotated[str | None, typer.Option(help="bool, float or trainable (float with a gradient)")] = None,
    key_lengths: Annotated[bool, typer.Option("--key-lengths", help="keys end at a length per sequence")] = False,
    softcap: Annotated[float | None, typer.Option(help="soft limit of the scores")] = None,
    alibi: Annotated[bool, typer.Option("--alibi", help="ALiBi slopes")] = False,
    sinks: Annotated[bool, typer.Option("--sinks", help="a sink per head")] = False,
    dropout: Annotated[float, typer.Option(min=0.0, max=1.0, help="dropout probability")] = 0.0,
    deterministic: Annotated[bool, typer.Option("--deterministic")] = False,
    backend: Annotated[str | None, typer.Option(help="insist on this backend")] = None,
) -> None:
    """Which backends can run a call, which one would, and why not the others. Computes nothing."""
    with user_errors():
        import torch

        import fastattn
        from fastattn.bench.options import parse_dtypes, parse_length, parse_window
        from fastattn.bench.report import check_mark, make_console, table
        from fastattn.bench.suites import DTYPES

        where, kind = pick_device(device), DTYPES[parse_dtypes(dtype)[0]]
        length, length_k = parse_length(seqlen), parse_length(seqlen_k or seqlen)
        query = torch.empty(batch, heads, length, head_dim, dtype=kind, device=where, requires_grad=grad)
        key = torch.empty(batch, kv_heads or heads, length_k, head_dim, dtype=kind, device=where)
        value = torch.empty(batch, kv_heads or heads, length_k, value_dim or head_dim, dtype=kind, device=where)
        options: dict[str, Any] = {"causal": causal, "softcap": softcap, "dropout_p": dropout}
        options |= {"deterministic": deterministic, "backend": backend}
        if window is not None:
            options["window"] = parse_window(window)
        if mask is not None:
            if mask not in ("bool", "float", "trainable"):
                raise ValueError(f"mask: expected bool, float or trainable, got {mask!r}")
            mask_dtype = torch.bool if mask == "bool" else kind
            options["attn_mask"] = torch.zeros(1, 1, 1, length_k, dtype=mask_dtype, device=where)
            if mask == "trainable":
                options["attn_mask"].requires_grad_()
        if key_lengths:
            options["key_lengths"] = torch.full((batch,), length_k, device=where)
        if alibi:
            options["alibi_slopes"] = torch.ones(heads, device=where)
        if sinks:
            options["sinks"] = torch.zeros(heads, device=where)
        verdicts = fastattn.explain(query, key, value, **options)
        console = make_console()
        shown = table("backend", "supported", "selected", "why", left=("backend", "why"))
        for verdict in verdicts:
            chosen = check_mark(console, True) if verdict.selected else ""
            why = "; ".join(verdict.reasons) or verdict.note
            shown.add_row(verdict.backend, check_mark(console, verdict.supported), chosen, why)
        console.print(shown)
        if not any(verdict.selected for verdict in verdicts):
            raise typer.Exit(1)


def verify(
    backend: Annotated[list[str] | None, typer.Option(help="backend to check; repeat for more; default: all")] = None,
    dtype: Annotated[str | None, typer.Option(help="dtypes, separated by commas; default: all")] = None,
    family: Annotated[list[str] | None, typer.Option(help="dense or linear; repeat for more; default: all")] = None,
    case: Annotated[list[str] | None, typer.Option(help="only cases whose name contains this; repeat for more")] = None,
    device: Device = "auto",
    seed: Annotated[int | None, typer.Option(help="of the random inputs; default: a fresh one")] = None,
    record: Annotated[bool, typer.Option("--record", help="write the hardware ledger")] = False,
    ledger: Annotated[Path | None, typer.Option(help="folder for --record; default: the package's own")] = None,
) -> None:
    """Check the accuracy of every backend over its family's feature grid; exit code 1 where a case fails."""
    with user_errors():
        from fastattn.bench.environment import environment, headline
        from fastattn.bench.options import parse_dtypes
        from fastattn.bench.report import make_console, progress_bar
        from fastattn.bench.suites import DTYPES
        from fastattn.verify import GRIDS
        from fastattn.verify import record as write_record
        from fastattn.verify import verify as run_grid

        for name in family or ():
            if name not in GRIDS:
                raise ValueError(f"--family: expected {' or '.join(GRIDS)}, got {name!r}")
        grid = [c for name in family or GRIDS for c in GRIDS[name]]
        cases = [c for c in grid if case is None or any(part in c.name for part in case)]
        if not cases:
            raise ValueError(f"--case: no case's name contains {' or '.join(case or ())}")
        if record and (case or family):
            raise ValueError("--record takes all grids, not some cases or families")
        where = pick_device(device)
        dtypes = [DTYPES[name] for name in parse_dtypes(dtype)] if dtype else None
        console = make_console()
        with progress_bar(make_console(stderr=True)) as progress:
            report = run_grid(backend or None, where.type, dtypes, progress, cases, seed)
        console.print(headline(environment(where)), style="bold", markup=False)
        console.print(f"seed {report.seed}", style="dim")
        console.print(report.summary(), markup=False, soft_wrap=True)
        verdict, style = ("all cases pass", "bold green") if report.passed else ("FAILED", "bold red")
        console.print(verdict, style=style)
        if record:
            console.print(f"recorded in {write_record(report, ledger)}", markup=False)
        if not report.passed:
            raise typer.Exit(1)
