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
from dualform.layers.moe import MoEConfig
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


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_the_loss_is_that_of_all_labels_whichever_logits_are_kept(model, tokens, training, recorded):
    model.train(training)
    model.training_logits = True
    with torch.set_grad_enabled(recorded):
        all_of_them = model(tokens, labels=tokens)
        for kept in (
            0,
            2,
            9,
            99,
            torch.arange(9).flip(0),
            torch.tensor([4] * 9),
            torch.tensor([-1]),
            torch.arange(9) > 5,
        ):
            found = model(tokens, labels=tokens, logits_to_keep=kept)
            torch.testing.assert_close(found.loss, all_of_them.loss)
            if isinstance(kept, torch.Tensor):
                torch.testing.assert_close(found.logits, all_of_them.logits[:, kept])


@pytest.mark.parametrize(
    "kept, message",
    [
        (-2, "logits_to_keep is -2"),
        (torch.tensor([[0, 1]]), r"logits_to_keep is torch.int64, \(1, 2\), expected a number or indices"),
        (torch.tensor(1), r"logits_to_keep is torch.int64, \(\)"),
        (torch.tensor([0.5]), "logits_to_keep is torch.float32"),
        (torch.tensor([0, 9]), "logits_to_keep holds 0 to 9, expected indices of 9 positions"),
        (torch.ones(8, dtype=torch.bool), r"logits_to_keep has shape \(8,\)"),
        ("all", "logits_to_keep is 'all'"),
    ],
)
def test_logits_that_are_not_there_are_not_kept(model, tokens, kept, message):
    with pytest.raises(ArgumentError, match=f"forward: {message}"):
        model(tokens, logits_to_keep=kept)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_where_no_label_counts_stays_there(model, tokens, training, value):
    """Of the features of row 1 and of one position, and of logits."""
    labels, harmed = tokens.clone(), torch.zeros(3, 9, dtype=torch.bool)
    labels[1] = labels[2, 5] = -100
    harmed[1] = harmed[2, 4] = True

    def grads(planted):
        hook = model.model.norm.register_forward_hook(lambda m, a, h: h.masked_fill(harmed[..., None], value))
        model.train(training)
        model.training_logits = training
        model.zero_grad()
        if not planted:
            hook.remove()
        loss = model(tokens, labels=labels).loss
        loss.backward()
        hook.remove()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    torch.testing.assert_close(grads(True), grads(False))


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.ones(3, 9), "labels is torch.float32, expected int32 or int64"),
        (torch.full((3, 9), 50), "labels holds 50, expected 0 to 49"),
        (torch.full((3, 9), -1), "labels holds -1, expected 0 to 49"),
        (torch.ones(9, dtype=torch.int64), r"labels has shape \(9,\)"),
        ([[1] * 9] * 3, "labels is list"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_labels_that_are_none_are_refused(model, tokens, labels, message, training):
    with pytest.raises(ArgumentError, match=f"forward: {message}"):
        model.train(training)(tokens, labels=labels)
    torch.testing.assert_close(model(tokens, labels=tokens.int()).loss, model(tokens, labels=tokens).loss)


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(3, 1, 9, 9), r"attention_mask has shape \(3, 1, 9, 9\)"),
        (torch.ones(3, 12), r"attention_mask has shape \(3, 12\), expected \(B, T\) = \(3, 9\)"),
        (torch.ones(3, 5), r"attention_mask has shape \(3, 5\)"),
        (torch.zeros(3, 9), "attention_mask is torch.float32 and 0 everywhere"),
        (torch.ones(3, 9).log().index_fill(1, torch.tensor([0]), -torch.inf), "values other than 0 and 1"),
        ([[1] * 9] * 3, "attention_mask is list"),
    ],
)
def test_masks_of_another_kind_are_refused(model, tokens, mask, message):
    with pytest.raises(ArgumentError, match=message):
        model(tokens, attention_mask=mask)
    with pytest.raises(ArgumentError, match=message):
        model.train()(tokens, attention_mask=mask, labels=tokens)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.bfloat16])
def test_masks_of_any_dtype_hide_padding(model, tokens, dtype):
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, :3] = mask[2, 7:] = 0
    for labels in (None, tokens):
        want, found = (model(tokens, attention_mask=m, labels=labels) for m in (mask, mask.to(dtype)))
        torch.testing.assert_close((found.logits, found.loss), (want.logits, want.loss))


def test_positions_are_those_of_the_tokens_or_refused(model, tokens):
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, :3] = mask[1, 6:] = 0
    counted, name = mask.cumsum(1) - 1, hf.modeling.CACHE
    want = model(tokens, attention_mask=mask).logits
    column = torch.arange(9).expand(3, 9)
    for right in (counted, counted.masked_fill(mask == 0, 1), column, column[:1], column[0]):
        torch.testing.assert_close(model(tokens, attention_mask=mask, position_ids=right).logits, want)
    first = model(tokens[:, :4], attention_mask=mask[:, :4])
    late = {"attention_mask": mask, name: first[name]}
    with pytest.raises(ArgumentError, match=r"position_ids\[0, 0\] is 0, expected 4"):
        model(tokens[:, 4:], position_ids=torch.arange(5), **late)
    torch.testing.assert_close(model(tokens[:, 4:], position_ids=counted[:, 4:], **late).logits, want[:, 4:])
    restarting, gap = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2]), torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9])
    for wrong, message in (
        (restarting, r"position_ids\[0, 3\] is 0, expected 3: positions follow from the order"),
        (gap, r"position_ids\[0, 4\] is 5, expected 4"),
        (torch.arange(9).flip(0), r"position_ids\[0, 0\] is 8, expected 0"),
        (torch.arange(3, 12), r"position_ids\[0, 0\] is 3, expected 0"),
        (torch.arange(8), r"position_ids has shape \(8,\), expected"),
        (torch.arange(9).expand(3, 1, 9), "position_ids has shape"),
    ):
        for labels in (None, tokens):
            with pytest.raises(ArgumentError, match=message):
                model(tokens, position_ids=wrong, labels=labels)


def test_keywords_that_would_change_nothing_are_refused(model, tokens):
    for given, message in (
        ({"atention_mask": torch.ones(3, 9)}, r"unknown keyword 'atention_mask'\n.*did you mean 'attention_mask'"),
        ({"cu_seq_lens_q": torch.tensor([0, 9])}, "cu_seq_lens_q is given, and packed rows are not read here"),
        ({"seq_idx": torch.zeros(1, 9)}, "seq_idx is given"),
        ({"output_attentions": True}, "output_attentions is True, and a model of this library returns none"),
        ({"is_causal": False}, "is_causal is False"),
        ({hf.modeling.CACHE: transformers.DynamicCache()}, "the cache is a DynamicCache, expected a StateCache"),
    ):
        with pytest.raises(ArgumentError, match=f"forward: {message}"):
            model(tokens, **given)
    nothing = {
        "output_attentions": False,
        "foreign": None,
        "token_type_ids": torch.zeros_like(tokens),
        "is_causal": True,
    }
    torch.testing.assert_close(model(tokens, **nothing).logits, model(tokens).logits)


def test_hidden_states_and_the_losses_of_routers_come_in_training_too():
    torch.manual_seed(0)
    parts = {"E": (Mamba2Config(d_state=4, d_head=8), MoEConfig(experts=4, balance=0.5))}
    model = hf.DualformForCausalLM(hf.DualformConfig(ModelConfig(50, 16, parts, "E"))).train()
    tokens = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(2))
    want = model.model.loss(tokens)
    torch.testing.assert_close(model(tokens, labels=tokens).loss, want)
    asked = model(tokens, labels=tokens, output_hidden_states=True)
    torch.testing.assert_close(model.model.logits(asked.hidden_states[0]), asked.logits)
    torch.testing.assert_close(asked.loss, want)
    model.training_logits = True
    torch.testing.assert_close(model(tokens, labels=tokens).loss, want)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [40, 53])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_vocabulary_of_another_size(tmp_path, tied, size):
    torch.manual_seed(0)
    config = ModelConfig(50, 16, PARTS, "MAS", tie_embeddings=tied, head_bias=not tied)
    model = hf.DualformForCausalLM(hf.DualformConfig(config)).eval()
    tokens = torch.randint(40, (2, 7))
    before = model(tokens).logits[..., :40]
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == model.model.config.vocab_size == len(model.model.embed.weight) == size
    after = model(tokens, labels=tokens)
    assert after.logits.shape == (2, 7, size) and after.loss.isfinite()
    torch.testing.assert_close(after.logits[..., :40], before)
    with pytest.raises(ArgumentError, match=f"tokens holds {size}, expected 0 to {size - 1}"):
        model(torch.full((1, 2), size))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load(tmp_path)(tokens)[0], after.logits)
    model.resize_token_embeddings(1000, mean_resizing=False)
    assert model.model.embed.weight[size:].std().item() == pytest.approx(0.02, rel=0.05)  # as in a new model


def test_a_cache_that_has_seen_every_token_is_refused(model, tokens):
    name = hf.modeling.CACHE
    with pytest.raises(ArgumentError, match="input_ids has 9 tokens, and the cache has seen 9: none is left to read"):
        model.prepare_inputs_for_generation(tokens, **{name: model(tokens)[name]})


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
    with pytest.raises(ConfigError, match="vocab_size is 51, but the model's is 50"):
        hf.DualformConfig(model.config.model, vocab_size=51)


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
