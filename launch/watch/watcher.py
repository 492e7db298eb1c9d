"""The base class of objects that the launcher calls while workers run: the hang check, the ledger, the summary."""

from collections.abc import Mapping

from bagualu.trainer.process.failure import Failure


class Watcher:
    """Methods that do nothing and are overridden as needed. The launcher calls them between its own work, so they must be quick.

    A generation is one set of workers, from their start to their end; a launch without failures has one.
    """

    def begins(self) -> None:
        """Called when a launch begins, only on the node whose launcher holds the lock of the run directory."""

    def started(self, generation: int, pids: Mapping[int, int]) -> None:
        """Called when the workers of `generation` (the first is 0) have started.

        `pids` maps the global ranks of the workers on this machine to their process ids. With comm.backend=simulated the ranks are
        threads, and all have the launcher's process id.
        """

    def look(self) -> Failure | None:
        """Called about ten times a second while workers run. A returned failure ends the generation as a worker's death does.

        The workers are killed (threads: those that wait fail, others keep running), and restarted if the restart policy allows. The
        failure must have the rank at fault (-1: no single rank), phase, cause and step.
        """
        return None

    def failed(self, generation: int, failure: Failure, again: bool) -> None:
        """Called when the workers of `generation` have ended with `failure`. `again` says whether workers are started again."""
