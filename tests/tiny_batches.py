"""Small batches and models for the training step, and its gradients in their plainest form."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import dense_loss
import numpy as np
import torch
from torch import Tensor

from m2encoder.batch import Batch, Captions
from m2encoder.config import Objective
from m2encoder.hashing import text_key
from m2encoder.model.configuration_m2encoder import M2EncoderConfig
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.patch_dropout import kept_patches

BILINGUAL = (Objective("image-zh", 0.3), Objective("image-en", 2.0), Objective("zh-en", 0.7))
SHAPE: dict[str, Any] = {
    "width": 24, "num_heads": 3, "image_layers": 1, "text_layers": 1, "shared_layers": 1,
    "projection_dim": 12, "image_size": 32, "patch_size": 8,
    "vocab_size": 300, "max_text_length": 30, "text_positions": 40,
}  # fmt: skip
Texts = Sequence[str | None]
Gradients = dict[str, np.ndarray]


def make_model(**changes: Any) -> M2Encoder:
    """Return a model in training mode that tells its inputs apart, every parameter random."""
    model = M2Encoder(M2EncoderConfig(**{**SHAPE, **changes})).train()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_matrix = parameter.ndim > 1 and "positions" not in name
            spread = 1 / parameter[0].numel() ** 0.5 if is_matrix else 0.1
            parameter.copy_(noise * spread + name.endswith("norm.weight"))
        model.logit_scale.fill_(2.0)
        if model.logit_bias is not None:
            model.logit_bias.fill_(-3.0)
    return model


def make_batch(texts: Mapping[str, Texts], *, first: int = 0, seed: int = 0) -> Batch:
    """Random pictures with these captions by language, None where there is none.

    first: the place of picture 0 in the global stream.
    """
    count = max(map(len, texts.values()))
    generator = torch.Generator().manual_seed(seed)
    # a colour for each quarter: noise all over would look the same to a convolution
    pixels = torch.randint(0, 256, (count, 3, 2, 2), dtype=torch.uint8, generator=generator)
    pixels = pixels.repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
    captions = {language: _captions(given) for language, given in texts.items()}
    positions = torch.arange(first, first + count)
    return Batch(pixels, captions, [f"k{i}" for i in range(count)], positions)


def _captions(texts: Texts) -> Captions:
    """One id per character, between a start and an end token."""
    there = [(row, text) for row, text in enumerate(texts) if text is not None]
    lists = [[2, *(4 + ord(character) % 290 for character in text), 3] for _, text in there]
    ids = torch.zeros(len(there), max(map(len, lists), default=0), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, text_ids in enumerate(lists):
        ids[i, : len(text_ids)] = torch.tensor(text_ids)
        mask[i, : len(text_ids)] = 1
    rows, keys = [row for row, _ in there], [text_key(text) for _, text in there]
    return Captions(ids, mask, torch.tensor(rows).long(), torch.tensor(keys).long())


def bilingual_texts(count: int, *, seed: int = 0) -> dict[str, Texts]:
    """Captions of 0 to 27 characters in two languages; a fifth is missing, some occur twice."""
    rng = np.random.default_rng(seed)
    letters = {"zh": "红色的房子旁边有一只白貓", "en": "a red house, white cat"}
    texts: dict[str, Texts] = {}
    for language, alphabet in letters.items():
        lengths = rng.integers(0, 28, count)
        some: list[str | None] = ["".join(rng.choice([*alphabet], n)) for n in lengths]
        some[count // 2 :: 3] = some[:2][-1:] * len(some[count // 2 :: 3])
        texts[language] = [text if rng.random() > 0.2 else None for text in some]
    return texts


def rows_of(batch: Batch, rows: range) -> Batch:
    """Return some consecutive pairs of a batch."""
    captions = {}
    for language, c in batch.captions.items():
        here = (c.rows >= rows.start) & (c.rows < rows.stop)
        longest = int(c.mask[here].sum(dim=1).max()) if here.any() else 0
        captions[language] = Captions(
            c.ids[here, :longest], c.mask[here, :longest], c.rows[here] - rows.start, c.keys[here]
        )
    part = slice(rows.start, rows.stop)
    return replace(
        batch, pixels=batch.pixels[part], captions=captions, keys=batch.keys[part],
        positions=batch.positions[part],
    )  # fmt: skip


def shares_of(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """Cut a batch into the shares of ranks, sizes[rank] pairs each."""
    ends = np.cumsum([0, *sizes]).tolist()
    return [rows_of(batch, range(*ends)) for ends in pairwise(ends)]


def dense_terms(
    model: M2Encoder,
    batch: Batch,
    objectives: Sequence[Objective],
    *,
    patch_dropout: float = 0.0,
    seed: int = 0,
    groups: int = 1,
    duplicates: str = "mask",
) -> dict[str, Tensor]:
    """The loss of each objective, in one process: captions one by one, all similarities at once."""
    kept = kept_patches(batch.positions, num_patches=16, share=patch_dropout, seed=seed)
    sides = {"image": model.encode_image(batch.pixels.float() / 255, kept)}
    count = len(batch.keys)
    present, same = {}, {}
    for language, (ids, mask, rows, keys) in batch.captions.items():
        vectors = sides["image"].new_zeros(count, sides["image"].shape[1])
        for i, row in enumerate(rows.tolist()):
            alone = model.encode_text(ids[i, mask[i].bool()][None])
            vectors = vectors.index_put((torch.tensor([row]),), alone)
        sides[language] = vectors
        present[language] = torch.zeros(count, dtype=torch.bool).index_fill(0, rows, True)
        key = torch.zeros(count, dtype=torch.int64).index_copy(0, rows, keys)
        same[language] = (key[:, None] == key) if duplicates == "mask" else torch.eye(count).bool()
    terms = {}
    for name in (objective.name for objective in objectives):
        first, second = name.split("-")
        languages = [side for side in (first, second) if side != "image"]
        terms[name] = dense_loss.masked(
            sides[first],
            sides[second],
            model.logit_scale.exp(),
            present=torch.stack([present[x] for x in languages]).all(0),
            same=torch.stack([same[x] for x in languages]).any(0),
            groups=groups,
            bias=model.logit_bias,
        )
    return terms


def dense_total(
    model: M2Encoder, batch: Batch, objectives: Sequence[Objective], **options: Any
) -> Tensor:
    """The weighted sum of dense_terms."""
    terms = dense_terms(model, batch, objectives, **options)
    return sum((o.weight * terms[o.name] for o in objectives), start=torch.zeros(()))


def gradients_of(model: torch.nn.Module) -> Gradients:
    """Each parameter's gradient by name; all of them must have one."""
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    return {
        name: p.grad.double().numpy().copy()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def largest_difference(found: Gradients, expected: Gradients) -> float:
    """The largest difference of any parameter's gradient, relative to that gradient's norm."""
    assert found.keys() == expected.keys()
    return max(
        float(np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name]))
        for name in expected
    )


def whole_difference(found: Gradients, expected: Gradients) -> float:
    """The difference of the whole gradient, all parameters as one vector, relative to its norm."""
    assert found.keys() == expected.keys()
    ours, theirs = (np.concatenate([g[k].ravel() for k in expected]) for g in (found, expected))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
