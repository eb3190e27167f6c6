"""From the start of Python to a runtime that serves, with `millrace build` and without, taking turns.

    python bench/start.py [--checkpoint FOLDER] [--quantize none int8 int4] [--rounds 3] [--json FILE]

Without --checkpoint a random one of the Qwen2.5-0.5B shape is made, with grist's tokenizer. Each start is a process
of its own, over files that are in the page cache. The table gives the seconds of `import torch`, which is the floor,
and as multiples of it: all other imports; then until the runtime serves, without a build and with one; and the whole
with a build. Last, how many times sooner than without a build that is.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from millrace.runtime.weights.resolve import resolve_model
from millrace.runtime.weights.synthetic import write_random_checkpoint

_CHILD = """
import time
begun = time.perf_counter()
import torch
torch_imported = time.perf_counter()
import asyncio, json, sys
import millrace.runtime.app
imported = time.perf_counter()
async def main():
    options = {"model__quantize": sys.argv[2], "model__build": sys.argv[3], "log__level": "error"}
    runtime = millrace.runtime.app.Runtime(sys.argv[1], **options)
    await runtime.start()
    print(json.dumps([torch_imported - begun, imported - torch_imported, time.perf_counter() - imported]))
    await runtime.close()
asyncio.run(main())
"""


class Start(NamedTuple):
    """Seconds of the parts of one start."""

    torch: float
    imports: float
    ready: float


def start(model: Path, quantize: str, build: str) -> Start:
    command = [sys.executable, "-c", _CHILD, str(model), quantize, build]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return Start(*json.loads(done.stdout.splitlines()[-1]))


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
        print(f"{'':6} {'torch s':>9} {'imports':>9} {'start':>9} {'with build':>12} {'whole':>9} {'sooner':>9}")
        for quantize in args.quantize:
            folder = Path(scratch) / quantize
            build(model, folder, quantize)
            rounds = [(start(model, quantize, ""), start(model, quantize, str(folder))) for _ in range(args.rounds)]
            results[quantize] = [{"without": plain._asdict(), "with": built._asdict()} for plain, built in rounds]
            torch = statistics.median(one.torch for pair in rounds for one in pair)
            imports = statistics.median(one.imports / one.torch for pair in rounds for one in pair)
            plain, ready = (statistics.median(pair[i].ready / pair[i].torch for pair in rounds) for i in (0, 1))
            whole = statistics.median(sum(built) / built.torch for _, built in rounds)
            sooner = statistics.median(sum(plain) / sum(built) for plain, built in rounds)
            print(
                f"{quantize:6} {torch:9.2f} {imports:8.2f}x {plain:8.2f}x {ready:11.2f}x {whole:8.2f}x {sooner:8.2f}x",
                flush=True,
            )
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
