"""`llmsqueeze generate`: let a model answer."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from llmsqueeze.cli.options import MODEL_HELP, Device, TrustCode
from llmsqueeze.cli.terminal import Outcome, hush, verb
from llmsqueeze.errors import RecipeError
from llmsqueeze.progress import Progress


@verb
def generate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP + "; compressed or not")],
    prompt: Annotated[str | None, typer.Argument(help="Text to answer, or to go on from. [standard input]")] = None,
    baseline: Annotated[str | None, typer.Option(help="Model that answers too, usually the original.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=10.0, help="0: always the likeliest token; higher: drawn more freely.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn.")] = 0,
    plain: Annotated[
        bool, typer.Option("--plain", help="Go on from the text, even if the model has a chat template.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Compute in: stored (that of the model), float32, or auto (the faster here).")
    ] = "auto",
    device: Device = "auto",
    trust_remote_code: TrustCode = False,
    *,
    as_text: bool,
    progress: Progress,
) -> Outcome:
    """Let MODEL answer PROMPT; the text appears as it is written."""
    if prompt is None and sys.stdin.isatty():
        raise RecipeError('there is no prompt; give one, as in `llmsqueeze generate FOLDER "Once upon a time"`')

    from llmsqueeze.evaluation.generate import Sampling
    from llmsqueeze.evaluation.generate import generate as answer

    hush()
    text = sys.stdin.read() if prompt is None else prompt
    sampling = Sampling(max_tokens, temperature, seed, plain)
    on_text = (lambda piece: typer.echo(piece, nl=False)) if as_text else (lambda _: None)
    answers: list[dict[str, Any]] = []
    for name in [baseline, model] if baseline else [model]:
        if as_text and baseline:
            typer.echo(f"{name}:")
        given: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        answers.append(answer(name, text, sampling, on_text, **given, progress=progress).as_dict())
        if as_text:
            typer.echo("\n" if baseline and name != model else "")
        progress.note("{model}: {tokens} tokens, {tokens_per_second} a second".format(**answers[-1]))
    return Outcome({"prompt": text, "answers": answers}, lambda _: None)
