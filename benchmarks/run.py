"""Runs the contests: worker processes, interleaved rounds, rows, and the ``pyflowgen bench`` command."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import click
import torch

from . import harness
from .harness import SETTINGS, Case, split_compiled


class Crashed(Exception):
    """The worker process died, or did not answer in time."""


class Failed(Exception):
    """The worker answered with an error."""


class Worker:
    """One worker process: a setting, and the tree whose pyflowgen it imports."""

    def __init__(
        self, device: str, threads: int, files: Sequence[Path], setting: str, tree: Path | None, log: IO[bytes]
    ):
        # Threads wait as they do for a user: a passive wait adds a wake-up of up to 0.1 ms to every parallel call, and
        # an idle worker's threads stop spinning by themselves within a few milliseconds.
        env = {
            "KINETO_LOG_LEVEL": "5",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            **os.environ,
        }
        env = {k: v for k, v in env.items() if not k.startswith(("MALLOC_", "OMP_WAIT"))} | SETTINGS[setting]
        if tree is not None:
            env["PYTHONPATH"] = os.pathsep.join([str(tree), *filter(None, [env.get("PYTHONPATH")])])
        command = [sys.executable, str(harness.HERE / "harness.py"), device, str(threads), *map(str, files)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=env)
        self.opened: object = None
        self.buffer = b""
        found = self.answer(300)
        if tree is not None and (found is None or tree.resolve() not in Path(found).resolve().parents):
            self.close()  # another commit's rows must never be an installed package's
            raise Failed(f"no pyflowgen in {tree}, found {found}")

    def answer(self, timeout: float) -> Any:
        assert self.process.stdout is not None
        stop = time.monotonic() + timeout
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, stop - time.monotonic()))
            chunk = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            if not chunk:
                self.close()
                raise Crashed(
                    f"no answer in {timeout:.0f} s" if not ready else f"exit status {self.process.returncode}"
                )
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        reply = json.loads(line)
        if "error" in reply:
            raise Failed(reply["error"])
        return reply["ok"]

    def ask(self, *request: Any, timeout: float = 600) -> Any:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            self.close()
            raise Crashed(f"exit status {self.process.returncode}") from error
        return self.answer(timeout)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


@dataclass
class Entry:
    """A provider under one setting, in the process it runs in."""

    provider: str
    setting: str
    home: str  # providers of one home share a process
    tree: Path | None
    label: str
    status: str = "ok"


@dataclass(frozen=True)
class Plan:
    """How long and where to measure."""

    device: str = "cpu"
    threads: int = 0
    rounds: int = 20
    seconds: float = 0.03  # of one visit
    quick: bool = False
    limit: float = 12.0  # seconds after which no further round of a contest begins, of which there are three at least
    minutes: float = float("inf")  # after so many no op's second contest begins
    settings: tuple[str, ...] = ("default", "no-mmap")
    trees: tuple[tuple[str, Path | None], ...] = (("", None),)  # (suffix of the row's provider, tree of its pyflowgen)

    @classmethod
    def fast(cls, **changes: Any) -> Plan:
        return cls(**{"rounds": 7, "seconds": 0.01, "quick": True, "settings": ("default",), **changes})


class Runner:
    """Owns the workers of a run. One that dies is replaced when next needed, without the provider that killed it."""

    def __init__(self, plan: Plan, files: Sequence[Path], log: IO[bytes]):
        self.plan, self.files, self.log = plan, files, log
        self.threads = plan.threads or torch.get_num_threads()
        self.workers: dict[tuple[str, str, Path | None], Worker] = {}
        self.measured: dict[str, Any] | None = None

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def _worker(self, entry: Entry) -> Worker:
        key = (entry.setting, entry.home, entry.tree)
        if key not in self.workers:
            self.workers[key] = Worker(self.plan.device, self.threads, self.files, entry.setting, entry.tree, self.log)
        return self.workers[key]

    def rates(self, dtypes: Sequence[str]) -> dict[str, Any]:
        if self.measured is None:
            self.measured = self._worker(Entry("", "default", "main", self.plan.trees[0][1], "")).ask("rates", dtypes)
        assert self.measured is not None
        return self.measured

    def entries(self, case: Case) -> list[Entry]:
        found = []
        for suffix, tree in self.plan.trees:
            for name in case.contestants(self.plan.quick):
                provider, compiled = split_compiled(name)
                if suffix and name != "pyflowgen":
                    continue
                # A compiled peer may take its process along (zuko's training step corrupts the heap under torch 2.13).
                home = name if compiled and provider != "eager" else "main"
                settings = [s for s in self.plan.settings if s in case.settings]
                for setting in settings if self.plan.device == "cpu" else ("default",):
                    found.append(Entry(name, setting, home, tree, name + suffix))
        return found

    def _ask(self, entry: Entry, entries: Sequence[Entry], at: tuple[str, int], *request: Any) -> Any:
        """One request to an entry's worker. A death is that entry's alone: the others of its home are built again."""
        worker = self._worker(entry)
        if worker.opened != at:
            worker.ask("open", *at)
            worker.opened = at
            for other in entries:
                same = (other.setting, other.home, other.tree) == (entry.setting, entry.home, entry.tree)
                if same and other is not entry and other.status == "prepared":
                    worker.ask("prepare", other.provider)
            if request[0] != "prepare":
                worker.ask("prepare", entry.provider)
        return worker.ask(*request)

    def _try(self, entry: Entry, entries: Sequence[Entry], at: tuple[str, int], *request: Any) -> Any:
        try:
            return self._ask(entry, entries, at, *request)
        except Crashed as crash:
            self.workers.pop((entry.setting, entry.home, entry.tree), None)
            entry.status = f"crashed: {crash}"
        except Failed as failure:
            entry.status = f"failed: {failure}"
        return None

    def contest(self, case: Case, at: tuple[str, int]) -> Iterator[dict[str, Any]]:
        """All rows of one case."""
        entries = self.entries(case)
        for entry in entries:
            verdict = self._try(entry, entries, at, "prepare", entry.provider)
            if verdict is not None:
                entry.status = "prepared" if verdict == "ok" else verdict
        dtype = str(case.dtype).removeprefix("torch.")
        facts = {
            "op": case.op, "dtype": dtype, "shape": case.shape, "threads": self.threads,
            "machine": harness.machine(torch.device(self.plan.device)), "torch": torch.__version__,
            "commit": harness.commit(), "date": datetime.date.today().isoformat(),
        }  # fmt: skip
        for mode in case.timed_modes(self.plan.quick):
            samples: list[list[float]] = [[] for _ in entries]
            calls: list[int | None] = [None] * len(entries)
            extra: dict[str, Any] = {}
            began = time.monotonic()
            for round_number in range(self.plan.rounds):
                if round_number >= 3 and time.monotonic() - began > self.plan.limit:
                    break
                order = list(range(len(entries)))
                shift = round_number % len(order)  # nobody always follows the same neighbour's cache contents
                for i in order[shift:] + order[:shift]:
                    if entries[i].status != "prepared":
                        continue
                    got = self._try(
                        entries[i], entries, at, "visit", entries[i].provider, mode, self.plan.seconds, calls[i]
                    )
                    if got is not None:
                        samples[i] += got[0]
                        calls[i] = got[1]
            peaks: dict[str, float | None] = {}
            for entry in entries:
                if entry.status == "prepared" and not extra:
                    moved, alive = self._try(entry, entries, at, "sizes", entry.provider, mode) or (0, 0)
                    moved, flops = case.bytes.get(mode, moved), case.flops.get(mode, 0)
                    extra = {
                        "least_mib": f"{alive / 2**20:.4g}",
                        "floor_ms": f"{harness.floor_ms(self.rates([dtype]), moved, flops, dtype):.4g}",
                    }
                # The allocations asked for do not depend on malloc's settings: taken once, for both rows.
                if entry.status == "prepared" and mode != "backward" and entry.label not in peaks:
                    peaks[entry.label] = self._try(entry, entries, at, "peak", entry.provider, mode)
            for entry, taken in zip(entries, samples, strict=True):
                row = {**facts, **extra, "provider": entry.label, "mode": mode, "setting": entry.setting}
                row["status"] = "ok" if entry.status == "prepared" else entry.status
                if row["status"] == "ok" and taken:
                    taken.sort()
                    cuts = {
                        "median_ms": statistics.median(taken),
                        "p20_ms": taken[len(taken) // 5],
                        "p80_ms": taken[len(taken) * 4 // 5],
                    }
                    row |= {k: f"{v:.5g}" for k, v in cuts.items()}
                    if peaks.get(entry.label) is not None:
                        row["peak_mib"] = f"{peaks[entry.label] / 2**20:.4g}"  # type: ignore[operator]
                yield row
        for key in [key for key in self.workers if key[1] != "main"]:
            self.workers.pop(key).close()


def run_tests(op: str) -> str:
    """The gate's strict form: the op's own test file has to pass. Returns "" or why the op is not timed."""
    test = harness.HERE.parent / "tests" / f"test_{op}.py"
    if not test.exists():
        return f"no test file {test.name}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(test)],
        cwd=test.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else f"tests fail: {(done.stdout.strip().splitlines() or ['no output'])[-1]}"


def run(
    files: dict[str, Path],
    plan: Plan,
    *,
    gate: str = "outputs",
    only: str = "",
    echo: Callable[[str], Any] = lambda text: None,
    keep: Callable[[list[dict[str, Any]]], Any] = lambda rows: None,
) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """Times the cases of bench files; returns the rows, what was refused, and the machine's measured rates.

    ``keep`` gets the rows of each case as it ends, so that an interrupted run leaves what it has.
    """
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    selected: list[tuple[Case, tuple[str, int]]] = []
    for op, path in files.items():
        if gate == "tests" and (why := run_tests(op)):
            refused.append(f"{op}: not timed, {why}")
            echo(refused[-1])
            continue
        cases = harness.load_cases(path, torch.device(plan.device))
        selected += [
            (case, (str(path), i))
            for i, case in enumerate(cases)
            if (case.quick or not plan.quick) and only in case.shape
        ]
    with tempfile.TemporaryFile() as log:
        runner = Runner(plan, list(files.values()), log)
        try:
            measured = (
                runner.rates(sorted({str(case.dtype).removeprefix("torch.") for case, _ in selected}))
                if selected
                else {}
            )
            # Against the clock: one contest of every op, whatever it takes, before any second one.
            turns = [[c.op for c, _ in selected[:i]].count(case.op) for i, (case, _) in enumerate(selected)]
            queue = list(zip(turns, selected, strict=True))
            if plan.minutes < float("inf"):
                queue.sort(key=lambda entry: entry[0])
            began = time.monotonic()
            for turn, (case, at) in queue:
                start = time.monotonic()
                if turn and start - began > 60 * plan.minutes:
                    refused.append(f"{case.op} {case.shape}: not timed, {plan.minutes:g} minutes were over")
                    continue
                new = list(runner.contest(case, at))
                rows += new
                keep(new)
                for line in describe(new):
                    echo(line)
                echo(f"  ({time.monotonic() - start:.0f} s)")
                refused += sorted(
                    {
                        f"{r['op']} {r['shape']} {r['dtype']}: {r['provider']} {r['status']}"
                        for r in new
                        if r["status"] != "ok"
                    }
                )
        finally:
            runner.close()
    return rows, refused, measured


# ---------------------------------------------------------------- words


TIE = 1.02  # closer than this is neither won nor lost


def ours(row: dict[str, Any]) -> bool:
    return row["provider"] == "pyflowgen"


def is_compiled(row: dict[str, Any]) -> bool:
    return split_compiled(row["provider"])[1]


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each contest our time, the fastest eager and compiled rivals, and their ratios (above 1: we are faster)."""
    contests: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        contests.setdefault(tuple(str(row[k]) for k in harness.KEY if k != "provider"), []).append(row)
    found = []
    for members in contests.values():
        timed = [r for r in members if r["status"] == "ok" and r.get("median_ms")]
        mine = next((r for r in timed if ours(r)), None)
        if mine is None:
            continue
        verdict: dict[str, Any] = {"row": mine, "ms": float(mine["median_ms"])}
        rivals = [r for r in timed if not r["provider"].startswith("pyflowgen")]
        for kind, group in (
            ("eager", [r for r in rivals if not is_compiled(r)]),
            ("compiled", [r for r in rivals if is_compiled(r)]),
        ):
            best = min(group, key=lambda r: float(r["median_ms"]), default=None)
            verdict[kind] = best["provider"] if best else None
            verdict[f"{kind}_ratio"] = float(best["median_ms"]) / verdict["ms"] if best else None
        for row in timed:
            if row["provider"].startswith("pyflowgen@"):
                verdict["vs"], verdict["vs_ratio"] = row["provider"], float(row["median_ms"]) / verdict["ms"]
        if mine.get("floor_ms"):
            verdict["floor_share"] = float(mine["floor_ms"]) / verdict["ms"]
        found.append(verdict)
    order = {shape: i for i, shape in enumerate(dict.fromkeys(v["row"]["shape"] for v in found))}
    return sorted(
        found,
        key=lambda v: (
            v["row"]["op"],
            v["row"]["dtype"] != "float32",
            order[v["row"]["shape"]],
            harness.MODES.index(v["row"]["mode"]),
        ),
    )


def describe(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for verdict in verdicts(rows):
        row = verdict["row"]
        parts = [f"{verdict[f'{kind}_ratio']:.2f}x {verdict[kind]}" for kind in ("eager", "compiled") if verdict[kind]]
        parts += [f"{verdict['vs_ratio']:.2f}x {verdict['vs']}"] if "vs" in verdict else []
        lines.append(
            f"{row['op']} {row['shape']} {row['dtype']} {row['mode']} [{row['setting']}]: {verdict['ms']:.4g} ms, "
            + ", ".join(parts)
        )
    return lines


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The last words on the terminal: per op, the range and the middle of the ratios, and every loss by name."""
    lines: list[str] = []
    found = verdicts(rows)
    for op in dict.fromkeys(v["row"]["op"] for v in found):
        mine = [v for v in found if v["row"]["op"] == op]
        words = []
        for kind, label in (("eager", "fastest eager rival"), ("compiled", "fastest compiled rival")):
            ratios = sorted(v[f"{kind}_ratio"] for v in mine if v[kind])
            if ratios:
                words.append(f"{statistics.median(ratios):.1f}x the {label} ({ratios[0]:.1f}-{ratios[-1]:.1f}x)")
        lines.append(
            f"{op}: median speed over {len(mine)} rows " + ", ".join(words) if words else f"{op}: no rival was timed"
        )
        for v in mine:
            for kind in ("eager", "compiled"):
                if v[kind] and v[f"{kind}_ratio"] < 1 / TIE:
                    row = v["row"]
                    where = f"{row['shape']} {row['dtype']} {row['mode']} [{row['setting']}]"
                    lines.append(f"  slower than {v[kind]}: {where} {v[f'{kind}_ratio']:.2f}x")
    return lines


# ---------------------------------------------------------------- another commit, the command


@contextlib.contextmanager
def other_tree(ref: str, echo: Callable[[str], Any]) -> Iterator[Path]:
    """A worktree of another commit of this repository, built in place; removed afterwards."""
    root = harness.HERE.parent

    def git(*words: str) -> None:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise click.ClickException(f"--vs {ref}: git {words[0]} {words[1]}: {done.stderr.strip() or 'failed'}")

    with tempfile.TemporaryDirectory(prefix="pyflowgen-vs-") as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", str(tree), ref)
        try:
            if (tree / "setup.py").exists():
                echo(f"building {ref} ...")
                done = subprocess.run(
                    [sys.executable, "setup.py", "build_ext", "--inplace"],
                    cwd=tree,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    raise click.ClickException(
                        f"--vs {ref}: its build failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}"
                    )
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def own_tree() -> Path | None:
    """Where this process's pyflowgen lies, so that the workers import the same."""
    spec = importlib.util.find_spec("pyflowgen")
    return Path(spec.origin).resolve().parents[1] if spec is not None and spec.origin else None


@click.command("bench")
@click.argument("ops", nargs=-1, metavar="[OP]...")
@click.option("--quick", is_flag=True, help="The short set of every op, fewer rounds: minutes in all.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--threads", default=0, help="Threads of each provider; 0: torch's own choice.")
@click.option("--rounds", type=click.IntRange(1), help="Rounds over all providers (20; quick 7).")
@click.option(
    "--gate",
    default="outputs",
    show_default=True,
    type=click.Choice(["outputs", "tests"]),
    help="'tests': the op's test file has to pass as well.",
)
@click.option(
    "--setting",
    "settings",
    multiple=True,
    type=click.Choice(list(SETTINGS)),
    help="Environment of all providers, may be repeated: default, no-mmap (malloc keeps its pages), avx2 (no AVX-512). "
    "[default, no-mmap; quick: default]",
)
@click.option(
    "--minutes", type=click.FloatRange(min=0), help="After so many minutes begin no contest but every op's first."
)
@click.option("--only", default="", metavar="TEXT", help="Only cases whose shape label contains TEXT.")
@click.option("--vs", metavar="REF", help="Also time pyflowgen of this git commit, interleaved with the present one.")
@click.option(
    "--rows",
    "csv_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The keyed rows to update (benchmarks/results.csv).",
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write this run's rows as JSON."
)
@click.option(
    "--html",
    "html_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the report: one self-contained HTML file.",
)
@click.option(
    "--run",
    "runs",
    multiple=True,
    metavar="NAME=DIR",
    help="A training run whose loss curve the report shows (reads DIR/metrics.jsonl).",
)
@click.option(
    "--samples",
    "samples",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A sample grid (PNG) for the report.",
)
@click.option(
    "--gallery",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The picture that pyflowgen gallery drew, for the report.",
)
@click.option("--no-bench", is_flag=True, help="Time nothing: make the report from the rows there are.")
def bench(
    ops: tuple[str, ...], quick: bool, device: str, threads: int, rounds: int | None, gate: str,
    settings: tuple[str, ...], minutes: float | None, only: str, vs: str | None, csv_path: Path | None,
    json_path: Path | None, html_path: Path | None, runs: tuple[str, ...], samples: tuple[Path, ...],
    gallery: Path | None, no_bench: bool,
) -> None:  # fmt: skip
    """Time OPs (all by default) against eager PyTorch, torch.compile and the installed peers."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("--device cuda: torch sees no CUDA device")
    known = harness.bench_files()
    if unknown := [op for op in ops if op not in known]:
        raise click.ClickException(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(known)}")
    named: dict[str, Path] = {}
    for run_name in runs:
        name, _, folder = run_name.partition("=")
        if not (Path(folder) / "metrics.jsonl").is_file():
            raise click.ClickException(f"--run {run_name}: expected NAME=DIR with a file metrics.jsonl in DIR")
        named[name] = Path(folder)
    csv_path = csv_path or harness.HERE / "results.csv"
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    measured: dict[str, Any] = {}
    if not no_bench:
        with contextlib.ExitStack() as stack:
            trees: list[tuple[str, Path | None]] = [("", own_tree())]
            if vs:
                trees.append((f"@{vs}", stack.enter_context(other_tree(vs, click.echo))))
            changes: dict[str, Any] = {"rounds": rounds, "settings": settings, "minutes": minutes}
            changes = {name: value for name, value in changes.items() if value}
            plan = (Plan.fast if quick else Plan)(device=device, threads=threads, trees=tuple(trees), **changes)

            def keep(new: list[dict[str, Any]]) -> None:
                harness.write_rows(csv_path, harness.merge_rows(harness.read_rows(csv_path), new))

            files = {op: known[op] for op in ops or known}
            rows, refused, measured = run(files, plan, gate=gate, only=only, echo=click.echo, keep=keep)
    here = harness.machine(torch.device(device))
    shown: list[dict[str, Any]] = rows or [dict(r) for r in harness.read_rows(csv_path) if r["machine"] == here]
    if json_path:
        json_path.write_text(
            json.dumps({"machine": here, "rates": measured, "refused": refused, "rows": shown}, indent=1)
        )
    if html_path:
        from .report import write_report

        write_report(
            html_path, shown, machine=here, measured=measured, refused=refused, runs=named, samples=list(samples),
            gallery=gallery,
        )  # fmt: skip
    click.echo("")
    for line in [*refused, *summary(shown)]:
        click.echo(line)
    click.echo(f"rows: {csv_path}")
    if html_path:
        click.echo(f"report: {html_path.resolve()}")
    if not shown:
        raise SystemExit(1)


if __name__ == "__main__":
    bench()
