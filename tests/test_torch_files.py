"""Torch files are read without running what is in them, and damaged ones give one line."""

import collections
import contextlib
import importlib
import logging
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import _utils as torch_utils
from torch import nn

from m2encoder.errors import CheckpointError
from m2encoder.torch_files import forget, read_torch_file


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(4, 6, generator=generator)
    return {
        "float32": torch.randn(3, 5, generator=generator),
        "float16": torch.randn(7, generator=generator).half(),
        "bfloat16": torch.randn(2, 2, generator=generator).bfloat16(),
        "int64": torch.arange(5),
        "scalar": torch.tensor(2.5),
        "rows": shared[1:3],
        "columns": shared.T,
        "empty": torch.zeros(0, 4),
        "名字 🐱": torch.ones(1),
    }


def assert_equal(found: Any, want: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(want)
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("new_format", [True, False])
def test_plain_files_of_both_formats_are_read(new_format: bool, tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    torch.save({"state_dict": weights()}, path, _use_new_zipfile_serialization=new_format)
    assert_equal(read_torch_file(path)["state_dict"], weights())


def test_safetensors_are_read(tmp_path: Path) -> None:
    plain = {name: tensor.contiguous().clone() for name, tensor in weights().items()}
    save_file(plain, tmp_path / "plain.safetensors")
    found = read_torch_file(tmp_path / "plain.safetensors")
    assert_equal({name: found[name] for name in plain}, plain)


# ── foreign objects ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def foreign_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Lightning-like checkpoint whose classes cannot be imported any more."""
    source = (
        "class Settings(dict):\n    pass\nclass Plain:\n    pass\nclass Items(list):\n    pass\n"
    )
    (tmp_path / "vanished.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    vanished = importlib.import_module("vanished")
    settings, plain = vanished.Settings(lr=1e-3, name="模型"), vanished.Plain()
    plain.settings, plain.items = settings, vanished.Items([1, plain])
    path = tmp_path / "lightning.ckpt"
    torch.save(
        {
            "epoch": 3,
            "hyper_parameters": settings,
            "callbacks": {vanished.Plain: plain},
            "counts": collections.Counter("abc"),
            "state_dict": collections.OrderedDict(weights(), parameter=nn.Parameter(torch.ones(2))),
        },
        path,
    )
    del sys.modules["vanished"]
    (tmp_path / "vanished.py").unlink()
    return path


def test_a_file_with_classes_that_cannot_be_imported_loads(
    foreign_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(pickle.UnpicklingError):
        torch.load(foreign_file, weights_only=True)
    with pytest.raises(ModuleNotFoundError):
        torch.load(foreign_file, weights_only=False)
    caplog.set_level(logging.INFO)
    content = read_torch_file(foreign_file)
    found = content["state_dict"]
    assert torch.equal(found.pop("parameter"), torch.ones(2))
    assert_equal(found, weights())
    assert content["epoch"] == 3
    assert "vanished" not in sys.modules
    assert "vanished.Settings" in caplog.text  # it says what it ignored


class Runs:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def attacks(canary: Path) -> dict[str, Any]:
    shell = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w')"
    changed = torch_utils._rebuild_tensor_v2
    return {
        "os.system": Runs(os.system, shell),
        "eval": Runs(eval, code),
        "exec": Runs(exec, code),
        "subprocess": Runs(subprocess.call, ["touch", str(canary)]),
        "open": Runs(open, str(canary), "w"),
        "getattr": Runs(getattr, "a", "upper"),
        "torch.load": Runs(torch.load, str(canary)),
        "nested": {"state_dict": [Runs(os.system, shell)]},
        "key": {Runs(os.system, shell): 1},
        "in a parameter": Runs(torch_utils._rebuild_parameter, Runs(os.system, shell), True, None),
        "rebuilder": Runs(changed, Runs(os.system, shell), 0, (1,), (1,), False, None),
    }


IN_A_TENSOR = ("in a parameter", "rebuilder")


@pytest.mark.parametrize("attack", [a for a in attacks(Path("x")) if a not in IN_A_TENSOR])
def test_a_malicious_object_never_runs_and_the_tensors_load(attack: str, tmp_path: Path) -> None:
    """The canary is a file that the attack makes; torch's own unsafe reading does make it."""
    canary, path = tmp_path / "canary", tmp_path / "bad.ckpt"
    torch.save({"state_dict": weights(), "bad": attacks(canary)[attack]}, path)
    assert_equal(read_torch_file(path)["state_dict"], weights())
    assert not canary.exists()


@pytest.mark.parametrize("attack", IN_A_TENSOR)
def test_a_malicious_object_in_place_of_a_tensors_part_never_runs(
    attack: str, tmp_path: Path
) -> None:
    canary, path = tmp_path / "canary", tmp_path / "bad.ckpt"
    torch.save({"state_dict": weights(), "bad": attacks(canary)[attack]}, path)
    with contextlib.suppress(CheckpointError):  # a stub may be no part of a tensor
        assert_equal(read_torch_file(path)["state_dict"], weights())
    assert not canary.exists()


def test_the_canary_would_show_an_unsafe_reading(tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "bad.ckpt"
    torch.save({"bad": attacks(canary)["os.system"]}, path)
    torch.load(path, weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("name", ["bad.pkl", "bad.ckpt"])
def test_a_bare_pickle_with_code_is_refused(name: str, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / name
    path.write_bytes(pickle.dumps({"state_dict": attacks(canary)["os.system"]}))
    with pytest.raises(CheckpointError, match="not a torch checkpoint, or damaged"):
        read_torch_file(path)
    assert not canary.exists()


def test_the_functions_that_rebuild_tensors_cannot_be_changed(tmp_path: Path) -> None:
    """A pickle may set the state of whatever it names; torch's functions must stay as they are."""
    before = torch_utils._rebuild_tensor_v2.__defaults__
    path = tmp_path / "bad.ckpt"
    torch.save({"state_dict": weights()}, path)
    program = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
        b"N}X\x0c\x00\x00\x00__defaults__)s\x86b."  # BUILD with (None, {"__defaults__": ()})
    )
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new.ckpt", "w") as new:
        for item in old.infolist():
            data = program if item.filename.endswith("data.pkl") else old.read(item)
            new.writestr(item.filename, data)
    with contextlib.suppress(CheckpointError):
        read_torch_file(tmp_path / "new.ckpt")
    assert torch_utils._rebuild_tensor_v2.__defaults__ == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "program.ckpt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(CheckpointError, match="a TorchScript program, expected a checkpoint"):
        read_torch_file(path)


# ── damage ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_gives_one_line(share: float, new_format: bool, tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"
    torch.save({"state_dict": weights()}, path, _use_new_zipfile_serialization=new_format)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"cut.ckpt: (truncated at|not a torch)") as caught:
        read_torch_file(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("page.ckpt", b"<html>404 not found</html>", "not a torch checkpoint, or damaged"),
        ("zeros.ckpt", bytes(4096), "not a torch checkpoint, or damaged"),
        ("pointer.ckpt", b"version https://git-lfs.github.com/spec/v1\n", "not a torch checkpoint"),
        ("a.safetensors", b"\x10" + bytes(40), "damaged safetensors file"),
    ],
)
def test_other_files_give_one_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch_file(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no.ckpt: no such checkpoint file; check the path"):
        read_torch_file(tmp_path / "no.ckpt")


# ── memory ──────────────────────────────────────────────────────────────────────────────────────


def test_forgotten_tensors_stay_readable_and_unmapped_ones_untouched(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "plain.ckpt")
    mapped = read_torch_file(tmp_path / "plain.ckpt")
    for tensor in (*mapped.values(), *(own := weights()).values()):
        forget(tensor)
    assert_equal(mapped, weights())
    assert_equal(own, weights())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is given back on Linux")
def test_forgetting_gives_memory_back(tmp_path: Path) -> None:
    torch.save({f"{i}": torch.ones(2**20) for i in range(16)}, tmp_path / "large.ckpt")  # 64 MiB
    mapped = read_torch_file(tmp_path / "large.ckpt")
    assert sum(float(tensor.sum()) for tensor in mapped.values()) == 16 * 2**20
    before = resident_bytes()
    for tensor in mapped.values():
        forget(tensor)
    assert before - resident_bytes() > 56 * 2**20


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
