"""Fixtures of the tests of the verbs: the command line in this process, and what the verbs before a verb made."""

from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from bksdm.cli import main
from verbs import Outcome, Run, make_student


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""

    def command(*words: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        written = capfd.readouterr()
        return Outcome(int(stop.value.code or 0), written.out, written.err)

    return command


@pytest.fixture
def done(run: Run) -> Run:
    """Run a command line that must succeed."""

    def command(*words: object) -> Outcome:
        outcome = run(*words)
        assert outcome.code == 0, outcome.err
        return outcome

    return command


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs write their pages without curves and charts, which take a second and more each and at which nobody looks.

    Fixtures of modules and sessions are made before, and have theirs.
    """
    monkeypatch.setattr("bksdm.distill.report.curves", lambda *given, **named: "")
    monkeypatch.setattr("bksdm.evaluate.report.quality", lambda result: None)


@pytest.fixture(scope="session")
def v1_student(v1_teacher: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small student of the v1 teacher. Shared by all tests: not to be changed."""
    return make_student(v1_teacher, tmp_path_factory.mktemp("students") / "v1")


@pytest.fixture(scope="session")
def exported_teacher(exported: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The teacher with two stages by a name such as those of the kinds. Shared by all tests: not to be changed."""
    return exported


@pytest.fixture(scope="session")
def exported_folder(exported_model: Path) -> Path:
    """The same on the disk. Shared by all tests: not to be changed."""
    return exported_model


@pytest.fixture(scope="session")
def exported_student(exported: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its small student, which is the quickest. Shared by all tests: not to be changed."""
    return make_student(exported, tmp_path_factory.mktemp("students") / "exported")


@pytest.fixture(scope="session")
def v2_student(v2_teacher: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small student of the v2 teacher. Shared by all tests: not to be changed."""
    return make_student(v2_teacher, tmp_path_factory.mktemp("students") / "v2")


@pytest.fixture(scope="session")
def xl_student(xl_teacher: DiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small student of the SDXL teacher. Shared by all tests: not to be changed."""
    return make_student(xl_teacher, tmp_path_factory.mktemp("students") / "xl")


@pytest.fixture(scope="session")
def shallow_xl_student(shallow_xl_teacher: DiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the shallow one. Shared by all tests: not to be changed."""
    return make_student(shallow_xl_teacher, tmp_path_factory.mktemp("students") / "shallow-xl")


@pytest.fixture(scope="session")
def kind_student(kind: str, request: pytest.FixtureRequest) -> Path:
    """The small student of one teacher of every family in turn. Shared by all tests: not to be changed."""
    return request.getfixturevalue(f"{kind}_student")
