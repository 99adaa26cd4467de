"""CLIP_benchmark, the real one, measures a model of ours and finds what we find.

Runs where clip-benchmark is installed: in an environment with NumPy below 2.4.
"""

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from m2encoder.eval.clip_benchmark import load_for_benchmark, register
from m2encoder.images import open_image
from m2encoder.load import load_model
from m2encoder.shards import ShardReader

needs_it = pytest.mark.skipif(
    find_spec("clip_benchmark") is None, reason="clip-benchmark is not installed"
)


def test_vectors_are_the_encoders_own(tiny_model_folder, tiny_shards):
    encoder = load_model(tiny_model_folder, device="cpu")
    model, transform, tokenizer = load_for_benchmark(str(tiny_model_folder))
    pairs = list(ShardReader(tiny_shards / "test"))[:5]
    pixels = [transform(open_image(pair.image)) for pair in pairs]
    import torch

    with torch.inference_mode():
        image = model.encode_image(torch.stack(pixels)).numpy()
        texts = ["一只红色的猫", "ＡＢＣ", "a cat 🐈", "很长" * 300]
        text = model.encode_text(tokenizer(texts)).numpy()
    np.testing.assert_allclose(image, encoder.encode_image([p.image for p in pairs]), atol=1e-6)
    np.testing.assert_allclose(text, encoder.encode_text(texts), atol=1e-6)


@needs_it
def test_it_is_registered_once():
    register()
    register()
    from clip_benchmark.models import MODEL_TYPES  # pyright: ignore[reportMissingImports]

    assert MODEL_TYPES.count("m2encoder") == 1


@needs_it
@pytest.mark.slow
def test_its_command_line_measures_our_model(tiny_model_folder, tiny_shards, tmp_path):
    """A webdataset of eight classes in its own layout; its accuracy is ours."""
    encoder = load_model(tiny_model_folder, device="cpu")
    pairs = [p for p in ShardReader(tiny_shards / "test") if p.meta.get("colour")][:24]
    names = sorted({p.meta["colour"] for p in pairs})
    root = tmp_path / "data"
    _write_webdataset(root, pairs, names)
    command = [sys.executable, "-m", "m2encoder.eval.clip_benchmark", "eval"]
    command += ["--model_type", "m2encoder", "--model", str(tiny_model_folder)]
    command += ["--pretrained", "none", "--dataset", "wds/own", "--dataset_root", str(root)]
    command += ["--task", "zeroshot_classification", "--no_amp", "--num_workers", "0"]
    command += ["--output", str(tmp_path / "found.json")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())["metrics"]
    image = encoder.encode_image([p.image for p in pairs])
    classes = encoder.encode_text([f"a picture of {name}" for name in names])
    right = (image @ classes.T).argmax(axis=1) == [names.index(p.meta["colour"]) for p in pairs]
    assert found["acc1"] == pytest.approx(right.mean(), abs=1e-6)


def _write_webdataset(root, pairs, names):
    import io
    import tarfile

    (root / "test").mkdir(parents=True)
    (root / "classnames.txt").write_text("\n".join(names))
    (root / "zeroshot_classification_templates.txt").write_text("a picture of {c}")
    (root / "test" / "nshards.txt").write_text("1")
    with tarfile.open(root / "test" / "0.tar", "w") as tar:
        for pair in pairs:
            label = str(names.index(pair.meta["colour"])).encode()
            for name, data in ((f"{pair.key}.png", pair.image), (f"{pair.key}.cls", label)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
