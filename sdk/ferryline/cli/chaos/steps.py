"""From the steps of a plan to the methods that carry them out."""

from __future__ import annotations

from ferryline.cli.chaos.schedule import Step


class Steps:
    """A step of kind ``half-open`` is done by ``_begin_half_open``, undone by ``_end_half_open`` if there is one."""

    async def begin(self, step: Step) -> None:
        """Do it. What cannot be done now (nobody to kill, no safe moment to damage a file) is left out."""
        await getattr(self, "_begin_" + step.kind.replace("-", "_"))(step)

    async def end(self, step: Step) -> None:
        """Undo it."""
        undo = getattr(self, "_end_" + step.kind.replace("-", "_"), None)
        if undo is not None:
            await undo(step)
