"""The JSON of `speed.py` and `waiting.py` as Markdown: medians, ratios, and which targets are met.

python evals/speed_table.py [evals/results/speed.json]
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from statistics import median
from typing import Any

# row: what it is, the contender that it is compared with, the most that its time may be of the other's
TARGETS = {
    "gptq": ("`quantize --method gptq --bits 3`", "peer", 0.5),
    "descent": ("`quantize --bits 3` (descent)", "before", 0.33),
    "coded": ("`quantize --method coded --bits 3.25`", "before", 0.33),
    "plan": ("`plan --method coded --bits 3.25`", "before", 0.4),
    "eval": ("`eval --baseline` of the descent folder", "before", 0.2),
}
KERNEL, MEMORY, THREADS = 0.05, 1.1, 1.6
Runs = dict[str, list[dict[str, Any]]]


def middle(runs: list[dict[str, Any]], name: str) -> float:
    """Median over the repeats; "processor" is user and kernel together."""
    return median(run["user"] + run["kernel"] if name == "processor" else run[name] for run in runs)


def table(head: str, rows: list[list[str]]) -> list[str]:
    names = [name.strip() for name in head.split("|")]
    rule = "|".join("---" if i == 0 else "---:" for i in range(len(names)))
    return [f"| {' | '.join(names)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def met(yes: bool) -> str:
    return "yes" if yes else "**no**"


def times(rows: dict[str, Runs], left_out: dict[str, str]) -> list[str]:
    """Processor and wall time of each row against its target; rows that lack a contender say so."""
    lines = []
    for name, (what, other, target) in TARGETS.items():
        runs = rows.get(name, {})
        if missing := [contender for contender in ("tree", other) if not runs.get(contender)]:
            why = left_out.get(name, f"no run of {' or '.join(missing)}")
            lines.append([what, other, *["–"] * 6, f"{target}", f"not measured: {why}"])
            continue
        cells, ratios = [], []
        for kind in ("processor", "wall"):
            a, b = middle(runs["tree"], kind), middle(runs[other], kind)
            ratios.append(a / b)
            cells += [f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}"]
        repeats = min(len(runs["tree"]), len(runs[other]))
        words = met(max(ratios) <= target) + (f" (of {repeats})" if repeats < 3 else "")
        lines.append([what, other, *cells, f"{target}", words])
    head = "command | against | processor s | its | ratio | wall s | its | ratio | at most | met"
    return table(head, lines)


def every_run(rows: dict[str, Runs]) -> list[str]:
    """All contenders of all rows: the parts of their time, and their memory."""
    lines = []
    for name, runs in rows.items():
        for contender, repeats in runs.items():
            user, kernel = middle(repeats, "user"), middle(repeats, "kernel")
            share = f"{kernel / max(user, 0.01):.3f}"
            fits = met(kernel <= KERNEL * user) if contender in ("tree", "two threads") else ""
            spread = f"{min(r['wall'] for r in repeats):.1f} to {max(r['wall'] for r in repeats):.1f}"
            peak = f"{middle(repeats, 'peak_mb'):.0f}"
            lines.append(
                [f"{name}, {contender}", f"{len(repeats)}", spread, f"{user:.1f}", f"{kernel:.1f}", share, fits, peak]
            )
    head = "row, contender | runs | wall s | user s | kernel s | kernel / user | at most 0.05 | peak MB"
    return table(head, lines)


def memory(rows: dict[str, Runs]) -> list[str]:
    lines = []
    for name, runs in rows.items():
        for other in ("before", "peer"):
            if runs.get("tree") and runs.get(other):
                a, b = middle(runs["tree"], "peak_mb"), middle(runs[other], "peak_mb")
                words = met(a <= MEMORY * b) if other == "before" else ""
                lines.append([f"{name} against {other}", f"{a:.0f}", f"{b:.0f}", f"{a / b:.2f}", words])
    return table("peak memory | MB | its | ratio | at most 1.1", lines)


def two_threads(runs: Runs) -> list[str]:
    if not (runs.get("tree") and runs.get("two threads")):
        return ["Two threads against one: not measured.", ""]
    one, two = middle(runs["tree"], "wall"), middle(runs["two threads"], "wall")
    cost = middle(runs["two threads"], "processor") / middle(runs["tree"], "processor")
    return [
        f"Two threads against one (`quantize --bits 3`): {one:.1f} s and {two:.1f} s of wall time, "
        f"{one / two:.2f} times as fast (at least {THREADS}: {met(one / two >= THREADS)}), for {cost:.2f} times the "
        "processor time.",
        "",
    ]


def quality(scores: dict[str, dict[str, float]]) -> list[str]:
    lines = [
        [name, f"{s['nll_difference']:+.4f} ± {s['nll_difference_stderr']:.4f}", f"{s['perplexity']:.3f}"]
        for name, s in scores.items()
    ]
    note = "± is over windows of text. Sums in another order lead to other codes, whose losses spread by more."
    return [note, "", *table("folder | loss above the original's or the other's | perplexity", lines)]


def waits(rows: list[dict[str, Any]]) -> list[str]:
    """Milliseconds of wall and processor time, one column per load."""
    loads = list(dict.fromkeys(row["load"] for row in rows))
    cells = {(row["setting"], row["load"]): f"{row['wall_ms']:.1f} / {row['processor_ms']:.1f}" for row in rows}
    settings = dict.fromkeys(row["setting"] for row in rows)
    average = [f"{load} {median(row['load_average'] for row in rows if row['load'] == load):.0f}" for load in loads]
    first = any(row["realtime"] for row in rows)
    note = "; the runs without load had real-time priority over it, which stands for idle cores" if first else ""
    lines = [[s, *(cells.get((s, load), "–") for load in loads)] for s in settings]
    return [
        textwrap.fill(f"Load average, with other work of the machine: {', '.join(average)}{note}.", 120),
        "",
        *table(" | ".join(["setting", *loads]), lines),
    ]


def at_once(runs: Runs) -> set[bool]:
    """Whether contenders of a row ran side by side, in any of its runs."""
    return {run["side_by_side"] for repeats in runs.values() for run in repeats if "side_by_side" in run}


def words(results: dict[str, Any]) -> str:
    """Machine, versions and settings as a paragraph."""
    machine, settings = results["machine"], results["settings"]
    commits: dict[str, dict[str, None]] = {}
    for runs in results["rows"].values():
        for contender, repeats in runs.items():
            commits.setdefault(contender, {}).update({run["commit"]: None for run in repeats if "commit" in run})
    sentences = [
        f"{settings['model']}, {settings['samples']} samples of {settings['seq_len']} tokens of "
        f"{settings['calibration']}, groups of 64, threads: {settings['threads']}; evaluation on {settings['windows']} "
        f"windows of {settings['text']}",
        f"{machine['processor']}, {machine['cores']} cores, with {', '.join(machine['units'])}"
        + (f"; every contender was kept to {settings['isa']}" if settings["isa"] else "")
        + (" and had real-time priority over other work" if machine.get("priority") == "real-time" else ""),
        *(f"`{name}`: commit {', '.join(commits[name])}" for name in ("tree", "before") if commits.get(name)),
    ]
    for how, together in (("took turns", False), ("ran side by side", True)):
        names = [row for row, runs in results["rows"].items() if row in TARGETS and together in at_once(runs)]
        sentences += [f"The contenders {how} in {', '.join(names)}"] if names else []
    for name, environment in (("`tree` and `before`", "tree"), ("`peer`", "peer")):
        if environment in machine:
            sentences.append(f"{name} run with " + ", ".join(f"{k} {v}" for k, v in machine[environment].items()))
    return textwrap.fill(". ".join(sentences) + ".", 120, break_on_hyphens=False)


def markdown(results: dict[str, Any], waiting: list[dict[str, Any]]) -> str:
    """The page: what was measured, and "not measured" where a contender has no run."""
    lines = [HEAD, ""]
    if results:
        rows = results["rows"]
        lines += [words(results), "", *times(rows, results.get("left_out", {}))]
        lines += ["One block of Llama-8B shapes on a GPU: not measured, for there was none.", ""]
        lines += [*two_threads(rows.get("threads", {})), "## Every contender", "", *every_run(rows)]
        lines += ["## Memory", "", *memory(rows), "## Quality", "", *quality(results["quality"])]
    else:
        lines += ["The rows of `speed.py` are not measured yet.", ""]
    if waiting:
        lines += [WAITING, "", *waits(waiting)]
    return "\n".join(lines).rstrip() + "\n"


HEAD = """# Speed

Made by `evals/speed.py` and `evals/waiting.py`; their first lines say how they measure. Seconds are of whole processes,
medians of the repeats; `tree` is this code."""

WAITING = """## Why two threads were slow beside other work

Torch's wheels for Linux bring one OpenMP runtime, GNU's (`libgomp`), which MKL inside torch uses too. At the end of
each parallel piece the threads wait for each other, and by default (`GOMP_SPINCOUNT` 300000) they spin for about eight
milliseconds before they sleep. If other processes have a share of the cores, a spinning thread uses up its turn while
the thread that it waits for has none. The runtime spins 1000 rounds only if it has itself more threads than cores; it
does not see other processes. An operation that costs 0.03 ms of processor time on one thread costs 8 ms on two that
share a core (`findings/threads_spin_beside_other_work.sh`).

The command `llmsqueeze` therefore sets `GOMP_SPINCOUNT=1000` before torch is imported, unless the user has set it or
`OMP_WAIT_POLICY`. `import llmsqueeze` leaves the environment alone: set it yourself before torch is imported.
`OMP_DYNAMIC` goes by the load average of the last minutes, so it takes one thread on cores that have just become idle.
`KMP_BLOCKTIME`, which another runtime reads, and `MKL_DYNAMIC` change nothing.

Milliseconds of wall / processor time of a mixture of matrix products and elementwise products; medians. Two settings
that differ in nothing (`KMP_BLOCKTIME`, default) differ by a tenth without load: so much is noise."""


def main() -> None:
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "evals/results/speed.json")
    waiting = file.with_name("speed-waiting.json")
    text = markdown(*(json.loads(f.read_text()) if f.exists() else {} for f in (file, waiting)))
    file.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
