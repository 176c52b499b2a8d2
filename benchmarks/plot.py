"""Figures, from the rows and the runs' metrics alone. Each function returns one SVG as text, to stand inline in a page.

Text, axes and grid take the page's text colour (``currentColor``), so a figure is readable on light and on dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .harness import KEY
from .run import is_compiled, verdicts

INK = "#010203"  # stands for the page's text colour, replaced on the way out
OURS, EAGER, COMPILED = "#e8590c", "#4c86c6", "#3a9d6e"
COLOURS = {
    "pyflowgen": OURS, "eager": EAGER, "compiled": COMPILED, "mask-free": "#8aa7c9", "nflows": "#9c6ade",
    "normflows": "#d0679d", "zuko": "#b8912f", "FrEIA": "#5f9ea0", "torchflows": "#a0785a",
}  # fmt: skip


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "text.color": INK, "xtick.color": INK,
        "ytick.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "axes.spines.top": False,
        "axes.spines.right": False, "axes.linewidth": 0.6, "legend.frameon": False,
    }  # fmt: skip
    matplotlib.rcParams.update(style)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, name: str) -> str:
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(
        {"svg.hashsalt": name}
    ):  # ids must differ between the figures of one page, not between runs
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S).replace(INK, "currentColor")
    text = re.sub(r"font: ([^;\"]*)'[^;\"]*", r"font: \1system-ui, sans-serif", text)
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text)
    if size:  # scale with the page, up to the drawn size
        text = text.replace(
            size.group(0),
            f'style="width:100%;max-width:{float(size.group(1)) * 4 / 3:.0f}px;height:auto" role="img"',
            1,
        )
    return text


def _ratio_axis(axes: Any, values: Sequence[float], label: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min([*values, 0.9]), max([*values, 1.1])
    axes.set_xscale("log")
    axes.set_xlim(low / 1.15, high * 1.15)
    ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low / 1.15 <= t <= high * 1.15]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}×"))
    axes.set_xlabel(label)


def _labels(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def name_of(row: Mapping[str, Any]) -> str:
    dtype = "" if row["dtype"] == "float32" else f" {row['dtype']}"
    return f"{row['shape']}{dtype}, {row['mode']}"


MARKED = ("default", "no-mmap")  # the settings that the figure shows


def speedups(rows: Sequence[dict[str, Any]], op: str) -> str:
    """How many times faster than the fastest eager and the fastest compiled rival, in each contest of an op."""
    found = [v for v in verdicts(rows) if v["row"]["op"] == op]
    labels = list(dict.fromkeys(name_of(v["row"]) for v in found))
    if not labels:
        return ""
    figure, axes = _figure(8.2, 1.1 + 0.26 * len(labels))
    axes.axvline(1, color=INK, linewidth=1)
    drawn = []
    for v in found:
        y = labels.index(name_of(v["row"]))
        if v["row"]["setting"] not in MARKED:
            continue
        solid = v["row"]["setting"] == "default"
        for kind, colour, marker, shift in (("eager", EAGER, "o", -0.14), ("compiled", COMPILED, "D", 0.14)):
            if v[kind]:
                drawn.append(v[f"{kind}_ratio"])
                face = colour if solid else "none"
                axes.plot([drawn[-1]], [y + shift], marker, color=colour, markerfacecolor=face, markersize=5)
    _labels(axes, labels)
    _ratio_axis(axes, drawn, "times faster than the fastest rival (right of 1×: pyflowgen is faster)")
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], marker=marker, linestyle="", color=colour, markerfacecolor=colour if full else "none", label=label
        )
        for marker, colour, full, label in (
            ("o", EAGER, True, "eager"),
            ("D", COMPILED, True, "compiled"),
            ("o", INK, False, "hollow: malloc keeps its pages"),
        )
        if full or any(v["row"]["setting"] == "no-mmap" for v in found)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, handletextpad=0.2)
    return _svg(figure, f"speedups-{op}")


def floors(rows: Sequence[dict[str, Any]], op: str) -> str:
    """Every provider's time over the floor of its contest (default setting)."""
    timed = [
        r for r in rows if r["op"] == op and r["status"] == "ok" and r.get("floor_ms") and r["setting"] == "default"
    ]
    labels = list(dict.fromkeys(name_of(r) for r in timed))
    if not labels:
        return ""
    figure, axes = _figure(8.2, 1.1 + 0.26 * len(labels))
    axes.axvline(1, color=INK, linewidth=1)
    times, seen = [], {}
    for row in sorted(timed, key=lambda r: r["provider"] == "pyflowgen"):
        over = [float(row[k]) / float(row["floor_ms"]) for k in ("p20_ms", "median_ms", "p80_ms")]
        times.append(over[1])
        base = row["provider"].removesuffix(" compiled")
        colour = COLOURS.get(base, INK)
        y, ours = labels.index(name_of(row)), row["provider"] == "pyflowgen"
        axes.plot([over[0], over[2]], [y, y], color=colour, linewidth=1.2, alpha=0.6)
        shape = "D" if is_compiled(row) else "o"
        (seen[row["provider"]],) = axes.plot(
            [over[1]], [y], shape, color=colour, markersize=7.5 if ours else 4.5, label=row["provider"], linestyle=""
        )
    _labels(axes, labels)
    _ratio_axis(axes, times, "time over the floor (1×: the same bytes copied, the same products at the best GEMM rate)")
    order = sorted(seen, key=lambda name: (name != "pyflowgen", list(COLOURS).index(name) if name in COLOURS else 99))
    figure.legend(
        handles=[seen[name] for name in order], loc="outside upper left", ncols=6, handletextpad=0.1, columnspacing=1
    )
    return _svg(figure, f"floors-{op}")


def allocator_gains(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Provider -> time under glibc's default over time with pages kept, one entry a contest."""
    pairs: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if row["status"] == "ok" and row.get("median_ms"):
            pairs.setdefault(tuple(str(row[k]) for k in KEY if k != "setting"), {})[row["setting"]] = float(
                row["median_ms"]
            )
    gains: dict[str, list[float]] = {}
    for key, times in pairs.items():
        if {"default", "no-mmap"} <= set(times):
            gains.setdefault(key[KEY.index("provider")], []).append(times["default"] / times["no-mmap"])
    return gains


def allocators(rows: Sequence[dict[str, Any]]) -> str:
    """What keeping malloc's pages alone gains each provider: one point a contest, a bar at the median."""
    gains = allocator_gains(rows)
    if not gains:
        return ""
    labels = sorted(
        gains, key=lambda name: (name != "pyflowgen", list(COLOURS).index(name) if name in COLOURS else 99, name)
    )
    figure, axes = _figure(8.2, 0.9 + 0.26 * len(labels))
    axes.axvline(1, color=INK, linewidth=1)
    for y, name in enumerate(labels):
        values = sorted(gains[name])
        colour = COLOURS.get(name.removesuffix(" compiled"), INK)
        axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.55, markersize=4.5)
        axes.plot([values[len(values) // 2]] * 2, [y - 0.3, y + 0.3], color=colour, linewidth=2.2)
    _labels(axes, labels)
    _ratio_axis(
        axes,
        [v for values in gains.values() for v in values],
        "time with glibc's default over time with malloc keeping its pages",
    )
    return _svg(figure, "allocators")


def losses(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Loss against wall time of training runs: validation solid, training thin."""
    figure, axes = _figure(8.2, 3.4)
    unit = "bits/dim" if all("valid_bits_per_dim" in m for lines in runs.values() for m in lines) else "nats"
    palette, values = [OURS, EAGER, COMPILED, "#9c6ade", "#d0679d"], []
    for i, (name, lines) in enumerate(runs.items()):
        colour = palette[i % len(palette)]
        for kind, width, alpha in (("valid", 1.8, 1.0), ("train", 0.9, 0.55)):
            points = [(_seconds(m), loss) for m in lines if (loss := loss_of(m, kind)) is not None]
            if points:
                label = name if kind == "valid" else None
                axes.plot(
                    [t for t, _ in points],
                    [v for _, v in points],
                    color=colour,
                    linewidth=width,
                    alpha=alpha,
                    label=label,
                )
                values += [v for _, v in points]
    values.sort()
    if len(values) > 8:  # the first epochs fall from far above, where nothing is to be seen
        spread = values[len(values) * 9 // 10] - values[0]
        axes.set_ylim(values[0] - 0.05 * spread, values[0] + 1.3 * spread)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel(f"{unit} (validation; thin: training)")
    axes.legend(loc="upper right")
    return _svg(figure, "losses")


def _seconds(line: Mapping[str, Any]) -> float:
    return float(line.get("seconds", line.get("wall", 0.0)))


def loss_of(line: Mapping[str, Any], kind: str) -> float | None:
    """The loss of one line of metrics: bits/dim where the data are discrete, else minus the log-likelihood in nats."""
    for name, sign in ((f"{kind}_bits_per_dim", 1), (f"{kind}_nats", -1), (kind, 1)):
        if line.get(name) is not None:
            return sign * float(line[name])
    return None


def write_figures(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """The figures as SVG files of their own, for a document."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"allocators": allocators(rows)}
    for op in dict.fromkeys(str(r["op"]) for r in rows):
        figures |= {f"{op}-speedups": speedups(rows, op), f"{op}-floors": floors(rows, op)}
    written = []
    for name, svg in figures.items():
        if svg:
            written.append(folder / f"{name}.svg")
            written[-1].write_text(svg.replace("currentColor", "#777"), encoding="utf-8")
    return written
