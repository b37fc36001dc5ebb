"""The vision tower: megatron-core's ViT in CLIP's or SigLIP's shape, up to the feature layer.

Shape legend: n images of S×S pixels · t output positions of each · C width of the tower.
"""

from __future__ import annotations

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_evomoe.config import RunConfig
from megatron_evomoe.model.attention import SdpaAttention
from megatron_evomoe.model.mlp import dense_mlp_spec
from megatron_evomoe.model.norm import TorchNorm
from megatron_evomoe.model.transformer_config import resolve_transformer_impl, vision_transformer_config


class VisionTower(CLIPViTModel):
    """A `CLIPViTModel` that ends at the feature layer, selects positions and accepts batches without images.

    It lacks the tower's final norm, because LLaVA reads the hidden states of a layer from before that norm.
    """

    def __init__(self, config: RunConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        vision = config.vision
        transformer_config = vision_transformer_config(config)
        use_te = resolve_transformer_impl(config) == "transformer_engine"
        has_class_token = vision.model_type == "clip"
        super().__init__(
            transformer_config,
            _te_layer_spec() if use_te else _local_layer_spec(),
            ln_pre_impl=_te_norm() if use_te else TorchNorm,
            ln_post_impl=_te_norm() if use_te else TorchNorm,
            add_class_token=has_class_token,
            class_token_len=int(has_class_token),
            patch_dim=vision.patch_size,
            img_h=vision.image_size,
            img_w=vision.image_size,
            model_subtype=vision.model_type,
            pg_collection=pg_collection,
        )
        self.ln_post = None
        self.conv1.to(transformer_config.params_dtype)
        self.num_skipped = int(has_class_token and vision.feature_select == "patch")
        if transformer_config.perform_initialization:
            # megatron-core leaves these at N(0, 1); CLIP and SigLIP start with a deviation near 0.02
            with torch.no_grad():
                transformer_config.init_method(self.position_embeddings.weight)
                if has_class_token:
                    transformer_config.init_method(self.class_token)

    def forward(self, pixels: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Features of the chosen layer.

        Args:
            pixels: float [n, 3, S, S], normalised; n may be 0, and must be the same on all TP ranks.
            attention_mask: None, because every patch attends to every other.

        Returns:
            [n, t, C]. If n is 0 and the tower trains, one blank image is run and its output dropped, so
            that every parameter still gets a (zero) gradient, which other data-parallel ranks wait for.
        """
        pixels = pixels.to(self.conv1.weight.dtype)
        if pixels.shape[0] == 0:
            if not (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())):
                return pixels.new_zeros(0, self.seq_length - self.num_skipped, self.visual_hidden_size)
            return self.forward(pixels.new_zeros(1, 3, self.img_h, self.img_w))[:0]
        return super().forward(pixels, attention_mask)[:, self.num_skipped :]


def build_vision_model(config: RunConfig, pg_collection: ProcessGroupCollection | None = None) -> VisionTower:
    """The tower of ``config.vision``, which maps pixels [n, 3, S, S] to features [n, t, C]."""
    return VisionTower(config, pg_collection)


def _local_layer_spec() -> ModuleSpec:
    # megatron-core's get_vit_layer_with_local_spec() is not used, because in 0.16.1 its attention is causal
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=TorchNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=SdpaAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=TorchNorm,
            mlp=dense_mlp_spec(ColumnParallelLinear, RowParallelLinear),
            mlp_bda=get_bias_dropout_add,
            # Transformer Engine's names, so that both implementations read the same checkpoints
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def _te_layer_spec() -> ModuleSpec:
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_transformer_engine_spec

    return get_vit_layer_with_transformer_engine_spec()


def _te_norm() -> type:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
