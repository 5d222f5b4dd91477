"""What every mixer bears, whatever it computes: empty batches, several processes, quantised maps, known packings."""

import socket
from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dualform.check.cases import CASES, Case
from dualform.core.errors import ArgumentError
from dualform.core.packing import Packing
from dualform.core.tree import leaves
from dualform.layers.registry import MIXERS

MIXER_CASES = {name: case for name, case in CASES.items() if case.kind in MIXERS}
WIDE = {case.kind: case for case in MIXER_CASES.values() if case.name.endswith("d=17")}
WAITS = ("tolist", "item", "nonzero", "__bool__", "__int__", "__index__", "__float__")  # for a device's values
every_mixer = pytest.mark.parametrize("case", MIXER_CASES.values(), ids=list(MIXER_CASES))
one_of_each = pytest.mark.parametrize("case", WIDE.values(), ids=list(WIDE))


@one_of_each
def test_what_does_not_fit_is_named(case: Case):
    """Another width, missing axes, no tensor, another batch, and what is no state of the layer."""
    f, x = case.trial(3).f, case.sample(2, 5, torch.Generator())
    state = f.init_state(2, max_len=9)
    wrong = {
        "width": lambda: f(x[..., :-1]),
        "axes": lambda: f(x[0]),
        "list": lambda: f(x.tolist()),
        "batch": lambda: f(torch.cat([x, x]), state),
        "step of another batch": lambda: f.step(torch.cat([x, x])[:, 0], state),
        "step of another width": lambda: f.step(x[:, 0, :-1], state),
        "step of a sequence": lambda: f.step(x, state),
        "no state of the layer": lambda: f(x, (x,)),
        "borders as a list": lambda: f(x[:1], cu_seqlens=[0, 5]),
        "borders beyond": lambda: f(x[:1], cu_seqlens=torch.tensor([0, 6])),
    }
    for name, call in wrong.items():
        with pytest.raises(ArgumentError):
            pytest.fail(f"{name}: {call()}")


@every_mixer
@pytest.mark.parametrize("grad", [False, True])
def test_no_rows_and_no_steps(case: Case, grad: bool):
    f, width = case.trial(1).f, case.sample(1, 1, torch.Generator()).shape[-1]

    def empty(*shape: int) -> Tensor:
        return torch.zeros(*shape, width, dtype=torch.float64)

    with torch.set_grad_enabled(grad):
        for rows, length in ((0, 3), (2, 0), (0, 0)):
            for state in (None, f.init_state(rows)):
                y, after = f(empty(rows, length), state)
                assert y.shape == (rows, length, width)
                assert all(leaf.shape[0] == rows for leaf in leaves(after))
        y, after = f.step(empty(0), f.init_state(0))
        assert y.shape == (0, width)
        assert all(leaf.shape[0] == 0 for leaf in leaves(after))
        for state in (None, f.init_state(2)):
            y, after = f(empty(1, 0), state, cu_seqlens=torch.tensor([0, 0, 0]))
            assert y.shape == (1, 0, width)
            assert all(leaf.shape[0] == 2 for leaf in leaves(after))


@every_mixer
def test_parameters_and_buffers_have_ordinary_strides(case: Case):
    """As DistributedDataParallel asks; a transposed column counts as contiguous and has others."""
    f = case.trial(1).f
    for name, m in chain(f.named_parameters(), f.named_buffers()):
        assert m.stride() == torch.empty(m.shape).stride(), name


@pytest.fixture
def one_process():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_mixers_train_in_a_process_group(one_process):
    for case in (*WIDE.values(), CASES["hyena long d=1"]):
        trial = case.trial(5)
        model = DistributedDataParallel(trial.f)
        model(trial.inputs)[0].square().sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad), case.name


@one_of_each
@pytest.mark.filterwarnings(r"ignore:[\s\S]*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_linear_maps_and_lstms_may_be_quantised(case: Case):
    """Modules are called, and their weights are not looked into: they may be anything that maps alike."""
    trial = case.trial(9, dtype=torch.float32)
    with torch.no_grad():
        want, _ = trial.f(trial.inputs)
    f = torch.ao.quantization.quantize_dynamic(trial.f, {nn.Linear, nn.LSTM}, torch.qint8)
    with torch.no_grad():
        y, state = f(trial.inputs)
        packed, _ = f(trial.inputs.flatten(0, 1)[None], cu_seqlens=torch.tensor([0, 9, 18, 27, 36]))
        f.step(trial.inputs[:, 0], state)
    torch.testing.assert_close(y, want, rtol=0.1, atol=0.1 * float(want.abs().max()))
    torch.testing.assert_close(packed.view_as(y), y, rtol=0.1, atol=0.1 * float(want.abs().max()))


def watched(name: str, method: Callable[..., Any], asked: list[str]) -> Callable[..., Any]:
    def ask(self: Tensor, *args: Any, **options: Any) -> Any:
        asked.append(name)
        return method(self, *args, **options)

    return ask


@one_of_each
def test_a_known_packing_is_not_read_again(case: Case, monkeypatch: pytest.MonkeyPatch):
    """Once tables have been made, a packed call asks for no values: on a GPU it would wait for them."""
    trial = case.trial(9)
    x = trial.inputs.flatten(0, 1)[None]
    packing, asked = Packing.of("test", torch.tensor([0, 7, 7, 8, 36]), x), []
    trial.f(x, cu_seqlens=packing)
    with monkeypatch.context() as patch:
        for name in WAITS:
            patch.setattr(Tensor, name, watched(name, getattr(Tensor, name), asked))
        trial.f(x, cu_seqlens=packing)[0].sum().backward()
    assert not asked


@pytest.mark.filterwarnings("ignore::dualform.ops.op.SlowBackendWarning")  # of float32, which some kernels refuse
@pytest.mark.gpu
@one_of_each
def test_nothing_waits_for_a_gpu(case: Case):
    trial = case.trial(9, device="cuda", dtype=torch.float32)
    x = trial.inputs.flatten(0, 1)[None]
    packing = Packing.of("test", torch.tensor([0, 7, 7, 8, 36]), x)
    with ExitStack() as stack:
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        torch.cuda.set_sync_debug_mode("error")
        trial.f(x, cu_seqlens=packing)[0].sum().backward()
