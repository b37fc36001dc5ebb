"""Memory that workers write to: it is never overwritten while a tensor uses it, and used again afterwards."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_evomoe.data import loader as loader_module
from megatron_evomoe.data.ahead import one_ahead
from megatron_evomoe.data.slots import Form, Slots

from .helpers import loader, take

DTYPES = st.sampled_from([torch.uint8, torch.int32, torch.float32, torch.bfloat16])
FORMS = st.lists(
    st.builds(Form, st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple), DTYPES), max_size=4
)


@settings(deadline=None)
@given(st.lists(st.tuples(FORMS, st.booleans()), max_size=12))
def test_blocks_in_use_are_not_given_out(messages):
    slots, kept = Slots(3, 1000), {}
    for number, (forms, keep) in enumerate(messages):
        slot = slots.take()
        if slot is None:
            assert len(kept) == 3  # nothing else holds a block
            kept.pop(next(iter(kept)))
            continue
        written = slots.tensors(slot, forms)
        if written is None:
            slots.release(slot)
            continue
        for i in range(len(written)):
            written[i].fill_(number)
        del written
        received = slots.receive(slot, forms)
        assert [(tuple(t.shape), t.dtype) for t in received] == [tuple(form) for form in forms]
        if keep and any(tensor.numel() for tensor in received):  # an empty tensor needs no memory
            kept[number] = received
        del received
        # through the values of a list, because a loop's variable would keep a tensor alive
        assert [n for n, tensors in kept.items() if not all((t == n).all() for t in tensors)] == []


def test_steps_that_are_kept_stay_as_they_are(dataset, sp, processor):
    steps = iter(loader(dataset, sp, processor, workers=2))
    kept = [next(steps) for _ in range(10)]  # more than there are blocks
    copies = [[m.images.clone() for m in step.microbatches] for step in kept]
    for _ in range(10):
        next(steps)
    for step, images in zip(kept, copies, strict=True):
        assert all(torch.equal(m.images, copy) for m, copy in zip(step.microbatches, images, strict=True))
    steps.close()


def test_memory_is_used_again(dataset, sp, processor):
    steps = iter(loader(dataset, sp, processor, workers=1, packing="none", pad_to_seq_length=True))
    places = set()
    for _ in range(30):
        step = next(steps)
        places |= {micro.tokens.data_ptr() for micro in step.microbatches}
        del step
        gc.collect()
    steps.close()
    assert len(places) <= 2 + 2 * 4  # of 120 microbatches: those in preparation, and two steps


def test_microbatches_that_do_not_fit_come_all_the_same(dataset, sp, processor, monkeypatch):
    expected = take(loader(dataset, sp, processor), 4)
    monkeypatch.setattr(loader_module, "Slots", lambda count, _: Slots(count, 64))
    found = take(loader(dataset, sp, processor, workers=2), 4)
    for one, other in zip(expected, found, strict=True):
        for a, b in zip(one.microbatches, other.microbatches, strict=True):
            assert a.keys == b.keys and torch.equal(a.tokens, b.tokens) and torch.equal(a.images, b.images)


# ---- one item ahead


def test_items_come_in_order_and_an_error_after_them():
    def items():
        try:
            yield from range(3)
            raise ValueError("no fourth")
        finally:
            ended.append(True)

    ended, found = [], []
    with pytest.raises(ValueError, match="no fourth"):
        for item in one_ahead(items()):
            found.append(item)
    assert found == [0, 1, 2] and ended == [True]


def test_closing_closes_the_items():
    def items():
        try:
            while True:
                yield 1
        finally:
            ended.append(True)

    ended = []
    ahead = one_ahead(items())
    assert next(ahead) == 1
    ahead.close()
    assert ended == [True]
