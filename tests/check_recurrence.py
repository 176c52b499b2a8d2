"""What every recurrent op is held to beside the battery: torch's own layers, streams, threads."""

from __future__ import annotations

import copy
import io
import itertools
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check_op import Op, Sample
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import pyflowgen
from pyflowgen import _native
from pyflowgen.recurrence import Packed

kernel = pytest.mark.skipif("library" not in pyflowgen.build_info(), reason="no compiled library")
GATES, STATES = {"lstm": 4, "gru": 3}, {"lstm": 2, "gru": 1}


def arguments(op: str, time: int, batch: int, features: int, hidden: int, bias: bool = True) -> tuple[Tensor, ...]:
    """(x, state, weights) in float64, the weights as large as torch draws them."""
    torch.manual_seed(time + batch + features + hidden)
    rows, bound = GATES[op] * hidden, hidden**-0.5
    uniform = [torch.rand(s, dtype=torch.float64) * 2 * bound - bound for s in ((rows, features), (rows, hidden), (rows,), (rows,))]  # fmt: skip
    state = [torch.randn(batch, hidden, dtype=torch.float64) for _ in range(STATES[op])]
    return torch.randn(time, batch, features, dtype=torch.float64), *state, *uniform[: 4 if bias else 2]


def samples(op: str) -> list[Sample]:
    torch.manual_seed(0)
    strided = list(arguments(op, 4, 3, 5, 7))
    strided[0] = torch.randn(3, 4, 10, dtype=torch.float64).transpose(0, 1)[:, :, ::2]
    strided[1] = torch.randn(7, 3, dtype=torch.float64).T
    sizes = torch.tensor([20, 20, 9, 2, 1])
    packed = [list(arguments(op, 1, 20, 6, hidden)) for hidden in (9, 200)]
    for p in packed:
        p[0] = torch.randn(int(sizes.sum()), 6, dtype=torch.float64)
    lengths = {"batch_sizes": sizes}
    return [
        Sample("one step", arguments(op, 1, 1, 3, 5)),
        Sample("one stream", arguments(op, 20, 1, 24, 97)),
        Sample("some rows", arguments(op, 6, 5, 40, 33), {"reverse": True}),
        Sample("many rows", arguments(op, 5, 29, 16, 20)),
        Sample("two tiles", arguments(op, 3, 9, 8, 96, bias=False)),
        Sample("strided", tuple(strided)),
        Sample("packed", tuple(packed[0]), lengths),
        Sample("packed, reverse", tuple(packed[0]), {**lengths, "reverse": True}),
        Sample("packed, shared columns", tuple(packed[1]), {**lengths, "reverse": True}),
        Sample("no rows", arguments(op, 3, 0, 4, 5)),
        Sample("no time", arguments(op, 0, 2, 4, 5)),
    ]


def battery(op: str) -> Op:
    function, reference = getattr(pyflowgen, op), getattr(pyflowgen, f"{op}_reference")
    good = lambda: [t.float() for t in arguments(op, 2, 3, 4, 5)]  # noqa: E731

    def call(place: int, tensor: Any, **options: Any) -> Callable[[], Any]:
        return lambda: function(*(tensor if i == place else t for i, t in enumerate(good())), **options)

    weight = 1 + STATES[op]
    rows = GATES[op] * 5
    torch.manual_seed(1)
    ragged = list(arguments(op, 1, 3, 2, 3))
    ragged[0] = torch.randn(5, 2, dtype=torch.float64)
    return Op(
        name=op,
        function=function,
        reference=reference,
        samples=lambda: samples(op),
        small=lambda: [
            Sample("batch", arguments(op, 2, 2, 2, 3)),
            Sample("no bias, reverse", arguments(op, 2, 1, 3, 2, bias=False), {"reverse": True}),
            Sample("packed", tuple(ragged), {"batch_sizes": torch.tensor([3, 2])}),
        ],
        operator=lambda s: (
            getattr(torch.ops.pyflowgen, op).default,
            (*s.tensors, *[None] * (weight + 4 - len(s.tensors)), s.options.get("batch_sizes"), s.options.get("reverse", False)),
        ),  # fmt: skip
        resize=lambda batch: Sample("resized", arguments(op, 3, batch, 4, 5)),
        bad=[
            ("x not a tensor", call(0, 3), TypeError, "x must be a tensor, got int"),
            ("x dimensions", call(0, torch.zeros(3, 4)), ValueError, r"x has shape \(3, 4\), expected \(time, 3, 4\)"),
            ("features", call(0, torch.zeros(2, 3, 5)), ValueError, r"x has shape \(2, 3, 5\), expected \(time, 3, 4\)"),
            ("x dtype", call(0, torch.zeros(2, 3, 4).double()), TypeError, r"is torch.float32, expected x's torch.float64"),
            ("state", call(1, torch.zeros(3, 6)), ValueError, r"h has shape \(3, 6\), expected \(batch, 5\)"),
            ("weight_ih", call(weight, torch.zeros(7, 4)), ValueError, rf"weight_ih has shape \(7, 4\), expected \({rows}, in\)"),
            ("weight_hh", call(weight + 1, torch.zeros(rows, 4)), ValueError, r"weight_hh has shape"),
            ("bias", call(weight + 2, torch.zeros(4)), ValueError, rf"bias_ih has shape \(4,\), expected \({rows},\)"),
            ("sizes grow", call(0, torch.zeros(6, 4), batch_sizes=torch.tensor([2, 4])), ValueError, r"no growth"),
            ("sizes dtype", call(0, torch.zeros(6, 4), batch_sizes=torch.tensor([3.0])), ValueError, r"expected int64"),
        ],
        dtypes=(torch.float64, torch.float32),
    )  # fmt: skip


def pair(op: str, *args: Any, cell: bool = False, **options: Any) -> tuple[Any, Any]:
    """torch's layer and ours with its weights."""
    name = op.upper() + ("Cell" if cell else "")
    theirs = getattr(nn, name)(*args, **options)
    ours = getattr(pyflowgen, name)(*args, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for r in (result if type(result) is tuple else (result.data,)) for t in flat(r)]


def state_of(op: str, *shape: int, dtype: torch.dtype = torch.float64) -> Any:
    s = tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(STATES[op]))
    return s if op == "lstm" else s[0]


def recurrence_tests(op: str) -> dict[str, Callable[..., None]]:
    """The tests of one op, for its test file's namespace."""
    # layers, both directions, bias, batch first, packed, a given state
    layers = [
        o for o in itertools.product((1, 2), (False, True), (True, False), (False, True), (False, True), (True, False))
    ]

    @pytest.mark.parametrize("layers,both,bias,first,packed,given", layers)
    def test_layer_is_torchs(layers: int, both: bool, bias: bool, first: bool, packed: bool, given: bool) -> None:
        torch.manual_seed(0)
        options = dict(num_layers=layers, bidirectional=both, bias=bias, batch_first=first, dtype=torch.float64)
        theirs, ours = pair(op, 3, 6, **options)
        x = torch.randn((4, 5, 3) if first else (5, 4, 3), dtype=torch.float64, requires_grad=True)
        hx = state_of(op, layers * (1 + both), 4, 6) if given else None
        results = []
        for layer in (theirs, ours):
            given_x = pack_padded_sequence(x, torch.tensor([3, 5, 1, 5]), first, enforce_sorted=False) if packed else x
            result = layer(given_x, hx)
            outputs = flat(result)
            generator = torch.Generator().manual_seed(1)
            incoming = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
            inputs = [x, *([] if hx is None else flat(hx)), *layer.parameters()]
            results.append((result, outputs, torch.autograd.grad(outputs, inputs, incoming)))
            with torch.no_grad():
                for a, b in zip(flat(layer(given_x, hx)), outputs, strict=True):
                    torch.testing.assert_close(a, b)
        (r0, o0, g0), (r1, o1, g1) = results
        if packed:
            assert torch.equal(r0[0].sorted_indices, r1[0].sorted_indices)
            assert torch.equal(r0[0].unsorted_indices, r1[0].unsorted_indices)
        for a, b in zip([*o0, *g0], [*o1, *g1], strict=True):
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-13)

    def test_dropout_and_unbatched() -> None:
        theirs, ours = pair(op, 3, 6, num_layers=3, dropout=0.5)
        x = torch.randn(5, 3)
        for train in (True, False):
            theirs.train(train), ours.train(train)
            results = []
            for layer in (theirs, ours):
                torch.manual_seed(3)
                results.append(flat(layer(x)))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(b, a)

    def test_what_torch_refuses_is_refused() -> None:
        theirs, ours = pair(op, 3, 6)
        state = lambda *shape: state_of(op, *shape, dtype=torch.float32)  # noqa: E731
        for args in [
            (torch.zeros(3, 2, 4),), (torch.zeros(3, 2, 2, 3),), (torch.zeros(0, 2, 3),), (torch.zeros(3, 2, 3), state(1, 3, 6)),
            (torch.zeros(3, 2, 3), state(2, 6)), (torch.zeros(3, 3), state(1, 1, 6)), (torch.zeros(3, 2, 3, dtype=torch.float64),),
        ]:  # fmt: skip
            for layer in (theirs, ours):
                with pytest.raises((ValueError, RuntimeError, TypeError)):
                    layer(*args)
        theirs, ours = pair(op, 3, 6, cell=True)
        for args in [(torch.zeros(2, 4),), (torch.zeros(2, 2, 3),), (torch.zeros(2, 3), state(3, 6))]:
            for cell in (theirs, ours):
                with pytest.raises((ValueError, RuntimeError)):
                    cell(*args)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("shape", [(3,), (2, 3), (9, 3)])
    def test_cell_is_torchs(shape: tuple[int, ...], bias: bool) -> None:
        theirs, ours = pair(op, 3, 6, bias, cell=True, dtype=torch.float64)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for hx in (None, state_of(op, *shape[:-1], 6)):
            got, want = flat(ours(x, hx)), flat(theirs(x, hx))
            state = [] if hx is None else flat(hx)
            incoming = [torch.randn_like(t) for t in want]
            for a, b in zip(
                [*got, *torch.autograd.grad(got, [x, *state, *ours.parameters()], incoming)],
                [*want, *torch.autograd.grad(want, [x, *state, *theirs.parameters()], incoming)],
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
            with torch.no_grad():
                for a, b in zip(flat(ours(x, hx)), want, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)

    def test_other_dtypes_run_torch() -> None:
        theirs, ours = pair(op, 3, 6)
        x = torch.randn(4, 2, 3, dtype=torch.bfloat16)
        torch.testing.assert_close(flat(ours.bfloat16()(x)), flat(theirs.bfloat16()(x)), rtol=0, atol=0)
        if op == "lstm":
            theirs, ours = pair(op, 3, 6, proj_size=2)
            torch.testing.assert_close(flat(ours(x.float())), flat(theirs(x.float())), rtol=0, atol=0)
            theirs, ours = pair(op, 3, 6)
            x = torch.randn(4, 32, 3)
            with torch.no_grad(), torch.profiler.profile() as profile:
                torch.testing.assert_close(flat(ours(x)), flat(theirs(x)), rtol=0, atol=0)
            assert not any(e.key.startswith("pyflowgen::") for e in profile.key_averages()), "oneDNN is faster here"
        with torch.autocast("cpu", torch.bfloat16):
            theirs, ours = pair(op, 3, 6)
            torch.testing.assert_close(flat(ours(x.float())), flat(theirs(x.float())), rtol=0, atol=0)

    # ---------------------------------------------------------------------------------------------------- streams
    @kernel
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_steps_are_the_sequence(dtype: torch.dtype) -> None:
        """A stream in steps gives the clip's scores, whatever the number of streams beside it."""
        layer = getattr(pyflowgen, op.upper())(20, 37, num_layers=2, dtype=dtype)
        x = torch.randn(12, 7, 20, dtype=dtype)
        with torch.no_grad():
            y, last = layer(x)
        state, alone = layer.init_state(7), layer.init_state(1)
        for t in range(12):
            output, state = layer.step(x[t], state)
            single, alone = layer.step(x[t, 2:3], alone)
            assert torch.equal(single[0], output[2])
            torch.testing.assert_close(output, y[t], rtol=0, atol=20 * torch.finfo(dtype).eps)
        for a, b in zip(flat(state), flat(last), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=50 * torch.finfo(dtype).eps)

    @kernel
    def test_causal_and_rows_alone() -> None:
        """What comes later, and other rows, leave the bits as they are."""
        function = getattr(pyflowgen, op)
        for hidden, batch in ((40, 30), (200, 3), (16, 1)):
            x, *rest = (t.float() for t in arguments(op, 9, batch, 12, hidden))
            y = function(x, *rest)[0]
            other = x.clone()
            other[5:] += 1
            assert torch.equal(function(other, *rest)[0][:5], y[:5])
            n = STATES[op]
            assert torch.equal(function(x[:, -1:], *(s[-1:] for s in rest[:n]), *rest[n:])[0], y[:, -1:])

    @kernel
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=lambda d: str(d)[6:])
    @pytest.mark.parametrize("size", [(1, 1), (3, 5), (70, 37), (64, 128), (515, 64)])
    def test_short_weights(size: tuple[int, int], dtype: torch.dtype) -> None:
        """The step is that of the rounded weights (int8: of rounded inputs too), and of nothing else.

        Beside bf16 weights inputs have 17 bits of mantissa at least.
        """
        cell = getattr(pyflowgen, op.upper() + "Cell")(*size)
        short = copy.deepcopy(cell).pack(dtype)

        def rounded(t: Tensor) -> Tensor:
            """Rows of 8-bit integers times a scale."""
            largest = t.abs().amax(1, keepdim=True)
            return (t * torch.div(torch.tensor(127.0), largest)).round().nan_to_num().double() * largest / 127

        def step(x: Tensor, state: Any) -> list[Tensor]:
            h = flat(state)[0]
            eight = (lambda t: t.double()) if dtype is torch.bfloat16 else rounded
            w, v = ((t.bfloat16().double() if dtype is torch.bfloat16 else rounded(t)) for t in (cell.weight_ih, cell.weight_hh))  # fmt: skip
            a = F.linear(eight(x), w, cell.bias_ih.double())
            b = F.linear(eight(h), v, cell.bias_hh.double())
            if op == "lstm":
                i, f, g, o = (a + b).chunk(4, 1)
                c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
                return [o.sigmoid() * c.tanh(), c]
            (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, 1), b.chunk(3, 1)
            n, z = (a_n + (a_r + b_r).sigmoid() * b_n).tanh(), (a_z + b_z).sigmoid()
            return [(1 - z) * n + z * h]

        for batch in (1, 9):
            state = short.init_state(batch)
            for _ in range(5):
                x = torch.randn(batch, size[0])
                want, state = step(x, state), short.step(x, state)
                for a, b in zip(flat(state), want, strict=True):
                    assert (a - b).abs().max().item() < (2e-5 if dtype is torch.bfloat16 else 3e-6)

    @kernel
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
    def test_not_a_number_is_seen(dtype: torch.dtype | None) -> None:
        cell = getattr(pyflowgen, op.upper() + "Cell")(5, 20).pack(dtype)
        for value in (float("nan"), float("inf"), -3.4e38):  # the last is beyond bf16's largest
            x = torch.zeros(2, 5)
            x[1, 3] = value
            h = flat(cell.step(x, cell.init_state(2)))[0]
            want = flat(nn.Module.__call__(cell.pack(None), x, cell.init_state(2)))[0]
            assert h[0].isfinite().all()
            if value != value:
                assert h[1].isnan().all() and want[1].isnan().all()
            elif dtype is not torch.int8 or value < 0:
                torch.testing.assert_close(h, want, rtol=0, atol=1e-2, equal_nan=True)
            cell.pack(dtype)
        if dtype is torch.int8:
            with torch.no_grad():
                cell.weight_hh[0, 0] = float("nan")
            with pytest.raises(ValueError, match="not finite"):
                cell.step(x, cell.init_state(2))

    @kernel
    def test_packed_weights_follow_the_weights() -> None:
        cell = getattr(pyflowgen, op.upper() + "Cell")(4, 9)
        x = torch.randn(3, 4)

        def agrees(cell: Any, dtype: torch.dtype = torch.float32) -> None:
            state = [s.to(dtype) for s in flat(cell.init_state(3))]
            given = tuple(state) if op == "lstm" else state[0]
            with pyflowgen.reference_path():
                want = flat(cell(x.to(dtype), given))
            for a, b in zip(flat(cell.step(x.to(dtype), given)), want, strict=True):
                torch.testing.assert_close(a, b.detach())

        agrees(cell)
        optimizer = torch.optim.SGD(cell.parameters(), 0.5)
        flat(cell(x))[0].square().sum().backward()
        optimizer.step()
        agrees(cell)
        cell.load_state_dict({k: torch.randn_like(v) for k, v in cell.state_dict().items()})
        agrees(cell)
        cell.weight_hh.data = torch.randn_like(cell.weight_hh)
        agrees(cell)
        cell.bias_ih = nn.Parameter(torch.randn_like(cell.bias_ih))
        agrees(cell)
        twin = copy.deepcopy(cell)
        with torch.no_grad():
            twin.weight_ih.mul_(2)
        agrees(twin), agrees(cell)
        file = io.BytesIO()
        torch.save(cell, file)
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            agrees(torch.load(file, weights_only=False))
        agrees(cell.double(), torch.float64)
        with torch.inference_mode():
            fresh = getattr(pyflowgen, op.upper() + "Cell")(4, 9)
            agrees(fresh)
            fresh.weight_hh.mul_(3)
            agrees(fresh)
        assert Packed(torch.int8).__reduce__() == (Packed, (torch.int8,))

    @kernel
    def test_a_stale_pack_is_noticed() -> None:
        """Sequences compare some elements of the packed weights with the weights themselves."""
        layer = getattr(pyflowgen, op.upper())(4, 9)
        x = torch.randn(3, 2, 4)
        with torch.no_grad():
            layer(x)
            for name in ("weight_ih_l0", "weight_hh_l0"):
                getattr(layer, name).data.mul_(2)  # no version counts this
                got = flat(layer(x))
                with pyflowgen.reference_path():
                    torch.testing.assert_close(got, flat(layer(x)))

    def test_pack_refuses() -> None:
        cell, layer = (
            getattr(pyflowgen, op.upper() + "Cell")(4, 9),
            getattr(pyflowgen, op.upper())(4, 9, bidirectional=True),
        )
        for what in (cell, layer):
            with pytest.raises(ValueError, match="dtype is torch.float16"):
                what.pack(torch.float16)
        with pytest.raises(ValueError, match="dtype is torch.int8 for torch.float64 weights"):
            copy.deepcopy(cell).double().pack(torch.int8)
        with pytest.raises(ValueError, match="one direction"):
            layer.step(torch.zeros(1, 4), layer.init_state(1))

    @pytest.mark.parametrize("reference", [False, True])
    def test_a_wrong_state_of_layers_is_told(reference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_native, "_reference_only", reference)
        layer = getattr(pyflowgen, op.upper())(4, 9, num_layers=2)
        for x, batch, words in (
            (torch.zeros(2, 5), 2, r"x has shape .*5\), expected .*4\)"),
            (torch.zeros(4), 2, r"x has shape \(4,\), expected \(batch, 4\)"),
            (torch.zeros(3, 4), 2, r"state has shape \(2, 2, 9\).*of \(2, 3, 9\)"),
        ):
            with pytest.raises(ValueError, match=words):
                layer.step(x, layer.init_state(batch))
        with pytest.raises(ValueError, match=r"state has shape \(1, 2, 9\)"):
            layer.step(torch.zeros(2, 4), getattr(pyflowgen, op.upper())(4, 9).init_state(2))

    @kernel
    def test_words_of_a_wrong_step() -> None:
        cell = getattr(pyflowgen, op.upper() + "Cell")(4, 9)
        short = cell.init_state(3)
        with pytest.raises(ValueError, match=r"x has shape \(2, 5\), expected \(2, 4\)"):
            cell.step(torch.zeros(2, 5), cell.init_state(2))
        with pytest.raises(ValueError, match=r"x has shape \(2, 4\), expected \(3, 4\)"):
            cell.step(torch.zeros(2, 4), short)
        with pytest.raises(TypeError, match="expected x's torch.float64"):
            cell.step(torch.zeros(3, 4, dtype=torch.float64), short)
        if STATES[op] == 2:
            with pytest.raises(ValueError, match="state has 1 tensors, expected 2"):
                cell.step(torch.zeros(3, 4), short[:1])

    def test_a_first_step_needs_no_state() -> None:
        cell, layer = getattr(pyflowgen, op.upper() + "Cell")(4, 9), getattr(pyflowgen, op.upper())(4, 9, num_layers=2)
        x = torch.randn(2, 4)
        for a, b in zip(flat(cell.step(x)), flat(cell.step(x, cell.init_state(2))), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(flat(layer.step(x)), flat(layer.step(x, layer.init_state(2))), strict=True):
            assert torch.equal(a, b)

    def test_a_wrong_cell_is_told_in_torchs_words() -> None:
        made = [getattr(of, op.upper() + "Cell")(4, 9) for of in (nn, pyflowgen)]
        state = made[1].init_state(2)
        for x in (torch.zeros(2, 5), torch.zeros(3, 4), torch.zeros(4)):
            for grad in (True, False):
                said = []
                for cell in made:
                    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as caught:
                        cell(x, state)
                    said.append(str(caught.value))
                assert said[0] == said[1]

    def test_compile() -> None:
        """A cell and a layer are one graph; of layers torch.compile must be told to take any."""
        torch.compiler.reset()
        cell = getattr(pyflowgen, op.upper() + "Cell")(4, 9)
        layer = getattr(pyflowgen, op.upper())(4, 9, num_layers=2, bidirectional=True)
        for module, shapes in ((cell, ((2, 4), (5, 4))), (layer, ((3, 2, 4), (6, 5, 4)))):
            with torch._dynamo.config.patch(allow_rnn=True):
                compiled = torch.compile(module, fullgraph=True, dynamic=True)
                for shape in shapes:
                    x = torch.randn(shape)
                    got, want = flat(compiled(x)), flat(module(x))
                    torch.testing.assert_close(got, want)
                    for a, b in zip(*(torch.autograd.grad(o[0].sum(), list(module.parameters())) for o in (got, want)), strict=True):  # fmt: skip
                        torch.testing.assert_close(a, b)
        torch.compiler.reset()
        x = torch.randn(3, 2, 4)
        torch.testing.assert_close(flat(torch.compile(layer)(x)), flat(layer(x)))  # as torch.compile is by itself

    def test_jit_trace() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, shape in (("", (3, 2, 4)), ("Cell", (2, 4))):
                module, x = getattr(pyflowgen, op.upper() + name)(4, 9), torch.randn(shape)
                torch.testing.assert_close(flat(torch.jit.trace(module, x)(x)), flat(module(x)))

    def test_steps_under_autocast() -> None:
        """What goes into a layer may be as short as autocast made it; the state stays float32."""
        cell, layer = getattr(pyflowgen, op.upper() + "Cell")(4, 9), getattr(pyflowgen, op.upper())(4, 9)
        x = torch.randn(2, 4)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            for given in (x, x.bfloat16()):
                _, state = layer.step(given)
                for a, b in zip(flat(state), flat(cell.step(given)), strict=True):
                    assert a.dtype is torch.float32 and b.shape == (2, 9)

    # ---------------------------------------------------------------------------------------------------- threads
    @kernel
    def test_threads_of_all_kinds() -> None:
        """More threads than cores, several callers at once, and a child process: the same bits, and an end."""
        sizes = ((8, 3, 16, 256), (8, 40, 16, 64))
        calls = [[t.float().requires_grad_() for t in arguments(op, *size)] for size in sizes]
        cell = getattr(pyflowgen, op.upper() + "Cell")(300, 300)
        x = torch.randn(1, 300)

        def work() -> list[Tensor]:
            found = []
            for args in calls:
                outputs = getattr(pyflowgen, op)(*args)
                found += [*outputs, *torch.autograd.grad([o.sum() for o in outputs], args)]
            return [*found, *flat(cell.step(x, cell.init_state(1)))]

        want, threads = work(), torch.get_num_threads()

        def agree(found: list[Tensor]) -> bool:
            return all(torch.equal(a, b) for a, b in zip(found, want, strict=True))

        try:
            for n in (1, 2, 5):
                torch.set_num_threads(n)
                assert agree(work())
                results: list[bool] = []
                callers = [threading.Thread(target=lambda r=results: r.append(agree(work()))) for _ in range(3)]
                for caller in callers:
                    caller.start()
                for caller in callers:
                    caller.join(60)
                assert results == [True] * 3
        finally:
            torch.set_num_threads(threads)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "multi-threaded, use of fork() may lead to deadlocks in the child"
            child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            os._exit(0 if agree([t.detach() for t in work()]) else 1)
        assert os.waitpid(child, 0)[1] == 0

    def test_without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
        """Everything runs where no kernel does."""
        monkeypatch.setattr(_native, "_reference_only", True)
        layer, cell = getattr(pyflowgen, op.upper())(4, 9), getattr(pyflowgen, op.upper() + "Cell")(4, 9)
        x = torch.randn(3, 2, 4)
        y = layer(x)[0]
        state = layer.init_state(2)
        for t in range(3):
            output, state = layer.step(x[t], state)
        torch.testing.assert_close(output, y[-1].detach())
        a, b = flat(cell.step(x[0], cell.init_state(2))), flat(cell(x[0]))
        torch.testing.assert_close(a[0], b[0].detach())
        assert not a[0].requires_grad

    return {name: value for name, value in locals().items() if name.startswith("test_")}
