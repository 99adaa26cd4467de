"""What every test runs under: one thread, no network by accident, the same random numbers.

Also the tiny real data and model that many tests share; fixtures of one subject live beside it.
"""

import os
import sys
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gloo_pool import GlooPool

    from m2encoder.config import PretrainConfig
    from m2encoder.encoder import Encoder

# Before anything imports torch. One thread: tiny models are fastest so, and sums keep their order
# on every machine. Child processes inherit all of this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_home = tempfile.TemporaryDirectory(prefix="m2encoder-tests-")  # removed when the tests end
os.environ["HF_HOME"] = _home.name
os.environ["MODELSCOPE_ENDPOINT"] = "http://127.0.0.1:9"  # nothing listens there

# tests/peers compare with other toolkits, which only the environment .venv-peers holds (make test
# runs both). Their torchvision must be mended before transformers looks at it.
if find_spec("open_clip") is None:
    collect_ignore = ["peers"]
else:
    from m2encoder.compat import mend_torchvision

    mend_torchvision()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Seed torch where a test already uses it; importing it here would slow the others."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small scenes data set: folders train, val and test, each shards with zero_shot.json."""
    from m2encoder.data_pipeline.scenes import make_scenes

    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, seed=0, train_pairs=160, test_pairs=40, size_px=32)
    return folder


@pytest.fixture(scope="session")
def tiny_config(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> "PretrainConfig":
    """A training run of a few steps on tiny_shards; tests replace its `out`."""
    from m2encoder.config import Data, Log, Optim, PretrainConfig, TokenizerConfig
    from m2encoder.model.architecture import Architecture

    return PretrainConfig(
        model=Architecture(
            width=32,
            num_heads=4,
            image_layers=1,
            text_layers=1,
            shared_layers=1,
            projection_dim=16,
            image_size=32,
            patch_size=16,
            patch_stem="conv",
            position_init_std=0.02,
        ),
        data=Data(train=str(tiny_shards / "train"), batch_size=16),
        tokenizer=TokenizerConfig(vocab_size=600),
        optim=Optim(warmup_steps=5),
        out=str(tmp_path_factory.mktemp("run")),
        epochs=1,
        log=Log(every_steps=1, writers=()),
    )


@pytest.fixture(scope="session")
def tiny_encoder(tiny_config: "PretrainConfig", tiny_model_folder: Path) -> "Encoder":
    """A real, untrained encoder of two layers; read-only for tests."""
    from m2encoder.load import load_model

    return load_model(tiny_model_folder, device="cpu")


@pytest.fixture(scope="session")
def tiny_model_folder(
    tiny_config: "PretrainConfig", tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder that tiny_encoder was opened from."""
    from m2encoder.cli.training import new_encoder, prepare_tokenizer
    from m2encoder.model_folder import save_model_folder

    tokenizer = prepare_tokenizer(tiny_config)
    shape = replace(tiny_config.model, vocab_size=tokenizer.vocab_size)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    encoder = new_encoder(replace(tiny_config, model=shape), tokenizer)
    save_model_folder(encoder, folder, sp_model=tokenizer.model)
    return folder


@pytest.fixture(scope="session")
def gloo() -> "Iterator[Callable[[int], GlooPool]]":
    """Give the pool of real processes for a world size; each is started once, when first needed."""
    from gloo_pool import GlooPool

    pools: dict[int, GlooPool] = {}

    def of(world_size: int) -> GlooPool:
        if world_size not in pools:
            pools[world_size] = GlooPool(world_size)
        return pools[world_size]

    yield of
    for pool in pools.values():
        pool.close()
