"""`bagualu simulate`: what it prints, its document, what it draws and writes, and what it refuses."""

import json
import math
import re
import shlex
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bagualu.comm.cluster_file import load_cluster
from bagualu.launch import cli
from bagualu.parallel.memory_kinds import KINDS
from bagualu.parallel.simulation import error_band
from bagualu.parallel.simulation.error_band import HeldOutError
from bagualu.parallel.simulation.step_parts import PRODUCTS

GUIDES = [Path(__file__).parents[3] / "docs/guides" / name for name in ("planning.md", "operators.md")]
LINES = [line for guide in GUIDES for line in guide.read_text().splitlines()]
COMMANDS = [line.strip() for line in LINES if line.startswith("    bagualu simulate ")]
SMALL = {
    "moe_tiny": [],
    "llama3_70b": ["model.layers=40", "model.hidden=64", "model.heads=8", "model.kv_heads=8", "model.ffn=64"],
    "mixtral_8x7b": [
        *("model.layers=8", "model.hidden=64", "model.heads=8", "model.kv_heads=8", "model.moe.ffn=64"),
        *("parallel.virtual_stages=2", "data.global_batch=64"),
    ],
}
"""For each recipe of the guide, a model that takes little time; tests/test_architecture.py checks the commands as they are."""
BATCH = {1024: 128, 2048: 256}
"""The sequences of a step of the guide's commands, and as many as leave each replica a pipeline's worth of micro-batches."""
TINY = ["simulate", "recipe=tiny", "cluster=h100", "world=8"]
FIXED = ("step_seconds", "tokens_per_second_per_device", "mfu", "hfu", "bubble", "memory_bytes", "fits")


def predicted(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    document: dict[str, Any] = json.loads(out)
    return document


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr with which these words are refused."""
    assert cli.main([*words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("bagualu: error: ")
    return err


def test_the_document_has_figures_that_belong_together(capsys: pytest.CaptureFixture[str]) -> None:
    document = predicted(capsys, *TINY)
    assert all(key in document for key in FIXED)
    assert document["layout"] == {"data": 4, "tensor": 1, "pipeline": 2, "expert": 2, "context": 1}  # data 2 in the recipe
    step = document["step_seconds"]
    assert document["tokens"] == 16 * 128
    assert document["tokens_per_second_per_device"] == pytest.approx(document["tokens"] / step / 8)
    assert sum(document["parts_seconds"].values()) == pytest.approx(step)
    assert 0 < document["mfu"] < document["hfu"] < 1
    assert document["bubble"] == pytest.approx(document["parts_seconds"]["waiting in the pipeline"] / step)
    ranks = document["pipeline_ranks"]
    assert [rank["pipeline"] for rank in ranks] == [0, 1]
    for rank in ranks:
        assert set(rank["by_kind"]) <= set(KINDS)
        assert sum(rank["by_kind"].values()) == rank["memory_bytes"]
        assert 0 <= rank["moment_seconds"] <= step
    assert document["memory_bytes"] == max(rank["memory_bytes"] for rank in ranks)
    chip = load_cluster("h100").parts[0].chip
    assert document["memory_limit_bytes"] == chip.memory_bytes - chip.context_bytes
    assert document["fits"] is True


def test_the_report_says_the_same_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    document = predicted(capsys, *TINY)
    assert cli.main(TINY) == 0
    out = capsys.readouterr().out
    assert out.startswith("tiny on 8 H100 SXM5 80GB (cluster=h100): data 4 x pipeline 2 x expert 2, native, ZeRO-1, float32")
    assert re.search(r"^step +\S+ ms for 2,048 tokens: ", out, re.MULTILINE)
    assert f"MFU      {document['mfu']:.1%} of 66.9 TFLOP/s (float32); HFU {document['hfu']:.1%}" in out
    assert f"bubble   {document['bubble']:.1%} of the step" in out
    assert "GiB to spare" in out
    for part in document["parts_seconds"]:
        assert f"  {part} " in out
    assert max(map(len, out.splitlines())) <= 132


def test_it_says_what_generated_kernels_save(capsys: pytest.CaptureFixture[str]) -> None:
    assert predicted(capsys, *TINY)["fusion"] is None
    fusion = predicted(capsys, *TINY, "train.compile=true")["fusion"]
    assert fusion["saved"].keys() == {"norm", "rotary", "gate", "loss"}
    assert list(fusion["left"].values()) == sorted(fusion["left"].values(), reverse=True)
    assert 0 < sum(fusion["saved"].values()) + sum(fusion["left"].values()) < 1
    assert cli.main([*TINY, "train.compile=true"]) == 0
    out = capsys.readouterr().out
    assert f"kernels  save norm {fusion['saved']['norm']:.1%}, " in out
    assert f"would save {sum(fusion['left'].values()):.1%}, the most as {next(iter(fusion['left']))}"[:70] in out
    assert max(map(len, out.splitlines())) <= 132


def test_a_model_that_does_not_fit_is_predicted_and_refused_with_what_would_make_it_fit(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "recipe=bench_dense_1b", "cluster=h100", "world=8", "data.global_batch=8", "train.micro_batch=1",
             "model.layers=4", "model.hidden=16384", "model.heads=128", "model.ffn=45056", "data.sequence_length=512"]  # fmt: skip
    assert cli.main([*words, "--json"]) == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert len(err.splitlines()) == 1
    assert (document["ended"], document["fits"], document["error"]) == (
        "refused",
        False,
        err.removeprefix("bagualu: error: ").strip(),
    )
    assert document["step_seconds"] > 0
    excess = re.search(r"needs [\d.]+ GiB \(.*\): ([\d.]+) GiB more than the 78.4 GiB of H100 SXM5 80GB", err)
    assert excess is not None
    assert float(excess[1]) == pytest.approx((document["memory_bytes"] - document["memory_limit_bytes"]) / 2**30, abs=0.06)
    fix = re.search(r"; give (\S+?)( or |$)", err)
    assert fix is not None
    assert predicted(capsys, *words, fix[1])["fits"] is True


def test_the_error_band_is_that_of_the_chip_whatever_the_file_is_called(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [HeldOutError(chip, 8, 10**7, "moe", error) for chip, error in (("H100 SXM5 80GB", 0.25), ("H200 SXM 141GB", -0.5))]
    monkeypatch.setattr(error_band, "held_out_errors", lambda: [one for one in known for _ in range(20)])
    (tmp_path / "mine.yaml").write_text((Path(__file__).parents[3] / "recipes/cluster/h100.yaml").read_text())
    for cluster in ("h100", f"{tmp_path}/mine.yaml"):
        band = predicted(capsys, *TINY[:2], f"cluster={cluster}", "world=8")["error_band"]
        assert (band["chips"], band["beyond"], band["least"]) == (["H100 SXM5 80GB"], False, pytest.approx(0.8))


def test_figures_of_a_quick_measurement_are_said_to_be_such(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shipped = (Path(__file__).parents[3] / "recipes/cluster/h100.yaml").read_text()
    for quick in (True, False):
        (tmp_path / "mine.yaml").write_text(f"quick: {str(quick).lower()}\n{shipped}")
        assert cli.main([*TINY[:2], f"cluster={tmp_path}/mine.yaml", "world=8"]) == 0
        line = "figures  of mine.yaml come from a quick measurement, which makes this less accurate: run bagualu doctor"
        assert (line in capsys.readouterr().out.splitlines()) is quick


def test_it_forecasts_what_failures_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """A rate at which 8 devices fail often."""
    words = ["days=2", "assume.failure_factor=300", "spares=1", "restart.limit=500"]
    failures = predicted(capsys, *TINY, *words)["failures"]
    ratio = failures["effective_training_time_ratio"]
    assert 0 < ratio["low"] < ratio["mean"] < ratio["high"] < 1
    assert sum(failures["categories"].values()) == pytest.approx(2 * 86400)
    assert failures["assumptions"]["failure_factor"]["value"] == 300
    assert cli.main([*TINY, *words]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^failures \S+ in 2 days ", out, re.MULTILINE)
    assert f"training {ratio['mean']:.1%} (90% of runs " in out
    assert max(map(len, out.splitlines())) <= 132


def test_a_cluster_that_never_fails_has_no_forecast(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shipped = (Path(__file__).parents[3] / "recipes/cluster/h100.yaml").read_text()
    mine = tmp_path / "mine.yaml"
    mine.write_text(shipped.partition("failures_per_device_hour:")[0])
    words = [*TINY[:2], f"cluster={mine}", "world=8"]
    assert predicted(capsys, *words)["failures"] is None
    assert "has no failures_per_device_hour, which a forecast of failures needs" in refused(capsys, *words, "days=3")


def test_data_ranks_are_what_the_other_degrees_leave(capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs 4 ranks but the world has 8" in refused(capsys, *TINY, "parallel.data=2")
    assert "8 ranks do not divide" not in refused(capsys, *TINY[:-1], "world=7", "parallel.tensor=3")


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ([], "simulate needs cluster=NAME (one of a100, a100_40gb, "),
        (["cluster=h100"], "simulate needs world=N, the number of devices; e.g. bagualu simulate recipe=llama3_8b cluster=h100"),
        (["cluster=h1000", "world=8"], "cluster=h1000 is unknown; did you mean cluster=h100?"),
        (["cluster=/no/such.yaml", "world=8"], "cluster=/no/such.yaml is no file"),
        (["cluster=h100", "world=eight"], "world=eight must be a whole number of at least 1, e.g. world=512"),
        (["cluster=h100", "world=0"], "world=0 must be a whole number of at least 1"),
        (["cluster=h100", "world=8,16"], "world=8,16 must be a whole number of at least 1, e.g. world=512; one value at a time"),
        (["cluster=h100", "world=8", "world=16"], "world=16 is the second world; give one"),
        (["cluster=h100", "world=7"], "7 ranks do not divide into tensor 1 x pipeline 2 x context 1 = 2; use 6 ranks"),
        (["cluster=h100", "world=96"], "data.global_batch=16 does not divide over 48 data ranks; give data.global_batch=96"),
        (["cluster=sw26010pro", "world=200000"], "has 107136 devices; give world=107136 or less"),
        (["cluster=h100", "world=8", "train.stps=3"], "did you mean train.steps?"),
        (["cluster=h100", "world=8", "optim.lr=1e-3,1e-4"], "one prediction takes one value of each key; simulate each by itself"),
        (["cluster=h100", "world=8", "out=step.gif"], "out=step.gif must end in .png, .svg or .html; give out=step.png"),
        (["cluster=h100", "world=8", "out=no/such/step.png"], "no/such does not exist; make it, or give out=step.png"),
        (["cluster=h100", "world=8", "trace=step.svg"], "trace=step.svg must end in .json; give trace=step.json"),
        (["cluster=h100", "world=8", "loads=uneven"], "loads=uneven is neither balanced nor skewed:R nor the directory of a run"),
        (["cluster=h100", "world=8", "loads=skewed:9"], "the fullest of 4 experts has from 1 to 4 times the mean load, not 9"),
        (["cluster=h100", "world=8", "recipe=tiny_dense", "loads=skewed:1.5"], "has no effect on a model without experts"),
        (["cluster=h100", "world=8", "parallel.engine=deepspeed"], "give parallel.engine=native parallel.zero=1"),
        (["cluster=mi300x", "world=8", "train.dtype=float8"], "train.dtype=float8: no matmul peak is known for MI300X 192GB"),
        (["cluster=sw26010pro", "world=8", "train.dtype=float8"], "no matmul peak is known for SW26010-Pro; give one of float64"),
        (["cluster=h100", "world=8", "stragglers=2%"], "stragglers=2% must be a fraction of at least 0 and below 1, e.g. stragg"),
        (["cluster=h100", "world=8", "stragglers=2"], "stragglers=2 must be a fraction"),
        (["cluster=h100", "world=8", "stragglers=-0.1"], "stragglers=-0.1 must be a fraction"),
        (["cluster=h100", "world=8", "stragglers=nan"], "stragglers=nan must be a fraction"),
        (["cluster=h100", "world=8", "days=0"], "days=0 must be a number above 0"),
        (["cluster=h100", "world=8", "spares=-1"], "spares=-1 must be a whole number of nodes, at least 0"),
        (["cluster=h100", "world=8", "assume.repair_hour=1"], "unknown assumption repair_hour; did you mean repair_hours?"),
        (["cluster=h100", "world=8", "--days=8"], "keys have no dashes, give days=8"),
        (["cluster=h100", "world=8", "--world=8"], "keys have no dashes, give world=8"),
        (["cluster=h100", "world=8", "-m"], "unknown option -m: one prediction takes one value of each key"),
    ],
)  # fmt: skip
def test_what_it_refuses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], fix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fix in refused(capsys, "simulate", *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("bytes_per_second: 5.0e+10", "bytes_per_second: -5.0e+10"), "tiers.network.bytes_per_second=-50000000000.0 must be"),
        (
            ("  memory_bytes_per_second: 3.35e+12", ""),
            "chip.memory_bytes_per_second is missing; give memory_bytes_per_second: 3.35e+12",
        ),
    ],
)
def test_a_cluster_file_with_a_wrong_figure_is_refused_with_file_and_key(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, change: tuple[str, str], problem: str
) -> None:
    shipped = (Path(__file__).parents[3] / "recipes/cluster/h100.yaml").read_text()
    assert change[0] in shipped
    mine = tmp_path / "mine.yaml"
    mine.write_text(shipped.replace(*change))
    assert f"{mine}: {problem}" in refused(capsys, "simulate", f"cluster={mine}", "world=8")


@pytest.mark.parametrize("verb", ["train", "slurm"])
def test_other_verbs_say_whose_key_cluster_is(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert "or predict the run with `bagualu simulate`" in refused(capsys, verb, "cluster=h100")
    assert "world=8 is for `bagualu simulate`" in refused(capsys, verb, "world=8")


def fewer(word: str) -> str:
    """The word of a command, with fewer sequences in a step."""
    key, _, value = word.partition("=")
    return f"{key}={BATCH[int(value)]}" if key == "data.global_batch" else word


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_guide_predict(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [fewer(word) for word in shlex.split(command)[1:]]
    small = SMALL[next(word for word in words if word.startswith("recipe=")).removeprefix("recipe=")]
    assert cli.main([*words, *small, "model.vocab=512", "data.sequence_length=32"]) == 0
    written = {word.partition("=")[2] for word in words if word.startswith(("out=", "trace="))}
    assert {path.name for path in tmp_path.iterdir()} == written


def test_the_guide_has_commands() -> None:
    assert len(COMMANDS) >= 8


def test_a_skewed_load_takes_longer(capsys: pytest.CaptureFixture[str]) -> None:
    wide = ["model.moe.ffn=8192", "data.sequence_length=2048"]
    balanced = predicted(capsys, *TINY, *wide)
    skewed = predicted(capsys, *TINY, *wide, "loads=skewed:1.8")
    assert skewed["step_seconds"] > balanced["step_seconds"]
    assert "waiting for ranks with more work" in skewed["parts_seconds"]
    assert "waiting for ranks with more work" not in balanced["parts_seconds"]


def test_all_wait_for_the_slowest_rank(capsys: pytest.CaptureFixture[str]) -> None:
    """With more ranks the slowest is slower."""
    wide = ["recipe=tiny_dense", "model.ffn=8192", "data.sequence_length=2048", "data.global_batch=512", "train.micro_batch=1"]
    paces = []
    for world in (8, 512):
        words = ["simulate", *wide, "cluster=h100", f"world={world}"]
        alike, apart = (predicted(capsys, *words, *more) for more in ([], ["stragglers=0.05"]))
        assert (alike["stragglers"], alike["slowest_pace"], apart["stragglers"]) == (0, 1, 0.05)
        assert "waiting for stragglers" not in alike["parts_seconds"]
        waited = apart["parts_seconds"]["waiting for stragglers"]
        assert 0 < apart["step_seconds"] - alike["step_seconds"] <= waited * 1.001
        assert apart["parts_seconds"][PRODUCTS] == pytest.approx(alike["parts_seconds"][PRODUCTS])
        assert sum(apart["parts_seconds"].values()) == pytest.approx(apart["step_seconds"])
        paces.append(apart["slowest_pace"])
    assert 1.05 < paces[0] < paces[1] < 1.2
    assert cli.main([*words, "stragglers=0.05"]) == 0
    assert f"slowest  computes {paces[1] - 1:.1%} longer than the mean rank" in capsys.readouterr().out


def test_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("step.png", "step.svg", "step.html"):
        assert cli.main([*TINY, f"out={tmp_path / name}"]) == 0
        assert f"written: {tmp_path / name}" in capsys.readouterr().out
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    text = " ".join(ElementTree.fromstring((tmp_path / "step.svg").read_text()).itertext())
    assert "<svg" in (page := (tmp_path / "step.html").read_text())
    assert "where the step goes" in page
    assert text is not None


def test_a_trace_file_has_a_process_for_each_role_and_an_arrow_for_each_message(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "step.json"
    document = predicted(capsys, *TINY, f"trace={path}")
    events = json.loads(path.read_text())["traceEvents"]
    named = {
        (event["name"], event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["ph"] == "M" and "tid" in event
    }
    assert {name for (what, _, _), name in named.items() if what == "process_name"} == {
        "pipeline 0: rank 0 and 3 alike", "pipeline 1: rank 4 and 3 alike"
    }  # fmt: skip
    starts, ends = ({event["id"]: event for event in events if event["ph"] == phase} for phase in "sf")
    assert starts.keys() == ends.keys()
    assert len(starts) == 2 * 2  # activations and gradients of 2 micro-batches
    assert all(starts[call]["pid"] != ends[call]["pid"] and starts[call]["ts"] <= ends[call]["ts"] for call in starts)
    slices = [event for event in events if event["ph"] == "X"]
    assert max(event["ts"] + event["dur"] for event in slices) == pytest.approx(document["step_seconds"] * 1e6, abs=1)
    for thread in {(event["pid"], event["tid"]) for event in slices}:
        _nested([event for event in slices if (event["pid"], event["tid"]) == thread])
    operators = Counter(event["name"] for event in slices)
    assert operators["aten.mm.default"] > 10
    most = max(sum(event["args"].values()) for event in events if event["ph"] == "C")
    assert most == document["memory_bytes"]


def _nested(slices: list[dict[str, Any]]) -> None:
    """Asserts that of two slices of a thread one contains the other, or they do not overlap, as viewers need."""
    open_until: list[float] = []
    for event in sorted(slices, key=lambda event: (event["ts"], -event["dur"])):
        end = event["ts"] + event["dur"]
        while open_until and open_until[-1] <= event["ts"] + 1e-3:
            open_until.pop()
        assert not open_until or end <= open_until[-1] + 1e-3
        assert not math.isnan(end)
        open_until.append(end)
