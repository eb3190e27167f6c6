"""Which stored tensors stand for which declared ones; every name, shape and type is checked before a weight is read."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.kernels.quantized import AnyWeight
from millrace.runtime.errors import CheckpointError
from millrace.runtime.models.declaration import TensorDecl
from millrace.runtime.models.decoder import DecoderDecl
from millrace.runtime.quant.formats.base import Format, Layout, Matrix, Part, StoredMatrix
from millrace.runtime.weights.checkpoint import CheckpointFiles

_LISTED = 12  # names in one error message
_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class QuantizedMatrix(NamedTuple):
    """A matrix that a checkpoint holds quantised."""

    layout: Layout
    stored: StoredMatrix
    transposed: bool  # the model declares it [in, out]

    def read(self, wide: torch.dtype) -> AnyWeight:
        """Integers [out, in], or values of type `wide` in the declared order."""
        weight = self.layout.read(self.stored, wide)
        return weight.t() if self.transposed and isinstance(weight, Tensor) else weight


class Matched(NamedTuple):
    """Names are declared ones."""

    names: Mapping[str, str]  # of plain tensors, to the stored names
    quantized: Mapping[str, QuantizedMatrix]  # by the matrix's name, without ".weight"
    plain_types: Sequence[str]  # of linear maps that are not quantised

    def describe(self, quantization: Format | None) -> str:
        """For people: how the linear maps are stored."""
        types = " and ".join(self.plain_types)
        if quantization is None:
            return types
        layouts = sorted({matrix.layout.describe() for matrix in self.quantized.values()})
        return f"{quantization.name} {'; '.join(layouts)}" + (f"; others {types}" if types else "")


def match(decl: DecoderDecl, checkpoint: CheckpointFiles, quantization: Format | None, path: Path) -> Matched:
    """Raises CheckpointError that lists every name, shape or type at fault. `path` is for messages."""
    tensors = checkpoint.tensors
    prefix = decl.base_prefix if any(name.startswith(decl.base_prefix) for name in tensors) else ""
    names: dict[str, str] = {}
    quantized: dict[str, QuantizedMatrix] = {}
    wanted: list[Part] = []  # with whole names
    plain_types = set()
    for declared in decl.tensors():
        bare = declared.name.removeprefix(decl.base_prefix)
        name = prefix + bare if bare != declared.name else declared.name
        matrix = _quantized(declared, name, checkpoint, quantization)
        if matrix is not None:
            stem = name.removesuffix("weight")
            quantized[declared.name.removesuffix(".weight")] = matrix
            wanted += (part._replace(suffix=stem + part.suffix) for part in matrix.layout.parts)
            continue
        names[declared.name] = name
        wanted.append(Part(name, declared.shape, ()))
        if declared.linear is not None and name in tensors:
            plain_types.add(_TYPES.get(tensors[name].dtype, tensors[name].dtype))
    extra = _extra(decl, checkpoint, quantization, prefix, {part.suffix for part in wanted})
    if decl.lm_head is None and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        _check_tied(checkpoint, names[f"{decl.embedding.name}.weight"])
    checkpoint.release()  # of what was read here and is small
    faults = _faults(wanted, extra, checkpoint)
    if faults:
        raise CheckpointError(
            f"the weights in {path} do not fit {decl.spec.architecture} as config.json describes it. {faults}"
        )
    if quantization is not None and not quantized:
        raise CheckpointError(
            f"{path} is said to be quantised ({quantization.name}), but all its matrices are stored plainly: "
            "take the settings of the quantisation out of config.json, or fetch the checkpoint again",
            param="quantization_config",
        )
    return Matched(names, quantized, sorted(plain_types))


def _extra(
    decl: DecoderDecl, checkpoint: CheckpointFiles, quantization: Format | None, prefix: str, used: set[str]
) -> list[str]:
    """Stored names that nothing declares and that are not known to be harmless."""
    patterns = (*decl.harmless, *(() if quantization is None else quantization.unused))

    def is_harmless(name: str) -> bool:
        if any(pattern.fullmatch(name.removeprefix(prefix)) for pattern in patterns):
            return True
        # Some releases of AutoGPTQ stored a bias for every matrix: zeros where the model has none.
        is_added = name.endswith(".bias") and f"{name.removesuffix('bias')}qweight" in used
        return is_added and not bool(checkpoint.read(name).any())

    return [name for name in checkpoint.tensors if name not in used and not is_harmless(name)]


def _faults(wanted: Sequence[Part], extra: Sequence[str], checkpoint: CheckpointFiles) -> str:
    missing, misshapen, mistyped = [], [], []
    for name, shape, dtypes in wanted:
        found = checkpoint.tensors.get(name)
        if found is None:
            missing.append(name)
        elif found.shape != shape:
            misshapen.append(f"{name} is {list(found.shape)}, expected {list(shape)}")
        elif dtypes and found.dtype not in dtypes:
            mistyped.append(f"{name} is {found.dtype}, expected {' or '.join(dtypes)}")
    return "; ".join(
        f"{len(found)} {what}: {_listing(found)}"
        for what, found in (
            ("missing", missing),
            ("unexpected", extra),
            ("of the wrong shape", misshapen),
            ("of the wrong type", mistyped),
        )
        if found
    )


def _quantized(
    declared: TensorDecl, name: str, checkpoint: CheckpointFiles, quantization: Format | None
) -> QuantizedMatrix | None:
    if declared.linear is None or quantization is None:
        return None
    transposed = declared.linear == "columns"
    outputs, inputs = declared.shape[::-1] if transposed else declared.shape
    stem = name.removesuffix("weight")
    stored = StoredMatrix(
        lambda suffix: checkpoint.tensors.get(stem + suffix), lambda suffix: checkpoint.read_any(stem + suffix)
    )
    layout = quantization.layout(Matrix(declared.name.removesuffix(".weight"), outputs, inputs), stored)
    return None if layout is None else QuantizedMatrix(layout, stored, transposed)


def _check_tied(checkpoint: CheckpointFiles, embedding: str) -> None:
    """Some checkpoints store a tied output matrix a second time."""
    same = torch.equal(checkpoint.read("lm_head.weight"), checkpoint.read(embedding))
    if not same:
        raise CheckpointError(
            f"config.json: tie_word_embeddings is true, but lm_head.weight differs from {embedding}; "
            "set it to false to use both",
            param="tie_word_embeddings",
        )


def _listing(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
    return ", ".join(ordered[:_LISTED]) + more
