"""What the coordinator decides. Pure: no I/O, no clock, no chance; time and identifiers are arguments."""
