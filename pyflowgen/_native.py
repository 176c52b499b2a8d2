"""What this installation can run: loads the compiled library, registers fakes, fills empty CUDA slots with Triton.

The one place that touches ``torch.library``, ``_C`` or Triton's import. A missing compiled library is no error:
every layer then runs its plain PyTorch reference, and :func:`build_info` says so.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyflowgen._sources import CSRC, fingerprint

# A test may load another build of the same ops, e.g. the CUDA kernels compiled for the CPU.
_LIBRARY = Path(os.environ.get("PYFLOWGEN_LIBRARY") or Path(__file__).with_name("libpyflowgen.so"))
# Triton's interpreter runs the GPU kernels on CPU tensors, for tests.
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_TRITON_KEY = "CPU" if _INTERPRET else "CUDA"
_KERNEL_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))

_triton = importlib.util.find_spec("triton") is not None
_definitions = torch.library.Library("pyflowgen", "FRAGMENT")
_fills: list[torch.library.Library] = []
_reference_only = False


def _load() -> str | None:
    """Load the op library; return why not, or None when it is there."""
    if not _LIBRARY.exists():
        return "it was not built (PYFLOWGEN_BUILD=none, or no build was run)"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return str(error)
    return None


_missing = _load()
if _missing and "PYFLOWGEN_QUIET" not in os.environ:
    warnings.warn(
        f"pyflowgen runs its plain PyTorch reference on the CPU: no compiled library, {_missing}.",
        RuntimeWarning,
        stacklevel=2,
    )


def _compiled_facts() -> dict[str, Any]:
    try:
        from pyflowgen import _C  # type: ignore[attr-defined]
    except ImportError:
        return {}
    return dict(_C.build_info())


def _warn_of_other_sources() -> None:
    """After a pull an editable install runs new Python on an old library, whose argument checks then fail."""
    built, here = _compiled_facts().get("sources"), fingerprint()
    if here is not None and built != here:
        warnings.warn(
            f"pyflowgen's compiled library was not built from the sources in {CSRC}: "
            "build again with `make` or `python setup.py build_ext --inplace`.",
            RuntimeWarning,
            stacklevel=2,
        )


if not _missing and "PYFLOWGEN_LIBRARY" not in os.environ and "PYFLOWGEN_QUIET" not in os.environ:
    _warn_of_other_sources()


def has_kernel(op: str, key: str) -> bool:
    """Whether operator ``pyflowgen::op`` has an implementation for dispatch key ``"CPU"`` or ``"CUDA"``."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"pyflowgen::{op}", key))


def launcher_schema(launcher: Callable[..., Any]) -> str:
    """The schema a launcher's annotations say; plain integers, as the compiled library has them."""
    return torch.library.infer_schema(launcher, mutates_args=()).replace("SymInt", "int")


def register(op: str, fake: Callable[..., Any]) -> None:
    """Give operator ``op`` its fake, and its Triton launcher wherever the compiled library left the slot empty.

    The launcher is the function called ``op`` in a module of ``pyflowgen.kernels`` named after the stem (``op`` up to
    ``_gates`` and ``_backward``). Without a compiled library the operator's schema comes from that launcher's
    annotations.
    """
    defined = bool(torch._C._dispatch_has_kernel(f"pyflowgen::{op}"))
    launcher = None
    if _triton and (_INTERPRET or torch.cuda.is_available()):
        stem = op.removesuffix("_backward").removesuffix("_gates")
        if importlib.util.find_spec(f"pyflowgen.kernels.{stem}") is not None:
            launcher = getattr(importlib.import_module(f"pyflowgen.kernels.{stem}"), op, None)
    if not defined:
        if launcher is None:
            return
        _definitions.define(op + launcher_schema(launcher))
    if launcher is not None and (_INTERPRET or not has_kernel(op, _TRITON_KEY)):
        # In the interpreter the launcher takes the CPU's place on purpose.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fill = torch.library.Library("pyflowgen", "IMPL")
            fill.impl(op, launcher, _TRITON_KEY, allow_override=True)
        _fills.append(fill)
        _by_triton.add((op, _TRITON_KEY.lower()))
    torch.library.register_fake(f"pyflowgen::{op}", fake)
    find_kernels(op)


def find_kernels(op: str) -> None:
    """Note for :func:`use_kernel` on which devices ``op`` has a kernel."""
    if not torch._C._dispatch_has_kernel(f"pyflowgen::{op}"):
        return
    for key in ("CPU", "CUDA"):
        if has_kernel(op, key):
            _kernels.add((op, key.lower()))


_kernels: set[tuple[str, str]] = set()
_by_triton: set[tuple[str, str]] = set()


def by_triton(op: str, x: Tensor) -> bool:
    """Whether a Triton kernel runs ``pyflowgen::op`` on x's device: some take less than the compiled library's."""
    return (op, x.device.type) in _by_triton


def has_kernel_for(op: str, x: Tensor) -> bool:
    """Whether a registered ``op`` has a kernel on x's device; unlike :func:`has_kernel` torch.compile traces it."""
    return (op, "cpu" if x.is_cpu else x.device.type) in _kernels  # (making the name costs 3 us)


def use_kernel(op: str, x: Tensor) -> bool:
    """The one choice made in Python: kernel (True) or reference.

    The reference runs where there is no kernel for the device or dtype, inside ``torch.func`` transforms and
    forward-mode differentiation, and under :func:`reference_path`.
    """
    return has_kernel_for(op, x) and x.dtype in _KERNEL_DTYPES and not _reference_only and not transforms_active()


def applier(function: Any) -> Callable[..., Any]:
    """``function.apply`` without its layers of Python before and behind, which a small batch feels.

    They serve ``torch.func`` and classes with a ``vjp``; where there may be a transform, ``function.apply`` is called.
    """
    lean = torch._C._FunctionBase.__dict__["apply"].__get__(None, function)
    if hasattr(function, "_backward_cls"):  # its own `apply` looks for the backward method in every call
        function._backward_cls.apply = function.backward

    def apply(*args: Any) -> Any:
        if torch.compiler.is_compiling() or transforms_active():
            return function.apply(*args)
        try:
            return lean(*args)
        except RuntimeError:  # also what is left of a transform that has ended: those tensors have no memory
            return function.apply(*args)

    return apply


def transforms_active() -> bool:
    """Whether a ``torch.func`` transform or forward-mode differentiation is under way."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def autocast_active() -> bool:
    """Whether autocast is on for any device: quicker to ask than for one."""
    return bool(torch._C._is_any_autocast_enabled())


def reference_only() -> bool:
    """Whether :func:`reference_path` is in force."""
    return _reference_only


def tracing() -> bool:
    """Whether values are not at hand to be looked at: in ``torch.compile``, ``torch.export``, ``torch.func``."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


@contextlib.contextmanager
def reference_path() -> Iterator[None]:
    """Run every pyflowgen layer on its plain PyTorch reference inside the block.

    Example:
        >>> import torch, pyflowgen
        >>> x, shift = torch.randn(4, 2), torch.randn(4, 2)
        >>> with pyflowgen.reference_path():
        ...     y, logdet = pyflowgen.affine_coupling(x, shift)
        >>> torch.equal(y, x + shift)
        True
    """
    global _reference_only
    before, _reference_only = _reference_only, True
    try:
        yield
    finally:
        _reference_only = before


def build_info() -> dict[str, Any]:
    """Facts about this installation, as plain strings, lists and booleans.

    Keys: ``version``, ``torch`` (running), ``torch_built_against``, ``compiler``, ``instruction_sets`` (compiled) and
    ``instruction_set`` (in use; ``ATEN_CPU_CAPABILITY`` lowers it), ``cuda_architectures``, ``triton`` (its version),
    ``library`` (path of the compiled ops) or ``library_missing`` (why the reference runs instead).

    Example:
        >>> import pyflowgen
        >>> info = pyflowgen.build_info()
        >>> info["version"] == pyflowgen.__version__, "library" in info or "library_missing" in info
        (True, True)
    """
    from pyflowgen import __version__

    info: dict[str, Any] = {"version": __version__, "torch": torch.__version__}
    info["compiler"] = None
    info.update(_compiled_facts())
    info["triton"] = importlib.metadata.version("triton") if _triton else None
    if _missing:
        info["library_missing"] = _missing
    else:
        info["library"] = str(_LIBRARY)
    return info
