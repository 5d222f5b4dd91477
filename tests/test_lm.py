"""The language model: one function in every form, its loss, its initialisation, its errors."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dualform.core.errors import ArgumentError
from dualform.core.packing import from_lengths
from dualform.core.tree import clone, leaves, take
from dualform.layers.attention import AttentionConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.models import linear_loss
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.ops import backend

V = 19
PARTS = {
    "M": (Mamba2Config(d_state=8, d_head=4),),
    "m": (MambaConfig(d_state=3), MLPConfig()),
    "A": (AttentionConfig(heads=2, kv_heads=1), MLPConfig()),
    "W": (AttentionConfig(heads=2, window=4),),
    "L": (LSTMConfig(hidden=5), Mamba2Config(d_state=4, d_head=8)),
    "F": (MLPConfig(d_hidden=9),),
}


def config(pattern, **options):
    return ModelConfig(V, 12, {letter: PARTS[letter] for letter in dict.fromkeys(pattern)}, pattern, **options)


def build(pattern, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return LanguageModel(config(pattern, **options)).to(dtype)


@pytest.fixture(scope="module", params=["MAmA", "FWLF"], ids=["shared", "untied"])
def model(request):
    options = {"shared": "A"} if "A" in request.param else {"tie_embeddings": False}
    return build(request.param, **options)


def tokens(*shape):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def gradients(model, text, state, cu_seqlens):
    """Loss gradients by parameter, and the bytes that the forward kept for them."""
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        h, final = model.features(text, state, cu_seqlens=cu_seqlens)
    loss = h.square().mean() + sum(leaf.square().sum() for leaf in leaves(final) if leaf.is_floating_point())
    loss.backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()], sum(kept.values())


@pytest.mark.parametrize("name", ["", "reference"])
@pytest.mark.parametrize("packed", [False, True])
def test_recomputing_changes_memory_and_nothing_else(model, name, packed, monkeypatch):
    text = tokens(1, 60) if packed else tokens(3, 20)
    borders = from_lengths(torch.tensor([11, 49])) if packed else None
    with torch.no_grad():
        state = model.features(tokens(2 if packed else 3, 5))[1]
    with backend(name):
        want, whole = gradients(model, text, state, borders)
        monkeypatch.setattr(model, "recompute", True)
        got, less = gradients(model, text, state, borders)
    for a, b in zip(got, want, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert less < whole / 3


def test_recomputing_keeps_the_forced_backend(model, monkeypatch):
    """The backward, which may run outside of ``backend(...)``, computes with the backend of the forward."""
    monkeypatch.setattr(model, "recompute", True)
    with backend("reference"):
        inside = model.loss(tokens(2, 9))
        want = torch.autograd.grad(inside, model.embed.weight)
        loss = model.loss(tokens(2, 9))
    assert torch.equal(torch.autograd.grad(loss, model.embed.weight)[0], want[0])


def prefix(mine, other):
    """Two states agree; a cache may have spare room."""
    for a, b in zip(leaves(mine), leaves(other), strict=True):
        if a.shape != b.shape:
            n = min(a.shape[1], b.shape[1])
            assert not a[:, n:].any() and not b[:, n:].any()
            a, b = a[:, :n], b[:, :n]
        close(a, b)


def test_split_and_step(model):
    x = tokens(2, 11)
    logits, state = model(x)
    assert logits.shape == (2, 11, V) and all(len(leaf) == 2 for leaf in leaves(state))
    first, left = model(x[:, :4])
    second, left = model(x[:, 4:], left)
    close(torch.cat([first, second], 1), logits)
    prefix(left, state)
    stepped, left = [], model.init_state(2, max_len=11)
    for t in range(11):
        y, left = model.step(x[:, t], left)
        stepped.append(y)
    close(torch.stack(stepped, 1), logits)
    prefix(left, state)


def test_features_then_head(model):
    x = tokens(2, 5)
    h, state = model.features(x)
    logits, again = model(x)
    assert h.shape == (2, 5, 12)
    close(model.logits(h), logits)
    prefix(state, again)


MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0]],
    "anywhere": [[0, 1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1]],
    "nothing": [[0] * 7] * 3,
    "everything": [[1] * 7] * 3,
}


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_padding_changes_nothing(model, where, dtype):
    mask = torch.tensor(MASKS[where], dtype=dtype)
    x, keep = tokens(3, 7), mask.bool()
    warm = model(tokens(3, 4))[1]
    for before in (None, warm):
        logits, state = model(x, None if before is None else clone(before), attention_mask=mask)
        assert logits.shape == (3, 7, V) and not logits[~keep].any()
        for i in range(3):
            row = None if before is None else take(before, [i])
            alone, left = model(x[i : i + 1, keep[i]], row)
            close(logits[i, keep[i]], alone[0])
            prefix(take(state, [i]), left if keep[i].any() or before is not None else model.init_state(1))


def test_packed_documents(model):
    lengths = [4, 0, 1, 6]
    x, borders = tokens(1, 11), from_lengths(torch.tensor(lengths))
    logits, state = model(x, cu_seqlens=borders)
    at = 0
    for i, n in enumerate(lengths):
        alone, left = model(x[:, at : at + n])
        close(logits[:, at : at + n], alone)
        prefix(take(state, [i]), left)
        at += n


def test_gradients_reach_every_parameter_through_logits_and_state(model):
    model.zero_grad()
    logits, state = model(tokens(2, 6))
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    model.zero_grad()
    _, state = model(tokens(2, 6))
    sum(leaf.square().sum() for leaf in leaves(state) if leaf.is_floating_point()).backward()
    assert model.embed.weight.grad.any()


def test_shared_letters_are_one_module_with_a_state_per_use():
    shared, apart = build("MAMA", shared="A"), build("MAMA")
    assert shared.blocks[1] is shared.blocks[3] and apart.blocks[1] is not apart.blocks[3]
    block = sum(p.numel() for p in apart.blocks[1].parameters())
    assert apart.parameter_count() - shared.parameter_count() == block
    _, state = shared(tokens(1, 5))
    assert not torch.equal(state[1][0].k, state[3][0].k)


def test_parameter_count_counts_tied_tensors_once():
    tied, untied = build("M"), build("M", tie_embeddings=False)
    assert untied.parameter_count() - tied.parameter_count() == V * 12
    assert tied.head is None and tied.parameter_count() == sum(p.numel() for p in tied.state_dict().values())


def test_built_on_the_meta_device():
    with torch.device("meta"):
        meta = LanguageModel(config("MAmL", shared="A"))
    assert all(p.is_meta for p in meta.parameters())
    assert meta.parameter_count() == build("MAmL", shared="A").parameter_count()


def test_a_copy_is_apart():
    model = build("MAA", shared="A")
    other = copy.deepcopy(model)
    assert other.config == model.config and other.blocks[1] is other.blocks[2]
    with torch.no_grad():
        other.embed.weight.zero_()
    assert model.embed.weight.any()


def test_initialisation():
    torch.manual_seed(0)
    biased = AttentionConfig(heads=2, bias=True)
    parts = {"M": (Mamba2Config(d_state=8, d_head=4), MLPConfig()), "A": (biased,)}
    model = LanguageModel(ModelConfig(400, 64, parts, "MMMMMMAA", shared="A"))
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    residual_parts = 6 * 2 + 2
    for block in model.blocks:
        for part in block.parts:
            output = getattr(part, "down_proj", None) or part.out_proj
            bound = output.in_features**-0.5 / math.sqrt(residual_parts)  # the deviation is bound / sqrt(3)
            assert output.weight.abs().max() <= bound and output.weight.std() > 0.5 * bound
            others = [m for m in part.modules() if isinstance(m, nn.Linear) and m is not output]
            assert all(m.weight.abs().max() > 0.9 * m.in_features**-0.5 for m in others)
            linear = [m for m in part.modules() if isinstance(m, nn.Linear) and m.bias is not None]
            assert not any(m.bias.any() for m in linear)
    step = F.softplus(model.blocks[0].parts[0].dt_bias)
    assert step.min() >= 0.99e-3 and step.max() <= 0.101  # the layer's own initialisation stands


def test_the_stream_is_float32_whatever_the_weights():
    model = build("MAFm", torch.bfloat16)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out[0].dtype)))
    logits, state = model(tokens(2, 5))
    assert logits.dtype == torch.bfloat16 and seen == [(torch.float32, torch.float32)] * 4
    step, _ = model.step(tokens(2), state)
    assert step.dtype == torch.bfloat16
    assert build("M", torch.float32)(tokens(1, 3))[0].dtype == torch.float32
    assert model.loss(tokens(2, 5)).dtype == torch.float32


def test_under_autocast():
    model = build("MAFm", torch.float32)
    want, (want_loss, x) = model(tokens(2, 5))[0], (model.loss(tokens(2, 5)), tokens(2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        got, loss = model(x)[0], model.loss(x)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want_loss.item(), rel=1e-2)
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.02)
    loss.backward()


def test_nothing_at_all(model):
    logits, state = model(tokens(2, 0))
    assert logits.shape == (2, 0, V)
    prefix(state, model.init_state(2))
    assert model.loss(tokens(2, 0)) == 0 and model.loss(tokens(1, 0), cu_seqlens=torch.tensor([0, 0])) == 0


# --- loss ---


def nats(model, x, targets):
    logits = model(x)[0]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), reduction="sum")


def test_loss_is_the_mean_cross_entropy_of_the_next_token(model):
    x = tokens(3, 7)
    want = nats(model, x[:, :-1], x[:, 1:]) / 18
    close(model.loss(x), want)
    close(model.loss(x.int()), want)
    close(model.loss(x[:, :-1], x[:, 1:]), want)
    close(model.loss(x[:, :-1].int(), x[:, 1:].int()), want)


def test_loss_ignores_targets_of_minus_100(model):
    x, targets = tokens(2, 5), tokens(2, 5).clone()
    targets[0, 2:] = -100
    logits = model(x)[0]
    kept = targets != -100
    close(model.loss(x, targets), F.cross_entropy(logits[kept], targets[kept]))
    assert model.loss(x, torch.full_like(x, -100)) == 0 and model.loss(x[:, :1]) == 0


@pytest.mark.parametrize("given", [False, True])
def test_loss_does_not_predict_across_borders(model, given):
    lengths = [4, 0, 1, 5]
    x, borders = tokens(1, 10), from_lengths(torch.tensor(lengths))
    pieces = [p for p in x.split(lengths, 1) if p.shape[1] > 1]
    want = sum(nats(model, p[:, :-1], p[:, 1:]) for p in pieces) / (3 + 4)
    targets = torch.cat([x[:, 1:], tokens(1, 1)], 1) if given else None
    close(model.loss(x, targets, cu_seqlens=borders), want)


@pytest.mark.parametrize("at_once", [1, 2 * V, 5 * V, 6 * V])
def test_loss_in_pieces_is_the_same_with_the_same_gradients(model, monkeypatch, at_once):
    x = tokens(2, 6)
    results = []
    for size in (2**24, at_once):
        monkeypatch.setitem(linear_loss.LOGITS_AT_ONCE, "cpu", size)
        model.zero_grad()
        loss = model.loss(x)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        with torch.no_grad():
            close(model.loss(x), results[0][0])
    close(results[1], results[0])


def test_loss_never_holds_all_logits(monkeypatch):
    model, sizes, slope = build("M"), [], linear_loss._slope
    monkeypatch.setitem(linear_loss.LOGITS_AT_ONCE, "cpu", 5 * V)
    monkeypatch.setattr(linear_loss, "_slope", lambda x, targets: sizes.append(x.numel()) or slope(x, targets))
    model.loss(tokens(2, 16)).backward()
    assert max(sizes) <= 5 * V and sum(sizes) == 32 * V  # each once, and never all


@pytest.mark.parametrize("frozen", ["embed", "blocks"])
def test_loss_with_frozen_parts(frozen):
    model, x = build("M"), tokens(2, 6)
    model.loss(x).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    getattr(model, frozen).requires_grad_(False)
    model.loss(x).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            close(p.grad, want[name])


# --- errors ---


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.tensor([[1, V]]), rf"tokens holds {V}, expected 0 to {V - 1}"),
        (torch.tensor([[1, -1]]), "tokens holds -1"),
        (torch.ones(1, 3), "tokens is torch.float32, expected int32 or int64"),
        (torch.ones(1, 3, dtype=torch.uint8), r"uint8.*\n.*tokens.long\(\)"),
        (torch.tensor([1, 2]), r"tokens has shape \(2,\), expected 2 axes \(B, T\)"),
        (torch.ones(1, 2, 3, dtype=torch.int64), "tokens has shape"),
        ([[1, 2]], "tokens is list"),
        (torch.ones(1, 2, dtype=torch.int64, device="meta"), r"tokens is on meta, but .* cpu"),
    ],
)
def test_bad_tokens(model, bad, message):
    for call in (model, model.features, model.loss):
        with pytest.raises(ArgumentError, match=message):
            call(bad)


def test_bad_step(model):
    state = model.init_state(2)
    for bad, message in [(tokens(2, 1), "tokens has shape"), (torch.tensor([V, 0]), "holds"), (tokens(3), "2 rows")]:
        with pytest.raises(ArgumentError, match=message):
            model.step(bad, state)


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.ones(2, 4, dtype=torch.int64), r"attention_mask has shape \(2, 4\), expected \(B, T\)"),
        (torch.ones(5, dtype=torch.int64), "attention_mask has shape"),
        (torch.full((2, 5), 2), "other than 0 and 1"),
        (torch.tensor([[0.0, 0, 0, -torch.inf, -torch.inf]] * 2), "other than 0 and 1"),
    ],
)
def test_bad_masks(model, bad, message):
    with pytest.raises(ArgumentError, match=message):
        model(tokens(2, 5), attention_mask=bad)


def test_mask_and_borders_exclude_each_other(model):
    with pytest.raises(ArgumentError, match="not both"):
        model(tokens(1, 4), cu_seqlens=torch.tensor([0, 4]), attention_mask=torch.ones(1, 4))


def test_bad_states(model):
    state = model.init_state(2)
    with pytest.raises(ArgumentError, match="not a tuple of 4, one per block"):
        model(tokens(2, 3), state[:2])
    with pytest.raises(ArgumentError, match="2 rows, expected 3"):
        model(tokens(3, 3), state)
    with pytest.raises(ArgumentError, match="2 rows, expected 1"):
        model(tokens(1, 3), state, cu_seqlens=torch.tensor([0, 3]))
    broken = (*state[:2], (*state[2], *state[2], state[1]), state[3])
    with pytest.raises(ArgumentError, match="one state per mixer"):
        model(tokens(2, 3), broken)


def test_bad_targets_and_borders(model):
    x = tokens(2, 5)
    with pytest.raises(ArgumentError, match=r"targets has shape \(2, 4\)"):
        model.loss(x, x[:, 1:])
    with pytest.raises(ArgumentError, match=f"targets holds {V}"):
        model.loss(x, torch.full_like(x, V))
    with pytest.raises(ArgumentError, match=r"targets is torch.float32"):
        model.loss(x, x.float())
    with pytest.raises(ArgumentError, match="cu_seqlens"):
        model.loss(x[:1], cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ArgumentError, match="batch axis must be 1"):
        model(x, cu_seqlens=torch.tensor([0, 5]))
