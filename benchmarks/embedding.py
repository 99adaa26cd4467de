"""How fast pictures and texts become vectors, beside a plain transformers loop.

Draws photographs (JPEG, 1024 x 768, random textures at five scales, quality 88, about 230 KB each:
as costly to decode as a camera's) and texts (1 to 24 random Chinese and English words). Tables:

- `m2-encoder-tiny` end to end against the loop that everybody writes: AutoModel and AutoProcessor
  over batches of 64, Image.open inside; equal weights and pixels, vectors compared in the same run;
- a ViT-B/16 shape end to end against its forward passes alone, pixels ready in memory, once with
  torch's own threads over batches of 64 and once in our batches, one thread for each;
- the same in several processes of one thread each (gloo), against one process with that many;
- the vector store, cold and warm; reading and scaling alone, in threads and in processes.

Every figure is the median of `--repeats` turns that take the variants one after the other.
"""

import argparse
import json
import logging
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image

from m2encoder.distributed import joined_world
from m2encoder.embed import embed_folder, embed_pictures, embed_texts
from m2encoder.embed_work import PictureWork
from m2encoder.encoder import Encoder
from m2encoder.model.architecture import Architecture
from m2encoder.overlap import Threads, overlapped
from m2encoder.pictures import FolderPictures
from m2encoder.quiet import quiet_transformers
from m2encoder.vector_store import VectorStore
from m2encoder.vector_table import VectorTable

BATCH = 64
SCALES = ((4, 80), (16, 50), (64, 30), (256, 18), (1024, 7))
"""Width in cells and strength of each texture."""
WORDS = [
    *("红色", "蓝色", "猫", "狗", "雪山", "日落", "海边", "街道", "一只", "两个"),
    *("a", "the", "red", "blue", "cat", "dog", "mountain", "sunset", "beach", "near"),
]
VIT = Architecture(
    width=768, num_heads=12, image_layers=9, text_layers=1, shared_layers=3, projection_dim=768,
    image_size=224, patch_size=16,
)  # fmt: skip


def draw_photographs(folder: Path, count: int) -> None:
    """Write `count` JPEG files."""
    for seed in range(count):
        draw = np.random.default_rng(seed)
        picture = np.full((768, 1024, 3), 120, np.float32)
        for cells, strength in SCALES:
            for channel in range(3):
                noise = draw.normal(size=(cells * 3 // 4, cells)).astype(np.float32)
                grown = Image.fromarray(noise).resize((1024, 768), Image.Resampling.BICUBIC)
                picture[..., channel] += strength * np.asarray(grown)
        pixels = picture.clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed:05d}.jpg", quality=88)


def make_texts(count: int) -> list[str]:
    """Return random texts, short ones more often than long ones."""
    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.geometric(1 / 8, count), 24)
    return [f"{i} " + " ".join(draw.choice(WORDS, n)) for i, n in enumerate(lengths)]


def new_encoder(shape: Architecture, name: str, folder: Path | None = None) -> Encoder:
    """Return an untrained model, saved to a folder if one is given."""
    from m2encoder.model.configuration_m2encoder import M2EncoderConfig
    from m2encoder.model.image_processing_m2encoder import M2EncoderImageProcessor
    from m2encoder.model.modeling_m2encoder import M2Encoder
    from m2encoder.model_folder import save_model_folder
    from m2encoder.tokenizer import TextTokenizer, train_tokenizer

    torch.manual_seed(0)
    sp_model = train_tokenizer(make_texts(500), vocab_size=400)
    tokenizer = TextTokenizer(sp_model, max_length=shape.max_text_length)
    fitted = replace(shape, vocab_size=tokenizer.vocab_size)
    model = M2Encoder(M2EncoderConfig(**asdict(fitted)))
    pixels = M2EncoderImageProcessor(shape.image_size)
    encoder = Encoder(model, pixels, tokenizer.to_fast(), name=name)
    if folder is not None:
        save_model_folder(encoder, folder, golden=False)
    return encoder


class PlainLoop:
    """The loop that everybody writes around AutoModel and AutoProcessor."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoProcessor

        with quiet_transformers():
            self.model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
            self.processor: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

    def pictures(self, paths: list[Path]) -> np.ndarray:
        """Return (N, D) float32."""
        found = []
        for start in range(0, len(paths), BATCH):
            images = [Image.open(path) for path in paths[start : start + BATCH]]
            inputs = self.processor(images=images, return_tensors="pt")
            with torch.inference_mode():
                found.append(self.model(**inputs).image_embeds)
        return torch.cat(found).numpy()

    def texts(self, texts: list[str]) -> np.ndarray:
        """Return (M, D) float32."""
        found = []
        for start in range(0, len(texts), BATCH):
            inputs = self.processor(text=texts[start : start + BATCH], return_tensors="pt")
            with torch.inference_mode():
                found.append(self.model(**inputs).text_embeds)
        return torch.cat(found).numpy()


def forward_only(encoder: Encoder, batches: list[torch.Tensor]) -> np.ndarray:
    """Run the model over pixels that are ready, with torch's own threads."""
    with torch.inference_mode():
        return torch.cat([encoder.model.encode_image(batch) for batch in batches]).numpy()


def forward_in_our_batches(encoder: Encoder, batches: list[torch.Tensor]) -> np.ndarray:
    """Run the model over pixels that are ready, as embed_pictures does."""
    compute = partial(forward_only, encoder)
    threads = Threads.on(torch.device("cpu"))
    turns = ([batch] for batch in batches)
    return np.concatenate(list(overlapped(turns, lambda batch: batch, compute, threads)))


def measured(variants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each variant, taken in turns; each runs once before."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, work in variants.items():
            began = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def print_table(
    title: str, count: int, unit: str, seconds: dict[str, list[float]], base: str
) -> None:
    """Print one row per variant; the last column compares with `base`."""
    print(f"\n{title}\n")
    print(f"| variant | {unit}/s | min | max | of {base} |\n|---|--:|--:|--:|--:|")
    reference = statistics.median(seconds[base])
    for name, found in seconds.items():
        middle = statistics.median(found)
        low, high = count / max(found), count / min(found)
        ratio = reference / middle
        print(f"| {name} | {count / middle:,.1f} | {low:,.1f} | {high:,.1f} | {ratio:.2f} |")
    sys.stdout.flush()


def compare_tiny(scratch: Path, texts: list[str], repeats: int) -> None:
    """The first table, for pictures and for texts, and the store's."""
    from m2encoder.presets import preset

    encoder = new_encoder(preset("m2-encoder-tiny"), "tiny", scratch / "tiny")
    plain, photos = PlainLoop(scratch / "tiny"), scratch / "photos"
    paths = FolderPictures(photos).paths
    ours = partial(embed_folder, encoder, photos, show_progress=False)
    apart = np.abs(ours().vectors - plain.pictures(paths)).max()
    texts_apart = np.abs(
        embed_texts(encoder, texts, show_progress=False).vectors - plain.texts(texts)
    ).max()
    assert max(apart, texts_apart) < 1e-5, (apart, texts_apart)
    print(f"\nlargest difference of a component: pictures {apart:.1e}, texts {texts_apart:.1e}")
    seconds = measured(
        {"plain transformers loop": lambda: plain.pictures(paths), "embed_folder": ours}, repeats
    )
    title = "m2-encoder-tiny, photographs end to end"
    print_table(title, len(paths), "pictures", seconds, "plain transformers loop")
    seconds = measured(
        {
            "plain transformers loop": lambda: plain.texts(texts),
            "embed_texts": lambda: embed_texts(encoder, texts, show_progress=False),
        },
        repeats,
    )
    print_table("m2-encoder-tiny, texts", len(texts), "texts", seconds, "plain transformers loop")
    stores = (VectorStore(scratch / f"store-{i}") for i in range(repeats + 1))
    warm = VectorStore(scratch / "store-0")
    seconds = measured(
        {
            "no store": ours,
            "cold": lambda: ours(store=next(stores)),
            "warm": lambda: ours(store=warm),
        },
        repeats,
    )
    title = "m2-encoder-tiny, photographs with a vector store"
    print_table(title, len(paths), "pictures", seconds, "no store")


def compare_vit(photos: Path, repeats: int) -> None:
    """The second table."""
    encoder = new_encoder(VIT, "ViT-B/16 shape")
    pictures = FolderPictures(photos)
    table = VectorTable(len(pictures), encoder.dim)
    work = PictureWork(encoder, pictures, table, BATCH, "raise", True, "float32", None)
    pixels = torch.from_numpy(np.stack([work.prepare(i) for i in range(len(pictures))]))
    own_batches = [pixels[span.rows] for span in work.spans()]
    variants = {
        f"forward only, batches of {BATCH}": lambda: forward_only(encoder, [*pixels.split(BATCH)]),
        "forward only, our batches": lambda: forward_in_our_batches(encoder, own_batches),
        "embed_folder": lambda: embed_folder(encoder, photos, show_progress=False).vectors,
    }
    first, *others = (work() for work in variants.values())
    assert all(np.abs(first - other).max() < 1e-5 for other in others)
    seconds = measured(variants, repeats)
    names = list(variants)
    fastest = min(names[:2], key=lambda name: statistics.median(seconds[name]))
    processes = torch.get_num_threads()
    seconds[f"embed_pictures, {processes} processes"] = in_processes(photos, processes, repeats)
    title = "ViT-B/16 shape, photographs end to end"
    print_table(title, len(pictures), "pictures", seconds, fastest)


def in_processes(photos: Path, count: int, repeats: int) -> list[float]:
    """Return the seconds that ranks of one thread each take together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    about |= {"OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, "--repeats", str(repeats), "--as-rank", str(photos)]
    ranks = []
    for rank in range(count):
        more = {name: str(value) for name, value in {**about, "RANK": rank}.items()}
        ranks.append(
            subprocess.Popen(command, env={**os.environ, **more}, stdout=subprocess.PIPE, text=True)
        )
    first, *_ = [process.communicate()[0] for process in ranks]
    return json.loads(first)


def work_as_rank(photos: Path, repeats: int) -> None:
    """Be one of several processes; the first prints the seconds."""
    encoder = new_encoder(VIT, "ViT-B/16 shape")
    pictures = FolderPictures(photos)
    with joined_world("cpu") as world:
        options: dict[str, Any] = {"upright": True, "world": world, "show_progress": False}
        work = partial(embed_pictures, encoder, pictures, **options)
        seconds = measured({"ranks": work}, repeats)["ranks"]
        if world.is_first:
            print(json.dumps(seconds))


def scaled(path: Path) -> np.ndarray:
    """Return one picture as the model takes it."""
    from m2encoder.images import open_image
    from m2encoder.model.image_processing_m2encoder import M2EncoderImageProcessor

    return M2EncoderImageProcessor(224).to_pixels(open_image(path, upright=True))


def compare_readers(photos: Path, repeats: int) -> None:
    """Reading, decoding and scaling alone."""
    paths = FolderPictures(photos).paths
    count = torch.get_num_threads()
    with ThreadPoolExecutor(count) as threads, ProcessPoolExecutor(count) as processes:
        variants = {
            "1 thread": lambda: [scaled(path) for path in paths],
            f"{count} threads": lambda: list(threads.map(scaled, paths)),
            f"{count} processes": lambda: list(processes.map(scaled, paths, chunksize=8)),
        }
        seconds = measured(variants, repeats)
    print_table("decoding and scaling to 224 pixels", len(paths), "pictures", seconds, "1 thread")


def main() -> None:
    """Measure and print."""
    logging.disable(logging.WARNING)  # some texts are too long
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", type=int, default=200)
    parser.add_argument("--texts", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["tiny", "vit", "readers"], help="one part alone")
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank is not None:
        work_as_rank(args.as_rank, args.repeats)
        return
    versions = f"torch {torch.__version__}, Pillow {Image.__version__}"
    print(f"{args.photographs} photographs, {torch.get_num_threads()} threads, {versions}, "
          f"Python {platform.python_version()}, {platform.machine()}")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch_dir:
        scratch = Path(scratch_dir)
        os.environ["HF_HOME"] = str(scratch / "hub")
        (scratch / "photos").mkdir()
        draw_photographs(scratch / "photos", args.photographs)
        if args.only in (None, "tiny"):
            compare_tiny(scratch, make_texts(args.texts), args.repeats)
        if args.only in (None, "readers"):
            compare_readers(scratch / "photos", args.repeats)
        if args.only in (None, "vit"):
            compare_vit(scratch / "photos", args.repeats)


if __name__ == "__main__":
    main()
