"""Install the top-level folders under the one root `bagualu` (docs/design/architecture.md, "The house")."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
DEEPSPEED = ["deepspeed==0.19.8"]  # the version that trainer/recipe/deepspeed.py asks for
HARNESS = ["lm_eval==0.4.13"]  # whose model interface trainer/generation/harness.py implements
FOLDERS = ("comm", "parallel", "fault_tolerance", "trainer", "launch", "recipes")


def packages() -> list[str]:
    """Every package under the six folders, named from the root `bagualu`."""
    found = [init.parent.relative_to(HERE) for folder in FOLDERS for init in (HERE / folder).rglob("__init__.py")]
    return sorted("bagualu." + ".".join(path.parts) for path in found)


setup(
    name="bagualu",
    version="0.1.0",
    description="Distributed training of large models on many different, unequal chips",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=packages(),
    package_dir={f"bagualu.{folder}": folder for folder in FOLDERS},
    package_data={"": ["py.typed", "*.yaml", "*/*.yaml", "*.sh", "*.cpp", "*.h"]},
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "hydra-core>=1.3",
        "omegaconf>=2.3",
        "datasets>=3.0",
        "pyarrow>=15.0",
        "huggingface_hub>=0.24",
        "tokenizers>=0.20",
        "jinja2>=3.1",
        "xxhash>=3.0",
        "filelock>=3.12",
        "psutil>=5.9",
        "rich>=13.0",
        "matplotlib>=3.8",
        "wandb>=0.31",
    ],
    extras_require={
        "deepspeed": DEEPSPEED,
        "harness": HARNESS,
        "test": [
            "pytest>=8.0",
            "safetensors>=0.4",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "transformers>=5.0",
            *DEEPSPEED,
            *HARNESS,
        ],
        "lint": ["ruff>=0.5", "mypy>=1.10", "types-psutil", "types-PyYAML"],
        "bench": DEEPSPEED,
    },
    entry_points={
        "console_scripts": ["bagualu = bagualu.launch.cli:main"],
        "bagualu.backends": [
            "gloo = bagualu.comm.gloo:GlooBackend",
            "nccl = bagualu.comm.nccl:NcclBackend",
            "simulated = bagualu.comm.simulated:SimulatedBackend",
        ],
    },
)
