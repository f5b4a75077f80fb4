"""`warmup`: every kind of layer runs once for each number of tokens, and nothing else happens."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowbit
from lowbit.kernels.problem import Problem
from lowbit.kernels.select import Kernel, select
from lowbit.tensor import FUNCTIONS, QuantizedTensor


@dataclass
class Ran:
    """What reached kernels: every problem, and the bias and static scale that came with it."""

    problems: list[Problem] = field(default_factory=list)
    extras: list[tuple[bool, bool]] = field(default_factory=list)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    seen, function = Ran(), Kernel.function.fget  # type: ignore[attr-defined]

    def recording(kernel: Kernel):  # type: ignore[no-untyped-def]
        def run(x: Tensor, planes: object, bias: Tensor | None, problem: Problem, act_scale: Tensor | None) -> Tensor:
            assert select(problem).kernel is kernel
            assert (x.shape, x.dtype) == ((problem.m, problem.k), problem.dtype)
            seen.problems.append(problem)
            seen.extras.append((bias is not None, act_scale is not None))
            return function(kernel)(x, planes, bias, problem, act_scale)

        return run

    monkeypatch.setattr(Kernel, "function", property(recording))
    return seen


def problem(m: int, n: int, k: int, spec: str, act: str = "", dtype: torch.dtype = torch.bfloat16) -> Problem:
    return Problem(m, n, k, spec, act, dtype, "cpu")


def quantized(*layers: nn.Module, config: object = "int8wo") -> nn.Sequential:
    model = nn.Sequential(*layers).bfloat16()
    lowbit.quantize_(model, config)  # type: ignore[arg-type]
    return model


def test_each_kind_runs_once_for_each_number_of_tokens(ran: Ran) -> None:
    model = quantized(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64, bias=False), nn.Linear(64, 32), nn.Linear(64, 32, bias=False),
        nn.Linear(32, 64, bias=False),
    )  # fmt: skip
    done = lowbit.warmup(model, (40, 1, 1, 8))
    assert done.layers == ("0", "2", "4"), "3 and 5 are like 0 and 2"
    sizes = [(32, 64), (64, 32), (32, 64)]
    assert ran.problems == [problem(m, n, k, "int8:row") for n, k in sizes for m in (1, 8, 40)]
    assert [bias for bias, _ in ran.extras] == 3 * [True] + 6 * [False]
    assert done.devices == ("cpu",)


def test_kernels_are_those_that_select_names() -> None:
    model = quantized(nn.Linear(64, 64), nn.Linear(64, 64), config={"0": "int8wo", "1": "int4wo-32"})
    done = lowbit.warmup(model, (1, 16, 64))
    expected: dict[str, set[int]] = {}
    for spec in ("int8:row", "int4:g32:asym"):
        for m in (1, 16, 64):
            expected.setdefault(select(problem(m, 64, 64, spec)).kernel.name, set()).add(m)
    assert {name: set(tokens) for name, tokens in done.kernels.items()} == expected
    assert all(list(tokens) == sorted(tokens) for tokens in done.kernels.values())
    text = str(done)
    assert text.startswith("warm on cpu: 2 kinds of layers in ")
    for name, tokens in done.kernels.items():
        assert f"  {name}: M = {', '.join(map(str, tokens))}" in text.splitlines()


def test_schemes_biases_and_scales_make_kinds(ran: Ran) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4))).bfloat16()
    static = lowbit.Int8StaticActivationInt8WeightConfig(scale=0.01)
    lowbit.quantize_(model, {"0": "int8wo", "1": "int8dq", "2": static, "3": "int4wo-32"})
    lowbit.warmup(model, [3])
    weights = [layer.weight for layer in model]
    assert ran.problems == [problem(3, 64, 64, w.format.spec, w.act_spec) for w in weights]
    assert [scale for _, scale in ran.extras] == [False, False, True, False]
    model[1].weight = model[0].weight  # tied
    assert lowbit.warmup(model, [3]).layers == ("0", "2", "3")


def test_a_bias_of_another_dtype_is_another_kind() -> None:
    model = quantized(nn.Linear(64, 64), nn.Linear(64, 64))
    assert model[1].bias is not None
    model[1].bias = nn.Parameter(model[1].bias.float())
    assert lowbit.warmup(model, [1]).layers == ("0", "1")


def test_dtype_of_activations(ran: Ran) -> None:
    model = quantized(nn.Linear(64, 64))
    lowbit.warmup(model, [1], torch.float16)
    assert ran.problems == [problem(1, 64, 64, "int8:row", dtype=torch.float16)]


def test_use_kernel_is_obeyed() -> None:
    with lowbit.use_kernel("torch_blocked"):
        assert lowbit.warmup(quantized(nn.Linear(64, 64)), (1, 100)).kernels == {"torch_blocked": (1, 100)}


def test_other_modules_do_not_count(ran: Ran) -> None:
    model = nn.ModuleDict({"table": nn.Embedding(16, 64), "up": nn.Linear(64, 64), "out": nn.Linear(64, 64)}).bfloat16()
    lowbit.quantize_(model, {"table": "int8wo", "up": "int8wo"})
    assert lowbit.warmup(model, [1]).layers == ("up",)
    assert len(ran.problems) == 1


def test_nothing_is_touched() -> None:
    model = quantized(nn.Linear(64, 64), nn.Dropout(), nn.Linear(64, 64)).train()
    bias = model[0].bias
    assert isinstance(bias, Tensor)
    bias.grad = torch.full_like(bias, 3.0)
    called = []
    model[0].register_forward_hook(lambda *_: called.append("hook"))
    weights = [p.clone() for layer in (model[0], model[2]) for p in layer.weight.planes.values()]  # type: ignore[union-attr, operator]
    before, state = [p.detach().clone() for p in (bias, model[2].bias)], torch.random.get_rng_state()
    lowbit.warmup(model, (1, 40))
    assert not called
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert torch.equal(bias.grad, torch.full_like(bias, 3.0))
    assert model[2].bias.grad is None  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(before, (bias, model[2].bias)))  # type: ignore[arg-type]
    after = [p for layer in (model[0], model[2]) for p in layer.weight.planes.values()]  # type: ignore[union-attr, operator]
    assert all(torch.equal(a, b) for a, b in zip(weights, after))
    assert model.training


def test_no_graph_of_gradients_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []

    def linear(x: Tensor, w: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
        results.append(real(x, w, bias))
        return results[-1]

    real = FUNCTIONS[F.linear]
    monkeypatch.setitem(FUNCTIONS, F.linear, linear)
    lowbit.warmup(quantized(nn.Linear(64, 64)), [1])
    assert [y.requires_grad for y in results] == [False]


def test_progress_comes_before_each_run(ran: Ran) -> None:
    calls = []

    def progress(done: int, total: int, name: str) -> None:
        assert done == len(ran.problems)
        calls.append((done, total, name))

    lowbit.warmup(quantized(nn.Linear(64, 32), nn.Linear(32, 64)), (1, 2), progress=progress)
    assert calls == [(0, 4, "0"), (1, 4, "0"), (2, 4, "1"), (3, 4, "1")]


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [(), (1, 0), (-1,)], ids=str)
def test_tokens_are_positive(tokens: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"positive numbers, got .*\[lowbit: bad-option\]$"):
        lowbit.warmup(quantized(nn.Linear(64, 64)), tokens)


def test_nothing_quantized_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"call lowbit.quantize_ first \(LB1010\) \[lowbit: nothing-quantized\]$"):
        lowbit.warmup(nn.Linear(2, 2))


def test_the_meta_device_runs_nothing() -> None:
    model = quantized(nn.Linear(64, 64), nn.Linear(64, 32))
    model[1].to("meta")
    with pytest.raises(ValueError, match=r"meta device.*load the model first \(LB1001\) \[lowbit: bad-option\]$"):
        lowbit.warmup(model)


def test_activations_have_a_float_dtype() -> None:
    with pytest.raises(TypeError, match=r"got torch.int32 \(LB4002\) \[lowbit: input-mismatch\]$"):
        lowbit.warmup(quantized(nn.Linear(64, 64)), [1], torch.int32)


def test_a_kernel_that_does_not_apply_is_an_error() -> None:
    with (
        lowbit.use_kernel("aten_int8_packed"),
        pytest.raises(lowbit.UnsupportedError, match=r"(.|\n)*\[lowbit: no-kernel\]$"),
    ):
        lowbit.warmup(quantized(nn.Linear(64, 64), config="int4wo-32"), [1])


def test_a_capture_is_refused(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"before the capture \(LB4001\) \[lowbit: no-kernel\]$"):
        lowbit.warmup(quantized(nn.Linear(64, 64)), [1])
    assert not ran.problems
