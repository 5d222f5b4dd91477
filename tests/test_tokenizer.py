"""Text round trips, and a stream never emits half a character."""

import json
import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from dualform.core.errors import ArgumentError, CheckpointError
from dualform.models.tokenizer import ByteTokenizer, SubwordTokenizer, load_tokenizer

TEXT = "def größe(naïve): return 'ÅΩ→ 日本語 🙂👩‍👩‍👧 \t\n  x'  # ½ é e\u0301  \u00a0 done. "
CORPUS = [TEXT, "the cat sat on the mat, the dog on the log. " * 5]


def byte_level():
    """As GPT-2: a token is any bytes, so a character may be cut."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS[1:], trainer)
    return SubwordTokenizer(tokenizer)


def byte_fallback():
    """As SentencePiece: words with a mark for the space, bytes for what is unknown; the first space is dropped."""
    vocab = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}}
    for word in ["▁", *(f"{a}{b}" for a in ("▁", "") for b in "abcdefghijklmnopqrstuvwxyz,.")]:
        vocab.setdefault(word, len(vocab))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return SubwordTokenizer(tokenizer)


TOKENIZERS = {"bytes": ByteTokenizer, "byte level": byte_level, "byte fallback": byte_fallback}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    return [*(stream.push(i) for i in ids), stream.flush()]


def test_round_trip(tokenizer):
    for text in ("", "a", " a", TEXT, TEXT * 9):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(isinstance(i, int) and 0 <= i < tokenizer.vocab_size for i in ids)


def test_a_stream_is_the_text_and_never_half_a_character(tokenizer):
    for text in (TEXT, " " + TEXT, TEXT * 9, "日本語" * 60, "🙂" * 60, "plain words only " * 30):
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids) == text
        assert "\ufffd" not in "".join(pieces) and pieces[-1] == ""


def test_a_stream_does_not_wait_longer_than_it_must(tokenizer):
    ids, stream = tokenizer.encode("the cat sat é."), tokenizer.stream()
    shown, waited = "", 0
    for n, i in enumerate(ids, 1):
        shown += stream.push(i)
        waited += shown != tokenizer.decode(ids[:n])
    assert waited <= 1  # in the middle of é


def test_an_unfinished_character_shows_at_the_end():
    smile = "🙂".encode()
    for n in (1, 2, 3):
        assert streamed(ByteTokenizer(), b"a" + smile[:n]) == ["a", *[""] * n, "\ufffd"]
    level = byte_level()
    ids = level.encode("a🙂")
    assert streamed(level, ids[:-1]) == ["a", *[""] * (len(ids) - 2), "\ufffd"]


def test_a_stream_starts_anew_after_its_end(tokenizer):
    stream, ids = tokenizer.stream(), tokenizer.encode("é日")
    for _ in range(2):
        assert "".join(stream.push(i) for i in ids) == "é日" and stream.flush() == ""
        stream.push(ids[0])
        stream.flush()


@pytest.mark.parametrize("name", ["bytes", "byte level"])
def test_a_stream_of_noise_equals_the_text_of_noise(name):
    tokenizer, rng = TOKENIZERS[name](), random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(256) for _ in range(rng.randrange(30))]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["words and words ", "日本語", "\ufffd"])
def test_what_a_stream_keeps_does_not_grow(monkeypatch, text):
    for make in (byte_level, byte_fallback):
        tokenizer, most = make(), 0
        ids, decode = tokenizer.encode(text * 200), tokenizer.decode

        def counted(some, decode=decode):
            nonlocal most
            most = max(most, len(some))
            return decode(some)

        monkeypatch.setattr(tokenizer, "decode", counted)
        shown = "".join(streamed(tokenizer, ids))
        assert shown == text * 200 or set(shown) == set(text) == {"\ufffd"}
        assert most <= 66


def test_endless_rubbish_is_let_go():
    fallback = byte_fallback()
    stream = fallback.stream()
    shown = "".join(stream.push(fallback.vocab_size and 256) for _ in range(500))  # the byte 0xFF
    assert len(shown) > 400 and set(shown) == {"\ufffd"}


def test_bytes_and_their_limits():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é") == [0xC3, 0xA9] and tokenizer.decode([0xC3, 0xA9, 0xFF]) == "é\ufffd"
    assert tokenizer.encode(b"a\xff".decode("utf-8", "surrogateescape")) == [97, 255]
    with pytest.raises(ArgumentError, match="character 1 of the text is a lone surrogate"):
        tokenizer.encode("a\ud800")
    for bad in (256, -1):
        with pytest.raises(ArgumentError, match=f"token {bad} is not a byte"):
            tokenizer.decode([1, bad])
        with pytest.raises(ArgumentError, match=f"token {bad} is not a byte"):
            tokenizer.stream().push(bad)


def with_special(model, pre_tokenizer):
    """``<s> text </s>``, both special; ``<call>``, added but not special; cuts to four tokens, and pads to six."""
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizer
    made.add_special_tokens(["<s>", "</s>", "<|end|>"])
    made.add_tokens(["<call>"])
    pair = [(name, made.token_to_id(name)) for name in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=pair)
    made.enable_truncation(4)
    made.enable_padding(length=6, pad_id=1)
    return SubwordTokenizer(made)


def unigram():
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -9.0) for c in "▁abces<>/|nd")]
    return with_special(models.Unigram(pieces, 0), pre_tokenizers.Metaspace())


def words():
    vocab = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", "a", "b", "c"])}
    return with_special(models.WordLevel(vocab, "<unk>"), pre_tokenizers.WhitespaceSplit())


def whole_words():
    """BPE that looks whole words up before it merges, as that of Llama 3; one merge would make a special token."""
    names = ["<unk>", "<s>", "</s>", *"abces<>/|nd ", "<s"]
    vocab = {name: i for i, name in enumerate(names)}
    model = models.BPE(vocab, [("<", "s"), ("<s", ">")], unk_token="<unk>", ignore_merges=True)
    return with_special(model, pre_tokenizers.WhitespaceSplit())


@pytest.mark.parametrize("make", [unigram, words, whole_words])
def test_text_never_becomes_a_special_token(make):
    tokenizer = make()
    names = {name: tokenizer._tokenizer.token_to_id(name) for name in ("<s>", "</s>", "<|end|>")}
    for text in ("a <s> b", "<s>", "a</s>", "<|end|>", "a <|end|> b </s> c", "<s><s>b", "a b c a b c a b c"):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(names.values())
        if make is not words and " " not in text:
            assert "".join(tokenizer.decode(ids).replace("▁", "").split()) == text
    assert tokenizer.encode("a <s> b", special=True)[-2] == names["<s>"] or make is unigram
    assert names["<|end|>"] in tokenizer.encode("a <|end|> b", special=True)
    call = tokenizer._tokenizer.token_to_id("<call>")  # an added token that is not special is text
    assert call in tokenizer.encode("a <call> b") and "<call>" in tokenizer.decode([call])
    assert len(tokenizer.encode("a b c a b c a b c")) >= 9  # neither cut nor padded
    with pytest.raises(ArgumentError, match="character 1 of the text is a lone surrogate"):
        tokenizer.encode("a\udcff")


def test_ordinary_text_is_encoded_as_the_library_does(tokenizer):
    if isinstance(tokenizer, SubwordTokenizer):
        tokenizer._tokenizer.add_special_tokens(["<unk>", "<s>"])
        for text in (TEXT, CORPUS[1], "日本語 🙂", " a  b "):
            assert tokenizer.encode(text) == tokenizer._tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("make", [unigram, words, whole_words])
def test_a_document_begins_as_the_tokenizer_says(make):
    tokenizer = make()
    start = tokenizer._tokenizer.token_to_id("<s>")
    assert list(tokenizer.begin) == [start] and not ByteTokenizer().begin and not byte_level().begin
    ids = [*tokenizer.begin, *tokenizer.encode("abc")]
    assert tokenizer.decode(ids) == tokenizer.decode(ids[1:]) == "".join(streamed(tokenizer, ids))


def test_a_folder_gives_its_tokenizer(tmp_path):
    assert isinstance(load_tokenizer(tmp_path, 256), ByteTokenizer) and ByteTokenizer().to_json() is None
    level = byte_level()
    (tmp_path / "tokenizer.json").write_text(level.to_json(), encoding="utf-8")
    for vocab in (level.vocab_size, 4096):  # vocabularies are padded
        again = load_tokenizer(tmp_path, vocab)
        assert again.encode(TEXT) == level.encode(TEXT) and again.vocab_size == level.vocab_size
    with pytest.raises(CheckpointError, match=f"has {level.vocab_size} tokens, but the model only 256"):
        load_tokenizer(tmp_path, 256)


def test_a_token_with_an_absurd_number_is_refused(tmp_path):
    """The library would count up to it when it writes the vocabulary."""
    table = json.loads(words().to_json())
    table["model"]["vocab"]["c"] = 2**31
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"not a tokenizer: .*a token has the number 2,147,483,648"):
        SubwordTokenizer.from_file(tmp_path / "tokenizer.json")


def test_a_folder_without_a_fitting_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer.json, and a vocabulary of 50280 is not bytes"):
        load_tokenizer(tmp_path, 50280)
    for text in ("", "{}", "[1"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match="not a tokenizer"):
            load_tokenizer(tmp_path, 256)
    with pytest.raises(CheckpointError, match="no such file"):
        SubwordTokenizer.from_file(tmp_path / "none.json")
