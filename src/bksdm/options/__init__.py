"""The options of the verbs: one flat dataclass each, which the command line or a caller fills.

Only a verb's own function reads them; what it calls takes plain arguments. A room is free of imports that take long.
"""

from bksdm.options.adapt import AdaptOptions
from bksdm.options.data import PrepareOptions
from bksdm.options.distill import DecoderOptions, DistillOptions, LcmOptions, Taps
from bksdm.options.evaluate import BenchmarkOptions, EvaluateOptions, Intervals
from bksdm.options.export import ExportFormat, ExportOptions, PushOptions
from bksdm.options.generate import DemoOptions, GenerateOptions, Runtime
from bksdm.options.personalize import FidelityOptions, PersonalizeOptions
from bksdm.options.pruning import DescribeOptions, PruneOptions, SensitivityOptions
from bksdm.options.quickstart import QuickstartOptions
from bksdm.options.shared import Precision

StudentOptions = DistillOptions | LcmOptions
TrainingOptions = StudentOptions | DecoderOptions | PersonalizeOptions

__all__ = [
    "AdaptOptions",
    "BenchmarkOptions",
    "DecoderOptions",
    "DemoOptions",
    "DescribeOptions",
    "DistillOptions",
    "EvaluateOptions",
    "ExportFormat",
    "ExportOptions",
    "FidelityOptions",
    "GenerateOptions",
    "Intervals",
    "LcmOptions",
    "PersonalizeOptions",
    "Precision",
    "PrepareOptions",
    "PruneOptions",
    "PushOptions",
    "QuickstartOptions",
    "Runtime",
    "SensitivityOptions",
    "StudentOptions",
    "Taps",
    "TrainingOptions",
]
