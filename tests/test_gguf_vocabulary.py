"""Tokenizers in files of GGUF: against those that they were made of, and a loop that joins pairs by their scores."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import dualform as df
from dualform.core.errors import CheckpointError
from dualform.layers.mamba import MambaConfig
from dualform.models.gguf.file import Header
from dualform.models.gguf.vocabulary import ends_of, keys_of, vocabulary
from dualform.models.gguf.write import write_gguf
from dualform.models.tokenizer import SubwordTokenizer, load_tokenizer
from dualform.models.usage import read_ends, usage_of
from dualform.models.world_tokenizer import WorldTokenizer

TEXTS = (
    "It's 1960, and Rudolf Kálmán writes: x_{t+1} = A x_t + 12345 w.\n\n\tWe'll see…  \r\n  Ünïcödé €",
    "don't DON'T 3.14159 (a+b)^2 == a**2   + 2ab\n",
    "",
)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def trained(cut=GPT2, special: tuple[str, ...] = ("<s>", "</s>"), **model) -> Tokenizer:
    """A tokenizer of pairs of bytes, of few tokens."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*special], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, Path(__file__).read_text()], trainer)
    return tokenizer


def header(keys: dict, architecture: str = "mamba2") -> Header:
    return Header({"general.architecture": architecture, **keys}, {})


def again(tokenizer: Tokenizer, ends: tuple[int, ...] = (1,)) -> SubwordTokenizer:
    """The tokenizer once it was in a file."""
    text = vocabulary(header(keys_of(tokenizer.to_str(), 500, ends)), "")
    assert text is not None
    return SubwordTokenizer.from_json(text, "")


CUTS = {
    "gpt-2": GPT2,
    "refact": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
}


@pytest.mark.parametrize("pre", CUTS)
def test_pairs_of_bytes_come_back(pre):
    tokenizer = trained(CUTS[pre])
    got, want = again(tokenizer), SubwordTokenizer(tokenizer)
    assert keys_of(tokenizer.to_str(), 500, (1,))["tokenizer.ggml.pre"] == pre
    for text in TEXTS:
        assert got.encode(text) == want.encode(text) and got.decode(got.encode(text)) == text
    assert got.encode("a<s>b", special=True) == want.encode("a<s>b", special=True)
    assert list(got.begin) == []


def test_what_opens_a_text_comes_back():
    tokenizer = trained()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert list(again(tokenizer).begin) == [0]


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "falcon"])
def test_cuts_by_other_patterns_keep_every_character(pre):
    keys = {**keys_of(trained().to_str(), 500, (1,)), "tokenizer.ggml.pre": pre}
    text = vocabulary(header(keys), "")
    assert text is not None
    tokenizer = SubwordTokenizer.from_json(text, "")
    for line in TEXTS:
        assert tokenizer.decode(tokenizer.encode(line)) == line
    cut = Tokenizer.from_str(text).pre_tokenizer
    pieces = [piece for piece, _ in cut.pre_tokenize_str("in 123456 DON'T")]
    assert {"llama-bpe": "456", "qwen2": "4", "falcon": "456"}[pre] in pieces


def by_scores(text: str, scores: dict[str, float]) -> list[str]:
    """Join the neighbours whose token has the best score, the first of equals, until none are left."""
    parts = list(text)
    while True:
        best = max(
            ((scores[a + b], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in scores),
            default=None,
        )
        if best is None:
            return parts
        at = -best[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_pairs_of_sentencepiece_are_joined_by_their_scores():
    letters = [*"▁abcdt"]
    joined = ["▁a", "ab", "▁ab", "abab", "ca", "dab", "▁the"[:2], "cab", "▁cab", "tt", "tttt"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *joined]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(letters) + len(joined))]
    scores = [0.0] * 259 + [-1000.0 - i for i in range(len(letters))] + [-float(i) for i in range(len(joined))]
    keys = {
        "model": "llama",
        "tokens": tokens,
        "token_type": types,
        "scores": scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    text = vocabulary(header({f"tokenizer.ggml.{key}": value for key, value in keys.items()}), "")
    assert text is not None
    tokenizer, known = SubwordTokenizer.from_json(text, ""), dict(zip(tokens, scores, strict=True))
    for given in ("abab cab", "dab ababab tttttt", "cababab"):
        want = [tokens.index(part) for part in by_scores("▁" + given.replace(" ", "▁"), known)]
        assert tokenizer.encode(given) == want
        assert tokenizer.decode(want) == given
    assert tokenizer.encode("é")[1:] == [3 + byte for byte in "é".encode()]
    assert list(tokenizer.begin) == [1]
    assert ends_of(header({f"tokenizer.ggml.{key}": value for key, value in keys.items()}), 400) == [2]


def test_a_vocabulary_of_world():
    raw = [bytes([byte]) for byte in range(256)] + ["é".encode(), b"ab", b"it's", b'"', b"\xe2\x82"]
    tokens = ["<s>", *(repr(token)[2:-1] for token in raw), "[PAD262]"]
    text = vocabulary(header({"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": tokens}, "rwkv7"), "")
    assert text is not None
    tokenizer = WorldTokenizer.from_text(text, "")
    assert tokenizer is not None
    assert tokenizer.encode("abé it's€") == [258, 257, 33, 259, 261, 0xAC + 1]
    assert tokenizer.decode(tokenizer.encode("abé it's€\x00")) == "abé it's€\x00"


def test_a_file_says_how_it_is_used(tmp_path):
    lm = df.LanguageModel(df.ModelConfig(500, 16, {"M": (MambaConfig(d_state=4),)}, "M"))
    tokenizer = trained()
    write_gguf(lm, tmp_path / "model.gguf", tokenizer.to_str(), [1], "a")
    loaded = load_tokenizer(tmp_path / "model.gguf", 500)
    assert loaded.encode(TEXTS[0]) == SubwordTokenizer(tokenizer).encode(TEXTS[0])
    assert read_ends(tmp_path / "model.gguf", 500) == [1]
    usage = usage_of(tmp_path / "model.gguf", loaded, 500)
    assert usage.ends == (1,) and usage.template is None


def test_what_is_not_known_is_refused_unless_a_tokenizer_lies_beside(tmp_path):
    keys = keys_of(trained().to_str(), 500, (1,))
    wrong = (
        ({"tokenizer.ggml.pre": "tekken"}, r"tokenizer.ggml.pre is 'tekken', expected one of gpt-2"),
        ({"tokenizer.ggml.model": "t5"}, "a tokenizer of the kind 't5', expected gpt2, llama or rwkv"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, "which makes no token"),
        ({"tokenizer.ggml.tokens": 7}, "tokens is 7, expected a list of texts"),
        ({"tokenizer.ggml.token_type": [1]}, "expected one for each token"),
    )
    for change, words in wrong:
        with pytest.raises(CheckpointError, match=words) as caught:
            vocabulary(header({**keys, **change}), "model.gguf: ")
        assert "tokenizer.json beside" in str(caught.value)
    assert vocabulary(header({}), "") is None
    lm = df.LanguageModel(df.ModelConfig(300, 16, {"M": (MambaConfig(d_state=4),)}, "M"))
    write_gguf(lm, tmp_path / "model.gguf", None, (), "a")
    with pytest.raises(CheckpointError, match=r"no tokenizer.json beside it"):
        load_tokenizer(tmp_path / "model.gguf", 300)
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(trained(special=()).to_str())))
    with pytest.raises(CheckpointError, match="tokens, but the model only 300"):
        load_tokenizer(tmp_path / "model.gguf", 300)
    assert load_tokenizer(tmp_path / "model.gguf", 400).encode("it")
