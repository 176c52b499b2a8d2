"""Puts models of other libraries on the kernels, in place: their classes' arithmetic is replaced, nothing else."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from pyflowgen.ops.gru import GRU, GRUCell
from pyflowgen.ops.lstm import LSTM, LSTMCell
from pyflowgen.peers import freia, nflows, normflows, zuko
from pyflowgen.recurrence import CellLayer, SequenceLayer

Model = TypeVar("Model", bound=nn.Module)

_TORCH: dict[type, type] = {nn.LSTM: LSTM, nn.GRU: GRU, nn.LSTMCell: LSTMCell, nn.GRUCell: GRUCell}
# (end of the module's name, class) -> what replaces its arithmetic. Forks keep both, with another package before them.
_PEERS: dict[tuple[str, str], type] = {**nflows.CLASSES, **normflows.CLASSES, **zuko.CLASSES, **freia.CLASSES}
# They only run others' layers together.
_CONTAINERS = (nflows.Composite, normflows.NormalizingFlow, zuko.Composed, freia.SequenceINN)


@functools.cache
def _accelerated(plain: Any, faster: Any) -> Any:
    name = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (_Swapped, faster, plain), {**name, "_plain": plain, "_faster": faster})


def _rebuild(plain: type, faster: type) -> Any:
    made = _accelerated(plain, faster)
    return made.__new__(made)


class _Swapped:
    """Copies and pickles of an accelerated module are accelerated; `type` made its class, which no name leads to."""

    _plain: type
    _faster: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(2)
        _, _, found, *rest = reduced
        state = {name: value for name, value in found.items() if name != "_pyflowgen"}
        return _rebuild, (self._plain, self._faster), state, *rest


def _faster(module: nn.Module) -> type | None:
    """What replaces the arithmetic of exactly this class: a subclass may have changed it."""
    kind = type(module)
    for (where, name), faster in _PEERS.items():
        if kind.__name__ == name and f".{kind.__module__}".endswith(f".{where}"):
            return faster
    return None


def accelerate(model: Model) -> Model:
    """Run the layers of a model of another library on pyflowgen's kernels, in place.

    ==================  =============================================================================================
    library             what runs faster
    ==================  =============================================================================================
    nflows, its forks   ``CompositeTransform``; ``AffineCouplingTransform``, ``AdditiveCouplingTransform`` and the
                        piecewise couplings (rational quadratic, linear, quadratic, cubic); the rational quadratic
                        autoregressive transform and CDF; ``LULinear``
    normflows           ``NormalizingFlow``; ``AffineCouplingBlock``; the rational quadratic coupling, autoregressive
                        transform and CDF; ``LULinearPermute``
    zuko                ``GeneralCouplingTransform`` (``NICE``, ``RealNVP``) with affine or rational quadratic maps;
                        rational quadratic maps of ``MaskedAutoregressiveTransform`` (``NSF``) and element-wise ones
    FrEIA               ``SequenceINN``; coupling blocks of GLOW, RNVP and NICE, ``AllInOneBlock``
    torch.nn            ``LSTM``, ``GRU``, ``LSTMCell``, ``GRUCell``
    ==================  =============================================================================================

    A coupling on a residual network or perceptron of its library becomes one operator, and so does a run of couplings
    with the permutations and ActNorms between; others keep their conditioner and get the map's kernel. Parameters,
    buffers, ``state_dict``, hooks, ``isinstance`` and the random numbers drawn stay as they are: each module's class
    becomes a subclass of its own that replaces the arithmetic. What a kernel does not take (another dtype or device, a
    double backward, a scale function of one's own) runs as before. Classes are known by name and module, forks
    included, and every layer is first compared with itself on a few random rows; one that computes something else is
    left alone, with a warning.

    Args:
        model: any module; all modules in it are looked at. Layers put in later are not: call it again.

    Returns:
        the model itself. :func:`accelerated` lists what was replaced, :func:`restore` puts it back.

    Raises:
        TypeError: model is no module.

    Example:
        >>> import torch, pyflowgen
        >>> model = torch.nn.Sequential(torch.nn.LSTM(3, 5))
        >>> before = model(torch.ones(2, 4, 3))[0]
        >>> after = pyflowgen.accelerate(model)(torch.ones(2, 4, 3))[0]
        >>> torch.allclose(before, after, atol=1e-6), pyflowgen.accelerated(model)
        (True, {'0': 'LSTM'})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model is {type(model).__name__}, expected a torch.nn.Module")
    found = False
    for name, module in model.named_modules():
        kind: Any = type(module)
        if kind in _TORCH:
            # The class as the constructor leaves it; parameters are untouched.
            module.__class__ = _TORCH[kind]
            module._prepare()
            found = True
        elif isinstance(module, _Swapped):
            found = True
        elif (faster := _faster(module)) is not None:
            module.__class__ = _accelerated(kind, faster)
            if not getattr(module, "_gains", lambda: True)():
                module.__class__ = kind
            elif _agrees(module):
                found = found or not issubclass(faster, _CONTAINERS)
            else:
                module.__class__ = kind
                warnings.warn(
                    f"accelerate: {name or 'the model'} is called {kind.__module__}.{kind.__name__} but computes "
                    "something else; it is left as it is",
                    stacklevel=2,
                )
    if not found:
        warnings.warn("accelerate: the model has no layer that is known here; nothing was changed", stacklevel=2)
    return model


@torch.no_grad()
def _agrees(module: Any) -> bool:
    """Whether an accelerated module gives on random rows what its own class gives."""
    if any(p.is_meta for p in module.parameters()):
        return True  # nothing to compare yet
    pairs: Iterator[tuple[torch.Tensor, torch.Tensor]] = module._compared()
    for fast, plain in pairs:
        if fast.shape != plain.shape or not torch.allclose(fast, plain.to(fast.dtype), rtol=1e-3, atol=1e-3):
            return False
    return True


def accelerated(model: nn.Module) -> dict[str, str]:
    """Which modules of the model :func:`accelerate` has replaced: name and class.

    Example:
        >>> import torch, pyflowgen
        >>> pyflowgen.accelerated(torch.nn.Linear(2, 3))
        {}
    """
    ours = (_Swapped, SequenceLayer, CellLayer)
    return {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, ours)}


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`: every module gets its own class back. Returns the model.

    Example:
        >>> import torch, pyflowgen
        >>> cell = pyflowgen.accelerate(torch.nn.GRUCell(3, 5))
        >>> type(pyflowgen.restore(cell))
        <class 'torch.nn.modules.rnn.GRUCell'>
    """
    back = {faster: plain for plain, faster in _TORCH.items()}
    for module in model.modules():
        if isinstance(module, _Swapped):
            module.__class__ = module._plain
            module.__dict__.pop("_pyflowgen", None)
        elif type(module) in back:
            module.__class__ = back[type(module)]
            for name in ("_pack", "_packs"):
                module.__dict__.pop(name, None)
    return model
