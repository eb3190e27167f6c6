"""llama.cpp as a worker, by its C interface: run_llama.py FILE.gguf --threads N (in its environment).

All prompts go in as one batch and every step decodes all sequences, each in a part of the KV cache of its own, which is
how llama.cpp's own batched-bench measures.
"""

import argparse
import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import llama_cpp
import numpy as np
from protocol import Generate, Tally, serve

BATCH = 2048  # tokens in a call; llama.cpp computes them 512 at a time, its default
STEP = 256  # cells of the KV cache per sequence are rounded up to this


class Engine:
    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._threads = threads
        self._contexts: dict[tuple[int, int], Any] = {}
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def generate(self, prompts: list[list[int]], new_tokens: int, tally: Tally) -> None:
        longest = max(map(len, prompts)) + new_tokens
        context = self._context(len(prompts), -(-longest // STEP) * STEP)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        last = self._prefill(context, prompts, tally)
        for index in range(1, new_tokens):
            rows = [(last[n], len(prompt) + index - 1, n, True) for n, prompt in enumerate(prompts)]
            last = dict(self._decode(context, rows, tally))

    def _prefill(self, context: Any, prompts: Sequence[Sequence[int]], tally: Tally) -> dict[int, int]:
        rows = [
            (token, position, number, position == len(prompt) - 1)
            for number, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        last: dict[int, int] = {}
        for begin in range(0, len(rows), BATCH):
            last.update(self._decode(context, rows[begin : begin + BATCH], tally))
        return last

    def _decode(self, context: Any, rows: Sequence[tuple[int, int, int, bool]], tally: Tally) -> list[tuple[int, int]]:
        """One call for (token, position, sequence, wants logits) each; the likeliest next token of those that want."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for place, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[place] = token
            batch.pos[place] = position
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = sequence
            batch.logits[place] = wanted
        status = llama_cpp.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode ended with {status}")
        chosen = []
        for place, (_, _, sequence, wanted) in enumerate(rows):
            if wanted:
                logits = llama_cpp.llama_get_logits_ith(context, place)
                chosen.append((sequence, int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())))
        for sequence, token in chosen:
            tally.add(sequence, token)
        return chosen

    def _context(self, sequences: int, length: int) -> Any:
        if (sequences, length) not in self._contexts:
            params = llama_cpp.llama_context_default_params()
            params.n_ctx = sequences * length
            params.n_seq_max = sequences
            params.n_batch = BATCH
            params.n_threads = params.n_threads_batch = self._threads
            context = llama_cpp.llama_init_from_model(self._model, params)
            if not context:
                raise RuntimeError(f"no context for {sequences} sequences of {length} tokens")
            self._contexts[sequences, length] = context
        return self._contexts[sequences, length]


def load(path: str, threads: int) -> tuple[Generate, Mapping[str, str]]:
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    engine = Engine(path, threads)
    engine.quiet = quiet  # llama.cpp keeps a bare pointer to it
    return engine.generate, {"llama-cpp-python": llama_cpp.__version__}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    serve(lambda: load(args.model, args.threads))
