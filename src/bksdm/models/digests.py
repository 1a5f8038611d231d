"""Short names for what networks in memory compute."""

import hashlib
from typing import Any


def network_digest(*networks: Any) -> str:
    """A short name for what networks compute: their weights, and the factor by which a VAE scales its latents.

    Weights count by value, so that a copy in another file, or in a wider number format, is the same network.
    """
    whole = hashlib.sha256()
    for network in networks:
        whole.update(str(getattr(network.config, "scaling_factor", "")).encode())
        for name, tensor in sorted(network.state_dict().items()):
            whole.update(name.encode())
            whole.update(tensor.float().cpu().contiguous().numpy())
    return whole.hexdigest()[:16]
