"""`bagualu schedule`: what it prints, what it draws, how it compares a run with its plan, and what it refuses."""

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from bagualu.launch import cli
from bagualu.parallel.pipeline.draw_text import draw
from bagualu.parallel.pipeline.registry import SCHEDULES, compute_schedule
from bagualu.parallel.pipeline.schedules.schedule import Kind
from bagualu.parallel.pipeline.timeline import simulate
from bagualu.trainer.recipe.compose import compose, save_recipe

ZB_V = ["schedule", "name=zb_v", "stages=4", "micro_batches=8"]
SECONDS = {Kind.FORWARD: 0.25, Kind.INPUT_GRADIENT: 0.5, Kind.WEIGHT_GRADIENT: 0.25, Kind.BACKWARD: 0.75}


def printed(capsys, *words):
    assert cli.main([*words]) == 0
    return capsys.readouterr().out


def refused(capsys, *words):
    """The one line on stderr with which these words are refused."""
    assert cli.main([*words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    return err


def test_the_picture_in_letters_with_bubble_and_activations(capsys):
    out = printed(capsys, *ZB_V)
    assert draw(compute_schedule("zb_v", 4, 8)) in out
    assert "bubble 5.9% of the step, 0.0% of the longest rank's own time (formula: 0 for F = I = W: 0.0%)" in out
    assert "activations in flight by rank: 8 8 8 8, each 1/2 of a rank's micro-batch (formula: 2p)" in out


def test_a_picture_too_wide_for_letters_is_left_out_with_what_to_do(capsys):
    out = printed(capsys, "schedule", "name=1f1b", "stages=8", "micro_batches=64")
    assert "F0" not in out
    assert "give out=schedule.svg to draw it" in out
    assert "bubble 9.9% of the step" in out  # 7 / 71


def test_json_has_every_pass_with_its_times(capsys):
    words = ["name=zb_h1", "stages=2", "micro_batches=3", "forward=1", "input=1.5", "weight=1/2", "message=2"]
    document = json.loads(printed(capsys, "schedule", *words, "--json"))
    assert (document["stages"], document["chunks"], document["micro_batches"]) == (2, 1, 3)
    assert document["peak_in_flight"] == [2, 2]
    assert document["formula"]["bubble_share"] == pytest.approx(2 / 11)  # (p-1)(F+I-W) over itself and 3 micro-batches of 3
    assert len(document["spans"]) == 2 * 3 * 3
    second = [span for span in document["spans"] if span["rank"] == 1]
    assert second[0] == {"rank": 1, "kind": "F", "micro_batch": 0, "stage": 1, "start": 3.0, "end": 4.0}
    assert second[1] == {"rank": 1, "kind": "I", "micro_batch": 0, "stage": 1, "start": 4.0, "end": 5.5}


def test_uneven_costs_and_small_counts_have_no_formula(capsys):
    assert "not defined for this size and these costs" in printed(capsys, *ZB_V, "input=2")
    assert "not defined for this size and these costs" in printed(capsys, *ZB_V[:3], "micro_batches=2")
    assert "formula: (p-1)(F+B): 27.3%" in printed(capsys, "schedule", "name=1f1b", "stages=4", "micro_batches=8", "input=2")


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_drawn_as_svg(capsys, tmp_path, name):
    path = tmp_path / f"{name}.svg"
    out = printed(capsys, "schedule", f"name={name}", "stages=3", "micro_batches=4", f"out={path}")
    assert f"drawn: {path}" in out
    picture = ElementTree.fromstring(path.read_text())
    assert picture.tag.endswith("svg")
    boxes = [one for one in picture.iter() if one.tag.endswith("path") and "stroke: #ffffff" in one.get("style", "")]
    assert len(boxes) == sum(map(len, compute_schedule(name, 3, 4).actions))


def test_png_and_the_same_file_every_time(capsys, tmp_path):
    for name in ("one.png", "two.png", "one.svg", "two.svg"):
        printed(capsys, *ZB_V, f"out={tmp_path}/{name}")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "one.svg").read_text() == (tmp_path / "two.svg").read_text()


def a_run(folder, name="1f1b", ranks=2, micro_batches=3, slow=1.0, step=5):
    """A run directory whose passes took SECONDS, the last rank's `slow` times as long."""
    recipe = compose([f"run.dir={folder}", "recipe=tiny_dense"])
    recipe.parallel.pipeline, recipe.parallel.schedule = ranks, name
    save_recipe(recipe)
    planned = compute_schedule(name, ranks, micro_batches)
    last = planned.placement.ranks - 1

    def cost(action):
        return SECONDS[action.kind] * (slow if planned.placement.rank_of(action.stage) == last else 1)

    rows = [
        {"rank": rank, "step": step, "kind": span.action.kind, "micro_batch": span.action.micro_batch, "stage": span.action.stage,
         "start": 1000.0 + span.start, "end": 1000.0 + span.end}
        for rank, spans in enumerate(simulate(planned, cost, message=0.125).ranks) for span in spans
    ]  # fmt: skip
    write(folder, rows)
    return rows


def write(folder, rows):
    (folder / "pipeline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_beside_its_plan(capsys, tmp_path):
    a_run(tmp_path, "zb_v", ranks=2, micro_batches=4, slow=2.0)
    document = json.loads(printed(capsys, "schedule", str(tmp_path), f"out={tmp_path}/both.svg", "--json"))
    measured = document["measured"]
    assert (document["name"], document["stages"], document["chunks"], document["micro_batches"]) == ("zb_v", 2, 2, 4)
    assert measured["step"] == 5
    assert measured["spans"][0]["start"] == 0  # from the first pass on
    assert document["end"] < measured["end"]  # the plan has no messages
    took = {(span["rank"], span["kind"]): span["end"] - span["start"] for span in document["spans"]}
    assert took[0, "F"] == pytest.approx(0.25)
    assert took[1, "F"] == pytest.approx(0.5)
    assert (tmp_path / "both.svg").stat().st_size > 10000
    with_messages = json.loads(printed(capsys, "schedule", str(tmp_path), "message=0.125", "--json"))
    assert with_messages["end"] == pytest.approx(measured["end"])


def test_a_run_of_a_sweep_has_an_equals_sign_in_its_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    a_run(tmp_path / "tiny-optim.lr=1")
    for given in ("tiny-optim.lr=1", f"{tmp_path}/tiny-optim.lr=1", "~/tiny-optim.lr=1"):
        assert json.loads(printed(capsys, "schedule", given, "out=~/drawn.png", "--json"))["name"] == "1f1b"
    assert (tmp_path / "drawn.png").exists()


def test_the_commands_of_the_page_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[3] / "docs/design/pipeline.md"
    commands = [line.split() for line in page.read_text().splitlines() if line.startswith("    bagualu schedule")]
    assert len(commands) == 2
    for command in commands:
        printed(capsys, *command[1:])


def test_what_is_printed_of_a_run(capsys, tmp_path):
    a_run(tmp_path)
    out = printed(capsys, "schedule", str(tmp_path))
    assert "1f1b: 2 ranks, 3 micro-batches" in out
    assert "measured in step 5: bubble " in out
    assert "times the planned 4 s" in out


def test_the_last_step_counts(capsys, tmp_path):
    rows = a_run(tmp_path)
    write(tmp_path, [*[{**row, "step": 4, "end": row["end"] + 1} for row in rows], *rows])
    assert json.loads(printed(capsys, "schedule", str(tmp_path), "--json"))["measured"]["step"] == 5


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ([], "schedule needs name=... (one of gpipe, 1f1b, interleaved_1f1b"),
        (["name=zb_v"], "schedule needs stages=...; e.g. bagualu schedule name=zb_v stages=4 micro_batches=8"),
        (["name=zb_v", "stages=4"], "schedule needs micro_batches=..."),
        (["name=zbv", "stages=4", "micro_batches=8"], "name=zbv is unknown; give one of gpipe, 1f1b"),
        (["name=zb_v", "stages=4", "micro_batches=8", "chunks=3"], "chunks=3 does not go with name=zb_v; give chunks=2"),
        (["name=zb_v", "stages=0", "micro_batches=8"], "stages=0 must be a whole number of at least 1"),
        (["name=zb_v", "stages=4", "micro_batches=2.5"], "micro_batches=2.5 must be a whole number"),
        (["name=zb_v", "stages=4", "microbatches=8"], "schedule has no key microbatches; did you mean micro_batches?"),
        (["name=zb_v", "stages=4", "stages=5"], "stages=5 is the second stages; give one"),
        ([*ZB_V[1:], "weight=-1"], "weight=-1 must be a number of at least 0"),
        ([*ZB_V[1:], "forward=1/0"], "forward=1/0 must be a number of at least 0"),
        ([*ZB_V[1:], "forward=inf"], "forward=inf must be a number of at least 0"),
        ([*ZB_V[1:], "input=0"], "forward and input must be more than 0"),
        ([*ZB_V[1:], "out=picture.pdf"], "out=picture.pdf must end in .svg or .png; give out=picture.svg"),
        ([*ZB_V[1:], "out=/no/such/folder/a.svg"], "/no/such/folder does not exist; make it, or give out=a.svg"),
        (["/no/such/run"], "/no/such/run/config.yaml does not exist; give the directory of a run"),
        (["runs/tiny", "name=zb_v"], "name=zb_v does not go with a run directory"),
        ([*ZB_V[1:], "--cfg", "job"], "unknown option --cfg: it is an option of bagualu train, bagualu slurm, bagualu rehearse"),
    ],
)
def test_wrong_input_is_one_line_with_the_fix_and_exit_code_2(capsys, words, fix):
    assert fix in refused(capsys, "schedule", *words)


def test_a_run_that_measured_nothing_or_something_else_is_refused(capsys, tmp_path):
    rows = a_run(tmp_path)
    file = tmp_path / "pipeline.jsonl"

    def line(text):
        file.write_text(text)
        return refused(capsys, "schedule", str(tmp_path))

    assert "pipeline.jsonl is empty" in line("\n")
    assert "pipeline.jsonl, line 1: not a pipeline pass" in line('{"rank": 0}\n')
    assert "pipeline.jsonl, line 2: not a pipeline pass" in line(json.dumps(rows[0]) + "\n[1]\n")
    assert "line 1: negative index or end before start" in line(json.dumps({**rows[0], "end": 0}))
    assert "line 1: negative index or end before start" in line(json.dumps({**rows[0], "end": math.nan}))
    file.write_bytes(b"\xff\xfe\n")
    assert "pipeline.jsonl, line 1: not a pipeline pass" in refused(capsys, "schedule", str(tmp_path))
    write(tmp_path, [row for row in rows if row["rank"] == 1])
    assert "has no pass of rank 0 in step 5" in refused(capsys, "schedule", str(tmp_path))
    write(tmp_path, rows[1:])
    assert "rank 0 did F0 of stage 0 0 times" in refused(capsys, "schedule", str(tmp_path))
    write(tmp_path, [row for row in rows if row["rank"] == 0])
    assert "records 1 ranks, but the recipe has parallel.pipeline=2" in refused(capsys, "schedule", str(tmp_path))
    file.unlink()
    assert "pipeline.jsonl does not exist; give the directory of a run" in refused(capsys, "schedule", str(tmp_path))
