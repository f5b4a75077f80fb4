"""A Llama-family decoder: Llama 2 and 3, SmolLM, Mistral, Qwen2 and Qwen3, told apart by their configuration.

Modules carry the names of Hugging Face's implementation (`model.layers.0.self_attn.q_proj`, ...), so that checkpoints
and rules by name work on both; `lowbit.models.fuse` joins projections that read the same input. What runs here is plain
PyTorch, for evaluation, calibration and training; `lowbit.models.inference` runs the same modules for generation. Sizes
in shapes: B sequences, T tokens, D hidden, H query heads, G key/value heads, S positions in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.errors import see
from lowbit.models.config import LlamaConfig
from lowbit.models.ranks import Ranks


class KVCache:
    """Keys and values of all layers in two tensors of fixed size, `(layers, B, G, S, head_dim)`."""

    def __init__(
        self, config: LlamaConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        if not 0 < capacity <= config.max_positions:
            raise ValueError(
                f"a KV cache holds 1 to {config.max_positions} positions of this model, got {capacity}"
                + see("context-exceeded")
            )
        shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.dtype.itemsize

    def update(self, layer: int, position: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store `k, v (B, G, T, head_dim)` from `position` on; returns views of everything up to their end."""
        end = position + k.shape[2]
        self.keys[layer, :, :, position:end] = k
        self.values[layer, :, :, position:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class RotaryEmbedding(nn.Module):
    """Angles of the rotary position embedding (Su et al., 2021), in the half-split order of Hugging Face."""

    inv_freq: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        # Made on the CPU even while a model is built on the meta device: no checkpoint holds it.
        powers = torch.arange(0, config.head_dim, 2, device="cpu").double() / config.head_dim
        divisors = torch.tensor(config.rope_divisors or 1.0, dtype=torch.float64, device="cpu")
        self._exact = (config.rope_theta**-powers / divisors).float()
        self.register_buffer("inv_freq", self._exact, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        """Follows the model to another device but not to another dtype: bf16 frequencies would be wrong by degrees."""
        super()._apply(fn, recurse)
        self.inv_freq = self._exact.to(self.inv_freq.device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(T, head_dim)` of `positions (T,)`; the second half of the columns repeats the first."""
        angles = torch.outer(positions.float(), self.inv_freq).repeat(1, 2)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x (B, H, T, head_dim)` turned by its positions: pairs are elements `i` and `i + head_dim / 2`."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def added_up(y: Tensor, ranks: Ranks | None) -> Tensor:
    """The sum of `y` over the ranks of a model that is cut, in place of it; `y` itself where it is whole."""
    return y if ranks is None else ranks.add_up(y)


class Attention(nn.Module):
    qkv_proj: nn.Linear | None
    ranks: Ranks | None = None  # that have other heads

    def __init__(self, c: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.groups = layer, c.head_dim, c.num_heads // c.num_kv_heads
        self.sizes = [heads * c.head_dim for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.register_module("qkv_proj", None)  # the three in one, once they are fused
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, heads side by side in the last dimension."""
        if self.qkv_proj is None:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.qkv_proj(x).split(self.sizes, dim=-1)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None, position: int) -> Tensor:
        b, t, _ = x.shape
        split = (-1, self.head_dim)
        q, k, v = (y.unflatten(-1, split) for y in self.project(x))
        q, k = rotate(self.q_norm(q).transpose(1, 2), *rope), rotate(self.k_norm(k).transpose(1, 2), *rope)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer, position, k, v)
        mask = None
        if position > 0 and t > 1:  # query i sees every key up to its own position
            mask = torch.ones(t, position + t, dtype=torch.bool, device=x.device).tril(position)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and t > 1, enable_gqa=self.groups > 1
        )
        return added_up(self.o_proj(y.transpose(1, 2).reshape(b, t, -1)), self.ranks)


class MLP(nn.Module):
    gate_up_proj: nn.Linear | None
    ranks: Ranks | None = None  # that have other columns

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.register_module("gate_up_proj", None)  # the two in one, once they are fused
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Gate and up."""
        if self.gate_up_proj is None:
            return self.gate_proj(x), self.up_proj(x)
        return self.gate_up_proj(x).chunk(2, dim=-1)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(x)
        return added_up(self.down_proj(F.silu(gate) * up), self.ranks)


class DecoderLayer(nn.Module):
    def __init__(self, c: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(c, layer)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None, position: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, position)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Everything below the output projection: token ids `(B, T)` to hidden states `(B, T, D)`."""

    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c, i) for i in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.rotary_emb = RotaryEmbedding(c)

    def forward(self, ids: Tensor, cache: KVCache | None, position: int) -> Tensor:
        x = self.embed_tokens(ids)
        positions = torch.arange(position, position + ids.shape[1], device=ids.device)
        rope = self.rotary_emb(positions, x.dtype)
        for layer in self.layers:
            x = layer(x, rope, cache, position)
        return self.norm(x)  # type: ignore[no-any-return]


class Llama(nn.Module):
    """The language model. Build it on the meta device and load weights with `lowbit.models.load_model`."""

    ranks: Ranks | None = None  # that share it, where it is parallelized

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the output projection the embedding's own table, where the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens, in the model's dtype, on its device."""
        like = self.model.norm.weight
        return KVCache(self.config, batch, capacity, like.dtype, like.device)

    def forward(self, ids: Tensor, cache: KVCache | None = None, position: int = 0, last_only: bool = False) -> Tensor:
        """Logits `(B, T, V)` in the model's dtype, or `(B, 1, V)` of the last token alone with `last_only`.

        Args:
            ids: `(B, T)` integer token ids.
            cache: where keys and values are kept; it must already hold the `position` tokens before these.
            position: place of the first of these tokens in its sequence.

        Raises:
            ValueError: `ids` is not 2-D, or the tokens reach beyond the cache or the model's longest context.
        """
        if ids.dim() != 2:
            raise ValueError(f"ids must be (batch, tokens), got shape {tuple(ids.shape)}" + see("input-mismatch"))
        if cache is None and position != 0:
            raise ValueError(
                f"position {position} needs the cache that holds the tokens before it" + see("input-mismatch")
            )
        limit = self.config.max_positions if cache is None else cache.capacity
        if position + ids.shape[1] > limit:
            raise ValueError(
                f"tokens {position} to {position + ids.shape[1]} exceed the {limit} positions there are"
                + see("context-exceeded")
            )
        x = self.model(ids, cache, position)
        logits: Tensor = self.lm_head(x[:, -1:] if last_only else x)
        return logits if self.ranks is None else self.ranks.gather(logits)
