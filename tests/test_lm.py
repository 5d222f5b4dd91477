"""The language model: one function in every form, its loss, its initialisation, its errors."""

import copy
import gc
import math
import re
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dualform.core.errors import ArgumentError
from dualform.core.packing import from_lengths
from dualform.core.tree import clone, detach, leaves, take
from dualform.layers.attention import AttentionConfig
from dualform.layers.hyena import HyenaConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.s4 import S4Config
from dualform.layers.s4d import S4DConfig
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
    "S": (S4DConfig(d_state=4),),
    "4": (S4Config(d_state=4),),
    "y": (HyenaConfig(l_max=16),),
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


@pytest.mark.parametrize("options", [{}, {"logit_cap": 3.0}, {"tie_embeddings": False, "head_bias": True}], ids=str)
@pytest.mark.parametrize("name", ["", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_where_no_target_counts_stays_there(options, name, value):
    model, x, targets = build("MF", **options), tokens(3, 6), tokens(3, 6).clone()
    targets[1] = targets[2, 3:] = -100

    def run(h):
        h = h.detach().requires_grad_()
        with backend(name):
            loss = model.head_loss(h, targets)
            head = model.embed.weight if model.head is None else model.head.weight
            return [loss, *torch.autograd.grad(loss, [h, head])]

    h = model.features(x)[0]
    want = run(h)
    close(want[0], model.loss(x, targets))
    close(run(h.masked_fill((targets == -100)[..., None], value)), want)


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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # PyTorch's compiler
def test_loss_in_float16_is_scaled_with_the_loss(autocast, device):
    """Of many tokens of one class the sum of the gradients passes the greatest float16, and their mean does not."""
    torch.manual_seed(0)
    h = (1 + torch.rand(2**18, 4)).to(device, torch.float32 if autocast else torch.float16).requires_grad_()
    weight = (torch.randn(8, 4) / 50).to(device, h.dtype).requires_grad_()
    targets = torch.zeros(len(h), dtype=torch.int64, device=device)
    with torch.autocast(device, torch.float16, enabled=autocast):
        loss = linear_loss.linear_cross_entropy(h, weight, targets) / len(h)
    (loss * 2.0**12).backward()
    got, want = (h.grad, weight.grad), (h.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    (F.cross_entropy(want[0] @ want[1].T, targets) * 2.0**12).backward()
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), exact.grad, rtol=5e-3, atol=5e-3 * exact.grad.abs().max().item())


def test_loss_of_one_token_under_a_large_scale():
    h, weight = torch.randn(1, 4).half().requires_grad_(), (torch.randn(8, 4) / 1000).half().requires_grad_()
    (linear_loss.linear_cross_entropy(h, weight, torch.tensor([3])) * 2.0**16).backward()  # no float16
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("given", [False, True])
def test_loss_with_a_mask_is_that_of_the_rows_without_padding(model, given):
    x, keep = tokens(3, 8), torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0, 0, 0]])
    targets = tokens(3, 9)[:, 1:] if given else None
    with torch.no_grad():
        before = model(tokens(3, 5))[1]
    total = count = 0
    for i in range(3):
        row = keep[i] == 1
        text, want = x[i][row][None], None if targets is None else targets[i][row][None]
        counted = text.shape[1] - (0 if given else 1)
        loss, after = model.loss_and_state(text, want, take(before, [i]))
        total, count = total + loss * counted, count + counted
    loss, state = model.loss_and_state(x, targets, clone(before), attention_mask=keep)
    close(loss, total / count)
    close(model.loss(x, targets, clone(before), attention_mask=keep.bool()), loss)
    prefix(take(state, [2]), after)


def test_truncated_backpropagation_stops_at_the_detached_state():
    model, x, targets = build("mM"), tokens(2, 12), tokens(2, 13)[:, 1:]
    want = model.loss(x, targets)
    losses, state = [], None
    for piece, answers in zip(x.split(4, 1), targets.split(4, 1), strict=True):
        loss, state = model.loss_and_state(piece, answers, state)
        assert any(leaf.requires_grad for leaf in leaves(state))
        loss.backward()
        state = detach(state)
        assert not any(leaf.requires_grad for leaf in leaves(state))
        losses.append(loss.detach())
    close(torch.stack(losses).mean(), want.detach())


@pytest.fixture
def unwatched() -> Iterator[None]:
    """The collector of garbage leaves alone whatever was there before, and takes no time for it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_a_loop_of_steps_without_gradients_keeps_nothing(unwatched):
    """Live tensors after many steps are those after few, under inference mode or detached; recorded, they grow."""

    def live(loop):
        gc.collect()
        seen = {id(o) for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}
        state = loop()
        nodes, todo = set(), [leaf.grad_fn for leaf in leaves(state)]
        while todo:
            node = todo.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                todo.extend(n for n, _ in node.next_functions)
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and id(o) not in seen]
        return len(tensors), len(nodes)

    model, text = build("S" * 2), tokens(1, 40)[0]

    def loop(steps, cut):
        def run():
            state = model.init_state(1)
            for token in text[:steps]:
                _, state = model.step(token[None], state)
                state = detach(state) if cut else state
            return state

        return run

    with torch.inference_mode():
        assert live(loop(40, False)) == live(loop(5, False))
    assert live(loop(40, True)) == live(loop(5, True))
    assert live(loop(40, False))[1] > live(loop(5, False))[1]  # asked for, gradients are recorded


@pytest.mark.parametrize("pattern", ["A", "S", "y", "M"])
def test_linear_maps_may_be_wrapped(pattern):
    """Dynamic quantisation puts modules in place of the linear maps whose weight is no tensor."""
    model = build(pattern, torch.float32, tie_embeddings=False).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    x, rounding = tokens(2, 9), 0.5 if pattern == "y" else 0.1  # eight bits for the sines of a filter are few
    with torch.no_grad():
        (logits, _), want = quantised(x), model(x)[0]
        assert (logits - want).norm() < rounding * want.norm()
        _, state = quantised(x[:, :8], quantised.init_state(2))
        last, _ = quantised.step(x[:, 8], state)
        assert (last - want[:, 8]).norm() < rounding * want.norm()
        torch.testing.assert_close(quantised.loss(x), model.loss(x), rtol=rounding, atol=0)


# --- intervals and rate ---


def test_intervals_and_rate_reach_every_mixer():
    """One block, and its mixer by hand."""
    model, x = build("S"), tokens(2, 6)
    block = model.blocks[0]
    times, h = torch.rand(2, 6, dtype=torch.float64) + 0.5, model.embed(x)
    mixer, norm = block.parts[0], block.norms[0]
    want = h + mixer(norm(h), intervals=times, rate=2.0)[0]
    close(model(x, intervals=times, rate=2.0)[0], model.logits(model.norm(want)))
    assert not torch.equal(model(x)[0], model(x, intervals=times)[0])
    assert not torch.equal(model(x)[0], model(x, rate=2.0)[0])
    close(model(x, intervals=torch.ones(2, 6), rate=1.0)[0], model(x)[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_intervals_in_every_form(recompute):
    model, x = build("mSM"), tokens(2, 7)
    model.recompute = recompute
    times = torch.rand(2, 7, dtype=torch.float64) + 0.5
    want, final = model(x, intervals=times)
    y, state = model(x[:, :5], intervals=times[:, :5])
    late, state = model.step(x[:, 5], state, interval=times[:, 5])
    last, state = model.step(x[:, 6], state, interval=times[:, 6])
    close(torch.cat([y, late[:, None], last[:, None]], 1), want)
    close(leaves(state), leaves(final))
    packed, _ = model(x.reshape(1, 14), intervals=times.reshape(1, 14), cu_seqlens=torch.tensor([0, 7, 14]))
    close(packed.view_as(want), want)
    keep = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
    padded, left = model(x, intervals=times, attention_mask=keep)
    first, state = model(x[1:, :3], intervals=times[1:, :3])
    close(padded[1:, :3], first)
    close(leaves(take(left, [1])), leaves(state))
    close(
        model.loss(x, intervals=times),
        model.loss(x.reshape(1, 14), intervals=times.reshape(1, 14), cu_seqlens=torch.tensor([0, 7, 14])),
    )


@pytest.mark.parametrize("pattern, name", [("MA", "part 'A': .*Attention"), ("SL", "part 'L': .*LSTM"), ("4", "S4")])
def test_intervals_are_refused_by_name(pattern, name):
    model, x = build(pattern), tokens(2, 3)
    message = "LanguageModel: .*intervals is given, and .* does not take it"
    for call in (model, model.features, model.loss):
        with pytest.raises(ArgumentError, match=name) as error:
            call(x, intervals=torch.ones(2, 3))
        assert re.search(message, str(error.value))
    with pytest.raises(ArgumentError, match=f"{name} .*|interval is given"):
        model.step(x[:, 0], model.init_state(2), interval=torch.ones(2))


def test_rate_is_refused_by_name_and_taken_by_s4():
    x = tokens(2, 3)
    model = build("M")
    for call in (model, model.loss):
        with pytest.raises(ArgumentError, match="part 'M': rate is given, and Mamba2 does not take it"):
            call(x, rate=2.0)
    with pytest.raises(ArgumentError, match="part 'M': rate is given"):
        model.step(x[:, 0], model.init_state(2), rate=0.5)
    model = build("4F")
    want, _ = model(x, rate=0.5)
    y, state = model(x[:, :2], rate=0.5)
    close(torch.cat([y, model.step(x[:, 2], state, rate=0.5)[0][:, None]], 1), want)


def test_bad_intervals():
    model, x = build("M"), tokens(2, 3)
    with pytest.raises(ArgumentError, match=r"LanguageModel: intervals has shape \(2, 4\)"):
        model(x, intervals=torch.ones(2, 4))
    with pytest.raises(ArgumentError, match="LanguageModel: interval has shape"):
        model.step(x[:, 0], model.init_state(2), interval=torch.ones(2, 1))


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
        (torch.zeros(2, 5), "attention_mask is torch.float32 and 0 everywhere"),
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
