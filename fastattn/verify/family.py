"""What a family of attention supplies to be verified: cases, inputs, the public call, plain PyTorch, the bar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class Case(Protocol):
    """One problem of a family's grid, as data: independent of dtype, device and backend."""

    def __hash__(self) -> int: ...

    @property
    def family(self) -> str:
        """Key of `fastattn.backends.FAMILIES`."""

    @property
    def name(self) -> str:
        """Unique in its grid; names the test and the row of the record."""

    @property
    def features(self) -> frozenset[str]:
        """The names of the features (keys of `fastattn.backends.FEATURES[family]`) that a backend needs for it."""


class Inputs(Protocol):
    """The tensors of a case, contiguous and without poison; grad_<result> is the gradient of each result."""

    @property
    def query(self) -> Tensor:
        """In the dtype under test."""

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another floating-point dtype."""

    def leaves(self, case: Any) -> tuple[Inputs, dict[str, Tensor]]:
        """Fresh tensors that require gradients, and those tensors by name: none where the case is forward only."""


class Family(Protocol):
    """A module with these names. Results are tensors by name: "out" and what else the public function returns."""

    @property
    def GRID(self) -> tuple[Any, ...]:
        """Every case, in the order in which a report lists them."""

    @property
    def NAIVE(self) -> tuple[Callable[[Any, Any, int], dict[str, Tensor]], ...]:
        """(case, inputs, seed) to the same results by plain PyTorch math in the inputs' dtype, differentiable by
        autograd: in each way that one would write it. In float64 the first is the truth."""

    def make_inputs(self, case: Any, dtype: torch.dtype, device: torch.device | str, seed: int) -> Any:
        """Random inputs, drawn on the CPU from the seed."""

    def disguise(self, case: Any, inputs: Any) -> Any:
        """The same problem in the memory layout of the case, NaN in all that no result may depend on."""

    def call(self, case: Any, inputs: Any, backend: str | None) -> dict[str, Tensor]:
        """The results of the public function."""

    def allowed(
        self,
        case: Any,
        inputs: Any,
        truth: Mapping[str, Tensor],
        naive_errors: Mapping[str, float],
        reordered: bool,
    ) -> dict[str, float]:
        """The largest error that each result and gradient may have.

        Args:
            inputs: in the dtype under test.
            truth: every result and gradient in float64, by name.
            naive_errors: of plain PyTorch math in that dtype, by name: the largest of its ways.
            reordered: of a backend whose backward may sum a score in another order than its forward did.
        """

    def zeros(self, case: Any, inputs: Any) -> dict[str, Tensor]:
        """Where results and gradients are zero by definition, by name, each broadcasting to it."""
