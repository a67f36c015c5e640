"""Pure parts of the client: no I/O, no clock, no randomness. Drivers feed events and carry out effects."""
