"""Perplexity equals what transformers' logits give, for every window and stride, and texts become tokens as in use."""

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoints import load_reference, make_checkpoint, random_tokens, reference_logits

from millrace.runtime.errors import ConfigError
from millrace.runtime.models.decoder import DecoderModel
from millrace.runtime.quant.calibration import TextSource, Token, windows
from millrace.runtime.quant.evaluate import perplexity
from millrace.runtime.weights.loader import load_model
from millrace.runtime.weights.resolve import resolve_model


def tokens(count: int, seed: int = 1, skip: int = 0) -> list[Token]:
    return [Token(index, at >= skip) for at, index in enumerate(random_tokens(count, seed))]


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3", "gpt2"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[DecoderModel, object]:
    folder = make_checkpoint(request.param, tmp_path_factory.mktemp("model"))
    return load_model(folder), load_reference(folder)


@pytest.mark.parametrize(("count", "window", "stride", "skip"), [
    (100, 128, 64, 0),  # fits at once
    (200, 64, 32, 0),
    (203, 64, 32, 7),  # a last window that is not full
    (130, 64, 64, 0),  # the first token of a window that keeps nothing is predicted by nothing
    (70, 40, 3, 50),
])  # fmt: skip
def test_windows_score_every_token_once(
    models: tuple[DecoderModel, object], count: int, window: int, stride: int, skip: int
) -> None:
    model, reference = models
    text = tokens(count, skip=skip)
    ids = [token.id for token in text]
    total, scored, done = 0.0, 0, 0
    starts = [0]
    while starts[-1] + window < count:
        starts.append(min(starts[-1] + stride, count - window))
    for start in starts:
        logits = reference_logits(reference, ids[start : start + window]).log_softmax(-1)
        for at in range(max(done, start + 1), min(start + window, count)):
            if text[at].scored:
                total -= float(logits[at - 1 - start, ids[at]])
                scored += 1
        done = start + window
    seen: list[int] = []
    found = perplexity(model, iter(text), window=window, stride=stride, progress=seen.append)
    assert found.scored == scored
    assert found.value == pytest.approx(math.exp(total / scored), rel=1e-3)
    assert seen[-1] == count


def test_long_windows_go_through_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(make_checkpoint("llama", tmp_path))
    whole = perplexity(model, tokens(200), window=200)
    monkeypatch.setattr("millrace.runtime.quant.evaluate._CHUNK", 48)
    parts = perplexity(model, tokens(200), window=200)
    assert parts.value == pytest.approx(whole.value, rel=1e-4)
    assert parts.scored == whole.scored == 199


@pytest.mark.parametrize(("text", "options", "message"), [
    ([], {}, "the text holds 0 tokens"),
    (tokens(1), {}, "the text holds 1 tokens, of which none can be scored"),
    (tokens(9, skip=9), {}, "the text holds 9 tokens, of which none can be scored"),
    (tokens(9), {"window": 257}, "window is 257, but it must be between 2 and 256"),
    (tokens(9), {"window": 1}, "window is 1, "),
    (tokens(9), {"window": 8, "stride": 9}, "stride is 9, but it must be between 1 and window (8)"),
    (tokens(9), {"stride": 0}, "stride is 0, "),
])  # fmt: skip
def test_what_cannot_be_measured(text: list[Token], options: dict[str, int], message: str, tmp_path: Path) -> None:
    model = load_model(make_checkpoint("llama", tmp_path))
    with pytest.raises(ConfigError) as error:
        perplexity(model, text, **options)
    assert message in str(error.value)


def test_of_messages_the_replies_are_scored(checkpoint: Path, tmp_path: Path) -> None:
    source = TextSource.load(checkpoint)
    messages = [
        {"role": "system", "content": "w1"},
        {"role": "user", "content": "w2 w3"},
        {"role": "assistant", "content": "w4 w5"},
        {"role": "user", "content": "w6"},
        {"role": "assistant", "content": "w7"},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n\n" + json.dumps({"text": "w8 w9"}), encoding="utf-8")
    found = list(source.file(path))
    user, assistant, system, end = 3, 4, 5, 6
    ids = [system, 10, end, user, 11, 12, end, assistant, 13, 14, end, user, 15, end, assistant, 16, end, 17, 18, 2]
    assert [token.id for token in found] == ids
    scored = [at for at, token in enumerate(found) if token.scored]
    assert scored == [8, 9, 10, 15, 16, 17, 18, 19]


def test_plain_text_is_one_document(checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TextSource.load(checkpoint)
    whole = list(source.file(text))
    assert len(whole) == 1600
    assert all(token.scored for token in whole)
    monkeypatch.setattr("millrace.runtime.quant.calibration._PART_CHARS", 100)
    assert list(source.file(text)) == whole


@pytest.mark.parametrize(("name", "content", "message"), [
    ("none.txt", None, "there is no file"),
    ("bytes.txt", b"w1 \xff\xfe", "bytes.txt is not a text in UTF-8"),
    ("bytes.jsonl", b'{"text": "\xff"}', "bytes.jsonl is not a text in UTF-8"),
    ("bad.jsonl", b'{"text": "w1"}\n{"text', "bad.jsonl, line 2: "),
    ("bad.jsonl", b'{"content": "w1"}', 'line 1: a line must be an object with "text"'),
    ("bad.jsonl", b'{"messages": []}', "line 1: messages is empty"),
])  # fmt: skip
def test_files_that_cannot_be_read(
    name: str, content: bytes | None, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        list(TextSource.load(checkpoint).file(path))
    assert message in str(error.value)


def test_built_in_conversations(checkpoint: Path) -> None:
    grist = TextSource.load(resolve_model("grist").path)
    first, again, other = (windows(grist.built_in(seed), 64, 4) for seed in (1, 1, 2))
    assert first.ids.shape == first.scored.shape == (4, 64)
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)
    assert 0.1 < first.scored.float().mean() < 0.9
    (checkpoint / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    assert windows(TextSource.load(checkpoint).built_in(1), 16, 2).scored.all()  # no chat template: plain text


def test_windows_leave_out_what_does_not_fill_one() -> None:
    found = windows(tokens(35, skip=10), 10, 8)
    assert found.ids.flatten().tolist() == random_tokens(30, 1)
    assert found.scored.sum(1).tolist() == [0, 10, 10]
    assert found.rows(1, 3).ids.shape == (2, 10)
    assert windows([], 10, 8).ids.shape == (0, 10)
