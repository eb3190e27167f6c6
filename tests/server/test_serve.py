"""Running and stopping: signals, grace, and an address that is taken."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import aiohttp
import pytest
from server_fakes import FakeRuntime, Served, chat, configured

from millrace.server.app import serve, start_server

CHAT = "/v1/chat/completions"


class Running:
    """`serve` in a task, as the command line runs it."""

    def __init__(self) -> None:
        self.runtime = FakeRuntime(config=configured(server__shutdown_grace_s=5.0), auto=False)
        self.url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.task = asyncio.ensure_future(serve(self.runtime, "127.0.0.1", 0, on_ready=self.url.set_result))


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    run = Running()
    async with asyncio.timeout(30):
        yield run
    run.task.cancel()
    await asyncio.gather(run.task, return_exceptions=True)
    await run.runtime.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_open_requests_finish_and_refuses_new_ones(running: Running, number: int) -> None:
    before = signal.getsignal(number)
    url = await running.url
    async with aiohttp.ClientSession() as client:
        asking = asyncio.ensure_future(client.post(url + CHAT, json=chat()))
        await running.runtime.until(lambda: running.runtime.running == 1)
        os.kill(os.getpid(), number)
        await running.runtime.until(lambda: running.runtime.state.state == "draining")
        async with client.get(url + "/readyz") as reply:
            assert reply.status == 503
        async with client.get(url + "/livez") as reply:
            assert reply.status == 200
        async with client.post(url + CHAT, json=chat()) as reply:
            assert (reply.status, (await reply.json())["error"]["code"]) == (503, "runtime_closed")
        running.runtime.step(100)
        async with await asking as reply:
            assert (await reply.json())["choices"][0]["message"]["content"] == "answer 0 to hi"
        await running.task
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.get(url + "/livez")
    assert signal.getsignal(number) == before


async def test_a_second_signal_ends_open_requests(running: Running) -> None:
    url = await running.url
    async with aiohttp.ClientSession() as client:
        asking = asyncio.ensure_future(client.post(url + CHAT, json=chat()))
        await running.runtime.until(lambda: running.runtime.running == 1)
        os.kill(os.getpid(), signal.SIGTERM)
        await running.runtime.until(lambda: running.runtime.state.state == "draining")
        os.kill(os.getpid(), signal.SIGTERM)
        await running.task
        assert running.runtime.running == 0
        with pytest.raises(aiohttp.ClientConnectionError):
            await asking


async def test_grace_has_an_end(served: Served) -> None:
    served.runtime.auto = False
    asking = asyncio.ensure_future(served.post(CHAT, chat()))
    await served.runtime.until(lambda: served.runtime.running == 1)
    assert await served.server.stop(0.05) is False
    assert len(served.runtime.cancelled) == 1
    with pytest.raises(aiohttp.ClientConnectionError):
        await asking


async def test_stop_returns_at_once_when_nothing_runs(served: Served) -> None:
    assert await served.server.stop(30) is True


async def test_an_address_that_is_taken(served: Served) -> None:
    with pytest.raises(OSError, match="address"):
        await start_server(served.runtime, "127.0.0.1", served.port)


async def test_no_signal_handler_outside_of_serve(served: Served) -> None:
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]")])
async def test_the_url_can_be_opened(host: str, shown: str) -> None:
    runtime = FakeRuntime(config=configured())
    server = await start_server(runtime, host, 0)
    try:
        assert server.url == f"http://{shown}:{server.port}"
        async with aiohttp.ClientSession() as client, client.get(server.url + "/livez") as reply:
            assert reply.status == 200
    finally:
        await server.close()
        await runtime.close()


async def test_a_public_address_takes_any_host_name() -> None:
    runtime = FakeRuntime(config=configured())
    server = await start_server(runtime, "0.0.0.0", 0)
    try:
        headers = {"Host": "api.example"}
        async with aiohttp.ClientSession() as client, client.get(server.url + "/livez", headers=headers) as reply:
            assert reply.status == 200
    finally:
        await server.close()
        await runtime.close()
