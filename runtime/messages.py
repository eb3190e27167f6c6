"""Every message that actors exchange, and nothing else.

Per-step messages are columns: their number does not depend on the batch size, and their cost hardly does. A frozen
struct says that a message, once sent, belongs to nobody. Who writes which message:

    Submit         Runtime -> admission          Opened         admission -> streamer
    Cancel         handle -> admission -> scheduler; streamer -> scheduler (stop string, broken stream)
    Admitted       admission -> scheduler        Closed         admission, scheduler -> streamer
    Flow           streamer -> scheduler         Started        scheduler -> streamer
    PrefillPlan    scheduler -> prefill          LogitsReady    prefill, decode -> sampler
    SwapPlan       scheduler -> prefill          StepDone       device -> sampler
    DecodePlan     scheduler -> decode
    RowsReady      sampler -> decode             TokensSampled  sampler -> scheduler and streamer (the same object)

`Admitted`, `Cancel`, `Closed`, `Flow`, `Started` and `TokensSampled` may cross a process border and serialise with
`encode` and `decode`. `Submit` and `Opened` hold a mailbox, `LogitsReady`, `RowsReady` and `StepDone` device
objects: they never do.
"""

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from millrace.runtime.errors import ErrorInfo
from millrace.runtime.types import FinishReason, Lane, Priority, Prompt, RequestId, SamplingParams, SequenceId

Column = NDArray[Any]  # one number per row or token; dtype and shape stand beside each field


class Submit(msgspec.Struct, frozen=True):
    rid: RequestId
    prompt: Prompt
    sampling: SamplingParams
    priority: Priority
    deadline: float | None  # world.now()
    arrived: float  # world.now()
    cache_salt: str  # requests share cached prefixes only under the same salt
    mailbox: Any  # runtime.mailbox.Mailbox


class Opened(msgspec.Struct, frozen=True):
    """Sent before `Admitted`, so that the streamer knows a request before its first token comes."""

    rid: RequestId
    prompt: Column  # [prompt_len] int32
    sampling: SamplingParams
    arrived: float  # world.now() of the submission
    mailbox: Any  # runtime.mailbox.Mailbox


class Admitted(msgspec.Struct, frozen=True, tag="admitted"):
    """A request that can be served: tokenised, bounded, and proved to fit."""

    rid: RequestId
    prompt: Column  # [prompt_len] int32
    block_hashes: tuple[bytes, ...]  # of the prompt's full blocks, see kv.prefix
    sampling: SamplingParams
    seed: int  # the request's own, or a fresh one
    max_new_tokens: int
    priority: Priority
    deadline: float | None
    arrived: float
    cache_salt: str


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Ends a request, or one choice of it.

    With `reason` None the receiver of the tokens has closed the choice already (a stop string), and the scheduler only
    gives back what it holds.
    """

    rid: RequestId
    reason: FinishReason | None = FinishReason.CANCELLED
    choice: int | None = None


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    """The terminal event of a request that did not end by its own tokens."""

    rid: RequestId
    reason: FinishReason
    error: ErrorInfo


class Started(msgspec.Struct, frozen=True, tag="started"):
    """A request has left the queue."""

    rid: RequestId
    cached_tokens: int  # prompt tokens whose keys and values were found in the prefix cache
    at: float  # world.now()


class Flow(msgspec.Struct, frozen=True, tag="flow"):
    """A reader that has fallen behind pauses its own request, and nobody else's."""

    rid: RequestId
    paused: bool


class SampleJoin(msgspec.Struct, frozen=True):
    """All that the sampler must know of a sequence, sent once, with the step that draws its first token."""

    seq: SequenceId
    row: int
    sampling: SamplingParams
    seed: int
    max_new_tokens: int
    prompt: Column  # [prompt_len] int32
    output: Column  # [num_output] int32, tokens drawn before a preemption


class BlockUpdates(msgspec.Struct, frozen=True):
    """New entries of block tables: table[rows[i]][indices[i]] = blocks[i]."""

    rows: Column  # [num_updates] int32
    indices: Column  # [num_updates] int32
    blocks: Column  # [num_updates] int32


class BlockCopies(msgspec.Struct, frozen=True):
    """Copy-on-write: done before the step writes anything."""

    source: Column  # [num_copies] int64
    target: Column  # [num_copies] int64


class PrefillPlan(msgspec.Struct, frozen=True):
    """One chunk of prompt for each of some sequences."""

    step: int
    seqs: list[SequenceId]
    rows: Column  # [num_seqs] int32
    starts: Column  # [num_seqs] int32, position of the chunk's first token
    lengths: Column  # [num_seqs] int32
    tokens: Column  # [sum(lengths)] int32
    prompt_logprobs: Column  # [num_seqs] int32, top alternatives wanted for every prompt token, -1 for none
    next_tokens: Column  # [num_seqs] int32, the prompt token behind the chunk, -1 behind the last chunk
    blocks: BlockUpdates
    # Sequences whose last chunk this is, and which draw their first token from it. With n > 1 choices, several sampled
    # rows read one row of logits.
    joins: tuple[SampleJoin, ...]
    join_of: Column  # [num_joins] int32, index into `seqs` of the sequence whose last token each join reads


class SwapPlan(msgspec.Struct, frozen=True):
    """Copies whole KV blocks to slots of host memory, or back."""

    step: int
    out: bool  # to the host
    blocks: list[int]
    slots: list[int]  # one for each block


class DecodePlan(msgspec.Struct, frozen=True):
    """The next token of every sequence in the decode batch, told as differences to the step before."""

    step: int
    seqs: list[SequenceId]  # of the whole batch, in the order of `rows`
    rows: Column  # [batch] int32
    joined_rows: Column  # [num_joined] int32
    joined_positions: Column  # [num_joined] int32, position of the next input token
    blocks: BlockUpdates  # whole tables of those who joined, and new blocks of the others
    copies: BlockCopies | None


class LogitsReady(msgspec.Struct, frozen=True):
    """A forward pass is launched; its logits will lie in `output` in stream order. A swap has none, and no rows."""

    lane: Lane
    step: int
    seqs: list[SequenceId]
    rows: Column  # [num_sampled] int32
    logits_index: Column | None  # [num_sampled] int64, row of the logits for each sampled row; None is one to one
    joins: tuple[SampleJoin, ...]
    output: Any  # runtime.device.StepOutput
    stream: Any  # runtime.device.Stream


class StepDone(msgspec.Struct, frozen=True):
    """The device has finished a step, and its ids are on the host."""

    ready: LogitsReady
    launched_at: float  # world.now()


class RowsReady(msgspec.Struct, frozen=True):
    """Sampling of this decode step is launched: the next step may be launched behind it."""

    step: int


class LogprobColumns(msgspec.Struct, frozen=True):
    """Log probabilities under the model's own distribution, one entry per token that asked.

    Attributes:
        index: [n] int32, place among the sampled rows (or among the scored positions of a prompt chunk).
        logprobs: [n] float32, of the drawn (or given) token; NaN where the model's logits are broken.
        num_top: [n] int32, how many alternatives are there.
        top_ids: [n, max_top] int32, best first, lowest id first on ties; -1 behind num_top.
        top_logprobs: [n, max_top] float32; -inf behind num_top.
    """

    index: Column
    logprobs: Column
    num_top: Column
    top_ids: Column
    top_logprobs: Column


class PromptLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of the prompt tokens at positions start + 1, start + 2, ..."""

    seq: SequenceId
    start: int
    tokens: Column  # [n] int32
    columns: LogprobColumns


class Finished(msgspec.Struct, frozen=True):
    index: int  # into the step's `seqs`
    reason: FinishReason
    stop_id: int | None = None
    error: ErrorInfo | None = None


class TokensSampled(msgspec.Struct, frozen=True, tag="sampled"):
    """What one step brought. Every launched step ends in exactly one of these, and it returns the step's credit."""

    lane: Lane
    step: int
    seqs: list[SequenceId]
    counts: Column  # [num_seqs] int32, tokens of each sequence in `tokens`; 0 for one that had ended before
    tokens: Column  # [sum(counts)] int32
    positions: Column  # [num_seqs] int32, number of output tokens each sequence had before this step
    finished: tuple[Finished, ...] = ()
    logprobs: LogprobColumns | None = None  # index: place among `seqs`
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    error: ErrorInfo | None = None  # the whole step failed
    failed: tuple[tuple[SequenceId, ErrorInfo], ...] = ()  # sequences of the step that failed alone
    launched_at: float = 0.0  # world.now()
    ready_at: float = 0.0


AdmissionInbox = Submit | Cancel
SchedulerInbox = Admitted | Cancel | Flow | TokensSampled
PrefillInbox = PrefillPlan | SwapPlan
DecodeInbox = DecodePlan | RowsReady
SamplerInbox = LogitsReady | StepDone
StreamerInbox = Opened | Started | Closed | TokensSampled
Wire = Admitted | Cancel | Closed | Flow | Started | TokensSampled


def _enc_hook(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    raise NotImplementedError(f"{type(value)} does not cross a process border")


def _dec_hook(kind: Any, value: Any) -> Any:
    dtype, shape, data = value
    return np.frombuffer(data, dtype=np.dtype(dtype)).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_enc_hook)
_decoder: msgspec.msgpack.Decoder[Wire] = msgspec.msgpack.Decoder(Wire, dec_hook=_dec_hook)


def encode(message: Wire) -> bytes:
    """One message as msgpack, for the process border."""
    return _encoder.encode(message)


def decode(data: bytes) -> Wire:
    """Raises msgspec.DecodeError or ValidationError for anything but a message of ours."""
    return _decoder.decode(data)
