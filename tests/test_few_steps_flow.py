"""Consistency distillation by flow matching: the objective by stock schedulers, and `bksdm lcm` end to end."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from bksdm.common.randomness import Draws
from bksdm.distill.conditions import Conditions, without_caption
from bksdm.distill.consistency import Consistency, unmoving_scheduler
from bksdm.distill.consistency_functions import ToPhaseEnd, phase_ends
from bksdm.distill.losses import pseudo_huber
from bksdm.families import family_of_pipeline
from bksdm.families.recipe import load_recipe
from bksdm.models.drawing import drawing
from bksdm.pruning.inherit import prune_unet
from bksdm.runtime.defaults import SAMPLING_FILE, Defaults
from fast import one_flow
from tiny_flow import SIDE, inputs
from verbs import Run, done_here, read_lines

pytest_plugins = ["verbs_fixtures", "flow_fixtures"]

GRID, PHASES = 10, 4


@pytest.fixture(scope="module")
def f(flow_teacher: DiffusionPipeline) -> ToPhaseEnd:
    schedule = family_of_pipeline(flow_teacher).noise_schedule(flow_teacher.scheduler)
    size = inputs(flow_teacher)[0].shape[2:]
    return ToPhaseEnd(schedule, schedule.grid(GRID, *size), torch.tensor(phase_ends(GRID, PHASES)))


@pytest.fixture(scope="module")
def scheduler(flow_teacher: DiffusionPipeline, f: ToPhaseEnd) -> FlowMatchEulerDiscreteScheduler:
    """What a student is saved with."""
    return unmoving_scheduler(flow_teacher.scheduler, f.noise_schedule.shift(*inputs(flow_teacher)[0].shape[2:]))


def objective(teacher: DiffusionPipeline, f: ToPhaseEnd, guidance: float) -> Consistency:
    student, _ = prune_unet(teacher.transformer, load_recipe("half"))
    conditions = Conditions.of(teacher)
    return Consistency(
        student.train(), teacher.transformer, conditions, f, without_caption(teacher, conditions), guidance=guidance
    )


# The objective


def test_phases_are_as_even_as_can_be() -> None:
    assert phase_ends(10, 4) == [0, 2, 5, 8, 10]
    assert phase_ends(48, 4) == [0, 12, 24, 36, 48]
    assert phase_ends(3, 1) == [0, 3]


def test_a_jump_is_a_step_of_the_students_scheduler(f: ToPhaseEnd, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
    ends = phase_ends(GRID, PHASES)
    scheduler.set_timesteps(sigmas=[end / GRID for end in reversed(ends[1:])])
    latents, answer = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for number, timestep in enumerate(scheduler.timesteps):
        known = f.grid[(f.grid - timestep).abs().argmin()]
        assert float(known) == pytest.approx(float(timestep), rel=1e-6)
        until = f.until(known.repeat(2))
        assert float(until[0]) == pytest.approx(1000 * float(scheduler.sigmas[number + 1]), abs=1e-3)
        wanted = scheduler.step(answer, timestep, latents, return_dict=False)[0]
        assert torch.allclose(f(latents, known.repeat(2), answer, until), wanted, atol=1e-5)


def test_at_the_end_of_its_phase_a_picture_stays_as_it_is(f: ToPhaseEnd) -> None:
    latents, answer = (torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    earlier, until = f.before(f.grid), f.until(f.grid)
    at_end = earlier == until
    assert at_end.tolist() == [number in phase_ends(GRID, PHASES) for number in range(GRID)]
    assert torch.allclose(f(latents, earlier, answer, until)[at_end], latents[at_end], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("number", [0, 4, GRID - 1])
def test_the_teachers_step_is_that_of_its_pipeline_under_guidance(
    flow_teacher: DiffusionPipeline, f: ToPhaseEnd, scheduler: FlowMatchEulerDiscreteScheduler, number: int
) -> None:
    family, config = family_of_pipeline(flow_teacher), flow_teacher.transformer.config
    made = objective(flow_teacher, f, family.second_call(flow_teacher.config, config, 3.0))
    latents, _, told = inputs(flow_teacher)
    timestep = f.grid[number].repeat(2)
    earlier, before = made.solve(latents, timestep, told)

    free = {name: value.expand(2, *value.shape[1:]) for name, value in made._empty.items()}
    captioned, without = (family.answer(flow_teacher.transformer, latents, timestep, given) for given in (told, free))
    guided = {
        "Z-Image": captioned + 3.0 * (captioned - without),  # ZImagePipeline
        "FLUX.2 klein": without + 3.0 * (captioned - without),  # Flux2KleinPipeline
        "Flux.1": captioned,  # FluxPipeline, which tells the network of guidance
    }[family.name]
    scheduler.set_timesteps(sigmas=[(number + 1) / GRID, *([number / GRID] if number else [])])
    wanted = scheduler.step(guided, scheduler.timesteps[0], latents, return_dict=False)[0]
    assert torch.allclose(earlier, wanted, atol=1e-4)
    assert float(before[0]) == pytest.approx(1000 * float(scheduler.sigmas[1]), abs=1e-3)


def test_the_loss_is_the_distance_of_two_jumps(flow_teacher: DiffusionPipeline, f: ToPhaseEnd) -> None:
    made = objective(flow_teacher, f, guidance=2.0)
    family = family_of_pipeline(flow_teacher)
    latents, _, told = inputs(flow_teacher)
    batch = {"latents_mean": latents, "latents_std": torch.zeros_like(latents), **told}
    loss = made(batch, Draws(0, "test"))["loss"]

    draws = Draws(0, "test")
    noisy = f.noise_schedule.corrupt(made.conditions.latents(batch, draws), draws, f.grid)
    until = f.until(noisy.timesteps)

    def jump(start: Tensor, timesteps: Tensor) -> Tensor:
        answer = family.answer(made.student, start, timesteps, told)
        return start + ((until - timesteps) / 1000).view(-1, 1, 1, 1) * answer

    with torch.no_grad():
        got, wanted = jump(noisy.latents, noisy.timesteps), jump(*made.solve(noisy.latents, noisy.timesteps, told))
    assert loss.item() == pytest.approx(float(pseudo_huber(got, wanted)), rel=1e-3)
    loss.backward()
    assert all(p.grad is not None for name, p in made.student.named_parameters() if "layers" in name)


# The verb


@pytest.fixture(scope="module")
def student(flow_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("student") / "half"
    done_here("prune", flow_folder, "--recipe", "half", "--out", out)
    return out


WORDS = "--batch_size 2 --lr 1e-3 --precision fp32 --teacher_precision fp32 --log_every 1 --checkpoint_every 1"


def teach(teacher: Path, student: Path, data: Path, out: Path, *words: object) -> Path:
    done_here(
        "lcm", teacher, "--student", student, "--data", data, "--out", out, "--sample_every", 0, *WORDS.split(), *words
    )
    return out / "student"


@pytest.fixture(scope="module")
def finished(flow_folder: Path, student: Path, flow_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return teach(flow_folder, student, flow_data, tmp_path_factory.mktemp("few") / "run", "--steps", 2)


def test_the_student_says_its_noise_levels_and_is_drawn_with_them(
    done: Run, flow_teacher: DiffusionPipeline, finished: Path, tmp_path: Path
) -> None:
    family = family_of_pipeline(flow_teacher)
    guidance = {"Z-Image": 0.0, "FLUX.2 klein": 1.0, "Flux.1": 3.5}[family.name]
    assert drawing(finished) == Defaults(4, guidance, (1.0, 0.76, 0.5, 0.24))
    values = json.loads((finished / SAMPLING_FILE).read_text())
    stock = DiffusionPipeline.from_pretrained(finished)
    stock.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    wanted = stock(prompt="red apple", height=SIDE, width=SIDE, generator=[rng], **values).images[0]
    shift = family.noise_schedule(flow_teacher.scheduler).shift(*inputs(flow_teacher)[0].shape[2:])
    levels = np.array(values["sigmas"])
    assert stock.scheduler.sigmas[:-1].numpy() == pytest.approx(shift * levels / (1 + (shift - 1) * levels), rel=1e-5)
    assert f"sigmas={values['sigmas']}" in (finished / "README.md").read_text()

    done("generate", finished, "--prompt", "red apple", "--out", tmp_path / "o")
    with Image.open(tmp_path / "o" / "00000.png") as ours:
        assert np.abs(np.asarray(ours, int) - np.asarray(wanted, int)).max() <= 1


def test_other_steps_are_the_pipelines_own(done: Run, finished: Path, tmp_path: Path) -> None:
    assert drawing(finished, steps=7).sigmas is None
    assert drawing(finished, steps=4, guidance=2.0).sigmas == (1.0, 0.76, 0.5, 0.24)
    done("generate", finished, "--prompt", "red apple", "--steps", 2, "--out", tmp_path / "o")


@one_flow
def test_a_run_goes_on_to_the_same_bits(
    flow_folder: Path, student: Path, flow_data: Path, finished: Path, tmp_path: Path
) -> None:
    for steps in (1, 2):
        got = teach(flow_folder, student, flow_data, tmp_path / "run", "--steps", steps)
    name = Path("transformer", "diffusion_pytorch_model.safetensors")
    whole, parts, before = (load_file(folder / name) for folder in (finished, got, student))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(not torch.equal(whole[name], before[name].float()) for name in whole)
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_guidance_that_it_is_not_told_of_in_training_is_refused(
    run: Run, flow_kind: str, flow_folder: Path, student: Path, flow_data: Path, tmp_path: Path
) -> None:
    if flow_kind != "flux":
        pytest.skip("it takes any")
    words = ["--student", student, "--data", flow_data, "--out", tmp_path / "run", "--guidance", 5]
    outcome = run("lcm", flow_folder, *words)
    assert outcome.code == 2
    assert "guidance is 5.0, and models of Flux.1 learn by being told 3.5; give --guidance 3.5" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_never_guided_takes_no_guidance(
    run: Run, flow_kind: str, flow_folder: Path, student: Path, flow_data: Path, tmp_path: Path
) -> None:
    """FLUX.1 schnell, which is told of none, and the FLUX.2 klein that was distilled."""
    if flow_kind == "z":
        pytest.skip("of Flux")
    teacher = Path(shutil.copytree(flow_folder, tmp_path / "teacher"))
    file, said = {
        "flux": (teacher / "transformer" / "config.json", {"guidance_embeds": False}),
        "klein": (teacher / "model_index.json", {"is_distilled": True}),
    }[flow_kind]
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    words = ["--student", student, "--data", flow_data, "--out", tmp_path / "run", "--guidance", 5]
    outcome = run("lcm", teacher, *words)
    assert outcome.code == 2
    assert "guidance is 5.0, and pipelines of this teacher use none; leave it out" in outcome.err
    family = family_of_pipeline(DiffusionPipeline.from_pretrained(flow_folder))
    config = json.loads((teacher / "transformer" / "config.json").read_text())
    assert family.second_call(json.loads((teacher / "model_index.json").read_text()), config, 5.0) == 1.0
