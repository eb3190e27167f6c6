"""An engine in a process of its own, driven by lines of JSON (protocol.py)."""

import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class WorkerError(Exception):
    """The worker ended, did not answer in time, or answered with an error; the text says which."""


class Worker:
    """Starts `command` and waits until it is ready; one job at a time.

    Args:
        log: where its stderr goes.
        limit: seconds for loading, and for each job.

    Raises:
        WorkerError: from the constructor and from `run`; the process is ended then.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path, limit: float) -> None:
        self._log, self._limit = log, limit
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **env},
                text=True,
                start_new_session=True,  # Ctrl-C is the parent's alone, which then closes its workers
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        begin = time.perf_counter()
        self.versions: dict[str, str] = self._answer()["ready"]
        self.load_seconds = time.perf_counter() - begin

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
        """The answer of Tally.answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:  # a broken or a closed pipe
            raise WorkerError(self._ended()) from error
        return self._answer()

    def close(self) -> None:
        """Ends the process, by force if it does not go by itself; idempotent."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self._limit)
        except queue.Empty:
            self._process.kill()
            self.close()
            raise WorkerError(f"no answer in {self._limit:g} s") from None
        if line is None:
            raise WorkerError(self._ended())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.close()
            raise WorkerError(answer["error"])
        return answer

    def _ended(self) -> str:
        self.close()
        tail = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        return f"ended with status {self._process.returncode}" + (f": {tail[0]}" if tail else "")
