"""Every command of the README and of the pages exists and takes these options."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from bksdm import api
from bksdm.cli import options_of, parse
from bksdm.runtime import __main__ as runtime

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PROJECT = (ROOT / "pyproject.toml").read_text()
README = (ROOT / "README.md").read_text()
NAMED = ("index", "evaluation", "decoder", "few-steps", "method", "faq")
PAGES = "".join(
    page.read_text()
    for page in (
        *(DOCS / f"{name}.md" for name in NAMED),
        *sorted((DOCS / "exports").iterdir()),
        *sorted((DOCS / "guides").iterdir()),
    )
)


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README + PAGES, re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_there_are_commands() -> None:
    assert len(commands()) >= 8


@pytest.mark.parametrize("command", commands())
def test_a_command_is_understood(command: str) -> None:
    program, verb, *given = shlex.split(command, comments=True)
    if program == "make":
        assert re.search(rf"^{verb}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        extras = re.findall(r"bksdm\[(.*)\]", given[-1])
        assert set(",".join(extras).split(",")) <= tomllib.loads(PROJECT)["project"]["optional-dependencies"].keys() | {
            ""
        }
    elif program == "python" and given[0] == "bksdm.runtime":
        runtime._parser().parse_args(given[1:])
    elif program == "python":
        script = (ROOT / verb).read_text()
        assert all(f'"{flag}"' in script for flag in given if flag.startswith("--"))
    else:
        assert program in ("bksdm", ".venv/bin/bksdm")
        parse(options_of(verb), verb, given)


def launched() -> list[tuple[str, str]]:
    """(file, command line of bksdm) in the launch examples."""
    found = []
    for file in sorted((ROOT / "examples" / "launch").iterdir()):
        text = "\n".join(line for line in file.read_text().splitlines() if not line.lstrip().startswith("#"))
        commands = re.findall(r"\bbksdm (\w+ .*)", re.sub(r"\s*\\\n\s*", " ", text))
        # A command inside the quotes of another ends with the quote that closes them.
        found += [(file.name, command[:-1] if command.count('"') % 2 else command) for command in commands]
    return found


def test_every_launch_example_starts_something() -> None:
    assert {name for name, _ in launched()} == {"eight_gpus.sh", "one_gpu.sh", "slurm.sbatch", "two_nodes.sh"}


@pytest.mark.parametrize(("name", "command"), launched())
def test_a_launch_example_is_understood(name: str, command: str) -> None:
    verb, *given = shlex.split(command)
    parse(options_of(verb), verb, given)


@pytest.mark.parametrize("name", ["one_gpu.sh", "eight_gpus.sh", "two_nodes.sh", "slurm.sbatch"])
def test_a_launch_example_is_a_script(name: str) -> None:
    file = ROOT / "examples" / "launch" / name
    assert subprocess.run(["bash", "-n", str(file)], check=False).returncode == 0


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_library_example_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "tiny" / "model_index.json").is_file()


def test_the_files_that_the_readme_names_are_there() -> None:
    for path in re.findall(r"^(src/\S+|examples/\S+|benchmarks/\S*|docs/\S+)", README, re.MULTILINE):
        assert (ROOT / path).exists(), path


def test_the_public_surface() -> None:
    functions = {"derive", "describe", "distill", "evaluate", "foresee", "generate", "prepare", "prune", "prune_unet"}
    functions |= {"benchmark", "latencies", "quickstart", "sample", "sensitivity", "distill_decoder", "with_decoder"}
    functions |= {"export", "lcm", "few_step_scheduler"}
    functions |= {"adapt", "demo", "fidelity", "load_controlnet", "merge_lora", "motion_unet", "personalize", "push"}
    options = {"DistillOptions", "EvaluateOptions", "GenerateOptions", "PrepareOptions", "PruneOptions"}
    options |= {
        "BenchmarkOptions",
        "DecoderOptions",
        "ExportOptions",
        "LcmOptions",
        "QuickstartOptions",
        "SensitivityOptions",
    }
    options |= {"AdaptOptions", "DemoOptions", "FidelityOptions", "PersonalizeOptions", "PushOptions"}
    models = {"load_pipeline", "load_recipe", "save_pipeline", "Origin"}
    kinds = {"Description", "InputError", "Interrupted", "Plan", "Pruning", "Recipe", "Request"}
    kinds |= {"Adapted", "Benchmark", "Consistency", "Exported", "Pushed", "Sensitivity", "Spared"}
    kinds |= {"CaptionPool", "Captions", "Conditions", "Distillation", "LossWeights", "NoiseSchedule"}
    assert set(api.__all__) == functions | options | models | kinds
    assert all(getattr(api, name) for name in api.__all__)
