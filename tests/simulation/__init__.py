"""A deterministic simulation of a whole cluster: the product's own cores on virtual time, under seeded faults.

``python -m tests.simulation --help`` from the root of the repository. The same seed gives the same run, event by event.
"""
