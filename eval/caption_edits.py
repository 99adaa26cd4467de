"""Turn a caption into one that is wrong in its colour, count, position, or in what belongs to what.

By word tables (hard_negative_words.json), where a rule is sure; everything else is left out with
a reason. Not for scoring (hard_negatives.py), nor for drawn scenes, which know their attributes.
"""

import json
import random
import re
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any, Literal, NamedTuple, get_args

Language = Literal["zh", "en"]
EditKind = Literal["colour", "count", "position", "swap"]
KINDS: tuple[EditKind, ...] = get_args(EditKind)

PLURAL = r"(?!this\b)(?:[A-Za-z]{3,}s|men|women|children|people|mice|geese|sheep|fish|deer)\b"
NO_NOUN = r"(?:of|another|day|time|who|that|is|has|can|more|or|and|by)\b"
NOUN_ENDS = r"(?=$|[.,;:!?]|\s+(?:and|with|in|on|at|is|near|by|under|behind|beside|to|of|from)\b)"
SIDE_BEFORE = re.compile(
    r"\b(?:on|to|at|from|in) (?:the|its|his|her|their|your|my) "
    r"(?:far |upper |lower |bottom |top )?$",
    re.IGNORECASE,
)
LONGEST_BEFORE = 40
"""Characters in which such words fit."""
SIDE_AFTER = re.compile(r" of\b|[- ]hand\b| side\b| corner\b", re.IGNORECASE)
BOUNDARY = re.compile(r"$|[\s，。、；：！？,.;:!?]")
JOINED = re.compile(r"[\s,，、/的和与與及或]*(?:and|or|&)?\s*(?:a |an |the )?")
"""Between two colours with nothing else between them: both describe one thing."""


class Attempt(NamedTuple):
    """A caption made wrong in one way, or why it could not be."""

    kind: EditKind
    text: str | None
    reason: str
    """Empty where there is a text."""


class Mention(NamedTuple):
    """A word of a table where it stands in a caption."""

    start: int
    end: int
    row: int
    """Which colour, count or pair of positions."""
    word: str


class _NotApplicable(Exception):
    """Why an edit cannot be made."""


def edit_caption(caption: str, kind: EditKind, language: Language, *, seed: int = 0) -> Attempt:
    """Return the caption with one attribute changed; the same arguments give the same text.

    colour: another colour. count: another number. position: left for right, above for below, ... in
    every place. swap: two colours, or two numbers, change places. Traditional characters stay so.
    Raises ValueError on another kind or language.
    """
    if kind not in KINDS or language not in get_args(Language):
        raise ValueError(f"kind {kind!r} in {language!r}, expected one of {KINDS} in zh or en")
    rng = random.Random(f"{seed}/{kind}/{caption}")
    try:
        text = _EDITS[kind](caption, language, rng)
    except _NotApplicable as why:
        return Attempt(kind, None, str(why))
    return Attempt(kind, text, "")


@cache
def words() -> dict[str, Any]:
    """Return the word tables."""
    path = resources.files("m2encoder.eval") / "hard_negative_words.json"
    return json.loads(path.read_text(encoding="utf-8"))


# ── the kinds ───────────────────────────────────────────────────────────────────────────────────


def _change_colour(text: str, language: Language, rng: random.Random) -> str:
    found = find_colours(text, language)
    if not found:
        raise _NotApplicable("no colour word")
    mention = rng.choice(found)
    present = {other.row for other in found}
    rows = [row for row in range(len(words()["colours"])) if row not in present]
    if not rows:
        raise _NotApplicable("every colour is in it already")
    new = _in_style(text, mention, rng.choice(rows), "colours", language)
    return _replaced(text, [(mention, new)], language)


def _change_count(text: str, language: Language, rng: random.Random) -> str:
    found = find_counts(text, language)
    if not found:
        if language == "en" and (one := _one_thing().search(text)):
            return _several(text, one, rng)
        raise _NotApplicable("no count word")
    mention = rng.choice(found)
    present = {other.row for other in found}
    lowest = 1 if language == "en" else 0  # "one" would need another form of the noun
    rows = [row for row in range(lowest, 5) if row not in present]
    if not rows:
        raise _NotApplicable("every small number is in it already")
    new = _in_style(text, mention, rng.choice(rows), "counts", language)
    return _replaced(text, [(mention, new)], language)


def _several(text: str, one: re.Match[str], rng: random.Random) -> str:
    """Turn "one red apple is" into "three red apples are"."""
    number = _cased(words()["counts"][rng.randrange(1, 5)]["en"][0], like=one["one"])
    rest = text[one.end() :]
    rest = re.sub(r"^(\s+)is\b", r"\1are", rest)
    return f"{text[: one.start()]}{number}{one['between']}{_plural(one['noun'])}{rest}"


def _change_position(text: str, language: Language, rng: random.Random) -> str:
    found = find_positions(text, language)
    if not found:
        raise _NotApplicable("no position word")
    pairs = words()["positions"][_script(text) if language == "zh" else "en"]
    axis = _axis(pairs[found[0].row])
    changed = []
    for mention in found:
        pair = pairs[mention.row]
        if _axis(pair) == axis:
            here = [word.lower() for word in pair].index(mention.word.lower())
            changed.append((mention, _cased(pair[1 - here], like=mention.word)))
    return _replaced(text, changed, language)


def _swap(text: str, language: Language, rng: random.Random) -> str:
    """Exchange two colours or, where there are not two, two counts."""
    reason = "fewer than two colours or counts"
    tables: list[tuple[str, Callable[..., list[Mention]]]]
    tables = [("colours", find_colours), ("counts", find_counts)]
    for table, find in tables:
        found = find(text, language)
        if len(found) < 2:
            continue
        first, second = found[:2]
        if first.row == second.row:
            reason = f"both {table} are the same"
        elif JOINED.fullmatch(text, first.end, second.start):
            reason = f"both {table} describe one thing"
        elif _noun_after(text, first) == _noun_after(text, second):
            reason = "both things have the same name"
        else:
            new = [
                (first, _in_style(text, first, second.row, table, language)),
                (second, _in_style(text, second, first.row, table, language)),
            ]
            return _replaced(text, new, language)
    raise _NotApplicable(reason)


_EDITS: dict[EditKind, Callable[[str, Language, random.Random], str]] = {
    "colour": _change_colour,
    "count": _change_count,
    "position": _change_position,
    "swap": _swap,
}


# ── finding words ───────────────────────────────────────────────────────────────────────────────


def find_colours(text: str, language: Language) -> list[Mention]:
    """Return every colour word, in order."""
    return _mentions(_colour_pattern(language), text, _rows("colours", language, bare=True))


def find_counts(text: str, language: Language) -> list[Mention]:
    """Return every number of things; in English from two, because "one" needs another noun."""
    rows = _rows("counts", language)
    digits = {str(row + 1): row for row in range(1, 9)} if language == "en" else {}
    return _mentions(_count_pattern(language), text, rows | digits)


def find_positions(text: str, language: Language) -> list[Mention]:
    """Return every word of position whose opposite is in the table, in order."""
    table = words()["positions"]
    pairs = table[_script(text) if language == "zh" else "en"]
    rows = {word: row for row, pair in enumerate(pairs) for word in pair}
    pattern = _alternatives(rows, whole=language == "en")
    return [m for m in _mentions(pattern, text, rows) if _is_place(text, m, language)]


def _is_place(text: str, mention: Mention, language: Language) -> bool:
    if language == "zh":
        alone = len(mention.word) == 1  # 上 and 下 mean much else, and 左右 "about"
        after = text[max(0, mention.start - 1) : mention.start] == "在"
        return not alone or bool(after and BOUNDARY.match(text, mention.end))
    if mention.word.lower() not in ("left", "right"):
        return True
    before = SIDE_BEFORE.search(text[max(0, mention.start - LONGEST_BEFORE) : mention.start])
    return bool(before or SIDE_AFTER.match(text, mention.end))


def _mentions(pattern: re.Pattern[str], text: str, rows: dict[str, int]) -> list[Mention]:
    return [
        Mention(*match.span("word"), rows[match["word"].lower()], match["word"])
        for match in pattern.finditer(text)
    ]


def _rows(table: str, language: Language, *, bare: bool = False) -> dict[str, int]:
    scripts = ("zh", "zh-Hant") if language == "zh" else ("en",)
    rows = {
        word: row
        for row, entry in enumerate(words()[table])
        for script in scripts
        for word in entry[script]
    }
    if bare and language == "zh":
        rows = {word[:-1]: row for word, row in rows.items()} | rows
    return rows


@cache
def _colour_pattern(language: Language) -> re.Pattern[str]:
    if language == "en":
        # "an orange" is a fruit, "orange cats" are not
        fruit = r"(?<=orange)(?!\s+(?!(?:and|or|is|are|on|in|at|with|of|that|to)\b)\w)"
        return re.compile(rf"\b{_group(_rows('colours', 'en'))}\b(?!{fruit})", re.IGNORECASE)
    full = list(_rows("colours", "zh"))
    table = words()
    after, before = table["bare_colour_stands_after"], table["bare_colour_stands_before"]
    bare = "|".join(sorted({word[:-1] for word in full}, key=len, reverse=True))
    whole = "|".join(sorted(full, key=len, reverse=True))
    return re.compile(
        rf"(?P<word>(?<![{table['no_colour_after']}])(?:{whole})"
        rf"|(?:(?<=[{after}\s，。,.])|(?<=^))(?:{bare})(?=[{before}]))"
    )


@cache
def _count_pattern(language: Language) -> re.Pattern[str]:
    rows = _rows("counts", language)
    if language == "en":
        numbers = "|".join([*(word for word, row in rows.items() if row), "[2-9]"])
        things = rf"(?=\s+(?!{NO_NOUN})(?:[A-Za-z-]+\s+){{0,2}}?{PLURAL})"
        return re.compile(
            rf"(?<![-\w.,:'])(?<!number )(?P<word>{numbers})(?![-\w]){things}", re.IGNORECASE
        )
    digits = "".join(rows)
    return re.compile(
        rf"(?<![第之几幾百千万萬\d每另同某这這那哪任{digits}])(?P<word>[{digits}])"
        rf"(?=[{words()['measure_words']}])"
    )


@cache
def _one_thing() -> re.Pattern[str]:
    described = "|".join([*_rows("colours", "en"), *words()["adjectives"]])
    return re.compile(
        rf"(?<![-\w])(?<!no )(?<!every )(?<!this )(?<!the )(?P<one>one)"
        rf"(?P<between>\s+(?:(?:{described})\s+)*)(?!(?:{described})\b)(?!{NO_NOUN})"
        rf"(?P<noun>[a-z]+){NOUN_ENDS}",
        re.IGNORECASE,
    )


def _alternatives(rows: dict[str, int], *, whole: bool) -> re.Pattern[str]:
    edge = r"\b" if whole else ""
    return re.compile(f"{edge}{_group(rows)}{edge}", re.IGNORECASE)


def _group(rows: dict[str, int]) -> str:
    return f"(?P<word>{'|'.join(sorted(rows, key=len, reverse=True))})"


# ── writing words ───────────────────────────────────────────────────────────────────────────────


def _script(text: str) -> str:
    return "zh-Hant" if set(text) & set(words()["traditional_characters"]) else "zh"


def _in_style(text: str, mention: Mention, row: int, table: str, language: Language) -> str:
    """Return the word of `row` in the form in which `mention` stands in the text."""
    entry = words()[table][row]
    if language == "zh":
        word: str = entry[_script(text)][0]
        return word.removesuffix("色") if not mention.word.endswith("色") else word
    if mention.word.isdigit():
        return str(row + 1)
    return _cased(entry["en"][0], like=mention.word)


def _replaced(text: str, changes: list[tuple[Mention, str]], language: Language) -> str:
    """Put each new word in place of its mention; English articles follow its first sound."""
    for mention, new in sorted(changes, reverse=True):
        start = mention.start
        article = re.search(r"\b(an?) $", text[max(0, start - 4) : start], re.IGNORECASE)
        if language == "en" and article:
            start -= len(article[0])
            fitting = "an" if new[0].lower() in "aeiou" else "a"
            new = f"{fitting.capitalize() if article[1][0].isupper() else fitting} {new}"
        text = text[:start] + new + text[mention.end :]
    return text


def _cased(word: str, *, like: str) -> str:
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word[0].upper() + word[1:] if like[0].isupper() else word


def _plural(noun: str) -> str:
    irregular = words()["irregular_plurals"]
    if noun.lower() in irregular:
        return _cased(irregular[noun.lower()], like=noun)
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(?:s|x|z|ch|sh)$", noun) else "s")


def _noun_after(text: str, mention: Mention) -> str:
    """Return the start of what a colour or count describes, enough to tell two things apart."""
    rest = text[mention.end :]
    if match := re.match(r"\s*([A-Za-z]+)", rest):
        return match[1].lower().removesuffix("s")
    return rest.lstrip("的大小" + words()["measure_words"])[:1]


def _axis(pair: list[str]) -> tuple[str, str]:
    """Return what tells the two words of a pair apart: 左 and 右 of 左边 and 右边."""
    if pair[0].isascii():
        return pair[0], pair[1]
    return next((a, b) for a, b in zip(*pair, strict=True) if a != b)
