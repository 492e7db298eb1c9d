#!/bin/bash
# hydra-core 1.3.8, omegaconf 2.3.1, Python 3.11
#
# Expected: a key whose structured config says `str` keeps the text that is typed for it. At worst a value of another type is refused.
# Instead:  the value is first read as whatever it looks like, and then turned into text again. Without a word
#           name=2024_01_01 becomes "20240101", 1e3 becomes "1000.0", 3.10 becomes "3.1" and true becomes "True"; in a YAML file
#           12:30:00 becomes "45000" (base 60), 007 becomes "7" and yes becomes "True". A run, a folder or a data set then has another
#           name than the person gave it.
# Seen:     {'name=2024_01_01': '20240101', 'name=1e3': '1000.0', 'name=3.10': '3.1', 'name=true': 'True'}
#           {'12:30:00': '45000', '007': '7', 'yes': 'True', '2024_01': '202401'}
# Here:     trainer/recipe/override_text.py and trainer/recipe/yaml_text.py keep text as typed; tests/trainer/test_text_values.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q hydra-core==1.3.8 omegaconf==2.3.1
cd "$folder"
mkdir group
cat > look.py <<'PYTHON'
import sys
from dataclasses import dataclass

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore


@dataclass
class Run:
    name: str = "run"


ConfigStore.instance().store(name="schema", node=Run)
typed, written = {}, {}
for override in ("name=2024_01_01", "name=1e3", "name=3.10", "name=true"):
    with initialize_config_dir(sys.argv[1], version_base="1.3"):
        typed[override] = compose("schema", overrides=[override]).name
for text in ("12:30:00", "007", "yes", "2024_01"):
    with open("main.yaml", "w") as file:
        file.write(f"defaults: [schema, _self_]\nname: {text}\n")
    with initialize_config_dir(sys.argv[1], version_base="1.3"):
        written[text] = compose("main").name
print(typed)
print(written)
expected = {"name=2024_01_01": "20240101", "name=1e3": "1000.0", "name=3.10": "3.1", "name=true": "True"}
sys.exit(0 if typed == expected and written == {"12:30:00": "45000", "007": "7", "yes": "True", "2024_01": "202401"} else 1)
PYTHON
"$folder/venv/bin/python" look.py "$folder"
