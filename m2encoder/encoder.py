"""The Encoder: a model with its preprocessing, and methods that take pictures and strings.

Not for opening or writing folders (load.py), nor for training, which calls M2Encoder's tensor
methods, nor for what other families need (foreign.py).
"""

import hashlib
import json
import logging
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from m2encoder.compat import mend_torchvision
from m2encoder.errors import CheckpointError, ConfigError, DataError
from m2encoder.images import ImageSource, open_image
from m2encoder.protocols import DualModel, PixelMaker
from m2encoder.tokenizer import clip, normalize

# Before anything imports transformers' models, which a torchvision that does not load would break.
mend_torchvision()

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
TEMPLATES = {
    "zh": ("{}", "一张{}的图片", "图中有{}"),
    "en": ("{}", "a picture of {}", "an image of {}"),
}


class BadItem(NamedTuple):
    """An item that was skipped."""

    position: int
    name: str
    reason: str


class Encoder:
    """A loaded model with its preprocessing. Vectors are float32, unit norm, (N, dim).

    Every encode method takes `on_error`: `raise` stops at the first bad item; `skip` leaves it out
    of the result, logs it, and appends it to the list given as `skipped`. `show_progress` None
    means: a bar on a terminal when there is more than one batch. `convert_to_tensor` returns torch
    tensors on the model's device instead of NumPy arrays.
    """

    def __init__(
        self,
        model: DualModel,
        image_processor: PixelMaker,
        tokenizer: Any,
        *,
        name: str = "m2encoder",
        folder: Path | None = None,
    ) -> None:
        # Any: training and saving take an M2Encoder, embedding every DualModel.
        self.model: Any = model
        self.model.eval()
        self.image_processor: Any = image_processor
        # One of transformers' fast tokenizers, a TextEncoding, or None: then texts are refused.
        self.tokenizer: Any = tokenizer
        self.name = name
        self.folder = folder
        self._told_of_truncation = False
        self._fingerprint: tuple[str, str] | None = None  # state of the weights, their hash

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.model.dim

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.logit_scale.device

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied with before a softmax: 1 / temperature, not its logarithm."""
        return float(self.model.logit_scale.detach().exp())

    @property
    def fingerprint(self) -> str:
        """sha256 of weights, shape, tokenizer and picture settings: equal means equal vectors."""
        settings = [*self.model.vector_settings]
        settings += [self.image_processor.size_px, self.image_processor.resize_mode]
        if self.tokenizer is not None:
            settings += [self.tokenizer.truncation_side, self.tokenizer.model_max_length]
        weights = sorted(self.model.state_dict().items())
        # Training changes weights in place, which torch counts; hashing anew takes seconds per GB.
        state = repr((settings, [(t.data_ptr(), t._version) for _, t in weights]))
        if self._fingerprint is None or self._fingerprint[0] != state:
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
            if self.tokenizer is not None:
                digest.update(tokenizer_definition(self.tokenizer))
            for name, tensor in weights:
                digest.update(name.encode())
                raw = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
                digest.update(raw.numpy().tobytes())
            self._fingerprint = (state, digest.hexdigest())
        return self._fingerprint[1]

    @property
    def text_normalization(self) -> str:
        """What is done to a text before the tokenizer: `none`, or what a protocol asks for.

        Set it to change it; it is saved with the model. Raises CheckpointError without a tokenizer.
        """
        from m2encoder.text_normalization import get_text_normalization

        fast = self._fast_tokenizer()
        return "none" if fast is None else get_text_normalization(fast)

    @text_normalization.setter
    def text_normalization(self, value: str) -> None:
        from m2encoder.text_normalization import set_text_normalization

        fast = self._fast_tokenizer()
        self._fingerprint = None
        if fast is not None:
            set_text_normalization(fast, value)  # pyright: ignore[reportArgumentType] - it checks
        elif value != "none":
            raise ConfigError(f"{self.name}: its tokenizer takes no text normalisation {value!r}")

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `load_model` and transformers open, or open_clip its own models."""
        from m2encoder.model.modeling_m2encoder import M2Encoder

        if isinstance(self.model, M2Encoder):
            from m2encoder.model_folder import save_model_folder as save
        else:
            from m2encoder.foreign import save_foreign as save
        save(self, Path(folder))

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload the model folder to `repo_id` on the Hugging Face hub; returns its address."""
        from m2encoder.publish import push_to_hub

        return push_to_hub(self, repo_id, private=private, token=token)

    def encode_image(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        batch_size: int = 64,
        on_error: OnError = "raise",
        skipped: list[BadItem] | None = None,
        show_progress: bool | None = None,
        convert_to_tensor: bool = False,
    ) -> Any:
        """Encode pictures: paths, encoded bytes, Pillow images or uint8 arrays (H, W, 3).

        Returns (N, dim) float32, unit norm. Raises DataError naming a picture that cannot be read.
        """
        many = images if isinstance(images, list | tuple) else [images]
        return self._encode(
            many, self._pixels, self._image_vectors, "pictures",
            batch_size, on_error, skipped, show_progress, convert_to_tensor,
        )  # fmt: skip

    def encode_text(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = 64,
        on_error: OnError = "raise",
        skipped: list[BadItem] | None = None,
        show_progress: bool | None = None,
        convert_to_tensor: bool = False,
    ) -> Any:
        """Encode texts in Chinese, English or both.

        Returns (M, dim) float32, unit norm. Texts over the model's token limit are truncated, with
        one warning per Encoder. Raises DataError naming a text that is empty.
        """
        many = [texts] if isinstance(texts, str) else texts
        return self._encode(
            many, checked_text, self._text_vectors, "texts",
            batch_size, on_error, skipped, show_progress, convert_to_tensor,
        )  # fmt: skip

    def encode(
        self,
        items: Any,
        *,
        batch_size: int = 64,
        on_error: OnError = "raise",
        skipped: list[BadItem] | None = None,
        show_progress: bool | None = None,
        convert_to_tensor: bool = False,
    ) -> Any:
        """Encode a mixed list: a `str` is always text; a Path, bytes, image or array a picture.

        Returns (N, dim) in the order of the items.
        """
        many = items if isinstance(items, list | tuple) else [items]
        rows: dict[int, Tensor] = {}
        bad: list[BadItem] = []
        for is_text in (False, True):
            where = [i for i, item in enumerate(many) if isinstance(item, str) == is_text]
            missed: list[BadItem] = []
            found = self._encode(
                [many[i] for i in where],
                checked_text if is_text else self._pixels,
                self._text_vectors if is_text else self._image_vectors,
                "texts" if is_text else "pictures",
                batch_size, on_error, missed, show_progress, True, where,
            )  # fmt: skip
            gone = {item.position for item in missed}
            rows.update(zip([i for i in where if i not in gone], found, strict=True))
            bad += missed
        if skipped is not None:
            skipped.extend(sorted(bad))
        empty = torch.zeros(0, self.dim, device=self.device)
        result = torch.stack([rows[i] for i in sorted(rows)]) if rows else empty
        return result if convert_to_tensor else result.cpu().numpy()

    def similarity(self, a: Any, b: Any) -> np.ndarray[Any, Any]:
        """Cosine similarity (N, M) float32 of vectors a (N, dim) and b (M, dim)."""
        return np.asarray(a, dtype=np.float32) @ np.asarray(b, dtype=np.float32).T

    def classify(
        self,
        images: ImageSource | Sequence[ImageSource],
        labels: Sequence[str],
        *,
        templates: Sequence[str] | None = None,
        **options: Any,
    ) -> np.ndarray[Any, Any]:
        """Return (N, K) float32: per picture the probability of each label, zh or en.

        A softmax over the labels. A model with a `logit_bias` (SigLIP) was trained to judge each
        label alone: there it is a sigmoid, and a row need not sum to 1.
        templates: strings with one `{}`; by default a few in the language of each label.
        Raises ValueError when labels are fewer than two or repeat, or a template has no `{}`.
        """
        if bad := [template for template in templates or () if "{}" not in template]:
            raise ValueError(f"template {bad[0]!r} has no {{}} for the label")
        if len(set(labels)) != len(labels) or len(labels) < 2:
            raise ValueError(f"labels must be two or more different ones, got {list(labels)}")
        classes = [
            self._average(tuple(templates or TEMPLATES[language_of(label)]), label)
            for label in labels
        ]
        vectors = self.encode_image(images, **options)
        logits = self.logit_scale * self.similarity(vectors, np.stack(classes))
        if (bias := getattr(self.model, "logit_bias", None)) is not None:
            return 1 / (1 + np.exp(-logits - float(bias)))
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True)

    def _average(self, templates: tuple[str, ...], label: str) -> np.ndarray[Any, Any]:
        vectors = self.encode_text([t.format(label) for t in templates], show_progress=False)
        mean = vectors.mean(axis=0)
        return mean / np.linalg.norm(mean)

    def _encode(
        self,
        items: Sequence[Any],
        prepare: Callable[[Any, str], Any],
        vectors: Callable[[list[Any]], Tensor],
        what: str,
        batch_size: int,
        on_error: OnError,
        skipped: list[BadItem] | None,
        show_progress: bool | None,
        convert_to_tensor: bool,
        where: Sequence[int] | None = None,
    ) -> Any:
        """Encode items of one kind; `where` gives their positions in the caller's list."""
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is {on_error!r}, expected 'raise' or 'skip'")
        hide = len(items) <= batch_size or None if show_progress is None else not show_progress
        bad: list[BadItem] = []
        done = [torch.zeros(0, self.dim, device=self.device)]
        with torch.inference_mode(), tqdm(total=len(items), unit=f" {what}", disable=hide) as bar:
            placed = zip(where or range(len(items)), items, strict=True)
            for batch in _prepared(placed, prepare, what, batch_size, on_error, bad, bar):
                done.append(vectors(batch).float())
        if skipped is not None:
            skipped.extend(bad)
        result = torch.cat(done)
        return result if convert_to_tensor else result.cpu().numpy()

    def _pixels(self, image: ImageSource, name: str) -> np.ndarray[Any, Any]:
        return self.image_processor.to_pixels(open_image(image, name=name))

    def _image_vectors(self, pixels: list[Any]) -> Tensor:
        return self.model.encode_image(torch.from_numpy(np.stack(pixels)).to(self.device))

    def _fast_tokenizer(self) -> PreTrainedTokenizerFast | None:
        tokenizer = self.needed_tokenizer()
        tokenizer = getattr(tokenizer, "inner", tokenizer)
        return tokenizer if isinstance(tokenizer, PreTrainedTokenizerFast) else None

    def needed_tokenizer(self) -> Any:
        """Return the tokenizer. Raises CheckpointError if the model has none."""
        if self.tokenizer is None:
            raise CheckpointError(
                f"{self.name}: this model has no tokenizer, so it encodes no texts; give it one "
                f'with load_model(..., tokenizer="sp.model") or m2enc convert --tokenizer sp.model'
            )
        return self.tokenizer

    def _text_vectors(self, texts: list[str]) -> Tensor:
        tokenizer = self.needed_tokenizer()
        side = "left" if tokenizer.truncation_side == "left" else "right"
        texts = [clip(text, side) for text in texts]
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        limit = tokenizer.model_max_length
        longest = int(inputs["attention_mask"].sum(dim=1).max())
        if longest >= limit and not self._told_of_truncation:
            self._told_of_truncation = True
            lost = "start" if side == "left" else "end"
            logger.warning("a text fills all %d tokens; longer ones lose their %s", limit, lost)
        return self.model.encode_text(
            inputs["input_ids"].to(self.device), inputs["attention_mask"].to(self.device)
        )


def _prepared(
    placed: Iterable[tuple[int, Any]],
    prepare: Callable[[Any, str], Any],
    what: str,
    batch_size: int,
    on_error: OnError,
    bad: list[BadItem],
    bar: "tqdm[Any]",
) -> Iterator[list[Any]]:
    """Yield batches of prepared items; bad ones raise, or are logged and collected in `bad`."""
    batch: list[Any] = []
    for position, item in placed:
        is_path = what == "pictures" and isinstance(item, str | os.PathLike)
        name = str(item) if is_path else f"{what.removesuffix('s')} {position}"
        try:
            batch.append(prepare(item, name))
        except DataError as error:
            if on_error == "raise":
                raise
            bad.append(BadItem(position, name, str(error)))
            logger.warning("skipped %s", error)
        bar.update()
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def checked_text(text: str, name: str) -> str:
    """Return the text. Raises DataError if it is empty or half a character, TypeError if no str."""
    if not isinstance(text, str):
        raise TypeError(f"{name} is a {type(text).__name__}, expected a str")
    try:
        if normalize(text):
            return text
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    raise DataError(f"{name}: empty, expected at least one character; remove it or skip bad ones")


def language_of(text: str) -> Literal["zh", "en"]:
    """`zh` if the text holds any Chinese character, else `en`."""
    return "zh" if any("CJK" in unicodedata.name(c, "") for c in text) else "en"


def tokenizer_definition(tokenizer: Any) -> bytes:
    """Return what decides the ids that a tokenizer gives, beside length and truncation side."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer.definition()
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls with padding or truncation leave their setting behind; it is no part of the tokenizer.
    definition["truncation"] = definition["padding"] = None
    return json.dumps(definition, sort_keys=True).encode()
