"""Small random models of the Llama family, for tests."""

import torch

from lowbit.models import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
    norm_eps=1e-5,
    rope_theta=10000.0,
)


def tiny_llama(config: LlamaConfig = CONFIG, dtype: torch.dtype = torch.float32, seed: int = 0) -> Llama:
    """Weights large enough that a wrong rotation or mask changes the logits by far more than rounding."""
    torch.manual_seed(seed)
    model = Llama(config)
    for name, p in model.named_parameters():
        p.requires_grad_(False)
        p.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model.to(dtype).eval()


def tiny_ids(batch: int = 2, tokens: int = 21, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))
