"""Seeded bugs: each is patched into the product's own code at run time, and the simulation must notice it.

::

    python -m tests.simulation.mutants                 all of them; exit status 1 if one is not caught
    python -m tests.simulation.mutants --only NAME --seeds 5000
    python -m tests.simulation.mutants --random 5      five drawn from today's date and the commit: for every build
    python -m tests.simulation.mutants --save          all, and docs/simulation-mutants.md from what was found
    python -m tests.simulation.mutants --list

A mutant replaces text inside functions of the product (`patching.py`); text that is no longer there is an error, not a
pass. A seed counts as a catch only if it passes without the mutant (`hunting.py`). Configurations are those in which
the rule can matter at all (replication rules, section 11); where a plain draw of the weather would need tens of
thousands of seeds, the mutant names the profile (`weather.py`) in which its moment comes.

A rule that another one covers in every schedule has no mutant of its own: nothing could tell. The mutant switches both
off, and docs/simulation-mutants.md says why one of them alone changes nothing.
"""

from __future__ import annotations

from tests.simulation.mutants.brokers import BROKERS
from tests.simulation.mutants.clients import CLIENTS
from tests.simulation.mutants.cluster import CLUSTER
from tests.simulation.mutants.queues import QUEUE_MUTANTS
from tests.simulation.mutants.table import TABLE

MUTANTS = TABLE + BROKERS + CLUSTER + CLIENTS + QUEUE_MUTANTS

__all__ = ["MUTANTS"]
