"""A checkpoint of one sharding and world goes on under each other, to the bit.

Not the runs themselves (test_sharding.py) nor damage in general (test_checkpoint.py).
"""

import shutil
from functools import cache

import pytest
import torch
from sharded_runs import BATCH_SIZE, Run, by_hand, end, load_here, progress, save_here
from tiny_batches import SHAPE

from m2encoder.checkpoint import Checkpoints
from m2encoder.distributed import World
from m2encoder.errors import CheckpointError

WORLDS = {"nnn of 4": 4, "ggg of 4": 4, "iii of 4": 4, "ggg of 2": 2, "nnn of 1": 1}
SAVED_AT, STEPS = 2, 3
TOLERANCE = 1e-5  # float32 sums in another order, over so many steps


def on_each_rank(gloo, world, work, *args):
    """What the ranks of a world return; a world of one is this process."""
    size, sharding = WORLDS[world], world[:3]
    if size == 1:
        return [work(0, 1, sharding, *args)]
    return gloo(size).run(work, sharding, *args)


def train_and_save(rank, world_size, sharding, folder):
    run = Run(rank, world_size, sharding, accumulate=2 if sharding == "iii" else 1)
    run.train(0, SAVED_AT)
    save_here(run, folder, SAVED_AT)
    return run.whole()


@pytest.fixture(scope="module")
def saved(gloo, tmp_path_factory):
    """Of each world: the folder with its checkpoint, and what was in it."""
    found = {}
    for world in WORLDS:
        folder = tmp_path_factory.mktemp(world.replace(" ", "-"))
        found[world] = folder, on_each_rank(gloo, world, train_and_save, folder)[0]
    return found


def load_and_go_on(rank, world_size, sharding, folders):
    """Of each folder: its progress, the state that was loaded, and that after one more step."""
    answers, run = [], Run(rank, world_size, sharding)
    for folder in folders:
        run.optimizer.state.clear()
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.zero_()
        found = load_here(run, folder)
        loaded = run.whole()
        losses = [loss for loss, _ in run.train(SAVED_AT, STEPS)]
        answers.append((found, loaded, losses, run.whole()))
    return answers


@cache
def expected_run():
    return list(by_hand(STEPS))


@pytest.mark.slow  # test_engine.py changes from each sharding to each other in one run
@pytest.mark.parametrize("world", WORLDS)
def test_every_checkpoint_goes_on_under(gloo, saved, world):
    answers = on_each_rank(gloo, world, load_and_go_on, [folder for folder, _ in saved.values()])
    expected = expected_run()
    for of_rank in answers:
        for (_, state), (found, loaded, losses, after) in zip(saved.values(), of_rank, strict=True):
            assert found == progress(SAVED_AT)
            assert loaded.keys() == state.keys()
            assert all(torch.equal(loaded[name], state[name]) for name in state)
            assert losses == pytest.approx(
                [loss for loss, *_ in expected[SAVED_AT:]], abs=TOLERANCE
            )
            for name, tensor in expected[-1][2].items():
                torch.testing.assert_close(after[name], tensor, rtol=0, atol=TOLERANCE)


def test_every_world_has_saved_the_same_names(saved):
    names = [state.keys() for _, state in saved.values()]
    assert all(some == names[0] for some in names)
    assert {name.partition("/")[0] for name in names[0]} == {"model", "optimizer", "ema"}


@pytest.mark.parametrize("world", WORLDS)
def test_each_rank_writes_about_its_share_once(saved, world):
    folder, state = saved[world]
    files = sorted((folder / "step-00000002").glob("*.safetensors"))
    assert len(files) == WORLDS[world]
    whole = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    headers = [int.from_bytes(file.read_bytes()[:8], "little") + 8 for file in files]
    bodies = [file.stat().st_size - header for file, header in zip(files, headers, strict=True)]
    assert sum(bodies) == whole
    assert max(bodies) < 1.3 * whole / len(files)


def refusals_of_rank(rank, world_size, folder, width):
    """What a rank is told of each way in which one file is damaged, or of another model."""
    run = Run(rank, world_size, "ggg", projection_dim=width)
    before, messages = run.whole(), []
    checkpoints = Checkpoints(folder, World(rank, world_size))
    path = checkpoints.latest()
    assert path is not None
    for file in sorted(path.glob("*.safetensors")):
        content = file.read_bytes()
        run.world.wait()
        if rank == 0 and width == SHAPE["projection_dim"]:
            file.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
        run.world.wait()
        with pytest.raises(CheckpointError) as error:
            checkpoints.load(path, run.state)
        run.world.wait()
        if rank == 0:
            file.write_bytes(content)
        messages.append((file.name, str(error.value)))
    after = run.whole()
    end(checkpoints)
    return messages, all(torch.equal(after[name], before[name]) for name in before)


def test_whichever_shard_is_damaged_all_ranks_say_so(gloo, saved, tmp_path):
    shutil.copytree(saved["ggg of 4"][0], tmp_path / "damaged")
    answers = gloo(4).run(refusals_of_rank, tmp_path / "damaged", SHAPE["projection_dim"])
    assert all(answer == answers[0] for answer in answers)
    messages, is_unchanged = answers[0]
    assert is_unchanged
    assert len(messages) == 4
    for name, message in messages:
        assert f"damaged checkpoint ({name}: its content is not what was written" in message


def test_all_ranks_refuse_another_model(gloo, saved):
    answers = gloo(2).run(refusals_of_rank, saved["iii of 4"][0], 16)
    assert answers[0] == answers[1]
    messages, is_unchanged = answers[0]
    assert is_unchanged
    for _, message in messages:
        assert "is (12, 24), the model expects (16, 24); was this run started with" in message


def test_batches_divide_by_every_world():
    assert all(BATCH_SIZE % size == 0 for size in WORLDS.values())
