"""Where the coordinator's records live: `MetaStore` and its back-ends."""
