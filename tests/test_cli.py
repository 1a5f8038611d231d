"""The command line: how it is spelled, what it prints, and how it ends."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import docstring_parser
import pytest
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from bksdm import cli
from bksdm.common.errors import InputError
from bksdm.export.ldm import write_single_file
from bksdm.options.distill import DistillOptions
from bksdm.options.generate import GenerateOptions
from published import FACTS, RECIPES, UNETS, XL, XL_FACTS
from verbs import Run

pytest_plugins = ["verbs_fixtures"]

# Options are a budget: a new one needs a reason and a line here.
OPTIONS = {"quickstart": 5, "describe": 3, "prune": 10, "prepare": 17, "distill": 53, "generate": 28, "evaluate": 30}
OPTIONS |= {"personalize": 32, "fidelity": 16, "adapt": 5, "push": 10, "demo": 14}
OPTIONS |= {"lcm": 37, "decoder": 26, "benchmark": 17, "sensitivity": 17, "export": 15}
JSON_VERBS = (
    "describe",
    "prune",
    "prepare",
    "distill",
    "lcm",
    "decoder",
    "personalize",
    "fidelity",
    "adapt",
    "generate",
    "evaluate",
    "benchmark",
    "sensitivity",
    "export",
    "push",
)


def python(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)


# Help


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_overview_names_every_verb(done: Run, words: list[str]) -> None:
    outcome = done(*words)
    assert [line.split()[0] for line in outcome.out.splitlines() if line.startswith("  ")] == list(cli.VERBS)
    assert not outcome.err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_shows_its_options_with_a_sentence_each(done: Run, verb: str) -> None:
    kind = cli.options_of(verb)
    described = {
        item.arg_name: item.description or ""
        for part in reversed(kind.__mro__)  # what several verbs share is said once, and differently where it differs
        for item in docstring_parser.parse(part.__doc__).params
    }
    text = done(verb, "--help").out
    assert text.startswith(f"usage: bksdm {verb}")
    assert sorted(described) == sorted(field.name for field in dataclasses.fields(kind))
    for name, sentence in described.items():
        assert f"--{name} " in text
        assert sentence.endswith(".")
        assert "".join(sentence.split()) in "".join(text.split())


def test_the_version_is_the_packages(done: Run) -> None:
    from importlib.metadata import version

    assert done("--version").out.strip() == version("bksdm")


HEAVY = {"torch", "diffusers", "transformers"}


def imported(*words: object) -> set[str]:
    """Names of the packages that a process with these words imports, at their top."""
    result = python("-X", "importtime", *words)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if line.startswith("import time:")}


@pytest.mark.parametrize("words", [["-c", "import bksdm.cli"], ["-m", "bksdm", "--help"], ["-m", "bksdm", "--version"]])
def test_the_front_door_opens_without_the_heavy_libraries(words: list[str]) -> None:
    found = imported(*words)
    assert "bksdm" in found
    assert not found & {*HEAVY, "numpy", "PIL", "jsonargparse"}


def test_the_options_of_all_verbs_are_shown_and_parsed_without_torch() -> None:
    code = """if True:
        import contextlib, itertools
        from bksdm import cli
        for verb, flag in itertools.product(cli.VERBS, ("--help", "--print_config")):
            with contextlib.suppress(SystemExit):
                cli.parse(cli.options_of(verb), verb, [flag])
        """
    assert not imported("-c", code) & {*HEAVY, "numpy", "PIL"}


@pytest.mark.parametrize("verb", cli.VERBS)
def test_options_are_a_budget(verb: str) -> None:
    assert len(dataclasses.fields(cli.options_of(verb))) == OPTIONS[verb]


def test_every_verb_has_a_budget() -> None:
    assert OPTIONS.keys() == cli.VERBS.keys()


@pytest.mark.parametrize("word", ["nonsense", "--nonsense", "Generate", ""])
def test_an_unknown_verb_is_refused_with_the_known_ones(run: Run, word: str) -> None:
    outcome = run(word)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.said == [f"bksdm: unknown verb {word!r}; give one of {', '.join(cli.VERBS)}"]


# Spelling


def generate_options(*words: str) -> GenerateOptions:
    return cli.parse(GenerateOptions, "generate", list(words))


@pytest.mark.parametrize(
    "words",
    [
        ["emoji", "--out", "o"],
        ["--model", "emoji", "--out", "o"],
        ["--out", "o", "--model", "emoji"],
        ["--out=o", "--model=emoji"],
    ],
)
def test_a_leading_word_is_the_first_option(words: list[str]) -> None:
    assert generate_options(*words) == GenerateOptions("emoji", "o")


@pytest.mark.parametrize(
    ("words", "prompts"),
    [
        (["--prompt", "red apple"], ["red apple"]),
        (["--prompt=red apple"], ["red apple"]),
        (["--prompt", "red apple", "green car"], ["red apple", "green car"]),
        (["--prompt", "red apple", "--prompt", "green car"], ["red apple", "green car"]),
        (["--prompt", "red apple", "--steps", "3", "--prompt", "green car"], ["red apple", "green car"]),
        (["--prompt=red apple", "--prompt=green car"], ["red apple", "green car"]),
        (["--prompt", "1", "null", "true", "[a]", "{b: c}", "d: e", '"f"', "-g", "#h"], None),
        (["--prompt", "ant, noto style", "été ☂", " spaces "], None),
    ],
)
def test_prompts_are_taken_word_by_word_as_they_are(words: list[str], prompts: list[str] | None) -> None:
    options = generate_options("emoji", "--out", "o", *words)
    assert options.prompt == (prompts or words[1:])


@pytest.mark.parametrize("text", ["1", "1.5", "a: b", "[a]", "{b", "- d", "true", "null", "~", "été"])
@pytest.mark.parametrize("option", ["negative_prompt", "out", "model"])
def test_texts_are_taken_as_they_are(option: str, text: str) -> None:
    given = {"model": "emoji", "out": "o"} | {option: text}
    options = generate_options(*(f"--{name}={value}" for name, value in given.items()))
    assert getattr(options, option) == text


@pytest.mark.parametrize(
    ("words", "flip"),
    [([], True), (["--flip"], True), (["--flip", "false"], False), (["--flip=false"], False), (["--flip=true"], True)],
)
def test_a_flag_may_stand_alone_or_with_a_value(words: list[str], flip: bool) -> None:
    options = cli.parse(DistillOptions, "distill", ["t", "--student", "s", *words, "--data", "d", "--out", "o"])
    assert options == DistillOptions("t", "s", "d", "o", flip=flip)


def test_options_of_two_words_may_be_written_with_a_hyphen() -> None:
    options = generate_options("emoji", "--out", "o", "--batch-size", "3", "--images-per-prompt=2")
    assert options == GenerateOptions("emoji", "o", batch_size=3, images_per_prompt=2)


@pytest.mark.parametrize(
    ("words", "value"), [(["--lr", "1e-3"], 1e-3), (["--lr", "1"], 1.0), (["--lr=.5"], 0.5), (["--lr", "2e1"], 20.0)]
)
def test_numbers_may_be_written_as_people_do(words: list[str], value: float) -> None:
    options = cli.parse(DistillOptions, "distill", ["t", "--student", "s", "--data", "d", "--out", "o", *words])
    assert options.lr == value
    assert isinstance(options.lr, float)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["emoji", "--steps", "3"], ".*out.*"),
        (["emoji", "--steps", "many", "--out", "o"], "steps is many; give a whole number"),
        (["emoji", "--steps", "3.5", "--out", "o"], "steps is 3.5; give a whole number"),
        (["emoji", "--steps", "true", "--out", "o"], "steps is true; give a whole number"),
        (["emoji", "--strengths", "a", "--out", "o"], r"strengths is \['a'\]; give a list of numbers"),
        (["emoji", "--precision", "fp8", "--out", "o"], "precision is fp8; give one of auto, fp32, bf16, fp16"),
        (["emoji", "--json", "false", "--seed", "x", "--out", "o"], "seed is x; give a whole number"),
        (["emoji", "--nonsense", "3", "--out", "o"], ".*nonsense.*"),
        (["emoji", "--out"], ".*out.*"),
        (["emoji", "green", "--out", "o"], ".*green.*"),
        (["--out", "o", "emoji"], ".*emoji.*"),
    ],
)
def test_what_is_not_an_option_is_refused(words: list[str], line: str) -> None:
    with pytest.raises(InputError, match=rf"^{line}; see bksdm generate --help$"):
        generate_options(*words)


def test_a_config_with_a_text_for_a_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("prompt: red apple\n")
    with pytest.raises(InputError, match=r"^prompt is red apple; give a list of texts; see"):
        generate_options("emoji", "--out", "o", "--config", str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("verb", cli.VERBS)
def test_options_are_not_shortened(verb: str) -> None:
    with pytest.raises(InputError, match="--ou"):
        cli.parse(cli.options_of(verb), verb, ["a", "--ou", "o"])


# Config files


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "options.yaml"
    path.write_text("model: emoji\nout: o\nsteps: 3\nprompt: [red, green]\nguidance: 2\n")
    return path


def test_a_config_file_gives_options(config: Path) -> None:
    wanted = GenerateOptions("emoji", "o", steps=3, prompt=["red", "green"], guidance=2.0)
    assert generate_options("--config", str(config)) == wanted


@pytest.mark.parametrize("first", [True, False])
def test_flags_come_on_top_wherever_they_stand(config: Path, first: bool) -> None:
    flags, file = ["--steps", "5", "--prompt", "blue"], ["--config", str(config)]
    options = generate_options(*(flags + file if first else file + flags))
    assert (options.steps, options.prompt, options.guidance) == (5, ["blue"], 2.0)


def test_the_model_may_stand_before_a_config_file(config: Path) -> None:
    assert generate_options("other", "--config", str(config)).model == "other"


def test_what_print_config_prints_is_a_config_file(done: Run, config: Path, tmp_path: Path) -> None:
    text = done("generate", "--config", config, "--steps", 7, "--json", "--print_config").out
    assert yaml.safe_load(text)["steps"] == 7
    printed = tmp_path / "printed.yaml"
    printed.write_text(text)
    wanted = GenerateOptions("emoji", "o", steps=7, prompt=["red", "green"], guidance=2.0, json=True)
    assert generate_options("--config", str(printed)) == wanted


@pytest.mark.parametrize("verb", cli.VERBS)
def test_print_config_shows_every_option_and_does_nothing(done: Run, verb: str) -> None:
    shown = yaml.safe_load(done(verb, "--print_config").out)
    assert set(shown) == {field.name for field in dataclasses.fields(cli.options_of(verb))}


def test_a_command_with_a_config_file_may_be_repeated(done: Run, config: Path, v1_folder: Path, tmp_path: Path) -> None:
    words = ("generate", v1_folder, "--config", config, "--out", tmp_path / "o", "--steps", 1, "--json")
    assert done(*words).json == done(*words).json


# What is printed


def test_json_is_one_object_and_nothing_else(done: Run, v1_folder: Path, tmp_path: Path) -> None:
    for words in (
        ("describe", v1_folder),
        ("describe", v1_folder, "--recipe", "tiny"),
        ("prune", v1_folder, "--recipe", "tiny", "--out", tmp_path / "student"),
        ("generate", tmp_path / "student", "--prompt", "red", "--steps", 1, "--out", tmp_path / "pictures"),
    ):
        outcome = done(*words, "--json")
        assert isinstance(outcome.json, dict)
        assert outcome.out.count("\n") == 1
        assert not outcome.said


def test_the_verbs_that_answer_with_json_are_known() -> None:
    assert (
        tuple(
            verb for verb in cli.VERBS if "json" in {field.name for field in dataclasses.fields(cli.options_of(verb))}
        )
        == JSON_VERBS
    )


def test_without_json_people_get_a_sentence(done: Run, v1_folder: Path, tmp_path: Path) -> None:
    student, pictures = tmp_path / "student", tmp_path / "pictures"
    assert f"student in {student}" in done("prune", v1_folder, "--recipe", "base", "--out", student).out
    words = ("generate", student, "--prompt", "red", "--steps", 1, "--out", pictures)
    assert done(*words).out == f"1 pictures in {pictures}\n"


def test_libraries_print_nothing_of_their_own(v1_folder: Path, tmp_path: Path) -> None:
    result = python("-m", "bksdm", "prune", v1_folder, "--recipe", "small", "--out", tmp_path / "student", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["out"] == str(tmp_path / "student")


# Describe


@pytest.fixture(params=["v1", "v2"])
def bare(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that holds only the published teacher's unet/config.json."""
    folder = tmp_path / request.param
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps(UNETS[request.param]))
    return folder


@pytest.mark.parametrize("recipe", ["whole", *RECIPES])
def test_describe_gives_the_published_figures(done: Run, bare: Path, recipe: str) -> None:
    described = done("describe", bare, *(() if recipe == "whole" else ("--recipe", recipe)), "--json").json
    published = FACTS["unets"][f"{bare.name}-{recipe}"]
    assert described["unet"]["params"] == published["params"]
    assert described["unet"]["gmacs_modules"] == pytest.approx(published["gmacs_modules"], abs=0.12)
    assert described["unet"]["gmacs_all"] == pytest.approx(published["gmacs_all"], abs=0.05)
    assert described["teacher_unet"]["params"] == FACTS["unets"][f"{bare.name}-whole"]["params"]
    assert described["latent_size"] == 64
    assert bool(described["removed"]) == (recipe != "whole")


@pytest.mark.parametrize("recipe", RECIPES)
def test_describe_draws_what_goes(done: Run, tmp_path: Path, recipe: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(UNETS["v1"]))
    text = done("describe", tmp_path, "--recipe", recipe).out
    assert f"{FACTS['unets'][f'v1-{recipe}']['params'] / 1e6:.1f} M parameters" in text
    assert ("." * len("RAR") in text.split("mid_block")[1].splitlines()[0]) == (recipe != "base")


def test_describe_takes_a_recipe_of_ones_own(done: Run, bare: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\nmid: false\n")
    described = done("describe", bare, "--recipe", tmp_path / "mine.yaml", "--json").json
    assert described["recipe"]["name"] == "mine"
    assert described["removed"] == ["mid_block"]


@pytest.mark.parametrize("recipe", XL_FACTS["params"])
def test_describe_gives_the_figures_of_sdxl(done: Run, tmp_path: Path, recipe: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(XL))
    described = done("describe", tmp_path, *(() if recipe == "whole" else ("--recipe", recipe)), "--json").json
    assert described["unet"]["params"] == XL_FACTS["params"][recipe]
    assert described["teacher_unet"]["params"] == 2_567_463_684
    assert {reader["program"] for reader in described["read_by"]} >= {"diffusers", "ComfyUI", "stable-diffusion.cpp"}


def test_describe_reads_no_weights(done: Run, v1_folder: Path, bare: Path) -> None:
    assert done("describe", v1_folder, "--json").json["unet"]["params"] < 1e7
    assert sorted(path.name for path in bare.rglob("*") if path.is_file()) == ["config.json"]
    assert done("describe", bare).code == 0


@pytest.mark.parametrize(
    ("config", "recipe"),
    [
        (UNETS["v1"], "small"),
        (XL, "vega"),
        ({"_class_name": "FluxTransformer2DModel"}, "half"),
        ({"_class_name": "Flux2Transformer2DModel"}, "half"),
        ({"_class_name": "ZImageTransformer2DModel"}, "half"),
    ],
    ids=["sd", "sdxl", "flux", "flux2", "z-image"],
)
def test_a_config_is_described_without_torch(config: dict, recipe: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = imported("-m", "bksdm", "describe", tmp_path, "--recipe", recipe)
    assert not found & {*HEAVY, "numpy", "PIL", "huggingface_hub"}


@pytest.mark.parametrize("model", ["emoji", "emoji-flow"])
def test_a_folder_is_described_without_torch(model: str) -> None:
    assert not imported("-m", "bksdm", "describe", model) & {*HEAVY, "numpy", "PIL", "huggingface_hub"}


def test_a_folder_is_pruned_without_torch(v1_folder: Path, tmp_path: Path) -> None:
    words = ("-m", "bksdm", "prune", v1_folder, "--recipe", "small", "--out", tmp_path / "student")
    assert not imported(*words) & {*HEAVY, "huggingface_hub"}


def test_evaluate_imports_what_draws_when_a_model_draws() -> None:
    assert not imported("-c", "import bksdm.evaluate.run") & {"diffusers", "transformers", "peft", "accelerate"}


@pytest.mark.parametrize("header", [True, False], ids=["ours", "published"])
def test_a_single_file_is_described_without_torch(
    done: Run, v1_folder: Path, v1_teacher: DiffusionPipeline, tmp_path: Path, header: bool
) -> None:
    file = tmp_path / "whole.safetensors"
    write_single_file(v1_teacher, file)
    if not header:
        save_file(load_file(file), file)
    assert not imported("-m", "bksdm", "describe", file) & HEAVY
    described, whole = (done("describe", model, "--json").json for model in (file, v1_folder))
    assert described["unet"]["params"] == whole["unet"]["params"]


@pytest.mark.slow
def test_verbs_import_what_draws_charts_when_there_is_one(v1_folder: Path, tmp_path: Path) -> None:
    """And prune nothing that others need."""
    others = "import bksdm.distill.run, bksdm.evaluate.run, bksdm.pruning.sensitivity.run, bksdm.quickstart.run"
    words = ["prune", str(v1_folder), "--recipe", "small", "--out", str(tmp_path / "student")]
    script = f"import sys; from bksdm.cli import _run; _run({words!r}); first = set(sys.modules); {others}; "
    script += "assert not first & {'datasets', 'pyarrow', 'gradio', 'onnx', 'openvino', 'lycoris'}"
    assert not imported("-c", script) & {"matplotlib", "tensorboard"}
    assert (tmp_path / "student" / "recipe.yaml").exists()


# Failures


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb with a fault of our own."""

    def fault(options: object) -> None:
        raise KeyError("no such tensor\nin the second line")

    monkeypatch.setitem(cli.VERBS, "describe", ("pruning.DescribeOptions", fault))


@pytest.mark.usefixtures("breaks")
def test_a_fault_of_our_own_is_one_line_and_code_1(run: Run) -> None:
    outcome = run("describe", "emoji")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.said == [r"bksdm: failed: KeyError: 'no such tensor\nin the second line' (--debug shows where)"]


@pytest.mark.usefixtures("breaks")
def test_debug_shows_where(run: Run) -> None:
    outcome = run("describe", "emoji", "--debug")
    assert (outcome.code, outcome.out) == (1, "")
    assert "Traceback" in outcome.err
    assert "in fault" in outcome.err


@pytest.mark.parametrize("words", [("nonsense", "--debug"), ("--debug", "nonsense"), ("prune", "--debug")])
def test_debug_adds_a_traceback_and_keeps_the_code(run: Run, words: tuple[str, ...]) -> None:
    outcome = run(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Traceback" in outcome.err
    assert outcome.said[-1].startswith("bksdm: ")


def test_without_debug_there_is_no_traceback(run: Run) -> None:
    outcome = run("describe", "./nowhere")
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert len(outcome.said) == 1


def test_an_interrupt_ends_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "describe", ("pruning.DescribeOptions", interrupted))
    outcome = run("describe", "emoji")
    assert (outcome.code, outcome.out, outcome.said) == (130, "", ["bksdm: stopped by SIGINT"])


@pytest.mark.parametrize("swallowed", [False, True], ids=["as it is", "as an error of a library"])
def test_sigterm_ends_with_143_and_only_while_a_verb_runs(
    run: Run, monkeypatch: pytest.MonkeyPatch, swallowed: bool
) -> None:
    def terminated(options: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            os.kill(os.getpid(), signal.SIGTERM)  # while it is cleaned up, another changes nothing
            if swallowed:
                raise RuntimeError("conversion failed") from error
            raise

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(cli.VERBS, "describe", ("pruning.DescribeOptions", terminated))
    outcome = run("describe", "emoji")
    assert (outcome.code, outcome.out, outcome.said) == (143, "", ["bksdm: stopped by SIGTERM"])
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("words", ["distill --print_config --teacher t", "distill --help", "generate --print_config"])
def test_a_reader_that_has_enough_is_no_error(words: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m bksdm {words} | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 128 + signal.SIGPIPE)
    assert "bksdm" not in done.stderr


def test_what_one_process_does_is_refused_to_several(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = run("describe", "emoji")
    assert outcome.code == 2
    assert outcome.said == [
        "bksdm: describe is done by one process; run it without the launcher, "
        "or launch prepare, distill, lcm, generate, evaluate"
    ]
