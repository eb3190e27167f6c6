"""Sampling on the GPU: from logits to one token per row in two launches that a CUDA graph can hold.

Everything that a draw depends on lies in device memory: a record per row (`SamplerTables`), and lists of edited and
seen ids that the record points to. The kernels advance positions and seen tokens themselves, so nothing comes back to
the host between steps. Semantics are those of `millrace.runtime.sampling` on the CPU: the order of edits and filters,
ties (lowest id), what counts as broken logits. Greedy tokens are the same. A draw is a function of the logits, the
parameters and (seed, choice, position) alone; with top_k, or a nucleus of few ids, it is the CPU's token unless
rounding decides, while unfiltered draws and large nuclei take the Philox numbers in another way.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from millrace.kernels.arguments import describe
from millrace.kernels.cuda_compile import Kernel
from millrace.kernels.cuda_launch import Launcher

BLOCK = 128  # ids per summary
MAX_VOCAB = 3584 * BLOCK  # the summaries of a row must fit into 48 KiB of shared memory beside the candidates
SMALL_VOCAB = 64 * BLOCK  # up to here a draw takes 128 threads: fewer to wait for, and enough to hold the summaries
GREEDY_BELOW = 1e-5  # temperatures under this are greedy, as in the CPU sampler
CODES = ("", "the model gave NaN or infinite logits", "no token is left to draw", "the list of seen tokens is full")

TYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "float"}
_SCAN_THREADS = 256
_SLICES = (32, 16, 8)  # summaries per thread block of the scan

_POINTERS = ("allowed", "shift_ids", "shift_values", "held", "seen", "seen_counts")
_FLOATS = ("inv_temperature", "top_p", "min_p", "repetition", "presence", "frequency")
_INTS = ("top_k", "greedy", "num_logprobs", "choice", "min_tokens", "num_allowed", "num_shifts", "num_held",
         "num_seen", "seen_capacity", "edit_slot", "reserved")  # fmt: skip
# struct SamplingRow of cuda/sampling.cuh
ROW_DTYPE = np.dtype(
    [("seed", "u8"), ("position", "i8"), *((name, "u8") for name in _POINTERS), *((name, "f4") for name in _FLOATS),
     *((name, "u4" if name == "choice" else "i4") for name in _INTS)],
    align=True,
)  # fmt: skip
SCAN_DTYPE = np.dtype(
    [(name, "u8") for name in ("logits", "rows", "logits_index", "table", "summary", "raw_summary", "edited")]
    + [("logits_stride", "i8")]
    + [(name, "i4") for name in ("vocab", "num_blocks", "slice_blocks", "vectors")],
    align=True,
)
DRAW_DTYPE = np.dtype(
    [
        (name, "u8")
        for name in (
            "logits", "rows", "logits_index", "table", "summary", "raw_summary", "edited", "tokens", "codes",
            "last_tokens", "logprobs", "num_top", "top_ids", "top_logprobs",
        )
    ]
    + [("logits_stride", "i8")]
    + [(name, "i4") for name in ("vocab", "num_blocks", "max_top", "vectors")],
    align=True,
)  # fmt: skip


def scan_kernel(dtype: torch.dtype) -> Kernel:
    return Kernel("sampling_scan.cu", "mr_sample_scan", (("MR_T", TYPES[dtype]),), max_registers=48)


def draw_kernel(dtype: torch.dtype, threads: int) -> Kernel:
    defines = (("MR_T", TYPES[dtype]), ("MR_THREADS", str(threads)))
    return Kernel("sampling_draw.cu", "mr_sample_draw", defines, max_registers=64)


def kernels() -> Iterable[Kernel]:
    """Every variant that can be launched."""
    for dtype in TYPES:
        yield scan_kernel(dtype)
        for threads in (128, 512):
            yield draw_kernel(dtype, threads)


class RowSettings(NamedTuple):
    """How one row samples; the fields of `SamplingParams` that matter here, already within their bounds.

    Attributes:
        seed: 64-bit integer; a negative one counts as its two's complement.
        top_k: 0 or less is off.
        allowed: if given, nothing else can be drawn.
        held: ids that end the text; not drawn before `min_tokens`.
        num_logprobs: -1 is off; else the drawn token and this many alternatives.
    """

    seed: int
    choice: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = {}
    allowed: Sequence[int] | None = None
    banned: Sequence[int] = ()
    held: Sequence[int] = ()
    min_tokens: int = 0
    num_logprobs: int = -1

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def has_edits(self) -> bool:
        held = bool(self.held) and self.min_tokens > 0
        return self.has_penalties or held or self.allowed is not None or bool(self.logit_bias) or bool(self.banned)


class SamplerTables:
    """The device memory of all rows. Owned by one thread; copies run on torch's current stream, which should be the one
    that samples: then a row's lists are not given to others before the steps that read them are over.

    Attributes:
        table: [max_rows, ROW_DTYPE.itemsize] uint8, a ROW_DTYPE each.
        edited: [edit_slots, num_blocks * BLOCK] float32, logits of rows with edits.
        last_tokens: [max_rows] int64, what each row drew last; the next decode step embeds it.
    """

    def __init__(
        self, max_rows: int, vocab_size: int, device: torch.device | str, edit_slots: int | None = None
    ) -> None:
        if not 0 < vocab_size <= MAX_VOCAB:
            raise ValueError(f"sampling: a vocabulary of {vocab_size} tokens, but 1 to {MAX_VOCAB} can be drawn from")
        slots = max_rows if edit_slots is None else edit_slots
        if max_rows < 1 or not 0 <= slots <= max_rows:
            raise ValueError(f"sampling: {max_rows} rows and {slots} edit slots; rows >= 1, 0 <= slots <= rows")
        self.max_rows, self.vocab_size, self.device = max_rows, vocab_size, torch.device(device)
        self.num_blocks = -(-vocab_size // BLOCK)
        self.table = torch.zeros(max_rows, ROW_DTYPE.itemsize, dtype=torch.uint8, device=device)
        self.edited = torch.empty(slots, self.num_blocks * BLOCK, dtype=torch.float32, device=device)
        self.last_tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._free_slots = list(range(slots - 1, -1, -1))
        self._slots: dict[int, int] = {}
        self._lists: dict[int, dict[str, Tensor]] = {}  # of rows that have joined; their records point to them

    @property
    def num_free_edit_slots(self) -> int:
        return len(self._free_slots)

    def join(
        self,
        row: int,
        settings: RowSettings,
        prompt_tokens: Sequence[int] = (),
        output_tokens: Sequence[int] = (),
        max_new_tokens: int = 0,
    ) -> None:
        """Writes the record of a row that is free.

        Args:
            prompt_tokens, output_tokens: what a row with penalties has seen, and has drawn, so far.
            max_new_tokens: that will be drawn at most; a row with penalties has room for as many new ids.
        """
        if not 0 <= row < self.max_rows or row in self._lists:
            raise ValueError(f"sampling: row {row} must be free and between 0 and {self.max_rows - 1}")
        for name, ids in (
            ("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens), ("allowed", settings.allowed or ()),
            ("banned", settings.banned), ("logit_bias", tuple(settings.logit_bias)), ("held", settings.held),
        ):  # fmt: skip
            if len(ids) and not 0 <= min(ids) <= max(ids) < self.vocab_size:
                raise ValueError(
                    f"sampling: {name} hold ids from {min(ids)} to {max(ids)}, but the vocabulary ends at "
                    f"{self.vocab_size - 1}"
                )
        if settings.has_edits and not self._free_slots:
            raise ValueError(f"sampling: row {row} edits its logits, but all {self.edited.shape[0]} slots are taken")
        record: Any = np.zeros((), ROW_DTYPE)
        record["seed"] = settings.seed & (2**64 - 1)
        record["position"] = len(output_tokens)
        record["choice"] = settings.choice
        record["greedy"] = settings.temperature < GREEDY_BELOW or settings.top_k == 1
        record["inv_temperature"] = 1.0 / max(settings.temperature, GREEDY_BELOW)
        record["top_k"] = min(max(settings.top_k, 0), self.vocab_size)
        record["top_p"], record["min_p"] = settings.top_p, settings.min_p
        record["repetition"] = settings.repetition_penalty
        record["presence"], record["frequency"] = settings.presence_penalty, settings.frequency_penalty
        record["num_logprobs"] = settings.num_logprobs
        record["min_tokens"] = min(settings.min_tokens, 2**31 - 1)
        record["num_allowed"] = -1
        record["edit_slot"] = -1
        lists: dict[str, npt.NDArray[Any]] = {}
        if settings.has_edits:
            shifts: dict[int, float] = dict(settings.logit_bias) | dict.fromkeys(settings.banned, -np.inf)
            lists["shift_ids"] = np.array(list(shifts), np.int32)
            lists["shift_values"] = np.array(list(shifts.values()), np.float32)
            lists["held"] = np.unique(np.asarray(settings.held, np.int32))
            record["num_shifts"], record["num_held"] = len(shifts), len(lists["held"])
            if settings.allowed is not None:
                lists["allowed"] = np.unique(np.asarray(settings.allowed, np.int32))
                record["num_allowed"] = len(lists["allowed"])
            if settings.has_penalties:
                lists["seen"], lists["seen_counts"], record["num_seen"] = self._seen(
                    settings, prompt_tokens, output_tokens, max_new_tokens
                )
                record["seen_capacity"] = len(lists["seen"])
        uploaded = self._upload_lists(lists)
        for name, tensor in uploaded.items():
            record[name] = tensor.data_ptr() if tensor.numel() else 0
        if settings.has_edits:
            record["edit_slot"] = self._free_slots[-1]
        self.table[row].copy_(self._pinned(record.reshape(1).view(np.uint8).copy()), non_blocking=True)
        self._lists[row] = uploaded
        if settings.has_edits:
            self._slots[row] = self._free_slots.pop()

    def leave(self, row: int) -> None:
        """Frees a row that no launched step samples any more."""
        if row not in self._lists:
            raise ValueError(f"sampling: row {row} is not taken, so nothing can leave it")
        del self._lists[row]
        if row in self._slots:
            self._free_slots.append(self._slots.pop(row))

    def record(self, row: int) -> Any:
        """The record of a row as the device has it now; waits for the device."""
        return self.table[row].cpu().numpy().view(ROW_DTYPE)[0]

    def _upload_lists(self, lists: dict[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
        """All lists in one copy; views of it by name."""
        if not lists:
            return {}
        whole = np.concatenate([values.view(np.int32) for values in lists.values()])
        on_device = self._pinned(whole).to(self.device, non_blocking=True)
        return dict(zip(lists, torch.split(on_device, [len(values) for values in lists.values()]), strict=True))

    def _pinned(self, values: npt.NDArray[Any]) -> Tensor:
        """In pinned memory, from which a copy does not wait for the work before it."""
        tensor = torch.from_numpy(values)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _seen(
        self, settings: RowSettings, prompt: Sequence[int], output: Sequence[int], max_new_tokens: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], int]:
        """Ids that the penalties touch with room for those to come, times drawn, and how many ids there are."""
        drawn, times = np.unique(np.asarray(output, np.int32), return_counts=True)
        # The prompt counts for repetition alone, which asks only whether a token is listed.
        read = prompt if settings.repetition_penalty != 1.0 else ()
        only_read = np.setdiff1d(np.asarray(read, np.int32), drawn)
        num_seen = len(drawn) + len(only_read)
        capacity = max(1, min(self.vocab_size, num_seen + max_new_tokens))
        seen, counts = np.full(capacity, -1, np.int32), np.zeros(capacity, np.int32)
        seen[: len(drawn)], counts[: len(drawn)] = drawn, times
        seen[len(drawn) : num_seen] = only_read
        return seen, counts, num_seen


class SampleBuffers(NamedTuple):
    """Scratch and results of `sample`, allocated once. A step with fewer rows uses the beginning of each.

    Attributes:
        tokens: [max_batch] int32, -1 where nothing was drawn.
        codes: [max_batch] int32, 0 or an index into CODES.
        logprobs: [max_batch] float32, of the rows that asked.
        num_top: [max_batch] int32, alternatives found.
        top_ids: [max_batch, max_top] int32, most likely first; -1 behind num_top.
        top_logprobs: [max_batch, max_top] float32; -inf behind num_top.
        summary, raw_summary: [max_batch, num_blocks, 2] float32.
    """

    tokens: Tensor
    codes: Tensor
    logprobs: Tensor
    num_top: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    summary: Tensor
    raw_summary: Tensor

    @classmethod
    def allocate(cls, max_batch: int, tables: SamplerTables, max_top: int = 20) -> "SampleBuffers":
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=tables.device)

        return cls(
            tokens=empty(max_batch, dtype=torch.int32),
            codes=empty(max_batch, dtype=torch.int32),
            logprobs=empty(max_batch, dtype=torch.float32),
            num_top=empty(max_batch, dtype=torch.int32),
            top_ids=empty(max_batch, max_top, dtype=torch.int32),
            top_logprobs=empty(max_batch, max_top, dtype=torch.float32),
            summary=empty(max_batch, tables.num_blocks, 2, dtype=torch.float32),
            raw_summary=empty(max_batch, tables.num_blocks, 2, dtype=torch.float32),
        )


def sample(
    launcher: Launcher,
    tables: SamplerTables,
    buffers: SampleBuffers,
    logits: Tensor,
    rows: Tensor,
    logits_index: Tensor | None = None,
    *,
    stream: int,
) -> None:
    """Draws the next token of each row into `buffers`, and advances the rows that drew.

    Args:
        logits: [num_logits, vocab_size] bfloat16, float16 or float32; rows may lie apart; read only.
        rows: [num_rows] int32, distinct rows that have joined, or -1 for a place of a graph's bucket that is not used
            (its token is -1, its code 0).
        logits_index: [num_rows] int32, which row of `logits` each row draws from; None is the identity.

    Raises:
        ValueError: a wrong shape, dtype, device or layout. The values of `rows` and `logits_index` are on the device
            and are not looked at.
    """
    num_rows = rows.shape[0] if rows.dim() == 1 else -1
    if logits.dtype not in TYPES or logits.dim() != 2 or logits.shape[1] != tables.vocab_size or logits.stride(1) != 1:
        raise ValueError(
            f"sample: logits are {describe(logits)}, but bfloat16, float16 or float32 [num_logits, "
            f"{tables.vocab_size}] with neighbouring columns is needed"
        )
    for name, tensor in (("rows", rows), ("logits_index", logits_index)):
        if tensor is not None and (
            tensor.dtype != torch.int32 or tensor.shape != (num_rows,) or not tensor.is_contiguous()
        ):
            raise ValueError(f"sample: {name} is {describe(tensor)}, but contiguous int32 [num_rows] is needed")
    _check_buffers(buffers, tables, num_rows)
    named = {"logits": logits, "rows": rows, "table": tables.table, **buffers._asdict()}
    if logits_index is not None:
        named["logits_index"] = logits_index
    for name, tensor in named.items():
        if tensor.device.type != launcher.device_type or tensor.device != tables.device:
            raise ValueError(f"sample: {name} is on {tensor.device}, but the launcher works on {launcher.device_type}")
    if logits_index is None and num_rows > logits.shape[0]:
        raise ValueError(f"sample: {num_rows} rows draw from {logits.shape[0]} rows of logits without a logits_index")
    if num_rows == 0:
        return
    element = logits.element_size()
    vectors = logits.data_ptr() % (4 * element) == 0 and logits.stride(0) % 4 == 0
    common = {
        "logits": logits.data_ptr(),
        "rows": rows.data_ptr(),
        "logits_index": 0 if logits_index is None else logits_index.data_ptr(),
        "table": tables.table.data_ptr(),
        "summary": buffers.summary.data_ptr(),
        "raw_summary": buffers.raw_summary.data_ptr(),
        "edited": tables.edited.data_ptr(),
        "logits_stride": logits.stride(0),
        "vocab": tables.vocab_size,
        "num_blocks": tables.num_blocks,
        "vectors": vectors,
    }
    wanted = 4 * launcher.sm_count
    fitting = (size for size in _SLICES if -(-tables.num_blocks // size) * num_rows >= wanted)
    slice_blocks = next(fitting, _SLICES[-1])
    grid = (-(-tables.num_blocks // slice_blocks), num_rows, 1)
    params = _record(SCAN_DTYPE, **common, slice_blocks=slice_blocks)
    launcher.launch(scan_kernel(logits.dtype), grid, _SCAN_THREADS, params, stream=stream)

    threads = 128 if tables.vocab_size <= SMALL_VOCAB else 512
    params = _record(
        DRAW_DTYPE,
        **common,
        tokens=buffers.tokens.data_ptr(),
        codes=buffers.codes.data_ptr(),
        last_tokens=tables.last_tokens.data_ptr(),
        logprobs=buffers.logprobs.data_ptr(),
        num_top=buffers.num_top.data_ptr(),
        top_ids=buffers.top_ids.data_ptr(),
        top_logprobs=buffers.top_logprobs.data_ptr(),
        max_top=buffers.top_ids.shape[1],
    )
    launcher.launch(
        draw_kernel(logits.dtype, threads),
        (num_rows, 1, 1),
        threads,
        params,
        shared_bytes=10 * tables.num_blocks,
        stream=stream,
    )


def _check_buffers(buffers: SampleBuffers, tables: SamplerTables, num_rows: int) -> None:
    max_top = buffers.top_ids.shape[-1]
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "tokens": (torch.int32, ()),
        "codes": (torch.int32, ()),
        "logprobs": (torch.float32, ()),
        "num_top": (torch.int32, ()),
        "top_ids": (torch.int32, (max_top,)),
        "top_logprobs": (torch.float32, (max_top,)),
        "summary": (torch.float32, (tables.num_blocks, 2)),
        "raw_summary": (torch.float32, (tables.num_blocks, 2)),
    }
    for name, tensor in buffers._asdict().items():
        dtype, tail = shapes[name]
        good = tensor.dim() == 1 + len(tail) and tuple(tensor.shape[1:]) == tail and tensor.shape[0] >= num_rows
        if tensor.dtype != dtype or not good or not tensor.is_contiguous():
            raise ValueError(
                f"sample: buffer {name} is {describe(tensor)}, but contiguous {dtype} "
                f"[{num_rows} or more{''.join(f', {size}' for size in tail)}] is needed"
            )


def _record(dtype: np.dtype[np.void], **values: Any) -> np.void:
    record: Any = np.zeros((), dtype)
    for name, value in values.items():
        record[name] = value
    found: np.void = record[()]
    return found
