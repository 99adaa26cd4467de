"""Start towers from the weights of another model, and say what was taken and what was not.

For models of our kind: folders, released names and checkpoints. Not for a timm or a transformers
tower with its library's weights (towers.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError
from m2encoder.foreign import is_foreign
from m2encoder.load import OPEN_CLIP, load_model
from m2encoder.model.configuration_m2encoder import Towers
from m2encoder.model.layers import resize_positions
from m2encoder.model.modeling_m2encoder import M2Encoder

ROLES = ("pad", "unk", "cls", "bos", "sep", "eos")
NOT_IN_IT = "not in it"


@dataclass
class InitReport:
    """What towers started from."""

    sources: dict[str, str]
    """Part ("image", "text" or "both") to the model it was taken from."""
    taken: list[str] = field(default_factory=list)
    """Names of the parameters that were copied, resized ones too."""
    changed: dict[str, str] = field(default_factory=dict)
    """Of those, what was copied in part or resized, and how."""
    random: dict[str, str] = field(default_factory=dict)
    """Names of the parameters that stay random, and why."""
    unused: list[str] = field(default_factory=list)
    """What the other model has beyond that."""

    def lines(self) -> list[str]:
        """Return the report, a line for each thing to know."""
        found = [f"{part} from {where}" for part, where in self.sources.items()]
        lines = [f"start: {', '.join(found)}; {len(self.taken)} tensors taken"]
        lines += [f"start: {name}: {how}" for name, how in self.changed.items()]
        reasons: dict[str, list[str]] = {}
        for name, why in self.random.items():
            reasons.setdefault(why, []).append(name)
        lines += [f"start: random: {_few(names)} ({why})" for why, names in reasons.items()]
        if self.unused:
            lines.append(f"start: not used: {_few(self.unused)}")
        return lines


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def init_towers(encoder: Encoder, *, image: str | None, text: str | None) -> InitReport:
    """Copy weights of other models into the encoder's, in place, before it is sharded.

    image, text: a model folder, released name or checkpoint for load_model; None leaves a tower as
    it is. Both the same: shared layers, projections and scale come along; otherwise they stay
    random, because they belong to both towers. Picture positions are resized, and of a table of
    text positions the rows that both have are copied. Another vocabulary: rows of the same pieces
    are copied. With an image tower come the mean and standard deviation that it expects.
    Raises CheckpointError if a model cannot be opened, is of another family, or has nothing that
    fits.
    """
    given = {part: where for part, where in (("image", image), ("text", text)) if where is not None}
    if image is not None and image == text:
        given = {"both": image}
    report = InitReport(given)
    assert isinstance(encoder.model, M2Encoder)
    for part, where in given.items():
        source = _open(where, "both" if part == "both" else "image" if part == "image" else "text")
        assert isinstance(source.model, M2Encoder)
        _take(encoder, source, part, where, report)
        if part != "text":
            for name in ("image_mean", "image_std"):
                setattr(encoder.model.config, name, getattr(source.model.config, name))
    _add_untouched(encoder.model, report)
    return report


def _open(where: str, towers: Towers) -> Encoder:
    refused = CheckpointError(
        f"{where}: a model of another family, whose layers are not ours (ours have a norm inside "
        f"attention and feed-forward); start from a model folder of ours or a released model, or "
        f"train other libraries' towers with towers.image and towers.text"
    )
    if where.startswith(OPEN_CLIP) or (Path(where).is_dir() and is_foreign(Path(where))):
        raise refused
    source = load_model(where, device="cpu", towers=towers)
    if not isinstance(source.model, M2Encoder):
        raise refused
    return source


@torch.no_grad()
def _take(encoder: Encoder, source: Encoder, part: str, where: str, report: InitReport) -> None:
    wanted = [
        name for name in encoder.model.state_dict() if part == "both" or name.startswith(f"{part}.")
    ]
    theirs = source.model.state_dict()
    taken: list[str] = []
    misfits: list[str] = []
    ours: Mapping[str, Tensor] = encoder.model.state_dict()
    for name in wanted:
        if name not in theirs:
            report.random[name] = NOT_IN_IT
            continue
        how = _copy(name, ours[name], theirs[name], encoder, source)
        if how.fits:
            taken.append(name)
            if how.note:
                report.changed[name] = how.note
        else:
            misfits.append(f"{name} is {_shape(theirs[name])}, here {_shape(ours[name])}")
            report.random[name] = how.note
    if not taken:
        reason = f"for example {misfits[0]}" if misfits else "no name in common"
        raise CheckpointError(
            f"{where}: nothing of it fits this model ({reason}); choose a model of the same width"
        )
    report.taken += taken
    kept = (name for name in theirs if part == "both" or name.startswith(f"{part}."))
    report.unused += [name for name in kept if name not in ours]


@dataclass
class _Copied:
    fits: bool
    note: str = ""


def _copy(name: str, ours: Tensor, theirs: Tensor, encoder: Encoder, source: Encoder) -> _Copied:
    """Copy one tensor, whole or what of it fits."""
    same_shape = ours.shape == theirs.shape
    if name == "text.token_embed.weight" and ours.shape[1:] == theirs.shape[1:]:
        mapping = same_pieces(encoder.tokenizer, source.tokenizer, len(ours), len(theirs))
        if mapping is not None:
            rows, their_rows = mapping
            ours[rows] = theirs[their_rows].to(ours.dtype)
            found, count = len(rows), len(ours)
            return _Copied(
                found > 0,
                f"another vocabulary; {found:,} of {count:,} pieces found in it, "
                f"{count - found:,} start at random",
            )
    if same_shape:
        ours.copy_(theirs)
        return _Copied(True)
    if name == "image.positions" and ours.shape[1:] == theirs.shape[1:]:
        grids = [round((len(table) - 1) ** 0.5) for table in (theirs, ours)]
        ours.copy_(resize_positions(theirs, grids[1]))
        return _Copied(True, "resized from {0}x{0} to {1}x{1} patches".format(*grids))
    if name == "text.positions" and ours.shape[1:] == theirs.shape[1:]:
        rows = min(len(ours), len(theirs))
        ours[:rows] = theirs[:rows].to(ours.dtype)
        rest = f", {len(ours) - rows:,} start at random" if len(ours) > rows else ""
        return _Copied(True, f"the first {rows:,} of {len(theirs):,} rows{rest}")
    return _Copied(False, f"{_shape(theirs)} there, {_shape(ours)} here")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def same_pieces(
    ours: PreTrainedTokenizerFast | None,
    theirs: PreTrainedTokenizerFast | None,
    our_rows: int,
    their_rows: int,
) -> tuple[list[int], list[int]] | None:
    """Return rows of our embedding and the rows of theirs that stand for the same pieces.

    Special tokens are the same where their role is (padding, unknown, start, end). None where both
    tokenizers are alike, so that rows are alike as they stand, or where one is not there.
    """
    if ours is None or theirs is None:
        return None
    vocabulary, other = ours.get_vocab(), theirs.get_vocab()
    roles = _roles(ours), _roles(theirs)
    if vocabulary == other and roles[0] == roles[1] and our_rows == their_rows:
        return None
    special = set(roles[0].values()), set(roles[1].values())
    # A piece that is a special token on one side alone means something else there.
    pairs = {
        row: other[piece]
        for piece, row in vocabulary.items()
        if piece in other and row not in special[0] and other[piece] not in special[1]
    }
    # Roles may share a row: start and end count for more than padding, which nothing attends to.
    pairs |= {row: roles[1][role] for role, row in roles[0].items() if role in roles[1]}
    found = sorted((a, b) for a, b in pairs.items() if a < our_rows and b < their_rows)
    return [a for a, _ in found], [b for _, b in found]


def _roles(tokenizer: Any) -> dict[str, int]:
    found = {role: getattr(tokenizer, f"{role}_token_id") for role in ROLES}
    return {role: int(row) for role, row in found.items() if row is not None}


def _add_untouched(model: M2Encoder, report: InitReport) -> None:
    """Name what no source was asked for, so that the report leaves nothing out."""
    known = {*report.taken, *report.random}
    for name in model.state_dict():
        if name not in known:
            of_both = not name.startswith(("image.", "text."))
            why = "towers start from different models" if of_both else "no source given"
            report.random[name] = why
