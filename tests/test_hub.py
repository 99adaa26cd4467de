"""Downloads through the hubs' own libraries, from a hub on this machine.

In a process of their own, because the libraries read their settings when they are imported. Not for
released models (test_sources.py).
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hub_server import REVISION, HubServer, hub_server

from m2encoder.errors import ConfigError, MissingExtraError
from m2encoder.hub import download_file, fetch_hub, hub_name, remove_download

BIG = bytes(range(256)) * 47_000  # 12 MB: Hugging Face's library writes 10 MiB at a time
CUT = 11_000_000
NAMED_ODDLY = "词表/sp 模型（ｖ１）.model"
FILES = {
    "org/plain": {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "vocab.txt": b"a",
        "pytorch_model.bin": b"pickle",
        "modeling.py": b"raise SystemExit",
        "m.ckpt": BIG,
        NAMED_ODDLY: b"\x00\xff" * 50,
    },
    "org/old": {"config.json": b"{}", "pytorch_model.bin": b"pickle", "tf_model.h5": b"other"},
    "org/gated": {"config.json": b"{}"},
}
NEEDS_MODELSCOPE = pytest.mark.skipif(
    find_spec("modelscope") is None, reason="needs modelscope: pip install 'm2encoder[modelscope]'"
)
HUBS = ["huggingface", pytest.param("modelscope", marks=NEEDS_MODELSCOPE)]
PREFIX = {"huggingface": "hf", "modelscope": "modelscope"}

CODE = """
import json, sys
from m2encoder import hub
from m2encoder.errors import M2EncoderError
for name, arguments, options in json.load(sys.stdin):
    try:
        print(json.dumps(["ok", str(getattr(hub, name)(*arguments, **options))]))
    except M2EncoderError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture
def server():
    with hub_server(FILES) as running:
        running.gated.add("org/gated")
        yield running


def settings(server: HubServer | None, home: Path, **more: str) -> dict[str, str]:
    """The environment of a client of `server`, or of one that nobody answers."""
    url = server.url if server else "http://127.0.0.1:9"
    ours = {name: v for name, v in os.environ.items() if not name.startswith(("HF_", "MODELSCOPE"))}
    return ours | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home / "脸"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "MODELSCOPE_ENDPOINT": url,
        "MODELSCOPE_CACHE": str(home / "魔搭"),
        "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "1",
        "NO_PROXY": "127.0.0.1",
        **more,
    }


def calls(environment: dict[str, str], *wanted: tuple[str, list[Any], dict[str, Any]]):
    """What functions of m2encoder.hub return or raise, called in one new process."""
    ran = subprocess.run(
        [sys.executable, "-c", CODE],
        input=json.dumps(wanted),
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return [tuple(json.loads(line)) for line in ran.stdout.splitlines()]


def call(environment: dict[str, str], name: str, *arguments: str, **options: str):
    """The one result of `calls`; an error must be one line."""
    ((kind, text),) = calls(environment, (name, list(arguments), options))
    assert "\n" not in text
    return kind, text


@pytest.mark.parametrize("hub", HUBS)
@pytest.mark.parametrize("path", ["config.json", NAMED_ODDLY])
def test_a_file_arrives_whole_and_is_not_fetched_twice(server, tmp_path, hub, path):
    wanted = ("download_file", [hub, "org/plain", path], {})
    (_, first), (_, again) = calls(settings(server, tmp_path), wanted, wanted)
    assert Path(first).read_bytes() == FILES["org/plain"][path]
    assert (again, len(server.ranges(path))) == (first, 1)


@pytest.mark.parametrize("hub", HUBS)
def test_a_dropped_connection_goes_on_where_it_stopped(server, tmp_path, hub):
    server.cut["m.ckpt"] = CUT
    wanted = ("download_file", hub, "org/plain", "m.ckpt")
    kind, path = call(settings(server, tmp_path), *wanted)
    if kind != "ok":  # huggingface_hub 0.36 goes on in the next call only
        kind, path = call(settings(server, tmp_path), *wanted)
    assert kind == "ok"
    assert Path(path).read_bytes() == BIG
    whole, rest = server.ranges("m.ckpt")
    assert whole is None
    assert rest is not None
    assert 0 < int(rest.removeprefix("bytes=").rstrip("-")) <= CUT


@pytest.mark.parametrize("hub", HUBS)
def test_after_a_download_that_failed_halfway_the_next_one_is_whole(server, tmp_path, hub):
    server.cut["m.ckpt"], server.down_after_cut = CUT, True
    wanted = ("download_file", hub, "org/plain", "m.ckpt")
    kind, text = call(settings(server, tmp_path), *wanted)
    assert (kind, text.partition(": ")[0]) == ("CheckpointError", f"{PREFIX[hub]}:org/plain")
    assert [path for path in tmp_path.rglob("m.ckpt") if path.is_file()] == []
    server.down.clear()
    before = len(server.ranges("m.ckpt"))
    kind, path = call(settings(server, tmp_path), *wanted)
    assert Path(path).read_bytes() == BIG
    if hub == "modelscope":  # keeps the first half for another process; Hugging Face's does not
        assert server.ranges("m.ckpt")[before:] == [f"bytes={CUT}-"]


@pytest.mark.parametrize("hub", HUBS)
@pytest.mark.parametrize(
    ("repository", "path", "message"),
    [
        ("org/none", "config.json", "org/none: no such repository or file, or it is private"),
        ("org/gated", "config.json", "org/gated: access refused, it is gated or private; ask"),
        ("org/plain", "没有.json", "org/plain: has no file 没有.json"),
    ],
)
def test_what_a_hub_refuses_is_one_line(server, tmp_path, hub, repository, path, message):
    kind, text = call(settings(server, tmp_path), "download_file", hub, repository, path)
    assert kind == "CheckpointError"
    assert text.startswith(f"{PREFIX[hub]}:{message}")


def test_a_revision_that_is_not_there_is_one_line(server, tmp_path):
    got = call(settings(server, tmp_path), "fetch_hub", "hf:org/plain@v9")
    assert got == ("CheckpointError", "hf:org/plain@v9: no such revision; check what follows the @")


@pytest.mark.parametrize("hub", HUBS)
def test_a_hub_out_of_reach_is_one_line(tmp_path, hub):
    environment = settings(None, tmp_path, MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS="1")
    kind, text = call(environment, "download_file", hub, "org/plain", "config.json")
    assert kind == "CheckpointError"
    assert text.startswith(f"{PREFIX[hub]}:org/plain: cannot be downloaded ([Errno ")
    assert text.endswith("); check the network and the name")


def test_offline_what_was_fetched_is_there_and_what_was_not_is_one_line(server, tmp_path):
    _, fetched = call(settings(server, tmp_path), "fetch_hub", "hf:org/plain")
    offline = settings(None, tmp_path, HF_HUB_OFFLINE="1")
    assert call(offline, "fetch_hub", "hf:org/plain") == ("ok", fetched)
    kind, text = call(offline, "fetch_hub", "hf:org/old")
    assert kind == "CheckpointError"
    assert text == (
        "hf:org/old: not downloaded yet, and HF_HUB_OFFLINE keeps it from being; unset that once"
    )


@pytest.mark.parametrize("hub", HUBS)
def test_a_snapshot_holds_no_code_and_no_pickle_beside_safetensors(server, tmp_path, hub):
    _, folder = call(settings(server, tmp_path), "fetch_hub", f"{PREFIX[hub]}:org/plain")
    found = {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()}
    assert found == {"config.json", "model.safetensors", "vocab.txt", NAMED_ODDLY}


@pytest.mark.parametrize("hub", HUBS)
def test_a_snapshot_without_safetensors_holds_the_older_weights(server, tmp_path, hub):
    _, folder = call(settings(server, tmp_path), "fetch_hub", f"{PREFIX[hub]}:org/old")
    assert {p.name for p in Path(folder).rglob("*")} == {"config.json", "pytorch_model.bin"}


def test_a_revision_is_asked_for(server, tmp_path):
    _, folder = call(settings(server, tmp_path), "fetch_hub", f"hf:org/plain@{REVISION}")
    assert Path(folder).name == REVISION


@pytest.mark.parametrize("spec", ["", "hf:", "hf:@main", "gs:org/name", "org/name", "模型", "：hf"])
def test_what_is_no_hub_name_is_one_line(spec):
    with pytest.raises(ConfigError, match="is no hub name, expected hf:ORG/NAME") as caught:
        fetch_hub(spec)
    assert "\n" not in str(caught.value)


def test_hub_name_is_what_fetch_hub_takes():
    assert hub_name("huggingface", "org/name") == "hf:org/name"
    assert hub_name("modelscope", "组织/模型", "v1") == "modelscope:组织/模型@v1"


@pytest.mark.skipif(find_spec("modelscope") is not None, reason="modelscope is installed")
def test_modelscope_without_its_library_names_the_extra():
    with pytest.raises(MissingExtraError, match=r"pip install 'm2encoder\[modelscope\]'"):
        download_file("modelscope", "org/name", "m.ckpt")


def test_removing_a_download_removes_the_link_and_the_file(tmp_path):
    (tmp_path / "blob").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "blob")
    remove_download(tmp_path / "link")
    remove_download(tmp_path / "link")  # gone already
    assert list(tmp_path.iterdir()) == []
