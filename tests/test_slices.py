"""The shape of the project: every op has all its files, imports go one way, names and examples are the intended ones."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pyflowgen
from pyflowgen import _native, _sources

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, KERNELS = ROOT / "pyflowgen", ROOT / "kernels"

LAYERS = (
    "csrc/formula/{}.h",
    "csrc/{}.h",
    "csrc/{}.cpp",
    "csrc/cpu/{}.cpp",
    "csrc/cpu/{}.simd.cpp",
    "csrc/cuda/{}.cu",
    "csrc/cuda/{}.cpp",
    "kernels/{}.py",
    "pyflowgen/ops/{}.py",
    "tests/test_{}.py",
    "benchmarks/bench_{}.py",
)
# Files that an op does without, and why. A file that exists is no longer missing: the list has to say the truth.
GPU = ("csrc/cuda/{}.cu", "csrc/cuda/{}.cpp", "kernels/{}.py")
WITHOUT = {
    "linear": {
        "csrc/formula/linear.h": "a product has no formula of one element; activations are in elementary.h",
        **{layer.format("linear"): "on a GPU torch's own product runs" for layer in GPU},
    },
    "conv_net": {
        "csrc/formula/conv_net.h": "products have no formula of one element; activations are in elementary.h",
        **{layer.format("conv_net"): "on a GPU cuDNN's convolutions are the right way" for layer in GPU},
    },
    "mlp_coupling": {
        "csrc/formula/mlp_coupling.h": "the transforms' formulas are those of the ops it is made of",
        "benchmarks/bench_mlp_coupling.py": "timed as whole flows, in bench_realnvp and bench_nsf",
        **{layer.format("mlp_coupling"): "its kernels for GPUs are Triton's" for layer in GPU[:2]},
    },
    "invertible_linear": {layer.format("invertible_linear"): "its kernels for GPUs are Triton's" for layer in GPU[:2]},
    "idu": {layer.format("idu"): "Triton alone on GPUs" for layer in GPU if layer.startswith("csrc")},
    "trn": {
        "csrc/formula/trn.h": "its cells are formula/lstm.h's",
        "kernels/trn.py": "a clip needs a barrier of the grid: CUDA C++ alone",
    },
}
# What several ops stand on, and whole systems that are timed: stems of no op.
SHARED = {
    "csrc/cpu/gemm.simd.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/packed_row.simd.cpp",
    "csrc/cpu/stream_product.simd.cpp",
    "csrc/cpu/team.cpp",
    "csrc/module.cpp",
    "kernels/tile.py",
    "kernels/elementary.py",
    "kernels/gates.py",
    "kernels/spline.py",
}
SYSTEMS = {f"benchmarks/bench_{name}.py" for name in ("accelerate", "glow", "memory", "nsf", "realnvp")}

OPS = sorted(p.stem for p in (PACKAGE / "ops").glob("*.py") if p.stem != "__init__")

NAMES = {
    "ActNorm", "AdditiveCoupling", "AffineCoupling", "Bijection", "Chain", "ConvNet", "ConvResNet", "Dequantize",
    "DiagNormal", "Flow", "FlowDistribution", "GRU", "GRUCell", "GaussianMixture", "GlowStep", "Householder", "IDU",
    "Inverse", "Invertible1x1Conv", "InvertibleLinear", "LSTM", "LSTMCell", "Linear", "LipschitzMLP", "Logistic",
    "LogisticDistribution", "Logit", "MLP", "MatrixExponential", "MultiScale", "NormalPrior", "Permutation",
    "Planar", "PolynomialSplineCoupling", "Radial", "Resampled", "ResidualFlow", "ResidualMLP", "Scale", "SplineCoupling", "Squeeze",
    "Sylvester", "TRN", "ZeroConv2d", "accelerate", "accelerated", "affine_coupling", "affine_coupling_reference", "bits_per_dim", "build_info", "conv_net", "conv_net_reference", "cubic_spline",
    "gru", "gru_reference", "hutchinson_trace", "hutchpp_trace", "idu", "idu_reference", "invertible_linear",
    "invertible_linear_reference", "linear", "linear_reference", "linear_spline", "lstm", "lstm_reference", "mlp_coupling",
    "mlp_coupling_reference", "polynomial_spline", "polynomial_spline_reference", "quadratic_spline", "rational_quadratic_spline", "rational_quadratic_spline_reference", "reference_path", "restore",
    "russian_roulette_logdet", "slogdet", "slogdet_reference", "trn", "trn_reference", "tune_malloc",
}  # fmt: skip

MODELS = {"Detector", "GRUDetector", "Glow", "IDN", "LSTMDetector", "LiveStreams", "NICE", "NSF", "RealNVP", "TRN"}


# ------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("op", OPS)
def test_op_has_all_its_files(op: str) -> None:
    expected = {layer.format(op) for layer in LAYERS}
    absent = {file for file in expected if not (ROOT / file).is_file()}
    assert absent == set(WITHOUT.get(op, ())), f"{op}: absent files differ from those it is said to do without"


def test_no_file_without_an_op() -> None:
    known = {layer.format(op) for op in OPS for layer in LAYERS} | SHARED | SYSTEMS
    patterns = ["csrc/*.cpp", "csrc/cpu/*.simd.cpp", "csrc/cuda/*.cu", "kernels/*.py", "benchmarks/bench_*.py"]
    found = {str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern) if p.stem != "__init__"}
    assert found <= known, f"no op is called so: {sorted(found - known)}"


# ------------------------------------------------------------------------------------------------------- names
def exported(path: Path) -> set[str]:
    """Names of a module that are exported as ``X as X``; anything else it binds is refused."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert alias.name == alias.asname, f"{path.name}: line {node.lineno} is not of the form X as X"
                names.add(alias.name)
        elif isinstance(node, ast.Assign):
            assert [ast.unparse(t) for t in node.targets] == ["__version__"], f"{path.name}: line {node.lineno}"
        else:
            assert isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant), f"{path.name}: {node.lineno}"
    return names


def test_public_names() -> None:
    assert exported(PACKAGE / "__init__.py") == NAMES
    assert exported(PACKAGE / "models/__init__.py") == MODELS
    assert exported(PACKAGE / "models/__init__.py") == MODELS
    assert exported(PACKAGE / "models/__init__.py") == MODELS
    assert exported(PACKAGE / "models/__init__.py") == MODELS
    for op in OPS:  # function and reference of every op, with one signature
        function, reference = getattr(pyflowgen, op), getattr(pyflowgen, f"{op}_reference")
        assert inspect.signature(function) == inspect.signature(reference)


def test_typed_and_one_version() -> None:
    assert (PACKAGE / "py.typed").is_file()
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{pyflowgen.__version__}"' in project


# ----------------------------------------------------------------------------------------------------- imports
def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, by full name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


PYTHON = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("op", OPS)
def test_an_op_imports_no_other_op(op: str) -> None:
    ours = {name for name in imports(PACKAGE / f"ops/{op}.py") if within(name, "pyflowgen")}
    below = ["pyflowgen._native", "pyflowgen.bijection", "pyflowgen.coupling", "pyflowgen.recurrence"]
    if op == "mlp_coupling":  # whole layers, made of the single ops
        single = ("affine_coupling", "linear", "rational_quadratic_spline")
        below += ["pyflowgen.recompute", *(f"pyflowgen.ops.{name}" for name in single)]
    assert all(within(name, *below) for name in ours), ours


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda p: p.stem)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    foreign = [n for n in imports(path) if not within(n, "torch", "triton", "pyflowgen.kernels")]
    assert all(n.split(".")[0] in sys.stdlib_module_names for n in foreign), foreign


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_native_touches_the_dispatcher(path: Path) -> None:
    if path.name == "_native.py":
        return
    touched = [n for n in imports(path) if within(n, "torch.library", "torch._C", "pyflowgen._C", "triton")]
    touched += [n for n in imports(path) if within(n, "pyflowgen.kernels")]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.library", "torch._C"):
            touched.append(f"line {node.lineno}: {ast.unparse(node)}")
    assert not touched


# From low to high; a module imports from its own rank or below.
RANKS = (
    "_native",
    "bijection coupling recompute recurrence",
    "ops metrics",
    "layers nets flow bases estimators linear_flows low_rank_flows residual_flow peers",
    "accelerate",
    "models",
    "data",
    "train",
    "detect",
    "recipes",
    "cli",
    "__main__",
)


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    rank = {name: i for i, names in enumerate(RANKS) for name in names.split()}
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for name in imports(path):
        if within(name, "pyflowgen") and name.split(".")[1] in rank:
            assert rank[name.split(".")[1]] <= rank[own], f"{own} imports {name}"


def code(path: Path) -> str:
    """C++ text without comments, string literals and includes."""
    noise = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#[ \t]*include[^\n]*'
    return re.sub(noise, " ", path.read_text(), flags=re.S | re.M)


TORCH_FREE = sorted(
    p for pattern in ("cpu/*.simd.cpp", "formula/*.h", "cuda/*.cu", "cuda/*.cuh") for p in (ROOT / "csrc").glob(pattern)
)


@pytest.mark.parametrize("path", TORCH_FREE, ids=lambda p: str(p.relative_to(ROOT / "csrc")))
def test_kernels_know_no_tensors(path: Path) -> None:
    assert not re.search(r"\bTensor\b", code(path))
    if path.suffix != ".cuh":  # the launch macro's error message is a string
        assert not re.search(r"\bstd::(vector|map|unordered_map|string|deque|list)\b", code(path)), "no containers"
    seen: set[Path] = set()
    todo = [path]
    while todo:  # and nothing that it includes does
        current = todo.pop()
        for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', current.read_text(), re.M):
            assert not name.startswith(("torch/", "ATen/", "c10/", "pybind11/", "Python.h")), f"{current}: {name}"
            inner = ROOT / "csrc" / name
            if inner.is_file() and inner not in seen:
                seen.add(inner)
                todo.append(inner)


def test_one_file_knows_python() -> None:
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert {p.name for p in files if re.search(r"#\s*include\s*<(pybind11/|Python\.h)", p.read_text())} == {
        "module.cpp"
    }


# -------------------------------------------------------------------------------------- without compiled library
NO_LIBRARY = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import torch, pyflowgen
    from pyflowgen.models import RealNVP
assert [w.category for w in seen if "pyflowgen" in str(w.message)] == [RuntimeWarning], [str(w.message) for w in seen]
warnings.simplefilter("error")
info = pyflowgen.build_info()
assert "library_missing" in info and "library" not in info, info
assert COMPILER or info["compiler"] is None, info
torch.manual_seed(0)
x, params = torch.randn(5, 3), torch.randn(5, 6, requires_grad=True)
for got, want in zip(pyflowgen.affine_coupling(x, params, layout="halves"),
                     pyflowgen.affine_coupling_reference(x, params, layout="halves"), strict=True):
    assert torch.equal(got, want)
w = torch.randn(4, 3)
assert torch.equal(pyflowgen.linear(x, w, activation="tanh"), torch.nn.functional.linear(x, w).tanh())
flow = RealNVP((4,))
loss = -flow.log_prob(torch.randn(6, 4)).mean()
loss.backward()
assert all(p.grad is not None for p in flow.parameters() if p.requires_grad)
assert flow.sample(7).shape == (7, 4)
print("all on the reference")
"""


@pytest.mark.parametrize("module", ["with _C", "without _C"])
def test_all_works_without_the_compiled_library(module: str) -> None:
    hide = "" if module == "with _C" else "import sys; sys.modules['pyflowgen._C'] = None\n"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYFLOWGEN_QUIET", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-c", hide + NO_LIBRARY.replace("COMPILER", str(not hide))],
        env={**environment, "PYFLOWGEN_LIBRARY": "/nonexistent/libpyflowgen.so"},
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all on the reference"


def test_a_library_of_other_sources_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    header = tmp_path / "generated/sources.h"  # as the build makes it
    subprocess.run([sys.executable, PACKAGE / "_sources.py", header], check=True, timeout=60)
    built = header.read_text().split('"')[1]
    monkeypatch.setattr(_native, "_compiled_facts", lambda: {"sources": built})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _native._warn_of_other_sources()
    monkeypatch.setattr(_native, "fingerprint", lambda: "other")
    with pytest.warns(RuntimeWarning, match="build again with `make`"):
        _native._warn_of_other_sources()
    monkeypatch.setattr(_native, "fingerprint", lambda: None)  # a wheel has no sources beside it
    _native._warn_of_other_sources()


def test_fingerprint_is_of_names_and_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sources, "CSRC", tmp_path)
    assert _sources.fingerprint() is None
    seen = set()
    for name, text in [("module.cpp", "a"), ("b.h", "c"), ("b.h", "d"), ("e/b.cu", "d")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        seen.add(_sources.fingerprint())
    assert len(seen) == 4 and None not in seen


# ---------------------------------------------------------------------------------------------------- examples
MODULES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(pyflowgen.__path__, "pyflowgen.")
    if not re.search(r"\.(__main__|_C|libpyflowgen|kernels|benchmarks)\b", name)
)


@pytest.mark.parametrize("name", ["pyflowgen", *MODULES])
def test_examples(name: str) -> None:
    torch.manual_seed(0)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_public_name_is_documented(name: str) -> None:
    thing = getattr(pyflowgen, name)
    assert thing.__doc__, "no docstring"
    if not name.endswith("_reference"):
        assert ">>>" in thing.__doc__, "no example"


@pytest.mark.parametrize("page", ["README.md", "docs/detection.md"])
def test_examples_of_the_pages(page: str) -> None:
    torch.manual_seed(0)
    result = doctest.testfile(str(ROOT / page), module_relative=False)
    assert result.attempted > 3 and result.failed == 0


# ------------------------------------------------------------------------------------------------------- words
def test_no_path_of_one_machine() -> None:
    folders = ("csrc", "kernels", "pyflowgen", "benchmarks", "tests", "docs")
    suffixes = {".py", ".md", ".h", ".cpp", ".cu", ".cuh", ".toml", ".txt", ".j2", ".csv", ".in"}
    files = [p for folder in folders for p in (ROOT / folder).rglob("*")] + list(ROOT.glob("*"))
    for path in [*(p for p in files if p.suffix in suffixes), ROOT / "Makefile", ROOT / ".ci/run"]:
        found = re.search(r"(?<![\w.])/(home|root|work|Users|mnt|tmp)/\w+", path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)}: {found[0]}"
