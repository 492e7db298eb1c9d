"""Draws a prediction into the file that `bagualu simulate out=FILE` names. Imports matplotlib."""

from html import escape
from io import BytesIO
from pathlib import Path

from bagualu.launch.verbs.prediction_text import caption, title
from bagualu.parallel.simulation.draw_step import draw_step
from bagualu.trainer.simulation.predict import Prediction

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font-family: sans-serif; margin: 1em }} pre {{ font-size: 90% }} svg {{ width: 100%; height: auto }}</style></head>
<body>
<pre>{report}</pre>
{picture}
</body>
</html>
"""


def draw_prediction(prediction: Prediction, report: str, path: Path) -> None:
    """Writes what each role does in the step to `path`, in the format of its suffix: .png, .svg, or .html, which has `report` too.
    Raises OSError."""
    heading, lines = title(prediction), [" ".join(line.split()) for line in caption(prediction)]
    if path.suffix != ".html":
        draw_step(heading, lines, prediction.replayed, path, path.suffix[1:])
        return
    picture = BytesIO()
    draw_step(heading, lines, prediction.replayed, picture, "svg")
    svg = picture.getvalue().decode()
    page = _PAGE.format(title=escape(heading), report=escape(report), picture=svg[svg.index("<svg") :])
    path.write_text(page, encoding="utf-8")
