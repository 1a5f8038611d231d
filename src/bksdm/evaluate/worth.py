"""What a model costs, to be held against what its pictures are worth."""

from collections.abc import Mapping
from typing import Any

from bksdm.common.devices import choose_device, choose_precision
from bksdm.evaluate.benchmark import whole_pictures
from bksdm.evaluate.rivals import Drawing, TorchRival
from bksdm.models.configs import context_tokens, load_denoiser_config
from bksdm.models.decoder import load_model
from bksdm.options.shared import Precision
from bksdm.pruning.cost import unet_cost
from bksdm.runtime.defaults import Defaults


def worth(
    models: Mapping[str, str],
    ways: Mapping[str, Defaults],
    *,
    rounds: int,
    precision: Precision,
    device: str,
    decoder: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Parameters, MACs and seconds a picture.

    Arguments:
        models: MODELs by their short names.
        ways: Steps and guidance of their timed pictures.
        rounds: Timed pictures of every model, which take turns; 0 to time none.
        precision: Type of the weights.
        device: Where.
        decoder: Small decoder of all of them.

    Returns:
        By short name: `params`, `gmacs_modules` and `gmacs_all` of the U-Net, and the median `seconds_per_picture`.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        cost = unet_cost(load_denoiser_config(model), tokens=context_tokens(model))
        found[name] = {"params": cost.params, "gmacs_modules": cost.gmacs_modules, "gmacs_all": cost.gmacs_all}
    if rounds and models:
        there = choose_device(device)
        dtype = choose_precision(precision, there, training=False)
        pipelines = {name: load_model(model, dtype, decoder).to(there) for name, model in models.items()}
        rivals = {name: TorchRival(name, pipeline, Drawing(ways[name])) for name, pipeline in pipelines.items()}
        for name, seconds in whole_pictures(rivals, rounds=rounds).items():
            found[name]["seconds_per_picture"] = seconds.median
    return found
