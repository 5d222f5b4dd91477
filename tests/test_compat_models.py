"""``MambaLMHeadModel`` as mamba-ssm names it: keys, generation, folders, and the same model in this library's terms."""

import dataclasses
import json

import pytest
import torch
from torch import Tensor

import dualform as df
from dualform.compat.generation import decode
from dualform.compat.mixer_seq import MambaLMHeadModel, MixerModel, create_block
from dualform.compat.model_config import MambaConfig
from dualform.core.errors import ArgumentError, CheckpointError, ConfigError
from dualform.models.tables.mamba_ssm import model_config, model_tensors

SIZES = {"d_model": 8, "n_layer": 2, "vocab_size": 13}
CONFIGS = {
    "mamba": MambaConfig(**SIZES, ssm_cfg={"d_state": 3}),
    "mamba2": MambaConfig(**SIZES, ssm_cfg={"layer": "Mamba2", "d_state": 3, "headdim": 4, "ngroups": 2}),
    "wide": MambaConfig(
        **SIZES, d_intermediate=9, ssm_cfg={"d_state": 3, "dt_rank": 2}, tie_embeddings=False, fused_add_norm=False
    ),
    "hybrid": MambaConfig(
        **SIZES,
        ssm_cfg={"layer": "Mamba2", "d_state": 3, "headdim": 8, "dt_limit": [0.0, 0.1]},
        attn_layer_idx=[1],
        attn_cfg={"num_heads": 2, "num_heads_kv": 1, "rotary_emb_dim": 4, "causal": True},
    ),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


def tokens(*shape: int) -> Tensor:
    return torch.randint(13, shape)


def test_the_keys_are_upstreams():
    model = MambaLMHeadModel(dataclasses.replace(CONFIGS["wide"], n_layer=1))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {
        "backbone.embedding.weight": (16, 8),
        "backbone.layers.0.norm.weight": (8,),
        "backbone.layers.0.mixer.A_log": (16, 3),
        "backbone.layers.0.mixer.D": (16,),
        "backbone.layers.0.mixer.in_proj.weight": (32, 8),
        "backbone.layers.0.mixer.conv1d.weight": (16, 1, 4),
        "backbone.layers.0.mixer.conv1d.bias": (16,),
        "backbone.layers.0.mixer.x_proj.weight": (8, 16),
        "backbone.layers.0.mixer.dt_proj.weight": (16, 2),
        "backbone.layers.0.mixer.dt_proj.bias": (16,),
        "backbone.layers.0.mixer.out_proj.weight": (8, 16),
        "backbone.layers.0.norm2.weight": (8,),
        "backbone.layers.0.mlp.fc1.weight": (256, 8),
        "backbone.layers.0.mlp.fc2.weight": (8, 128),
        "backbone.norm_f.weight": (8,),
        "lm_head.weight": (16, 8),
    }
    tied = MambaLMHeadModel(CONFIGS["mamba"])
    assert tied.lm_head.weight is tied.backbone.embedding.weight
    assert MambaLMHeadModel(MambaConfig(**SIZES, rms_norm=False)).state_dict()["backbone.norm_f.bias"].shape == (8,)


def test_the_start_of_parameters():
    model = MixerModel(8, 4, 9, 16, rms_norm=True, initializer_cfg={"initializer_range": 5.0})
    assert 3 < model.embedding.weight.std() < 7
    block = model.layers[0]
    assert block.layer_idx == 0 and block.mixer.layer_idx == 0
    assert block.mixer.dt_proj.bias.abs().min() > 0  # not started again
    assert block.mixer.out_proj.weight.abs().max() <= (1 / 16) ** 0.5 / 8**0.5 + 1e-6


@configs
def test_the_same_model_in_our_own_terms(config):
    theirs = MambaLMHeadModel(config).double()
    about = dataclasses.asdict(config)
    ours = df.LanguageModel(model_config(about)).double()
    ours.load_state_dict(model_tensors(theirs.state_dict(), ours.config))
    x = tokens(2, 7)
    want = theirs(x).logits
    if config.residual_in_fp32 and not config.fused_add_norm:  # the stream is rounded there
        torch.testing.assert_close(ours(x)[0], want, atol=1e-6, rtol=1e-5)
    else:
        torch.testing.assert_close(ours(x)[0], want)


@configs
def test_generation_is_the_loop(config):
    model, prompt = MambaLMHeadModel(config).double(), tokens(2, 3)
    sequence, scores = prompt, []
    with torch.no_grad():
        while sequence.shape[1] < 9:
            scores.append(model(sequence).logits[:, -1, :13])
            sequence = torch.cat([sequence, scores[-1].argmax(-1, keepdim=True)], 1)
    found = model.generate(prompt, 9, vocab_size=13, return_dict_in_generate=True, output_scores=True, cg=True)
    assert torch.equal(found.sequences, sequence)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if not config.fused_add_norm else {}
    torch.testing.assert_close(found.scores, tuple(scores), **tolerance)
    assert torch.equal(model.generate(prompt, 9, vocab_size=13), sequence)
    last = model(sequence, num_last_tokens=2).logits
    torch.testing.assert_close(last, model(sequence).logits[:, -2:])


def test_sequences_on_one_line():
    model, x = MambaLMHeadModel(CONFIGS["mamba2"]).double(), tokens(1, 7)
    want = torch.cat([model(x[:, :3]).logits, model(x[:, 3:]).logits], 1)
    torch.testing.assert_close(model(x, seq_idx=torch.tensor([[0] * 3 + [1] * 4], dtype=torch.int32)).logits, want)
    torch.testing.assert_close(model(x, cu_seqlens=torch.tensor([0, 3, 7])).logits, want)


class Listener:
    def __init__(self):
        self.heard: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.heard.append(value)

    def end(self) -> None:
        self.ended = True


def test_options_of_generation(capsys):
    model, prompt = MambaLMHeadModel(CONFIGS["mamba"]), tokens(1, 3)
    greedy = model.generate(prompt, 8)
    taught = torch.tensor([[*prompt[0].tolist(), 5, 6]])
    assert model.generate(prompt, 8, teacher_outputs=taught)[0, 3:5].tolist() == [5, 6]
    ended = model.generate(prompt, 8, eos_token_id=int(greedy[0, 3]))
    assert ended.shape[1] == 4
    listener = Listener()
    heard = model.generate(prompt, 8, streamer=listener, enable_timing=True)
    assert torch.equal(torch.cat(listener.heard, 1), heard) and listener.ended
    assert "Prompt processing + decoding time: " in capsys.readouterr().out
    kept = model.generate(prompt, 8, repetition_penalty=1e9)
    assert len(set(kept[0].tolist())) == len(set(prompt[0].tolist())) + 5
    assert torch.equal(model.generate(prompt, 3), prompt)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 0, "top_p": 0.6}, {0, 1}),
        ({"top_k": 3, "top_p": 0.1}, {0}),
        ({"top_k": 0, "min_p": 0.9}, {0}),
        ({"top_k": 0, "min_p": 0.4, "temperature": 9.0}, {0, 1}),
        ({"top_k": 0, "temperature": 0.01}, {0}),
        ({"top_k": 0}, {0, 1, 2}),
    ],
)
def test_what_is_drawn(options, allowed):
    """From a model whose tokens always have the probabilities 0.5, 0.3 and 0.2."""

    def model(input_ids: Tensor, position_ids: object, inference_params: object, num_last_tokens: int) -> object:
        logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(len(input_ids), 1, 3)
        return type("Output", (), {"logits": logits})

    drawn = decode(torch.zeros(60, 1, dtype=torch.int64), model, 2, **options).sequences[:, 1]
    assert set(drawn.tolist()) == allowed


def test_a_folder(tmp_path):
    for name, config in CONFIGS.items():
        model = MambaLMHeadModel(config)
        model.save_pretrained(tmp_path / name)
        again = MambaLMHeadModel.from_pretrained(tmp_path / name, dtype=torch.float64)
        assert again.config == config
        torch.testing.assert_close(again.state_dict(), model.state_dict(), check_dtype=False)
        assert again.lm_head.weight.dtype == torch.float64
    folder = tmp_path / "mamba"
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "n_layers": 3}))
    with pytest.raises(CheckpointError, match=r"unknown key 'n_layers'\n.*did you mean 'n_layer'"):
        MambaLMHeadModel.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**about, "n_layer": 3}))
    with pytest.raises(CheckpointError, match="10 tensors missing and 0 too many"):
        MambaLMHeadModel.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**about, "d_model": 16}))
    with pytest.raises(CheckpointError, match="size mismatch"):
        MambaLMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        MambaLMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"a": print}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"bin: .*more than tensors, which could run code"):
        MambaLMHeadModel.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(about))
    torch.save(MambaLMHeadModel(CONFIGS["mamba"]).state_dict(), folder / "pytorch_model.bin")
    MambaLMHeadModel.from_pretrained(folder)
    for name in ("nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(CheckpointError, match=r"no such folder\n.*owner/name"):
            MambaLMHeadModel.from_pretrained(name)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rms_norm": False}, "rms_norm is False"),
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "ssm_cfg has rmsnorm = False; the layer here has True"),
        ({"ssm_cfg": {"bimamba_type": "v2"}}, "ssm_cfg has 'bimamba_type', which the layer here does not have"),
        (
            {"attn_layer_idx": [0], "attn_cfg": {"num_heads": 2, "mlp_dim": 4, "causal": True}},
            "attn_cfg has mlp_dim = 4",
        ),
        ({"attn_layer_idx": [0], "attn_cfg": {"num_heads": 2, "rotary_emb_dim": 6}}, "rotary_emb_dim = 6 of 4"),
        ({"attn_layer_idx": [0], "attn_cfg": {"num_heads": 2}}, "attn_cfg has causal = False"),
    ],
)
def test_sizes_that_we_do_not_have(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        model_config({**dataclasses.asdict(CONFIGS["mamba"]), **change})


def test_what_does_not_fit_is_refused_in_a_sentence():
    with pytest.raises(ArgumentError, match=r"ssm_cfg has the layer 'Mamba3'\n.*Mamba2"):
        create_block(8, ssm_cfg={"layer": "Mamba3"})
    model = MambaLMHeadModel(CONFIGS["mamba"])
    for options in ({"top_p": 2.0}, {"top_k": -1}, {"temperature": 0.0}):
        with pytest.raises(ArgumentError, match="decode: "):
            model.generate(tokens(1, 2), 4, **options)
