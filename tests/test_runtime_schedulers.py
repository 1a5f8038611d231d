"""The samplers of the torch-free runner go diffusers' way, number for number."""

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch

from bksdm.common.errors import InputError
from bksdm.generate.sampling import scheduler_config, scheduler_named
from bksdm.runtime.noise import Generator
from bksdm.runtime.schedulers import SCHEDULERS, check_scheduler, trajectory, with_scheduler

SHAPE = (2, 4, 4, 4)
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V, X = ({"prediction_type": kind} for kind in ("v_prediction", "sample"))
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}
UNCLIPPED = {"clip_sample": False}
ZERO_SNR = STABLE | TRAILING | V | UNCLIPPED | {"rescale_betas_zero_snr": True}
KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}
TO_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
NOISY = {"algorithm_type": "sde-dpmsolver++"}
PLMS = {"skip_prk_steps": True}
DDIM, DDPM, PNDM, LCM = "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler"
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
HEUN, LMS = "HeunDiscreteScheduler", "LMSDiscreteScheduler"
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
CASES = [
    (DDIM, {}),
    (DDIM, STABLE | LEADING | UNCLIPPED | {"set_alpha_to_one": False}),
    (DDIM, STABLE | TRAILING | V | UNCLIPPED),
    (DDIM, STABLE | LEADING | X),
    (DDIM, {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "linspace", "clip_sample_range": 2.0}),
    (DDIM, {"num_train_timesteps": 4, "trained_betas": [0.01, 0.1, 0.2, 0.3], "clip_sample": False}),
    (DDPM, {}),
    (DDPM, STABLE | TRAILING | V | UNCLIPPED | {"variance_type": "fixed_large"}),
    (DDPM, STABLE | LEADING | X | UNCLIPPED | {"variance_type": "fixed_small_log"}),
    (PNDM, STABLE | LEADING | PLMS),
    (PNDM, STABLE | TRAILING | V | PLMS | {"set_alpha_to_one": True}),
    (PNDM, PLMS | {"timestep_spacing": "linspace"}),
    (PNDM, {}),
    (PNDM, STABLE | LEADING | V | {"set_alpha_to_one": True}),
    (PNDM, STABLE | TRAILING),
    (LCM, {}),
    (LCM, V | {"original_inference_steps": 100, "set_alpha_to_one": False}),
    (LCM, X | {"clip_sample": True, "timestep_scaling": 5.0}),
    (EULER, STABLE),
    (EULER, STABLE | LEADING),
    (EULER, STABLE | TRAILING | V | TO_SIGMA_MIN),
    (EULER, STABLE | LEADING | KARRAS),
    (EULER, STABLE | KARRAS | X | {"sigma_min": 0.1, "sigma_max": 10.0}),
    (EULER, STABLE | TRAILING | EXPONENTIAL | V),
    (ANCESTRAL, STABLE),
    (ANCESTRAL, STABLE | LEADING | V),
    (HEUN, STABLE),
    (HEUN, STABLE | LEADING | V | KARRAS),
    (HEUN, STABLE | TRAILING | X | EXPONENTIAL),
    (LMS, STABLE),
    (LMS, STABLE | LEADING | V | KARRAS),
    (LMS, STABLE | TRAILING | X | EXPONENTIAL),
    (DPM, STABLE),
    (DPM, STABLE | LEADING | V),
    (DPM, STABLE | TRAILING | X | {"solver_order": 1}),
    (DPM, STABLE | TO_SIGMA_MIN | {"lower_order_final": False}),
    (DPM, STABLE | TO_SIGMA_MIN | {"euler_at_final": True}),
    (DPM, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    (DPM, STABLE | LEADING | {"solver_order": 3}),
    (DPM, STABLE | TO_SIGMA_MIN | {"solver_order": 3, "lower_order_final": False}),
    (DPM, STABLE | KARRAS),
    (DPM, STABLE | EXPONENTIAL | TO_SIGMA_MIN),
    (DPM, ZERO_SNR | KARRAS),
    (DPM, STABLE | KARRAS | TO_SIGMA_MIN | {"solver_type": "heun", "sigma_min": 0.1}),
    (DPM, {"beta_schedule": "squaredcos_cap_v2", "sigma_max": 50.0} | KARRAS),
    (DPM, STABLE | LEADING | EXPONENTIAL | V),
    (DPM, STABLE | NOISY | KARRAS),
    (DPM, STABLE | LEADING | NOISY | V | {"solver_type": "heun"}),
    (DPM, STABLE | NOISY | {"solver_order": 1}),
    (UNIPC, STABLE),
    (UNIPC, STABLE | LEADING | V | {"solver_order": 3}),
    (UNIPC, STABLE | TRAILING | X | {"solver_order": 1}),
    (UNIPC, STABLE | TO_SIGMA_MIN | {"solver_type": "bh1", "lower_order_final": False}),
    (UNIPC, STABLE | KARRAS | {"sigma_max": 10.0}),
    (UNIPC, STABLE | EXPONENTIAL | {"solver_order": 3, "disable_corrector": [0, 2]}),
    *((name, ZERO_SNR) for name in (DDIM, DDPM, LCM, EULER, ANCESTRAL, DPM, UNIPC)),
    *((name, ZERO_SNR | {"prediction_type": "epsilon"}) for name in (EULER, ANCESTRAL, DPM, UNIPC)),
]


def predicted(sample: np.ndarray, timestep: float) -> np.ndarray:
    """A smooth stand-in for a U-Net, of both of its arguments; what is compared is the sampler around it."""
    return np.asarray(0.8 * np.tanh(sample) + 0.3 * np.cos(timestep / 300), dtype=np.float32)


def theirs(name: str, config: dict, steps: int, strength: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """Timesteps and samples on diffusers' way, as its pipelines go it."""
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(steps)
    skipped = (steps - min(int(steps * strength), steps)) * scheduler.order
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    def draw() -> torch.Tensor:
        return torch.cat([torch.randn((1, *SHAPE[1:]), generator=generator) for generator in generators])

    timesteps = scheduler.timesteps[skipped:]
    if strength < 1:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)
        clean = torch.linspace(-1, 1, 128).reshape(SHAPE)
        sample = scheduler.add_noise(clean, draw(), timesteps[:1].repeat(2))
    else:
        sample = draw() * scheduler.init_noise_sigma
    extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    samples = [sample.numpy()]
    for timestep in timesteps:
        output = predicted(scheduler.scale_model_input(sample, timestep).numpy(), float(timestep))
        sample = scheduler.step(torch.from_numpy(output), timestep, sample, **extra).prev_sample
        samples.append(sample.numpy())
    return timesteps.numpy(), samples


def ours(name: str, config: dict, steps: int, strength: float) -> tuple[np.ndarray, list[np.ndarray]]:
    way = trajectory({"_class_name": name, **config}, steps, strength)
    generators = [Generator(seed) for seed in (3, 4)]

    def draw() -> np.ndarray:
        return np.concatenate([generator.normal((1, *SHAPE[1:])) for generator in generators])

    if strength < 1:
        sample = way.noisy(np.linspace(-1, 1, 128, dtype=np.float32).reshape(SHAPE), draw())
    else:
        sample = draw() * way.noise_scale
    samples = [sample]
    for timestep in way.timesteps:
        sample = way.step(predicted(way.scaled(sample), float(timestep)), sample, draw)
        samples.append(sample)
    return way.timesteps, samples


@pytest.mark.parametrize(
    ("steps", "strength"), [(1, 1.0), (2, 1.0), (2, 0.6), (5, 1.0), (5, 0.6), (20, 1.0), (20, 0.6)]
)
@pytest.mark.parametrize(("name", "config"), CASES)
def test_the_whole_way_is_diffusers(name: str, config: dict, steps: int, strength: float) -> None:
    runge_kutta = name == PNDM and "skip_prk_steps" not in config
    if steps > config.get("num_train_timesteps", 1000) or (runge_kutta and (steps < 4 or strength < 1)):
        pytest.skip("refused")
    timesteps, expected = theirs(name, config, steps, strength)
    visited, found = ours(name, config, steps, strength)
    np.testing.assert_allclose(visited, timesteps, rtol=1e-6)
    assert len(found) == len(expected)
    rounding = 2 * np.finfo(np.float32).eps * max(np.abs(other).max() for other in expected)
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5 * np.abs(other).max() + rounding)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_stock_configuration_is_read_as_it_is_saved(name: str, tmp_path) -> None:
    stock = getattr(diffusers, name)()
    stock.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    own = {key: value for key, value in stock.config.items() if not key.startswith("_")}
    np.testing.assert_array_equal(trajectory(config, 5).timesteps, ours(name, own, 5, 1.0)[0])


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": PNDM, "skip_prk_steps": True, **STABLE},  # as in folders of 2022, with no spacing
        {"_class_name": PNDM, "skip_prk_steps": True, **STABLE, **LEADING, **V},
        {"_class_name": DDIM, "clip_sample": True, **STABLE},
        {"_class_name": EULER, **STABLE, **KARRAS, **TRAILING},
        {"_class_name": UNIPC, "solver_type": "bh1", "final_sigmas_type": "sigma_min", **STABLE},
        {"_class_name": DPM, "solver_type": "heun", "lower_order_final": False, **STABLE},
        {"_class_name": DDIM, **ZERO_SNR},
    ],
)
def test_another_scheduler_is_the_one_that_diffusers_makes(config: dict, name: str) -> None:
    current = getattr(diffusers, config["_class_name"]).from_config(config)
    written = json.loads(json.dumps(scheduler_config(current)))
    ours = with_scheduler(written, name)
    if config.get("rescale_betas_zero_snr") and name in (PNDM, HEUN, LMS):
        for other in (lambda: check_scheduler(ours), lambda: scheduler_named(name, current)):
            with pytest.raises(InputError, match=r"give (one of|--scheduler with one of) DDIM"):
                other()
        return
    theirs = scheduler_named(name, current)
    assert type(theirs).__name__ == name
    for option in SCHEDULERS[name].defaults.keys() & theirs.config.keys():
        names = SCHEDULERS[name].renamed.get(option, {})
        mine = ours.get(option, SCHEDULERS[name].defaults[option])
        mine = names.get(mine, mine) if isinstance(mine, str) else mine
        assert (list(mine) if isinstance(mine, tuple) else mine) == theirs.config[option], option


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "DEISMultistepScheduler"}, "scheduler DEISMultistepScheduler is not known here"),
        ({}, "scheduler None is not known here"),
        ({"_class_name": DDIM, "thresholding": True}, "DDIMScheduler has thresholding True, and only False is known"),
        ({"_class_name": DDIM, "beta_schedule": "sigmoid"}, "DDIMScheduler has beta_schedule sigmoid"),
        ({"_class_name": DDIM, "timestep_spacing": "odd"}, "DDIMScheduler has timestep_spacing odd"),
        ({"_class_name": DPM, "timestep_spacing": "odd"}, "DPMSolverMultistepScheduler has timestep_spacing odd"),
        ({"_class_name": PNDM, "prediction_type": "sample"}, "PNDMScheduler has prediction_type sample"),
        ({"_class_name": EULER, "use_beta_sigmas": True}, "EulerDiscreteScheduler has use_beta_sigmas True"),
        (
            {"_class_name": HEUN} | KARRAS | EXPONENTIAL,
            "use_karras_sigmas and use_exponential_sigmas, which",
        ),
        ({"_class_name": DPM, "algorithm_type": "dpmsolver"}, "algorithm_type dpmsolver"),
        ({"_class_name": DPM, "solver_order": 3} | NOISY, "solver_order 3 with algorithm_type sde-dpmsolver"),
        ({"_class_name": UNIPC, "predict_x0": False}, "predict_x0 False"),
        ({"_class_name": UNIPC, "lower_order_final": False}, "whose last step has no answer"),
        ({"_class_name": UNIPC} | KARRAS | TO_SIGMA_MIN, "whose last step goes nowhere"),
        ({"_class_name": DPM, "solver_order": 3} | KARRAS | TO_SIGMA_MIN, "whose last step goes nowhere"),
        ({"_class_name": DDIM, "rescale_betas_zero_snr": True}, "DDIMScheduler predicts noise"),
        ({"_class_name": LMS, "rescale_betas_zero_snr": True}, "LMSDiscreteScheduler has no rescale_betas_zero_snr"),
    ],
)
def test_what_is_not_known_is_refused(config: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        trajectory(config, 5)


def test_a_refusal_names_schedulers_that_work() -> None:
    config = {"_class_name": DDIM, "thresholding": True, **STABLE}
    with pytest.raises(InputError) as caught:
        check_scheduler(config)
    named = str(caught.value).partition("; give --scheduler with one of ")[2].split(", ")
    assert named == [PNDM, EULER, ANCESTRAL, HEUN, LMS]
    for name in named:
        trajectory(with_scheduler(config, name), 5)
    with pytest.raises(InputError, match="no scheduler here can do it; use torch"):
        check_scheduler(config | {"beta_schedule": "sigmoid"})


@pytest.mark.parametrize(
    ("steps", "strength", "said"), [(3, 1.0, "steps is 3, and PNDMScheduler without"), (5, 0.6, "from noise alone")]
)
def test_runge_and_kutta_need_four_steps_from_noise(steps: int, strength: float, said: str) -> None:
    with pytest.raises(InputError, match=said):
        trajectory({"_class_name": PNDM}, steps, strength)


@pytest.mark.parametrize(("steps", "strength"), [(0, 1.0), (1001, 1.0), (5, 0.0), (5, 1.5), (5, 0.1)])
def test_ways_without_steps_are_refused(steps: int, strength: float) -> None:
    with pytest.raises(InputError, match=str(steps if strength == 1 else strength)):
        trajectory({"_class_name": "DDIMScheduler"}, steps, strength)
