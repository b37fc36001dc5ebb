"""The projector, which maps vision features into the language model's space.

Shape legend: n images · t positions of each · Cv width of the tower · C width of the language model.
"""

from __future__ import annotations

from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules

from megatron_evomoe.config import RunConfig
from megatron_evomoe.model.transformer_config import projector_transformer_config


def build_projector(config: RunConfig) -> MultimodalProjector:
    """LLaVA's ``mlp2x_gelu``, [n, t, Cv] -> [n, t, C].

    With n = 0 it returns [0, t, C], through which every weight still gets a (zero) gradient.
    megatron-core's parallel linear layers are used with Transformer Engine too, because these layers are
    small and must accept zero rows.
    """
    return MultimodalProjector(
        projector_transformer_config(config),
        MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        projector_type="mlp",
        input_size=config.vision.hidden_size,
    )
