"""What quantised copies of a model lose: size and perplexity of held-out text, method by method.

    python bench/quantization.py [--model grist] [--rows ...] [--group-size 64] [--eval FILE] [--json FILE]

All rows are of the same windows of text. Weights are dequantised and multiplied in float32; int8 and fp8 round
activations too, as their formats say. "nearest" is plain rounding between a group's least and largest weight, the
measure for AWQ and GPTQ.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

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


# name: (method, its settings); those with groups take --group-size.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {}),
    "fp8": ("fp8", {}),
    "int4 nearest": ("int8", {}),  # of a checkpoint that plain rounding made: what comes before is what it loses
    "int4": ("int4", {}),
    "gptq": ("gptq", {}),
    "gptq no-sym": ("gptq", {"sym": False}),
    "awq": ("awq", {}),
}


def measure(name: str, options: argparse.Namespace, folder: Path) -> Report:
    method, settings = ROWS[name]
    model = options.model
    if name == "int4 nearest":
        model = str(folder / "nearest")
        write_nearest(options.model, Path(model), options.group_size)
    if method not in ("int8", "fp8"):
        settings = settings | {"group_size": options.group_size}
    return quantize(
        method,
        model,
        folder / name.replace(" ", "-"),
        calibration=options.calibration,
        evaluation=options.eval,
        samples=options.samples,
        **settings,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="grist", help="checkpoint folder or hub id")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="all if left out")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64, help="windows of calibration, of 512 tokens")
    parser.add_argument("--calibration", type=Path, help="text file; built-in conversations if left out")
    parser.add_argument("--eval", type=Path, help="held-out text")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    given: Report | None = None
    print(f"{options.model}, groups of {options.group_size}\n{'':<14}{'MB':>10}{'perplexity':>12}{'change':>10}")
    with tempfile.TemporaryDirectory(prefix="millrace-quantization-") as folder:
        for name in options.rows:
            report = measure(name, options, Path(folder))
            is_nearest = name == "int4 nearest"
            if given is None and not is_nearest:
                given = report
                print(f"{'as given':<14}{report.bytes_before / 1e6:>10,.2f}{report.before:>12.4f}", flush=True)
            value = report.before if is_nearest else report.after
            # The integers, scales and zeros of plain rounding are not written here.
            size = None if is_nearest else report.bytes_after
            change = None if given is None else value / given.before - 1
            rows.append({"method": name, "bytes": size, "perplexity": value, "change": change})
            print(
                f"{name:<14}{'' if size is None else f'{size / 1e6:,.2f}':>10}{value:>12.4f}"
                f"{'' if change is None else f'{change:+.2%}':>10}",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
