"""What a run says: ratios to each peer, the floor, how far first tokens agree, as tables, JSON and a plot."""

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from peers.engines import MILLRACE, PRECISIONS
from peers.measure import Load, Samples


def ratios(samples: Samples, peer: str, load: Load) -> list[float]:
    """Millrace's rate over the peer's in each round that gave both."""
    own = samples.answers.get(MILLRACE, {}).get(load.name, [])
    other = samples.answers.get(peer, {}).get(load.name, [])
    return [load.rate(a) / load.rate(b) for a, b in zip(own, other, strict=False) if a is not None and b is not None]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Minimum, median and maximum; None of nothing."""
    if not values:
        return None
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def rates(samples: Samples, label: str, load: Load) -> list[float]:
    return [load.rate(answer) for answer in samples.answers[label][load.name] if answer is not None]


def agreement(samples: Samples, peer: str) -> float | None:
    """The share of prompts whose first token is Millrace's at the same precision: below 1 by rounding, never far at
    fp32."""
    same = asked = 0
    for load, own in samples.answers.get(MILLRACE, {}).items():
        for a, b in zip(own, samples.answers[peer][load], strict=False):
            if a is not None and b is not None:
                firsts = list(zip(a["ids"], b["ids"], strict=True))
                asked += len(firsts)
                same += sum(x[0] == y[0] for x, y in firsts)
    return same / asked if asked else None


def weight_bytes(config: Mapping[str, Any], precision: str, group: int = 128) -> float:
    """Bytes of weights that one decode step must read: all matrices, the one that gives the logits included.

    int8 has a scale for each output (not counted); int4 a 2-byte scale and zero for each group, and 8-bit logits. It is
    Millrace's form that is counted: blocks of other engines may take some percent more or less.
    """
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * head * (heads + config.get("num_key_value_heads", heads))
    layers = config["num_hidden_layers"] * (attention + 3 * hidden * inner)
    logits = config["vocab_size"] * hidden
    if precision == "int4":
        return layers * (0.5 + 4 / group) + logits
    return (layers + logits) * {"fp32": 4, "bf16": 2, "int8": 1}[precision]


def floor_rate(config: Mapping[str, Any], precision: str, load: Load, bandwidth: float) -> float:
    """Decoded tokens per second if a step did nothing but read the weights once, at `bandwidth` bytes/s."""
    return load.sequences * bandwidth / weight_bytes(config, precision)


def floor_shares(
    config: Mapping[str, Any], precision: str, samples: Samples, label: str, load: Load
) -> dict[str, float] | None:
    """The spread of an engine's rate over the floor at the machine's rate of the same round."""
    rounds = zip(samples.answers[label][load.name], samples.read_rates[load.name], strict=False)
    return spread([load.rate(answer) / floor_rate(config, precision, load, rate) for answer, rate in rounds if answer])


def ratio_table(shape: str, parts: Mapping[str, Samples], loads: Sequence[Load]) -> Table:
    table = Table(title=f"{shape}: Millrace's tokens/s over the peer's, median (min-max) of rounds")
    for column in ("", "peer", *(load.name for load in loads), "same first token"):
        table.add_column(column, justify="left" if column in ("", "peer") else "right")
    for precision, samples in parts.items():
        for peer in (label for label in samples.answers if label != MILLRACE):
            cells = [_cell(spread(ratios(samples, peer, load))) for load in loads]
            agreed = agreement(samples, peer)
            table.add_row(precision, peer, *cells, "-" if agreed is None else f"{agreed:.0%}")
    return table


def floor_table(shape: str, config: Mapping[str, Any], parts: Mapping[str, Samples], loads: Sequence[Load]) -> Table:
    decodes = [load for load in loads if load.new_tokens > 1]
    table = Table(title=f"{shape}: share of the floor, the weights read once a step at the machine's rate")
    for column in ("", "engine", *(load.name for load in decodes)):
        table.add_column(column, justify="left" if column in ("", "engine") else "right")
    for precision, samples in parts.items():
        for label in samples.answers:
            shares = [floor_shares(config, precision, samples, label, load) for load in decodes]
            table.add_row(precision, label, *map(_percent, shares))
    return table


def _cell(found: Mapping[str, float] | None) -> str:
    return "-" if found is None else f"{found['median']:.2f} ({found['min']:.2f}-{found['max']:.2f})"


def _percent(found: Mapping[str, float] | None) -> str:
    return "-" if found is None else f"{found['median']:.0%}"


def summary(config: Mapping[str, Any], parts: Mapping[str, Samples], loads: Sequence[Load]) -> Any:
    """For the JSON of a shape: rates and ratios of every cell, shares of the floor, versions, what failed."""
    return {
        precision: {
            "rates": {label: {load.name: rates(samples, label, load) for load in loads} for label in samples.answers},
            "whole": {
                label: {
                    name: [a and {"seconds": a["seconds"], "first_tokens": a["started"]} for a in answers]
                    for name, answers in cells.items()
                }
                for label, cells in samples.answers.items()
            },
            "ratios": {
                label: {load.name: spread(ratios(samples, label, load)) for load in loads}
                for label in samples.answers
                if label != MILLRACE
            },
            "read_rates": samples.read_rates,
            "floor_shares": {
                label: {
                    load.name: floor_shares(config, precision, samples, label, load)
                    for load in loads
                    if load.new_tokens > 1
                }
                for label in samples.answers
            },
            "same_first_token": {label: agreement(samples, label) for label in samples.answers if label != MILLRACE},
            "versions": samples.versions,
            "failed": samples.failed,
        }
        for precision, samples in parts.items()
    }


def added(earlier: Mapping[str, Any], result: Mapping[str, Any], built: Collection[str]) -> dict[str, Any]:
    """The JSON of an earlier run with the precisions and the HTTP part of a later one in it, or in their places.

    A precision of which the later run measured nothing does not replace one; `built` are the environments it had.
    """
    shapes = {shape: dict(parts) for shape, parts in earlier["shapes"].items()}
    for shape, parts in result["shapes"].items():
        measured = {
            precision: part
            for precision, part in parts.items()
            if any(values for cells in part["rates"].values() for values in cells.values())
        }
        together = {**shapes.get(shape, {}), **measured}
        shapes[shape] = {precision: together[precision] for precision in PRECISIONS if precision in together}
    not_built = {name: reason for name, reason in earlier["not_built"].items() if name not in built}
    return {
        **result,
        "not_built": {**not_built, **result["not_built"]},
        "shapes": shapes,
        "http": {**earlier["http"], **result["http"]},
    }


def markdown(result: Mapping[str, Any]) -> Iterator[str]:
    """The tables of a run's JSON in Markdown, line by line: ratios and shares of the floor of each shape, and HTTP."""
    loads = result["loads"]
    decodes = loads[:-1]
    for shape, parts in result["shapes"].items():
        yield from _head(f"{shape}: Millrace's tokens/s over the peer's", "", "peer", *loads)
        for precision, part in parts.items():
            for peer, cells in part["ratios"].items():
                yield _row(precision, peer, *(_cell(cells[load]) for load in loads))
        yield from _head(f"{shape}: share of the floor", "", "engine", *decodes)
        for precision, part in parts.items():
            for engine, cells in part["floor_shares"].items():
                yield _row(precision, engine, *(_percent(cells[load]) for load in decodes))
    for shape, part in result["http"].items():
        yield from _head(f"{shape}: {part['load']} over HTTP", "", "ratio")
        for name, found in part["ratios"].items():
            yield _row(name, _cell(found))


def _head(title: str, *cells: str) -> Iterator[str]:
    yield from ("", f"**{title}**", "", _row(*cells), "|" + "---|" * len(cells))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Bars of median ratios with whiskers from minimum to maximum: a row for each shape, a panel for each load.

    `result` is the JSON of a run. Needs matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = result["shapes"]
    loads = result["loads"]
    colors = {"fp32": "#4c72b0", "bf16": "#55a868", "int8": "#c44e52", "int4": "#8172b3"}
    tallest = max(1, *(sum(len(part["ratios"]) for part in parts.values()) for parts in shapes.values()))
    figure, grid = pyplot.subplots(
        len(shapes), len(loads), figsize=(3.2 * len(loads) + 1.5, len(shapes) * (0.32 * tallest + 1.1)),
        sharey="row", squeeze=False,
    )  # fmt: skip
    for row, (shape, parts) in zip(grid, shapes.items(), strict=True):
        for axis, load in zip(row, loads, strict=True):
            labels = []
            for precision, part in parts.items():
                for peer, cells in part["ratios"].items():
                    found, place = cells[load], len(labels)
                    labels.append(peer)
                    if found is None:
                        continue
                    axis.barh(place, found["median"], color=colors[precision], height=0.7)
                    axis.plot([found["min"], found["max"]], [place, place], color="black", linewidth=1)
                    axis.annotate(f"{found['median']:.2f}", (0, place), (3, 0), textcoords="offset points",
                                  va="center", color="white", fontsize=8)  # fmt: skip
            axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
            axis.set_yticks(range(len(labels)), labels, fontsize=8)
            axis.set_title(f"{shape}, {load}", fontsize=9)
            axis.tick_params(axis="x", labelsize=8)
        row[0].invert_yaxis()
    figure.suptitle(f"Millrace's tokens/s over each peer's, {result['threads']} threads", fontsize=10)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
