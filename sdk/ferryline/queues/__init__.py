"""Queues, from the receivers' side: leases, renewal, settling. See docs/queues.md."""
