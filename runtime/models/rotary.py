"""Decoders with rotary positions, RMS norms and a gated SiLU MLP: Llama, Mistral, Qwen2 and Qwen3."""

import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

import msgspec
from torch import Tensor

from millrace.kernels import ops
from millrace.runtime.models.base import ModelSpec
from millrace.runtime.models.config import ConfigReader, special_tokens
from millrace.runtime.models.declaration import (
    EmbeddingDecl,
    LinearDecl,
    LinearPart,
    RMSNorm,
    RMSNormDecl,
    TensorDecl,
    WeightSource,
)
from millrace.runtime.models.decoder import DecoderDecl
from millrace.runtime.models.rope import Rope, read_rope


class RotaryLayerDecl(msgspec.Struct, frozen=True, kw_only=True):
    """One layer; the fields stand in the order in which the layer computes."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    input_norm: RMSNormDecl
    qkv: LinearDecl
    q_norm: RMSNormDecl | None  # over head_dim, before the rotation
    k_norm: RMSNormDecl | None
    output: LinearDecl
    post_attention_norm: RMSNormDecl
    gate_up: LinearDecl
    down: LinearDecl

    def tensors(self) -> Iterator[TensorDecl]:
        modules = (self.input_norm, self.qkv, self.q_norm, self.k_norm, self.output)
        for module in (*modules, self.post_attention_norm, self.gate_up, self.down):
            if module is not None:
                yield from module.tensors()

    def load(self, source: WeightSource, positions: Tensor) -> "RotaryLayer":
        return RotaryLayer(self, source, positions)


class RotaryLayer:
    """One layer with its weights: implements millrace.runtime.models.decoder.DecoderLayer."""

    def __init__(self, decl: RotaryLayerDecl, source: WeightSource, cos_sin: Tensor) -> None:
        self.window = decl.window
        self.scale = decl.head_dim**-0.5
        self.input_norm = decl.input_norm.load(source)
        self.output = decl.output.load(source)
        self.post_attention_norm = decl.post_attention_norm.load(source)
        self._num_heads = decl.num_heads
        self._backends = source.placement.backends
        self._cos_sin = cos_sin  # [max_model_len, head_dim]
        self._qkv = decl.qkv.load(source)
        self._q_norm: RMSNorm | None = None if decl.q_norm is None else decl.q_norm.load(source)
        self._k_norm: RMSNorm | None = None if decl.k_norm is None else decl.k_norm.load(source)
        self._gate_up = decl.gate_up.load(source)
        self._down = decl.down.load(source)

    @property
    def weight_bytes(self) -> int:
        return sum(linear.weight_bytes for linear in (self._qkv, self.output, self._gate_up, self._down))

    def describe(self) -> ops.DecoderLayerArgs:
        return ops.DecoderLayerArgs(
            input_norm=self.input_norm.weights(),
            qkv=self._qkv,
            q_norm=None if self._q_norm is None else self._q_norm.weights(),
            k_norm=None if self._k_norm is None else self._k_norm.weights(),
            output=self.output,
            post_attention_norm=self.post_attention_norm.weights(),
            up=self._gate_up,
            down=self._down,
            scale=self.scale,
            window=self.window,
        )

    def write_kv(
        self, x: Tensor, positions: Tensor, kv_cache: Tensor, kv_scales: Tensor | None, slots: Tensor
    ) -> Tensor:
        return ops.rope_kv(
            self._qkv(x),
            self._num_heads,
            kv_cache,
            positions,
            slots,
            cos_sin=self._cos_sin,
            q_norm=None if self._q_norm is None else self._q_norm.weight,
            k_norm=None if self._k_norm is None else self._k_norm.weight,
            eps=0.0 if self._q_norm is None else self._q_norm.eps,
            kv_scales=kv_scales,
            backends=self._backends,
        )

    def mlp(self, x: Tensor) -> Tensor:
        return self._down(ops.silu_mul(self._gate_up(x), backends=self._backends))


class RotaryDecl(DecoderDecl, frozen=True, kw_only=True):
    """A checkpoint of the family."""

    base_prefix: ClassVar[str] = "model."
    # Old releases of transformers saved the frequencies, which config.json determines.
    harmless: ClassVar[Sequence[re.Pattern[str]]] = (re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),)

    is_gated: ClassVar[bool] = True

    rope: Rope

    def load_positions(self, source: WeightSource, max_model_len: int) -> Tensor:
        """cos and sin, [max_model_len, head_dim]."""
        return self.rope.cos_sin(max_model_len).to(source.placement.device)

    def rotation(self, positions: Tensor) -> Tensor:
        return positions


def declare_rotary(
    config: ConfigReader,
    architecture: str,
    *,
    head_dim: int,
    windows: Sequence[int | None],
    qkv_bias: bool,
    output_bias: bool,
    mlp_bias: bool,
    qk_norm: bool,
) -> RotaryDecl:
    """Declares a checkpoint from what its architecture decided (the arguments) and from the keys that all share.

    Raises CheckpointError for a value that is missing or not supported.
    """
    config.one_of("hidden_act", ("silu", "swish"), "silu")
    hidden = config.integer("hidden_size")
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        config.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    vocab, inner = config.integer("vocab_size"), config.integer("intermediate_size")
    eps = config.number("rms_norm_eps", 1e-6)
    rope = read_rope(config, head_dim)

    def layer(index: int, window: int | None) -> RotaryLayerDecl:
        name = f"model.layers.{index}"
        attn, mlp = f"{name}.self_attn", f"{name}.mlp"
        return RotaryLayerDecl(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            window=window,
            input_norm=RMSNormDecl(f"{name}.input_layernorm", hidden, eps),
            qkv=LinearDecl(
                parts=(
                    LinearPart(f"{attn}.q_proj", heads * head_dim, qkv_bias),
                    LinearPart(f"{attn}.k_proj", kv_heads * head_dim, qkv_bias),
                    LinearPart(f"{attn}.v_proj", kv_heads * head_dim, qkv_bias),
                ),
                in_features=hidden,
            ),
            q_norm=RMSNormDecl(f"{attn}.q_norm", head_dim, eps) if qk_norm else None,
            k_norm=RMSNormDecl(f"{attn}.k_norm", head_dim, eps) if qk_norm else None,
            output=LinearDecl(parts=(LinearPart(f"{attn}.o_proj", hidden, output_bias),), in_features=heads * head_dim),
            post_attention_norm=RMSNormDecl(f"{name}.post_attention_layernorm", hidden, eps),
            gate_up=LinearDecl(
                parts=(
                    LinearPart(f"{mlp}.gate_proj", inner, mlp_bias),
                    LinearPart(f"{mlp}.up_proj", inner, mlp_bias),
                ),
                in_features=hidden,
            ),
            down=LinearDecl(parts=(LinearPart(f"{mlp}.down_proj", hidden, mlp_bias),), in_features=inner),
        )

    tied = config.flag("tie_word_embeddings", False)
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=len(windows),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_model_len=rope.max_positions,
        # Planning may drop old keys only where no layer looks at them.
        sliding_window=None if None in windows else max(window for window in windows if window is not None),
        **special_tokens(config),
    )
    return RotaryDecl(
        spec=spec,
        rope=rope,
        embedding=EmbeddingDecl("model.embed_tokens", vocab, hidden),
        layers=tuple(layer(index, window) for index, window in enumerate(windows)),
        final_norm=RMSNormDecl("model.norm", hidden, eps),
        lm_head=None if tied else LinearDecl(parts=(LinearPart("lm_head", vocab),), in_features=hidden),
    )


def read_head_dim(config: ConfigReader) -> int:
    """`head_dim`, or the hidden size divided among the heads where it is not written."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if config.values.get("head_dim") is None and hidden % heads:
        config.refuse("num_attention_heads", f"a divisor of hidden_size ({hidden}), or head_dim must be given")
    return config.integer("head_dim", hidden // heads)
