"""A user's hook in a real run: its events, its log entries, and the effect of an exception in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import programs
from tests.runs import metrics, run, steady

STAGES = [{"name": "evolve", "train_iters": 4}]
COPIES = {"evolution_rule": "ema", "evolution_beta": [[0.0, 0.0]] * 3}
SCRIPT = """
import argparse, json, os, sys
from pathlib import Path

from megatron_evomoe.commands import train
from megatron_evomoe.train.hooks import StepHook


def distance(layer):
    first, evolved = layer.linear_fc1.weight, layer._evolved["linear_fc1.weight"]
    return float((evolved - first).abs().max())


class Recorder(StepHook):
    def __init__(self, args):
        self.file = Path(args.folder, f"moments{os.environ.get('RANK', 0)}.jsonl").open("a")
        self.fails_at, self.clashes = args.fails_at, args.clashes

    def say(self, *what):
        self.file.write(json.dumps(what) + "\\n")
        self.file.flush()

    def begin_stage(self, run):
        self.say("begin_stage", run.step)

    def begin_step(self, run, step):
        self.say("begin_step", step)

    def after_data(self, run, batch):
        self.say("after_data", [len(batch.microbatches), len(batch.microbatches[0].tokens)])

    def after_step(self, run, result):
        self.say("after_step", run.step, result.loss)
        run.add_metrics({"my/loss": result.loss, "my/distance": distance(run.built.evolving[0])})
        if self.clashes:
            run.add_metrics({"lm loss": 0.0})
        if run.step == self.fails_at and os.environ.get("RANK", "1") == "1":
            raise RuntimeError("told to fail")

    def before_save(self, run):
        self.say("before_save", run.step)

    def after_save(self, run, path):
        self.say("after_save", path.name)

    def after_measure(self, run, scores):
        self.say("after_measure", sorted(scores))

    def end_stage(self, run):
        self.say("end_stage", run.step)


if __name__ == "__main__":  # helper processes of a run import the script again
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder")
    parser.add_argument("--fails-at", type=int)
    parser.add_argument("--clashes", action="store_true")
    train.add_arguments(parser)
    args = parser.parse_args()
    sys.exit(train.run(args, hooks=[Recorder(args)]))
"""


def train(folder: Path, config: Path, *flags: str, ranks: int = 0, expect: int = 0) -> str:
    """Train with a `Recorder` hook, which records its events in `folder`; returns what the run prints."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    argv = (str(script), "--folder", str(folder), "--config", str(config), *flags)
    done = programs.run(*argv, ranks=ranks, expect=expect)
    return done.stdout + done.stderr


def moments(folder: Path, rank: int = 0) -> list[list]:
    return [json.loads(line) for line in (folder / f"moments{rank}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny_yaml) -> Path:
    """The folder of a finished run.

    Its rule `ema` with β = 0 makes experts 2…N equal to expert 1 after each step.
    """
    folder = tmp_path_factory.mktemp("hooked")
    config = tiny_yaml(folder, stages=STAGES, moe=COPIES, train={"eval_samples": 2})
    train(folder, config)
    return folder


def test_a_hook_is_told_of_every_moment_in_order(unbroken):
    losses = [line["lm loss"] for line in metrics(unbroken / "run")]
    wanted = [["begin_stage", 0]]
    for step, loss in enumerate(losses, start=1):
        wanted += [["begin_step", step], ["after_data", [4, 2]], ["after_step", step, loss]]
        if step in (2, 4):  # saves of `save_interval` 2, of which the second is also the last step
            wanted += [["before_save", step], ["after_save", f"iter_{step:07d}"]]
    wanted += [["after_measure", ["accuracy", "blind"]], ["end_stage", 4]]
    assert len(losses) == 4 and moments(unbroken) == wanted


def test_a_hooks_numbers_are_in_the_steps_line(unbroken):
    lines = metrics(unbroken / "run")
    assert [line["my/loss"] for line in lines] == [line["lm loss"] for line in lines]


def test_a_hook_sees_the_experts_that_followed_the_update(unbroken):
    """A hook that ran before evolution would still see the experts of the previous step."""
    assert [line["my/distance"] for line in metrics(unbroken / "run")] == [0, 0, 0, 0]


def test_an_exception_in_a_hook_is_an_exception_of_the_step(unbroken, tiny_yaml, tmp_path):
    """A hook's exception ends all ranks with its message.

    The hooks of every rank are closed, the checkpoints stay valid, and the same command resumes from them.
    """
    config = tiny_yaml(tmp_path, stages=STAGES, moe=COPIES, train={"eval_samples": 2})
    said = train(tmp_path, config, "--fails-at", "3", ranks=2, expect=1)
    errors = {line for line in said.splitlines() if line.startswith("error: ")}
    assert len(errors) == 1 and "RuntimeError: told to fail. The checkpoints under" in errors.pop()
    assert [m[:2] for m in moments(tmp_path, rank=1)[-2:]] == [["after_step", 3], ["end_stage", 3]]
    (tmp_path / "moments0.jsonl").unlink()
    train(tmp_path, config)
    assert moments(tmp_path)[:2] == [["begin_stage", 2], ["begin_step", 3]]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_name_that_is_taken_is_refused(tiny_yaml, tmp_path):
    config = tiny_yaml(tmp_path, stages=STAGES, train={"eval_samples": 2})
    said = train(tmp_path, config, "--clashes", expect=1)
    assert "the step has metrics named lm loss already; use other names" in said


def test_the_example_runs(tiny_yaml, tmp_path):
    config = tiny_yaml(tmp_path, stages=STAGES, data={"eval_data": []})
    programs.run("examples/train_with_hook.py", "--config", str(config))
    lines = metrics(tmp_path / "run")
    assert (
        "loss-ratio" not in lines[0] and lines[1]["loss-ratio"] == lines[1]["lm loss"] / lines[0]["lm loss"]
    )


def test_metrics_are_those_of_a_run_without_hooks(unbroken, tiny_yaml, tmp_path):
    config = tiny_yaml(tmp_path, stages=STAGES, moe=COPIES, train={"eval_samples": 2})
    run("train", "--config", str(config))
    hooked = [
        {k: v for k, v in line.items() if not k.startswith("my/")} for line in metrics(unbroken / "run")
    ]
    assert steady(hooked) == steady(metrics(tmp_path / "run"))
