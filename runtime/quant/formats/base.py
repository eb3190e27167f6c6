"""What a format of quantised checkpoints tells: which tensors stand for a matrix, and how they are read."""

import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from millrace.kernels.quantized import AnyWeight
from millrace.runtime.errors import CheckpointError
from millrace.runtime.models.config import ConfigReader
from millrace.runtime.weights.checkpoint import StoredTensor

# What Intel's AutoRound writes beside the keys of the format that it exports to: how it rounded.
AUTO_ROUND = (
    "amp autoround_version enable_minmax_tuning enable_quanted_input gradient_accumulate_steps iters low_gpu_mem_usage "
    "lr minmax_lr nsamples provider scale_dtype seqlen to_quant_block_names"
)
FLOATS = ("F16", "BF16", "F32")  # names of safetensors


class Matrix(NamedTuple):
    """The weight of a linear map as the model declares it: <name>.weight [out_features, in_features]."""

    name: str
    out_features: int
    in_features: int

    def refuse(self, fault: str) -> NoReturn:
        raise CheckpointError(f"{self.name}: {fault}")

    def groups(self, size: int) -> int:
        """How many groups of `size` inputs there are; CheckpointError where they do not come out even."""
        if self.in_features % size:
            self.refuse(
                f"{self.in_features} inputs cannot be cut into groups of {size}, as the checkpoint's config says"
            )
        return self.in_features // size

    def describe_groups(self, size: int) -> str:
        return "one scale for each output" if size == self.in_features else f"groups of {size}"


class Part(NamedTuple):
    """One tensor that a matrix is stored in: <matrix>.<suffix>, of one of these safetensors types."""

    suffix: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


class StoredMatrix(NamedTuple):
    """What a checkpoint holds under the name of a matrix, by suffix."""

    header: Callable[[str], StoredTensor | None]
    read: Callable[[str], Tensor]  # as stored; valid until the checkpoint is released

    def has(self, suffix: str) -> bool:
        return self.header(suffix) is not None


class Layout(Protocol):
    """How one matrix is stored."""

    @property
    def parts(self) -> Sequence[Part]:
        """Every tensor that must be there; the loader checks names, shapes and types before `read`."""

    def read(self, stored: StoredMatrix, wide: torch.dtype) -> AnyWeight:
        """The weight [out_features, in_features]: integers, or values of type `wide` where integers cannot hold it.

        Raises CheckpointError for contents that no such matrix can have.
        """

    def describe(self) -> str:
        """For people: bits, groups, and whether it can stay packed."""


class Format(Protocol):
    """One family of quantised checkpoints, with the settings of one checkpoint.

    Attributes:
        name: for people.
        unused: patterns of stored tensors that this runtime does not need, such as scales of activations.
    """

    name: str
    unused: Sequence[re.Pattern[str]]

    def layout(self, matrix: Matrix, stored: StoredMatrix) -> Layout | None:
        """How the matrix is stored; None: plainly, as <name>.weight. Reads no weight.

        Raises CheckpointError where the settings do not fit the matrix.
        """


def is_listed(name: str, listed: Collection[str]) -> bool:
    """Whether one of `listed` names the module: whole, or by some of its dotted parts in a row ("lm_head",
    "mlp.gate"), as modules_to_not_convert does."""
    return any(f".{entry}." in f".{name}." for entry in listed)


def compiled(config: ConfigReader, key: str, text: str) -> re.Pattern[str]:
    """A pattern for names of modules out of a checkpoint's settings."""
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        config.refuse(key, f"made of names and regular expressions (in {text!r}: {error})")


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
