#!/usr/bin/env bash
# datasets 5.2.0 cannot load the folder that img2dataset writes with output_format="parquet" by
# load_dataset("parquet", data_dir=FOLDER): it reads img2dataset's 00000_stats.json as parquet and ends in
# DatasetGenerationError, whose own text does not say why.
#
# It matters to whoever keeps pictures in that layout. load_dataset(FOLDER) and data_files="FOLDER/*.parquet" read it.
# The files below have img2dataset's names and columns.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1
cd "$folder"
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> log <<'PYTHON'
import json
from importlib.metadata import version
from pathlib import Path

import pyarrow
import pyarrow.parquet
from datasets import load_dataset

print("datasets", version("datasets"))
Path("out").mkdir()
for shard in range(2):
    columns = {"key": [f"{shard:05d}0000"], "caption": ["a cat"], "status": ["success"], "jpg": [b"\xff\xd8"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), f"out/{shard:05d}.parquet")
    Path(f"out/{shard:05d}_stats.json").write_text(json.dumps({"count": 1, "successes": 1}))


def columns(*words, **options):
    try:
        return load_dataset(*words, split="train", **options).column_names
    except Exception as error:
        return f"{type(error).__name__}: {error}"


found = {
    'load_dataset("parquet", data_dir="out")': columns("parquet", data_dir="out"),
    'load_dataset("./out")': columns("./out"),
    'load_dataset("parquet", data_files="out/*.parquet")': columns("parquet", data_files="out/*.parquet"),
}
for call, result in found.items():
    print(call, "->", result)
first, second, third = found.values()
assert second == third == ["key", "caption", "status", "jpg"], found
assert str(first).startswith("DatasetGenerationError"), "data_dir reads only parquet now"
PYTHON
