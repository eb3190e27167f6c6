"""Makes `millrace.*` importable from the checkout, without installing it.

The folders at the top of the tree are imported as `millrace.<folder>`, a mapping that setuptools makes at install time
(pyproject.toml, package-dir). A GPU machine is often bare and cannot reach a registry, so that nothing can be installed
there; and where some Millrace is installed, it may be another revision than the one whose results are to be written
down. So the check always imports this tree, by a finder that reads the same mapping.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


class TreeFinder(importlib.abc.MetaPathFinder):
    """Finds `millrace` and the packages of the mapping; what lies inside of them is found by their path as usual."""

    def __init__(self, root: Path = ROOT) -> None:
        settings = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
        folders = settings["tool"]["setuptools"]["package-dir"]
        self.packages = {name: root / folder for name, folder in folders.items()}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "millrace":
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = []
            return spec
        folder = self.packages.get(name)
        if folder is None:
            return None
        init = folder / "__init__.py"
        return importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(folder)])


def use_tree(root: Path = ROOT) -> None:
    """From now on `millrace.*` comes from the tree; raises RuntimeError if another one has been imported already."""
    if "millrace" in sys.modules:
        kernels = importlib.import_module("millrace.kernels")
        where = Path(kernels.__path__[0]).resolve()
        if where != (root / "kernels").resolve():
            raise RuntimeError(f"millrace is imported from {where.parent} already, not from {root}")
        return
    if not any(isinstance(finder, TreeFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TreeFinder(root))
