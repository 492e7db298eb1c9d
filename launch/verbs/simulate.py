"""`bagualu simulate recipe=NAME cluster=NAME world=N`: predicts a training step on a described cluster.

Torch and matplotlib are imported only once the recipe and the cluster are known to be right.
"""

import sys
from dataclasses import asdict
from itertools import chain
from typing import Any, Literal

from bagualu.launch.verbs.command_line import CommandLine
from bagualu.launch.verbs.question import read_question
from bagualu.parallel.simulation.trace_events import write_trace
from bagualu.trainer.process.failure import DONE, REFUSED
from bagualu.trainer.simulation.failures import failure_report


def simulate(request: CommandLine) -> tuple[int, Any]:
    """Print the prediction of a step and of what failures will cost, and draw the step or write it as a trace if `out` or `trace`
    is given. Returns the exit code and the object that --json prints. Raises RecipeError.

    A recipe that does not fit the memory of its devices is predicted too; the exit code is then REFUSED.
    """
    question = read_question(request)
    from bagualu.launch.verbs.prediction_text import as_document, excess, report_text
    from bagualu.trainer.simulation.fusion import fusion_of
    from bagualu.trainer.simulation.loads import read_shares
    from bagualu.trainer.simulation.predict import predict

    wanted: Literal["calls", "operators"] | None = None
    if question.out is not None or question.trace is not None:
        wanted = "calls" if question.trace is None else "operators"
    shares = read_shares(question.loads, question.recipe.model) if question.recipe.model.moe.experts else None
    prediction = predict(question.recipe, question.cluster, question.world, shares, wanted, question.stragglers)
    files = {"out": question.out, "trace": question.trace}
    failures = None
    if prediction.fits:
        recipe, layout = prediction.recipe, prediction.layout
        failures = failure_report(recipe, prediction.cluster, layout, prediction.step_seconds, question.failures)
    document = as_document(prediction) | {key: None if path is None else str(path) for key, path in files.items()}
    document["failures"] = None if failures is None else failures.document()
    first = prediction.cluster.part_of(0).chip
    on_each = max(1, prediction.recipe.micro_batches() // prediction.layout.data)
    fusion = fusion_of(prediction.recipe, first, on_each, shares) if question.recipe.train.compile is True else None
    document["fusion"] = None if fusion is None else asdict(fusion)
    further = [["", *part.lines()] for part in (fusion, failures) if part is not None]
    report = "\n".join([report_text(prediction), *chain(*further)])
    if not request.json:
        print(report)
    if question.out is not None:
        from bagualu.launch.verbs.draw_prediction import draw_prediction

        draw_prediction(prediction, report, question.out)
    if question.trace is not None:
        write_trace(prediction.replayed, question.trace)
    for path in files.values():
        if path is not None and not request.json:
            print(f"written: {path}")
    if prediction.fits:
        return DONE, document
    error = excess(prediction)
    print(f"bagualu: error: {error}", file=sys.stderr)
    return REFUSED, document | {"ended": "refused", "error": error}
