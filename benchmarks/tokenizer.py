"""How fast texts become ids: SentencePiece, as training uses it, beside `tokenizer.json`.

Prints one table: median texts per second of both on the same texts, in one thread, the spread and
the ratio; above it the size of `tokenizer.json` and how long opening it takes. Without --model the
tokenizer is one of ours, trained on the texts; without --texts they are made here.
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before tokenizers is imported

import sentencepiece
import tokenizers
import transformers
from transformers import AutoTokenizer

from m2encoder.released_tokenizer import load_tokenizer
from m2encoder.tokenizer import train_tokenizer, write_tokenizer_class

WORDS = {
    "en": "a the red blue small cat dog man woman child sits stands plays runs on in near with "
    "sofa table street park beach city old young two three holding wearing hat ball phone",
    "zh": "一只 红色的 蓝色的 小 猫 狗 男人 女人 孩子 坐在 站在 玩 跑 沙发上 桌子 街道 公园里 "
    "海滩 城市 老 年轻的 两个 三个 拿着 戴着 帽子 球 手机 旁边 和",
}


def make_captions(count: int) -> list[str]:
    """Return captions of 6 to 16 random words, English and Chinese in turn."""
    chance = random.Random(0)
    captions = []
    for i in range(count):
        lang, space = (("en", " "), ("zh", ""))[i % 2]
        captions.append(space.join(chance.choices(WORDS[lang].split(), k=chance.randint(6, 16))))
    return captions


def read_captions(path: Path) -> list[str]:
    """Return the captions of a file of JSON lines with a `caption`, one or a list of them."""
    captions: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            found = json.loads(line)["caption"]
            captions += [found] if isinstance(found, str) else found
    return captions


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="an sp.model, ours or a released one")
    parser.add_argument("--texts", type=Path, help="JSON lines with a `caption` each")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each, after one to warm")
    args = parser.parse_args()
    texts = read_captions(args.texts) if args.texts else make_captions(10_000)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder, "sp.model")
        if args.model is None:
            model.write_bytes(train_tokenizer(texts, vocab_size=2_000))
        ours = load_tokenizer(model, max_length=52)
        ours.to_fast().save_pretrained(folder)
        write_tokenizer_class(Path(folder))
        size_bytes = Path(folder, "tokenizer.json").stat().st_size
        opening = [seconds(lambda: AutoTokenizer.from_pretrained(folder)) for _ in range(6)][1:]
        fast = AutoTokenizer.from_pretrained(folder)
    calls: dict[str, Callable[[], object]] = {
        "sentencepiece, text by text": lambda: [ours.encode(text) for text in texts],
        "tokenizer.json, all in one call": lambda: fast(texts, truncation=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(args.rounds + 1):  # in turn, so that a busy moment meets all of them
        for name, call in calls.items():
            taken = seconds(call)
            if number:
                rates[name].append(len(texts) / taken)
    print(
        f"Python {platform.python_version()}, {platform.machine()}, one thread; "
        f"sentencepiece {sentencepiece.__version__}, tokenizers {tokenizers.__version__}, "
        f"transformers {transformers.__version__}\n{type(ours).__name__}, {ours.vocab_size:,} "
        f"pieces, {len(texts):,} texts, {args.rounds} rounds each\ntokenizer.json: "
        f"{size_bytes / 1e6:.2f} MB, opened in {statistics.median(opening):.2f} s "
        f"({min(opening):.2f} to {max(opening):.2f})\n"
    )
    print("| way | median texts/s | min | max |\n|---|--:|--:|--:|")
    for name, rate in rates.items():
        print(f"| {name} | {statistics.median(rate):,.0f} | {min(rate):,.0f} | {max(rate):,.0f} |")
    first, second = (statistics.median(rate) for rate in rates.values())
    print(f"\nratio of the first to the second: {first / second:.1f}")


if __name__ == "__main__":
    main()
