"""Read other people's torch files without running what is in them.

A checkpoint is a pickle, and a pickle may name any function. Not for our own files: model folders
and training checkpoints hold safetensors.
"""

import ctypes
import logging
import mmap
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch import _utils as torch_utils

from m2encoder.errors import CheckpointError

logger = logging.getLogger(__name__)

_SAFE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in vars(torch).values()
       if isinstance(dtype, torch.dtype)},
}  # fmt: skip
_REBUILDERS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")  # of torch._utils


def read_torch_file(path: Path) -> Any:
    """Return what torch.save (or safetensors) wrote, on the CPU, tensors mapped from the file.

    First with torch's own weights_only reader. A zip file that also holds objects of other classes
    (Lightning's hyper-parameters, say) is read again by an unpickler that rebuilds tensors and
    plain containers and puts an inert stub in the place of everything else, so nothing that the
    file names is imported or called. Raises CheckpointError if the file is missing, truncated or of
    another kind.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file; check the path")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged safetensors file ({error})") from None
    names = _zip_names(path)
    options: dict[str, Any] = {"map_location": "cpu", "mmap": names is not None}
    try:
        return torch.load(path, weights_only=True, **options)
    except Exception as error:  # a damaged file raises anything, from KeyError to struct.error
        if names is None:
            raise _damaged(path, error) from None
    if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
        raise CheckpointError(
            f"{path}: a TorchScript program, expected a checkpoint of plain tensors; save the "
            f"model's state_dict() instead"
        )
    stubs: set[str] = set()
    try:
        content = torch.load(
            path, weights_only=False, pickle_module=_restricted_pickle(stubs), **options
        )
    except Exception as error:
        raise _damaged(path, error) from None
    logger.info("%s: ignored objects of %s", path.name, ", ".join(sorted(stubs)) or "no class")
    return content


def _zip_names(path: Path) -> list[str] | None:
    """Return the entries of torch's zip format, None for its format before version 1.6.

    Raises CheckpointError if a zip file is cut off: its table of contents stands at the end.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            start = file.read(4)
        if start in (b"", b"PK\x03\x04"):
            size = path.stat().st_size
            raise CheckpointError(
                f"{path}: truncated at {size:,} bytes, expected a whole torch file; download it "
                f"again"
            )
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    reason = f" ({reason.split('. ')[0][:200]})" if " " in reason else ""
    return CheckpointError(
        f"{path}: not a torch checkpoint, or damaged{reason}; expected a file of tensors that "
        f"torch.save wrote"
    )


class _Inert:
    """Stands for an object of a class that is not rebuilt; takes whatever a pickle does to it."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def _ignore(self, *_: Any, **__: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore

    def __call__(self, *_: Any, **__: Any) -> "_Inert":
        return self


class _Rebuild:
    """A function of torch that builds a tensor; unlike the function it cannot be changed."""

    __slots__ = ("_function",)

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, *_: Any) -> None:
        pass


def _restricted_pickle(stubs: set[str]) -> Any:
    """Return what torch.load takes for the pickle module; collects the replaced names in `stubs`.

    torch itself resolves storage types, by a table, before `find_class` is asked.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module_name: str, global_name: str, /) -> Any:
            if module_name == "torch._utils" and global_name in _REBUILDERS:
                return _Rebuild(getattr(torch_utils, global_name))
            if (found := _SAFE.get((module_name, global_name))) is not None:
                return found
            stubs.add(f"{module_name}.{global_name}")
            return type("Inert", (_Inert,), {})

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    return SimpleNamespace(Unpickler=Unpickler, load=load, __name__="restricted pickle")


def forget(tensor: Tensor) -> None:
    """Give back the memory of a mapped tensor that has been copied; it stays readable.

    Its pages come from the file again if they are looked at. Without this a process would end up
    holding the file and the model. Does nothing outside Linux.
    """
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = tensor.data_ptr() + tensor.nbytes
    if _is_mapped_file(start, end):
        size = ctypes.c_size_t(end - start)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), size, mmap.MADV_DONTNEED)


def _is_mapped_file(start: int, end: int) -> bool:
    """Whether these addresses lie in one mapping of a file; of other memory nothing is given up."""
    maps = Path("/proc/self/maps")  # "7f0000-7f1000 r--p 00000000 08:01 1234   /a/file"
    for line in maps.read_text().splitlines() if maps.exists() else ():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        low, high = (int(address, 16) for address in addresses.split("-"))
        if low <= start < high:
            return end <= high and inode != "0"
    return False
