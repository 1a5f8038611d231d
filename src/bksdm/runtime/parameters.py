"""How a picture was made, as texts inside its PNG.

Under `parameters` it is written as AUTOMATIC1111's web interface does, which is what many programs read; under `bksdm`
lies all of it, as JSON.
"""

import json
from collections.abc import Mapping
from typing import Any

KEY = "bksdm"
_NEGATIVE = "Negative prompt:"
_SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "DPMSolverSDEScheduler": "DPM++ SDE",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "KDPM2DiscreteScheduler": "DPM2",
    "LCMScheduler": "LCM",
    "LMSDiscreteScheduler": "LMS",
    "UniPCMultistepScheduler": "UniPC",
}
_MULTISTEP = {
    ("dpmsolver++", 2): "DPM++ 2M",
    ("sde-dpmsolver++", 2): "DPM++ 2M SDE",
    ("sde-dpmsolver++", 3): "DPM++ 3M SDE",
}
_SPACINGS = {"use_karras_sigmas": " Karras", "use_exponential_sigmas": " Exponential", "use_beta_sigmas": " Beta"}


def sampler_name(scheduler: Mapping[str, Any]) -> str:
    """What AUTOMATIC1111's web interface calls a scheduler, or its class's name where it has none.

    Arguments:
        scheduler: Its options, with `_class_name`.
    """
    kind = str(scheduler["_class_name"])
    name = _SAMPLERS.get(kind)
    if kind == "DPMSolverMultistepScheduler":
        options = scheduler.get("algorithm_type", "dpmsolver++"), scheduler.get("solver_order", 2)
        name = _MULTISTEP.get(options)
    elif kind == "PNDMScheduler" and scheduler.get("skip_prk_steps"):
        name = "PLMS"
    if name is None:
        return kind.removesuffix("Scheduler")
    return name + next((added for option, added in _SPACINGS.items() if scheduler.get(option)), "")


def texts(about: Mapping[str, Any], scheduler: Mapping[str, Any], size: tuple[int, int]) -> dict[str, str]:
    """What goes into the PNG, by keyword.

    Arguments:
        about: prompt, seed, model, steps and guidance, and what else there is to say; what is None is left out.
            negative_prompt, which is given where there was guidance, and the strength with which a picture was begun
            from, are written under both keywords.
        scheduler: The options of the one that was used, with `_class_name`.
        size: Width and height in pixels.
    """
    sampler, (width, height) = sampler_name(scheduler), size
    told = {name: value for name, value in about.items() if value is not None}
    if not told.get("negative_prompt"):
        told.pop("negative_prompt", None)  # nothing was kept away from
    told |= {"scheduler": scheduler["_class_name"], "width": width, "height": height}
    fields = {
        "Steps": told["steps"],
        "Sampler": sampler,
        "CFG scale": f"{told['guidance']:g}",
        "Seed": told["seed"],
        "Size": f"{width}x{height}",
        "Model": told["model"],
        "Denoising strength": told.get("strength"),
    }
    settings = ", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items() if value is not None)
    negative = told.get("negative_prompt")
    prompt = str(told["prompt"]).replace(_NEGATIVE, _NEGATIVE.lower())  # readers would end the prompt there
    lines = [prompt, *([f"{_NEGATIVE} {negative}"] if negative else []), settings]
    return {"parameters": "\n".join(map(str, lines)).strip(), KEY: json.dumps(told)}


def _quoted(value: object) -> str:
    """What would be taken for more than one setting, in quotes."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
