"""Runs a function in a forked process, so that a crash ends that process and fails one test."""

import faulthandler
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch

LIMIT_S = 150.0  # of one function; a kernel that spins for ever is killed


class Outcome(NamedTuple):
    """How the function ended.

    Attributes:
        kind: "passed", "skipped", "failed" (an AssertionError), "error" (another exception) or "crashed".
        name: of the exception's type.
        text: its message or traceback.
    """

    kind: str
    name: str = ""
    text: str = ""


def run_isolated(function: Callable[[], object]) -> Outcome:
    """The outcome of the function in a child process; what it changes in memory is lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _child(function, write_end)
    os.close(write_end)
    data = bytearray()
    deadline = time.monotonic() + LIMIT_S
    with os.fdopen(read_end, "rb", buffering=0) as pipe:
        while True:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return Outcome("crashed", "Timeout", f"still running after {LIMIT_S:.0f} s")
            chunk = pipe.read(65536)
            if not chunk:
                break
            data += chunk
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0 and data:
        return Outcome(*pickle.loads(data))
    name = signal.Signals(-status).name if status < 0 else f"status {status}"
    return Outcome("crashed", name, f"the process that ran the kernels ended with {name}")


def _child(function: Callable[[], object], write_end: int) -> None:
    try:
        faulthandler.disable()
        # After a fork torch makes its thread pool anew when it is first asked for; several threads that ask at once, as
        # when transformers loads a checkpoint, find none.
        torch.set_num_threads(torch.get_num_threads())
        try:
            function()
            outcome = Outcome("passed")
        except BaseException as error:
            name = type(error).__name__
            kind = "skipped" if name == "Skipped" else "failed" if isinstance(error, AssertionError) else "error"
            text = str(error) if kind == "skipped" else "".join(traceback.format_exception(error))
            outcome = Outcome(kind, name, text)
        sys.stdout.flush()
        sys.stderr.flush()
        with os.fdopen(write_end, "wb") as pipe:
            pickle.dump(tuple(outcome), pipe)
        os._exit(0)
    finally:
        os._exit(1)
