"""The numbers in the tensors of a compressed linear: finite, in their range, in agreement with each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from llmsqueeze.model.checkpoint import all_finite
from llmsqueeze.parts import Affine, Coded, DualBinary, Integers, LowRank, Sparse, Spec, bitpack
from llmsqueeze.quantizers import dual_binary


def kept_errors(name: str, tensor: Tensor) -> Iterator[str]:
    """The errors of a tensor that is not compressed."""
    if tensor.is_floating_point() and tensor.numel():
        wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()
        if not all_finite(wide):
            yield f"{name} holds numbers that are not finite"


def part_errors(
    linear: str, shape: tuple[int, int], spec: Spec, names: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> Iterator[str]:
    """The errors of one part of a linear [rows, cols].

    names: tensor of the part -> its name in the file; tensors: tensor of the part -> its value, as `parts.layout` says.
    """
    for kind, tensor in tensors.items():
        yield from kept_errors(names[kind], tensor)
    if spec["part"] in (Affine.kind, DualBinary.kind):
        yield from _grid_errors(spec, names, tensors, shape[1])
    elif spec["part"] == Sparse.kind:
        yield from _sparse_errors(linear, shape, spec, names, tensors)
    elif spec["part"] in (Coded.kind, Integers.kind):
        if bool((tensors["escape_index"].diff() <= 0).any()):
            yield f"{names['escape_index']} is not in order"
    elif spec["part"] != LowRank.kind:
        yield f"{linear} holds a part of the unknown kind {spec['part']}"
    if "rows" in tensors:
        marked = int(bitpack.unpack(tensors["rows"][None], 1, shape[0]).sum())
        if marked != spec["rows"]:
            yield f"{names['rows']} marks {marked} rows; the part holds {spec['rows']}"


def _sparse_errors(
    linear: str, shape: tuple[int, int], spec: Spec, names: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> Iterator[str]:
    part = Sparse.restore(shape, spec, tensors)
    count = int(part.counts.sum())
    if count != spec["count"]:
        yield f"{names['row_count']} counts {count} outliers; there are {spec['count']}"
    if len(part.columns) and int(part.columns.max()) >= shape[1]:
        yield f"{names['index']} points beyond the {shape[1]} columns of {linear}"


def _grid_errors(spec: Spec, names: Mapping[str, str], tensors: Mapping[str, Tensor], cols: int) -> Iterator[str]:
    if spec["part"] == Affine.kind and bool((tensors["scale"] == 0).any()):
        yield f"{names['scale']} holds zeros"
    if spec["part"] == DualBinary.kind:
        alphas = tensors["alpha1"].float(), tensors["alpha2"].float()
        if not bool(dual_binary.in_order(*alphas).all()):
            yield f"{names['alpha1']} and {names['alpha2']} cross: their levels are not in order"
    for kind in ("codes", "plane1", "plane2"):
        if kind in tensors:
            yield from padding_errors(names[kind], tensors[kind], cols * (spec["bits"] if kind == "codes" else 1))


def padding_errors(name: str, packed: Tensor, bits: int) -> Iterator[str]:
    """The rest of each row's last word, behind its `bits`, must be zeros; packed int32 [rows, words]."""
    used = bits % 32
    if used and bool((packed[:, -1].long() & 0xFFFFFFFF).bitwise_right_shift(used).any()):
        yield f"{name} has bits set beyond its last column"
