"""Plots of a report, as PNG. Ours in one colour, every peer in one of its own, the same in all plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from benchmarks.compare.plan import VARIANTS
from benchmarks.compare.stats import LATENCIES, Row, Table

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = {"ferryline": "#1b6ca8", "kafka": "#444444", "rabbitmq": "#e6772e", "nats": "#34a07b", "redis": "#b3342d"}
SYSTEM = {one.name: one.system for one in VARIANTS}
PANELS_PER_ROW = 3


def plot_all(found: Table, folder: Path, name: str) -> list[Path]:
    """Throughput, latency and cost, each in a file ``name``-*.png. Returns the files."""
    rates = {key: rows for key, rows in found.items() if key[1] not in LATENCIES}
    times = {key: rows for key, rows in found.items() if key[1] in LATENCIES}
    made = []
    for what, tables, draw in (
        ("throughput", rates, _rates),
        ("latency", times, _latencies),
        ("cost", {key: rows for key, rows in rates.items() if key[0] in ("100B", "1KiB", "16KiB")}, _costs),
    ):
        if tables:
            path = folder / f"{name}-{what}.png"
            _panels(tables, draw, path)
            made.append(path)
    return made


def _panels(tables: Table, draw: Any, path: Path) -> None:
    columns = min(PANELS_PER_ROW, len(tables))
    lines = -(-len(tables) // columns)
    tallest = max(len(rows) for rows in tables.values())
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(6.2 * columns, lines * (1.1 + 0.24 * tallest)), squeeze=False
    )
    panels = list(axes.flat)
    for (key, rows), axis in zip(tables.items(), panels, strict=False):
        draw(axis, rows)
        axis.set_title(key[0] if key[0] == key[1] else f"{key[0]}: {key[1]}", fontsize=10)
        axis.tick_params(labelsize=7)
        axis.grid(axis="x", alpha=0.3)
    for axis in panels[len(tables) :]:
        axis.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _names(axis: Any, rows: list[Row]) -> tuple[range, list[str]]:
    axis.set_yticks(range(len(rows)), [one.variant for one in rows])
    return range(len(rows)), [COLOURS[SYSTEM.get(one.variant, "ferryline")] for one in rows]


def _rates(axis: Any, rows: dict[str, Row]) -> None:
    """Medians, with the range over the rounds."""
    order = sorted(rows.values(), key=lambda one: one.rate.median)
    places, colours = _names(axis, order)
    medians = [one.rate.median for one in order]
    below = [one.rate.median - one.rate.lowest for one in order]
    above = [one.rate.highest - one.rate.median for one in order]
    axis.barh(places, medians, color=colours, xerr=(below, above), error_kw={"lw": 0.8})
    axis.set_xlabel("records/s", fontsize=8)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")


def _latencies(axis: Any, rows: dict[str, Row]) -> None:
    """p50 as a bar, p99 as a mark, both logarithmic."""
    order = sorted(rows.values(), key=lambda one: -one.latency_ms["p50"].median)
    places, colours = _names(axis, order)
    axis.barh(places, [one.latency_ms["p50"].median for one in order], color=colours, label="p50")
    axis.plot([one.latency_ms["p99"].median for one in order], places, "k|", markersize=9, label="p99")
    if all("p999" in one.latency_ms for one in order):
        axis.plot([one.latency_ms["p999"].median for one in order], places, "kx", markersize=4, label="p99.9")
    axis.set_xscale("log")
    axis.set_xlabel("ms", fontsize=8)
    axis.legend(fontsize=7)


def _costs(axis: Any, rows: dict[str, Row]) -> None:
    """Processor seconds per million records: servers full, the client pale."""
    order = sorted(rows.values(), key=lambda one: -one.total_us)
    places, colours = _names(axis, order)
    servers = [one.server_us.median for one in order]
    axis.barh(places, servers, color=colours, label="servers")
    axis.barh(places, [one.client_us.median for one in order], left=servers, color=colours, alpha=0.45, label="client")
    axis.set_xlabel("processor s per million records", fontsize=8)
    axis.legend(fontsize=7)
