"""The recorders: phases, layers, allocations and kernels of a run, written down for the pure functions beside them.

One run can be watched in three ways, which would disturb each other, so a profile takes several runs: `memory` (with
`dequant` inside it), `clock` and `kernels`.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit.tools.profile.kernels import LAYER, PHASE
from lowbit.tools.profile.layers import Found, find_layers, state_tensors
from lowbit.tools.profile.memory import MemoryEvent, Span, snapshot_events
from lowbit.tools.profile.stacks import current_stack
from lowbit.tools.profile.taint import DequantTracer, is_subclass, plain_tensors
from lowbit.tools.timing import synchronize

#: Entries of CUDA's allocator history; the oldest are lost beyond them.
_HISTORY = 1_000_000


class AllocationTracker(TorchDispatchMode):
    """Memory of tensors on the CPU: an event for every storage that an operation makes and for its end.

    What a kernel allocates and frees inside of itself is not seen.
    """

    supports_higher_order_operators = True

    def __init__(self, where: Callable[[], tuple[str, str]]) -> None:
        super().__init__()
        self.events: list[MemoryEvent] = []
        self._where = where
        self._alive: dict[int, Any] = {}
        self._blocks = 0

    def adopt(self, tensors: Iterator[Tensor]) -> None:
        """Count these storages too, which were made where this tracker could not see it."""
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_subclass(t) for t in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        made = plain_tensors(result)
        if made:
            given = {t.untyped_storage()._cdata for t in plain_tensors((args, kwargs))}
            for tensor in made:
                if tensor.untyped_storage()._cdata not in given:
                    self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or not size or tensor.device.type != "cpu":
            return
        self._blocks += 1
        block = self._blocks
        phase, layer = self._where()
        self.events.append(MemoryEvent(time.time(), size, block, phase, layer, current_stack()))

        def gone(_: object) -> None:
            self._alive.pop(key, None)
            self.events.append(MemoryEvent(time.time(), -size, block, *self._where()))

        self._alive[key] = weakref.ref(storage, gone)

    def close(self) -> None:
        """Forget what is still alive, so that its end later on is no event."""
        self._alive.clear()


class Profiler:
    """Records runs of a model on one device.

        p = Profiler("cpu")
        with p.memory(), p.phase("load"):
            model = ...
        p.watch(model)
        with p.kernels(), p.phase("decode"):
            model(x)

    Attributes:
        spans: stretches of time of the phases, by what was being recorded: "memory", "warm-up", "clock", "kernels", or
            "" for runs that are not.
        found: the layers of the model that is watched.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.spans: dict[str, list[Span]] = {}
        self.found = Found()
        self.tracer: DequantTracer | None = None
        self.memory_base = 0
        self.memory_events: list[MemoryEvent] = []
        self._trace = b'{"traceEvents": []}'
        self.snapshot: dict[str, Any] | None = None
        self._model: nn.Module | None = None
        self._phase, self._layers, self._recording = "", list[tuple[str, Any]](), ""
        self._tracker: AllocationTracker | None = None

    # Phases and layers ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Callable[[nn.Module], None]]:
        """What runs inside belongs to this phase; the same name may come again.

        Yields a function that counts a model's tensors to this phase, for weights that no operation made, as those that
        a file maps into memory.
        """
        if self._recording == "warm-up":
            name = "warm-up"
        outer, self._phase = self._phase, name
        self._note()
        synchronize(self.device)
        start = time.time()
        try:
            with record_function(PHASE + name):
                yield self._adopt
                synchronize(self.device)
        finally:
            self.spans.setdefault(self._recording, []).append(Span(name, start, time.time()))
            self._phase = outer
            self._note()

    def watch(self, model: nn.Module) -> None:
        """Tell the layers of this model apart from now on. Call it when they are quantized."""
        self._model, self.found = model, find_layers(model)
        self._adopt(model)

    def _adopt(self, model: nn.Module) -> None:
        if self._tracker is not None:
            self._tracker.adopt(state_tensors(model))

    @contextlib.contextmanager
    def layers(self) -> Iterator[None]:
        """Tell layers apart in what is recorded, except inside of compiled modules, whose graphs that would break."""
        with contextlib.ExitStack() as exits:
            names = {name for layer in self.found.layers for name in layer.names}
            for name, module in _uncompiled(self._model) if self._model is not None else ():
                if name in names:
                    pre = module.register_forward_pre_hook(self._enter_layer(name), prepend=True)
                    post = module.register_forward_hook(self._leave_layer, always_call=True)
                    exits.callback(pre.remove)
                    exits.callback(post.remove)
            yield

    def _enter_layer(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            scope = record_function(LAYER + name)
            scope.__enter__()
            self._layers.append((name, scope))
            self._note()

        return enter

    def _leave_layer(self, module: nn.Module, args: Any, result: Any) -> None:
        if self._layers:
            self._layers.pop()[1].__exit__(None, None, None)
            self._note()

    def _where(self) -> tuple[str, str]:
        return self._phase, self._layers[-1][0] if self._layers else ""

    def _note(self) -> None:
        """Tell CUDA's allocator where we are."""
        if self._recording == "memory" and self.device.type == "cuda":
            phase, layer = self._where()
            _tell_allocator(f"phase={phase};layer={layer}")

    @contextlib.contextmanager
    def _record(self, what: str) -> Iterator[None]:
        outer, self._recording = self._recording, what
        try:
            yield
        finally:
            self._recording = outer
            self._layers.clear()

    # What is recorded ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def memory(self, snapshot: Path | None = None) -> Iterator[None]:
        """Record allocations: CUDA's history on a GPU, tensors on the CPU; of layers inside of `layers` or `dequant`.

        Args:
            snapshot: a file for CUDA's raw history, which pytorch.org/memory_viz shows.
        """
        with self._record("memory"):
            if self.device.type != "cuda":
                self._tracker = tracker = AllocationTracker(self._where)
                if self._model is not None:
                    self._tracker.adopt(state_tensors(self._model))
                try:
                    with tracker:
                        yield
                finally:
                    tracker.close()
                    self._tracker, self.memory_events = None, tracker.events
                return
            self.memory_base = torch.cuda.memory_allocated(self.device)
            torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=_HISTORY)
            try:
                yield
            finally:
                torch.cuda.synchronize(self.device)
                self._keep_snapshot(snapshot)
                _tell_allocator("")
                torch.cuda.memory._record_memory_history(None)

    def _keep_snapshot(self, file: Path | None) -> None:
        spans = self.spans.get("memory", [])
        index = self.device.index if self.device.index is not None else torch.cuda.current_device()
        self.memory_events = snapshot_events(torch.cuda.memory._snapshot(), spans, index)
        if file is not None:
            torch.cuda.memory._dump_snapshot(str(file))

    @contextlib.contextmanager
    def dequant(self) -> Iterator[None]:
        """Follow the quantized weights of the watched model."""
        assert self._model is not None, "watch(model) comes first"
        if self.tracer is None:
            self.tracer = DequantTracer(self._model, self.found)
        with contextlib.ExitStack() as exits:
            exits.enter_context(self.layers())
            exits.enter_context(self.tracer)
            yield

    @contextlib.contextmanager
    def warm_up(self) -> Iterator[None]:
        """One phase whatever `phase` is told inside: what a model does once (compiling, packing) is over then."""
        with self._record("warm-up"):
            yield

    @contextlib.contextmanager
    def clock(self) -> Iterator[None]:
        """Nothing but the time of the phases."""
        with self._record("clock"):
            yield

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        """Record kernels and operations with `torch.profiler`."""
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with self._record("kernels"), self.layers():
            # Shapes are a witness on a CPU; kernels of a GPU tell theirs by how many threads they have.
            # `acc_events` would keep those of several cycles; here is one, and without it torch 2.11 warns.
            recording = torch.profiler.profile(
                activities=activities, record_shapes=self.device.type == "cpu", acc_events=True
            )
            try:
                with recording:
                    yield
            finally:
                with tempfile.TemporaryDirectory() as directory:
                    file = Path(directory) / "trace.json"
                    recording.export_chrome_trace(str(file))
                    self._trace = file.read_bytes()

    @property
    def trace(self) -> dict[str, Any]:
        """The Chrome trace that `kernels` recorded."""
        return json.loads(self._trace.decode("utf-8", errors="replace"))  # type: ignore[no-any-return]

    def write_trace(self, file: Path) -> None:
        """The Chrome trace, for Perfetto; compressed if the name ends in `.gz`."""
        packed = file.suffix == ".gz"
        file.write_bytes(gzip.compress(self._trace, compresslevel=4, mtime=0) if packed else self._trace)


def _tell_allocator(note: str) -> None:
    """Attach a note to the allocations that follow; older versions of torch have none, and phases go by time."""
    tell = getattr(torch._C, "_cuda_setMemoryMetadata", None)
    if tell is not None:
        tell(note)


def _uncompiled(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules by name, but for those inside of a compiled one."""
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        return
    yield prefix, model
    for name, child in model.named_children():
        yield from _uncompiled(child, f"{prefix}.{name}" if prefix else name)
