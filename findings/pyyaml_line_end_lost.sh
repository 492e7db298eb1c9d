#!/bin/bash
# PyYAML 6.0.3, Python 3.11
#
# Expected: yaml.safe_load(yaml.safe_dump(text, allow_unicode=True)) is the text again, whatever the text.
# Instead:  a text with the line end U+0085 (next line) is written without quotes and with that sign as it is; the reader takes it for
#           the end of a line and puts a space in its place. No error on either side. Without allow_unicode the sign is escaped and
#           comes back. It is what the ellipsis of a Windows-1252 text becomes when that is read as Latin-1.
# Seen:     'a\x85b' comes back as 'a b', '\x85' comes back as ' '
# Here:     trainer/recipe/yaml_text.py writes such text in double quotes; tests/trainer/test_text_values.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pyyaml==6.0.3
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import yaml

back = {text: yaml.safe_load(yaml.safe_dump({"text": text}, allow_unicode=True))["text"] for text in ("a\x85b", "\x85")}
escaped = {text: yaml.safe_load(yaml.safe_dump({"text": text}))["text"] for text in back}
print(", ".join(f"{text!r} comes back as {value!r}" for text, value in back.items()))
sys.exit(0 if back["a\x85b"] == "a b" and back["\x85"] == " " and all(escaped[text] == text for text in back) else 1)
PYTHON
