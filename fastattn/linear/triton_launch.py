"""What the launches of one linear problem share: its arguments as kernels take them, and the chunks' kernels."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastattn.dense.problem import unit_rows
from fastattn.dense.triton import _slots as resident
from fastattn.dense.triton_launch import INTERPRETED, matrix, padded, run, tiles_of
from fastattn.linear.problem import Problem


@cache
def kernels() -> SimpleNamespace:
    """The modules with the kernels; imported at the first launch, because importing Triton takes time."""
    from fastattn.kernels import (
        dense_backward,
        linear_chunks,
        linear_config,
        linear_delta,
        linear_scale,
        linear_tiles,
        linear_vector,
    )

    return SimpleNamespace(
        chunks=linear_chunks,
        config=linear_config,
        delta=linear_delta,
        rows=dense_backward,
        scale=linear_scale,
        tiles=linear_tiles,
        vector=linear_vector,
    )


def state(kv: Tensor | None, normalizer: Tensor | None = None) -> Any:
    """A `State` of kernels/linear_tiles.py."""
    return kernels().tiles.State(kv, normalizer)


class Launch:
    """A problem as kernels take it: query and key are a `Source`, values `Values` of kernels/linear_tiles.py."""

    def __init__(self, p: Problem) -> None:
        self.p = p
        tiles, config = kernels().tiles, kernels().config
        self.batch, self.heads = p.query.shape[:2]
        self.group = self.heads // p.key.shape[1]
        # Sums over keys leave float16's range: its products are taken in tf32, which is as precise.
        self.narrow = p.query.dtype == torch.bfloat16
        self.operand = torch.bfloat16 if self.narrow else torch.float32
        mask = None if p.key_mask is None else p.key_mask.contiguous().view(torch.int8)
        self.query = tiles.Source(*matrix(unit_rows(p.query)), 1, None, None, 0)
        self.key = tiles.Source(
            *matrix(unit_rows(p.key)), self.group, None, mask, 0 if mask is None else mask.stride(0)
        )
        self.values = tiles.Values(*matrix(unit_rows(p.value)), self.group, None, None, None)
        self.map = tiles.Map(*self._projection(), p.feature_bias, p.feature_eps)
        tf32 = p.query.dtype == torch.float16 or torch.backends.cuda.matmul.fp32_precision == "tf32"
        self.products = "bfloat16" if self.narrow else "tf32" if tf32 else "float32"
        # The interpreter pays by the operation: it takes the larger tiles of bfloat16.
        self.tiling = "bfloat16" if INTERPRETED else self.products
        self.chunk = config.chunk(self.tiling)
        self.vector = p.decay is not None and p.decay.dim() == 4
        head_dim = p.query.shape[3]
        self.widths = {"M": p.num_features, "D": head_dim, "BLOCK_D": padded(head_dim), "DV": p.value.shape[3]}
        self.precision = {
            "OPERAND": getattr(tiles.tl, "bfloat16" if self.narrow else "float32"),
            "PRECISION": "ieee" if self.products == "float32" else "tf32",
        }
        self.slot_sequences = None if p.cu_seqlens is None else self._slot_sequences(p.cu_seqlens)
        self.log_scale: Tensor | None = None  # of the keys' features, after all steps
        change = self._shift() if p.feature == "softmax" else None
        self.prefix = self._prefix(change) if p.decay is not None or change is not None else None
        self.weights = self._weights() if self.vector else None

    def _projection(self) -> tuple[Tensor | None, Tensor | None]:
        """(projection, residual) of the `Map`: two bfloat16 products are better than one in tf32."""
        projection = self.p.projection
        if projection is None or not self.narrow:
            return projection, None
        rounded = projection.bfloat16()
        return rounded, (projection - rounded).bfloat16()

    def slots(self, length: int) -> int:
        """Chunks of a head; of packed sequences, places for them, because how many there are is on the device."""
        packed = self.p.cu_seqlens is not None
        return length // self.chunk + self.p.num_sequences if packed else tiles_of(length, self.chunk)

    def _slot_sequences(self, cu_seqlens: Tensor) -> Tensor:
        """The sequence whose chunk lies in each slot; see `first_slot` in kernels/linear_tiles.py."""
        device, sequences = cu_seqlens.device, self.p.num_sequences
        first = cu_seqlens[:-1] // self.chunk + torch.arange(sequences, dtype=torch.int32, device=device)
        slots = torch.arange(self.slots(self.p.query.shape[2]), dtype=torch.int32, device=device)
        return (torch.searchsorted(first, slots, right=True, out_int32=True) - 1).clamp_(0)

    def place(self, x: Tensor) -> tuple:
        """The last arguments of kernels with a program for each chunk of x."""
        return (self.p.cu_seqlens, self.slot_sequences, x.shape[1], x.shape[2], self.slots(x.shape[2]))

    def chunks(self, x: Tensor) -> int:
        return x.shape[0] * x.shape[1] * self.slots(x.shape[2]) if self.p.num_sequences else 0

    def per_step(self, length: int, *width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.p.query.new_empty((self.batch, self.heads, length, *width), dtype=dtype)

    def tile(self, table: str, *names: str) -> dict[str, Any]:
        """A tile of a table of kernels/linear_config.py as constants, and the widths called names."""
        config = kernels().config
        projected = self.map.projection is not None
        found = config.config(getattr(config, table), self.widths["BLOCK_D"], self.tiling, projected)
        return {
            **{name: self.widths[name] for name in names},
            "CHUNK": self.chunk,
            "BLOCK_M": min(found.block_m, padded(self.widths["M"])),
            "BLOCK_V": min(found.block_v, padded(self.widths["DV"])),
            "num_warps": found.num_warps,
            "num_stages": found.num_stages,
            **self.precision,
        }

    def _shift(self) -> Tensor | None:
        """Give query and key their shift; the change of the keys' running maximum, if causal."""
        p = self.p
        self.query = self.query._replace(shift=self._highest(self.query, p.query, None, None))
        norms = p.key.new_empty(p.key.shape[:3], dtype=torch.float32)
        highest = self._highest(self.key._replace(group=1), p.key, norms, p.scale / 2)
        length, initial = p.key.shape[2], p.initial_log_scale
        self.log_scale = p.query.new_empty((p.num_sequences, self.heads), dtype=torch.float32)
        shift, change = self.per_step(length), self.per_step(length) if p.causal else None
        run(
            kernels().scale.running_maximum_kernel,
            p.num_sequences * self.heads,
            highest,
            norms,
            None if initial is None else initial.contiguous(),
            shift,
            change,
            self.log_scale,
            self.group,
            p.cu_seqlens,
            self.heads,
            length,
            CAUSAL=p.causal,
            BLOCK=1024,
        )
        self.key = self.key._replace(shift=shift)
        return change

    def _highest(self, source: Any, x: Tensor, norms: Tensor | None, half_scale: float | None) -> Tensor:
        highest = x.new_empty(x.shape[:3], dtype=torch.float32)
        constants = self.tile("STATE", "M", "D", "BLOCK_D")
        del constants["BLOCK_V"], constants["OPERAND"]
        run(
            kernels().scale.exponent_kernel,
            self.chunks(x),
            highest,
            norms,
            source,
            self.map,
            half_scale,
            *self.place(x),
            **constants,
        )
        return highest

    def _prefix(self, change: Tensor | None) -> Tensor:
        p, decay = self.p, self.p.decay
        width = self._decay_width()
        # Weights are exponentials of differences, which one large step before them must not cost their last bits.
        dtype = torch.float32 if self.vector else torch.float64
        prefix = self.per_step(p.query.shape[2], width["WIDTH"], dtype=dtype)
        run(
            kernels().scale.prefix_kernel,
            self.chunks(p.query) * tiles_of(width["WIDTH"], width["BLOCK"]),
            prefix,
            *((None, 0, 0, 0, 0) if decay is None else (decay, *decay.stride(), 0)[:5]),
            change,
            self.key,
            *self.place(p.query),
            **width,
        )
        return prefix

    def decay_gradient(self, grad: Tensor, changes: Tensor, totals: Tensor) -> None:
        width = self._decay_width()
        run(
            kernels().scale.decay_gradient_kernel,
            self.chunks(self.p.query) * tiles_of(width["WIDTH"], width["BLOCK"]),
            grad,
            changes,
            totals,
            self.key,
            *self.place(self.p.query),
            **width,
        )

    def _decay_width(self) -> dict[str, int]:
        width = self.widths["M"] if self.vector else 1
        return {"WIDTH": width, "CHUNK": self.chunk, "BLOCK": min(32, padded(width)) if self.vector else 1}

    def _weights(self) -> Tensor:
        """Those within chunks, where each feature decays on its own."""
        p, sub = self.p, kernels().config.SUB
        weights = self.per_step(p.query.shape[2], self.chunk)
        constants = self.tile("VECTOR", "M")
        del constants["BLOCK_V"]
        run(
            kernels().vector.weights_kernel,
            self.chunks(p.query) * (self.chunk // sub) ** 2,
            weights,
            self.query,
            self.key,
            self.map,
            self.prefix,
            *self.place(p.query),
            FEATURE=p.feature,
            SUB=sub,
            **constants,
        )
        return weights

    def _intra(self, row: Any, column: Any, row_values: Any, column_values: Any, reverse: bool) -> Tensor:
        """The gradient of the rows' features through `weights`."""
        p, sub = self.p, kernels().config.SUB
        intra = self.per_step(p.query.shape[2], p.num_features)
        constants = self.tile("VECTOR", "M", "DV")
        run(
            kernels().vector.feature_gradient_kernel,
            self.chunks(p.query) * (self.chunk // sub) * tiles_of(p.num_features, constants["BLOCK_M"]),
            intra,
            row,
            column,
            row_values,
            column_values,
            self.map,
            self.prefix,
            *self.place(p.query),
            FEATURE=p.feature,
            NORMALIZE=p.normalize,
            REVERSE=reverse,
            SUB=sub,
            **constants,
        )
        return intra

    def kept_initially(self) -> Tensor | None:
        """The factor from initial_log_scale to the present one that no decay contains, (sequences, Hq)."""
        before, after = self.p.initial_log_scale, self.log_scale
        if self.p.causal or before is None or after is None:
            return None
        return torch.where(before == float("-inf"), 1.0, torch.exp(before - after))

    def initial_state(self) -> Any:
        """The state before the first step, in the scale of the keys' features if those are not causal."""
        kv, normalizer, kept = self.p.initial_kv, self.p.initial_normalizer, self.kept_initially()
        if kv is None:
            return state(None)
        if kept is not None:
            kv = kv * kept[..., None, None]
            normalizer = None if normalizer is None else normalizer * kept[..., None]
        return state(kv.contiguous(), None if normalizer is None else normalizer.contiguous())

    def empty_states(self, *shape: int) -> Any:
        kv = self.p.query.new_empty((*shape, self.widths["M"], self.widths["DV"]), dtype=torch.float32)
        return state(kv, kv.new_empty(kv.shape[:-1]) if self.p.normalize else None)

    def states(self, source: Any, x: Tensor, values: Any, initial: Any, reverse: bool) -> tuple[Any, Any]:
        """(the states that chunks read, the last) from `initial` through the steps of x; causal, before each chunk."""
        p = self.p
        constants = self.tile("STATE", "M", "D", "BLOCK_D", "DV")
        blocks = tiles_of(self.widths["M"], constants["BLOCK_M"]) * tiles_of(self.widths["DV"], constants["BLOCK_V"])
        programs, slots = p.num_sequences * self.heads * blocks, self.slots(x.shape[2])
        # A sum is split, so that there is work for the whole device.
        parts = 1 if p.causal else max(1, min(slots, tiles_of(2 * resident(x.device), max(programs, 1))))
        last = self.empty_states(p.num_sequences, self.heads, parts)
        before = self.empty_states(self.batch, self.heads, slots) if p.causal else state(None)
        run(
            kernels().chunks.state_kernel,
            programs * parts,
            *last,
            initial if p.causal else state(None),
            before,
            source,
            values,
            self.map,
            self.prefix,
            p.cu_seqlens,
            self.heads,
            x.shape[2],
            slots,
            parts,
            FEATURE=p.feature,
            NORMALIZE=p.normalize,
            REVERSE=reverse,
            VECTOR=self.vector,
            **constants,
        )
        last = state(*(None if t is None else t.sum(2) for t in last))
        if p.causal:
            return before, last
        if initial.kv is not None:
            last = state(*(None if t is None else t + i for t, i in zip(last, initial, strict=True)))
        return last, last

    def outputs(
        self,
        out: Tensor,
        denominator: Tensor | None,
        row: Any,
        column: Any,
        values: Any,
        states: Any,
        reverse: bool = False,
    ) -> None:
        """Write what the rows of out read of states and values, divided by the denominator where there is one."""
        p = self.p
        constants = self.tile("OUTPUT", "M", "D", "BLOCK_D", "DV")
        run(
            kernels().chunks.output_kernel,
            self.chunks(out) * tiles_of(out.shape[3], constants["BLOCK_V"]),
            *matrix(out),
            denominator,
            row,
            column,
            values,
            states,
            self.map,
            self.prefix,
            self.weights,
            1.0 if reverse or p.normalize else p.scale,
            *self.place(out),
            FEATURE=p.feature,
            CAUSAL=p.causal,
            NORMALIZE=denominator is not None,
            REVERSE=reverse,
            VECTOR=self.vector,
            **constants,
        )

    def gradients(
        self,
        grad: Tensor,
        changes: Tensor | None,
        totals: Tensor | None,
        row: Any,
        column: Any,
        row_values: Any,
        column_values: Any,
        states: Any,
        other_states: Any,
        reverse: bool = False,
    ) -> None:
        """Write the gradient of the rows; see `gradient_kernel`."""
        p = self.p
        run(
            kernels().chunks.gradient_kernel,
            self.chunks(grad),
            *matrix(grad),
            changes,
            totals,
            row,
            column,
            row_values,
            column_values,
            states,
            other_states,
            self.map,
            self.prefix,
            self._intra(row, column, row_values, column_values, reverse) if self.vector else None,
            p.scale / 2 if reverse and p.feature == "softmax" else None,
            *self.place(grad),
            FEATURE=p.feature,
            CAUSAL=p.causal,
            NORMALIZE=p.normalize,
            REVERSE=reverse,
            VECTOR=self.vector,
            **self.tile("GRADIENT", "M", "D", "BLOCK_D", "DV"),
        )
