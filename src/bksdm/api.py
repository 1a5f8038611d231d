"""The library's door: what the verbs of the command line do, as functions.

    from bksdm.api import PruneOptions, describe, prune

    print(describe("emoji", "small").text())
    prune(PruneOptions(teacher="emoji", recipe="small", out="pruned"))

Everything that raises `InputError` says in one line what to mend.
"""

from bksdm.benchmark import Benchmark, benchmark, latencies
from bksdm.decoder import with_decoder
from bksdm.describe import Description, describe
from bksdm.distill.captions import CaptionPool, Captions
from bksdm.distill.conditions import Conditions
from bksdm.distill.consistency import Consistency, few_step_scheduler
from bksdm.distill.decoder import distill_decoder
from bksdm.distill.few_steps import lcm
from bksdm.distill.loop import Interrupted
from bksdm.distill.noise import NoiseSchedule
from bksdm.distill.objective import Distillation
from bksdm.distill.plan import Plan
from bksdm.distill.run import distill, foresee
from bksdm.errors import InputError
from bksdm.evaluate.run import evaluate
from bksdm.export.run import Exported, export
from bksdm.families import derive
from bksdm.generate import generate
from bksdm.losses import LossWeights
from bksdm.models import load_pipeline, save_pipeline
from bksdm.options import (
    BenchmarkOptions,
    DecoderOptions,
    DistillOptions,
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    LcmOptions,
    PrepareOptions,
    PruneOptions,
    QuickstartOptions,
    SensitivityOptions,
)
from bksdm.prepare import prepare
from bksdm.prune import prune, prune_unet
from bksdm.quickstart import quickstart
from bksdm.recipe import Pruning, Recipe, load_recipe
from bksdm.sampling import Request, sample
from bksdm.sensitivity.outcome import Sensitivity
from bksdm.sensitivity.run import sensitivity

__all__ = [
    "Benchmark",
    "BenchmarkOptions",
    "CaptionPool",
    "Captions",
    "Conditions",
    "Consistency",
    "DecoderOptions",
    "Description",
    "DistillOptions",
    "Distillation",
    "EvaluateOptions",
    "ExportOptions",
    "Exported",
    "GenerateOptions",
    "InputError",
    "Interrupted",
    "LcmOptions",
    "LossWeights",
    "NoiseSchedule",
    "Plan",
    "PrepareOptions",
    "PruneOptions",
    "Pruning",
    "QuickstartOptions",
    "Recipe",
    "Request",
    "Sensitivity",
    "SensitivityOptions",
    "benchmark",
    "derive",
    "describe",
    "distill",
    "distill_decoder",
    "evaluate",
    "export",
    "few_step_scheduler",
    "foresee",
    "generate",
    "latencies",
    "lcm",
    "load_pipeline",
    "load_recipe",
    "prepare",
    "prune",
    "prune_unet",
    "quickstart",
    "sample",
    "save_pipeline",
    "sensitivity",
    "with_decoder",
]
