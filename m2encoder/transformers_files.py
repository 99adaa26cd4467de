"""Read models and tokenizers that transformers saved, and notice what it would make up instead.

Not for our own model folders (model_folder.py).
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


def read_model(path: str, *, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Return the model of a folder or hub repository, for evaluation.

    Code that came with it is never run. Raises ValueError if weights are missing or have another
    shape, which transformers would draw at random; other errors are transformers' own.
    """
    model, info = cast(Any, AutoModel).from_pretrained(
        path, dtype=dtype, output_loading_info=True, trust_remote_code=False, **options
    )
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"the weights lack {missing[0]}{more}")
    return model.eval()


def read_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub repository. Raises ValueError if there is none.

    Without files, transformers 5 makes up an empty one and 4.57 stumbles over its own search.
    """
    folder = Path(path)
    if folder.is_dir() and not any(file for name in VOCABULARIES for file in folder.glob(name)):
        raise ValueError(f"no tokenizer, expected one of {', '.join(VOCABULARIES)}")
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError("its tokenizer is empty, expected tokenizer.json or a vocabulary")
    return tokenizer


def text_positions(model: nn.Module) -> int | None:
    """Return how many tokens a text model takes; None if it does not say.

    RoBERTa's kind counts positions from behind its padding id.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - unused
    return getattr(model.config, "max_position_embeddings", None)
