"""A verb as typer runs it: its help in groups, and the right word for an option that there is not."""

from __future__ import annotations

from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from llmsqueeze.errors import nearest

UsageError: Any = typer.BadParameter.__base__  # of the click that typer brings along
ALIKE = {  # what other tools call it -> what it is called here
    "out": ("output", "output-dir", "output-path", "out-dir", "outdir", "save", "save-dir", "save-path"),
    "calibration": ("dataset", "data", "calib", "calib-data", "calib-dataset", "calibration-dataset"),
    "samples": ("num-samples", "nsamples", "n-samples", "num-calibration-samples", "calib-size"),
    "seq-len": ("seqlen", "sequence-length", "max-seq-length", "max-length", "context"),
    "bits": ("wbits", "w-bit", "w-bits", "nbits", "bpw", "scheme", "quant", "type"),
    "group-size": ("groupsize", "q-group-size", "gs", "block-size"),
    "skip": ("ignore", "exclude", "modules-to-not-convert", "ignore-layers"),
    "asymmetric": ("asym", "zero-point"),
    "symmetric": ("sym",),
    "text": ("dataset", "data"),
    "tasks": ("task", "benchmarks"),
    "num-fewshot": ("fewshot", "shots", "num-shots", "nshot", "n-shot"),
    "output-path": ("out", "output", "output-dir", "out-dir", "results"),
    "distill-steps": ("iters", "iterations", "epochs"),
    "overwrite": ("yes", "overwrite-output-dir"),
}
OTHERS = "Other options"
ONCE = {"--adapter": "one is merged at a time"}  # of two the last would win, without a word


class Verb(TyperCommand):
    """Options without a group of their own come last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for name, why in ONCE.items():
            if sum(word.partition("=")[0] == name for word in args) > 1:
                refuse(f"{name} is given several times; {why}")
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            wrong = getattr(error, "option_name", None)
            if wrong is None:
                raise
            known = [name for param in self.params for name in param.opts if name.startswith("--")]
            said = f"{ctx.info_name} has no option {wrong}{right_word(wrong, known)}"
            refuse(error.format_message() if wrong in known else said)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                argument = param.param_type_name == "argument"
                group = "Arguments" if argument else getattr(param, "rich_help_panel", None) or OTHERS
                groups.setdefault(group, []).append(record)
        last = groups.pop(OTHERS, [])
        for group, records in (groups | {OTHERS if len(groups) > 1 else "Options": last}).items():
            with formatter.section(group):
                formatter.write_dl(records)


def refuse(message: str) -> NoReturn:
    """Ends the program with a line and exit code 2."""
    from llmsqueeze.cli.console import print_error

    print_error(message)
    raise typer.Exit(2)


def right_word(wrong: str, known: list[str]) -> str:
    """What is said of an option that there is not: the one that is meant, as far as that can be told."""
    name = wrong.lstrip("-").replace("_", "-").lower()
    if f"--{name}" in known:
        return f"; it is --{name}"
    meant = [option for option, words in ALIKE.items() if name in words and f"--{option}" in known]
    if meant:
        return f"; here that is --{meant[0]}"
    return nearest(f"--{name}", known) or "; --help lists all"
