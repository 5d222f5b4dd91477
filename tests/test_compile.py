"""Compiled whole, without a graph break, every mixer is the same function, one program for all lengths and batches."""

import io
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dualform.check.cases import CASES, Case
from dualform.core.forms import packed, whole
from dualform.core.laws import compare_gradients, gradients
from dualform.core.packing import Packing
from dualform.core.tree import clone, leaves
from dualform.layers.registry import MIXERS
from dualform.models.linear_loss import linear_cross_entropy
from dualform.ops import backend

ONE_OF_EACH = {case.kind: case for case in CASES.values() if case.kind in MIXERS and case.name.endswith("d=3")}
DYNAMIC = {**ONE_OF_EACH, "attention window": CASES["attention window d=17"], "hyena long": CASES["hyena long d=1"]}
ONE_OF_EACH["lm"] = CASES["lm mamba2 + shared attention"]
SHAPES = ((13, 21), (6, 11), (14, 310), (2, 250))  # batches and lengths, unlike any width: a compiler ties equal sizes

every_dynamic = pytest.mark.parametrize("case", DYNAMIC.values(), ids=list(DYNAMIC))

pytestmark = [  # while it traces, the compiler trips over warnings of its own library
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]


def steps(f, x, state, borders):
    return f.step(x[:, 0], state)


FORMS = {
    "from a state": lambda f, x, state, borders: f(x, state),
    "packed from a state": lambda f, x, state, borders: f(x.flatten(0, 1)[None], state, cu_seqlens=borders),
    "step": steps,
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A compiler that has seen nothing, and takes ``torch.nn.LSTM``, which is off by default."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield


@pytest.mark.parametrize("case", ONE_OF_EACH.values(), ids=list(ONE_OF_EACH))
def test_compiled_equals_eager(case: Case):
    trial = case.trial(5)
    compiled = torch.compile(trial.f.forward, fullgraph=True, backend="aot_eager", dynamic=False)
    got = gradients(trial, lambda f, x, state: compiled(x, state), "both")
    found = compare_gradients(got, gradients(trial, whole, "both"), "compiled")
    assert found.error <= 1e-9, found


def test_every_mixer_is_compiled():
    assert set(ONE_OF_EACH) == {*MIXERS, "lm"}


@every_dynamic
def test_compiled_and_packed_equals_eager(case: Case):
    check_packed(case, known=False)


@pytest.mark.parametrize("kind", ["mamba2", "attention", "s4"])
def test_compiled_with_a_known_packing_equals_eager(kind: str):
    check_packed(ONE_OF_EACH[kind], known=True)


def check_packed(case: Case, known: bool) -> None:
    """Forward and backward, the borders given as a tensor or as what was made of one before.

    What differs between packings may not become a constant. Other sizes stay what they are: as symbols, which they are
    in the programs below, they take the compiler half of its time for a backward.
    """
    trial = case.trial(9)
    compiled = torch.compile(trial.f.forward, fullgraph=True, backend="aot_eager", dynamic=known or None)

    class Compiled:
        def forward(self, x: Tensor, state, *, cu_seqlens: Tensor):
            if known:
                return compiled(x, state, cu_seqlens=Packing.of("test", cu_seqlens, x))
            for tensor, size in ((x, 1), (cu_seqlens, 0), *((leaf, 0) for leaf in leaves(state))):
                torch._dynamo.mark_dynamic(tensor, size)
            return compiled(x, state, cu_seqlens=cu_seqlens)

    form = packed(trial.lengths)
    got = gradients(trial, lambda f, x, state: form(Compiled(), x, state), "both")
    found = compare_gradients(got, gradients(trial, form, "both"), "compiled")
    assert found.error <= 1e-9, found


@pytest.mark.parametrize("form", FORMS)
@every_dynamic
def test_one_program_serves_all_lengths_and_batches(case: Case, form: str):
    f, programs = case.trial(1).f, []

    def count(graph, inputs):
        programs.append(graph)
        return graph.forward

    compiled = torch.compile(FORMS[form], dynamic=True, fullgraph=True, backend=count)
    with torch.no_grad():
        for batch, length in SHAPES:
            x = case.sample(batch, length, torch.Generator())
            borders = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(batch * length, (batch,)).sort()[0]])
            borders[-1] = batch * length
            state = f.init_state(batch, max_len=batch * length + 7)
            _, state = f(x[:, :7], state)
            got = compiled(f, x, clone(state), borders)
            torch.testing.assert_close(got[0], FORMS[form](f, x, clone(state), borders)[0])
    assert len(programs) == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["attention", "hyena long"])
def test_a_full_cache_is_told_by_the_rows_it_belongs_to(name: str, form: str):
    """A compiled program can neither grow a cache nor raise for it: rows that fit are right, the others NaN."""
    case, batch, length = DYNAMIC[name], 3, 5
    f, x = case.trial(1).f, case.sample(batch, length, torch.Generator())
    state, borders = f.init_state(batch, max_len=8), torch.arange(batch + 1) * length
    _, state = f(x[:, :1], state)
    state = state._replace(length=torch.tensor([1, 8 - (1 if form == "step" else length), 8]))
    compiled = torch.compile(FORMS[form], dynamic=True, fullgraph=True, backend="eager")
    with torch.no_grad():
        y, after = compiled(f, x, clone(state), borders)
        want, _ = FORMS[form](f, x, clone(state), borders)
    y, want = (m.reshape(batch, -1, m.shape[-1]) for m in (y, want))
    torch.testing.assert_close(y[:2], want[:2])
    assert y[2].isnan().all()
    if form == "step":
        assert compiled(f, x, after, borders)[0][1:].isnan().all()


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_portable_operators_are_compiled_and_exported(kind: str):
    """As where no kernels are."""
    with backend("torch"):
        check_packed(ONE_OF_EACH[kind], known=False)
        check_exported(ONE_OF_EACH[kind])


@every_dynamic
def test_a_mixer_is_exported_with_dynamic_batch_and_time(case: Case):
    check_exported(case)


def check_exported(case: Case) -> None:
    f, file = case.trial(1).f.eval(), io.BytesIO()
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("time", min=2)}
    x = case.sample(*SHAPES[0], torch.Generator())
    torch.export.save(torch.export.export(f, (x,), dynamic_shapes=(sizes,)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for shape in SHAPES:
        x = case.sample(*shape, torch.Generator())
        y, state = loaded(x)
        want, last = f(x)
        torch.testing.assert_close(y, want)
        assert type(state) is type(last)


def test_the_loss_is_compiled_by_any_compiler():
    """Inductor subtracts a mask from numbers; PyTorch itself, which other compilers call, does not."""
    h, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    targets = torch.tensor([0, 8, -100, 3, 3, 1])
    want = linear_cross_entropy(h, weight, targets)
    got = torch.compile(linear_cross_entropy, fullgraph=True, backend="eager")(h, weight, targets)
    torch.testing.assert_close(got, want)
    wanted, found = (torch.autograd.grad(loss, (h, weight)) for loss in (want, got))
    torch.testing.assert_close(found, wanted)
