"""Models of this library as models of transformers: generate, Trainer, PEFT, saving."""

import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from dualform.core.errors import ArgumentError, ConfigError
from dualform.generation.engine import generate
from dualform.generation.options import Sampling
from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba import MambaConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.layers.registry import MIXERS
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.saving.model import load

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
hf = import_module("dualform.hf")

GOLDEN = Path(__file__).parent / "golden"
PARTS = {
    "M": (Mamba2Config(d_state=8, d_head=8),),
    "A": (AttentionConfig(heads=2), MLPConfig()),
    "S": (MambaConfig(d_state=4),),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ModelConfig(50, 16, PARTS, "MAS", tie_embeddings=False)
    return hf.DualformForCausalLM(hf.DualformConfig(config, pad_token_id=0)).eval()


@pytest.fixture
def tokens():
    return torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(1))


def greedy(model, row, count):
    return list(generate(model.model, row, count, sampling=Sampling(0.0)))


def test_a_call_is_that_of_the_language_model(model, tokens):
    want, _ = model.model(tokens)
    found = model(tokens, labels=tokens, output_hidden_states=True)
    torch.testing.assert_close(found.logits, want)
    torch.testing.assert_close(found.loss, model.model.loss(tokens))
    torch.testing.assert_close(model.model.logits(found.hidden_states[0]), want)
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, want[:, -2:])
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([3, 5])).logits, want[:, [3, 5]])
    torch.testing.assert_close(model(tokens, labels=tokens, return_dict=False)[0], found.loss)
    with pytest.raises(ArgumentError, match="reads tokens"):
        model(inputs_embeds=torch.zeros(1, 3, 16))
    with pytest.raises(ArgumentError, match="forward: labels has shape"):
        model(tokens, labels=tokens[:, 1:])


def test_pieces_go_on_where_the_cache_stands(model, tokens):
    want, _ = model.model(tokens)
    name = hf.modeling.CACHE
    first = model(tokens[:, :4])
    second = model(tokens[:, 4:8], attention_mask=torch.ones(3, 8), **{name: first[name]})
    last = model(tokens[:, 8:], **{name: second[name]})
    torch.testing.assert_close(torch.cat([m.logits for m in (first, second, last)], 1), want)
    assert last[name].get_seq_length() == 9
    with pytest.raises(ArgumentError, match="cannot forget the last tokens"):
        last[name].crop(3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_prompts_generate_what_each_generates_alone(model, tokens, side):
    lengths = (9, 4, 6)
    mask = torch.tensor([[1] * n + [0] * (9 - n) for n in lengths])
    mask = mask.flip(1) if side == "left" else mask
    shown = [row[m.bool()] for row, m in zip(tokens, mask, strict=True)]
    padded = tokens * mask
    logits = model(padded, attention_mask=mask).logits
    for i, row in enumerate(shown):
        torch.testing.assert_close(logits[i, mask[i].bool()], model.model(row[None])[0][0])
    if side == "left":
        new = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 9:]
        assert new.tolist() == [greedy(model, row, 6) for row in shown]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {}])
def test_generate_with_the_state_equals_generate_without(model, tokens, options):
    given = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, **options}
    kept = model.generate(tokens, **given)
    assert torch.equal(kept, model.generate(tokens, use_cache=False, **given))
    if not options:
        assert kept[:, 9:].tolist() == [greedy(model, row, 7) for row in tokens]
        drawn = model.generate(tokens, do_sample=True, top_k=5, max_new_tokens=4)
        assert drawn.shape == (3, 13)


def test_labels_are_shifted_and_padding_does_not_count(model, tokens):
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, :3] = mask[2, 7:] = 0
    labels = tokens.clone()
    labels[0, :5] = -100
    want = model.model.loss(tokens, attention_mask=mask, targets=hf.modeling._targets(labels, mask))
    count = (4 + 5 + 6) - 0
    evaluated = model(tokens, attention_mask=mask, labels=labels)
    model.train()
    trained = model(tokens, attention_mask=mask, labels=labels)
    assert trained.logits is None and evaluated.logits is not None
    summed = model(tokens, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(30))
    for found, expected in ((evaluated, want), (trained, want), (summed, want * count / 30)):
        torch.testing.assert_close(found.loss, expected)
    model.training_logits = True
    torch.testing.assert_close(model(tokens, attention_mask=mask, labels=labels).logits, evaluated.logits)


def test_saved_and_found_by_its_type(model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(again) is hf.DualformForCausalLM and again.config.model_config == model.config.model_config
    assert (again.config.vocab_size, again.config.hidden_size, again.config.num_hidden_layers) == (50, 16, 3)
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    ours = load(tmp_path)  # also without transformers
    torch.testing.assert_close(ours(tokens)[0], model(tokens).logits, rtol=0, atol=0)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="pattern"):
        hf.DualformConfig({**model.config.model, "pattern": "X"})


def test_models_of_the_hub_become_models_of_transformers(tmp_path):
    folder = shutil.copytree(GOLDEN / "lm_mamba", tmp_path / "there")
    ours, theirs = hf.load(folder), transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(1, ours.config.vocab_size, (2, 7))
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    assert ours.generation_config.eos_token_id == [theirs.generation_config.eos_token_id]
    given = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(tokens, **given), theirs.generate(tokens, **given))


def test_recompute_is_what_checkpointing_asks_for(model, tokens):
    model.train()
    grads = []
    for enable in (False, True):
        model._set_gradient_checkpointing(enable=enable)
        assert model.model.recompute is enable
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def languages():
    """A model of each kind of causal mixer, built with its defaults where that is small."""
    small = {"d_state": 8, "d_head": 8, "heads": 2}
    for kind, config in MIXERS.items():
        given = {name: value for name, value in small.items() if name in config.__dataclass_fields__}
        if getattr(config.__dataclass_fields__.get("bidirectional"), "default", False):
            continue
        yield kind, config(**given)


@pytest.mark.parametrize("kind, config", [pytest.param(*pair, id=pair[0]) for pair in languages()])
def test_no_projection_bypasses_its_adapter(kind, config, tokens):
    torch.manual_seed(0)
    lm = LanguageModel(ModelConfig(50, 16, {"X": (config, MLPConfig())}, "XX", tie_embeddings=False))
    model = hf.DualformForCausalLM(hf.DualformConfig(lm.config), lm)
    linear = [name for name, module in lm.named_modules() if isinstance(module, nn.Linear) and name != "head"]
    options = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).train()
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(linear)
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    adapted.eval()
    with torch.no_grad():
        want = adapted(input_ids=tokens).logits
        stepped, state = [], lm.init_state(3)
        for t in range(tokens.shape[1]):
            logits, state = lm.step(tokens[:, t], state)
            stepped.append(logits)
        torch.testing.assert_close(torch.stack(stepped, 1), want, rtol=1e-3, atol=1e-4)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tokens).logits, want, rtol=1e-3, atol=1e-4)


class Windows(torch.utils.data.Dataset):
    """Always the same sixteen windows."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        row = (torch.arange(12) * (i % 3 + 1) + i) % 50
        return {"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones(12, dtype=torch.int64)}


@pytest.mark.parametrize("lora", [False, True])
def test_a_trainer_lowers_the_loss_and_resumes_with_the_same(model, tmp_path, lora):
    def trainer(steps):
        torch.manual_seed(0)
        lm = LanguageModel(model.config.model_config)
        wrapped = hf.DualformForCausalLM(hf.DualformConfig(lm.config), lm)
        if lora:
            options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
            wrapped = peft.get_peft_model(wrapped, peft.LoraConfig(**options))
        given = transformers.TrainingArguments(
            str(tmp_path / "run"), max_steps=steps, per_device_train_batch_size=8, learning_rate=2e-2, seed=3,
            save_steps=6, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
            dataloader_pin_memory=False,
        )  # fmt: skip
        return transformers.Trainer(wrapped, given, train_dataset=Windows())

    whole = trainer(12)
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.2
    again = trainer(12)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    resumed = [row["loss"] for row in again.state.log_history if "loss" in row]
    assert resumed[-6:] == losses[-6:]
