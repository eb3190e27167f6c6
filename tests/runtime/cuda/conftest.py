"""What the tests of the GPU lanes share: the host shim of the kernels, in a process of its own for each test."""

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from shim.build import compiler
from shim.isolation import run_isolated
from shim.launcher import ShimLauncher


@pytest.fixture(scope="session")
def shim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShimLauncher]:
    """Executes kernels; compiled ones are kept in pytest's cache from run to run, where there is one."""
    if compiler() is None:
        pytest.skip("no g++ or clang++: kernels are not executed")
    cache = getattr(request.config, "cache", None)
    folder = Path(cache.mkdir("millrace-shim")) if cache is not None else tmp_path_factory.mktemp("shim")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has none of the threads of its parent
    yield ShimLauncher(cache_dir=folder)
    torch.set_num_threads(before)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    """A crash of a kernel ends a forked process, and is reported as the failure of one test."""
    if "shim" not in pyfuncitem.fixturenames:
        return (yield)
    names = pyfuncitem._fixtureinfo.argnames
    function = inspect.unwrap(pyfuncitem.obj)  # without what would run a coroutine on the loop of this process
    pyfuncitem.obj = partial(_isolated, partial(function, **{name: pyfuncitem.funcargs[name] for name in names}))
    return (yield)


def _isolated(function: Callable[[], Any], **_: object) -> None:
    outcome = run_isolated(partial(_run, function))
    if outcome.kind == "skipped":
        pytest.skip(outcome.text)
    if outcome.kind != "passed":
        pytest.fail(f"{outcome.name}\n{outcome.text}", pytrace=False)


def _run(function: Callable[[], Any]) -> None:
    result: Coroutine[Any, Any, None] | None = function()
    if result is not None:
        asyncio.run(result)
