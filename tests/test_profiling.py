"""A profile of a real loop: which steps are in it, and what its costs say.

Not what the numbers are: those depend on the machine.
"""

import gzip
import json
import logging
import re
import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import record_function

from m2encoder.profiling import PROFILED_STEPS, SKIPPED_STEPS, largest_costs, profiled


def run(out, steps):
    """Multiply matrices in a loop of that many steps; returns the batches that came through."""
    seen = []
    for batch in profiled(range(steps), out):
        with record_function(f"step {batch}"):
            torch.mm(torch.ones(128, 128), torch.ones(128, 128))
        seen.append(batch)
    return seen


def test_the_middle_steps_are_in_the_trace_and_every_batch_comes_through(tmp_path, caplog, capfd):
    caplog.set_level(logging.INFO)
    count = SKIPPED_STEPS + PROFILED_STEPS + 3
    assert run(tmp_path, count) == list(range(count))
    with gzip.open(tmp_path / "profile/trace.json.gz") as file:
        trace = json.load(file)
    names = {event.get("name", "") for event in trace["traceEvents"]}
    expected = {f"step {n}" for n in range(SKIPPED_STEPS, SKIPPED_STEPS + PROFILED_STEPS)}
    assert {name for name in names if name.startswith("step ")} == expected
    assert "aten::mm" in names
    costs = (tmp_path / "profile/costs.txt").read_text().splitlines()
    assert [record.getMessage() for record in caplog.records][:-1] == costs
    assert capfd.readouterr() == ("", "")


def test_a_run_that_ends_within_the_profile_is_profiled_as_far_as_it_came(tmp_path):
    assert len(run(tmp_path, SKIPPED_STEPS + 2)) == SKIPPED_STEPS + 2
    assert "aten::mm" in (tmp_path / "profile/costs.txt").read_text()


@pytest.mark.parametrize("steps", [0, SKIPPED_STEPS])
def test_a_run_that_ends_before_the_profile_says_so(tmp_path, caplog, steps):
    assert len(run(tmp_path, steps)) == steps
    assert f"no profile: the run ended within the first {SKIPPED_STEPS} steps" in caplog.text
    assert not (tmp_path / "profile").exists()


def test_an_error_in_the_loop_stops_the_profiler(tmp_path):
    batches = profiled(range(20), tmp_path)
    while next(batches) <= SKIPPED_STEPS:
        pass
    assert torch.autograd.profiler._is_profiler_enabled
    with pytest.raises(ValueError, match="stop"):
        batches.throw(ValueError("stop"))
    assert not torch.autograd.profiler._is_profiler_enabled


def test_what_takes_longest_comes_first(tmp_path):
    for batch in profiled(range(SKIPPED_STEPS + PROFILED_STEPS), tmp_path):
        with record_function("a long sleep 睡"):
            time.sleep(0.02 if batch >= SKIPPED_STEPS else 0)
    first = (tmp_path / "profile/costs.txt").read_text("utf-8").splitlines()[1]
    found = re.fullmatch(r"  a long sleep 睡 +(\d+\.\d\d) ms +(\d+\.\d) % +(\d+) calls", first)
    assert found
    assert (float(found[1]) >= 100, float(found[2]) > 50, int(found[3])) == (True, True, 5)


def cost(key, own_us, *, count=1, device=DeviceType.CPU, is_user_annotation=False):
    """What key_averages gives of one operation or kernel; this machine may have no GPU."""
    times = {"self_cpu_time_total": own_us, "self_device_time_total": own_us}
    return SimpleNamespace(
        key=key, count=count, device_type=device, is_user_annotation=is_user_annotation, **times
    )


def test_costs_are_the_kernels_of_a_gpu_where_there_is_one():
    lines = largest_costs(
        [
            cost("aten::mm", 9000),  # launches gemm
            cost("gemm", 3000, count=7, device=DeviceType.CUDA),
            cost("a step", 4000, device=DeviceType.CUDA, is_user_annotation=True),
            cost("norm", 1000, device=DeviceType.CUDA),
        ]
    )
    assert lines == [
        "the 2 largest costs, GPU time without what each calls:",
        "  gemm       3.00 ms   75.0 %       7 calls",
        "  norm       1.00 ms   25.0 %       1 calls",
    ]


def test_only_the_ten_largest_are_named_and_long_names_are_cut():
    lines = largest_costs([cost(f"{'kernel' * 20}{n}", n) for n in range(30)])
    assert len(lines) == 11
    assert max(map(len, lines)) < 100


def test_no_costs_are_no_error():
    assert largest_costs([]) == ["the 0 largest costs, CPU time without what each calls:"]
