"""The ops on an NVIDIA GPU: our kernels through a launcher, products through torch (cuBLAS).

Everything is enqueued on the stream that is current at the call, which is asked for at each launch: during the capture
of a graph it is the capture's. What the kernels do not have (an odd head_dim, float32) is refused, and left to torch.
"""

from collections.abc import Callable, Hashable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from millrace.kernels import cuda_attention, cuda_copy, cuda_elementwise, cuda_gemv, cuda_gemv_rows, cuda_sampling
from millrace.kernels.arguments import (
    ActivationArgs,
    AttentionArgs,
    Backend,
    CopyBlocksArgs,
    EmbeddingArgs,
    Float8Args,
    NormArgs,
    PackArgs,
    PackedLinear,
    QuantizedArgs,
    Refusal,
    RopeKvArgs,
)
from millrace.kernels.cuda_compile import Kernel
from millrace.kernels.cuda_launch import Launcher
from millrace.kernels.cuda_linear import CudaLinear, CudaQuantized, CudaRows, QuantizedProducts
from millrace.kernels.memory import BLOCK_SIZE

_TYPES = tuple(cuda_elementwise.MODEL_DTYPES)
_VECTOR = cuda_elementwise.VECTOR


class CudaBackend(Backend):
    """Args:
    launcher: of the device that the tensors are on.
    current_stream: the raw stream to launch on, asked for at each launch.
    max_seqs: places of the largest decode step.
    batch_invariant: splits of the attention do not depend on who else is in the batch.
    """

    name = "cuda"

    def __init__(
        self,
        launcher: Launcher,
        current_stream: Callable[[], int],
        *,
        max_seqs: int,
        batch_invariant: bool = False,
    ) -> None:
        self._launcher = launcher
        self._stream = current_stream
        self._max_seqs = max_seqs
        self._batch_invariant = batch_invariant
        self._workspaces: dict[Hashable, cuda_attention.DecodeWorkspace] = {}
        self._products = QuantizedProducts(launcher, current_stream)

    def pack_linear(self, args: PackArgs) -> PackedLinear | Refusal:
        if args.weight.dtype != args.activation or args.activation not in _TYPES:
            return Refusal(f"it has no product of {args.activation} by {args.weight.dtype}")
        return self._elsewhere(args.weight) or CudaLinear(args.weight, args.bias, self._row_lookup)

    def _row_lookup(self, tokens: Tensor, weight: Tensor) -> Tensor:
        found = self.embedding(EmbeddingArgs(tokens, weight, weight.dtype))
        return weight.index_select(0, tokens) if isinstance(found, Refusal) else found

    def pack_quantized(self, args: QuantizedArgs) -> PackedLinear | Refusal:
        reason = cuda_gemv.lacks(args.weight, args.activation)
        if reason:
            return Refusal(reason)
        refusal = self._elsewhere(args.weight.q)
        if refusal is not None:
            return refusal
        if args.weight.is_w8a8 and cuda_gemv_rows.are_row_scaled(args.weight):
            return CudaRows(self._products, cuda_gemv_rows.pack_integers(args.weight, args.bias, args.activation))
        return CudaQuantized(self._products, cuda_gemv.pack(args.weight, args.bias, args.activation))

    def pack_float8(self, args: Float8Args) -> PackedLinear | Refusal:
        reason = cuda_gemv_rows.lacks(args.weight, args.activation)
        if reason:
            return Refusal(reason)
        return self._elsewhere(args.weight.codes) or CudaRows(
            self._products, cuda_gemv_rows.pack_float8(args.weight, args.bias, args.activation)
        )

    @property
    def quantized_kernels(self) -> frozenset[Kernel]:
        """What the quantised matrices that were packed so far launch: to be loaded at start, with `model_kernels`."""
        return frozenset(self._products.kernels)

    def embedding(self, args: EmbeddingArgs) -> Tensor | Refusal:
        refusal = self._unserved(args.weight, args.weight.shape[1])
        if refusal is not None or args.dtype != args.weight.dtype:
            return refusal or Refusal(f"a table of {args.weight.dtype} gives no {args.dtype}")
        return cuda_elementwise.embedding(args.tokens, args.weight, launcher=self._launcher, stream=self._stream())

    def rms_norm(self, args: NormArgs) -> Tensor | Refusal:
        x, residual = args.x, args.residual
        refusal = self._unserved_norm(args)
        if refusal is not None:
            return refusal
        width = x.shape[-1]
        y = cuda_elementwise.rms_norm(
            x.view(-1, width),
            args.weight,
            args.eps,
            residual=None if residual is None else residual.view(-1, width),
            launcher=self._launcher,
            stream=self._stream(),
        )
        return y.view(x.shape)

    def layer_norm(self, args: NormArgs) -> Tensor | Refusal:
        x, residual = args.x, args.residual
        refusal = self._unserved_norm(args)
        if refusal is not None:
            return refusal
        width = x.shape[-1]
        y = cuda_elementwise.layer_norm(
            x.view(-1, width),
            args.weight,
            args.bias,
            args.eps,
            residual=None if residual is None else residual.view(-1, width),
            launcher=self._launcher,
            stream=self._stream(),
        )
        return y.view(x.shape)

    def silu_mul(self, args: ActivationArgs) -> Tensor | Refusal:
        return self._unserved(args.x, args.x.shape[1] // 2) or cuda_elementwise.activation(
            args.x, "silu", gated=True, launcher=self._launcher, stream=self._stream()
        )

    def gelu_tanh(self, args: ActivationArgs) -> Tensor | Refusal:
        x = args.x
        refusal = self._unserved(x, x.shape[-1])
        if refusal is not None:
            return refusal
        flat = x.view(-1, x.shape[-1])
        y = cuda_elementwise.activation(flat, "gelu_tanh", launcher=self._launcher, stream=self._stream())
        return y.view(x.shape)

    def rope_kv(self, args: RopeKvArgs) -> Tensor | Refusal:
        qkv, head_dim = args.qkv, args.head_dim
        refusal = self._unserved(qkv, head_dim)
        if refusal is not None:
            return refusal
        rotary_dim = 0 if args.cos_sin is None else args.cos_sin.shape[1]
        if rotary_dim % _VECTOR or head_dim > 256:
            return Refusal(f"rotary_dim {rotary_dim} or head_dim {head_dim} is not a multiple of {_VECTOR} up to 256")
        q = cuda_elementwise.rope_write_kv(
            qkv,
            args.slot_mapping,
            args.kv_cache,
            num_heads=args.num_heads,
            q_norm=args.q_norm,
            k_norm=args.k_norm,
            norm_eps=args.eps,
            cos_sin=args.cos_sin,
            positions=None if args.cos_sin is None else args.positions,
            kv_scales=args.kv_scales,
            out=qkv.new_empty(qkv.shape[0], args.num_heads * head_dim),
            launcher=self._launcher,
            stream=self._stream(),
        )
        return q.view(qkv.shape[0], args.num_heads, head_dim)

    def paged_attention(self, args: AttentionArgs) -> Tensor | Refusal:
        q, batch = args.q, args.batch
        num_heads, head_dim = q.shape[1:]
        group = num_heads // args.k_cache.shape[1]
        lacking = attention_lacks(head_dim, group)
        refusal = Refusal(lacking) if lacking else self._unserved(q, head_dim)
        if refusal is not None:
            return refusal
        if not batch.num_tokens:
            return torch.empty_like(q)
        scales = (None, None) if args.kv_scales is None else (args.kv_scales[0], args.kv_scales[1])
        pool = cuda_attention.KvPool(args.k_cache, args.v_cache, *scales)
        options = cuda_attention.AttentionOptions(args.scale, args.window)
        if batch.is_decode:
            workspace = batch.plan((self, "decode", args.window), lambda: self._plan_decode(args))
            return cuda_attention.decode_attention(
                self._launcher, q, pool, batch.block_tables, batch.context_lens, workspace, options,
                stream=self._stream(),
            )  # fmt: skip
        plan = batch.plan((self, "prefill"), lambda: self._plan_prefill(args))
        return cuda_attention.prefill_attention(
            self._launcher, q, pool, batch.block_tables, plan, options, stream=self._stream()
        )

    def _plan_decode(self, args: AttentionArgs) -> cuda_attention.DecodeWorkspace:
        """Once per step and window. The memory is made at the first step, which is no captured one."""
        batch, (_, num_heads, head_dim) = args.batch, args.q.shape
        shape = cuda_attention.DecodeShape(
            max_seqs=self._max_seqs,
            num_heads=num_heads,
            num_kv_heads=args.k_cache.shape[1],
            head_dim=head_dim,
            max_context_len=batch.block_tables.shape[1] * BLOCK_SIZE,
            dtype=args.q.dtype,
            kv_dtype=args.k_cache.dtype,
            windows=(args.window,),
            batch_invariant=self._batch_invariant,
        )
        if shape not in self._workspaces:
            device = args.q.device
            self._workspaces[shape] = cuda_attention.decode_workspace(shape, self._launcher, device)
        workspace = self._workspaces[shape]
        cuda_attention.plan_decode(self._launcher, batch.context_lens, workspace, stream=self._stream())
        return workspace

    def _plan_prefill(self, args: AttentionArgs) -> cuda_attention.PrefillPlan:
        batch, (_, num_heads, head_dim) = args.batch, args.q.shape
        if batch.bounds is None or batch.contexts is None:
            raise ValueError("paged_attention: a prefill step needs its lengths on the host")
        plan = cuda_attention.plan_prefill(
            self._launcher,
            [end - begin for begin, end in pairwise(batch.bounds)],
            batch.contexts,
            num_heads=num_heads,
            num_kv_heads=args.k_cache.shape[1],
            head_dim=head_dim,
            device="cpu",
        )
        # Through pinned memory, so that the copy does not wait for the stream; torch keeps it until the copy is done.
        tiles, device = plan.tiles, batch.context_lens.device
        if device.type != "cpu":
            tiles = tiles.pin_memory().to(device, non_blocking=True)
        return plan._replace(tiles=tiles, query_starts=batch.query_starts, context_lens=batch.context_lens)

    def copy_blocks(self, args: CopyBlocksArgs) -> Refusal | None:
        pool, source, target = args.kv_storage, args.source, args.target
        if not (source.is_cpu and target.is_cpu):
            return Refusal("the lists of blocks are on the device, and the kernel takes them from the host")
        refusal = self._elsewhere(pool)
        if refusal is None:
            cuda_copy.copy_blocks(
                self._launcher, pool, source.tolist(), target.tolist(), scales=args.kv_scales, stream=self._stream()
            )
        return refusal

    def _elsewhere(self, tensor: Tensor) -> Refusal | None:
        if tensor.device.type == self._launcher.device_type:
            return None
        return Refusal(f"the tensors are on {tensor.device}, not on a {self._launcher.device_type} device")

    def _unserved(self, x: Tensor, width: int) -> Refusal | None:
        """Why the kernels cannot serve rows of this width; None if they can."""
        if x.dtype not in _TYPES:
            return Refusal(f"the kernels compute in bfloat16 and float16, not in {x.dtype}")
        if width % _VECTOR or not width:
            return Refusal(f"a width of {width} is not a multiple of {_VECTOR}")
        return self._elsewhere(x)

    def _unserved_norm(self, args: NormArgs) -> Refusal | None:
        if args.weight.dtype != args.x.dtype or (args.bias is not None and args.bias.dtype != args.x.dtype):
            return Refusal(f"the weight is {args.weight.dtype}, and the activations are {args.x.dtype}")
        width = args.x.shape[-1]
        if width > cuda_elementwise.MAX_NORM_WIDTH:
            return Refusal(f"a width of {width} is over {cuda_elementwise.MAX_NORM_WIDTH}")
        return self._unserved(args.x, width)


def attention_lacks(head_dim: int, group: int) -> str:
    """Why the attention kernels have no heads of this size, or not as many per kv head; empty if they have."""
    if head_dim not in cuda_attention.HEAD_DIMS:
        return f"the kernels have head sizes of {', '.join(map(str, cuda_attention.HEAD_DIMS))}, and not {head_dim}"
    if group > cuda_attention.MAX_QUERY_ROWS:
        return f"the kernels have up to {cuda_attention.MAX_QUERY_ROWS} query heads for a kv head, and not {group}"
    return ""


def model_kernels(dtype: torch.dtype, head_dim: int, kv_dtype: torch.dtype | None = None) -> Iterator[Kernel]:
    """The variants that a model of this type and head size may launch over a pool of `kv_dtype` (None: the model's),
    sampling included: what to load at start."""
    name = cuda_elementwise.MODEL_DTYPES[dtype]
    kv = cuda_elementwise.KV_DTYPES.index(None if kv_dtype == dtype else kv_dtype)
    lanes = next((lanes for lanes in (8, 16, 32) if head_dim <= _VECTOR * lanes), 32)
    fits = {
        "MR_T": (name,),
        "MR_KV": ((name, "fp8", "int8")[kv], str(kv)),
        "MR_HEAD_DIM": (str(head_dim),),
        "MR_LANES": (str(lanes),),
    }
    for front in (cuda_elementwise, cuda_attention, cuda_sampling, cuda_copy):
        for kernel in front.kernels():
            if all(value in fits.get(macro, (value,)) for macro, value in kernel.defines):
                yield kernel
