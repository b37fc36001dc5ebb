"""Train with a hook: your own code, called at fixed moments of a stage.

    python examples/train_with_hook.py --config run.yaml                        # takes the flags of `train`
    torchrun --nproc-per-node 8 examples/train_with_hook.py --config run.yaml

`StepHook` (megatron_evomoe/train/hooks.py) lists the moments. Every rank calls the hook.
"""

from __future__ import annotations

import argparse
import sys

from megatron_evomoe.commands import train
from megatron_evomoe.errors import UserError
from megatron_evomoe.train.hooks import StepHook


class LossSpikes(StepHook):
    """Log each step's loss relative to its running mean, and print a line when the ratio is large."""

    def __init__(self, limit: float = 1.5, memory: float = 0.9) -> None:
        self.limit, self.memory = limit, memory
        self.mean = None

    def begin_stage(self, run):
        """Forget the running mean, because another stage has another loss."""
        self.mean = None

    def after_step(self, run, result):
        """Update the running mean with `result.loss`, which is the same number on every rank."""
        if self.mean is not None:
            ratio = result.loss / self.mean
            run.add_metrics({"loss-ratio": ratio})  # in metrics.jsonl, TensorBoard and wandb
            if ratio > self.limit:
                run.session.logger.say(f"step {run.step}: the loss is {ratio:.1f} times its running mean")
        before = result.loss if self.mean is None else self.mean
        self.mean = self.memory * before + (1 - self.memory) * result.loss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    train.add_arguments(parser)
    try:
        return train.run(parser.parse_args(), hooks=[LossSpikes()])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":  # needed because the helper processes of a run import this file again
    sys.exit(main())
