"""How much memory opening a model takes, beside its peers, each in a process of its own.

Writes the 0.4B shape with random weights (1 GB in float32) to a temporary folder in several ways
and prints one table: peak resident memory above that of the imports, when the model has been opened
and when it has encoded one picture and one text, and its ratio to the weights (the larger of stored
and in memory; target: at most 1.2). Pages of a file that is only mapped count as resident. Linux
only.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

LOADERS = {
    "load_model": """
from m2encoder.load import load_model
def load(path, dtype):
    return load_model(path, device="cpu", dtype=dtype).model
""",
    "AutoModel.from_pretrained": """
import m2encoder.load  # the same imports, so that both start alike
from transformers import AutoModel
def load(path, dtype):
    return AutoModel.from_pretrained(path, dtype=dtype, trust_remote_code=True)
""",
    "torch.load, then copied": """
import torch
import m2encoder.load
from m2encoder.model.configuration_m2encoder import M2EncoderConfig
from m2encoder.released import Report, build_model
from m2encoder.released_config import shape_from_tensors
def load(path, dtype):
    weights = torch.load(path, weights_only=True)["state_dict"]
    config = M2EncoderConfig(**vars(shape_from_tensors(weights, where=path)))
    report, dtype = Report("state_dict", None), getattr(torch, dtype)
    return build_model(weights, config, where=path, report=report, dtype=dtype)[0]
""",
}
"""Python that defines load(path, dtype) -> a model with encode_image and encode_text."""
MEASURE = """
import json, sys, time
import torch
def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
torch.zeros(1)
before, began = memory("VmRSS"), time.perf_counter()
model = load(sys.argv[1], sys.argv[2])
seconds, opened = time.perf_counter() - began, memory("VmHWM") - before
with torch.inference_mode():
    model.encode_image(torch.zeros(1, 3, model.config.image_size, model.config.image_size))
    model.encode_text(torch.arange(1, 20)[None])
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(json.dumps([opened, memory("VmHWM") - before, seconds, size]))
"""


class Case(NamedTuple):
    """Weights as they are stored, and the precision that they are opened in."""

    name: str
    path: Path
    dtype: str
    loaders: tuple[str, ...] = ("load_model", "AutoModel.from_pretrained")


def write_cases(folder: Path, preset: str) -> list[Case]:
    """Write the model in several ways; returns what to open."""
    import torch
    from safetensors.torch import save_file

    from m2encoder.convert import export_released
    from m2encoder.encoder import Encoder
    from m2encoder.model.configuration_m2encoder import M2EncoderConfig
    from m2encoder.model.image_processing_m2encoder import M2EncoderImageProcessor
    from m2encoder.model.modeling_m2encoder import M2Encoder
    from m2encoder.model_folder import EXTRAS, save_model_folder
    from m2encoder.presets import preset as shape_of
    from m2encoder.released import extra_shapes
    from m2encoder.tokenizer import TextTokenizer, train_tokenizer

    torch.manual_seed(0)
    shape = shape_of(preset)
    sp_model = train_tokenizer(["一只红色的猫", "a red cat"], vocab_size=400)
    tokenizer = TextTokenizer(sp_model, max_length=shape.max_text_length)
    processor = M2EncoderImageProcessor(shape.image_size)
    model = M2Encoder(M2EncoderConfig(**asdict(shape)))
    encoder = Encoder(model, processor, tokenizer.to_fast(), name=preset)
    one, many, half = (folder / name for name in ("one", "many", "half"))
    save_model_folder(encoder, one, max_shard_size="100GB", golden=False)
    save_model_folder(encoder, many, max_shard_size="200MB", golden=False)
    extras = {n: torch.randn(size) for n, size in extra_shapes(shape).items()}
    save_file(extras, one / EXTRAS)
    export_released(one, folder / "released.ckpt")
    encoder.model.half()
    save_model_folder(encoder, half, max_shard_size="100GB", golden=False)
    released = folder / "released.ckpt", ("load_model", "torch.load, then copied")
    return [
        Case("released checkpoint, float32", released[0], "float32", released[1]),
        Case("released checkpoint, float32", released[0], "float16", released[1]),
        Case("float32, one file", one, "float32"),
        Case("float32, several files", many, "float32"),
        Case("float32, one file", one, "float16"),
        Case("float32, several files", many, "float16"),
        Case("float16, one file", half, "float32"),
        Case("float16, one file", half, "float16"),
    ]


def stored_bytes(path: Path) -> int:
    """Return the size of the weights on disk."""
    files = [path] if path.is_file() else path.glob("model*.safetensors")
    return sum(file.stat().st_size for file in files)


def measure(loader: str, case: Case) -> tuple[float, float, float, float]:
    """Open the model in a fresh process; returns peak bytes opened and used, seconds, its size."""
    code = LOADERS[loader] + MEASURE
    words = [sys.executable, "-c", code, str(case.path), case.dtype]
    ran = subprocess.run(words, capture_output=True, text=True, check=True)
    return tuple(json.loads(ran.stdout.splitlines()[-1]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="m2-encoder-0.4b", help="shape of the model")
    preset = parser.parse_args().preset
    import torch
    import transformers

    print(
        f"{preset}, Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {platform.machine()}\n"
    )
    print("| stored | opened in | by | MiB opened | MiB used | of the weights | s |")
    print("|---|---|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as scratch:
        for case in write_cases(Path(scratch), preset):
            for loader in case.loaders:
                opened, used, seconds, size = measure(loader, case)
                ratio = used / max(size, stored_bytes(case.path))
                print(
                    f"| {case.name} | {case.dtype} | {loader} | {opened / 2**20:,.0f} | "
                    f"{used / 2**20:,.0f} | {ratio:.2f} | {seconds:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
