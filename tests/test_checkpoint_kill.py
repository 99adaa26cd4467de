"""A save that is killed, or for which a disk is full, leaves the last good checkpoint.

Not runs that are killed (test_engine_kill.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_killer import make_state
from sharded_runs import Run, end, progress

from m2encoder.checkpoint import Checkpoints, list_checkpoints
from m2encoder.errors import CheckpointError


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_before_any_file_operation_a_whole_checkpoint_stands(tmp_path):
    script = Path(__file__).with_name("checkpoint_killer.py")
    ran = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=True
    )
    *kills, last = map(json.loads, ran.stdout.splitlines())
    assert last == {"status": 0, "tries": len(kills) + 1}
    before = [f"{event} {name}" for event, name in (kill["killed_before"] for kill in kills)]
    assert {  # folder, each file, rename, and removal of the older one
        "os.mkdir .step-00000002.tmp", "open tensors-00000-of-00001.safetensors",
        "open progress.json", "open manifest.json", "os.rename .step-00000002.tmp",
        "os.rename step-00000001", "os.rmdir .step-00000001.old.tmp",
    } <= set(before)  # fmt: skip
    found = []
    for number in range(1, last["tries"] + 1):
        checkpoints, state = Checkpoints(tmp_path / str(number)), make_state(0)
        path = checkpoints.latest()
        assert path is not None
        step = checkpoints.load(path, state).step
        assert all(torch.equal(p, torch.full_like(p, step)) for p in state.model.parameters())
        found.append(step)
    renamed = before.index("os.rename .step-00000002.tmp")
    assert found == [1] * (renamed + 1) + [2] * (len(found) - renamed - 1)


def full_disk_of_rank(rank, world_size, folder, full_on):
    """Two saves, the second with no room for the shard of one rank; what each rank is told."""
    import resource

    run = Run(rank, world_size, "ggg")
    checkpoints = Checkpoints(folder, run.world)
    checkpoints.save(run.state, progress(1), wait=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == full_on:  # Python ignores the signal: writing more raises an OSError, as a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError) as error:
            checkpoints.save(run.state, progress(2), wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run.world.wait()
    after = sorted(path.name for path in folder.iterdir())
    run.world.wait()
    checkpoints.save(run.state, progress(3), wait=True)
    found = checkpoints.load(folder / "step-00000003", run.state)
    end(checkpoints)
    return str(error.value), after, found.step


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
@pytest.mark.parametrize("full_on", [0, 1])
def test_where_one_ranks_disk_is_full_the_last_good_checkpoint_stands(gloo, tmp_path, full_on):
    for message, after, step in gloo(2).run(full_disk_of_rank, tmp_path, full_on):
        assert message.startswith(f"{tmp_path}/step-00000002: cannot write (")
        assert "File too large" in message
        assert message.endswith("the last good checkpoint, step-00000001, stands; free space")
        assert after == ["step-00000001"]
        assert step == 3
    assert len(list_checkpoints(tmp_path)) == 2
