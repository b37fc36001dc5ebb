"""One rank of `test_plan`: builds stages under one layout, takes an optimizer step, reports what it holds.

Arguments: a JSON file with {"parallel": …, "cases": [[kind, section overrides], …]}, and the folder for each
rank's answer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_evomoe.parallel import backend

MODEL: dict[str, Any] = {
    "language": {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 500,
        "add_qkv_bias": True,
    },
    "vision": {
        "image_size": 16,
        "patch_size": 8,
        "hidden_size": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
        "ffn_hidden_size": 32,
    },
    "moe": {"dtr_hidden_size": 4, "dtr_rank": 4},
    "data": {"seq_length": 64},
    "train": {"micro_batch_size": 1, "global_batch_size": 4},
}


def case_config(parallel: dict[str, Any], kind: str, sections: dict[str, Any]) -> Any:
    """The configuration of one case; the test computes its plan from the same configuration."""
    from megatron_evomoe.config import from_mapping

    raw = {**MODEL, "parallel": parallel, "stages": [{"name": kind}]}
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return from_mapping(raw)


def main(request: str, folder: str) -> None:
    """Measure all cases of one layout and write the results together with this rank's place in the layout."""
    backend.prepare()
    torch.set_num_threads(1)
    backend.init_process_group(timeout_minutes=2)
    from megatron.core import parallel_state as ps

    from megatron_evomoe.parallel import topology

    asked = json.loads(Path(request).read_text())
    topology.initialize(case_config(asked["parallel"], "warmup", {}))
    place = {
        "pp_rank": ps.get_pipeline_model_parallel_rank(),
        "dp_rank": ps.get_data_parallel_rank(with_context_parallel=True),
        "expert_dp_rank": ps.get_expert_data_parallel_rank(),
    }
    ep_rank = ps.get_expert_model_parallel_rank()
    measured = [measure(asked["parallel"], kind, sections) for kind, sections in asked["cases"]]
    Path(folder, f"{torch.distributed.get_rank()}.json").write_text(
        json.dumps({"place": place, "ep_rank": ep_rank, "measured": measured})
    )
    torch.distributed.destroy_process_group()


def measure(parallel: dict[str, Any], kind: str, sections: dict[str, Any]) -> dict[str, Any]:
    """Measure the parameters of each model chunk, and the bytes of all state after an optimizer step."""
    from megatron_evomoe.parallel import topology
    from megatron_evomoe.train.built import build_stage

    config = case_config(parallel, kind, sections)
    topology.seed_everything(1)
    built = build_stage(config, config.stages[0])
    for mlp in built.evolving:
        mlp.begin()
    for parameter in (p for chunk in built.modules for p in chunk.parameters() if p.requires_grad):
        parameter.main_grad.fill_(1e-3)
    built.optimizer.step()
    buffers = [b for w in built.wrapped for b in w.buffers + w.expert_parallel_buffers]
    evolved = [t for mlp in built.evolving for t in (*mlp._evolved.values(), *mlp._previous.values())]
    return {
        "parameters": size(p for chunk in built.modules for p in chunk.parameters()),
        "gradients": size(b.grad_data for b in buffers),
        "optimizer": size(optimizer_tensors(built.optimizer)),
        "evolution": size(evolved),
        "tensors": [[described(n, p) for n, p in chunk.named_parameters()] for chunk in built.modules],
    }


def described(name: str, parameter: torch.Tensor) -> list[Any]:
    """Name, shape, the dimension that is split over ranks, and megatron-core's ``sequence_parallel`` mark."""
    split = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
    return [name, list(parameter.shape), split, bool(getattr(parameter, "sequence_parallel", False))]


def size(tensors: Any) -> int:
    """The size of the tensors in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def optimizer_tensors(optimizer: Any) -> list[torch.Tensor]:
    """Adam's moments and the fp32 master copies of bf16 parameters.

    Step counters are scalars and are left out.
    """
    found: list[torch.Tensor] = []
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if one.optimizer is None:  # this rank trains no parameters of the group
            continue
        found += [t for state in one.optimizer.state.values() for name, t in state.items() if name != "step"]
        for groups in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups"):
            found += [t for group in getattr(one, groups, []) for t in group if t is not None]
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
