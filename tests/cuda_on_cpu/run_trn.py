"""The CUDA launchers of trn on CPU tensors; run by tests/test_cuda_on_cpu.py in a process of its own."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

import pyflowgen
from pyflowgen import TRN, _native
from pyflowgen.ops.trn import TRNWeights

OPTIONS = list(itertools.product(("after", "before"), ("current", "previous")))


def run(function, arguments, **options):
    torch.manual_seed(1)  # for dropout's masks
    *tensors, weights = arguments
    out = function(*tensors, TRNWeights(*weights), **options)
    loss = sum((o * torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in out)
    grads = torch.autograd.grad(loss, (*tensors, *weights), allow_unused=True)
    found = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, (*tensors, *weights), strict=True)]
    return [t.detach().double() for t in (*out, *found)]


def arguments(batch, frames, features, hidden, classes, dtype):
    torch.manual_seed(batch + hidden)
    layer = TRN(features, hidden, classes).double()
    tensors = torch.randn(batch, frames, features), torch.randn(batch, hidden), torch.randn(batch, hidden)
    every = *tensors, torch.rand(batch, features), *(3 * w for w in layer.weights())
    x, h, c, future, *weights = (t.detach().to(dtype).requires_grad_() for t in every)
    return x, h, c, future, weights


def close(got, want, dtype):
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        eps = 1e-11 if dtype == torch.float64 else 2e-5
        assert w.numel() == 0 or (g - w).abs().max() <= eps * w.abs().max().clamp(min=1), i


def test_the_launchers_run():
    assert os.environ["PYFLOWGEN_LIBRARY"] == pyflowgen.build_info()["library"]
    assert _native.use_kernel("trn", torch.zeros(1)) and not _native.use_kernel("trn_step", torch.zeros(1))


@pytest.mark.parametrize("dropout", (0.0, 0.3))
@pytest.mark.parametrize(("pool", "start"), OPTIONS)
def test_values_and_gradients(pool, start, dropout):
    given = arguments(5, 2, 6, 9, 3, torch.float64)
    options = {"steps": 3, "pool": pool, "start": start, "dropout": dropout}
    close(run(pyflowgen.trn, given, **options), run(pyflowgen.trn_reference, given, **options), torch.float64)


# One stream and one step; more features than units a block; more classes than a tile, and than the device has shared
# memory for beside the rest; no frame, no stream.
@pytest.mark.parametrize("sizes", ((1, 3, 2, 3, 1, 1), (2, 2, 30, 5, 34, 2), (2, 0, 4, 5, 3, 2), (0, 2, 4, 5, 3, 2)))
def test_sizes(sizes):
    *shape, steps = sizes
    for dtype in (torch.float32, torch.float64):
        given = arguments(*shape, dtype)
        close(run(pyflowgen.trn, given, steps=steps), run(pyflowgen.trn_reference, given, steps=steps), dtype)


@pytest.mark.parametrize(("pool", "start"), OPTIONS)
def test_clips_in_pieces_and_streams(pool, start):
    """Without gradients little is kept; a stream's frames one by one are the clip's."""
    torch.manual_seed(0)
    layer = TRN(5, 6, 4, steps=2, pool=pool, start=start).eval()
    frames = torch.randn(2, 5, 5)
    with torch.no_grad():
        whole = layer(frames)
        with pyflowgen.reference_path():
            want = layer(frames)
        first = layer(frames[:, :2])
        rest = layer(frames[:, 2:], first[2:])
        state = layer.init_state(2)
        for frame in frames.unbind(1):
            out = layer.step(frame, state)
            state = out[2:]
    for g, w in zip(whole, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)
    for g, w in zip((torch.cat([first.scores, rest.scores], 1), *rest[2:]), (whole.scores, *whole[2:]), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.scores, whole.scores[:, -1], rtol=1e-5, atol=1e-6)
