"""How layers of a serving engine hold and run quantized weights, without the engine: two methods that differ in where
the weights come from.

`StoredWeights` gives the engine one parameter per stored tensor, in the classes by which it cuts for tensor parallelism
(vLLM's, which SGLang has under the same names), and makes planes of them when they are loaded. `OnlineWeights` takes a
float weight and quantizes it. Both keep plain tensors and call lowbit's ops, so that torch.compile and CUDA graphs see
one opaque op per matmul.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from lowbit import dispatch, ops
from lowbit.checkpoints.files import CheckpointError
from lowbit.checkpoints.leaves import ACT_SCALE, WHOLE, Leaf
from lowbit.checkpoints.manifest import StoredWeight
from lowbit.configs import Scheme
from lowbit.errors import see
from lowbit.formats.base import Tile
from lowbit.formats.int import SCALE_DTYPES, IntFormat
from lowbit.integrations.engine_plans import Stored
from lowbit.models.fuse import join_weights
from lowbit.tensor import QuantizedTensor


class Engine(NamedTuple):
    """What differs between engines.

    Attributes:
        name: for errors.
        parameters: the module with the engine's classes of parameters.
        per_part: `PerPart` on top of the engine's `PerTensorScaleParameter`.
        embedding: the class of tables of the vocabulary.
    """

    name: str
    parameters: ModuleType
    per_part: type[nn.Parameter]
    embedding: type[nn.Module]


class Part(NamedTuple):
    """One matmul: the names of its planes in the layer, of its activation's scale, and its rows."""

    planes: tuple[str, ...]
    act_scale: str
    n: int


class Weights:
    """What both methods do with weights that they have; a base of the engine's own class of methods.

    Attributes:
        names: the layers of the checkpoint that this layer holds; several in a merged one (q, k and v).
        scheme: what the weights are, or become.
        sizes: rows of each of the layer's parts on this rank.
        parts: the matmuls. One, unless the parts of a merged layer have a scale per tensor each, which one matmul
            cannot have; nothing is rounded again to join them.
    """

    engine: ClassVar[Engine]

    def __init__(self, names: Sequence[str], scheme: Scheme) -> None:
        self.names, self.scheme = tuple(names), scheme
        self.sizes: list[int] = []
        self.parts: tuple[Part, ...] = ()
        # As strings and numbers, so that torch.compile traces no formats.
        self.k, self.spec, self.act, self.dtype = 0, "", "", torch.bfloat16

    def _keep(self, layer: nn.Module, weights: list[QuantizedTensor]) -> None:
        """Put the planes of the layer's parts into it, joined where they can be."""
        if len(weights) > 1:
            with contextlib.suppress(ValueError):  # they stay apart: see `parts`
                weights = [join_weights(list(weights))]  # type: ignore[list-item]
        parts = []
        for i, w in enumerate(weights):
            planes = {f"{name}_{i}": plane for name, plane in w.planes.items()}
            scale = {} if w.act_scale is None else {f"act_scale_{i}": w.act_scale}
            for name, tensor in (planes | scale).items():
                # Parts that stay apart are views of rows of one tensor; kernels want whole ones.
                own = tensor.contiguous() if len(weights) == 1 else tensor.clone()
                layer.register_parameter(name, nn.Parameter(own, requires_grad=False))
            parts.append(Part(tuple(planes), next(iter(scale), ""), w.out_features))
        self.parts, self.spec, self.act = tuple(parts), weights[0].format.spec, weights[0].act_spec

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x (..., K)` in bf16, fp16 or fp32 to `(..., N)` of this rank."""
        biases = bias.split([part.n for part in self.parts]) if bias is not None else [None] * len(self.parts)
        out = [
            dispatch.linear(
                x, [getattr(layer, name) for name in part.planes], b,
                getattr(layer, part.act_scale) if part.act_scale else None, self.spec, self.act, part.n, self.k,
            )
            for part, b in zip(self.parts, biases, strict=True)
        ]  # fmt: skip
        return out[0] if len(out) == 1 else torch.cat(out, dim=-1)

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Rows of a quantized table, `(..., K)` in the layer's dtype."""
        [part] = self.parts
        planes = [getattr(layer, name) for name in part.planes]
        return ops.embedding(input_, planes, self.spec, part.n, self.k, self.dtype)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """One table for both: the embedding itself, which this method can also multiply by.

        Raises:
            ValueError: the embedding is not quantized by lowbit.
        """
        if not isinstance(embed_tokens.quant_method, Weights):
            raise ValueError(
                f"{self.names[0]} is {self.scheme.spec} and tied to an embedding that is not quantized; set "
                "tie_word_embeddings to false in config.json, or quantize both" + see("layer-not-quantizable")
            )
        return embed_tokens

    def _sizes(self, rows: Iterable[int], k: int, dtype: torch.dtype) -> None:
        self.sizes, self.k, self.dtype = list(rows), k, dtype

    def _refuse(self, axis: str, size: int, what: str, step: int) -> NoReturn:
        raise ValueError(
            f"{', '.join(self.names)}: a rank or a merged part has {size} weights along {axis}, and {self.scheme.spec} "
            f"stores {what} in tiles of {step}; use fewer ranks, or quantize with a finer format"
            + see("cut-inside-tile")
        )


class StoredWeights(Weights):
    """Weights that a checkpoint holds quantized.

    Args:
        names, scheme: as in the attributes.
        stored: how.
    """

    def __init__(self, names: Sequence[str], scheme: Scheme, stored: Stored) -> None:
        super().__init__(names, scheme)
        self.leaves, self.any_scale, self.exact = stored
        self.tensors: dict[str, _Loaded] = {}
        self.dummy = False

    # The engine's part ------------------------------------------------------------------------------------------------

    def attribute(self, leaf: Leaf) -> str:
        """The parameter of a stored tensor: `weight.scale` is `weight_scale` of the layer."""
        return leaf.name.replace(".", "_")

    def register(self, layer: nn.Module, name: str, param: nn.Parameter) -> None:
        layer.register_parameter(name, param)

    def is_dummy(self) -> bool:
        """Whether the engine loads nothing, to measure with any weights."""
        return False

    # -----------------------------------------------------------------------------------------------------------------

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, *, weight_loader: Callable[..., None], **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        """One parameter per stored tensor of the layer, of this rank's size.

        Raises:
            ValueError: a rank or a part of the layer would begin inside a tile of weights that share a byte, a word or
                a scale.
        """
        self._sizes(output_partition_sizes, input_size_per_partition, params_dtype)
        rows, parts = sum(output_partition_sizes), len(output_partition_sizes)
        for leaf in self._leaves_of(rows):
            assert leaf.tile is not None, leaf.name
            self._refuse_cut(layer, leaf, leaf.tile, input_size, output_size)
            loaded = _Loaded(self.engine.name, leaf, self.names, self._dtypes(leaf), weight_loader)
            self.tensors[leaf.name] = loaded
            self.register(layer, self.attribute(leaf), _parameter(self.engine, leaf, leaf.tile, parts, loaded))
        self.dummy = self.is_dummy()

    def _leaves_of(self, n: int) -> list[Leaf]:
        return self.leaves("weight", StoredWeight(*self.scheme, (n, self.k), self.dtype))

    def _dtypes(self, leaf: Leaf) -> tuple[torch.dtype, ...]:
        """What a tensor may be stored in; the first holds all of them exactly."""
        if self.any_scale and leaf.info.dtype in SCALE_DTYPES.values():
            return tuple(SCALE_DTYPES.values())
        return (leaf.info.dtype,)

    def _refuse_cut(self, layer: nn.Module, leaf: Leaf, tile: Tile, input_size: int, output_size: int) -> None:
        n, k = tile
        if k is not None and self.k != input_size and self.k % k:
            self._refuse("K", self.k, leaf.name, k)
        if n is not None and (len(self.sizes) > 1 or self.sizes[0] != output_size):
            for size in self.sizes:
                if size % n:
                    self._refuse("N", size, leaf.name, n)
        if n is not None and isinstance(layer, self.engine.embedding):
            table: Any = layer
            if table.org_vocab_size % n:
                self._refuse("N", table.org_vocab_size, leaf.name, n)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replace the stored tensors by the planes that kernels read.

        Raises:
            CheckpointError: a tensor of the layer was not in the checkpoint.
        """
        stored = {self.attribute(leaf) for leaf in self._leaves_of(sum(self.sizes))}
        if not stored <= layer._parameters.keys():
            return  # done before
        missing = [t.name for t in self.tensors.values() if not t.complete(len(self.sizes))]
        if missing and not self.dummy:
            what = f"{', '.join(self.names)}: not in the checkpoint, or not for every part: {', '.join(missing)}"
            raise CheckpointError(f"{self.engine.name}'s loader", [what])
        weights, start = [], 0
        for i, n in enumerate(self.sizes):
            weights.append(self._part(layer, i, start, n))
            start += n
        for name in stored:
            delattr(layer, name)
        self._keep(layer, weights)

    def _part(self, layer: nn.Module, i: int, start: int, n: int) -> QuantizedTensor:
        planes: dict[str, Tensor] = {}
        fmt = self.scheme.weight
        # A layer that is merged in the checkpoint has one name for all of its parts.
        exact = self.exact[i if len(self.exact) > 1 else 0] if self.exact else {}
        for leaf in self._leaves_of(n):
            if leaf.plane is None:
                continue  # the shape again, which the engine has compared with the tensors
            t: Tensor = getattr(layer, self.attribute(leaf)).data
            if leaf.tile == WHOLE:
                t = t[i] if len(self.sizes) > 1 else t
            elif len(self.sizes) > 1:
                rows = leaf.tile[0] if leaf.tile and leaf.tile[0] else 1
                t = t[start // rows : -(-(start + n) // rows)]
            if leaf.plane == "scale" and isinstance(fmt, IntFormat):
                fmt = replace(fmt, scale_dtype=self.tensors[leaf.name].dtype)
                t = t.to(fmt.scale_dtype)
            planes[leaf.plane] = leaf.from_disk(t)
            if leaf.plane in exact:
                planes[leaf.plane].fill_(exact[leaf.plane])
        act_scale = planes.pop(ACT_SCALE, None)
        return QuantizedTensor(planes, fmt, (n, self.k), self.dtype, self.scheme.act, act_scale)


class OnlineWeights(Weights):
    """Float weights, quantized when all of a layer are read.

    Args:
        names, scheme: as in the attributes.
        check_used: raises if there are rules that reached no layer; called when the model is whole.
    """

    #: Where the float weight lies before it is read; None: where the engine puts tensors.
    float_device: ClassVar[str | None] = None

    def __init__(self, names: Sequence[str], scheme: Scheme, check_used: Callable[[], None]) -> None:
        super().__init__(names, scheme)
        self.check_used = check_used

    def create_weights(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, *, weight_loader: Callable[..., None], **extra_weight_attrs: Any,
    ) -> None:  # fmt: skip
        """A float `weight`.

        Raises:
            ValueError: a rank would begin inside a tile of weights that share a scale.
        """
        self._sizes(output_partition_sizes, input_size_per_partition, params_dtype)
        n, k = self.scheme.weight.tile
        if self.k != input_size and self.k % k:
            self._refuse("K", self.k, "weights", k)
        for size in self.sizes:
            if sum(self.sizes) != output_size and size % n:
                self._refuse("N", size, "weights", n)
        data = torch.empty(sum(self.sizes), self.k, dtype=params_dtype, device=self.float_device)
        kind = self.engine.parameters.ModelWeightParameter
        layer.register_parameter("weight", kind(data=data, input_dim=1, output_dim=0, weight_loader=weight_loader))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Quantize each part of the layer by itself, as `lowbit.quantize_` does to the unmerged layers.

        Raises:
            ValueError: the weight holds NaN or Inf, or a rule reaches no layer.
        """
        if "weight" not in layer._parameters:
            return  # done before
        self.check_used()
        weight = layer.get_parameter("weight").data
        parts = list(weight.split(self.sizes))
        if isinstance(layer, self.engine.embedding):
            held: Any = layer.shard_indices
            parts = [weight[: held.num_org_elements]]
        try:
            weights = [QuantizedTensor.from_float(w, *self.scheme) for w in parts]
        except ValueError as error:
            raise ValueError(f"{', '.join(self.names)}: {error}") from None
        if isinstance(layer, self.engine.embedding):
            weights = [_with_rows(weights[0], self.sizes[0])]
        del layer.weight
        self._keep(layer, weights)


def _with_rows(w: QuantizedTensor, n: int) -> QuantizedTensor:
    """A table with rows of zeros below it, which learned codebooks and scales of scales have not seen."""
    k, planes = w.in_features, dict(w.planes)
    for p in w.format.planes:
        shape = p.shape_for(n, k)
        if planes[p.name].shape != shape:
            planes[p.name] = torch.zeros(shape, dtype=p.dtype, device=w.device)
            planes[p.name][: len(w.planes[p.name])].view(torch.uint8).copy_(w.planes[p.name].view(torch.uint8))
    return w.with_planes(planes, (n, k))


class _Loaded:
    """The loader of one parameter: the engine's own, with a record of what has come.

    Attributes:
        dtype: in which the tensor was stored; that of the format where nothing is loaded.
    """

    def __init__(
        self, engine: str, leaf: Leaf, layers: tuple[str, ...], dtypes: tuple[torch.dtype, ...],
        loader: Callable[..., None],
    ) -> None:  # fmt: skip
        self.engine, self.name, self.layers, self.dtypes, self.loader = engine, leaf.name, layers, dtypes, loader
        self.dtype = leaf.info.dtype
        self.shards: set[Any] = set()

    def __call__(self, param: nn.Parameter, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> None:
        if loaded_weight.dtype not in self.dtypes:
            expected = " or ".join(map(str, self.dtypes))
            found = f"{', '.join(self.layers)}: {self.name} is {loaded_weight.dtype}, expected {expected}"
            raise CheckpointError(f"{self.engine}'s loader", [f"{found}; `lowbit verify` looks at the whole directory"])
        self.dtype = loaded_weight.dtype
        shard = args[0] if args else next(iter(kwargs.values()), None)
        self.shards.update(shard if isinstance(shard, tuple) else [shard])
        if shard is None and isinstance(param, PerPart):  # a layer that is merged on disk has one for all of its parts
            param.data.copy_(loaded_weight.expand_as(param.data))
        else:
            self.loader(param, loaded_weight, *args, **kwargs)

    def complete(self, parts: int) -> bool:
        """Whether the whole tensor has come, or one for each part of a merged layer."""
        return None in self.shards or len(self.shards) >= parts


class PerPart:
    """`(parts, *shape)`: what belongs to a whole weight, for each part of a merged layer."""

    data: Tensor
    _shard_id_as_int: Callable[[str | int], int]

    def _load_into_shard_id(self, loaded_weight: Tensor, shard_id: str | int, **kwargs: Any) -> None:
        self.data[self._shard_id_as_int(shard_id)].copy_(loaded_weight)


def _parameter(engine: Engine, leaf: Leaf, tile: Tile, parts: int, loader: _Loaded) -> nn.Parameter:
    """The engine's class that cuts a stored tensor as its tile says."""
    n, k = tile
    classes = engine.parameters
    kind, where = classes.ModelWeightParameter, {"output_dim": 0, "input_dim": 1}
    if n is None:
        assert k is None, leaf.name
        kind, where = (engine.per_part if parts > 1 else classes.BasevLLMParameter), {}
    elif k is None:
        kind, where = classes.ChannelQuantScaleParameter, {"output_dim": 0}
        if n > 1:
            kind, where = classes.PackedColumnParameter, where | {"packed_dim": 0, "packed_factor": n}
    elif n > 1:
        kind, where = classes.PackedvLLMParameter, where | {"packed_dim": 0, "packed_factor": n}
    elif leaf.plane in ("scale", "outer_scale", "zero_point"):
        kind = classes.GroupQuantScaleParameter
    elif k > 1:
        kind, where = classes.PackedvLLMParameter, where | {"packed_dim": 1, "packed_factor": k}
    shape = (parts, *leaf.info.shape) if kind is engine.per_part else leaf.info.shape
    made: nn.Parameter = kind(data=torch.empty(shape, dtype=loader.dtypes[0]), weight_loader=loader, **where)
    return made
