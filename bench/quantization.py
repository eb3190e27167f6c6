"""What quantised copies of a model lose: size and perplexity of held-out text, method by method.

    python bench/quantization.py [--model grist] [--group-size 64] [--calibration FILE] [--eval FILE] [--json FILE]

All rows are of the same windows of text. Weights are dequantised and multiplied in float32; int8 and fp8 round
activations too, as their formats say. "nearest" is plain rounding between a group's least and largest weight, the
measure for AWQ and GPTQ.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from millrace.runtime.quant.job import Report
from millrace.runtime.quant.quantize import quantize
from millrace.runtime.quant.rounding import round_to_nearest
from millrace.runtime.quant.source import Source
from millrace.runtime.weights.resolve import resolve_model


def write_nearest(model: str, folder: Path, group_size: int) -> None:
    """A float32 checkpoint of the weights that plain rounding to 4 bits makes."""
    source = Source(resolve_model(model).path)
    folder.mkdir()
    matrices = {
        f"{part.name}.weight"
        for layer in source.layers
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)
        for part in linear.parts
    }
    tensors = {}
    for tensor in source.decl.tensors():
        wide = source.read(tensor.name).float()
        tensors[tensor.name] = round_to_nearest(wide, 4, group_size).widen() if tensor.name in matrices else wide
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = source.written_config() | {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    source.copy_others(folder)


def measure(options: argparse.Namespace, folder: Path, console: Console) -> list[dict[str, Any]]:
    texts = {"calibration": options.calibration, "evaluation": options.eval, "samples": options.samples}
    group = {"group_size": options.group_size}

    def run(name: str, method: str, **settings: Any) -> Report:
        with console.status(name):
            return quantize(method, options.model, folder / name.replace(" ", "-"), **texts, **settings)

    rows: list[dict[str, Any]] = []

    def add(name: str, size: int, value: float) -> None:
        rows.append({"method": name, "bytes": size, "perplexity": value, "change": value / rows[0]["perplexity"] - 1
                     if rows else 0.0})  # fmt: skip

    int8 = run("int8", "int8")
    add("as given", int8.bytes_before, int8.before)
    add("int8", int8.bytes_after, int8.after)
    fp8 = run("fp8", "fp8")
    add("fp8", fp8.bytes_after, fp8.after)
    awq = run("awq", "awq", **group)
    with console.status("nearest"):
        write_nearest(options.model, folder / "nearest-model", options.group_size)
        # What comes before another method is what plain rounding gives; zeros and scales take as much as AWQ's.
        nearest = quantize("int8", folder / "nearest-model", folder / "nearest", **texts)
    add("int4 nearest", awq.bytes_after, nearest.before)
    for name, method, settings in (
        ("int4", "int4", {}),
        ("gptq", "gptq", {}),
        ("gptq no-sym", "gptq", {"sym": False}),
    ):
        report = run(name, method, **settings, **group)
        add(name, report.bytes_after, report.after)
    add("awq", awq.bytes_after, awq.after)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="grist", help="checkpoint folder or hub id")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64, help="windows of calibration")
    parser.add_argument("--calibration", type=Path, help="text file; built-in conversations if left out")
    parser.add_argument("--eval", type=Path, help="held-out text")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="millrace-quantization-"))
    try:
        rows = measure(options, folder, console)
    finally:
        shutil.rmtree(folder)
    table = Table(title=f"{options.model}, groups of {options.group_size}")
    for column in ("method", "MB", "perplexity", "change"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(row["method"], f"{row['bytes'] / 1e6:,.2f}", f"{row['perplexity']:.4f}", f"{row['change']:+.2%}")
    console.print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
