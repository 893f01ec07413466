"""Recorded calls, rollout and pictures: against weights and matrix products made in float64 from what the model saw."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fastattn
from fastattn import maps
from fastattn.bench.memory import AllocationMeter
from fastattn.dense import op
from fastattn.dense import weights as blockwise
from fastattn.dense.probabilities import attention_weights
from fastattn.errors import UnsupportedError
from fastattn.models import Transformer, TransformerConfig
from fastattn.nn import MultiheadAttention

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "attention_maps.py"
EXACT: dict[str, Any] = {"atol": 1e-12, "rtol": 0}


def _qkv(length_q: int = 6, length_k: int = 6, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((4, length_q), (2, length_k), (2, length_k))
    query, key, value = (torch.randn(batch, heads, length, 3, dtype=torch.float64) for heads, length in sizes)
    return query, key, value


def _mixing(weights: Tensor) -> Tensor:
    """0.5 A + 0.5 I with rows scaled to sum to 1, from one layer's (B, H, S, S), as Abnar and Zuidema define it."""
    mixed = 0.5 * weights.mean(dim=1) + 0.5 * torch.eye(weights.shape[-1], dtype=weights.dtype)
    return mixed / mixed.sum(dim=-1, keepdim=True)


def test_weights_of_the_reference_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a layer is missed or comes out of order, or its weights are not those of the same model's standard
    attention in float64."""
    config = TransformerConfig(num_layers=3, num_kv_heads=2, embed_dim=16, max_seq_len=20, window=7)
    model = Transformer(config).double()
    tokens = torch.randint(256, (2, 13))
    with maps.capture() as calls:
        expected_logits = model(tokens)

    seen: list[Tensor] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
        age = torch.arange(13)[:, None] - torch.arange(13)
        scores = query @ key.repeat_interleave(2, dim=1).mT / 2
        seen.append(torch.softmax(scores.masked_fill((age < 0) | (age >= 7), float("-inf")), dim=-1))
        return seen[-1] @ value.repeat_interleave(2, dim=1)

    for block in model.blocks:
        monkeypatch.setattr(block.attention, "attend", spy)
    assert_close(model(tokens), expected_logits, **EXACT)
    assert len(calls) == len(seen) == 3
    for call, weights in zip(calls, seen, strict=True):
        assert_close(call.weights(), weights, **EXACT)
        assert_close(call.weights([-1, 4], [2], "heads"), weights[:, 2, [-1, 4]], **EXACT)
        assert_close(call.weights(average="rows"), weights.mean(dim=2), **EXACT)
    expected = _mixing(seen[2]) @ _mixing(seen[1]) @ _mixing(seen[0])
    assert_close(maps.rollout(calls), expected, **EXACT)
    assert_close(maps.rollout(calls, rows=[-1]), expected[:, [-1]], **EXACT)


@pytest.mark.parametrize("learned", [False, True], ids=["plain", "add_bias_kv"])
def test_weights_of_the_layer(learned: bool) -> None:
    """Fails if the recorded call is not the layer's: its own weights, masks and learned key included, are the truth."""
    layer = MultiheadAttention(8, 2, batch_first=True, add_bias_kv=learned, dtype=torch.float64)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with maps.capture() as calls:
        _, expected = layer(x, x, x, key_padding_mask=padding, average_attn_weights=False)
    assert expected.requires_grad
    [call] = calls
    found = call.weights()
    assert not found.requires_grad
    # The layer moves its learned key from the front to the end, where torch has it.
    assert_close(found.roll(-1, dims=-1) if learned else found, expected.detach(), **EXACT)


def test_weights_before_dropout() -> None:
    """Fails if dropout is in the maps, or recording changes what the call draws."""
    query, key, value = _qkv()
    state = torch.get_rng_state()
    expected = fastattn.attention(query, key, value, dropout_p=0.5)
    torch.set_rng_state(state)
    with maps.capture() as calls:
        assert torch.equal(fastattn.attention(query, key, value, dropout_p=0.5), expected)
    assert_close(calls[0].weights(), torch.softmax(query @ key.repeat_interleave(2, 1).mT / 3**0.5, -1), **EXACT)


def test_every_public_function_is_recorded() -> None:
    """Fails if one of them goes past the recording, or its options are lost."""
    query, key, value = _qkv(batch=1)
    expected = attention_weights(query, key, causal=True)
    bounds = torch.tensor([0, 6], dtype=torch.int32)
    packed = (t[0].transpose(0, 1) for t in (query, key, value))
    pages = (t.unflatten(2, (2, 3))[0].transpose(0, 1).contiguous() for t in (key, value))
    lengths, table = torch.tensor([6]), torch.tensor([[0, 1]])
    with maps.capture() as calls, fastattn.override_sdpa():
        fastattn.attention(query, key, value, causal=True)
        torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        fastattn.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        fastattn.attention_varlen(*packed, bounds, bounds, 6, 6, causal=True)
        fastattn.attention_with_kvcache(query, key, value, key_lengths=lengths, causal=True)
        fastattn.attention_with_kvcache(query, *pages, key_lengths=lengths, block_table=table, causal=True)
    assert len(calls) == 6
    for call in calls:
        assert_close(call.sequence(0).weights(), expected, **EXACT)
        if call.problem.cu_seqlens_q is None:
            assert_close(call.weights(rows=[2, 5]), expected[:, :, [2, 5]], **EXACT)
    with pytest.raises(ValueError, match=r"packed sequences; choose one of them with sequence\(index\)"):
        calls[3].weights()


def test_one_sequence_of_several() -> None:
    """Fails if a sequence is taken with another's mask, lengths, slopes, pages or rows."""
    query, key, value = _qkv(4, 7, batch=3)
    lengths = torch.tensor([7, 3, 5])
    options = {
        "attn_mask": torch.randn(3, 1, 4, 7, dtype=torch.float64),
        "alibi_slopes": torch.rand(3, 4),
        "query_start": torch.tensor([3, 0, 1]),
        "key_start": torch.tensor([0, 1, 2]),
    }
    bounds_q, bounds_k = (torch.tensor(b, dtype=torch.int32) for b in ([0, 4, 8, 12], [0, 7, 14, 21]))
    packed = [t.transpose(0, 1).flatten(1, 2).transpose(0, 1) for t in (query, key, value)]
    with maps.capture() as calls:
        fastattn.attention(query, key, value, causal=True, key_lengths=lengths, **options)
        fastattn.attention_varlen(*packed, bounds_q, bounds_k, 4, 7, causal=True, key_lengths=lengths, **options)
    expected = attention_weights(query, key, causal=True, key_lengths=lengths, **options)
    for call in calls:
        for index in (0, 2, -2):
            assert_close(call.sequence(index).weights(), expected[[index]], **EXACT)
        with pytest.raises(ValueError, match="index must be between -3 and 2, got 3"):
            call.sequence(3)


def test_recording_begins_and_ends_with_the_block() -> None:
    """Fails if a call outside the block is recorded, an inner block ends an outer one, or an error leaves one on."""
    query, key, value = _qkv()
    with maps.capture() as outer:
        with maps.capture():
            pass  # leaves two empty recordings, which are equal and not the same
        fastattn.attention(query, key, value)
        with contextlib.suppress(ZeroDivisionError), maps.capture() as inner:
            fastattn.attention(query, key, value)
            raise ZeroDivisionError
        fastattn.attention(query, key, value)
        thread = threading.Thread(target=fastattn.attention, args=(query, key, value))
        thread.start()
        thread.join()
    fastattn.attention(query, key, value)
    assert (len(outer), len(inner)) == (4, 1)
    assert op.recordings == []
    assert isinstance(outer[1:], maps.Calls)
    assert len(outer[1:]) == 3
    assert repr(outer[:1]) == "Calls([Call(query (2, 4, 6, 3), key (2, 2, 6, 3))])"


def test_what_a_recording_keeps() -> None:
    """Fails if value, output or graph are kept, or queries and keys are copied."""
    query, key, value = (t.requires_grad_() for t in _qkv(64, 64))
    with AllocationMeter(torch.device("cpu")) as memory, maps.capture() as calls:
        fastattn.attention(query, key, value, return_lse=True)
    problem, lse = calls[0].problem, calls[0].lse
    assert problem.query.data_ptr() == query.data_ptr()
    assert problem.value.data_ptr() == key.data_ptr()
    assert not any(t.requires_grad for t in (problem.query, problem.key, problem.value, lse))
    assert memory.live <= lse.numel() * 8 + 1024


def test_compiled_model() -> None:
    """Fails if compiled code misses the recording, goes on recording after it, or compiles anew for each block."""
    compiled_graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        compiled_graphs.append(graph)
        return graph.forward

    def model(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return fastattn.attention(fastattn.attention(query, key, value, causal=True), key, value)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    query, key, value = _qkv()
    compiled(query, key, value)
    for _ in range(3):
        with maps.capture() as calls:
            compiled(query, key, value)
        compiled(query, key, value)
        assert len(calls) == 2
        assert_close(calls[0].weights(), attention_weights(query, key, causal=True), **EXACT)
    assert len(compiled_graphs) == 2


def test_transforms_are_refused() -> None:
    """Fails if tensors of a transform, which end with it, are recorded."""
    query, key, value = _qkv()
    with maps.capture(), pytest.raises(UnsupportedError, match=r"maps\.capture does not see through torch\.func"):
        torch.func.vmap(lambda q: fastattn.attention(q[None], key[:1], value[:1]))(query)


@pytest.mark.parametrize("name", ["causal", "sinks", "padded", "starts"])
def test_rollout_is_the_matrix_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if layers multiply in another order, rows that sum to less than 1 are not scaled, a row without keys
    loses its residual part, or blocks are put together wrongly."""
    monkeypatch.setitem(blockwise.BLOCK, "cpu", 2 * 9)
    options: list[dict[str, Any]] = {
        "causal": [{"causal": True}] * 3,
        "sinks": [{"sinks": torch.randn(4)}, {"causal": True}, {"sinks": torch.ones(4), "window": (2, 1)}],
        "padded": [{"key_lengths": torch.tensor([0, 5]), "key_start": torch.tensor([0, 2])}] * 2,
        "starts": [{"causal": True, "query_start": torch.tensor([-3, 0])}, {"window": (1, 1)}],
    }[name]
    expected = torch.eye(9, dtype=torch.float64)
    with maps.capture() as calls:
        for option in options:
            query, key, value = _qkv(9, 9)
            fastattn.attention(query, key, value, **option)
            expected = _mixing(attention_weights(query, key, **option)) @ expected
    assert_close(maps.rollout(calls), expected, **EXACT)
    assert_close(maps.rollout(calls, rows=[7, -9, 3, 3]), expected[:, [7, 0, 3, 3]], **EXACT)
    assert_close(maps.rollout(calls, rows=[]), expected[:, []], **EXACT)


def test_rollout_holds_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if rollout of one token takes memory that grows with the square of the length."""
    monkeypatch.setitem(blockwise.BLOCK, "cpu", 1 << 14)
    length = 1024
    with maps.capture() as calls:
        for _ in range(2):
            query, key = (torch.randn(1, 2, length, 8) for _ in range(2))
            fastattn.attention(query, key, key)
    with AllocationMeter(torch.device("cpu")) as memory:
        maps.rollout(calls, rows=[0])
    assert memory.peak < length * length * 4 / 8


def test_rollout_of_what_is_no_stack_of_layers() -> None:
    """Fails if calls that have no product give a number, or an error that does not name the call."""
    with pytest.raises(ValueError, match="calls must hold at least one attention call"):
        maps.rollout([])
    with maps.capture() as calls:
        fastattn.attention(*_qkv(6, 6))
        fastattn.attention(*_qkv(4, 6))
        fastattn.attention(*_qkv(7, 7))
    with pytest.raises(ValueError, match=r"got \(2, 4\) and \(2, 6\) in call 1"):
        maps.rollout(calls)
    with pytest.raises(ValueError, match=r"got \(2, 7\) and \(2, 7\) in call 1"):
        maps.rollout(calls[::2])
    with pytest.raises(ValueError, match="rows must be between -6 and 5, got 6"):
        maps.rollout(calls[:1], rows=[6])


def test_plot_draws_the_weights() -> None:
    """Fails if a map is missing, turned round, drawn with another map's title, or labels are not at their tokens."""
    weights = torch.rand(5, 3, 4)
    figure = maps.plot(weights, queries=list("abc"), keys=list("wxyz"))
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == [f"head {i}" for i in range(5)]
    for axes, expected in zip(panels, weights, strict=True):
        assert_close(torch.from_numpy(axes.images[0].get_array().data), expected, atol=0, rtol=0)
    assert [label.get_text() for label in panels[0].get_yticklabels()] == list("abc")
    assert [label.get_text() for label in panels[4].get_xticklabels()] == list("wxyz")
    [single] = [axes for axes in maps.plot(torch.zeros(2, 2), titles=["rollout"]).axes if axes.images]
    assert single.get_title() == "rollout"


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        ([[1.0]], {}, TypeError, r"weights must be a torch.Tensor .* got list"),
        (torch.zeros(1, 2, 2, 2), {}, ValueError, r"weights must have shape .* got \(1, 2, 2, 2\)"),
        (torch.zeros(2, 0, 3), {}, ValueError, r"got \(2, 0, 3\)"),
        (torch.zeros(2, 3), {"keys": ["a"]}, ValueError, r"keys must have 3 entries for weights \(2, 3\), got 1"),
        (torch.zeros(2, 2, 3), {"titles": ["a"]}, ValueError, "titles must have 2 entries"),
    ],
)
def test_plot_of_wrong_arguments(weights: Any, options: dict, error: type[Exception], message: str) -> None:
    """Fails if labels are cut or repeated to fit, or matplotlib's own error comes out."""
    with pytest.raises(error, match=f"^fastattn: .*{message}"):
        maps.plot(weights, **options)


def test_example(tmp_path: Path) -> None:
    """Fails if the program crashes, its snippets do not repeat, or it names other heads than the highest scores'."""
    spec = importlib.util.spec_from_file_location("attention_maps", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.induction_targets(b"abcdXabcY") == [(7, 3)]
    assert example.strongest(torch.tensor([[0.1, 0.2, 0.0], [0.0, 0.1, 0.5]])) == (1, 2, 0.5)
    for row in example.batch(torch.arange(1000) % 256, torch.Generator()):
        assert any(torch.equal(row[p:], row[:-p]) for p in range(*example.PERIODS))
    example.main(["--steps", "1", "--out", str(tmp_path / "new" / "maps.png")])
    assert (tmp_path / "new" / "maps.png").read_bytes().startswith(b"\x89PNG")
