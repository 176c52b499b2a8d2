"""Writes the README's table from the rows: ``python -m benchmarks.readme_table``. The tests hold the two together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import harness
from .run import TIE, verdicts

README = harness.HERE.parent / "README.md"
BLOCK = re.compile(r"(?<=<!-- rows -->\n).*?(?=<!-- end of rows -->)", re.S)
# What the first screen shows of each op; all rows are in results.csv and in the report.
SHOWN = {
    "accelerate": ("1024x64 nflows RealNVP", "1024x64 nflows NSF", "1024x64 zuko NSF by coupling"),
    "affine_coupling": (
        "8192x64 exp halves", "8192x64 tanh halves", "8192x64 exp interleaved", "32x48x32x32 exp halves",
        "64x2 exp halves",
    ),
    "linear": ("16x512 -> 2048", "1024x128 -> 128"),
    "rational_quadratic_spline": ("8192x32 8 bins softmax", "8192x32 8 bins softclip"),
    "polynomial_spline": ("8192x32 8 bins cubic",),
    "slogdet": ("8192x8x8",),
    "invertible_linear": ("16x12x16x16",),
    "glow": ("16x12x16x16 without net", "16x12x16x16 width 128"),
    "realnvp": ("1024x64 8 couplings 2x128",),
    "nsf": ("1024x64 4 couplings 2x128 8 bins", "1024x2 4 couplings 2x128 8 bins"),
    "lstm": ("step 512 -> 512", "step 512 -> 512 bf16"),
    "gru": ("step 512 -> 512", "step 512 -> 512 int8"),
    "trn": ("step 1024 -> 512 int8", "4x16x128 -> 64"),
    "idu": ("1x1x3072 -> 512 stream", "16x16x128 -> 64"),
}  # fmt: skip
MODES = ("forward", "forward+backward", "step")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one table for each machine, ratios against the fastest rival of each kind, and all losses in words."""
    parts = []
    for machine in dict.fromkeys(row["machine"] for row in rows):
        here = [dict(row) for row in rows if row["machine"] == machine]
        found = [v for v in verdicts(here) if v["row"]["setting"] == "default"]
        lines = [
            "| op | shape | mode | pyflowgen | fastest eager | fastest compiled |",
            "|---|---|---|---:|---:|---:|",
        ]
        for v in found:
            row = v["row"]
            if row["shape"] in SHOWN.get(row["op"], ()) and row["mode"] in MODES and row["dtype"] == "float32":
                rivals = [_rival(v, kind) for kind in ("eager", "compiled")]
                lines.append(
                    f"| {row['op']} | {row['shape']} | {row['mode']} | {v['ms']:.3g} ms | {' | '.join(rivals)} |"
                )
        threads = sorted({row["threads"] for row in here}, key=int)
        torch = sorted({row["torch"] for row in here})
        lines += [
            "",
            f"{machine}; {' or '.join(threads)} threads, float32, torch {', '.join(torch)}, glibc's default allocator. "
            "Each ratio is rival's time over ours, from one interleaved run: above 1 we are faster.",
            _losses(found),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n" if parts else "No rows yet: `make bench` measures them.\n"


def _rival(verdict: Mapping[str, Any], kind: str) -> str:
    return f"{verdict[f'{kind}_ratio']:.2f}× ({verdict[kind]})" if verdict[kind] else "–"


def _losses(found: Sequence[Mapping[str, Any]]) -> str:
    names = [
        f"{' '.join(v['row'][k] for k in ('op', 'shape', 'dtype', 'mode'))} ({v[f'{kind}_ratio']:.2f}× {v[kind]})"
        for v in found
        for kind in ("eager", "compiled")
        if v[kind] and v[f"{kind}_ratio"] < 1 / TIE
    ]
    if not names:
        return f"Of all {len(found)} rows measured so none is slower than its fastest rival."
    summary = f"Slower than a rival, of all {len(found)} rows measured so:"
    return f"\n<details><summary>{summary} {len(names)}</summary>\n\n" + "; ".join(names) + ".\n\n</details>"


def main(readme: Path = README) -> None:
    text = readme.read_text(encoding="utf-8")
    rows = harness.read_rows(harness.HERE / "results.csv")
    readme.write_text(BLOCK.sub(lambda _: table(rows), text), encoding="utf-8")


if __name__ == "__main__":
    main()
