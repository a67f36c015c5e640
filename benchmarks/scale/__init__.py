"""How cost grows: with partitions, with connections, with bytes of log, and beyond one machine by simulation."""
