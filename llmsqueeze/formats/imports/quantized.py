"""A model that is quantized already, as a folder of dense weights: by transformers, which opens it, or by `load`.

Whatever transformers can open and make dense is read: GGUF files, fp8, compressed-tensors, bitsandbytes, GPTQ and AWQ
(the last with their packages), and folders of llmsqueeze. Memory: the dense model. Disk: the same.
"""

from __future__ import annotations

import inspect
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from llmsqueeze.errors import CheckpointError, OutputError, RecipeError, UnsupportedError, foreign
from llmsqueeze.files import is_pointer, read_json, read_json_if_there, write_json
from llmsqueeze.formats.entries import is_compressed
from llmsqueeze.formats.inspection import beside
from llmsqueeze.formats.opened import open_folder
from llmsqueeze.journal.partial import partial_of
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.config import auto_class, load_config
from llmsqueeze.model.original import Source, locate
from llmsqueeze.parallel import processes
from llmsqueeze.progress import Progress

GGUF = ".gguf"
SUFFIX = ".original"  # of the dense folder
FROM = ".from.json"  # in the dense folder: what it was made from
DTYPES = (torch.bfloat16, torch.float16)


@contextmanager
def as_dense(source: Source, out: Path, progress: Progress) -> Iterator[Source]:
    """In the context the source of a run that will write `out` is dense: `dense_source`. What that wrote is removed at
    the end; a run that was killed leaves it, and the next one takes it."""
    dense = dense_source(source, out, progress)
    try:
        yield dense
    finally:
        if dense.named is not None and processes.first():
            shutil.rmtree(dense.model, ignore_errors=True)


def dense_source(source: Source, out: Path, progress: Progress) -> Source:
    """The source of a run that will write `out`: of a quantized model, the folder of its dense weights, written beside.

    Raises what `dense_folder` raises, and RecipeError for a model that is not quantized.
    """
    path = Path(source.model).expanduser()
    if not source.from_quantized and gguf_file(path) is None:
        return source
    path = path if path.exists() else locate(source.model, source.revision)
    if gguf_file(path) is None and "quantization_config" not in read_json(path / "config.json"):
        raise RecipeError(f"--from-quantized: {source.model} is not quantized; leave the option out")
    dense = out.with_name(out.name + SUFFIX)
    processes.of_first(lambda: dense_folder(path, dense, source.trust_remote_code, progress))
    return replace(source, model=str(dense), revision=None, named=source.model, read_from=precision(path))


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path names, or that is all that a folder has of weights; None if there is none.

    Raises CheckpointError if a folder has several.
    """
    if path.is_file() and path.suffix.lower() == GGUF:
        return path
    if not path.is_dir() or (path / "config.json").exists() or any(path.glob("*.safetensors")):
        return None
    files = sorted(path.glob(f"*{GGUF}"))
    if len(files) > 1:
        raise CheckpointError(
            f"{path} has {len(files)} GGUF files; name one of them: {', '.join(f.name for f in files)}"
        )
    return files[0] if files else None


def precision(path: Path) -> str:
    """'GGUF, Q4_K and F32', or the method and the width that a config names."""
    if (file := gguf_file(path)) is not None:
        from gguf import GGUFReader

        if is_pointer(file):
            raise CheckpointError(f"{file} is a pointer of Git LFS, not the file: run `git lfs pull` there")
        with foreign(CheckpointError, f"{file} is no whole GGUF file"):
            kinds = Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors)
        return f"GGUF, {' and '.join(name for name, _ in kinds.most_common(2))}"
    about = read_json(path / "config.json").get("quantization_config") or {}
    bits = about.get("bits") or about.get("num_bits")
    bits = bits or next((w for key, w in (("load_in_4bit", 4), ("load_in_8bit", 8)) if about.get(key)), None)
    return f"{about.get('quant_method', 'an unnamed method')}{f', {bits} bits' if bits else ''}"


def dense_folder(path: Path, out: Path, trust_remote_code: bool, progress: Progress) -> Path:
    """Writes the model of a file or folder with dense weights into `out`, if a run before has not; returns `out`.

    Raises UnsupportedError if transformers cannot open it or make it dense, CheckpointError if it is damaged,
    OutputError if `out` is something else.
    """
    about = identity(path)
    if read_json_if_there(out / FROM) == about:
        return out
    if out.exists() and not (out / FROM).is_file():
        raise OutputError(
            f"{out} exists already, where the dense weights of {path} are to lie during the run; rename it, or choose "
            "another --out"
        )
    progress.note(f"{path} is quantized ({precision(path)}): what its rounding lost stays lost")
    half = partial_of(out)
    shutil.rmtree(half, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    with redirect_stderr(StringIO()):  # bars of other libraries
        model, tokenizer = opened(path, trust_remote_code)
    try:
        half.mkdir(parents=True)
        model.save_pretrained(half)
        if tokenizer is not None:
            tokenizer.save_pretrained(half)
        else:
            beside.copy(path, half)
        config = read_json(half / "config.json")
        write_json(half / "config.json", {key: value for key, value in config.items() if key != "quantization_config"})
        write_json(half / FROM, about)
        half.rename(out)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return out


def identity(path: Path) -> dict[str, Any]:
    """What a dense folder is known by: the files that it was made from, their sizes and times."""
    files = [gguf_file(path)] if gguf_file(path) is not None else sorted(path.glob("*.safetensors"))
    stats = {str(file.resolve()): file.stat() for file in files if file is not None}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def opened(path: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """The dense model, and its tokenizer if that is in the same file."""
    if (file := gguf_file(path)) is not None:
        return from_gguf(file, torch.bfloat16)
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(f"{path} has no weights in safetensors")
    model = _by_load(path, trust_remote_code) or _by_transformers(path, trust_remote_code)
    if getattr(model, "hf_quantizer", None) is not None and not all_dense(model):
        with foreign(UnsupportedError, f"transformers cannot make {path} dense"):
            model = model.dequantize()
    return _dense(model, path, model.dtype if model.dtype in DTYPES else torch.bfloat16), None


def _by_load(path: Path, trust_remote_code: bool) -> Any:
    """The model of a folder in a format that llmsqueeze reads; None if it is in another one."""
    from llmsqueeze.formats.load import load

    checkpoint = open_checkpoint(path)
    if not is_compressed(checkpoint):
        return None
    try:
        open_folder(checkpoint, trust_remote_code)
    except UnsupportedError:  # a form of compressed-tensors that only others write
        return None
    return load(str(path), trust_remote_code=trust_remote_code)


def _by_transformers(path: Path, trust_remote_code: bool) -> Any:
    """The model, dense from the start if its quantizer can do that."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    config: Any = load_config(path, trust_remote_code)
    about = dict(getattr(config, "quantization_config", None) or {})
    of_method: Any = AUTO_QUANTIZATION_CONFIG_MAPPING.get(about.get("quant_method", ""))
    if of_method is not None and "dequantize" in inspect.signature(of_method).parameters:
        config.quantization_config = about | {"dequantize": True}
    with foreign(UnsupportedError, f"transformers cannot open {path}", "or start from the original weights"):
        return auto_class(config).from_pretrained(
            path, config=config, dtype="auto", trust_remote_code=trust_remote_code
        )


def from_gguf(file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model of a GGUF file with dense weights, and its tokenizer. Raises UnsupportedError for one that transformers
    do not open."""
    from transformers import AutoConfig, AutoTokenizer, GgufConfig

    with foreign(UnsupportedError, f"transformers cannot open {file}"):
        named: dict[str, Any] = {"gguf_file": file.name}
        config = AutoConfig.from_pretrained(file.parent, **named)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **named)
        how = GgufConfig(dequantize=True)
        model = auto_class(config).from_pretrained(file.parent, **named, dtype=dtype, quantization_config=how)
    return _dense(model, file, dtype), tokenizer


def all_dense(model: Any) -> bool:
    """Whether every linear of the model is an ordinary one, with a weight of floating-point numbers."""
    linears = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    weights = [linear._parameters.get("weight") for linear in linears]
    return all(weight is not None and weight.is_floating_point() and weight.itemsize > 1 for weight in weights)


def _dense(model: Any, path: Path, dtype: torch.dtype) -> Any:
    """The model in a dtype, without what its quantizer left. Raises UnsupportedError if it is not dense."""
    if not all_dense(model):
        raise UnsupportedError(f"transformers leave weights of {path} quantized; start from the original weights")
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.hf_quantizer = None
    model._weight_conversions = None  # else `save_pretrained` undoes what its quantizer did, and rounds again
    return model.to(dtype)
