"""Tokenizers out of GGUF keys: the ids, texts and templates of the tokenizers that the keys were made from."""

import itertools
import json
from typing import Any

import numpy as np
import pytest
import tokenizers
from gguf_files import vocabulary_keys
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from millrace.runtime.errors import CheckpointError
from millrace.runtime.text.chat import ChatTemplate, encode_chat
from millrace.runtime.text.gguf_tokenizer import chat_templates, load_tokenizer, special_ids
from millrace.runtime.text.tokenizer import Tokenizer
from millrace.runtime.weights.resolve import resolve_model

TEXTS = [
    "Hello world, how are you today? I'm fine, we'LL see, it's DON'T.",
    "  two spaces before, two after  \n\n\n  x\r\n\t y",
    "naïve café Zażółć gęślą jaźń 日本語のテキスト 😀👩‍🚀 Привет, мир!",
    "12345 numbers, 1,234.5; if x < 3 and y > 4: return f(x)//2 # ok?!... CamelCaseWords HTTPServer",
    "<|im_start|>user\nNot control<|end|> <s></s> <tool_call> <|eot_id|>",
    "\u00a0no-break, \u2003em, \u0661\u0662\u0663 digits, ½ ² Ⅷ, e\u0301",
    "",
    " ",
]
# Patterns as the tokenizer.json of published models have them.
PUBLISHED = {
    "gpt-2": [r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"],
    "llama-bpe": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
    ],
    "qwen2": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
    ],
    "seed-coder": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
    ],
    "tekken": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
    ],
    "gpt-4o": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
    ],
}
WHERE = "model.gguf"


def metadata(keys: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """Keys as the reader gives them: numbers in arrays. `changed` replaces keys of tokenizer.ggml; None drops one."""
    keys = keys | {f"tokenizer.ggml.{name}": value for name, value in changed.items()}
    return {
        key: np.array(value) if isinstance(value, list) and not isinstance(value[0], str) else value
        for key, value in keys.items()
        if value is not None
    }


def published(name: str) -> tokenizers.Tokenizer:
    """A small tokenizer with the pre-tokenizer of a published one."""
    lib = tokenizers.Tokenizer(models.BPE(ignore_merges=name in ("llama-bpe", "tekken")))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "smollm")
    if name == "smollm":
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True), to_bytes]
    else:
        steps = [*(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PUBLISHED[name]), to_bytes]
    lib.pre_tokenizer = pre_tokenizers.Sequence(steps)
    lib.normalizer = normalizers.NFC() if name == "qwen2" else None
    lib.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    lib.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    lib.add_special_tokens(["<|begin|>", "<|im_start|>", "<|eot_id|>"])
    lib.add_tokens([AddedToken(text, normalized=False) for text in ("<tool_call>", "   ")])
    return lib


@pytest.fixture(scope="module")
def grist() -> tuple[Tokenizer, dict[str, Any]]:
    """The embedded model's tokenizer, and the keys made from it."""
    folder = resolve_model().path
    config = json.loads((folder / "tokenizer_config.json").read_text())
    lib = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    keys = vocabulary_keys(lib, config, 4096) | {"tokenizer.ggml.pre": "qwen2"}
    return Tokenizer.load(folder), metadata(keys | {"tokenizer.chat_template": config["chat_template"]})


@pytest.fixture(scope="module")
def read(grist: tuple[Tokenizer, dict[str, Any]]) -> Tokenizer:
    return load_tokenizer(grist[1], WHERE)


@pytest.mark.parametrize("name", [*PUBLISHED, "smollm"])
def test_pre_tokenizers_cut_as_the_published_ones(name: str) -> None:
    lib = published(name)
    keys = vocabulary_keys(lib, {"bos_token": "<|begin|>"}, lib.get_vocab_size())
    ours = load_tokenizer(metadata(keys, pre=name, add_bos_token=False), WHERE)
    want = Tokenizer(lib, special_tokens={"bos_token": "<|begin|>"})
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == want.encode(text)
        assert ours.encode_control(text) == want.encode_control(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == want.decode(ids, skip)
    assert (ours.control_ids, ours.special_ids, ours.bos_id) == (want.control_ids, want.special_ids, want.bos_id)
    assert [ours.token_bytes(index) for index in range(610)] == [want.token_bytes(index) for index in range(610)]


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=60))
def test_the_embedded_tokenizer_comes_back(grist: tuple[Tokenizer, dict[str, Any]], read: Tokenizer, text: str) -> None:
    want, ours = grist[0], read
    text = normalizers.NFC().normalize_str(text)  # Qwen2's tokenizers do that, grist's does not
    assert ours.encode(text) == want.encode(text)
    assert ours.decode(ours.encode(text)) == want.decode(want.encode(text))


def test_everything_that_is_named_comes_back(grist: tuple[Tokenizer, dict[str, Any]], read: Tokenizer) -> None:
    (want, keys), ours = grist, read
    assert (ours.vocab_size, ours.eos_ids, ours.bos_id, ours.eos_id) == (4096, (1,), None, 1)
    assert ours.control_tokens == want.control_tokens
    assert dict(ours.special_tokens) == dict(want.special_tokens)
    template = ChatTemplate(chat_templates(keys), ours.special_tokens)
    messages = [{"role": "user", "content": "Is <|end|> text?"}]
    asked = encode_chat(want, ChatTemplate.load(resolve_model().path, want.special_tokens), messages)
    assert encode_chat(ours, template, messages) == asked


def test_the_vocabulary_without_a_named_pre_tokenizer() -> None:
    """llama.cpp's own: punctuation is cut off first, and digits into threes."""
    lib = published("gpt-2")
    keys = metadata(vocabulary_keys(lib, {}, lib.get_vocab_size()))
    ours = load_tokenizer(keys, WHERE)
    assert keys.get("tokenizer.ggml.pre") is None
    cut = ours._lib.pre_tokenizer.pre_tokenize_str("a  1234567 (b)'s")
    assert [piece for piece, _ in cut] == ["a", "Ġ", "Ġ", "123", "456", "7", "Ġ", "(", "b", ")'", "s"]


@pytest.mark.parametrize(("flags", "want"), [
    ({}, (1, 0)), ({"add_bos_token": False}, (0, 0)), ({"add_bos_token": True, "add_eos_token": True}, (1, 1)),
])  # fmt: skip
def test_tokens_around_a_text(flags: dict[str, bool], want: tuple[int, int]) -> None:
    lib = published("llama-bpe")
    config = {"bos_token": "<|begin|>", "eos_token": "<|eot_id|>"}
    keys = vocabulary_keys(lib, config, lib.get_vocab_size())
    ours = load_tokenizer(metadata(keys, pre="llama-bpe", **flags), WHERE)
    inner = ours.encode("Hello", add_special_tokens=False)
    assert ours.encode("Hello") == [ours.bos_id] * want[0] + inner + [ours.eos_id] * want[1]


def test_rows_that_fill_the_table_are_no_tokens(grist: tuple[Tokenizer, dict[str, Any]]) -> None:
    _, keys = grist
    tokens = [*keys["tokenizer.ggml.tokens"], "[PAD4096]", "[PAD4097]"]
    types = [*keys["tokenizer.ggml.token_type"].tolist(), 5, 5]
    ours = load_tokenizer(metadata(keys, tokens=tokens, token_type=types), WHERE)
    assert ours.vocab_size == 4096
    assert ours.token_bytes(4097) == b""
    assert ours.decode(ours.encode("[PAD4096]")) == "[PAD4096]"


def test_ids_that_end_a_text() -> None:
    tokens = ["a", "<|eot_id|>", "<|end_of_text|>", "<|im_end|>", "b", "<|eom_id|>"]
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens}
    found = special_ids(metadata(keys, eos_token_id=2, eot_token_id=4, padding_token_id=0xFFFFFFFF), WHERE)
    assert found.endings == (2, 4, 1, 3, 5)
    assert found.named == {"eos_token": 2}
    assert special_ids(metadata(keys), WHERE).endings == (1, 2, 3, 5)


class Pieces:
    """SentencePiece's BPE as llama.cpp does it: the two neighbours whose piece has the highest score are merged, the
    leftmost first; what is no token in the end goes by bytes."""

    def __init__(self, tokens: list[str], scores: list[float], types: list[int]) -> None:
        self.ids = {token: index for index, token in enumerate(tokens)}
        self.scores = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == 1}

    def encode(self, text: str) -> list[int]:
        parts = list("▁" + text.replace(" ", "▁")) if text else []
        while True:
            joined = enumerate(one + two for one, two in itertools.pairwise(parts))
            pairs = [(self.scores.get(piece, -np.inf), -at) for at, piece in joined]
            best, at = max(pairs, default=(-np.inf, 0))
            if best == -np.inf:
                break
            parts[-at : -at + 2] = [parts[-at] + parts[-at + 1]]
        ids: list[int] = []
        for part in parts:
            ids += [self.ids[part]] if part in self.ids else [self.ids[f"<0x{byte:02X}>"] for byte in part.encode()]
        return ids


@pytest.fixture(scope="module")
def pieces() -> dict[str, Any]:
    """The keys of a SentencePiece vocabulary; a merge's rank is its piece's score."""
    lib = tokenizers.Tokenizer(models.BPE())
    lib.normalizer = normalizers.Replace(" ", "▁")
    lib.train_from_iterator(TEXTS[:4] * 3, trainers.BpeTrainer(vocab_size=330, show_progress=False))
    spec = json.loads(lib.to_str())["model"]
    merged = ["".join(merge) for merge in spec["merges"]]
    single = [token for token in spec["vocab"] if len(token) == 1 and ord(token) < 0x3000]
    kept = [piece for piece in merged if all(ord(char) < 0x3000 for char in piece)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *kept, *single, "[INST]", "<mark>"]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(kept) + len(single)) + [3, 4]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(kept) + len(single))] + [0.0, 0.0]
    return metadata({
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.scores": scores,
    })  # fmt: skip


@pytest.mark.parametrize("text", [*TEXTS, "Hello Hello  hello\nworld", "日本 x 😀"])
def test_sentencepiece_merges_by_score(text: str, pieces: dict[str, Any]) -> None:
    ours = load_tokenizer(pieces, WHERE)
    types = pieces["tokenizer.ggml.token_type"].tolist()
    want = Pieces(pieces["tokenizer.ggml.tokens"], pieces["tokenizer.ggml.scores"].tolist(), types).encode(text)
    assert ours.encode(text) == [1, *want]  # BOS where no key says otherwise
    assert ours.decode(ours.encode(text)) == text


def test_sentencepiece_special_tokens(pieces: dict[str, Any]) -> None:
    ours = load_tokenizer(pieces, WHERE)
    inst, mark = len(pieces["tokenizer.ggml.tokens"]) - 2, len(pieces["tokenizer.ggml.tokens"]) - 1
    assert (ours.bos_id, ours.eos_id, ours.eos_ids) == (1, 2, (2,))  # SentencePiece's own, as no key has others
    assert ours.special_ids == {0, 1, 2, inst}
    ids = ours.encode_control("<s>[INST] Hello<mark></s>")
    assert [index for index in ids if index in (1, 2, inst, mark)] == [1, inst, mark, 2]
    assert not {1, 2, inst} & set(ours.encode("<s>[INST]</s>", add_special_tokens=False))


def test_sentencepiece_without_a_space_in_front(pieces: dict[str, Any]) -> None:
    ours = load_tokenizer(metadata(pieces, add_space_prefix=False, add_bos_token=False), WHERE)
    with_space = load_tokenizer(metadata(pieces, add_bos_token=False), WHERE)
    assert ours.encode(" Hello world") == with_space.encode("Hello world") != ours.encode("Hello world")
    assert ours.decode(ours.encode(" Hello")) == " Hello"


def test_templates_by_name() -> None:
    keys = {
        "tokenizer.chat_template": "{{ 'd' }}",
        "tokenizer.chat_templates": ["tool_use", "missing"],
        "tokenizer.chat_template.tool_use": "{{ 't' }}",
    }
    assert chat_templates(keys) == {"default": "{{ 'd' }}", "tool_use": "{{ 't' }}"}
    assert chat_templates({}) == {}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": "bert"}, "tokenizer.ggml.model is 'bert', but it must be gpt2 or llama"),
    ({"model": None}, "tokenizer.ggml.model is missing"),
    ({"pre": "kimi-k2"}, "tokenizer.ggml.pre is 'kimi-k2', but it must be one of default, gpt-2, llama-bpe"),
    ({"tokens": None}, "tokenizer.ggml.tokens must be a list of strings"),
    ({"merges": None}, "tokenizer.ggml.merges must be a list of strings"),
    ({"merges": ["no such"]}, "no tokenizer can be made of tokenizer.ggml"),
    ({"token_type": [1, 1]}, "token_type must be an array of 4096 numbers, one for each token"),
    ({"token_type": "x"}, "token_type must be an array of 4096 numbers"),
    ({"tokens": ["a"] * 4096}, "tokenizer.ggml.tokens holds 'a' twice"),
    ({"eos_token_id": 4096}, "eos_token_id is 4096, but it must be the id of one of 4096 tokens"),
    ({"add_bos_token": True}, "add_bos_token is true, but tokenizer.ggml has no such token"),
    ({"add_bos_token": 1}, "add_bos_token is 1, but it must be true or false"),
    ({"add_sep_token": True}, "add_sep_token is True, but it must be false or absent"),
    ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is True, but it must be false or absent"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "said"), REFUSED)
def test_keys_that_are_refused(changed: dict[str, Any], said: str, grist: tuple[Tokenizer, dict[str, Any]]) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        load_tokenizer(metadata(grist[1], **changed), WHERE)
    assert str(caught.value).startswith(WHERE)


def test_scores_are_needed(pieces: dict[str, Any]) -> None:
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.ggml\.scores is missing, but it must be an array of numbers"
    ):
        load_tokenizer(metadata(pieces, scores=None), WHERE)
