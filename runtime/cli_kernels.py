"""`millrace prepare` and `millrace kernels build`: the kernels of the CPU and of GPUs, compiled beforehand."""

import argparse

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from millrace.kernels import ops
from millrace.kernels.cpu_build import BuildError
from millrace.kernels.cuda_catalog import all_kernels
from millrace.kernels.cuda_compile import ARCHS, Built, CudaCompiler, build_all

_err = Console(stderr=True, highlight=False)


def prepare(args: argparse.Namespace) -> int:
    _err.print(ops.prepare(), soft_wrap=True)
    return 0


def build(args: argparse.Namespace) -> int:
    """Fills the cache of compiled CUDA kernels, and prints where it is."""
    compiler = CudaCompiler() if args.cache is None else CudaCompiler(cache_dir=args.cache)
    fault = ""
    archs = args.arch or _own_arch()
    if not archs:
        fault = f"there is no GPU here whose architecture could be taken; name one with --arch ({', '.join(ARCHS)})"
    elif compiler.nvrtc is None:
        fault = "NVRTC, which compiles the kernels, was not found: pip install 'nvidia-cuda-nvrtc==13.0.*'"
    elif args.jobs is not None and args.jobs < 1:
        fault = f"--jobs is {args.jobs}, but it must be at least 1"
    if fault:
        _err.print(f"[bold red]error:[/] {escape(fault)}", soft_wrap=True)
        return 2
    archs = list(dict.fromkeys(archs))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    compiled = 0
    try:
        with Progress(*columns, TimeElapsedColumn(), console=_err, transient=True) as progress:
            task = progress.add_task("CUDA kernels", total=None)

            def show(built: Built) -> None:
                nonlocal compiled
                compiled += not built.cached
                progress.update(task, description=f"CUDA kernels {built.arch}", completed=built.done, total=built.total)

            total = build_all(all_kernels(), archs, show, compiler=compiler, workers=args.jobs)
    except BuildError as error:
        _err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    _err.print(f"{total} CUDA modules for {', '.join(archs)} ({compiled} compiled now) in", soft_wrap=True)
    print(compiler.cache_dir)
    return 0


def _own_arch() -> list[str]:
    """The architecture of this machine's first GPU, if there is one."""
    if not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability()
    return [f"sm_{major}{minor}"]
