"""From the start of Python to a runtime that serves, with `millrace build` and without, taking turns.

    python bench/start.py [--checkpoint FOLDER] [--quantize none int8 int4] [--rounds 3]

Without --checkpoint a random one of the Qwen2.5-0.5B shape is made, with grist's tokenizer. Each start is a process
of its own, over files that are in the page cache. The table gives seconds until everything is imported, then until the
runtime serves; and how many times sooner the whole is with a build.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from millrace.runtime.weights.resolve import resolve_model
from millrace.runtime.weights.synthetic import write_random_checkpoint

_CHILD = """
import time
begun = time.perf_counter()
import asyncio, json, sys
import millrace.runtime.app
imported = time.perf_counter()
async def main():
    options = {"model__quantize": sys.argv[2], "model__build": sys.argv[3], "log__level": "error"}
    runtime = millrace.runtime.app.Runtime(sys.argv[1], **options)
    await runtime.start()
    print(json.dumps([imported - begun, time.perf_counter() - imported]))
    await runtime.close()
asyncio.run(main())
"""


def start(model: Path, quantize: str, build: str) -> tuple[float, float]:
    command = [sys.executable, "-c", _CHILD, str(model), quantize, build]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    imported, served = json.loads(done.stdout.splitlines()[-1])
    return imported, served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--quantize", nargs="+", default=["none", "int8", "int4"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.checkpoint
        if model is None:
            model = Path(scratch) / "model"
            write_random_checkpoint(model, "qwen2.5-0.5b", dtype="bfloat16")
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(resolve_model().path / name, model)
        print(f"{'':6} {'import s':>9} {'start s':>9} {'with build s':>13} {'in all':>8}")
        for quantize in args.quantize:
            folder = Path(scratch) / quantize
            command = [
                sys.executable,
                "-m",
                "millrace.runtime",
                "build",
                str(model),
                str(folder),
                "--quantize",
                quantize,
            ]
            subprocess.run(command, capture_output=True, check=True, timeout=600)
            rounds = [(start(model, quantize, ""), start(model, quantize, str(folder))) for _ in range(args.rounds)]
            imports = statistics.median(one[0] for pair in rounds for one in pair)
            plain, ready = (statistics.median(pair[which][1] for pair in rounds) for which in (0, 1))
            ratio = statistics.median(sum(pair[0]) / sum(pair[1]) for pair in rounds)
            print(f"{quantize:6} {imports:9.2f} {plain:9.2f} {ready:13.2f} {ratio:7.2f}x", flush=True)


if __name__ == "__main__":
    main()
