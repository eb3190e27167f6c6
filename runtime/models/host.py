"""Models of tensors as the lanes of the host want them, of numpy's arrays; and the other way round."""

from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from millrace.kernels.cpu_decoder import KV_NAMES, CpuStack
from millrace.kernels.cpu_linear import KINDS, CpuLinear, array_of, bytes_of
from millrace.kernels.cpu_matrix import FLOAT32
from millrace.kernels.cpu_transformer import TABLE_KINDS, TransformerState
from millrace.runtime.models.base import ForwardBatch, Model
from millrace.runtime.models.cpu_model import CpuModel, HostKV
from millrace.runtime.models.decoder import DecoderModel, PagedKV

Array = npt.NDArray[Any]


class PlacedModel(Model[Tensor], Protocol):
    """A model of tensors.

    Attributes:
        device: where they lie.
    """

    device: torch.device


def host_model(model: DecoderModel) -> Model[Array]:
    """The same model over the same weights: in the C++ library, or where that did not pack all of them, in torch."""
    return cpu_model(model) or TorchHost(model)


def cpu_model(model: DecoderModel) -> CpuModel | None:
    """The model in the C++ library; None where torch has a part in it."""
    stack, head, table = model.stack, model.lm_head, model.table
    if not isinstance(stack, CpuStack) or not isinstance(head, CpuLinear):
        return None
    kind = FLOAT32 if table is None else KINDS[table.dtype]
    if kind not in TABLE_KINDS:
        return None
    state = TransformerState(
        decoder=stack.decoder.state,
        head=head.matrix.state,
        table=None if table is None else bytes_of(table),
        table_kind=kind,
        learned=None if model.learned is None else array_of(model.learned),
    )
    return CpuModel(head.matrix.library, state, model.spec, KV_NAMES[model.kv_dtype])


def tensor_model(model: Any) -> PlacedModel:
    """What `loading.load` gave, for a caller with tensors."""
    if isinstance(model, CpuModel):
        return CpuTensors(model)
    if isinstance(model, TorchHost):
        return model.tensors
    placed: PlacedModel = model  # the one of a GPU
    return placed


class TorchHost:
    """Implements millrace.runtime.models.base.Model of numpy's arrays, which torch's tensors share."""

    def __init__(self, model: DecoderModel) -> None:
        self.tensors: PlacedModel = model
        self._model = model
        self.spec = model.spec
        self.weight_bytes, self.kv_bytes_per_token = model.weight_bytes, model.kv_bytes_per_token

    def allocate_kv(self, num_blocks: int) -> PagedKV:
        return self._model.allocate_kv(num_blocks)

    def forward(self, batch: ForwardBatch[Array], kv: PagedKV) -> Array:
        logits: Array = self._model.forward(batch.converted(torch.from_numpy), kv).numpy()
        return logits

    def copy_blocks(self, kv: PagedKV, source: Array, target: Array) -> None:
        self._model.copy_blocks(kv, torch.from_numpy(source), torch.from_numpy(target))


class CpuTensors:
    """A model of the C++ library for callers with tensors: implements PlacedModel."""

    device = torch.device("cpu")

    def __init__(self, model: CpuModel) -> None:
        self._model = model
        self.spec = model.spec
        self.weight_bytes, self.kv_bytes_per_token = model.weight_bytes, model.kv_bytes_per_token

    def allocate_kv(self, num_blocks: int) -> HostKV:
        return self._model.allocate_kv(num_blocks)

    def forward(self, batch: ForwardBatch[Tensor], kv: HostKV) -> Tensor:
        return torch.from_numpy(self._model.forward(batch.converted(Tensor.numpy), kv))

    def copy_blocks(self, kv: HostKV, source: Tensor, target: Tensor) -> None:
        self._model.copy_blocks(kv, source.numpy(), target.numpy())
