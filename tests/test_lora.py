"""Adapters: trained in place of a model, saved in PEFT's files, loaded and merged as a model."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import dualform as df
from dualform.core.errors import ArgumentError, CheckpointError, ConfigError
from dualform.layers.attention import AttentionConfig
from dualform.layers.mamba2 import Mamba2Config
from dualform.layers.mlp import MLPConfig
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.saving.files import ADAPTER_CONFIG_FILE, ADAPTER_FILE, MANIFEST_FILE
from dualform.train.checkpoint import MOMENTS_FILE, checkpoints
from dualform.train.loop import train
from dualform.train.recipe import Lora
from dualform.train.setup import build_model
from small_runs import QUIET, losses, small_recipe

peft = pytest.importorskip("peft")
PARTS = {"M": (Mamba2Config(d_state=4, d_head=4), MLPConfig(d_hidden=8)), "A": (AttentionConfig(heads=2),)}


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    LanguageModel(ModelConfig(256, 8, PARTS, "MA")).save(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, base):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and saw a bird. " * 120)
    return small_recipe(base, text, tmp_path / "run", data={"length": 16}, lora=Lora(rank=2, alpha=8.0))


def logits(model):
    tokens = torch.arange(24).reshape(2, 12)
    with torch.inference_mode():
        return model.eval()(tokens)[0]


def adapters(folder):
    return load_file(folder / ADAPTER_FILE)


def test_adapters_alone_are_trained_and_kept(recipe, base):
    before, shown = df.load(base).state_dict(), StringIO()
    recipe = replace(recipe, steps=40, save_every=20, optim=replace(recipe.optim, lr=0.1))
    out = train(recipe, console=Console(file=shown, width=200))
    model, _ = build_model(recipe)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    every, count = (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    assert f"{every:,} parameters, {count:,} of them trained" in shown.getvalue()
    assert losses(out)[-1] < 0.99 * losses(out)[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in df.load(base).state_dict().items())
    place = checkpoints(out / "checkpoints")[-1]
    assert {name.rpartition(".")[0] for name in load_file(place / MOMENTS_FILE)} == trained
    for folder in (place / "model", out / "model", out / "best"):
        assert len(adapters(folder)) == len(trained) and not (folder / "model.safetensors").exists()
    found, merged = df.load(out), df.load(base)
    changed = {n for n, p in found.named_parameters() if not torch.equal(p, merged.get_parameter(n))}
    assert changed == {name.replace(".lora_A.default", "").replace(".lora_B.default", "") for name in trained}
    assert all(n.startswith("blocks.") for n in changed) and {n.split(".")[-2] for n in changed} >= {
        "in_proj",
        "out_proj",
    }


def test_a_resumed_run_ends_as_an_unbroken_one(recipe):
    whole = train(recipe, console=QUIET)
    out = train(
        replace(recipe, out=recipe.out + "-two", steps=3, optim=replace(recipe.optim, floor=1.0)), console=QUIET
    )
    kept = adapters(out / "model")
    two = replace(recipe, out=str(out), optim=replace(recipe.optim, floor=1.0))
    train(two, resume=True, console=QUIET)
    unbroken = train(replace(two, out=recipe.out + "-one"), console=QUIET)
    one, again = adapters(unbroken / "model"), adapters(out / "model")
    assert all(torch.equal(one[name], again[name]) for name in one) and losses(out)[-1] == losses(unbroken)[-1]
    assert any(not torch.equal(again[name], kept[name]) for name in kept)
    with pytest.raises(CheckpointError, match=r"cannot change lora\.rank: 2, now 3"):
        train(replace(recipe, out=str(whole), lora=Lora(rank=3)), resume=True, console=QUIET)


def test_what_ran_in_training_is_what_is_loaded(recipe):
    torch.manual_seed(1)
    model, tokenizer = build_model(recipe)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    want = logits(model)
    model.save(recipe.out, tokenizer)
    found = df.load(recipe.out)
    torch.testing.assert_close(logits(found), want, rtol=1e-4, atol=1e-5)
    assert found.adaptation is None and not any("lora" in name for name in found.state_dict())
    half = df.load(recipe.out, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(ArgumentError, match="a model with adapters as 'hf'"):
        df.save(model, Path(recipe.out).with_name("other"), layout="hf")
    assert not Path(recipe.out).with_name("other").exists()


def test_commands_take_a_run_with_adapters(recipe, dualform, tmp_path):
    out = train(recipe, console=QUIET)
    code, _, err = dualform("convert", out, tmp_path / "merged")
    assert code == 0, err
    merged = df.load(tmp_path / "merged")
    assert all(torch.equal(t, merged.state_dict()[name]) for name, t in df.load(out).state_dict().items())
    assert dualform("generate", out, "the", "-n", 3)[0] == 0
    code, shown, _ = dualform("info", out)
    assert code == 0 and ADAPTER_FILE in shown.replace("\n", "")
    code, shown, _ = dualform("verify", out, "--json")
    listed = {
        Path(row["path"]).parent.name: row["status"]
        for row in json.loads(shown)["files"]
        if ADAPTER_FILE in row["path"]
    }
    assert code == 0 and listed == {"model": "ok", "best": "ok"}
    file = out / "model" / ADAPTER_FILE
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert dualform("verify", out)[0] == 2


def test_adapters_are_peft_s_in_both_directions(recipe, base, tmp_path):
    hf = pytest.importorskip("dualform.hf")
    out = train(recipe, console=QUIET)
    tokens = torch.arange(24).reshape(2, 12)
    there = peft.PeftModel.from_pretrained(hf.load(base), out / "model").eval()
    with torch.inference_mode():
        torch.testing.assert_close(there(input_ids=tokens).logits, logits(df.load(out)), rtol=1e-4, atol=1e-5)
    own = peft.get_peft_model(
        hf.load(base), peft.LoraConfig(r=3, target_modules=["in_proj"], use_rslora=True, init_lora_weights=False)
    )
    own.save_pretrained(tmp_path / "own")
    about = json.loads((tmp_path / "own" / ADAPTER_CONFIG_FILE).read_text()) | {"base_model_name_or_path": str(base)}
    (tmp_path / "own" / ADAPTER_CONFIG_FILE).write_text(json.dumps(about))
    with torch.inference_mode():
        want = own.eval()(input_ids=tokens).logits
    torch.testing.assert_close(logits(df.load(tmp_path / "own")), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ArgumentError, match="the model has adapters of PEFT"):
        df.save(own.base_model.model.model, tmp_path / "not")


def test_how_a_model_is_used_goes_with_it(recipe, base, tmp_path):
    (base / "generation_config.json").write_text('{"eos_token_id": 46}')
    (base / "chat_template.jinja").write_text("{{ messages }}")
    for lora in (Lora(rank=1), Lora()):
        out = train(replace(recipe, out=str(tmp_path / str(lora.rank)), steps=1, lora=lora), console=QUIET)
        assert (out / "model" / "generation_config.json").read_text() == '{"eos_token_id": 46}'
        assert (out / "model" / "chat_template.jinja").read_text() == "{{ messages }}"
        listed = json.loads((out / "model" / MANIFEST_FILE).read_text())["files"]
        assert {"generation_config.json", "chat_template.jinja"} < set(listed)


@pytest.mark.parametrize(
    "lora, message",
    [
        (Lora(rank=1, targets=("in_prj",)), r"lora\.targets names 'in_prj', no linear map of a block"),
        (Lora(rank=1, targets=("embed",)), r"lora\.targets names 'embed'"),
    ],
)
def test_targets_that_are_not_there_are_named(recipe, lora, message):
    with pytest.raises(ConfigError, match=message):
        build_model(replace(recipe, lora=lora))


def test_targets_are_chosen_by_whole_names_and_ends(recipe):
    model, _ = build_model(replace(recipe, lora=Lora(rank=1, targets=("blocks.0.parts.0.in_proj", "qkv_proj"))))
    found = {name.split(".lora")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert "blocks.0.parts.0.in_proj" in found and all(
        n == "blocks.0.parts.0.in_proj" or "qkv_proj" in n for n in found
    )


def test_adapters_need_weights_below_them(recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"lora\.rank is 2 for a model without trained weights"):
        build_model(replace(recipe, model="byte-mamba2"))
    out = train(replace(recipe, steps=1), console=QUIET)
    with pytest.raises(ConfigError, match="has adapters already"):
        build_model(replace(recipe, model=str(out)))
    assert build_model(replace(recipe, model=str(out), lora=Lora()))[0].adaptation is None  # merged


def test_a_block_in_several_places_takes_no_adapters(recipe, tmp_path):
    LanguageModel(ModelConfig(256, 8, PARTS, "AMA", shared="A")).save(tmp_path / "shared")
    with pytest.raises(ConfigError, match=r"a block that stands in several places of it \('A'\)"):
        build_model(replace(recipe, model=str(tmp_path / "shared")))


def test_another_base_is_refused(recipe, base, tmp_path):
    out = train(replace(recipe, steps=1), console=QUIET)
    kept = base.rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"base_model_name_or_path is .*, no such folder"):
        df.load(out)
    LanguageModel(ModelConfig(256, 8, PARTS, "MA")).save(base)
    for use in (lambda: df.load(out), lambda: train(replace(recipe, steps=2), resume=True, console=QUIET)):
        with pytest.raises(CheckpointError, match=r"not the weights that the adapters in .* were trained on"):
            use()
    kept.rename(tmp_path / "again")


def _about(**changes):
    def change(folder):
        path = folder / ADAPTER_CONFIG_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _tensors(change):
    def changed(folder):
        tensors = load_file(folder / ADAPTER_FILE)
        change(tensors, sorted(tensors))
        save_file(tensors, folder / ADAPTER_FILE)

    return changed


@pytest.mark.parametrize(
    "damage, message",
    [
        (_about(peft_type="IA3"), "peft_type is 'IA3', expected 'LORA'"),
        (_about(use_dora=True), "use_dora is True, expected False"),
        (_about(rank_pattern={"a": 3}), "rank_pattern is"),
        (_about(r=0), "r is 0, expected at least 1"),
        (_about(r="2"), "r is '2'"),
        (_about(r=10**400), "r is .*, expected at least 1 and at most"),
        (_about(r=3), r"has A \(2, \d+\) and B \(\d+, 2\), expected \(r, \d+\) and \(\d+, r\), r = 3"),
        (_about(lora_alpha=10**400), "lora_alpha is .*, expected at least"),
        (_about(lora_alpha=1e300), "lora_alpha is 1e.?300, expected at least"),
        (_about(base_model_name_or_path=None), "base_model_name_or_path is None"),
        (lambda folder: (folder / ADAPTER_CONFIG_FILE).write_text("{"), ADAPTER_CONFIG_FILE),
        (lambda folder: (folder / ADAPTER_FILE).write_bytes(b"x" * 9), f"{ADAPTER_FILE}: cannot be read"),
        (lambda folder: (folder / ADAPTER_FILE).unlink(), ADAPTER_FILE),
        (_tensors(lambda t, names: t.pop(names[0])), r"has A None and B \(\d+, 2\)"),
        (_tensors(lambda t, names: t.update({names[0]: t[names[0]][:, :-1].contiguous()})), r"expected \(r, \d+\)"),
        (_tensors(lambda t, names: t.update(other=t.pop(names[0]))), "'other' is of no linear map"),
    ],
)
def test_damaged_adapters_are_named(recipe, base, damage, message):
    model, tokenizer = build_model(recipe)
    model.save(recipe.out, tokenizer)
    (Path(recipe.out) / MANIFEST_FILE).unlink()
    damage(Path(recipe.out))
    with pytest.raises(CheckpointError, match=message):
        df.load(recipe.out)
