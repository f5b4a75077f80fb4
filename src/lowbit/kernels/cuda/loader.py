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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lowbit.cache import cache_dir
from lowbit.errors import see
from lowbit.kernels.problem import UnsupportedError
from lowbit.kernels.triton.launch import multiprocessors

Defines = tuple[tuple[str, int], ...]
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_lock = threading.Lock()


class Source(NamedTuple):
    """What is compiled: a file beside this one, constants, and code put before it."""

    file: str
    defines: Defines
    prelude: str = ""

    def machine_code(self, arch: tuple[int, int]) -> bytes:
        """For compute capability `arch`; raises what `compile_source` does."""
        return compile_source(self.prelude + read_source(self.file), self.file.removesuffix(".cu"), self.defines, arch)


def compile_ahead(sources: Iterable[Source], arch: tuple[int, int]) -> None:
    """Bring sources into the cache, several at once: the compiler uses one core for each."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for _ in threads.map(lambda source: source.machine_code(arch), dict.fromkeys(sources)):
            pass


@cache
def missing() -> str | None:
    """Why CUDA C++ kernels cannot be compiled here, or None. Looks for the packages and imports nothing."""
    try:
        found = importlib.util.find_spec("cuda.bindings.nvrtc")
    except ModuleNotFoundError:
        found = None
    return None if found else "cuda.bindings is not installed (it comes with PyTorch's CUDA wheels from 2.11)"


def check(result: tuple[Any, ...], what: str) -> Any:
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
    check((status,), "nvrtcVersion")
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

    program = check(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []), "nvrtcCreateProgram")
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])[0]
        if int(status) != 0:
            log = b" " * check(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
            nvrtc.nvrtcGetProgramLog(program, log)
            text = log.rstrip(b"\0").decode()
            raise RuntimeError(f"{name}.cu did not compile for {target} with {' '.join(options)}:\n{text}")
        code: bytes = b" " * check(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize")
        check(nvrtc.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
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
    """One compiled kernel of a source on one device."""

    def __init__(self, source: Source, kernel: str, device: int) -> None:
        from cuda.bindings import driver

        if torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                f"{kernel} is not compiled yet and the stream is being captured; before a CUDA graph is captured, "
                "call lowbit.warmup(model, tokens) or run the layer once with this number of tokens" + see("no-kernel")
            )
        code = source.machine_code(torch.cuda.get_device_capability(device))
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # makes the primary context current
            module = check(driver.cuModuleLoadData(code), "cuModuleLoadData")
            self.function = check(driver.cuModuleGetFunction(module, kernel.encode()), "cuModuleGetFunction")
            # Blocks may take all the shared memory that there is beside what the source declares.
            of = driver.CUfunction_attribute
            found = driver.cuFuncGetAttribute(of.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, self.function)
            declared = check(found, "cuFuncGetAttribute")
            properties: Any = torch.cuda.get_device_properties(device)
            most = properties.shared_memory_per_block_optin - declared
            limit = of.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver.cuFuncSetAttribute(self.function, limit, most), "cuFuncSetAttribute")
        self.name, self.device = kernel, device
        self._driver, self._handle = driver, int(self.function)
        self._starts_early = torch.cuda.get_device_capability(device) >= (9, 0)
        self._resident: dict[tuple[int, int, int], int] = {}

    def resident(self, threads: int, shared: int, cluster: int = 1) -> int:
        """Clusters of `cluster` blocks that the whole current device holds at once."""
        key = (threads, shared, cluster)
        if key not in self._resident:
            config, attribute = self._config(cluster, threads, shared), self._driver.CUlaunchAttribute()
            attribute.id = self._driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size = attribute.value.clusterDim
            size.x, size.y, size.z = cluster, 1, 1
            config.attrs, config.numAttrs = [attribute], 1
            if cluster > 1:
                found = check(self._driver.cuOccupancyMaxActiveClusters(self.function, config), "occupancy")
            else:
                count = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self.function, threads, shared)
                found = check(count, "occupancy") * multiprocessors(torch.device("cuda", torch.cuda.current_device()))
            self._resident[key] = found
        return self._resident[key]

    def _config(self, grid: int, threads: int, shared: int) -> Any:
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared
        return config

    def launch(self, frame: Frame, early: bool = False) -> None:
        """Launch on the current stream of the current device, which must be the kernel's.

        Args:
            early: the kernel may start before the one before it on the stream has ended; it waits for it itself
                (programmatic dependent launch, from Hopper on).
        """
        config = frame.config
        config.stream = torch._C._cuda_getCurrentRawStream(self.device)
        config.attribute_count = early and self._starts_early
        status = _launcher()(frame.config_at, self._handle, frame.parameters_at, None)
        if status:
            check((self._driver.CUresult(status),), f"cuLaunchKernelEx of {self.name}")


class Frame:
    """What `cuLaunchKernelEx` reads. Filling it in takes longer than the launch, so that callers use it again.

    Attributes:
        arguments: the kernel's parameters, ctypes objects passed by value, which may be another for every launch.
        first: the bytes of the first of them.
        parameters: the addresses of all.

    Args:
        shared: bytes of dynamic shared memory of each block.
    """

    def __init__(self, grid: int, threads: int, shared: int, arguments: Sequence[Any]) -> None:
        self.arguments, self.first = arguments, memoryview(arguments[0]).cast("B")
        self.parameters = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        self.config = _LaunchConfig(grid, 1, 1, threads, 1, 1, shared, None, ctypes.addressof(_EARLY), 0)
        self.config_at, self.parameters_at = ctypes.addressof(self.config), ctypes.addressof(self.parameters)


class Frames:
    """Frames of launches that differ in the values of their parameters alone.

    A thread takes one, fills it in, launches and gives it back: there are as many as were ever in use at once.
    """

    def __init__(self, make: Callable[[], Frame]) -> None:
        self._make, self._free = make, list[Frame]()

    def take(self) -> Frame:
        try:
            return self._free.pop()
        except IndexError:
            return self._make()

    def give(self, frame: Frame) -> None:
        self._free.append(frame)


class _LaunchConfig(ctypes.Structure):
    """`CUlaunchConfig` of the driver API."""

    _fields_ = (
        ("grid_x", ctypes.c_uint), ("grid_y", ctypes.c_uint), ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint), ("block_y", ctypes.c_uint), ("block_z", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint), ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )  # fmt: skip


class _LaunchAttribute(ctypes.Structure):
    """`CUlaunchAttribute` of the driver API: a kind, and 64 bytes for its value."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


_EARLY = _LaunchAttribute(id=6, value=1)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


@cache
def _libcuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _launcher() -> Any:
    """`cuLaunchKernelEx` through ctypes, whose structures are filled faster than those of cuda.bindings."""
    launch = _libcuda().cuLaunchKernelEx
    launch.argtypes, launch.restype = (ctypes.c_void_p,) * 4, ctypes.c_int
    return launch


class TensorMap(ctypes.Structure):
    """`CUtensorMap` of the driver API, as a kernel takes it."""

    _fields_ = (("words", ctypes.c_uint32 * 32),)


@lru_cache(maxsize=4096)
def tensor_map(
    address: int,
    rows: int,
    columns: int,
    box_rows: int,
    stride: int | None = None,
    box_bytes: int = 128,
    swizzled: bool = True,
) -> TensorMap:
    """How the copy engine reads boxes of `box_rows` rows from a matrix `(rows, columns)` of 2-byte elements.

    What lies outside the matrix is 0. The map holds no tensor: where memory is used again, the same address means the
    same map.

    Args:
        stride: bytes from row to row, a multiple of 16; as many as a row has, if it is None.
        box_bytes: of a row of a box, 128 if `swizzled`: the 16-byte pieces of eight rows are mixed in shared memory.
    """
    encode = _libcuda().cuTensorMapEncodeTiled
    longs, ints = ctypes.c_uint64 * 2, ctypes.c_uint32 * 2
    strides = longs(stride or 2 * columns)
    memory = ctypes.create_string_buffer(128 + 64)
    aligned = -(-ctypes.addressof(memory) // 64) * 64
    two_bytes, no_interleave, promote_256, zeros = 1, 0, 3, 0
    swizzle = 3 if swizzled else 0
    status = encode(
        ctypes.c_void_p(aligned), two_bytes, 2, ctypes.c_void_p(address), longs(columns, rows), strides,
        ints(box_bytes // 2, box_rows), ints(1, 1), no_interleave, swizzle, promote_256, zeros,
    )  # fmt: skip
    if status:
        raise RuntimeError(f"cuTensorMapEncodeTiled failed with {status} for {rows} x {columns} at {address:#x}")
    return TensorMap.from_buffer_copy(ctypes.string_at(aligned, 128))


def load(source: Source, kernel: str, device: int) -> CudaKernel:
    """The kernel compiled and loaded, once per process and device; safe to call from several threads."""
    with _lock:
        return _load(source, kernel, device)


_load = cache(CudaKernel)
