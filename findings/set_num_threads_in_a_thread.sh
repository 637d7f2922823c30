#!/bin/bash
# torch.set_num_threads, called in one Python thread, changes others: later ones, and those that have not yet computed.
#
# Versions: torch 2.13.0 (Linux on x86-64, CPU build, which uses OpenMP).
#
# Expected: either of two things. The number belongs to the process, as the documentation's "sets the number of threads
# used for intraop parallelism on CPU" suggests. Or it belongs to the thread that sets it, as with OpenMP itself.
#
# Seen: neither. A call sets the number of its own thread, and a default that every other thread takes over when it first
# asks for the number or computes in parallel. So a worker that limits itself to one thread
#   - leaves a thread alone that has computed before,
#   - limits all threads that begin later, though nobody asked for that,
#   - limits a thread that has set a number of its own, but has not used it yet; the main thread is no exception.
# A pool whose workers limit themselves should set the number again in the main thread, after that has used it once.
#
# Output seen (the main thread sets 2, then a worker sets 1; each line is what torch.get_num_threads() gives):
#   main thread that asked before: 2, a thread begun before that asked: 2, a thread begun later: 1
#   main thread that set 2 and did not use it: 1
#   as described
#
# Exits 0 while the behaviour is as described, 1 when it is not. Needs bash, python3 with venv, pip.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python="$folder/env/bin/python"
"$python" -m pip install --quiet torch==2.13.0 numpy

cat > "$folder/threads.py" <<'PY'
import sys
from concurrent.futures import ThreadPoolExecutor

import torch


def in_new_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


torch.set_num_threads(2)
if sys.argv[1] == "unused":
    in_new_thread(torch.set_num_threads, 1)
    print(torch.get_num_threads())
else:
    torch.get_num_threads()
    with ThreadPoolExecutor(1) as before:
        before.submit(torch.get_num_threads).result()
        in_new_thread(torch.set_num_threads, 1)
        print(torch.get_num_threads(), before.submit(torch.get_num_threads).result(), in_new_thread(torch.get_num_threads))
PY
used=$("$python" "$folder/threads.py" used)
unused=$("$python" "$folder/threads.py" unused)
read -r main before later <<< "$used"
echo "main thread that asked before: $main, a thread begun before that asked: $before, a thread begun later: $later"
echo "main thread that set 2 and did not use it: $unused"
if [ "$used" = "2 2 1" ] && [ "$unused" = 1 ]; then
  echo "as described"
else
  echo "not as described"
  exit 1
fi
