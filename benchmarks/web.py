"""What a student costs in the browser: download, seconds a picture beside native onnxruntime, and memory of the tab.

    bksdm export STUDENT --to web --out runs/web
    python benchmarks/web.py runs/web                                # 4 steps, both ways in turns
    python benchmarks/web.py --full runs/web_full                    # writes BK-SDM-Tiny, random, in 8 and 4 bits
    python benchmarks/web.py runs/web_full/int8 runs/web_full/int4 --steps 2 --guidance 1 --rounds 1

Headless Chromium draws by WebAssembly with as many threads as the machine has cores, and native onnxruntime from the
same files with as many. Memory is the most that the tab's process held while it loaded and drew.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from diffusers import AutoencoderTiny
from full_size import stable_diffusion
from playwright.sync_api import Page, sync_playwright

from bksdm.common.runs import provenance
from bksdm.export import to_onnx, to_web
from bksdm.export.formats import Source
from bksdm.families.recipe import load_recipe
from bksdm.generate.web import server
from bksdm.models.decoder import with_autoencoder
from bksdm.pruning.run import prune_unet, with_denoiser
from bksdm.runtime.folder import open_folder

PROMPT = "red apple, noto style"
MIB = 2**20
BITS = {"int8": 8, "int4": 4}
SIDE = 512
OPEN = """async () => {
    const { open } = await import("/bksdm.js");
    const began = performance.now();
    globalThis.model = await open({ base: "/", gpu: false });
    return (performance.now() - began) / 1000;
}"""
DRAW = """async (wish) => {
    const times = [];
    const { seconds } = await model.draw(wish, { onProgress: ({ step }) => step && times.push(performance.now()) });
    return { seconds, steps: times.slice(1).map((time, i) => (time - times[i]) / 1000) };
}"""


def write_full(out: Path) -> None:
    """BK-SDM-Tiny at full size, random, with a decoder of TAESD's size, as the export writes it; it is not compared."""
    teacher = stable_diffusion()
    tiny = with_denoiser(teacher, prune_unet(teacher.unet, load_recipe("tiny"))[0])
    source = Source("tiny", with_autoencoder(tiny, AutoencoderTiny().eval()), None, "fp32", SIDE, SIDE)
    print(f"memory, as the export says it: {to_web.memory(source) / MIB:.0f} MiB", flush=True)
    (out / "onnx").mkdir(parents=True)
    to_onnx.write(source, out / "onnx")
    for precision, bits in BITS.items():
        folder = Path(shutil.copytree(out / "onnx", out / precision))
        for file in folder.rglob(to_onnx.MODEL_FILE):
            to_onnx.to_integers(file, bits)
        made = dataclasses.replace(source, precision=precision)
        to_web.add_page(made, folder)
        to_web.add_manifest(made, folder)
        print(precision, "written", flush=True)


def measure(folder: Path, steps: int, guidance: float, rounds: int) -> str:
    """A row of the table."""
    manifest = json.loads((folder / "manifest.json").read_text())
    entries = [
        entry
        for name, network in manifest["networks"].items()
        if name != "vae_encoder"
        for entry in (network["graph"], *network["weights"])
    ]
    weights, runtime = sum(entry["bytes"] for entry in entries), manifest["runtime"]["wasm"]
    wish = {"prompt": PROMPT, "seed": 0, "steps": steps, "guidance": guidance, "preview": False}
    native = native_drawer(folder, steps, guidance)
    with tab(folder) as (page, peak):
        opening = page.evaluate(OPEN)
        if rounds > 1:
            page.evaluate(DRAW, wish)  # warms up
            native()
        turns = [(page.evaluate(DRAW, wish), native()) for _ in range(rounds)]
        memory = peak()
    seconds = statistics.median(drawn["seconds"] for drawn, _ in turns)
    step = statistics.median(step for drawn, _ in turns for step in drawn["steps"])
    ratio = statistics.median(drawn["seconds"] / alone for drawn, alone in turns)
    cells = [
        f"{manifest['precision']}, {manifest['shape']['width']} px, {steps} steps, guidance {guidance:g}",
        f"{weights / MIB:.1f} + {runtime / MIB:.1f}",
        f"{max(entry['bytes'] for entry in entries) / MIB:.1f}",
        f"{opening:.1f}",
        f"{seconds:.2f}",
        f"{step:.2f}",
        f"{statistics.median(alone for _, alone in turns):.2f}",
        f"{ratio:.1f}",
        f"{memory / MIB:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def native_drawer(folder: Path, steps: int, guidance: float) -> Callable[[], float]:
    """Draws the same by onnxruntime, and gives the seconds."""
    pipeline = open_folder(folder, threads=os.cpu_count())

    def draw() -> float:
        began = time.perf_counter()
        list(pipeline.sample([PROMPT], [0], steps=steps, guidance=guidance))
        return time.perf_counter() - began

    return draw


@contextmanager
def tab(folder: Path) -> Iterator[tuple[Page, Callable[[], int]]]:
    """A page of the folder's address in Chromium, and what gives the most memory that its process held so far."""
    with server(str(folder), "127.0.0.1", 0) as opened, sync_playwright() as started:
        threading.Thread(target=opened.serve_forever, daemon=True).start()
        path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(0)
        page.goto(f"http://127.0.0.1:{opened.server_port}/manifest.json")
        most, over = [0], threading.Event()
        watch = threading.Thread(target=_watch, args=(most, over))
        watch.start()
        yield page, lambda: most[0]
        over.set()
        watch.join()
        browser.close()
        opened.shutdown()


def _watch(most: list[int], over: threading.Event) -> None:
    while not over.wait(0.1):
        for process in psutil.Process().children(recursive=True):
            try:
                if "--type=renderer" in process.cmdline():
                    most[0] = max(most[0], process.memory_info().rss)
            except psutil.Error:
                continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--full", type=Path, help="where BK-SDM-Tiny is written")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.full:
        write_full(given.full)
    if not given.folders:
        return
    print("| export | download, MiB | largest file | opened, s | a picture, s | a step | native | ratio | tab, MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for folder in given.folders:
        print(measure(folder, given.steps, given.guidance, given.rounds), flush=True)
    about = provenance()
    print(f"\n{about['processor']}, {os.cpu_count()} cores, {about['started'][:10]}; onnxruntime-web 1.30.0.")


if __name__ == "__main__":
    main()
