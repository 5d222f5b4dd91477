"""Training on conversations: what the template writes is read, and the answers alone are learned."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import dualform as df
from dualform.core.errors import ConfigError, DataError
from dualform.layers.mamba2 import Mamba2Config
from dualform.models.chat import ChatTemplate
from dualform.models.config import ModelConfig
from dualform.models.lm import LanguageModel
from dualform.models.tokenizer import ByteTokenizer, SubwordTokenizer
from dualform.train.chat import read_and_targets
from dualform.train.data import open_dataset, prepare, whole_text
from dualform.train.evaluate import score
from dualform.train.loop import train
from dualform.train.packed import Packed
from dualform.train.recipe import Data, Lora, Optim, Recipe
from small_runs import QUIET, losses, small_recipe

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "A colour?"},
    {"role": "assistant", "content": "Blau, würde ich sagen."},
    {"role": "user", "content": "Say <|end|> now"},
    {"role": "assistant", "content": "<|end|> it is"},
]


def subwords():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|start|>", "<|end|>"])
    return SubwordTokenizer(made)


def written(tokenizer, folder, talks, **data):
    path = folder / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    data = Data(path=str(path), chat=True, length=64, held_out=2, **data)
    template = ChatTemplate(CHATML)
    prepare(data, tokenizer, folder / "data", template)
    return data, open_dataset(data, tokenizer, folder / "data", template)


def test_answers_and_their_ends_are_learned_and_nothing_else(tmp_path):
    tokenizer = subwords()
    start, end = (tokenizer.encode(name, special=True)[0] for name in ("<|start|>", "<|end|>"))
    _, dataset = written(tokenizer, tmp_path, [TALK] * 6)
    ends = [*dataset.train_starts[1:], len(dataset.train)]
    (tokens,) = {tuple(dataset.train[a:b]) for a, b in zip(dataset.train_starts, ends, strict=True)}
    read = np.array([~t if t < 0 else t for t in tokens])
    assert (read == start).sum() == (read == end).sum() == len(TALK)  # what a message says is text
    learned = np.array(tokens) >= 0
    runs = np.split(read[learned], np.flatnonzero(np.diff(np.flatnonzero(learned)) > 1) + 1)
    newline = tokenizer.encode("\n")
    assert [run.tolist() for run in runs] == [
        [*tokenizer.encode(answer), end, *newline] for answer in ("Blau, würde ich sagen.", "<|end|> it is")
    ]
    assert list(read) == ChatTemplate(CHATML).encode(tokenizer, TALK, answer=False)
    size = sum(len(m["content"].encode()) for m in TALK if m["role"] == "assistant")
    about = dataset.about
    assert about["train"]["bytes"] == size * about["train"]["documents"]
    assert about["train"]["learned"] == learned.sum() * about["train"]["documents"]
    assert dataset.nbytes.sum() == about["held_out"]["bytes"] and not dataset.nbytes[dataset.held_out[:] < 0].any()
    assert about["gzip"] is None


def model():
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(258, 8, {"M": (Mamba2Config(d_state=4, d_head=4),)}, "M"))


def alone(lm, tokenizer, talk):
    """The loss of each learned token of a conversation, by the definition."""
    ids = torch.tensor([ChatTemplate(CHATML).encode(tokenizer, talk, answer=False)])
    losses = F.cross_entropy(lm(ids)[0][0, :-1], ids[0, 1:], reduction="none")
    learned = torch.zeros(ids.shape[1], dtype=torch.bool)
    for i, message in enumerate(talk):
        if message["role"] == "assistant":
            begin, end = (len(ChatTemplate(CHATML).encode(tokenizer, talk[: i + j], answer=not j)) for j in (0, 1))
            learned[begin:end] = True
    return losses[learned[1:]]


def talks(count):
    words = ["red", "green", "a longer answer", "no"]
    return [
        [{"role": "user", "content": f"number {i}"}, {"role": "assistant", "content": words[i % 4] + "!" * (i % 3)}]
        for i in range(count)
    ]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_of_a_step_is_the_mean_over_the_learned_tokens(tmp_path, accumulate):
    from dualform.train.objective import Objective

    tokenizer, lm, every = subwords(), model(), talks(12)
    data, dataset = written(tokenizer, tmp_path, every, packed=True, batch=4, accumulate=accumulate)
    packed = Packed(dataset.train, dataset.train_starts, data.length, 0)
    portions = list(packed.portions(data, 0))
    found = sum(Objective(lm, chat=True)(p.tokens, p.cu_seqlens) * p.share / len(portions) for p in portions)
    losses = []
    for p in portions:
        for begin, end in zip(p.cu_seqlens[:-1], p.cu_seqlens[1:], strict=True):
            read, targets = read_and_targets(p.tokens[:, begin:end])
            losses.append(F.cross_entropy(lm(read)[0][0], targets[0], reduction="none")[targets[0] >= 0])
    torch.testing.assert_close(found, torch.cat(losses).mean())
    assert packed.predicted(data, 0) == len(torch.cat(losses))


def test_a_score_is_that_of_the_answers(tmp_path):
    tokenizer, lm, every = subwords(), model(), talks(5)
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in every))
    data = Data(path=str(path), chat=True, length=64)
    with whole_text(data, tokenizer, ChatTemplate(CHATML)) as dataset:
        found = score(lm, dataset, length=64, packed=True)
    want = torch.cat([alone(lm, tokenizer, talk) for talk in every])
    assert found.tokens == len(want) and found.nats == pytest.approx(want.sum().item(), rel=1e-5)
    assert found.bytes == sum(len(talk[1]["content"]) for talk in every)


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    model().save(folder, subwords())
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return folder


@pytest.fixture
def recipe(tmp_path, base):
    text = tmp_path / "talks.jsonl"
    text.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks(14)))
    data = {"chat": True, "length": 48}
    return small_recipe(base, text, tmp_path / "run", data=data, optim=Optim(lr=0.05, warmup=1))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_on_conversations(recipe, rank, dualform, tmp_path):
    shown = StringIO()
    recipe = replace(recipe, lora=Lora(rank=rank))
    out = train(recipe, console=Console(file=shown, width=200))
    assert ", of answers (" in shown.getvalue()
    assert losses(out)[-1] < losses(out)[0]
    assert Recipe.load(out).data.packed
    level = replace(recipe, optim=replace(recipe.optim, floor=1.0))  # the rate does not depend on the steps
    two = train(replace(level, out=recipe.out + "-two", steps=3), console=QUIET)
    train(replace(level, out=str(two)), resume=True, console=QUIET)
    whole = train(replace(level, out=recipe.out + "-whole"), console=QUIET)
    one, again = df.load(whole).state_dict(), df.load(two).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    code, text, err = dualform(
        "eval", out, "--set", f"data.path={recipe.data.path}", "--set", "data.chat=true", "--json"
    )
    assert code == 0, err
    every = [json.loads(line)["messages"] for line in Path(recipe.data.path).read_text().splitlines()]
    found = json.loads(text)
    assert found["of"] == "answers"
    shown = dualform("eval", out, "--set", f"data.path={recipe.data.path}", "--set", "data.chat=true")[1]
    assert "per token of answers\n" in shown and f"{found['tokens']:,} tokens of answers, 14 documents" in shown
    want = torch.cat([alone(df.load(out), subwords(), talk) for talk in every])
    assert found["tokens"] == len(want) and found["nats"] == pytest.approx(want.sum().item(), rel=1e-4)
    assert dualform("verify", out)[0] == 0
    code, text, err = dualform("generate", out, "number 3", "-n", "3", "-t", "0")
    assert code == 0, err


@pytest.mark.parametrize("size, dtype", [(128, "int8"), (129, "int16"), (2**15 + 1, "int32")])
def test_tokens_take_the_narrowest_integer_with_a_sign(tmp_path, size, dtype):
    class Letters(ByteTokenizer):
        vocab_size = size

    _, dataset = written(Letters(), tmp_path, talks(6))
    assert dataset.train.dtype == dataset.about["dtype"] == dtype


def test_a_model_without_a_template_is_refused(recipe, base, dualform):
    (base / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"data\.chat is true for a model without a chat template"):
        train(recipe, console=QUIET)
    assert not Path(recipe.out).exists()
    with pytest.raises(DataError, match="no template was given"):
        prepare(recipe.data, ByteTokenizer(), Path(recipe.out))
    with pytest.raises(ConfigError, match="without a chat template"):
        train(replace(recipe, model="byte-mamba2"), console=QUIET)
    args = ("eval", base, "--set", f"data.path={recipe.data.path}", "--set", "data.chat=true")
    code, _, err = dualform(*args)
    assert code == 2 and "has no chat template" in err


def test_another_template_makes_other_data(recipe, base):
    train(replace(recipe, steps=1), console=QUIET)
    (base / "chat_template.jinja").write_text(CHATML.replace("Be", "be") + " ")
    with pytest.raises(DataError, match="chat template"):
        train(replace(recipe, steps=2), resume=True, console=QUIET)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "x"}', r"line 2: no list of messages under 'messages'; it has 'text'"),
        ("[1]", "line 2: no list of messages"),
        ('{"messages": "x"}', "no list of messages"),
        ('{"messages": []}', "no message of the role 'assistant'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no message of the role 'assistant'"),
        ('{"messages": [{"role": "assistant", "content": ""}]}', "message 0 is an empty answer"),
        ('{"messages": [{"role": "user"}]}', "message 0 is .*, expected a role and a content"),
        ('{"messages": [{"role": 3, "content": "x"}]}', "expected a role and a content"),
        ("{", "line 2: not JSON that can be read"),
    ],
)
def test_lines_that_are_no_conversations_are_named(tmp_path, line, message):
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        prepare(Data(path=str(path), chat=True), ByteTokenizer(), tmp_path / "data", ChatTemplate(CHATML))


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('roles must alternate') }}", r"talks\.jsonl:1: .*roles must alternate"),
        (
            "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}",
            "writes the answer in message 2 otherwise",
        ),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            "writes nothing of the answer in message 2",
        ),
        (
            "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}{{ '>' if add_generation_prompt }}",
            "does not write the answer in message 2 where generation would begin it",
        ),
    ],
)
def test_templates_in_which_no_answer_can_be_found_are_refused(tmp_path, template, message):
    path = tmp_path / "talks.jsonl"
    path.write_text((json.dumps({"messages": TALK}) + "\n") * 3)
    with pytest.raises(DataError, match=message):
        prepare(Data(path=str(path), chat=True), ByteTokenizer(), tmp_path / "data", ChatTemplate(template))


def test_a_conversation_that_begins_with_an_answer(tmp_path):
    """Nothing foretells its first token, which is not learned from the end of another conversation."""
    talk = [{"role": "assistant", "content": "éa"}, {"role": "user", "content": "b"}]
    path, template = tmp_path / "talks.jsonl", ChatTemplate("{% for m in messages %}{{ m.content }};{% endfor %}")
    path.write_text((json.dumps({"messages": talk}) + "\n") * 3)
    data = Data(path=str(path), chat=True, length=8)
    prepare(data, ByteTokenizer(), tmp_path / "data", template)
    found = open_dataset(data, ByteTokenizer(), tmp_path / "data", template)
    first, *answer = "éa;".encode()
    assert found.held_out.tolist() == [~first, *answer, ~ord("b"), ~ord(";")]
    assert found.nbytes.tolist() == [0, 1, 1, 1, 0, 0] and found.about["held_out"]["learned"] == 3


def test_conversations_that_are_cut_are_counted(recipe):
    def said(length):
        shown = StringIO()
        some = replace(recipe, out=f"{recipe.out}-{length}", steps=1, data=replace(recipe.data, length=length))
        out = train(some, console=Console(file=shown, width=300))
        kinds = (("ids", np.int16), ("starts", np.int64))
        tokens, starts = (np.fromfile(out / "data" / f"train.{name}", kind) for name, kind in kinds)
        return shown.getvalue(), np.diff(starts, append=len(tokens))

    text, sizes = said(40)
    longest = int(sizes.max()) - 1  # predicted tokens
    cut = int((sizes - 1 > 40).sum())
    assert 0 < cut < len(sizes)
    assert f"warning: {cut} of {len(sizes)} conversations have more than 40 tokens (data.length) and are cut" in text
    assert text.count("are cut") == 1 and f"--set data.length={longest}\n" in text
    assert "are cut" in said(longest - 1)[0] and "are cut" not in said(longest)[0]


def test_a_corpus_of_conversations_is_known_without_being_told(tmp_path, dualform):
    path = tmp_path / "talks.jsonl"
    path.write_text((json.dumps({"messages": TALK, "topic": "x"}) + "\n") * 3)
    with pytest.raises(DataError, match=r"no text under 'text'.*\n.*conversations: --set data\.chat=true$"):
        prepare(Data(path=str(path)), ByteTokenizer(), tmp_path / "data")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("learned", None, r"train: the key 'learned' is missing"),
        ("learned", 2.0, "learned is 2.0, expected a whole number"),
        ("learned", 0, r"train\.learned is 0, expected 1 to train\.tokens"),
        ("learned", 10**9, r"train\.learned is 1000000000, expected 1 to train\.tokens"),
        ("learned", 1, r"train\.ids: [\d,]+ tokens are learned, but about\.json speaks of 1"),
    ],
)
def test_what_is_learned_is_what_was_prepared(tmp_path, key, value, message):
    data, _ = written(subwords(), tmp_path, [TALK] * 6)
    about = json.loads((tmp_path / "data" / "about.json").read_text())
    about["train"] |= {key: value}
    if value is None:
        del about["train"][key]
    (tmp_path / "data" / "about.json").write_text(json.dumps(about))
    (tmp_path / "data" / "manifest.json").unlink()
    with pytest.raises(DataError, match=message):
        open_dataset(data, subwords(), tmp_path / "data", ChatTemplate(CHATML))


def test_text_in_a_folder_of_conversations_is_passed_over(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "readme.txt").write_text("not one")
    (tmp_path / "in" / "talks.jsonl").write_text((json.dumps({"messages": TALK}) + "\n") * 4)
    data = Data(path=str(tmp_path / "in"), chat=True)
    prepare(data, ByteTokenizer(), tmp_path / "data", ChatTemplate(CHATML))
    assert open_dataset(data, ByteTokenizer(), tmp_path / "data", ChatTemplate(CHATML)).about["skipped"] == 1
    with pytest.raises(DataError, match=r"not JSON lines, which data\.chat reads"):
        alone_in = replace(data, path=str(tmp_path / "in" / "readme.txt"))
        prepare(alone_in, ByteTokenizer(), tmp_path / "data", ChatTemplate(CHATML))


def test_a_conversation_is_held_out_whole(tmp_path):
    path, template = tmp_path / "talks.jsonl", ChatTemplate(CHATML)
    data = Data(path=str(path), chat=True)
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in [TALK, TALK[:3], TALK]))
    prepare(data, ByteTokenizer(), tmp_path / "data", template)
    about = open_dataset(data, ByteTokenizer(), tmp_path / "data", template).about
    assert (about["train"]["documents"], about["held_out"]["documents"], about["cut"]) == (2, 1, "")
    assert about["held_out"]["bytes"] == len(TALK[2]["content"].encode())
    path.write_text(json.dumps({"messages": TALK}) + "\n")
    with pytest.raises(DataError, match="holds one conversation"):
        prepare(data, ByteTokenizer(), tmp_path / "data", template)
