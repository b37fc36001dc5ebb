"""Sample order depends on (seed, epoch, position); bad samples keep their place and are counted."""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
import time

import numpy as np
import pytest
import torch

from megatron_evomoe.config import ConfigError
from megatron_evomoe.config.token_types import TokenType
from megatron_evomoe.data.conversation import IGNORE_INDEX
from megatron_evomoe.data.errors import DataError
from megatron_evomoe.data.image import ImageProcessor, decode_image
from megatron_evomoe.data.loader import SampleOrder, prepare_eval
from megatron_evomoe.data.shards import RawSample, ShardDataset, write_shards
from megatron_evomoe.data.tokenizer import build_tokenizer

from .helpers import TOKENS_PER_IMAGE, chat, jpeg, loader, samples, take


def keys_of(steps):
    return [key for step in steps for micro in step.microbatches for key in micro.keys]


def same(a, b):
    tensors = ("tokens", "labels", "token_types", "images")
    return a.keys == b.keys and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


# ---- batches


def test_microbatch_contents(dataset, sp, processor):
    (step,) = take(loader(dataset, sp, processor), 1)
    assert len(step.microbatches) == 4 and step.position == 8 and step.epoch == 0 and step.skipped == {}
    lengths = {micro.tokens.shape for micro in step.microbatches}
    assert len(lengths) == 1  # the whole step is padded to one length
    longest = 0
    for m, micro in enumerate(step.microbatches):
        images = []
        for row in range(2):
            i = SampleOrder(50, seed=5).index(2 * m + row)
            record, data = samples(50)[i]
            assert micro.keys[row] == f"{i:09d}"
            kinds = micro.token_types[row]
            n = int((kinds != TokenType.PADDING).sum())
            longest = max(longest, n)
            assert (kinds[:n] != TokenType.PADDING).all() and (micro.tokens[row, n:] == sp.pad_id).all()
            assert (micro.labels[row, n:] == IGNORE_INDEX).all()
            assert int((kinds == TokenType.VISION).sum()) == TOKENS_PER_IMAGE * len(data)
            answer = micro.labels[row][micro.labels[row] != IGNORE_INDEX]
            assert sp.decode(answer[:-1].tolist()).strip() == record["conversations"][1]["value"]
            images += [processor(decode_image(d)) for d in data]
        assert micro.images.dtype == torch.uint8 and micro.images.shape == (
            len(images),
            3,
            8,
            8,
        )
        assert all(torch.equal(a, b) for a, b in zip(micro.images, images, strict=True))
        assert micro.tokens.dtype == micro.labels.dtype == micro.token_types.dtype == torch.int32
    assert next(iter(lengths)) == (2, longest)


def test_padding(dataset, sp, processor):
    (plain,) = take(loader(dataset, sp, processor), 1)
    (rounded,) = take(loader(dataset, sp, processor, pad_to_multiple_of=64), 1)
    (full,) = take(loader(dataset, sp, processor, pad_to_seq_length=True), 1)
    s = plain.microbatches[0].tokens.shape[1]
    assert (
        rounded.microbatches[0].tokens.shape[1] == -(-s // 64) * 64
        and full.microbatches[0].tokens.shape[1] == 512
    )
    assert torch.equal(full.microbatches[0].tokens[:, :s], plain.microbatches[0].tokens)


def test_text_only_microbatch_has_no_images(tmp_path, sp, processor):
    write_shards([({"conversations": chat("1 + 1?", "2")}, [])] * 4, tmp_path)
    (step,) = take(loader(ShardDataset(tmp_path), sp, processor, global_batch_size=2), 1)
    assert step.microbatches[0].images.shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(global_batch_size=7),
        dict(data_parallel_size=3),
        dict(data_parallel_rank=1),
        dict(start_position=-1),
        dict(micro_batch_size=0),
        dict(pad_to_multiple_of=7),
        dict(conversation_template="alpaca"),
    ],
)
def test_impossible_arguments(dataset, sp, processor, wrong):
    with pytest.raises(ConfigError):
        loader(dataset, sp, processor, **wrong)


# ---- workers and resume


def test_workers_do_not_change_anything(dataset, sp, processor):
    reference = take(loader(dataset, sp, processor), 8)  # the eight steps pass the end of an epoch at 50
    assert [step.epoch for step in reference] == [0, 0, 0, 0, 0, 0, 0, 1]
    for workers in (1, 2, 3):
        for a, b in zip(reference, take(loader(dataset, sp, processor, workers=workers), 8), strict=True):
            assert (a.position, a.epoch) == (b.position, b.epoch)
            assert all(same(x, y) for x, y in zip(a.microbatches, b.microbatches, strict=True))


def global_stream(dataset, sp, processor, steps, *, dp, **kwargs):
    """Sample keys in global order, merged from all replicas."""
    replicas = [
        take(loader(dataset, sp, processor, data_parallel_rank=r, data_parallel_size=dp, **kwargs), steps)
        for r in range(dp)
    ]
    return [
        key
        for step in range(steps)
        for m in range(len(replicas[0][0].microbatches))
        for replica in replicas
        for key in replica[step].microbatches[m].keys
    ]


def test_resume_is_exact_at_any_size_and_worker_count(dataset, sp, processor):
    whole = global_stream(dataset, sp, processor, 10, dp=2)
    assert len(whole) == 80 and sorted(whole[:50]) == sorted(dataset.key(i) for i in range(50))
    for dp, workers, micro in ((1, 0, 2), (1, 3, 1), (2, 1, 2), (4, 0, 2), (4, 1, 1)):
        stopped = loader(dataset, sp, processor, data_parallel_rank=1, data_parallel_size=2, workers=workers)
        position = take(stopped, 4)[-1].position
        assert position == stopped.position == 32
        resumed = global_stream(
            dataset, sp, processor, 6, dp=dp, workers=workers, micro_batch_size=micro, start_position=position
        )
        assert whole[:32] + resumed == whole, (dp, workers, micro)


def test_iterating_again_goes_on_where_it_stopped(dataset, sp, processor):
    one = loader(dataset, sp, processor, workers=1)
    assert keys_of(take(one, 2) + take(one, 2)) == keys_of(take(loader(dataset, sp, processor), 4))


def test_parents_random_stream_is_left_alone(dataset, sp, processor):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    take(loader(dataset, sp, processor, workers=1), 1)
    assert torch.equal(torch.rand(3), expected)


def test_no_descriptors_or_processes_are_left_over(dataset, sp, processor):
    def count():
        gc.collect()  # data sets of other tests close their files only when collected
        return len(os.listdir("/proc/self/fd")), len(torch.multiprocessing.active_children())

    take(loader(dataset, sp, processor, workers=2), 2)
    before = count()
    for _ in range(3):
        kept = take(loader(dataset, sp, processor, workers=2), 6)  # batches outlive the loader
    deadline = time.monotonic() + 5
    while count() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert count() == before and any(micro.images.float().sum() > 0 for micro in kept[0].microbatches)


def _gloo_rank(rank, port, folder, sp_path, queue):
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    torch.set_num_threads(2)
    torch.randn(256, 256) @ torch.randn(256, 256)  # a thread pool exists before the workers are forked
    seen = []
    for step in take(
        loader(
            ShardDataset(folder),
            build_tokenizer(sp_path),
            ImageProcessor(8),
            workers=2,
            data_parallel_rank=rank,
            data_parallel_size=2,
        ),
        4,
    ):
        total = torch.tensor([len(keys_of([step]))])
        torch.distributed.all_reduce(total)
        seen.append((int(total), keys_of([step])))
    queue.put((rank, seen))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _two_gloo_ranks(port, folder, sp_path, queue):
    """Run two gloo ranks, independent of the test session's process groups.

    This process forks the ranks, so that torch is imported once.
    """
    torch.multiprocessing.start_processes(
        _gloo_rank, (port, folder, sp_path, queue), nprocs=2, start_method="fork"
    )


def test_workers_fork_while_gloo_runs(shard_dir, sp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    launcher = context.Process(target=_two_gloo_ranks, args=(port, shard_dir, sp_path, queue))
    launcher.start()
    results = dict(queue.get(timeout=120) for _ in range(2))
    launcher.join(60)
    assert launcher.exitcode == 0
    order = SampleOrder(50, seed=5)
    for step in range(4):
        assert results[0][step][0] == results[1][step][0] == 8
        for rank in range(2):
            first = 8 * step + 2 * rank
            positions = [first, first + 1, first + 4, first + 5]  # microbatches of two samples in turn
            assert results[rank][step][1] == [f"{order.index(p):09d}" for p in positions]


def test_workers_use_one_thread(dataset, sp, processor, monkeypatch):
    monkeypatch.setattr(type(dataset), "key", lambda self, i: f"{os.getpid()} {torch.get_num_threads()}")
    pids = {key.split()[0] for key in keys_of(take(loader(dataset, sp, processor, workers=2), 4))}
    threads = {key.split()[1] for key in keys_of(take(loader(dataset, sp, processor, workers=2), 4))}
    assert len(pids) == 2 and str(os.getpid()) not in pids and threads == {"1"}


# ---- bad samples

LONG = " ".join(["How many are there of 3?"] * 100)
BAD = {
    "image-count": ({"conversations": chat("no marker")}, [jpeg()]),
    "no-conversation": ({"caption": "a cat"}, []),
    "corrupt-image": ({"conversations": chat()}, [jpeg()[:300]]),
    "too-long": ({"conversations": chat(LONG, "2")}, []),
    "turn-order": ({"conversations": chat("a", "b") + chat("c", "d")[1:]}, []),
}


def mixed(folder, bad, good=20):
    """A data set of `good` good samples with `bad` in between, to be read unshuffled."""
    write_shards(
        [
            sample
            for pair in zip(samples(good), [*bad, *[None] * good], strict=False)
            for sample in pair
            if sample
        ],
        folder,
    )
    return ShardDataset(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_keep_their_slot_and_are_counted_and_logged_once(
    tmp_path, sp, processor, caplog, workers
):
    dataset = mixed(tmp_path, BAD.values())
    with caplog.at_level(logging.WARNING):
        train = loader(dataset, sp, processor, shuffle=False, workers=workers, global_batch_size=10)
        (step,) = take(train, 1)
    assert step.skipped == train.skipped == dict.fromkeys(BAD, 1) and train.read == 10
    assert keys_of([step]) == [f"{i:09d}" for i in range(10)]
    for i, micro in enumerate(step.microbatches):
        assert (micro.token_types[1] == TokenType.PADDING).all() and (micro.labels[1] == IGNORE_INDEX).all()
        assert (micro.tokens[1] == sp.pad_id).all() and (micro.token_types[0] != TokenType.PADDING).any()
        assert len(micro.images) == len(samples(20)[i][1])
        reason = list(BAD)[i]
        lines = [r.getMessage() for r in caplog.records if f"{2 * i + 1:09d}" in r.getMessage()]
        assert len(lines) == 1 and reason in lines[0] and "shard-000000.tar" in lines[0]


def test_bad_json_too_many_pixels_and_missing_answer(tmp_path, sp, processor):
    write_shards([({"conversations": chat()}, [jpeg(0, (100, 100))]), *samples(3)], tmp_path)
    path = tmp_path / "shard-000000.tar"
    broken = path.read_bytes().replace(b'"id":"sample-0"', b'"id":"sample-0,')
    path.write_bytes(broken)
    train = loader(
        ShardDataset(tmp_path), sp, processor, shuffle=False, global_batch_size=4, max_image_pixels=9999
    )
    (step,) = take(train, 1)
    assert step.skipped == {"image-too-large": 1, "bad-json": 1}
    # A microbatch in which every sample is bad still has its full set of tensors.
    assert step.microbatches[0].images.shape[0] == 0
    assert (step.microbatches[0].token_types == TokenType.PADDING).all()


def test_every_sample_of_a_step_may_be_bad(tmp_path, sp, processor):
    write_shards([BAD["no-conversation"]] * 8, tmp_path)
    (step,) = take(loader(ShardDataset(tmp_path), sp, processor, pad_to_multiple_of=4), 1)
    assert [tuple(micro.tokens.shape) for micro in step.microbatches] == [(2, 4)] * 4 and step.skipped == {
        "no-conversation": 8
    }


def test_long_samples_are_cut_when_asked(tmp_path, sp, processor):
    answer = " ".join(["There are 3."] * 200)
    write_shards(
        [
            ({"conversations": chat("<image>\nhi", answer)}, [jpeg()]),
            ({"conversations": chat(LONG, "2")}, []),
        ],
        tmp_path,
    )
    (step,) = take(
        loader(
            ShardDataset(tmp_path), sp, processor, shuffle=False, global_batch_size=2, long_samples="truncate"
        ),
        1,
    )
    micro = step.microbatches[0]
    assert micro.tokens.shape == (2, 512) and (micro.labels[0] != IGNORE_INDEX).sum() > 100
    assert len(micro.images) == 1
    assert step.skipped == {"too-long": 1}  # truncation would have removed the second's whole answer


def test_samples_without_supervision_are_counted(tmp_path, sp, processor, monkeypatch):
    from megatron_evomoe.data import batch

    def masked(*args, **kwargs):
        sample = encode(*args, **kwargs)
        sample.labels = [IGNORE_INDEX] * len(sample.labels)
        return sample

    encode = batch.encode
    monkeypatch.setattr(batch, "encode", masked)
    write_shards(samples(4), tmp_path)
    (step,) = take(loader(ShardDataset(tmp_path), sp, processor, global_batch_size=4), 1)
    assert step.skipped == {"no-supervision": 4}


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_stop_the_run(tmp_path, sp, processor, workers):
    dataset = mixed(tmp_path, [BAD["image-count"], BAD["corrupt-image"], BAD["image-count"]], good=150)
    steps = iter(loader(dataset, sp, processor, shuffle=False, workers=workers, max_bad_sample_rate=0.025))
    taken = []
    with pytest.raises(DataError) as error:
        for step in steps:
            taken.append(step)
    # 3 bad samples among 96 already exceed the rate; the check comes at 104 samples.
    assert len(taken) == 12
    message = str(error.value)
    assert all(
        part in message
        for part in ("3 of 104", "image-count: 2, corrupt-image: 1", "000000001 of ", "raise the rate")
    )
    assert len(take(loader(dataset, sp, processor, shuffle=False, max_bad_sample_rate=0.03), 15)) == 15


def test_long_samples_are_not_bad_ones(tmp_path, sp, processor, caplog):
    """Samples that are too long do not count as bad samples.

    A fifth of the samples is too long. They are counted, and logged at 1, 10 and 100; they stop a run only
    above a limit of their own, `max_long_sample_rate`.
    """
    long = ({"conversations": chat(LONG, "2")}, [])
    write_shards(
        [sample for pair in zip([long] * 30, *[iter(samples(120))] * 4, strict=True) for sample in pair],
        tmp_path,
    )
    dataset = ShardDataset(tmp_path)
    train = loader(dataset, sp, processor, shuffle=False)
    take(train, 75)
    assert train.skipped == {"too-long": 120} and train.read == 600
    lines = [r.getMessage() for r in caplog.records if "too-long" in r.getMessage()]
    assert len(lines) == 3 and "100 of about" in lines[2]
    with pytest.raises(
        DataError,
        match=r"of 104 samples read were longer than seq_length 512.*max_long_sample_rate 0.1; raise",
    ):
        take(loader(dataset, sp, processor, shuffle=False, max_long_sample_rate=0.1), 13)


# ---- evaluation


def test_prepare_eval(sp, processor):
    turns = [
        *chat("<image>\nWhich digit is this?", "7"),
        *chat("and <image>?", "It is 3."),
        *chat("Is it even?", "No"),
    ]
    raw = RawSample("k", "s.tar", {"id": 1, "kind": "digit", "conversations": turns}, [jpeg(0), jpeg(1)])
    items = prepare_eval(raw, sp, processor, "v1", TOKENS_PER_IMAGE)
    assert [item.answer for item in items] == ["7", "It is 3.", "No"]
    assert [len(item.images) for item in items] == [1, 2, 2]
    for i, (prompt, _, images, metadata) in enumerate(items):
        assert prompt.token_types.count(TokenType.VISION) == TOKENS_PER_IMAGE * len(images) and set(
            prompt.labels
        ) == {IGNORE_INDEX}
        assert metadata == {"id": 1, "kind": "digit", "key": "k", "shard": "s.tar", "turn": i}
        assert sp.decode(prompt.tokens).endswith("ASSISTANT:")
    assert torch.equal(items[1].images[1], processor(decode_image(jpeg(1))))
    assert "It is 3." in sp.decode(items[2].prompt.tokens) and "No" not in sp.decode(items[2].prompt.tokens)
    json.dumps(items[0].metadata)
    assert isinstance(np.asarray(items[0].images), np.ndarray)
