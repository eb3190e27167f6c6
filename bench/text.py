"""Microseconds of Python for one token of text: detokenising, stop strings, and what loading costs.

Run with `python bench/text.py [FOLDER]`. Without a folder that holds a tokenizer.json, a byte-level vocabulary of
128,000 random words is made.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from millrace.runtime.text.detokenizer import Detokenizer
from millrace.runtime.text.stops import StopMatcher
from millrace.runtime.text.tokenizer import Tokenizer

TOKENS = 50_000
REPEATS = 7


def make(folder: Path, vocab_size: int = 128_000) -> None:
    draw = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = dict.fromkeys(alphabet)
    while len(words) < vocab_size:
        words["Ġ" + "".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 7)))] = None
    lib = tokenizers.Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    lib.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lib.decoder = decoders.ByteLevel()
    lib.add_special_tokens([f"<|reserved_{number}|>" for number in range(256)])
    lib.save(str(folder / "tokenizer.json"))


def best(name: str, count: int, unit: str, run: Callable[[], object]) -> None:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) / count)
    print(f"{name:<52} {min(times) * 1e6:10.3f} us best, {statistics.median(times) * 1e6:10.3f} us median, per {unit}")


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(made)
        if len(sys.argv) == 1:
            make(folder)
        start = time.perf_counter()
        tokenizer = Tokenizer.load(folder)
        print(f"load: {time.perf_counter() - start:.2f} s for {tokenizer.vocab_size} tokens")
        start = time.perf_counter()
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        print(f"  of which the library alone: {time.perf_counter() - start:.2f} s")
    draw = random.Random(1)
    text = tokenizer.table(True).text
    whole = [index for index in range(tokenizer.vocab_size) if text[index]]
    usual = draw.sample(whole, 3000)  # a text draws on few words of the vocabulary, over and over
    ids = [[draw.choice(usual)] for _ in range(TOKENS)]
    torn = [[token] for token in tokenizer.encode("日本語😀" * (TOKENS // 12), add_special_tokens=False)]
    pieces = [text[token] or "" for (token,) in ids]

    def detokenize(parts: list[list[int]]) -> None:
        push = Detokenizer(tokenizer, (), True).push
        for part in parts:
            push(part)

    def match(stops: list[str]) -> None:
        push = StopMatcher(stops, False).push
        for piece in pieces:
            push(piece)

    best("an empty loop", TOKENS, "token", lambda: [part for part in ids])  # noqa: C416
    best("Detokenizer.push, whole characters", TOKENS, "token", lambda: detokenize(ids))
    best("Detokenizer.push, characters cut into bytes", len(torn), "token", lambda: detokenize(torn))
    best("Detokenizer()", 1, "stream", lambda: Detokenizer(tokenizer, whole[:8], True))
    best("StopMatcher.push, no stop string", TOKENS, "token", lambda: match([]))
    best("StopMatcher.push, one that seldom starts", TOKENS, "token", lambda: match(["\n\nUser:"]))
    best("StopMatcher.push, four that start in every token", TOKENS, "token", lambda: match([" #1", " ;", "e!", "a?"]))
    words = "".join(pieces[:2000])
    best("Tokenizer.encode", 2000, "token", lambda: tokenizer.encode(words))
    best("Tokenizer.touches_control", len(words), "character", lambda: tokenizer.touches_control(words))
    best("Tokenizer.touches_control, all '<'", 20_000, "character", lambda: tokenizer.touches_control("<" * 20_000))


if __name__ == "__main__":
    main()
