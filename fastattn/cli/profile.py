"""`fastattn profile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastattn.cli.common import Device, Lengths, pick_device, user_errors

if TYPE_CHECKING:
    import torch


def profile(
    model: Annotated[
        str,
        typer.Option(
            help="layer (multi-head attention), op (bare call), lm (a language model), or your own: "
            "module:factory or file.py:factory",
        ),
    ] = "layer",
    seqlen: Lengths = "512,1k,2k,4k",
    impl: Annotated[
        str | None,
        typer.Option(
            help="naive, sdpa, fastattn, a mechanism; your own model's: original, replaced, activated, overridden. "
            "The first is the baseline",
            show_default="naive,fastattn; original,replaced,activated",
        ),
    ] = None,
    mechanism: Annotated[
        str | None,
        typer.Option(
            help="what stands in for softmax attention, beside it: performer, linear, retention, gla, delta; with "
            "--full performer, linear, linformer, nystrom; of a layer or lm also window, longformer, bigbird, strided, "
            "fixed, lsh, topk, nsa"
        ),
    ] = None,
    mode: Annotated[str, typer.Option(help="fwdbwd (a training step) or fwd (inference)")] = "fwdbwd",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, float64", show_default="float32")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="heads", show_default="4")] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="head size", show_default="64")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="layers, for --model lm", show_default="4")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="batch size", show_default="1")] = None,
    causal: Annotated[bool | None, typer.Option("--causal/--full", show_default="causal")] = None,
    device: Device = "auto",
    time_limit: Annotated[
        float | None, typer.Option(min=1, help="seconds for each point; past it, a row says so")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for JSON, picture and page (on CUDA, snapshots too)")] = None,
) -> None:
    """Memory and time against length, by phase, with a fit and the longest length that fits.

    Of attention itself, or of your own model before and after fastattn. For that, write a function that takes a length
    and returns the model and its inputs, a tensor, a tuple or a dict, and name it:

    \b
        # my_model.py
        import torch
        def factory(seqlen):
            layer = torch.nn.TransformerEncoderLayer(256, 4, dropout=0.0, batch_first=True)
            return torch.nn.TransformerEncoder(layer, 2), torch.randn(1, seqlen, 256)

    \b
        fastattn profile --model my_model.py:factory --seqlen 256..2k --out profile

    Every point runs in a fresh process. One that runs out of memory or time, or crashes, is a row; Ctrl-C shows and
    writes what was measured until then.
    """
    with user_errors():
        from fastattn.bench.builtin import STAND_INS
        from fastattn.bench.case import MODES
        from fastattn.bench.model import MODEL
        from fastattn.bench.options import parse_dtypes, parse_lengths, parse_names
        from fastattn.bench.point import kind_of
        from fastattn.bench.subject import Shape

        kind = kind_of(model)
        names = parse_names(impl, "impl", kind.implementations) if impl else list(kind.default)
        if mechanism:
            if kind is MODEL:
                raise ValueError("mechanism: the factory of your own model decides that")
            names += parse_names(mechanism, "mechanism", STAND_INS)
        if mode not in MODES:
            raise ValueError(f"mode: no {mode!r}; there are {', '.join(MODES)}")
        dtypes = parse_dtypes(dtype) if dtype else [None]
        if len(dtypes) > 1:
            raise ValueError(f"dtype: one at a time, got {dtype}")
        sizes = {"batch": batch, "heads": heads, "head_dim": head_dim, "layers": layers, "causal": causal}
        given: dict[str, Any] = {k: v for k, v in {**sizes, "dtype": dtypes[0]}.items() if v is not None}
        if given and kind is MODEL:
            raise ValueError(f"{', '.join(given)}: the factory of your own model decides that")
        if out:
            import matplotlib  # noqa: F401  (missing plots should be known before minutes of measuring)
        where, lengths = pick_device(device), parse_lengths(seqlen)
        for path in run(model, lengths, names, where, out, shape=Shape(**given), mode=mode, time_limit=time_limit):
            typer.echo(f"written: {path}")


def run(
    what: str, seqlens: list[int], names: list[str], where: torch.device, out: Path | None, **settings: Any
) -> list[Path]:
    """Measure, print, and with `out` write JSON, picture and page; returns what was written."""
    from fastattn.bench.profile import run_profile
    from fastattn.bench.profile_report import print_profile
    from fastattn.bench.report import make_console, progress_bar
    from fastattn.bench.subject import Subject

    subject = Subject(what, names[0], seqlens[0], device=where.type, **settings)
    with progress_bar(make_console(stderr=True)) as progress:
        measured = run_profile(subject, seqlens, names, progress, out)
    print_profile(make_console(), measured)
    written = measured.write(out) if out else []
    if measured.interrupted:
        for path in written:
            typer.echo(f"written: {path}")
        raise typer.Exit(130)
    return written
