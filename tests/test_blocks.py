"""The grammar of blocks: norms, factors, branches, chains, values that later parts read, shared and low-rank parts.

Each element is compared with its formula written out, and the laws run on models that have it.
"""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualform.core.errors import ArgumentError, ConfigError
from dualform.core.laws import LAWS, Trial
from dualform.core.options import options
from dualform.core.tree import clone
from dualform.layers.attention import AttentionConfig
from dualform.layers.block import Block, ChainConfig, ParallelConfig, SublayerConfig
from dualform.layers.context import Context
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.norms import NORMS
from dualform.layers.part import Part
from dualform.layers.recall import RecallConfig
from dualform.layers.registry import FEEDFORWARDS
from dualform.models.config import ModelConfig
from dualform.models.heads import SequenceClassifier, SequenceRegressor
from dualform.models.lm import LanguageModel
from dualform.models.saving.model import load, save

V, D = 13, 8
pytestmark = [  # while it traces, the compiler trips over warnings of its own library
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]


@options
class TellerConfig:
    """Of a part for these tests alone."""

    weight: float = 0.5

    def build(self, d_model: int) -> "Teller":
        return Teller(self, d_model)


class Teller(Part):
    """Reads the value of the Teller before it, tells its own, and has a loss: its mean square over what counts."""

    in_context = True

    def __init__(self, config: TellerConfig, d_model: int):
        super().__init__()
        self.weight = config.weight
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, *, context: Context | None = None) -> Tensor:
        assert context is not None
        y = self.out_proj(x)
        told = context["told"] if "told" in context else torch.zeros_like(y)
        context["told"] = y
        if context.collects:
            square = y.square().mean(-1)
            counted = torch.ones_like(square) if context.counted is None else context.counted.to(square.dtype)
            context.add_loss(self.weight * (square * counted).sum() / counted.sum())
        return y + told


@pytest.fixture(autouse=True, scope="module")
def teller():
    FEEDFORWARDS["teller"] = TellerConfig
    yield
    del FEEDFORWARDS["teller"]


MAMBA = Mamba2Config(d_state=3, d_head=4, expand=1)
ATTENTION = AttentionConfig(heads=2)
SELECTIVE = MambaConfig(d_state=2)
MLP = MLPConfig(d_hidden=5)
WIDE = AttentionConfig(heads=2, d_head=3, d_out=D)  # reads the stream and the embedding
SHARED = ChainConfig((SublayerConfig(WIDE, joined="embedding", stream=0), SublayerConfig(MLP, stream=0)))
LOW_RANK = ChainConfig(
    (
        SublayerConfig(WIDE, joined="embedding", stream=0, low_rank=2),
        SublayerConfig(MLP, norm=None, stream=0, low_rank=1),
    )
)
RECALLING = ChainConfig((SublayerConfig(RecallConfig("shared"), norm=None), SublayerConfig(MAMBA, stream=0)))
ZAMBA = {"M": (MAMBA,), "S": (SublayerConfig(SHARED, norm=None, saved="shared"),), "H": (SublayerConfig(RECALLING),)}
LOW_RANKS = {**ZAMBA, "S": (SublayerConfig(LOW_RANK, norm=None, saved="shared"),)}
BRANCHES = ParallelConfig(
    (SublayerConfig(MAMBA, norm=None, scale_in=0.9, scale=1.2), SublayerConfig(ATTENTION, norm=None, scale=0.8))
)
FACTORS = (SublayerConfig(MAMBA, scale_in=0.7, scale=1.4, stream=0.6), SublayerConfig(MLP, scale=0.3))
NORMED = (SublayerConfig(ATTENTION, normed=True, scale=1.3, stream=0.8), SublayerConfig(MLP, normed=True))
SEVERAL_NORMS = (SublayerConfig(ATTENTION, norm="layer"), SublayerConfig(MLP, norm="rms_offset", eps=0.1))
SANDWICH = (SublayerConfig(MAMBA, norm=None, after="rms"), SublayerConfig(MLP, after="layer"))
ENDS = {"embed_scale": 3.0, "logit_scale": 0.4, "logit_cap": 0.5}
MODELS = {
    "norms": ({"A": SEVERAL_NORMS}, "AA", {"norm": "layer_no_bias", "embed_norm": "layer"}),
    "after, sandwich": ({"M": SANDWICH}, "MM", {}),
    "factors": ({"M": FACTORS}, "MM", ENDS),
    "normed": ({"A": NORMED}, "AA", {"tie_embeddings": False, "head_bias": True}),
    "branches, one norm": ({"P": (BRANCHES, MLP)}, "PP", {}),
    "branches, a norm each": ({"P": (SublayerConfig(ParallelConfig((ATTENTION, MLP)), norm=None),)}, "PP", {}),
    "chains": ({"C": (ChainConfig((SELECTIVE, ParallelConfig((MLP, ChainConfig((MAMBA, MLP)))))),)}, "CC", {}),
    "a shared block beside the stream": (ZAMBA, "MSHSHM", {"shared": "S"}),
    "low rank": (LOW_RANKS, "MSHSH", {"shared": "S"}),
    "telling": ({"T": (MAMBA, TellerConfig())}, "TTT", {}),
}
EVERYTHING = ModelConfig(
    V,
    D,
    {**LOW_RANKS, "T": (TellerConfig(),)},
    "TSH",
    shared="S",
    embed_norm="rms",
    tie_embeddings=False,
    head_bias=True,
    **ENDS,
)
every = pytest.mark.parametrize("name", MODELS)


def config(name: str) -> ModelConfig:
    if name == "everything":
        return EVERYTHING
    parts, pattern, given = MODELS[name]
    return ModelConfig(V, D, parts, pattern, **given)


def build(name: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(config(name)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


# --- the laws ---


@every
@pytest.mark.parametrize("law", ["split", "step", "packed", "padded left", "padded between", "rows", "causal"])
def test_the_laws(name, law):
    error = LAWS[law](Trial(build(name), tokens(3, 9), warmup=3))
    assert error is not None and error.error < 1e-10


@every
def test_gradients_of_every_form(name):
    error = LAWS["gradient"](Trial(build(name), tokens(2, 6), warmup=2))
    assert error is not None and error.error < 1e-8


@every
def test_prepared_and_saved(name, tmp_path):
    model = build(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config(name).to_dict()))) == config(name)
    save(model, tmp_path)
    again, x = load(tmp_path), tokens(2, 5)
    with torch.no_grad():
        state, prepared = model.init_state(2), model.prepare()
        stepped = []
        for t in range(5):
            y, state = prepared.step(x[:, t], state)
            stepped.append(y)
        close(torch.stack(stepped, 1), model(x)[0])
        assert torch.equal(again(x)[0], model(x)[0])
        assert torch.equal(copy.deepcopy(model)(x)[0], model(x)[0])


@every
def test_recomputing_changes_nothing(name):
    model, x = build(name).train(), tokens(2, 6)
    want = torch.autograd.grad(model.loss(x), list(model.parameters()), allow_unused=True)
    model.recompute = True
    got = torch.autograd.grad(model.loss(x), list(model.parameters()), allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@every
def test_bfloat16_and_the_loss(name):
    model, x = build(name, torch.bfloat16), tokens(2, 7)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out[0].dtype)))
    logits, state = model(x)
    assert logits.dtype == torch.bfloat16 and set(seen) == {(torch.float32, torch.float32)}
    assert model.step(x[:, 0], state)[0].dtype == torch.bfloat16
    model = model.double()
    want = F.cross_entropy(model(x)[0][:, :-1].flatten(0, 1), x[:, 1:].flatten())
    close(model.loss(x), want)


# --- each element, written out ---


def pieces(block: Block) -> tuple:
    return tuple(block.parts), tuple(block.norms), tuple(block.after)


def test_where_norms_and_factors_stand():
    torch.manual_seed(0)
    sub = SublayerConfig(MLP, norm="layer", after="rms", eps=0.1, scale_in=0.5, scale=3.0, stream=0.25)
    block, x = sub.build(D).double(), torch.randn(2, 4, D, dtype=torch.float64)
    (part,), (norm,), (after,) = pieces(block)
    assert norm.eps == after.eps == 0.1
    close(block(x)[0], 0.25 * x + 3 * after(part(0.5 * norm(x))))
    normed = SublayerConfig(MLP, normed=True, scale=3.0, stream=0.25).build(D).double()
    (part,), (norm,), _ = pieces(normed)
    close(normed(x)[0], 0.25 * norm(x) + 3 * part(norm(x)))
    chain = ChainConfig((SublayerConfig(MLP, stream=0), SublayerConfig(MLP, norm=None, stream=0), MLP)).build(D)
    (one, two, three), (first, _, third), _ = pieces(chain.double())
    y = two(one(first(x)))
    close(chain(x)[0], y + three(third(y)))


def test_branches_read_the_same_and_are_added():
    torch.manual_seed(0)
    block = ParallelConfig((MLP, SublayerConfig(MLP, norm=None, scale=2.0))).build(D).double()
    x = torch.randn(2, 4, D, dtype=torch.float64)
    (one, two), (norm, _), _ = pieces(block)
    close(block(x)[0], one(norm(x)) + 2 * two(x))


@pytest.mark.parametrize("kind", [kind for kind in NORMS if kind != "batch"])
def test_the_norms(kind):
    x, eps = torch.randn(3, D, dtype=torch.float64), 0.1
    norm = NORMS[kind](D, eps).double()
    with torch.no_grad():
        for p in norm.parameters():
            p.add_(torch.randn_like(p))
    centred = x - x.mean(-1, keepdim=True) if kind.startswith("layer") else x
    weight = norm.weight + 1 if kind == "rms_offset" else norm.weight
    bias = norm.bias if kind == "layer" else 0
    want = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias
    close(norm(x), want)
    close(norm(x, x)[1], 2 * x)
    close(norm(x, x)[0], norm(2 * x))
    assert norm.bfloat16()(x.float()).dtype == torch.bfloat16


def test_the_ends_of_a_model():
    model, x = build("factors"), tokens(2, 5)
    h = 3.0 * model.embed(x)
    for block in model.blocks:
        h = block(h)[0]
    close(model(x)[0], 0.5 * torch.tanh(0.4 * (model.norm(h) @ model.embed.weight.T) / 0.5))
    model = build("norms")
    close(model._embed(x), model.embed_norm(model.embed(x)))


def test_a_shared_block_beside_the_stream():
    """Zamba: attention over the stream and the embedding, whose output joins the input of a Mamba, not the stream."""
    model, x = build("a shared block beside the stream"), tokens(2, 5)
    e = h = model.embed(x)
    for letter, block in zip("MSHSHM", model.blocks, strict=True):
        if letter == "S":
            (attention, mlp), (first, second), _ = pieces(block.parts[0])
            kept = mlp(second(attention(first(torch.cat([h, e], -1)))[0]))
        elif letter == "H":
            (recall, mamba), (_, norm), _ = pieces(block.parts[0])
            h = h + mamba(norm(block.norms[0](h) + kept @ recall.out_proj.weight.T))[0]
        else:
            h = h + block.parts[0](block.norms[0](h))[0]
    close(model.features(x)[0], model.norm(h))
    assert model.blocks[1] is model.blocks[3]


def test_low_rank_matrices_are_each_uses_own():
    torch.manual_seed(0)
    model = LanguageModel(config("low rank")).double()
    (one, two), x = (model.blocks[i].parts[0].parts[0] for i in (1, 3)), torch.randn(2, 4, 2 * D, dtype=torch.float64)
    assert one.qkv_proj.base is two.qkv_proj.base and one.out_proj is two.out_proj
    assert torch.equal(one(x)[0], two(x)[0])  # at the start
    own = sum(p.numel() for p in two.qkv_proj.down.parameters()) + sum(p.numel() for p in two.qkv_proj.up.parameters())
    assert own == 2 * 3 * (2 * D) + 2 * 3 * 6
    with torch.no_grad():
        for p in two.qkv_proj.up.parameters():
            p.normal_()
    lines = [up.weight @ down.weight for down, up in zip(two.qkv_proj.down, two.qkv_proj.up, strict=True)]
    close(two.qkv_proj(x), x @ (one.qkv_proj.base.weight + torch.cat(lines)).T)
    assert not torch.equal(one(x)[0], two(x)[0])


def test_losses_of_parts_reach_the_training_and_nothing_else():
    model, x = build("telling").train(), tokens(3, 6)
    told = []
    hooks = [block.parts[1].out_proj.register_forward_hook(lambda m, a, y: told.append(y)) for block in model.blocks]
    plain = F.cross_entropy(model(x)[0][:, :-1].flatten(0, 1), x[:, 1:].flatten())
    want = plain + sum(0.5 * y.square().mean() for y in told)
    close(model.loss(x), want)
    close(model.eval().loss(x), plain)
    with torch.no_grad():
        close(model.train().loss(x), plain)
    for hook in hooks:
        hook.remove()
    for kind, target in ((SequenceClassifier, torch.tensor([0, 1, 1])), (SequenceRegressor, torch.randn(3, 2))):
        torch.manual_seed(0)
        pooled = kind(config("telling"), 2)
        apart = pooled.eval().loss(x, target)
        beside = pooled.train().loss(x, target)
        assert beside > apart + 1e-4
        losses = pooled.forward_and_losses(x)[2]
        assert len(losses) == 3
        torch.testing.assert_close(beside, apart + sum(losses))
        assert not pooled.eval().forward_and_losses(x)[2]


def test_the_loss_of_a_part_does_not_see_padding():
    torch.manual_seed(0)
    model, x = LanguageModel(ModelConfig(V, D, {"T": (TellerConfig(),)}, "TT")).double(), tokens(2, 7)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    want = model.loss(x, attention_mask=mask)
    other = torch.where(mask.bool(), x, (x + 1) % V)
    close(model.loss(other, attention_mask=mask), want)
    compiled = torch.compile(lambda x: model.loss(x, attention_mask=mask), backend="eager", fullgraph=True)
    close(compiled(other), want)


# --- compiled and exported ---


def test_everything_compiled_whole_and_exported():
    torch.compiler.reset()
    model, graphs = build("everything"), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = torch.compile(lambda x, s: model(x, s)[0], dynamic=True, fullgraph=True, backend=backend)
    one = torch.compile(lambda x, s: model.step(x, s)[0], dynamic=True, fullgraph=True, backend="eager")
    with torch.no_grad():
        for batch, length in ((7, 11), (9, 10)):  # numbers that are no width of a layer
            x = tokens(batch, length)
            state = model(tokens(batch, 4), model.init_state(batch, max_len=20))[1]
            close(run(x, clone(state)), model(x, clone(state))[0])
            close(one(x[:, 0], clone(state)), model.step(x[:, 0], clone(state))[0])
        assert len(graphs) == 1
        program = torch.export.export(model, (tokens(2, 4),), strict=False)
        close(program.module()(tokens(2, 4))[0], model(tokens(2, 4))[0])


# --- what is refused ---


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SublayerConfig(MLP, norm="rns"), "sublayer: norm is 'rns', expected the name of a norm"),
        (lambda: SublayerConfig(MLP, after="bath"), "sublayer: after is 'bath'"),
        (lambda: SublayerConfig(MLP, scale=math.inf), "sublayer: scale is inf, expected a finite number"),
        (lambda: SublayerConfig(MLP, eps=0.0), "sublayer: eps is 0.0, expected a small positive number"),
        (lambda: SublayerConfig(MLP, low_rank=-1), "sublayer: low_rank is -1"),
        (lambda: ChainConfig(()), "chain: parts is empty"),
        (lambda: ParallelConfig((MLPConfig,)), "parallel: parts has <class"),
        (lambda: ParallelConfig((SublayerConfig(MLP, stream=0.5),)), "a branch has stream or normed"),
        (lambda: SublayerConfig(RecallConfig("a"), low_rank=2).build(D), "low_rank is 2 around Recall"),
        (
            lambda: SublayerConfig(AttentionConfig(heads=2, d_conv=2), low_rank=2).build(D),
            "low_rank is 2 around Attention, which cannot have it",
        ),
        (lambda: AttentionConfig(heads=2, d_out=0).build(D), "attention: d_out is 0, expected at least 1"),
        (lambda: ModelConfig(V, D, ZAMBA, "HS"), "'H' reads 'shared', which nothing before it saves"),
        (lambda: ModelConfig(V, D, {"A": (SublayerConfig(WIDE, joined="b"),)}, "A"), "'A' reads 'b', which nothing"),
        (lambda: ModelConfig(V, D, {"M": (MLP,)}, "M", norm="a"), "model: norm is 'a'"),
        (lambda: ModelConfig(V, D, {"M": (MLP,)}, "M", logit_cap=0.0), "model: logit_cap is 0.0"),
        (lambda: ModelConfig(V, D, {"M": (MLP,)}, "M", embed_scale=math.nan), "model: embed_scale is nan"),
        (lambda: ModelConfig(V, D, {"M": (MLP,)}, "M", head_bias=True), "head_bias is True, and the head is the emb"),
    ],
)
def test_what_cannot_be(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_a_file_with_parts_in_parts():
    table = config("chains").to_dict()
    table["parts"]["C"][0]["parts"][0]["d_stat"] = 3
    with pytest.raises(ConfigError, match=r"parts\.C\[0\] \(chain\)\.parts\[0\] \(mamba\): unknown key 'd_stat'"):
        ModelConfig.from_dict(table)
    part = {"kind": "mlp"}
    for _ in range(50):
        part = {"kind": "chain", "parts": [part]}
    with pytest.raises(ConfigError, match="hold parts more than 8 times"):
        ModelConfig.from_dict({**table, "parts": {"C": [part]}})
    part = MLP
    for _ in range(9):
        part = ChainConfig((part,))
    with pytest.raises(ConfigError, match="hold parts more than 8 times"):
        ModelConfig(V, D, {"C": (part,)}, "C")
    table["parts"]["C"] = [{"kind": "sublayer", "part": 3}]
    with pytest.raises(ConfigError, match="part is 3, expected"):
        ModelConfig.from_dict(table)


def test_a_block_without_its_context():
    block = SublayerConfig(WIDE, joined="embedding").build(D)
    with pytest.raises(ArgumentError, match="no context, which 'embedding' is read from"):
        block(torch.randn(1, 2, D))
    with pytest.raises(ArgumentError, match=r"nothing before has saved 'b'\n.*there is a"):
        _ = Context({"a": torch.zeros(1)})["b"]
