"""What a user of plain PyTorch would run: the decoder's layer under `torch.compile`, a static cache, one CUDA graph.

None of lowbit's kernels run here. It stands beside lowbit's own bf16 in `lowbit bench generate`, so that the baseline
is not one of our making.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.models.llama import DecoderLayer, Llama, rotate


def plain_layer(
    layer: DecoderLayer, x: Tensor, rope: tuple[Tensor, Tensor], positions: Tensor, mask: Tensor, keys: Tensor,
    values: Tensor,
) -> Tensor:  # fmt: skip
    """One layer over a static cache `(B, G, S, D)`; `x (B, T, hidden)` at `positions (T,)`, `mask (T, S)`."""
    a, (batch, tokens, _) = layer.self_attn, x.shape
    q, k, v = (y.view(batch, tokens, -1, a.head_dim) for y in a.project(layer.input_layernorm(x)))
    q, k = rotate(a.q_norm(q).transpose(1, 2), *rope), rotate(a.k_norm(k).transpose(1, 2), *rope)
    keys.index_copy_(2, positions, k)
    values.index_copy_(2, positions, v.transpose(1, 2))
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=a.groups > 1)
    x = x + a.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))
    return x + layer.mlp(layer.post_attention_layernorm(x))  # type: ignore[no-any-return]


class CompiledSession:
    """Has what `bench generate` needs of a `Session`: `prefill`, `step`, `token`."""

    def __init__(self, model: Llama, batch: int, capacity: int, backend: str = "inductor") -> None:
        self.model, self.cache = model, model.new_cache(batch, capacity)
        device = self.cache.keys.device
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.places = torch.arange(capacity, device=device)
        self.layer: Callable[..., Tensor] = torch.compile(plain_layer, fullgraph=True, dynamic=False, backend=backend)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_bytes = 0
        if device.type == "cuda":
            self._capture()

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run_step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._run_step()
        self.graph_bytes = torch.cuda.memory_reserved() - before

    def capture_prompt(self, tokens: int) -> None:
        """Prompts run without a graph."""

    def prefill(self, ids: Tensor) -> None:
        """Begin anew; the first new token is in `token`."""
        positions = self.places[: ids.shape[1]]
        self.token.copy_(self._forward(ids, positions))
        self.position.fill_(ids.shape[1])

    def step(self) -> None:
        """One more token."""
        if self.graph is None:
            self._run_step()
        else:
            self.graph.replay()

    def _run_step(self) -> None:
        self.token.copy_(self._forward(self.token[:, None], self.position))
        self.position += 1

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        decoder = self.model.model
        x = decoder.embed_tokens(ids)
        rope = decoder.rotary_emb(positions, x.dtype)
        mask = self.places <= positions[:, None]
        for i, layer in enumerate(decoder.layers):
            x = self.layer(layer, x, rope, positions, mask, self.cache.keys[i], self.cache.values[i])
        return self.model.lm_head(decoder.norm(x[:, -1])).argmax(-1)  # type: ignore[no-any-return]
