"""Generation step by step: a prompt, then one token after the other; on a GPU, each step is one CUDA graph.

A graph costs one launch instead of some three hundred, and kernels that know how start while the one ahead of them
still runs. Positions and lengths are in memory, so one graph serves a whole generation and all that follow. A prompt
runs eagerly unless a graph for its length was asked for.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.errors import see
from lowbit.kernels.problem import early_launches, is_batch_invariant
from lowbit.kernels.select import triton_missing
from lowbit.models.inference import MOST_NEW, State, forward, forward_new
from lowbit.models.llama import Llama
from lowbit.models.sampling import Sampling, draw
from lowbit.tensor import QuantizedTensor

# Capacities of kept sessions are multiples of this, so that generations of similar lengths share one.
ROUND = 256


class Session:
    """One model, a number of sequences and a capacity.

        session = Session(model, batch=1, capacity=256)
        session.prefill(ids)
        for _ in range(100):
            session.step()
        print(session.ids)

    Every call chooses the most likely token; `sample` and `put` replace it. Weights must stay where they are while a
    session with a graph is in use; `session_for` makes a new one if they do not.

    Attributes:
        length: tokens of each sequence so far, the newest included, which is not in the cache yet.
        graph_bytes: GPU memory that graphs hold beside weights and state.
        capture_seconds: what capturing took, warm-up and compilation of kernels included.
    """

    @torch.inference_mode()
    def __init__(self, model: Llama, batch: int, capacity: int, graph: bool | None = None) -> None:
        """
        Args:
            capacity: tokens of a sequence that the cache holds.
            graph: whether steps are a CUDA graph; the default is where that is possible.

        Raises:
            ValueError: the capacity exceeds the model's context, or a graph was asked for where there is none.
        """
        self._model = weakref.ref(model)
        self.state = State(model, batch, capacity)
        device = self.state.token.device
        possible = device.type == "cuda" and triton_missing() is None
        if graph and not possible:
            raise ValueError(f"Session: CUDA graphs need a CUDA GPU and Triton, the model is on {device}"
                             + see("bad-option"))  # fmt: skip
        self.length = 0
        self.graph_bytes, self.capture_seconds = 0, 0.0
        self._fingerprint = fingerprint(model)
        self._prompts: dict[int, tuple[_Graph, Tensor]] = {}
        self._reads: dict[int, tuple[_Graph, Tensor]] = {}
        self._step = self._captured(self._run_step) if (possible if graph is None else graph) else None

    @property
    def model(self) -> Llama:
        model = self._model()
        assert model is not None, "the session's model is gone"
        return model

    @property
    def batch(self) -> int:
        return self.state.cache.keys.shape[1]

    @property
    def capacity(self) -> int:
        return self.state.cache.capacity

    @property
    def uses_graph(self) -> bool:
        return self._step is not None

    @property
    def ids(self) -> Tensor:
        """`(B, length)` int64: a copy of the sequences so far."""
        return self.state.ids[:, : self.length].clone()

    @property
    def token(self) -> Tensor:
        """`(B,)` int64: the newest token of every sequence; the next call changes it."""
        return self.state.token

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Begin anew with the prompts `ids (B, T)`; the logits `(B, V)` behind them, valid until the next call.

        Raises:
            ValueError: another number of sequences, no token, or more than the capacity.
        """
        tokens = self._checked(ids, "prompts")
        self.length = 0
        self.state.positions.zero_()
        self.state.ids[:, :tokens] = ids
        if tokens in self._prompts:
            graph, given = self._prompts[tokens]
            given.copy_(ids)
            logits = graph.replay()
        else:
            logits = self._run_prompt(self.state.ids[:, :tokens])
        self.length = tokens + 1
        return logits

    @torch.inference_mode()
    def read(self, ids: Tensor, at: int) -> Tensor:
        """Have `ids (B, T)` from place `at` on instead of what is there, and take the most likely token behind them.

        One pass over T tokens costs little more than a step, since it reads the weights once, too.

        Args:
            at: of a token that is there: 0 to `length - 1`.

        Returns:
            logits `(B, T, V)` behind each of the tokens, valid until the next call.

        Raises:
            ValueError: another number of sequences, no token or more than 16, a place that is not there, or more than
                the capacity.
        """
        tokens = self._checked(ids, "tokens to read", at)
        if tokens > MOST_NEW:
            raise ValueError(f"Session: reads at most {MOST_NEW} tokens at once, got {tokens}" + see("bad-option"))
        if not 0 <= at < self.length:
            raise ValueError(f"Session: there is no token at {at}, {self.length} are there" + see("bad-option"))
        self.state.positions.fill_(at)
        self.state.ids[:, at : at + tokens] = ids
        if tokens in self._reads:
            graph, given = self._reads[tokens]
            given.copy_(ids)
            logits = graph.replay()
        else:
            logits = self._run_read(ids)
        self.length = at + tokens + 1
        return logits

    @torch.inference_mode()
    def rewind(self, length: int, token: Tensor) -> None:
        """Have the first `length - 1` tokens only, and `token (B,)` as the newest behind them.

        Raises:
            ValueError: so many are not there.
        """
        if not 1 < length <= self.length:
            raise ValueError(
                f"Session: goes back to 2 to {self.length} tokens, which are there, not to {length}" + see("bad-option")
            )
        self.length = length
        self.state.positions.fill_(length - 1)
        self.put(token)

    @torch.inference_mode()
    def step(self) -> Tensor:
        """One more token for every sequence; the logits `(B, V)` it was chosen from, valid until the next call.

        Raises:
            ValueError: the cache is full.
        """
        self._check_room(self.length)
        logits = self._run_step() if self._step is None else self._step.replay()
        self.length += 1
        return logits

    @torch.inference_mode()
    def put(self, token: Tensor) -> None:
        """Replace the newest token of every sequence by `token (B,)`."""
        self.state.take(token.to(self.state.token.dtype), 0)

    def sample(self, logits: Tensor, sampling: Sampling, random: torch.Generator) -> None:
        """Replace the newest token of every sequence by a draw from `logits (B, V)`, unless the sampling is greedy."""
        if not sampling.greedy:
            self.put(draw(sampling.probabilities(logits), random))

    @torch.inference_mode()
    def capture_prompt(self, tokens: int) -> None:
        """Capture a graph for prompts of this many tokens too, if steps are graphs. It begins anew."""
        self._capture(self._prompts, self._run_prompt, tokens)

    @torch.inference_mode()
    def capture_read(self, tokens: int) -> None:
        """The same for reading so many tokens behind others."""
        self._capture(self._reads, self._run_read, tokens)

    def _capture(self, into: dict[int, tuple[_Graph, Tensor]], run: Callable[[Tensor], Tensor], tokens: int) -> None:
        if self._step is None or tokens in into:
            return
        self._check_room(tokens)
        given = torch.zeros(self.batch, tokens, dtype=torch.int64, device=self.state.ids.device)
        into[tokens] = (self._captured(lambda: run(given)), given)
        self.length = 0

    def _checked(self, ids: Tensor, what: str, at: int = 0) -> int:
        """The number of tokens of each sequence in `ids`, which fit from place `at` on."""
        tokens = ids.shape[-1]
        if ids.dim() != 2 or ids.shape[0] != self.batch or tokens == 0:
            raise ValueError(
                f"Session: {what} must be ({self.batch}, tokens) with at least one token, got {tuple(ids.shape)}"
                + see("input-mismatch")
            )
        self._check_room(at + tokens)
        return tokens

    def _check_room(self, tokens: int) -> None:
        if self.length == 0 and tokens == 0:
            raise ValueError("Session: give it a prompt first" + see("input-mismatch"))
        if tokens > self.capacity:
            raise ValueError(
                f"Session: {tokens} tokens do not fit into a cache of {self.capacity}; make one with more capacity"
                + see("context-exceeded")
            )

    def _run_prompt(self, ids: Tensor) -> Tensor:
        logits = forward(self.model, ids, self.state)
        self.state.take_greedy(logits, ids.shape[1])
        return logits

    def _run_read(self, ids: Tensor) -> Tensor:
        logits = forward_new(self.model, ids, self.state)
        self.state.take_greedy(logits[:, -1], ids.shape[1])
        return logits

    def _run_step(self) -> Tensor:
        logits = forward(self.model, self.state.token[:, None], self.state)
        self.state.take_greedy(logits, 1)
        return logits

    def _captured(self, run: Callable[[], Tensor]) -> _Graph:
        graph = _Graph(run, self.state.positions.zero_, self.state.positions.device)
        self.graph_bytes += graph.nbytes
        self.capture_seconds += graph.seconds
        return graph


class _Graph:
    """A CUDA graph of one call and its result.

    Attributes:
        nbytes: GPU memory that it holds.
        seconds: what the capture took, and the runs before it.
    """

    def __init__(self, run: Callable[[], Tensor], reset: Callable[[], object], device: torch.device) -> None:
        """Runs `run` twice before it is captured, so that everything is compiled and loaded; `reset` before each."""
        started, self.device = time.perf_counter(), device
        with torch.cuda.device(device), early_launches():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    reset()
                    run()
            torch.cuda.current_stream().wait_stream(side)
            reset()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = run()
            torch.cuda.synchronize()
            self.nbytes = torch.cuda.memory_reserved() - before
        self.seconds = time.perf_counter() - started

    def replay(self) -> Tensor:
        with torch.cuda.device(self.device):
            self.graph.replay()
        return self.result


# Sessions that are kept --------------------------------------------------------------------------

_kept: weakref.WeakKeyDictionary[Llama, Session] = weakref.WeakKeyDictionary()


def session_for(model: Llama, batch: int, capacity: int) -> Session:
    """A session of at least this capacity. On a GPU the model's last one is kept, and taken again while it fits.

    It holds its cache and graphs until the model is gone, another one is needed, or `forget_session(model)`.
    """
    session = _kept.get(model)
    if session is not None:
        fits = session.batch == batch and capacity <= session.capacity <= 4 * max(capacity, ROUND)
        if fits and session._fingerprint == fingerprint(model):
            return session
        forget_session(model)
        del session
    device = model.model.norm.weight.device
    if device.type != "cuda" or triton_missing():
        return Session(model, batch, capacity)
    rounded = min(-(-capacity // ROUND) * ROUND, model.config.max_positions)
    _kept[model] = Session(model, batch, max(rounded, capacity))
    return _kept[model]


def forget_session(model: Llama) -> None:
    """Free the cache and the graphs that are kept for a model."""
    _kept.pop(model, None)


def fingerprint(model: Llama) -> tuple[object, ...]:
    """What a graph depends on: where the weights are, what they mean, and how they are to be multiplied."""
    found: list[object] = [is_batch_invariant()]
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, QuantizedTensor):
            stored = [*tensor.planes.values(), *([] if tensor.act_scale is None else [tensor.act_scale])]
            found.append((tensor.format.spec, tensor.act_spec, *(t.data_ptr() for t in stored)))
        else:
            found.append((tensor.dtype, tensor.data_ptr()))
    return tuple(found)
