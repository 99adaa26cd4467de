"""What a text's spelling does to its vector and its picture's rank, though it says the same.

Not for the changes themselves (text_changes.py), nor for captions made wrong (hard_negatives.py).
"""

# I images   T texts   C changed texts   D width of an embedding

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2encoder.embed import TextEmbeddings, embed_texts
from m2encoder.encoder import Encoder
from m2encoder.errors import DataError
from m2encoder.eval.bootstrap import DRAWS
from m2encoder.eval.language_bias import colour_pairs, mix_codes
from m2encoder.eval.means import change_metric, hits_metric, mean_metric
from m2encoder.eval.metric import Metric, TaskOutput, undefined
from m2encoder.eval.retrieval import retrieval_ranks
from m2encoder.eval.scores import paired_scores
from m2encoder.eval.text_changes import Change, changes_for
from m2encoder.ranks import Hits, hits_at_k
from m2encoder.tokenizer import normalize

Vectors = NDArray[np.float32]
EXAMPLES = 3
"""Pairs of texts per change in the details."""


class ChangedTexts(NamedTuple):
    """The texts that one change alters."""

    rows: NDArray[np.int64]
    """(C,) which texts."""
    texts: list[str]
    """(C,) what became of them."""
    emptied: int
    """Texts of which nothing was left; they are in no number but this."""


def apply_change(texts: Sequence[str], change: Change) -> ChangedTexts:
    """Return the texts that `change` alters."""
    changed = [(row, new) for row, old in enumerate(texts) if (new := change(old)) != old]
    left = [(row, new) for row, new in changed if normalize(new)]
    rows = np.asarray([row for row, _ in left], np.int64)
    return ChangedTexts(rows, [new for _, new in left], len(changed) - len(left))


def robustness(
    image: Vectors,
    text: Vectors,
    owner: NDArray[np.int64],
    changed: Mapping[str, tuple[NDArray[np.int64], Vectors]],
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> TaskOutput:
    """Compare texts with themselves written otherwise.

    image: (I, D). text: (T, D). owner: (T,) the picture of each. changed: by name the rows (C,) of
    the texts that a change alters, and their new vectors (C, D). All unit norm.
    `NAME_changed`: share of texts that it alters. Over these, `NAME_cosine`: mean cosine of the new
    vector with the old. `NAME_t2i_r1_change`: share whose picture is first with the new text, less
    that with the old, paired; undefined where no text is altered. `t2i_r1`: of the texts as they
    are, all of them. Raises ValueError on shapes, DataError on NaN or no texts.
    """
    owner = np.asarray(owner)
    options: dict[str, Any] = {"seed": seed, "draws": draws}

    original = hits_at_k(retrieval_ranks(image, text, owner).t2i, 1)
    metrics = {"t2i_r1": hits_metric(original, owner, **options)}
    for name, (rows, vectors) in changed.items():
        if len(rows) != len(vectors):
            raise ValueError(f"{name}: {len(rows)} rows for {len(vectors)} vectors")
        altered = np.zeros(len(text))
        altered[rows] = 1
        metrics[f"{name}_changed"] = mean_metric(altered, owner, **options)
        if not len(rows):
            metrics[f"{name}_cosine"] = metrics[f"{name}_t2i_r1_change"] = undefined()
            continue
        cosines = paired_scores(vectors, text[rows])
        metrics[f"{name}_cosine"] = mean_metric(cosines, owner[rows], **options)
        before = Hits(*(value[rows] for value in original))
        after = hits_at_k(retrieval_ranks(image, vectors, owner[rows]).t2i, 1)
        metrics[f"{name}_t2i_r1_change"] = change_metric(before, after, owner[rows], **options)
    return TaskOutput(metrics)


def measure_robustness(
    encoder: Encoder,
    image: Vectors,
    captions: TextEmbeddings,
    language: str,
    *,
    batch_size: int = 64,
    seed: int = 0,
    draws: int = DRAWS,
) -> TaskOutput:
    """Change the captions of one language in every way known, encode them and compare.

    Beside `robustness`: `truncated`, the share of captions that are longer than the model takes,
    and code mixing (language_bias.mix_codes) as a change. Details: per change examples, how many
    captions it emptied, and which changes could not be made and why.
    """
    texts = captions.texts
    if not texts:
        raise DataError(f"no captions in {language}, robustness needs some; check the data")
    changes, missing = changes_for(language)
    changes["code_mixed"] = lambda text: mix_codes(text, language, colour_pairs())
    found = {name: apply_change(texts, change) for name, change in changes.items()}
    new = list(dict.fromkeys(text for each in found.values() for text in each.texts))
    encoded = embed_texts(encoder, new, batch_size=batch_size, show_progress=False).vectors
    place = {text: row for row, text in enumerate(new)}
    vectors = {
        name: (each.rows, encoded[np.asarray([place[text] for text in each.texts], np.int64)])
        for name, each in found.items()
    }
    options: dict[str, Any] = {"seed": seed, "draws": draws}
    output = robustness(image, captions.vectors, captions.owner, vectors, **options)
    details = {
        "examples": {
            name: [
                [texts[row], text]
                for row, text in zip(each.rows[:EXAMPLES].tolist(), each.texts, strict=False)
            ]
            for name, each in found.items()
        },
        "emptied": {name: each.emptied for name, each in found.items() if each.emptied},
        "left_out": missing,
    }
    truncated = Metric(captions.truncated / len(texts), len(texts))
    metrics = output.metrics | {"truncated": truncated}
    return TaskOutput(metrics, details, output.ranks)
