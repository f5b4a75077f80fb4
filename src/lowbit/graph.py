"""Which module feeds which in a decoder of the Llama family: what may be folded where without changing the model.

Folding needs to know more than a module's inputs: that a norm is read by q, k and v and by nothing else, or that a
linear's output is added to the residual stream. That is found here, once, by the names that Hugging Face's Llama,
Mistral, Qwen2, Qwen3 and SmolLM share with ours; a model that has more or other parts is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.calibrate import blocks_of
from lowbit.errors import see
from lowbit.tensor import QuantizedTensor

NORMS = ("input_layernorm", "post_attention_layernorm")
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
# These lie behind q and k and inside a head; nothing is folded into or through them.
BESIDE = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True)
class Edge:
    """What `source` puts out meets `readers` and nothing else, each channel multiplied by numbers of its own only.

    So channels of `source` (a norm, or a linear's outputs) can be divided by a scale and the readers' columns
    multiplied by it. In grouped-query attention, `groups` heads of the reader share one head of the source.
    """

    source: str
    readers: tuple[str, ...]
    groups: int = 1
    head_dim: int = 1

    def to_readers(self, x: Tensor) -> Tensor:
        """A number per channel of the source as one per column of the readers: each head once for every sharer."""
        return x.view(-1, 1, self.head_dim).expand(-1, self.groups, -1).flatten()

    def to_source(self, x: Tensor) -> Tensor:
        """The way back: the mean over sharers."""
        return x.view(-1, self.groups, self.head_dim).mean(1).flatten()


@dataclass(frozen=True)
class Layer:
    """One decoder layer; names are those of the whole model."""

    name: str
    head_dim: int
    groups: int

    def at(self, part: str) -> str:
        return f"{self.name}.{part}"

    @property
    def attention(self) -> Edge:
        return Edge(self.at(NORMS[0]), tuple(self.at(p) for p in LINEARS[:3]))

    @property
    def mlp(self) -> Edge:
        return Edge(self.at(NORMS[1]), tuple(self.at(p) for p in LINEARS[4:6]))

    @property
    def edges(self) -> tuple[Edge, ...]:
        """All places to fold a scale. The input of o is a mean of v's outputs, that of down is up's times a gate."""
        v, o, up, down = (self.at(LINEARS[i]) for i in (2, 3, 5, 6))
        return self.attention, Edge(v, (o,), self.groups, self.head_dim), self.mlp, Edge(up, (down,))

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Linears with one input each, in the order in which they run."""
        return (self.attention.readers, (self.at("self_attn.o_proj"),), self.mlp.readers, (self.at("mlp.down_proj"),))


@dataclass(frozen=True)
class DecoderGraph:
    """The layers of a decoder in order, and what lies around them, by name."""

    blocks: str
    layers: tuple[Layer, ...]
    embedding: str
    norm: str
    head: str

    def edges(self) -> Iterator[Edge]:
        for layer in self.layers:
            yield from layer.edges


def decoder_graph(model: nn.Module) -> DecoderGraph:
    """The graph of a language model of the Llama family, whose weights are floats yet.

    Raises:
        ValueError: a part is missing, unknown, quantized, or used twice; or a norm is no RMSNorm with a weight.
    """
    modules = dict(model.named_modules())
    found = [name for name, m in modules.items() if isinstance(m, nn.ModuleList) and name.endswith("layers")]
    if len(found) != 1 or not len(modules[found[0]]):  # type: ignore[arg-type]
        raise _unknown(model, f"it has {len(found)} lists of modules named 'layers', one is needed")
    blocks = found[0]
    if (largest := blocks_of(model)[0]) != blocks:
        raise _unknown(model, f"most of its weights are in {largest!r}, not in {blocks!r}")
    body = blocks.removesuffix("layers")  # with its dot
    embedding, norm, head = f"{body}embed_tokens", f"{body}norm", "lm_head"
    for name, kind in ((embedding, nn.Embedding), (norm, nn.Module), (head, nn.Linear)):
        if not isinstance(modules.get(name), kind):
            raise _unknown(model, f"there is no {kind.__name__} named {name!r}")
    layers = tuple(_layer(model, modules, f"{blocks}.{i}") for i in range(len(modules[blocks])))  # type: ignore[arg-type]
    for name in (norm, *(layer.at(n) for layer in layers for n in NORMS)):
        _check_norm(model, name, modules[name])
    seen: dict[int, str] = {}
    for layer in layers:
        for name in (*(layer.at(p) for p in LINEARS), *(layer.at(p) for p in NORMS)):
            first = seen.setdefault(id(modules[name].weight), name)
            if first != name:
                raise _unknown(
                    model, f"{name} shares its weight with {first}, and what is folded into one is not for both"
                )
    return DecoderGraph(blocks, layers, embedding, norm, head)


def _layer(model: nn.Module, modules: dict[str, nn.Module], name: str) -> Layer:
    parts = {n.removeprefix(name + ".") for n, m in modules.items() if n.startswith(name + ".") and _has_weight(m)}
    missing = [p for p in (*NORMS, *LINEARS) if p not in parts]
    extra = sorted(parts - {*NORMS, *LINEARS, *BESIDE})
    if missing or extra:
        what = [f"{name} lacks {', '.join(missing)}"] * bool(missing) + [f"{name} has also {', '.join(extra)}"] * bool(
            extra
        )
        raise _unknown(model, " and ".join(what))
    for p in LINEARS:
        module = modules[f"{name}.{p}"]
        if not isinstance(module, nn.Linear):
            raise _unknown(model, f"{name}.{p} is {type(module).__name__}, not a Linear")
        if isinstance(module.weight, QuantizedTensor):
            raise ValueError(
                f"{name}.{p} is quantized already ({module.weight.format.spec}); what changes weights before they are "
                "quantized needs the original model" + see("already-quantized")
            )
    sizes = [modules[f"{name}.{p}"].weight.shape for p in LINEARS[:4]]  # type: ignore[union-attr]
    q, k, v, o = int(sizes[0][0]), int(sizes[1][0]), int(sizes[2][0]), int(sizes[3][1])  # type: ignore[index, arg-type]
    head_dim = getattr(modules[f"{name}.self_attn"], "head_dim", None)
    if not isinstance(head_dim, int) or k != v or q != o or q % v or v % head_dim:
        raise _unknown(
            model,
            f"{name}.self_attn has a head_dim of {head_dim}, {q}, {k} and {v} outputs of q, k and v, {o} inputs of o",
        )
    return Layer(name, head_dim, q // v)


def _has_weight(module: nn.Module) -> bool:
    return bool(list(module.parameters(recurse=False)))


@torch.no_grad()
def _check_norm(model: nn.Module, name: str, norm: nn.Module) -> None:
    """Seen from outside, because names do not tell: some norms subtract the mean, others multiply by 1 + weight."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    x = torch.randn(4, weight.numel(), generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype) + 1
    wanted = x.float() / x.float().square().mean(1, keepdim=True).sqrt() * weight.float()
    if getattr(norm, "bias", None) is not None or not (norm(x).float() - wanted).norm() <= 2e-2 * wanted.norm():
        raise _unknown(model, f"{name} ({type(norm).__name__}) does not give x / rms(x) * weight")


def _unknown(model: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"{type(model).__name__} is no decoder whose parts are known: {why}. Rotation, AWQ, SmoothQuant and alignment "
        "fold numbers through models of the Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM); use 'mse', 'hqq' or "
        "'gptq' for others" + see("unknown-architecture")
    )
