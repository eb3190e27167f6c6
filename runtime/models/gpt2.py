"""GPT-2 (Radford et al. 2019): learned positions, layer norms, a plain GELU MLP, matrices stored [in, out]."""

import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

import msgspec
import torch
from torch import Tensor

from millrace.kernels import ops
from millrace.runtime.models.base import ModelSpec
from millrace.runtime.models.config import ConfigReader, special_tokens
from millrace.runtime.models.declaration import (
    EmbeddingDecl,
    LayerNormDecl,
    LinearDecl,
    LinearPart,
    TensorDecl,
    WeightSource,
)
from millrace.runtime.models.decoder import DecoderDecl


class GPT2LayerDecl(msgspec.Struct, frozen=True, kw_only=True):
    """One layer; the fields stand in the order in which the layer computes."""

    num_heads: int
    scale: float
    input_norm: LayerNormDecl
    qkv: LinearDecl
    output: LinearDecl
    post_attention_norm: LayerNormDecl
    up: LinearDecl
    down: LinearDecl

    def tensors(self) -> Iterator[TensorDecl]:
        for module in (self.input_norm, self.qkv, self.output, self.post_attention_norm, self.up, self.down):
            yield from module.tensors()

    def load(self, source: WeightSource, positions: Tensor) -> "GPT2Layer":
        return GPT2Layer(self, source)


class GPT2Layer:
    """One layer with its weights: implements millrace.runtime.models.decoder.DecoderLayer."""

    window = None

    def __init__(self, decl: GPT2LayerDecl, source: WeightSource) -> None:
        self.scale = decl.scale
        self.input_norm = decl.input_norm.load(source)
        self.output = decl.output.load(source)
        self.post_attention_norm = decl.post_attention_norm.load(source)
        self._num_heads = decl.num_heads
        self._backends = source.placement.backends
        self._qkv = decl.qkv.load(source)
        self._up = decl.up.load(source)
        self._down = decl.down.load(source)

    @property
    def weight_bytes(self) -> int:
        return sum(linear.weight_bytes for linear in (self._qkv, self.output, self._up, self._down))

    def describe(self) -> ops.DecoderLayerArgs:
        return ops.DecoderLayerArgs(
            input_norm=self.input_norm.weights(),
            qkv=self._qkv,
            q_norm=None,
            k_norm=None,
            output=self.output,
            post_attention_norm=self.post_attention_norm.weights(),
            up=self._up,
            down=self._down,
            scale=self.scale,
            window=self.window,
        )

    def write_kv(
        self, x: Tensor, positions: Tensor, kv_cache: Tensor, kv_scales: Tensor | None, slots: Tensor
    ) -> Tensor:
        return ops.rope_kv(
            self._qkv(x), self._num_heads, kv_cache, positions, slots, kv_scales=kv_scales, backends=self._backends
        )

    def mlp(self, x: Tensor) -> Tensor:
        return self._down(ops.gelu_tanh(self._up(x), backends=self._backends))


class GPT2Decl(DecoderDecl, frozen=True, kw_only=True):
    """A GPT-2 checkpoint."""

    base_prefix: ClassVar[str] = "transformer."
    # Old releases of transformers saved the causal mask and its fill value as buffers.
    harmless: ClassVar[Sequence[re.Pattern[str]]] = (re.compile(r"h\.\d+\.attn\.(masked_)?bias"),)

    is_gated: ClassVar[bool] = False

    position_embedding: EmbeddingDecl

    def position_tensors(self) -> Iterator[TensorDecl]:
        yield from self.position_embedding.tensors()

    def load_positions(self, source: WeightSource, max_model_len: int) -> Tensor:
        """The learned embedding, [max_model_len, hidden_size]."""
        stored = source.read(f"{self.position_embedding.name}.weight")[:max_model_len]
        place = source.placement
        return torch.empty(stored.shape, dtype=place.activation, device=place.device).copy_(stored)

    def rotation(self, positions: Tensor) -> None:
        return None


def declare_gpt2(config: ConfigReader) -> GPT2Decl:
    # gelu_new and gelu_pytorch_tanh are two names of the tanh approximation.
    config.one_of("activation_function", ("gelu_new", "gelu_pytorch_tanh"), "gelu_new")
    hidden, heads = config.integer("n_embd"), config.integer("n_head")
    if hidden % heads:
        config.refuse("n_head", f"a divisor of n_embd ({hidden})")
    head_dim = hidden // heads
    inner = config.integer("n_inner", 4 * hidden)
    eps = config.number("layer_norm_epsilon", 1e-5)
    vocab, positions = config.integer("vocab_size"), config.integer("n_positions")
    scale = head_dim**-0.5 if config.flag("scale_attn_weights", True) else 1.0
    by_index = config.flag("scale_attn_by_inverse_layer_idx", False)

    def linear(name: str, in_features: int, out_features: int) -> LinearDecl:
        part = LinearPart(name, out_features, bias=True)
        return LinearDecl(parts=(part,), in_features=in_features, transposed=True)

    def layer(index: int) -> GPT2LayerDecl:
        name = f"transformer.h.{index}"
        return GPT2LayerDecl(
            num_heads=heads,
            scale=scale / (index + 1) if by_index else scale,
            input_norm=LayerNormDecl(f"{name}.ln_1", hidden, eps),
            qkv=linear(f"{name}.attn.c_attn", hidden, 3 * hidden),
            output=linear(f"{name}.attn.c_proj", hidden, hidden),
            post_attention_norm=LayerNormDecl(f"{name}.ln_2", hidden, eps),
            up=linear(f"{name}.mlp.c_fc", hidden, inner),
            down=linear(f"{name}.mlp.c_proj", inner, hidden),
        )

    layers = tuple(layer(index) for index in range(config.integer("n_layer")))
    tied = config.flag("tie_word_embeddings", True)
    return GPT2Decl(
        spec=ModelSpec(
            architecture="GPT2LMHeadModel",
            vocab_size=vocab,
            hidden_size=hidden,
            num_layers=len(layers),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            max_model_len=positions,
            **special_tokens(config),
        ),
        embedding=EmbeddingDecl("transformer.wte", vocab, hidden),
        position_embedding=EmbeddingDecl("transformer.wpe", positions, hidden),
        layers=layers,
        final_norm=LayerNormDecl("transformer.ln_f", hidden, eps),
        lm_head=None if tied else LinearDecl(parts=(LinearPart("lm_head", vocab),), in_features=hidden),
    )
