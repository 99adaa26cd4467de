"""Which patches of a training picture stay: enough, in order, by seed and position, evenly.

Not for what the image tower does with them (test_training_step.py, test_layers.py).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2encoder.patch_dropout import kept_patches


def kept_at(*positions, num_patches=196, share=0.5, seed=0):
    """The patches that stay, as lists; something is always dropped here."""
    found = kept_patches(
        torch.tensor(positions, dtype=torch.int64), num_patches=num_patches, share=share, seed=seed
    )
    assert found is not None
    return found.tolist()


# --- how many, and in which form ----------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    positions=st.lists(st.integers(0, 2**62), max_size=5),
    num_patches=st.integers(1, 300),
    share=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**63 - 1),
)
def test_as_many_patches_stay_as_the_share_says_each_once_and_in_order(
    positions, num_patches, share, seed
):
    given_positions = torch.tensor(positions, dtype=torch.int64)
    found = kept_patches(given_positions, num_patches=num_patches, share=share, seed=seed)
    count = max(1, round((1 - share) * num_patches))
    if count == num_patches:
        assert found is None
        return
    assert found is not None
    assert found.shape == (len(positions), count)
    assert found.dtype == torch.int64
    assert (found.diff(dim=1) > 0).all()
    assert ((found >= 0) & (found < num_patches)).all()


@pytest.mark.parametrize(("num_patches", "share"), [(196, 0.0), (1, 0.9), (16, 0.03)])
def test_a_share_of_less_than_half_a_patch_drops_none(num_patches, share):
    kept = kept_patches(torch.arange(3), num_patches=num_patches, share=share, seed=0)
    assert kept is None


@pytest.mark.parametrize(
    ("num_patches", "share", "count"), [(196, 0.5, 98), (16, 0.25, 12), (16, 0.99, 1), (2, 0.9, 1)]
)
def test_the_count_worked_by_hand(num_patches, share, count):
    (patches,) = kept_at(5, num_patches=num_patches, share=share)
    assert len(patches) == count


def test_no_pictures_have_no_patches():
    assert kept_at() == []


# --- by seed and position alone -----------------------------------------------------------------


def test_a_picture_keeps_its_patches_in_any_company():
    alone = {position: kept_at(position)[0] for position in (0, 3, 17, 2**40)}
    assert kept_at(2**40, 3, 99, 3, 17, 0) == [
        alone[2**40], alone[3], kept_at(99)[0], alone[3], alone[17], alone[0],
    ]  # fmt: skip


def test_the_generators_of_torch_are_neither_read_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = kept_at(7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert kept_at(7) == first


def test_other_positions_and_other_seeds_keep_other_patches():
    by_position = kept_at(*range(500))
    by_seed = [kept_at(0, seed=seed)[0] for seed in range(1, 500)]
    on_the_diagonal = [kept_at(i, seed=i)[0] for i in range(1, 500)]
    every = [tuple(patches) for patches in by_position + by_seed + on_the_diagonal]
    assert len(set(every)) == len(every)


def test_seed_and_position_are_not_added_up():
    assert kept_at(8, seed=3) != kept_at(7, seed=4)
    assert kept_at(3, seed=8) != kept_at(8, seed=3)


WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15


def splitmix(x):
    """The reference's finaliser, with Python's whole numbers."""
    x %= WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return x ^ x >> 31


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (3, 1_600), (2**62 + 1, 2**61 + 7)])
def test_the_patches_are_those_of_splitmix64(seed, position):
    """So that a run resumed on another machine, or years later, sees the same ones."""
    assert splitmix(GOLDEN) == 0xE220A8397B1DCDAF  # the published generator's first after seed 0
    start = splitmix(position + splitmix(seed + GOLDEN))
    words = [splitmix(start + (patch + 1) * GOLDEN) for patch in range(64)]
    signed = [word - WORD if word >= WORD // 2 else word for word in words]
    expected = sorted(sorted(range(64), key=signed.__getitem__)[:24])
    assert kept_at(position, num_patches=64, share=0.625, seed=seed) == [expected]


# --- evenly -------------------------------------------------------------------------------------

DRAWS, PATCHES, KEPT = 20_000, 16, 4
BY_POSITION = (torch.arange(DRAWS), 11)


def membership(positions, seed):
    """(positions, PATCHES): 1 where the patch stays."""
    kept = kept_patches(positions, num_patches=PATCHES, share=1 - KEPT / PATCHES, seed=seed)
    assert kept is not None
    return torch.zeros(len(positions), PATCHES, dtype=torch.float64).scatter_(1, kept, 1.0)


def deviations(counts, probability, draws):
    """How far binomial counts are from what is expected, in standard deviations."""
    return (counts - draws * probability).abs() / (draws * probability * (1 - probability)) ** 0.5


def test_every_patch_and_every_two_patches_stay_equally_often():
    stays = membership(*BY_POSITION)
    together = stays.T @ stays
    # the largest of 16 and of 120 normal deviations; above 4.5 once in 10,000 such tests
    assert deviations(together.diagonal(), KEPT / PATCHES, DRAWS).max() < 4.5
    pairs = together[torch.ones_like(together).triu(1).bool()]
    probability = KEPT * (KEPT - 1) / (PATCHES * (PATCHES - 1))
    assert deviations(pairs, probability, DRAWS).max() < 4.5


def test_neighbouring_positions_and_seeds_are_independent():
    positions, seed = BY_POSITION
    stays = membership(positions, seed)
    for other in (membership(positions + 1, seed), membership(positions, seed + 1)):
        both = (stays * other).sum(dim=0)
        assert deviations(both, (KEPT / PATCHES) ** 2, DRAWS).max() < 4.5
