"""Small tokenizers in the styles of published ones, trained here and saved as a checkpoint folder holds them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from millrace.runtime.text.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? The capital of France is Paris.",
    "user assistant system You are a helpful assistant. Hello world, how are you today? I'm fine, thank you!",
    "def main():\n    print('hello')\n    return 0\n\nif x < 3 and y > 4: pass",
    "Zażółć gęślą jaźń. Привет, мир! 日本語のテキスト。 naïve café déjà vu",
] * 3
GPT_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _train(lib: tokenizers.Tokenizer, vocab_size: int, special: list[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    lib.train_from_iterator(CORPUS, trainer)


def qwen_like() -> tuple[tokenizers.Tokenizer, dict]:
    """NFC, GPT split, byte level; markers that are added but not special."""
    lib = tokenizers.Tokenizer(models.BPE())
    lib.normalizer = normalizers.NFC()
    lib.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    lib.decoder = decoders.ByteLevel()
    lib.post_processor = processors.ByteLevel(trim_offsets=False)
    _train(lib, 420, [], pre_tokenizers.ByteLevel.alphabet())
    lib.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<｜User｜>", "<|odd one|>"])
    lib.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>", "<tool_call>", "   ")])
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    return lib, config


def llama3_like() -> tuple[tokenizers.Tokenizer, dict]:
    """Byte level with a BOS that the post-processor adds."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    lib = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    lib.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    lib.decoder = decoders.ByteLevel()
    _train(lib, 400, [], pre_tokenizers.ByteLevel.alphabet())
    lib.add_special_tokens(names)
    bos = lib.token_to_id(names[0])
    lib.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(f"{names[0]} $A", f"{names[0]} $A $B", [(names[0], bos)]),
        ]
    )
    return lib, {"bos_token": names[0], "eos_token": {"__type": "AddedToken", "content": "<|eot_id|>", "special": True}}


def _sentencepiece_model() -> tokenizers.Tokenizer:
    lib = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    lib.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>", *byte_pieces]
    _train(lib, 480, special, [])
    # The byte pieces are the model's, not added tokens; and letters like the Polish ones have to go by bytes.
    spec = json.loads(lib.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in byte_pieces]
    rare = {token for token in spec["model"]["vocab"] if len(token) == 1 and ord(token) > 0x3000}
    merges = spec["model"]["merges"]
    kept = [merge for merge in merges if not any(char in rare for part in merge for char in part)]
    used = {"".join(merge) for merge in kept}
    vocab = [t for t in spec["model"]["vocab"] if (len(t) == 1 and t not in rare) or t in used or t in special]
    spec["model"] |= {"merges": kept, "vocab": {token: index for index, token in enumerate(vocab)}}
    lib = tokenizers.Tokenizer.from_str(json.dumps(spec))
    bos = lib.token_to_id("<s>")
    lib.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", bos)])
    lib.add_special_tokens(["[INST]", "[/INST]"])
    return lib


def llama_like() -> tuple[tokenizers.Tokenizer, dict]:
    """Byte fallback, spaces by a normaliser, as converted from SentencePiece by transformers 4 (legacy)."""
    lib = _sentencepiece_model()
    lib.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return lib, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def mistral_like() -> tuple[tokenizers.Tokenizer, dict]:
    """Byte fallback, spaces by a pre-tokeniser that prepends one to the first word only."""
    lib = _sentencepiece_model()
    lib.normalizer = normalizers.Sequence([])
    lib.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    lib.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return lib, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def metaspace_like() -> tuple[tokenizers.Tokenizer, dict]:
    """Byte fallback under a Metaspace decoder, whose first token loses its spaces."""
    lib = _sentencepiece_model()
    lib.normalizer = normalizers.Sequence([])
    lib.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    lib.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", "always")])
    return lib, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def wordpiece_like() -> tuple[tokenizers.Tokenizer, dict]:
    """A decoder that no table serves."""
    lib = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    lib.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    lib.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    lib.train_from_iterator(CORPUS, trainer)
    return lib, {"unk_token": "[UNK]", "cls_token": "[CLS]"}


STYLES: dict[str, Callable[[], tuple[tokenizers.Tokenizer, dict]]] = {
    "qwen": qwen_like,
    "llama3": llama3_like,
    "llama": llama_like,
    "mistral": mistral_like,
    "metaspace": metaspace_like,
    "wordpiece": wordpiece_like,
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    result = {}
    for name, build in STYLES.items():
        folder = result[name] = root / name
        folder.mkdir()
        lib, config = build()
        lib.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return result


@pytest.fixture(scope="session")
def loaded(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer.load(folder) for name, folder in folders.items()}
