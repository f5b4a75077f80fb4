"""CUDA C++ source to a running kernel with NVRTC, which the PyTorch wheels bring: no toolkit, no host compiler.

A kernel is a source file and constants. Its machine code is cached on disk under a hash of everything that decides
it. The cache only saves time: a file that is damaged is made again, and a cache that cannot be written is not used.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import re
import tempfile
import threading
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from lowbit.cache import cache_dir
from lowbit.errors import see
from lowbit.kernels.problem import UnsupportedError

Defines = tuple[tuple[str, int], ...]
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_lock = threading.Lock()


@cache
def missing() -> str | None:
    """Why CUDA C++ kernels cannot be compiled here, or None. Looks for the packages and imports nothing."""
    try:
        found = importlib.util.find_spec("cuda.bindings.nvrtc")
    except ModuleNotFoundError:
        found = None
    return None if found else "cuda.bindings is not installed (it comes with PyTorch's CUDA wheels from 2.11)"


def _check(result: tuple[Any, ...], what: str) -> Any:
    """The value of a cuda.bindings call `(status, *values)`.

    Raises:
        RuntimeError: the status is not success.
    """
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"{what} failed: {status!r}")
    return values[0] if values else None


def compile_source(source: str, name: str, defines: Defines, arch: tuple[int, int]) -> bytes:
    """Machine code (cubin) of `source` for compute capability `arch`, from the cache or from NVRTC.

    Raises:
        RuntimeError: the source does not compile; the message ends with the compiler's log.
    """
    from cuda.bindings import nvrtc

    status, *version = nvrtc.nvrtcVersion()
    _check((status,), "nvrtcVersion")
    target = f"sm_{arch[0]}{arch[1]}" + ("a" if arch[0] >= 9 else "")
    options = [f"--gpu-architecture={target}", "--std=c++17", *(f"-D{k}={v}" for k, v in defines)]
    key = hashlib.sha256("\0".join((source, *options, str(version))).encode()).hexdigest()[:32]
    file = f"{name}-{key}.cubin"
    code = _read_cached(file)
    if code is None:
        code = _compile(source, name, target, options)
        _write_cached(file, code)
    return code


def _compile(source: str, name: str, target: str, options: list[str]) -> bytes:
    from cuda.bindings import nvrtc

    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []), "nvrtcCreateProgram")
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])[0]
        if int(status) != 0:
            log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
            nvrtc.nvrtcGetProgramLog(program, log)
            text = log.rstrip(b"\0").decode()
            raise RuntimeError(f"{name}.cu did not compile for {target} with {' '.join(options)}:\n{text}")
        code: bytes = b" " * _check(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize")
        _check(nvrtc.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read_cached(file: str) -> bytes | None:
    """The machine code in a file of the cache; None if there is no such file, or not all of what was written."""
    try:
        data = (cache_dir("cuda") / file).read_bytes()
    except OSError:
        return None
    code, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    return code if hashlib.sha256(code).digest() == checksum else None


def _write_cached(file: str, code: bytes) -> None:
    """Machine code, and its checksum behind it, where readers of ELF files do not look.

    It is on the disk before it gets its name, so that other processes, and those after a crash, find all of it or
    nothing.
    """
    # The kernel runs without being cached: a full disk or a home that is read-only is no reason to stop.
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=cache_dir("cuda")) as scratch:
        handle, temporary = tempfile.mkstemp(dir=scratch)
        with os.fdopen(handle, "wb") as out:
            out.write(code + hashlib.sha256(code).digest())
            out.flush()
            os.fsync(handle)
        os.replace(temporary, Path(scratch).with_name(file))


def read_source(name: str) -> str:
    """A source file of this folder with its `#include "..."` lines replaced by the files they name."""
    folder = resources.files("lowbit.kernels.cuda")
    text = folder.joinpath(name).read_text()
    return re.sub(r'^#include "(.+)"$', lambda m: folder.joinpath(m[1]).read_text(), text, flags=re.MULTILINE)


class CudaKernel:
    """One compiled kernel on one device.

    Args:
        prelude: code put before the source.
        shared: dynamic shared memory per block, in bytes.
    """

    def __init__(
        self, source_name: str, kernel: str, defines: Defines, device: int, prelude: str = "", shared: int = 0
    ) -> None:
        from cuda.bindings import driver

        if torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                f"{kernel} is not compiled yet and the stream is being captured; before a CUDA graph is captured, "
                "call lowbit.warmup(model, tokens) or run the layer once with this number of tokens" + see("no-kernel")
            )
        source = prelude + read_source(source_name)
        arch = torch.cuda.get_device_capability(device)
        code = compile_source(source, source_name.removesuffix(".cu"), defines, arch)
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # makes the primary context current
            module = _check(driver.cuModuleLoadData(code), "cuModuleLoadData")
            self.function = _check(driver.cuModuleGetFunction(module, kernel.encode()), "cuModuleGetFunction")
            if shared > 48 << 10:
                limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _check(driver.cuFuncSetAttribute(self.function, limit, shared), "cuFuncSetAttribute")
        self._shared = shared
        self._driver = driver

    def __call__(self, grid: int, threads: int, *arguments: Any, early: bool = False) -> None:
        """Launch on the current stream of the current device, which must be the kernel's.

        Args:
            arguments: ctypes objects, the kernel's parameters, passed by value.
            early: the kernel may start before the one before it on the stream has ended; it waits for it itself
                (programmatic dependent launch).
        """
        driver = self._driver
        parameters = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        stream = torch.cuda.current_stream().cuda_stream
        if not early:
            where = ctypes.addressof(parameters)
            launched = driver.cuLaunchKernel(self.function, grid, 1, 1, threads, 1, 1, self._shared, stream, where, 0)
            _check(launched, "cuLaunchKernel")
            return
        config, attribute = driver.CUlaunchConfig(), driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = self._shared, driver.CUstream(stream)
        config.attrs, config.numAttrs = [attribute], 1
        _check(driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(parameters), 0), "cuLaunchKernelEx")


def load(
    source_name: str, kernel: str, defines: Defines, device: int, prelude: str = "", shared: int = 0
) -> CudaKernel:
    """The kernel compiled with `defines`, once per process and device; safe to call from several threads."""
    with _lock:
        return _load(source_name, kernel, defines, device, prelude, shared)


_load = cache(CudaKernel)
