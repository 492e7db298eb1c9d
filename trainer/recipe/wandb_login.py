"""Checks that Weights & Biases has an API key for its server."""

from bagualu.comm.errors import RecipeError


def require_login() -> None:
    """Raises RecipeError if W&B finds no API key, which `log.wandb=online` needs, or cannot read its settings. Contacts no server.
    Does nothing if W&B is not installed or its version has no such look-up.

    Takes almost a second, because it imports W&B and uses its own look-up (environment variables, netrc, its settings files).
    """
    try:
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib.wbauth import authenticate_session
    except ImportError:  # this version of wandb has them elsewhere; its start will report a missing key
        return
    instead = "run `wandb login`, set WANDB_API_KEY, or give log.wandb=offline"
    try:
        server = wandb_setup.singleton().settings.base_url
        login = authenticate_session(host=server, source="bagualu", prompt=False, update_session=False)
    except Exception as error:  # a key or a WANDB_ variable that W&B cannot read
        raise RecipeError(f"log.wandb=online: {' '.join(str(error).split())[:300]} Correct it: {instead}") from error
    if login is None:
        raise RecipeError(f"log.wandb=online, but there is no API key for {server}; {instead}")
