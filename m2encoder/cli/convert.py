"""`m2enc convert`: released checkpoints and other families' models to model folders, and back."""

from pathlib import Path
from typing import Literal


def convert(
    model: str,
    out: Path,
    *,
    config: Path | None = None,
    tokenizer: Path | None = None,
    to: Literal["folder", "released"] = "folder",
    text_normalization: Literal["none", "lower-quotes"] = "none",
) -> int:
    """Turn a released checkpoint into a model folder, or a model folder back.

    Args:
        model: a released checkpoint file, a model folder, or the name of another family's model
            (hf:ORG/NAME, open-clip:NAME, a transformers or open_clip folder).
        out: the model folder to write, which may replace an older one; with --to released the
            checkpoint file, which must not be there yet.
        config: the JSON configuration of a released checkpoint; released sizes need none.
        tokenizer: its sp.model; by default the one beside the checkpoint.
        to: released writes the released layout again, bit for bit.
        text_normalization: lower-quotes makes letters small and curly double quotes straight
            before every text, as the released retrieval script does.
    """
    from m2encoder.convert import convert_released, export_released

    if to == "released":
        lines = export_released(Path(model), out)
    elif Path(model).is_file():
        report = convert_released(
            Path(model),
            out,
            config=config,
            tokenizer=tokenizer,
            text_normalization=text_normalization,
        )
        lines = [*report.lines(), f"model folder written: {out}"]
    else:
        lines = _copy(model, out)
    print("\n".join(lines))
    return 0


def _copy(model: str, out: Path) -> list[str]:
    """Write another family's model as a folder that opens offline."""
    from m2encoder.errors import ConfigError
    from m2encoder.load import load_model
    from m2encoder.model.modeling_m2encoder import M2Encoder

    encoder = load_model(model, device="cpu")
    if isinstance(encoder.model, M2Encoder):
        raise ConfigError(
            f"{model}: already a model folder of ours ({encoder.folder}); copy it, or go back with "
            f"--to released"
        )
    encoder.save_pretrained(out)
    return [f"model folder written: {out}"]
