"""The benchmark harness on toy ops: gate, crashes, keyed rows, report. Nothing here asserts a speed."""

from __future__ import annotations

import base64
import importlib
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

# Installed, the folder is pyflowgen.benchmarks; from a plain checkout it is benchmarks.
ROOT = Path(__file__).resolve().parents[1]
try:
    harness = importlib.import_module("pyflowgen.benchmarks.harness")
except ImportError:
    sys.path.insert(0, str(ROOT))
    harness = importlib.import_module("benchmarks.harness")
PACKAGE = harness.__name__.rpartition(".")[0]
run = importlib.import_module(f"{PACKAGE}.run")
plot = importlib.import_module(f"{PACKAGE}.plot")
report = importlib.import_module(f"{PACKAGE}.report")

TOY = '''
import os, torch
from .harness import Case, normal

def reference(x, s):
    return x * torch.exp(s), s.sum(-1)

def wrong(x, s):
    return x * torch.exp(s) * 1.01, s.sum(-1)

def wrong_gradient(x, s):
    y = (x * torch.exp(s)).detach()
    return y + x - x.detach(), s.sum(-1)

def dies(x, s):
    os.abort()

def dies_later(x, s):
    dies_later.calls = getattr(dies_later, "calls", 0) + 1
    if dies_later.calls > 1:
        os.abort()
    return reference(x, s)

def fails(x, s):
    raise ValueError("no such thing")

def as_is(fn):
    return lambda device, dtype: fn

def cases(device):
    named = {"eager": reference, "pyflowgen": lambda x, s: (x * s.exp(), s.sum(-1)), "wrong": wrong,
             "gradient": wrong_gradient, "fails": fails}
    deadly = {"eager": reference, "dies": dies, "dies later": dies_later, "pyflowgen": reference}
    return [Case("toy", "64x32", torch.float32, normal((64, 32), (64, 32)), {k: as_is(f) for k, f in named.items()},
                 modes=("forward", "backward", "forward+backward"), compile=(), quick=True),
            Case("toy", "deadly", torch.float32, normal((8, 2), (8, 2)), {k: as_is(f) for k, f in deadly.items()},
                 compile=()),
            Case("toy", "16x4 slow", torch.float64, normal((16, 4), (16, 4)), {"eager": as_is(reference)}, compile=())]
'''  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """Rows of one quick run of the toy op, every setting."""
    path = tmp_path_factory.mktemp("bench") / "bench_toy.py"
    path.write_text(TOY)
    result: tuple[list[dict[str, Any]], list[str], dict[str, Any]] = run.run(
        {"toy": path}, run.Plan.fast(rounds=2, seconds=0.002, threads=1, settings=tuple(harness.SETTINGS))
    )
    return result


def status(rows: list[dict[str, Any]], provider: str) -> set[str]:
    return {str(row["status"]).partition(":")[0] for row in rows if row["provider"] == provider}


def test_a_right_provider_is_timed_under_every_setting_in_each_mode(toy: Any) -> None:
    rows = [row for row in toy[0] if row["provider"] == "pyflowgen"]
    assert {(row["mode"], row["setting"]) for row in rows} == {
        (mode, setting) for mode in ("forward", "forward+backward") for setting in harness.SETTINGS
    }
    for row in rows:
        assert row["status"] == "ok" and row["shape"] == "64x32" and row["threads"] == 1
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["floor_ms"]) > 0


def test_the_gate_refuses_wrong_values_and_wrong_gradients(toy: Any) -> None:
    rows, refused, _ = toy
    assert status(rows, "wrong") == {"wrong"} and status(rows, "gradient") == {"wrong"}
    assert not any(row.get("median_ms") for row in rows if row["provider"] in ("wrong", "gradient"))
    assert any("wrong: tensor 0 is off by" in line for line in refused)


def test_an_exception_is_a_status(toy: Any) -> None:
    assert status(toy[0], "fails") == {"failed"} and any("ValueError: no such thing" in line for line in toy[1])


def test_a_crash_stays_its_providers_own(tmp_path: Path) -> None:
    path = tmp_path / "bench_toy.py"
    path.write_text(TOY)
    plan = run.Plan(rounds=2, seconds=0.001, threads=1, settings=("default",))
    rows, _, _ = run.run({"toy": path}, plan, only="deadly")
    assert status(rows, "dies") == {"crashed"}
    assert status(rows, "dies later") == {"crashed"}  # after it passed the gate, amid the others' rounds
    assert status(rows, "eager") == {"ok"} and status(rows, "pyflowgen") == {"ok"}


def test_when_the_time_is_over_an_op_keeps_its_first_contest(tmp_path: Path) -> None:
    path = tmp_path / "bench_toy.py"
    path.write_text(TOY)
    plan = run.Plan(rounds=1, seconds=0.001, threads=1, settings=("default",), minutes=1e-6)
    rows, refused, _ = run.run({"toy": path}, plan)
    assert {row["shape"] for row in rows} == {"64x32"}
    assert [line for line in refused if "minutes were over" in line] == [
        f"toy {shape}: not timed, 1e-06 minutes were over" for shape in ("deadly", "16x4 slow")
    ]


def test_peak_memory_is_exact() -> None:
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return (x * 2) * 3  # one temporary and the output, beside the input

    make = lambda fn: lambda device, dtype: fn  # noqa: E731
    case = harness.Case("m", "m", torch.float32, harness.normal((256, 1024)), {"eager": make(doubled)}, ("forward",))
    contest = harness.Contest(case, torch.device("cpu"))
    assert contest.prepare("eager") == "ok"
    assert 0 <= contest.peak("eager", "forward") - 3 * 2**20 < 64  # torch holds the numbers 2 and 3 as tensors a while
    assert contest.sizes("eager", "forward") == (2 * 2**20, 2 * 2**20)


def test_a_module_gets_gradients_of_its_parameters_and_a_step() -> None:
    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).square().mean()

    inputs = harness.normal((8, 4))
    case = harness.Case("m", "m", torch.float32, inputs, {"eager": lambda *_: Loss()}, ("step",), grad=())
    contest = harness.Contest(case, torch.device("cpu"))
    assert contest.prepare("eager") == "ok"
    assert len(contest.errors["eager", "eager"]) == 3  # the loss, the weight's gradient, the bias's
    before = contest.fns["eager"].layer.weight.detach().clone()
    samples, calls = contest.visit("eager", "step", 0.001)
    assert samples and calls >= 1 and not torch.equal(before, contest.fns["eager"].layer.weight)


def test_floor_is_the_longer_of_copy_and_products() -> None:
    measured = {"copy": [(1024, 1e-6), (4096, 4e-6), (16384, 16e-6)], "gemm": {"float32": 1e9}}
    assert harness.floor_ms(measured, 2048, 0, "float32") == pytest.approx(2e-3)
    assert harness.floor_ms(measured, 2048, 1e6, "float32") == pytest.approx(1.0)
    assert harness.floor_ms(measured, 65536, 0, "float32") == pytest.approx(64e-3)  # beyond the last size: at its rate


def row(**changes: Any) -> dict[str, Any]:
    base = dict.fromkeys(harness.FIELDS, "") | {
        "op": "toy", "provider": "eager", "mode": "forward", "dtype": "float32", "shape": "8x8", "threads": "2",
        "setting": "default", "machine": "here", "status": "ok", "median_ms": "2.0", "p20_ms": "1.9", "p80_ms": "2.2",
        "floor_ms": "0.5", "commit": "old",
    }  # fmt: skip
    return base | changes


def test_a_rerun_replaces_its_rows_and_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.csv"
    old = [row(), row(provider="gone"), row(shape="9x9"), row(machine="there")]
    harness.write_rows(path, harness.merge_rows([], old))
    new = [row(commit="new", median_ms="1.0"), row(provider="pyflowgen", commit="new", median_ms="0.5")]
    harness.write_rows(path, harness.merge_rows(harness.read_rows(path), new))
    found = harness.read_rows(path)
    here = {r["provider"]: r for r in found if r["shape"] == "8x8" and r["machine"] == "here"}
    assert set(here) == {"eager", "pyflowgen"}  # a provider of another run is no row of this contest
    assert here["eager"]["median_ms"] == "1.0" and len(found) == 4
    assert harness.merge_rows(found, []) == found
    assert [p.name for p in path.parent.iterdir()] == ["results.csv"]


def test_verdicts_name_the_fastest_rival_and_losses_are_said() -> None:
    rows = [
        row(), row(provider="nflows", median_ms="1.5"), row(provider="compiled", median_ms="0.8"),
        row(provider="nflows compiled", status="crashed: exit status -6", median_ms=""),
        row(provider="pyflowgen", median_ms="1.0"),
    ]  # fmt: skip
    (verdict,) = run.verdicts(rows)
    assert verdict["eager"] == "nflows" and verdict["eager_ratio"] == pytest.approx(1.5)
    assert verdict["compiled"] == "compiled" and verdict["compiled_ratio"] == pytest.approx(0.8)
    assert verdict["floor_share"] == pytest.approx(0.5)
    assert any("slower than compiled" in line and "0.80x" in line for line in run.summary(rows))


def test_the_report_is_one_file_with_everything_in_it(toy: Any, tmp_path: Path) -> None:
    folder = tmp_path / "fused"
    folder.mkdir()
    lines = [
        {"step": i, "seconds": i / 2, "train_bits_per_dim": 3 - i / 50, "valid_bits_per_dim": 3.1 - i / 50}
        for i in range(1, 30)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines) + '{"step": 30, "sec')
    grid = tmp_path / "grid.png"
    grid.write_bytes(
        base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
    )
    page_path = tmp_path / "report.html"
    rows, refused, measured = toy
    report.write_report(
        page_path,
        rows,
        machine="A <machine>",
        measured=measured,
        refused=refused,
        runs={"fused": folder},
        samples=[grid],
        gallery=grid,
    )
    page = page_path.read_text()
    assert "Densities in the plane" in page and page.count("data:image/png;base64,") == 2
    assert "A &lt;machine&gt;" in page and "data:image/png;base64," in page and "prefers-color-scheme: dark" in page
    assert page.count("<svg") == 4 and "best validation 2.5200" in page and "wrong: tensor 0" in page
    linked = [a for a in re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page) if not a.startswith(("#", "data:"))]
    assert linked == [] and not re.search(r"@import|<script|<link|url\((?!#)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    clips = [i for i in ids if i.startswith("p") and len(i) == 11]
    assert len(clips) == len(set(clips))  # figures of one page must not clip each other


def test_figures_as_files(toy: Any, tmp_path: Path) -> None:
    names = [path.name for path in plot.write_figures(toy[0], tmp_path)]
    assert names == ["allocators.svg", "toy-speedups.svg", "toy-floors.svg"]
    assert all((tmp_path / name).read_text().startswith("<svg") for name in names)


def test_every_bench_file_declares_sound_cases() -> None:
    for op, path in harness.bench_files().items():
        cases = harness.load_cases(path, torch.device("cpu"))
        keys = [(c.op, c.shape, c.dtype, mode) for c in cases for mode in c.modes]
        assert len(keys) == len(set(keys)), f"{op}: two cases share a key"
        assert any(c.quick for c in cases), f"{op}: nothing in the quick set"
        for case in cases:
            assert {"eager", "pyflowgen"} <= set(case.providers), f"{op} {case.shape}"
            assert set(case.truth) | set(case.truth.values()) <= set(case.providers), f"{op} {case.shape}"


def test_command_writes_rows_json_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = tmp_path / "bench_toy.py"
    bench.write_text(TOY)
    monkeypatch.setattr(harness, "bench_files", lambda: {"toy": bench})
    files = [str(tmp_path / name) for name in ("rows.csv", "rows.json", "report.html")]
    words = ["toy", "--only", "slow", "--rounds", "1", "--threads", "1", "--rows", files[0], "--json", files[1]]
    done = CliRunner().invoke(run.bench, [*words, "--html", files[2]])
    assert done.exit_code == 0, done.output
    (forward, *_) = [r for r in harness.read_rows(Path(files[0])) if r["mode"] == "forward"]
    assert forward["dtype"] == "float64" and math.isfinite(float(forward["median_ms"]))
    assert json.loads(Path(files[1]).read_text())["rows"] and f"report: {files[2]}" in done.output.splitlines()[-1]


def test_command_refuses_in_one_line(tmp_path: Path) -> None:
    for words, told in (
        (["no_such_op"], "no benchmark named no_such_op"),
        (["--run", f"a={tmp_path}"], "metrics.jsonl"),
        (["--vs", "no-such-ref"], "no-such-ref"),
    ):
        done = CliRunner().invoke(run.bench, [*words, "--rows", str(tmp_path / "rows.csv")])
        assert done.exit_code == 1 and told in done.output and "Traceback" not in done.output
    assert not (tmp_path / "rows.csv").exists()


def test_gate_tests_keeps_an_op_with_failing_tests_from_being_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "run_tests", lambda op: "tests fail: 1 failed")
    rows, refused, _ = run.run({"toy": Path("nowhere.py")}, run.Plan.fast(), gate="tests")
    assert rows == [] and refused == ["toy: not timed, tests fail: 1 failed"]


def test_readme_table_says_what_the_rows_say() -> None:
    readme = harness.HERE.parent / "README.md"
    if not readme.exists():
        pytest.skip("an installed package has no README")
    table = importlib.import_module(f"{PACKAGE}.readme_table")
    found = table.BLOCK.findall(readme.read_text(encoding="utf-8"))
    assert found == [table.table(harness.read_rows(harness.HERE / "results.csv"))], (
        "run python -m benchmarks.readme_table"
    )


def test_readme_table_names_losses() -> None:
    table = importlib.import_module(f"{PACKAGE}.readme_table")
    fixed = {
        "mode": "forward", "dtype": "float32", "shape": "1024x128 -> 128", "threads": "2", "setting": "default",
        "machine": "M", "op": "linear", "status": "ok", "torch": "2.13.0",
    }  # fmt: skip
    times = {"pyflowgen": "2", "eager": "3", "compiled": "1"}
    text = table.table([{**fixed, "provider": name, "median_ms": ms} for name, ms in times.items()])
    assert "| linear | 1024x128 -> 128 | forward | 2 ms | 1.50× (eager) | 0.50× (compiled) |" in text
    assert "M; 2 threads" in text and "of all 1 rows measured so: 1" in text
    assert "linear 1024x128 -> 128 float32 forward (0.50× compiled)." in text
