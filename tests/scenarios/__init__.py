"""Stories of a cluster as text: commands, and what the real cores make of them."""
