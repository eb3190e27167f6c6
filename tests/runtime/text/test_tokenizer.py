import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer

from millrace.runtime.errors import CheckpointError, InvalidRequestError
from millrace.runtime.text.tokenizer import Tokenizer

BPE_STYLES = ["qwen", "llama3", "llama", "mistral", "metaspace"]
TEXTS = [
    "Hello world, how are you today?",
    "  two spaces before, two after  ",
    "naïve café\n\n\tZażółć gęślą jaźń 日本語 😀👩‍🚀",
    "e\u0301 combining, \u00a0 no-break, 12345 numbers, if x < 3 and y > 4:",
    "",
    " ",
]
texts = st.text(st.sampled_from("ab cdehlo <>|[]/\n▁éż日😀0x"), max_size=40)
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


@pytest.mark.parametrize("style", [*BPE_STYLES, "wordpiece"])
def test_equals_transformers(style: str, folders: dict[str, Path], loaded: dict[str, Tokenizer]) -> None:
    reference, ours = AutoTokenizer.from_pretrained(folders[style]), loaded[style]
    assert ours.vocab_size == len(reference)
    assert (ours.bos_id, ours.eos_id) == (reference.bos_token_id, reference.eos_token_id)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == reference.encode(text)
        assert ours.encode(text, add_special_tokens=False) == reference.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert ours.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("style", BPE_STYLES)
@relaxed
@given(text=texts)
def test_aliased_encoding_is_the_plain_one(style: str, loaded: dict[str, Tokenizer], text: str) -> None:
    tokenizer = loaded[style]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.encode_mixed(text, ()) == ids
    control = tokenizer.control_tokens[max(tokenizer.control_ids)]
    around = f"{text}{control}{text}"
    span = (len(text), len(text) + len(control))
    assert tokenizer.encode_mixed(around, [span]) == tokenizer.encode_control(around)


@pytest.mark.parametrize("style", BPE_STYLES)
def test_control_tokens_in_user_text_are_text(style: str, loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded[style]
    unknown = tokenizer.special_tokens.get("unk_token")
    assert len(tokenizer.control_ids) >= 5
    for index, content in tokenizer.control_tokens.items():
        text = f"before {content} after{content}"
        assert index in tokenizer.encode_control(text)
        ids = tokenizer.encode(text, add_special_tokens=False)
        if content != unknown:
            assert tokenizer.control_ids.isdisjoint(ids)
        assert tokenizer.decode(ids).strip() == text
        prefix = [tokenizer.bos_id] if style != "qwen" else []
        assert tokenizer.encode(text) == prefix + ids


def test_added_tokens_that_are_text_stay_tokens(loaded: dict[str, Tokenizer], folders: dict[str, Path]) -> None:
    tokenizer = loaded["qwen"]
    spaces = AutoTokenizer.from_pretrained(folders["qwen"]).convert_tokens_to_ids("   ")
    assert spaces not in tokenizer.control_ids
    assert spaces in tokenizer.encode("a   b")
    assert spaces in tokenizer.encode("a   b <|im_end|>")
    assert tokenizer.decode(tokenizer.encode("a   b <think>")) == "a   b <think>"


def test_normalised_spelling_of_a_control_token_is_text() -> None:
    lib = tokenizers.Tokenizer(models.BPE())
    lib.normalizer = tokenizers.normalizers.NFKC()
    lib.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    lib.model = models.BPE({char: index for index, char in enumerate(alphabet)}, [])
    lib.add_special_tokens([tokenizers.AddedToken("<|end|>", normalized=True)])
    tokenizer = Tokenizer(lib)
    wide = "＜|end|＞"
    (control,) = tokenizer.control_ids
    assert control in tokenizer.encode_control(wide)  # the library sees the token through the normaliser
    assert control not in tokenizer.encode(wide)
    assert tokenizer.contains_control(wide)


def test_a_token_that_cannot_be_spelled_is_refused() -> None:
    lib = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "word": 2}, unk_token="<unk>"))
    lib.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    lib.add_special_tokens(["<unk>", "<end>"])
    tokenizer = Tokenizer(lib)
    assert tokenizer.encode("word stranger") == [2, 0]
    with pytest.raises(InvalidRequestError, match="<end>"):
        tokenizer.encode("word <end>")


def test_reserved_noncharacter_matters_only_beside_control_tokens(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["qwen"]
    assert tokenizer.decode(tokenizer.encode("a \ufdd0 b")) == "a \ufdd0 b"
    with pytest.raises(InvalidRequestError, match="U\\+FDD0"):
        tokenizer.encode("a \ufdd0421\ufdd1 <|im_end|>")


def test_bytes_and_text_of_tokens(loaded: dict[str, Tokenizer]) -> None:
    for style in BPE_STYLES:
        tokenizer = loaded[style]
        text = "naïve 日本😀 <|x|>"
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().removeprefix(" ") == text
    llama = loaded["llama"]
    piece = {llama.token_piece(index): index for index in range(llama.vocab_size)}
    assert llama.token_bytes(piece["<0xE6>"]) == b"\xe6"
    assert llama.token_text(piece["<0xE6>"]) == "\ufffd"
    assert llama.token_text(piece["<0x41>"]) == "A"
    assert llama.token_text(piece["▁"]) == " "
    assert llama.token_text(piece["</s>"]) == "</s>"
    assert (llama.token_bytes(llama.vocab_size), llama.token_text(10**9)) == (b"", "")


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_post_processor_decides_bos_and_eos(bos: bool, eos: bool, tmp_path: Path, folders: dict[str, Path]) -> None:
    _copy(folders["llama3"], tmp_path, add_bos_token=bos, add_eos_token=eos)
    assert Tokenizer.load(tmp_path).encode("Hello") == AutoTokenizer.from_pretrained(tmp_path).encode("Hello")


def test_saved_by_transformers(tmp_path: Path, folders: dict[str, Path], loaded: dict[str, Tokenizer]) -> None:
    for style in BPE_STYLES:
        reference = AutoTokenizer.from_pretrained(folders[style])
        reference.save_pretrained(tmp_path / style)
        ours = Tokenizer.load(tmp_path / style)
        assert ours.special_ids == loaded[style].special_ids
        assert [ours.encode(text) for text in TEXTS] == [loaded[style].encode(text) for text in TEXTS]


def test_tokens_beyond_tokenizer_json(tmp_path: Path, folders: dict[str, Path], loaded: dict[str, Tokenizer]) -> None:
    size = loaded["llama3"].vocab_size
    declared = {str(size): {"content": "<|late|>", "special": True, "normalized": False}}
    _copy(folders["llama3"], tmp_path, added_tokens_decoder=declared, pad_token="<|pad|>")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<plain>": size + 1}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"sep_token": "<|eot_id|>"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [size, 7]}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.token_text(size) == "<|late|>"
    assert tokenizer.vocab_size == size + 3
    assert {size, size + 2} <= tokenizer.special_ids
    assert size + 1 in tokenizer.control_ids - tokenizer.special_ids
    assert tokenizer.special_tokens["sep_token"] == "<|eot_id|>"
    assert tokenizer.eos_ids == (tokenizer.eos_id, size, 7)


def test_wrong_id_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    _copy(folders["llama3"], tmp_path, added_tokens_decoder={"9000": {"content": "<|late|>", "special": True}})
    with pytest.raises(CheckpointError, match="9000"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "qwen.tiktoken"])
def test_other_formats_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"{name}.*convert it once"):
        Tokenizer.load(tmp_path)


def test_broken_files_are_named(tmp_path: Path, folders: dict[str, Path]) -> None:
    _copy(folders["qwen"], tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"a": ' * 100_000)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_text_that_is_no_unicode_is_refused(loaded: dict[str, Tokenizer]) -> None:
    for text in ("\ud800", "a\udfff<|im_end|>"):
        with pytest.raises(InvalidRequestError, match="surrogate"):
            loaded["qwen"].encode(text)


def test_many_control_tokens_cost_no_time_per_character() -> None:
    lib = tokenizers.Tokenizer(models.BPE())
    lib.add_special_tokens([f"<unused{number}>" for number in range(6000)])
    tokenizer = Tokenizer(lib)
    pattern = tokenizer.control_pattern
    assert all(pattern.fullmatch(content) for content in tokenizer.control_tokens.values())
    assert pattern.search("<unused6000>") is None
    assert not tokenizer.contains_control("<unused" * 100_000)
    assert tokenizer.ends_inside_control("<unused" * 100_000)


def _copy(source: Path, target: Path, **config: object) -> None:
    (target / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    merged = json.loads((source / "tokenizer_config.json").read_text()) | config
    (target / "tokenizer_config.json").write_text(json.dumps(merged))
