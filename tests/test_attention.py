"""Attention against a loop over tokens, its cache against running everything at once."""

import math
import sys

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.tree import clone, leaves
from dualform.layers.attention import Attention, AttentionConfig, AttentionState
from dualform.layers.rotary import rotate
from vectors import close

CONFIGS = {
    "plain": (AttentionConfig(heads=2), 6),
    "grouped": (AttentionConfig(heads=4, kv_heads=2, d_head=5, bias=True), 17),
    "one key head, no positions": (AttentionConfig(heads=3, kv_heads=1, rope=None), 3),
    "window": (AttentionConfig(heads=2, kv_heads=1, d_head=4, window=4), 7),
    "window of one": (AttentionConfig(heads=2, d_head=3, window=1), 5),
    "smallest": (AttentionConfig(heads=1), 1),
}


@pytest.fixture(params=CONFIGS)
def layer(request: pytest.FixtureRequest) -> Attention:
    torch.manual_seed(0)
    config, d_model = CONFIGS[request.param]
    return config.build(d_model).double()


def sample(layer: Attention, *shape: int) -> Tensor:
    return torch.randn(*shape, layer.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def turned(vector: list[float], position: int, base: float | None) -> list[float]:
    """The rotary embedding of one head at one position, in complex numbers."""
    half, out = len(vector) // 2, list(vector)
    for i in range(half if base is not None else 0):
        angle = position * base ** (-2 * i / (2 * half))
        z = complex(vector[i], vector[i + half]) * complex(math.cos(angle), math.sin(angle))
        out[i], out[i + half] = z.real, z.imag
    return out


def oracle(layer: Attention, x: Tensor) -> Tensor:
    """One row ``(T, D)``: every softmax written out, one query and one head at a time."""
    H, G, P = layer.heads, layer.kv_heads, layer.d_head
    base = None if layer.rope is None else layer.rope.base
    rows = []
    for x_t in x:
        qkv = layer.qkv_proj(x_t).view(H + 2 * G, P)
        rows.append((qkv[:H], qkv[H : H + G], qkv[H + G :]))
    outputs = []
    for t, (q, _, _) in enumerate(rows):
        heads = []
        for h in range(H):
            first = 0 if layer.window is None else max(0, t - layer.window + 1)
            query = torch.tensor(turned(q[h].tolist(), t, base), dtype=x.dtype)
            scores, values = [], []
            for s in range(first, t + 1):
                key = torch.tensor(turned(rows[s][1][h // (H // G)].tolist(), s, base), dtype=x.dtype)
                scores.append(float(query @ key) / math.sqrt(P))
                values.append(rows[s][2][h // (H // G)])
            weights = [math.exp(score - max(scores)) for score in scores]
            heads.append(sum(w / sum(weights) * v for w, v in zip(weights, values, strict=True)))
        outputs.append(layer.out_proj(torch.cat(heads)))
    return torch.stack(outputs)


def test_oracle(layer: Attention) -> None:
    x = sample(layer, 2, 11)
    with torch.no_grad():
        y, _ = layer(x)
        for row, got in zip(x, y, strict=True):
            close(got, oracle(layer, row), 1e-12)


@pytest.mark.parametrize("sizes", [(11,), (4, 7), (1, 9, 1), (3, 3, 5), (1,) * 11])
@pytest.mark.parametrize("grad", [True, False])
def test_split(layer: Attention, sizes: tuple[int, ...], grad: bool) -> None:
    x = sample(layer, 2, 11)
    with torch.set_grad_enabled(grad):
        want, _ = layer(x)
        state, outputs = layer.init_state(2, max_len=5), []
        for part in x.split(list(sizes), 1):
            y, state = layer(part, state)
            outputs.append(y)
    close(torch.cat(outputs, 1), want, 1e-12)
    assert state.length.tolist() == [11, 11]


@pytest.mark.parametrize("lengths", [(3, 5, 0, 1), (0, 0, 2), (1, 1, 1), (0, 0), (13, 2, 3, 9)])
@pytest.mark.parametrize("grad", [True, False])
def test_packed_from_ragged_states(layer: Attention, lengths: tuple[int, ...], grad: bool) -> None:
    """Rows that have seen different numbers of tokens go on by different numbers of tokens."""
    n = len(lengths)
    before, x = sample(layer, n, 6), sample(layer, 1, sum(lengths))
    seen = [(5 * i) % 7 for i in range(n)]
    with torch.set_grad_enabled(grad):
        _, state = layer(
            torch.cat([row[:k] for row, k in zip(before, seen, strict=True)])[None], cu_seqlens=borders(seen)
        )
        y, state = layer(x, state, cu_seqlens=borders(lengths).int())
        for i, part in enumerate(x[0].split(list(lengths))):
            _, alone = layer(before[i : i + 1, : seen[i]])
            want, alone = layer(part[None], alone)
            if lengths[i]:
                start = sum(lengths[:i])
                close(y[:, start : start + lengths[i]], want, 1e-12, f"row {i}")
            assert int(state.length[i]) == seen[i] + lengths[i]
            if seen[i] + lengths[i]:
                room = min(seen[i] + lengths[i], state.k.shape[1])
                close(state.k[i, :room], alone.k[0, :room], 1e-12, f"keys of row {i}")
                close(state.v[i, :room], alone.v[0, :room], 1e-12, f"values of row {i}")
            assert not state.k[i, seen[i] + lengths[i] :].any()
    assert y.shape == x.shape


def borders(lengths: tuple[int, ...] | list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def test_gradients_through_the_state(layer: Attention) -> None:
    """Gradients of parameters, input and the cache's keys and values: stepped and packed as in one call."""
    x, _ = sample(layer, 1, 5).requires_grad_(), torch.manual_seed(2)
    _, warm = layer(sample(layer, 1, 6)[:, :3])
    weights = torch.randn(5, layer.d_model, dtype=torch.float64)

    def gradients(sizes: tuple[int, ...], packed: bool) -> list[Tensor]:
        start = AttentionState(warm.k.detach().requires_grad_(), warm.v.detach().requires_grad_(), warm.length)
        state, outputs = clone(start), []
        for part in x.split(list(sizes), 1):
            y, state = layer(part, state, cu_seqlens=borders([part.shape[1]]) if packed else None)
            outputs.append(y)
        loss = (torch.cat(outputs, 1) * weights).sum() + state.k.square().sum() + state.v.square().sum()
        return list(torch.autograd.grad(loss, [x, start.k, start.v, *layer.parameters()]))

    want = gradients((5,), False)
    for sizes, packed in [((1,) * 5, False), ((2, 3), False), ((2, 3), True), ((5,), True)]:
        for i, (got, expected) in enumerate(zip(gradients(sizes, packed), want, strict=True)):
            close(got, expected, 1e-11, f"{sizes} {packed} {i}")
    assert all(g.any() for g in want[1:3]) or layer.window == 1


def test_blocks_of_queries(layer: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prefill is cut into blocks of queries; the cut does not show."""
    x = sample(layer, 2, 70)
    _, state = layer(x[:, :9])
    want, _ = layer(x[:, 9:], clone(state))
    monkeypatch.setattr(sys.modules["dualform.ops.attention"], "_SCORES", 1)
    got, _ = layer(x[:, 9:], clone(state))
    close(got, want, 1e-12)


def test_capacity() -> None:
    """Without a window capacity is ``max_len``, at least doubled when exceeded; with one it is the window."""
    layer = AttentionConfig(heads=1).build(2)
    state, sizes = layer.init_state(1, max_len=3), []
    with torch.no_grad():
        for _ in range(8):
            _, state = layer.step(torch.randn(1, 2), state)
            sizes.append(state.k.shape[1])
    assert sizes == [3, 3, 3, 6, 6, 6, 12, 12]
    assert state.k[:, :8].all() and not state.k[:, 8:].any()
    windowed = AttentionConfig(heads=1, window=5).build(2)
    assert windowed.init_state(2, max_len=100).k.shape == (2, 5, 1, 2)
    assert windowed(torch.randn(2, 3, 2))[1].k.shape == (2, 5, 1, 2)
    assert windowed(torch.randn(2, 9, 2))[1].k.shape == (2, 5, 1, 2)


def test_a_state_keeps_its_dtype() -> None:
    layer = AttentionConfig(heads=2, kv_heads=1).build(4)
    state = layer.init_state(1, max_len=8)
    half = AttentionState(state.k.bfloat16(), state.v.bfloat16(), state.length)
    x = torch.randn(1, 6, 4)
    y, after = layer(x, half)
    assert (after.k.dtype, after.v.dtype, y.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    close(y, layer(x)[0], 3e-2)
    stepped = clone(AttentionState(state.k.bfloat16(), state.v.bfloat16(), state.length))
    for t in range(6):
        y_t, stepped = layer.step(x[:, t], stepped)
        close(y_t, y[:, t], 1e-5)


def test_a_state_of_inference_mode_goes_on_outside() -> None:
    layer, x = AttentionConfig(heads=1).build(2), torch.randn(1, 4, 2)
    with torch.inference_mode():
        _, state = layer(x[:, :3], layer.init_state(1, max_len=8))
    with torch.no_grad():
        y, _ = layer.step(x[:, 3], state)
        close(y, layer(x)[0][:, 3], 1e-5)


def test_a_fork_by_expanding_is_not_written_to() -> None:
    layer, x = AttentionConfig(heads=1).build(2), torch.randn(3, 1, 2)
    with torch.no_grad():
        _, state = layer(torch.randn(1, 4, 2), layer.init_state(1, max_len=8))
        forked = AttentionState(state.k.expand(3, -1, -1, -1), state.v.expand(3, -1, -1, -1), state.length.expand(3))
        y, _ = layer(x, forked)
        for i in range(3):
            close(y[i : i + 1], layer(x[i : i + 1], clone(state))[0], 1e-5)


def test_autocast_and_low_precision() -> None:
    layer, x = AttentionConfig(heads=2, kv_heads=1, window=4).build(8), torch.randn(1, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
        again, _ = layer(x, layer.init_state(1))
    close(y, layer(x)[0], 5e-2)
    close(again, y, 2e-2)
    low = layer.bfloat16()
    y, state = low(x.bfloat16())
    assert y.dtype == torch.bfloat16 and {leaf.dtype for leaf in leaves(state)} == {torch.bfloat16, torch.int64}


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = AttentionConfig(heads=2).build(4)
        y, state = layer(torch.empty(2, 5, 4), layer.init_state(2, max_len=4))
    assert y.shape == (2, 5, 4) and state.k.shape[1] >= 5


def test_compiles_to_one_graph() -> None:
    layer, x = AttentionConfig(heads=2, kv_heads=1).build(4), torch.randn(2, 3, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        want, _ = layer(x)
        y, state = compiled(x[:, :2], layer.init_state(2, max_len=4))
        last, _ = compiled(x[:, 2:], state)
        close(torch.cat([y, last], 1), want, 1e-5)
        _, full = layer(x[:, :2], state)
        y, _ = compiled(x[:, 2:], full)  # a token too many
        assert bool(y.isnan().all())


@pytest.mark.parametrize(
    "config, d_model, words",
    [
        (AttentionConfig(heads=4), 6, "multiple of heads 4"),
        (AttentionConfig(heads=4, kv_heads=3), 8, "multiple of kv_heads 3"),
        (AttentionConfig(heads=0), 8, "heads is 0"),
        (AttentionConfig(heads=2, kv_heads=0), 8, "kv_heads is 0"),
        (AttentionConfig(heads=2, window=0), 8, "window is 0"),
        (AttentionConfig(heads=2, d_head=0), 8, "d_head is 0"),
        (AttentionConfig(heads=2, rope=0.0), 8, "rope is 0"),
        (AttentionConfig(heads=2, d_rope=5), 8, "d_rope is 5, expected 1 to d_head = 4"),
        (AttentionConfig(heads=2, d_conv=-1), 8, "d_conv is -1"),
    ],
)
def test_a_config_that_cannot_be_built(config: AttentionConfig, d_model: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.build(d_model)


def test_wrong_tensors_are_named() -> None:
    layer = AttentionConfig(heads=2, window=3).build(4)
    with pytest.raises(ArgumentError, match="x has shape"):
        layer(torch.randn(2, 3, 5))
    with pytest.raises(ArgumentError, match="state has 3 rows, expected 2"):
        layer(torch.randn(2, 3, 4), layer.init_state(3))
    with pytest.raises(ArgumentError, match=r"state\.k has shape"):
        layer(torch.randn(2, 3, 4), AttentionConfig(heads=2, window=4).build(4).init_state(2))


def test_rotary_is_relative_and_far_positions_stay_exact() -> None:
    """The product of a turned query and key depends on their distance, a million tokens out as at the start."""
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    products = []
    for start in (0, 1_000_003):
        at = torch.tensor([[start]])
        products.append((rotate(q, at + 5) * rotate(k, at)).sum())
    close(products[1], products[0], 1e-4)
    odd = torch.randn(1, 2, 1, 5)
    assert torch.equal(rotate(odd, torch.tensor([[3, 4]]))[..., 4], odd[..., 4])
    assert torch.equal(rotate(odd[..., :1], torch.tensor([[3, 4]])), odd[..., :1])


def test_no_rows_and_no_tokens() -> None:
    layer = AttentionConfig(heads=2).build(4)
    for rows, length in ((0, 3), (2, 0)):
        y, state = layer(torch.empty(rows, length, 4), layer.init_state(rows))
        assert y.shape == (rows, length, 4) and state.length.tolist() == [0] * rows
