"""The page's charts: figures in, SVG out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lrqat.report.facts import HeatMap
from lrqat.report.svg import ACCENT, HEAT, INK, LINE, MUTED, OTHER, drawing, inline

MOST_POINTS = 800  # of a curve: two a unit of its width
MOST_NUMBERED = 50  # layers whose heat map has its numbers written in it
BINS_SHOWN = 0.0005  # a histogram's axis ends where less than this share lies beyond


def running_mean(values: Sequence[float]) -> tuple[int, Any]:
    """(steps, the mean of each value and those before it over so many): a twentieth of all, four at least."""
    import numpy as np

    window = max(4, len(values) // 20)
    ends = np.arange(len(values)) + 1
    starts = np.maximum(0, ends - window)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return window, (sums[ends] - sums[starts]) / (ends - starts)


def curve(metrics: Sequence[Mapping[str, Any]], key: str, label: str) -> str:
    """A figure of metrics.jsonl against steps: every step faint, a running mean on top."""
    import numpy as np

    rows = [row for row in metrics if row.get(key) is not None]
    stride = -(-len(rows) // MOST_POINTS)
    steps = np.array([row["step"] for row in rows])
    values = [float(row[key]) for row in rows]
    window, smooth = running_mean(values)
    with drawing(220) as (figure, axes):
        each = "each step" if stride == 1 else f"one step in {stride}"
        axes.plot(steps[::stride], values[::stride], color=ACCENT, linewidth=1, alpha=0.4, label=each)
        axes.plot(steps[::stride], smooth[::stride], color=ACCENT, linewidth=2, label=f"mean of {window} steps")
        axes.legend()
        axes.set(xlabel="step")
        axes.set_title(label, loc="left", color=INK)
        axes.xaxis.get_major_locator().set_params(integer=True)
        return inline(figure, f"curve-{key}", f"{label} against steps")


def bars(values: Sequence[tuple[str, float, bool]], name: str, label: str, form: str) -> str:
    """Horizontal bars, each under its name: (name, value, whether it is this run)."""
    most = max(value for _, value, _ in values)
    with drawing(30 + 42 * len(values)) as (figure, axes):
        for row, (model, value, ours) in enumerate(values):
            axes.barh(row, value, height=0.34, color=ACCENT if ours else OTHER)
            axes.text(0, row - 0.28, _short(model), va="bottom", color=INK, weight="bold" if ours else "normal")
            axes.text(value + most * 0.015, row, format(value, form), va="center", color=INK)
        axes.set(xlim=(0, most * 1.2), ylim=(len(values) - 0.5, -0.75), xticks=[], yticks=[])
        axes.set_title(label, loc="left", color=INK)
        axes.grid(False)
        axes.spines[["left", "bottom"]].set_visible(False)
        return inline(figure, name, label)


def _short(name: str) -> str:
    """The end of a long name, which tells models apart."""
    return name if len(name) <= 52 else "…" + name[-51:]


def moved_map(found: HeatMap) -> str:
    """Share of moved codes, layers down, projections across; the number in each cell while there is room."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb

    shares = np.array([[np.nan if s is None else 100 * s for s in row] for row in found.shares])
    least, most = float(np.nanmin(shares)), float(np.nanmax(shares))
    numbered = len(found.rows) <= MOST_NUMBERED and len(found.columns) <= 8
    heat = to_rgb(HEAT)
    colours = LinearSegmentedColormap.from_list("heat", [(*heat, 0.04), (*heat, 1.0)])
    with drawing(64 + (18 if numbered else 7) * len(found.rows)) as (figure, axes):
        edges = (np.arange(len(found.columns) + 1) - 0.5, np.arange(len(found.rows) + 1) - 0.5)
        norm = Normalize(least, most if most > least else least + 1)
        mesh = axes.pcolormesh(*edges, np.ma.masked_invalid(shares), cmap=colours, norm=norm)
        mesh.set_edgecolor("none")
        if numbered:
            digits = 0 if most >= 10 else 1 if most >= 2 else 2
            for row, column in np.argwhere(np.isfinite(shares)):
                text = f"{shares[row, column]:.{digits}f}"
                axes.text(column, row, text, ha="center", va="center", color=INK, fontsize=10)
        step = 1 if numbered else -(-len(found.rows) // 24)
        axes.set_yticks(range(0, len(found.rows), step), found.rows[::step])
        axes.set_xticks(range(len(found.columns)), [c.removesuffix("_proj") for c in found.columns])
        axes.tick_params(length=0)
        axes.xaxis.tick_top()
        axes.invert_yaxis()
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("layer")
        if not numbered:
            bar = figure.colorbar(mesh, ax=axes, orientation="horizontal", aspect=40, shrink=0.7)
            bar.set_label("codes moved, %")
            bar.outline.set_visible(False)
        return inline(figure, "moved", "share of codes moved in %, by layer and projection")


def before_after(entry: Mapping[str, Any], name: str, label: str, unit: str) -> str:
    """Two histograms in one: before as an outline, after filled; as shares of all."""
    import numpy as np

    series = {when: np.array(entry[when], dtype=float) for when in ("before", "after")}
    low, high = entry.get("low", -0.5), entry.get("high", len(entry["after"]) - 0.5)
    edges = np.linspace(low, high, len(entry["after"]) + 1)
    shares = {when: 100 * counts / counts.sum() for when, counts in series.items()}
    with drawing(200) as (figure, axes):
        axes.stairs(shares["after"], edges, fill=True, color=ACCENT, alpha=0.55, label="after")
        axes.stairs(shares["before"], edges, color=OTHER, linewidth=1.4, label="before")
        if "low" in entry:
            axes.set_xlim(*_shown(edges, shares["before"] + shares["after"]))
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.16))
        axes.set(xlabel=unit, ylabel="%")
        axes.set_title(label, loc="left", color=INK, pad=18)
        return inline(figure, name, f"{label}, before and after training")


def changes(entry: Mapping[str, Any], name: str, label: str) -> str:
    """One histogram of relative changes, on an axis in %."""
    import numpy as np

    counts = np.array(entry["counts"], dtype=float)
    edges = 100 * np.linspace(entry["low"], entry["high"], len(counts) + 1)
    shares = 100 * counts / counts.sum()
    with drawing(200) as (figure, axes):
        axes.stairs(shares, edges, fill=True, color=ACCENT, alpha=0.55)
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_xlim(*_shown(edges, shares))
        axes.set(xlabel="change, %", ylabel="%")
        axes.set_title(label, loc="left", color=INK)
        return inline(figure, name, label)


def _shown(edges: Any, shares: Any) -> tuple[float, float]:
    """The part of an axis that holds all but the thinnest tails."""
    import numpy as np

    kept = np.flatnonzero(shares >= BINS_SHOWN * shares.sum())
    first, last = max(0, int(kept[0]) - 1), min(len(shares) - 1, int(kept[-1]) + 1)
    return float(edges[first]), float(edges[last + 1])


def intervals(rows: Sequence[tuple[str, float, float, float]], name: str, label: str, band: float | None) -> str:
    """Points with their intervals around 1: (name, ratio, low, high); `band` is shaded on both sides of 1."""
    with drawing(56 + 40 * len(rows)) as (figure, axes):
        if band is not None:
            axes.axvspan(1 - band, 1 + band, color=LINE, alpha=0.5, linewidth=0)
        axes.axvline(1, color=MUTED, linewidth=1)
        for row, (text, ratio, low, high) in enumerate(rows):
            axes.plot([low, high], [row, row], color=ACCENT, linewidth=2.5, solid_capstyle="round")
            axes.plot([ratio], [row], "o", color=ACCENT, markersize=6)
            axes.text(0, row - 0.24, _short(text), va="bottom", color=INK, transform=axes.get_yaxis_transform())
        reach = 1.15 * max([abs(value - 1) for _, _, low, high in rows for value in (low, high)] + [band or 0, 0.005])
        axes.set(xlim=(1 - reach, 1 + reach), ylim=(len(rows) - 0.5, -0.8), yticks=[], xlabel="ratio")
        axes.set_title(label, loc="left", color=INK)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="y", visible=False)
        return inline(figure, name, label)
