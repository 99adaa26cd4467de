"""The one door to timm and open_clip: other toolkits that tests and benchmarks compare with.

Not for torchvision transforms or operators in our own code, which needs no torchvision.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from m2encoder.errors import MissingExtraError

# The schemas that torchvision 0.28's Python files look up while they are imported. Its compiled
# operators link against libc10_cuda and therefore do not load beside a CPU build of torch.
_TORCHVISION_OPS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_declared: list[object] = []  # a torch.library.Library undoes its declarations when collected


def import_open_clip() -> ModuleType:
    """Import open_clip, mending torchvision first. Raises MissingExtraError if it is absent."""
    return _import_peer("open_clip", distribution="open_clip_torch")


def import_timm() -> ModuleType:
    """Import timm, mending torchvision first. Raises MissingExtraError if it is absent."""
    return _import_peer("timm", distribution="timm")


def mend_torchvision() -> bool:
    """Make `import torchvision` work beside a CPU torch; True if that took the two-op shim.

    Declares the schemas of `nms` and `qnms` without an implementation: transforms and models work,
    while calling torchvision.ops.nms or decoding JPEG with torchvision still raises. Does nothing
    where torchvision is absent or imports by itself.
    """
    if find_spec("torchvision") is None:
        return False
    try:
        import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    else:
        return bool(_declared)
    from torch.library import Library

    fragment = Library("torchvision", "FRAGMENT")
    for schema in _TORCHVISION_OPS:
        fragment.define(schema)
    _declared.append(fragment)
    # What the failed import left behind would be reused half-initialised.
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    import_module("torchvision")
    return True


def _import_peer(name: str, *, distribution: str) -> ModuleType:
    for needed, package in ((name, distribution), ("torchvision", "torchvision")):
        if find_spec(needed) is None:
            raise MissingExtraError(package, extra="towers")
    mend_torchvision()
    return import_module(name)
