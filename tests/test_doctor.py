"""`m2enc doctor loss`: every placement passes, a wrong loss is found out, by exit code too."""

import json
import subprocess
import sys

import pytest
import torch

from m2encoder.cli import main
from m2encoder.distributed import World
from m2encoder.doctor import TOLERANCE, LossCheck, _compare_with_dense, check_loss
from m2encoder.loss import ContrastiveLoss, make_loss


def doctor(*words):
    command = [sys.executable, "-m", "m2encoder", "doctor", "loss", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_four_processes_pass_in_every_placement():
    ran = doctor("--json")
    assert ran.returncode == 0, ran.stderr
    checks = json.loads(ran.stdout)
    placements = {(c["kind"], c["grid"], c["group_ranks"]) for c in checks}
    grids = {("4x1", 4), ("2x2", 4), ("1x4", 4), ("1x2", 2)}
    assert placements == {(kind, *grid) for kind in ("infonce", "sigmoid") for grid in grids}
    assert all(c["is_right"] and 0 < c["error"] < TOLERANCE for c in checks)
    sent = {(c["kind"], c["grid"]): c["sent_bytes"] for c in checks}
    assert sent["infonce", "2x2"] < sent["infonce", "1x4"]


def test_a_table_is_printed_by_one_process_alone():
    ran = doctor("--world", "2")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("2 processes on cpu")
    assert ran.stdout.count("| infonce | 2x1 | 2 of 2 |") == 1
    assert ran.stdout.endswith("4 placements, 0 wrong (tolerance 1e-09)\n")


class Wrong(ContrastiveLoss):
    """A loss whose gradients are a millionth too long."""

    def terms(self, sides, *args, **kwargs):
        found = super().terms(sides, *args, **kwargs)
        value = found.losses.detach()
        return found._replace(losses=value + (found.losses - value) * (1 + 1e-6))


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_a_gradient_off_by_a_millionth_is_found_out(kind):
    loss = make_loss(rank=0, world_size=1, kind=kind)
    loss.__class__ = Wrong
    error, ratio = _compare_with_dense(World(), loss, kind, group=1)
    check = LossCheck(kind, "1x1", 1, error, ratio, 0, 0)
    assert error == pytest.approx(1e-6, rel=1e-3)
    assert ratio - 1 == pytest.approx(1e-6, rel=1e-3)
    assert not check.is_right


def test_no_number_is_not_right():
    assert not LossCheck("infonce", "1x1", 1, float("nan"), 1.0, 0, 0).is_right
    assert not LossCheck("infonce", "1x1", 1, 0.0, float("nan"), 0, 0).is_right


def test_one_process_needs_no_others():
    checks = list(check_loss(World()))
    assert [check.kind for check in checks] == ["infonce", "sigmoid"]
    assert all(check.is_right for check in checks)
    assert [check.sent_bytes for check in checks] == [0, 0]


def test_a_wrong_loss_gives_exit_code_1(monkeypatch, capsys):
    wrong = [LossCheck("infonce", "1x1", 1, 1.0, 1.0, 0, 0)]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setattr("m2encoder.doctor.check_loss", lambda world: iter(wrong))
    assert main(["doctor", "loss"]) == 1
    assert "1 placements, 1 wrong" in capsys.readouterr().out
    assert not torch.distributed.is_initialized()


def test_a_world_of_none_is_refused_in_one_line():
    ran = doctor("--world", "0")
    assert ran.returncode == 2
    assert ran.stderr == "m2enc: nproc is 0, expected at least 1\n"
