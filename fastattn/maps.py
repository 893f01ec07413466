"""Attention maps of a model that runs on fused attention: recorded calls, their weights, rollout, pictures.

The model runs as ever. What is kept of each call is its query, its key and its log-sum-exp, from which any part of the
map follows later: exp(scores - lse).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from fastattn.dense import reference
from fastattn.dense.op import recordings
from fastattn.dense.probabilities import Indices, check_average, indices
from fastattn.dense.problem import Problem
from fastattn.dense.weights import Average, blocks, chosen_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Call", "Calls", "capture", "plot", "rollout"]

PANEL = 2.4  # inches of a map's side, more where its labels need it
LABEL = 0.095


@dataclass(frozen=True, eq=False, repr=False)
class Call:
    """One recorded attention call: `problem` has its query, its key and what else decides its weights, detached."""

    problem: Problem
    lse: Tensor  # (B, Hq, Sq)

    def weights(
        self, rows: Indices | None = None, heads: Indices | None = None, average: Average | None = None
    ) -> Tensor:
        """The call's probabilities before dropout, as `fastattn.attention_weights` gives them: (B, H, R, Sk).

        Raises:
            TypeError, ValueError: indices of the wrong type or range, or a call with packed sequences.
        """
        p = self._unpacked()
        chosen_rows, chosen_heads = indices("rows", rows, p.query.shape[2]), indices("heads", heads, p.query.shape[1])
        check_average(average)
        return chosen_weights(p, chosen_rows, chosen_heads, self.lse, average)

    def sequence(self, index: int) -> Call:
        """The call as it would have been for one of its sequences alone, batch size 1; views, packed or not."""
        p = self.problem
        count = p.query.shape[0] if p.cu_seqlens_q is None else p.cu_seqlens_q.shape[0] - 1
        [index] = indices("index", [index], count)
        if p.cu_seqlens_q is not None:
            rows, _, alone = list(p.sequences())[index]
            return Call(alone, self.lse[:, :, rows])
        p = reference.gathered(p)
        one = slice(index, index + 1)
        names = (
            *("query", "key", "value", "attn_mask", "mask_rows", "mask_columns"),
            *("alibi_slopes", "query_start", "key_start", "key_lengths"),
        )
        tensors = {name: getattr(p, name) for name in names}
        own = {name: t[one] for name, t in tensors.items() if t is not None and t.shape[0] > 1}
        return Call(replace(p, **own), self.lse[one])

    def _unpacked(self) -> Problem:
        if self.problem.cu_seqlens_q is not None:
            raise ValueError("fastattn: this call holds packed sequences; choose one of them with sequence(index)")
        return reference.gathered(self.problem)

    def __repr__(self) -> str:
        return f"Call(query {tuple(self.problem.query.shape)}, key {tuple(self.problem.key.shape)})"


class Calls(Sequence[Call]):
    """The calls that `capture` has recorded, in the order in which they were made."""

    def __init__(self, recording: list[tuple[Problem, Tensor]]) -> None:
        self._recording = recording

    def __len__(self) -> int:
        return len(self._recording)

    @overload
    def __getitem__(self, index: int) -> Call: ...
    @overload
    def __getitem__(self, index: slice) -> Calls: ...
    def __getitem__(self, index: int | slice) -> Call | Calls:
        if isinstance(index, slice):
            return Calls(self._recording[index])
        return Call(*self._recording[index])

    def __repr__(self) -> str:
        return f"Calls({list(self)})"


@contextmanager
def capture() -> Iterator[Calls]:
    """Record every attention call that fastattn makes inside the block, whichever function or layer makes it::

        with fastattn.maps.capture() as calls:
            model(tokens)
        calls[3].weights(rows=[-1])  # layer 3: what the last token attends to, (B, H, 1, S)

    The calls run as they would without it, on the same kernels. Until `calls` is dropped, it keeps alive each call's
    query, key, mask and log-sum-exp (value and output are not kept): the tensors themselves, no copies, so what is
    written over afterwards (a cache that decoding goes on to overwrite) shows in the maps.

    All threads are recorded. A compiled model compiles once more for recording; layers whose forward activation
    checkpointing repeats in the backward are recorded again if that runs inside the block.

    Raises:
        UnsupportedError: from calls inside the block under a torch.func transform or forward-mode AD.
    """
    recording: list[tuple[Problem, Tensor]] = []
    recordings.append(recording)
    try:
        yield Calls(recording)
    finally:
        # By identity: lists compare by what they hold.
        recordings[:] = [other for other in recordings if other is not recording]


def rollout(calls: Sequence[Call], rows: Indices | None = None) -> Tensor:
    """How much of each input token reaches chosen tokens after all layers (Abnar & Zuidema, arXiv:2005.00928).

    The rows of A_L ... A_2 A_1, A being the mean over a layer's heads plus the identity, for the residual connection,
    with rows scaled to sum to 1. The product is formed from the last layer down, R rows at a time, and no layer's
    matrix is held: memory is (B, R, S), and time grows with R and with how far back the layers look from these rows.

    Args:
        calls: one self-attention call a layer, first layer first, all over the same tokens: `capture`'s, or some of
            them.
        rows: the tokens to explain, as in `fastattn.attention_weights`; None: all.

    Returns:
        (B, R, S), float32 (float64 for float64); rows sum to 1.

    Raises:
        TypeError, ValueError: no calls, indices of the wrong type or range, or calls that are not self-attention over
            the same tokens.
    """
    problems = [call._unpacked() for call in calls]
    if not problems:
        raise ValueError("fastattn: calls must hold at least one attention call, got none")
    batch, _, seqlen, _ = problems[0].query.shape
    for index, p in enumerate(problems):
        sizes = (p.query.shape[0], p.query.shape[2], p.key.shape[2])
        if sizes != (batch, seqlen, seqlen):
            raise ValueError(
                f"fastattn: calls must all be self-attention over the same tokens, ({batch}, {seqlen}) as queries and "
                f"as keys, got ({sizes[0]}, {sizes[1]}) and ({sizes[0]}, {sizes[2]}) in call {index}"
            )
    chosen = list(indices("rows", rows, seqlen))
    share = problems[0].query.new_zeros((batch, len(chosen), seqlen), dtype=problems[0].accumulate_dtype)
    share[:, range(len(chosen)), chosen] = 1.0
    with torch.no_grad(), torch.autocast(share.device.type, enabled=False):
        for p, call in zip(reversed(problems), reversed(calls), strict=True):
            share = _through_layer(p, call.lse, share)
    return share


def _through_layer(p: Problem, lse: Tensor, share: Tensor) -> Tensor:
    """share @ A, with (B, R, S) shares of a layer's outputs as shares of its inputs."""
    tokens: list[int] = share.any(dim=1).any(dim=0).nonzero().flatten().tolist()
    result = torch.zeros_like(share)
    for (_, place, seen), weights in blocks(p, tokens, range(p.query.shape[1]), lse, average=True):
        own = slice(tokens[place.start], tokens[place.stop - 1] + 1)
        # The identity's 1, and the rest of the row's sum: less than 1 with sinks or without keys.
        part = share[:, :, own] / (1.0 + weights.sum(dim=2))[:, None]
        result[:, :, own] += part
        result[:, :, seen] += part @ weights
    return result


def plot(
    weights: Tensor,
    *,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
) -> Figure:
    """Maps side by side as pictures, dark where the weight is large; colours follow the root of the weight.

    Args:
        weights: (N, R, S), such as the heads of one layer and sequence, `call.weights()[0]`; or one map (R, S).
        queries, keys: R and S labels, such as tokens; positions without them.
        titles: N of them; default "head 0" and so on.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.

    Raises:
        TypeError, ValueError: weights or labels of the wrong type or shape.
        ImportError: matplotlib is missing.
    """
    if not isinstance(weights, Tensor):
        raise TypeError(f"fastattn: weights must be a torch.Tensor (N, R, S) or (R, S), got {type(weights).__name__}")
    if weights.dim() not in (2, 3) or weights.numel() == 0:
        raise ValueError(f"fastattn: weights must have shape (N, R, S) or (R, S), got {tuple(weights.shape)}")
    if titles is None:
        titles = [f"head {head}" for head in range(len(weights))] if weights.dim() == 3 else [""]
    maps = weights.detach().to("cpu", torch.float32).reshape(-1, *weights.shape[-2:])
    for name, labels, size in zip(("titles", "queries", "keys"), (titles, queries, keys), maps.shape, strict=True):
        if labels is not None and len(labels) != size:
            raise ValueError(
                f"fastattn: {name} must have {size} entries for weights {tuple(weights.shape)}, got {len(labels)}"
            )
    try:
        from matplotlib.colors import LinearSegmentedColormap, PowerNorm

        from fastattn.bench.plots import STYLES, new_figure
    except ImportError as error:
        raise ImportError("fastattn: maps.plot needs matplotlib; pip install 'fastattn[cli]'") from error

    columns = min(len(maps), 4)
    lines = math.ceil(len(maps) / columns)
    width, height = (PANEL if labels is None else max(PANEL, LABEL * len(labels)) for labels in (keys, queries))
    figure, panels = new_figure(lines, columns, columns * width + 1.2, lines * (height + 0.3) + 0.5)
    colours = LinearSegmentedColormap.from_list("weights", ["white", STYLES["fastattn"][0], "black"])
    norm = PowerNorm(0.5, vmin=0.0, vmax=float(maps.max()) or 1.0)
    flat = [axes for line in panels for axes in line]
    for axes in flat[len(maps) :]:
        axes.remove()
    for index, (axes, weight, title) in enumerate(zip(flat, maps, titles, strict=False)):
        image = axes.imshow(weight.numpy(), cmap=colours, norm=norm, aspect="auto")
        axes.set_title(title)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        for axis, labels, outer, upright in (
            (axes.yaxis, queries, index % columns == 0, 0),
            (axes.xaxis, keys, index + columns >= len(maps), 90),
        ):
            if labels is not None:
                turn = upright if max(map(len, labels)) > 1 else 0  # words beside each other would overlap
                axis.set_ticks(range(len(labels)), labels, fontsize=6.5, family="monospace", rotation=turn)
                axis.set_tick_params(length=0, pad=1.5)
            axis.set_tick_params(labelleft=outer, labelbottom=outer)
    figure.colorbar(image, ax=flat[: len(maps)], label="weight", shrink=0.8, fraction=0.03, pad=0.01)
    figure.supxlabel("key")
    figure.supylabel("query")
    return figure
