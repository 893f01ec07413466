"""Write text with the model of examples/train_lm.py, and time the ways of doing it.

    python examples/generate.py                                  # continues a piece of Python's standard library
    python examples/generate.py --prompt "class " --temperature 0.9 --tokens 500
    python examples/generate.py --batch-size 16 --prompt-len 2048

Where `--out` holds no model yet, one is trained first, as `train_lm.py --attention fastattn` does (a minute on two
cores). It knows single bytes, and after so short a training it has learnt what code looks like, not what it means.

The table times greedy generation, every prompt as long as the others, in the same process by turns: with fastattn over
a static and over a paged cache, with PyTorch's scaled_dot_product_attention over a static cache, and without a cache,
everything computed anew for each token. All must produce the same tokens; the exit code is 1 where they do not.
"""

import argparse
import codecs
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import train_lm
from rich.console import Console
from rich.table import Table

from fastattn.bench.environment import environment, headline
from fastattn.models import KVCache, TorchCache, Transformer, generate
from fastattn.models.cache import PAGE_SIZE

# The prompt starts with this text's first occurrence in the second half, and ends wherever that is.
EXCERPT = b"class "
EXCERPT_BYTES = 240


class Way(NamedTuple):
    """One way to generate."""

    attention: str
    kind: str
    model: Transformer
    cache: KVCache | None


class Timing(NamedTuple):
    """Seconds to the first token of every sequence, then tokens per second, and the tokens."""

    first: float
    speed: float
    tokens: list[list[int]]


def write(model: Transformer, prompt: bytes, arguments: argparse.Namespace, console: Console) -> None:
    """Print the prompt and its continuation, each byte as soon as it is there."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def show(_: int, token: int) -> None:
        console.out(decoder.decode(bytes([token])), style="bold cyan", end="", highlight=False)

    console.rule("prompt, and how it goes on", align="left")
    console.out(prompt.decode(errors="replace"), end="", highlight=False)
    generate(
        model,
        [list(prompt)],
        arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        generator=torch.Generator().manual_seed(arguments.seed),
        stream=show,
    )
    console.out(decoder.decode(b"", final=True))
    console.rule()


def measure(way: Way, prompts: Sequence[Sequence[int]], tokens: int) -> Timing:
    """Generate greedily and time it."""
    moments: list[float] = []
    started = time.perf_counter()
    results = generate(
        way.model,
        prompts,
        tokens,
        temperature=0,
        cache=way.cache,
        stream=lambda *_: moments.append(time.perf_counter()),
    )
    first = moments[len(prompts) - 1]
    speed = len(prompts) * (tokens - 1) / (moments[-1] - first)
    return Timing(first - started, speed, [result.tolist() for result in results])


def ways(path: Path, device: torch.device, batch_size: int, length: int) -> list[Way]:
    """What to compare, the yardstick of the tokens last."""
    # Positions past those trained on cost the same and must agree all the same.
    fast, sdpa = (train_lm.load(path, device, attention=name, max_seq_len=length) for name in ("fastattn", "sdpa"))
    return [
        Way("fastattn", "static", fast, KVCache.static(fast, batch_size)),
        Way("fastattn", "paged", fast, KVCache.paged(fast, batch_size * -(-length // PAGE_SIZE))),
        Way("sdpa", "static", sdpa, TorchCache.static(sdpa, batch_size)),
        Way("fastattn", "none", fast, None),
    ]


def compare(path: Path, text: bytes, arguments: argparse.Namespace, console: Console) -> bool:
    """Time every way and print the table; whether all tokens are the same."""
    device = torch.device(arguments.device)
    batch_size, prompt_len, tokens = arguments.batch_size, arguments.prompt_len, arguments.new_tokens
    compared = ways(path, device, batch_size, prompt_len + tokens)
    generator = torch.Generator().manual_seed(arguments.seed)
    starts = torch.randint(len(text) - prompt_len, (batch_size,), generator=generator).tolist()
    prompts = [list(text[start : start + prompt_len]) for start in starts]

    timings: list[list[Timing]] = [[] for _ in compared]
    with console.status("timing") as status:
        for turn in range(arguments.repeats + 1):
            for way, timed in zip(compared, timings, strict=True):
                if way.cache is None and turn > 1:
                    continue  # seconds a run: once is enough to see by how much it loses
                status.update(f"timing, turn {turn} of {arguments.repeats}: {way.attention}, cache {way.kind}")
                timing = measure(way, prompts, tokens if turn else 2)
                if turn:  # the first is the warm-up
                    timed.append(timing)

    expected = timings[-1][0].tokens
    same = [all(timing.tokens == expected for timing in timed) for timed in timings]
    table = Table(
        title=f"{batch_size} prompts of {prompt_len} bytes, {tokens} new bytes each, greedy\n"
        f"{headline(environment(device))}",
        title_justify="left",
    )
    table.add_column("attention")
    table.add_column("cache")
    for column in ("cache\n(MB)", "first bytes\n(ms)", "then\n(bytes/s)", "same\nbytes"):
        table.add_column(column, justify="right")
    for way, timed, agrees in zip(compared, timings, same, strict=True):
        table.add_row(
            way.attention,
            way.kind,
            "" if way.cache is None else f"{way.cache.nbytes / 1e6:,.1f}",
            f"{statistics.median(t.first for t in timed) * 1e3:,.1f}",
            f"{statistics.median(t.speed for t in timed):,.0f}",
            "yes" if agrees else "NO",
        )
    console.print(table)
    console.print(f"all produce the same bytes: {'they do' if all(same) else 'THEY DO NOT'}")
    return all(same)


def prompt_from(text: bytes) -> bytes:
    """A piece of the text to go on with."""
    start = max(text.find(EXCERPT, len(text) // 2), 0)
    return text[start : start + EXCERPT_BYTES]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    def at_least(least: int) -> Callable[[str], int]:
        def integer(text: str) -> int:
            if int(text) < least:
                raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
            return int(text)

        return integer

    def temperature(text: str) -> float:
        if not 0 <= float(text) < math.inf:
            raise argparse.ArgumentTypeError(f"must be a number from 0 on, got {text}")
        return float(text)

    def probability(text: str) -> float:
        if not 0 < float(text) <= 1:
            raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
        return float(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    writing = parser.add_argument_group("writing")
    writing.add_argument("--prompt", help="text to continue; default: a piece of what the model was trained on")
    writing.add_argument("--tokens", type=at_least(1), default=300, help="bytes to write, default: %(default)s")
    writing.add_argument("--temperature", type=temperature, default=0.7, help="0 is greedy, default: %(default)s")
    writing.add_argument("--top-k", type=at_least(1), help="default: all bytes")
    writing.add_argument("--top-p", type=probability, default=0.95, help="default: %(default)s")
    timing = parser.add_argument_group("timing")
    timing.add_argument("--batch-size", type=at_least(1), default=8, help="prompts at once, default: %(default)s")
    timing.add_argument("--prompt-len", type=at_least(1), default=1024, help="bytes each, default: %(default)s")
    timing.add_argument("--new-tokens", type=at_least(2), default=32, help="bytes each, default: %(default)s")
    timing.add_argument("--repeats", type=at_least(1), default=3, help="of which the median, default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("results/train_lm"), help="folder of model.pt, as train_lm's")
    parser.add_argument("--text", type=Path, help="text of the prompts, and to train on; default: as train_lm's")
    parser.add_argument("--steps", type=at_least(1), default=250, help="of training, default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="default: a GPU where there is one, else cpu")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    console = Console()
    text, description = train_lm.read_text(arguments.text)
    path = arguments.out / train_lm.MODEL
    options = {"steps": arguments.steps, "seed": arguments.seed, "out": arguments.out, "device": arguments.device}
    training = None if path.exists() else train_lm.parse_arguments([f"--{k}={v}" for k, v in options.items()])
    if len(text) <= max(arguments.prompt_len, 0 if training is None else training.seq_len):
        raise SystemExit(f"generate: {len(text)} bytes of text are too few")
    prompt = prompt_from(text) if arguments.prompt is None else arguments.prompt.encode()
    if not prompt:
        raise SystemExit("generate: --prompt must not be empty")

    if training is not None:
        console.print(f"no model at {path}: training one on {description}", highlight=False, soft_wrap=True)
        train_lm.train(text, "fastattn", training)
    model = train_lm.load(path, torch.device(arguments.device), max_seq_len=len(prompt) + arguments.tokens)
    write(model, prompt, arguments, console)
    if model.config.mechanism != "flash":
        console.print("no timing: PyTorch has no attention to compare this mechanism with")
        return 0
    return 0 if compare(path, text, arguments, console) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
