"""`make bench-compare`: Ferryline and its peers in one run, on one machine, taking turns.

plan.py      what is measured: workloads, variants (a server's settings and a client), counts
peers/       servers: how each is started, paused and ended, and what its acknowledgement means
clients/     one adapter per client library, each used as its documentation advises
worker.py    one role (a producer, a consumer, ...) in a process of its own
measure.py   one measurement: workers, and what the servers used meanwhile
runner.py    rounds, turns, budget
limits.py    what the machine itself does with the same bytes
stats.py, goals.py, tables.py, plots.py   raw numbers to medians, verdicts, Markdown, PNG
"""
