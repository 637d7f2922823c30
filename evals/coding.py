"""The entropy coder by itself: bytes against the ideal code length, and speed.

    python evals/coding.py [--threads 1 2] [--folders DIR ...] [--out FILE.json]

Matrices of the shapes of an 8B model, integers drawn from normal distributions under steps that differ by row and
column as coded weights' do. Speed: million weights a second, the median of five; encoding counts the integers, chooses
the tables, codes, and sums up; decoding gives integers of one byte, dense makes bfloat16 weights of streams. Ideal is
the entropy of the integers under the tables' contexts, with counts that are known for nothing. `--folders`: coded
folders, whose streams are compared with the same ideal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmsqueeze.formats.entries import read_entries
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.parts import Coded
from llmsqueeze.parts.coded import LIMIT, contexts_of
from llmsqueeze.parts.coding import rans

TIMES = 5
SHAPES = ((4096, 4096), (1024, 4096), (4096, 14336), (14336, 4096), (128, 352))


def integers(rows: int, cols: int, bits: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers of about so many bits, and exponents of their steps [rows] and [cols]."""
    generator = torch.Generator().manual_seed(0)
    row = (torch.randn(rows, generator=generator) * 8).round().long()
    col = (torch.randn(cols, generator=generator) * 8).round().long()
    step = 2.0 ** ((row[:, None] + col[None]) / 16) * 2.0 ** (2.05 - bits)
    return (torch.randn(rows, cols, generator=generator) / step).round(), row, col


def ideal_bits(values: torch.Tensor, part: Coded) -> float:
    """Entropy of the integers in each context."""
    contexts = contexts_of(part.row_step, part.col_step)
    counted = rans.counts((values.clamp(-LIMIT, LIMIT).to(torch.int16) + 128).to(torch.uint8).numpy(), contexts)
    total = 0.0
    for counts in counted:
        used = counts[counts > 0].astype(np.float64)
        total -= float((used * np.log2(used / used.sum())).sum()) if len(used) else 0.0
    return total


def measure(rows: int, cols: int, bits: float, threads: int) -> dict[str, Any]:
    """Codes a matrix and decodes it again, some times."""
    torch.set_num_threads(threads)
    values, row, col = integers(rows, cols, bits)
    part = Coded.from_integers(values, row, col, torch.bfloat16)
    assert torch.equal(part.decoded().values(), values)
    nbytes = sum(tensor.nbytes for tensor in part.tensors().values())
    steps = part.row_step.nbytes + part.col_step.nbytes
    return {
        "rows": rows,
        "cols": cols,
        "threads": threads,
        "bits": 8 * nbytes / values.numel(),
        "over_ideal": 8 * (nbytes - steps) / ideal_bits(values, part) - 1,
        "encode": speed(lambda: Coded.from_integers(values, row, col, torch.bfloat16), values.numel()),
        "decode": speed(part.decoded, values.numel()),
        "dense": speed(lambda: part.dense(torch.bfloat16), values.numel()),
    }


def speed(run: Callable[[], object], numel: int) -> float:
    """Million weights a second, the median of `TIMES` runs."""
    seconds = []
    for _ in range(TIMES):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return numel / statistics.median(seconds) / 1e6


def of_folder(folder: Path) -> dict[str, Any]:
    """How much longer a folder's streams and tables are than the ideal."""
    checkpoint, ideal, stored, numel = open_checkpoint(folder), 0.0, 0, 0
    for entry in read_entries(checkpoint).values():
        for spec, names in zip(entry.specs, entry.names, strict=True):
            if spec["part"] == Coded.kind:
                part = Coded.restore(entry.shape, spec, {k: checkpoint.read_raw(n) for k, n in names.items()})
                ideal += ideal_bits(part.decoded().values(), part)
                stored += 8 * sum(tensor.nbytes for tensor in part.streams.tensors().values())
                numel += entry.shape[0] * entry.shape[1]
    return {
        "folder": folder.name,
        "ideal_bits": ideal / numel,
        "stored_bits": stored / numel,
        "over_ideal": stored / ideal - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folders", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    for threads in args.threads:
        for rows, cols in SHAPES:
            row = measure(rows, cols, args.bits, threads)
            results.append(row)
            print(
                f"{threads} threads, {rows:5} x {cols:5} {row['bits']:.3f} bits, {100 * row['over_ideal']:+.2f} % over "
                f"ideal; million weights a second: encode {row['encode']:6.1f}, decode {row['decode']:6.1f}, dense "
                f"{row['dense']:6.1f}",
                flush=True,
            )
    for folder in args.folders:
        results.append(of_folder(folder))
        row = results[-1]
        print(
            f"{folder.name:24} {row['stored_bits']:.4f} bits in streams and tables, {100 * row['over_ideal']:+.2f} % "
            f"over the ideal {row['ideal_bits']:.4f}",
            flush=True,
        )
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
