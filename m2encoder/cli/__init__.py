"""The command line: a table of commands, each a typed function that jsonargparse reads.

Nothing heavy is imported before a command is known, so `m2enc --help` answers at once.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from m2encoder.cli.slurm import adopt_slurm
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
    "report": Command("report", "report", "a page about a training run, finished or not"),
    "data demo": Command("data", "demo", "make a small bilingual data set: scenes or emoji"),
    "data index": Command("data", "index", "write the index that others' webdataset tars lack"),
    "data verify": Command("data", "verify", "check a shard folder against its index"),
    "tokenizer train": Command("tokenizer", "train", "train a bilingual SentencePiece tokenizer"),
    "eval retrieval": Command("evaluate", "retrieval", "recall@k between pictures and captions"),
    "eval zero-shot": Command("evaluate", "zero_shot", "accuracy on classes described in words"),
    "eval suite": Command("evaluate", "suite", "every task of a suite: zh, en, bilingual, full"),
    "eval bilingual": Command("bilingual", "bilingual", "how alike Chinese and English are taken"),
    "eval fine-grained": Command(
        "fine_grained", "fine_grained", "captions that differ in one thing; SugarCrepe, Winoground"
    ),
    "eval prompts": Command("prompts", "prompts", "class names that differ between languages"),
    "eval calibrate": Command(
        "calibrate", "calibrate", "from which score on a picture fits, kept for searching"
    ),
    "eval probe": Command("probe", "probe", "train a classifier on a model's picture vectors"),
    "eval contamination": Command(
        "contamination", "contamination", "look for a test set in training data"
    ),
    "eval protocols": Command("protocols", "protocols", "name what can be measured, and how"),
    "eval table": Command("results", "table", "results and published figures side by side"),
    "eval compare": Command("results", "compare", "what sets two runs apart, and how surely"),
    "eval report": Command("results", "report", "a page about results, with pictures"),
    "embed": Command("search", "embed", "write the vectors of pictures or texts"),
    "index": Command("index", "index", "build a search index of pictures"),
    "index info": Command("index", "info", "describe an index and what its search finds"),
    "index update": Command("index", "update", "embed new and changed pictures, drop gone ones"),
    "index add": Command("index", "add", "add pictures of the indexed folder"),
    "index remove": Command("index", "remove", "take pictures out of an index"),
    "search": Command("search", "search", "find pictures by Chinese, English or another picture"),
    "convert": Command(
        "convert", "convert", "turn a released checkpoint into a model folder, and back"
    ),
    "models ls": Command("models", "ls", "name the released models"),
    "models info": Command("models", "info", "describe a released model or a model folder"),
    "models interpolate": Command("models", "interpolate", "write the model between two models"),
    "models verify": Command("verify", "verify", "compare a model with its golden vectors"),
    "doctor loss": Command(
        "doctor", "loss", "check the contrastive loss on this machine, in several processes"
    ),
    "config list": Command("configuration", "list_configs", "name the shipped configurations"),
    "config cp": Command("configuration", "copy_config", "copy a shipped configuration to edit it"),
}

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
EPILOG = (
    "Every command explains itself with --help. Results go to stdout, messages to stderr. --debug "
    "shows tracebacks, --quiet hides messages. Exit codes: 0 ok, 1 failure, 2 usage, 3 bad data, "
    "4 done but some items were skipped, 130 interrupted, 143 saved and stopped by SIGTERM."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    flags = {flag for flag in ("--debug", "--quiet") if flag in words}
    words = [word for word in words if word not in flags]
    # Before torch loads GNU OpenMP: threads that spin for long while they wait stall each other as
    # soon as anything else runs (benchmarks/busy_machine.py). Spin briefly, then sleep.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        adopt_slurm()
    except ConfigError as error:
        return _fail(str(error), error.exit_code, "--debug" in flags)
    speaks = os.environ.get("RANK", "0") == "0"  # the first of the processes that train together
    level = logging.INFO if speaks and "--quiet" not in flags else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    for chatty in ("httpx", "httpx2", "faiss", "modelscope", "modelscope_hub"):
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
    from m2encoder.cli.options import call_with_options

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


if __name__ == "__main__":
    sys.exit(main())
