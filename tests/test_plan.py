"""`distill --plan`: parameters, work and passes from configs alone, and memory near what a step really takes."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from bksdm.common.errors import InputError
from bksdm.data.prepare import prepare
from bksdm.distill.plan import Memory, Plan
from bksdm.distill.run import foresee
from bksdm.options.data import PrepareOptions
from bksdm.options.distill import DistillOptions
from followed import followed
from tiny_models import LATENT, asked, random_told
from verbs import Run

pytest_plugins = ["verbs_fixtures"]

# A larger model has many layers to follow.
kinds = pytest.mark.parametrize(
    "kind", ["exported", pytest.param("shallow_xl", id="xl", marks=pytest.mark.slow)], indirect=True
)


def planned(teacher: Path, student: Path, data: Path, **changes: object) -> Plan:
    settings: dict[str, object] = {"steps": 10, "batch_size": 1, "accumulation": 8, "precision": "fp32"}
    settings |= {"teacher_precision": "fp32", "peak_tflops": 1.0} | changes
    return foresee(DistillOptions(str(teacher), str(student), str(data), "nowhere", **settings))


@pytest.fixture(scope="module")
def plan(v1_folder: Path, v1_student: Path, pictures: Path) -> Plan:
    return planned(v1_folder, v1_student, pictures)


@pytest.fixture(scope="module")
def kind_plan(kind_folder: Path, kind_student: Path, pictures: Path) -> Plan:
    return planned(kind_folder, kind_student, pictures)


def params(folder: Path) -> int:
    return UNet2DConditionModel.from_pretrained(folder / "unet").num_parameters()


@kinds
def test_parameters_steps_and_passes(kind_plan: Plan, kind_folder: Path, kind_student: Path) -> None:
    assert (kind_plan.teacher_params, kind_plan.student_params) == (params(kind_folder), params(kind_student))
    assert (kind_plan.pictures, kind_plan.samples_per_step, kind_plan.steps) == (8, 8, 10)
    assert kind_plan.passes == 10.0


@kinds
def test_the_work_is_a_forward_pass_of_the_teacher_and_three_of_the_student(
    kind_plan: Plan, kind_folder: Path, kind_student: Path
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def forward(folder: Path) -> int:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        latents, timesteps = torch.zeros(1, 4, LATENT, LATENT), torch.zeros(1)
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            asked(unet, latents, timesteps, random_told(unet.config, 1))
        return flops.get_total_flops()

    wanted = kind_plan.samples_per_step * (forward(kind_folder) + 3 * forward(kind_student))
    assert kind_plan.flops_per_step == pytest.approx(wanted, rel=0.03)  # the first layer needs no gradient of its input


@pytest.mark.slow
def test_what_is_compared_under_guidance_passes_twice(
    plan: Plan, v1_folder: Path, v1_student: Path, pictures: Path
) -> None:
    choices = {"guided_output": 3.0, "random_conditioning": 5.0, "mask_features": 2.0, "taps": "both"}
    assert planned(v1_folder, v1_student, pictures, **choices).flops_per_step == 2 * plan.flops_per_step


@pytest.mark.slow
def test_a_run_with_every_choice_is_measured(v1_folder: Path, v1_student: Path, pictures: Path) -> None:
    choices = {"guided_output": 3.0, "random_conditioning": 5.0, "normalize_features": True, "feature_decay": True}
    assert planned(v1_folder, v1_student, pictures, peak_tflops=None, **choices).seconds_per_step > 0


@pytest.mark.slow
def test_what_is_held_are_weights_average_and_moments(
    plan: Plan, v1_folder: Path, v1_student: Path, pictures: Path, v1_teacher: object
) -> None:
    frozen = sum(p.numel() for name in ("vae", "text_encoder") for p in getattr(v1_teacher, name).parameters())
    assert plan.chosen.held == 4 * (plan.teacher_params + frozen + 4 * plan.student_params)
    without = planned(v1_folder, v1_student, pictures, ema_decay=0.0)
    assert plan.chosen.held - without.chosen.held == 4 * plan.student_params
    low = planned(v1_folder, v1_student, pictures, teacher_precision="bf16")
    assert plan.chosen.held - low.chosen.held == 2 * plan.teacher_params


def by_case(plan: Plan) -> dict[tuple[int, bool], Memory]:
    return {(row.batch_size, row.gradient_checkpointing): row for row in plan.memory}


@pytest.mark.slow
def test_memory_grows_with_the_batch_and_shrinks_with_checkpointing(
    v1_folder: Path, v1_student: Path, pictures: Path
) -> None:
    plan = planned(v1_folder, v1_student, pictures, batch_size=32)
    rows = by_case(plan)
    assert {size for size, _ in rows} == {1, 8, 16, 32}
    assert rows[1, False].working < rows[8, False].working < rows[16, False].working < rows[32, False].working
    assert rows[32, True].working < 0.8 * rows[32, False].working
    assert rows[32, False] == plan.chosen
    assert min(row.working for row in plan.memory) > 4 * plan.student_params, "gradients are there at the end"


def test_a_scheduler_that_diffusers_does_not_have_is_named(
    v1_folder: Path, v1_student: Path, pictures: Path, tmp_path: Path
) -> None:
    teacher = Path(shutil.copytree(v1_folder, tmp_path / "teacher"))
    (teacher / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "SomeScheduler"}')
    with pytest.raises(
        InputError, match=f"{teacher} names the scheduler SomeScheduler, which diffusers .* does not have"
    ):
        planned(teacher, v1_student, pictures)


@kinds
def test_the_working_memory_is_what_a_real_step_allocates(
    kind_plan: Plan, kind_folder: Path, kind_student: Path, pictures: Path
) -> None:
    """The same step on real tensors, whose bytes are followed in the same way."""
    options = DistillOptions(str(kind_folder), str(kind_student), str(pictures), "nowhere", precision="fp32")
    assert kind_plan.chosen.working == pytest.approx(followed(options), rel=0.02)


@pytest.mark.slow
def test_pictures_that_do_not_fit_in_memory_add_the_vae(
    plan: Plan, v1_folder: Path, v1_student: Path, pictures: Path
) -> None:
    online = planned(v1_folder, v1_student, pictures, cache_gb=0.0)
    assert online.flops_per_step > 1.05 * plan.flops_per_step


@pytest.mark.slow
def test_prepared_latents_are_planned_too(plan: Plan, v1_folder: Path, v1_student: Path, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    prepare(PrepareOptions("emoji/heldout", str(v1_folder), str(out), text_embeddings=True, workers=0))
    found = planned(v1_folder, v1_student, out)
    assert found.pictures == 75
    assert found.flops_per_step == plan.flops_per_step


@pytest.mark.slow
def test_time_from_a_stated_peak(plan: Plan, v1_folder: Path, v1_student: Path, pictures: Path) -> None:
    assert plan.seconds_per_step == pytest.approx(plan.flops_per_step / 0.4e12)
    assert plan.seconds == pytest.approx(10 * plan.seconds_per_step)
    faster = planned(v1_folder, v1_student, pictures, peak_tflops=2.0)
    assert faster.seconds_per_step == pytest.approx(plan.seconds_per_step / 2)
    assert "40% of 1 TFLOP/s" in plan.text()


@kinds
@pytest.mark.slow
def test_time_and_memory_are_measured_without_a_stated_peak(
    kind_folder: Path, kind_student: Path, pictures: Path
) -> None:
    found = planned(kind_folder, kind_student, pictures, peak_tflops=None)
    assert found.seconds_per_step > 0
    assert found.measured_memory > found.chosen.working
    assert "s a step" in found.text()


@pytest.mark.slow
def test_what_does_not_fit_is_not_measured(
    v1_folder: Path, v1_student: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bksdm.distill.plan._device", lambda device: ("a small device", 2**20))
    found = planned(v1_folder, v1_student, pictures, peak_tflops=None)
    assert found.seconds_per_step is None
    assert "not measured: it would not fit" in found.text()
    assert found.text().count("(!)") == len(found.memory)


@pytest.mark.slow
def test_the_command_line_starts_nothing(run: Run, v1_folder: Path, v1_student: Path, pictures: Path) -> None:
    words = ["distill", v1_folder, "--student", v1_student, "--data", pictures, "--out", "nowhere", "--plan"]
    outcome = run(*words, "--peak_tflops", 100, "--json", "--batch_size", 1)
    assert outcome.code == 0
    assert outcome.json["chosen"]["batch_size"] == 1
    assert outcome.json["chosen"]["total"] == sum(outcome.json["chosen"][k] for k in ("held", "working", "overhead"))
    assert not Path("nowhere").exists()
    text = run(*words, "--peak_tflops", 100, "--batch_size", 1).out
    for word in ("teacher", "student", "TFLOP", "with --gradient_checkpointing", "50,000 steps", "in all"):
        assert word in text


@pytest.mark.slow
def test_configs_are_enough(v1_folder: Path, v1_student: Path, pictures: Path, tmp_path: Path, plan: Plan) -> None:
    for source, name in ((v1_folder, "teacher"), (v1_student, "student")):
        for part in ("unet", "vae", "text_encoder"):
            (tmp_path / name / part).mkdir(parents=True)
            (tmp_path / name / part / "config.json").write_bytes((source / part / "config.json").read_bytes())
    (tmp_path / "student" / "recipe.yaml").write_bytes((v1_student / "recipe.yaml").read_bytes())
    found = planned(tmp_path / "teacher", tmp_path / "student", pictures)
    first, second = (dataclasses.asdict(made) | {"memory": (), "chosen": None} for made in (found, plan))
    assert first == second
    assert found.chosen.total == pytest.approx(plan.chosen.total, rel=1e-3)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_peak_of_nothing_is_refused(v1_folder: Path, v1_student: Path, pictures: Path, value: float) -> None:
    with pytest.raises(InputError, match=f"peak_tflops is {value}; give more than 0"):
        planned(v1_folder, v1_student, pictures, peak_tflops=value)


def test_a_missing_config_is_named(v1_folder: Path, v1_student: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    config = json.loads((v1_folder / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"vae.config.json is not readable JSON"):
        planned(tmp_path, v1_student, pictures)
