"""Whether Weights & Biases has a key for its server. Free of torch."""

from bagualu.comm.errors import RecipeError


def require_login() -> None:
    """Raises RecipeError where W&B finds no API key, which `log.wandb=online` needs. Asks no server.

    Takes most of a second: W&B's own look-up is used (environment variables, netrc, its settings files), so W&B is imported.
    """
    try:
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib.wbauth import authenticate_session
    except ImportError:  # a version of wandb that has them elsewhere: its start will tell
        return
    instead = "run `wandb login`, set WANDB_API_KEY, or give log.wandb=offline"
    try:
        server = wandb_setup.singleton().settings.base_url
        found = authenticate_session(host=server, source="bagualu", prompt=False, update_session=False)
    except Exception as error:  # a key or a WANDB_ variable that W&B cannot read
        raise RecipeError(f"log.wandb=online: {' '.join(str(error).split())[:300]} Correct it: {instead}") from error
    if found is None:
        raise RecipeError(f"log.wandb=online, but there is no API key for {server}; {instead}")
