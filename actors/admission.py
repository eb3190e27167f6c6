"""Admission: turns what a client sent into what the scheduler can serve, or refuses it at once with the numbers.

It is the author of refusals (docs/architecture.md, "One terminal event").
"""

import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from millrace.runtime.channel import ChannelClosed, Receiver, Sender
from millrace.runtime.errors import ContextLengthError, InvalidRequestError, MillraceError, RequestCancelledError
from millrace.runtime.kv.prefix import PrefixHasher
from millrace.runtime.messages import (
    AdmissionInbox,
    Admitted,
    Cancel,
    Opened,
    SchedulerInbox,
    StreamerInbox,
    Submit,
)
from millrace.runtime.metrics import Metrics
from millrace.runtime.text.chat import ChatTemplate, encode_chat
from millrace.runtime.text.tokenizer import Tokenizer
from millrace.runtime.types import BLOCK_SIZE, ChatPrompt, FinishReason, RequestId, TextPrompt, TokensPrompt
from millrace.runtime.world import World

LONG_TEXT = 4096  # characters; longer prompts are encoded in a helper thread, so that the loop does not stall
TURN_TOKENS = 4096  # prompt tokens, and four times as many characters, before the loop gets its turn


class Capacity:
    """What one request can have at most.

    Attributes:
        max_model_len: positions of one sequence, prompt and output.
        num_blocks: usable KV blocks.
        max_rows: sequences that can run at once.
        vocab_size: ids that the model has logits for.
        max_logprobs: top alternatives per token.
    """

    def __init__(
        self, *, max_model_len: int, num_blocks: int, max_rows: int, vocab_size: int, max_logprobs: int
    ) -> None:
        self.max_model_len = max_model_len
        self.num_blocks = num_blocks
        self.max_rows = max_rows
        self.vocab_size = vocab_size
        self.max_logprobs = max_logprobs

    def prompt(self, tokens: Sequence[int]) -> NDArray[np.int32]:
        """The prompt as a column, [prompt_len]; raises if it is empty, too long, or names ids that there are not."""
        if len(tokens) == 0:
            raise InvalidRequestError("the prompt is empty; give at least one token", param="prompt")
        if len(tokens) > self.max_model_len:
            raise self._too_long(len(tokens), None)
        ids = np.array(tokens, dtype=np.int64)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise InvalidRequestError(
                f"token id {wrong} is not in the vocabulary, 0 to {self.vocab_size - 1}", param="prompt"
            )
        return ids.astype(np.int32)

    def check_text(self, length: int, longest_token: int) -> None:
        """Refuses a text (in characters) that no tokenisation can fit, before the work of encoding it."""
        if length > self.max_model_len * longest_token:
            raise ContextLengthError(
                f"the model's context holds {self.max_model_len} tokens of at most {longest_token} characters, but the "
                f"prompt has {length} characters; shorten it",
                param="messages",
            )

    def max_new_tokens(self, prompt: int, wanted: int | None, n: int) -> int:
        """Bounds the output of a request, or raises with the numbers when it can never fit."""
        if n > self.max_rows:
            raise InvalidRequestError(
                f"n is {n}, but {self.max_rows} sequences can run at once (scheduler.max_num_seqs)", param="n"
            )
        room = self.max_model_len - prompt
        if (1 if wanted is None else wanted) > room:
            raise self._too_long(prompt, wanted)
        most = self._most_that_fit(prompt, n)
        if most < (1 if wanted is None else wanted):
            blocks = self.blocks(prompt, wanted or 1, n)
            raise ContextLengthError(
                f"prompt ({prompt} tokens), output ({wanted or 1}) and n ({n}) need {blocks} KV blocks of {BLOCK_SIZE} "
                f"tokens, but the cache has {self.num_blocks}; at most {max(most, 0)} output tokens fit: "
                "shorten the request or raise kv.memory_mb",
                param="max_tokens",
            )
        return min(room, most) if wanted is None else wanted

    def blocks(self, prompt: int, new: int, n: int) -> int:
        """Blocks that a request holds at its longest: the choices share the prompt's full blocks."""
        shared = prompt // BLOCK_SIZE if n > 1 else 0
        each = -(-(prompt + new) // BLOCK_SIZE)
        # While the choices fork, the prompt's last, partial block is held beside their copies of it.
        return shared + n * (each - shared) + (1 if n > 1 and prompt % BLOCK_SIZE else 0)

    def _too_long(self, prompt: int, wanted: int | None) -> ContextLengthError:
        asked = "at least one output token was" if wanted is None else f"{wanted} output tokens were"
        return ContextLengthError(
            f"the model's context holds {self.max_model_len} tokens, but the prompt has {prompt} and {asked} "
            "asked for; shorten the prompt or lower max_tokens",
            param="messages" if prompt >= self.max_model_len else "max_tokens",
        )

    def _most_that_fit(self, prompt: int, n: int) -> int:
        shared = prompt // BLOCK_SIZE if n > 1 else 0
        spare = self.num_blocks - shared - (1 if n > 1 and prompt % BLOCK_SIZE else 0)
        return (shared + spare // n) * BLOCK_SIZE - prompt


class Admission:
    """Owns the tokenizer's encoding side, the chat template and the limits."""

    def __init__(
        self,
        *,
        world: World,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        hasher: PrefixHasher | None,
        capacity: Capacity,
        metrics: Metrics,
        inbox: Receiver[AdmissionInbox],
        streamer: Sender[StreamerInbox],
        scheduler: Sender[SchedulerInbox],
    ) -> None:
        self._world = world
        self._tokenizer = tokenizer
        self._template = template
        self._hasher = hasher
        self._capacity = capacity
        self._metrics = metrics
        self._inbox = inbox
        self._streamer = streamer
        self._scheduler = scheduler
        self._seeds = world.rng("seeds")
        self._encoding: dict[RequestId, Submit] = {}  # in a helper thread
        self._longest_token = tokenizer.longest_token

    async def run(self) -> None:
        while True:
            handled = 0
            for message in await self._inbox.recv_batch():
                if isinstance(message, Cancel):
                    await self._cancel(message)
                    continue
                if _characters(message) > LONG_TEXT:
                    self._encoding[message.rid] = message
                    self._world.spawn(self._admit_long(message), f"encode-{message.rid}")
                else:
                    await self._admit(message)
                handled += _tokens(message)
                if handled >= TURN_TOKENS:
                    handled = 0
                    await asyncio.sleep(0)

    async def _cancel(self, cancel: Cancel) -> None:
        submit = self._encoding.pop(cancel.rid, None)
        if submit is None:
            await self._scheduler.send(cancel)
        else:
            self._refuse(submit, RequestCancelledError("the request was cancelled"), FinishReason.CANCELLED)

    async def _admit(self, submit: Submit) -> None:
        admitted = self._prepare(submit)
        if isinstance(admitted, Admitted):
            await self._forward(submit, admitted)
        else:
            self._refuse(submit, admitted)

    async def _admit_long(self, submit: Submit) -> None:
        admitted = await self._world.to_thread(lambda: self._prepare(submit))
        if self._encoding.pop(submit.rid, None) is None:
            return  # cancelled meanwhile
        if isinstance(admitted, Admitted):
            try:
                await self._forward(submit, admitted)
            except ChannelClosed:
                return  # the runtime is closing, and has told every reader
        else:
            self._refuse(submit, admitted)

    async def _forward(self, submit: Submit, admitted: Admitted) -> None:
        await self._streamer.send(
            Opened(submit.rid, admitted.prompt, admitted.sampling, submit.arrived, submit.mailbox)
        )
        await self._scheduler.send(admitted)

    def _refuse(self, submit: Submit, error: MillraceError, reason: FinishReason = FinishReason.REFUSED) -> None:
        """Ends a request that nobody else knows yet."""
        self._metrics.finished(reason, self._world.now() - submit.arrived, 0)
        submit.mailbox.fail(error)

    def _encode(self, submit: Submit) -> Sequence[int]:
        prompt = submit.prompt
        if isinstance(prompt, TextPrompt):
            return self._tokenizer.encode(prompt.text, prompt.add_special_tokens)
        if isinstance(prompt, TokensPrompt):
            return prompt.tokens
        return encode_chat(
            self._tokenizer,
            self._template,
            prompt.messages,
            add_generation_prompt=prompt.add_generation_prompt,
            continue_final_message=prompt.continue_final_message,
            **prompt.template_kwargs,
        )

    def _prepare(self, submit: Submit) -> Admitted | MillraceError:
        """Whatever goes wrong in here belongs to this request; may run in a helper thread."""
        try:
            self._capacity.check_text(_characters(submit), self._longest_token)
            return self._admitted(submit, self._encode(submit))
        except MillraceError as error:
            return error
        except Exception as error:  # a template or tokenizer that breaks on this text must not end the others
            kind = type(error).__name__
            return InvalidRequestError(f"the prompt could not be encoded: {kind}", param="prompt")

    def _admitted(self, submit: Submit, tokens: Sequence[int]) -> Admitted:
        capacity = self._capacity
        sampling = submit.sampling.checked(capacity.vocab_size, capacity.max_logprobs)
        prompt = capacity.prompt(tokens)
        max_new_tokens = capacity.max_new_tokens(len(prompt), sampling.max_tokens, sampling.n)
        hashes: list[bytes] = []
        if self._hasher is not None:
            self._hasher.extend(hashes, prompt, submit.cache_salt)
        return Admitted(
            rid=submit.rid,
            prompt=prompt,
            block_hashes=tuple(hashes),
            sampling=sampling,
            seed=self._seeds.getrandbits(64) if sampling.seed is None else sampling.seed & (2**64 - 1),
            max_new_tokens=max_new_tokens,
            priority=submit.priority,
            deadline=submit.deadline,
            arrived=submit.arrived,
            cache_salt=submit.cache_salt,
        )


def _characters(submit: Submit) -> int:
    """What there is to encode; ids need no encoding."""
    prompt = submit.prompt
    if isinstance(prompt, TextPrompt):
        return len(prompt.text)
    if isinstance(prompt, ChatPrompt):
        return sum(len(message.content) for message in prompt.messages)
    return 0


def _tokens(submit: Submit) -> int:
    """About how many tokens a prompt has, for sharing the loop."""
    if isinstance(submit.prompt, TokensPrompt):
        return len(submit.prompt.tokens)
    return _characters(submit) // 4
