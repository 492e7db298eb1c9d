"""Who looks on while workers run: a hang check, a ledger, a rehearsal. Given to the launcher as a list. Free of torch."""

from collections.abc import Mapping

from bagualu.trainer.process.failure import Failure


class Watcher:
    """Does nothing; override what is needed. Called on the launcher's main thread, so each call must be quick.

    A generation is one set of workers, from their start to their end; a launch without failures has one.
    """

    def begins(self) -> None:
        """A launch begins, and this process keeps others out of the run directory. Of several nodes one is called."""

    def started(self, generation: int, pids: Mapping[int, int]) -> None:
        """The workers of `generation` (0: the first) run: process ids on this machine by global rank.

        With comm.backend=simulated the ranks are threads, and all have the launcher's own process id.
        """

    def look(self) -> Failure | None:
        """Asked about ten times a second while workers run. A failure it returns ends their generation like a death: they are
        killed (threads that wait fail, others are left behind), and started again if the budget allows. It must name the rank at
        fault (-1: nobody alone), phase, cause and step."""
        return None

    def failed(self, generation: int, failure: Failure, again: bool) -> None:
        """`generation` has ended with `failure`; `again`: another one follows it."""
