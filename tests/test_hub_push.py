"""Uploading a model folder, to a hub on this machine: what arrives, and what is said when not.

In processes of their own, because the hub's library reads its settings when it is imported. Not for
downloads (test_hub.py).
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from consumers.upload_server import UploadServer, upload_server

from m2encoder.encoder import Encoder
from m2encoder.errors import M2EncoderError
from m2encoder.load import load_model
from m2encoder.publish import push_to_hub

PUSH = """
import json, sys
from m2encoder.errors import M2EncoderError
from m2encoder.load import load_model
from m2encoder.publish import push_to_hub
encoder = load_model(sys.argv[1], device="cpu")
said = []
for options in json.loads(sys.argv[2]):
    try:
        said.append(push_to_hub(encoder, **options))
    except M2EncoderError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def push(endpoint: str, folder: Path, scratch: Path, *calls: dict[str, Any]) -> list[str]:
    """Return the address, or the error's one line, of each call."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(scratch / "hf")}
    settings["HF_HUB_DISABLE_XET"] = "1"  # the hub's newer storage, which this server has not
    ran = subprocess.run(
        [sys.executable, "-c", PUSH, str(folder), json.dumps(calls)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """A hub after a few uploads: what was said, and what it holds."""
    scratch = tmp_path_factory.mktemp("push")
    with upload_server() as server:
        server.repositories["org/again"] = {
            "model-00001-of-00002.safetensors": b"old",
            "README.md": b"old",
            "calibration.json": b"of other weights",
            "图.png": b"mine",
        }
        said = push(
            server.url,
            tiny_model_folder,
            scratch,
            {"repo_id": "org/new", "token": "hf_token", "license": "apache-2.0", "private": True},
            {"repo_id": "org/again", "token": "hf_token"},
            {"repo_id": "mine", "token": "hf_token"},
            {"repo_id": "org/new", "token": "hf_reader"},
            {"repo_id": "org/new", "token": "hf_unknown"},
            {"repo_id": "not a name", "token": "hf_token"},
        )
        yield server, said, scratch


def test_what_arrives_opens_and_gives_equal_vectors(hub, tiny_encoder: Encoder) -> None:
    server, said, scratch = hub
    assert said[0] == f"{server.url}/org/new"
    folder = scratch / "received"
    folder.mkdir()
    for name, content in server.repositories["org/new"].items():
        (folder / name).write_bytes(content)
    texts = ["一只红色的猫", "繁體", "a red cat", "👨‍👩‍👧‍👦", "ｆｕｌｌ", "long " * 200]
    received = load_model(folder, device="cpu")
    assert np.array_equal(received.encode_text(texts), tiny_encoder.encode_text(texts))
    assert received.fingerprint == tiny_encoder.fingerprint


def test_what_arrives_is_the_folder_byte_for_byte(hub, tiny_model_folder: Path) -> None:
    received = hub[0].repositories["org/new"]
    sent = {path.name: path.read_bytes() for path in tiny_model_folder.iterdir()}
    assert received.keys() == sent.keys()
    assert "modules.json" in received
    for name in sent.keys() - {"README.md", "tokenizer_config.json", "special_tokens_map.json"}:
        assert received[name] == sent[name], name  # those three: see test_save.py


def test_the_card_names_the_repository_and_the_licence(hub) -> None:
    card = hub[0].repositories["org/new"]["README.md"].decode()
    assert "license: apache-2.0" in card
    assert 'load_model("hf:org/new")' in card
    assert 'SentenceTransformer("org/new", trust_remote_code=True)' in card
    assert "path/to/this/folder" not in card


def test_an_upload_is_one_commit_and_private_if_asked(hub) -> None:
    server: UploadServer = hub[0]
    assert server.commits == ["Upload model with m2encoder"] * 3
    assert server.private == {"org/new": True, "someone/mine": False}


def test_a_second_upload_leaves_no_weights_of_the_first_and_nobody_elses_files(hub) -> None:
    server, said, _ = hub
    assert said[1] == f"{server.url}/org/again"
    again = server.repositories["org/again"]
    assert again["图.png"] == b"mine"
    assert again["README.md"] != b"old"
    assert [name for name in again if name.endswith(".safetensors")] == ["model.safetensors"]
    assert "calibration.json" not in again


def test_a_name_without_an_organisation_is_the_users_own(hub) -> None:
    assert hub[1][2] == f"{hub[0].url}/someone/mine"


def test_refusals_are_one_line(hub) -> None:
    assert hub[1][3:] == [
        "org/new: the token may not write there; take one with write access to it",
        "org/new: not logged in, or the token is not valid; run `hf auth login`, or give a token",
        "not a name: no name of a repository, expected ORG/NAME",
    ]


def test_a_hub_that_breaks_off_or_is_not_there_is_one_line(tiny_model_folder, tmp_path):
    call = {"repo_id": "org/new", "token": "hf_token"}
    with upload_server() as server:
        server.broken = True
        (said,) = push(server.url, tiny_model_folder, tmp_path, call)
        assert said == "org/new: the server answered 503; try again later"
        assert server.repositories["org/new"] == {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (said,) = push(
            f"http://127.0.0.1:{free.getsockname()[1]}", tiny_model_folder, tmp_path, call
        )
    assert said.startswith("org/new: cannot be reached (")
    assert said.endswith("); check the network")
    assert "\n" not in said


def test_offline_is_one_line(tiny_encoder: Encoder) -> None:
    with pytest.raises(M2EncoderError, match="org/new: HF_HUB_OFFLINE keeps from uploading"):
        push_to_hub(tiny_encoder, "org/new", token="hf_token")
