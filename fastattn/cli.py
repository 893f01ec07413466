"""The `fastattn` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit(f"the fastattn command needs {error.name}: pip install 'fastattn[cli]'") from None

if TYPE_CHECKING:
    import torch

    from fastattn.bench.presets import Preset
    from fastattn.bench.suites import Problem

# Plots, tables and the measuring code take long to import: each command imports what it needs itself.

app = typer.Typer(
    help="Fused attention for PyTorch: look at an installation, check its accuracy, measure its speed and memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(add_completion=False)
app.add_typer(bench_app, name="bench")

Device = Annotated[str, typer.Option(help="auto (the GPU where there is one), cpu or cuda")]
Lengths = Annotated[str, typer.Option(help="lengths: 512,1k,2k or doublings 512..8k")]
Heads = Annotated[int, typer.Option(min=1, help="query heads")]
Batch = Annotated[int, typer.Option(min=1, help="batch size")]


@contextmanager
def _user_errors() -> Iterator[None]:
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


def _pick_device(name: str) -> torch.device:
    import torch

    from fastattn.bench.suites import default_device

    if name == "auto":
        return default_device()
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: torch finds no GPU here")
    return torch.device(name)


@app.command()
def info() -> None:
    """Versions, device, instruction sets, backends and why one is missing, and what was verified on this hardware."""
    with _user_errors():
        from rich.text import Text

        from fastattn.bench.info import sections
        from fastattn.bench.report import make_console

        console = make_console()
        for title, lines in sections():
            console.print(Text(title, "bold"))
            for name, value in lines:
                console.print(Text.assemble((f"  {name:<16} ", "dim"), value))


@app.command()
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
    with _user_errors():
        import torch

        import fastattn
        from fastattn.bench.options import parse_dtypes, parse_length, parse_window
        from fastattn.bench.report import check_mark, make_console, table
        from fastattn.bench.suites import DTYPES

        where, kind = _pick_device(device), DTYPES[parse_dtypes(dtype)[0]]
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


@app.command()
def verify(
    backend: Annotated[list[str] | None, typer.Option(help="backend to check; repeat for more; default: all")] = None,
    dtype: Annotated[str | None, typer.Option(help="dtypes, separated by commas; default: all")] = None,
    case: Annotated[list[str] | None, typer.Option(help="only cases whose name contains this; repeat for more")] = None,
    device: Device = "auto",
    seed: Annotated[int | None, typer.Option(help="of the random inputs; default: a fresh one")] = None,
    record: Annotated[bool, typer.Option("--record", help="write the hardware ledger")] = False,
    ledger: Annotated[Path | None, typer.Option(help="folder for --record; default: the package's own")] = None,
) -> None:
    """Check the accuracy of every backend over the feature grid; exit code 1 where a case fails."""
    with _user_errors():
        from fastattn.bench.environment import environment, headline
        from fastattn.bench.options import parse_dtypes
        from fastattn.bench.report import make_console, progress_bar
        from fastattn.bench.suites import DTYPES
        from fastattn.verify import GRID
        from fastattn.verify import record as write_record
        from fastattn.verify import verify as run_grid

        cases = [c for c in GRID if case is None or any(part in c.name for part in case)]
        if not cases:
            raise ValueError(f"--case: no case's name contains {' or '.join(case or ())}")
        if record and case:
            raise ValueError("--record takes the whole grid, not some cases")
        where = _pick_device(device)
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


@bench_app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    preset: Annotated[
        str | None, typer.Option(help="quickstart, quick, cpu, cpu-avx2, figures, gpu or gpu-dry, instead of shapes")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="the same as --preset quick")] = False,
    seqlen: Lengths = "512,1k,2k,4k",
    dtype: Annotated[str, typer.Option(help="dtypes, separated by commas")] = "float32",
    head_dim: Annotated[str, typer.Option(help="head sizes, separated by commas")] = "64",
    heads: Heads = 4,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="key and value heads; default: heads")] = None,
    batch: Batch = 1,
    causal: Annotated[bool, typer.Option("--causal", help="causal attention (the default)")] = False,
    full: Annotated[bool, typer.Option("--full", help="attention without a mask; with --causal, both")] = False,
    both: Annotated[bool, typer.Option("--both", help="causal and full")] = False,
    mode: Annotated[str, typer.Option(help="fwd, fwdbwd (forward + backward), or both: fwd,fwdbwd")] = "fwd,fwdbwd",
    impl: Annotated[
        str | None,
        typer.Option(help="naive, sdpa, sdpa:<torch backend>, fastattn, fastattn:<backend>, flex, a peer"),
    ] = None,
    device: Device = "auto",
    time_limit: Annotated[float | None, typer.Option(min=1, help="seconds; slow rows are skipped to keep it")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for JSON, CSV and plots together")] = None,
    json: Annotated[Path | None, typer.Option(help="write the results here")] = None,
    csv: Annotated[Path | None, typer.Option(help="append the rows to this file")] = None,
    plot: Annotated[Path | None, typer.Option(help="folder for PNG plots")] = None,
) -> None:
    """Time, memory and error of naive attention, torch's SDPA and fastattn, side by side.

    `fastattn bench compare A.json B.json` compares two runs.
    """
    if context.invoked_subcommand is not None:
        return
    with _user_errors():
        from fastattn.bench.presets import PRESETS
        from fastattn.bench.report import make_console, print_results, print_targets, progress_bar
        from fastattn.bench.run import Settings, run
        from fastattn.bench.suites import absent_peer, default_implementations, implementation
        from fastattn.bench.targets import judge_target

        name = "quick" if quick else preset
        if name is not None and name not in PRESETS:
            raise ValueError(f"preset: no {name!r}; there are {', '.join(PRESETS)}")
        chosen: Preset | None = PRESETS[name] if name else None
        if chosen:
            _start_with(chosen.environment)
        where = _pick_device(device)
        if chosen:
            problems = chosen.problems()
        else:
            masks = [kind for kind, wanted in ((False, full or both), (True, causal or both or not full)) if wanted]
            problems = _problems(seqlen, dtype, head_dim, heads, kv_heads, batch, masks, mode)
        console, progress_console = make_console(), make_console(stderr=True)
        notes: list[str] = []
        names: Sequence[str] = impl.split(",") if impl else default_implementations(where)
        if chosen and chosen.implementations and not impl:
            absent = {name: absent_peer(name) for name in chosen.implementations}
            names = [name for name, reason in absent.items() if reason is None]
            notes = [f"{name} is not measured: {reason}" for name, reason in absent.items() if reason]
        implementations = [implementation(name.strip()) for name in names]
        if chosen:
            implementations = [replace(i, subject=chosen.subjects.get(i.name, i.subject)) for i in implementations]
            notes += [f"run with {key}={value}" for key, value in chosen.environment.items()]
        if plot or out:
            import matplotlib  # noqa: F401  (missing plots should be known before minutes of measuring)
        limit = time_limit or (chosen.time_limit_s if chosen else 60.0)
        with progress_bar(progress_console) as progress:
            results = run(problems, implementations, Settings(where, limit, notes=tuple(notes)), progress)
        print_results(console, results)
        if chosen and chosen.targets:
            print_targets(console, [judge_target(target, results) for target in chosen.targets])
        written: list[Path] = []
        if out:
            (out / "bench.csv").unlink(missing_ok=True)
        for path in (json, out and out / "bench.json"):
            if path:
                results.write_json(path)
                written.append(path)
        for path in (csv, out and out / "bench.csv"):
            if path:
                results.append_csv(path)
                written.append(path)
        for folder in (plot, out):
            if folder:
                from fastattn.bench.plots import plot_results

                written += plot_results(results, folder)
        if chosen and chosen.profile_seqlens:
            written += _profile("layer", list(chosen.profile_seqlens), ["naive", "fastattn"], where, out)
        for path in written:
            console.print(f"written: {path}", markup=False, soft_wrap=True)


def _start_with(environment: Mapping[str, str]) -> None:
    """Start this command anew unless the variables, which libraries read as they are loaded, are there already."""
    if any(os.environ.get(key) != value for key, value in environment.items()):
        os.execve(sys.executable, [sys.executable, "-m", "fastattn.cli", *sys.argv[1:]], {**os.environ, **environment})


def _problems(
    seqlen: str,
    dtype: str,
    head_dim: str,
    heads: int,
    kv_heads: int | None,
    batch: int,
    masks: list[bool],
    mode: str,
) -> list[Problem]:
    from fastattn.bench.options import parse_dtypes, parse_integers, parse_lengths, parse_names
    from fastattn.bench.suites import MODES, Problem, grid

    if heads % (kv_heads or heads):
        raise ValueError(f"heads: must be a multiple of kv-heads, got {heads} and {kv_heads}")
    return grid(
        parse_lengths(seqlen),
        head_dims=parse_integers(head_dim, "head-dim"),
        dtypes=parse_dtypes(dtype),
        causal=masks,
        modes=parse_names(mode, "mode", MODES),
        base=Problem(0, heads=heads, kv_heads=kv_heads or heads, batch=batch),
    )


@bench_app.command("compare")
def bench_compare(
    old: Annotated[Path, typer.Argument(help="JSON of the earlier run", metavar="A.json")],
    new: Annotated[Path, typer.Argument(help="JSON of the later run", metavar="B.json")],
    fail_on: Annotated[str, typer.Option(help="worsening that counts, such as 5%")] = "5%",
) -> None:
    """Compare fastattn's rows of two runs; exit code 1 where B is slower, larger or wrong.

    On the same hardware a row counts as slower when both its time and its ratio to SDPA got worse; on different
    hardware only the ratio to SDPA of the same run counts.
    """
    with _user_errors():
        from fastattn.bench.compare import compare
        from fastattn.bench.options import parse_fraction
        from fastattn.bench.report import make_console, print_comparison
        from fastattn.bench.results import Results

        tolerance = parse_fraction(fail_on)
        comparison = compare(Results.read_json(old), Results.read_json(new), tolerance)
        if not comparison.changes:
            raise ValueError("the two runs have no measured row of fastattn in common")
        print_comparison(make_console(), comparison, tolerance)
        if comparison.regressions:
            raise typer.Exit(1)


@app.command()
def profile(
    model: Annotated[str, typer.Option(help="layer (multi-head attention), op (bare call), lm (a model)")] = "layer",
    seqlen: Lengths = "512,1k,2k,4k",
    impl: Annotated[str, typer.Option(help="naive, sdpa, fastattn")] = "naive,fastattn",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, float64")] = "float32",
    heads: Heads = 4,
    head_dim: Annotated[int, typer.Option(min=1, help="head size")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="layers, for --model lm")] = 4,
    batch: Batch = 1,
    causal: Annotated[bool, typer.Option("--causal/--full")] = True,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="folder for the JSON and the plot")] = None,
) -> None:
    """Memory of a layer, a call or a language model against length, by phase, with a fit and the longest that fits."""
    with _user_errors():
        from fastattn.bench.options import parse_dtypes, parse_lengths, parse_names
        from fastattn.bench.point import IMPLEMENTATIONS, SUBJECTS

        what = parse_names(model, "model", SUBJECTS)[0]
        names = parse_names(impl, "impl", IMPLEMENTATIONS)
        if out:
            import matplotlib  # noqa: F401  (missing plots should be known before minutes of measuring)
        shape = {"batch": batch, "heads": heads, "head_dim": head_dim, "layers": layers, "causal": causal}
        written = _profile(
            what, parse_lengths(seqlen), names, _pick_device(device), out, dtype=parse_dtypes(dtype)[0], **shape
        )
        for path in written:
            typer.echo(f"written: {path}")


def _profile(
    what: str, seqlens: list[int], names: list[str], where: torch.device, out: Path | None, **shape: Any
) -> list[Path]:
    """Measure, print, and with `out` write the JSON and the plot; returns what was written."""
    from fastattn.bench.point import Subject
    from fastattn.bench.profile import plot_profile, print_profile, profile_memory
    from fastattn.bench.report import make_console, progress_bar

    subject = Subject(what, names[0], seqlens[0], device=where.type, **shape)
    with progress_bar(make_console(stderr=True)) as progress:
        measured = profile_memory(subject, seqlens, names, progress)
    print_profile(make_console(), measured)
    if out is None:
        return []
    measured.write_json(out / f"profile_{what}.json")
    return [out / f"profile_{what}.json", plot_profile(measured, out / f"profile_{what}.png")]


def main() -> None:
    """Entry point of the `fastattn` command."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
