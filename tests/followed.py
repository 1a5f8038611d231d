"""A real step of retraining, whose bytes are followed as `distill --plan` follows those of a step without data."""

import torch

from bksdm.common.randomness import Draws
from bksdm.distill import plan
from bksdm.distill.data import open_data
from bksdm.distill.pair import Formats
from bksdm.families import derive
from bksdm.models.configs import load_denoiser_config
from bksdm.models.pipelines import denoiser, text_encoders
from bksdm.options.distill import DistillOptions
from bksdm.pruning.told import read_recipe


def followed(options: DistillOptions) -> int:
    """Bytes of activations and gradients at most, of a micro-batch of one."""
    pruning = derive(read_recipe(options.student), load_denoiser_config(options.teacher))
    data = open_data(options.data, options.resolution, options.flip, options.cache_gb)
    shapes = plan._Shapes.of(options, pruning, data)
    pair = shapes.pair(Formats.choose(options))
    pair.set_up(gradient_checkpointing=False, shard_teacher=False)
    objective, batch = pair.objective(options), shapes.batch(1)
    networks = (denoiser(pair.teacher), pair.teacher.vae, *text_encoders(pair.teacher), pair.student)
    before = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    with plan._Alive([*before, *batch.values()]) as alive:
        torch.autograd.backward(objective(batch, Draws(0, "plan"))["loss"])
    return alive.most
