"""A tokenizer for the checkpoints of `checkpoints.py`, and texts of its words."""

import json
import random
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers

WORDS = 190


def add_tokenizer(folder: Path) -> None:
    """Words w0 to w189 as tokens 9 to 198, and a chat template."""
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    vocab = {token: index for index, token in enumerate(special)} | {"w": 7, ".": 8}
    lib = tokenizers.Tokenizer(models.WordLevel(vocab | {f"w{i}": 9 + i for i in range(WORDS)}, unk_token="<unk>"))
    lib.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    lib.add_special_tokens(special)
    lib.save(str(folder / "tokenizer.json"))
    template = (
        "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    config = {"eos_token": "</s>", "unk_token": "<unk>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def words(count: int, seed: int) -> str:
    """A text in which a word often follows from the one before."""
    draw, now, found = random.Random(seed), 0, []
    for _ in range(count):
        now = (now * 7 + draw.choice((1, 2, 3))) % WORDS
        found.append(f"w{now}")
    return " ".join(found)
