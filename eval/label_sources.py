"""Find out what a path holds, and open it as pictures with the class of each, as the data says it.

Not for the order of classes and for what is left out (datasets.py), nor for captions.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.annotations import text_lines
from m2encoder.eval.caption_sources import find_files
from m2encoder.eval.foreign_tars import Sample, TarPictures, read_samples
from m2encoder.eval.picture_sources import CifarPictures
from m2encoder.images import list_images
from m2encoder.pictures import FilePictures, Pictures, ShardPictures
from m2encoder.shards import INDEX_NAME, ShardReader
from m2encoder.tar_members import list_tars

PICKLES = frozenset({"data_batch_1", "test_batch", "batches.meta", "meta"})
SPLITS = frozenset({"train", "test", "val", "valid", "validation"})
CIFAR_KINDS = (("test_batch.bin", 1, "batches.meta.txt"), ("test.bin", 2, "fine_label_names.txt"))
"""File of the test split, bytes of label, file of the labels' names."""


class Labelled(NamedTuple):
    """Pictures, and what the data calls the class of each; None where it does not say."""

    pictures: Pictures
    values: list[str | None]
    labels: list[str] | None = None
    """Every class in order, where the data states them."""
    missing: frozenset[int] = frozenset()
    """Pictures that are not there."""
    notes: tuple[str, ...] = ()


def open_labelled(path: Path, *, images: Path | None, label_key: str | None) -> Labelled:
    """Open what a path holds; see datasets.read_labelled. Raises DataError, ConfigError."""
    if path.is_file():
        if path.suffix.lower() == ".jsonl":
            return _json_lines(path, images or path.parent, label_key or "label")
        if path.suffix.lower() == ".tar":
            return _tars(path, label_key)
        raise DataError(f"{path}: expected a folder, a tar or a .jsonl of pictures and labels")
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder, expected labelled pictures")
    if (path / INDEX_NAME).is_file():
        return _shards(path, label_key)
    for name, label_bytes, names in CIFAR_KINDS:
        if (path / name).is_file():
            return _cifar(path / name, label_bytes, path / names)
    if pickles := sorted(PICKLES & {child.name for child in path.iterdir() if child.is_file()}):
        raise DataError(
            f"{path}: {pickles[0]} is a Python pickle, which can run any code when it is opened; "
            f"take CIFAR's binary version, or a folder for each class"
        )
    return _tars(path, label_key) if list_tars(path) else _class_folders(path)


def _shards(folder: Path, label_key: str | None) -> Labelled:
    if label_key is None:
        raise ConfigError(f"{folder}: say which key of its meta holds the label of each picture")
    reader = ShardReader(folder)
    values: list[str | None] = []
    for shard in reader.index.shards:
        with (folder / shard.name).open("rb") as file:
            for entry in shard.pairs:
                offset, size = entry["json"]
                file.seek(offset)
                try:
                    value = json.loads(file.read(size))["meta"].get(label_key)
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise DataError(
                        f"{folder / shard.name}: pair {entry['key']!r} is damaged; restore the file"
                    ) from None
                values.append(_label(f"{folder}, {entry['key']}", value))
    return Labelled(ShardPictures(reader), values)


def _label(where: str, value: Any) -> str | None:
    if value is None or (isinstance(value, str | int) and not isinstance(value, bool)):
        return None if value is None else str(value).strip() or None
    raise DataError(f"{where}: label {str(value)[:40]!r}, expected a name or a number")


def _json_lines(path: Path, folder: Path, label_key: str) -> Labelled:
    names: list[str] = []
    values: list[str | None] = []
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
            names.append(record["image"])
            values.append(_label(where, record.get(label_key)))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(
                f'{where}: {line[:40]!r}, expected {{"image": ..., "{label_key}": ...}}'
            ) from None
    if len(set(names)) != len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))
        raise DataError(f"{path}: {twice} is listed twice; a picture has one label, correct it")
    found = find_files(names, folder)
    return Labelled(found.pictures, values, missing=frozenset(found.missing))


def _tars(path: Path, label_key: str | None) -> Labelled:
    samples = [sample for sample in read_samples(path) if sample.image is not None]
    if not samples:
        raise DataError(f"{path}: no pictures in its tars; check the path")
    values = [_tar_label(path, sample, label_key) for sample in samples]
    return Labelled(TarPictures(samples), values)


def _tar_label(path: Path, sample: Sample, label_key: str | None) -> str | None:
    """A number or name in `.cls`, as CLIP_benchmark writes it, or a key of the JSON."""
    where = f"{path}, sample {sample.key}"
    if label_key is None and "cls" in sample.others:
        return _label(where, sample.text("cls").strip())
    return _label(where, sample.record().get(label_key or "label"))


def _cifar(path: Path, label_bytes: int, names: Path) -> Labelled:
    pictures = CifarPictures([path], label_bytes=label_bytes)
    numbers = pictures.labels().tolist()
    if not names.is_file():
        return Labelled(pictures, [str(number) for number in numbers])
    labels = [line.strip() for line in text_lines(names) if line.strip()]
    if max(numbers) >= len(labels):
        raise DataError(
            f"{path}: a label {max(numbers)}, but {names.name} has {len(labels)} names; are both "
            f"of the same data set?"
        )
    return Labelled(pictures, [labels[number] for number in numbers], labels)


def _class_folders(folder: Path) -> Labelled:
    """A folder for each class, as torchvision's ImageFolder and CN-CLIP's data sets have it."""
    children = sorted(
        child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")
    )
    splits = [child.name for child in children if child.name.lower() in SPLITS]
    if children and len(splits) == len(children):
        raise DataError(f"{folder}: holds the splits {', '.join(splits)}; name one of the folders")
    if len(children) < 2:
        raise DataError(
            f"{folder}: {len(children)} folders, expected one for each class with its pictures"
        )
    paths: list[Path] = []
    values: list[str | None] = []
    empty: list[str] = []
    for child in children:
        of_class = list_images(child)
        paths += of_class
        values += [child.name] * len(of_class)
        empty += [] if of_class else [child.name]
    loose = [p for p in list_images(folder) if p.parent == folder]
    paths += loose
    values += [None] * len(loose)
    notes = [f"{len(empty):,} classes have no pictures, such as {empty[0]}"] if empty else []
    names = [path.relative_to(folder).as_posix() for path in paths]
    labels = sorted((child.name for child in children), key=class_order(children))
    return Labelled(FilePictures(names, paths), values, labels, notes=tuple(notes))


def class_order(folders: list[Path]) -> Callable[[str], Any]:
    """Return the key that sorts class folders: by number where all are numbers, else by name.

    Sorted as text, 10 would come before 2, and every label behind it would be another class.
    """
    return int if all(child.name.isdecimal() for child in folders) else str
