"""What is exported is loaded rightly by transformers 4.57 too, which runs in an environment of its own."""

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

from bagualu.trainer.conversion.export_model import export_model
from bagualu.trainer.conversion.import_model import import_model
from bagualu.trainer.models.hugging_face.directory import open_model
from tests.trainer.models.hugging_face.published import NAMES, logits, publish, tokens
from tests.trainer.models.hugging_face.test_parity import own_logits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PACKAGES = ("transformers==4.57.6", "huggingface-hub==0.36.0", "tokenizers==0.22.1")
"""What has to be older there than here. Everything else comes from the environment that runs the tests."""
UNREACHABLE = ("Retrying (", "Connection error", "Network is unreachable", "Temporary failure in name resolution")
"""What pip writes if it cannot reach the index."""
LOADING = """
import json, sys, torch, transformers, huggingface_hub
folder = sys.argv[1]
tokens = torch.load(f"{folder}/tokens.pt")
for name in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        torch.save(model(tokens).logits, f"{folder}/{name}/logits.pt")
    print(json.dumps([transformers.__version__, huggingface_hub.__version__, model.config.rope_theta]))
"""


@pytest.fixture(scope="module")
def older_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with transformers 4.57. Skips if there is no package index."""
    folder = tmp_path_factory.mktemp("transformers4")
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--retries", "1", *PACKAGES]
    installed = subprocess.run(pip, check=False, capture_output=True, text=True)
    if installed.returncode and any(words in installed.stderr for words in UNREACHABLE):
        pytest.skip("the package index cannot be reached")
    assert not installed.returncode, installed.stderr
    (own,) = folder.glob("lib/python*/site-packages")
    here = dict.fromkeys([sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))])
    (own / "here.pth").write_text("\n".join(here))  # after its own packages
    return python


def test_every_family_has_the_same_logits_there(older_python: Path, tmp_path: Path) -> None:
    for name in NAMES:
        publish(name, tmp_path / f"{name}-published")
        import_model(tmp_path / f"{name}-published", tmp_path / f"{name}-run")
        export_model(tmp_path / f"{name}-run", tmp_path / name)
    torch.save(tokens(), tmp_path / "tokens.pt")
    command = [str(older_python), "-c", LOADING, str(tmp_path), *NAMES]
    loaded = subprocess.run(command, check=False, capture_output=True, text=True)
    assert not loaded.returncode, loaded.stderr
    lines = [json.loads(line) for line in loaded.stdout.splitlines()]
    for name, (version, hub, theta) in zip(NAMES, lines, strict=True):
        assert (version[:5], hub[:2]) == ("4.57.", "0.")
        assert theta == open_model(tmp_path / name).description.model.rope_theta
        own, there = own_logits(tmp_path / name, torch.float32), torch.load(tmp_path / name / "logits.pt")
        torch.testing.assert_close(there, own, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name} in 4.57: {text}")
        torch.testing.assert_close(
            logits(tmp_path / name, torch.float32), own, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name} in 5: {text}"
        )
