"""From the start of a process until it serves, with `millrace build` and without, taking turns.

    python bench/start.py [--checkpoint FOLDER] [--quantize none int8 int4] [--rounds 3] [--json FILE]

Without --checkpoint a random one of the Qwen2.5-0.5B shape is made, with grist's tokenizer. Each start is a process
of its own, over files that are in the page cache; the clock runs from before it is spawned until it says that it is
ready. A runtime is a program with `async with Runtime(...)`, a server is `millrace serve`. The table gives the seconds
of a process that does nothing but `import torch`, which is what machines differ in, and of each start; as multiples of
that import; and how many times sooner than without a build.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from millrace.runtime.weights.resolve import resolve_model
from millrace.runtime.weights.synthetic import write_random_checkpoint

_RUNTIME = """
import asyncio, sys
from millrace.runtime import Runtime
async def main():
    async with Runtime(sys.argv[1], model__quantize=sys.argv[2], model__build=sys.argv[3], log__level="error"):
        print("<ready>", flush=True)
asyncio.run(main())
"""
_LIMIT_S = 600


class Start(NamedTuple):
    """Seconds of one round."""

    torch: float
    runtime: float
    runtime_with_build: float
    server: float
    server_with_build: float


def until(command: list[str], sign: str) -> float:
    """Seconds until the process says `sign`, in a line of its own or as part of one; it is ended then."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        watch = threading.Timer(_LIMIT_S, process.kill)
        watch.start()
        assert process.stdout is not None
        said = []
        try:
            for line in process.stdout:
                said.append(line)
                if sign in line:
                    return time.perf_counter() - started
        finally:
            watch.cancel()
            process.terminate()
            process.communicate()
    raise SystemExit(f"{' '.join(command)} was never ready:\n{''.join(said)}")


def one_round(model: Path, quantize: str, build: Path) -> Start:
    python = [sys.executable, "-c"]
    serve = [sys.executable, "-m", "millrace.runtime", "serve", str(model), "--port", "0", "--quantize", quantize]
    return Start(
        until([*python, "import torch; print('<ready>', flush=True)"], "<ready>"),
        until([*python, _RUNTIME, str(model), quantize, ""], "<ready>"),
        until([*python, _RUNTIME, str(model), quantize, str(build)], "<ready>"),
        until(serve, "chat page"),
        until([*serve, "--build", str(build)], "chat page"),
    )


def build(model: Path, folder: Path, quantize: str) -> None:
    command = [sys.executable, "-m", "millrace.runtime", "build", str(model), str(folder), "--quantize", quantize]
    subprocess.run(command, capture_output=True, check=True, timeout=600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--quantize", nargs="+", default=["none", "int8", "int4"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all rounds there too")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = args.checkpoint
        if model is None:
            model = Path(scratch) / "model"
            write_random_checkpoint(model, "qwen2.5-0.5b", dtype="bfloat16")
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(resolve_model().path / name, model)
        print(f"{'':6}" + "".join(f" {name:>18}" for name in Start._fields) + "   (seconds, and multiples of torch)")
        for quantize in args.quantize:
            folder = Path(scratch) / quantize
            build(model, folder, quantize)
            one_round(model, quantize, folder)  # files come into the page cache
            rounds = [one_round(model, quantize, folder) for _ in range(args.rounds)]
            results[quantize] = [start._asdict() for start in rounds]
            cells = []
            for name in Start._fields:
                seconds = statistics.median(getattr(start, name) for start in rounds)
                ratio = statistics.median(getattr(start, name) / start.torch for start in rounds)
                cells.append(f"{seconds:8.2f} s {ratio:6.2f}x")
            sooner = statistics.median(start.runtime / start.runtime_with_build for start in rounds)
            served = statistics.median(start.server / start.server_with_build for start in rounds)
            print(f"{quantize:6} {'  '.join(cells)}   sooner: {sooner:.2f}x, {served:.2f}x", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
