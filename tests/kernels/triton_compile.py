"""Compiles the launches of a host function for a GPU that this machine does not have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NAMES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8", torch.int8: "i8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}  # fmt: skip


@dataclass
class Launch:
    """One launch as a host function made it: the kernel and what it was given."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    def source(self) -> ASTSource:
        """Pointers count as aligned, integers as divisible by 16 where they are, as at a real launch."""
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for i, (name, parameter) in enumerate(inspect.signature(self.kernel.fn).parameters.items()):
            value = self.arguments[name]
            if "constexpr" in str(parameter.annotation) or (not isinstance(value, Tensor) and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            if isinstance(value, float):
                signature[name] = "fp32"
                continue
            signature[name] = f"*{NAMES[value.dtype]}" if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)

    @property
    def key(self) -> tuple[Any, ...]:
        source = self.source()
        return (
            self.kernel.fn.__name__,
            str(source.signature),
            str(source.constants),
            str(source.attrs),
            str(self.options),
        )

    def compile(self, arch: int) -> Any:
        return triton.compile(self.source(), target=GPUTarget("cuda", arch, 32), options=self.options)


def launches_of(monkeypatch: pytest.MonkeyPatch, modules: list[Any], call: Callable[[], Any]) -> list[Launch]:
    """What `call` would launch: the kernels of `modules` are replaced by recorders that run nothing."""
    log: list[Launch] = []

    def recorder(kernel: Any) -> Any:
        class Recorder:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                def launch(*args: Any, **kwargs: Any) -> None:
                    names = inspect.signature(kernel.fn).parameters
                    options = {k: v for k, v in kwargs.items() if k not in names}
                    bound = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in kwargs.items() if k in names})
                    log.append(Launch(kernel, dict(bound.arguments), options))

                return launch

        return Recorder()

    with monkeypatch.context() as patch:
        for module in modules:
            for name, value in list(vars(module).items()):
                if name.endswith("_kernel") and hasattr(value, "fn"):
                    patch.setattr(module, name, recorder(value))
        call()
    return log
