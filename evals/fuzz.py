"""Files that were tampered with: does every command end as ours?

    python evals/fuzz.py [--cases 2000] [--kinds config plan ...] [--seed 0] [--out FILE.json]

A valid folder (or plan, profile, recipe, text) is changed in one to three places: types, signs, sizes, names, missing,
doubled, deep; or a bit of a shard flips. The change is harmless by itself. A forked child then runs a command in
process, with 2 GB of memory beyond what the parent has and 20 seconds of processor time for each. It must end with code
0, or with code 2 and one message; a flipped bit must be found. Kinds that were run before keep their counts. Writes
evals/results/fuzz.json and fuzz.md. tests/test_fuzz.py runs some cases of the light kinds.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gguf_model
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llmsqueeze
from llmsqueeze.cli.app import app
from llmsqueeze.demo import MODEL_DIR
from llmsqueeze.journal import write_behind

SECONDS, MEMORY = 20, 2 << 30
TEXT: dict[str, Any] = {"calibration": "demo", "samples": 2, "seq_len": 32}
BRIEF = ("--bits", "4", "--samples", "2", "--seq-len", "16", "--calibration", "demo")
VALUES = [None, True, 0, -1, 1, 3, 2**31, 2**63, 10**30, -0.5, 1e308, "", "x", "../x", "\x00", [], {}, [[]], [1, "a"]]
RESULTS = Path(__file__).with_name("results") / "fuzz.json"
ENDS = ("refused", "done")
AT_A_TIME = 25  # cases of one child
Case = tuple[Path, list[str]]  # the folder or file that was changed, and the command


class Base:
    """The valid folders and files, made once."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.folders = scratch, dict[str, Path]()
        self.original = scratch / "original"
        shutil.copytree(MODEL_DIR, self.original)
        config = json.loads((MODEL_DIR / "config.json").read_text())
        (self.original / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
        tensors = load_file(MODEL_DIR / "model.safetensors")
        kept = {n: t for n, t in tensors.items() if not n.startswith(tuple(f"model.layers.{i}." for i in (1, 2, 3)))}
        save_file(kept, self.original / "model.safetensors", {"format": "pt"})

    def folder(self, kind: str) -> Path:
        """The original compressed as `kind` says."""
        settings: dict[str, dict[str, Any]] = {
            "native": {"method": "gwq", "quantizer": "rtn", "bits": 3, **TEXT},
            "coded": {"method": "coded", "bits": 2.5, **TEXT},
            "portable": {"method": "rtn", "bits": 4, "portable": True},
        }
        if kind not in self.folders:
            self.folders[kind] = self.scratch / kind
            llmsqueeze.quantize(self.original, self.folders[kind], verify=False, **settings[kind])
        return self.folders[kind]

    def plan(self) -> Path:
        if "plan" not in self.folders:
            self.folders["plan"] = self.scratch / "plan"
            llmsqueeze.plan(self.original, self.folders["plan"], method="mixllm", bits=3.5, trial=False, **TEXT)
        return self.folders["plan"]


def mutated(value: Any, rng: random.Random) -> Any:
    """A JSON value changed somewhere inside."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        value = copy.copy(value)
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        choice = rng.random()
        if choice < 0.15:
            del value[key]
        elif choice < 0.25 and isinstance(value, dict):
            value[rng.choice(["x", "..", key + "x" if isinstance(key, str) else "y"])] = value.pop(key)
        elif choice < 0.3 and isinstance(value, list):
            value.append(value[key])
        else:
            value[key] = mutated(value[key], rng)
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice([value + 1, value - 1, -value, value * 1000, value * 10**9, float(value), str(value)])
    if rng.random() < 0.03:
        deep: Any = []
        for _ in range(900):
            deep = [deep]
        return deep
    return rng.choice(VALUES)


def in_json(path: Path, rng: random.Random, key: str | None = None) -> None:
    """Changes a JSON file, or one entry of it; now and then its text."""
    text = path.read_text(encoding="utf-8")
    if rng.random() < 0.1:
        in_text(path, rng)
        return
    value = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        if key is None:
            value = mutated(value, rng)
        else:
            value[key] = mutated(value[key], rng)
    path.write_text(json.dumps(value), encoding="utf-8")


def in_text(path: Path, rng: random.Random) -> None:
    """Cuts, doubles or changes bytes of a file."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        what = rng.randrange(5)
        if what == 0:
            data = data[:at]
        elif what == 1:
            data[at:at] = data[max(0, at - 40) : at]
        elif what == 2 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif what == 3:
            data[at : at + rng.randint(1, 20)] = b""
        else:
            data[at:at] = rng.choice([b"[" * 3000, b"-", b"9" * 30, b"\xff", b"\0", b"*a", b"{", b"\n- ", b": "])
    path.write_bytes(bytes(data))


def in_header(path: Path, rng: random.Random) -> None:
    """Changes the header of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.15:
        size_ = rng.choice([0, 1, size - 1, size + 8, 2**40, 2**64 - 1])
        path.write_bytes(size_.to_bytes(8, "little") + data[8:])
        return
    header = json.dumps(mutated(json.loads(data[8 : 8 + size]), rng)).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def in_data(path: Path, rng: random.Random) -> None:
    """Flips a bit of a shard's tensors."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def flipped(folder: Path, rng: random.Random) -> None:
    in_data(shard(folder, rng), rng)


def shard(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def copied(source: Path, work: Path) -> Path:
    return Path(shutil.copytree(source, work / source.name))


def quantize_with(model: Path, work: Path, *more: object) -> list[str]:
    return ["quantize", str(model), "--out", str(work / "out"), "--quiet", "--no-verify", *map(str, more)]


def of_folder(
    kind: str, change: Callable[[Path, random.Random], None], verbs: tuple[str, ...] = ("check", "load", "show")
) -> Callable[[Base, Path, random.Random], Case]:
    def case(base: Base, work: Path, rng: random.Random) -> Case:
        folder = copied(base.folder(kind), work)
        change(folder, rng)
        return folder, [rng.choice(verbs), str(folder)]

    return case


def of_original(
    change: Callable[[Path, random.Random], None], *more: object
) -> Callable[[Base, Path, random.Random], Case]:
    def case(base: Base, work: Path, rng: random.Random) -> Case:
        folder = copied(base.original, work)
        change(folder, rng)
        check = not more and rng.random() < 0.5
        return folder, ["check", str(folder)] if check else quantize_with(folder, work, "--method", "rtn", *more)

    return case


def of_plan(name: str) -> Callable[[Base, Path, random.Random], Case]:
    def case(base: Base, work: Path, rng: random.Random) -> Case:
        folder = copied(base.plan(), work)
        file = folder / name
        if name == "plan.yaml":
            changed_yaml(file, rng)
        else:
            (in_header if rng.random() < 0.7 else in_data)(file, rng)
        return folder, quantize_with(base.original, work, "--plan", folder / "plan.yaml")

    return case


def changed_yaml(path: Path, rng: random.Random) -> None:
    import yaml

    if rng.random() < 0.3:
        in_text(path, rng)
        return
    value = yaml.safe_load(path.read_text())
    for _ in range(rng.randint(1, 3)):
        value = mutated(value, rng)
    try:
        path.write_text(yaml.safe_dump(value))
    except RecursionError:
        path.write_text(json.dumps(value))  # is YAML too


def recipe(base: Base, work: Path, rng: random.Random) -> Case:
    file = work / "recipe.yaml"
    few = "calibration: demo\nsamples: 2\nseq_len: 16\n"
    rest = ["bits: 3\nmethod: gptq\ngroup_size: 64\n", "method: mixllm\nmix: {6: 0.1, 4: 0.6}\n"]
    file.write_text(few + rng.choice(rest))
    changed_yaml(file, rng)
    # thousands of samples are valid, and take longer than a case has
    file.write_text(re.sub(r"(?m)^samples: [0-9]{3,5}$", "samples: 99", file.read_text(encoding="utf-8")))
    return file, quantize_with(base.original, work, "--recipe", file)


def text(base: Base, work: Path, rng: random.Random) -> Case:
    file = work / f"text{rng.choice(['.txt', '.jsonl', '.json', '.csv', '.parquet', '.jsonl.gz'])}"
    line = "Once upon a time there was a cat. " * 8
    rows: list[dict[str, Any]] = [{"text": line, "id": number} for number in range(12)]
    if rng.random() < 0.5 and file.suffix not in (".txt", ".csv"):
        rows = [{"messages": [{"role": role, "content": line} for role in ("user", "assistant")]} for _ in range(6)]
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".txt":
        file.write_text(line * 12)
    elif file.suffix == ".csv":
        file.write_text("\n".join(["text,id", *(f"{line},{number}" for number in range(12))]))
    else:
        changed = mutated(rows, rng) if rng.random() < 0.5 else rows
        together = file.suffix == ".json" or not isinstance(changed, list)
        content = json.dumps(changed) if together else "\n".join(map(json.dumps, changed))
        file.write_bytes(gzip.compress(content.encode()) if file.suffix == ".gz" else content.encode())
    if rng.random() < 0.6:
        in_text(file, rng)
    more = ["--method", "gptq", "--bits", 4, "--samples", 2, "--seq-len", 16, "--calibration", file]
    return file, quantize_with(base.original, work, *more)


def gguf_file(base: Base, work: Path, rng: random.Random) -> Case:
    """A GGUF file: numbers and bytes of its head changed, or cut; measured, compressed, or taken as a base."""
    whole = base.scratch / "model.gguf"
    if not whole.exists():
        gguf_model.write(base.original, whole)
    content = bytearray(whole.read_bytes())
    head = len(content) - sum(file.stat().st_size for file in base.original.glob("*.safetensors"))
    for _ in range(rng.randint(1, 3)):
        at = rng.choice([8, 16, rng.randrange(head), rng.randrange(head) // 4 * 4])
        width = rng.choice([1, 4, 8])
        content[at : at + width] = rng.choice([0, 1, 255, 2**31, 2**62, rng.randrange(2**63)]).to_bytes(8, "little")[
            :width
        ]
    if rng.random() < 0.15:
        del content[rng.randrange(len(content)) :]
    file = work / "model.gguf"
    file.write_bytes(content)
    text = work / "text.txt"
    text.write_text("ab abba " * 40)
    commands = [
        ["eval", str(file), "--text", str(text), "--limit", "1", "--seq-len", "16", "--device", "cpu"],
        ["quantize", str(file), "--method", "rtn", "--bits", "4", "--out", str(work / "out")],
        [
            "export",
            str(base.folder("portable")),
            "--to",
            "gguf",
            "--gguf-base",
            str(file),
            "--out",
            str(work / "o.gguf"),
        ],
    ]
    return file, rng.choice(commands)


KINDS: dict[str, Callable[[Base, Path, random.Random], Case]] = {
    "config.json": of_original(lambda folder, rng: in_json(folder / "config.json", rng)),
    "quantization_config, native": of_folder(
        "native", lambda folder, rng: in_json(folder / "config.json", rng, "quantization_config")
    ),
    "quantization_config, coded": of_folder(
        "coded", lambda folder, rng: in_json(folder / "config.json", rng, "quantization_config")
    ),
    "quantization_config, portable": of_folder(
        "portable", lambda folder, rng: in_json(folder / "config.json", rng, "quantization_config")
    ),
    "safetensors headers": of_folder("native", lambda folder, rng: in_header(shard(folder, rng), rng)),
    "originals' headers": of_original(lambda folder, rng: in_header(folder / "model.safetensors", rng)),
    "index": of_folder("native", lambda folder, rng: in_json(folder / "model.safetensors.index.json", rng)),
    "data, native": of_folder("native", flipped, ("check", "load")),
    "data, coded": of_folder("coded", flipped, ("check", "load")),
    "data, portable": of_folder("portable", flipped, ("check", "load")),
    "record": of_folder("native", lambda folder, rng: in_json(folder / "llmsqueeze.json", rng)),
    "plan": of_plan("plan.yaml"),
    "profile": of_plan("profile.safetensors"),
    "recipe": recipe,
    "calibration text": text,
    "gguf": gguf_file,
    "tokenizer": of_original(
        lambda folder, rng: in_json(folder / rng.choice(["tokenizer.json", "tokenizer_config.json"]), rng),
        *("--bits", 4, "--samples", 2, "--seq-len", 16, "--calibration", "demo", "--importance", "lim", "--method"),
        "layerwise",
    ),
}
LIGHT = tuple(  # for tests/test_fuzz.py
    kind
    for kind in KINDS
    if kind.startswith(("quantization_config", "safetensors", "index", "data", "record", "profile"))
)


def outcome(arguments: list[str]) -> str:
    """What a command ended with: 'done', 'refused', or what is wrong with its end."""
    if arguments[0] == "load":
        from llmsqueeze.errors import SqueezeError

        try:
            with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
                llmsqueeze.load(arguments[1])
        except SqueezeError:
            return "refused"
        except BaseException as error:
            return f"load raised {type(error).__name__}: {str(error)[:150]}"
        return "done"
    result = CliRunner().invoke(app, arguments)
    if result.exit_code == 0:
        return "done"
    if result.exit_code == 2 and (arguments[0] == "check" or result.stderr.count("error: ") >= 1):
        return "refused"
    return f"code {result.exit_code}: {' '.join(result.stderr.split())[-250:] or repr(result.exception)}"


def one(kind: str, number: int, seed: int, base: Base) -> tuple[str, str]:
    """Makes a case and runs its command; returns the command's verb, and what it ended with."""
    rng = random.Random(f"{kind} {seed} {number}")
    with tempfile.TemporaryDirectory(prefix="case-", dir=base.scratch) as folder:
        work = Path(folder)
        _, arguments = KINDS[kind](base, work, rng)
        before = sorted(path.name for path in base.scratch.iterdir())
        ended = outcome(arguments)
        if sorted(path.name for path in base.scratch.iterdir()) != before:
            ended = "wrote outside its output"
    if ended == "done" and kind.startswith("data"):
        ended = "a flipped bit went unseen"
    return arguments[0], ended


def in_child(kind: str, numbers: range, seed: int, base: Base) -> list[str]:
    """What the cases ended with, in a forked process with bounds, which may not reach the last of them."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        write_behind.cache_clear()  # a fork has no threads
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for number in numbers:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(10 * SECONDS)
            try:
                verb, ended = one(kind, number, seed, base)
            except BaseException as error:
                verb, ended = "", f"raised {type(error).__name__}: {str(error)[:150]}"
            text = ended if ended in ENDS else f"{verb}: {ended}"
            os.write(writer, json.dumps(text).encode()[:4000] + b"\n")
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        ends = [json.loads(line) for line in stream]
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        late = os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGPROF)
        ends.append("took too long" if late else f"died of signal {os.WTERMSIG(status)}")
        for left in base.scratch.glob("case-*"):
            shutil.rmtree(left, ignore_errors=True)
    return ends


def run(kind: str, cases: int, seed: int, base: Base) -> tuple[Counter[str], dict[int, str]]:
    """Outcomes of a kind: done, refused, wrong; and of each case that ended wrong, how."""
    counts, wrong, number = Counter[str](), dict[int, str](), 0
    with tempfile.TemporaryDirectory(dir=base.scratch) as work:  # what all cases need is made once
        KINDS[kind](base, Path(work), random.Random(0))
    while number < cases:
        for ended in in_child(kind, range(number, min(number + AT_A_TIME, cases)), seed, base):
            counts[ended if ended in ENDS else "wrong"] += 1
            if ended not in ENDS:
                wrong[number] = ended
            number += 1
    return counts, wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    results = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        base = Base(Path(scratch))
        with tempfile.TemporaryDirectory() as work:  # imports are paid once
            outcome(quantize_with(base.original, Path(work), "--method", "gptq", *BRIEF))
            for verb in ("check", "load", "show"):
                outcome([verb, str(base.folder("native"))])
        for kind in [one for one in KINDS if any(one.startswith(name) for name in asked.kinds)]:
            start = time.monotonic()
            counts, wrong = run(kind, asked.cases, asked.seed, base)
            row = {end: counts[end] for end in (*ENDS, "wrong")}
            results[kind] = (
                {"cases": asked.cases, "seed": asked.seed} | row | {"seconds": round(time.monotonic() - start)}
            )
            print(kind, results[kind], flush=True)
            for number, how in wrong.items():
                print(f"    {number}: {how}", file=sys.stderr, flush=True)
            asked.out.write_text(
                json.dumps({name: results[name] for name in KINDS if name in results}, indent=1) + "\n"
            )
            asked.out.with_suffix(".md").write_text(page(results))


def page(results: dict[str, dict[str, int]]) -> str:
    rows = []
    for kind in (kind for kind in KINDS if kind in results):
        cells = (str(results[kind][key]) for key in ("cases", *ENDS, "wrong", "seconds"))
        rows.append(f"| {kind} | {' | '.join(cells)} |")
    return (
        "# Files that were tampered with\n\n"
        "`python evals/fuzz.py`: one to three changes in a valid file, then a command in a process with\n"
        f"{MEMORY >> 30} GB and {SECONDS} s. `refused`: code 2 and a message; `done`: code 0 (the change is valid, or\n"
        "the command reads nothing of it); `wrong`: anything else, a traceback, a hang, no message, a flipped bit of\n"
        "a shard that was not found.\n\n"
        "| kind | cases | refused | done | wrong | seconds |\n|:---|---:|---:|---:|---:|---:|\n"
        + "\n".join(rows)
        + "\n"
    )


if __name__ == "__main__":
    main()
