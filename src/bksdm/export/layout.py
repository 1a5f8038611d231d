"""The part of an exported folder that is the same for every runtime: configs, tokenizer, scheduler.

It is the layout of optimum's ONNX and OpenVINO pipelines, which is diffusers' with `vae` in two: a folder for each
network, with its diffusers config and, in the runtime's form, what it computes.
"""

import json
from pathlib import Path

from diffusers import StableDiffusionPipeline

from bksdm.export.components import Component
from bksdm.models import save_vocabulary
from bksdm.runs import write_text

# What readers of model_index.json compare with: the networks' own classes, not those of a runtime.
_CLASSES = {
    "scheduler": "diffusers",
    "text_encoder": "transformers",
    "tokenizer": "transformers",
    "unet": "diffusers",
    "vae": "diffusers",
}


def write_layout(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write `model_index.json`, the tokenizer and the scheduler."""
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    save_vocabulary(pipeline.tokenizer, folder / "tokenizer")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    parts = {name: [library, type(getattr(pipeline, name)).__name__] for name, library in _CLASSES.items()}
    parts["tokenizer"] = ["transformers", "CLIPTokenizer"]
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **parts}
    write_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")


def component_folder(component: Component, folder: Path) -> Path:
    """The folder of a network, made and with its config."""
    made = folder / component.name
    made.mkdir()
    write_text(made / "config.json", component.config)
    return made
