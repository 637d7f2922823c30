"""`llmsqueeze export`: write a compressed folder in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmsqueeze.cli.options import Overwrite, TrustCode, written_to
from llmsqueeze.cli.terminal import Outcome, hush, verb
from llmsqueeze.progress import Progress


@verb
def export(
    folder: Annotated[str, typer.Argument(help="Folder that llmsqueeze wrote")],
    to: Annotated[
        str,
        typer.Option(help="compressed-tensors (stock transformers, vLLM), dense (anything), peft, gguf or gguf-map."),
    ],
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32. [dense: the model's own; peft: fp32]")] = None,
    bits: Annotated[
        int | None,
        typer.Option(help="With coded weights and compressed-tensors: the width that they are rounded to. [4]"),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="With --bits: columns that share a scale; -1: whole rows. [128, or the largest that fits]"),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="With dense: LoRA adapter (folder or Hub id) to merge into the weights.")
    ] = None,
    gguf_base: Annotated[
        Path | None,
        typer.Option(help="With gguf: a GGUF file of the same model to put the weights in. [llama.cpp's converter]"),
    ] = None,
    out: Annotated[Path | None, written_to("Folder or file to write. [<folder>-<to>, <folder>.gguf]")] = None,
    overwrite: Overwrite = False,
    trust_remote_code: TrustCode = False,
    *,
    progress: Progress,
) -> Outcome:
    """Write a compressed FOLDER in another format. Only what it has no place for is rounded again, and that is said."""
    from llmsqueeze.cli.tables.runs import print_export
    from llmsqueeze.formats.export import export as export_folder

    hush()
    summary = export_folder(
        folder,
        to,
        out,
        dtype=dtype,
        bits=bits,
        group_size=group_size,
        adapter=adapter,
        gguf_base=gguf_base,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    return Outcome(summary, print_export)
