"""Judge what a cluster did from what its clients saw. Pure: no I/O, no clock, no chance.

`history` is the format in which a run is written down, `checker` reads one and gives a `Verdict`.
"""
