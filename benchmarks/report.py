"""The report: one HTML file that needs nothing beside it, from the rows, the runs' metrics and the sample grids."""

from __future__ import annotations

import base64
import datetime
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import harness, plot
from .run import TIE, summary, verdicts


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``; a last line cut short by a kill is left out."""
    lines = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def race(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """What the runs say: steps a second of each, and when each reached the level that all of them reached."""
    words = []
    best: dict[str, float] = {}
    for name, lines in runs.items():
        losses = [loss for line in lines if (loss := plot.loss_of(line, "valid")) is not None]
        if not losses:
            continue
        best[name] = min(losses)
        last = lines[-1]
        seconds = float(last.get("seconds", last.get("wall", 0)))
        if seconds:
            pace = f"{int(last['step'])} steps in {seconds:.1f} s ({last['step'] / seconds:.0f} a second)"
            words.append(f"{name}: {pace}, best validation {best[name]:.4f}")
    if len(best) > 1:
        level = max(best.values())
        for name in best:
            hit = next(line for line in runs[name] if (v := plot.loss_of(line, "valid")) is not None and v <= level)
            words.append(f"{name} reached {level:.4f} after {float(hit.get('seconds', hit.get('wall', 0))):.1f} s")
    return words


SETTING_NAMES = {
    "default": "glibc's malloc (default)",
    "no-mmap": "malloc keeps pages (no-mmap)",
    "avx2": "without AVX-512 (avx2)",
}


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×" if value < 10 else f"{value:.0f}×"


def verdict_kind(ratio: float) -> str:
    return "loss" if ratio < 1 / TIE else "win" if ratio > TIE else "tie"


def settings_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The settings there are rows of, the default first of all."""
    there = {r["setting"] for r in rows}
    return [name for name in harness.SETTINGS if name in there or name == "default"]


def contests(rows: Sequence[dict[str, Any]], op: str) -> list[dict[str, Any]]:
    """One line for each contest of an op: the default setting first, the others' ratios beside it."""
    found = [v for v in verdicts(rows) if v["row"]["op"] == op]
    others = [
        {plot.name_of(v["row"]): v for v in found if v["row"]["setting"] == setting}
        for setting in settings_of(rows)[1:]
    ]
    lines = []
    for v in (v for v in found if v["row"]["setting"] == "default"):
        row = v["row"]
        same = [
            r
            for r in rows
            if all(str(r[k]) == str(row[k]) for k in harness.KEY if k != "provider") and r["status"] == "ok"
        ]
        rival_peaks = [
            float(r["peak_mib"]) for r in same if r.get("peak_mib") and not r["provider"].startswith("pyflowgen")
        ]
        lines.append(
            {
                "name": plot.name_of(row),
                "ms": f"{v['ms']:.3g}",
                "cells": [
                    {"text": _ratio(w[f"{kind}_ratio"]), "who": w[kind], "kind": verdict_kind(w[f"{kind}_ratio"])}
                    if w is not None and w[kind]
                    else {"text": "", "who": "", "kind": ""}
                    for w in (v, *(other.get(plot.name_of(row)) for other in others))
                    for kind in ("eager", "compiled")
                ],
                "vs": _ratio(v.get("vs_ratio")),
                "peak": row.get("peak_mib") or "",
                "least": row.get("least_mib") or "",
                "rival_peak": f"{min(rival_peaks):.4g}" if rival_peaks else "",
                "floor": f"{100 * v['floor_share']:.0f} %" if "floor_share" in v else "",
            }
        )
    return lines


def headlines(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """One tile an op: the middle ratio against the fastest rivals of each kind."""
    tiles = []
    found = verdicts(rows)
    for op in dict.fromkeys(v["row"]["op"] for v in found):
        for kind in ("eager", "compiled"):
            ratios = sorted(v[f"{kind}_ratio"] for v in found if v["row"]["op"] == op and v[kind])
            if ratios:
                lost = sum(r < 1 / TIE for r in ratios)
                detail = f"{_ratio(ratios[0])} to {_ratio(ratios[-1])} over {len(ratios)} rows" + (
                    f", {lost} of them slower" if lost else ""
                )
                tiles.append(
                    {
                        "op": op,
                        "value": _ratio(statistics.median(ratios)),
                        "kind": f"the fastest {kind} rival",
                        "detail": detail,
                    }
                )
    return tiles


def allocator_words(rows: Sequence[dict[str, Any]]) -> str:
    gains = plot.allocator_gains(rows)
    eager = sorted(
        g for name, values in gains.items() if name != "pyflowgen" and not name.endswith("compiled") for g in values
    )
    words = []
    for label, values in (("eager code", eager), ("pyflowgen", sorted(gains.get("pyflowgen", [])))):
        if values:
            words.append(
                f"{label} gains {values[len(values) // 2]:.2f}× in the middle ({values[0]:.2f}× to {values[-1]:.2f}×)"
            )
    return "; ".join(words)


def _inline(picture: Path) -> str:
    return base64.b64encode(picture.read_bytes()).decode()


def write_report(
    path: Path,
    rows: Sequence[dict[str, Any]],
    *,
    machine: str,
    measured: Mapping[str, Any] | None = None,
    refused: Sequence[str] = (),
    runs: Mapping[str, Path] | None = None,
    samples: Sequence[Path] = (),
    gallery: Path | None = None,
) -> None:
    """Write the report. ``runs`` maps a name to a folder with ``metrics.jsonl``; ``samples``, ``gallery`` are PNGs."""
    try:
        from jinja2 import Environment, FileSystemLoader
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError(
            f"the HTML report needs jinja2 and matplotlib: pip install 'pyflowgen[bench]' ({error})"
        ) from error
    lines = {name: read_metrics(folder) for name, folder in (runs or {}).items()}
    lines = {name: found for name, found in lines.items() if found}
    ops = []
    for op in dict.fromkeys(str(r["op"]) for r in rows):
        mine = [r for r in rows if r["op"] == op]
        ops.append(
            {
                "name": op,
                "contests": contests(mine, op),
                "settings": [SETTING_NAMES[name] for name in settings_of(mine)],
                "has_vs": any("vs" in v for v in verdicts(mine)),
                "speedups": Markup(plot.speedups(rows, op)),
                "floors": Markup(plot.floors(rows, op)),
                "rows": sorted(
                    mine,
                    key=lambda r: (
                        r["shape"],
                        r["dtype"],
                        r["mode"],
                        r["setting"],
                        float(r.get("median_ms") or "inf"),
                    ),
                ),
            }
        )
    bandwidth = [
        {
            "size": f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size // 2**10} KiB",
            "rate": f"{size / seconds / 1e9:.1f} GB/s",
        }
        for size, seconds in (measured or {}).get("copy", [])
        if size in (2**14, 2**17, 2**20, 2**23, 2**26, 2**28)
    ]
    environment = Environment(
        loader=FileSystemLoader(harness.HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        machine=machine,
        threads=sorted({str(r["threads"]) for r in rows}),
        torch=sorted({str(r["torch"]) for r in rows}),
        commit=sorted({str(r["commit"]) for r in rows}),
        date=datetime.date.today().isoformat(),
        tiles=headlines(rows),
        summary=summary(rows),
        refused=refused
        or sorted({f"{r['op']} {r['shape']}: {r['provider']} {r['status']}" for r in rows if r["status"] != "ok"}),
        ops=ops,
        allocators=Markup(plot.allocators(rows)),
        allocator_words=allocator_words(rows),
        losses=Markup(plot.losses(lines)) if lines else "",
        race=race(lines),
        samples=[{"name": p.stem, "data": _inline(p)} for p in samples],
        gallery=_inline(gallery) if gallery else "",
        bandwidth=bandwidth,
        gemm={k: f"{v / 1e9:.0f} GFLOP/s" for k, v in (measured or {}).get("gemm", {}).items()},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
