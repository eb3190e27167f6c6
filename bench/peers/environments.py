"""A Python environment for each peer, built once into the cache: `python -m venv`, pip, and a stamp when it works."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

STAMP = "built.json"


class NotBuilt(Exception):
    """A peer, or a model for it, could not be made; the text is the reason, in a line."""


class OutOfTime(NotBuilt):
    """It was stopped on its way; the next run goes on from there."""


@dataclass(frozen=True)
class Recipe:
    """What makes an environment: pip requirements, then commands; `{env}` stands for its folder.

    Attributes:
        check: Python that must run in it, and prints the version that results name.
        variables: for the environment of all commands and of the peer's processes.
    """

    name: str
    packages: tuple[str, ...]
    check: str
    commands: tuple[tuple[str, ...], ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    def fingerprint(self) -> str:
        parts = [self.packages, self.check, self.commands, sorted(self.variables.items()), sys.version_info[:2]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


# The range that Millrace itself supports, so that peers that convert or run with torch have the same.
TORCH = "torch>=2.11,<2.14"

_LLAMA_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=ON", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF",
)  # fmt: skip

_VLLM = (
    "https://files.pythonhosted.org/packages/f7/25/aa5684e9c59d6fc75f78926b7f15e8d9adc7de2d9e6e7575b80776ad8169/"
    "vllm-0.33.0.tar.gz"
)

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # One build of the llama.cpp that llama-cpp-python's source brings: its libraries serve the Python package
        # (which builds none of its own), and llama-server comes with them.
        Recipe(
            "llama.cpp",
            ("cmake", "ninja", "numpy", "gguf"),
            "import llama_cpp; llama_cpp.llama_backend_init(); print(llama_cpp.__version__)",
            (
                ("{env}/bin/python", "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python",
                 "--dest", "{env}/source", "llama-cpp-python"),
                ("sh", "-c", "tar xzf {env}/source/*.tar.gz --strip-components=1 -C {env}/source"),
                ("{env}/bin/cmake", "-G", "Ninja", "-DCMAKE_MAKE_PROGRAM={env}/bin/ninja", "-S",
                 "{env}/source/vendor/llama.cpp", "-B", "{env}/build", *_LLAMA_OPTIONS),
                ("{env}/bin/cmake", "--build", "{env}/build", "--target", "llama-server", "-j", "2"),
                ("{env}/bin/python", "-m", "pip", "install", "-Ccmake.define.LLAMA_BUILD=OFF", "{env}/source"),
            ),
            {"LLAMA_CPP_LIB_PATH": "{env}/build/bin"},
        ),
        Recipe(
            "openvino",
            ("openvino-genai", "optimum-intel[openvino]", "nncf", TORCH),
            "import openvino_genai, optimum.exporters.openvino; print(openvino_genai.__version__)",
            # optimum brings PyPI's torchvision, which a CPU build of torch cannot import; text models need none.
            (("{env}/bin/python", "-m", "pip", "uninstall", "--yes", "torchvision"),),
        ),
        Recipe(
            "ctranslate2",
            ("ctranslate2", "transformers", TORCH),
            "import ctranslate2; print(ctranslate2.__version__)",
        ),
        Recipe(
            "onnxruntime-genai",
            ("onnxruntime-genai", "onnx", "onnx_ir", "transformers", TORCH),
            "import onnxruntime_genai; print(onnxruntime_genai.__version__)",
        ),
        # The wheels of PyPI are for CUDA. By its name pip refuses what the source builds (0.33.0+cpu is not 0.33.0), so
        # it is named by its address. The build fetches oneDNN from GitHub.
        Recipe(
            "vllm",
            (TORCH, "setuptools>=77,<81", "setuptools_scm", "setuptools_rust", "wheel", "cmake", "ninja", "packaging",
             "numpy", "jinja2"),
            "import vllm, vllm._C; print(vllm.__version__)",
            (("{env}/bin/python", "-m", "pip", "install", "--no-build-isolation", "vllm @ " + _VLLM),),
            {"VLLM_TARGET_DEVICE": "cpu", "MAX_JOBS": "2"},
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """A built one: its interpreter, what its processes need to be told, its version."""

    folder: Path
    variables: Mapping[str, str]
    version: str

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")


def build(recipe: Recipe, cache: Path, limit: float, rebuild: bool = False) -> Environment:
    """The environment of `recipe` in `cache`, made if it is not there; a failure is remembered until `rebuild`.

    Raises NotBuilt with the failing command's last error, OutOfTime where it took longer than `limit` seconds.
    """
    folder = cache / "env" / recipe.name
    variables = {name: value.format(env=folder) for name, value in recipe.variables.items()}
    stamp = folder / STAMP
    if stamp.is_file() and not rebuild:
        found = json.loads(stamp.read_text("utf-8"))
        if found["recipe"] == recipe.fingerprint():
            if "reason" in found:
                raise NotBuilt(f"{found['reason']} (tried before; --rebuild {recipe.name} tries again)")
            return Environment(folder, variables, found["version"])
        shutil.rmtree(folder)
    elif rebuild:
        shutil.rmtree(folder, ignore_errors=True)
    # A folder without a stamp was interrupted: every command below goes on from what is there.
    deadline = time.monotonic() + limit
    log = cache / "logs" / f"build-{recipe.name}.log"
    python = str(folder / "bin" / "python")
    try:
        run([sys.executable, "-m", "venv", str(folder)], log, deadline)
        if recipe.packages:
            run([python, "-m", "pip", "install", *recipe.packages], log, deadline, variables)
        for command in recipe.commands:
            run([part.format(env=folder) for part in command], log, deadline, variables)
        version = run([python, "-c", recipe.check], log, deadline, variables).strip().splitlines()[-1]
    except OutOfTime:
        raise
    except NotBuilt as error:
        _stamp(folder, recipe, reason=str(error))
        raise
    _stamp(folder, recipe, version=version)
    return Environment(folder, variables, version)


def _stamp(folder: Path, recipe: Recipe, **outcome: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STAMP).write_text(json.dumps({"recipe": recipe.fingerprint(), **outcome}, indent=1) + "\n", "utf-8")


def run(command: Sequence[str], log: Path, deadline: float, variables: Mapping[str, str] | None = None) -> str:
    """Runs a command at low priority into `log`; its output. Raises NotBuilt with its last error, or OutOfTime."""
    log.parent.mkdir(parents=True, exist_ok=True)
    name = " ".join(Path(part).name if part.startswith("/") else part for part in command[:4])
    begin = log.stat().st_size if log.exists() else 0
    with log.open("ab") as sink:
        try:
            process = subprocess.Popen(
                ["nice", "-n", "10", *command] if shutil.which("nice") else command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(variables or {})},
                start_new_session=True,  # so that a compiler's processes end with it
            )
        except OSError as error:
            raise NotBuilt(f"`{name}`: {error}") from error
        try:
            status = process.wait(max(1.0, deadline - time.monotonic()))
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise OutOfTime(f"`{name}` did not end within its time; the log is {log}") from error
            raise
    with log.open("rb") as whole:
        whole.seek(begin)
        output = whole.read().decode(errors="replace")
    if status:
        raise NotBuilt(f"`{name}` ended with {status}: {last_error(output)}; the log is {log}")
    return output


def last_error(output: str) -> str:
    """The last exception that a log shows, else its last line that speaks of an error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"(\w+\.)*\w+(Error|Exception): ", line)]
    told = [line for line in lines if re.search(r"error|fatal|failed", line, re.IGNORECASE)]
    return (raised or told or lines or ["nothing was printed"])[-1][:300]
