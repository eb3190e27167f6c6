"""Millrace side by side with other CPU engines, on random Qwen2.5-0.5B and Llama-3.2-1B checkpoints.

    python bench/peers_cpu.py [--quick] [--peers PEER ...] [--shapes SHAPE ...] [--precisions P ...] [--minutes N]
    python bench/peers_cpu.py --build          # environments and converted models only, which takes an hour or more
    python bench/peers_cpu.py --show           # what was measured, as tables for documents

Each peer is built in an environment of its own from the registry that pip is configured with, and kept in the cache
together with the checkpoints as each peer wants them; a second run finds them there. llama.cpp is compiled for this
machine. A peer that cannot be built is named with the reason, and the rest goes on (`--rebuild PEER` tries again).

Every engine is a process of its own with its model loaded, and gets one job at a time: 128 tokens in and 64 out,
greedy, at 1, 8 and 16 sequences, and the first token of a prompt of 512. Only one computes at a time, and they take
turns at every load, since one launch differs from the next by more than engines do: what counts is the ratio within a
round. Rates of decoding count from the moment when every sequence has its first token. Then 16 streams over HTTP:
`millrace serve` and llama-server.

All of it takes hours. With --add a run keeps what the JSON file holds of other shapes and precisions, so that it can
be done in pieces: the engines of one precision are always compared within one run, as are the streams over HTTP, which
--http-only measures alone.

Leave the machine alone meanwhile. Exit status: 0; 1 if an engine failed or time ran out; 2 for wrong arguments.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from peers import checkpoints, environments, http_part, table
from peers.engines import ENGINES, MILLRACE, PEERS, PRECISIONS, QUICK_PEERS, Engine, chosen
from peers.environments import RECIPES, Environment, NotBuilt
from peers.measure import LOADS, Samples, fit_together, measure
from peers.probe import available_memory, read_bandwidth
from peers.worker import Worker
from rich.console import Console

from millrace.runtime.app import available_cores
from millrace.runtime.weights.synthetic import preset

RESULTS = Path(__file__).parent / "results"
LLAMA_OVER_HTTP = next(engine for engine in ENGINES if engine.label == "llama.cpp Q8_0")
JOB_LIMIT_S = 600.0  # for a worker to load, and for one job


class Bench:
    """What a run has at hand: the cache, the environments that could be built, and the time that is left."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args, self.console = args, console
        self.cache: Path = args.cache
        self.environments: dict[str, Environment] = {}
        self.not_built: dict[str, str] = {}
        self.deadline = time.monotonic() + 60 * args.minutes

    def build(self, engines: Sequence[Engine]) -> None:
        """Every environment and model that `engines` need; what fails goes into `not_built`."""
        deadline = time.monotonic() + 60 * self.args.build_minutes
        for name in dict.fromkeys(e.environment for e in engines if e.environment):
            self.console.print(f"environment of {name} ...")
            try:
                left, again = deadline - time.monotonic(), name in self.args.rebuild
                self.environments[name] = environments.build(RECIPES[name], self.cache, left, again)
            except NotBuilt as error:
                self.not_built[name] = str(error)
        for shape in self.args.shapes:
            checkpoints.checkpoint(self.cache, shape)
            for engine in engines if self.args.no_http else dict.fromkeys([*engines, LLAMA_OVER_HTTP]):
                if engine.environment in self.environments and engine.kind:
                    self.console.print(f"{shape}: {engine.label} ...")
                    try:
                        self.model(engine, shape, deadline)
                    except NotBuilt as error:
                        self.not_built[f"{engine.label}, {shape}"] = str(error)

    def model(self, engine: Engine, shape: str, deadline: float) -> Path:
        """What an engine loads; made if it is not there. Raises NotBuilt."""
        if not engine.kind:
            return checkpoints.checkpoint(self.cache, shape)
        convert = checkpoints.CONVERTERS[engine.environment]
        return convert(self.cache, shape, engine.kind, self.environments[engine.environment], deadline)

    def start(self, engine: Engine, shape: str) -> Worker:
        env = self.environments.get(engine.environment)
        python = env.python if env else sys.executable
        command = engine.command(python, self.model(engine, shape, time.monotonic()), self.args.threads)
        return Worker(
            command, self._variables(env), self._log(f"{shape} {engine.label} {engine.precision}"), JOB_LIMIT_S
        )

    def measure(self, engines: Sequence[Engine], shape: str, parts: dict[str, Samples]) -> None:
        """Fills `parts` precision by precision: engines of one take turns, and only they are in memory."""
        for precision in self.args.precisions:
            group = [e for e in engines if e.precision == precision and self._usable(e, shape)]
            weights = table.weight_bytes(preset(shape), "int8")
            together = fit_together(group, round(weights), available_memory())
            how = "all in memory" if together else "one in memory at a time"
            self.console.print(f"{shape} {precision}: {', '.join(e.label for e in group)}; {how}")
            parts[precision] = Samples()
            measure(
                group,
                lambda e: self.start(e, shape),
                together,
                self.args.rounds,
                self.deadline,
                self.console.print,
                lambda: read_bandwidth(self.args.threads),
                into=parts[precision],
            )

    def measure_http(self, shape: str) -> dict[str, Any]:
        model, limit = checkpoints.checkpoint(self.cache, shape), JOB_LIMIT_S
        threads = self.args.threads
        servers = {
            http_part.MILLRACE_SERVER: lambda: http_part.millrace_server(
                model, threads, self._log("millrace serve"), limit
            )
        }
        llama = self.environments.get("llama.cpp")
        if llama is not None and self._usable(LLAMA_OVER_HTTP, shape):
            file = self.model(LLAMA_OVER_HTTP, shape, time.monotonic())
            binary = llama.folder / "build" / "bin" / "llama-server"
            servers[http_part.LLAMA_SERVER] = lambda: http_part.llama_server(
                binary, file, threads, self._variables(llama), self._log("llama-server"), limit
            )
        own = Engine(MILLRACE, "millrace", "int8", "run_millrace.py", 1, options=("--quantize", "int8", "--default"))
        return http_part.measure_http(
            servers, lambda: self.start(own, shape), self.args.rounds, self.deadline, self.console.print
        )

    def _usable(self, engine: Engine, shape: str) -> bool:
        return engine.environment not in self.not_built and f"{engine.label}, {shape}" not in self.not_built

    def _variables(self, env: Environment | None) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": str(self.args.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return {**threads, **(env.variables if env else {})}

    def _log(self, name: str) -> Path:
        return self.cache / "logs" / f"{name.replace(' ', '-')}.log"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", metavar="PEER", help=f"default: all of {', '.join(PEERS)}")
    parser.add_argument("--shapes", nargs="+", choices=checkpoints.SHAPES, help="default: both")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=180, help="for measuring; what does not fit is left out")
    parser.add_argument("--build-minutes", type=float, default=120, help="for building and converting")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "millrace" / "peers")
    parser.add_argument("--rebuild", nargs="+", default=[], choices=list(RECIPES), metavar="PEER")
    parser.add_argument("--build", action="store_true", help="build and convert what is missing, measure nothing")
    parser.add_argument("--quick", action="store_true", help="one round of the 0.5B shape, llama.cpp and OpenVINO only")
    http = parser.add_mutually_exclusive_group()
    http.add_argument("--no-http", action="store_true", help="leave out the streams over HTTP")
    http.add_argument("--http-only", action="store_true", help="nothing but the streams over HTTP")
    parser.add_argument("--add", action="store_true", help="to what the JSON file holds; else it is written anew")
    parser.add_argument("--show", action="store_true", help="print the JSON file's tables, measure nothing")
    parser.add_argument("--json", type=Path, default=RESULTS / "peers_cpu.json", metavar="FILE")
    parser.add_argument("--plot", type=Path, default=RESULTS / "peers_cpu.png", metavar="FILE")
    args = parser.parse_args(arguments)
    if args.add or args.show:
        args.earlier = _earlier(parser, args.json)
    if args.show:
        print(*table.markdown(args.earlier), sep="\n")
        return 0
    if args.add and args.earlier["threads"] != args.threads:
        parser.error(
            f"{args.json} is of {args.earlier['threads']} threads, not {args.threads}: give --threads, or begin "
            "anew without --add"
        )
    if args.http_only and (args.peers is not None or args.precisions is not None):
        parser.error("--http-only measures llama-server and Millrace in int8: leave out --peers and --precisions")
    if args.precisions is None:
        args.precisions = list(PRECISIONS)
    if args.rounds < 1 or args.threads < 1 or args.minutes <= 0 or args.build_minutes <= 0:
        parser.error("--rounds and --threads must be at least 1, --minutes and --build-minutes positive")
    if args.quick:
        args.rounds = 1
    if args.shapes is None:
        args.shapes = list(checkpoints.SHAPES[:1] if args.quick else checkpoints.SHAPES)
    if args.peers is None:
        args.peers = list(QUICK_PEERS if args.quick else PEERS)
    try:
        engines = chosen(args.peers, args.precisions)
    except ValueError as error:
        parser.error(str(error))
    if args.http_only:
        engines, args.precisions = [LLAMA_OVER_HTTP], []
    # Builds and servers run in sessions of their own, so a signal that ends this process must end them, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console(width=None if sys.stdout.isatty() else 150)
    bench = Bench(args, console)
    bench.build(engines)
    for name, reason in bench.not_built.items():
        console.print(f"not built: {name}: {reason}", markup=False)
    if args.build:
        return 0
    return run(bench, engines)


def _earlier(parser: argparse.ArgumentParser, file: Path) -> dict[str, Any]:
    """The result to add to; read before hours are spent, so that what is wrong with it is said now."""
    try:
        earlier: dict[str, Any] = json.loads(file.read_text("utf-8"))
        loads = earlier["loads"]
        for key in ("shapes", "http", "not_built", "threads"):
            earlier[key]
        for parts in earlier["shapes"].values():
            for part in parts.values():
                part["floor_shares"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--add and --show need a result of this bench, and {file} is none ({error}): run once without")
    if loads != [load.name for load in LOADS]:
        parser.error(f"{file} is of the loads {', '.join(loads)}: begin anew without --add")
    return earlier


def run(bench: Bench, engines: Sequence[Engine]) -> int:
    args, console = bench.args, bench.console
    bench.deadline = time.monotonic() + 60 * args.minutes
    result: dict[str, Any] = {
        "bench": "peers_cpu", "threads": args.threads, "rounds": args.rounds, "loads": [load.name for load in LOADS],
        "load_before": os.getloadavg()[0], "not_built": bench.not_built, "shapes": {}, "http": {},
    }  # fmt: skip
    measured: dict[str, dict[str, Samples]] = {}
    try:
        for shape in args.shapes:
            bench.measure(engines, shape, measured.setdefault(shape, {}))
            if not args.no_http:
                result["http"][shape] = bench.measure_http(shape)
    finally:
        if measured:
            report(result, measured, console, args, bench.environments)
    parts = [samples.failed for shape in measured.values() for samples in shape.values()]
    failed = [*parts, *(part["failed"] for part in result["http"].values())]
    for part in failed:
        for name, reason in part.items():
            console.print(f"failed: {name}: {reason}", markup=False)
    return 1 if any(failed) else 0


def report(
    result: dict[str, Any],
    measured: dict[str, dict[str, Samples]],
    console: Console,
    args: argparse.Namespace,
    built: Collection[str],
) -> None:
    """Tables, then the JSON, then the plot where matplotlib is installed; of what there is, if the run was stopped."""
    for shape, parts in measured.items():
        if not parts:
            continue
        console.print(table.ratio_table(shape, parts, LOADS))
        console.print(table.floor_table(shape, preset(shape), parts, LOADS))
        result["shapes"][shape] = table.summary(preset(shape), parts, LOADS)
    for shape, part in result["http"].items():
        console.print(http_part.http_table(shape, part))
    if args.add:
        result = table.added(args.earlier, result, built)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    console.print(f"written: {args.json}")
    if not result["shapes"]:
        return
    try:
        table.plot(result, args.plot)
    except ImportError:
        console.print("no plot: matplotlib is not installed (pip install 'millrace[bench]')", markup=False)
    else:
        console.print(f"written: {args.plot}")


if __name__ == "__main__":
    sys.exit(main())
