"""Small quantised checkpoints: packed straight from the definition of each format, one integer at a time.

Nothing here is quick or shares a line with what reads them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from checkpoints import PagedSequences, load_reference, make_checkpoint, random_tokens, reference_logits
from safetensors.torch import load_file, save_file
from torch import Tensor

from millrace.kernels.quantized import AnyWeight
from millrace.kernels.torch_backend import TorchBackend
from millrace.runtime.models.declaration import Placement
from millrace.runtime.models.decoder import DecoderModel
from millrace.runtime.models.registry import declare
from millrace.runtime.quant.formats import read_format
from millrace.runtime.weights.checkpoint import Checkpoint, read_config
from millrace.runtime.weights.loader import load_model
from millrace.runtime.weights.matching import match

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in a word of AWQ's, from its lowest bits


class Stored(NamedTuple):
    """A matrix as a checkpoint stores it, by suffix, and what it stands for."""

    tensors: Mapping[str, Tensor]
    wide: Tensor  # [out, in] float32


class Integers(NamedTuple):
    """A matrix [out, in] of scale * (q - zero), one scale and zero for each row and group."""

    q: Tensor  # [out, in] int64
    scales: Tensor  # [out, groups] float16
    zeros: Tensor  # [out, groups] int64
    groups: Tensor  # [in] int64, the group of each input

    def widen(self) -> Tensor:
        return (self.q - self.zeros[:, self.groups]).float() * self.scales.float()[:, self.groups]


def random_integers(
    outputs: int, inputs: int, bits: int, group_size: int, *, seed: int = 0, order: Tensor | None = None
) -> Integers:
    """Integers and zeros of all sizes that the bits hold; with an order, input order[i] comes i-th in the groups."""
    generator = torch.Generator().manual_seed(seed + 1000 * outputs + inputs)
    groups = torch.arange(inputs) // group_size
    if order is not None:
        groups[order] = groups.clone()
    shape = (outputs, inputs // group_size)
    return Integers(
        torch.randint(0, 1 << bits, (outputs, inputs), generator=generator),
        (torch.rand(shape, generator=generator) * 0.3 / (1 << bits) + 0.05 / (1 << bits)).half(),
        torch.randint(0, 1 << bits, shape, generator=generator),
        groups,
    )


def pack_bits(values: Sequence[int], bits: int) -> list[int]:
    """One long number with value i at bit i * bits, cut into signed words of 32 bits."""
    number = sum(value << (index * bits) for index, value in enumerate(values))
    words = [(number >> start) & 0xFFFFFFFF for start in range(0, len(values) * bits, 32)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def int32(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def gptq(integers: Integers, bits: int, *, version: int = 1, with_groups: bool = True) -> Stored:
    zeros = int32([pack_bits(column.tolist(), bits) for column in integers.zeros.t()])
    if version == 1:
        if bits == 3:
            smaller = (integers.zeros - 1) % 8
            zeros = int32([pack_bits(column.tolist(), bits) for column in smaller.t()])
        else:
            zeros -= pack_bits([1] * (32 // bits), bits)[0]
    tensors = {
        "qweight": int32([pack_bits(row.tolist(), bits) for row in integers.q]).t().contiguous(),
        "qzeros": zeros,
        "scales": integers.scales.t().contiguous(),
    }
    if with_groups:
        tensors["g_idx"] = integers.groups.int()
    return Stored(tensors, integers.widen())


def _awq_words(rows: Tensor) -> Tensor:
    ordered = rows.view(len(rows), -1, 8)[:, :, AWQ_ORDER].flatten(1)
    return int32([pack_bits(row.tolist(), 4) for row in ordered])


def awq(integers: Integers) -> Stored:
    tensors = {
        "qweight": _awq_words(integers.q.t()),
        "qzeros": _awq_words(integers.zeros.t()),
        "scales": integers.scales.t().contiguous(),
    }
    return Stored(tensors, integers.widen())


class Pair(NamedTuple):
    """A quantised checkpoint, and a plain one in float32 that holds what it stands for."""

    quantized: Path
    plain: Path


def make_pair(
    folder: Path,
    convert: Callable[[str, Tensor], Stored | None],
    settings: Mapping[str, Any] | None,
    *,
    kind: str = "llama",
    dtype: torch.dtype = torch.float16,
    **overrides: Any,
) -> Pair:
    """`convert` gets each matrix's name and random weight [out, in], and returns None for those that stay plain.

    Args:
        settings: the quantization_config; None leaves config.json as it is.
        dtype: of what stays plain.
        overrides: of the architecture's configuration.
    """
    sizes = {"n_layer": 2} if kind == "gpt2" else {"intermediate_size": 128, "num_hidden_layers": 2}
    overrides = sizes | overrides
    plain = make_checkpoint(kind, folder / "plain", **overrides)
    names = {declared.name: declared.linear for declared in declare(read_config(plain)).tensors() if declared.linear}
    stored: dict[str, Tensor] = {}
    wide: dict[str, Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        side = names.get(name)
        matrix = None
        if side is not None:
            matrix = convert(name.removesuffix(".weight"), tensor if side == "rows" else tensor.t().contiguous())
        if matrix is None:
            stored[name] = tensor.to(dtype)
            wide[name] = stored[name].float()
            continue
        stem = name.removesuffix("weight")
        stored.update({stem + suffix: part.contiguous() for suffix, part in matrix.tensors.items()})
        wide[name] = (matrix.wide if side == "rows" else matrix.wide.t()).float().contiguous()
    quantized = folder / "quantized"
    quantized.mkdir()
    save_file(stored, quantized / "model.safetensors", {"format": "pt"})
    save_file(wide, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    if settings is not None:
        config["quantization_config"] = dict(settings)
    (quantized / "config.json").write_text(json.dumps(config))
    return Pair(quantized, plain)


def read_matrices(folder: Path, wide: torch.dtype = torch.float32) -> dict[str, AnyWeight]:
    """Every quantised matrix by name, as the loader reads it."""
    config = read_config(folder)
    matched = match(declare(config), Checkpoint(folder), read_format(config, folder), folder)
    return {name: matrix.read(wide) for name, matrix in matched.quantized.items()}


def widened(weight: AnyWeight) -> Tensor:
    return weight.float() if isinstance(weight, Tensor) else weight.widen()


def load_on_torch(folder: Path) -> DecoderModel:
    """The model on the backend that does not round activations."""
    return load_model(folder, placement=Placement(backends=(TorchBackend(),)))


def logits(model: DecoderModel) -> Tensor:
    return PagedSequences(model, 1, 48).step({0: random_tokens(40, seed=1)})[0]


def wanted_logits(pair: Pair) -> Tensor:
    """transformers' of the plain twin."""
    want = reference_logits(load_reference(pair.plain), random_tokens(40, seed=1))
    assert want.std() > 0.1  # logits that are all alike would prove nothing
    return want


def altered(folder: Path, target: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor | None]) -> Path:
    """A copy of a quantised checkpoint with other settings and tensors; a tensor that is None is taken out."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (target / "config.json").write_text(json.dumps(config))
    changed = {**load_file(folder / "model.safetensors"), **tensors}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    return target


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()
