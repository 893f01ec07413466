"""Train a small byte-level language model until it copies, then draw the attention heads that do it, and rollout.

    python examples/attention_maps.py                         # two to three minutes on one core
    python examples/attention_maps.py --steps 1500 --out maps.png

The model sees snippets that repeat, half of them from Python's standard library, half random characters. To predict a
repeated snippet it needs two heads in a row (Olsson et al., arXiv:2209.11895): a previous-token head, which tells each
position what came before it, and in a later layer an induction head, which looks for the position after the last
occurrence of the present token. The model runs on fused attention, in training and when its maps are drawn.
"""

import argparse
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastattn import maps
from fastattn.models import Transformer, TransformerConfig

SEQ_LEN, BATCH_SIZE = 96, 16
PERIODS = (8, 32)  # bytes that a snippet may have
LEARNING_RATE = 1e-2
WARMUP_STEPS = 50
LINE = "left = scale(point)\nright = scale(point)\n"


def batch(text: Tensor, random: torch.Generator) -> Tensor:
    """(BATCH_SIZE, SEQ_LEN + 1) int64 tokens: each row is a snippet of its own period, over and over."""
    position = torch.arange(SEQ_LEN + 1)
    first = torch.randint(len(text) - SEQ_LEN, (BATCH_SIZE, 1), generator=random)
    rows = text[first + position].long()
    rows[::2] = torch.randint(32, 127, rows[::2].shape, generator=random)  # printable ASCII
    period = torch.randint(*PERIODS, (BATCH_SIZE, 1), generator=random)
    return rows.gather(1, position % period)


def train(steps: int, seed: int) -> Transformer:
    """A model of two layers after `steps` steps; prints its loss."""
    root = Path(sysconfig.get_path("stdlib"))
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in sorted(root.glob("*.py")))), dtype=torch.uint8)
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model = Transformer(TransformerConfig(num_layers=2, max_seq_len=SEQ_LEN))
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embedding" in name]
    optimizers = (
        # Muon (Jordan et al., 2024) forms the heads within some 600 steps; AdamW for all of it has not by then.
        torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    )
    started = time.perf_counter()
    for step in range(steps):
        tokens = batch(text, random)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min((step + 1) / WARMUP_STEPS, 1 - 0.9 * step / steps)
            optimizer.step()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - started
            print(f"step {step + 1} of {steps}: loss {loss.item():.2f} nats/byte, {seconds:.0f} s", flush=True)
    return model


def induction_targets(line: bytes) -> list[tuple[int, int]]:
    """(position, position after the last earlier occurrence of the same three bytes), where there is one."""
    found = []
    for i in range(3, len(line)):
        earlier = line.rfind(line[i - 2 : i + 1], 0, i)
        if earlier >= 0:
            found.append((i, earlier + 3))
    return found


def strongest(scores_LH: Tensor) -> tuple[int, int, float]:
    """(layer, head, score) of the highest score."""
    layer, head = divmod(int(scores_LH.argmax()), scores_LH.shape[1])
    return layer, head, float(scores_LH[layer, head])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=900, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("results/attention_maps.png"), help="default: %(default)s")
    arguments = parser.parse_args(argv)

    model = train(arguments.steps, arguments.seed)
    line = LINE.encode()
    with maps.capture() as calls, torch.no_grad():
        model(torch.tensor([list(line)]))
    weights_LHSS = torch.stack([call.weights()[0] for call in calls])
    previous = strongest(weights_LHSS.diagonal(-1, 2, 3).mean(dim=-1))
    targets = induction_targets(line)
    induction = strongest(torch.stack([weights_LHSS[:, :, i, j] for i, j in targets], dim=-1).mean(dim=-1))
    print(f"previous-token head: layer {previous[0]}, head {previous[1]}, {previous[2]:.0%} of its attention")
    print(f"induction head: layer {induction[0]}, head {induction[1]}, {induction[2]:.0%} of its attention")

    characters = ["·" if c == " " else "↵" if c == "\n" else c for c in LINE]
    drawn = torch.stack([weights_LHSS[previous[:2]], weights_LHSS[induction[:2]], maps.rollout(calls)[0]])
    titles = [
        f"previous token: layer {previous[0]}, head {previous[1]}",
        f"induction: layer {induction[0]}, head {induction[1]}",
        "rollout through both layers",
    ]
    figure = maps.plot(drawn, queries=characters, keys=characters, titles=titles)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out)
    print(f"picture: {arguments.out}")


if __name__ == "__main__":
    main()
