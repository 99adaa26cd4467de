"""Short keys of texts: the same for texts that say the same in other clothes.

Not for files (shards.sha256_of) nor for models (Encoder.fingerprint).
"""

import unicodedata
from hashlib import blake2b


def text_key(text: str) -> int:
    """Return a signed 64-bit key of the normalised text.

    Normalised: NFKC (full-width letters and punctuation become half-width), case-folded, runs of
    white space one space, none at the ends. Traditional and simplified characters stay apart.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    digest = blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    # not the smallest number, which means "no text" to the loss (handshake.MISSING)
    return max(int.from_bytes(digest, "big", signed=True), 1 - 2**63)
