"""Where time went, by a clock that the test turns, and once by a real stream with workers.

Not what the loop does with it: test_train.py.
"""

import time
from contextlib import suppress

import pytest
from tiny_batches import make_batch

from m2encoder.log_line import duration, log_line, waiting_sentence
from m2encoder.step_clock import StepClock, longest_waiting


class Hands:
    """A clock that stands still until it is turned."""

    def __init__(self):
        self.time_s = 100.0

    def __call__(self):
        return self.time_s

    def turn(self, seconds):
        self.time_s += seconds


@pytest.fixture
def hands():
    return Hands()


def batch_of(**work_s):
    batch = make_batch({"zh": ["猫", "狗"]})
    batch.work_s = work_s
    return batch


def stream_of(hands, *waits):
    """Give a batch per (seconds that it is waited for, its work)."""
    for wait_s, work_s in waits:
        hands.turn(wait_s)
        yield batch_of(**work_s)


def run(hands, *waits, step_s=1.0):
    clock = StepClock(hands)
    for _ in clock.batches(stream_of(hands, *waits)):
        hands.turn(step_s)
    return clock


def test_a_wait_is_shared_out_by_the_work_that_went_into_the_batch(hands):
    clock = run(hands, (1.0, {"read": 3.0, "decode": 1.0}), (1.0, {"tokenise": 2.0}), step_s=3.0)
    row = clock.row(samples=64, world_size=4)
    assert row == pytest.approx(
        {
            "samples_per_s": 8.0,
            "samples_per_s_per_device": 2.0,
            "waiting": 0.25,
            "waiting/read": 0.09375,
            "waiting/decode": 0.03125,
            "waiting/tokenise": 0.125,
            "waiting/transfer": 0.0,
            "waiting/other": 0.0,
        }
    )


def test_waiting_longer_than_the_work_took_is_for_something_else(hands):
    row = run(hands, (4.0, {"read": 1.0}), step_s=4.0).row(1, 1)
    assert (row["waiting/read"], row["waiting/other"]) == (0.125, 0.375)


@pytest.mark.parametrize("work_s", [{}, {"read": 0.0}])
def test_a_wait_that_no_work_explains_is_for_something_else(hands, work_s):
    row = run(hands, (1.0, work_s), step_s=1.0).row(1, 1)
    assert (row["waiting"], row["waiting/other"]) == (0.5, 0.5)


def test_the_parts_of_the_waiting_add_up(hands):
    waits = [(0.1 * n, {"read": 0.05 * n, "decode": 0.3, "tokenise": 0.01}) for n in range(9)]
    clock = run(hands, *waits)
    with clock.transfer():
        hands.turn(0.7)
    row = clock.row(9, 1)
    parts = [value for name, value in row.items() if name.startswith("waiting/")]
    assert row["waiting"] == pytest.approx(sum(parts))
    assert row["waiting/transfer"] == pytest.approx(0.7 / (3.6 + 9 + 0.7))


def test_a_row_begins_anew(hands):
    clock = run(hands, (5.0, {"read": 5.0}))
    clock.row(1, 1)
    hands.turn(2.0)
    assert clock.row(10, 1) == {
        "samples_per_s": 5.0,
        "samples_per_s_per_device": 5.0,
        "waiting": 0.0,
        **{f"waiting/{name}": 0.0 for name in ("read", "decode", "tokenise", "transfer", "other")},
    }


def test_what_came_before_the_first_batch_is_left_out(hands):
    clock = StepClock(hands)
    batches = clock.batches(stream_of(hands, (1.0, {"read": 1.0})))
    hands.turn(60.0)
    next(batches)
    assert clock.row(8, 1)["samples_per_s"] == 8.0


def test_pauses_are_left_out(hands):
    clock = StepClock(hands)
    hands.turn(2.0)
    with clock.paused():
        hands.turn(60.0)
    assert clock.seconds == 2.0
    assert clock.row(10, 1)["samples_per_s"] == 5.0
    assert clock.seconds == 0.0


def test_a_pause_ends_when_it_fails(hands):
    clock = StepClock(hands)
    with suppress(OSError), clock.paused():
        hands.turn(5.0)
        raise OSError("full")
    assert clock.seconds == 0.0


def test_an_error_of_the_stream_comes_through(hands):
    def broken():
        yield batch_of()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(StepClock(hands).batches(broken()))


def test_a_real_wait_is_measured():
    def slow():
        time.sleep(0.2)
        yield batch_of(read=0.2)

    clock = StepClock()
    assert len(list(clock.batches(slow()))) == 1
    row = clock.row(2, 1)
    assert row["waiting/read"] > 0.9
    assert 0 < row["samples_per_s"] < 10


# --- several ranks ---


def row_of_rank(rank, world_size):
    from m2encoder.distributed import World

    waiting = 0.5 if rank == 1 else 0.125
    row = {"samples_per_s": 7.0, "waiting": waiting, "waiting/read": waiting}
    return longest_waiting(row, World(rank, world_size))


def test_the_rank_that_waited_longest_is_named(gloo):
    expected = {"samples_per_s": 7.0, "waiting": 0.5, "waiting/read": 0.5, "waiting_rank": 1}
    assert gloo(2).run(row_of_rank) == [expected, expected]
    assert waiting_sentence(expected) == "rank 1 waiting 50 % of the time, for read"


def test_a_rank_alone_is_not_named():
    from m2encoder.distributed import World

    assert longest_waiting({"waiting": 0.5}, World()) == {"waiting": 0.5}


# --- words ---


@pytest.mark.parametrize(
    ("shares", "sentence"),
    [
        ({"read": 0.41}, "waiting 41 % of the time, for read"),
        ({"read": 0.2, "decode": 0.3}, "waiting 50 % of the time, for decode and read"),
        ({"read": 0.4, "decode": 0.05}, "waiting 45 % of the time, for read"),
        ({"other": 0.9}, "waiting 90 % of the time, for other work of the readers"),
        ({"transfer": 0.06}, "waiting 6 % of the time, for transfer"),
        ({"read": 0.04}, ""),
        ({}, ""),
    ],
)
def test_waiting_is_said_in_one_sentence(shares, sentence):
    row = {f"waiting/{cause}": share for cause, share in shares.items()}
    assert waiting_sentence(row | {"waiting": sum(shares.values())}) == sentence


def test_a_log_line_says_everything_that_the_row_has():
    row = {
        "loss": 3.21449, "loss/image-zh": 3.3, "loss/image-en": 3.1, "accuracy/image-zh": 0.2,
        "samples_per_s": 5120.4, "samples_per_s_per_device": 640.05, "mfu": 0.4123,
        "grad_norm": 0.83456, "lr": 9.3e-4, "waiting": 0.41, "waiting/read": 0.41,
    }  # fmt: skip
    assert log_line(row, step=1200, total_steps=20_000, left_s=7325) == (
        "step 1,200 of 20,000, loss 3.214 (image-zh 3.300, image-en 3.100), "
        "5,120 samples/s (640 per device), MFU 41.2 %, gradient norm 0.835, lr 9.30e-04, "
        "waiting 41 % of the time, for read, 2 h 02 min left"
    )


def test_a_log_line_leaves_out_what_the_row_lacks():
    row = {"loss": 1.0, "samples_per_s": 2.5, "samples_per_s_per_device": 2.5, "lr": 0.0}
    assert log_line(row, step=1, total_steps=2) == (
        "step 1 of 2, loss 1.000, 2.5 samples/s, lr 0.00e+00"
    )


def test_a_loss_that_is_not_finite_can_be_said():
    assert "loss nan" in log_line({"loss": float("nan")}, step=1, total_steps=2)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-3, "0 s"), (0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (725, "12 min 05 s"),
        (3599.6, "1 h 00 min"), (7325, "2 h 02 min"), (86_399, "1 d 00 h"), (190_000, "2 d 05 h"),
    ],
)  # fmt: skip
def test_durations_are_said_in_two_units(seconds, words):
    assert duration(seconds) == words
