"""Train a small byte-level language model with naive attention and with fastattn, and compare the two runs.

    python examples/train_lm.py      # naive, then fastattn, on the sources of Python's standard library
    python examples/train_lm.py --text novel.txt --attention fastattn --steps 1000
    python examples/train_lm.py --mechanism gla      # another mechanism alone; compare_mechanisms.py compares them

Both runs start from the same weights and see the same batches, so their losses may differ by rounding only: the
program fails (exit code 1) where they differ by more than 1e-3 within the first 200 steps. The yardstick for having
learnt something is the bigram entropy of the text, the loss of the best predictor that looks at one byte of context.
Every run has a process of its own, because peak memory is a property of a process. The results are a table on the
screen, and `train_lm.json`, `train_lm.png` and the weights of the last run, `model.pt`, in the folder `--out`;
`examples/generate.py` writes text with them.
"""

import argparse
import hashlib
import json
import math
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import fastattn
from fastattn.bench.environment import environment, headline
from fastattn.bench.memory import AllocationMeter, ResidentMeter
from fastattn.models import Transformer, TransformerConfig

COMPARED_STEPS = 200
TOLERANCE = 1e-3
# Single batches differ by some 0.2 nats, because the text is uneven; the mean of 20 is steady enough to compare.
FINAL_STEPS = 20
# The first steps pay for thread start-up and allocation.
UNTIMED_STEPS = 5
MAX_TEXT_BYTES = 16 * 2**20
# Above some learning rate training is chaotic and rounding differences grow. The largest difference in 200 steps, naive
# against the C++ kernels, measured with a peak of 4e-3: 2e-2; 1.5e-3: 3e-4; 1e-3: 2e-6 (final losses 2.00, 2.07, 2.10).
WARMUP_STEPS = 30
LEARNING_RATE = 1e-3

MODEL = "model.pt"
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
MECHANISMS = ("flash", "performer", "linear", "retention", "gla", "delta")  # the causal ones
COLOURS = {"naive": "#a8a8a8", "sdpa": "#d98c00", "fastattn": "#1f5fa8"}


def read_text(path: Path | None) -> tuple[bytes, str]:
    """The training bytes, at most `MAX_TEXT_BYTES`, and one line that says what they are."""
    if path is not None:
        text = path.read_bytes()[:MAX_TEXT_BYTES]
        source = str(path)
    else:
        root = Path(sysconfig.get_path("stdlib"))
        files = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py"))
        files = [file for file in files if not SKIPPED_FOLDERS.intersection(file.split("/"))]
        text = b"".join((root / file).read_bytes() for file in files)[:MAX_TEXT_BYTES]
        source = f"standard library of Python {platform.python_version()}, {len(files)} files without tests"
    return text, f"{source}: {len(text):,} bytes, sha256 {hashlib.sha256(text).hexdigest()[:12]}"


def bigram_entropy(text: bytes) -> float:
    """H(next byte | previous byte) of `text` in nats per byte, from its own bigram counts."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).int()
    counts = torch.bincount(tokens[:-1] * 256 + tokens[1:], minlength=256 * 256).double().view(256, 256)
    conditional = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return -(torch.special.xlogy(counts, conditional).sum() / counts.sum()).item()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
    return LEARNING_RATE * min((step + 1) / WARMUP_STEPS, cosine)


def train(text: bytes, attention: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one model, save it in `arguments.out`, and return its losses, speed and peak memory above the start."""
    device = torch.device(arguments.device)
    batch_size, seq_len, steps = arguments.batch_size, arguments.seq_len, arguments.steps
    torch.manual_seed(arguments.seed)
    config = TransformerConfig(num_kv_heads=2, max_seq_len=seq_len, attention=attention, mechanism=arguments.mechanism)
    model = Transformer(config).to(device)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    batches = torch.Generator().manual_seed(arguments.seed)
    offset_S = torch.arange(seq_len + 1)
    losses: list[float] = []
    seconds: list[float] = []

    memory = AllocationMeter(device) if device.type == "cuda" else ResidentMeter()
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress, memory:
        task = progress.add_task(attention, total=steps, status="")
        for step in range(steps):
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            first_B = torch.randint(len(text) - seq_len, (batch_size,), generator=batches)
            crop_BS = tokens[first_B[:, None] + offset_S].long().to(device)
            loss = model(crop_BS[:, :-1], crop_BS[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - started)
            speed = batch_size * seq_len / statistics.median(seconds[-20:])
            status = f"loss {losses[-1]:.3f}  {speed:,.0f} tokens/s"
            progress.update(task, advance=1, status=status)
            # A live bar is not drawn into a file or pipe.
            if not progress.console.is_terminal and (step + 1) % 25 == 0:
                progress.console.print(f"{attention}: step {step + 1} of {steps}, {status}", highlight=False)

    save(model, arguments.out / MODEL)
    timed = seconds[UNTIMED_STEPS:] or seconds
    return {
        "attention": attention,
        "backend": selected_backend(config, batch_size, device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "final_loss": statistics.fmean(losses[-FINAL_STEPS:]),
        "tokens_per_second": batch_size * seq_len / statistics.median(timed),
        "peak_bytes": memory.peak,
        "losses": losses,
        "step_seconds": seconds,
    }


def save(model: Transformer, path: Path) -> None:
    """Write the configuration and the weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"config": asdict(model.config), "weights": model.state_dict()}, path)


def load(path: Path, device: torch.device, **config: Any) -> Transformer:
    """The model that `save` wrote, ready for inference; `config` replaces fields of its configuration."""
    saved = torch.load(path, map_location=device, weights_only=True)
    model = Transformer(replace(TransformerConfig(**saved["config"]), **config)).to(device)
    model.load_state_dict(saved["weights"])
    return model.requires_grad_(False).eval()


def selected_backend(config: TransformerConfig, batch_size: int, device: torch.device) -> str | None:
    """The backend that fastattn takes for this model's softmax attention, None where it has none."""
    if config.attention != "fastattn" or config.mechanism != "flash":
        return None

    def tensor(heads: int) -> Tensor:
        shape = (batch_size, heads, config.max_seq_len, config.head_dim)
        return torch.empty(shape, device=device, requires_grad=True)

    key, value = tensor(config.kv_heads), tensor(config.kv_heads)
    verdicts = fastattn.explain(tensor(config.num_heads), key, value, causal=True)
    return next(verdict.backend for verdict in verdicts if verdict.selected)


def train_in_fresh_process(attention: str, argv: Sequence[str]) -> dict[str, Any]:
    """`train` in a new interpreter, so that nothing from before counts in its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, *argv, "--attention", attention, "--worker-result", str(result)]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"train_lm: the run with {attention} attention failed")
        return json.loads(result.read_text())


def largest_difference(losses: Sequence[float], expected: Sequence[float]) -> float:
    """Largest |difference| over the compared steps; NaN where a loss is not finite, so that no comparison passes."""
    differences = [abs(a - b) for a, b in zip(losses[:COMPARED_STEPS], expected, strict=False)]
    return max(differences) if all(map(math.isfinite, differences)) else math.nan


def draw(report: dict[str, Any], path: Path) -> None:
    """Loss curves, their difference, tokens/s and peak memory as one PNG."""
    # Imported late: the processes whose memory is measured have no use for it.
    from matplotlib.figure import Figure

    runs, bigram = report["runs"], report["bigram_entropy"]
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 1), height_ratios=(2, 1))
    loss_axes = figure.add_subplot(grid[0 if len(runs) > 1 else slice(None), 0])
    for index, run in enumerate(runs):
        name, losses = run["attention"], run["losses"]
        # The curves coincide, so the first lies broad beneath the second.
        width = 4.0 if index == 0 and len(runs) > 1 else 1.2
        label = f"{name}: {run['final_loss']:.4f} (mean of the last {FINAL_STEPS} steps)"
        loss_axes.plot(range(1, len(losses) + 1), losses, lw=width, color=COLOURS[name], label=label)
    loss_axes.axhline(bigram, color="#b03030", lw=1.2, ls="--", label=f"bigram entropy of the text: {bigram:.4f}")
    loss_axes.set_ylabel("training loss (nats/byte)")
    loss_axes.legend()
    lowest_axes = loss_axes

    if len(runs) > 1:
        first, second = runs
        lowest_axes = figure.add_subplot(grid[1, 0], sharex=loss_axes)
        differences = [abs(a - b) for a, b in zip(first["losses"], second["losses"], strict=True)]
        # Zeros have no logarithm and NaN no place; the table's verdict counts both.
        shown = [(step, d) for step, d in enumerate(differences, 1) if 0 < d < math.inf]
        steps, heights = [step for step, _ in shown], [d for _, d in shown]
        lowest_axes.semilogy(steps, heights, ".", ms=3, color=COLOURS[second["attention"]])
        lowest_axes.plot([1, COMPARED_STEPS], [TOLERANCE, TOLERANCE], color="#b03030", lw=1.2)
        lowest_axes.text(1, TOLERANCE * 1.4, f"allowed in the first {COMPARED_STEPS} steps", va="bottom", fontsize=8)
        lowest_axes.set_ylim(top=10 * max([*heights, TOLERANCE]))
        lowest_axes.set_ylabel("|loss difference|\n(nats/byte)")
        loss_axes.tick_params(labelbottom=False)
    lowest_axes.set_xlabel("step")

    names = [run["attention"] for run in runs]
    for row, key, scale, title in (
        (0, "tokens_per_second", 1.0, "training speed (tokens/s)"),
        (1, "peak_bytes", 1e-6, "peak memory above\nstart of training (MB)"),
    ):
        axes = figure.add_subplot(grid[row, 1])
        values, colours = [(run[key] or 0) * scale for run in runs], [COLOURS[name] for name in names]
        bars = axes.bar(names, values, color=colours, width=0.6)
        axes.bar_label(bars, fmt="{:,.0f}", padding=2)
        axes.margins(y=0.15)
        axes.set_title(title, fontsize=10)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['model']}\n{report['text']}\n{headline(report['environment'])}", fontsize=9)
    figure.savefig(path, dpi=130)


def print_table(report: dict[str, Any], console: Console) -> None:
    """The report as a table and one line on each condition."""
    table = Table(title=report["model"], title_justify="left")
    compared = min(COMPARED_STEPS, report["steps"])
    table.add_column("attention", no_wrap=True)
    table.add_column("final loss\n(nats/byte)", justify="right")
    table.add_column(f"max difference\nin {compared} steps", justify="right")
    table.add_column("\ntokens/s", justify="right")
    table.add_column("peak memory\n(MB)", justify="right")
    for run in report["runs"]:
        name = run["attention"] + (f" ({run['backend']})" if run["backend"] else "")
        difference = "" if run["largest_difference"] is None else f"{run['largest_difference']:.1e}"
        memory = "not measurable" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 1e6:,.0f}"
        table.add_row(name, f"{run['final_loss']:.4f}", difference, f"{run['tokens_per_second']:,.0f}", memory)
    console.print(table)
    verdict = "reached" if report["below_bigram"] else "not reached"
    console.print(f"final loss below the bigram entropy of {report['bigram_entropy']:.4f} nats/byte: {verdict}")
    if report["agree"] is not None:
        verdict = "they do" if report["agree"] else "THEY DO NOT"
        console.print(f"losses of the first {compared} steps agree within {TOLERANCE}: {verdict}")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ("both", "naive", "fastattn", "sdpa")
    parser.add_argument("--attention", choices=choices, default="both", help="default: both, naive then fastattn")
    parser.add_argument("--mechanism", choices=MECHANISMS, default="flash", help="default: flash, which is attention")
    parser.add_argument("--text", type=Path, help="file to train on instead of Python's standard library")
    parser.add_argument("--steps", type=positive, default=250, help="default: %(default)s")
    parser.add_argument("--seq-len", type=positive, default=512, help="bytes a sequence, default: %(default)s")
    parser.add_argument("--batch-size", type=positive, default=4, help="sequences a step, default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches, default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("results/train_lm"), help="default: %(default)s")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="default: a GPU where there is one, else cpu")
    parser.add_argument("--worker-result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.mechanism != "flash":
        if arguments.attention in ("naive", "sdpa"):
            parser.error(f"--mechanism {arguments.mechanism} needs --attention fastattn, got {arguments.attention}")
        arguments.attention = "fastattn"
    return arguments


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    text, description = read_text(arguments.text)
    if len(text) < arguments.seq_len + 1:
        raise SystemExit(f"train_lm: {len(text)} bytes of text are too few for sequences of {arguments.seq_len}")
    if arguments.worker_result is not None:
        arguments.worker_result.write_text(json.dumps(train(text, arguments.attention, arguments)))
        return 0

    console = Console()
    console.print(f"training on {description}", highlight=False, soft_wrap=True)
    names = ("naive", "fastattn") if arguments.attention == "both" else (arguments.attention,)
    runs = [train_in_fresh_process(name, argv) for name in names]
    bigram = bigram_entropy(text)
    for run in runs:
        compared = run is not runs[0]
        run["largest_difference"] = largest_difference(run["losses"], runs[0]["losses"]) if compared else None
    differences = [run["largest_difference"] for run in runs[1:]]
    report = {
        "model": f"{runs[0]['parameters'] / 1e6:.2f} M parameters, {arguments.steps} steps of "
        f"{arguments.batch_size} x {arguments.seq_len} bytes, float32, seed {arguments.seed}"
        + ("" if arguments.mechanism == "flash" else f", mechanism {arguments.mechanism}"),
        "text": description,
        "environment": environment(torch.device(arguments.device)),
        "steps": arguments.steps,
        "bigram_entropy": bigram,
        "below_bigram": all(run["final_loss"] < bigram for run in runs),
        "agree": all(difference <= TOLERANCE for difference in differences) if differences else None,
        "runs": runs,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "train_lm.json").write_text(json.dumps(report, indent=1))
    draw(report, arguments.out / "train_lm.png")
    print_table(report, console)
    console.print(f"picture and figures: {arguments.out / 'train_lm.png'}, {arguments.out / 'train_lm.json'}")
    console.print(f"weights: {arguments.out / MODEL}, for examples/generate.py")
    return 1 if report["agree"] is False else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
