"""Every CUDA kernel that the fronts can launch: what `millrace kernels build` compiles, and what the tests walk."""

from millrace.kernels import (
    cuda_attention,
    cuda_copy,
    cuda_elementwise,
    cuda_gemv,
    cuda_gemv_rows,
    cuda_rounded,
    cuda_sampling,
)
from millrace.kernels.cuda_compile import Kernel


def all_kernels() -> tuple[Kernel, ...]:
    """All variants of all fronts, each once."""
    fronts = (cuda_elementwise, cuda_attention, cuda_sampling, cuda_copy, cuda_gemv, cuda_gemv_rows, cuda_rounded)
    return tuple(dict.fromkeys(kernel for front in fronts for kernel in front.kernels()))
