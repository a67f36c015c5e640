"""Backups of a cluster: taken from a running one, checked without any, put into an empty one. See docs/backup.md."""
