"""The library's door: what the verbs of the command line do, as functions.

    from bksdm.api import PruneOptions, describe, prune

    print(describe("emoji", "small").text())
    prune(PruneOptions(teacher="emoji", recipe="small", out="pruned"))

Everything that raises `InputError` says in one line what to mend.
"""

from bksdm.common.errors import InputError
from bksdm.data.prepare import prepare
from bksdm.distill.captions import CaptionPool, Captions
from bksdm.distill.conditions import Conditions
from bksdm.distill.consistency import Consistency, few_step_scheduler
from bksdm.distill.decoder import distill_decoder
from bksdm.distill.few_steps import lcm
from bksdm.distill.loop import Interrupted
from bksdm.distill.losses import LossWeights
from bksdm.distill.objective import Distillation
from bksdm.distill.plan import Plan
from bksdm.distill.run import distill, foresee
from bksdm.evaluate.benchmark import Benchmark, benchmark, latencies
from bksdm.evaluate.run import evaluate
from bksdm.export.push import Pushed, push
from bksdm.export.run import Exported, export
from bksdm.families import derive
from bksdm.families.noise import NoiseSchedule
from bksdm.families.recipe import Pruning, Recipe, load_recipe
from bksdm.generate.demo import demo
from bksdm.generate.requests import Request
from bksdm.generate.run import generate
from bksdm.generate.sampling import sample
from bksdm.models.adapters.controlnet import load_controlnet
from bksdm.models.adapters.lora import merge_lora
from bksdm.models.adapters.motion import motion_unet
from bksdm.models.adapters.run import Adapted, adapt
from bksdm.models.decoder import with_decoder
from bksdm.models.pipelines import Origin, load_pipeline, save_pipeline
from bksdm.options.adapt import AdaptOptions
from bksdm.options.data import PrepareOptions
from bksdm.options.distill import DecoderOptions, DistillOptions, LcmOptions
from bksdm.options.evaluate import BenchmarkOptions, EvaluateOptions
from bksdm.options.export import ExportOptions, PushOptions
from bksdm.options.generate import DemoOptions, GenerateOptions
from bksdm.options.personalize import FidelityOptions, PersonalizeOptions
from bksdm.options.pruning import PruneOptions, SensitivityOptions
from bksdm.options.quickstart import QuickstartOptions
from bksdm.personalize.fidelity import fidelity
from bksdm.personalize.run import personalize
from bksdm.pruning.describe import Description, describe
from bksdm.pruning.inherit import prune_unet
from bksdm.pruning.run import prune
from bksdm.pruning.sensitivity.outcome import Sensitivity
from bksdm.pruning.sensitivity.run import sensitivity
from bksdm.quickstart.run import quickstart
from bksdm.runtime.spared import Spared

__all__ = [
    "AdaptOptions",
    "Adapted",
    "Benchmark",
    "BenchmarkOptions",
    "CaptionPool",
    "Captions",
    "Conditions",
    "Consistency",
    "DecoderOptions",
    "DemoOptions",
    "Description",
    "DistillOptions",
    "Distillation",
    "EvaluateOptions",
    "ExportOptions",
    "Exported",
    "FidelityOptions",
    "GenerateOptions",
    "InputError",
    "Interrupted",
    "LcmOptions",
    "LossWeights",
    "NoiseSchedule",
    "Origin",
    "PersonalizeOptions",
    "Plan",
    "PrepareOptions",
    "PruneOptions",
    "Pruning",
    "PushOptions",
    "Pushed",
    "QuickstartOptions",
    "Recipe",
    "Request",
    "Sensitivity",
    "SensitivityOptions",
    "Spared",
    "adapt",
    "benchmark",
    "demo",
    "derive",
    "describe",
    "distill",
    "distill_decoder",
    "evaluate",
    "export",
    "few_step_scheduler",
    "fidelity",
    "foresee",
    "generate",
    "latencies",
    "lcm",
    "load_controlnet",
    "load_pipeline",
    "load_recipe",
    "merge_lora",
    "motion_unet",
    "personalize",
    "prepare",
    "prune",
    "prune_unet",
    "push",
    "quickstart",
    "sample",
    "save_pipeline",
    "sensitivity",
    "with_decoder",
]
