"""Who may import whom, and what only the world may touch: an AST walk over the tree."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("runtime", "actors", "kernels", "server")

# Layer of each module, by the longest prefix. A module imports from its own layer or below; `None` is checked by name.
LAYERS = {
    "runtime.errors": 0,
    "runtime.types": 0,
    "runtime.messages": 0,
    "runtime.config": 0,
    "runtime.world": 0,
    "runtime.mailbox": 0,
    "runtime.channel": 1,
    "runtime.metrics": 1,
    "runtime.log": 1,
    "kernels": 1,
    "runtime.device": 2,
    "runtime.lanes": 2,
    "runtime.cuda": 2,
    "runtime.kv": 2,
    "runtime.scheduling": 2,
    "runtime.models": 2,
    "runtime.quant": 2,
    "runtime.weights": 2,
    "runtime.sampling": 2,
    "runtime.text": 2,
    "runtime.assets": 2,
    "actors": 3,
    "runtime.handle": 4,
    "runtime.plan": 4,
    "runtime.gpu": 4,
    "runtime.loading": 4,
    "runtime.loading_torch": 4,
    "runtime.supervisor": 4,
    "runtime.engine": 4,
    "runtime.app": 4,
    "runtime": 4,  # the lazy face
    "runtime.cli": 5,
    "runtime.cli_build": 5,
    "runtime.cli_kernels": 5,
    "runtime.cli_quant": 5,
    "runtime.cli_run": 5,
    "runtime.__main__": 5,
    "server": 5,
}
THIRD_PARTY_L0 = {"msgspec", "numpy"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, ast.parse(path.read_text("utf-8"))


MODULES = dict(modules())


def layer(module: str) -> int:
    parts = module.split(".")
    while ".".join(parts) not in LAYERS:
        parts.pop()
    return LAYERS[".".join(parts)]


def imports(tree: ast.Module) -> Iterator[str]:
    """Absolute names of what is imported, without imports for type checkers only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full.removeprefix("millrace.") in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    # The lazy face names what it exports under TYPE_CHECKING only.
    if module == "runtime":
        return
    own = layer(module)
    for name in imports(MODULES[module]):
        if not name.startswith("millrace."):
            if own == 0:
                top = name.split(".")[0]
                assert top in THIRD_PARTY_L0 or top in _stdlib(), f"{module} imports {name}"
            continue
        target = name.removeprefix("millrace.")
        assert layer(target) <= own, f"{module} (layer {own}) imports {target} (layer {layer(target)})"
        if module.startswith("kernels"):
            assert target.startswith("kernels"), f"{module} imports {target}"
        if module.startswith("actors."):
            assert not target.startswith("actors."), f"an actor imports another: {module} imports {target}"
        if module.startswith("runtime.models"):
            assert not target.startswith("runtime.kv"), f"{module} imports {target}"
        if target.startswith("actors"):
            assert module == "runtime.engine", f"only the composition root imports actors, not {module}"
        if module.startswith("server"):
            assert not target.startswith(("actors", "runtime.kv", "runtime.engine", "runtime.messages")), module


def _stdlib() -> frozenset[str]:
    import sys

    return sys.stdlib_module_names


# What is not deterministic goes through the world, in everything that the simulator is to run.
SIMULATED = [name for name in MODULES if name.startswith(("actors.", "runtime.kv", "runtime.scheduling"))] + [
    "runtime.engine",
    "runtime.channel",
    "runtime.mailbox",
    "runtime.handle",
    "runtime.supervisor",
]
FORBIDDEN = {
    "time": None,
    "random": None,
    "secrets": None,
    "uuid": None,
    "threading": None,
    "datetime": None,
}
FORBIDDEN_CALLS = {
    ("asyncio", "create_task"),
    ("asyncio", "ensure_future"),
    ("asyncio", "wait_for"),
    ("asyncio", "Queue"),
    ("asyncio", "to_thread"),
    ("os", "urandom"),
}


@pytest.mark.parametrize("module", SIMULATED)
def test_only_the_world_is_not_deterministic(module: str) -> None:
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & set(FORBIDDEN), module
        if isinstance(node, ast.ImportFrom):
            assert node.module not in FORBIDDEN, module
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in FORBIDDEN_CALLS, f"{module}: {node.value.id}.{node.attr}"


@pytest.mark.parametrize("module", MODULES)
def test_no_code_is_loaded_from_data(module: str) -> None:
    for name in imports(MODULES[module]):
        assert name.split(".")[0] not in {"pickle", "marshal", "shelve", "dill", "multiprocessing"}, module
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec"}, module
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "load"), module
            assert (node.value.id, node.attr) != ("yaml", "load"), module


def test_every_module_says_what_it_is() -> None:
    silent = [
        name
        for name, tree in MODULES.items()
        if ast.get_docstring(tree) is None and tree.body and name != "runtime.__main__"
    ]
    assert silent == []


def test_long_files_give_a_reason() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            lines = path.read_text("utf-8").splitlines()
            assert len(lines) <= 500 or "lines" in lines[0], f"{path} has {len(lines)} lines and no reason"
