"""The command line: one verb a module, imported when it is used, so that `bksdm --help` is instant."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

from bksdm.common.errors import InputError

if TYPE_CHECKING:
    from types import FrameType

    from bksdm.options.adapt import AdaptOptions
    from bksdm.options.data import PrepareOptions
    from bksdm.options.distill import DecoderOptions, DistillOptions, LcmOptions
    from bksdm.options.evaluate import BenchmarkOptions, EvaluateOptions
    from bksdm.options.export import ExportOptions, PushOptions
    from bksdm.options.generate import DemoOptions, GenerateOptions
    from bksdm.options.personalize import FidelityOptions, PersonalizeOptions
    from bksdm.options.pruning import DescribeOptions, PruneOptions, SensitivityOptions
    from bksdm.options.quickstart import QuickstartOptions

BAD_INPUT, FAILURE = 2, 1
_UNFIT = re.compile(r'Parser key "(?P<name>\w+)": .*(Given value|Got value): (?P<value>.*)')
_KINDS = (
    ("list[float]", "a list of numbers"),
    ("list[int]", "a list of whole numbers"),
    ("list[str]", "a list of texts"),
    ("bool", "true or false"),
    ("int", "a whole number"),
    ("float", "a number"),
    ("str", "a text"),
)


def _describe(options: DescribeOptions) -> None:
    from bksdm.pruning.describe import describe

    description = describe(options.model, options.recipe)
    _answer(description.to_dict(), options.json, description.text())


def _prune(options: PruneOptions) -> None:
    from bksdm.pruning.repair.record import Repaired
    from bksdm.pruning.run import prune

    description = prune(options)
    repaired = Repaired.read(options.out)
    result = {"out": options.out, **description.to_dict()} | ({"repair": repaired.to_dict()} if repaired else {})
    text = f"{description.text()}\n\n{repaired.text()}" if repaired else description.text()
    _answer(result, options.json, f"{text}\nstudent in {options.out}")


def _prepare(options: PrepareOptions) -> None:
    from bksdm.data.prepare import prepare

    made = prepare(options)
    text = (
        f"{made['pictures']} pictures in {options.out}, {made['skipped']} skipped; {made['images_per_second']:.1f} "
        f"images/s a process, and the VAE alone {made['vae_images_per_second']:.1f}"
    )
    _answer({"out": options.out, **made}, options.json, text)


def _distill(options: DistillOptions) -> None:
    from bksdm.distill.run import distill, foresee

    if options.plan:
        plan = foresee(options)
        _answer(plan.to_dict(), options.json, plan.text())
        return
    student = str(distill(options))
    _answer({"student": student}, options.json, f"student in {student}")


def _decoder(options: DecoderOptions) -> None:
    from bksdm.distill.decoder import distill_decoder

    decoder = str(distill_decoder(options))
    _answer({"decoder": decoder}, options.json, f"decoder in {decoder}")


def _lcm(options: LcmOptions) -> None:
    from bksdm.distill.few_steps import lcm

    student = str(lcm(options))
    _answer({"student": student}, options.json, f"student in {student}")


def _personalize(options: PersonalizeOptions) -> None:
    from bksdm.personalize.run import personalize

    made = str(personalize(options))
    _answer({"out": made}, options.json, f"{'LoRA' if options.lora else 'model'} in {made}")


def _push(options: PushOptions) -> None:
    from bksdm.export.push import push

    made = push(options)
    _answer(made.to_dict(), options.json, made.text())


def _demo(options: DemoOptions) -> None:
    if options.web:
        from bksdm.generate.web import serve_web

        serve_web(options)
        return
    from bksdm.generate.demo import demo

    demo(options)


def _fidelity(options: FidelityOptions) -> None:
    from bksdm.personalize.fidelity import fidelity, text_table

    result = fidelity(options)
    _answer(result, options.json, f"{text_table(result)}\ngrid in {options.out}/grid.png")


def _adapt(options: AdaptOptions) -> None:
    from bksdm.models.adapters.run import adapt

    made = adapt(options)
    _answer(made.to_dict(), options.json, made.text())


def _generate(options: GenerateOptions) -> None:
    from bksdm.generate.run import generate

    paths = [str(path) for path in generate(options)]
    _answer({"pictures": paths}, options.json, f"{len(paths)} pictures in {options.out}")


def _evaluate(options: EvaluateOptions) -> None:
    from bksdm.evaluate.run import evaluate
    from bksdm.evaluate.table import text_table

    result = evaluate(options)
    _answer(result, options.json, f"{text_table(result)}\nreport in {options.out}/report.html")


def _benchmark(options: BenchmarkOptions) -> None:
    from bksdm.evaluate.benchmark import benchmark

    result = benchmark(options)
    _answer(
        result.to_dict(), options.json, result.text() + (f"\nbenchmark.json in {options.out}" if options.out else "")
    )


def _sensitivity(options: SensitivityOptions) -> None:
    from bksdm.pruning.sensitivity.run import sensitivity

    found = sensitivity(options)
    recipe = f"\nrecipe in {options.out}/recipe.yaml" if found.choice else ""
    text = f"{found.text()}{recipe}\nreport in {options.out}/report.html"
    _answer({"out": options.out, **found.to_dict()}, options.json, text)


def _export(options: ExportOptions) -> None:
    from bksdm.export.run import export

    made = export(options)
    _answer(made.to_dict(), options.json, made.text())


def _quickstart(options: QuickstartOptions) -> None:
    from bksdm.quickstart.run import quickstart

    print(f"report in {quickstart(options)}")


# Of each verb, where its options are in `bksdm.options`, and what it does.
VERBS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "quickstart": ("quickstart.QuickstartOptions", _quickstart),
    "describe": ("pruning.DescribeOptions", _describe),
    "prune": ("pruning.PruneOptions", _prune),
    "prepare": ("data.PrepareOptions", _prepare),
    "distill": ("distill.DistillOptions", _distill),
    "lcm": ("distill.LcmOptions", _lcm),
    "decoder": ("distill.DecoderOptions", _decoder),
    "personalize": ("personalize.PersonalizeOptions", _personalize),
    "fidelity": ("personalize.FidelityOptions", _fidelity),
    "adapt": ("adapt.AdaptOptions", _adapt),
    "generate": ("generate.GenerateOptions", _generate),
    "evaluate": ("evaluate.EvaluateOptions", _evaluate),
    "benchmark": ("evaluate.BenchmarkOptions", _benchmark),
    "sensitivity": ("pruning.SensitivityOptions", _sensitivity),
    "export": ("export.ExportOptions", _export),
    "push": ("export.PushOptions", _push),
    "demo": ("generate.DemoOptions", _demo),
}

# Verbs that several processes, as `accelerate launch` starts them, do together.
SHARED = ("prepare", "distill", "lcm", "generate", "evaluate")


def options_of(verb: str) -> type[Any]:
    """The options of a verb, which are imported without those of others."""
    module, _, name = VERBS[verb][0].partition(".")
    kind: type[Any] = getattr(import_module(f"bksdm.options.{module}"), name)
    return kind


def main(arguments: list[str] | None = None) -> None:
    """Run one verb and exit: 0 done, 1 failed, 2 bad input, 128 + n stopped by signal n."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        try:
            sys.exit(_run(given))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (KeyboardInterrupt, Exception) as error:
        if debug:
            traceback.print_exception(error)
        sys.exit(_explain(error))


def _run(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if given[0] == "--version":
        from importlib.metadata import version

        print(version("bksdm"))
        return 0
    if given[0] not in VERBS:
        raise InputError(f"unknown verb {given[0]!r}; give one of {', '.join(VERBS)}")
    chosen = parse(options_of(given[0]), given[0], given[1:])
    if _count_started() > 1 and given[0] not in SHARED:
        raise InputError(
            f"{given[0]} is done by one process; run it without the launcher, or launch {', '.join(SHARED)}"
        )
    _quiet()
    with _sigterm_raises():
        if _count_started() > 1:
            from bksdm.common.processes import join

            join()
        VERBS[given[0]][1](chosen)
    return 0


def _quiet() -> None:
    """Keep libraries from printing bars and notices of their own, those too that a verb comes to import."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    pipelines = sys.modules.get("bksdm.models.pipelines")  # what imports it later finds the environment
    if pipelines:
        pipelines.quiet_libraries()


class _Terminated(KeyboardInterrupt):
    signal_number = signal.SIGTERM


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """While inside, SIGTERM raises as Ctrl-C does, so that what is half written goes; a second one changes nothing."""
    told = False

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        nonlocal told
        told = True
        signal.signal(number, signal.SIG_IGN)
        raise _Terminated

    takes = threading.current_thread() is threading.main_thread()  # no other may
    if not takes or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Exception as error:
        if told:  # a library has made an error of its own of it
            raise _Terminated from error
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _count_started() -> int:
    """How many processes a launcher has started, by the environment that it gives them."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def _main_process() -> bool:
    return _count_started() == 1 or os.environ.get("RANK", "0") == "0"


def parse(kind: type[Any], verb: str, given: list[str]) -> Any:
    """The options of a verb from flags over a `--config` file over defaults.

    Raises:
        InputError: A key is unknown, missing, or of the wrong type.
    """
    from docstring_parser import DocstringStyle
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_style=DocstringStyle.GOOGLE)  # by default every style is tried
    parser = ArgumentParser(prog=f"bksdm {verb}", description=_summary(kind), exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of options; flags come on top.")
    parser.add_class_arguments(kind, as_group=False)
    try:
        namespace = parser.parse_args(_spelled_out(kind, given))
    except (ArgumentError, TypeError, ValueError) as error:
        message = _plain(kind, " ".join(str(error).split()))
        raise InputError(f"{message}; see bksdm {verb} --help") from error
    values = {field.name: getattr(namespace, field.name) for field in dataclasses.fields(kind)}
    return kind(**values)


def _plain(kind: type[Any], message: str) -> str:
    """What the parser says of a value of the wrong type, in the words that all other refusals have."""
    unfit = _UNFIT.match(message)
    if not unfit:
        return message
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    of_type = types[unfit["name"]]
    choices = re.findall(r"'([^']+)'", of_type) if "Literal" in of_type else []
    wanted = f"one of {', '.join(choices)}" if choices else next(words for mark, words in _KINDS if mark in of_type)
    return f"{unfit['name']} is {unfit['value']}; give {wanted}"


def _spelled_out(kind: type[Any], given: list[str]) -> list[str]:
    """Short ways of writing, in the form that the parser takes.

    `describe MODEL` means `describe --model MODEL`: a leading word is the verb's first option, or several words
    if that is a list.
    `--json` means `--json=true`, `--batch-size 3` means `--batch_size=3`, and `--prompt A B` or
    `--prompt A --prompt B` a list. A `--config` comes first, so that flags come on top of it wherever it stands.
    """
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    words = list(given)
    if words and not words[0].startswith("-"):
        words.insert(0, f"--{next(iter(types))}")
    config: list[str] = []
    spelled: list[str] = []
    lists: dict[str, list[str]] = {}
    while words:
        flag, equals, value = words.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else ""
        of_type = types.get(name, "")
        if equals:
            words.insert(0, value)
        if "list" in of_type:
            values = lists.setdefault(name, [])
            values += [words.pop(0)] if equals else _until_next_flag(words)
        elif "bool" in of_type and not (equals or (words and words[0].lower() in ("true", "false"))):
            spelled.append(f"--{name}=true")
        elif (of_type or name == "config") and words:
            (config if name == "config" else spelled).append(f"--{name}={words.pop(0)}")
        else:
            spelled.append(f"{flag}={words.pop(0)}" if equals else flag)
    return config + spelled + [f"--{name}={json.dumps(values)}" for name, values in lists.items()]


def _until_next_flag(words: list[str]) -> list[str]:
    """Take the leading words that are no flags."""
    taken = []
    while words and not words[0].startswith("--"):
        taken.append(words.pop(0))
    return taken


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {_summary(options_of(name))}" for name in VERBS]
    return "\n".join(
        [
            "usage: bksdm VERB ... [--config FILE] [--print_config] [--debug]",
            "",
            "Make text-to-image diffusion models small and fast: prune blocks, retrain by distillation.",
            "",
            *lines,
            "",
            "bksdm VERB --help shows a verb's options.",
        ]
    )


def _summary(kind: type[Any]) -> str:
    return (kind.__doc__ or "").splitlines()[0]


def _answer(result: dict[str, Any], as_json: bool, text: str) -> None:
    _say(json.dumps(result) if as_json else text)


def _say(text: str) -> None:
    """On stdout, by one of several processes."""
    if _main_process():
        print(text)


def _explain(error: BaseException) -> int:
    """One line on stderr, and the exit code."""
    number = getattr(error, "signal_number", signal.SIGINT if isinstance(error, KeyboardInterrupt) else None)
    message = " ".join(str(error).split())
    speaker = "bksdm" if _main_process() else f"bksdm (process {os.environ['RANK']})"
    if number is not None:
        print(f"{speaker}: {message or f'stopped by {signal.Signals(number).name}'}", file=sys.stderr)
        return 128 + int(number)
    message = message or type(error).__name__
    if isinstance(error, InputError):
        print(f"{speaker}: {message}", file=sys.stderr)
        return BAD_INPUT
    print(f"{speaker}: failed: {type(error).__name__}: {message} (--debug shows where)", file=sys.stderr)
    return FAILURE


if __name__ == "__main__":
    main()
