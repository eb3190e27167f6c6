"""A server on a free port of the loopback address, over a fake runtime, in the test's own loop."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from server_fakes import FakeRuntime, Served, configured

from millrace.server.app import start_server

Start = Callable[..., Awaitable[Served]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts servers: keywords with `__` are options of the configuration, others fields of the fake runtime."""
    async with AsyncExitStack() as stack:

        async def go(**options: Any) -> Served:
            config = configured(**{key: value for key, value in options.items() if "__" in key})
            fields = {key: value for key, value in options.items() if "__" not in key}
            runtime = FakeRuntime(config=config, **fields)
            stack.push_async_callback(runtime.close)
            server = await start_server(runtime, "127.0.0.1", 0)
            stack.push_async_callback(server.close)
            client = await stack.enter_async_context(aiohttp.ClientSession())
            return Served(runtime, server, client)

        yield go


@pytest.fixture
async def served(start: Start) -> Served:
    return await start()
