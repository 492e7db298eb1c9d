"""Predicts the rows of a file of published runs: traces each distinct recipe once, and replays it on the cluster of each row."""

import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bagualu.comm.errors import RecipeError
from bagualu.comm.topology import Chip, Cluster
from bagualu.parallel.simulation.events import Operator, Role
from bagualu.parallel.simulation.operator_cost import is_attention, operator_seconds
from bagualu.parallel.simulation.replay import Replayed, replay
from bagualu.trainer.simulation.roles import trace_world
from bagualu.trainer.simulation.trace import Traced

from .attention import assemble_with
from .describe import Run, describe
from .families import Unknown
from .overlap import blocking, chunked
from .rows import Published, Row

CALIBRATION, TEST, LEFT_OUT = "calibration", "test", "left out"


@dataclass(frozen=True)
class Figures:
    """What is predicted of a run."""

    step_seconds: float
    memory_bytes: int
    """Of the fullest device of those whose memory is stated, with `context_bytes` where the driver reports it."""
    fits: bool | None
    """None: the row does not say what is computed again, of which the memory depends."""


@dataclass(frozen=True)
class Predicted:
    """A row with its use and its prediction."""

    row: Row
    used: str
    reason: str
    published: Published
    run: Run | None = None
    figures: Figures | None = None


class Traces:
    """The roles of runs, in a folder if one is given. They do not depend on the cluster."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def has(self, run: Run) -> bool:
        """Returns whether the roles of a run are in the folder."""
        return self._folder is not None and self._path(run, self._folder).exists()

    def of(self, run: Run) -> Sequence[Role]:
        """Returns the roles of a run. Raises RecipeError if it cannot be traced."""
        roles = self._traced(run)
        if run.overlap == "blocking" and run.recipe.parallel.zero < 3:  # DeepSpeed's overlap_comm is true at stage 3
            return blocking(roles)
        return chunked(roles) if run.overlap == "chunked" else roles

    def _traced(self, run: Run) -> Sequence[Role]:
        if self._folder is None:
            return _trace(run)
        path = self._path(run, self._folder)
        if path.exists():
            roles: Sequence[Role] = pickle.loads(path.read_bytes())
            return roles
        roles = _trace(run)
        self._folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(roles, pickle.HIGHEST_PROTOCOL))
        return roles

    def _path(self, run: Run, folder: Path) -> Path:
        text = " ".join([*run.words, str(run.world), run.attention])
        return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.pickle"


def _trace(run: Run) -> list[Role]:
    return trace_world(run.recipe, run.world, Traced(assemble=assemble_with(run.attention)))


def use_of(row: Row) -> tuple[str, str, Published, Run | None]:
    """Returns what a row is used for, the reason, what it measured and, unless it is left out, its run."""
    published, reasons = row.published()
    if published.fits is None:
        return LEFT_OUT, "; ".join(reasons), published, None
    try:
        run = describe(row)
    except Unknown as unknown:
        return LEFT_OUT, str(unknown), published, None
    if row.single_node and published.step_seconds is not None:
        return CALIBRATION, "the devices of a single node", published, run
    return TEST, "; ".join(reasons), published, run


def predict(run: Run, published: Published, traces: Traces) -> Figures:
    """Returns the prediction of a run. Raises RecipeError if it cannot be traced."""
    replayed = replayed_of(run, traces.of(run), run.cluster)
    chip = run.cluster.parts[0].chip
    context = 0 if published.only_tensors else chip.context_bytes
    peaks = {role.role.pipeline: 0 for role in replayed.roles}
    for role in replayed.roles:
        peaks[role.role.pipeline] = max(peaks[role.role.pipeline], role.peak.bytes)
    stated = [size for pipeline, size in peaks.items() if run.stages is None or pipeline in run.stages]
    fits = max(peaks.values()) + chip.context_bytes <= chip.memory_bytes if run.recompute_known else None
    return Figures(replayed.step_seconds, max(stated) + context, fits)


def replayed_of(run: Run, roles: Sequence[Role], cluster: Cluster) -> Replayed:
    """Returns the step of the roles of a run on `cluster`."""
    return replay(roles, run.recipe.parallel.layout(run.world), cluster, seconds_on(cluster.parts[0].chip, run.attention_slower))


def seconds_on(chip: Chip, attention_slower: float) -> Callable[[int, Operator], float]:
    """Returns the times of operators on a chip, of each kind and shape computed once; those of fused attention that much longer."""
    known: dict[Operator, float] = {}

    def seconds(rank: int, operator: Operator) -> float:
        if (found := known.get(operator)) is None:
            slower = attention_slower if is_attention(operator) else 1.0
            found = known[operator] = operator_seconds(chip, operator) * slower
        return found

    return seconds


def predicted(row: Row, traces: Traces) -> Predicted:
    """Returns a row with its prediction or, if it is left out, the reason."""
    used, reason, published, run = use_of(row)
    if run is None:
        return Predicted(row, used, reason, published)
    try:
        return Predicted(row, used, reason, published, run, predict(run, published, traces))
    except RecipeError as error:
        return Predicted(row, LEFT_OUT, f"the recipe is refused: {error}", published)


def as_json(predicted: Predicted) -> Mapping[str, object]:
    """Returns a row of the result."""
    figures, published = predicted.figures, predicted.published
    return {
        "run_id": predicted.row.text("run_id"),
        "source": predicted.row.text("source"),
        "used": predicted.used,
        "reason": predicted.reason,
        "predicted": {
            "step_seconds": figures.step_seconds if figures else None,
            "memory_bytes": figures.memory_bytes if figures else None,
            "fits": figures.fits if figures else None,
        },
        "published": {
            "step_seconds": published.step_seconds,
            "memory_bytes": published.memory_bytes,
            "fits": published.fits,
        },
    }


def errors(rows: Sequence[Predicted], figure: str) -> Iterator[float]:
    """Yields predicted / published - 1 of a figure, of the rows that have both."""
    for row in rows:
        measured = getattr(row.published, figure)
        if row.figures is not None and measured is not None:
            yield getattr(row.figures, figure) / measured - 1
