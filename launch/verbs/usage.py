"""The help pages of the verbs. Imports neither torch nor Hydra, so that help is fast."""

import textwrap
from dataclasses import fields
from importlib.resources import files

from bagualu.comm.cluster_file import cluster_names
from bagualu.comm.monitor import Phase
from bagualu.fault_tolerance.injection.kinds import KINDS
from bagualu.parallel.pipeline.registry import FAMILIES

VERBS = {
    "train": "train on this machine",
    "slurm": "write a SLURM batch script and submit it",
    "rehearse": "train under planned faults, and report which were survived",
    "checkpoint": "list the checkpoints of a run, verify every byte; bring models of Hugging Face in and out",
    "generate": "continue texts with a trained model",
    "evaluate": "measure how well a trained model predicts text",
    "schedule": "draw a pipeline schedule, and the times that a run measured",
    "simulate": "predict a training step on a cluster that need not be here: time, memory, what limits",
    "plan": "find the layout with which a recipe trains fastest on such a cluster, and the command for it",
    "doctor": "measure what this machine can do, and say what is wrong with it",
}

_HELP = """\
bagualu: train large models in parallel

usage: bagualu VERB [key=value ...] [options]

verbs:
{verbs}

`bagualu VERB --help` describes a verb. Keys are those of a recipe: recipe=tiny train.steps=100
exit codes: 0 done, 2 wrong usage or recipe, 75 stopped on request with nothing lost (a checkpoint is saved,
or nothing was done yet), 76 the same step fails repeatedly, 130 Ctrl-C at the very start, others a failure"""

_TRAIN = """\
usage: bagualu train [recipe=NAME] [key=value ...] [--cfg job] [--json] [-m]

Starts the workers that the recipe's layout needs on this machine and trains.
Ctrl-C saves a checkpoint and stops, or only stops if nothing was done yet (exit code 75: start again with
checkpoint.resume=true); a second Ctrl-C stops immediately.

recipes:
{recipes}

keys (all of them: --cfg job):
  run.dir                 the run's directory, default runs/NAME
  train.steps train.micro_batch (auto: what fits) train.dtype   checkpoint.every checkpoint.keep checkpoint.async
  data.source             stdlib, random, a file or folder of text, of records or of token ids
  data.global_batch       sequences of one optimizer step, over all ranks
  model.layers model.hidden model.heads model.moe.experts ...   parallel.data parallel.tensor parallel.pipeline ...
  model.from              begin with the weights of a Hugging Face directory, a run or a checkpoint (recipe=finetune)
  comm.backend            auto (nccl where the workers have GPUs, else gloo), gloo, nccl, or simulated: all ranks as
                          threads of one process
  comm.device=cuda        for simulated: on one GPU, which all ranks share
  checkpoint.resume=true  continue from the newest checkpoint of run.dir
  restart.limit           how often failed workers are restarted; restart.elastic=true: with fewer if some are lost

options:
  --cfg job   print the resolved recipe and do nothing
  --json      print one JSON document on stdout, all else on stderr
  -m          run every combination of several values (optim.lr=1e-3,3e-4) in turn, each in its own run.dir,
              even if one fails; with checkpoint.resume=true, run only those that are not done
  -h, --help  this page"""

_SLURM = """\
usage: bagualu slurm [recipe=NAME] launch.nodes=N [launch.workers=M] [key=value ...] [--print] [--cfg job] [--json]

Writes a batch script into the run directory and submits it with sbatch, if there is one. The script runs one agent on
each node. Before the job's time limit, and when it is preempted, the run saves a checkpoint, and the job goes back
into the queue and continues from it, unless it has saved no new step since it began.

recipes:
{recipes}

keys (all of them: --cfg job):
  launch.nodes launch.workers       nodes, and workers on each
  launch.slurm.partition launch.slurm.account
  launch.slurm.time=24:00:00        time limit; default: the partition's limit
  launch.slurm.requeue=false        the job does not go back into the queue by itself
  restart.elastic=true              the job continues when SLURM has lost one of its nodes
  launch.slurm.gpus_per_node launch.slurm.cpus_per_task
  launch.slurm.directives=[--exclusive]             further #SBATCH lines
  launch.slurm.setup=["source env/bin/activate"]    shell lines run on every node; a line that fails ends the job

options:
  --print     print the script and do nothing
  --cfg job   print the resolved recipe and do nothing
  --json      print one JSON document on stdout, all else on stderr
  -h, --help  this page"""

_REHEARSE = """\
usage: bagualu rehearse [recipe=NAME] faults=... [key=value ...] [--no-compare] [--json]

Runs the recipe twice on this machine, with and without the planned faults, in two folders of RUN_DIR-rehearsal. Reports
for every fault how it was noticed, what was done about it and what it cost, and whether both final states are equal
bit for bit. Exit code 0 only if every fault struck, and was survived or took no effect, and the states are equal.

faults=[kill@step=5:rank=2:at=backward, corrupt@step=9]     these faults; each strikes once, also after a restart
faults=random:20                                            20 faults, drawn with run.seed
faults=random:20:kill+slow                                  20 faults of these kinds

kinds (all take step= and rank=, most take at=):
{kinds}

points: {points}

options:
  --no-compare  leave out the run without faults
  --json        print one JSON document on stdout, all else on stderr
  -h, --help    this page"""

_CHECKPOINT = """\
usage: bagualu checkpoint list|verify RUN_DIR|CHECKPOINT [--json]
       bagualu checkpoint import HF_DIR to=RUN_DIR [--json]
       bagualu checkpoint export RUN_DIR|CHECKPOINT to=HF_DIR [dtype=DTYPE] [format=FORMAT] [--json]

list    steps, sizes, the layout that wrote them, and problems that a quick look at every file shows
verify  the same after checking every byte on all cores; names every damaged block, exit code 1 if there is any
import  a model in the files of Hugging Face becomes a run that has done no step, from which any layout can go on
export  the weights of a checkpoint, by default the newest of a run, become a model that transformers loads; dtype is
        float64, float32, bfloat16 or float16, by default that of the training; format is safetensors, the default, or
        dcp, a checkpoint that torch.distributed.checkpoint loads into the state of such a model

Give a run directory, or one checkpoint in it (runs/tiny/checkpoints/step-00000010)."""

_GENERATE = """\
usage: bagualu generate RUN_DIR|CHECKPOINT --prompt TEXT [options] [key=value ...]

Continues each prompt with the model of a run: its newest checkpoint, or the one that is given. Text is written while
it is generated, one prompt after the other. On several ranks the tokens are the same, up to rounding.

prompts (all may be repeated):
  --prompt TEXT           "" stands for the beginning of a document
  --prompt-file FILE      one prompt a line; - reads them from stdin
  --tokens 5,17,101       a prompt as tokens, for a model without a tokenizer

options:
  --max-new-tokens N      default 128
  --temperature T         0 (default) takes the most probable token; else one is drawn, more evenly for a larger T
  --top-p P               draw from the fewest most probable tokens with probability P together; default 1, all
  --min-p P               draw none less probable than P times the most probable; default 0
  --repetition-penalty R  more than 1 makes tokens that the text holds less probable; default 1
  --seed N                of what is drawn, default 0
  --stop TEXT             end a text before TEXT; may be repeated
  --ignore-eos            go on after the end of a document
  --json                  print one JSON document on stdout when all texts have ended, and stream nothing
  -h, --help              this page

keys:
  parallel.tensor parallel.pipeline parallel.expert parallel.data    a layout, by default one process
  train.dtype                                                        default: that of the run
  comm.backend comm.device comm.timeout_seconds                      as in a run
  launch.threads launch.affinity launch.allocator launch.port        as in a run"""

_EVALUATE = """\
usage: bagualu evaluate RUN_DIR|CHECKPOINT [data.source=TEXT] [sequences=N] [key=value ...] [--json]

Prints the loss (nats per token), perplexity and bits per byte of the model of a run: its newest checkpoint, or the
one that is given. Without data.source on the text that the run kept for validation, with it on all of that text.

keys:
  data.source            a text file or a folder of text files, records with text, or files of token ids
  data.format data.field data.token_dtype data.end_token    how to read it, as in training; chat: loss of answers
  data.packing           stream, documents or whole, as in training; default: stream, for chat whole
  sequences              the most sequences to evaluate, spread evenly; default: all (of random tokens, 64)
  data.sequence_length   default: as the run was trained; for other text the model's context, at most all of the text
  data.cache             where other text is prepared; default: as in the run
  train.micro_batch      default: as in the run
  parallel.tensor parallel.pipeline parallel.expert parallel.data    a layout, by default one process
  train.dtype                                                        default: that of the run
  comm.backend comm.device comm.timeout_seconds                      as in a run
  launch.threads launch.affinity launch.allocator launch.port        as in a run

options:
  --json      print one JSON document on stdout
  -h, --help  this page"""

_SCHEDULE = """\
usage: bagualu schedule name=NAME stages=N micro_batches=M [chunks=V] [key=value ...] [--json]
       bagualu schedule RUN_DIR [out=FILE] [--json]

Draws the schedule in letters if it is narrow enough: F forward, B backward, I and W its two parts (the gradients
of input and weights), one line per rank, ' for a pass of a rank's second chunk; -- is the second half of a pass that
takes two steps. Prints its bubble and the activations in flight on every rank. For the directory of a run, it prints
the schedule with the run's mean time of each pass and, below, the times that were measured in one step.

keys:
  name            {names}
  stages          ranks of the pipeline: the stages that each chunk of the model is cut into
  micro_batches   number of micro-batches of one step on every rank
  chunks          stages per rank (parallel.virtual_stages in a recipe); default: as many as the schedule needs
  forward=1 input=1 weight=1    time of F, I and W in a stage, e.g. forward=1 input=1.2 weight=0.8
  message=0       time of a message between two ranks, in the same unit
  out             FILE.svg or FILE.png: draw it there

options:
  --json      print one JSON document on stdout, with every pass and its times
  -h, --help  this page"""

_SIMULATE = """\
usage: bagualu simulate recipe=NAME cluster=NAME world=N [key=value ...] [loads=LOADS] [out=FILE] [trace=FILE] [--json]

Predicts a step of `bagualu train` with this recipe on N devices of a described cluster. The trainer itself takes the
step, once for each kind of rank, with tensors that have no values, and the cluster's figures say how long each of its
operators and messages takes. Needs no GPU. Prints the step's time, what it consists of, the memory of each pipeline
rank, and whether that fits (exit code 2 if it does not, with what would make it fit).

clusters:
{clusters}

keys, besides all those of a recipe (bagualu train --cfg job):
  cluster           a cluster from the list above; this, which is this machine as `bagualu doctor` measured it; or a file
                    of yours that ends in .yaml (docs/design/clusters.md)
  world             the number of devices, one rank each; data ranks are what the other degrees leave
  loads             how tokens spread over the experts of a layer: balanced (default); skewed:R, R times the mean for the
                    fullest, and for each other the same fraction of the one before it; or RUN_DIR, as in that run
  stragglers        standard deviation of the time that ranks take for the same work, as a fraction, e.g. 0.02; default 0.
                    All wait for the slowest of so many
  train.dtype=float8    products of linear layers take the cluster's float8 peak
  days              length of the run whose failures are forecast (default 14), if the cluster's file has failure rates
  spares            nodes that stand by for those that fail; left out: always enough
  assume.NAME       another figure for that forecast, e.g. assume.repair_hours=6 (docs/design/failures.md lists them)
  out               FILE.png, FILE.svg or FILE.html: draw what each kind of rank does in the step
  trace             FILE.json: the same for https://ui.perfetto.dev

options:
  --json      print one JSON document on stdout
  -h, --help  this page"""

_PLAN = """\
usage: bagualu plan recipe=NAME cluster=NAME world=N [key=value ...] [days=N] [top=N] [seconds=N] [loads=LOADS] [--json]

Finds the layouts with which a recipe trains fastest on N devices of a described cluster: degrees of data, tensor,
pipeline and expert parallelism, micro-batch, schedule, recomputation, ZeRO stage, sequence parallelism, the split of
layers and, where chips differ, the shares of data ranks. Layouts that do not fit their devices are left out. The best
by an estimate are predicted as `bagualu simulate` does. Prints them with the reasons why the others are slower, the
command that runs the best, and what other choices cost. Keys that you give keep their values.

clusters:
{clusters}

keys, besides all those of a recipe (bagualu train --cfg job):
  cluster, world    as for bagualu simulate
  parallel.tensor=8 train.micro_batch=1 ...     what to keep; all other keys of a layout are searched
  top               how many layouts to print, default 10
  seconds           about how long the search may take, default 50
  loads             as for bagualu simulate
  days              how long you have the devices: the command of the best layout gets the train.steps that fit, with the
                    failures that the cluster's file forecasts, and checkpoint.every and restart.limit for them
  spares, assume.NAME   as for bagualu simulate

options:
  --json      print one JSON document on stdout
  -h, --help  this page"""

_DOCTOR = """\
usage: bagualu doctor [key=value ...] [--quick] [--json]

Measures this machine as a run uses it: matrix products of each dtype, operators, memory, communication between ranks,
and the disk of run directories. Ranks that share a CPU are measured alone and together. Says which backends work, what
is wrong and what to do about it, and writes the figures as cluster=this into the cache folder. Takes about a minute.

keys:
  launch.workers          measure this number of workers only; default: one for each GPU, or 1, 2, 4 ... up to the cores
  launch.threads launch.affinity launch.allocator    as in a run
  comm.backend            default auto: nccl where torch can use GPUs, else gloo
  run.dir                 where runs will be, for the figures of its disk
  data.cache              the cache folder, default ~/.cache/bagualu

options:
  --quick     few sizes of everything, in seconds, which makes predictions less accurate; a cluster=this that was measured
              in full is kept
  --json      print one JSON document on stdout, all else on stderr
  -h, --help  this page"""


def page(verb: str) -> str:
    """Returns the help page of a verb as text; for an empty string, the page with the list of verbs."""
    if not verb:
        return _HELP.format(verbs="\n".join(f"  {name:<12}{what}" for name, what in VERBS.items()))
    if verb in ("checkpoint", "doctor", "evaluate", "generate"):
        return {"checkpoint": _CHECKPOINT, "doctor": _DOCTOR, "evaluate": _EVALUATE, "generate": _GENERATE}[verb]
    if verb == "schedule":
        return _SCHEDULE.format(names=" ".join(FAMILIES))
    if verb == "rehearse":
        return _REHEARSE.format(kinds="\n".join(_kinds()), points=" ".join(Phase))
    if text := {"simulate": _SIMULATE, "plan": _PLAN}.get(verb):
        names = textwrap.fill(" ".join(cluster_names()), 116, initial_indent="  ", subsequent_indent="  ")
        return text.format(clusters=names)
    return {"train": _TRAIN, "slurm": _SLURM}[verb].format(recipes="\n".join(_recipes()))


def _kinds() -> list[str]:
    """Returns a list with a line for each kind of fault: its own options and what it does."""
    lines = []
    for name, kind in KINDS.items():
        own = [option.name for option in fields(kind) if option.name not in ("step", "rank", "at")]
        lines.append(f"  {' '.join([name, *(f'{option}=' for option in own)]):<24}{(kind.__doc__ or '').strip()}")
    return lines


def _recipes() -> list[str]:
    """Returns a list with a line for each recipe that comes with Bagualu: its name and the first comment in its file."""
    lines = []
    for entry in sorted((files("bagualu.recipes") / "recipe").iterdir(), key=lambda entry: entry.name):
        comments = [line[2:] for line in entry.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
        about = next(line for line in comments if not line.startswith("@package"))
        lines.append(f"  {entry.name.removesuffix('.yaml'):<18}{about}")
    return lines
