"""Doubles that tests share: the ledger model, a tokenizer of numbered words, and an engine made of them."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import tokenizers
from prometheus_client import CollectorRegistry

from millrace.runtime.config import Config, load_config
from millrace.runtime.device import CpuDevice, Device, NullDevice
from millrace.runtime.engine import Engine
from millrace.runtime.lanes import Lanes
from millrace.runtime.log import make_logger
from millrace.runtime.messages import SwapPlan
from millrace.runtime.models.base import ForwardBatch, ModelSpec
from millrace.runtime.models.decoder import DecoderModel
from millrace.runtime.models.host import host_model
from millrace.runtime.plan import MemoryPlan
from millrace.runtime.text.chat import ChatTemplate
from millrace.runtime.text.tokenizer import Tokenizer
from millrace.runtime.types import BLOCK_SIZE, Priority, SamplingParams, as_prompt
from millrace.runtime.world import AsyncioWorld

VOCAB = 211
EOS = 0


def next_token(history: Sequence[int], vocab_size: int = VOCAB) -> int:
    """The ledger model's next token: a hash of every token id with its position."""
    pairs = np.stack([np.array(history, dtype=np.int64), np.arange(len(history))], axis=1)
    return int.from_bytes(hashlib.blake2b(pairs.tobytes(), digest_size=8).digest(), "little") % vocab_size


def expected(prompt: Sequence[int], max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
    """What the ledger model answers, from the prompt alone."""
    history = list(prompt)
    while len(history) < len(prompt) + max_tokens:
        history.append(next_token(history))
        if history[-1] == EOS and not ignore_eos:
            break
    return history[len(prompt) :]


class LedgerModel:
    """A model whose keys and values are the (token, position) pairs themselves.

    Its next token hashes the pairs that it reads through the block tables, so that a wrong table, an early reuse, a
    missed copy, a stale prefix hit, or a lost, doubled or swapped token gives a wrong token at once.
    """

    def __init__(self, max_model_len: int = 512, num_eos: int = 1) -> None:
        self.spec = ModelSpec(
            architecture="ledger",
            vocab_size=VOCAB,
            hidden_size=1,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=1,
            max_model_len=max_model_len,
            eos_token_ids=(EOS,),
        )
        self.fail_at: int | None = None  # raises in the forward pass of this number
        self.num_forwards = 0
        self.num_tokens = 0
        self.batch_sizes: list[int] = []

    @property
    def weight_bytes(self) -> int:
        return 0

    @property
    def kv_bytes_per_token(self) -> int:
        return 16

    def allocate_kv(self, num_blocks: int) -> Any:
        return np.full((num_blocks * BLOCK_SIZE, 2), -1, dtype=np.int64)

    def forward(self, batch: ForwardBatch[Any], kv: Any) -> Any:
        self.num_forwards += 1
        if self.num_forwards == self.fail_at:
            raise RuntimeError("planted")
        tokens, positions = batch.tokens, batch.positions
        self.num_tokens += len(tokens)
        self.batch_sizes.append(len(batch.context_lens))
        slots = batch.slot_mapping
        assert (slots >= BLOCK_SIZE).all(), "a write into the null block"
        assert len(set(slots.tolist())) == len(slots), "two tokens in one slot"
        kv[slots, 0], kv[slots, 1] = tokens, positions
        starts, tables = batch.query_starts, batch.block_tables
        wanted = batch.logits_indices
        owner = np.searchsorted(starts, wanted, side="right") - 1
        logits = np.full((len(wanted), VOCAB), -20.0, dtype=np.float32)
        for row, (index, sequence) in enumerate(zip(wanted, owner, strict=True)):
            context = np.arange(positions[index] + 1)
            read = kv[tables[sequence][context // BLOCK_SIZE] * BLOCK_SIZE + context % BLOCK_SIZE]
            digest = hashlib.blake2b(np.ascontiguousarray(read).tobytes(), digest_size=8).digest()
            logits[row, int.from_bytes(digest, "little") % VOCAB] = 20.0
        return logits

    def copy_blocks(self, kv: Any, source: Any, target: Any) -> None:
        blocks = kv.reshape(-1, BLOCK_SIZE, 2)
        blocks[target] = blocks[source]


class LedgerSwap:
    """A swap lane for the ledger model's storage on the CPU; the swaps of the numbers in `fail_at` fail."""

    def __init__(self, kv: Any, num_slots: int, block_seconds: float = 0.0) -> None:
        self.num_slots = num_slots
        self.block_seconds = block_seconds
        self.fail_at: set[int] = set()
        self._blocks = kv.reshape(-1, BLOCK_SIZE, 2)
        self._slots = np.full((num_slots, BLOCK_SIZE, 2), -7, dtype=np.int64)

    def run(self, plan: SwapPlan) -> None:
        if plan.step in self.fail_at:
            raise RuntimeError("planted")
        assert len(plan.blocks) == len(plan.slots) > 0
        if plan.out:
            self._slots[plan.slots] = self._blocks[plan.blocks]
        else:
            self._blocks[plan.blocks] = self._slots[plan.slots]


def word_tokenizer(vocab_size: int = VOCAB) -> Tokenizer:
    """Token i is the text "<i>"; id 0 is special and ends a text."""
    vocab = {"</s>": 0} | {f"<{index}>": index for index in range(1, vocab_size)}
    lib = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<1>"))
    lib.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("<[0-9]+>"), "isolated")
    lib.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(lib, special_tokens={"eos_token": "</s>"})


TEMPLATE = "{% for m in messages %}<{{ m.content | length + 1 }}>{% endfor %}"


@asynccontextmanager
async def engine(
    *,
    model: Any = None,
    num_blocks: int = 65,
    device: Device | None = None,
    null_device: bool = True,
    gpu: Callable[[AsyncioWorld, Any, MemoryPlan, Config], Awaitable[tuple[Device, Lanes]]] | None = None,
    **options: Any,
) -> AsyncIterator[Engine]:
    """A running engine around a model (the ledger model by default); checks all invariants when it is left.

    `gpu` makes the device and its lanes, from (world, model, plan, config)."""
    world = AsyncioWorld()
    model = model or LedgerModel()
    config: Config = load_config(None, {key.replace("__", ".", 1): value for key, value in options.items()})
    max_model_len = config.model.max_model_len or model.spec.max_model_len
    plan = MemoryPlan(
        total=0,
        weights=0,
        kv_cache=0,
        kv_per_token=model.kv_bytes_per_token,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
    )
    lanes = None
    if gpu is not None:
        device, lanes = await gpu(world, model, plan, config)
    elif isinstance(model, DecoderModel):
        model = host_model(model)
    device = device or (NullDevice(world) if null_device else CpuDevice(world, 1))
    made = Engine(
        config=config,
        world=world,
        device=device,
        model=model,
        plan=plan,
        tokenizer=word_tokenizer(model.spec.vocab_size),
        template=ChatTemplate({"default": TEMPLATE}, {}),
        model_name="ledger",
        registry=CollectorRegistry(),
        log=make_logger(config.log),
        lanes=lanes,
    )
    made.start()
    scheduler = made.scheduler
    try:
        yield made
        if made.state == "ready":
            await settle(made)
            scheduler.check()
    finally:
        await made.stop()
        await world.close()


async def settle(made: Engine) -> None:
    """Returns when no request is open and no step is launched."""
    for _ in range(100_000):
        if not made.num_open and not made.scheduler.num_launched and not made.scheduler.num_running:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"{made.num_open} requests and {made.scheduler.num_launched} steps are left")


def greedy(max_tokens: int | None = 16, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **more)


def submit(made: Engine, prompt: Sequence[int] | str, sampling: SamplingParams, **more: Any) -> Any:
    given: dict[str, Any] = {"priority": Priority.NORMAL, "deadline": None, "name": "test", "cache_salt": ""} | more
    return made.submit(as_prompt(prompt), sampling, **given)
