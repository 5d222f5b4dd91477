"""H3 against the original's numbers and against the two recurrences of the paper, written out."""

import pytest
import torch
from torch import Tensor

from dualform.core.errors import ArgumentError, ConfigError
from dualform.layers.h3 import H3, H3Config, H3State
from vectors import close, load

CONFIGS = {
    "one channel a head": (H3Config(d_state=6), 3),
    "wide heads": (H3Config(d_state=4, d_head=3, rule="bilinear", init="legs", dt_max=0.5), 6),
    "one head": (H3Config(d_state=2, d_head=2, init="inv", bias=False, dt_min=0.5, dt_max=2.0), 2),
}


@pytest.fixture(params=CONFIGS)
def layer(request: pytest.FixtureRequest) -> H3:
    torch.manual_seed(0)
    config, d_model = CONFIGS[request.param]
    return config.build(d_model).double()


def sample(layer: H3, rows: int, length: int, states: int | None = None) -> tuple[Tensor, H3State]:
    draw = torch.Generator().manual_seed(1)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, dtype=like.dtype, generator=draw).requires_grad_()

    state = layer.init_state(rows if states is None else states)
    return random(torch.empty(rows, length, layer.d_model, dtype=torch.float64)), H3State(*map(random, state))


def oracle(layer: H3, x: Tensor, state: H3State) -> tuple[Tensor, H3State]:
    """A shift register of keys, then ``h = Abar h + Bbar k v`` with both poles of every pair, a head at a time."""
    width, dt = layer.config.d_head, layer.log_dt.exp()[:, None]
    A, C = -layer.log_A_re.exp() + 1j * layer.A_im, torch.view_as_complex(layer.C)
    if layer.config.rule == "zoh":
        Abar, Bbar = torch.exp(dt * A), (torch.exp(dt * A) - 1) / A
    else:
        Abar, Bbar = (1 + dt / 2 * A) / (1 - dt / 2 * A), dt / (1 - dt / 2 * A)
    line, h, outputs = state.shift, state.h, []
    for x_t in x.unbind(1):
        q, k, v = layer.qkv_proj(x_t).chunk(3, -1)
        line = torch.cat([line, k[..., None]], -1)
        k = torch.stack([layer.shift[:, j] * line[..., -1 - j] for j in range(layer.config.d_state)]).sum(0)
        line, y, new = line[..., 1:], torch.zeros_like(q), torch.zeros_like(h)
        for head in range(layer.heads):
            for j in range(width):
                for i in range(width):
                    a, b = head * width + i, head * width + j
                    u = k[:, a] * v[:, b]
                    state_t = Abar[head] * h[:, head, i, j] + Bbar[head] * u[:, None]
                    both = C[head] * state_t + C[head].conj() * state_t.conj()
                    z = both.sum(-1).real + layer.D[head] * u
                    new = new.index_put((torch.arange(len(x)), *map(torch.tensor, (head, i, j))), state_t)
                    y = y.index_put((torch.arange(len(x)), torch.tensor(b)), q[:, a] * z, accumulate=True)
        h = new
        outputs.append(layer.out_proj(y))
    return torch.stack(outputs, 1), H3State(line, h)


def gradients(layer: H3, x: Tensor, state: H3State, y: Tensor, last: H3State) -> tuple[Tensor, ...]:
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    loss = loss + last.shift.pow(3).sum() / 10 + torch.view_as_real(last.h).pow(3).sum() / 10
    return torch.autograd.grad(loss, [x, *state, *layer.parameters()])


@pytest.mark.parametrize("length", [1, 2, 21, 66])
def test_oracle(layer: H3, length: int) -> None:
    x, state = sample(layer, 2, length)
    y, last = layer(x, state)
    want, want_last = oracle(layer, x, state)
    close(y, want, 1e-12)
    for got, expected in zip(last, want_last, strict=True):
        close(got, expected, 1e-12)
    pairs = zip(gradients(layer, x, state, y, last), gradients(layer, x, state, want, want_last), strict=True)
    for got, expected in pairs:
        close(got, expected, 1e-10)


@pytest.mark.parametrize("lengths", [(3, 0, 130, 64, 1), (0, 0), (5,)])
def test_packed(layer: H3, lengths: tuple[int, ...]) -> None:
    x, state = sample(layer, 1, sum(lengths), len(lengths))
    y, last = layer(x, state, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int())
    rows = [H3State(*(leaf[i : i + 1] for leaf in state)) for i in range(len(lengths))]
    parts = [layer(part, row) for part, row in zip(x.split(list(lengths), 1), rows, strict=True)]
    want, want_last = torch.cat([p[0] for p in parts], 1), zip(*[p[1] for p in parts], strict=True)
    for got, expected in zip(last, want_last, strict=True):
        close(got, torch.cat(expected), 1e-12)
    assert y.shape == x.shape
    if sum(lengths):
        close(y, want, 1e-12)


def golden(name: str, config: H3Config, dtype: torch.dtype) -> tuple[H3, dict[str, Tensor]]:
    """The layer with the original's weights; its input vector of the diagonal model is part of C here."""
    case = load(name)
    layer, width = config.build(6).to(dtype), config.d_head
    B, C = case["sd.ssm_k_kernel.kernel.B"], case["sd.ssm_k_kernel.kernel.C"][0]
    taps = torch.stack([(B[:, : 8 - j] * C[:, j:]).sum(1) for j in range(8)], 1)
    taps[:, 0] += case["sd.ssm_k_D"]
    own, diagonal = "sd.kernel.kernel.", torch.view_as_complex(case["sd.kernel.kernel.B"])
    weights = {
        "shift": taps,
        "log_dt": case[own + "log_dt"],
        "log_A_re": case[own + "inv_A_real"],
        "A_im": case[own + "A_imag"],
        "C": torch.view_as_real(torch.view_as_complex(case[own + "C"][0]) * diagonal),
        "D": case["sd.D"],
        "qkv_proj.weight": torch.cat([case[f"sd.{n}_proj.weight"] for n in "qkv"]),
        "qkv_proj.bias": torch.cat([case[f"sd.{n}_proj.bias"] for n in "qkv"]),
        # the original's order is channel of the head, then head
        "out_proj.weight": case["sd.output_linear.weight"].unflatten(1, (width, -1)).transpose(1, 2).flatten(1),
        "out_proj.bias": case["sd.output_linear.bias"],
    }
    layer.load_state_dict(weights)
    return layer, case


@pytest.mark.parametrize(
    "name, config",
    [
        ("h3_headdim1", H3Config(d_state=8, rule="bilinear")),
        ("h3_headdim2", H3Config(d_state=8, d_head=2)),
    ],
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_golden(name: str, config: H3Config, dtype: torch.dtype, tolerance: float) -> None:
    layer, case = golden(name, config, dtype)
    u, u_next = case["u"].to(dtype), case["u_next"].to(dtype)
    close(layer.kernel(21), case["kernel_diag"], tolerance)
    shift = torch.nn.functional.pad(layer.shift.detach(), (0, 21 - 8))
    shift[:, 0] -= case["sd.ssm_k_D"]
    close(shift, case["kernel_shift"], tolerance)
    y, state = layer(u)
    close(y, case["y"], tolerance)
    close(layer(torch.cat([u, u_next], 1))[0], case["y_full"], tolerance)
    for t in range(4):
        y_t, state = layer.step(u_next[:, t], state)
        close(y_t, case["y_full"][:, 21 + t], tolerance)
        if "y_decode" in case:
            close(y_t, case["y_decode"][:, t], tolerance)


def test_golden_states() -> None:
    layer, case = golden("h3_headdim1", H3Config(d_state=8, rule="bilinear"), torch.float64)
    _, state = layer(case["u"])
    B = case["sd.ssm_k_kernel.kernel.B"]
    # place n of the original's line holds sum_j B_j k_{t-(n-j)}; its last place no longer moves an output
    line = state.shift.flip(2)
    want = torch.stack([(B[:, : n + 1] * line[..., : n + 1].flip(2)).sum(2) for n in range(7)], -1)
    close(want, case["state_shift"][..., :7], 1e-10)
    B = torch.view_as_complex(case["sd.kernel.kernel.B"])
    close(state.h[:, :, 0, 0] * B, torch.view_as_complex(case["state_diag"]), 1e-10)


def test_the_state_does_not_grow() -> None:
    layer, x = H3Config(d_state=4, d_head=2).build(4), torch.randn(1, 40, 4)
    shapes = [leaf.shape for leaf in layer.init_state(1)]
    assert [leaf.shape for leaf in layer(x)[1]] == shapes
    assert [leaf.shape for leaf in layer(torch.randn(1, 400, 4), layer(x)[1])[1]] == shapes


def test_low_precision_is_computed_in_float32() -> None:
    layer, x = H3Config(d_state=4).build(4), torch.randn(1, 80, 4)
    want, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
    close(y, want, 5e-2)
    assert [leaf.dtype for leaf in state] == [torch.float32, torch.complex64]
    y, state = layer.bfloat16()(x.bfloat16())
    assert (y.dtype, state.shift.dtype, state.h.dtype) == (torch.bfloat16, torch.float32, torch.complex64)
    y_t, _ = layer.step(x[:, 0].bfloat16(), layer.init_state(1))
    close(y_t, y[:, 0], 5e-2)


@pytest.mark.parametrize(
    "config, words",
    [
        (H3Config(d_state=5), "d_state is 5"),
        (H3Config(init="legt"), "init 'legt' is unknown"),
        (H3Config(rule="euler"), "rule 'euler' is unknown"),
        (H3Config(dt_min=0.0), "dt_min"),
        (H3Config(d_head=3), "d_head is 3"),
        (H3Config(d_head=0), "d_head is 0"),
    ],
)
def test_a_config_that_cannot_be_built(config: H3Config, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config.build(4)


def test_wrong_tensors_are_named() -> None:
    layer = H3Config(d_state=4).build(3)
    with pytest.raises(ArgumentError, match="x has shape"):
        layer(torch.randn(2, 5, 4))
    with pytest.raises(ArgumentError, match="state has 3 rows, expected 2"):
        layer(torch.randn(2, 5, 3), layer.init_state(3))
