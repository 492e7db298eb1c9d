#!/bin/bash
# After a wandb.init that failed, the same process cannot record the same run offline: "run ID ... is in use".
#
# Version: wandb 0.31.0, Python 3.11, Linux.
# Expected: wandb.init(mode="online", id=X) raises CommError because the server cannot be reached. No run has started, so a program
#   that falls back to wandb.init(mode="offline", id=X) gets an offline run, which `wandb sync` can send later.
# Instead: the service process keeps X as a run that is under way. The second wandb.init raises ServerResponseError
#   "run ID X is in use", and so does every later one, offline or online. Only wandb.teardown(), which ends the service and with it
#   every other run of the process, makes X free again.
# Output seen:
#   online: CommError
#   offline: ServerResponseError: run ID abc is in use
#   offline again: ServerResponseError: run ID abc is in use
#   offline after teardown: recorded
# Here: trainer/output/wandb_sink.py tears down before it goes on offline (tests/trainer/output/test_wandb_sink.py).
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install wandb==0.31.0
cd "$folder"
env -u WANDB_MODE WANDB_BASE_URL=http://127.0.0.1:9 WANDB_API_KEY=0000000000000000000000000000000000000000 \
    "$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/seen"
import wandb

SETTINGS = wandb.Settings(silent=True, console="off", init_timeout=3)


def attempt(name, mode):
    try:
        wandb.init(project="project", id="abc", mode=mode, settings=SETTINGS).finish()
        print(f"{name}: recorded", flush=True)
    except wandb.errors.CommError:
        print(f"{name}: CommError", flush=True)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}", flush=True)


attempt("online", "online")
attempt("offline", "offline")
attempt("offline again", "offline")
wandb.teardown()
attempt("offline after teardown", "offline")
PYTHON
diff "$folder/seen" - <<'SEEN'
online: CommError
offline: ServerResponseError: run ID abc is in use
offline again: ServerResponseError: run ID abc is in use
offline after teardown: recorded
SEEN
