"""Fixtures that several test files share: small random pipelines, as objects and as folders, and pictures."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from bksdm.export.run import export
from bksdm.models import save_pipeline
from bksdm.options import ExportOptions
from tiny_models import TWO_STAGES, V1_UNET, V2_UNET, build_pictures, build_pipeline

torch.set_num_threads(1)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Each file's tests go to one process, and those of exported folders too, so that what they share is made once."""
    exports = {"onnx_folder", "openvino_folder"} & set(getattr(item, "fixturenames", ()))
    item.add_marker(pytest.mark.xdist_group("exports" if exports else item.path.stem))


@pytest.fixture(scope="session")
def v1_teacher() -> StableDiffusionPipeline:
    """Shaped as SD 1.x. Shared by all tests: not to be changed."""
    return build_pipeline(V1_UNET)


@pytest.fixture(scope="session")
def v2_teacher() -> StableDiffusionPipeline:
    """Shaped as SD 2.x. Shared by all tests: not to be changed."""
    return build_pipeline(V2_UNET, "v_prediction")


@pytest.fixture(scope="session", params=["v1", "v2"])
def teacher(request: pytest.FixtureRequest) -> StableDiffusionPipeline:
    """Each of the two teachers in turn."""
    return request.getfixturevalue(f"{request.param}_teacher")


@pytest.fixture(scope="session")
def v1_folder(v1_teacher: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The v1 teacher on the disk. Shared by all tests: not to be changed."""
    folder = tmp_path_factory.mktemp("v1") / "teacher"
    save_pipeline(v1_teacher, folder)
    return folder


@pytest.fixture(scope="session")
def v2_folder(v2_teacher: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The v2 teacher on the disk. Shared by all tests: not to be changed."""
    folder = tmp_path_factory.mktemp("v2") / "teacher"
    save_pipeline(v2_teacher, folder)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    """What the exported folders hold. Shared by all tests: not to be changed."""
    return build_pipeline(TWO_STAGES)


@pytest.fixture(scope="session")
def exported_model(exported: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on the disk, in diffusers' form. Shared by all tests: not to be changed."""
    folder = tmp_path_factory.mktemp("exports") / "model"
    save_pipeline(exported, folder)
    return folder


@pytest.fixture(scope="session")
def onnx_folder(exported_model: Path) -> Path:
    """The same as ONNX. Shared by all tests: not to be changed."""
    return export(ExportOptions(str(exported_model), "onnx", str(exported_model.parent / "onnx"))).out


@pytest.fixture(scope="session")
def openvino_folder(exported_model: Path) -> Path:
    """The same for OpenVINO. Shared by all tests: not to be changed."""
    return export(ExportOptions(str(exported_model), "openvino", str(exported_model.parent / "openvino"))).out


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted models are kept for a run of the tests, and not among the user's."""
    monkeypatch.setenv("BKSDM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def folder(v1_folder: Path, tmp_path: Path) -> Path:
    """A copy of the v1 teacher's folder, to be damaged."""
    return Path(shutil.copytree(v1_folder, tmp_path / "teacher"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight captioned pictures. Shared by all tests: not to be changed."""
    return build_pictures(tmp_path_factory.mktemp("data") / "pictures")
