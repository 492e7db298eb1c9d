"""Runs the jobs of a sweep one after the other. A failed job does not end the sweep; a request to stop does."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.launch.verbs.sweep import SweepJob
from bagualu.launch.workers import storage_probe
from bagualu.trainer.process.failure import DONE, FAILED, INTERRUPTED, REFUSED, STOPPED, Failure, last_line, os_error, what_next
from bagualu.trainer.process.stop_request import StopRequest
from bagualu.trainer.recipe.config import Recipe

Run = Callable[[Recipe], tuple[int, dict[str, Any]]]
"""A function that runs one job and returns its exit code and the object that --json prints for it."""
_NOT_BEGUN = "not begun"


class Series:
    """The jobs of a sweep, with the exit code and result of each."""

    def __init__(self, jobs: Sequence[SweepJob], stop: StopRequest) -> None:
        self.jobs = list(jobs)
        self._stop = stop
        self._codes: dict[int, int] = {}
        """Exit codes of the jobs that have ended, by their index in the sweep."""
        self._documents: list[dict[str, Any]] = [{"ended": _NOT_BEGUN, "run_dir": job.recipe.run.dir} for job in self.jobs]

    def run(self, run: Run) -> tuple[int, list[dict[str, Any]]]:
        """Run all jobs that are not done yet; a request to stop ends the sweep. Returns the sweep's exit code (`_exit_code`) and
        what --json prints for each job, in order.
        """
        for number, job in enumerate(self.jobs):
            self._check(number, job)
        for number, job in enumerate(self.jobs):
            if number in self._codes:
                continue
            if self._stop():
                break
            code = self._run(run, number, job)
            if code in (STOPPED, INTERRUPTED):
                break
        self._print_rest()
        return self._exit_code(), self._documents

    def _check(self, number: int, job: SweepJob) -> None:
        """Record a job as refused if its run directory cannot be used, and as done if, with checkpoint.resume=true, it has done all
        its steps before."""
        try:
            storage_probe.check(job.recipe)
        except RecipeError as error:
            self._refuse(number, error)
        else:
            if summary := _summary_if_done(job.recipe):
                self._ended(number, DONE, summary)
                print(f"bagualu: {job.recipe.run.dir} is already done", file=sys.stderr, flush=True)

    def _run(self, run: Run, number: int, job: SweepJob) -> int:
        try:
            return self._ended(number, *run(job.recipe))
        except RecipeError as error:  # another job has taken the run directory in the meantime
            return self._refuse(number, error)
        except OSError as error:
            return self._ended(number, FAILED, {"ended": "failed", "cause": os_error(error)})
        except KeyboardInterrupt:
            return self._ended(number, INTERRUPTED, {"ended": "interrupted"})

    def _refuse(self, number: int, error: RecipeError) -> int:
        print(f"bagualu: error: {error}", file=sys.stderr, flush=True)
        return self._ended(number, REFUSED, {"ended": "refused", "error": str(error)})

    def _ended(self, number: int, code: int, document: dict[str, Any]) -> int:
        self._codes[number] = code
        self._documents[number] = {"run_dir": self.jobs[number].recipe.run.dir, **document}
        return code

    def _exit_code(self) -> int:
        """Returns the exit code of the first job of the sweep that failed; without one, STOPPED if a job is not done, else DONE."""
        failed = [code for _, code in sorted(self._codes.items()) if code not in (DONE, STOPPED)]
        stopped = len(self._codes) < len(self.jobs) or STOPPED in self._codes.values()
        return failed[0] if failed else STOPPED if stopped else DONE

    def _print_rest(self) -> None:
        """Print how many jobs are done, which are not and why, and at the end the last line of the job that determined the exit
        code."""
        rest = [number for number in range(len(self.jobs)) if self._codes.get(number) != DONE]
        head = f"bagualu: sweep: {len(self.jobs) - len(rest)} of {len(self.jobs)} jobs done"
        resumes = all(job.recipe.checkpoint.resume for job in self.jobs)
        again = f"; the same command {'' if resumes else 'with checkpoint.resume=true '}repeats only what is not done"
        print(head + (again if rest else ""), file=sys.stderr)
        for number in rest:
            document = self._documents[number]
            how = f"{document['ended']} (exit code {self._codes[number]})" if number in self._codes else _NOT_BEGUN
            why = document.get("error") or document.get("cause")
            print(f"  {how}: {document['run_dir']}" + (f": {why}" if why else ""), file=sys.stderr)
        for number in [number for number in rest if self._codes.get(number) == self._exit_code()][:1]:
            if line := _last_line(self._documents[number]):
                print(line, file=sys.stderr)
        sys.stderr.flush()


def _last_line(document: dict[str, Any]) -> str | None:
    """Returns the last line that a job printed, from its `document`; None if the document holds neither an error nor a failure."""
    if "error" in document:
        return f"bagualu: error: {document['error']}"
    if "rank" not in document:
        return f"bagualu: failed: {document['cause']}" if "cause" in document else None
    failure = Failure(**{field.name: document[field.name] for field in fields(Failure)})
    return last_line(failure, f"in {document['run_dir']}: {what_next(failure)}")


def _summary_if_done(recipe: Recipe) -> dict[str, Any] | None:
    """Returns the summary of the run in run.dir if the recipe has checkpoint.resume=true and that run has done train.steps steps;
    else None, also if the summary cannot be read."""
    path = RunDirectory(recipe.run.dir).summary
    if not recipe.checkpoint.resume:
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    done = isinstance(summary, dict) and summary.get("ended") == "done" and summary.get("step", 0) >= recipe.train.steps
    return summary if done else None
