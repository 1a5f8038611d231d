"""The samplers of diffusers in numpy, by the name and the options that a scheduler_config.json has.

Whatever a configuration asks for and is not done here is refused.
"""

from collections.abc import Mapping
from typing import Any

from bksdm.common.errors import InputError
from bksdm.runtime.flow import why_no_flow
from bksdm.runtime.sigma_samplers import Euler, EulerAncestral, Heun, Lms
from bksdm.runtime.solvers import DpmSolver, UniPc
from bksdm.runtime.timestep_samplers import Ddim, Ddpm, Lcm, Pndm
from bksdm.runtime.trajectory import KNOWN, Trajectory

SCHEDULERS: Mapping[str, type[Trajectory]] = {
    "DDIMScheduler": Ddim,
    "DDPMScheduler": Ddpm,
    "PNDMScheduler": Pndm,
    "LCMScheduler": Lcm,
    "EulerDiscreteScheduler": Euler,
    "EulerAncestralDiscreteScheduler": EulerAncestral,
    "HeunDiscreteScheduler": Heun,
    "LMSDiscreteScheduler": Lms,
    "DPMSolverMultistepScheduler": DpmSolver,
    "UniPCMultistepScheduler": UniPc,
}
LEFT_OUT = "_use_default_values"  # diffusers' name for options that a model's own configuration leaves out


def check_scheduler(config: Mapping[str, Any], *, flows: bool = False) -> None:
    """Refuse a scheduler that is not known here, or an option of it.

    Arguments:
        config: Of scheduler_config.json.
        flows: Whether it is for flow matching.

    Raises:
        InputError: Naming it, and a scheduler that the same configuration gives and that is known.
    """
    reason = why_no_flow(config) if flows else why_unknown(config)
    if reason is None:
        return
    if flows:
        raise InputError(f"{reason}; use torch")
    known = [name for name in SCHEDULERS if why_unknown(with_scheduler(config, name)) is None]
    mend = f"give --scheduler with one of {', '.join(known)}" if known else "no scheduler here can do it; use torch"
    raise InputError(f"{reason}; {mend}")


def with_scheduler(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The configuration of another scheduler with the same noise schedule, as diffusers' `from_config` makes it.

    What the model's own configuration leaves out takes the defaults of the other scheduler, but for samples that some
    clip by default, which suits pixels and not latents.
    """
    return {"clip_sample": False, **told(config), "_class_name": name}


def told(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the options that it says were left out."""
    left_out = {*config.get(LEFT_OUT, ()), LEFT_OUT}
    return {option: value for option, value in config.items() if option not in left_out}


def trajectory(config: Mapping[str, Any], steps: int, strength: float = 1.0) -> Trajectory:
    """The way that a scheduler takes in `steps` steps.

    Arguments:
        config: Of scheduler_config.json, with `_class_name`.
        steps: Denoising steps of the whole way.
        strength: Share of the way that is gone, from its middle on, in (0, 1].

    Raises:
        InputError: The scheduler is unknown, or cannot do so many or so few steps.
    """
    check_scheduler(config)
    kind = SCHEDULERS[config["_class_name"]]
    options = options_of(config)
    if not 1 <= steps <= options["num_train_timesteps"]:
        raise InputError(f"steps is {steps}; give at least 1 and at most {options['num_train_timesteps']}")
    if not 0 < strength <= 1:
        raise InputError(f"strength is {strength}; give more than 0 and at most 1")
    done = min(int(steps * strength), steps)
    if done < 1:
        raise InputError(f"strength {strength} of {steps} steps leaves no step to do; give more of either")
    return kind(options, steps, steps - done)


def why_unknown(config: Mapping[str, Any]) -> str | None:
    """Why a scheduler, or an option of it, is not known here; None where it is."""
    name = str(config.get("_class_name"))
    if name not in SCHEDULERS:
        return f"scheduler {name} is not known here"
    kind = SCHEDULERS[name]
    options = options_of(config)
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in options:
        return f"{name} has no rescale_betas_zero_snr, which this model has"
    for option, values in {**KNOWN, **kind.supported}.items():
        if option in options and options[option] not in values:
            known = " or ".join(str(value) for value in values if value is not None)
            return f"{name} has {option} {options[option]}, and only {known or 'none'} is known here"
    reason = kind.why_not(options)
    return None if reason is None else f"{name} {reason}"


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """All options that the sampler of a known scheduler reads, with diffusers' defaults for what is left out."""
    kind = SCHEDULERS[config["_class_name"]]
    options = {name: config.get(name, default) for name, default in kind.defaults.items()}
    for option, names in kind.renamed.items():
        options[option] = names.get(str(options[option]), options[option])
    return options
