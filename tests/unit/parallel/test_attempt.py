"""The ranks of a restarted job find each other, whatever an earlier attempt left in the store."""

from __future__ import annotations

import datetime
import threading

import pytest
import torch.distributed as dist

from megatron_evomoe.parallel import attempt

MINUTE = datetime.timedelta(minutes=1)


def join(store: dist.Store, world: int) -> dict[int, dist.Store]:
    found: dict[int, dist.Store] = {}
    threads = [
        threading.Thread(target=lambda r=r: found.update({r: attempt.own_store(store, r, world, MINUTE)}))
        for r in range(world)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_second_attempt_sees_nothing_of_the_first():
    store = dist.HashStore()
    for number in range(3):
        stores = join(store, 4)
        assert not stores[3].check(["address"])
        stores[0].set("address", str(number))
        assert all(s.get("address") == str(number).encode() for s in stores.values())


def test_names_left_by_dead_ranks_do_not_count():
    """Entries of ranks that died do not count as members.

    Those ranks died before or after an answer; rank 0 waits for ranks that confirm its present token.
    """
    store = dist.HashStore()
    store.set("evomoe/hello/1", "died before an answer")
    store.set("evomoe/hello/2", "died after it")
    store.set("evomoe/welcome/died after it", "old token")
    store.set("evomoe/old token/heard/2", "")
    stores = join(store, 3)
    stores[0].set("x", "1")
    assert stores[1].get("x") == stores[2].get("x") == b"1"


def test_absent_rank_is_named():
    with pytest.raises(RuntimeError, match=r"1 of 2 ranks did not join within 0:00:00.1.*: ranks 1"):
        attempt.own_store(dist.HashStore(), 0, 2, datetime.timedelta(seconds=0.1))
