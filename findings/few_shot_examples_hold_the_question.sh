#!/bin/bash
# lm-eval puts a question and its answer among its own few-shot examples, if a task has only a test split.
#
# Versions: lm_eval 0.4.13, datasets 5.2.0, torch 2.13.0, transformers 5.23.0.
#
# Expected: few-shot examples of a question are other documents. lm-eval draws one more than asked for and leaves the
# question out, where examples and questions come from one split.
#
# Seen: it does so only if the task names that split as fewshot_split. A task of one's own that has a test_split and
# nothing else takes its examples from there too, but draws no more than asked for and leaves nothing out: some prompts
# hold the question with its answer, and ask it again. The score rises, and no error is raised. With the line
# "fewshot_split: test" no prompt does.
#
# How: a multiple-choice task of six local documents, three examples each; the prompts that lm-eval builds are read.
#
# Output seen:
#   test_split alone: 2 of 6 prompts hold their own question with its answer
#   with fewshot_split: test: 0 of 6 prompts hold their own question with its answer
#   as described
#
# Exits 0 while the behaviour is as described, 1 when it is not. Needs bash, python3 with venv, and pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq lm_eval==0.4.13 datasets==5.2.0 torch==2.13.0 transformers==5.23.0
export HF_HUB_OFFLINE=1
cd "$work"
cat > try.py <<'PYTHON'
import json

from lm_eval.tasks import TaskManager

DOCUMENTS = [{"question": f"question {n}", "choices": ["yes", "no"], "label": n % 2} for n in range(6)]
with open("documents.jsonl", "w") as file:
    file.write("\n".join(map(json.dumps, DOCUMENTS)))
CONFIG = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "documents.jsonl"}},
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "num_fewshot": 3,
}


def own_questions(name, **more):
    """How many prompts hold their own question twice: once with its answer."""
    loaded = TaskManager(include_defaults=False).load([{"task": name, **CONFIG, **more}])["tasks"]
    (task,) = loaded.values()
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    prompts = {request.doc_id: request.args[0] for request in task.instances}
    return sum(prompts[n].count(f"question {n}:") > 1 for n in range(6)), len(prompts)


counts = [own_questions("alone"), own_questions("named", fewshot_split="test")]
for what, (count, of) in zip(("test_split alone", "with fewshot_split: test"), counts):
    print(f"{what}: {count} of {of} prompts hold their own question with its answer")
described = counts[0][0] > 0 and counts[1] == (0, 6)
print("as described" if described else "otherwise than described")
raise SystemExit(not described)
PYTHON
"$work/venv/bin/python" try.py 2>"$work/log" || { status=$?; tail -n 20 "$work/log" >&2; exit "$status"; }
