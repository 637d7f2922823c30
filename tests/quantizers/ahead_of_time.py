"""Compiles Triton's kernels for GPUs that are not here, and prints one line of JSON for each. Run it as a program,
without TRITON_INTERPRET: the interpreter's kernels cannot be compiled.

Weights are rounded on the CPU as on a GPU, but where a kernel would start, it is compiled for the arguments that it
would get. So results are not computed, and only the kernels' kinds depend on the weights.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmsqueeze.parts import Grid
from llmsqueeze.quantizers import gptq as gptq_module
from llmsqueeze.quantizers import kernels
from llmsqueeze.quantizers.curvature import Curvature
from llmsqueeze.quantizers.grids import fit_on_device
from llmsqueeze.quantizers.kernels import feedback, levels, scales, sweep
from llmsqueeze.quantizers.steps import RoundedToSteps

POINTERS = {torch.float32: "*fp32", torch.uint8: "*u8", torch.bool: "*i1"}
seen: set[str] = set()
capabilities = [80]


def compile_kernel(kernel: Any, rows: int, *arguments: Any, **constants: Any) -> None:
    """As `levels.launch`, but for a GPU that is not here."""
    constants |= {"ROWS": levels.ROWS, "COLUMNS": gptq_module.PANEL}
    signature, attributes = dict.fromkeys(constants, "constexpr"), {}
    for place, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        special = name not in kernel.do_not_specialize
        if isinstance(value, int) and special and value == 1:  # as Triton treats it
            signature[name], constants[name] = "constexpr", 1
        elif special and not isinstance(value, float):
            aligned = value.data_ptr() if isinstance(value, Tensor) else value
            attributes |= {(place,): [["tt.divisibility", 16]]} if aligned % 16 == 0 else {}
    ordered = {name: signature[name] for name in kernel.arg_names}
    for capability in capabilities:
        source = ASTSource(kernel, ordered, constants, attributes)
        if f"{capability} {source.hash()}" not in seen:
            seen.add(f"{capability} {source.hash()}")
            report(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=levels.OPTIONS), capability)


def report(binary: Any, capability: int) -> None:
    ptx = binary.asm["ptx"]
    facts = {
        "kernel": binary.metadata.name,
        "capability": capability,
        "shared": binary.metadata.shared,
        "bytes": len(binary.asm["cubin"]),
        "divisions": ptx.count("div.rn.f32"),
        "inexact": len(re.findall(r"fma\.rn\.f32|div\.full|div\.approx|\.ftz", ptx)),
    }
    sys.stdout.write(json.dumps(facts) + "\n")


def main() -> None:
    for module in (feedback, sweep, scales):
        module.launch = compile_kernel  # type: ignore[attr-defined]
    kernels.usable = lambda tensor: True  # type: ignore[assignment]
    gptq_module.panel_compiled = feedback.round_panel
    weight, H = torch.randn(8, 160), torch.eye(160)
    curvature, pinned = Curvature(H, H.clone(), H[0]), torch.zeros(8, 160, dtype=torch.bool)
    first, both = [80], [80, 90]
    for grid, outliers, search, capabilities[:] in (
        (Grid(3, 64, True), None, False, first),
        (Grid(3, 64, False), pinned, True, both),
        (Grid(2, 64, True, dual=True), pinned, True, first),
        (Grid(1, 64, True, half=True), None, True, first),
    ):
        dtype = torch.float16 if grid.half else torch.bfloat16
        scales.fit(weight[:, : grid.group_size], H[0] if search else None, grid, dtype)
        scale, zero = fit_on_device(weight, None, grid, torch.bfloat16)
        codes, error = torch.zeros_like(weight, dtype=torch.uint8), torch.zeros(8, 128)
        given = levels.Levels.of_grid(grid, scale.repeat(3, 1).T, zero.repeat(3, 1).T, 160)
        feedback.round_columns(weight, weight, outliers, H, given, slice(0, 128), slice(0, 64), codes, error)
        sweep.descend(codes, weight, weight, H, given, outliers)
    start = RoundedToSteps(weight, torch.zeros(8).long(), torch.zeros(160).long(), torch.zeros(8).long())
    for outliers, capabilities[:] in ((None, first), (pinned, first)):
        sweep.sweep_steps(feedback.feedback(weight, start, curvature, outliers), weight, H, outliers)


if __name__ == "__main__":
    main()
