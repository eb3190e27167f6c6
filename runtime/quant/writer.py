"""The layouts that quantised checkpoints are published in: rounded matrices to named tensors, and what config.json
says of them.

Sources: AutoAWQ 0.2.9 (gemm), AutoGPTQ 0.7.1 and GPTQModel 7.7 (version 1, which stores zeros less 1),
compressed-tensors 0.20 (pack-quantized, int-quantized, float-quantized). A matrix <name> is [out, in]; bits are packed
from the lowest on.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from millrace.kernels.quantized import QuantizedWeight

_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight outputs lies in each nibble of a word, lowest first
_SLICE = 1 << 22  # values that are packed at a time
_FP8_LARGEST = 448.0  # of float8_e4m3fn


class Float8Weight(NamedTuple):
    """A matrix of scale * value, with one scale for each output."""

    values: Tensor  # [out, in] float8_e4m3fn
    scales: Tensor  # [out, 1] float32

    def widen(self) -> Tensor:
        """The matrix in float32."""
        return self.values.float() * self.scales


def round_to_fp8(weight: Tensor) -> Float8Weight:
    """`weight` [out, in] rounded to the nearest float8_e4m3fn, each output's largest to 448."""
    # A scale that bfloat16 holds exactly stays the same in a model that is loaded in it.
    largest = weight.abs().amax(1, keepdim=True)
    scales = (largest / _FP8_LARGEST).clamp(min=2.0**-24).to(torch.bfloat16).float()
    values = (weight / scales).clamp(-_FP8_LARGEST, _FP8_LARGEST).to(torch.float8_e4m3fn)
    return Float8Weight(values, scales)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Integers below 2 ** bits, [rows, count] uint8, as one stream of bits for each row: [rows, words] int32, the last
    word filled up with zeros. A value of 3 bits may lie in two words."""
    rows, count = values.shape
    words = -(-count * bits // 32)
    packed = np.zeros((rows, words * 4), np.uint8)
    step = max(1, _SLICE // max(count, 1))
    shifts = np.arange(bits, dtype=np.uint8)
    for start in range(0, rows, step):
        part = values[start : start + step].numpy()
        stream = ((part[:, :, None] >> shifts) & 1).reshape(len(part), count * bits)
        folded = np.packbits(stream, axis=1, bitorder="little")
        packed[start : start + step, : folded.shape[1]] = folded
    return torch.from_numpy(packed.view("<i4").astype(np.int32))


def awq_tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """qweight [in, out / 8] and qzeros [in / group, out / 8] int32, scales [in / group, out] float16."""
    return {
        f"{name}.qweight": _awq_words(weight.q),
        f"{name}.qzeros": _awq_words(weight.zeros.to(torch.uint8)),
        f"{name}.scales": weight.scales.t().contiguous(),
    }


def _awq_words(values: Tensor) -> Tensor:
    turned = values.t()
    ordered = turned.reshape(len(turned), -1, 8)[:, :, _AWQ_ORDER].flatten(1)
    return pack_bits(ordered.contiguous(), 4)


def gptq_tensors(name: str, weight: QuantizedWeight, bits: int) -> dict[str, Tensor]:
    """qweight [in * bits / 32, out], qzeros [in / group, out * bits / 32] and g_idx [in] int32, scales
    [in / group, out] float16. `bits` says how many of the stored ones are used."""
    inputs = weight.q.shape[1]
    q, groups = weight.q, torch.arange(inputs, dtype=torch.int32) // weight.group_size
    if weight.order is not None:
        q, groups = torch.empty_like(q), torch.empty_like(groups)
        q[:, weight.order] = weight.q
        groups[weight.order] = torch.arange(inputs, dtype=torch.int32) // weight.group_size
    return {
        f"{name}.qweight": pack_bits(q, bits).t().contiguous(),
        f"{name}.qzeros": pack_bits((weight.zeros.t() - 1).to(torch.uint8), bits),
        f"{name}.scales": weight.scales.t().contiguous(),
        f"{name}.g_idx": groups,
    }


def packed_tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """pack-quantized, 4 bits about zero: weight_packed [out, in / 8] int32, weight_scale [out, in / group] float16,
    weight_shape [2]. The format's integers are signed and stored with 8 added, which is a zero of 8 here; packed zeros
    are left out, for transformers 5 does not load them."""
    if not bool((weight.zeros == 8).all()):
        raise ValueError(f"{name}: all zeros must be 8")
    return {
        f"{name}.weight_packed": pack_bits(weight.q, 4),
        f"{name}.weight_scale": weight.scales,
        f"{name}.weight_shape": torch.tensor(weight.q.shape, dtype=torch.int64),
    }


def int8_tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """int-quantized: weight [out, in] int8, weight_scale [out, 1] float16."""
    return {
        f"{name}.weight": (weight.q.to(torch.int16) - 128).to(torch.int8),
        f"{name}.weight_scale": weight.scales,
    }


def fp8_tensors(name: str, weight: Float8Weight) -> dict[str, Tensor]:
    """float-quantized: weight [out, in] float8_e4m3fn, weight_scale [out, 1] float32."""
    return {f"{name}.weight": weight.values, f"{name}.weight_scale": weight.scales}


def awq_config(group_size: int) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}


def gptq_config(bits: int, group_size: int, *, sym: bool, desc_act: bool) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": sym,
        "checkpoint_format": "gptq",
    }


def packed_config(group_size: int) -> dict[str, Any]:
    return _compressed("pack-quantized", _arguments(4, "int", "group") | {"group_size": group_size}, None)


def int8_config() -> dict[str, Any]:
    return _compressed("int-quantized", _arguments(8, "int", "channel"), _arguments(8, "int", "token"))


def fp8_config() -> dict[str, Any]:
    return _compressed("float-quantized", _arguments(8, "float", "channel"), _arguments(8, "float", "token"))


def _arguments(bits: int, kind: str, strategy: str) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "group_size": None,
        "dynamic": strategy == "token",
    }


def _compressed(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
