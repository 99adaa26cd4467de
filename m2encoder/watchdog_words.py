"""What the watchdog says: which rank is missing, where it stopped, what the others wait in.

Not for watching (watchdog.py).
"""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

SHOWN_KEYS = 3


class Sign(NamedTuple):
    """A rank's sign of life, as its file holds it."""

    rank: int
    pid: int
    beats: int
    time: float
    """Seconds since 1970 by the rank's own clock; only for saying how long ago."""
    step: int
    order: int
    """How many places of this step came before."""
    phase: str
    phase_s: float
    """Seconds in this phase."""
    is_paused: bool
    """Whether this rank may take any time."""
    keys: list[str]
    """The samples at hand."""
    ended: str | None
    """Why it ended: an error, or "" for none; None while it runs."""


class Seen(NamedTuple):
    """What another rank sees of one, between two looks."""

    sign: Sign
    is_alive: bool
    """It gave another sign and has not ended."""
    is_moving: bool
    """It went on to another place."""

    @classmethod
    def between(cls, before: Sign | None, sign: Sign) -> "Seen":
        """Compare the signs of two looks; `before` is None where there was none."""
        is_new = before is None or (before.pid, before.beats) != (sign.pid, sign.beats)
        is_moving = before is None or (before.step, before.order) != (sign.step, sign.order)
        return cls(sign, is_new and sign.ended is None, is_new and is_moving)

    @property
    def is_paused(self) -> bool:
        """Whether the rank may take any time."""
        return self.sign.is_paused


def missing_sentence(signs: Mapping[int, Seen], world_size: int, *, timeout_s: float) -> str:
    """Return one sentence about a world that stands still.

    Missing are the ranks that are not alive or never came; where all are alive, those that are
    furthest behind, if any.
    """
    never = [rank for rank in range(world_size) if rank not in signs]
    gone = [seen.sign for seen in signs.values() if not seen.is_alive]
    alive = [seen.sign for seen in signs.values() if seen.is_alive]
    if not never and not gone:
        behind = min((sign.step, sign.order) for sign in alive)
        gone = [sign for sign in alive if (sign.step, sign.order) == behind]
        alive = [sign for sign in alive if (sign.step, sign.order) != behind]
    others = _others(alive)
    if not never and not alive and len(gone) == world_size:
        return _nobody_behind(gone, timeout_s)
    parts = []
    if never:
        parts.append(f"{_ranks(never)} {_are(never)} missing: never started")
    parts += [_missing(each) for each in _alike(gone)]
    return "; ".join([*parts, *others])


def _nobody_behind(signs: Sequence[Sign], timeout_s: float) -> str:
    sign = signs[0]
    where = f"step {sign.step} ({sign.phase}{_last_samples(sign)})"
    if len(signs) == 1:
        return f"no progress for {timeout_s:g} s in {where}"
    return f"no progress for {timeout_s:g} s: all {len(signs)} ranks stand in {where}, none behind"


def _missing(signs: Sequence[Sign]) -> str:
    """Say where ranks stopped that stopped in the same place."""
    sign, ranks = signs[0], [each.rank for each in signs]
    who = f"{_ranks(ranks)} {_are(ranks)} missing"
    if sign.ended:
        return f"{who}: ended in step {sign.step} with {sign.ended}"
    if sign.ended == "":
        return f"{who}: ended in step {sign.step}"
    ago = sign.phase_s + max(0.0, time.time() - sign.time)
    return (
        f"{who}: last seen in step {sign.step} ({sign.phase}{_last_samples(sign)}), {ago:.0f} s ago"
    )


def _last_samples(sign: Sign) -> str:
    if not sign.keys:
        return ""
    more = ", …" if len(sign.keys) > SHOWN_KEYS else ""
    return f", last samples {', '.join(sign.keys[:SHOWN_KEYS])}{more}"


def _alike(signs: Sequence[Sign]) -> list[list[Sign]]:
    groups: dict[tuple[int, str, str | None], list[Sign]] = {}
    for sign in signs:
        groups.setdefault((sign.step, sign.phase, sign.ended), []).append(sign)
    return list(groups.values())


def _others(alive: Sequence[Sign]) -> list[str]:
    """Say where the others wait, the place of most of them first."""
    groups = sorted(_alike(alive), key=lambda group: -len(group))
    shown = []
    for group in groups[:2]:
        ranks = [sign.rank for sign in group]
        verb = "waits" if len(ranks) == 1 else "wait"
        shown.append(f"{_ranks(ranks)} {verb} in step {group[0].step} ({group[0].phase})")
    return shown


def _are(ranks: Sequence[int]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _ranks(ranks: Sequence[int]) -> str:
    """Write ranks with runs of three or more as first-last: `ranks 0-3, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(words)
