"""Upload a model folder to the Hugging Face hub, through its own library.

So its endpoint, token and offline settings hold, and there are none of ours. Not for downloads
(hub.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi

from m2encoder.calibration import CALIBRATION
from m2encoder.encoder import Encoder
from m2encoder.errors import ConfigError, M2EncoderError
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.model_folder import save_model_folder

REPLACED = ["*.safetensors", "*.safetensors.index.json", CALIBRATION]
"""Files of an earlier upload that go when this one does not have them: weights in other parts, and
a calibration of other weights."""
REASONS = {
    401: "not logged in, or the token is not valid; run `hf auth login`, or give a token",
    403: "the token may not write there; take one with write access to it",
    404: "no such user or organisation, or it is private; check the name, or log in",
}


def push_to_hub(
    encoder: Encoder,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    license: str | None = None,
) -> str:
    """Upload a model of ours to `repo_id` (ORG/NAME), made if it is not there; returns its URL.

    private: None leaves it to the organisation's setting. license: SPDX name for the card.
    Raises M2EncoderError saying why it cannot be uploaded; nothing is then changed there, but an
    empty repository may be left. Raises ConfigError on a model of another family.
    """
    if not isinstance(encoder.model, M2Encoder):
        raise ConfigError(
            f"{encoder.name}: a {type(encoder.model).__name__} is another library's model; save it "
            f"with save_pretrained and upload it with that library"
        )
    api = HfApi(token=token, library_name="m2encoder")
    with _in_one_line(repo_id), TemporaryDirectory(prefix="m2encoder-") as scratch:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        folder = Path(scratch) / "model"
        save_model_folder(encoder, folder, license=license, repo_id=url.repo_id)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            commit_message="Upload model with m2encoder",
            delete_patterns=REPLACED,
        )
    return str(url)


@contextmanager
def _in_one_line(repo_id: str) -> Iterator[None]:
    """Turn what the library and the network raise into one line. By name: versions differ."""
    try:
        yield
    except M2EncoderError:
        raise
    except Exception as error:
        names = {kind.__name__ for kind in type(error).__mro__}
        status = getattr(getattr(error, "response", None), "status_code", None)
        if "HFValidationError" in names:
            reason = "no name of a repository, expected ORG/NAME"
        elif "OfflineModeIsEnabled" in names:
            reason = "HF_HUB_OFFLINE keeps from uploading; unset it"
        elif status is not None:
            reason = REASONS.get(status, f"the server answered {status}; try again later")
        elif "HTTPError" in names or isinstance(error, OSError):
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            reason = f"cannot be reached ({first}); check the network"
        else:
            raise
        raise M2EncoderError(f"{repo_id}: {reason}") from error
