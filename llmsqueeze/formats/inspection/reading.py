"""One reading of a model folder: each tensor comes from disk once and serves all checks.

Its bits are compared with the digest of the tensor that was handed to the writer, its numbers are checked
(integrity.py), and the weight that the parts of a linear sum to is compared with the weight that was computed with.
The caller can run a block with these weights before the next block is read. Memory: the tensors that the caller keeps,
and one linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmsqueeze import parts
from llmsqueeze.errors import CheckpointError, VerificationError
from llmsqueeze.formats.folder import digest
from llmsqueeze.formats.inspection.integrity import kept_errors, part_errors
from llmsqueeze.formats.opened import Folder
from llmsqueeze.parts import Integers, Part

RUNTIMES = ("native", "transformers", "vllm")


@dataclass
class Findings:
    """errors: the folder cannot be used. obstacles: runtime -> why it does not open the folder. notes: good to know."""

    errors: list[str] = field(default_factory=list)
    obstacles: dict[str, list[str]] = field(default_factory=lambda: {runtime: [] for runtime in RUNTIMES})
    notes: list[str] = field(default_factory=list)

    def verdicts(self) -> dict[str, str]:
        """runtime -> why it does not open the folder, "" if it does."""
        return {one: self.errors[0] if self.errors else "; ".join(self.obstacles[one]) for one in RUNTIMES}


@dataclass(frozen=True)
class Expected:
    """The folder as it was written: digests of all tensors, and of the weights (float32, [rows, cols]) that linears
    sum to; weights None: not known."""

    tensors: Mapping[str, bytes]
    weights: Mapping[str, bytes] | None


def compare_names(folder: Folder, expected: Expected) -> None:
    """Raises VerificationError unless the folder has the expected tensors and linears, and no others."""
    if different := sorted(set(expected.tensors) ^ set(folder.checkpoint.tensors)):
        raise VerificationError(f"{different[0]} was written, or can be read, but not both")
    if expected.weights is not None and (different := sorted(set(folder.entries) ^ set(expected.weights))):
        raise VerificationError(f"the config and the compressed linears differ in {different[0]}")


class Reading:
    """Reads the tensors of a folder, each once. `errors` grows as they are read."""

    def __init__(
        self,
        folder: Folder,
        expected: Expected | None = None,
        device: torch.device | str = "cpu",
        sound: bool = True,
    ) -> None:
        """expected: None if only the numbers are checked. device: of the weights. sound: tensors have the shapes that
        the config says; if not, only their bits are compared."""
        self.errors: list[str] = []
        self._checkpoint, self._entries = folder.checkpoint, folder.entries
        self._digests = expected.tensors if expected else None
        self._weights = expected.weights if expected else None
        self._device, self._sound = device, sound
        self._unread = dict.fromkeys(folder.checkpoint.tensors)
        self._linear_of = {name: linear for linear, entry in self._entries.items() for name in entry.tensors}
        self._shapes = {name: entry.shape for entry in self._entries.values() for name in entry.beside}

    def kept(self, name: str) -> Tensor:
        """A tensor that is not compressed. Raises VerificationError."""
        tensor = self._read(name)
        self.errors += kept_errors(name, tensor)
        return tensor

    def weight(self, linear: str) -> Tensor:
        """float32 [rows, cols]: a linear's weight from its parts. Raises VerificationError, also for wrong numbers."""
        restored = self._parts(linear)
        if self.errors:
            raise VerificationError(failed_check(self.errors[0]))
        weight = parts.sum_of_parts(restored)
        if self._weights is not None and digest(weight) != self._weights[linear]:
            raise VerificationError(f"{linear}, put together from the file, is not the weight that was computed with")
        return weight

    def rest(self) -> None:
        """Reads everything that was not read before; damaged tensors are errors. Raises VerificationError."""
        for name in list(self._unread):
            linear = self._linear_of.get(name)
            if name not in self._unread:
                continue  # read with its linear
            try:
                self._read_with(name, linear)
            except CheckpointError as error:
                self.errors.append(str(error))
                for one in self._entries[linear].tensors if linear else ():
                    self._unread.pop(one, None)

    def _read_with(self, name: str, linear: str | None) -> None:
        """A tensor, and all others of its linear."""
        if not self._sound:
            self._read(name)
        elif linear is None:
            self.kept(name)
        elif self._weights is not None:
            self.weight(linear)
        else:
            self._parts(linear)

    def _parts(self, linear: str) -> list[Part]:
        """A linear's parts on the device, none of them coded; their errors are noted."""
        entry = self._entries[linear]
        for name in entry.beside:
            self._read(name)
        restored: list[Part] = []
        for spec, names in zip(entry.specs, entry.names, strict=True):
            tensors = {kind: self._read(name) for kind, name in names.items()}
            self.errors += part_errors(linear, entry.shape, spec, names, tensors)
            moved = {kind: tensor.to(self._device) for kind, tensor in tensors.items()}
            try:
                part = parts.decoded(parts.restore(entry.shape, spec, moved))
                if isinstance(part, Integers):
                    part.values()  # the escapes are inside the matrix
                restored.append(part)
            except CheckpointError as error:
                self.errors.append(f"{linear}: {error}")
        return restored

    def _read(self, name: str) -> Tensor:
        stored = self._checkpoint.tensors.get(name)
        if stored is not None and name in self._shapes:  # read_entries read it
            tensor = torch.tensor(self._shapes[name], dtype=stored.dtype)
        else:
            tensor = self._checkpoint.read_raw(name)
        self._unread.pop(name, None)
        if self._digests is not None and digest(tensor) != self._digests[name]:
            file = self._checkpoint.tensors[name].file.name
            raise VerificationError(f"{name} in {file} is not what was written: disk or memory are faulty")
        return tensor


def failed_check(error: str) -> str:
    return f"the folder that was written does not pass the check: {error}"
