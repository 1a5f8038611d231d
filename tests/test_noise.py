"""The forward process against its formula, for both prediction types."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler, PNDMScheduler

from bksdm.common.errors import InputError
from bksdm.common.randomness import Draws
from bksdm.families.flow import FlowSchedule
from bksdm.families.noise import ForwardProcess, NoiseSchedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BOTH = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])


def schedule(prediction_type: str = "epsilon") -> NoiseSchedule:
    return NoiseSchedule.from_scheduler(PNDMScheduler(**SD, skip_prk_steps=True, prediction_type=prediction_type))


def draws(seed: int = 0, first: int = 0) -> Draws:
    return Draws(seed, "test", first)


def latents(batch: int = 64) -> torch.Tensor:
    return draws(9).normal((batch, 4, 8, 8))


@pytest.mark.parametrize("kind", [PNDMScheduler, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
def test_every_scheduler_of_sd_stands_for_the_same_schedule(kind: type) -> None:
    found = NoiseSchedule.from_scheduler(kind(**SD))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert len(found) == 1000
    assert found.prediction_type == "epsilon"
    assert torch.allclose(found.alphas_cumprod.double(), (1 - betas).cumprod(0), atol=1e-6)


@BOTH
def test_the_prediction_type_is_the_schedulers(prediction_type: str) -> None:
    assert schedule(prediction_type).prediction_type == prediction_type


@pytest.mark.parametrize("prediction_type", ["sample", "flow_prediction"])
def test_another_prediction_type_is_refused(prediction_type: str) -> None:
    scheduler = DPMSolverMultistepScheduler(**SD, prediction_type=prediction_type)
    with pytest.raises(InputError, match=f"'{prediction_type}' cannot be retrained; use epsilon or v_prediction"):
        NoiseSchedule.from_scheduler(scheduler)


def test_a_scheduler_without_betas_is_refused() -> None:
    with pytest.raises(InputError, match="EDMEulerScheduler cannot be retrained by"):
        NoiseSchedule.from_scheduler(EDMEulerScheduler())


def test_a_schedule_that_ends_in_pure_noise_is_taken_over() -> None:
    scheduler = DDIMScheduler(**SD, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    found = NoiseSchedule.from_scheduler(scheduler)
    assert torch.equal(found.alphas_cumprod, scheduler.alphas_cumprod)
    assert float(found.alphas_cumprod[-1]) < 1e-6


@BOTH
def test_noisy_latents_and_target_follow_the_formula(prediction_type: str) -> None:
    clean, noise_schedule = latents().double(), schedule(prediction_type)
    noisy = noise_schedule.corrupt(clean, draws())
    share = noise_schedule.alphas_cumprod.double()[noisy.timesteps].view(-1, 1, 1, 1)
    noise = (noisy.latents - share.sqrt() * clean) / (1 - share).sqrt()
    target = noise if prediction_type == "epsilon" else share.sqrt() * noise - (1 - share).sqrt() * clean
    assert torch.allclose(noisy.target, target, atol=1e-5)
    assert noise.mean().abs() < 0.02
    assert (noise.std() - 1).abs() < 0.02


@BOTH
def test_diffusers_adds_the_same_noise(prediction_type: str) -> None:
    reference = DDPMScheduler(**SD, prediction_type=prediction_type)
    clean, noise_schedule = latents(), schedule(prediction_type)
    noisy, noise = noise_schedule.corrupt(clean, draws()), schedule("epsilon").corrupt(clean, draws()).target
    assert torch.allclose(noisy.latents, reference.add_noise(clean, noise, noisy.timesteps), atol=1e-6)
    wanted = noise if prediction_type == "epsilon" else reference.get_velocity(clean, noise, noisy.timesteps)
    assert torch.allclose(noisy.target, wanted, atol=1e-6)


def test_timesteps_are_whole_and_uniform() -> None:
    timesteps = schedule().corrupt(torch.zeros(10_000, 1, 1, 1), draws()).timesteps
    assert timesteps.dtype == torch.long
    assert (int(timesteps.min()), int(timesteps.max())) == (0, 999)
    assert all(900 < int(count) < 1100 for count in torch.bincount(timesteps // 100))


def test_every_sample_has_a_timestep_and_noise_of_its_own() -> None:
    noisy = schedule().corrupt(torch.zeros(8, 4, 8, 8), draws())
    assert noisy.timesteps.shape == (8,)
    assert len(set(noisy.timesteps.tolist())) > 1
    assert not torch.equal(noisy.target[0], noisy.target[1])


def test_the_noise_is_a_function_of_the_draws() -> None:
    first, again, other = (schedule().corrupt(latents(4), draws(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.timesteps, again.timesteps)
    assert not torch.equal(first.latents, other.latents)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_number_format_is_the_latents(dtype: torch.dtype) -> None:
    noisy = schedule().corrupt(latents(2).to(dtype), draws())
    assert noisy.latents.dtype == noisy.target.dtype == dtype


def test_the_signal_to_noise_ratio() -> None:
    noise_schedule = NoiseSchedule(torch.tensor([0.9, 0.5, 0.2]))
    assert torch.allclose(noise_schedule.snr(torch.tensor([0, 1, 2, 1])), torch.tensor([9.0, 1.0, 0.25, 1.0]))


@pytest.mark.parametrize("process", [schedule(), FlowSchedule(lambda height, width: height / width)])
@pytest.mark.parametrize("count", [1, 3, 10])
def test_parts_have_every_timestep_once_from_the_least_noisy_on(process: ForwardProcess, count: int) -> None:
    parts = process.parts(count, 16, 8)
    every = torch.cat(parts)
    assert len(parts) == count
    assert len(every) == len(process)
    assert (every.diff() > 0).all()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
