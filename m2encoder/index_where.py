"""Conditions on a picture's metadata, such as `date>=2024`, as parameterised SQL.

Not for running them (index_items.py).
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from m2encoder.errors import ConfigError

CONDITION = re.compile(
    r"\s*(?P<field>[^\W\d][\w.-]*)\s*"
    r"(?P<operator><=|>=|!=|==?|<|>|\b(?:like|glob)\b)\s*(?P<value>.*?)\s*",
    re.IGNORECASE | re.DOTALL,
)
DATE = re.compile(r"\d{4}(-\d\d(-\d\d([ T]\d\d(:\d\d(:\d\d)?)?)?)?)?")
MAX_VALUE_CHARS = 10_000
"""SQLite refuses patterns of 50,000 bytes."""
IS_NUMBER = (
    "(typeof(atom) IN ('integer', 'real') OR "
    "(atom GLOB '*[0-9]*' AND atom NOT GLOB '*[^-+.0-9eE]*'))"
)
"""Of a value in the metadata, which may hold numbers as text."""
EXPECTED = (
    "expected FIELD OPERATOR VALUE with one of = != < <= > >= LIKE GLOB, for example date>=2024, "
    "\"name GLOB 'trips/*'\" or language=zh"
)


class Where(NamedTuple):
    """An SQL condition on the table `items`, and the values of its question marks."""

    sql: str
    parameters: tuple[Any, ...]


def compile_where(conditions: str | Sequence[str]) -> Where:
    """Compile conditions, all of which must hold. Raises ConfigError on anything else.

    Fields: `name`, `id`, `size` (bytes), `date` (when taken, else written; compared as far as the
    value goes: date=2024-05 is all of May), and every field of the metadata, `a.b` for one inside
    another (`meta.size` is the metadata's own `size`). A field that is a list meets a condition if
    one of its elements does; `!=` is the opposite of `=`, so it also holds where there is no such
    field. LIKE: % and _ are wildcards, case is ignored in ASCII. GLOB: *, ? and [...], case counts.
    Numbers compare as numbers, also where the metadata holds them as text; 'quoted' values as text.
    """
    given = [conditions] if isinstance(conditions, str) else list(conditions)
    compiled = [_compile(condition) for condition in given]
    sql = " AND ".join(f"({one.sql})" for one in compiled) or "1"
    return Where(sql, tuple(value for one in compiled for value in one.parameters))


def _compile(condition: str) -> Where:
    match = CONDITION.fullmatch(condition)
    if match is None or not match["value"]:
        raise ConfigError(f"condition {condition[:100]!r}: {EXPECTED}")
    field, operator, value = match["field"], match["operator"].upper(), match["value"]
    operator = "=" if operator == "==" else operator
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    value = value[1:-1] if is_quoted else value
    if len(value) > MAX_VALUE_CHARS or _is_unstorable(value):
        raise ConfigError(
            f"condition on {field}: a value of {len(value):,} characters, expected at most "
            f"{MAX_VALUE_CHARS:,} of valid Unicode; shorten it"
        )
    if field == "name":
        return Where(f"name {operator} ?", (value,))
    if field == "date":
        return _on_date(operator, value)
    number = None if is_quoted or operator in ("LIKE", "GLOB") else _number(value)
    if field in ("id", "size"):
        if number is None:
            raise ConfigError(
                f"condition {condition[:100]!r}: {field} is a number, expected = != < <= > >= and "
                f"a number"
            )
        return Where(f"{field} {operator} ?", (number,))
    return _on_meta(field.removeprefix("meta."), operator, value, number, is_quoted)


def _on_date(operator: str, value: str) -> Where:
    if operator in ("LIKE", "GLOB"):
        return Where(f"date {operator} ?", (value,))
    if not DATE.fullmatch(value):
        raise ConfigError(
            f"date {value[:100]!r}: expected YYYY, YYYY-MM, YYYY-MM-DD or YYYY-MM-DD HH:MM:SS"
        )
    return Where(f"substr(date, 1, {len(value)}) {operator} ?", (value.replace("T", " "),))


def _on_meta(field: str, operator: str, value: str, number: float | None, is_quoted: bool) -> Where:
    path = "$" + "".join(f'."{part}"' for part in field.split("."))
    negated, operator = ("NOT ", "=") if operator == "!=" else ("", operator)
    compared: str | float = value
    if not is_quoted and value in ("true", "false") and operator == "=":
        test = "type = ?"
    elif number is None:
        test = f"atom IS NOT NULL AND CAST(atom AS TEXT) {operator} ?"
    else:
        test, compared = f"{IS_NUMBER} AND CAST(atom AS REAL) {operator} ?", number
    found = f"EXISTS (SELECT 1 FROM json_each(items.meta, ?) WHERE {test})"
    return Where(negated + found, (path, compared))


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) and re.fullmatch(r"[-+.\deE]+", value) else None


def _is_unstorable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return True
    return False
