"""What the fewest bytes and operations are, and the time that they take at the ceilings of this run.

The arithmetic is that of docs/performance.md: a decode step streams every weight once (the embedding is gathered) and
every key and value of the contexts; a prefill multiplies. Time is at least the larger of bytes over the copy bandwidth
and operations over the rate of a bf16 matrix product.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Ceilings(NamedTuple):
    """Measured in the same run: bytes read plus bytes written per second, and operations per second."""

    copy: float
    gemm: float

    def seconds(self, num_bytes: float, flops: float = 0.0) -> float:
        return max(num_bytes / self.copy, flops / self.gemm)


class Shape(NamedTuple):
    """The sizes of a Llama-like decoder with a 16-bit cache.

    Attributes:
        layer_bytes, output_bytes: of an element of the layers' matrices, and of the matrix that gives the logits.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    layer_bytes: float = 2.0
    output_bytes: float = 2.0

    @staticmethod
    def of(config: Mapping[str, Any]) -> "Shape":
        """From the values of a config.json."""
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return Shape(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads", heads),
            head_dim=config.get("head_dim", hidden // heads),
            vocab=config["vocab_size"],
            tied=config["tie_word_embeddings"],
        )

    def rounded(self, bits: int, group: int) -> "Shape":
        """With matrices that were rounded as they were loaded: 8 bits for each output, or 4 with a scale and a zero
        point of 16 bits for each group of inputs; the output matrix has 8."""
        return self._replace(layer_bytes=1.0 if bits == 8 else 0.5 + 4 / group, output_bytes=1.0)

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def streamed_weights(self) -> int:
        """Elements that a step reads: all but the embedding, whose rows are gathered."""
        return self.layers * self.layer_weights + self.vocab * self.hidden

    @property
    def streamed_bytes(self) -> float:
        """Of the same elements."""
        return self.layers * self.layer_weights * self.layer_bytes + self.vocab * self.hidden * self.output_bytes

    @property
    def parameters(self) -> int:
        """Elements in all, norms left out."""
        return self.streamed_weights + (0 if self.tied else self.vocab * self.hidden)

    @property
    def kv_bytes_per_token(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * 2

    def decode_bytes(self, batch: int, context: float) -> float:
        """Of one step that makes one token for each of `batch` sequences with `context` keys each."""
        return self.streamed_bytes + batch * context * self.kv_bytes_per_token

    def decode_flops(self, batch: int, context: float) -> float:
        attention = 4 * self.layers * self.heads * self.head_dim * context
        return batch * (2 * self.streamed_weights + attention)

    def prefill_flops(self, tokens: int, sequences: int = 1) -> float:
        """Of prompts of tokens / sequences each; logits of their last tokens alone."""
        length = tokens / sequences
        attention = 4 * self.layers * self.heads * self.head_dim * tokens * (length + 1) / 2
        return 2 * tokens * self.layers * self.layer_weights + attention + 2 * sequences * self.vocab * self.hidden

    def decode_floor(self, ceilings: Ceilings, batch: int, context: float) -> float:
        """Seconds of a step."""
        return ceilings.seconds(self.decode_bytes(batch, context), self.decode_flops(batch, context))

    def prefill_floor(self, ceilings: Ceilings, tokens: int, sequences: int = 1) -> float:
        """Seconds."""
        return ceilings.seconds(self.streamed_bytes, self.prefill_flops(tokens, sequences))


def attention_bytes(batch: int, context: int, kv_heads: int, head_dim: int, heads: int, item: int = 2) -> int:
    """Of decode attention in one layer: keys and values once, queries in and results out in 16 bits."""
    return batch * (2 * context * kv_heads * head_dim * item + 2 * heads * head_dim * 2)


def causal_flops(query_len: int, context: int, heads: int, head_dim: int) -> float:
    """Of causal attention of the last `query_len` tokens of a context in one layer."""
    keys = query_len * (context - query_len) + query_len * (query_len + 1) / 2
    return 4 * heads * head_dim * keys


# Goals of issue 3 on an H100, as shares of what the same run measures.
GOAL_ATTENTION = 0.80  # where keys and values are 100 MB or more
GOAL_PREFILL = 0.60
GOAL_DECODE = {("llama-2-7b", 1): 0.80, ("llama-2-7b", 64): 0.80, ("llama-3.1-8b", 256): 0.70}
GOAL_LAUNCHES = 10  # per layer
GOAL_FIRST_TOKEN_MS = 50.0
GOAL_TOKENS_PER_S = 1000.0  # 7B
GOAL_BUSY = 0.90
GOAL_GAP_MS = 0.3
