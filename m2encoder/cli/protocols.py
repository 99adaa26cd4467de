"""`m2enc eval protocols`: the evaluation protocols that we know, and what was published for them.

Not for measuring (evaluate.py).
"""

from dataclasses import asdict
from json import dumps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m2encoder.eval.protocols import EvalProtocol, Published

COLUMNS = ("t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10", "mean_recall", "top1")


def protocols(name: str | None = None, *, json: bool = False) -> int:
    """Name the evaluation protocols, or tell everything about one, published figures included.

    Args:
        name: A protocol, such as flickr30k-cn/5k; without one, all are listed.
        json: Print JSON instead of text.
    """
    from m2encoder.eval.protocols import get_protocol, known_protocols

    if name is not None:
        protocol = get_protocol(name)
        print(_json(_plain(protocol)) if json else "\n".join(_full(protocol)))
        return 0
    known = list(known_protocols().values())
    if json:
        print(_json([{k: v for k, v in _plain(p).items() if k != "published"} for p in known]))
        return 0
    rows = [("protocol", "task", "language", "pictures", "texts", "checked by")]
    print("\n".join(_aligned([*rows, *map(_row, known)])))
    return 0


def _json(value: Any) -> str:
    return dumps(value, ensure_ascii=False, indent=2)


def _plain(protocol: "EvalProtocol") -> dict[str, Any]:
    return asdict(protocol) | {"expected": protocol.expected}


def _row(protocol: "EvalProtocol") -> tuple[str, ...]:
    if protocol.labels:
        texts = f"{protocol.labels.count:,} names x {protocol.labels.num_templates}"
        check = "names, templates, counts"
    else:
        texts = _count(protocol.texts)
        check = "captions" if protocol.checksum else "counts" if protocol.texts else "script"
    return (protocol.id, protocol.task, protocol.language, _count(protocol.images), texts, check)


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _full(protocol: "EvalProtocol") -> list[str]:
    facts = [
        (
            "protocol",
            protocol.id + (f" (also {', '.join(protocol.aliases)})" * bool(protocol.aliases)),
        ),
        ("what", protocol.title),
        ("task", f"{protocol.task}, {protocol.language}, split {protocol.split}"),
        ("pictures", _count(protocol.images)),
        *_text_facts(protocol),
        ("directions", ", ".join(protocol.directions)),
        ("mean recall", ", ".join(protocol.mean_recall)),
        *(("texts", line) for line in protocol.text_preprocessing),
        *(("pictures", line) for line in protocol.image_preprocessing),
        *(("overlap", line) for line in protocol.overlaps),
        *(("note", line) for line in protocol.notes),
    ]
    lines = [f"{name + '  ':<14}{value}" for name, value in facts if value]
    return [*lines, "", *_published(protocol)]


def _text_facts(protocol: "EvalProtocol") -> list[tuple[str, str]]:
    labels = protocol.labels
    if labels is None:
        per = protocol.captions_per_image or {}
        spread = ", ".join(f"{count:,} with {k}" for k, count in per.items())
        return [
            ("captions", _count(protocol.texts) + (f" ({spread})" if spread else "")),
            ("checksum", protocol.checksum or "not known: results say unverified"),
            ("", ""),
            ("taken from", protocol.checksum_from or ""),
        ]
    return [
        ("class names", f"{labels.count:,} from {labels.source}, sha256 {labels.checksum[:12]}…"),
        ("shared names", ", ".join(labels.repeated)),
        (
            "templates",
            f"{labels.num_templates} from {labels.templates_source}, "
            f"sha256 {labels.templates_checksum[:12]}…",
        ),
    ]


def _published(protocol: "EvalProtocol") -> list[str]:
    rows = protocol.published
    if not rows:
        return ["no published figures known"]
    columns = [name for name in COLUMNS if any(name in row.values for row in rows)]
    columns += sorted({name for row in rows for name in row.values} - set(columns))
    table = [("published, %", *columns, "", "source")]
    table += [
        (
            row.model,
            *(_figure(row, name) for name in columns),
            _marks(protocol, row),
            "; ".join(source.text for source in row.sources),
        )
        for row in rows
    ]
    notes = [f"{row.model}: {row.note}" for row in rows if row.note]
    return [*_aligned(table), "", *_legend(protocol), *dict.fromkeys(notes)]


def _figure(row: "Published", name: str) -> str:
    if name not in row.values:
        return ""
    value = row.values[name]
    text = f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"
    return text + ("*" if name in row.computed else "")


def _marks(protocol: "EvalProtocol", row: "Published") -> str:
    other = "" if row.protocol == protocol.id else f"[{row.protocol or '?'}]"
    return other + (" 2nd" if row.second_hand else "")


def _legend(protocol: "EvalProtocol") -> list[str]:
    rows = protocol.published
    said = {
        "[?]: the source does not say which protocol": any(row.protocol is None for row in rows),
        "[name]: measured under that protocol, not comparable": any(
            row.protocol not in (None, protocol.id) for row in rows
        ),
        "*: computed from the figures beside it": any(row.computed for row in rows),
        "2nd: read in a page about the work, not in the work": any(r.second_hand for r in rows),
    }
    return [line for line, is_needed in said.items() if is_needed]


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
