"""The linear family's part of ``fastattn verify``: its cases, their plain PyTorch, and their accuracy bar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fastattn.verify.bar import absolute_tolerance, accumulator_of, base, finite, largest
from fastattn.verify.linear.cases import GRID, Case
from fastattn.verify.linear.inputs import Inputs, alone, call, lay_out, make_inputs, poison
from fastattn.verify.linear.naive import by_weights, step_by_step

__all__ = ["GRID", "NAIVE", "allowed", "call", "disguise", "make_inputs", "zeros"]


Form = Callable[[Case, Inputs], dict[str, Tensor]]


def disguise(case: Case, inputs: Inputs) -> Inputs:
    """The memory layout of the case, with NaN in masked keys and in rows of no sequence."""
    return lay_out(case, poison(case, inputs))


def _naive(form: Form, case: Case, inputs: Inputs, seed: int) -> dict[str, Tensor]:
    del seed  # nothing is random
    if case.packed is None:
        return form(case, inputs)
    parts = [form(case, sequence) for sequence in alone(case, inputs)]
    results = {name: torch.cat([part[name] for part in parts], 2 if name == "out" else 0) for name in parts[0]}
    results["out"] = torch.nn.functional.pad(results["out"], (0, 0, 0, case.tail))
    return results


NAIVE = (partial(_naive, by_weights), partial(_naive, step_by_step))


def zeros(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Where results and gradients are zero by definition: masked keys, rows that see none, rows of no sequence."""
    unused, blind = [], []
    for sequence in alone(case, inputs):
        batch, _, k_len = sequence.value.shape[:3]
        keep = inputs.value.new_ones(batch, k_len, dtype=torch.bool)
        if sequence.key_mask is not None:
            keep = sequence.key_mask
        seen = keep.cummax(1).values if case.causal else keep.any(1, keepdim=True).expand(-1, sequence.query.shape[2])
        unused.append(~keep)
        blind.append(~seen & (not case.state_in))
    key, row = (torch.nn.functional.pad(torch.cat(t, 1), (0, case.tail), value=True) for t in (unused, blind))
    step, key, row = key[:, None], key[:, None, :, None], row[:, None, :, None]
    found = {"out": row, "grad_query": row, "grad_key": key, "grad_value": key, "grad_beta": step}
    return found if case.decay == "head" else found | {"grad_decay": key if case.decay == "vector" else step}


def decay_error(case: Case, inputs: Inputs) -> float:
    """What results may be off, relatively, because the logs of a decay are added up before the exponential.

    The sum is rounded by half a unit of its size, and the sums of two steps are subtracted for the weight between them.
    Plain PyTorch does so too, but where a result has few elements (the decay of each head), it may be lucky.
    """
    if inputs.decay is None or not inputs.decay.numel():
        return 0.0
    steps = inputs.decay.double()
    steps = steps * case.rows[1] if steps.ndim == 1 else steps.sum(2)
    return torch.finfo(accumulator_of(inputs.query.dtype)).eps / 2 * largest(steps)


def exponent_error(case: Case, inputs: Inputs) -> float:
    """What results may be off, relatively, because softmax features are exponentials of sums.

    W q, W k and |k|^2 / 2 are each rounded by half a unit of their size, and plain PyTorch's may fall the lucky way.
    """
    wide = inputs.to(torch.float64)
    if case.feature != "softmax" or wide.projection is None:
        return 0.0
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    sizes = [scale**0.5 * largest(x @ wide.projection.mT) for x in (wide.query, wide.key)]
    sizes.append(scale / 2 * largest(wide.key.square().sum(-1)))
    return torch.finfo(accumulator_of(inputs.query.dtype)).eps / 2 * sum(sizes)


def decay_gradient_error(case: Case, inputs: Inputs, truth: Mapping[str, Tensor]) -> float:
    """What the gradient of a decay may be off, however small it is: it is a long sum of numbers that largely cancel.

    Step t's is the sum, over all steps from t on, of what the query contributes less what the key does, each about the
    size of dO . O: a random walk of roundings. For the decay of a head those sums are summed again, over the N steps.
    """
    size = largest((inputs.grad_out.double() * truth["out"]).sum(-1))
    if case.state_out:
        size += largest((inputs.grad_kv.double() * truth["kv"]).sum((2, 3)))
    batch, steps, _ = case.rows
    walk = (batch * steps**3 / 3) ** 0.5 if case.decay == "head" else steps**0.5
    return torch.finfo(accumulator_of(inputs.query.dtype)).eps / 2 * walk * size


def cancellation_errors(case: Case, inputs: Inputs) -> dict[str, float]:
    """What gradients of a normalised output may be off where numerator and denominator cancel, by name.

    The gradient of a feature is that through the numerator less that through the denominator, equal sums where a row
    has one key or a query one feature. In units of the largest gradient through the numerator alone: two for products
    and quotients, and half of one for each key of both sums, a random walk: no two ways add them up in the same order.
    """
    if not case.normalize:
        return {}
    wide = inputs.to(torch.float64)
    numerator = replace(case, normalize=False, state_out=False)
    ones = torch.ones_like(wide.value[..., :1])
    state = None if wide.initial_normalizer is None else wide.initial_normalizer[..., None]
    sums = NAIVE[0](replace(numerator, value_dim=1), replace(wide, value=ones, initial_kv=state), 0)["out"]
    tensors, leaves = replace(wide, initial_normalizer=None).leaves(case)
    out = NAIVE[0](numerator, tensors, 0)["out"]
    seeds = torch.where(sums == 0, 0, wide.grad_out / sums.masked_fill(sums == 0, 1))
    grads = torch.autograd.grad(out, list(leaves.values()), seeds, allow_unused=True, materialize_grads=True)
    units = torch.finfo(accumulator_of(inputs.query.dtype)).eps * (2 + (case.rows[2] / 2) ** 0.5)
    found = {f"grad_{name}": units * largest(grad) for name, grad in zip(leaves, grads, strict=True)}
    return {name: error for name, error in found.items() if name in ("grad_query", "grad_key", "grad_decay")}


def allowed(
    case: Case,
    inputs: Inputs,
    truth: Mapping[str, Tensor],
    naive_errors: Mapping[str, float],
    reordered: bool,
) -> dict[str, float]:
    """The largest error that each result and gradient may have; see `fastattn.verify.family.Family.allowed`."""
    dtype, cancelled = inputs.query.dtype, cancellation_errors(case, inputs)
    relative = decay_error(case, inputs) + exponent_error(case, inputs)
    bars = {}
    for name, result in truth.items():
        exact = finite(result)
        terms = case.rows[1] if name.startswith("grad_initial") else 1  # each query adds to it
        bar = base(name, exact, dtype, naive_errors[name]) + absolute_tolerance(exact, dtype, max(terms, 1))
        bars[name] = bar + relative * largest(exact) + cancelled.get(name, 0.0)
    if "grad_decay" in bars:
        bars["grad_decay"] += decay_gradient_error(case, inputs, truth)
    return bars
