"""Run folders: what they hold, when they go on, what they refuse, and that nothing is ever half written."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from bksdm.common.errors import InputError
from bksdm.common.runs import check_free, open_run, provenance, replace_folder, run_files, write_text

OPTIONS = {"teacher": "emoji", "steps": 100, "lr": 1e-4, "flip": True, "prompts": None, "names": ["a", "b"]}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(folder: Path, options: dict, verb: str = "distill", may_change: tuple[str, ...] = ()) -> str:
    with pytest.raises(InputError) as refused:
        open_run(folder, verb, options, may_change)
    assert "\n" not in str(refused.value)
    assert "choose another --out" in str(refused.value)
    return str(refused.value)


# Opening a run


@pytest.mark.parametrize("where", ["run", "deep/er/run"])
def test_a_new_run_has_its_options_and_its_provenance(tmp_path: Path, where: str) -> None:
    folder = open_run(tmp_path / where, "distill", OPTIONS)
    assert folder == tmp_path / where
    assert names(folder) == ["config.yaml", "provenance.json"]
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"verb": "distill", **OPTIONS}
    assert json.loads((folder / "provenance.json").read_text()).keys() == provenance().keys()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    open_run(tmp_path, "distill", OPTIONS)
    assert names(tmp_path) == ["config.yaml", "provenance.json"]


def test_the_same_options_open_the_same_run(tmp_path: Path) -> None:
    open_run(tmp_path, "distill", OPTIONS)
    (tmp_path / "metrics.jsonl").write_text("kept")
    open_run(tmp_path, "distill", OPTIONS)
    assert (tmp_path / "metrics.jsonl").read_text() == "kept"


def test_paths_and_tuples_are_the_same_after_a_round_trip(tmp_path: Path) -> None:
    options = {"data": Path("some/folder"), "sizes": (1, 2), "nested": {"a": (Path("b"),)}}
    open_run(tmp_path, "prepare", options)
    open_run(tmp_path, "prepare", options)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {
        "verb": "prepare",
        "data": "some/folder",
        "sizes": [1, 2],
        "nested": {"a": ["b"]},
    }


@pytest.mark.parametrize(
    ("key", "value"), [("teacher", "other"), ("steps", 200), ("lr", 2e-4), ("prompts", "file"), ("names", ["a"])]
)
def test_another_run_is_refused_with_the_option_that_differs(tmp_path: Path, key: str, value: object) -> None:
    open_run(tmp_path, "distill", OPTIONS)
    before = (tmp_path / "config.yaml").read_text()
    there = "not given" if OPTIONS[key] is None else repr(OPTIONS[key])
    message = refusal(tmp_path, OPTIONS | {key: value})
    assert f"{tmp_path} holds another run ({key}: {there} there, {value!r} now)" in message
    assert (tmp_path / "config.yaml").read_text() == before


def test_what_an_option_names_is_told_in_words_where_it_has_changed(tmp_path: Path) -> None:
    open_run(tmp_path, "distill", OPTIONS | {"data_content": "0123"})
    message = refusal(tmp_path, OPTIONS | {"data_content": "4567"})
    assert f"{tmp_path} holds another run (the content of data has changed since); choose another --out" in message
    message = refusal(tmp_path, OPTIONS | {"teacher_content": "89ab"})
    assert f"{tmp_path} holds another run (the content of teacher was not noted); choose another --out" in message


def test_a_run_of_another_verb_is_refused(tmp_path: Path) -> None:
    open_run(tmp_path, "distill", OPTIONS)
    assert "(verb: 'distill' there, 'evaluate' now)" in refusal(tmp_path, OPTIONS, "evaluate")


def test_an_option_that_the_earlier_run_did_not_have_is_named(tmp_path: Path) -> None:
    open_run(tmp_path, "distill", OPTIONS)
    assert "(size: not given there, 7 now)" in refusal(tmp_path, OPTIONS | {"size": 7})


def test_some_options_may_change(tmp_path: Path) -> None:
    open_run(tmp_path, "distill", OPTIONS)
    open_run(tmp_path, "distill", OPTIONS | {"steps": 200}, may_change=("steps",))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["steps"] == 200
    assert "(lr: " in refusal(tmp_path, OPTIONS | {"lr": 1.0}, may_change=("steps",))


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert f"{tmp_path} is not empty and holds no run of bksdm" in refusal(tmp_path, OPTIONS)
    assert names(tmp_path) == ["thesis.txt"]


@pytest.mark.parametrize("content", [b"", b"- a\n- b\n", b"words", b"a: [", b"\xff\xfe", b"a: \x00"])
def test_a_config_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    assert f"{tmp_path / 'config.yaml'} is not the config of a run" in refusal(tmp_path, OPTIONS)
    assert (tmp_path / "config.yaml").read_bytes() == content


@pytest.mark.parametrize("where", ["file", "file/run", "file/deep/er/run"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / where) in refusal(tmp_path / where, OPTIONS)
    assert (tmp_path / "file").read_text() == "in the way"


def test_looking_writes_nothing(tmp_path: Path) -> None:
    check_free(tmp_path / "run", "distill", OPTIONS)
    assert names(tmp_path) == []


def test_the_files_of_a_run_are_the_ones_that_it_is_known_by(tmp_path: Path) -> None:
    for name, text in run_files("prune", OPTIONS).items():
        (tmp_path / name).write_text(text)
    check_free(tmp_path, "prune", OPTIONS)


def test_the_provenance_says_what_made_a_run() -> None:
    made = provenance()
    assert made["command"] == sys.argv
    assert {"bksdm", "torch", "diffusers", "transformers", "safetensors", "numpy"} == made["versions"].keys()
    assert made["python"].startswith("3.")
    assert json.loads(json.dumps(made)) == made


# Whole or not at all


def test_text_is_written_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "été 文字")
    write_text(tmp_path / "a.txt", "again")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "again"
    assert names(tmp_path) == ["a.txt"]


def test_text_that_cannot_be_encoded_leaves_the_old_text(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "\ud800")
    assert (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("where", ["target", "deep/er/target"])
def test_a_folder_appears_when_the_block_ends(tmp_path: Path, where: str) -> None:
    target = tmp_path / where
    with replace_folder(target) as partial:
        (partial / "a.txt").write_text("new")
        assert not target.exists()
    assert names(target) == ["a.txt"]
    assert names(target.parent) == ["target"]


def made(target: Path, text: str) -> Path:
    with replace_folder(target) as partial:
        (partial / f"{text}.txt").write_text(text)
    return target


def test_an_earlier_folder_is_replaced_whole(tmp_path: Path) -> None:
    made(tmp_path / "target", "old")
    made(tmp_path / "target", "new")
    assert names(tmp_path / "target") == ["new.txt"]
    assert names(tmp_path) == ["target"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_get_the_mode_that_the_umask_gives_whoever_writes_them(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with replace_folder(tmp_path / "target") as partial:
            (partial / "part").mkdir()
            save_file({"a": torch.zeros(2)}, partial / "part" / "weights.safetensors")
            (partial / "text.txt").write_text("text")
    finally:
        os.umask(before)
    for name in ("part/weights.safetensors", "text.txt"):
        assert stat.S_IMODE((tmp_path / "target" / name).stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_earlier_folder(tmp_path: Path, error: type[BaseException]) -> None:
    made(tmp_path / "target", "old")
    with pytest.raises(error), replace_folder(tmp_path / "target"):
        raise error
    assert names(tmp_path / "target") == ["old.txt"]
    assert names(tmp_path) == ["target"]


def test_an_error_leaves_no_folder_where_there_was_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), replace_folder(tmp_path / "target"):
        raise ValueError("no")
    assert names(tmp_path) == []


def test_a_failure_in_the_last_move_leaves_the_earlier_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "target", "old")
    original = os.replace

    def fails_for_new_content(source: Path, target: Path) -> None:
        if (Path(source) / "new.txt").exists():
            raise OSError(5, "Input/output error")
        original(source, target)

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", fails_for_new_content)
        with pytest.raises(OSError, match="Input/output error"):
            made(tmp_path / "target", "new")
    assert names(tmp_path / "target") == ["old.txt"]


def test_a_kill_leaves_the_earlier_folder_and_the_next_run_succeeds(tmp_path: Path) -> None:
    made(tmp_path / "target", "old")
    script = (
        "import os, sys, pathlib; from bksdm.common.runs import replace_folder\n"
        "with replace_folder(pathlib.Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half.txt').write_text('half'); os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, tmp_path / "target"], check=False).returncode == 9
    assert names(tmp_path / "target") == ["old.txt"]
    made(tmp_path / "target", "new")
    assert names(tmp_path / "target") == ["new.txt"]
    assert names(tmp_path) == ["target"]


def test_a_kill_between_the_two_moves_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".student.earlier").mkdir()
    (tmp_path / ".student.earlier" / "weights").write_text("the only copy")
    with pytest.raises(KeyboardInterrupt), replace_folder(tmp_path / "student"):
        raise KeyboardInterrupt
    assert (tmp_path / "student" / "weights").read_text() == "the only copy"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with replace_folder(tmp_path / "link") as partial:
        (partial / "weights").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "weights").read_text() == "new"
    assert names(tmp_path) == ["disk", "link"]


def test_what_was_chosen_is_part_of_the_provenance(tmp_path: Path) -> None:
    open_run(tmp_path, "distill", OPTIONS, chosen={"device": "cpu"})
    assert json.loads((tmp_path / "provenance.json").read_text())["device"] == "cpu"


def test_long_values_are_cut_in_messages(tmp_path: Path) -> None:
    open_run(tmp_path, "generate", {"prompt": ["word"] * 100})
    assert len(refusal(tmp_path, {"prompt": ["other"] * 100}, "generate")) < 500
