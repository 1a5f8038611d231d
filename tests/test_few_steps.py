"""Latent-consistency distillation: the objective by hand, and `bksdm lcm` end to end."""

import copy
import json
from inspect import signature
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler
from safetensors.torch import load_file
from torch import Tensor

from bksdm.common.errors import InputError
from bksdm.common.randomness import Draws
from bksdm.distill.conditions import Conditions, repeated, without_caption
from bksdm.distill.consistency import Consistency, few_step_scheduler
from bksdm.distill.consistency_functions import ToPicture
from bksdm.distill.few_steps import lcm
from bksdm.distill.losses import pseudo_huber
from bksdm.families.noise import NoiseSchedule
from bksdm.families.recipe import load_recipe
from bksdm.models.drawing import drawing
from bksdm.options.distill import LcmOptions
from bksdm.pruning.inherit import prune_unet
from bksdm.pruning.told import read_recipe
from bksdm.runtime.defaults import Defaults
from fast import one_kind, slow
from tiny_models import (
    PICTURE,
    V1_UNET,
    XL_SHALLOW_UNET,
    asked,
    build_pipeline,
    build_xl_pipeline,
    random_inputs,
    random_latents,
    random_told,
)
from verbs import Run, read_lines, told

pytest_plugins = ["verbs_fixtures"]

UNET = Path("student", "unet", "diffusion_pytorch_model.safetensors")


def objective(
    pipeline: DiffusionPipeline, guidance: float = 3.0, average: dict[str, Tensor] | None = None
) -> Consistency:
    """One for the small student of the pipeline."""
    teacher = copy.deepcopy(pipeline.unet)
    student, _ = prune_unet(teacher, load_recipe("small"))
    conditions = Conditions.of(pipeline)
    schedule = NoiseSchedule.from_scheduler(pipeline.scheduler)
    return Consistency(
        student.train(),
        teacher,
        conditions,
        ToPicture(schedule, few_step_scheduler(pipeline.scheduler, 50)),
        without_caption(pipeline, conditions),
        guidance=guidance,
        average=average,
    )


def batch(made: Consistency, count: int = 2) -> dict[str, Tensor]:
    return random_latents(count) | random_told(made.teacher.config, count)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction", "xl"])
def pipeline(request: pytest.FixtureRequest) -> DiffusionPipeline:
    return build_xl_pipeline(XL_SHALLOW_UNET) if request.param == "xl" else build_pipeline(V1_UNET, request.param)


# The objective


def test_the_grid_is_the_schedulers(pipeline: DiffusionPipeline) -> None:
    made = objective(pipeline)
    scheduler = few_step_scheduler(pipeline.scheduler, 50)
    scheduler.set_timesteps(50)
    assert made.consistent.grid.tolist() == sorted(scheduler.timesteps.tolist())


def test_without_noise_the_latents_stay_as_they_are(pipeline: DiffusionPipeline) -> None:
    latents, _, _ = random_inputs()
    answer = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    zeros = torch.zeros(2).long()
    assert torch.allclose(objective(pipeline).consistent(latents, zeros, answer, zeros), latents, atol=1e-6)


def test_late_timesteps_take_the_clean_latents_that_the_scheduler_takes(pipeline: DiffusionPipeline) -> None:
    made = objective(pipeline)
    latents, _, _ = random_inputs()
    answer = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    scheduler = few_step_scheduler(pipeline.scheduler, 50)
    scheduler.set_timesteps(4)
    timestep = scheduler.timesteps[1]
    stepped = scheduler.step(answer, timestep, latents, generator=torch.Generator().manual_seed(0))
    got = made.consistent(latents, timestep.repeat(2), answer, torch.zeros(2).long())
    assert torch.allclose(got, stepped.denoised, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("index", [0, 30, slow(1), slow(49)])
def test_the_teachers_step_is_that_of_ddim_under_guidance(pipeline: DiffusionPipeline, index: int) -> None:
    made = objective(pipeline, guidance=3.0)
    latents, told = random_inputs()[0], random_told(made.teacher.config)
    timestep = made.consistent.grid[index]
    earlier, before = made.solve(latents, timestep.repeat(2), told)

    empty = told | repeated(without_caption(pipeline, made.conditions), 2)
    with torch.no_grad():
        captioned, free = (asked(made.teacher, latents, timestep, given) for given in (told, empty))
    ddim = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=False, clip_sample=False)
    ddim.set_timesteps(50)
    wanted = ddim.step(free + 3.0 * (captioned - free), int(timestep), latents).prev_sample
    assert torch.allclose(earlier, wanted, rtol=1e-4, atol=1e-4)
    assert before.tolist() == 2 * [max(0, int(timestep) - 20)]


def test_the_loss_is_the_distance_to_the_averaged_student_one_timestep_earlier(
    pipeline: DiffusionPipeline,
) -> None:
    other, _ = prune_unet(pipeline.unet, load_recipe("small"))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    made = objective(pipeline, average={name: p.detach() for name, p in other.named_parameters()})
    draws, given = Draws(0, "test"), batch(made)
    loss = made(given, Draws(0, "test"))["loss"]

    f, latents = made.consistent, made.conditions.latents(given, draws)
    noisy = f.noise_schedule.corrupt(latents, draws, f.grid)
    with torch.no_grad():
        told = made.conditions.told(given)
        earlier, before = made.solve(noisy.latents, noisy.timesteps, told)
        target = f(earlier, before, asked(other, earlier, before, told), torch.zeros_like(before))
        answer = asked(made.student, noisy.latents, noisy.timesteps, told)
        got = f(noisy.latents, noisy.timesteps, answer, torch.zeros_like(before))
    assert loss.item() == pytest.approx(float(((got - target) ** 2 + 1e-6).sqrt().mean() - 1e-3), rel=1e-4)


def test_every_parameter_of_the_student_learns_and_none_of_the_teacher(pipeline: DiffusionPipeline) -> None:
    made = objective(pipeline)
    with torch.autocast("cpu", torch.bfloat16):  # which keeps copies of the weights
        loss = made(batch(made), Draws(0, "test"))["loss"]
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in made.student.parameters())
    assert not any(p.requires_grad for p in made.teacher.parameters())


@one_kind
def test_how_samples_are_split_changes_nothing_but_rounding(kind_teacher: DiffusionPipeline) -> None:
    made = objective(kind_teacher)
    whole = batch(made, 4)
    halves = [
        made({name: value[first : first + 2] for name, value in whole.items()}, Draws(0, "test", first))["loss"]
        for first in (0, 2)
    ]
    assert made(whole, Draws(0, "test"))["loss"].item() == pytest.approx(
        sum(half.item() for half in halves) / 2, rel=1e-5
    )


def test_a_pseudo_huber_is_square_near_zero_and_absolute_far_from_it() -> None:
    zero = torch.zeros(1, 1, 1, 1)
    assert float(pseudo_huber(zero + 1e-4, zero, c=1.0)) == pytest.approx(0.5e-8, rel=0.1, abs=6e-8)
    assert float(pseudo_huber(zero + 5, zero)) == pytest.approx(5, rel=1e-3)


# The verb


def teach(teacher: Path, student: Path, data: Path, out: Path, **changes: object) -> list[dict[str, float]]:
    """The records of a short run."""
    settings: dict[str, object] = {"steps": 2, "batch_size": 2, "lr": 1e-3, "precision": "fp32"}
    settings |= {"teacher_precision": "fp32", "log_every": 1, "sample_every": 0, "checkpoint_every": 1}
    lcm(LcmOptions(str(teacher), str(student), str(data), str(out), **settings | changes))
    return read_lines(out / "metrics.jsonl")


# What is taught by this verb, and carried on, is any U-Net.
one_unet = pytest.mark.parametrize("kind", ["exported", slow("v1"), slow("shallow_xl", id="xl")], indirect=True)


@pytest.fixture(scope="module")
def finished(kind_folder: Path, kind_student: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps with sample grids. Not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    (one_prompt := out.parent / "prompt.txt").write_text("red apple\n")
    teach(kind_folder, kind_student, pictures, out, sample_every=2, sample_prompts=str(one_prompt))
    return out


@one_unet
def test_the_student_is_a_stock_pipeline_that_draws_in_four_steps(finished: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(finished / "student")
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.scheduler, LCMScheduler)
    assert pipeline.scheduler.config.original_inference_steps == 50
    config = json.loads((finished / "student" / "scheduler" / "scheduler_config.json").read_text())
    assert config.keys() - {"_class_name", "_diffusers_version"} <= signature(LCMScheduler).parameters.keys()
    for steps in (1, 4):
        rng = torch.Generator().manual_seed(0)
        pixels = pipeline("red", num_inference_steps=steps, guidance_scale=1.0, generator=rng, output_type="np").images
        assert pixels.shape == (1, PICTURE, PICTURE, 3)
        assert pixels.std() > 0


@one_unet
def test_the_student_says_that_it_draws_in_four_steps_without_guidance(
    done: Run, finished: Path, tmp_path: Path
) -> None:
    assert drawing(finished / "student") == Defaults(4, 1.0)
    done("generate", finished / "student", "--prompt", "red", "--out", tmp_path / "o")
    made = told(tmp_path / "o" / "00000.png")
    assert (made["steps"], made["guidance"], made["scheduler"]) == (4, 1.0, "LCMScheduler")


@one_unet
def test_a_run_leaves_its_losses_its_page_its_recipe_and_a_card(finished: Path) -> None:
    assert [line["step"] for line in read_lines(finished / "metrics.jsonl")] == [1, 2]
    assert "retraining, step 2 of 2" in (finished / "report.html").read_text()
    assert sorted(path.name for path in (finished / "samples").iterdir()) == ["step-00000000.png", "step-00000002.png"]
    assert read_recipe(finished / "student").name == "small"
    card = (finished / "student" / "README.md").read_text()
    assert 'pipeline(prompt="...", num_inference_steps=4, guidance_scale=1.0)' in card
    assert "- guidance: 7.5" in card


@one_unet
def test_the_student_has_the_averaged_weights_and_the_rest_is_the_teachers(finished: Path, kind_folder: Path) -> None:
    held = load_file(sorted((finished / "checkpoints").iterdir())[-1] / "tensors.safetensors")
    assert all(torch.equal(value, held[f"ema.{name}"]) for name, value in load_file(finished / UNET).items())
    vae = Path("vae", "diffusion_pytorch_model.safetensors")
    assert (finished / "student" / vae).read_bytes() == (kind_folder / vae).read_bytes()


@one_unet
def test_a_resumed_run_ends_with_the_same_bits(
    kind_folder: Path, kind_student: Path, pictures: Path, finished: Path, tmp_path: Path
) -> None:
    (prompts := tmp_path / "prompt.txt").write_text("red apple\n")
    teach(kind_folder, kind_student, pictures, tmp_path / "run", steps=1, sample_prompts=str(prompts))
    teach(kind_folder, kind_student, pictures, tmp_path / "run", sample_prompts=str(prompts))
    assert (tmp_path / "run" / UNET).read_bytes() == (finished / UNET).read_bytes()


def test_without_an_average_the_target_is_the_students_own(
    v1_folder: Path, v1_student: Path, pictures: Path, tmp_path: Path
) -> None:
    options = {"steps": 2, "ema_decay": 0.0, "guidance": 1.0, "loss": "l2"}
    records = teach(v1_folder, v1_student, pictures, tmp_path / "run", **options)
    held = load_file(tmp_path / "run" / "checkpoints" / "step-00000002" / "tensors.safetensors")
    assert all(torch.equal(value, held[f"model.{name}"]) for name, value in load_file(tmp_path / "run" / UNET).items())
    assert all(record["loss"] > 0 for record in records)


def test_a_student_that_keeps_every_block_learns_too(
    done: Run, v1_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "whole.yaml"
    recipe.write_text("name: whole\n")
    done("prune", v1_folder, "--recipe", recipe, "--out", tmp_path / "whole")
    words = ["--steps", 1, "--batch_size", 1, "--sample_every", 0, "--json"]
    said = done(
        "lcm", v1_folder, "--student", tmp_path / "whole", "--data", pictures, "--out", tmp_path / "run", *words
    )
    assert said.json == {"student": str(tmp_path / "run" / "student")}
    assert load_file(tmp_path / "run" / UNET).keys() == load_file(v1_folder / "unet" / UNET.name).keys()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("guidance", 0.0, "guidance is 0.0; give 1 for none, or more"),
        ("guidance", float("nan"), "guidance is nan"),
        ("solver_steps", 30, "solver_steps is 30, which does not divide the teacher's 1000 timesteps"),
        ("solver_steps", 0, "solver_steps is 0; give at least 1"),
        ("sample_steps", 51, "sample_steps is 51; give at most 50"),
        ("steps", 0, "steps is 0; give at least 1"),
        ("ema_decay", 1.0, "ema_decay is 1.0"),
        ("lr", -1.0, "lr is -1.0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    v1_folder: Path, v1_student: Path, pictures: Path, tmp_path: Path, option: str, value: float, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        teach(v1_folder, v1_student, pictures, tmp_path / "run", **{option: value})
    assert not (tmp_path / "run").exists()


def test_a_run_with_other_options_is_not_gone_on_with(
    v1_folder: Path, v1_student: Path, pictures: Path, tmp_path: Path
) -> None:
    teach(v1_folder, v1_student, pictures, tmp_path / "run", steps=1)
    with pytest.raises(InputError, match=r"guidance: 7\.5 there, 2\.0 now"):
        teach(v1_folder, v1_student, pictures, tmp_path / "run", guidance=2.0)
