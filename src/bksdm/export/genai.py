"""What stock openvino-genai makes of a folder's scheduler: it knows six, and less of them than diffusers.

Tried with 2026.4.1. Of what it does not know it refuses most in words; LMS it takes for DDIM, and by LCM with anything
but predicted noise the process ends.
"""

from collections.abc import Collection, Mapping
from typing import Any

_USUAL = {"time_shift_type": "exponential"}
_FLOW_OFF = (
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)
# By scheduler, values of options that it does not draw with.
_UNKNOWN: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "PNDMScheduler": {"skip_prk_steps": (False,)},
    "DDIMScheduler": {"clip_sample": (True,), "thresholding": (True,)},
    "LCMScheduler": {"prediction_type": ("v_prediction", "sample")},
    "EulerDiscreteScheduler": {"use_karras_sigmas": (True,), "use_exponential_sigmas": (True,)},
    "EulerAncestralDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler": dict.fromkeys(_FLOW_OFF, (True,)),
}


def genai_draws(scheduler: Mapping[str, Any]) -> bool:
    """Whether it draws by a scheduler of this configuration, in full, as diffusers does."""
    unknown = _UNKNOWN.get(str(scheduler.get("_class_name")))
    if unknown is None or scheduler.get("beta_schedule") == "squaredcos_cap_v2":
        return False
    return all(scheduler.get(option) not in values for option, values in unknown.items())


def for_genai(scheduler: Mapping[str, Any], unsaid: Collection[str] = ()) -> dict[str, Any]:
    """A configuration that it draws by, or refuses: it refuses a DDIM that clips, as one does that does not say.

    Arguments:
        scheduler: The configuration.
        unsaid: Options that are left out where the model's own configuration does so, or could.
    """
    lms = scheduler["_class_name"] == "LMSDiscreteScheduler"
    out = {"clip_sample"} if lms else {option for option in unsaid if scheduler.get(option) == _USUAL.get(option)}
    return {option: value for option, value in scheduler.items() if option not in out}
