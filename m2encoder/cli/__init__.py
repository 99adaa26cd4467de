"""The command line: a table of commands, each a typed function that jsonargparse reads.

Nothing heavy is imported before a command is known, so `m2enc --help` answers at once.
"""

import argparse
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
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
    logging.getLogger("httpx").setLevel(logging.WARNING)
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
    if not shown or not (wanted or len(words) == 1):
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
    names are alike. A function that names a dataclass as `options_class` is called with an instance
    of it, filled from `--config` (a file or the name of a shipped one) and from options named after
    its fields. Raises ConfigError with one line on anything unknown or ill-typed.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class Parser(jsonargparse.ArgumentParser):
        def format_help(self) -> str:
            return re.sub(r"--[a-z][\w.]*", lambda m: m[0].replace("_", "-"), super().format_help())

    options_class = getattr(function, "options_class", None)
    parser = Parser(prog=f"m2enc {name}", description=_summary(function), exit_on_error=False)
    if options_class is None:
        kinds = {n: p.kind for n, p in inspect.signature(function).parameters.items()}
        options = {n for n, kind in kinds.items() if kind is inspect.Parameter.KEYWORD_ONLY}
        for is_option, skip in ((False, options), (True, kinds.keys() - options)):
            parser.add_function_arguments(
                function, as_group=False, as_positional=not is_option, skip=set(skip)
            )
    else:
        parser.add_argument("--config", action="config", help="YAML file or shipped name")
        parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
        parser.add_class_arguments(options_class, None)
    try:
        parsed = parser.parse_args(
            _spelled(words) if options_class is None else _composed(_spelled(words))
        )
        given = dict(parser.instantiate_classes(parsed))
    except jsonargparse.ArgumentError as error:
        raise ConfigError(f"{name}: {error}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{name}: {error}") from None
    given.pop("config", None)
    if options_class is None:
        return function(**given)
    dry_run = given.pop("dry_run")
    return function(options_class(**given), dry_run=dry_run)


def _summary(function: Callable[..., Any]) -> str:
    text = (function.__doc__ or "").strip()
    return text.split("\n\n")[0].replace("\n", " ")


def _spelled(words: Sequence[str]) -> list[str]:
    """Spell option names with underscores, and gather `--name a b` into `--name=["a", "b"]`."""
    spelled: list[str] = []
    for word in words:
        if re.match(r"--[a-z]", word):
            name, equals, value = word.partition("=")
            spelled.append("--" + name[2:].replace("-", "_") + equals + value)
        else:
            spelled.append(word)
    ends = [i for i, word in enumerate(spelled) if word.startswith("--")] + [len(spelled)]
    for start, end in reversed(list(pairwise(ends))):
        if end - start > 2 and "=" not in spelled[start]:
            values = json.dumps(spelled[start + 1 : end], ensure_ascii=False)
            spelled[start:end] = [f"{spelled[start]}={values}"]
    return spelled


def _composed(words: list[str]) -> list[str]:
    """Put each configuration in as one YAML text, its presets filled in."""
    from m2encoder.cli.configuration import compose_config

    words = ["--dry-run" if word == "--dry_run" else word for word in words]
    for i, word in enumerate(words):
        if word == "--config" and i + 1 < len(words):
            words[i + 1] = compose_config(words[i + 1])
        elif word.startswith("--config="):
            words[i] = "--config=" + compose_config(word.removeprefix("--config="))
    return words


if __name__ == "__main__":
    sys.exit(main())
