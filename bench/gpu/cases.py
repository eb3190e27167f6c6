"""Every kernel on the device against float64, and against the host shim from the same inputs."""

import contextlib
import math
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.case_list import Case, Checked, Place, cases, error_of
from gpu.context import Context
from gpu.plan import Row
from millrace.kernels.cuda_compile import Kernel, read_source
from millrace.kernels.cuda_launch import CupyLauncher, Launcher

SHIM_TOLERANCE = 2.0  # times a case's own: both round, and each in its own order


def device_place() -> Place:
    torch.zeros(1, device="cuda")  # modules are loaded into the context that torch makes current
    return Place(CupyLauncher(0), "cuda", torch.cuda.current_stream().cuda_stream)


def shim_place(like: Launcher) -> Place | None:
    """The host shim, where there is a C++ compiler for it; of as many multiprocessors, so that work is split alike."""
    from shim.build import compiler
    from shim.launcher import ShimLauncher

    beside = ShimLauncher(sm_count=like.sm_count, shared_bytes_per_sm=like.shared_bytes_per_sm)
    return None if compiler() is None else Place(beside, "cpu", 0)


class Recorder:
    """A launcher that only notes what would be launched."""

    def __init__(self, like: Launcher) -> None:
        self.device_type, self.sm_count = like.device_type, like.sm_count
        self.shared_bytes_per_sm = like.shared_bytes_per_sm
        self.kernels: dict[Kernel, None] = {}

    def launch(self, kernel: Kernel, *rest: Any, **more: Any) -> None:
        self.kernels[kernel] = None


def kernels_of(chosen: list[Case], place: Place) -> list[Kernel]:
    """What the cases launch: known beforehand, it is compiled on all processors at once."""
    recorder = Recorder(place.launcher)
    for case in chosen:
        # Nothing is computed, so that a case may stumble over what it finds.
        with contextlib.suppress(Exception):
            seeded(case, place._replace(launcher=recorder))
    return list(recorder.kernels)


def build_shim(kernels: list[Kernel], folder: Path) -> None:
    from shim.build import build

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda kernel: build(kernel, folder, read_source), kernels))


def seeded(case: Case, place: Place) -> Checked:
    torch.manual_seed(zlib.crc32(f"{case.group} {case.name}".encode()))
    return case.run(place)


def worst(checked: Checked) -> float:
    return max(error_of(got, want) for got, want in zip(checked.got, checked.want, strict=True))


def differing(device: list[Tensor], shim: list[Tensor]) -> float:
    """How far the device's results are from the shim's."""
    return max(error_of(got, want.double()) for got, want in zip(device, shim, strict=True))


def check(
    context: Context,
    chosen: list[Case],
    place: Place,
    shim: Place | None = None,
    settle: Callable[[], None] = lambda: torch.cuda.synchronize(),
) -> None:
    """One row for each group of cases with its worst error, against the reference, or against the shim if it is given.

    A case that raises fails its group; a device that has failed ends the part.
    """
    for group in dict.fromkeys(case.group for case in chosen):
        name = f"{group} vs {'reference' if shim is None else 'shim'}"
        if context.left < 2:
            context.say(f"   {name} and what follows: no time left")
            return
        members = [case for case in chosen if case.group == group]
        context.row(_group_row(context, name, members, place, shim, settle))


def _group_row(
    context: Context, name: str, members: list[Case], place: Place, shim: Place | None, settle: Callable[[], None]
) -> Row:
    found: list[tuple[float, float, str]] = []  # share of the tolerance, error, case
    note, done = "", 0
    for case in members:
        if context.left < 1 and done:
            break
        done += 1
        try:
            checked = seeded(case, place)
            settle()
            error, tolerance = worst(checked), checked.tolerance
            if shim is not None:
                error, tolerance = differing(checked.got, seeded(case, shim).got), SHIM_TOLERANCE * checked.tolerance
            share = error / tolerance if tolerance else (0.0 if error == 0 else math.inf)
            found.append((share, error, case.name))
        except Exception as raised:
            note = f"{case.name}: {type(raised).__name__}: {raised}"[:300]
            settle()  # raises if the device is lost
    share, error, case_name = max(found, default=(math.inf, math.inf, ""))
    count = f"{len(members)} cases" if done == len(members) else f"{done} of {len(members)} cases, no time for more"
    text = note or f"{count}; worst is {case_name} at {share:.0%} of what is allowed"
    failed = bool(note) or not share <= 1.0
    return Row(context.part.name, name, _finite(error), "relative", note=text, failed=failed)


def _finite(error: float) -> float:
    """JSON has no infinity."""
    return error if error < 1e30 else 1e30


def run(context: Context) -> None:
    chosen = [case for case in cases() if case.small or not context.small]
    place = device_place()
    kernels = kernels_of(chosen, place)
    launcher: Any = place.launcher
    launcher.prepare(kernels)
    check(context, chosen, place)
    if context.small:
        return
    shim = shim_place(launcher)
    if shim is None:
        context.say("   no g++ or clang++: the device is not compared with the host shim")
        return
    beside: Any = shim.launcher
    build_shim(kernels, beside.cache_dir)
    check(context, chosen, place, shim)
