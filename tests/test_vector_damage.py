"""Stored vectors that are damaged, or whose job was killed: noticed, and computed again.

Not for what is stored under which key (test_vector_store.py).
"""

import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from stored_vectors import KEY, parts, same
from tiny_pictures import CountedReads, listed

from m2encoder.embed import embed_pictures
from m2encoder.vector_store import VectorStore
from m2encoder.vector_table import TRUNCATED, WHOLE, Span, VectorTable


@pytest.fixture
def store(tmp_path):
    return VectorStore(tmp_path / "vectors")


@pytest.fixture
def counted(tmp_path):
    """23 pictures, two of them bad, that count what is read of them."""
    return CountedReads(listed(23, bad={3, 11}), tmp_path / "reads")


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def header_end(content):
    return content.index(b"\n", content.index(b"\n") + 1) + 1


DAMAGES = {
    "hash": lambda content: flipped(content, 5),
    "header": lambda content: flipped(content, content.index(b'"bad"') + 9),
    "format": lambda content: content.replace(b'"format": 1', b'"format": 9'),
    "states": lambda content: flipped(content, header_end(content) + 2),
    "vectors": lambda content: flipped(content, len(content) - 50),
    "cut off": lambda content: content[:-1],
    "cut in the header": lambda content: content[:90],
    "too long": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "other file": lambda content: b"\n[1, 2]\n" + content,
    "not even text": lambda content: bytes(range(256)) * 8,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_noticed_and_computed_again(tiny_encoder, store, counted, caplog, damage):
    plain = embed_pictures(tiny_encoder, counted, on_error="skip", store=store)
    (path,) = parts(store)
    content = path.read_bytes()
    path.write_bytes(DAMAGES[damage](content))
    assert path.read_bytes() != content
    counted.positions()
    with caplog.at_level(logging.WARNING):
        same(embed_pictures(tiny_encoder, counted, on_error="skip", store=store), plain)
    assert sorted(counted.positions()) == list(range(23))
    assert f"{path}: damaged (" in caplog.text
    assert path.read_bytes() == content


def test_a_part_of_another_key_is_never_taken(tiny_encoder, store, caplog):
    embed_pictures(tiny_encoder, listed(5), store=store)
    (theirs,) = parts(store)
    embed_pictures(tiny_encoder, listed(5, seed=1), store=store)
    (mine,) = set(parts(store)) - {theirs}
    mine.write_bytes(theirs.read_bytes())
    with caplog.at_level(logging.WARNING):
        found = embed_pictures(tiny_encoder, listed(5, seed=1), store=store)
    assert "holds other vectors" in caplog.text
    same(found, embed_pictures(tiny_encoder, listed(5, seed=1)))


def table_of(rows, count=10):
    table = VectorTable(count, 4)
    for row in rows:
        table.vectors[row] = row + 1
        table.states[row] = TRUNCATED if row % 3 == 0 else WHOLE
    return table


def test_one_damaged_part_of_several_loses_its_own_rows_only(store):
    stored = store.open(KEY)
    table = table_of(range(10))
    table.set_bad(4, "坏图，全角！\ud83d")
    for span in (Span(0, 3), Span(3, 6), Span(6, 10)):
        stored.add(table, span)
        stored.flush(table)
    path = parts(store)[2]
    path.write_bytes(path.read_bytes()[:-1])
    found = VectorTable(10, 4)
    store.open(KEY).load(found)
    assert found.states.tolist() == [*table.states[:6], 0, 0, 0, 0]
    np.testing.assert_array_equal(found.vectors[:6], table.vectors[:6])
    assert found.reasons == table.reasons == {4: "坏图，全角！\ud83d"}


def test_rows_without_a_gap_are_written_together_and_joined_at_the_end(store):
    stored = store.open(KEY)
    table = table_of(range(10))
    for span in (Span(0, 2), Span(2, 3), Span(5, 8), Span(8, 10)):
        stored.add(table, span)
    stored.flush(table)
    names = [path.name for path in parts(store)]
    assert names == ["0000000000-0000000003.part", "0000000005-0000000010.part"]
    stored.finish(table)
    assert [path.name for path in parts(store)] == ["0000000000-0000000010.part"]
    found = VectorTable(10, 4)
    store.open(KEY).load(found)
    assert found.truncated == 4
    np.testing.assert_array_equal(found.states, table.states)


# --- kill -9 ------------------------------------------------------------------------------------

VICTIM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from tiny_pictures import CountedReads, listed
from m2encoder.embed import embed_pictures
from m2encoder.load import load_model
from m2encoder.vector_store import VectorStore
encoder = load_model(sys.argv[1], device="cpu")
pictures = CountedReads(listed(60, bad={7}), Path(sys.argv[3]), seconds=0.03)
store = VectorStore(sys.argv[2], flush_s=0.01)
embed_pictures(encoder, pictures, batch_size=2, on_error="skip", store=store)
"""


def killed(command, log, *, reads, delay_s=0.0):
    """Run until that many pictures were read, then kill; says whether the job was still running."""
    log.write_text("")
    with subprocess.Popen(command) as victim:
        while victim.poll() is None and len(log.read_text().split()) < reads:
            time.sleep(0.001)
        time.sleep(delay_s)
        victim.send_signal(signal.SIGKILL)
    return victim.returncode == -signal.SIGKILL


@pytest.fixture
def job(tiny_model_folder, tmp_path):
    """60 slow pictures, one of them bad, and the command that encodes them into tmp_path/vectors"""
    pictures = CountedReads(listed(60, bad={7}), tmp_path / "reads")
    here = Path(__file__).parent
    where = (tiny_model_folder, tmp_path / "vectors", pictures.log, here)
    return pictures, [sys.executable, "-c", VICTIM, *map(str, where)]


def test_a_killed_job_goes_on_where_it_was(tiny_encoder, job, tmp_path):
    """Killed three times, after a few more pictures each."""
    pictures, command = job
    plain = embed_pictures(tiny_encoder, pictures, batch_size=2, on_error="skip")
    for few in (5, 23, 11):
        assert killed(command, pictures.log, reads=few)
    store = VectorStore(tmp_path / "vectors")
    assert parts(store)
    pictures.positions()
    found = embed_pictures(tiny_encoder, pictures, batch_size=2, on_error="skip", store=store)
    same(found, plain)
    assert 0 < len(pictures.positions()) < 60 - 8
    assert [path.name for path in parts(store)] == ["0000000000-0000000060.part"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_whatever_a_kill_leaves_is_whole_and_right(tiny_encoder, job, tmp_path, seed):
    """Killed at random moments until it has finished."""
    pictures, command = job
    plain = embed_pictures(tiny_encoder, pictures, batch_size=2, on_error="skip")
    moment = random.Random(seed)
    while killed(command, pictures.log, reads=moment.randint(1, 40), delay_s=moment.random() / 10):
        store = VectorStore(tmp_path / "vectors")
        for entry in store.entries():
            assert entry.key is not None
            table = VectorTable(60, tiny_encoder.dim)
            store.open(entry.key).load(table)
            for part in parts(store):
                assert table.has(Span(*map(int, part.stem.split("-"))))
            found = plain.vectors[np.searchsorted(plain.kept, table.kept)]
            np.testing.assert_array_equal(table.vectors[table.kept], found)
    store = VectorStore(tmp_path / "vectors")
    same(embed_pictures(tiny_encoder, pictures, batch_size=2, on_error="skip", store=store), plain)


def test_a_half_written_file_of_a_killed_job_is_never_read(tiny_encoder, store):
    plain = embed_pictures(tiny_encoder, listed(5), store=store)
    (path,) = parts(store)
    old, young = (path.with_name(f"{path.name}.{i}-ab.tmp") for i in (1, 2))
    for half in (old, young):
        half.write_bytes(path.read_bytes()[:40])
    os.utime(old, (1, 1))
    path.unlink()
    same(embed_pictures(tiny_encoder, listed(5), store=store), plain)
    assert not old.exists()  # while the young one may be another process's
    assert young.exists()
