#!/bin/bash
# datasets take ordinary rows for the log of a coding agent, and refuse them unless another package is installed.
#
# Versions: datasets 5.2.0.
#
# Expected: a file of JSON lines is read by its fields. Where a field is sometimes a mapping and sometimes text, datasets
# 5 give it the type Json, and the rows come back as they are in the file.
#
# Seen: if the field of mappings and text is called "message", and the rows have a text "type" beside it, as mail, chat
# and event logs have, the file counts as an agent's trace by these two fields alone. load_dataset, streaming or not,
# asks for the package teich. The same rows with mappings alone are read, and so are the mixed ones with
# parse_agent_traces=False, an option of the reader of JSON.
#
# How: two rows, streamed from a file.
#
# Output seen:
#   mappings alone: one, two
#   mappings and text: To support decoding agent traces, please install 'teich'.
#   mappings and text, parse_agent_traces=False: one, two
#   as described
#
# Exits 0 while the behaviour is as described, 1 when it is not. Needs bash, python3 with venv, and pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq datasets==5.2.0
export HF_HUB_OFFLINE=1
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import json

import datasets

MIXED = [{"type": "mail", "message": {"body": "hello"}, "text": "one"}, {"type": "note", "message": "hi", "text": "two"}]
ALIKE = [MIXED[0], {"type": "note", "message": {"body": "hi"}, "text": "two"}]


def texts(rows, **options):
    with open("rows.jsonl", "w") as file:
        file.write("\n".join(map(json.dumps, rows)))
    try:
        read = datasets.load_dataset("json", data_files="rows.jsonl", split="train", streaming=True, **options)
        return ", ".join(row["text"] for row in read)
    except ImportError as error:
        return str(error)


given = [texts(ALIKE), texts(MIXED), texts(MIXED, parse_agent_traces=False)]
names = ("mappings alone", "mappings and text", "mappings and text, parse_agent_traces=False")
for name, said in zip(names, given):
    print(f"{name}: {said}")
described = given == ["one, two", "To support decoding agent traces, please install 'teich'.", "one, two"]
print("as described" if described else "otherwise than described")
raise SystemExit(not described)
PYTHON
