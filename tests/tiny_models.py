"""Tiny, randomly initialised models and tokenizers of other libraries, written by the tests."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEXTS = [
    "一只红色的猫",
    "繁體中文：貓與狗",
    "ＦＵＬＬ　ｗｉｄｔｈ！",
    "a red cat",
    "👨‍👩‍👧‍👦 family",
    "猫" * 10_000,
    "long " * 300,
    "x",
]
PIECES = [
    *"一只红色的猫繁體中文貓與狗图有：！👨abcdefghijklmnopqrstuvwxyz",
    *("red", "cat", "fa", "##mily", "full", "width", "long"),
]


def pictures() -> list[Image.Image]:
    """Return three pictures of different shape."""
    rng = np.random.default_rng(0)
    sizes = [(30, 40), (97, 21), (32, 32)]
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def wordpiece(*, pad_id: int = 0, max_length: int = 1_000) -> PreTrainedTokenizerFast:
    """Return a BERT-like tokenizer: [CLS] pieces [SEP], each Chinese character a piece."""
    specials = ["[CLS]", "[SEP]", "[UNK]"]
    specials.insert(pad_id, "[PAD]")
    table = {piece: i for i, piece in enumerate(dict.fromkeys([*specials, *PIECES]))}
    fast = Tokenizer(models.WordPiece(table, unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=True)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", table["[CLS]"]), ("[SEP]", table["[SEP]"])]
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]", model_max_length=max_length,
    )  # fmt: skip


def randomise(model: nn.Module) -> None:
    """Draw every parameter anew: nothing that was skipped stays unseen."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write what AutoModel and AutoTokenizer open."""
    randomise(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
