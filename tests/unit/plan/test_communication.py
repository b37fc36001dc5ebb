"""Communication volumes and the arithmetic of the step time are compared with hand-worked values.

The model's sizes are small numbers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_evomoe.config import from_mapping
from megatron_evomoe.model import inventory
from megatron_evomoe.plan.communication import volume_of
from megatron_evomoe.plan.flops import flops
from megatron_evomoe.plan.rank_tensors import local_numel
from megatron_evomoe.plan.states import states_of
from megatron_evomoe.plan.step_time import Machine, step_time

C, SEQ, LAYERS = 64, 128, 4
TP, PP, EP, ETP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def config_of(parallel: dict, train: dict | None = None, **sections):
    return from_mapping(
        {
            "language": {
                "num_layers": LAYERS,
                "hidden_size": C,
                "ffn_hidden_size": 96,
                "num_attention_heads": 4,
                "vocab_size": 64,
            },
            "data": {"seq_length": SEQ, **sections.pop("data", {})},
            "parallel": parallel,
            "train": {"bf16": True, "global_batch_size": 8, **(train or {})},
            **sections,
        }
    )


def volume(kind: str, world: int, parallel: dict, pp_rank: int = 0, **more):
    config = config_of(parallel, **more)
    states = states_of(config, kind, world_size=world, pp_rank=pp_rank)
    return volume_of(config, kind, states, world_size=world, pp_rank=pp_rank), states


def test_a_single_rank_is_silent():
    assert volume("route", 1, {})[0].total == 0


def test_expert_all_to_all():
    """Dispatch and combine of two mixtures, forward and backward, move 3/4 of the tokens.

    4 ranks are DP 4, with 2 microbatches each.
    """
    v, _ = volume("route", 4, {EP: 4})
    assert v.ep == 2 * 2 * 2 * 2 * (SEQ * C * 2) * 3 // 4
    assert v.tp == v.pp == 0
    again, _ = volume("route", 4, {EP: 4}, train={"recompute_granularity": "full"})
    assert again.ep == v.ep * 3 // 2  # the recomputed forward communicates too
    assert volume("warmup", 4, {EP: 4})[0].ep == 0


def test_pipeline():
    """The first stage sends hidden states forward, and the last sends gradients back.

    A stage between them sends both; virtual chunks add transfers.
    """
    hidden = SEQ * C * 2
    assert [volume("warmup", 4, {PP: 4}, rank)[0].pp for rank in range(4)] == [
        8 * n * hidden for n in (1, 2, 2, 1)
    ]
    interleaved = {PP: 2, "num_layers_per_virtual_pipeline_stage": 1}
    assert [volume("warmup", 2, interleaved, rank)[0].pp for rank in range(2)] == [8 * 3 * hidden] * 2


@pytest.mark.parametrize("distributed", [True, False])
def test_gradients_and_parameters(distributed):
    v, s = volume("warmup", 4, {"use_distributed_optimizer": distributed})
    once = s.dense_reduced * 3 // 4
    assert (v.gradients, v.parameters) == ((4 * once, 2 * once) if distributed else (8 * once, 0))


def test_both_copies_of_a_tied_matrix_are_added_up():
    tied, s = volume("warmup", 2, {PP: 2})
    assert s.tied == 64 * C and tied.gradients == 4 * s.tied
    assert volume("route", 2, {PP: 2})[0].gradients == 0  # the tied matrix is frozen


def test_tensor_parallel_layers():
    """Tensor-parallel collectives per layer and microbatch when everything is trained.

    A layer has two gathers and two scatters in the forward, as many in the backward, and two gathers of
    inputs for the weights' gradients. The ends have an all-reduce and a gather of the embedding, and a gather
    and a scatter at the output layer. The frozen tower has two all-reduces per layer.
    """
    v, _ = volume("warmup", 2, {TP: 2})
    hidden, tower = SEQ * C * 2 // 2, 2 * 4 * (17 * 64 * 2 // 2)
    assert v.tp == 8 * (LAYERS * 10 * hidden + 3 * hidden + 2 * hidden + tower)
    frozen, _ = volume("align", 2, {TP: 2})
    assert v.tp - frozen.tp == 8 * LAYERS * 2 * hidden  # frozen weights do not need their inputs


def test_arithmetic_of_a_dense_step():
    """6 FLOP per weight and token for trained parts, 2 for the frozen tower, plus causal attention."""
    config = config_of({}, vision={"num_layers": 2})
    forward, backward = flops(config, "dense", 0)
    s = states_of(config, "dense", world_size=1, pp_rank=0)
    vision = sum(t.numel for t in inventory.vision_model(config))
    projector = 64 * C + C + C * C + C
    scores = LAYERS * 2 * SEQ * SEQ * C
    weights = s.parameters - vision - projector - C  # the last norm is not counted
    assert forward == 2 * SEQ * weights + scores + 2 * 16 * vision
    assert backward == 2 * (2 * SEQ * weights + scores)


def test_cached_features_need_no_tower_but_its_weights():
    """A step with cached features does not run the tower, but still holds its weights.

    The volumes and FLOP of the two runs differ by the tower's forward.
    """

    def sections(wanted):
        return {"parallel": {TP: 2}, "data": {"cache_vision_features": wanted}}

    (plain, states), (cached, cached_states) = (
        volume("warmup", 2, **sections(wanted)) for wanted in (False, True)
    )
    assert plain.tp - cached.tp == 8 * 2 * 4 * (17 * 64 * 2 // 2) and cached_states == states
    one, other = (config_of(**sections(wanted)) for wanted in (False, True))
    (forward, backward), (cached_forward, cached_backward) = (
        flops(one, "warmup", 0),
        flops(other, "warmup", 0),
    )
    assert (
        forward - cached_forward == 2 * 16 * sum(local_numel(one, t) for t in inventory.vision_model(one))
        and cached_backward == backward
    )


def test_frozen_weights_cost_no_gradient_of_their_own():
    forward, backward = flops(config_of({}), "align", 0)
    full_forward, full_backward = flops(config_of({}), "dense", 0)
    assert forward == full_forward and backward < full_backward
    recomputing = config_of({}, train={"recompute_granularity": "full"})
    assert flops(recomputing, "dense", 0)[1] > full_backward


def test_traffic_inside_a_node_is_fast():
    """Two TP ranks share a node of 8 GPUs, but not a node of 1."""
    config = config_of({TP: 2})
    states = states_of(config, "warmup", world_size=2, pp_rank=0)
    v = volume_of(config, "warmup", states, world_size=2, pp_rank=0)
    near, far = Machine(nnodes=1, gpus_per_node=2), Machine(nnodes=2, gpus_per_node=1)
    fast, slow = (step_time(config, "warmup", v, machine, 0) for machine in (near, far))
    assert fast.tp == v.tp / 400e9 and slow.tp == v.tp / 40e9
    assert fast.compute == slow.compute and fast.bubble == 0


def test_overlap_hides_reduction_behind_the_backward():
    config = config_of({})
    states = states_of(config, "warmup", world_size=2, pp_rank=0)
    v = volume_of(config, "warmup", states, world_size=2, pp_rank=0)
    machine = Machine(nnodes=1, gpus_per_node=2, tflops=1e-3)
    shown = step_time(config, "warmup", v, machine, 0)
    hidden = step_time(
        replace(config, parallel=replace(config.parallel, overlap_grad_reduce=True)), "warmup", v, machine, 0
    )
    assert shown.dp == (v.gradients + v.parameters) / 400e9 and hidden.dp == v.parameters / 400e9
