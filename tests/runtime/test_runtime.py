"""The public face, on the embedded model: what a program that embeds the runtime relies on."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from millrace.runtime import ChatMessage, FinishReason, Priority, Runtime, SamplingParams
from millrace.runtime.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthError,
    InvalidRequestError,
    RequestCancelledError,
    RuntimeClosedError,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


async def test_await_iterate_and_equal_prompts() -> None:
    async with Runtime(device__threads=1) as runtime:
        completion = await runtime.submit(QUESTION, GREEDY)
        deltas = [
            delta async for delta in runtime.submit([ChatMessage(role="user", content=QUESTION[0]["content"])], GREEDY)
        ]
        assert "".join(delta.text for delta in deltas) == completion.text
        assert deltas[-1].finish_reason is completion.finish_reason
        text = await runtime.submit("Once upon a time", GREEDY)
        ids = await runtime.submit(runtime.tokenizer.encode("Once upon a time"), GREEDY)
        assert text.token_ids == ids.token_ids
        assert text.usage.completion_tokens == len(text.token_ids)
        assert (text.model, runtime.model_name) == ("grist", "grist")


async def test_cancel_leaves_nothing_behind() -> None:
    async with Runtime(device__threads=1) as runtime:
        handle = runtime.submit("Once", SamplingParams(max_tokens=1500, ignore_eos=True))
        async for _ in handle:
            break
        with pytest.raises(RequestCancelledError):
            await handle
        task = asyncio.ensure_future(_wait(runtime))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await runtime.drain(10.0)
        async with asyncio.timeout(10):
            while runtime.health().running:  # at most the steps that were in flight
                await asyncio.sleep(0)
        assert (runtime.health().waiting, runtime.health().state) == (0, "draining")
        with pytest.raises(RuntimeClosedError, match="draining"):
            await runtime.submit("Once", GREEDY)


async def _wait(runtime: Runtime) -> None:
    await runtime.submit("Once", SamplingParams(max_tokens=1500, ignore_eos=True))


async def test_two_runtimes_side_by_side() -> None:
    async with Runtime(device__threads=1) as one, Runtime(device__threads=1, scheduler__max_num_seqs=2) as two:
        results = await asyncio.gather(*[r.submit(QUESTION, GREEDY) for r in (one, two, one, two)])
        assert len({result.token_ids for result in results}) == 1
        await one.close()
        assert (await two.submit(QUESTION, GREEDY)).token_ids == results[0].token_ids
        with pytest.raises(RuntimeClosedError):
            one.submit(QUESTION, GREEDY)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_closing_gives_threads_descriptors_and_memory_back() -> None:
    async def once() -> None:
        async with Runtime(device__threads=2) as runtime:
            await asyncio.gather(*[runtime.submit(f"{i} Once upon", GREEDY) for i in range(8)])

    await once()  # what the libraries keep for the process is there after this
    gc.collect()
    before = (threading.active_count(), _descriptors(), len(asyncio.all_tasks()))
    resident = _resident()
    for _ in range(4):
        await once()
    gc.collect()
    assert (threading.active_count(), _descriptors(), len(asyncio.all_tasks())) == before
    assert _resident() - resident < 24 << 20


async def test_an_idle_runtime_uses_no_cpu() -> None:
    async with Runtime(device__threads=1) as runtime:
        await runtime.submit("Once", GREEDY)
        gc.collect()
        await asyncio.sleep(0.1)
        before = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - before < 0.01


async def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"did you mean scheduler\.max_num_seqs"):
        Runtime(scheduler__max_num_seq=3)
    with pytest.raises(CheckpointError):
        await Runtime("/absent/model").start()
    with pytest.raises(ConfigError, match=r"5000.*2048"):
        await Runtime(model__max_model_len=5000).start()
    with pytest.raises(RuntimeClosedError, match="not started"):
        Runtime().submit("x")
    async with Runtime(device__threads=1) as runtime:
        with pytest.raises(ContextLengthError, match="2048 tokens, but the prompt has 3000"):
            await runtime.submit([5] * 3000, GREEDY)
        with pytest.raises(InvalidRequestError, match="a prompt is a string"):
            runtime.submit([object()])  # type: ignore[list-item]
        with pytest.raises(InvalidRequestError, match="n is 99"):
            await runtime.submit("x", SamplingParams(n=99), priority=Priority.HIGH)
        long = "word " * 5000  # encoded in a helper thread
        with pytest.raises(ContextLengthError):
            await runtime.submit(long, GREEDY)


async def test_choices_and_seeds() -> None:
    sampling = SamplingParams(n=3, seed=7, temperature=1.2, max_tokens=16, ignore_eos=True)
    async with Runtime(device__threads=1) as runtime:
        first, second = await runtime.submit("Once", sampling), await runtime.submit("Once", sampling)
        assert [choice.token_ids for choice in first.choices] == [choice.token_ids for choice in second.choices]
        assert len({choice.token_ids for choice in first.choices}) == 3
        assert all(choice.finish_reason is FinishReason.LENGTH for choice in first.choices)


def test_importing_installs_nothing_bare(tmp_path: Path) -> None:
    """`import server` and the like must not find us, and the lazy face imports no torch."""
    code = (
        "import importlib.util, sys, millrace.runtime\n"
        "assert 'torch' not in sys.modules\n"
        "bare = [n for n in ('server', 'kernels', 'actors', 'runtime') if importlib.util.find_spec(n)]\n"
        "assert not bare, bare\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""})


async def test_closing_while_loading_and_a_cancelled_close() -> None:
    runtime = Runtime(device__threads=1)
    starting = asyncio.ensure_future(runtime.start())
    await asyncio.sleep(0)
    await runtime.close()
    with pytest.raises(RuntimeClosedError):
        await starting
    await runtime.close()
    assert runtime.health().state == "closed"

    other = Runtime(device__threads=1)
    await other.start()
    closing = asyncio.ensure_future(other.close())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await other.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("millrace")]
