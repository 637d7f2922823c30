"""The parts of a model card on how to open a folder, and on the programs that do not open it."""

from __future__ import annotations

from collections.abc import Mapping

PROGRAMS = {"native": "`llmsqueeze.load`", "transformers": "transformers", "vllm": "vLLM"}


def how_to_load(name: str, form: str) -> list[str]:
    """Sections of the card: a warning if necessary, and code. `form`: llmsqueeze, compressed-tensors or dense."""
    if form == "llmsqueeze":
        return [WARNING, "## Load", _native(name)]
    return ["## Load", _portable(name) if form == "compressed-tensors" else _dense(name)]


def programs(form: str, verdicts: Mapping[str, str]) -> list[str]:
    """A line for each program: it opens the folder, or the reason from `llmsqueeze check` why it does not."""
    package = ", with the package compressed-tensors" if form == "compressed-tensors" else ""
    yes = {"native": "yes", "transformers": f"yes{package}", "vllm": "its loader accepts the format; not tried"}
    return [f"{PROGRAMS[target]}: {why or yes[target]}." for target, why in verdicts.items()]


WARNING = """\
> [!WARNING]
> **LOAD THIS MODEL WITH `llmsqueeze.load`, OR IMPORT `llmsqueeze.hf` FIRST.**
> transformers alone does not know this format. Without `import llmsqueeze.hf` it does not stop: it prints only a
> warning and fills the missing weights with **RANDOM VALUES**. The model then writes nonsense."""


def _native(name: str) -> str:
    return f"""\
```
pip install llmsqueeze
```

```python
import llmsqueeze
from transformers import AutoTokenizer

model = llmsqueeze.load("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Or, in code that already calls transformers:

```python
import llmsqueeze.hf  # registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

vLLM does not open this format. If compressed-tensors can represent all parts (`llmsqueeze check model` tells), these
commands make a folder that its loader accepts:

```
hf download {name} --local-dir model
llmsqueeze export model --to compressed-tensors --out portable
vllm serve ./portable
```"""


def _portable(name: str) -> str:
    return f"""\
The weights are in the compressed-tensors format (`pack-quantized`, dense packing). transformers 5 opens them with the
package compressed-tensors 0.18 or later. Do not use `dequantize=True`: of several widths it reads only the first
correctly.

```
pip install 'compressed-tensors>=0.18'
```

{_transformers(name)}

vLLM serves them if it has kernels for their widths (4 bits on a CPU, 2 to 8 on a GPU). This folder was not tried:

```
vllm serve {name}
```

llmsqueeze opens them without that package, keeps them compressed in memory, and stops if a weight is missing:

{_ours(name)}"""


def _dense(name: str) -> str:
    return f"""\
The weights are an ordinary checkpoint again, with as many numbers as the original's.

{_transformers(name)}

```
vllm serve {name}
```

llmsqueeze opens them too:

{_ours(name)}"""


def _transformers(name: str) -> str:
    return f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""


def _ours(name: str) -> str:
    return f"""\
```python
import llmsqueeze

model = llmsqueeze.load("{name}")
```"""
