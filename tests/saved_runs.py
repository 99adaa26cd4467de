"""Runs that tests stop, and what they read of the checkpoints that a run has left."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from m2encoder.batch import BatchStream

TIMES = ("samples_per_s", "seconds", "waiting", "mfu")
"""How the names of columns begin that differ from run to run."""


@dataclass
class StopsAt:
    """A stream that is interrupted before it gives batch `step`."""

    stream: BatchStream
    step: int

    @property
    def steps_per_epoch(self):
        return self.stream.steps_per_epoch

    @property
    def pairs(self):
        return self.stream.pairs

    def batches(self, first_step, last_step):
        yield from self.stream.batches(first_step, min(self.step, last_step))
        if self.step < last_step:
            raise KeyboardInterrupt


def tensors_of(checkpoint):
    """Every tensor by name (model/..., optimizer/..., ema/...), whole, whoever wrote its pieces."""
    reader = HuggingFaceStorageReader(str(checkpoint))
    facts: Any = reader.read_metadata().state_dict_metadata
    found = {
        name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in facts.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(found, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    return found


def weights_of(checkpoint):
    """The model's state alone."""
    return {
        name.removeprefix("model/"): tensor
        for name, tensor in tensors_of(checkpoint).items()
        if name.startswith("model/")
    }
