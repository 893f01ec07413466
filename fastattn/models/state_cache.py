"""The recurrent states that a `Transformer` with a linear mechanism keeps while it generates."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.linear.state import LinearState
from fastattn.models.cache import Cache
from fastattn.models.transformer import Transformer, apply_rotary
from fastattn.nn.mixers import Mixer


class StateCache(Cache):
    """One `LinearState` a layer: its size, and a token's time, do not grow with the tokens that there were.

    For a causal model of a linear mechanism. It takes its sequences from the first tokens that the model is
    called with. What a state has taken in it cannot forget, so there is no `crop`.

    Attributes:
        states: for each layer, None where there are no sequences.
    """

    def __init__(self, model: Transformer) -> None:
        config = model.config
        if config.options is None or config.options.mixer.family != "linear" or not config.causal:
            raise ValueError(
                "fastattn: model must be causal with a linear mechanism to have a state, got "
                f"causal={config.causal}, mechanism={config.mechanism!r}"
            )
        self.config = config
        self.capacity = config.max_seq_len
        self._mixers = [module for module in model.modules() if isinstance(module, Mixer)]
        self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the states of all layers."""
        return sum(t.nbytes for state in self.states if state is not None for t in state if t is not None)

    def clear(self) -> None:
        self.lengths = []
        self.states: list[LinearState | None] = [None] * len(self._mixers)

    def begin(self, model: Transformer, batch: int, seq_len: int, counts: Sequence[int] | None = None) -> None:
        self._lengths_after(model, batch, seq_len, counts)
        self.lengths = self.lengths or [0] * batch
        self._after = self.states.copy()
        device = model.cos.device
        position_S = torch.arange(seq_len, device=device)
        position_BS = torch.tensor(self.lengths, device=device)[:, None] + position_S
        self._cos, self._sin = model.cos[position_BS], model.sin[position_BS]
        self._mask = None
        if min(self._counts) < seq_len:
            self._mask = position_S < torch.tensor(self._counts, device=device)[:, None]

    def attend(self, layer: int, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, x_BSE: Tensor) -> Tensor:
        mixer = self._mixers[layer]
        if mixer.rotary:
            q_BSHD, k_BSKD = (apply_rotary(t, self._cos, self._sin) for t in (q_BSHD, k_BSKD))
        out_BHSD, self._after[layer] = mixer(
            *(t.transpose(1, 2) for t in (q_BSHD, k_BSKD, v_BSKD)),
            x_BSE,
            causal=True,
            key_mask=self._mask,
            initial_state=self.states[layer],
            return_state=True,
        )
        return out_BHSD

    def end(self) -> None:
        super().end()
        self.states = self._after

    def reorder(self, index: Sequence[int]) -> None:
        index = [operator.index(b) for b in index]
        if not all(0 <= b < len(self.lengths) for b in index):
            raise ValueError(f"fastattn: index must name sequences 0 to {len(self.lengths) - 1}, got {index}")
        self.lengths = [self.lengths[b] for b in index]
        self.states = [
            None if state is None else LinearState._make(None if t is None else t[index] for t in state)
            for state in self.states
        ]
