"""Layers that stay take over what went after them: exactly, by data, in every family."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from bksdm.common.errors import InputError
from bksdm.data.source import read_source
from bksdm.evaluate.output_error import Probe, probes
from bksdm.families import derive, family_of
from bksdm.families.recipe import load_recipe
from bksdm.models.pipelines import denoiser, load_pipeline
from bksdm.options.pruning import PruneOptions
from bksdm.pruning.inherit import prune_unet
from bksdm.pruning.repair.layers import Repair
from bksdm.pruning.repair.least_squares import NormalEquations, flat, patches
from bksdm.pruning.repair.places import places
from bksdm.pruning.repair.record import Repaired
from bksdm.pruning.repair.walk import Walk
from bksdm.pruning.run import prune
from fast import one_flow, one_kind
from verbs import Run

pytest_plugins = ["verbs_fixtures", "flow_fixtures"]
RIDGE = 0.01


def changes_of(operation: nn.Module, given: Tensor, wanted: Tensor, ridge: float = RIDGE) -> dict[str, Tensor]:
    equations = NormalEquations([operation])
    for one, other in zip(given.split(3), wanted.split(3), strict=True):
        equations.add([one], other, torch.ones_like(other))
    assert equations.exact
    return equations.changes(ridge)[0]


@pytest.mark.parametrize(
    ("operation", "shape"),
    [
        (nn.Conv2d(3, 4, 3, padding=1), (8, 3, 6, 6)),
        (nn.Conv2d(3, 4, 3, padding=1, stride=2), (8, 3, 6, 6)),
        (nn.Conv2d(3, 4, 1), (8, 3, 6, 6)),
        (nn.Linear(5, 4), (8, 7, 5)),
        (nn.Linear(5, 4, bias=False), (8, 7, 5)),
    ],
)
def test_the_change_is_the_solution_of_least_squares(operation: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    given = torch.randn(shape)
    wanted = torch.randn_like(operation(given)).detach()
    change = changes_of(operation, given, wanted)
    rows = patches(operation, given).double()
    width = rows.shape[1]
    ridge = (RIDGE * rows.square().sum() / width).sqrt()  # as rows of its own, whose result is to be zero
    bias = "bias" in change
    system = torch.cat([torch.cat([rows, rows.new_ones(len(rows), bias)], 1), ridge * torch.eye(width, width + bias)])
    right = torch.cat([flat(wanted).double(), rows.new_zeros(width, 4)])
    solution = torch.linalg.lstsq(system, right).solution
    torch.testing.assert_close(change["weight"].flatten(1), solution[:width].T, rtol=1e-4, atol=1e-6)
    if bias:
        torch.testing.assert_close(change["bias"], solution[width], rtol=1e-4, atol=1e-6)


def test_what_other_weights_would_give_is_found_again() -> None:
    torch.manual_seed(0)
    one, other = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
    given = torch.randn(12, 3, 6, 6)
    with torch.no_grad():
        change = changes_of(one, given, other(given) - one(given), ridge=1e-9)
    torch.testing.assert_close(one.weight + change["weight"].float(), other.weight, rtol=1e-3, atol=1e-4)


def test_two_operations_that_are_added_up_are_changed_together() -> None:
    torch.manual_seed(0)
    old, new = ([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(5, 4, 1)] for _ in range(2))
    given = [torch.randn(12, 3, 6, 6), torch.randn(12, 5, 6, 6)]
    equations = NormalEquations(old)
    with torch.no_grad():
        wanted = sum(one(own) for one, own in zip(new, given, strict=True)) - sum(
            one(own) for one, own in zip(old, given, strict=True)
        )
        equations.add(given, wanted, torch.ones_like(wanted))
        for operation, change in zip(old, equations.changes(1e-9), strict=True):
            for name, difference in change.items():
                getattr(operation, name).data += difference
        found, right = (sum(one(own) for one, own in zip(both, given, strict=True)) for both in (old, new))
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4)


def test_a_layer_stands_for_those_removed_behind_it(v1_teacher: DiffusionPipeline) -> None:
    config = v1_teacher.unet.config
    found = {tap.student: tap.teacher for tap in places(derive(load_recipe("small"), config), config)}
    assert found["down_blocks.0.resnets.0"] == "down_blocks.0.resnets.0"
    assert found["down_blocks.0.attentions.0"] == "down_blocks.0.attentions.1"
    assert found["down_blocks.3.resnets.0"] == "mid_block.resnets.1"
    assert found["up_blocks.1.resnets.1"] == "up_blocks.1.resnets.2"
    assert found["up_blocks.1.upsamplers.0"] == "up_blocks.1.upsamplers.0"
    assert found[""] == ""


def asked(pipeline: DiffusionPipeline, data: Path, count: int = 4) -> list[Probe]:
    return list(probes(pipeline, read_source(data).pictures[:count], 0, 2))


def repaired(pipeline: DiffusionPipeline, recipe: str, data: Path) -> Repair:
    student, pruning = prune_unet(denoiser(pipeline), load_recipe(recipe))
    work = Repair(denoiser(pipeline), student, pruning, asked(pipeline, data), RIDGE)
    for residual in work.residuals():
        assert residual.after <= residual.before * (1 + 1e-5) + 1e-9, residual
    return work


@one_kind
def test_no_layers_residual_rises_and_the_answer_comes_closer(kind_teacher: DiffusionPipeline, pictures: Path) -> None:
    before, after = repaired(kind_teacher, "base", pictures).output
    assert after < before


@one_flow
def test_blocks_behind_gates_come_closer_too(flow_teacher: DiffusionPipeline, flow_data: Path) -> None:
    before, after = repaired(flow_teacher, "half", flow_data).output
    assert after < before


def test_a_walk_gives_what_a_whole_pass_gives(v1_teacher: DiffusionPipeline, pictures: Path) -> None:
    network, probed = v1_teacher.unet, asked(v1_teacher, pictures)
    family = family_of(network.config)
    passed, kept = family.passed(network.config), family.skip_connections(network.config)
    walk = Walk(network, probed, passed, {path for path in passed if path.removesuffix(".0") in kept or path in kept})
    for path in passed:
        for _ in walk.advance(path):
            pass
    for batch, probe in enumerate(probed):
        assert torch.equal(walk.run(batch, ""), probe.output(network))
    assert not any("forward" in vars(module) for module in network.modules())


def options(teacher: object, out: Path, data: object, **more: object) -> PruneOptions:
    return PruneOptions(str(teacher), "base", str(out), repair=str(data), **{"repair_pictures": 4, **more})


def test_a_repaired_student_is_a_stock_pipeline_and_made_once(v1_folder: Path, pictures: Path, tmp_path: Path) -> None:
    asked = options(v1_folder, tmp_path / "a", pictures)
    prune(asked)
    student = load_pipeline(tmp_path / "a").unet.state_dict()
    plain, _ = prune_unet(load_pipeline(v1_folder).unet, load_recipe("base"))
    changed = {name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, student[name])}
    assert "conv_out.weight" in changed
    assert "conv_in.weight" not in changed
    record = Repaired.read(tmp_path / "a")
    assert record
    assert all(layer.after <= layer.before * (1 + 1e-5) for layer in record.layers)
    written = (tmp_path / "a" / "repair.json").stat().st_mtime_ns
    prune(asked)
    assert (tmp_path / "a" / "repair.json").stat().st_mtime_ns == written
    with pytest.raises(InputError, match="ridge"):
        prune(dataclasses.replace(asked, ridge=0.5))
    with pytest.raises(InputError, match="repair"):
        prune(PruneOptions(str(v1_folder), "base", str(tmp_path / "a")))
    pipeline, source = load_pipeline(v1_folder), read_source(pictures)
    probed = list(probes(pipeline, [source.pictures[at * 2] for at in range(4)], 0))
    again, pruning = prune_unet(pipeline.unet, load_recipe("base"))
    assert len(list(Repair(pipeline.unet, again, pruning, probed, asked.ridge).residuals())) == 31
    assert all(torch.equal(tensor, student[name]) for name, tensor in again.state_dict().items())


def test_what_was_done_is_printed(run: Run, v1_folder: Path, pictures: Path, tmp_path: Path) -> None:
    words = (
        "prune",
        v1_folder,
        "--recipe",
        "small",
        "--out",
        tmp_path / "s",
        "--repair",
        pictures,
        "--repair_pictures",
        2,
    )
    outcome = run(*map(str, words), "--precision", "fp16", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["repair"] == json.loads((tmp_path / "s" / "repair.json").read_text())
    assert load_pipeline(tmp_path / "s", torch.float16).unet.conv_out.weight.isfinite().all()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"repair": "nowhere"}, "nowhere"),
        ({"repair_pictures": 0}, "repair_pictures is 0"),
        ({"ridge": 0.0}, "ridge is 0.0"),
        ({"ridge": float("nan")}, "ridge is nan"),
        ({"repair": None, "repair_pictures": 192, "ridge": 0.5}, "ridge is 0.5, which is for --repair"),
    ],
)
def test_what_is_unfit_is_named(
    more: dict[str, object], said: str, v1_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        prune(dataclasses.replace(options(v1_folder, tmp_path / "out", pictures), **more))
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_removes_nothing_leaves_nothing_to_repair(
    v1_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "whole.yaml"
    recipe.write_text("name: whole\n")
    with pytest.raises(InputError, match="removes nothing"):
        prune(dataclasses.replace(options(v1_folder, tmp_path / "out", pictures), recipe=str(recipe)))
