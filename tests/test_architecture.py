"""The shape of the house: imports point down, help and checks need no torch, the environment is read in few places."""

import ast
import functools
import graphlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bagualu.fault_tolerance.run_directory import RunDirectory
from bagualu.launch.verbs import command_line
from bagualu.launch.verbs.generate import read_sampling
from bagualu.launch.verbs.plan import read_plan
from bagualu.launch.verbs.question import read_question
from bagualu.launch.verbs.schedule import schedule
from bagualu.launch.verbs.sweep import jobs
from bagualu.trainer.costs.fits import Device, check_memory
from bagualu.trainer.costs.micro_batch import choose_micro_batch
from bagualu.trainer.recipe import preflight
from bagualu.trainer.recipe.compose import compose
from tests.trainer.data.token_files import write_examples

ROOT = Path(__file__).parents[1]
HOUSE = ("comm", "parallel", "fault_tolerance", "trainer", "launch")
"""From the bottom up: a folder imports itself and those before it."""
SOURCES = [path for folder in (*HOUSE, "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]
READS_ENVIRONMENT = {
    "comm/world.py",  # who this rank is
    "trainer/process/environment.py",  # allocator settings a person has made
    "trainer/__main__.py",  # starts itself again with its environment as it should be
    "trainer/user_settings.py",  # where caches lie, which compiler
    "trainer/operators/kept_code.py",  # tells a library of kernels an address
    "trainer/engine/deepspeed_library.py",  # which chip DeepSpeed is to use, and the rank on it
    "launch/workers/run.py",  # the environment that workers are started in
    "launch/workers/fork_server.py",  # tells the fork server whose it is
    "launch/workers/fork_server_preload.py",  # where the fork server reads it
    "launch/workers/secret.py",  # what agents sign with
    "launch/workers/processes.py",  # how elastic is told which signals are its own
}
ROOMS = {
    "fault_tolerance/checkpoint": ("checkpoint/layout",),
    "fault_tolerance/checkpoint/layout": (),
    "fault_tolerance/checkpoint/reading": ("checkpoint/layout",),
    "fault_tolerance/checkpoint/saving": ("checkpoint/layout", "checkpoint/reading"),
    "fault_tolerance/forecast": ("ledger",),
    "fault_tolerance/guard": (),
    "fault_tolerance/injection": ("checkpoint/layout", "ledger"),
    "fault_tolerance/ledger": (),
    "fault_tolerance/replica": ("checkpoint", "checkpoint/layout", "checkpoint/saving"),
    "fault_tolerance/watchdog": (),
    "launch/batch": (),
    "launch/machine": ("workers",),
    "launch/verbs": ("batch", "machine", "workers"),
    "launch/watch": (),
    "launch/workers": ("watch",),
    "parallel/balance": (),
    "parallel/balance/stages": ("pipeline", "pipeline/schedules"),
    "parallel/data": (),
    "parallel/pipeline": ("pipeline/schedules",),
    "parallel/pipeline/schedules": (),
    "parallel/planner": ("pipeline",),
    "parallel/simulation": ("pipeline", "pipeline/schedules"),
    "trainer/conversion": ("data", "models/decoder", "models/hugging_face", "optim", "recipe"),
    "trainer/costs": ("data", "models/decoder", "operators", "optim", "process", "recipe"),
    "trainer/data": (),
    "trainer/engine": ("models", "models/decoder", "operators", "optim", "recipe"),
    "trainer/generation": ("conversion", "data", "engine", "models/decoder", "operators", "recipe", "recovery"),
    "trainer/models": (),
    "trainer/models/decoder": ("models", "operators"),
    "trainer/models/hugging_face": ("models/decoder",),
    "trainer/operators": (),
    "trainer/operators/generated": ("operators",),
    "trainer/optim": ("operators",),
    "trainer/output": ("optim", "process", "recipe"),
    "trainer/process": ("recipe",),
    "trainer/recipe": ("data", "models/decoder", "models/hugging_face", "operators", "optim"),
    "trainer/recovery": ("data", "models/decoder", "process", "recipe"),
    "trainer/simulation": ("costs", "data", "models/decoder", "operators", "recipe"),
}
"""By room, which others of the same top folder it may import, besides the files of the top folder itself."""
DEFERRED = {  # imports inside a function: each keeps torch (or Hydra) away from a path that must be quick without it
    "launch/cli.py": {  # errors, outcome and usage too: a Ctrl-C while they are imported is answered
        *(f"bagualu.launch.verbs.{verb}" for verb in ("checkpoint", "doctor", "rehearse", "schedule", "show_recipe")),
        *(f"bagualu.launch.verbs.{verb}" for verb in ("evaluate", "generate", "plan", "simulate", "slurm", "train", "usage")),
        "bagualu.launch.verbs.command_line",
        "bagualu.comm.errors",
        "bagualu.trainer.process.failure",
    },
    "launch/verbs/checkpoint.py": {"bagualu.trainer.conversion.export_model", "bagualu.trainer.conversion.import_model"},  # torch
    "launch/verbs/generate.py": {
        "bagualu.trainer.data.tokenizer",
        "bagualu.trainer.data.tokenizer_files",
    },  # a library, before the prompts are known to be needed
    "launch/verbs/rehearse.py": {"bagualu.fault_tolerance.checkpoint.reading.compare"},
    "launch/verbs/plan.py": {  # torch
        "bagualu.launch.verbs.plan_text",
        "bagualu.trainer.simulation.loads",
        "bagualu.trainer.simulation.planning",
    },
    "launch/verbs/simulate.py": {  # torch; matplotlib
        "bagualu.launch.verbs.draw_prediction",
        "bagualu.launch.verbs.prediction_text",
        "bagualu.trainer.simulation.fusion",
        "bagualu.trainer.simulation.loads",
        "bagualu.trainer.simulation.predict",
    },
    "launch/verbs/schedule.py": {"bagualu.parallel.pipeline.draw_svg", "bagualu.trainer.recipe.compose"},  # matplotlib; Hydra
    "launch/verbs/command_line.py": {"bagualu.trainer.recipe.keys"},  # Hydra
    "launch/workers/run.py": {"bagualu.launch.workers", "bagualu.trainer.output.progress"},
    "trainer/operators/kernel.py": {"bagualu.trainer.operators.inductor"},  # torch's compiler
    "trainer/settle.py": {"bagualu.trainer.simulation.gain"},  # torch, which short runs need not wait for
    "trainer/__main__.py": {"torch", "bagualu.trainer.process.worker"},
}


def name(path):
    return path.relative_to(ROOT).as_posix()


def module(path):
    return "bagualu." + name(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module(path): path for path in SOURCES}


@functools.cache
def tree(path):
    return ast.parse(path.read_text())


@functools.cache
def imports(path, anywhere=True):
    """Modules that a file imports; with anywhere=False only when it is itself imported."""
    found = set()
    whole = tree(path)
    inside = {id(node) for function in ast.walk(whole) if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
              for node in ast.walk(function)}  # fmt: skip
    for node in ast.walk(whole):
        if not anywhere and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: import by the full name"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {one if one in MODULES else str(node.module) for one in full}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_point_down(path):
    folder = path.relative_to(ROOT).parts[0]
    allowed = HOUSE[: HOUSE.index(folder) + 1] if folder in HOUSE else ()
    for imported in imports(path):
        assert imported.split(".")[0] not in (*HOUSE, "recipes"), f"write bagualu.{imported}"
        if imported.startswith("bagualu."):
            assert imported.split(".")[1] in allowed, f"{name(path)} imports {imported}, which lies above it"


def room(path):
    """The folder of a file; a file right in a top folder is a room of its own."""
    inside = path.relative_to(ROOT)
    return (inside if len(inside.parts) == 2 else inside.parent).as_posix()


@pytest.mark.parametrize("path", [path for path in SOURCES if len(path.relative_to(ROOT).parts) > 2], ids=name)
def test_rooms_import_only_rooms_below_them(path):
    top = path.relative_to(ROOT).parts[0]
    for imported in imports(path):
        if imported in MODULES and (other := room(MODULES[imported])) in ROOMS and other.startswith(f"{top}/"):
            inside = other.removeprefix(f"{top}/")
            assert other == room(path) or inside in ROOMS[room(path)], f"{name(path)} imports {imported}: no arrow leads there"


def test_the_architecture_page_has_a_row_for_every_room():
    page = (ROOT / "docs/design/architecture.md").read_text()
    rooms = {path.parent.relative_to(ROOT).as_posix() for path in SOURCES if path.name != "__init__.py"} | {"recipes"}
    assert {room for room in rooms if f"| `{room}/` |" not in page} == set()
    assert rooms - {*HOUSE, "recipes"} == ROOMS.keys()


def test_rooms_have_no_cycle():
    arrows = {}
    for path in SOURCES:
        others = {room(MODULES[imported]) for imported in imports(path) if imported in MODULES}
        arrows.setdefault(room(path), set()).update(others - {room(path)})
    graphlib.TopologicalSorter(arrows).prepare()  # raises CycleError, which names the rooms


COLLECTIVES = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "barrier", "send", "receive"}
"""Methods of a `Group`."""


def test_the_trainer_calls_no_collective_by_hand_outside_its_engines():
    found = [
        f"{name(path)}: {node.func.attr}"
        for path in SOURCES
        if name(path).startswith("trainer/") and not name(path).startswith(("trainer/engine/", "trainer/simulation/"))
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in COLLECTIVES
    ]
    assert found == []


PRIVATE_NAMES_OF_TORCH = {
    "comm/simulated.py": {"_python_dispatch", "_disable_current_modes"},
    "comm/store.py": {"_C", "_distributed_c10d"},  # stores, which torch.distributed re-exports without types
    "launch/workers/elastic_private.py": {"_NodeDesc"},
    "parallel/precision.py": {"_python_dispatch", "_get_current_dispatch_mode"},
    "trainer/conversion/torch_checkpoint.py": {"_StorageInfo"},
    "trainer/costs/tensor_memory.py": {"_python_dispatch", "_disable_current_modes"},
    "trainer/operators/attention.py": {"_softmax_backward_data"},
    "trainer/operators/inductor.py": {"_dynamo", "_guards", "_inductor", "_subclasses"},  # torch's compiler
    "trainer/operators/kept_code.py": {"_C", "_dynamo", "_torchinductor_pyobject_tensor_data_ptr"},  # what kernels are told
    "trainer/operators/packed.py": {"_reorder_linear_weight", "_linear_pointwise"},
    "trainer/operators/update.py": {"_fused_adamw_"},
    "trainer/simulation/operators.py": {"_python_dispatch"},
    "trainer/simulation/step_graph.py": {"_python_dispatch"},
    "trainer/simulation/trace.py": {"_python_dispatch"},
}
"""What each file uses of torch that torch does not publish. In elastic_private.py also attributes of elastic's classes."""
_OF_ELASTIC = {"_worker_group", "_pcontext", "_remaining_restarts", "_state_holder", "_this_node", "_shared_tcp_store_server"}


def test_private_names_of_torch_are_used_in_few_files():
    found = {}
    for path in SOURCES:
        used = found.setdefault(name(path), set())
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "torch":
                used |= {part for part in [*node.module.split("."), *(alias.name for alias in node.names)] if part[0] == "_"}
            elif isinstance(node, ast.Attribute) and node.attr[0] == "_" and ast.unparse(node.value).split(".")[0] == "torch":
                used |= {node.attr} - {"__version__"}
            elif isinstance(node, ast.Attribute) and node.attr in _OF_ELASTIC:
                assert name(path) == "launch/workers/elastic_private.py", f"{name(path)}: {node.attr}"
    assert {file: names for file, names in found.items() if names} == PRIVATE_NAMES_OF_TORCH


def test_engines_use_what_their_libraries_publish_and_never_their_checkpoints():
    for path in (path for path in SOURCES if name(path).startswith("trainer/engine/")):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute):
                private = node.attr[0] == "_" and not node.attr.startswith("__")
                assert not private or ast.unparse(node.value) == "self", f"{name(path)}: {ast.unparse(node)}"
                assert node.attr not in {"save_checkpoint", "load_checkpoint", "save_16bit_model"}, name(path)


USED_OF_DEEPSPEED = {
    "initialize",
    "ops.__compatible_ops__",
    "runtime.zero.parameter_offload.FWD_MODULE_STACK",
    "zero.Init.param_id",
    *(f"utils.{name}" for name in ("groups.mpu", "safe_get_local_fp32_param", "safe_get_local_grad", "safe_set_local_grad")),
    *(f"engine.{name}" for name in (
        "allreduce_gradients", "destroy", "module", "param_names", "set_gradient_accumulation_boundary", "step", "was_step_applied",
    )),
    *(f"engine.optimizer.{name}" for name in (
        "averaged_gradients", "fp32_partitioned_groups_flat", "get_gradient_for_reduction", "get_grads_for_reduction",
        "grad_partitions_flat_buffer", "ipg_buckets", "persistent_parameters", "state_dict", "update_lp_params",
        "use_grad_accum_attribute",
    )),
    *(f"parameter.{name}" for name in ("ds_id", "ds_numel", "ds_tensor", "partition", "partition_numel")),
}  # fmt: skip
"""What the engine uses of DeepSpeed's modules, engine, optimizer and parameters. DeepSpeed documents few of these names: its next
version may change them, and trainer/recipe/deepspeed.py accepts one version."""


def test_each_use_of_deepspeed_is_known():
    found = set()
    for path in (path for path in SOURCES if name(path).startswith("trainer/engine/deepspeed")):
        nodes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)]
        found |= {f"parameter.{node.attr}" for node in nodes if re.fullmatch(r"ds_\w+|partition(_numel)?", node.attr)}
        for used in {ast.unparse(node) for node in nodes} - {ast.unparse(node.value) for node in nodes}:
            if library := re.fullmatch(r"(?:self\._)?library\.([\w.]+)", used):
                found.add(library[1])
            elif engine := re.search(r"\b(?:self|zero)\.(engine(?:\.optimizer)?\.\w+)", used):
                found.add(engine[1])
    assert found == USED_OF_DEEPSPEED


def test_the_files_of_a_run_are_named_once():
    run = RunDirectory("run")
    names = {getattr(run, key).name for key, value in vars(RunDirectory).items() if isinstance(value, property)}
    assert {"metrics.jsonl", "checkpoints", ".secret"} <= names
    names.remove("tokenizer.json")  # the name that a tokenizer's file has everywhere
    spelt = [
        (node.value, name(path))
        for path in SOURCES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.strip("/").split("/")[0] in names
    ]
    caches = ("data/corpus_cache", "data/scan", "operators/compiled", "operators/kept_code")
    elsewhere = {(".lock", f"trainer/{each}.py") for each in caches}
    assert set(spelt) - elsewhere == {(one, "fault_tolerance/run_directory.py") for one in names}
    script = (ROOT / "launch/batch/job.sh").read_text()
    assert [one for one in names if f"/{one}" in script] == []


def test_no_public_class_name_has_two_meanings():
    places = {}
    for path in SOURCES:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name(path))
    assert {one: files for one, files in places.items() if len(files) > 1} == {}


def test_no_cycles():
    graph = {one: {other for other in imports(path) if other in MODULES} for one, path in MODULES.items()}
    done, under_way = set(), []

    def visit(one):
        assert one not in under_way, " -> ".join([*under_way[under_way.index(one) :], one])
        if one not in done:
            under_way.append(one)
            for other in sorted(graph[one]):
                visit(other)
            done.add(under_way.pop())

    for one in graph:
        visit(one)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_are_at_the_top_where_they_can_be_seen(path):
    inner = {one for one in imports(path) - imports(path, anywhere=False) if one.split(".")[0] in ("torch", "bagualu")}
    allowed = DEFERRED.get(name(path), set())
    assert all(one in allowed or one.rsplit(".", 1)[0] in allowed for one in inner), inner


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_environment_variables_are_read_in_few_places(path):
    text = path.read_text()
    if name(path) not in READS_ENVIRONMENT:
        assert "os.environ" not in text
        assert "getenv" not in text


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name == "__init__.py"], ids=name)
def test_packages_say_nothing(path):
    assert path.read_text().strip() == ""
    assert (path.parent / "py.typed").exists()


def loaded_after(statements):
    """Names of the modules that a fresh Python has loaded after `statements`."""
    code = f"{statements}\nimport sys\nprint('\\nMODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_needs_neither_torch_nor_hydra():
    pages = "main(['--help']), main(['train', '--help']), main(['doctor', '--help']), main(['doctor', '--qick'])"
    loaded = loaded_after(f"from bagualu.launch.cli import main\n{pages}")
    assert not loaded & {"torch", "hydra", "omegaconf"}


def test_a_recipe_is_composed_checked_and_refused_without_torch():
    loaded = loaded_after(
        "from bagualu.launch.cli import main\n"
        "assert main(['train', 'parallel.tensor=5']) == 2\n"
        "assert main(['train', 'recipe=llama3_8b', 'comm.backend=gloo', 'model.ffn=1400000']) == 2\n"
        "assert main(['slurm', 'recipe=llama3_8b', '--print']) == 0\n"
        "assert main(['train', '--cfg', 'job']) == 0\n"
        "assert main(['simulate', 'cluster=h100', 'world=7']) == 2\n"
        "assert main(['plan', 'cluster=h100', 'world=23']) == 2"
    )
    assert "hydra" in loaded
    assert "torch" not in loaded


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("bagualu.launch.cli", ["train", "comm.backend=simulated", "parallel.data=2", "parallel.pipeline=2"]),
        ("bagualu.trainer.__main__", ["comm.backend=gloo", "parallel.data=1", "parallel.pipeline=1"]),
    ],
)
def test_a_run_does_without_torchs_compiler_and_without_collecting_what_torch_is(tmp_path, module, words):
    """Seconds of a run's start, and 70 MB; torch loads them on the way to things we do without."""
    small = ["recipe=tiny_dense", "data.source=random", "train.steps=2", "train.validate_every=1", "checkpoint.every=1"]
    small += ["model.layers=2", "model.hidden=24", "model.heads=2", "model.kv_heads=2", "model.ffn=24", "model.vocab=64"]
    small += ["data.sequence_length=8", "train.validation_sequences=4"]
    done = f"assert main({[*words, *small, f'run.dir={tmp_path}/run']}) == 0"
    loaded = loaded_after(
        f"from {module} import main\n{done}\nimport gc\nassert gc.isenabled() and gc.get_freeze_count() > 100_000"
    )
    assert "torch.optim" in loaded
    assert not loaded & {"torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy"}


def test_a_cluster_is_described_and_its_collectives_are_costed_without_torch_and_hydra():
    loaded = loaded_after(
        "from bagualu.comm.cluster_file import load_cluster\n"
        "from bagualu.comm.cost import collective_seconds\n"
        "assert collective_seconds(load_cluster('h100'), 'all_reduce', 1e6, range(64)) > 0"
    )
    assert not loaded & {"torch", "hydra", "omegaconf"}


def test_failures_are_forecast_without_torch_and_hydra():
    loaded = loaded_after("import bagualu.fault_tolerance.forecast.influence, bagualu.fault_tolerance.forecast.report")
    assert not loaded & {"torch", "hydra", "omegaconf"}


def test_a_worker_does_without_hydra():
    """Its recipe has been composed."""
    assert not loaded_after("import bagualu.launch.workers.worker_process, bagualu.trainer.run") & {"hydra", "omegaconf"}


def test_a_schedule_is_drawn_without_torch_and_hydra(tmp_path):
    words = ["schedule", "name=zb_v", "stages=2", "micro_batches=3"]
    loaded = loaded_after(f"from bagualu.launch.cli import main\nassert main({words}) == 0")
    assert not loaded & {"torch", "hydra", "omegaconf", "matplotlib"}
    loaded = loaded_after(f"from bagualu.launch.cli import main\nassert main({[*words, f'out={tmp_path}/picture.svg']}) == 0")
    assert "matplotlib" in loaded
    assert not loaded & {"torch", "hydra", "omegaconf"}


def test_the_readme_opens_with_the_two_commands():
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    python3 -m venv")]
    assert len(commands) == 2
    assert commands[0].endswith("bagualu train recipe=tiny")
    assert " -m pytest" in commands[1]
    assert all("pip install -c constraints.txt" in command for command in commands)


def readme_commands(start):
    lines = (ROOT / "README.md").read_text().splitlines()
    return [line.strip() for line in lines if line.startswith(f"    {start}")]


def guide_commands():
    """Those of the guides but for a folder of recipes, which tests/trainer/test_text_values.py makes."""
    pages = sorted((ROOT / "docs/guides").glob("*.md"))
    lines = [line.strip() for page in pages for line in page.read_text().splitlines() if line.startswith("    bagualu ")]
    return [line for line in lines if "hydra.searchpath" not in line]


def check(recipe, world):
    preflight.check(recipe, world)
    check_memory(recipe, world, Device(80 * 2**30, "its GPU"))  # what users are told to type needs no larger one


@pytest.fixture(scope="module")
def data_of_the_guides(tmp_path_factory):
    """A folder with the texts and token files that the guides name. Checking a command changes nothing in it."""
    folder = tmp_path_factory.mktemp("guides")
    for name in ("my_texts", "texts/a, b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "text").write_text("some words")
    write_examples(folder)
    return folder


@pytest.mark.parametrize(
    "command",
    [*readme_commands("bagualu "), *readme_commands("torchrun "), *readme_commands("python -m bagualu"), *guide_commands()],
)
def test_the_commands_of_the_readme_and_the_guides_are_valid(command, data_of_the_guides, monkeypatch):
    monkeypatch.chdir(data_of_the_guides)
    monkeypatch.setenv("XDG_CACHE_HOME", str(data_of_the_guides / "cache"))
    if "model.from=" in command:
        return None  # tests/launch/test_finetune_guide.py runs it, with a model to begin with
    words = shlex.split(command)
    if words[0] == "torchrun":
        world = int(words[words.index("--nproc-per-node") + 1])
        return check(compose(words[words.index("bagualu.trainer") + 1 :]), world)
    if words[0] == "python":
        recipe = compose(words[words.index("--id") + 2 :])
        return check(recipe, recipe.world_size())
    request = command_line.read(words[1:])
    if request.help:
        return None
    if request.verb == "doctor":
        assert {word.partition("=")[0] for word in request.overrides} <= set(command_line.DOCTOR_KEYS)
        return None
    if request.verb == "checkpoint":
        assert request.overrides[0] in ("list", "verify", "import", "export")
        return None
    if request.verb in ("generate", "evaluate"):
        assert request.overrides[0].startswith("runs/")  # tests/launch/verbs/test_generate.py runs the commands of its guide
        return read_sampling(request).validate()
    if request.verb == "schedule":
        of_a_run = request.overrides[0].startswith("runs/")  # tests/launch/verbs/test_schedule.py draws one
        assert of_a_run or schedule(request)[0] == 0
        return None
    if request.verb == "plan":
        read_plan(request)
        return None
    if request.verb == "simulate":
        question = read_question(request)
        chip = question.cluster.parts[0].chip
        device = Device(chip.memory_bytes - chip.context_bytes, chip.name)
        return check_memory(question.recipe, question.world, device)
    recipes = [job.recipe for job in jobs(request.overrides)] if request.multirun else [compose(request.overrides)]
    for recipe in recipes:
        world = recipe.world_size()
        check(choose_micro_batch(recipe, world, None), world)
    return None
