"""The vision-language model, composed of megatron-core parts: encode, project, splice, decode.

Shape legend: b rows · s positions · C width · V vocabulary · n images of t positions each · S side of an
    image in
pixels. Activations inside the decoder are [s, b, C].
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule

from megatron_evomoe.config import RunConfig
from megatron_evomoe.config.kinds import StageKind
from megatron_evomoe.config.recipe import MODULES
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.conversation import IGNORE_INDEX
from megatron_evomoe.data.image import processor_for
from megatron_evomoe.model.attention import PackedSegments
from megatron_evomoe.model.language import build_language_model
from megatron_evomoe.model.projector import build_projector
from megatron_evomoe.model.splice import splice
from megatron_evomoe.model.vision import build_vision_model
from megatron_evomoe.moe.planes import mark_starts
from megatron_evomoe.parallel import rng, topology


class LlavaModel(MegatronModule):
    """A vision tower and a projector, which the first pipeline stage holds, before a `GPTModel`.

    On the last pipeline stage `forward` returns the loss of each position, or logits without labels; on
    earlier stages it returns hidden states.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        stage_kind: StageKind,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        language = build_language_model(
            config,
            stage_kind=stage_kind,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        super().__init__(config=language.config)
        self.run_config = config
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        # read by megatron-core's schedules and gradient finalisation
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = language.share_embeddings_and_output_weights
        with rng.derived("vision_model"):
            self.vision_model = build_vision_model(config) if pre_process else None
        with rng.derived("vision_projection"):
            self.vision_projection = build_projector(config) if pre_process else None
        self.language_model = language
        self._normalize = processor_for(config).normalize

    def set_input_tensor(self, input_tensor: torch.Tensor) -> None:
        """Take the hidden states of the stage before. megatron-core's schedule calls this."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        """The tied matrix, whose gradient megatron-core sums over the first and the last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def vision_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features [n, t, C of the tower] of uint8 pixels [n, 3, S, S]; a frozen tower has no autograd."""
        assert self.vision_model is not None
        normalized = self._normalize(pixels, self.config.params_dtype)
        trains_tower = any(p.requires_grad for p in self.vision_model.parameters())
        with torch.set_grad_enabled(trains_tower and torch.is_grad_enabled()):
            return self.vision_model(normalized)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Images in the decoder's space, [n, t, C].

        Args:
            images: uint8 pixels [n, 3, S, S], or features [n, t, C of the tower] that were kept of them.
        """
        assert self.vision_projection is not None
        return self.vision_projection(images if images.dim() == 3 else self.vision_features(images))

    def embed(self, tokens: torch.Tensor, token_types: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Word embeddings with image features at the vision positions, [s, b, C].

        Under sequence parallelism s is this rank's part of the positions. Arguments are those of `forward`.
        """
        # RoPE alone knows positions, so the embedding does without
        words = self.language_model.embedding(input_ids=tokens, position_ids=None)
        hidden = splice(words, token_types == TokenType.VISION, self.encode_images(images).to(words.dtype))
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
        recomputes = self.config.recompute_granularity == "full" or {"mlp", "layernorm"} & set(
            self.config.recompute_modules or ()
        )
        if self.training and recomputes:
            # Re-entrant recompute gives no gradients inside a block if none of its inputs needs one, as
            # below the first trained FFN of `evolve`; a norm that is recomputed needs one of its output.
            hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
        return hidden

    def forward(
        self,
        tokens: torch.Tensor,
        token_types: torch.Tensor,
        images: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        segments: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """Run this pipeline stage.

        Args:
            tokens: int64 [b, s]; ids at vision positions are ignored.
            token_types: int64 [b, s] of `TokenType`.
            images: uint8 pixels [n, 3, S, S], or features [n, t, C] that were kept of them, in the order in
                which their positions occur row by row; needed on the first pipeline stage only.
            labels: int64 [b, s], already shifted; IGNORE_INDEX where nothing is supervised.
            segments: lengths of the segments of a packed row (b = 1), as in `data.batch.MicroBatch`.
                Positions restart at each segment, and no position attends to another segment.

        Returns:
            float [b, s] loss per position (undefined where ignored), or [b, s, V] logits without labels;
            before the last stage hidden states [s, b, C].

        Raises:
            ValueError: `segments` do not fill one row.
        """
        packed = self._packed(tokens, segments)
        decoder_input = None
        if self.pre_process:
            assert images is not None
            decoder_input = self.embed(tokens, token_types, images)
        positions = _positions(tokens, segments)
        if segments is not None and self.config.moe_expert_capacity_factor is not None:
            token_types = mark_starts(token_types, positions == 0)  # capacity depends on positions
        if self.config.sequence_parallel:
            tp = self.config.tensor_model_parallel_size
            token_types = token_types.chunk(tp, dim=1)[topology.current().tensor.rank].contiguous()
        # Ignored positions get a valid id, because the caller masks their loss.
        targets = labels.masked_fill(labels == IGNORE_INDEX, 0) if labels is not None else None
        return self.language_model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=None,
            decoder_input=decoder_input,
            labels=targets,
            packed_seq_params=packed,
            padding_mask=token_types,  # the argument that megatron-core hands to every layer (moe/layer.py)
        )

    def _packed(self, tokens: torch.Tensor, segments: tuple[int, ...] | None) -> PackedSegments | None:
        if segments is None:
            return None
        if tokens.shape[0] != 1 or sum(segments) != tokens.shape[1]:
            raise ValueError(
                f"segments of lengths {list(segments)} for tokens of shape {list(tokens.shape)}: they must "
                "fill one row"
            )
        thd = self.config.transformer_impl == "transformer_engine"
        return PackedSegments.of(segments, tokens.device, thd=thd)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """The parts' entries under `vision_model.`, `vision_projection.` and `language_model.`."""
        out = {}
        for name in MODULES:
            module = getattr(self, name)
            if module is not None:
                out.update(module.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
        return out


def _positions(tokens: torch.Tensor, segments: tuple[int, ...] | None) -> torch.Tensor:
    """int64 [b, s], the place of each position in its row or segment; needs no device synchronisation."""
    counted = torch.arange(max(segments or (tokens.shape[1],)), device=tokens.device)
    if segments is None:
        return counted.expand_as(tokens)
    return torch.cat([counted[:length] for length in segments])[None]
