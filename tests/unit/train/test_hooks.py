"""The order of hooks, and what a hook may add to a step's line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_evomoe.train.hooks import HookChain, StepHook
from tests.programs import ROOT


class Named(StepHook):
    """Appends its name and the moment to a list, and can raise at one moment."""

    def __init__(self, name: str, said: list[str], raises: str = "") -> None:
        self.name, self.said, self.raises = name, said, raises

    def _say(self, moment: str) -> None:
        self.said.append(f"{self.name} {moment}")
        if moment == self.raises:
            raise RuntimeError(moment)

    def begin_stage(self, run):
        self._say("begin_stage")

    def begin_step(self, run, step):
        self._say(f"begin_step {step}")

    def after_step(self, run, result):
        self._say("after_step")

    def end_stage(self, run):
        self._say("end_stage")


def test_hooks_nest():
    said: list[str] = []
    chain = HookChain([Named("outer", said), Named("inner", said)])
    with chain.stage(None):
        chain.begin_step(None, 7)
        chain.after_step(None, None)
    assert said == [
        "outer begin_stage",
        "inner begin_stage",
        "outer begin_step 7",
        "inner begin_step 7",
        "inner after_step",
        "outer after_step",
        "inner end_stage",
        "outer end_stage",
    ]


@pytest.mark.parametrize(("moment", "ended"), [("begin_stage", ["outer"]), ("end_stage", ["inner", "outer"])])
def test_every_hook_that_began_ends(moment, ended):
    said: list[str] = []
    chain = HookChain([Named("outer", said), Named("inner", said, raises=moment)])
    with pytest.raises(RuntimeError, match=moment), chain.stage(None):
        pass
    assert [s for s in said if s.endswith("end_stage")] == [f"{name} end_stage" for name in ended]


def test_a_metric_has_one_value_per_step():
    from megatron_evomoe.train.stage_run import StageRun

    names = ("session", "stage", "config", "built", "record", "samples", "stop", "hooks")
    run = StageRun(**dict.fromkeys(names))
    run.add_metrics({"a": 1.0, "b": 2.0})
    with pytest.raises(ValueError, match="metrics named b already; use other names"):
        run.add_metrics({"b": 3.0, "c": 4.0})


def test_a_hook_can_be_defined_before_the_device_is_prepared():
    """A script imports `StepHook` at its top, before `backend.prepare` sets up megatron-core."""
    imports = "import sys, megatron_evomoe.train.hooks, megatron_evomoe.commands.train"
    check = "assert not {'torch', 'megatron'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", f"{imports}; {check}"], check=True, cwd=ROOT)
