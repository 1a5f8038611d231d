"""The part of an exported folder that is the same for every runtime: configs, tokenizer, scheduler.

It is the layout of optimum's ONNX and OpenVINO pipelines, which is diffusers' with `vae` in two: a folder for each
network, with its diffusers config and, in the runtime's form, what it computes.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from transformers import CLIPTokenizer

from bksdm.common.errors import InputError
from bksdm.common.runs import write_text
from bksdm.export.components import Component
from bksdm.export.formats import Source
from bksdm.families import family_of_pipeline
from bksdm.models.folders import save_vocabulary
from bksdm.models.pipelines import scheduler_config, tokenizers
from bksdm.runtime.schedulers import check_scheduler


def write_layout(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write `model_index.json`, the tokenizers and the scheduler."""
    family = family_of_pipeline(pipeline)
    for name, tokenizer in zip(family.tokenizers, tokenizers(pipeline), strict=True):
        family.tokenizer_for_readers(tokenizer).save_pretrained(folder / name)
        if isinstance(tokenizer, CLIPTokenizer):
            save_vocabulary(tokenizer.backend_tokenizer, folder / name)
    (folder / "scheduler").mkdir()
    write_scheduler(scheduler_config(pipeline.scheduler), folder)
    flags = {name: value for name, value in pipeline.config.items() if isinstance(value, bool)}
    flags |= {"requires_safety_checker": False} if "requires_safety_checker" in flags else {}
    index = {"_class_name": family.pipeline, **flags, **_classes(pipeline)}
    write_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")


def _classes(pipeline: DiffusionPipeline) -> dict[str, list[str]]:
    """What readers of model_index.json compare with: the networks' own classes, not those of a runtime."""
    family = family_of_pipeline(pipeline)
    parts = {name: type(getattr(pipeline, name)) for name in (*family.networks, *family.tokenizers, "scheduler")}
    return {name: [kind.__module__.partition(".")[0], kind.__name__] for name, kind in sorted(parts.items())}


def write_scheduler(config: Mapping[str, Any], folder: Path) -> None:
    """Write `scheduler/scheduler_config.json`, in full, for readers have defaults of their own.

    But for minus infinity, which JSON does not have and which is every reader's default where it occurs.
    """
    known = {name: value for name, value in config.items() if value != -math.inf}
    text = json.dumps(known, indent=2, sort_keys=True, allow_nan=False)
    write_text(folder / "scheduler" / "scheduler_config.json", text + "\n")


def why_not(source: Source) -> str | None:
    """Why the torch-free runtime could not draw with the source's scheduler; None where it can."""
    try:
        check_scheduler(scheduler_config(source.pipeline.scheduler), flows=family_of_pipeline(source.pipeline).by_flow)
    except InputError as error:
        return str(error)
    return None


def component_folder(component: Component, folder: Path) -> Path:
    """The folder of a network, made and with its config."""
    made = folder / component.name
    made.mkdir()
    write_text(made / "config.json", component.config)
    return made
