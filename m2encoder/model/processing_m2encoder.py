"""The processor of a model folder: its image processor and its tokenizer together."""

from typing import Any

from transformers import BatchFeature, ProcessorMixin
from transformers import __version__ as transformers_version

from .image_processing_m2encoder import M2EncoderImageProcessor


class M2EncoderProcessor(ProcessorMixin):
    """Pictures and texts to the inputs of M2Encoder."""

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012 - transformers' names and types
    if transformers_version.startswith("4."):  # 5 finds both by itself, and warns of these
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    image_processor: M2EncoderImageProcessor

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(
        self, images: Any = None, text: Any = None, return_tensors: str | None = "pt", **_: Any
    ) -> BatchFeature:
        """Return pixel_values for images, input_ids and attention_mask for text, or both.

        Texts are padded to the longest and truncated to the tokenizer's model_max_length.
        Raises ValueError when neither is given.
        """
        if images is None and text is None:
            raise ValueError("give images, text or both")
        inputs: dict[str, Any] = {}
        if images is not None:
            inputs.update(self.image_processor(images, return_tensors=return_tensors))
        if text is not None:
            inputs.update(
                self.tokenizer(text, padding=True, truncation=True, return_tensors=return_tensors)
            )
        return BatchFeature(inputs)


M2EncoderProcessor.register_for_auto_class()
