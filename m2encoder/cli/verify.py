"""`m2enc models verify`: is a model still the one that was saved, and the one that was published?

Not for measuring quality (evaluate.py).
"""

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from m2encoder.errors import ConfigError

if TYPE_CHECKING:
    from m2encoder.anchor import AnchorReport
    from m2encoder.encoder import Encoder
    from m2encoder.golden import GoldenReport

EXIT_OFF = 1


def verify(
    model: str,
    *,
    image: Path | None = None,
    json: bool = False,
    device: str = "auto",
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> int:
    """Compare a model with the golden vectors in its folder; exit code 1 if it is off.

    Args:
        model: A model folder, or the name of a released model.
        image: The authors' pokemon.jpeg, to compare a released model with the published figures.
        json: Print JSON instead of lines.
        device: Where to compute: auto, cpu, cuda, ...; cpu allows the least difference.
        dtype: Precision to compute in.
    """
    from m2encoder.golden import GOLDEN, check_golden
    from m2encoder.load import load_model

    encoder = load_model(model, device=device, dtype=dtype)
    folder = encoder.folder or Path(model)
    anchor = None if image is None else _check_anchor(encoder, image)
    # Weights that come without golden vectors can still be held to the published figures.
    golden = None if anchor and not (folder / GOLDEN).is_file() else check_golden(encoder, folder)
    ok = all(report.ok for report in (golden, anchor) if report)
    if json:
        reports: dict[str, Any] = {"golden": golden, "anchor": anchor}
        plain = {name: report and report.to_dict() for name, report in reports.items()}
        print(dumps({"model": model, **plain, "ok": ok}, ensure_ascii=False, indent=2))
    else:
        print("\n".join(_golden_lines(golden) + _anchor_lines(anchor)))
    return 0 if ok else EXIT_OFF


def _check_anchor(encoder: "Encoder", image: Path) -> "AnchorReport":
    from m2encoder.anchor import PUBLISHED, check_anchor, released_name

    name = released_name(encoder)
    if name is None:
        raise ConfigError(
            f"--image compares with published figures, which only {', '.join(PUBLISHED)} have; "
            f"{encoder.name} has another shape, so leave --image out"
        )
    return check_anchor(encoder, image, name)


def _golden_lines(report: "GoldenReport | None") -> list[str]:
    if report is None:
        return ["golden vectors: none here"]
    found = ", ".join(f"{k.replace('_', ' ')} {v:.1e}" for k, v in report.differences.items())
    state = "ok" if report.ok else f"OFF, most of all {report.worst}"
    return [f"golden vectors: largest difference {found} (allowed {report.tolerance:g}): {state}"]


def _anchor_lines(report: "AnchorReport | None") -> list[str]:
    if report is None:
        return []
    lines = [f"published figures of {report.model}:"]
    for label, found in report.found.items():
        state = "OFF" if label in report.off else "ok"
        lines.append(f"  {label}: {found:.9g}, published {report.published[label]:.9g}: {state}")
    return lines
