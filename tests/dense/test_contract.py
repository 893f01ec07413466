"""The feature grid on every backend: right where its capability table says yes, a clear refusal where it says no.

A case fails where the output, the LSE or any gradient is further from the float64 reference than twice (gradients:
three times) plain PyTorch math of the same dtype, where NaN outside the key interval or in a fresh buffer gets into a
result, where a row without keys is not exactly zero, and where a backend runs or refuses against its table.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

import fastattn
from fastattn import verify
from fastattn.backends import FEATURES, capabilities
from fastattn.verify.cases import GRID, Case

OTHER_DTYPES = (torch.bfloat16, torch.float16, torch.float64)


Target = tuple[str, str, str]  # device, backend, instruction set
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _targets() -> list[Target]:
    on_devices = [(device, backend) for device in DEVICES for backend in verify.backends_on(device)]
    return [(device, backend, isa) for device, backend in on_devices for isa in verify.instruction_sets(backend)]


def _spread() -> list[tuple[Case, torch.dtype, Target]]:
    """float32 on each backend's best instruction set: every case. Each other combination: a third of them, in turn."""
    chosen, combination = [], 0
    best: set[tuple[str, str]] = set()
    for target in _targets():  # the best instruction set first
        for dtype in (torch.float32, *OTHER_DTYPES):
            everything = dtype == torch.float32 and target[:2] not in best
            cases = GRID if everything else GRID[combination % 3 :: 3]
            combination += 0 if everything else 1
            chosen += [(case, dtype, target) for case in cases]
        best.add(target[:2])
    return chosen


def _name(parameters: tuple[Case, torch.dtype, Target]) -> str:
    case, dtype, (device, backend, isa) = parameters
    where = "" if device == "cpu" else device
    return "-".join(filter(None, (where, backend, isa, str(dtype).removeprefix("torch."), case.name)))


@pytest.mark.parametrize("parameters", _spread(), ids=_name)
def test_case(parameters: tuple[Case, torch.dtype, Target], seed: int) -> None:
    case, dtype, (device, backend, isa) = parameters
    with verify.forced_isa(isa):
        result = verify.run_case(case, dtype, backend, device, seed)
    assert result.passed, result.message


@pytest.mark.parametrize("backend", verify.backends_on("cpu", own=True))
def test_rows_past_the_last_sequence(backend: str) -> None:
    """Packed tokens that belong to no sequence: output 0, LSE -inf, no gradient, and their values, NaN, go nowhere."""
    q, k, v = (torch.randn(12, 2, 8) for _ in range(3))
    for t in (q, k, v):
        t[9:] = torch.nan
    leaves = [t.requires_grad_() for t in (q, k, v)]
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    out, lse = fastattn.attention_varlen(*leaves, cu, cu, 5, 5, causal=True, return_lse=True, backend=backend)
    assert torch.equal(out[9:], torch.zeros(3, 2, 8))
    assert (lse[:, 9:] == -torch.inf).all()
    assert out[:9].isfinite().all()
    for grad in torch.autograd.grad([out, lse], leaves, [torch.randn_like(out), torch.randn_like(lse)]):
        assert torch.equal(grad[9:], torch.zeros(3, 2, 8))
        assert grad[:9].isfinite().all()


@pytest.mark.parametrize("backend", [c.backend for c in capabilities("dense")])
def test_every_feature_of_the_table_has_a_case(backend: str) -> None:
    """Fails where a table declares a feature that no case of the grid needs ("transforms" is tested in test_ops)."""
    table = {c.backend: c for c in capabilities("dense")}[backend]
    covered = frozenset[str]().union(*(case.features for case in GRID))
    assert table.features - covered <= {"transforms"}
    assert covered <= set(FEATURES["dense"])


def test_case_names_are_unique() -> None:
    """Fails where two cases share a name, which would merge their rows in the ledger."""
    assert len({case.name for case in GRID}) == len(GRID)


def _broken(defect: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, case: Case) -> verify.CaseResult:
    """The grid's verdict on a backend with a defect planted into its results."""
    from fastattn.verify import check

    honest = check.run_backend

    def dishonest(case: Case, inputs, backend: str, seed: int) -> dict[str, torch.Tensor]:
        found = honest(case, inputs, backend, seed)
        if inputs.query.dtype == torch.float64:  # the oracle's own run
            return found
        if defect == "unwritten":
            found["out"] = found["out"].clone()
            found["out"][-1, -1, -1, -1] = torch.nan
        elif defect == "scaled gradient":
            found["grad_key"] = found["grad_key"] * 1.05
        elif defect == "leak":
            found["grad_value"] = found["grad_value"] + 1e-30
        return found

    check.expected.cache_clear()
    monkeypatch.setattr(check, "run_backend", dishonest)
    try:
        return check.run_case(case, dtype, "reference", "cpu", 5)
    finally:
        check.expected.cache_clear()


@pytest.mark.parametrize("defect", ["unwritten", "scaled gradient", "leak"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bar_catches(defect: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where the grid would pass a backend that skips one element, is 5 % off, or leaks past the keys."""
    case = verify.find_case("key_lengths")
    assert not _broken(defect, dtype, monkeypatch, case).passed


def test_all_combinations_are_walked() -> None:
    """Fails where a backend and instruction set of this machine gets no case in some dtype."""
    walked = {(target, dtype) for _, dtype, target in _spread()}
    expected = set(product(_targets(), (torch.float32, *OTHER_DTYPES)))
    assert walked == expected
