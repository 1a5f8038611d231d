"""The samplers of the torch-free runner go diffusers' way, number for number."""

import json

import diffusers
import numpy as np
import pytest
import torch

from bksdm.errors import InputError
from bksdm.runtime.noise import Generator
from bksdm.runtime.schedulers import SCHEDULERS, trajectory

SHAPE = (2, 4, 4, 4)
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}
CASES = [
    ("DDIMScheduler", {}),
    ("DDIMScheduler", STABLE | LEADING | {"clip_sample": False, "set_alpha_to_one": False}),
    ("DDIMScheduler", STABLE | TRAILING | V | {"clip_sample": False}),
    ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "linspace", "clip_sample_range": 2.0}),
    ("DDIMScheduler", {"num_train_timesteps": 4, "trained_betas": [0.01, 0.1, 0.2, 0.3], "clip_sample": False}),
    ("PNDMScheduler", STABLE | LEADING | {"skip_prk_steps": True}),
    ("PNDMScheduler", STABLE | TRAILING | V | {"skip_prk_steps": True, "set_alpha_to_one": True}),
    ("PNDMScheduler", {"skip_prk_steps": True, "timestep_spacing": "linspace"}),
    ("LCMScheduler", {}),
    ("LCMScheduler", V | {"original_inference_steps": 100, "set_alpha_to_one": False}),
    ("LCMScheduler", {"clip_sample": True, "timestep_scaling": 5.0}),
    ("EulerDiscreteScheduler", STABLE),
    ("EulerDiscreteScheduler", STABLE | LEADING),
    ("EulerDiscreteScheduler", STABLE | TRAILING | V | {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", STABLE),
    ("DPMSolverMultistepScheduler", STABLE | LEADING | V),
    ("DPMSolverMultistepScheduler", STABLE | TRAILING | {"solver_order": 1}),
    ("DPMSolverMultistepScheduler", STABLE | {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("DPMSolverMultistepScheduler", STABLE | {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
    ("DPMSolverMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
]


def predicted(sample: np.ndarray, timestep: float) -> np.ndarray:
    """A smooth stand-in for a U-Net, of both of its arguments; what is compared is the sampler around it."""
    return np.asarray(0.8 * np.tanh(sample) + 0.3 * np.cos(timestep / 300), dtype=np.float32)


def theirs(name: str, config: dict, steps: int, strength: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """Timesteps and samples on diffusers' way, as its pipelines go it."""
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(steps)
    skipped = steps - min(int(steps * strength), steps)
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
    extra = {"generator": generators} if name == "LCMScheduler" else {}
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


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize(("name", "config"), CASES)
def test_the_whole_way_is_diffusers(name: str, config: dict, steps: int, strength: float) -> None:
    if steps > config.get("num_train_timesteps", 1000) or int(steps * strength) < 1:
        pytest.skip("no such way")
    timesteps, expected = theirs(name, config, steps, strength)
    visited, found = ours(name, config, steps, strength)
    np.testing.assert_allclose(visited, timesteps, rtol=1e-6)
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_stock_configuration_is_read_as_it_is_saved(name: str, tmp_path) -> None:
    stock = getattr(diffusers, name)(**({"skip_prk_steps": True} if name == "PNDMScheduler" else {}))
    stock.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    own = {key: value for key, value in stock.config.items() if not key.startswith("_")}
    np.testing.assert_array_equal(trajectory(config, 5).timesteps, ours(name, own, 5, 1.0)[0])


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"_class_name": "UniPCMultistepScheduler"}, "UniPCMultistepScheduler"),
        ({}, "scheduler None"),
        ({"_class_name": "PNDMScheduler"}, "skip_prk_steps False"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding True"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "sample"}, "prediction_type sample"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "sigmoid"}, "'sigmoid'"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "odd"}, "'odd'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "odd"}, "'odd'"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "use_karras_sigmas True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "sde-dpmsolver"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "solver_order 3"),
    ],
)
def test_what_is_not_known_is_refused(config: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        trajectory(config, 5)


@pytest.mark.parametrize(("steps", "strength"), [(0, 1.0), (1001, 1.0), (5, 0.0), (5, 1.5), (5, 0.1)])
def test_ways_without_steps_are_refused(steps: int, strength: float) -> None:
    with pytest.raises(InputError, match=str(steps if strength == 1 else strength)):
        trajectory({"_class_name": "DDIMScheduler"}, steps, strength)
