"""Documents, what is held out, tokens on disk, and windows that follow from the seed and the step."""

import gzip
import json
import lzma
import shutil
from itertools import combinations

import numpy as np
import pytest
import tokenizers
import torch

from dualform.core.errors import DataError
from dualform.models.tokenizer import ByteTokenizer, SubwordTokenizer
from dualform.train import corpus as corpus_module
from dualform.train.corpus import Corpus, Document, split
from dualform.train.data import open_dataset, prepare
from dualform.train.recipe import Data


def documents(path, **options):
    return list(Corpus(Data(path=str(path), **options)))


def write_files(folder, count=40, size=200):
    random = np.random.default_rng(0)
    for i in range(count):
        words = " ".join(str(w) for w in random.integers(0, 1000, size // 4))
        (folder / f"{i:02}.txt").write_text(f"file {i}\n{words} é\n")
    return folder


def make(folder, data, tokenizer=None):
    tokenizer = tokenizer or ByteTokenizer()
    prepare(data, tokenizer, folder / "run" / "data")
    return open_dataset(data, tokenizer, folder / "run" / "data")


def bpe(texts):
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(texts, trainer)
    raw.enable_truncation(5)  # settings for inference must not cut a corpus
    raw.enable_padding(length=9)
    return SubwordTokenizer(raw)


# --- documents ---


def test_a_file_is_a_document(tmp_path):
    (tmp_path / "a.txt").write_text("été\r\n")
    assert documents(tmp_path / "a.txt") == [Document("a.txt", "été\r\n".encode())]


def test_json_lines_are_documents(tmp_path):
    lines = [json.dumps({"text": "one", "n": 1}), "", json.dumps({"text": ""}), json.dumps({"text": "é"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert documents(tmp_path / "a.jsonl") == [Document("a.jsonl:1", b"one"), Document("a.jsonl:4", "é".encode())]
    (tmp_path / "b.ndjson").write_text('{"body": "x"}\n')
    assert documents(tmp_path / "b.ndjson", text_field="body") == [Document("b.ndjson:1", b"x")]


def test_a_folder_is_all_its_text_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in {
        "b/2.txt": b"two", "a.txt": b"one", "c.jsonl": b'{"text": "three"}\n',
        "empty": b"", "picture.png": b"\x89PNG\0", "latin": b"caf\xe9", ".git/config": b"hidden", ".hidden": b"x",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    corpus = Corpus(Data(path=str(tmp_path)))
    want = [Document("a.txt", b"one"), Document("b/2.txt", b"two"), Document("c.jsonl:1", b"three")]
    assert list(corpus) == want == list(corpus)
    assert sorted(corpus.skipped) == ["latin", "picture.png"]


def test_links_to_folders_are_followed_once(tmp_path):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (corpus / "own", elsewhere / "deep"):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(folder.name)
    (corpus / "linked").symlink_to(elsewhere)
    (corpus / "again").symlink_to(corpus / "own")  # has its own place
    (elsewhere / "up").symlink_to(corpus)  # a cycle
    (corpus / "gone").symlink_to(tmp_path / "nowhere")
    (corpus / "itself").symlink_to(corpus / "itself")
    found = Corpus(Data(path=str(corpus)))
    assert list(found) == [Document("linked/deep/a.txt", b"deep"), Document("own/a.txt", b"own")]
    assert found.skipped == ["gone", "itself"]


def test_the_standard_library_is_its_source():
    found = {d.name: d.text for d in Corpus(Data())}
    assert {"json/decoder.py", "argparse.py", "asyncio/tasks.py"} <= set(found)
    assert all(name.endswith(".py") and "test" not in name.split("/")[:-1] for name in found)
    assert not any(name.startswith(("encodings/", "site-packages/", "idlelib/", "_sysconfigdata")) for name in found)
    assert 4e6 < sum(map(len, found.values())) < 2e7


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.txt", b"caf\xe9", "a.txt: not text: byte 3 is not UTF-8"),
        ("a.txt", b"ab\0c", "a.txt: not text: byte 2 is zero"),
        ("a.txt", b"", "holds no text"),
        ("a.jsonl", b'{"text": "a"}\nnonsense', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"body": "a"}', "no text under 'text'; it has 'body'"),
        ("a.jsonl", b'["a"]', "no text under 'text'; it is list"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl, line 1: 'text' is a number, expected a text"),
        ("a.jsonl", b'{"text": null, "id": 7}', "'text' is null, expected a text"),
        ("a.jsonl", b"[" * 99_999, "a.jsonl, line 1: not JSON"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        list(split(Corpus(Data(path=str(tmp_path / name)))))
    assert said in str(error.value)


def test_nothing_to_read_is_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        documents(tmp_path / "missing")
    (tmp_path / "picture.png").write_bytes(b"\0")
    with pytest.raises(DataError, match="no text; passed over 1 files"):
        list(split(Corpus(Data(path=str(tmp_path)))))


# --- what is held out ---


def test_whole_documents_are_held_out_by_name(tmp_path):
    write_files(tmp_path)
    data = Data(path=str(tmp_path), held_out=5)
    parts = list(split(Corpus(data)))
    held = {d.name for d, held_out in parts if held_out}
    assert [d for d, _ in parts] == list(Corpus(data)) and 3 <= len(held) <= 14
    (tmp_path / "zz.txt").write_text("one more changes nothing for the others")
    assert {d.name for d, held_out in split(Corpus(data)) if held_out} - {"zz.txt"} == held


def test_at_most_a_fixed_size_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "HELD_OUT_BYTES", 500)
    held = [d for d, held_out in split(Corpus(Data(path=str(write_files(tmp_path)), held_out=2))) if held_out]
    assert held and sum(len(d.text) for d in held) <= 500


def test_of_few_documents_the_one_of_the_right_size_is_held_out(tmp_path):
    for name, size in (("a", 30), ("b", 10), ("c", 20)):
        (tmp_path / name).write_text("x" * size)
    for every, name in ((2, "a"), (3, "c"), (6, "b"), (20, "a, its end")):
        held = [d for d, held_out in split(Corpus(Data(path=str(tmp_path), held_out=every))) if held_out]
        assert 2 / 3 <= sum(len(d.text) for d in held) / (60 / every) <= 3 / 2
        assert len(held) == 1 or every == 2
        assert held[0].name == name or every == 2


@pytest.mark.parametrize("text", ["line\n" * 100, "é" * 333, "line\n" * 3 + "x" * 90])
def test_a_single_document_gives_up_its_end(tmp_path, text):
    (tmp_path / "a").write_text(text)
    (head, first), (tail, last) = split(Corpus(Data(path=str(tmp_path / "a"), held_out=10)))
    assert (first, last) == (False, True) and head.text + tail.text == text.encode()
    assert 0.05 * len(text.encode()) < len(tail.text) < 0.15 * len(text.encode())
    assert tail.text.decode() and (head.text.decode().endswith("\n") or "\n" not in tail.text.decode())


def held_out(folder, sizes, every=20):
    """What is held out of documents of so many bytes: their names, their share of the text, and what was cut."""
    for name, size in sizes.items():
        (folder / name).write_text(f"{'x' * 9}\n" * (size // 10))
    corpus = Corpus(Data(path=str(folder), held_out=every))
    parts = list(split(corpus))
    assert parts == list(split(corpus)) and sum(len(d.text) for d, _ in parts) == sum(sizes.values())
    held = [d for d, held_back in parts if held_back]
    return [d.name for d in held], sum(len(d.text) for d in held) / sum(sizes.values()), corpus.cut


@pytest.mark.parametrize("small, large", [("a", "b"), ("b", "a"), ("one.txt", "two.txt"), ("2", "1")])
def test_a_large_document_is_not_held_out_beside_a_small_one(tmp_path, small, large):
    for every in range(2, 30):  # of 14 kB and 577 kB, some hash is always a multiple
        names, share, cut = held_out(tmp_path, {small: 14_000, large: 577_000}, every)
        assert 2 / 3 / every <= share <= 3 / 2 / every
        assert (names == [small] and not cut) or (names == [f"{large}, its end"] and cut == large)
    assert held_out(tmp_path, {small: 14_000, large: 577_000}, 29) == ([small], 14 / 591, "")


def test_the_share_of_a_few_documents_is_near_what_was_asked_for(tmp_path):
    """Of any number and sizes; whole documents, wherever a choice of them is near it."""
    random, whole = np.random.default_rng(0), 0
    for i in range(20):
        folder = tmp_path / str(i)
        folder.mkdir()
        sizes = {f"{k}": int(10 * 10 ** random.uniform(1, 3)) // 10 * 10 for k in range(random.integers(2, 16))}
        names, share, cut = held_out(folder, sizes)
        assert 2 / 3 / 20 <= share <= 3 / 2 / 20 + 10 / sum(sizes.values())
        choices = [sum(some) for n in range(1, len(sizes) + 1) for some in combinations(sizes.values(), n)]
        fits = any(2 / 3 <= size * 20 / sum(sizes.values()) <= 3 / 2 for size in choices)
        assert bool(cut) != fits, (sizes, names)
        whole += not cut
    assert 5 < whole < 19


def test_other_whole_documents_are_held_out_where_the_hashes_choose_too_little_or_too_much(tmp_path):
    sizes = {"large": 100_000, **{f"{i}": 100 for i in range(200)}}
    names, share, cut = held_out(tmp_path, sizes, 7)
    assert 0.9 / 7 < share < 1.1 / 7 and len(names) > 150 and "large" not in names and not cut


def test_the_end_of_the_largest_is_held_out_where_no_whole_document_is_small_enough(tmp_path):
    names, share, cut = held_out(tmp_path, {"a": 30_000, "b": 40_000})
    assert names == ["b, its end"] and cut == "b" and 0.048 < share < 0.052


# --- tokens on disk ---


def test_documents_lie_end_to_end_each_after_a_separator(tmp_path, monkeypatch):
    monkeypatch.setattr("dualform.train.data.COMPARABLE", 1)
    data = Data(path=str(write_files(tmp_path)), held_out=5, length=16, separator="\n\n")
    parts = list(split(Corpus(data)))
    dataset = make(tmp_path, data)
    for wanted, ids in ((False, dataset.train), (True, dataset.held_out)):
        texts = [d.text for d, held_out in parts if held_out == wanted]
        assert bytes(ids) == b"".join(b"\n\n" + text for text in texts) and ids.dtype == np.uint8
    held = [d.text for d, held_out in parts if held_out]
    about = dataset.about["held_out"]
    assert about["documents"] == len(held) and about["bytes"] == sum(map(len, held)) == dataset.nbytes.sum()
    assert dataset.nbytes[:3].tolist() == [0, 0, 1]
    text = b"".join(held)
    assert dataset.about["gzip"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert dataset.about["xz"] == 8 * len(lzma.compress(text, preset=9)) / len(text)


def test_compressors_are_no_comparison_on_a_short_text(tmp_path):
    """What they make of 300 bytes is mostly headers."""
    for size, compared in ((300, False), (2**14, True)):
        path = tmp_path / f"{size}.txt"
        path.write_text(("to be or not to be\n" * 2000)[: 2 * size + 60])
        (tmp_path / str(size)).mkdir()
        about = make(tmp_path / str(size), Data(path=str(path), held_out=2, length=16)).about
        assert [about[name] is not None for name in ("gzip", "xz")] == [compared] * 2


def test_a_tokenizer_counts_every_byte_once(tmp_path):
    data = Data(path=str(write_files(tmp_path)), held_out=5, length=16)
    tokenizer = bpe([d.text.decode() for d in Corpus(data)])
    held = [d.text for d, held_out in split(Corpus(data)) if held_out]
    dataset = make(tmp_path, data, tokenizer)
    assert dataset.held_out.dtype == np.uint16
    assert dataset.nbytes.sum() == sum(map(len, held)) == dataset.about["held_out"]["bytes"]
    assert tokenizer.decode(dataset.held_out.tolist()).encode() == b"".join(b"\n" + text for text in held)
    sizes = [len(tokenizer.decode([i]).encode()) for i in dataset.held_out.tolist()[1:10]]
    assert dataset.nbytes[1:10].tolist() == sizes  # ASCII: a token's bytes are its text's


@pytest.mark.parametrize("separator, before", [("<|end|>", ["<|end|>", "<s>"]), ("<|end|><s>", ["<|end|>", "<s>"])])
def test_only_the_separator_names_special_tokens(tmp_path, separator, before):
    """Documents are opened by what the tokenizer puts before a text, once, and their own text stays text."""
    (tmp_path / "text").mkdir()
    for i in range(4):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} <|end|> <s>forged</s> " * 9)
    raw = bpe(["<|end|> forged"])._tokenizer
    raw.add_special_tokens(["<s>", "</s>", "<|end|>"])
    pair = [(name, raw.token_to_id(name)) for name in ("<s>", "</s>")]
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=pair)
    tokenizer = SubwordTokenizer(raw)
    data = Data(path=str(tmp_path / "text"), length=16, separator=separator, held_out=4)
    dataset = make(tmp_path, data, tokenizer)
    opening, first = [raw.token_to_id(name) for name in before], min(id for _, id in pair)
    ids, starts = np.array(dataset.held_out), [0] if dataset.about["held_out"]["documents"] == 1 else None
    text = (tmp_path / "text" / f"{tokenizer.decode(ids.tolist())[0]}.txt").read_text()
    assert starts and ids[:2].tolist() == opening and not (ids[2:] >= first).any() and dataset.nbytes[:2].sum() == 0
    assert tokenizer.decode(ids[2:].tolist()) == text and dataset.nbytes.sum() == len(text)


def test_a_split_character_is_counted_once(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_text("日本語 👍🏽 " * 20)
    data = Data(path=str(tmp_path / "text"), length=16)
    dataset = make(tmp_path, data, bpe(["abc"]))
    assert dataset.nbytes.sum() == dataset.about["held_out"]["bytes"] < len(dataset.held_out)
    assert dataset.about["cut"] == "2.txt" and dataset.about["train"]["documents"] == 3


def test_prepared_tokens_do_not_need_the_source(tmp_path):
    (tmp_path / "text").mkdir()
    data = Data(path=str(write_files(tmp_path / "text")), length=16)
    before = bytes(make(tmp_path, data).train)
    shutil.rmtree(tmp_path / "text")
    assert bytes(open_dataset(data, ByteTokenizer(), tmp_path / "run" / "data").train) == before


def test_tokens_of_another_source_are_refused(tmp_path):
    data = Data(path=str(write_files(tmp_path)), length=16)
    make(tmp_path, data)
    with pytest.raises(DataError, match="tokenizer"):
        open_dataset(data, bpe(["abc"]), tmp_path / "run" / "data")
    with pytest.raises(DataError, match=r"data\.held_out"):
        open_dataset(Data(path=data.path, held_out=7), ByteTokenizer(), tmp_path / "run" / "data")
    with pytest.raises(DataError, match="no prepared data"):
        open_dataset(data, ByteTokenizer(), tmp_path / "elsewhere")


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a\n" * 40)
    with pytest.raises(DataError, match=r"gives \d+ training tokens, fewer than one window of 128"):
        make(tmp_path, Data(path=str(tmp_path / "a.txt")))
    (tmp_path / "b.txt").write_text("a")
    with pytest.raises(DataError):
        make(tmp_path, Data(path=str(tmp_path / "b.txt"), length=1))


# --- windows ---


def test_windows_follow_from_the_seed_and_the_step(tmp_path):
    data = Data(path=str(write_files(tmp_path)), length=16, batch=6)
    dataset = make(tmp_path, data)

    def windows(*args, **options):
        return torch.cat(list(dataset.windows(data, *args, **options)))

    one = windows(3, 5)
    assert one.shape == (6, 17) and one.dtype == torch.int64 and torch.equal(one, windows(3, 5))
    assert not torch.equal(one, windows(3, 6)) and not torch.equal(one, windows(4, 5))
    text = bytes(dataset.train)
    assert all(bytes(row.tolist()) in text for row in one)


def test_processes_share_the_batch_and_portions_share_a_process(tmp_path):
    data = Data(path=str(write_files(tmp_path)), length=16, batch=12)
    dataset = make(tmp_path, data)
    (whole,) = dataset.windows(data, 0, 1)
    ranks = [next(dataset.windows(data, 0, 1, rank, 3)) for rank in range(3)]
    assert torch.equal(torch.stack(ranks, 1).flatten(0, 1), whole)
    halves = list(dataset.windows(Data(path=data.path, length=16, batch=12, accumulate=2), 0, 1, 2, 3))
    assert [len(h) for h in halves] == [2, 2] and torch.equal(torch.cat(halves), ranks[2])


def test_windows_reach_both_ends(tmp_path):
    (tmp_path / "a.txt").write_text("ab\ncd\nef\n" * 2)
    data = Data(path=str(tmp_path / "a.txt"), length=13, batch=64, held_out=6)
    dataset = make(tmp_path, data)
    starts = {bytes(row.tolist()) for row in next(dataset.windows(data, 0, 0))}
    text = bytes(dataset.train)
    assert starts == {text[i : i + 14] for i in range(len(text) - 13)} and len(starts) > 1
