"""Fixtures that several test files share: small random pipelines, as objects and as folders, and pictures."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import dataclasses
import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from filelock import FileLock

from bksdm.export.run import export
from bksdm.models.pipelines import save_pipeline
from bksdm.options.export import ExportOptions
from tiny_models import (
    TWO_STAGES,
    V1_UNET,
    V2_UNET,
    XL_SHALLOW_UNET,
    XL_TWO_STAGES,
    XL_UNET,
    build_pictures,
    build_pipeline,
    build_xl_pipeline,
)
from verbs import saved

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # the libraries, which are many objects that stay

_WATCHED: list[tuple[DiffusionPipeline, list[object]]] = []


def watched(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline that tests share; a file of tests that changes it fails."""
    _WATCHED.append((pipeline, state(pipeline)))
    return pipeline


def state(pipeline: DiffusionPipeline) -> list[object]:
    """Of its networks' modules, whether they train; of their weights, whether they learn and how often they changed."""
    networks = [network for network in pipeline.components.values() if isinstance(network, torch.nn.Module)]
    modes = [module.training for network in networks for module in network.modules()]
    return modes + [(value.requires_grad, value._version) for network in networks for value in network.parameters()]


@pytest.fixture(scope="module", autouse=True)
def shared_pipelines_stay() -> Iterator[None]:
    """No file of tests leaves to the next what it did to the pipelines that all share."""
    yield
    changed = [pipeline for pipeline, before in _WATCHED if state(pipeline) != before]
    _WATCHED[:] = [(pipeline, state(pipeline)) for pipeline, _ in _WATCHED]
    assert not changed


@pytest.fixture(scope="session")
def v1_teacher() -> StableDiffusionPipeline:
    """Shaped as SD 1.x. Shared by all tests: not to be changed."""
    return watched(build_pipeline(V1_UNET))


@pytest.fixture(scope="session")
def v2_teacher() -> StableDiffusionPipeline:
    """Shaped as SD 2.x. Shared by all tests: not to be changed."""
    return watched(build_pipeline(V2_UNET, "v_prediction"))


@pytest.fixture(scope="session")
def xl_teacher() -> StableDiffusionXLPipeline:
    """Shaped as SDXL. Shared by all tests: not to be changed."""
    return watched(build_xl_pipeline(XL_UNET))


@pytest.fixture(scope="session")
def xl_folder(xl_teacher: StableDiffusionXLPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SDXL teacher on the disk. Shared by all tests: not to be changed."""
    return saved(xl_teacher, tmp_path_factory)


@pytest.fixture(scope="session")
def shallow_xl_teacher() -> StableDiffusionXLPipeline:
    """Shaped as SDXL, with fewer transformer layers. Shared by all tests: not to be changed."""
    return watched(build_xl_pipeline(XL_SHALLOW_UNET))


@pytest.fixture(scope="session")
def shallow_xl_folder(shallow_xl_teacher: StableDiffusionXLPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on the disk. Shared by all tests: not to be changed."""
    return saved(shallow_xl_teacher, tmp_path_factory)


@pytest.fixture(scope="session", params=["v1", "v2", "xl"])
def any_teacher(request: pytest.FixtureRequest) -> DiffusionPipeline:
    """Each of the teachers in turn, of every family."""
    return request.getfixturevalue(f"{request.param}_teacher")


@pytest.fixture(scope="session", params=["v1", pytest.param("shallow_xl", id="xl")])
def kind(request: pytest.FixtureRequest) -> str:
    """One kind of model of every family in turn, by the name that its fixtures begin with."""
    return request.param


@pytest.fixture(scope="session")
def kind_teacher(kind: str, request: pytest.FixtureRequest) -> DiffusionPipeline:
    """One teacher of every family in turn. Shared by all tests: not to be changed."""
    return request.getfixturevalue(f"{kind}_teacher")


@pytest.fixture(scope="session")
def kind_folder(kind: str, request: pytest.FixtureRequest) -> Path:
    """The same on the disk. Shared by all tests: not to be changed."""
    return request.getfixturevalue(f"{kind}_folder")


@pytest.fixture
def version_teacher(version: str, request: pytest.FixtureRequest) -> DiffusionPipeline:
    """The teacher that a test's parameter `version` names. Shared by all tests: not to be changed."""
    return request.getfixturevalue(f"{version}_teacher")


@pytest.fixture(scope="session", params=["v1", "v2"])
def teacher(request: pytest.FixtureRequest) -> StableDiffusionPipeline:
    """Each of the two teachers in turn."""
    return request.getfixturevalue(f"{request.param}_teacher")


@pytest.fixture(scope="session")
def v1_folder(v1_teacher: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The v1 teacher on the disk. Shared by all tests: not to be changed."""
    return saved(v1_teacher, tmp_path_factory)


@pytest.fixture(scope="session")
def v2_folder(v2_teacher: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The v2 teacher on the disk. Shared by all tests: not to be changed."""
    return saved(v2_teacher, tmp_path_factory)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    """What the exported folders hold. Shared by all tests: not to be changed."""
    return watched(build_pipeline(TWO_STAGES))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of a run share, for what takes long to make."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """What `make` writes into a folder; the process that comes first makes it, and others wait."""
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            make(folder)
    return folder


@pytest.fixture(scope="session")
def exported_model(exported: StableDiffusionPipeline, shared: Path) -> Path:
    """The same on the disk, in diffusers' form. Shared by all tests: not to be changed."""
    return made_once(shared / "exported-model", lambda folder: save_pipeline(exported, folder))


@pytest.fixture(scope="session")
def onnx_folder(exported_model: Path, shared: Path) -> Path:
    """The same as ONNX. Shared by all tests: not to be changed."""
    return made_once(shared / "onnx", lambda out: export(ExportOptions(str(exported_model), "onnx", str(out))))


@pytest.fixture(scope="session")
def openvino_folder(exported_model: Path, shared: Path) -> Path:
    """The same for OpenVINO. Shared by all tests: not to be changed."""
    return made_once(shared / "openvino", lambda out: export(ExportOptions(str(exported_model), "openvino", str(out))))


@pytest.fixture(scope="session")
def xl_exported() -> StableDiffusionXLPipeline:
    """What the exported folders of SDXL hold. Shared by all tests: not to be changed."""
    return watched(build_xl_pipeline(XL_TWO_STAGES))


@pytest.fixture(scope="session")
def xl_exported_model(xl_exported: StableDiffusionXLPipeline, shared: Path) -> Path:
    """The same on the disk, in diffusers' form. Shared by all tests: not to be changed."""
    return made_once(shared / "xl-exported-model", lambda folder: save_pipeline(xl_exported, folder))


@pytest.fixture(scope="session")
def xl_onnx_folder(xl_exported_model: Path, shared: Path) -> Path:
    """The same as ONNX. Shared by all tests: not to be changed."""
    return made_once(shared / "xl-onnx", lambda out: export(ExportOptions(str(xl_exported_model), "onnx", str(out))))


@pytest.fixture(scope="session")
def xl_openvino_folder(xl_exported_model: Path, shared: Path) -> Path:
    """The same for OpenVINO. Shared by all tests: not to be changed."""
    options = ExportOptions(str(xl_exported_model), "openvino", "")
    return made_once(shared / "xl-openvino", lambda out: export(dataclasses.replace(options, out=str(out))))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted models are kept for a run of the tests, and not among the user's."""
    monkeypatch.setenv("BKSDM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def own_data_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` makes of parquet files is kept for a run of the tests, and not among the user's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture
def folder(v1_folder: Path, tmp_path: Path) -> Path:
    """A copy of the v1 teacher's folder, to be damaged."""
    return Path(shutil.copytree(v1_folder, tmp_path / "teacher"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight captioned pictures. Shared by all tests: not to be changed."""
    return build_pictures(tmp_path_factory.mktemp("data") / "pictures")
