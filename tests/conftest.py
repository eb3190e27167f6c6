"""`--cases N`: of a test with more than N cases, N of them; `make test-fast` uses it."""

import hashlib
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; what needs two threads asks for them
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, metavar="N", help="of a test with more than N cases, run N of them")


@pytest.hookimpl(tryfirst=True)  # before marks and -k choose, so that what they choose from does not depend on them
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    limit = config.getoption("--cases")
    if limit is None:
        return
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {item for cases in tests.values() for item in drawn(cases, limit)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def drawn(cases: list[pytest.Item], limit: int) -> list[pytest.Item]:
    """The same ones in every run, without the pattern that every n-th of a product of parameters would have."""
    return sorted(cases, key=lambda case: hashlib.sha256(case.nodeid.encode()).digest())[:limit]
