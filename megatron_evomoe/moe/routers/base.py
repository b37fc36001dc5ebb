"""What all routers share: a megatron-core `TopKRouter` that knows each token's modality.

Shape legend: s sequence · b batch · T = s·b tokens · C width · N experts · K experts per token.

This package computes the logits, the drops by capacity, the z-loss and the scale of an expert's output;
top-k and the formula of the load-balancing loss are megatron-core's (`TopKRouter.routing`). Words are
megatron-core's too: the gate puts out *logits*, *probs* scale the experts' outputs, and *routing_map* says
which expert gets which token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    apply_random_logits,
    get_tokens_per_expert_and_token_count,
    save_to_aux_losses_tracker,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_evomoe.config import MoEConfig
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.moe.capacity import within_capacity
from megatron_evomoe.moe.planes import from_planes, starts_of
from megatron_evomoe.moe.router import draw_router, router_tensors

Observer = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
"""(layer_number, token_types [T], logits [T, N], probs [T, N], routing_map [T, N]), all detached."""

Intervention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(probs [T, N], routing_map [T, N], token_types [T]) -> (probs, routing_map)."""


def straight_through(probs_TN: Tensor) -> Tensor:
    """p / stop_gradient(Σ_selected p): 1 for top-1, renormalised weights for top-K, with the gradient of p.

    With weights that are renormalised before the gradient is taken, no logit would learn for K = 1; with
    these every expert's logit does. A token that capacity dropped keeps weight 0, and the remaining experts
    of a token that lost some share the weight 1.

    Args:
        probs_TN: probabilities of the chosen experts, 0 elsewhere.
    """
    mass_T1 = probs_TN.detach().sum(dim=-1, keepdim=True)
    return probs_TN / mass_T1.masked_fill(mass_T1 == 0, 1.0)


class TypedRouter(TopKRouter):
    """A `TopKRouter` whose gate may read the token types. Subclasses define `logits`.

    Raises:
        ValueError: the two configurations disagree, or `straight_through` is to scale scores that are not a
            softmax over all experts.
    """

    auxiliary_weight: float = 1.0
    """Factor of the auxiliary losses' gradients, the same for all microbatches of a step.

    megatron-core takes the mean over all microbatches. With M·DP / K, where K of a step's M·DP microbatches
    hold real tokens, it becomes the mean over those.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        *,
        moe: MoEConfig,
        **ignored: Any,
    ) -> None:
        _check(config, moe)
        super().__init__(config=config, pg_collection=pg_collection)
        self.is_mtp_layer = is_mtp_layer  # newer versions of the base class take it; 0.16.1 does not
        self.moe = moe
        self.gate_dtype = torch.float64 if config.moe_router_dtype == "fp64" else torch.float32
        self.capacity_factor = config.moe_expert_capacity_factor
        self.config = copy.copy(config)
        # megatron-core would drop by the tokens that this rank holds (moe/capacity.py)
        self.config.moe_expert_capacity_factor = None
        self.observer: Observer | None = None
        self.intervene: Intervention | None = None
        self.make_parameters()

    def logits(self, hidden: Tensor, token_types: Tensor) -> Tensor:
        """Logits [s, b, N] in `self.gate_dtype`.

        Args:
            hidden: tokens [s, b, C] of any floating type.
            token_types: int64 [s, b].
        """
        raise NotImplementedError

    def gating(self, input: Tensor, token_types: Tensor | None = None) -> Tensor:
        """`logits` under the name by which megatron-core calls it; without types every token is text."""
        if token_types is None:
            token_types = input.new_full(input.shape[:2], TokenType.TEXT, dtype=torch.int64)
        return self.logits(input, token_types)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route tokens [s, b, C].

        `padding_mask` (megatron-core fixes this name) holds the planes [s, b, 3] of moe/planes.py; None makes
        every token text. Returns probs [T, N] in `self.gate_dtype` and the bool routing_map [T, N]. Padding
        tokens are routed like any other; the auxiliary losses leave them out and no token attends to them.
        With a capacity factor, training drops padding tokens and those over capacity; evaluation drops
        nothing. Communicates over TP x CP.
        """
        if padding_mask is None:
            token_types, is_padding = input.new_full(input.shape[:2], TokenType.TEXT, dtype=torch.int64), None
            starts = None
        else:
            token_types = from_planes(padding_mask)
            is_padding = token_types == TokenType.PADDING
            starts = starts_of(padding_mask)
        logits = self.gating(self.apply_input_jitter(input), token_types)
        if self.config.moe_router_force_load_balancing:
            logits = apply_random_logits(logits)
        self._maintain_float32_expert_bias()
        probs, routing_map = self.routing(logits, padding_mask=is_padding)
        if self.capacity_factor is not None and self.training:
            probs, routing_map = self._drop(probs, routing_map, is_padding, starts)
        if self.moe.router_gate == "straight_through":
            probs = straight_through(probs)
        return self._diagnose(logits, probs, routing_map, token_types.flatten())

    def _drop(
        self, probs: Tensor, routing_map: Tensor, is_padding: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Take back what exceeds capacity. Communicates over the ranks that share the microbatch."""
        kept = within_capacity(
            probs,
            routing_map,
            None if is_padding is None else is_padding.flatten(),
            None if starts is None else starts.flatten(),
            topk=self.topk,
            factor=self.capacity_factor,
            by_position=self.config.moe_token_drop_policy == "position",
            group=self.tp_cp_group if self.config.sequence_parallel else self.cp_group,
        )
        return probs * kept, kept

    def get_aux_loss_coeff(self, aux_loss_type: str) -> float:
        """The coefficient of an auxiliary loss in this step; megatron-core logs losses divided by it."""
        return super().get_aux_loss_coeff(aux_loss_type) * self.auxiliary_weight

    def _apply_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """Attach the load-balancing loss, exactly 0 for a microbatch of padding alone.

        megatron-core's own method divides by the number of real tokens, and 0 / 0 would reach every
        gradient. Arguments are those of that method. Communicates over TP x CP.
        """
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0:
            return probs
        tokens_per_expert_N, _, tokens = get_tokens_per_expert_and_token_count(
            routing_map=routing_map,
            reduce_group=self.tp_cp_group,
            topk=self.topk,
            with_padding_mask=with_padding_mask,
        )
        loss = switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=tokens_per_expert_N,
            total_num_tokens=tokens.clamp(min=1) if with_padding_mask else tokens,
            topk=self.topk,
            num_experts=self.config.num_moe_experts,
            moe_aux_loss_coeff=coefficient,
            fused=self.config.moe_router_fusion,
        )
        return self.attach_and_log_load_balancing_loss(
            probs, coefficient, loss, "load_balancing_loss", self.tp_cp_group
        )

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Attach the z-loss (ST-MoE, arXiv 2202.08906): coefficient x mean of logsumexp² over real tokens.

        The mean is over the microbatch, and 0 if it holds padding alone. megatron-core averages the means of
        the TP x CP ranks, which is another number if padding lies unevenly on them, and logs that of one
        replica. Communicates over TP x CP.
        """
        if self.config.moe_z_loss_coeff is None or not (self.training and torch.is_grad_enabled()):
            return logits
        squares_T = torch.logsumexp(logits, dim=-1).square()
        if padding_mask is not None:
            squares_T = squares_T.masked_fill(padding_mask, 0.0)
        count = (
            squares_T.new_tensor(squares_T.numel())
            if padding_mask is None
            else (~padding_mask).sum().to(squares_T)
        )
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(count, group=self.tp_cp_group)
        z_loss = squares_T.sum() / count.clamp(min=1)
        save_to_aux_losses_tracker(
            "z_loss", z_loss, self.layer_number, self.config.num_layers, reduce_group=self.tp_cp_group
        )
        weight = self.config.moe_z_loss_coeff * self.auxiliary_weight
        return MoEAuxLossAutoScaler.apply(logits, weight * z_loss)

    def _diagnose(
        self, logits: Tensor, probs: Tensor, routing_map: Tensor, types_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Let `intervene` change the decision (in evaluation only), and show it to `observer`."""
        if self.observer is None and self.intervene is None:
            return probs, routing_map
        if self.intervene is not None:
            if self.training:  # recompute would call it twice and could get two different answers
                raise ValueError(
                    "router.intervene is for evaluation: call eval() on the model, or set it to None"
                )
            probs, routing_map = self.intervene(probs, routing_map, types_T)
        # Recompute's second forward runs inside the backward of the first, where autograd has a task.
        if self.observer is not None and torch._C._current_graph_task_id() == -1:
            with torch.no_grad():
                logits_TN = logits.detach().flatten(0, 1)
                self.observer(self.layer_number, types_T, logits_TN, probs.detach(), routing_map)
        return probs, routing_map

    def make_parameters(self) -> None:
        """Replace the core's [N, C] map by the parameters that the registry lists.

        A parameter without a gradient would stall the gradient buckets, so the core's goes. Each parameter is
        drawn in fp32, cast, and marked as the core marks its own: whole on every TP rank, and under sequence
        parallelism fed one rank's share of the positions.
        """
        self.weight = None
        self.bias = None
        tensors = router_tensors(self.moe, self.config)
        for tensor in tensors:
            module, _, name = tensor.name.rpartition(".")
            self.get_submodule(module).register_parameter(name, nn.Parameter(torch.empty(tensor.shape)))
        if self.config.perform_initialization:
            with torch.no_grad():
                draw_router(tensors, dict(self.named_parameters()))
        for parameter in self.parameters():
            parameter.data = parameter.data.to(self.config.params_dtype)
            parameter.sequence_parallel = self.config.sequence_parallel


def _check(config: TransformerConfig, moe: MoEConfig) -> None:
    if (config.num_moe_experts, config.moe_router_topk) != (moe.num_experts, moe.moe_router_topk):
        raise ValueError(
            f"TransformerConfig has {config.num_moe_experts} experts, top-{config.moe_router_topk}; "
            f"MoEConfig has {moe.num_experts}, top-{moe.moe_router_topk}: build the first from the second"
        )
    if config.moe_pad_expert_input_to_capacity:
        raise ValueError(
            "moe_pad_expert_input_to_capacity fills experts up on each rank, but capacity here is the "
            "microbatch's; leave it off"
        )
    softmax_over_all = config.moe_router_pre_softmax and config.moe_router_score_function == "softmax"
    if moe.router_gate == "straight_through" and not (
        softmax_over_all and config.moe_router_topk_scaling_factor is None
    ):
        raise ValueError(
            "router_gate 'straight_through' needs moe_router_pre_softmax=True, "
            "moe_router_score_function='softmax' and no moe_router_topk_scaling_factor, got "
            f"{config.moe_router_pre_softmax}, {config.moe_router_score_function!r} and "
            f"{config.moe_router_topk_scaling_factor}; set them so, or use router_gate 'prob'"
        )
