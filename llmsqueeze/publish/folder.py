"""A compressed folder for people: its record, its linears with their sizes, and its scores, for terminal and pages.

It reads the JSON files and the headers of the weights. So it is fast for a model of any size. Scores can hold any
value: a value of the wrong type counts as unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmsqueeze.errors import CheckpointError, UnsupportedError, nearest
from llmsqueeze.files import COMPARISON, EVALUATION, SIDECAR, read_json_if_there
from llmsqueeze.formats.entries import Entry, is_compressed, read_entries
from llmsqueeze.formats.experts import joined
from llmsqueeze.formats.public import shown
from llmsqueeze.formats.record import read_record
from llmsqueeze.model.checkpoint import Checkpoint, open_checkpoint
from llmsqueeze.publish.linears import Linear, compressed_linears, dense_linears
from llmsqueeze.publish.numbers import finite

BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")  # the names of this number in configs
# the ends of the keys that stand beside a task's scores
DERIVED = ("_stderr", "_difference", "_right_to_wrong", "_wrong_to_right", "_mcnemar_p")

# the keys of the record that card and report need
NEEDED = ("model", "recipe", "bits_per_weight", "quantized_weights", "nbytes", "nbytes_original")


@dataclass(frozen=True)
class Folder:
    """A compressed folder.

    `record`: `llmsqueeze.json`. `evaluation`, `comparison`: the scores, empty if not measured. `entries`: the linears
    in the config, empty if the folder holds ordinary weights. `linears`: in the order of their compression. `towers`:
    those of other towers and projectors, and `ends`: rounded embeddings and head, which are not among them.
    """

    name: str
    checkpoint: Checkpoint
    record: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    comparison: Mapping[str, Any]
    entries: Mapping[str, Entry]
    linears: Sequence[Linear]
    towers: Sequence[Linear] = ()
    ends: Sequence[Linear] = ()

    @property
    def recipe(self) -> Mapping[str, Any]:
        return mapping(self.record.get("recipe"))

    @property
    def format(self) -> str:
        """llmsqueeze, compressed-tensors or dense."""
        return str(self.record.get("format", "llmsqueeze"))

    @property
    def dense(self) -> bool:
        """Whether the folder was exported as ordinary weights."""
        return not self.entries

    @property
    def unchanged(self) -> str:
        """What is as in the original, in words."""
        return "norms" if self.ends or self.recipe.get("code_embeddings") else "embeddings, norms"

    @property
    def blocks(self) -> int:
        """The number of decoder blocks, 0 if unknown."""
        counts = (finite(self.checkpoint.config.get(key)) for key in BLOCK_COUNTS)
        return int(next((count for count in counts if count), 0))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.checkpoint.nbytes

    @property
    def nbytes_original(self) -> float | None:
        return finite(self.record.get("nbytes_original"))

    @property
    def linear_nbytes(self) -> int:
        return sum(linear.nbytes or 0 for linear in self.linears)

    @property
    def weights(self) -> int:
        """The number of weights in the compressed linears."""
        return sum(linear.weights or 0 for linear in self.linears) or int(self.record["quantized_weights"])

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of all tensors of the linears."""
        return self.linear_nbytes * 8 / self.weights if self.linear_nbytes else float(self.record["bits_per_weight"])

    @property
    def compared(self) -> list[Mapping[str, Any]]:
        """The models in the comparison, the original first."""
        models = self.comparison.get("models")
        return [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []

    @property
    def distillations(self) -> list[Mapping[str, Any]]:
        """All distillations of the folder, the first one first."""
        entries = self.record.get("distillation")
        return [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []


def read_folder(path: Path) -> Folder:
    """The folder at `path`.

    Raises UnsupportedError if llmsqueeze did not write it, CheckpointError if a file is missing or damaged.
    """
    checkpoint = joined(open_checkpoint(path))
    record = read_record(path)
    entries = read_entries(checkpoint) if is_compressed(checkpoint) or not record else {}
    errors = output_errors(record)
    towers, ends = (set(record.get(kind, ())) for kind in ("towers", "embeddings"))
    linears = compressed_linears(checkpoint, entries, errors) if entries else dense_linears(checkpoint, errors)
    return Folder(
        name=path.resolve().name,
        checkpoint=checkpoint,
        record=record,
        evaluation=read_json_if_there(path / EVALUATION),
        comparison=read_json_if_there(path / COMPARISON),
        entries=entries,
        linears=[linear for linear in linears if linear.name not in towers | ends],
        towers=[linear for linear in linears if linear.name in towers],
        ends=[linear for linear in linears if linear.name in ends],
    )


def read_public(path: Path) -> Folder:
    """The folder without local paths and tokens, for a card or a page.

    Raises as `read_folder` and `complete_record`.
    """
    complete_record(path)
    folder = read_folder(path)
    return replace(
        folder,
        record=shown(folder.record),
        evaluation=shown(folder.evaluation),
        comparison=shown(folder.comparison),
    )


def complete_record(path: Path) -> dict[str, Any]:
    """The folder's `llmsqueeze.json` with all that card and report need.

    Raises UnsupportedError if there is none, CheckpointError if a key is missing or has the wrong type.
    """
    if not (path / SIDECAR).is_file():
        raise UnsupportedError(_not_ours(path))
    record = read_record(path)
    if wrong := [key for key in NEEDED if record.get(key) is None]:
        raise CheckpointError(
            f"'{path / SIDECAR}' has no usable {', '.join(wrong)}; run `llmsqueeze quantize` again to write it"
        )
    return record


def _not_ours(path: Path) -> str:
    """The error message for a path that is not a folder of ours, with the nearest one that is."""
    ours = [file.parent for base in (path, path.parent) if base.is_dir() for file in base.glob(f"*/{SIDECAR}")]
    hint = nearest(path.name, [folder.name for folder in ours])
    if not path.is_dir():
        return f"there is no folder {path}; name a folder that llmsqueeze wrote{hint}"
    inside = next((folder for folder in ours if folder.parent == path), None)
    hint = f"; did you mean '{inside}'?" if inside else hint
    return f"{path} has no {SIDECAR}; name a folder that llmsqueeze wrote{hint}"


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def task_scores(values: Any) -> dict[str, float]:
    """metric -> score of a task, without standard errors and differences."""
    scores = {key: finite(value) for key, value in mapping(values).items() if not key.endswith(DERIVED)}
    return {key: score for key, score in scores.items() if score is not None}


def output_errors(record: Mapping[str, Any]) -> dict[str, float | None]:
    return {str(name): finite(value) for name, value in mapping(record.get("errors")).items()}
