"""How a model card says to open a folder, by the format that it is in."""

from __future__ import annotations


def how_to_load(name: str, form: str) -> list[str]:
    """Sections of the card: what to beware of, and the code. `form`: llmsqueeze, compressed-tensors or dense."""
    if form == "llmsqueeze":
        return [WARNING, "## Load", _native(name)]
    return ["## Load", _portable(name) if form == "compressed-tensors" else _plain(name)]


WARNING = """\
> [!WARNING]
> **LOAD THIS MODEL WITH `llmsqueeze.load`, OR IMPORT `llmsqueeze.hf` FIRST.**
> transformers alone does not know this format. Without `import llmsqueeze.hf` it does not stop: it only prints a
> warning, fills the weights it misses with **RANDOM VALUES**, and the model then writes nonsense."""


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

or, in code that already calls transformers:

```python
import llmsqueeze.hf  # makes the format known to transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```"""


def _plain(name: str) -> str:
    return f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""


def _portable(name: str) -> str:
    return f"""\
The weights are in the compressed-tensors format (`pack-quantized`, dense packing): transformers 5 opens them with the
package compressed-tensors 0.18 or later, on its default path (not with `dequantize=True`, which reads only the first of
several widths rightly).

```
pip install 'compressed-tensors>=0.18'
```

{_plain(name)}

vLLM serves them where it has kernels for their widths (on a CPU 4 bits only; it was not tried with this folder):

```
vllm serve {name}
```"""
