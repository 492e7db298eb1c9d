"""The whole recipe as a tree of dataclasses. It does not import torch, so that a wrong recipe is refused quickly.

Each component owns its section and validates it; this file adds the sections of the trainer and of the job, and the checks that
involve several sections.
"""

from dataclasses import dataclass, field, replace
from math import gcd, prod
from typing import Any

from bagualu.comm.checks import require_at_least, require_finite, require_known_home, require_text
from bagualu.comm.cluster_file import load_cluster
from bagualu.comm.config import CommConfig
from bagualu.comm.errors import RecipeError
from bagualu.fault_tolerance.config import CheckpointConfig, GuardConfig, RestartConfig, StragglerConfig
from bagualu.fault_tolerance.injection.fault import Fault
from bagualu.fault_tolerance.injection.kinds import Flip
from bagualu.fault_tolerance.injection.plan import Setting, expand, resolve
from bagualu.parallel.balance.stages.activations import Activations, read_activations
from bagualu.parallel.balance.stages.keys import validate_shares, validate_split
from bagualu.parallel.config import ParallelConfig
from bagualu.parallel.layout import Layout
from bagualu.parallel.pipeline.registry import placement_of
from bagualu.trainer.data.config import DataConfig
from bagualu.trainer.models.decoder.config import LONGEST_ALIBI, ModelConfig
from bagualu.trainer.models.decoder.shapes import parameter_shapes
from bagualu.trainer.operators.config import OperatorsConfig
from bagualu.trainer.operators.registry import AUTO, DEFAULT_VARIANTS, FLOAT8_MULTIPLE, GENERATED, is_float8
from bagualu.trainer.optim.config import USING_ADAMW, OptimConfig
from bagualu.trainer.recipe.deepspeed import DeepSpeedTerms
from bagualu.trainer.recipe.override_text import typed

MOST_MICRO_BATCHES = 2**16
"""The most micro-batches of a data rank in a step: all their passes are planned before the first pass runs."""
SEEDS = range(-(2**63), 2**64)
"""The seeds that torch accepts."""
DTYPES = ("float64", "float32", "bfloat16", "float16", "float8")
CHOSEN = "auto"
"""The value of train.micro_batch for which a number is chosen before the workers start (costs/micro_batch.py)."""


def stored_dtype_of(dtype: str) -> str:
    """Returns the dtype of the tensors of a run with train.dtype=`dtype`."""
    return "bfloat16" if dtype == "float8" else dtype


@dataclass
class RunConfig:
    """`run.*`: the run's name, directory and seed."""

    name: str = "run"
    dir: str = field(default="runs/${run.name}", metadata={"path": True})
    seed: int = 0
    """Seed of the initial weights, the order of the data and random faults. None of them depends on the rank."""

    def validate(self) -> None:
        require_text("run", self, dir="runs/tiny", name="tiny")
        require_known_home("run", self, "dir")
        if self.seed not in SEEDS:
            raise RecipeError(f"run.seed={self.seed} must lie between -2**63 and 2**64 - 1, e.g. run.seed={self.seed % 2**32}")


@dataclass
class TrainConfig:
    """`train.*`: the training loop."""

    steps: int = 100
    micro_batch: Any = 1
    """The number of sequences that a data rank passes through the model together; auto: of the numbers that divide the batch and
    are predicted to fit 0.8 of the memory, the one with the shortest predicted step."""
    dtype: str = "float32"
    """The dtype of weights and activations: float64 | float32 | bfloat16 | float16 | float8. With all but the first two, the
    optimizer keeps float32 master weights. float8 is bfloat16, except that linear layers of attention, feed-forwards and experts
    multiply in float8 (operators.linear says how matrices are scaled). NVIDIA GPUs need compute capability 8.9 or later for it."""
    recompute: Any = "none"
    """Which activations the backward pass computes again instead of keeping them: none; full, all of each layer but its input;
    attention, those of the attention of each layer; experts, those of each mixture of experts; every:N, all of every N-th layer; a
    list with the numbers of layers (from 0), all of these; auto, all of as many layers as parallel.memory_bytes requires; bytes:N,
    all of as many layers as it takes for each rank to keep at most N bytes. docs/guides/memory.md compares them."""
    offload_bytes: int = field(default=0, metadata={"example": "1073741824"})
    """The most bytes of activations that each rank keeps in host memory, instead of device memory, until its backward pass needs
    them; 0: none."""
    compile: Any = CHOSEN
    """Whether operators for which `operators` says auto are computed by kernels that torch's compiler generates for this chip
    (norms, rotary positions, gates, the loss): true | false | auto. auto: on CPUs with a C++ compiler, if the run is so long that
    it is expected to save at least twice the time of generating them."""
    deterministic: bool = True
    """Whether to use only kernels that return the same bits every time, as those of a CPU do. false lets a GPU use faster kernels
    for attention; then a resumed run is the same only up to rounding, and hardware faults cannot be detected by computing again."""
    validate_every: int = 0
    """Steps between validations; 0 validates only after the last step."""
    validation_sequences: int = 64
    """Sequences of the validation split that each validation uses, always the same; 0 turns validation off."""
    sample_every: int = field(default=0, metadata={"example": "100"})
    """Steps between samples: the beginning of a text that the model makes up, or its answer in a conversation of the data, is
    printed then and after the last step; 0: never. Random tokens are not shown."""

    @property
    def stored_dtype(self) -> str:
        """The dtype in which working weights, activations and gradients between operators are stored."""
        return stored_dtype_of(self.dtype)

    def validate(self) -> None:
        if self.dtype not in DTYPES:
            raise RecipeError(f"train.dtype={self.dtype} is unknown; give one of {', '.join(DTYPES)}")
        require_at_least(1, "train", self, "steps")
        size = self.micro_batch
        if size != CHOSEN and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise RecipeError(f"train.micro_batch={typed(size)} must be at least 1, a whole number, or auto")
        if not isinstance(self.compile, bool) and self.compile != CHOSEN:
            raise RecipeError(f"train.compile={typed(self.compile)} must be true, false or auto")
        require_at_least(0, "train", self, "validate_every", "validation_sequences", "sample_every")


@dataclass
class SlurmConfig:
    """`launch.slurm.*`: options that `bagualu slurm` writes into the job script."""

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    """Wall-time limit in SLURM's format, e.g. 24:00:00; by default the partition's limit. The run saves and stops before it."""
    requeue: bool = True
    """Whether the job returns to the queue by itself after its time limit, a preemption or the loss of nodes. false: the job ends
    then."""
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    """CPU cores for the agent of a node, shared by its workers."""
    directives: list[str] = field(default_factory=list)
    """Options of further #SBATCH lines, without #SBATCH itself, e.g. ["--exclusive"]."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that run on every node before the agent, e.g. ["module load cuda", "source env/bin/activate"]. A line that fails
    ends the job; `|| true` at its end lets it fail."""

    def validate(self) -> None:
        require_at_least(1, "launch.slurm", self, "gpus_per_node", "cpus_per_task")


@dataclass
class LaunchConfig:
    """`launch.*`: how worker processes are started. Under torchrun only `threads`, `affinity` and `allocator` take effect."""

    workers: int | None = None
    """Worker processes on each node; by default the ranks that the layout needs, divided by the nodes."""
    nodes: int = 1
    """The number of machines that the run uses; restart.elastic=true lets it go on with fewer."""
    threads: int | None = None
    """CPU threads of each worker; by default its node's cores are divided evenly among the workers."""
    affinity: bool = True
    """Whether to pin each worker to an equal part of its node's cores. Nothing is pinned if there are fewer cores than workers or a
    CPU quota applies."""
    allocator: str = "tuned"
    """tuned: the C allocator keeps freed memory and asks for 2 MB pages; system: the machine's settings."""
    port: int | None = None
    """Port of the rendezvous store with which `bagualu train` and `bagualu slurm` connect workers. Default: a free port (train), or
    a port computed from the job's number (slurm)."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def validate(self) -> None:
        require_at_least(1, "launch", self, "nodes", "workers", "threads")
        if self.allocator not in ("tuned", "system"):
            raise RecipeError(f"launch.allocator={self.allocator} is unknown; give tuned or system")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise RecipeError(f"launch.port={self.port} must lie between 1 and 65535, or leave it out")
        self.slurm.validate()


@dataclass
class LogConfig:
    """`log.*`: what is shown and recorded."""

    wandb: str = "disabled"
    """Whether metrics go to Weights & Biases: disabled | offline (into the run directory) | online. If W&B fails, a line is printed
    and the run continues offline, or without W&B; a failure of W&B never ends the run."""
    wandb_project: str = "bagualu"
    progress: str = "auto"
    """How progress is shown on stderr: auto (a bar on a terminal, lines elsewhere) | bar | lines | off."""
    every: int = 10
    """Steps between progress lines, if progress is shown as lines."""

    def validate(self) -> None:
        if self.wandb not in ("disabled", "offline", "online"):
            raise RecipeError(f"log.wandb={self.wandb} is unknown; give disabled, offline or online")
        if len(self.wandb_project) > 128 or set(self.wandb_project) & set("/\\#?%:"):
            raise RecipeError(f"log.wandb_project={self.wandb_project} is no name for W&B, which takes up to 128 characters, none "
                              "of them / \\ # ? % :")  # fmt: skip
        if self.progress not in ("auto", "bar", "lines", "off"):
            raise RecipeError(f"log.progress={self.progress} is unknown; give auto, bar, lines or off")
        require_at_least(1, "log", self, "every")


@dataclass
class Recipe:
    """Everything that defines a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    operators: OperatorsConfig = field(default_factory=OperatorsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    restart: RestartConfig = field(default_factory=RestartConfig)
    straggler: StragglerConfig = field(default_factory=StragglerConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    log: LogConfig = field(default_factory=LogConfig)
    cluster: str | None = field(default=None, metadata={"path": True})
    """With comm.backend=simulated, a described cluster (recipes/cluster/, or a file that ends in .yaml): metrics.jsonl also says
    what each step would take there. Default: none."""
    faults: Any = field(default_factory=list)
    """Faults to inject, to test whether the run survives them: a list of faults (injection/kinds.py), or random:COUNT."""

    def world_size(self) -> int:
        """Returns the number of ranks that the recipe asks for: launch.workers x launch.nodes, or without launch.workers the
        product of the degrees of `parallel` (parallel.data left out: as many data ranks as parallel.expert)."""
        if self.launch.workers is not None:
            return self.launch.workers * self.launch.nodes
        p = self.parallel
        data = p.expert if p.data is None else p.data
        return p.tensor * p.pipeline * p.context * data

    def validate(self, world: int) -> Layout:
        """Validates every section, and the combination, for `world` ranks; returns the layout. Raises RecipeError with the fix."""
        require_finite(self)
        if self.train.micro_batch == CHOSEN:  # some size is right if the smallest is
            return replace(self, train=replace(self.train, micro_batch=self.smallest_micro_batch())).validate(world)
        for part in (self.run, self.data, self.train, self.parallel, self.comm, self.checkpoint, self.restart, self.straggler,
                     self.launch, self.log):  # fmt: skip
            part.validate()
        self.model.validate(self.train.stored_dtype)
        self.optim.validate("float64" if self.train.dtype == "float64" else "float32")
        self.optim.validate_steps(self.train.steps)
        self.operators.validate(self.comm.chip, self.train.dtype)
        if self.optim.name not in USING_ADAMW and self.operators.update not in (AUTO, DEFAULT_VARIANTS["update"]):
            raise RecipeError(f"operators.update={self.operators.update} is an update by AdamW, which optim.name={self.optim.name} "
                              "does not use; leave it out")  # fmt: skip
        self.model.lora.check_targets(parameter_shapes(self.model))
        self.optim.check_patterns(self.trainable_shapes())
        if self.comm.on_cpu and not self.train.deterministic:
            raise RecipeError("train.deterministic=false is for GPUs: a CPU computes the same bits anyway; leave it out, or "
                              "give comm.backend=nccl")  # fmt: skip
        self.guard.validate(saves=self.checkpoint.every > 0, repeatable=self.train.deterministic)
        layout = self.parallel.layout(world)
        if self.train.compile is True and self.comm.backend == "simulated":
            raise RecipeError(
                "train.compile=true cannot run on comm.backend=simulated, whose ranks are threads of one process; "
                "give train.compile=false or comm.backend=gloo"
            )
        generated = [name for name, variant in self.operators.as_dict().items() if variant == GENERATED]
        if generated and world > 1 and self.comm.backend == "simulated":
            key = f"operators.{generated[0]}"
            raise RecipeError(f"{key}={GENERATED} cannot run on comm.backend=simulated, whose ranks are threads of one process; "
                              f"give {key}=auto or comm.backend=gloo")  # fmt: skip
        if self.cluster is not None:
            self._validate_cluster(self.cluster, world)
        if self.parallel.engine == "fsdp" and self.comm.backend == "simulated":
            raise RecipeError("parallel.engine=fsdp needs torch process groups, which comm.backend=simulated does not have; give "
                              "parallel.engine=native or comm.backend=gloo")  # fmt: skip
        patience = self.comm.timeout_seconds / 2
        if (self.checkpoint.timeout_seconds or 0) > patience:
            raise RecipeError(f"checkpoint.timeout_seconds={self.checkpoint.timeout_seconds} must be at most half of "
                              f"comm.timeout_seconds={self.comm.timeout_seconds}, in which the other ranks wait; "
                              f"give {patience:g} or less")  # fmt: skip
        self._validate_batch(layout)
        self._validate_micro_batches(layout)
        self._validate_model(layout)
        self._validate_pipeline(layout)
        faults = self.planned_faults(max(world, self.world_size()))  # a run that resumes with fewer ranks keeps its plan
        if self.parallel.engine == "deepspeed":
            self.deepspeed_terms(layout).validate()
        self._validate_faults(faults)
        return layout

    def freezes(self, name: str) -> bool:
        """Returns whether the parameter `name` is not trained, because optim.groups says so or model.lora trains factors only."""
        return not self.model.lora.trains(name) or self.optim.freezes(name)

    def trainable_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the global shapes of the parameters that optim.groups can choose from, by name: with model.lora the factors,
        else all."""
        return {name: shape for name, shape in parameter_shapes(self.model).items() if self.model.lora.trains(name)}

    def tensor_widths(self) -> dict[str, int]:
        """Returns, by key, the numbers of the model that parallel.tensor must divide."""
        model = self.model
        named = {"model.heads": model.heads, "model.kv_heads": model.key_value_heads}
        if not (model.moe.experts and model.moe.every == 1):
            named["model.ffn"] = model.ffn
        if model.moe.experts:
            named["model.moe.ffn"] = model.moe.ffn
        return named

    def activations(self) -> Activations:
        """Returns what train.recompute and train.offload_bytes mean for this model. Raises RecipeError."""
        mixtures = [self.model.is_moe_layer(layer) for layer in range(self.model.layers)]
        return read_activations(self.train.recompute, self.train.offload_bytes, mixtures)

    def smallest_micro_batch(self) -> int:
        """Returns the smallest train.micro_batch that can be right: 1, or the one that parallel.shares implies."""
        shares = self.parallel.shares
        count = sum(shares) if isinstance(shares, list) and all(isinstance(share, int) for share in shares) else 0
        return self.data.global_batch // count if count > 0 and self.data.global_batch % count == 0 else 1

    def micro_batches(self) -> int:
        """Returns the number of micro-batches in a step, summed over all data ranks."""
        count: int = self.data.global_batch // self.train.micro_batch
        return count

    def declared_shares(self, layout: Layout) -> list[int] | None:
        """Returns the number of micro-batches in a step for each data rank; None if parallel.shares=measured."""
        if self.parallel.shares == "measured":
            return None
        return list(self.parallel.shares or [self.micro_batches() // layout.data] * layout.data)

    def deepspeed_terms(self, layout: Layout) -> DeepSpeedTerms:
        """Returns what DeepSpeed has to do with of this recipe."""
        shares = set(self.declared_shares(layout) or ())
        return DeepSpeedTerms(
            parallel=self.parallel,
            optim=self.optim,
            layout=layout,
            dtype=self.train.stored_dtype,
            simulated=self.comm.backend == "simulated",
            global_batch=self.data.global_batch,
            micro_batch=self.train.micro_batch,
            accumulation=shares.pop() if len(shares) == 1 and not self.restart.elastic else None,
            elements=sum(map(prod, parameter_shapes(self.model).values())),
        )

    @property
    def variants(self) -> OperatorsConfig:
        """The variants of operators: those that `operators` names; of the others generated ones with train.compile=true, and linear
        layers in float8 with train.dtype=float8."""
        named = self.operators.in_float8() if self.train.dtype == "float8" else self.operators
        return named.generated() if self.train.compile is True else named

    def without_float8(self) -> "Recipe":
        """Returns the recipe with weights stored in the same dtype and no product in float8."""
        named = replace(self.operators, linear=AUTO) if is_float8(self.operators.linear) else self.operators
        return replace(self, train=replace(self.train, dtype=self.train.stored_dtype), operators=named)

    def planned_faults(self, world: int) -> list[Fault]:
        """Returns the faults that `faults` describes, on `world` ranks. Raises RecipeError."""
        return resolve(self.faults, self._setting(world))

    def expanded_faults(self) -> list[str]:
        """Returns `faults` with random faults drawn, so that the plan stays the same on fewer ranks. Raises RecipeError."""
        return expand(self.faults, self._setting(max(1, self.world_size())))

    def _validate_faults(self, faults: list[Fault]) -> None:
        for fault in faults:
            if isinstance(fault, Flip) and fault.what == "weight" and self.parallel.zero_stage == 3:
                instead = "parallel.engine=native parallel.zero=2" if self.parallel.engine == "fsdp" else "parallel.zero=2"
                raise RecipeError(f"faults: {fault} flips a weight, but with parallel.zero=3 a rank holds weights only while it "
                                  f"computes; give what=master or {instead}")  # fmt: skip

    def _setting(self, world: int) -> Setting:
        retries = self.guard.on_nonfinite == "retry" and self.train.dtype != "float16"  # float16 overflows are skipped instead
        return Setting(self.run.seed, self.train.steps, world, self.checkpoint.every, retries)

    def _validate_cluster(self, name: str, world: int) -> None:
        if self.comm.backend != "simulated":
            raise RecipeError(f"cluster={name} is for ranks that are simulated, whose steps it times; give comm.backend=simulated, "
                              "leave it out, or predict the run with `bagualu simulate`")  # fmt: skip
        load_cluster(name).for_world(world)

    def _validate_batch(self, layout: Layout) -> None:
        if self.parallel.shares is not None:
            self._validate_shares(layout)
            return
        per_rank, rest = divmod(self.data.global_batch, layout.data)
        if rest:
            whole = layout.data * self.train.micro_batch
            raise RecipeError(f"data.global_batch={self.data.global_batch} does not divide over {layout.data} data ranks; "
                              f"give data.global_batch={-(-self.data.global_batch // whole) * whole}")  # fmt: skip
        if per_rank % self.train.micro_batch:
            fits = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
            raise RecipeError(f"train.micro_batch={self.train.micro_batch} does not divide the {per_rank} sequences of a data "
                              f"rank; give one of {fits}")  # fmt: skip

    def _validate_shares(self, layout: Layout) -> None:
        if self.data.global_batch % self.train.micro_batch:
            fits = [n for n in range(1, self.data.global_batch + 1) if self.data.global_batch % n == 0]
            raise RecipeError(f"train.micro_batch={self.train.micro_batch} does not divide data.global_batch="
                              f"{self.data.global_batch}; give one of {fits}")  # fmt: skip
        validate_shares(self.parallel.shares, self.micro_batches(), layout.data, layout.expert)

    def _validate_micro_batches(self, layout: Layout) -> None:
        most = max(self.declared_shares(layout) or [self.micro_batches() // layout.data])
        if most > MOST_MICRO_BATCHES:
            raise RecipeError(f"data.global_batch={self.data.global_batch} is {most} micro-batches of train.micro_batch="
                              f"{self.train.micro_batch} for a data rank, more than {MOST_MICRO_BATCHES}; "
                              f"give data.global_batch={self.data.global_batch * MOST_MICRO_BATCHES // most} or less")  # fmt: skip

        if self.parallel.zero_stage >= 2 and len(set(self.declared_shares(layout) or [0, 1])) > 1:
            engine, stage = self.parallel.engine, self.parallel.zero
            each, fix = f"parallel.zero={stage} reduces after each with every engine", "parallel.zero=1"
            if engine == "fsdp":
                each, fix = "parallel.engine=fsdp gathers weights for each", f"{fix} with parallel.engine=native or deepspeed"
            raise RecipeError(f"parallel.shares={self.parallel.shares} gives data ranks different numbers of micro-batches, and "
                              f"{each}; leave it out, or give {fix}")  # fmt: skip

    def _validate_model(self, layout: Layout) -> None:
        if self.parallel.sequence and self.data.sequence_length % layout.tensor:
            raise RecipeError(f"data.sequence_length={self.data.sequence_length} does not divide over parallel.tensor="
                              f"{layout.tensor} as parallel.sequence=true needs; change one of them")  # fmt: skip
        length = self.data.sequence_length
        if (self.model.max_positions or length) < length:
            raise RecipeError(f"data.sequence_length={length} is more than model.max_positions={self.model.max_positions}; give "
                              f"model.max_positions={length} or shorter sequences")  # fmt: skip
        if self.model.positions == "alibi" and length > LONGEST_ALIBI:
            raise RecipeError(f"data.sequence_length={length} is more than the {LONGEST_ALIBI} positions that "
                              "model.positions=alibi tells apart; give shorter sequences or other positions")  # fmt: skip
        model, tensor, named = self.model, layout.tensor, self.tensor_widths()
        common = gcd(*named.values())
        for name, value in named.items():
            if value % tensor:
                fits = [n for n in range(1, common + 1) if common % n == 0]
                raise RecipeError(f"{name}={value} is not divisible by parallel.tensor={tensor}; "
                                  f"give parallel.tensor one of {fits[:8]} or change {name}")  # fmt: skip
        if layout.expert > 1 and not model.moe.experts:
            raise RecipeError(
                f"parallel.expert={layout.expert} needs a mixture of experts; give parallel.expert=1 or model.moe.experts"
            )
        if model.moe.experts % layout.expert:
            raise RecipeError(f"model.moe.experts={model.moe.experts} is not divisible by parallel.expert={layout.expert}; "
                              f"give model.moe.experts={-(-model.moe.experts // layout.expert) * layout.expert}")  # fmt: skip
        if self.train.dtype == "float8":
            self._validate_float8(layout)

    def _validate_float8(self, layout: Layout) -> None:
        """Raises RecipeError if no linear layer can multiply in float8. One width of each is model.hidden."""
        hidden, others = self.model.hidden, self.float8_widths(layout)
        if hidden % FLOAT8_MULTIPLE or all(width % FLOAT8_MULTIPLE for width in others.values()):
            widths = " and ".join(map(str, dict.fromkeys(others.values())))
            raise RecipeError(f"train.dtype=float8 multiplies matrices whose widths are multiples of {FLOAT8_MULTIPLE}, and no "
                              f"layer has such a matrix on a rank (model.hidden={hidden} by {widths}); change the model's widths, "
                              "or give train.dtype=bfloat16")  # fmt: skip

    def float8_widths(self, layout: Layout) -> dict[str, int]:
        """Returns, by key, the widths on a rank of linear layers that may multiply in float8. Their other one is model.hidden."""
        heads = ("model.heads", "model.kv_heads")
        return {
            name: width // layout.tensor * (self.model.head_width if name in heads else 1)
            for name, width in self.tensor_widths().items()
        }

    def _validate_pipeline(self, layout: Layout) -> None:
        parallel = self.parallel
        placement = placement_of(parallel.schedule, layout.pipeline, parallel.virtual_stages)
        self.activations()
        validate_split(parallel.balance, self.model.layers, placement, parallel.memory_bytes, self.train.recompute)
