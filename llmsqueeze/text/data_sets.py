"""Data sets on the Hub, by the library datasets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llmsqueeze.errors import CalibrationError, HubError, reason
from llmsqueeze.text.document import Text
from llmsqueeze.text.fields import text_of

SMALL = 256 << 20  # bytes of a data set that is kept for later runs; of a larger one only what is needed is read


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
