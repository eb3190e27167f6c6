"""What the fronts of the ops ask of tensors: contiguous, of a type, of a shape."""

import torch
from torch import Tensor

from millrace.kernels.arguments import describe

FLOAT = (torch.float32,)
KV_8_BIT = (torch.float8_e4m3fn, torch.int8)
ACTIVATION = WEIGHT = (torch.float32, torch.bfloat16, torch.float16)
LONG = (torch.int64,)
INT = (torch.int32,)


def refuse(op: str, name: str, tensor: Tensor, wanted: str) -> ValueError:
    return ValueError(f"{op}: {name} is {describe(tensor)}, but it must be {wanted}")


def check(op: str, name: str, tensor: Tensor, shape: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Contiguous, of one of the dtypes, and of the shape; a string in the shape names a size that may be anything."""
    given = tensor.shape
    if (
        len(given) == len(shape)
        and tensor.dtype in dtypes
        and tensor.is_contiguous()
        and all(want.__class__ is str or size == want for size, want in zip(given, shape, strict=True))
    ):
        return
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    raise refuse(op, name, tensor, f"contiguous {kinds} [{', '.join(map(str, shape))}]")
