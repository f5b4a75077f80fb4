"""A `Llama` as it runs for generation: the model's own modules, with one op for everything between two linear layers.

A quantized layer is seven kernels for one new token (norm, qkv, attention, o, norm, gate and up with SiLU, down), nine
for a prompt.
`Session` keeps what they need from step to step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit import decoder_ops as ops
from lowbit.models.llama import MLP, Attention, DecoderLayer, KVCache, Llama, RMSNorm
from lowbit.ops import fuses_silu_mul, linear_silu_mul
from lowbit.tensor import QuantizedTensor

#: That pass an MLP at once.
TOKENS = 8192


class State:
    """Where a batch of sequences stands: its cache, and what a step reads and writes, all on the model's device.

    Attributes:
        cache: keys and values.
        ids: `(B, capacity + 1)` int64: prompts, and every token since.
        token: `(B,)` int64, the newest, which the next step reads.
        positions: `(B,)` int32, its places.
        cos, sin: fp32 `(capacity, head_dim / 2)`, the rotary angles of every position.
        arrived: int32 `(B G,)`, zeros between two calls of the kernels that count in them.
    """

    def __init__(self, model: Llama, batch: int, capacity: int) -> None:
        self.cache: KVCache = model.new_cache(batch, capacity)
        device = self.cache.keys.device
        self.ids = torch.zeros(batch, capacity + 1, dtype=torch.int64, device=device)
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self.positions = torch.zeros(batch, dtype=torch.int32, device=device)
        cos, sin = model.model.rotary_emb(torch.arange(capacity, device=device), torch.float32)
        half = model.config.head_dim // 2
        self.cos, self.sin = cos[:, :half].contiguous(), sin[:, :half].contiguous()
        self.arrived = torch.zeros(batch * model.config.num_kv_heads, dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        """Of everything that is kept."""
        kept = (self.ids, self.token, self.positions, self.cos, self.sin, self.arrived)
        return self.cache.nbytes + sum(t.numel() * t.element_size() for t in kept)

    def take_greedy(self, logits: Tensor, step: int) -> None:
        """Make the most likely tokens by `logits (B, V)` the newest, `step` places behind the ones before."""
        ops.take_greedy(logits, self.token, self.positions, self.ids, self.arrived, step)

    def take(self, token: Tensor, step: int) -> None:
        """Make `token (B,)` the newest, `step` places behind the one before."""
        self.token.copy_(token)
        self.positions += step
        self.ids.scatter_(1, self.positions.long()[:, None], token[:, None])


def forward(model: Llama, ids: Tensor, state: State) -> Tensor:
    """Logits `(B, V)` behind the last of the tokens `ids (B, T)`, which go into the cache at `state.positions`.

    More than one token has to be the beginning of its sequence.
    """
    batch, tokens = ids.shape
    decoder = model.model
    x, change = decoder.embed_tokens(ids), None
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        x, h = _normed(x, change, layer.input_layernorm)
        change = _attention(layer.self_attn, h, state, i)
        x, h = _normed(x, change, layer.post_attention_layernorm)
        change = _mlp(layer.mlp, h)
    if tokens > 1:
        x, change = x[:, -1:], None if change is None else change[:, -1:]
    _, h = _normed(x, change, decoder.norm)
    return linear(model.lm_head, h).view(batch, -1)


def _normed(x: Tensor, change: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """The residual stream with `change` added to it, and the same normed."""
    if change is None:
        return x, ops.rms_norm(x, norm.weight, norm.eps)
    return ops.add_rms_norm(x, change, norm.weight, norm.eps)


def _attention(a: Attention, h: Tensor, state: State, layer: int) -> Tensor:
    batch, tokens, _ = h.shape
    qkv = _joint(a.qkv_proj, ("q_proj", "k_proj", "v_proj"), a, h)
    keys, values = state.cache.keys[layer], state.cache.values[layer]
    q_norm = a.q_norm.weight if isinstance(a.q_norm, RMSNorm) else None
    k_norm = a.k_norm.weight if isinstance(a.k_norm, RMSNorm) else None
    eps = a.q_norm.eps if isinstance(a.q_norm, RMSNorm) else 0.0
    heads = a.groups * keys.shape[1]
    where = (keys, values, state.positions, state.cos, state.sin, q_norm, k_norm, eps, heads)
    if tokens == 1:
        y = ops.decode_attention(qkv.view(batch, -1), *where, state.arrived)
    else:
        q = ops.rope_write(qkv, *where)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys[:, :, :tokens], values[:, :, :tokens], is_causal=True, enable_gqa=a.groups > 1
        )
        y = y.transpose(1, 2)
    return linear(a.o_proj, y.reshape(batch, tokens, -1))


def _mlp(mlp: MLP, h: Tensor) -> Tensor:
    """Gate and up are several times as wide as what goes in: long prompts pass some thousand tokens at a time."""
    if h.shape[0] * h.shape[1] > TOKENS:
        parts = h.view(1, -1, h.shape[-1]).split(TOKENS, dim=1)
        return torch.cat([_mlp(mlp, part) for part in parts], dim=1).view(h.shape)
    fused = mlp.gate_up_proj
    if fused is not None and isinstance(w := fused.weight, QuantizedTensor) and not _is_watched(fused):
        what = (w.format.spec, w.act_spec, w.out_features, w.in_features)
        if fuses_silu_mul(h, *what):
            return linear(mlp.down_proj, linear_silu_mul(h, list(w.planes.values()), fused.bias, w.act_scale, *what))
    gate_up = _joint(fused, ("gate_proj", "up_proj"), mlp, h)
    return linear(mlp.down_proj, ops.silu_mul(gate_up))


def _joint(fused: nn.Linear | None, parts: tuple[str, ...], owner: nn.Module, x: Tensor) -> Tensor:
    """What the joint projection gives, or the separate ones side by side."""
    if fused is not None:
        return linear(fused, x)
    return torch.cat([linear(owner.get_submodule(part), x) for part in parts], dim=-1)


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """The module's result; for one token and a plain weight on a GPU, by the kernel that is made for that."""
    if x.is_cuda and x.numel() == x.shape[-1] and type(module) is nn.Linear and not _is_watched(module):
        weight = module.weight
        if not isinstance(weight, QuantizedTensor) and weight.dtype == x.dtype:
            return ops.gemv(x, weight, module.bias)
    return module(x)  # type: ignore[no-any-return]


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
