"""Command-line words to a function's parameters: jsonargparse, with the habits people expect.

Dashes or underscores, a bare `--flag`, `--list A B`, one plain line per mistake. Not for what the
commands are (m2encoder/cli/__init__.py).
"""

import difflib
import inspect
import json
import re
from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
from typing import Any

from m2encoder.errors import ConfigError


def call_with_options(function: Callable[..., Any], name: str, words: Sequence[str]) -> Any:
    """Read `words` as the function's parameters and call it.

    Keyword-only parameters are options, the others positional (those with a default may be left
    out); dashes and underscores in option names are alike, and a bool alone means true. A function
    that names a dataclass as `options_class` is called with an instance of it, filled from
    `--config` (a file or the name of a shipped one) and from options named after its fields; its
    own keyword-only parameters are options too. Raises ConfigError with one line on anything
    unknown or ill-typed.
    """
    import jsonargparse

    options_class = getattr(function, "options_class", None)
    parameters = inspect.signature(function).parameters
    own_options = _own_options(function)
    positional = [] if options_class else [n for n in parameters if n not in own_options]
    lists = {n for n, p in parameters.items() if "list[" in str(p.annotation)}
    parser = _make_parser(function, name, positional)
    defaults = parser.get_defaults()
    optional = {n for n in positional if parameters[n].default is not inspect.Parameter.empty}
    known = {n for n in defaults.keys(branches=True) if n not in positional or n in optional}
    flags = {n for n in known if isinstance(defaults.get(n), bool)}
    try:
        spelled = _spelled(
            words, known=known, flags=flags, lists=lists, positional=positional, optional=optional
        )
        parsed = parser.parse_args(_composed(spelled) if options_class else spelled)
        for group in sorted(known - set(defaults.keys())):
            if not isinstance(parsed.get(group), jsonargparse.Namespace):
                found = parsed.get(group)
                raise ConfigError(f"{name}: {group}: expected a mapping of settings, got {found}")
        given = dict(parser.instantiate(parsed))
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(f"{name}: {_explained(str(error), known)}") from None
    if options_class is None:
        return function(**given)
    print_config, _ = (given.pop(n) for n in ("print_config", "config"))
    own = {n: given.pop(n) for n in own_options}
    cfg = options_class(**given)
    if print_config:
        from m2encoder.cli.configuration import to_yaml

        print(to_yaml(cfg), end="")
        return 0
    return function(cfg, **own)


def _own_options(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.items()
    return [n for n, p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


def _make_parser(function: Callable[..., Any], name: str, positional: Sequence[str]) -> Any:
    """Return a jsonargparse parser of the function's parameters or of its `options_class`."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class Parser(jsonargparse.ArgumentParser):
        def format_help(self) -> str:
            return _plain_help(super().format_help())

    # jsonargparse's own --print_config cannot write a tuple of dataclasses
    options: dict[str, Any] = {"exit_on_error": False, "print_config": None}
    parser = Parser(prog=f"m2enc {name}", description=_summary(function), **options)
    if options_class := getattr(function, "options_class", None):
        parser.add_argument("--config", action="config", help="YAML file or shipped name")
        parser.add_argument(
            "--print_config", type=bool, default=False, help="print the configuration and stop"
        )
        configuration = inspect.signature(function).parameters.keys() - set(_own_options(function))
        parser.add_function_arguments(function, as_group=False, skip=set(configuration))
        parser.add_class_arguments(options_class, None)
        return parser
    rest = inspect.signature(function).parameters.keys() - set(positional)
    for as_positional, skip in ((True, rest), (False, set(positional))):
        parser.add_function_arguments(
            function, as_group=False, as_positional=as_positional, skip=set(skip)
        )
    return parser


def _summary(function: Callable[..., Any]) -> str:
    text = (function.__doc__ or "").strip()
    return text.split("\n\n")[0].replace("\n", " ")


def _plain_help(text: str) -> str:
    """Show option names with dashes, flags without a value, and lists as words."""
    text = re.sub(r"--[a-z][\w.]*", lambda m: m[0].replace("_", "-"), text)
    text = re.sub(r"(--[a-z][\w.-]*) \{true,false\}", r"\1", text)
    text = re.sub(r"<class\s+'(\w+)'>", r"\1", text)
    return re.sub(r"'\[\"[A-Z]+1\",...\]'( \| LIST_OF_PATHS_FILE \| -)?", "PATH ...", text)


def _spelled(
    words: Sequence[str],
    *,
    known: Collection[str],
    flags: Collection[str],
    lists: Collection[str],
    positional: Sequence[str],
    optional: Collection[str],
) -> list[str]:
    """Write each option as `--name=value`, a list as JSON, and positional words last.

    A word in the place of an `optional` parameter becomes an option: jsonargparse knows no other.
    Raises ConfigError on an option that is not known.
    """
    spelled: list[str] = []
    places: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "-h" or not re.match(r"--[A-Za-z]", word):
            (spelled if word == "-h" else places).append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name == "help" or name.endswith(".help"):
            spelled.append("--" + name + equals + value)
            continue
        if name.removesuffix("+") not in known:
            raise ConfigError(f"unknown option --{_dashed(name)}{_did_you_mean(name, known, '--')}")
        if name in lists and not value.startswith("["):
            values = [value] if equals else list(takewhile(lambda w: not w.startswith("--"), rest))
            rest = rest if equals else rest[len(values) :]
            equals, value = "=" if values else "", json.dumps(values, ensure_ascii=False)
        elif name in flags and not equals and rest[:1] not in (["true"], ["false"]):
            equals, value = "=", "true"
        elif not equals and rest and not rest[0].startswith("--"):
            equals, value = "=", rest.pop(0)
        spelled.append("--" + name + equals + value if equals else "--" + name)
    last = len(positional) - 1
    if positional and positional[last] in lists and len(places) > last:
        places[last:] = [json.dumps(places[last:], ensure_ascii=False)]
    for i, name in enumerate(positional[: len(places)]):
        places[i] = f"--{name}={places[i]}" if name in optional else places[i]
    return spelled + places


def _composed(words: list[str]) -> list[str]:
    """Put configurations and presets in as JSON text."""
    from m2encoder.cli.configuration import compose_config, compose_model

    composers = {"--config": compose_config, "--model": compose_model}
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if equals and name in composers:
            words[i] = f"{name}={composers[name](value)}"
    return words


def _explained(message: str, known: Collection[str]) -> str:
    """Say what jsonargparse found wrong in plain words."""
    text = " ".join(message.split())
    if m := re.match(r"(?:Group '([\w.]+)' does not accept option|Option) '([\w.]+)'", text):
        name = ".".join(filter(None, m.groups()))
        return f"unknown setting {name}{_did_you_mean(name, known)}"
    if m := re.match(r"Parser key \"([\w.]+)\": Unable to load config '(.*?)'", text):
        return f"{m[1]}: expected a mapping of settings or a YAML file of them, got {m[2]}"
    union = r"(.*): Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] "
    if m := re.search(union + r".*Given value: (.*)", text):
        kinds = [re.sub(r"<class '([\w.]+)'>", r"\1", kind) for kind in m[2].split(", ")]
        wanted = " or ".join("null" if kind == "NoneType" else kind for kind in kinds)
        name = re.sub(r"Parser key .([\w.]+).", r"\1", m[1])
        return f"{name}: expected {wanted}, got {m[3]}"
    text = re.sub(r"Problem with given class_path '[\w.]+': ", "", text)
    text = re.sub(r"Parser key \"([\w.]+)\":", r"\1:", text)
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text)
    text = re.sub(r"Expected an? (typing\.)?Literal\[(.*?)\]", r"expected one of \2", text)
    return re.sub(r"Expected an? (.*?)\. Got value:", r"expected \1, got", text).replace(
        ". Got value:", ", got"
    )


def _did_you_mean(name: str, known: Collection[str], prefix: str = "") -> str:
    """Return "; did you mean ...?" with the option spelled most like `name`."""
    last = name.rpartition(".")[2]
    close = difflib.get_close_matches(name, sorted(known), n=1)
    close = close or [n for n in sorted(known) if n.rpartition(".")[2] == last][:1]
    close = [_dashed(n) if prefix else n for n in close]
    return f"; did you mean {prefix}{close[0]}?" if close else "; --help names those that exist"


def _dashed(name: str) -> str:
    return name.replace("_", "-")
