"""Kernels on the host shim: every test that executes kernels runs in a process of its own (see shim/README.md)."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from shim.build import compiler
from shim.isolation import run_isolated
from shim.launcher import Edits, ShimLauncher

Case = Callable[[ShimLauncher], object]

WAYS = [(backward, late) for backward in (False, True) for late in (True, False)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has none of the threads of its parent
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shim_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled kernels by content: kept in pytest's cache from run to run, where there is one."""
    if compiler() is None:
        pytest.skip("no g++, or not Linux: kernels are not executed")
    torch.testing.assert_close(torch.zeros(1), torch.zeros(1))  # imports for a second: once here, not in every fork
    cache = getattr(request.config, "cache", None)
    return Path(cache.mkdir("millrace-shim")) if cache is not None else tmp_path_factory.mktemp("shim")


@pytest.fixture(params=WAYS, ids=lambda way: f"{'backward' if way[0] else 'forward'}-{'late' if way[1] else 'early'}")
def launcher(request: pytest.FixtureRequest, shim_cache: Path) -> ShimLauncher:
    """One of the four ways: the test runs once for each."""
    backward, late = request.param
    return ShimLauncher(backward=backward, late_copies=late, cache_dir=shim_cache)


def _run_ways(case: Case, cache_dir: Path, edits: Edits | None = None) -> None:
    for backward, late in WAYS:
        launcher = ShimLauncher(backward=backward, late_copies=late, cache_dir=cache_dir, edits=edits)
        torch.manual_seed(0)
        try:
            case(launcher)
        except Exception as error:
            error.add_note(f"with {launcher!r}")
            raise


@pytest.fixture
def four_ways(shim_cache: Path) -> Callable[[Case], None]:
    """four_ways(case) calls case(launcher) for each of the four ways, from the same random seed."""
    return partial(_run_ways, cache_dir=shim_cache)


@pytest.fixture
def planted(shim_cache: Path) -> Callable[[Edits, Case], str]:
    """planted(edits, case) demands that the case fails, in at least one way, with the bug that the edits put in.

    To fail is an AssertionError, a ShimError or a crash. Returns what was said, for a test that wants to look.
    """

    def check(edits: Edits, case: Case) -> str:
        outcome = run_isolated(lambda: _run_ways(case, shim_cache, edits))
        if outcome.kind == "skipped":
            pytest.skip(outcome.text)
        caught = outcome.kind in ("failed", "crashed") or outcome.name == "ShimError"
        assert caught, f"the planted bug was not caught: {outcome.kind} {outcome.text}"
        return outcome.text

    return check


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    """A test that executes kernels does so in a forked process, and its outcome is reported as the test's own."""
    if "shim_cache" in pyfuncitem.fixturenames:
        names = pyfuncitem._fixtureinfo.argnames
        arguments = {name: pyfuncitem.funcargs[name] for name in names}
        function = pyfuncitem.obj
        pyfuncitem.obj = partial(_isolated, partial(function, **arguments))
        try:
            return (yield)
        finally:
            pyfuncitem.obj = function
    return (yield)


def _isolated(function: Callable[[], object], **_: object) -> None:
    outcome = run_isolated(function)
    if outcome.kind == "skipped":
        pytest.skip(outcome.text)
    if outcome.kind != "passed":
        pytest.fail(f"{outcome.name}\n{outcome.text}", pytrace=False)
