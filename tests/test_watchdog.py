"""Worlds of real processes that stand still in every way that we know, and some that do not.

All of them run at the same time, since they mostly sleep. Not the training loop's own use of the
watchdog (test_train.py).
"""

import ctypes
import json
import logging
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from m2encoder.errors import DataError
from m2encoder.watchdog import Watchdog
from m2encoder.watchdog_words import Seen, Sign, missing_sentence

TIMEOUT_S = 3.0
GIVE_UP_S = 90
FOREVER_S = 600


def stop_itself(rank, dog):
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_itself(rank, dog):
    os.kill(os.getpid(), signal.SIGKILL)


def read_forever(rank, dog):
    dog.enter("read", 12)
    time.sleep(FOREVER_S)


def raise_an_error(rank, dog):
    raise DataError("pair '坏' is bad\nand more")


def hold_the_interpreter(rank, dog):
    ctypes.PyDLL(None).sleep(FOREVER_S)  # unlike CDLL, keeps Python's lock


def evaluate_long(rank, dog):
    with dog.paused("evaluation", 12):
        time.sleep(2.5 * TIMEOUT_S)


def walk_slowly(rank, dog):
    for step in range(12, 17):
        dog.enter("read", step)
        time.sleep(0.6 * TIMEOUT_S)


def do_nothing(rank, dog):
    pass


def follow(out, rank, world_size, others, what_happens, who):
    """Train 11 steps, then let something happen to rank `who` that the others wait for."""
    logging.basicConfig(filename=out / f"log-{rank}.txt", format="%(message)s", encoding="utf-8")
    others.wait(GIVE_UP_S)  # as joining a world does
    with Watchdog(out, rank, world_size, TIMEOUT_S) as dog:
        for step in range(1, 13):
            dog.enter("read", step)
            dog.enter("exchange", step, keys=[f"图{step}-{i}" for i in range(5)])
        time.sleep(TIMEOUT_S / 2)  # two beats, so that the files say so
        others.wait(GIVE_UP_S)
        if rank == who or who is None:
            what_happens(rank, dog)
        else:
            dog.enter("exchange", 13)
        if who is None and what_happens is do_nothing:
            time.sleep(FOREVER_S)
        others.wait(FOREVER_S)


SCENES = {
    # name: (ranks, those that are started, what happens, to whom)
    "stopped": (3, 3, stop_itself, 1),
    "killed": (3, 3, kill_itself, 0),
    "reading": (3, 3, read_forever, 2),
    "ended": (3, 3, raise_an_error, 1),
    "stuck": (2, 2, hold_the_interpreter, 1),
    "nobody": (3, 3, do_nothing, None),
    "absent": (3, 2, do_nothing, None),
    "alone": (1, 1, read_forever, 0),
    "evaluating": (3, 3, evaluate_long, 1),
    "slow": (2, 2, walk_slowly, None),
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Run every scene; name to its folder, exit codes, sentence and seconds."""
    context = multiprocessing.get_context("spawn")
    started = {}
    for name, (world_size, count, what_happens, who) in SCENES.items():
        out = tmp_path_factory.mktemp(name)
        barrier = context.Barrier(count)
        processes = [
            context.Process(
                target=follow, args=(out, rank, world_size, barrier, what_happens, who), daemon=True
            )
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        started[name] = (out, processes, barrier)  # which must outlive them
    found = {}
    deadline = time.monotonic() + GIVE_UP_S
    for name, (out, processes, _) in started.items():
        survivors = [
            process
            for rank, process in enumerate(processes)
            if (name, rank) not in {("stopped", 1), ("stuck", 1)}  # end only when killed
        ]
        for process in survivors:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        said = out / "ranks/hang.txt"
        sentence = said.read_text("utf-8").strip() if said.is_file() else None
        found[name] = SimpleNamespace(out=out, codes=codes, sentence=sentence)
    return found


def stacks(world, rank):
    return (world.out / f"ranks/rank-{rank:05d}.txt").read_text("utf-8")


def test_a_stopped_rank_is_named_with_where_it_stopped(worlds):
    world = worlds["stopped"]
    told = re.fullmatch(
        r"rank 1 is missing: last seen in step 12 \((.*)\), \d+ s ago; "
        r"ranks 0, 2 wait in step 13 \(exchange\); stacks in .*ranks",
        world.sentence,
    )
    assert told
    assert told[1] == "exchange, last samples 图12-0, 图12-1, 图12-2, …"
    assert world.codes == [1, None, 1]


def test_a_killed_rank_is_named_even_if_it_was_the_first(worlds):
    world = worlds["killed"]
    assert world.sentence.startswith("rank 0 is missing: last seen in step 12 (exchange, ")
    assert "; ranks 1, 2 wait in step 13 (exchange); " in world.sentence
    assert world.codes == [-signal.SIGKILL, 1, 1]


def test_a_rank_that_reads_forever_is_named_though_it_is_alive(worlds):
    world = worlds["reading"]
    assert world.sentence.startswith("rank 2 is missing: last seen in step 12 (read, ")
    assert "; ranks 0, 1 wait in step 13 (exchange); " in world.sentence
    assert world.codes == [1, 1, 1]


def test_a_rank_that_ended_is_named_with_its_error(worlds):
    world = worlds["ended"]
    told = "rank 1 is missing: ended in step 12 with DataError: pair '坏' is bad; ranks 0, 2 wait"
    assert world.sentence.startswith(told)
    assert world.codes == [1, 1, 1]


def test_a_rank_whose_watchdog_cannot_run_is_named_and_leaves_its_stacks_all_the_same(worlds):
    world = worlds["stuck"]
    assert world.sentence.startswith("rank 1 is missing: last seen in step 12 (exchange, ")
    assert "in hold_the_interpreter" in (world.out / "ranks/rank-00001.stuck.txt").read_text()


def test_a_world_in_which_nobody_is_behind_says_so(worlds):
    world = worlds["nobody"]
    assert world.sentence.startswith("no progress for 3 s: all 3 ranks stand in step 12 (exchange,")
    assert ", none behind; stacks in " in world.sentence
    assert world.codes == [1, 1, 1]


def test_a_rank_that_never_came_is_named(worlds):
    world = worlds["absent"]
    assert world.sentence.startswith("rank 2 is missing: never started; ranks 0, 1 wait in step 12")


def test_a_process_alone_says_where_it_stands(worlds):
    world = worlds["alone"]
    assert world.sentence.startswith("no progress for 3 s in step 12 (read, last samples 图12-0, ")
    assert world.codes == [1]


@pytest.mark.parametrize("name", ["evaluating", "slow"])
def test_taking_time_is_no_hang(worlds, name):
    world = worlds[name]
    assert (world.sentence, set(world.codes)) == (None, {0})
    assert not (world.out / "events.jsonl").exists()
    left = sorted(path.name for path in (world.out / "ranks").iterdir())
    assert left == [f"rank-{rank:05d}.json" for rank in range(SCENES[name][0])]


@pytest.mark.parametrize(("name", "rank"), [("stopped", 0), ("stopped", 2), ("reading", 2)])
def test_every_rank_that_can_leaves_its_stacks_and_last_samples(worlds, name, rank):
    text = stacks(worlds[name], rank)
    assert f"rank {rank}, step 1" in text
    assert "last samples: 图12-0, 图12-1, 图12-2, 图12-3, 图12-4" in text
    main = text.partition("thread MainThread")[2]
    assert "in follow" in main
    assert ("in read_forever" in main) == (name == "reading")


SPEAKERS = {"stopped": 0, "killed": 1, "reading": 0, "ended": 0, "nobody": 0, "alone": 0}


@pytest.mark.parametrize("name", SPEAKERS)
def test_the_lowest_rank_alive_speaks_alone_and_the_run_remembers(worlds, name):
    world = worlds[name]
    logs = {path.stem: path.read_text("utf-8") for path in world.out.glob("log-*.txt")}
    said = [rank for rank, log in logs.items() if world.sentence in log]
    assert said == [f"log-{SPEAKERS[name]}"]
    events = [json.loads(line) for line in (world.out / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["text"]) for event in events] == [("hang", world.sentence)]


def test_the_ranks_files_say_where_each_was(worlds):
    sign = json.loads((worlds["reading"].out / "ranks/rank-00002.json").read_text("utf-8"))
    assert (sign["rank"], sign["step"], sign["phase"]) == (2, 12, "read")
    assert sign["keys"] == [f"图12-{i}" for i in range(5)]


# --- in this process ---


def test_what_an_earlier_start_left_is_cleared_and_nothing_else_is_left(tmp_path):
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    for name in ("alarm", "hang.txt", "rank-00000.txt"):
        (ranks / name).write_text("old")
    with Watchdog(tmp_path, 0, 1, timeout_s=30) as dog:
        dog.enter("read", 1, ["a"])
    assert [path.name for path in ranks.iterdir()] == ["rank-00000.json"]
    sign = json.loads((ranks / "rank-00000.json").read_text())
    assert (sign["phase"], sign["keys"], sign["ended"]) == ("read", ["a"], "")


def test_a_folder_that_cannot_be_written_does_not_end_training(tmp_path):
    with Watchdog(tmp_path, 0, 1, timeout_s=0.4) as dog:
        (tmp_path / "ranks/rank-00000.json.tmp").mkdir()
        for step in range(8):
            dog.enter("read", step)
            time.sleep(0.1)


def test_saying_where_the_loop_is_costs_microseconds(tmp_path):
    keys = [f"k{i}" for i in range(4096)]
    with Watchdog(tmp_path, 0, 1, timeout_s=600) as dog:
        started = time.perf_counter()
        for step in range(1000):
            dog.enter("read", step, keys)
        assert time.perf_counter() - started < 0.5  # 3 ms when measured


# --- the sentence, by hand ---


def sign_of(rank, step, phase="exchange", order=1, ended=None, keys=()):
    place = {"step": step, "order": order, "phase": phase, "phase_s": 60.0, "is_paused": False}
    return Sign(rank=rank, pid=1, beats=9, time=time.time(), keys=[*keys], ended=ended, **place)


def world_of(*signs, dead=()):
    return {sign.rank: Seen(sign, sign.rank not in dead, False) for sign in signs}


def test_long_lists_of_ranks_are_shortened():
    signs = [sign_of(rank, 12 if rank in (5, 9) else 13) for rank in range(16)]
    assert missing_sentence(world_of(*signs), 16, timeout_s=60) == (
        "ranks 5, 9 are missing: last seen in step 12 (exchange), 60 s ago; "
        "ranks 0-4, 6-8, 10-15 wait in step 13 (exchange)"
    )


def test_ranks_that_are_gone_are_named_by_where_each_stopped():
    signs = [sign_of(0, 12, "read"), sign_of(1, 13), sign_of(2, 13, ended=""), sign_of(4, 13)]
    assert missing_sentence(world_of(*signs, dead={0, 2}), 5, timeout_s=60) == (
        "rank 3 is missing: never started; rank 0 is missing: last seen in step 12 (read), "
        "60 s ago; rank 2 is missing: ended in step 13; ranks 1, 4 wait in step 13 (exchange)"
    )


def test_within_a_step_the_earlier_place_is_behind():
    signs = [sign_of(0, 13, "update", order=2), sign_of(1, 13, "exchange", order=1)]
    said = missing_sentence(world_of(*signs), 2, timeout_s=60)
    assert said.startswith("rank 1 is missing: last seen in step 13 (exchange)")


def test_a_world_of_the_dead_still_makes_a_sentence():
    said = missing_sentence(world_of(sign_of(0, 3), dead={0}), 1, timeout_s=60)
    assert said == "no progress for 60 s in step 3 (exchange)"


def test_the_watchdog_needs_no_torch():
    names = Path(__file__).parents[1] / "m2encoder"
    for name in ("watchdog.py", "watchdog_words.py"):
        assert "import torch" not in (names / name).read_text("utf-8")
