"""The errors that reach a user, each with the exit code that the command line returns for it.

Not for a caller's mistake inside Python (ValueError, TypeError), nor for what cannot happen
(assert).
"""


class M2EncoderError(Exception):
    """Base of every error that m2encoder raises on purpose; one line, no traceback needed."""

    exit_code = 1


class ConfigError(M2EncoderError):
    """A setting, option or configuration file is wrong."""

    exit_code = 2


class PlacementError(ConfigError, ValueError):
    """Ranks cannot be arranged as asked: a grid, a group or a world that do not fit each other."""


class FeatureError(M2EncoderError, ValueError):
    """Features that a contrastive loss cannot take; raised on every rank, naming the one at fault.

    A ValueError too, because the loss is also used alone. `rank` and `row` are set where one row of
    one rank is to blame.
    """

    def __init__(self, message: str, *, rank: int | None = None, row: int | None = None) -> None:
        super().__init__(message)
        self.rank, self.row = rank, row


class DataError(M2EncoderError):
    """A picture, text, shard, index or embedding cannot be used as it is."""

    exit_code = 3


class CheckpointError(M2EncoderError):
    """A model folder or training checkpoint is missing, damaged or of another shape."""

    exit_code = 3


class StoppedError(M2EncoderError):
    """A run saved and stopped because it was told to (SIGTERM); nothing is wrong."""

    exit_code = 143


class MissingExtraError(M2EncoderError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, *, extra: str) -> None:
        super().__init__(
            f"{package} is not installed, but this needs it; "
            f"install it with: pip install 'm2encoder[{extra}]'"
        )
