"""The command line: a table of commands, each a typed function that jsonargparse reads.

Nothing heavy is imported before a command is known, so `m2enc --help` answers at once.
"""

import argparse
import difflib
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from itertools import takewhile
from typing import Any, NamedTuple

from m2encoder.errors import ConfigError, M2EncoderError


class Command(NamedTuple):
    """Where a command's function lies, and what it does in a few words."""

    module: str
    function: str
    summary: str


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "demo", "demo", "everything once: data, training, evaluation, search, a report"
    ),
    "pretrain": Command("pretrain", "pretrain", "train a model"),
    "data demo": Command("data", "demo", "make a small bilingual data set: scenes or emoji"),
    "data verify": Command("data", "verify", "check a shard folder against its index"),
    "tokenizer train": Command("tokenizer", "train", "train a bilingual SentencePiece tokenizer"),
    "eval retrieval": Command("evaluate", "retrieval", "recall@k between pictures and captions"),
    "eval zero-shot": Command("evaluate", "zero_shot", "accuracy on classes described in words"),
    "embed": Command("search", "embed", "write the vectors of pictures or texts"),
    "index": Command("search", "index", "build a search index of pictures"),
    "search": Command("search", "search", "find pictures by Chinese, English or another picture"),
    "config list": Command("configuration", "list_configs", "name the shipped configurations"),
    "config cp": Command("configuration", "copy_config", "copy a shipped configuration to edit it"),
}

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
EPILOG = (
    "Every command explains itself with --help. Results go to stdout, messages to stderr. --debug "
    "shows tracebacks, --quiet hides messages. Exit codes: 0 ok, 1 failure, 2 usage, 3 bad data, "
    "4 done but some items were skipped, 130 interrupted."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    flags = {flag for flag in ("--debug", "--quiet") if flag in words}
    words = [word for word in words if word not in flags]
    level = logging.WARNING if "--quiet" in flags else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    for chatty in ("httpx", "faiss"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        return _run(words)
    except M2EncoderError as error:
        return _fail(str(error), error.exit_code, "--debug" in flags)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED, False)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        return _fail(f"{type(error).__name__}: {reason}", EXIT_FAILURE, "--debug" in flags)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        logging.getLogger(__name__).exception("traceback:")
    print(f"m2enc: {' '.join(message.split())}", file=sys.stderr)
    return code


def _run(words: list[str]) -> int:
    if words and words[0] == "--version":
        from m2encoder import __version__

        print(__version__)
        return 0
    name = next((n for n in (" ".join(words[:2]), *words[:1]) if n in COMMANDS), None)
    if name is None:
        return _help(words)
    command = COMMANDS[name]
    function = getattr(import_module(f"m2encoder.cli.{command.module}"), command.function)
    return int(call_with_options(function, name, words[len(name.split()) :]) or 0)


def _help(words: list[str]) -> int:
    group = words[0] if words and not words[0].startswith("-") else ""
    shown = {n: c for n, c in COMMANDS.items() if not group or n.startswith(group + " ")}
    wanted = not words or words[-1] in ("-h", "--help")
    if not shown or not (wanted or (group and len(words) == 1)):
        known = ", ".join(COMMANDS)
        raise ConfigError(f"no command {' '.join(words[:2])!r}; expected one of: {known}")
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {n.ljust(width)}{c.summary}" for n, c in shown.items()]
    parser = argparse.ArgumentParser(
        prog="m2enc",
        usage="m2enc COMMAND [OPTIONS]",
        description="Chinese-English image-text encoders.\n\ncommands:\n" + "\n".join(lines),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    print(parser.format_help(), end="")
    return 0 if wanted else EXIT_USAGE


def call_with_options(function: Callable[..., Any], name: str, words: Sequence[str]) -> Any:
    """Read `words` as the function's parameters and call it.

    Keyword-only parameters are options, the others positional; dashes and underscores in option
    names are alike, and a bool alone means true. A function that names a dataclass as
    `options_class` is called with an instance of it, filled from `--config` (a file or the name of
    a shipped one) and from options named after its fields. Raises ConfigError with one line on
    anything unknown or ill-typed.
    """
    import jsonargparse

    options_class = getattr(function, "options_class", None)
    parameters = {} if options_class else inspect.signature(function).parameters
    positional = [n for n, p in parameters.items() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    lists = {n for n, p in parameters.items() if "list[" in str(p.annotation)}
    parser = _make_parser(function, name, positional)
    defaults = parser.get_defaults()
    known = {n for n in defaults.keys(branches=True) if n not in positional}
    flags = {n for n in known if isinstance(defaults.get(n), bool)}
    try:
        spelled = _spelled(words, known=known, flags=flags, lists=lists, positional=positional)
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
    dry_run, print_config, _ = (given.pop(n) for n in ("dry_run", "print_config", "config"))
    cfg = options_class(**given)
    if print_config:
        from m2encoder.cli.configuration import to_yaml

        print(to_yaml(cfg), end="")
        return 0
    return function(cfg, dry_run=dry_run)


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
        for flag, text in (
            ("dry_run", "print the plan and stop"),
            ("print_config", "print the configuration and stop"),
        ):
            parser.add_argument(f"--{flag}", type=bool, default=False, help=text)
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
    return re.sub(r"'\[\"[A-Z]+1\",...\]'( \| LIST_OF_PATHS_FILE \| -)?", "PATH ...", text)


def _spelled(
    words: Sequence[str],
    *,
    known: Collection[str],
    flags: Collection[str],
    lists: Collection[str],
    positional: Sequence[str],
) -> list[str]:
    """Write each option as `--name=value`, a list as JSON, and positional words last.

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


if __name__ == "__main__":
    sys.exit(main())
