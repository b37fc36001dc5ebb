"""Every field declares what a resume does when its value has changed."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import pytest

from megatron_evomoe.config.resume import Fixed, Free, Logged, OnResume, on_resume
from megatron_evomoe.config.run import SECTIONS

FIELDS = [(section, f.name) for section in SECTIONS.values() for f in dataclasses.fields(section)]


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_every_field_declares_one_class(section, field):
    assert isinstance(on_resume(section, field), OnResume)


def test_classes_are_those_of_the_fields():
    language, train, log = SECTIONS["language"], SECTIONS["train"], SECTIONS["log"]
    assert on_resume(language, "rotary_base") is OnResume.MUST_EQUAL
    assert {on_resume(train, name) for name in ("seed", "global_batch_size", "trainable")} == {
        OnResume.MUST_EQUAL
    }
    assert {on_resume(SECTIONS["optimizer"], name) for name in ("lr", "adam_beta1")} == {OnResume.LOGGED}
    assert on_resume(train, "micro_batch_size") is OnResume.LOGGED
    assert on_resume(log, "log_interval") is OnResume.FREE


@dataclasses.dataclass
class Careless:
    plain: int = 0
    constrained: Annotated[int, "no class"] = 0
    twice: Fixed[Free[int]] = 0
    nested: list[Logged[int]] = dataclasses.field(default_factory=list)
    good: Logged[Annotated[int, "a rule"]] = 0


@pytest.mark.parametrize("field", ["plain", "constrained", "twice", "nested"])
def test_a_field_without_exactly_one_is_an_error(field):
    with pytest.raises(TypeError, match=f"Careless.{field} must declare one of"):
        on_resume(Careless, field)


def test_a_class_goes_together_with_other_metadata():
    assert on_resume(Careless, "good") is OnResume.LOGGED
