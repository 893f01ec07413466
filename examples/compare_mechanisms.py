"""Train the same small model with every attention mechanism, and compare losses, time and memory.

    python examples/compare_mechanisms.py
    python examples/compare_mechanisms.py --task masked --steps 1000 --seq-len 1024

There are two tasks on the sources of Python's standard library: predicting the next byte, for causal mechanisms, and
filling in hidden bytes (15 % of them), for an encoder in which all positions see all. Within a task all models start
from the same weights, but for what a mechanism adds, and see the same batches. What counts is the loss on text that was
not trained on. The time of a training step is also measured for longer sequences, fewer at a time.

Every run has a process of its own, because peak memory is a property of a process. The results are a table for each
task on the screen, and `mechanisms.json` and `mechanisms.png` in the folder `--out`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import train_lm
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from fastattn.bench.environment import environment, headline
from fastattn.bench.memory import AllocationMeter, ResidentMeter
from fastattn.models import Transformer, TransformerConfig
from fastattn.nn import Linformer, Mechanism

TASKS = {
    "next": ("flash", "performer", "linear", "retention", "gla", "delta"),
    "masked": ("flash", "performer", "linear", "linformer", "nystrom"),
}
TITLES = {"next": "next byte (causal)", "masked": "hidden bytes (encoder)"}
MASK = 256  # the token after the 256 bytes
MASKED_SHARE = 0.15
IGNORED = -100
HELD_OUT_BYTES = 64 * 1024
HELD_OUT_SEQUENCES = 16
LENGTHS = (512, 1024, 2048, 4096)
TIMED_STEPS = 2
COLOURS = {
    "flash": "#404040",
    "performer": "#1f5fa8",
    "linear": "#d98c00",
    "retention": "#7a4fa3",
    "gla": "#2c8c4b",
    "delta": "#b03030",
    "linformer": "#8c6d31",
    "nystrom": "#c05a9e",
}


def batches(
    text: Tensor, task: str, batch_size: int, seq_len: int, seed: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, int64 (batch_size, seq_len); of hidden bytes only these are targets."""
    generator = torch.Generator().manual_seed(seed)
    offset_S = torch.arange(seq_len + 1)
    for _ in range(steps):
        first_B = torch.randint(len(text) - seq_len, (batch_size,), generator=generator)
        crop_BS = text[first_B[:, None] + offset_S].long()
        if task == "next":
            yield crop_BS[:, :-1], crop_BS[:, 1:]
            continue
        whole_BS = crop_BS[:, :-1]
        hidden_BS = torch.rand(whole_BS.shape, generator=generator) < MASKED_SHARE
        yield whole_BS.masked_fill(hidden_BS, MASK), whole_BS.masked_fill(~hidden_BS, IGNORED)


def build(task: str, mechanism: str, arguments: argparse.Namespace, length: int) -> Transformer:
    """The model for sequences of this length; Linformer has as many keys as for those that are trained on."""
    options: str | Mechanism = mechanism
    if mechanism == "linformer":
        options = Linformer(length, max(1, arguments.seq_len // 4))
    torch.manual_seed(arguments.seed)
    config = TransformerConfig(vocab_size=MASK + 1, max_seq_len=length, causal=task == "next", mechanism=options)
    return Transformer(config).to(arguments.device)


class Trainer:
    """A model and its optimizer, as train_lm has them."""

    def __init__(self, model: Transformer, steps: int) -> None:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim != 2]
        self.model, self.steps = model, steps
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
        )

    def step(self, step: int, inputs: Tensor, targets: Tensor) -> float:
        device = self.model.embedding.weight.device
        for group in self.optimizer.param_groups:
            group["lr"] = train_lm.learning_rate(step, self.steps)
        loss = self.model(inputs.to(device), targets.to(device))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def train(text: bytes, task: str, mechanism: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one model and return its losses, its loss on held-out text, seconds a step and peak memory."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    held_out, tokens = tokens[-HELD_OUT_BYTES:], tokens[:-HELD_OUT_BYTES]
    device, batch_size, seq_len = torch.device(arguments.device), arguments.batch_size, arguments.seq_len
    trainer = Trainer(build(task, mechanism, arguments, seq_len), arguments.steps)
    losses: list[float] = []
    seconds: list[float] = []
    name = f"{task}: {mechanism}"
    columns = (
        TextColumn("{task.description:>17}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    memory = AllocationMeter(device) if device.type == "cuda" else ResidentMeter()
    with Progress(*columns) as progress, memory:
        shown = progress.add_task(name, total=arguments.steps, status="")
        drawn = batches(tokens, task, batch_size, seq_len, arguments.seed, arguments.steps)
        for step, (inputs, targets) in enumerate(drawn):
            started = time.perf_counter()
            losses.append(trainer.step(step, inputs, targets))
            seconds.append(time.perf_counter() - started)
            status = f"loss {statistics.fmean(losses[-10:]):.3f}  {statistics.median(seconds[-20:]) * 1e3:,.0f} ms/step"
            progress.update(shown, advance=1, status=status)
            # A live bar is not drawn into a file or pipe.
            if not progress.console.is_terminal and (step + 1) % 50 == 0:
                progress.console.print(f"{name}: step {step + 1} of {arguments.steps}, {status}", highlight=False)

    with torch.no_grad():
        drawn = batches(held_out, task, 1, seq_len, arguments.seed + 1, HELD_OUT_SEQUENCES)
        unseen = [trainer.model(x.to(device), y.to(device)).item() for x, y in drawn]
    return {
        "task": task,
        "mechanism": mechanism,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "losses": losses,
        "held_out_loss": statistics.fmean(unseen),
        "step_seconds": statistics.median(seconds[train_lm.UNTIMED_STEPS :] or seconds),
        "peak_bytes": memory.peak,
        "seconds_by_length": {n: step_seconds(tokens, task, mechanism, arguments, n) for n in arguments.lengths},
    }


def step_seconds(tokens: Tensor, task: str, mechanism: str, arguments: argparse.Namespace, length: int) -> float:
    """Of a training step at this length, at as many tokens as the longest of all has; the best of a few."""
    batch_size = max(arguments.lengths) // length
    trainer = Trainer(build(task, mechanism, arguments, length), TIMED_STEPS + 1)
    seconds = []
    for step, drawn in enumerate(batches(tokens, task, batch_size, length, arguments.seed, TIMED_STEPS + 1)):
        started = time.perf_counter()
        trainer.step(step, *drawn)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def train_in_fresh_process(task: str, mechanism: str, argv: Sequence[str]) -> dict[str, Any]:
    """`train` in a new interpreter, so that nothing from before counts in its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, *argv, "--worker", task, mechanism, str(result)]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"compare_mechanisms: the run of {task} with {mechanism} failed")
        return json.loads(result.read_text())


def smoothed(losses: Sequence[float], width: int = 10) -> list[float]:
    """The mean of the last `width` losses at each step."""
    return [statistics.fmean(losses[max(0, i + 1 - width) : i + 1]) for i in range(len(losses))]


def draw(report: dict[str, Any], path: Path) -> None:
    """For each task loss curves, time of a step against length, and peak memory, as one PNG."""
    # Imported late: the processes whose memory is measured have no use for it.
    from matplotlib.figure import Figure

    tasks = [task for task in TASKS if any(run["task"] == task for run in report["runs"])]
    figure = Figure(figsize=(14, 3.9 * len(tasks) + 0.6), layout="constrained")
    grid = figure.subplots(len(tasks), 3, squeeze=False, width_ratios=(3, 2, 1.6))
    for (loss_axes, time_axes, memory_axes), task in zip(grid, tasks, strict=True):
        runs = [run for run in report["runs"] if run["task"] == task]
        for run in runs:
            name, colour = run["mechanism"], COLOURS[run["mechanism"]]
            curve = smoothed(run["losses"])
            label = f"{name}: {run['held_out_loss']:.3f}"
            loss_axes.plot(range(1, len(curve) + 1), curve, lw=1.4, color=colour, label=label)
            lengths = list(map(int, run["seconds_by_length"]))
            time_axes.plot(lengths, run["seconds_by_length"].values(), "o-", ms=4, lw=1.4, color=colour, label=name)
        # The first steps, all alike, would take most of the room.
        loss_axes.set_ylim(top=max(smoothed(run["losses"])[len(run["losses"]) // 10] for run in runs))
        loss_axes.set_title(f"{TITLES[task]}: training loss, mean of 10 steps", fontsize=10)
        loss_axes.set_ylabel("nats/byte")
        loss_axes.set_xlabel("step")
        loss_axes.legend(title="loss on held-out text", fontsize=8, title_fontsize=8)
        time_axes.set_xscale("log", base=2)
        time_axes.set_xticks(lengths, [f"{n:,}" for n in lengths], minor=False)
        time_axes.set_ylim(bottom=0)
        time_axes.set_title(f"a training step of {max(lengths):,} bytes (s)", fontsize=10)
        time_axes.set_xlabel("length of a sequence")
        values = [(run["peak_bytes"] or 0) / 1e6 for run in runs]
        bars = memory_axes.barh(
            [run["mechanism"] for run in runs], values, color=[COLOURS[run["mechanism"]] for run in runs]
        )
        memory_axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=8)
        memory_axes.invert_yaxis()
        memory_axes.margins(x=0.18)
        memory_axes.set_title("peak memory above\nstart of training (MB)", fontsize=10)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['model']}\n{report['text']}\n{headline(report['environment'])}", fontsize=9)
    figure.savefig(path, dpi=130)


def print_tables(report: dict[str, Any], console: Console) -> None:
    """One table a task: losses in nats per byte, and the time of a step of as many bytes as the longest length."""
    for task, title in TITLES.items():
        runs = [run for run in report["runs"] if run["task"] == task]
        if not runs:
            continue
        table = Table(title=f"{title}: {report['model']}", title_justify="left")
        table.add_column("mechanism", no_wrap=True)
        for column in ("weights\n(M)", "held-out\nloss", "memory\n(MB)"):
            table.add_column(column, justify="right")
        lengths = list(runs[0]["seconds_by_length"])
        for length in lengths:
            table.add_column(f"{length}\n(ms)", justify="right")
        for run in runs:
            table.add_row(
                run["mechanism"],
                f"{run['parameters'] / 1e6:.3f}",
                f"{run['held_out_loss']:.3f}",
                "not measurable" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 1e6:,.0f}",
                *(f"{run['seconds_by_length'][length] * 1e3:,.0f}" for length in lengths),
            )
        console.print(table)
    console.print(f"bigram entropy of the text: {report['bigram_entropy']:.3f} nats/byte")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("both", *TASKS), default="both", help="default: both")
    parser.add_argument("--text", type=Path, help="file to train on instead of Python's standard library")
    parser.add_argument("--steps", type=positive, default=300, help="default: %(default)s")
    parser.add_argument("--seq-len", type=positive, default=512, help="bytes a sequence, default: %(default)s")
    parser.add_argument("--batch-size", type=positive, default=4, help="sequences a step, default: %(default)s")
    parser.add_argument(
        "--lengths", type=positive, nargs="+", default=LENGTHS, help="at which steps are timed, default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches, default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("results/mechanisms"), help="default: %(default)s")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="default: a GPU where there is one, else cpu")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    text, description = train_lm.read_text(arguments.text)
    longest = max(arguments.seq_len, *arguments.lengths)
    if len(text) <= HELD_OUT_BYTES + longest or arguments.seq_len >= HELD_OUT_BYTES:
        raise SystemExit(f"compare_mechanisms: {len(text)} bytes of text are too few for sequences of {longest}")
    if arguments.worker is not None:
        task, mechanism, result = arguments.worker
        Path(result).write_text(json.dumps(train(text, task, mechanism, arguments)))
        return 0

    console = Console()
    console.print(f"training on {description}", highlight=False, soft_wrap=True)
    tasks = TASKS if arguments.task == "both" else (arguments.task,)
    runs = [train_in_fresh_process(task, mechanism, argv) for task in tasks for mechanism in TASKS[task]]
    report = {
        "model": f"{min(run['parameters'] for run in runs) / 1e6:.2f} M parameters, {arguments.steps} steps of "
        f"{arguments.batch_size} x {arguments.seq_len} bytes, float32, seed {arguments.seed}",
        "text": description,
        "environment": environment(torch.device(arguments.device)),
        "bigram_entropy": train_lm.bigram_entropy(text),
        "runs": runs,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "mechanisms.json").write_text(json.dumps(report, indent=1))
    draw(report, arguments.out / "mechanisms.png")
    print_tables(report, console)
    console.print(f"picture and figures: {arguments.out / 'mechanisms.png'}, {arguments.out / 'mechanisms.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
