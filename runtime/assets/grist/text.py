"""The tokenizer of grist, its chat template, and conversations as token ids."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from millrace.runtime.assets.grist.corpus import TRAIN_SEED, Conversation, Turn, conversations
from millrace.runtime.assets.grist.model import ASSISTANT, END, PAD, SPECIAL_TOKENS, SYSTEM, USER

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('grist knows the roles system, user and assistant, not ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# Words with the blank before them, and every digit by itself: sums are learned digit by digit or not at all.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(vocab_size: int, count: int = 30000) -> Tokenizer:
    """A byte-level BPE tokenizer learned from the first `count` training conversations."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(count), trainer)
    return tokenizer


def _texts(count: int) -> list[str]:
    texts = []
    for conversation in itertools.islice(conversations(TRAIN_SEED), count):
        texts += [conversation.system, conversation.text]
        texts += [part for turn in conversation.turns for part in (turn.user, turn.reply)]
    return [text for text in texts if text]


def save_text_files(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer and its Hugging Face configuration."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": SPECIAL_TOKENS[END],
        "pad_token": SPECIAL_TOKENS[PAD],
        "additional_special_tokens": [SPECIAL_TOKENS[i] for i in (SYSTEM, USER, ASSISTANT)],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def prompt_ids(tokenizer: Tokenizer, turns: list[Turn], user: str, system: str = "") -> list[int]:
    """What the chat template makes of a conversation whose next reply is wanted."""

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    ids = [SYSTEM, *encode(system), END] if system else []
    for turn in turns:
        ids += [USER, *encode(turn.user), END, ASSISTANT, *encode(turn.reply), END]
    return [*ids, USER, *encode(user), END, ASSISTANT]


def encode_conversations(tokenizer: Tokenizer, batch: list[Conversation]) -> list[tuple[list[int], list[bool]]]:
    """Token ids of each conversation, and which of them grist must learn to write: its replies with their ends."""
    texts = []
    for conversation in batch:
        texts += [conversation.system or conversation.text]
        texts += [part for turn in conversation.turns for part in (turn.user, turn.reply)]
    encoded = iter(tokenizer.encode_batch(texts, add_special_tokens=False))
    samples = []
    for conversation in batch:
        first = next(encoded).ids
        if conversation.text:
            samples.append(([*first, END], [True] * (len(first) + 1)))
            continue
        ids = [SYSTEM, *first, END] if conversation.system else []
        learned = [False] * len(ids)
        for _ in conversation.turns:
            user, reply = next(encoded).ids, next(encoded).ids
            ids += [USER, *user, END, ASSISTANT, *reply, END]
            learned += [False] * (len(user) + 3) + [True] * (len(reply) + 1)
        samples.append((ids, learned))
    return samples
