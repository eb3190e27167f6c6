import functools
import itertools
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.runtime.text.decoding import ByteLevelDecoder
from millrace.runtime.text.detokenizer import Detokenizer
from millrace.runtime.text.tokenizer import Tokenizer

TABLE_STYLES = ["qwen", "llama3", "llama", "mistral", "metaspace"]
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)


def stream(tokenizer: Tokenizer, tail: Sequence[int], parts: Iterable[Sequence[int]], skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, tail, skip)
    return [*(detokenizer.push(part) for part in parts), detokenizer.finish()]


@functools.cache
def pools(tokenizer: Tokenizer) -> list[list[int]]:
    """Ids that are hard to decode: bytes that form no character alone, spaces, control tokens."""
    raw = [index for index, text in enumerate(tokenizer.table(False).text) if text is None]
    spaces = [index for index in range(tokenizer.vocab_size) if tokenizer.token_text(index).strip() == ""]
    return [pool for pool in (raw, spaces, sorted(tokenizer.control_ids)) if pool]


def draw_ids(data: st.DataObject, tokenizer: Tokenizer, max_size: int = 24) -> list[int]:
    """Random ids, some of them beyond the vocabulary."""
    usual = st.integers(0, tokenizer.vocab_size + 3)
    return data.draw(st.lists(st.one_of(usual, *map(st.sampled_from, pools(tokenizer))), max_size=max_size))


def cut(ids: list[int], borders: set[int]) -> list[list[int]]:
    ends = [0, *sorted(border for border in borders if border < len(ids)), len(ids)]
    return [ids[start:end] for start, end in itertools.pairwise(ends)]


@pytest.mark.parametrize("style", TABLE_STYLES)
@relaxed
@given(data=st.data(), skip=st.booleans(), borders=st.sets(st.integers(0, 24)))
def test_equals_decode_of_the_whole(
    style: str, loaded: dict[str, Tokenizer], data: st.DataObject, skip: bool, borders: set[int]
) -> None:
    tokenizer = loaded[style]
    ids = draw_ids(data, tokenizer)
    whole = tokenizer.decode(ids, skip)
    for parts in (cut(ids, borders), [[index] for index in ids], [ids]):
        assert "".join(stream(tokenizer, [], parts, skip)) == whole


@pytest.mark.parametrize("style", TABLE_STYLES)
@relaxed
@given(data=st.data(), skip=st.booleans())
def test_goes_on_where_the_prompt_ends(
    style: str, loaded: dict[str, Tokenizer], data: st.DataObject, skip: bool
) -> None:
    tokenizer = loaded[style]
    tail, ids = draw_ids(data, tokenizer, 8), draw_ids(data, tokenizer)
    prompt, whole = tokenizer.decode(tail, skip), tokenizer.decode([*tail, *ids], skip)
    out = "".join(stream(tokenizer, tail, [[index] for index in ids], skip))
    # A prompt whose only text was a stripped space, in bytes: nothing of it shows until the run is spoiled.
    hidden = not prompt and any(index in pools(tokenizer)[0] for index in tail) and "\ufffd" in whole
    if "\ufffd" not in prompt:
        if whole.startswith(prompt) and not hidden:
            assert out == whole[len(prompt) :]
        else:  # bytes of the output spoil a run that the prompt began, and what was told cannot be told anew
            assert "\ufffd" in out and "\ufffd" in whole
    else:  # the prompt ends inside a character, perhaps: the output has the rest of it
        assert whole.endswith(out) or "\ufffd" in out


@pytest.mark.parametrize("style", TABLE_STYLES)
@relaxed
@given(text=st.text(st.sampled_from("ab é日😀👩‍🚀\n ▁"), max_size=12), at=st.integers(0, 60))
def test_text_that_the_prompt_began(style: str, loaded: dict[str, Tokenizer], text: str, at: int) -> None:
    tokenizer = loaded[style]
    ids = tokenizer.encode(text, add_special_tokens=False)
    tail, rest = ids[:at], ids[at:]
    out = stream(tokenizer, tail, [[index] for index in rest], True)
    whole, told = tokenizer.decode(ids), "".join(out)
    assert "\ufffd" not in told
    assert whole.endswith(told)
    prompt = tokenizer.decode(tail)
    if "\ufffd" not in prompt or isinstance(tokenizer.decoder_plan, ByteLevelDecoder):
        assert prompt.rstrip("\ufffd") + told == whole


@pytest.mark.parametrize("style", TABLE_STYLES)
def test_never_a_part_of_a_character(style: str, loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded[style]
    text = "😀 日本 é👩‍🚀!"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)  # so that characters are cut into tokens
    detokenizer = Detokenizer(tokenizer, (), True)
    out = ""
    for index in ids:
        out += detokenizer.push([index])
        assert tokenizer.decode(ids).startswith(out)
        assert "\ufffd" not in out
    assert out + detokenizer.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("style", TABLE_STYLES)
def test_unfinished_bytes_at_the_end(style: str, loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded[style]
    ids = tokenizer.encode("a😀", add_special_tokens=False)[:-1]
    parts = stream(tokenizer, (), [[index] for index in ids], True)
    assert "\ufffd" not in "".join(parts[:-1])
    assert "".join(parts) == tokenizer.decode(ids)
    assert parts[-1].endswith("\ufffd")


def test_a_byte_run_is_told_as_soon_as_it_is_decided(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["llama"]
    piece = {tokenizer.token_piece(index): index for index in range(tokenizer.vocab_size)}
    detokenizer = Detokenizer(tokenizer, [piece["a"]], True)
    assert [detokenizer.push([piece[f"<0x{byte:02X}>"]]) for byte in b"\xf0\x9f"] == ["", ""]
    assert detokenizer.push([piece["<0x41>"]]) == "\ufffd\ufffd\ufffd"  # broken for good
    assert detokenizer.push([piece["<0x42>"]]) == "\ufffd"
    assert detokenizer.push([piece["▁"]]) == " "
    assert detokenizer.push([piece["<0x42>"]]) == ""
    assert detokenizer.push([piece["a"]]) == "Ba"


def test_special_tokens_leave_text_only_where_asked(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["qwen"]
    ids = tokenizer.encode_control("<think>ok</think><|im_end|>")
    assert "".join(stream(tokenizer, (), [ids], True)) == "<think>ok</think>"
    assert "".join(stream(tokenizer, (), [[index] for index in ids], False)) == "<think>ok</think><|im_end|>"


@pytest.mark.parametrize("tail", ["", "The quick brown"])
def test_window_of_a_decoder_without_a_table(tail: str, loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["wordpiece"]
    assert tokenizer.decoder_plan is None
    prompt = tokenizer.encode(tail, add_special_tokens=False)
    ids = tokenizer.encode("fox jumps over the unknowable dog, is it? café " * 8, add_special_tokens=False)
    whole, before = tokenizer.decode([*prompt, *ids]), tokenizer.decode(prompt)
    assert whole.startswith(before)
    for parts in ([[index] for index in ids], cut(ids, {3, 4, 11})):
        out = stream(tokenizer, prompt, parts, True)
        assert "".join(out) == whole[len(before) :]
        assert sum(map(bool, out)) > min(len(parts) // 2, 3)
