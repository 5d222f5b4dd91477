"""Language models compiled whole: one graph for all lengths and batches from 2 on, in every form, and exported.

Every mixer by itself is compiled and exported in ``test_compile.py``; here it is what models add around them.
"""

import io

import pytest
import torch

from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.s4d import S4DConfig
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel

V = 19
PARTS = {
    "A": (AttentionConfig(heads=2, window=11), MLPConfig(d_hidden=24)),
    "M": (MambaConfig(d_state=4),),
    "S": (S4DConfig(d_state=4),),
    "Z": (Mamba2Config(d_state=4, d_head=16),),
}
FORMS = {
    "whole": lambda model, x, state, mask, borders: model(x)[0],
    "state": lambda model, x, state, mask, borders: model(x, state)[0],
    "masked": lambda model, x, state, mask, borders: model(x, state, attention_mask=mask)[0],
    "packed": lambda model, x, state, mask, borders: model(x.reshape(1, -1), state, cu_seqlens=borders)[0],
    "loss": lambda model, x, state, mask, borders: model.loss(x, attention_mask=mask),
    "step": lambda model, x, state, mask, borders: model.step(x[:, 0], state)[0],
}
SHAPES = ((5, 13), (2, 9), (7, 70))  # numbers that are no width of a layer: a compiler takes equal ones for one

pytestmark = [  # while it traces, the compiler trips over warnings of its own library
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]


def build(pattern):
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(V, 16, {letter: PARTS[letter] for letter in pattern}, pattern)).double().eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", ["ZA", "MS"])
def test_one_graph_serves_all_lengths_and_batches(pattern, form):
    torch.compiler.reset()
    model, graphs = build(pattern), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(FORMS[form], dynamic=True, fullgraph=True, backend=backend)
    with torch.no_grad():
        for batch, length in SHAPES:
            x, mask = torch.randint(V, (batch, length)), torch.rand(batch, length) < 0.7
            mask[:, -1], borders = True, torch.arange(batch + 1) * length
            _, state = model(torch.randint(V, (batch, 3)), model.init_state(batch, max_len=batch * length + 3))
            want = FORMS[form](model, x, torch.utils._pytree.tree_map(torch.clone, state), mask, borders)
            torch.testing.assert_close(compiled(model, x, state, mask, borders), want)
    assert len(graphs) == 1


@pytest.mark.parametrize("pattern", ["ZA", "MS"])
def test_a_model_is_exported_with_dynamic_batch_and_time(pattern):
    model, file = build(pattern), io.BytesIO()
    dynamic = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("time", min=2)}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randint(V, SHAPES[0]),), dynamic_shapes=(dynamic,))
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for shape in ((4, 3), (3, 300)):
        x = torch.randint(V, shape)
        got, want = loaded(x), model(x)
        torch.testing.assert_close(got, want)
        assert all(type(a) is type(b) for a, b in zip(got[1][0], want[1][0], strict=True))
