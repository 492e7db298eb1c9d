"""Whether this machine lets a test have file systems of its own."""

import subprocess


def can_mount() -> bool:
    """In a mount namespace: as root, or with user namespaces."""
    try:
        done = subprocess.run(["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"], capture_output=True)
    except FileNotFoundError:
        return False
    return done.returncode == 0
