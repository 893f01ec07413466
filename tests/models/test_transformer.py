"""The reference model computes the same function with every attention, and that function is a causal language model.

Weights are scaled up from their initial values, because with those attention is so flat that a wrong scale, mask or
head order would hide below the tolerance. Each test's docstring says what would make it fail.
"""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.models import ATTENTION, Transformer, TransformerConfig
from fastattn.models.transformer import apply_rotary, rotary_table
from fastattn.nn import Mechanism, Nystrom, Performer

SMALL = {"vocab_size": 29, "num_layers": 2, "num_heads": 4, "embed_dim": 64, "max_seq_len": 48}
VARIANTS = {
    "mha": {},
    "gqa": {"num_kv_heads": 2},
    "mqa": {"num_kv_heads": 1},
    "window": {"window": 7},
    "gqa-window-1": {"num_kv_heads": 2, "window": 1},
}


def build(attention: str, dtype: torch.dtype = torch.float32, **config: Any) -> Transformer:
    torch.manual_seed(3)
    model = Transformer(TransformerConfig(**(SMALL | config), attention=attention))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(12 if "qkv" in name else 4)
    return model.to(dtype)


def draw_tokens(batch: int = 3, seq_len: int = 37) -> Tensor:
    generator = torch.Generator()
    print(f"tokens drawn with seed {generator.seed()}")
    return torch.randint(SMALL["vocab_size"], (batch, seq_len), generator=generator)


def logits_and_gradients(model: Transformer, tokens_BS: Tensor) -> dict[str, Tensor]:
    """Float64 logits and the gradient of every parameter."""
    logits = model(tokens_BS[:, :-1])
    F.cross_entropy(logits.double().flatten(0, 1), tokens_BS[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    return {"logits": logits.detach().double(), **gradients}


@pytest.mark.parametrize("attention", ["fastattn", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_equals_naive(attention: str, variant: str) -> None:
    """Fails if a swap differs in scale, mask, window edge, head grouping or layout, or loses a gradient."""
    tokens_BS = draw_tokens()
    expected = logits_and_gradients(build("naive", torch.float64, **VARIANTS[variant]), tokens_BS)
    actual = logits_and_gradients(build(attention, torch.float64, **VARIANTS[variant]), tokens_BS)
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= 1e-10 * value.abs().max(), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_error_is_that_of_naive(dtype: torch.dtype, variant: str) -> None:
    """Fails if fastattn's error against float64 exceeds twice that of naive attention (three times for gradients)."""
    tokens_BS = draw_tokens()
    # The exact answer of the rounded weights, not of the weights before rounding.
    exact_model = build("naive", dtype, **VARIANTS[variant]).double()
    exact, naive, fast = (
        logits_and_gradients(model, tokens_BS)
        for model in (exact_model, *(build(name, dtype, **VARIANTS[variant]) for name in ("naive", "fastattn")))
    )
    for name, value in exact.items():
        factor = 2 if name == "logits" else 3
        floor = torch.finfo(dtype).eps * value.abs().max()
        allowed = factor * (naive[name] - value).abs().max() + floor
        assert (fast[name] - value).abs().max() <= allowed, name


def test_attention_is_sharp() -> None:
    """Fails if the weights of these tests leave attention so flat that those above could not tell right from wrong."""
    tokens_BS = draw_tokens()
    causal = build("fastattn")(tokens_BS)
    windowed = build("fastattn", window=7)(tokens_BS)
    assert (causal - windowed)[:, :7].abs().max() < 1e-4 * causal.abs().max()
    assert (causal - windowed)[:, 7:].abs().max() > 0.1 * causal.abs().max()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("window", [None, 5])
def test_token_reaches_exactly_its_window(attention: str, window: int | None) -> None:
    """Fails if a token changes an earlier logit, one past its window, or none of those it must reach."""
    model = build(attention, num_layers=1, window=window)
    tokens_BS = draw_tokens(batch=1)
    changed_BS = tokens_BS.clone()
    changed_BS[0, 11] = (changed_BS[0, 11] + 1) % SMALL["vocab_size"]
    with torch.no_grad():
        same_S = (model(tokens_BS) == model(changed_BS)).all(dim=-1)[0]
    end = tokens_BS.shape[1] if window is None else 11 + window
    assert same_S[:11].all()
    assert not same_S[11:end].any()
    assert same_S[end:].all()


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    """Fails if the loss has another base, reduction or alignment than log-softmax at the targets, or counts -100."""
    model, tokens_BS = build("naive", torch.float64), draw_tokens()
    targets_BS = draw_tokens()
    targets_BS[0, 5:9] = -100
    log_p = model(tokens_BS).log_softmax(-1)
    terms = [
        -log_p[b, s, targets_BS[b, s]]
        for b, s in itertools.product(range(3), range(tokens_BS.shape[1]))
        if targets_BS[b, s] >= 0
    ]
    torch.testing.assert_close(model(tokens_BS, targets_BS), torch.stack(terms).mean())


def test_same_seed_same_weights_and_first_loss_near_uniform() -> None:
    """Fails if the attention's name changes the initial weights, state dict or size, or the start is not near ln V."""
    states = []
    for attention in ATTENTION:
        torch.manual_seed(5)
        model = Transformer(TransformerConfig(**SMALL, attention=attention))
        states.append(model.state_dict())
        assert model(draw_tokens(), draw_tokens()).item() == pytest.approx(math.log(SMALL["vocab_size"]), abs=0.2)
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)
    embed, hidden = 64, 192
    per_layer = 4 * embed * embed + 3 * embed * hidden + 2 * embed
    # One embedding: the output layer is tied to it.
    assert sum(p.numel() for p in model.parameters()) == 29 * embed + 2 * per_layer + embed


@pytest.mark.parametrize("attention", ATTENTION)
def test_overfits_one_batch(attention: str) -> None:
    """Fails if gradients do not train the model: random tokens can be learnt by heart only through attention."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SMALL, num_kv_heads=2, attention=attention))
    tokens_BS = torch.randint(SMALL["vocab_size"], (2, 33), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(tokens_BS[:, :-1], tokens_BS[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # One token of context leaves about half of ln 29 = 3.4 nats: each token has some two successors in the batch.
    assert loss.item() < 0.1


CAUSAL_MECHANISMS: list[str | Mechanism] = ["flash", Performer(32), "linear", "retention", "gla", "delta"]
ENCODERS: list[str | Mechanism] = ["flash", Performer(32), "linear", "linformer", Nystrom(16)]


@pytest.mark.parametrize("mechanism", CAUSAL_MECHANISMS, ids=str)
def test_no_mechanism_sees_the_future(mechanism: str | Mechanism) -> None:
    """Fails if a token changes an earlier logit by a single bit, or does not reach every later one."""
    torch.manual_seed(3)
    model = Transformer(TransformerConfig(**SMALL, num_kv_heads=2, mechanism=mechanism)).requires_grad_(False)
    tokens_BS = draw_tokens(batch=1)
    changed_BS = tokens_BS.clone()
    changed_BS[0, 11] = (changed_BS[0, 11] + 1) % SMALL["vocab_size"]
    same_S = (model(tokens_BS) == model(changed_BS)).all(dim=-1)[0]
    assert same_S[:11].all()
    assert not same_S[11:].any()


@pytest.mark.parametrize("mechanism", ENCODERS, ids=str)
def test_encoder_sees_all(mechanism: str | Mechanism) -> None:
    """Fails if an encoder is causal, or ignores where a token stands."""
    torch.manual_seed(3)
    config = TransformerConfig(**SMALL, causal=False, mechanism=mechanism)
    model = Transformer(config).double().requires_grad_(False)
    tokens_BS = draw_tokens(batch=1)
    tokens_BS[0, 10:12] = torch.tensor([3, 4])
    swapped_BS = tokens_BS.clone()
    swapped_BS[0, 10:12] = torch.tensor([4, 3])
    changed_S = (model(tokens_BS) - model(swapped_BS)).abs().amax(-1)[0]
    assert (changed_S > 1e-9).all()


@pytest.mark.parametrize("attention", ["sdpa", "naive"])
def test_encoder_equals_the_others(attention: str) -> None:
    """Fails if an encoder's attention differs between the implementations."""
    tokens_BS = draw_tokens()
    expected = logits_and_gradients(build("fastattn", torch.float64, causal=False), tokens_BS)
    actual = logits_and_gradients(build(attention, torch.float64, causal=False), tokens_BS)
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= 1e-10 * value.abs().max(), name


def test_mechanisms_start_from_the_same_weights() -> None:
    """Fails if what a mechanism adds changes the weights that all have, or layers share Performer's directions."""
    states = {}
    for mechanism in CAUSAL_MECHANISMS:
        torch.manual_seed(5)
        states[str(mechanism)] = Transformer(TransformerConfig(**SMALL, mechanism=mechanism)).state_dict()
    for state in states.values():
        assert all(torch.equal(state[name], tensor) for name, tensor in states["flash"].items())
        assert all(name in states["flash"] or ".attention.mixer." in name for name in state)
    drawn = [t for name, t in states[str(Performer(32))].items() if name.endswith("projection")]
    assert len(drawn) == SMALL["num_layers"]
    assert not torch.equal(*drawn)


@pytest.mark.parametrize(
    ("mechanism", "turned"), [("flash", True), ("retention", True), ("linear", True), ("gla", False), ("delta", False)]
)
def test_rotary_positions_by_mechanism(mechanism: str, turned: bool) -> None:
    """Fails if rotary positions act where the model says that they do not, or the reverse."""
    model = Transformer(TransformerConfig(**SMALL, mechanism=mechanism)).requires_grad_(False)
    tokens_BS = draw_tokens()
    logits = model(tokens_BS)
    model.cos, model.sin = model.cos.roll(1, 0), model.sin.flip(0)
    assert torch.equal(logits, model(tokens_BS)) != turned


@pytest.mark.parametrize("mechanism", CAUSAL_MECHANISMS[1:], ids=str)
def test_mechanism_learns_by_heart(mechanism: str | Mechanism) -> None:
    """Fails if the gradients of a mechanism do not train the model (the test above says why a low loss tells)."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SMALL, mechanism=mechanism))
    tokens_BS = torch.randint(SMALL["vocab_size"], (2, 33), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(45):
        loss = model(tokens_BS[:, :-1], tokens_BS[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.2


@pytest.mark.parametrize("mechanism", ENCODERS, ids=str)
def test_encoder_fills_in_masked_tokens(mechanism: str | Mechanism) -> None:
    """Fails if gradients do not train an encoder: a hidden token is that of the rest of its row, anew in each step, and
    nothing else tells it (a guess costs ln 28 = 3.3 nats)."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SMALL, causal=False, mechanism=mechanism))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    mask = SMALL["vocab_size"] - 1
    losses = []
    for _ in range(30):
        tokens_BS = torch.randint(mask, (16, 1)).expand(-1, 24)
        hidden_BS = torch.rand(tokens_BS.shape) < 0.3
        loss = model(tokens_BS.masked_fill(hidden_BS, mask), tokens_BS.masked_fill(~hidden_BS, -100))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3
    assert losses[-1] < 1.6


def test_rotary_depends_on_distance_alone() -> None:
    """Fails if rotated products depend on absolute positions, not on distance, or if a rotation changes length."""
    cos, sin = rotary_table(40, 16)
    query, key = torch.randn(2, 16, dtype=torch.float64)
    rotated = [apply_rotary(x.expand(1, 40, 1, 16), cos, sin)[0, :, 0] for x in (query, key)]
    products = rotated[0] @ rotated[1].T
    for distance in (-20, -1, 0, 1, 7, 33):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-12, atol=1e-12)
    assert (products[0] - products[0, 0]).abs()[1:].min() > 1e-6
    torch.testing.assert_close(rotated[0].norm(dim=-1), query.norm().expand(40), rtol=1e-12, atol=0)


def test_rotary_angles() -> None:
    """Fails if pair i of D channels does not turn by position * 10000^(-2i/D), counter-clockwise."""
    cos, sin = rotary_table(5, 4)
    turned = apply_rotary(torch.tensor([1.0, 1.0, 0.0, 0.0]).double().expand(1, 5, 1, 4), cos, sin)[0, 3, 0]
    fast, slow = 3.0, 0.03
    expected = torch.tensor([math.cos(fast), math.cos(slow), math.sin(fast), math.sin(slow)], dtype=torch.float64)
    torch.testing.assert_close(turned, expected)


@pytest.mark.parametrize("attention", ATTENTION)
def test_model_knows_order_but_not_place(attention: str) -> None:
    """Fails if queries or keys are not rotated, or not alike: then order, or the place of a sequence, is wrong."""
    model = build(attention, torch.float64, num_layers=1, num_kv_heads=2, window=6)
    tokens_BS = draw_tokens(batch=1)
    tokens_BS[0, 20:22] = torch.tensor([3, 4])
    swapped_BS = tokens_BS.clone()
    swapped_BS[0, 20:22] = torch.tensor([4, 3])
    with torch.no_grad():
        logits, later, swapped = model(tokens_BS), model(tokens_BS[:, 9:]), model(swapped_BS)
    # The first token of `later` that sees a whole window is number 5. The rotary table is in float32.
    assert (logits[:, 14:] - later[:, 5:]).abs().max() < 1e-5 * logits.abs().max()
    assert (logits[:, 22:26] - swapped[:, 22:26]).abs().max() > 1e-2 * logits.abs().max()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"embed_dim": 60}, "embed_dim must be a multiple of 2 \\* num_heads = 8 .*got 60"),
        ({"num_kv_heads": 3}, "num_heads=4 and num_kv_heads=3"),
        ({"attention": "flash"}, "one of \\['fastattn', 'naive', 'sdpa'\\], got 'flash'"),
        ({"mechanism": "softmax"}, "mechanism must be one of flash, performer, .*got 'softmax'"),
        ({"mechanism": "linformer"}, "causal must be False with Linformer attention, got True"),
        ({"mechanism": "nystrom"}, "causal must be False with Nystrom attention, got True"),
        ({"mechanism": "gla", "causal": False}, "must be True with gla, got False"),
        ({"mechanism": "gla", "attention": "sdpa"}, "attention must be 'fastattn' with mechanism 'gla', got 'sdpa'"),
        ({"mechanism": "linear", "window": 3}, "window must be None but for causal attention .*got 3"),
        ({"causal": False, "window": 3}, "window must be None but for causal attention .*got 3"),
    ],
)
def test_config_errors(config: dict[str, Any], message: str) -> None:
    """Fails if sizes that do not fit are accepted, or the error does not name the argument and what was given."""
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**(SMALL | config))


def test_input_errors() -> None:
    """Fails if tokens beyond the rotary table or of another rank, or targets of another shape, are accepted."""
    model = build("naive")
    with pytest.raises(ValueError, match=r"max_seq_len=48 .*got shape \(1, 49\)"):
        model(draw_tokens(1, 49))
    with pytest.raises(ValueError, match=r"got shape \(4,\)"):
        model(draw_tokens(1, 4)[0])
    with pytest.raises(ValueError, match=r"targets must have the shape of tokens, \(1, 4\), got \(1, 5\)"):
        model(draw_tokens(1, 4), draw_tokens(1, 5))
