"""Overlapped work: order, the first error, how far it runs ahead, and torch's threads after it."""

import threading
import time

import pytest
import torch

from m2encoder.overlap import Threads, overlapped

SEVERAL = Threads(prepare=3, compute=2, one_each=True)
CPU = torch.device("cpu")


def doubled_slowly(item):
    time.sleep(0.002 * (item % 3))  # later items are often ready first
    return 2 * item


@pytest.mark.parametrize(
    "threads", [Threads(1, 1, True), SEVERAL, Threads(8, 4, True), Threads(4, 1, False)]
)
def test_results_come_in_order_and_are_those_of_a_plain_loop(threads):
    batches = [range(5), range(5, 6), range(6, 6), range(6, 40), range(40, 43)]
    found = list(overlapped(batches, doubled_slowly, list, threads))
    assert found == [[2 * item for item in batch] for batch in batches]


def test_nothing_to_do_gives_nothing():
    assert list(overlapped([], doubled_slowly, list, SEVERAL)) == []


def refused(item):
    if item in (7, 3):
        time.sleep(0.05 if item == 3 else 0)  # 7 fails long before 3
        raise ValueError(f"item {item}")
    return item


def collect(results, found):
    for batch in results:
        found += batch


def test_the_first_error_in_order_is_raised_and_stops_the_rest():
    batches = ([i] for i in range(1000))
    found = []
    with pytest.raises(ValueError, match=r"^item 3$"):
        collect(overlapped(batches, refused, list, SEVERAL), found)
    assert found == [0, 1, 2]
    assert next(batches)[0] < 50


def test_an_error_while_computing_is_raised_too():
    with pytest.raises(ZeroDivisionError):
        list(overlapped([[0], [1]], doubled_slowly, lambda items: [1 // i for i in items], SEVERAL))


def test_it_runs_ahead_but_not_far():
    """Else a slow reader of the results would find all pixels in memory."""
    taken = []
    batches = (taken.append(i) or [i] * 4 for i in range(100))
    results = overlapped(batches, doubled_slowly, len, SEVERAL)
    next(results)
    time.sleep(0.1)
    assert 3 <= len(taken) <= 6
    results.close()
    assert len(taken) <= 6


def test_preparing_goes_on_while_a_batch_is_computed():
    later = threading.Event()

    def prepare(item):
        if item == 1:
            later.set()
        return item

    def compute(items):
        assert later.wait(timeout=30)  # prepared while this batch is computed
        return items

    threads = Threads(prepare=1, compute=1, one_each=True)
    assert list(overlapped([[0], [1]], prepare, compute, threads)) == [[0], [1]]


def test_batches_are_computed_at_the_same_time_with_one_thread_each():
    together = threading.Barrier(2, timeout=30)
    own = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = list(
            overlapped(
                [[0], [1]],
                doubled_slowly,
                lambda items: (together.wait(), torch.get_num_threads())[1],
                Threads.on(CPU),
            )
        )
        assert found == [1, 1]
        assert torch.get_num_threads() == 2
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [2]  # threads that start afterwards are not left with one
    finally:
        torch.set_num_threads(own)


def test_processes_with_gpus_share_the_cores(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = Threads.on(torch.device("cuda"))
    assert (alone.compute, alone.one_each) == (2, False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * alone.prepare))
    assert Threads.on(torch.device("cuda")).prepare == 1
    assert Threads.on(torch.device("cuda"), workers=5).prepare == 5


def test_no_workers_are_refused():
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        Threads.on(CPU, workers=0)
