"""The library's door: what the verbs of the command line do, as functions.

    from bksdm.api import PruneOptions, describe, load_recipe, prune

    print(describe("emoji", load_recipe("small")).text())
    prune(PruneOptions(teacher="emoji", recipe="small", out="pruned"))

Everything that raises `InputError` says in one line what to mend.
"""

from bksdm.describe import Description, describe
from bksdm.distill.objective import Distillation
from bksdm.distill.run import distill
from bksdm.errors import InputError
from bksdm.evaluate.run import evaluate
from bksdm.generate import generate
from bksdm.losses import LossWeights
from bksdm.models import load_pipeline, save_pipeline
from bksdm.options import DistillOptions, EvaluateOptions, GenerateOptions, PruneOptions, QuickstartOptions
from bksdm.prune import prune, prune_unet
from bksdm.quickstart import quickstart
from bksdm.recipe import Pruning, Recipe, load_recipe
from bksdm.sampling import Request, sample

__all__ = [
    "Description",
    "DistillOptions",
    "Distillation",
    "EvaluateOptions",
    "GenerateOptions",
    "InputError",
    "LossWeights",
    "PruneOptions",
    "Pruning",
    "QuickstartOptions",
    "Recipe",
    "Request",
    "describe",
    "distill",
    "evaluate",
    "generate",
    "load_pipeline",
    "load_recipe",
    "prune",
    "prune_unet",
    "quickstart",
    "sample",
    "save_pipeline",
]
