"""One rank of `test_import.py`: loads imported checkpoints under a layout and runs the models.

Rank 0 writes the logits and the answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_evomoe.parallel import backend


def main(asked: str, answered: str) -> None:
    """Run every job in the file `asked` under its layout and write the results, by name, to `answered`."""
    backend.prepare()
    torch.set_num_threads(1)
    backend.init_process_group(timeout_minutes=2)
    request = json.loads(Path(asked).read_text())
    questions = torch.load(request["questions"], weights_only=True)
    results = {
        name: run(Path(folder), request["parallel"], questions) for name, folder in request["jobs"].items()
    }
    if torch.distributed.get_rank() == 0:
        torch.save(results, answered)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run(
    folder: Path, parallel: dict[str, int], questions: dict[str, Any], kind: str = "warmup"
) -> dict[str, Any]:
    """Logits [b, s, V] and greedy continuations of the questions that the model can take. Communicates."""
    from megatron_evomoe.checkpoint import find
    from megatron_evomoe.config import from_mapping
    from megatron_evomoe.parallel import topology
    from megatron_evomoe.train.built import build_stage
    from megatron_evomoe.train.decoding import greedy, inference
    from megatron_evomoe.train.transition import start_from

    config = from_mapping(
        {
            **yaml.safe_load((folder / "model.yaml").read_text()),
            "parallel": parallel,
            "data": {"seq_length": 64},
            "stages": [{"name": kind}],
        }
    )
    if not torch.distributed.is_initialized() or not _laid_out():
        topology.initialize(config)
    topology.seed_everything(1)
    built = build_stage(config.for_stage(kind), config.stages[0])
    start_from(find.resolve(folder), built, config, config.stages[0], fingerprint="any")
    given = (
        questions["text"]
        if "vision" not in yaml.safe_load((folder / "model.yaml").read_text())
        else questions[str(config.vision.tokens_per_image)]
    )
    with inference(built.modules):
        logits = all_logits(built.modules, given, config)
        answers = greedy(
            built.modules, prompts(given), given["pixels"], stop=set(), max_new_tokens=6, pad_id=0
        )
    return {"logits": logits, "answers": answers}


def _laid_out() -> bool:
    from megatron.core import parallel_state

    return parallel_state.model_parallel_is_initialized()


def prompts(given: dict[str, Any]) -> list[Any]:
    from megatron_evomoe.data.conversation import EncodedSample

    return [
        EncodedSample(tokens, [-100] * len(tokens), types)
        for tokens, types in zip(given["tokens"].tolist(), given["types"].tolist(), strict=True)
    ]


def all_logits(chunks: list[Any], given: dict[str, Any], config: Any) -> torch.Tensor:
    """The logits of all positions, on every rank, without the vocabulary's padding. Communicates."""
    from megatron.core import parallel_state as ps
    from megatron.core import tensor_parallel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    b, s = given["tokens"].shape

    def forward_step(batches: Any, model: Any) -> Any:
        next(batches)

        def gathered(output: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            return tensor_parallel.gather_from_tensor_model_parallel_region(output)[
                ..., : config.language.vocab_size
            ]

        return model(given["tokens"], given["types"], given["pixels"]), gathered

    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter((0,)),
        model=chunks,
        num_microbatches=1,
        seq_length=s,
        micro_batch_size=b,
        decoder_seq_length=s,
        forward_only=True,
        collect_non_loss_data=True,
    )
    logits = found[0].contiguous() if found else torch.zeros(b, s, config.language.vocab_size)
    if ps.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            logits, ps.get_pipeline_model_parallel_last_rank(), ps.get_pipeline_model_parallel_group()
        )
    return logits


if __name__ == "__main__":
    main(*sys.argv[1:])
