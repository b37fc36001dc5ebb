"""The values from which the fuzz tests of configurations draw."""

from __future__ import annotations

from typing import Any

from megatron_evomoe.moe.router import ROUTERS

BOTH = [False, True]

FILE = """\
# a run
preset: tiny
language: {num_layers: 4, rotary_base: 10000}
vision:
  image_size: 32
moe: &experts
  num_experts: 4
  moe_layer_freq: [0, 1, 0, 1]
  evolution_beta: [[0.9, 0.99], [0.8, 0.89], [0.7, 0.79]]
data:
  tokenizer: "runs/tokenizer.model"
  train_data: ["data/shard-{000..127}.tar", data/more]
  seq_length: ${EVOMOE_FUZZ_LENGTH:-128}
optimizer:
  lr: 1e-3
  min_lr: 1.0e-5
  adam_beta2: .95
train: {train_iters: 1_000, bf16: yes, trainable: [projector, language]}
checkpoint:
  save: runs/fuzz
  save_interval: 50
log: {log_interval: 5, wandb_exp_name: '007'}
stages:
  - {name: align, train_iters: 60}
  - name: second
    kind: route
    lr: 5e-4
"""

VALUES: dict[str, dict[str, list[Any]]] = {
    "language": {
        "num_layers": [1, 2, 3],
        "hidden_size": [1, 2, 8, 16, 30, 32, 33],
        "ffn_hidden_size": [1, 3, 16, 48],
        "num_attention_heads": [1, 2, 3, 4, 5],
        "num_query_groups": [None, 1, 2, 3, 4],
        "kv_channels": [None, 1, 2, 3, 6, 7, 8, 16],
        "vocab_size": [1, 5, 64, 100],
        "make_vocab_size_divisible_by": [1, 3, 8, 128],
        "max_position_embeddings": [2, 8, 64, 2048],
        "normalization": ["RMSNorm", "LayerNorm"],
        "norm_epsilon": [1e-37, 1e-6, 0.5],
        "activation": ["silu", "gelu", "gelu_tanh"],
        "gated_linear_unit": BOTH,
        "add_qkv_bias": BOTH,
        "add_bias_linear": BOTH,
        "qk_layernorm": BOTH,
        "parallel_residual": BOTH,
        "lm_head_bias": BOTH,
        "tie_word_embeddings": BOTH,
        "rotary_base": [1, 2, 10000, 10**12],
        "rotary_percent": [1e-9, 0.1, 0.25, 0.3, 0.5, 1.0],
        "rope_scaling_type": [None, "linear", "llama3"],
        "rope_scaling_factor": [1.0, 1.5, 8.0, 1e6],
        "window_size": [None, 1, 2, 5, 64],
        "init_method_std": [1e-9, 0.02, 1.0, 100],
    },
    "vision": {
        "model_type": ["clip", "siglip"],
        "image_size": [1, 2, 8, 16, 32],
        "patch_size": [1, 2, 8, 16],
        "hidden_size": [1, 2, 8, 15, 16],
        "num_layers": [1, 2, 3],
        "num_attention_heads": [1, 2, 3],
        "ffn_hidden_size": [1, 8],
        "norm_epsilon": [1e-37, 1e-5],
        "feature_layer": [-3, -2, -1, 0, 1, 2],
        "feature_select": ["patch", "cls_patch"],
        "init_method_std": [1e-9, 0.02],
    },
    "moe": {
        "num_experts": [1, 2, 3, 4, 7, 64],
        "moe_layer_freq": [1, 2, [1], [0, 1], [1, 0], [1, 1], [0, 0], [0, 1, 0]],
        "moe_router_topk": [1, 2, 3],
        "router": list(ROUTERS),
        "dtr_hidden_size": [1, 4],
        "dtr_rank": [1, 4],
        "dtr_init_std": [1e-9, 0.02],
        "dtr_activation": ["none", "gelu", "silu"],
        "dtr_kernel": ["torch"],
        "router_gate": ["prob", "straight_through"],
        "moe_aux_loss_coeff": [0, 0.001, 1e6],
        "moe_z_loss_coeff": [None, 0, 0.1],
        "moe_expert_capacity_factor": [None, 1e-9, 0.5, 1, 4, 1e6],
        "moe_token_dispatcher_type": ["alltoall", "allgather", "flex"],
        "moe_grouped_gemm": BOTH,
        "expert_init": ["evolve", "replicate", "noise"],
        "expert_init_noise": [0, 0.1],
        "evolution_rule": ["delta", "ema", "printed", "mine"],
        "evolution_beta": [None, [[0.5, 0.6]], []],
    },
    "data": {"seq_length": [2, 3, 17, 64, 128]},
    "parallel": {
        "sequence_parallel": [None, False, True],
        "use_distributed_optimizer": BOTH,
        "overlap_grad_reduce": BOTH,
        "overlap_param_gather": BOTH,
        "num_layers_per_virtual_pipeline_stage": [None, 1, 2],
        "context_parallel_size": [1, 2],
    },
    "optimizer": {
        "lr": [0, 1e-3, 1, 1000],
        "min_lr": [0, 1e-3],
        "lr_decay_style": ["cosine", "linear", "constant", "inverse-square-root"],
        "lr_decay_iters": [None, 1, 2, 100],
        "lr_warmup_fraction": [0, 0.03, 0.5, 1],
        "weight_decay": [0, 0.1, 1000],
        "adam_beta1": [0, 0.9, 0.9999999],
        "adam_beta2": [0, 0.999, 0.99999999],
        "adam_eps": [1e-37, 1e-8, 0.5],
        "clip_grad": [0, 1, 1e-9],
    },
    "train": {
        "train_iters": [1, 2, 100],
        "bf16": BOTH,
        "transformer_impl": ["auto", "local", "transformer_engine"],
        "recompute_granularity": [None, "full", "selective"],
        "recompute_num_layers": [1, 2, 3, 100],
        "recompute_modules": [
            ["core_attn"],
            [],
            ["moe"],
            ["mlp"],
            ["layernorm"],
            ["moe_act"],
            ["mlp", "mlp"],
            ["core_attn", "moe", "mlp"],
        ],
        "seed": [0, 2**32 - 1],
        "deterministic_mode": BOTH,
        "trainable": [
            [],
            ["vision"],
            ["projector"],
            ["language"],
            ["first_expert"],
            ["experts"],
            ["router"],
            ["router", "vision"],
        ],
    },
    "gpu": {
        "fp8_format": [None, None, "hybrid"],
        "fp8_recipe": ["delayed", "tensorwise"],
        "apply_rope_fusion": [None, False, True],
        "moe_permute_fusion": [None, False, True],
        "cross_entropy_loss_fusion": [None, False, True],
        "moe_router_padding_for_fp8": BOTH,
        "first_last_layers_bf16": BOTH,
    },
}
