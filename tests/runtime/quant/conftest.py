"""A small checkpoint with a tokenizer, and a text for it."""

from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from word_texts import add_tokenizer, words


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(words(40, seed) for seed in range(40)), encoding="utf-8")
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = make_checkpoint("llama", tmp_path / "model")
    add_tokenizer(folder)
    return folder
