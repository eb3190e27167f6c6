"""Tiny random checkpoints written by transformers, its logits for them, and batches that drive our models."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from millrace.runtime.models.base import ForwardBatch, Model
from millrace.runtime.types import BLOCK_SIZE

_SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GPT2_SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}

# name: (configuration class, sizes, what makes this one different)
_KINDS: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, _SIZES, {}),
    "llama-biases": (transformers.LlamaConfig, _SIZES, {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama-rope-llama3": (transformers.LlamaConfig, _SIZES, {"rope_parameters": _LLAMA3}),
    "llama-rope-linear": (transformers.LlamaConfig, _SIZES, {"rope_parameters": _LINEAR}),
    "llama-rope-dynamic": (transformers.LlamaConfig, _SIZES, {"rope_parameters": _DYNAMIC}),
    "llama-rope-yarn": (transformers.LlamaConfig, _SIZES, {"rope_parameters": _YARN}),
    "mistral": (transformers.MistralConfig, _SIZES, {"sliding_window": 20}),
    "qwen2": (transformers.Qwen2Config, _SIZES, {"tie_word_embeddings": True}),
    "qwen2-windows": (
        transformers.Qwen2Config,
        _SIZES,
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, _SIZES, {"head_dim": 32}),
    "gpt2": (transformers.GPT2Config, _GPT2_SIZES, {}),
}
KINDS = tuple(_KINDS)


def make_checkpoint(
    kind: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Writes a checkpoint of one of KINDS by transformers' save_pretrained; overrides go into its configuration.

    All tensors are random, norms and biases too, and large enough that a wrong one shows in the logits.
    """
    make_config, sizes, own = _KINDS[kind]
    config = make_config(**{**sizes, **own, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = parameter.dim() == 1 and name.endswith("weight")
        parameter.data = 1.0 + 0.2 * noise if is_scale else 0.12 * noise
    model.tie_weights()
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def load_reference(folder: Path) -> transformers.PreTrainedModel:
    """The checkpoint in transformers, computing in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@torch.inference_mode()
def reference_logits(reference: transformers.PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """[num_tokens, vocab_size] float32, computed in one pass without a cache."""
    return reference(torch.tensor([list(tokens)]), use_cache=False).logits[0]


@torch.inference_mode()
def reference_greedy(reference: transformers.PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """The next `count` most likely tokens, computed with transformers' own cache; EOS is a token like any other."""
    cache = transformers.DynamicCache(config=reference.config)
    chosen: list[int] = []
    step = list(prompt)
    for _ in range(count):
        logits = reference(torch.tensor([step]), past_key_values=cache, use_cache=True).logits
        step = [int(logits[0, -1].argmax())]
        chosen += step
    return chosen


def agree_until_a_tie(
    reference: transformers.PreTrainedModel,
    prompt: Sequence[int],
    got: Sequence[int],
    want: Sequence[int],
    tolerance: float,
) -> None:
    """Greedy tokens computed in 16 bits equal others, until two of them are as good as equal: then each goes its own
    way, and float32 must find the one chosen within `tolerance` of the best."""
    assert len(got) == len(want)
    for at, (one, two) in enumerate(zip(got, want, strict=True)):
        if one != two:
            logits = reference_logits(reference, [*prompt, *want[:at]])[-1]
            assert logits.max() - logits[one] < tolerance, (at, one, two)
            return


def random_tokens(count: int, seed: int, vocab_size: int = 199) -> list[int]:
    return random.Random(seed).choices(range(vocab_size), k=count)


class PagedSequences:
    """Runs sequences through a model in any chunks, each over block tables drawn in shuffled order.

    All storage starts as NaN, so that a read of a slot that was never written shows in the logits.
    """

    def __init__(self, model: Model[Tensor], num_seqs: int, max_len: int, seed: int = 0) -> None:
        self.model = model
        self._width = -(-max_len // BLOCK_SIZE)
        num_blocks = 1 + num_seqs * self._width
        self.kv = model.allocate_kv(num_blocks)
        for part in (self.kv.storage, self.kv.scales):
            if part is not None:
                torch.as_tensor(part).view(torch.uint8).fill_(0xFF)  # NaN in every float type
        blocks = list(range(1, num_blocks))
        random.Random(seed).shuffle(blocks)
        self.tables = [blocks[seq * self._width : (seq + 1) * self._width] for seq in range(num_seqs)]
        self.lengths = [0] * num_seqs

    def step(
        self, chunks: dict[int, Sequence[int]], *, last_only: bool = False, is_decode: bool = False
    ) -> dict[int, Tensor]:
        """Appends a chunk of tokens to each named sequence, in one batch; `is_decode` says that they are one each.

        Returns each sequence's logits [num_logits, vocab_size], for all tokens of its chunk or for the last one.
        """
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        bounds, contexts, tables, logits_indices = [0], [], [], []
        for seq, chunk in chunks.items():
            table, start = self.tables[seq], self.lengths[seq]
            here = range(start, start + len(chunk))
            tokens += chunk
            positions += here
            slots += [table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for at in here]
            first = bounds[-1] + (len(chunk) - 1 if last_only else 0)
            bounds.append(bounds[-1] + len(chunk))
            logits_indices.append(range(first, bounds[-1]))
            self.lengths[seq] = start + len(chunk)
            contexts.append(self.lengths[seq])
            used = -(-contexts[-1] // BLOCK_SIZE)
            tables.append(table[:used] + [0] * (self._width - used))
        batch = ForwardBatch[Tensor](
            tokens=torch.tensor(tokens),
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            query_starts=torch.tensor(bounds, dtype=torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            logits_indices=torch.tensor([index for rows in logits_indices for index in rows]),
            max_query_len=max(len(chunk) for chunk in chunks.values()),
            max_context_len=max(contexts),
            is_decode=is_decode,
        )
        logits = self.model.forward(batch, self.kv).split([len(rows) for rows in logits_indices])
        return dict(zip(chunks, logits, strict=True))
