"""The parameters that one rank holds of one model chunk, from the inventory (`model/inventory.py`). Exact.

Names and order are those of `LlavaModel.named_parameters()` with local layers. Transformer Engine renames
norms and experts and changes no size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from megatron_evomoe.config import RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.recipe import is_trained, trained_parts
from megatron_evomoe.model import inventory
from megatron_evomoe.parallel.degrees import virtual_stages


class RankTensor(NamedTuple):
    """One parameter as this rank holds it."""

    name: str
    numel: int
    part: str
    """The part of the model that the tensor belongs to, one of `config.recipe.PARTS`."""
    trains: bool
    layer: int
    """Decoder layer, global, from 0; −1 outside the decoder's layers."""
    expert_parallel: bool = False
    """Reduced over the ranks that hold the same experts, rather than over all replicas."""
    own_bucket: bool = False
    """Whether it is the tied matrix under PP.

    megatron-core gives this matrix a gradient bucket of its own, so that both copies are sharded alike.
    """


def chunk_layers(config: RunConfig, pp_rank: int, chunk: int) -> range:
    """Decoder layers of a chunk, global, from 0. Chunks are dealt round robin over the pipeline ranks."""
    pp = config.parallel.pipeline_model_parallel_size
    count = config.language.num_layers // (pp * chunks(config))
    first = (chunk * pp + pp_rank) * count
    return range(first, first + count)


def chunks(config: RunConfig) -> int:
    """Model chunks per pipeline rank."""
    return virtual_stages(config) or 1


def is_first(pp_rank: int, chunk: int) -> bool:
    """Whether the chunk embeds: it has the vision tower, the projector and the embedding."""
    return pp_rank == 0 and chunk == 0


def is_last(config: RunConfig, pp_rank: int, chunk: int) -> bool:
    """Whether the chunk computes the loss: it has the last norm and the output layer."""
    return pp_rank == config.parallel.pipeline_model_parallel_size - 1 and chunk == chunks(config) - 1


def chunk_tensors(config: RunConfig, kind: StageKind, pp_rank: int, chunk: int = 0) -> list[RankTensor]:
    """The parameters of one chunk in the model's order; `config` has layout and overrides applied."""
    parts = trained_parts(config, kind)
    layers = chunk_layers(config, pp_rank, chunk)
    expert_parallel = experts_reduced_apart(config)
    tied_apart = config.language.tie_word_embeddings and config.parallel.pipeline_model_parallel_size > 1
    first, last = is_first(pp_rank, chunk), is_last(config, pp_rank, chunk)
    return [
        RankTensor(
            t.local_name(layers.start),
            local_numel(config, t),
            t.part,
            trains=is_trained(t.part, parts),
            layer=-1 if t.layer is None else t.layer,
            expert_parallel=t.expert is not None and expert_parallel,
            own_bucket=tied_apart and t.name.endswith(("word_embeddings.weight", "output_layer.weight")),
        )
        for t in on_one_ep_rank(config, inventory.tensors(config, kind, layers, first=first, last=last))
    ]


def layer_tensors(config: RunConfig, kind: StageKind, layer: int) -> Iterator[inventory.Tensor]:
    """A decoder layer's tensors on one rank, with their whole shapes; see `local_numel`."""
    return on_one_ep_rank(config, inventory.decoder_layer(config, kind, layer))


def on_one_ep_rank(config: RunConfig, tensors: Iterable[inventory.Tensor]) -> Iterator[inventory.Tensor]:
    """`tensors` without the experts of other EP ranks; all of these hold equally many."""
    experts = config.moe.num_experts // config.parallel.expert_model_parallel_size
    return (t for t in tensors if t.expert is None or t.expert < experts)


def local_numel(config: RunConfig, tensor: inventory.Tensor) -> int:
    """Elements of a tensor that one rank holds."""
    return math.prod(tensor.local_shape(config.parallel))


def experts_reduced_apart(config: RunConfig) -> bool:
    """Whether experts' gradients are reduced apart, over the ranks that hold the same ones (moe/layer.py)."""
    p = config.parallel
    return p.expert_model_parallel_size > 1 or p.expert_tensor_parallel_size != p.tensor_model_parallel_size
