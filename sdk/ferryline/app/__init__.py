"""Workers: apps of subscribers, tasks and schedules. See docs/workers.md.

`App` declares and connects, `Worker` runs what was declared. ``signatures``, ``verdicts``, ``statuses``, ``cron`` and
``scaling`` decide, and do nothing else.
"""
