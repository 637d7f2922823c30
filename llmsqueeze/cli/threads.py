"""How torch's threads wait for each other. OpenMP reads it once, so it is set before torch is imported."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPINS = "1000"


def spin_little(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets an idle OpenMP thread sleep after microseconds; GNU's runtime lets it spin for about ten milliseconds.

    The runtime itself spins so little if it has more threads than cores. It does not see other processes: beside them,
    the spinning thread holds the core that the thread it waits for would need. On idle cores 1000 rounds cost nothing
    (evals/results/speed.md). What the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPINS)
