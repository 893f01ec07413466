"""`fastattn bench` and `fastattn bench compare`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastattn.cli.common import Batch, Device, Heads, Lengths, pick_device, user_errors
from fastattn.cli.profile import run as run_profile

if TYPE_CHECKING:
    from fastattn.bench.case import Case
    from fastattn.bench.preset import Preset

app = typer.Typer(add_completion=False)


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    preset: Annotated[
        str | None,
        typer.Option(
            help="quickstart, quick, cpu, cpu-avx2, figures, gpu or gpu-dry; linear, mechanisms, approximation, "
            "linear-gpu, mechanisms-gpu or linear-gpu-dry; sparse, sparse-gpu or sparse-gpu-dry; instead of shapes"
        ),
    ] = None,
    family: Annotated[str, typer.Option(help="dense (softmax attention), linear or sparse")] = "dense",
    mechanism: Annotated[
        str | None,
        typer.Option(
            help="of --family linear, separated by commas: linear, linear-sum, retention, simple-gla, gla, delta, "
            "gated-delta, performer, linformer, nystrom",
            show_default="linear",
        ),
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="features of a Performer, keys of a Linformer, landmarks of Nystrom")
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="of --family sparse, separated by commas: window, documents, bigbird, random", show_default="window"
        ),
    ] = None,
    density: Annotated[
        float | None, typer.Option(min=0, max=1, help="share of the blocks that --pattern random keeps")
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
        typer.Option(
            help="naive, sdpa, sdpa:<torch backend>, fastattn, fastattn:<backend>, flex, a peer, a mechanism "
            "(performer, performer:512); --family linear: naive, torch, fla, sdpa, flash, fastattn; "
            "--family sparse: naive, sdpa, flex, dense, fastattn"
        ),
    ] = None,
    device: Device = "auto",
    time_limit: Annotated[float | None, typer.Option(min=1, help="seconds; slow rows are skipped to keep it")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for JSON, CSV and plots together")] = None,
    json: Annotated[Path | None, typer.Option(help="write the results here")] = None,
    csv: Annotated[Path | None, typer.Option(help="append the rows to this file")] = None,
    plot: Annotated[Path | None, typer.Option(help="folder for PNG plots")] = None,
) -> None:
    """Time, memory and error of naive attention, torch's SDPA and fastattn, side by side.

    With --family linear: of linear attention, beside its quadratic form, PyTorch's chunkwise one and softmax attention.
    With --family sparse: of attention over a block mask, beside others given that mask and fastattn without it.

    `fastattn bench compare A.json B.json` compares two runs.
    """
    if context.invoked_subcommand is not None:
        return
    with user_errors():
        from fastattn.bench.families import family_of
        from fastattn.bench.presets import PRESETS
        from fastattn.bench.report import make_console, print_results, print_targets, progress_bar
        from fastattn.bench.run import Settings, run
        from fastattn.bench.targets import judge_target

        name = "quick" if quick else preset
        if name is not None and name not in PRESETS:
            raise ValueError(f"preset: no {name!r}; there are {', '.join(PRESETS)}")
        chosen: Preset | None = PRESETS[name] if name else None
        if chosen:
            _start_with(chosen.environment)
        where = pick_device(device)
        problems: Sequence[Case]
        if chosen:
            problems = chosen.problems()
        else:
            masks = [kind for kind, wanted in ((False, full or both), (True, causal or both or not full)) if wanted]
            shape = {"heads": heads, "kv_heads": kv_heads or heads, "batch": batch}
            bases = _bases(family, shape, mechanism=mechanism, width=width, pattern=pattern, density=density)
            problems = _problems(bases, seqlen, dtype, head_dim, masks, mode)
        console, progress_console = make_console(), make_console(stderr=True)
        chosen_family = family_of(problems[0])
        names: Sequence[str] = impl.split(",") if impl else chosen_family.default(where)
        if chosen and chosen.implementations and not impl:
            names = chosen.implementations
        implementations = [chosen_family.implementation(name.strip()) for name in names]
        notes: list[str] = []
        if not impl:
            absent = {i.name: reason for i in implementations if (reason := i.absent())}
            implementations = [i for i in implementations if i.name not in absent]
            notes = [f"{name} is not measured: {reason}" for name, reason in absent.items()]
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
            written += run_profile("layer", list(chosen.profile_seqlens), ["naive", "fastattn"], where, out)
        for path in written:
            console.print(f"written: {path}", markup=False, soft_wrap=True)


def _start_with(environment: Mapping[str, str]) -> None:
    """Start this command anew unless the variables, which libraries read as they are loaded, are there already."""
    if any(os.environ.get(key) != value for key, value in environment.items()):
        os.execve(sys.executable, [sys.executable, "-m", "fastattn.cli", *sys.argv[1:]], {**os.environ, **environment})


def _bases(family: str, shape: dict[str, Any], **options: Any) -> list[Case]:
    """A case of each mechanism or pattern that was named, of any length."""
    from fastattn.bench.families import FAMILIES
    from fastattn.bench.linear.problem import MECHANISMS, LinearProblem
    from fastattn.bench.options import parse_names
    from fastattn.bench.sparse.problem import PATTERNS, SparseProblem
    from fastattn.bench.suites import Problem

    if family not in FAMILIES:
        raise ValueError(f"family: no {family!r}; there are {', '.join(FAMILIES)}")
    if shape["heads"] % shape["kv_heads"]:
        raise ValueError(f"heads: must be a multiple of kv-heads, got {shape['heads']} and {shape['kv_heads']}")
    for name, value in options.items():
        wanted = "linear" if name in ("mechanism", "width") else "sparse"
        if value is not None and family != wanted:
            beside = "; beside softmax attention name it in --impl" if wanted == "linear" else ""
            raise ValueError(f"{name}: goes with --family {wanted}{beside}")
    if family == "dense":
        return [Problem(0, **shape)]
    if family == "sparse":
        names = parse_names(options["pattern"] or "window", "pattern", tuple(PATTERNS))
        density = options["density"]
        return [SparseProblem(0, **shape, pattern=n, density=density if n == "random" else None) for n in names]
    names = parse_names(options["mechanism"] or "linear", "mechanism", tuple(MECHANISMS))
    width = options["width"]
    return [LinearProblem(0, **shape, mechanism=n, width=width, causal=MECHANISMS[n].masks[0]) for n in names]


def _problems(bases: list[Case], seqlen: str, dtype: str, head_dim: str, masks: list[bool], mode: str) -> list[Case]:
    from fastattn.bench.case import MODES, grid
    from fastattn.bench.options import parse_dtypes, parse_integers, parse_lengths, parse_names

    return [
        case
        for base in bases
        for case in grid(
            base,
            parse_lengths(seqlen),
            head_dims=parse_integers(head_dim, "head-dim"),
            dtypes=parse_dtypes(dtype),
            causal=masks,
            modes=parse_names(mode, "mode", MODES),
        )
    ]


@app.command("compare")
def bench_compare(
    old: Annotated[Path, typer.Argument(help="JSON of the earlier run", metavar="A.json")],
    new: Annotated[Path, typer.Argument(help="JSON of the later run", metavar="B.json")],
    fail_on: Annotated[str, typer.Option(help="worsening that counts, such as 5%")] = "5%",
) -> None:
    """Compare fastattn's rows of two runs; exit code 1 where B is slower, larger or wrong.

    On the same hardware a row counts as slower when both its time and its ratio to SDPA got worse; on different
    hardware only the ratio to SDPA of the same run counts.
    """
    with user_errors():
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
