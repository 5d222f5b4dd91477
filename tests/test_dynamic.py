"""One graph for all lengths and batches from 2 on: language models compiled whole with dynamic shapes, and exported.

``LACKING`` names what does not hold yet, form by form, and ``EXPORTED`` what does.
"""

import io

import pytest
import torch

from dualform.layers.attention import AttentionConfig
from dualform.layers.dss import DSSConfig
from dualform.layers.h3 import H3Config
from dualform.layers.hyena import HyenaConfig
from dualform.layers.hyena_modal import HyenaModalConfig
from dualform.layers.lru import LRUConfig
from dualform.layers.lstm import LSTMConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.s4 import S4Config
from dualform.layers.s4d import S4DConfig
from dualform.layers.s5 import S5Config
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel

V = 19
PARTS = {
    "attention": AttentionConfig(heads=2),
    "dss": DSSConfig(d_state=4),
    "h3": H3Config(d_state=4),
    "hyena": HyenaConfig(l_max=128),
    "hyena_modal": HyenaModalConfig(d_state=4),
    "lru": LRUConfig(d_state=4),
    "lstm": LSTMConfig(),
    "mamba": MambaConfig(d_state=4),
    "mamba2": Mamba2Config(d_state=4, d_head=16),
    "mlp": MLPConfig(d_hidden=24),
    "s4": S4Config(d_state=4),
    "s4d": S4DConfig(d_state=4),
    "s5": S5Config(d_state=4),
}
FORMS = {
    "whole": lambda model, x, state, mask, borders: model(x)[0],
    "state": lambda model, x, state, mask, borders: model(x, state)[0],
    "masked": lambda model, x, state, mask, borders: model(x, state, attention_mask=mask)[0],
    "packed": lambda model, x, state, mask, borders: model(x.reshape(1, -1), state, cu_seqlens=borders)[0],
    "loss": lambda model, x, state, mask, borders: model.loss(x, attention_mask=mask),
    "step": lambda model, x, state, mask, borders: model.step(x[:, 0], state)[0],
}
LACKING = {  # forms that still make a graph for some shapes, or break one
    "attention": ("state", "masked", "packed", "loss", "step"),
    "hyena": ("state", "masked", "packed", "loss", "step"),
    "lstm": tuple(FORMS),
}
DYNAMIC = [(name, form) for name in PARTS for form in FORMS if form not in LACKING.get(name, ())]
EXPORTED = ("dss", "h3", "hyena_modal", "lru", "mamba", "mamba2", "mlp", "s4", "s4d", "s5")
EXPORTED_WITH_GRADIENTS = ("dss", "h3", "hyena_modal", "lru", "mlp", "s4", "s4d", "s5")
SHAPES = ((5, 13), (2, 9), (7, 70))  # numbers that are no width of a layer: a compiler takes equal ones for one

pytestmark = [  # while it traces, the compiler trips over warnings of its own library
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]


def build(name):
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(V, 16, {"M": (PARTS[name],)}, "MM")).double().eval()


@pytest.mark.parametrize("name, form", DYNAMIC)
@torch._dynamo.config.patch(allow_rnn=True)
def test_one_graph_serves_all_lengths_and_batches(name, form):
    torch.compiler.reset()
    model, graphs = build(name), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(FORMS[form], dynamic=True, fullgraph=True, backend=backend)
    with torch.no_grad():
        for batch, length in SHAPES:
            x, mask = torch.randint(V, (batch, length)), torch.rand(batch, length) < 0.7
            mask[:, -1], borders = True, torch.arange(batch + 1) * length
            _, state = model(torch.randint(V, (batch, 3)))
            want = FORMS[form](model, x, torch.utils._pytree.tree_map(torch.clone, state), mask, borders)
            torch.testing.assert_close(compiled(model, x, state, mask, borders), want)
    assert len(graphs) == 1


EXPORTS = [*((name, False) for name in EXPORTED), *((name, True) for name in EXPORTED_WITH_GRADIENTS)]


@pytest.mark.parametrize("name, gradients", EXPORTS)
def test_a_model_is_exported_with_dynamic_batch_and_time(name, gradients):
    model, file = build(name), io.BytesIO()
    dynamic = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("time", min=2)}
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(model, (torch.randint(V, SHAPES[0]),), dynamic_shapes=(dynamic,))
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for shape in ((4, 3), (3, 300)):
        x = torch.randint(V, shape)
        got, want = loaded(x), model(x)
        torch.testing.assert_close(got, want)
        assert all(type(a) is type(b) for a, b in zip(got[1][0], want[1][0], strict=True))
