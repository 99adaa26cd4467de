"""Write a folder of results complete or not at all, and never over a stranger's files.

Not for shards (shards.py) and training checkpoints (checkpoint.py), which have their own layouts.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m2encoder.errors import DataError


def check_replaceable(out_dir: Path, *, marker: str) -> None:
    """Raise DataError if `out_dir` exists, is not empty and has no file `marker` of ours in it."""
    if out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / marker).is_file():
        raise DataError(
            f"{out_dir}: holds other files (no {marker}), they would be lost; choose another folder"
        )
    if out_dir.exists() and not out_dir.is_dir():
        raise DataError(f"{out_dir}: is a file, expected a folder to write; choose another name")


@contextmanager
def complete_folder(out_dir: Path, *, marker: str) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `out_dir` when the block ends well.

    marker: a file that the block writes; an older folder is replaced only if it has that file.
    Raises DataError if something else is in the way or the place cannot be written.
    """
    check_replaceable(out_dir, marker=marker)
    temporary = out_dir.with_name(out_dir.name + ".tmp")
    old = out_dir.with_name(out_dir.name + ".old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by an interrupted run
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(old, ignore_errors=True)
        if out_dir.exists():
            out_dir.rename(old)
        temporary.rename(out_dir)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"{out_dir}: cannot be written ({reason}); choose a folder that can"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write indented UTF-8 JSON; Chinese stays readable."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read what `write_jsonl` wrote. Raises ValueError on damage, OSError if it is missing."""
    # Not str.splitlines: it also breaks at characters that a JSON string may hold, such as U+2028.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
