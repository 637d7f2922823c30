"""How this process was started: its command, and what a launcher (`torchrun`, `accelerate launch`) says of others."""

from __future__ import annotations

import os

command: list[str] = []  # the words of the command that this process runs, if it was started for one


def number(name: str, default: int = 0) -> int:
    """A number of the launcher's, such as RANK."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def count() -> int:
    """How many processes it started; 1 without a launcher."""
    return number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def follows() -> bool:
    """Whether this is another one than the first, which writes and prints."""
    return count() > 1 and number("RANK") > 0
