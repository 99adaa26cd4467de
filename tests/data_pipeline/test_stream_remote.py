"""Shards far away: the same batches through the cache, its bound, and what is refused.

Served by a real web server on this machine and by fsspec's file:// and memory://.
"""

import functools
import hashlib
import http.server
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest

from m2encoder.config import Data, Source
from m2encoder.data_pipeline.remote import RemoteFolder
from m2encoder.data_pipeline.shard_files import PackedShard
from m2encoder.data_pipeline.stream import TrainingStream
from m2encoder.data_pipeline.training_sources import source_texts
from m2encoder.errors import ConfigError, DataError
from m2encoder.released_tokenizer import load_tokenizer
from m2encoder.shards import ShardReader, write_shards


@pytest.fixture(scope="module")
def shards(tiny_shards, tmp_path_factory):
    """160 pairs in 8 shards."""
    folder = tmp_path_factory.mktemp("remote")
    write_shards(ShardReader(tiny_shards / "train"), folder, pairs_per_shard=20)
    return folder


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, counts what is asked for, and fails as often as it is told to."""

    asked: ClassVar[list[str]] = []
    failures = 0

    def do_GET(self):
        Server.asked.append(self.path)
        if Server.failures:
            Server.failures -= 1
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def server(shards):
    handler = functools.partial(Server, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


@pytest.fixture
def url(server, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Server.asked, Server.failures = [], 0
    return server


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_tokenizer(tiny_model_folder / "sp.model", max_length=24)


@pytest.fixture
def batches(tokenizer, tmp_path):
    def read(train, steps=(0, 12), **settings):
        data = replace(Data(train=train, batch_size=16, cache=str(tmp_path / "cache")), **settings)
        stream = TrainingStream(data, image_size=32, tokenizer=tokenizer, seed=1)
        return [(b.keys, b.pixels.numpy().tobytes(), b.texts) for b in stream.batches(*steps)]

    return read


def packed(folder, number):
    shard = ShardReader(folder).index.shards[number]
    return PackedShard.of(shard, shard.pairs)


def taken(cache):
    return {path.name: path.stat().st_size for path in Path(cache).glob("*.t[am][rp]")}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_web_server_gives_the_batches_of_a_folder(batches, shards, url, workers):
    assert batches(url, workers=workers) == batches(str(shards))
    tars = [path for path in Server.asked if path.endswith(".tar")]
    assert sorted(tars) == sorted(f"/{path.name}" for path in shards.glob("*.tar"))  # once each


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_fsspec_addresses_give_the_batches_of_a_folder(batches, shards, protocol):
    address = f"{protocol}://{shards}"
    if protocol == "memory":
        for path in shards.iterdir():
            with fsspec.open(f"memory://{path}", "wb") as file:
                file.write(path.read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    assert batches(address) == batches(str(shards))


def test_a_second_run_reads_from_the_cache(batches, shards, url):
    batches(url)
    Server.asked = []
    assert batches(url) == batches(str(shards))
    assert Server.asked == ["/index.json"]


def test_a_source_far_away_mixes_with_a_near_one(batches, shards, url, tiny_shards):
    far, near = (Source(url), Source(str(tiny_shards / "train"), weight=2))
    assert batches((far, near)) == batches((Source(str(shards)), near))


def test_the_cache_is_bounded_and_the_least_recently_used_goes(shards, url, tmp_path):
    wanted = [packed(shards, number) for number in range(8)]
    limit = sum(shard.size_bytes for shard in wanted[:3]) + 10_000
    folder = RemoteFolder(url, tmp_path, limit / 1e9)
    for shard in (0, 1, 2, 0, 3, 0, 4, 0, 5):  # 0 is used again before each next one comes
        path = folder.local(wanted[shard])
        assert hashlib.sha256(path.read_bytes()).hexdigest() == wanted[shard].sha256
        assert sum(taken(tmp_path).values()) <= limit
    assert Server.asked.count("/shard-000000.tar") == 1
    assert Server.asked.count("/shard-000001.tar") == 1
    assert f"{wanted[0].sha256}.tar" in taken(tmp_path)
    assert f"{wanted[1].sha256}.tar" not in taken(tmp_path)
    folder.local(wanted[1])
    assert Server.asked.count("/shard-000001.tar") == 2


def test_a_small_cache_gives_the_same_batches(batches, shards, url, tmp_path):
    limit = 2.5 * max(path.stat().st_size for path in shards.glob("*.tar"))
    assert batches(url, steps=(0, 4), cache_gb=limit / 1e9) == batches(str(shards), steps=(0, 4))
    assert sum(taken(tmp_path / "cache").values()) <= limit


def test_many_that_want_a_shard_fetch_it_once(shards, url, tmp_path):
    shard = packed(shards, 4)
    with ThreadPoolExecutor(8) as pool:  # each with a folder of its own, as processes have
        found = list(pool.map(lambda _: RemoteFolder(url, tmp_path, 1).local(shard), range(8)))
    assert len(set(found)) == 1
    assert Server.asked == ["/shard-000004.tar"]


def test_a_connection_that_fails_is_tried_again(shards, url, tmp_path):
    Server.failures = 1
    assert RemoteFolder(url, tmp_path, 1).local(packed(shards, 2)).is_file()
    assert Server.asked == ["/shard-000002.tar"] * 2


def test_prefetch_brings_a_shard_in_the_background(shards, url, tmp_path):
    folder, shard = RemoteFolder(url, tmp_path, 1), packed(shards, 6)
    assert not folder.prefetch(shard)
    assert not folder.prefetch(shard)  # asked for once
    folder.local(shard)  # waits for it
    assert folder.prefetch(shard)
    assert Server.asked == ["/shard-000006.tar"]


def test_a_shard_that_differs_from_its_index_is_refused_and_not_kept(shards, tmp_path):
    far = tmp_path / "far"
    far.mkdir()
    data = bytearray((shards / "shard-000001.tar").read_bytes())
    data[5000] ^= 1
    (far / "shard-000001.tar").write_bytes(data)
    folder = RemoteFolder(f"file://{far}", tmp_path / "cache", 1)
    with pytest.raises(DataError, match=r"bytes with sha256 .* the index says .* restore"):
        folder.local(packed(shards, 1))
    assert taken(tmp_path / "cache") == {}


def test_what_cannot_be_fetched_is_refused_in_one_line(batches, shards, url, tmp_path):
    with pytest.raises(ConfigError, match=r"far away, and data\.cache is not set"):
        batches(url, cache=None)
    with pytest.raises(DataError, match=r"nowhere/index\.json: not there, expected a shard folder"):
        batches(f"{url}/nowhere")
    with pytest.raises(DataError, match=r"nowhere/index\.json: not there, expected a shard folder"):
        batches(f"file://{tmp_path}/nowhere")
    with pytest.raises(ConfigError, match=r"data\.cache_gb is 0\.00; raise it"):
        RemoteFolder(url, tmp_path, 1e-6).local(packed(shards, 0))
    with pytest.raises(ConfigError, match="cannot be read here"):
        batches("nosuch://bucket/shards")


def test_captions_for_a_tokenizer_come_from_every_source(shards, url, tmp_path, tiny_shards):
    sources = (Source(url, languages=("zh",)), Source(str(tiny_shards / "val"), languages=("en",)))
    data = Data(train=sources, batch_size=16, cache=str(tmp_path))
    far, near = ShardReader(shards), ShardReader(tiny_shards / "val")
    expected = [text for pair in far for text in pair.captions["zh"]]
    expected += [text for pair in near for text in pair.captions["en"]]
    assert list(source_texts(data)) == expected
