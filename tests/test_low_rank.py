"""Retraining by matrices of low rank, and weights that are kept in few bits, over all kinds of models."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from bksdm.common.devices import keep_in, offload
from bksdm.distill.conditions import as_type
from bksdm.families import family_of_pipeline
from bksdm.families.recipe import load_recipe
from bksdm.models.adapters.training import add_lora, every_layer, merged_weights
from bksdm.models.configs import load_denoiser_config
from bksdm.models.pipelines import denoiser
from bksdm.pruning.taps import Features
from fast import slow
from tiny_flow import BUILDS, inputs
from tiny_models import V1_UNET, build_pipeline
from verbs import Run, done_here, read_lines

pytest_plugins = ["verbs_fixtures", "flow_fixtures"]

WORDS = "--batch_size 2 --accumulation 1 --lr 1e-2 --log_every 1 --sample_every 0 --checkpoint_every 1 --ema_decay 0.5"
LORA = "--lora_rank 2 --precision fp32"


def weights(student: Path) -> dict[str, Tensor]:
    (file,) = [file for part in ("transformer", "unet") for file in (student / part).glob("*.safetensors")]
    return load_file(file)


def learn(verb: str, teacher: Path, student: Path, data: Path, out: Path, *words: object) -> Path:
    given = ["--student", student, "--data", data, "--out", out, *WORDS.split(), *words]
    done_here(verb, teacher, *given)
    return out / "student"


@pytest.fixture(scope="module")
def learnt(kind_folder: Path, kind_student: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps. Not to be changed."""
    out = tmp_path_factory.mktemp("low") / "run"
    return learn("distill", kind_folder, kind_student, pictures, out, *LORA.split(), "--steps", 2)


KINDS = pytest.mark.parametrize("kind", [pytest.param("exported", id="sd"), "z"], indirect=True)
ONE_KIND = pytest.mark.parametrize("kind", [pytest.param("exported", id="sd"), slow("z")], indirect=True)


@KINDS
def test_the_student_is_a_stock_one_that_is_changed_by_low_rank(learnt: Path, kind_student: Path) -> None:
    after, before = weights(learnt), weights(kind_student)
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name].float())}
    layers = [name for name, tensor in before.items() if tensor.ndim > 1 and "pad_token" not in name]
    assert changed >= {name for name in layers if "embed" not in name}
    for name in layers:
        change = (after[name] - before[name].float()).flatten(1)
        values = torch.linalg.svdvals(change)
        assert (values[2:] <= 1e-3 * values[0].clamp(min=1e-6)).all(), name
    pipeline = DiffusionPipeline.from_pretrained(learnt)
    network = denoiser(pipeline)
    norms = {
        f"{path}.{name}"
        for path, module in network.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if "Norm" in type(module).__name__
    }
    assert changed - set(layers) <= norms
    assert len(changed & norms) > len(norms) / 2
    assert denoiser(pipeline).dtype == torch.float32
    card = (learnt / "README.md").read_text()
    assert "- lora_rank: 2" in card


@KINDS
def test_checkpoints_hold_what_learns_alone(learnt: Path, kind_student: Path) -> None:
    held = load_file(sorted((learnt.parent / "checkpoints").iterdir())[-1] / "tensors.safetensors")
    names = {name.split("/")[-2] for name in held if name.startswith("model.") and "lora" in name}
    assert names <= {"default", "lora_A", "lora_B"}
    assert sum(t.numel() for name, t in held.items() if name.startswith("model.")) < 0.6 * sum(
        t.numel() for t in weights(kind_student).values()
    )


@ONE_KIND
def test_a_run_goes_on_to_the_same_bits(
    kind_folder: Path, kind_student: Path, pictures: Path, learnt: Path, tmp_path: Path
) -> None:
    for steps in (1, 2):
        given = (*LORA.split(), "--steps", steps)
        got = learn("distill", kind_folder, kind_student, pictures, tmp_path / "run", *given)
    whole, parts = weights(learnt), weights(got)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@ONE_KIND
def test_few_steps_are_learnt_by_low_rank_too(
    kind_folder: Path, kind_student: Path, pictures: Path, tmp_path: Path
) -> None:
    got = learn("lcm", kind_folder, kind_student, pictures, tmp_path / "run", *LORA.split(), "--steps", 2)
    assert any(not torch.equal(tensor, weights(kind_student)[name].float()) for name, tensor in weights(got).items())


@pytest.mark.parametrize(
    ("kept", "kind"),
    [
        pytest.param("bf16", "exported", id="sd-bf16"),
        pytest.param("fp8", "z", id="z-fp8"),
        slow("fp8", "exported", id="sd-fp8"),
        slow("bf16", "z", id="z-bf16"),
    ],
    indirect=["kind"],
)
def test_weights_that_do_not_learn_are_kept_in_few_bits(
    kind_folder: Path, kind_student: Path, pictures: Path, tmp_path: Path, kept: str
) -> None:
    precision = ["--precision", "bf16", "--teacher_precision", kept, "--student_precision", kept]
    words = ["--lora_rank", 2, *precision, "--steps", 1, "--gradient_checkpointing"]
    got = learn("distill", kind_folder, kind_student, pictures, tmp_path / "run", *words)
    assert all(line["loss"] > 0 for line in read_lines(tmp_path / "run" / "metrics.jsonl"))
    configs = [load_denoiser_config(folder).items() for folder in (got, kind_student)]
    after, before = ({key: value for key, value in config if key != "_name_or_path"} for config in configs)
    assert after == before
    assert {tensor.dtype for tensor in weights(got).values()} == {torch.bfloat16}


@pytest.mark.parametrize("build", [slow(BUILDS["flux"], id="flux"), slow(BUILDS["klein"], id="klein"), BUILDS["z"]])
def test_gradients_are_those_of_weights_of_eight_bits_that_are_widened(build: object) -> None:
    found = []
    for kept in (True, False):
        generator = torch.Generator().manual_seed(0)
        pipeline = build()  # type: ignore[operator]
        network, family = pipeline.transformer, family_of_pipeline(pipeline)
        keep_in(network, torch.float8_e4m3fn, torch.float32)
        if not kept:  # the same numbers, and no casting
            values = {name: tensor.float() for name, tensor in network.state_dict().items()}
            network = build().transformer  # type: ignore[operator]
            network.load_state_dict(values)
        learns = add_lora({"transformer": network}, {"transformer": every_layer(network)}, 2, seed=0, norms=True)
        with torch.no_grad():
            for parameter in learns.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10 + (parameter.ndim == 1))
        latents, timesteps, told = inputs(pipeline)
        answer = family.answer(network, latents, timesteps, told)
        answer.square().mean().backward()
        assert merged_weights(network, torch.float32).keys() == build().transformer.state_dict().keys()  # type: ignore[operator]
        found.append([answer.detach(), *(parameter.grad for parameter in learns.parameters())])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_merged_student_answers_as_the_one_that_learnt() -> None:
    pipeline = BUILDS["z"]()
    network, family = pipeline.transformer, family_of_pipeline(pipeline)
    learns = add_lora({"transformer": network}, {"transformer": every_layer(network)}, 2, seed=0, norms=True)
    with torch.no_grad():
        for parameter in learns.parameters():
            parameter.add_(0.05)
        want = family.answer(network, *inputs(pipeline))
        stock = BUILDS["z"]().transformer
        stock.load_state_dict(merged_weights(network, torch.float32))
        got = family.answer(stock, *inputs(pipeline))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kept", [torch.float8_e4m3fn, slow(torch.float32), slow(torch.bfloat16)])
@pytest.mark.parametrize("build", [*BUILDS.values(), lambda: build_pipeline(V1_UNET)], ids=[*BUILDS, "v1"])
def test_a_teacher_that_comes_layer_by_layer_answers_as_one_that_is_there(build: object, kept: torch.dtype) -> None:
    """And its features are read; on a CPU layers have nowhere to go, so that is all that is held here."""
    pipeline = build()  # type: ignore[operator]
    network, family = denoiser(pipeline), family_of_pipeline(pipeline)
    keep_in(network, kept, torch.bfloat16)
    taps = [
        tap.teacher for tap in family.derive(load_recipe("half" if family.by_flow else "base"), network.config).taps
    ]
    latents, timesteps, told = inputs(pipeline)
    computing = torch.float32 if kept == torch.float32 else torch.bfloat16
    seen = []
    for _ in range(2):
        features = Features(network, taps)
        with torch.no_grad(), features.recording() as found:
            answer = family.answer(network, latents.to(computing), timesteps, as_type(told, computing))
        features.remove()
        seen.append([answer, *found.values()])
        offload(network, torch.device("cpu"))
    assert len(seen[0]) == 1 + len(taps)
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--student_precision bf16",
            "student_precision is bf16, and weights that learn are float32; give --lora_rank",
        ),
        (
            "--lora_rank 2 --precision fp32 --student_precision bf16",
            "student_precision is bf16, and the student computes in torch.float32; give both --precision and",
        ),
        ("--lora_rank 0", "lora_rank is 0; give at least 1"),
        ("--offload_teacher --device cpu", "offload_teacher is for a teacher beside a GPU, and device is cpu"),
        ("--offload_teacher --shard_teacher", "offload_teacher leaves the teacher where it is, and shard_teacher"),
        ("--teacher_precision fp8 --shard_teacher", "teacher_precision is fp8, which cannot be spread over processes"),
    ],
)
def test_what_does_not_go_together_is_refused(
    run: Run, v1_folder: Path, v1_student: Path, pictures: Path, tmp_path: Path, words: str, said: str
) -> None:
    given = ["--student", v1_student, "--data", pictures, "--out", tmp_path / "run", *words.split()]
    outcome = run("distill", v1_folder, *given)
    assert outcome.code == 2
    assert said in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@KINDS
def test_a_plan_counts_what_learns_alone(
    done: Run, kind_folder: Path, kind_student: Path, pictures: Path, tmp_path: Path
) -> None:
    given = ["--student", kind_student, "--data", pictures, "--out", tmp_path / "run", "--plan", "--json"]
    given += ["--batch_size", 1, "--peak_tflops", 1, "--precision", "bf16"]
    held = [
        json.loads(done("distill", kind_folder, *given, *words.split()).out)["chosen"]["held"]
        for words in ("", "--lora_rank 2", "--lora_rank 2 --student_precision fp8")
    ]
    assert held[0] > held[1] > held[2]


@pytest.mark.slow
def test_a_plan_counts_two_layers_of_a_teacher_that_is_offloaded(
    done: Run, klein_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    done("prune", klein_folder, "--recipe", "half", "--out", tmp_path / "student")
    given = ["--student", tmp_path / "student", "--data", pictures, "--out", tmp_path / "run", "--plan", "--json"]
    given += ["--batch_size", 1, "--peak_tflops", 1, "--precision", "bf16"]
    there, away = (
        json.loads(done("distill", klein_folder, *given, *words).out)["chosen"]["held"]
        for words in ([], ["--offload_teacher"])
    )
    sizes = {name: tensor.numel() * 2 for name, tensor in weights(klein_folder).items()}
    assert there - away == sum(sizes.values()) - 2 * max(sizes.values())
