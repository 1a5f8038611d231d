"""The fast path is the plain path to rounding: beside the published loop, and with a compiled teacher."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from bksdm.data.folder import read_captions
from bksdm.data.pictures import PictureSamples
from bksdm.distill.openvino import ByOpenvino
from bksdm.distill.run import distill
from bksdm.families.recipe import load_recipe
from bksdm.models.pipelines import load_pipeline, tokenizing
from bksdm.options.distill import DistillOptions
from bksdm.pruning.inherit import prune_unet
from tiny_models import PICTURE
from verbs import make_student, read_lines

pytest_plugins = ["verbs_fixtures"]
pytestmark = pytest.mark.usefixtures("without_charts")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from published_loop import PublishedLoop  # noqa: E402

TERMS = ("loss", "task", "output_kd", "feature_kd")


def retrained(teacher: Path, student: Path, data: Path, out: Path, **changes: object) -> list[list[float]]:
    settings: dict[str, object] = {"steps": 5, "batch_size": 4, "accumulation": 1, "lr": 1e-3, "log_every": 1}
    settings |= {"precision": "fp32", "teacher_precision": "fp32", "flip": False, "sample_every": 0} | changes
    distill(DistillOptions(str(teacher), str(student), str(data), str(out), **settings))
    return [[line[name] for name in TERMS] for line in read_lines(out / "metrics.jsonl")]


@pytest.mark.parametrize(
    "recipe", [pytest.param("base", marks=pytest.mark.slow), "small", pytest.param("tiny", marks=pytest.mark.slow)]
)
def test_losses_are_those_of_the_published_loop(
    recipe: str, v1_teacher: StableDiffusionPipeline, v1_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    pipeline = load_pipeline(v1_folder)
    student, pruning = prune_unet(pipeline.unet, load_recipe(recipe))
    samples = PictureSamples(read_captions(pictures), PICTURE, tokenizing(pipeline.tokenizer))
    published = PublishedLoop(pipeline, student, pruning.taps, samples, batch_size=4, lr=1e-3)
    theirs = [[step[name] for name in TERMS] for step in (published.step() for _ in range(3))]
    made = make_student(v1_teacher, tmp_path / "student", recipe)
    ours = retrained(v1_folder, made, pictures, tmp_path / "run", steps=3)
    assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4)


def compiled_as(call: Any) -> Any:
    """Stands for `nn.Module.compile`: calls of the network become calls of `call` with the network's own."""

    def compile(network: nn.Module, **options: object) -> None:
        network._compiled_call_impl = lambda *inputs, **named: call(network._call_impl, *inputs, **named)

    return compile


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without OpenVINO."""
    monkeypatch.setattr("bksdm.distill.run.openvino_is_faster", lambda device, precision: False)


@pytest.mark.slow
@pytest.mark.usefixtures("by_torch")
def test_a_compiled_teacher_that_is_right_is_used(
    v1_folder: Path, v1_student: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def right(own: Any, *inputs: Any, **named: Any) -> Any:
        calls.append(1)
        return own(*inputs, **named)

    plain = retrained(v1_folder, v1_student, pictures, tmp_path / "plain")
    monkeypatch.setattr(nn.Module, "compile", compiled_as(right))
    assert retrained(v1_folder, v1_student, pictures, tmp_path / "compiled", compile_teacher=True) == plain
    assert len(calls) == 1 + 5


@pytest.mark.slow
@pytest.mark.usefixtures("by_torch")
def test_a_compiled_teacher_that_is_wrong_is_found_out(
    v1_folder: Path,
    v1_student: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def wrong(own: Any, latents: Any, *inputs: Any, **named: Any) -> Any:
        return own(1.01 * latents, *inputs, **named)

    plain = retrained(v1_folder, v1_student, pictures, tmp_path / "plain")
    monkeypatch.setattr(nn.Module, "compile", compiled_as(wrong))
    assert retrained(v1_folder, v1_student, pictures, tmp_path / "compiled", compile_teacher=True) == plain
    assert "more than 0.001, from itself; it stays uncompiled" in " ".join(capfd.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.usefixtures("by_torch")
def test_a_teacher_that_is_really_compiled(v1_folder: Path, v1_student: Path, pictures: Path, tmp_path: Path) -> None:
    plain = torch.tensor(retrained(v1_folder, v1_student, pictures, tmp_path / "plain"))
    compiled = torch.tensor(
        retrained(v1_folder, v1_student, pictures, tmp_path / "compiled", compile_teacher=True, sample_every=2)
    )
    assert torch.allclose(plain, compiled, rtol=1e-4)


def test_openvino_computes_a_network_and_leaves_its_earlier_answers_alone() -> None:
    pytest.importorskip("openvino")

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(3, 8, 3).requires_grad_(False)

        def forward(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
            found = self.inner(latents)
            return found * timesteps[:, None, None, None], found

    network, times = Both(), torch.tensor([1, 700])
    first, second = torch.randn(2, 2, 3, 6, 6)
    computed = ByOpenvino(network, (first, times))
    early = computed((first, times))
    for found, latents in ((computed((second, times)), second), (early, first)):
        for one, own in zip(found, network(latents, times), strict=True):
            torch.testing.assert_close(one, own, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_teacher_computed_by_openvino_gives_the_same_losses_and_goes_on_to_the_bit(
    v1_folder: Path, v1_student: Path, pictures: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")

    def by_openvino(out: str, **changes: object) -> list[list[float]]:
        return retrained(v1_folder, v1_student, pictures, tmp_path / out, compile_teacher=True, **changes)

    plain = torch.tensor(retrained(v1_folder, v1_student, pictures, tmp_path / "plain"))
    whole = by_openvino("whole")
    assert torch.allclose(plain, torch.tensor(whole), rtol=1e-4)
    assert not torch.equal(plain, torch.tensor(whole))  # it was not torch that computed it
    by_openvino("parts", steps=2)
    assert by_openvino("parts") == whole


def test_memory_layouts_change_nothing_but_rounding(v1_teacher: StableDiffusionPipeline) -> None:
    unet = copy.deepcopy(v1_teacher.unet)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 8, 32)
    with torch.no_grad():
        plain = unet(*inputs).sample
        assert torch.allclose(unet.to(memory_format=torch.channels_last)(*inputs).sample, plain, atol=1e-5)
