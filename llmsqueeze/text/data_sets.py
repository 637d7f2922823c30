"""Data sets of the library datasets: folders on disk, and the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmsqueeze.errors import CalibrationError, HubError, foreign, nearest, reason
from llmsqueeze.text.document import Text
from llmsqueeze.text.fields import Row, text_of

SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves
SMALL = 256 << 20  # bytes of a data set that is kept for later runs; of a larger one only what is needed is read


def read_folder(path: Path, config: str | None, split: str, named: bool, field: str | None, enough: int | None) -> Text:
    """A folder that `save_to_disk` wrote, or one of data files. named: whether the user named the split.

    Raises CalibrationError if it is neither.
    """
    import datasets

    source = " ".join([path.name, *([config] if config else []), *([split] if named else [])])
    with quiet(), foreign(CalibrationError, f"{path} is a folder that datasets cannot read"):
        if any((path / name).is_file() for name in SAVED):
            data: Any = datasets.load_from_disk(str(path))
        else:
            data = datasets.load_dataset(str(path.resolve()), config, streaming=True)
        return text_of(chosen(data, split, named, source), source, field, enough)


def chosen(data: Any, split: str, named: bool, source: str) -> Iterable[Row]:
    """The rows of a split; if nobody named it, of the only one, or of train if there are several.

    Raises CalibrationError if there is none such.
    """
    if not isinstance(data, Mapping):
        return data  # type: ignore[no-any-return]
    names = list(data)
    if split not in names and not named:
        split = names[0] if len(names) == 1 else "train"
    if split not in names:
        raise CalibrationError(
            f"{source} has no split {split!r}{nearest(split, names)} (it has: {', '.join(names)}; write the name of "
            "one behind the folder, as in folder::split)"
        )
    return data[split]  # type: ignore[no-any-return]


def read_hub(name: str, config: str | None, split: str, field: str | None, enough: int | None) -> Text:
    """A data set on the Hub, or in the cache of an earlier run.

    Raises HubError if it cannot be reached, CalibrationError if it cannot be used.
    """
    import datasets

    source = " ".join(filter(None, (name, config, split)))
    reached = hub_answers(name)
    if not reached:
        # a cached data set still loads; any other fails at once, not after half a minute of retries
        datasets.config.HF_HUB_OFFLINE = True
    with quiet():
        try:
            stream = reached and enough is not None and not small(name, config)
            data = datasets.load_dataset(name, config, split=split, **({"streaming": True} if stream else {}))
            return text_of(data, source, field, enough)
        except (ConnectionError, FileNotFoundError, OSError) as error:
            raise HubError(
                f"the data set {name} is no local file and cannot be read from the Hub ({type(error).__name__}); "
                "name a local text file with --calibration (for eval: --text)"
            ) from error
        except ValueError as error:
            raise CalibrationError(f"the data set {name} cannot be used: {reason(error)}") from error


def small(name: str, config: str | None) -> bool:
    """Whether a data set of the Hub is known to be small enough to be kept as a whole."""
    import datasets

    nbytes = datasets.load_dataset_builder(name, config).info.download_size
    return nbytes is not None and nbytes <= SMALL


def hub_answers(name: str) -> bool:
    """Whether the Hub can be reached. Raises CalibrationError if it has no such data set that the user may read."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(name, timeout=10)
    except HFValidationError as error:
        raise CalibrationError(f"{name} is neither a local text file nor the name of a Hub data set") from error
    except HfHubHTTPError as error:
        raise CalibrationError(
            f"the Hub has no data set {name} that you may read ({type(error).__name__}); is the name right, and "
            "does it need a login (hf auth login)?"
        ) from error
    except Exception:  # the HTTP library has its own errors for no route, no name, a refusal, a time-out
        return False
    return True


@contextmanager
def quiet() -> Iterator[None]:
    """datasets writes neither progress nor what it logs before it raises an error; nor does the Hub's library of cards
    without metadata."""
    import datasets
    from datasets.utils import logging
    from huggingface_hub.utils import logging as hub_logging

    loggers = [logging, hub_logging]
    before = [one.get_verbosity() for one in loggers]
    datasets.disable_progress_bars()
    for one in loggers:
        one.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.set_verbosity(level)
