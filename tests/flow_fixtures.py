"""Small random teachers of every family of transformers, as fixtures."""

from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from bksdm.families import family_of_pipeline
from bksdm.models.pipelines import load_pipeline
from tiny_flow import BUILDS, SIDE
from tiny_models import LATENT
from verbs import captioned, make_student, saved


@pytest.fixture(scope="module", params=BUILDS)
def flow_kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def flow_teacher(flow_kind: str) -> DiffusionPipeline:
    """Shared by all tests: not to be changed."""
    pipeline = BUILDS[flow_kind]()
    factor = pipeline.vae_scale_factor * family_of_pipeline(pipeline).patch
    pipeline.transformer.register_to_config(_sample_size=SIDE // factor)
    return pipeline


@pytest.fixture(scope="module")
def flow_folder(flow_kind: str, flow_teacher: DiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on the disk. Shared by all tests: not to be changed."""
    path = tmp_path_factory.mktemp(flow_kind) / "teacher"
    flow_teacher.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def flow_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)) for _ in range(6)]
    return captioned(tmp_path_factory.mktemp("data") / "pictures", pictures)


@pytest.fixture(scope="session")
def z_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of Z-Image on the disk, for pictures of the size of the other tests. Not to be changed."""
    pipeline = BUILDS["z"]()
    pipeline.transformer.register_to_config(_sample_size=LATENT)
    return saved(pipeline, tmp_path_factory)


@pytest.fixture(scope="session")
def klein_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of FLUX.2-klein, whose latents are half as many to a side."""
    pipeline = BUILDS["klein"]()
    pipeline.transformer.register_to_config(_sample_size=LATENT // 2)
    return saved(pipeline, tmp_path_factory)


@pytest.fixture(scope="session")
def z_student(z_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of it. Not to be changed."""
    return make_student(load_pipeline(z_folder), tmp_path_factory.mktemp("students") / "z", "half")
