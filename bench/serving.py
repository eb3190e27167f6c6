"""Load on an OpenAI-compatible server: time to first token, inter-token latency, tokens per second, failures.

    python bench/serving.py http://127.0.0.1:8000 --concurrency 16 --requests 200
    python bench/serving.py http://127.0.0.1:8000 --rate 4 --requests 200          # open loop, Poisson arrivals
    python bench/serving.py --self --concurrency 8 --requests 32 --json result.json

Closed loop: `concurrency` clients, each sends its next request when the last has ended. Open loop: requests arrive at
`rate` per second whatever the server does, as users do, which shows the queueing that a closed loop hides. Arrivals
and prompts come from `seed`, so two runs send the same requests.
"""

import argparse
import asyncio
import ipaddress
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

WORDS = (
    "river",
    "stone",
    "wheel",
    "water",
    "grain",
    "flour",
    "morning",
    "village",
    "bread",
    "summer",
    "garden",
    "story",
)
START_LIMIT_S = 300  # for a server of one's own to become ready


@dataclass
class Plan:
    """What to send. `rate` 0 is the closed loop; `seconds` and `requests` both bound the run."""

    url: str
    model: str
    requests: int
    concurrency: int
    rate: float
    seconds: float
    prompt_words: int
    max_tokens: int
    seed: int
    timeout_s: float


@dataclass
class Outcome:
    """One request, times in seconds from its sending. `gaps` holds the time between two chunks with text."""

    first: float | None = None
    total: float = 0.0
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    error: str | None = None


async def send(session: aiohttp.ClientSession, plan: Plan, prompt: str) -> Outcome:
    """Streams one completion. Every failure is an outcome: a benchmark that dies of an error measures nothing."""
    outcome, began = Outcome(), time.perf_counter()
    body = {
        "model": plan.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": plan.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    last, chunks = None, 0
    try:
        async with (
            asyncio.timeout(plan.timeout_s),
            session.post(f"{plan.url}/v1/chat/completions", json=body) as reply,
        ):
            if reply.status != 200:
                outcome.error = f"HTTP {reply.status}"
                return outcome
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk = msgspec.json.decode(line[6:])
                if chunk.get("error"):
                    outcome.error = str(chunk["error"].get("code") or "error in the stream")
                    return outcome
                if chunk.get("usage"):
                    outcome.tokens = chunk["usage"]["completion_tokens"]
                if any(choice["delta"].get("content") for choice in chunk["choices"]):
                    now = time.perf_counter()
                    chunks += 1
                    if last is None:
                        outcome.first = now - began
                    else:
                        outcome.gaps.append(now - last)
                    last = now
    except TimeoutError:
        outcome.error = "timeout"
    except aiohttp.ClientError as error:
        outcome.error = type(error).__name__
    finally:
        outcome.total = time.perf_counter() - began
        outcome.tokens = outcome.tokens or chunks  # a server without usage chunks sends about a token per chunk
    return outcome


async def load(plan: Plan, progress: Progress) -> tuple[list[Outcome], float]:
    """Runs the plan; the outcomes, and the seconds that it took."""
    rng = random.Random(plan.seed)
    prompts = [" ".join(rng.choices(WORDS, k=plan.prompt_words)) for _ in range(plan.requests)]
    arrivals: list[float] = []
    at = 0.0
    for _ in prompts if plan.rate else ():
        arrivals.append(at)
        at += rng.expovariate(plan.rate)
    outcomes: list[Outcome] = []
    bar = progress.add_task("requests", total=plan.requests)
    limit = asyncio.Semaphore(plan.concurrency)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def one(prompt: str) -> None:
            outcomes.append(await send(session, plan, prompt))
            progress.advance(bar)

        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number, prompt in enumerate(prompts):
                if arrivals:
                    await asyncio.sleep(max(0.0, began + arrivals[number] - time.perf_counter()))
                else:
                    await limit.acquire()
                if time.perf_counter() - began > plan.seconds:
                    break
                task = group.create_task(one(prompt))
                if not arrivals:
                    task.add_done_callback(lambda _: limit.release())
        return outcomes, time.perf_counter() - began


def percentile(values: list[float], share: float) -> float | None:
    """The smallest value that at least `share` of the values do not exceed."""
    return sorted(values)[max(0, -(-len(values) * int(share * 1000) // 1000) - 1)] if values else None


def summary(plan: Plan, outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    """Times in milliseconds; a request that failed counts in `failures` only."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    failures: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.error is not None:
            failures[outcome.error] = failures.get(outcome.error, 0) + 1

    def spread(values: list[float]) -> dict[str, float | None]:
        points = {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99)}
        return {name: None if value is None else round(value * 1e3, 3) for name, value in points.items()}

    tokens = sum(outcome.tokens for outcome in good)
    return {
        "plan": asdict(plan),
        "seconds": round(seconds, 3),
        "requests": len(outcomes),
        "failures": failures,
        "requests_per_second": round(len(good) / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 2),
        "tokens": tokens,
        "time_to_first_token_ms": spread([outcome.first for outcome in good if outcome.first is not None]),
        "inter_token_ms": spread([gap for outcome in good for gap in outcome.gaps]),
        "request_ms": spread([outcome.total for outcome in good]),
    }


def show(result: dict[str, Any], console: Console) -> None:
    plan = result["plan"]
    loop = f"open loop, {plan['rate']:g} requests/s" if plan["rate"] else f"closed loop, {plan['concurrency']} clients"
    table = Table(title=f"{plan['url']}  {loop}")
    table.add_column("measure")
    table.add_column("p50", justify="right")
    table.add_column("p99", justify="right")
    for name in ("time_to_first_token_ms", "inter_token_ms", "request_ms"):
        points = result[name]
        shown = ["-" if points[p] is None else f"{points[p]:.1f}" for p in ("p50", "p99")]
        table.add_row(name.replace("_", " "), *shown)
    console.print(table)
    console.print(
        f"{result['requests']} requests in {result['seconds']:.1f} s: {result['tokens_per_second']:.1f} tokens/s, "
        f"{result['requests_per_second']:.2f} requests/s, {sum(result['failures'].values())} failures"
    )
    for reason, count in sorted(result["failures"].items()):
        console.print(f"  failed: {reason} x {count}")


def refuse_remote(url: str, allowed: bool) -> None:
    """Exits for a target that is not this machine: load on a stranger's server is an attack."""
    host = urlsplit(url).hostname or ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not allowed:
        sys.exit(f"{host!r} is not a loopback address; give --allow-remote if that server is yours to load")


@asynccontextmanager
async def own_server(arguments: list[str]) -> AsyncIterator[str]:
    """Starts `millrace serve` on a free port, waits until it is ready, and stops it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "millrace.runtime.cli", "serve", "--server-port", str(port), *arguments]
    server = await asyncio.create_subprocess_exec(*command, stdout=sys.stderr, env=dict(os.environ))
    url = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(START_LIMIT_S), aiohttp.ClientSession() as session:
            while True:
                if server.returncode is not None:
                    sys.exit(f"the server ended with status {server.returncode} before it was ready")
                try:
                    async with session.get(f"{url}/readyz") as reply:
                        if reply.status == 200:
                            break
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.1)
        yield url
    finally:
        if server.returncode is None:
            server.send_signal(signal.SIGTERM)
            await server.wait()


async def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    @asynccontextmanager
    async def target() -> AsyncIterator[str]:
        if args.self:
            async with own_server(args.serve_args) as url:
                yield url
        else:
            yield args.url.rstrip("/").removesuffix("/v1")

    async with target() as url:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/models") as reply:
            model = args.model or (await reply.json())["data"][0]["id"]
        plan = Plan(
            url=url,
            model=model,
            requests=args.requests,
            concurrency=args.concurrency,
            rate=args.rate,
            seconds=args.seconds,
            prompt_words=args.prompt_words,
            max_tokens=args.max_tokens,
            seed=args.seed,
            timeout_s=args.timeout,
        )
        with Progress(console=console) as progress:
            outcomes, seconds = await load(plan, progress)
    return summary(plan, outcomes, seconds)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("url", nargs="?", help="of the server, with or without /v1")
    parser.add_argument("--self", action="store_true", help="start a Millrace server for the run")
    parser.add_argument("--serve-args", nargs=argparse.REMAINDER, default=[], help="what follows goes to that server")
    parser.add_argument("--model", help="name; by default the first that the server lists")
    parser.add_argument("--requests", type=int, default=64, help="how many at most")
    parser.add_argument("--seconds", type=float, default=120.0, help="nothing new is sent after this long")
    parser.add_argument("--concurrency", type=int, default=8, help="clients of the closed loop")
    parser.add_argument("--rate", type=float, default=0.0, help="requests per second: the open loop")
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    parser.add_argument("--allow-remote", action="store_true", help="the target may be another machine")
    args = parser.parse_args(arguments)
    if bool(args.url) == args.self:
        parser.error("give either a url or --self")
    if min(args.requests, args.concurrency, args.prompt_words, args.max_tokens) < 1 or args.rate < 0:
        parser.error("requests, concurrency, prompt words and max tokens must be at least 1, and the rate not negative")
    return args


def main() -> None:
    args = parse()
    if args.url:
        refuse_remote(args.url, args.allow_remote)
    console = Console(stderr=args.json is None and not sys.stdout.isatty())
    try:
        result = asyncio.run(run(args, console))
    except (aiohttp.ClientError, TimeoutError) as error:
        sys.exit(f"cannot reach the server: {error or type(error).__name__}")
    show(result, console)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    if result["failures"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
