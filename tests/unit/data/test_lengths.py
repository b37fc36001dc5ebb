"""The lengths of samples are those of the rows that training makes, at any seq_length and after trouble."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_evomoe.config import DataConfig
from megatron_evomoe.data.batch import Preparer
from megatron_evomoe.data.errors import SampleError
from megatron_evomoe.data.lengths import open_lengths
from megatron_evomoe.data.sample_length import REASONS
from megatron_evomoe.data.shards import ShardDataset

from .helpers import TEMPLATES, TOKENS_PER_IMAGE, write_tar

SETTINGS = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
WORDS = ["Is it even?", " There are 7.", "é", "<image>", "\n", "漢字", "</s>", " " * 200, "<|im_end|>", ""]
TEXT = st.lists(st.sampled_from(WORDS), max_size=5).map("".join)


@st.composite
def conversations(draw):
    """Turns of which some are not allowed, and how many images stand in the text or do not."""
    turns = []
    if draw(st.booleans()):
        turns.append({"from": "system", "value": draw(TEXT)})
    for _ in range(draw(st.integers(0, 3))):
        turns += [{"from": "human", "value": draw(TEXT)}, {"from": "gpt", "value": draw(TEXT)}]
    if draw(st.integers(0, 3)) == 0:
        turns.append({"from": draw(st.sampled_from(["gpt", "human", "tool"])), "value": draw(TEXT)})
    shown = sum(turn["value"].count("<image>") for turn in turns if turn["from"] == "human")
    return turns, max(0, shown + draw(st.sampled_from([0, 0, 0, 0, 1, -1])))


def prepared(dataset, tokenizer, template, seq_length, long_samples):
    """Length of each row of training, 0 where it has none; reasons and messages of those."""
    preparer = Preparer(dataset, tokenizer, None, template, TOKENS_PER_IMAGE, seq_length, long_samples, 10**6)
    found, problems = [], {}
    for i in range(len(dataset)):
        try:
            found.append(len(preparer._encode(i)[0].tokens))
        except SampleError as error:
            found.append(0)
            problems[i] = error.reason, error.message
    return found, problems


def opened(dataset, tokenizer, template="v1", folder=None, **more):
    config = DataConfig(conversation_template=template)
    return open_lengths(dataset, tokenizer, config, TOKENS_PER_IMAGE, folder=folder, **{"workers": 1, **more})


@pytest.mark.parametrize("template", TEMPLATES)
def test_lengths_are_those_of_rows(tokenizer, template, tmp_path):
    path = tmp_path / "a.tar"

    @settings(max_examples=12, **SETTINGS)
    @given(st.lists(conversations(), min_size=1, max_size=6), st.integers(1, 90))
    def run(drawn, seq_length):
        members = []
        for i, (turns, images) in enumerate(drawn):
            members += [(f"{i}.{j}.jpg", b"not decoded") for j in range(images)]
            members.append((f"{i}.json", json.dumps({"conversations": turns}).encode()))
        dataset = ShardDataset(write_tar(path, members))
        measured = opened(dataset, tokenizer, template)
        everything = range(len(dataset))
        whole, problems = prepared(dataset, tokenizer, template, 10**9, "skip")
        found = measured[everything].tolist()
        assert [max(length, 0) for length in found] == whole
        assert {i: REASONS[-length - 1] for i, length in enumerate(found) if length < 0} == {
            i: reason for i, (reason, _) in problems.items()
        }
        examples = {i: (reason, m) for reason, p in measured.problems.items() for i, m in p.examples}
        assert examples.items() <= problems.items()
        assert sum(p.count for p in measured.problems.values()) == len(problems)
        lengths_of_interest = {seq_length, *(max(1, n + d) for n in whole if n for d in (-1, 0, 1))}
        for length in sorted(lengths_of_interest):
            for rule in ("skip", "truncate"):
                expected, _ = prepared(dataset, tokenizer, template, length, rule)
                assert measured.usable(everything, length, rule).tolist() == expected
        measured.path.unlink()

    run()
