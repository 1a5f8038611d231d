#!/usr/bin/env bash
# One of the 1,632 prompts of PartiPrompts.tsv loses its quotation marks in pandas, in datasets' csv builder and in
# Python's csv.excel_tab, without a warning.
#
# The file quotes nothing: a quotation mark is part of its prompt. One prompt begins with one ("G I G G L E" painted
# in ...), and readers that take .tsv for .csv with another comma see a quoted field there, take the marks away and go
# on. Models are then asked for another text than the one that scores were published for. quoting=csv.QUOTE_NONE (3)
# reads the file as it is, also through datasets. The two lines below are in the form of the file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pandas==3.1.1 datasets==5.2.0
cd "$folder"
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> log <<'PYTHON'
import csv
from importlib.metadata import version

import datasets
import pandas

print("pandas", version("pandas"), "datasets", version("datasets"))
PROMPT = '"G I G G L E" painted in thick lettering on a brick wall.'
with open("prompts.tsv", "w", encoding="utf-8") as file:
    file.write(f"Prompt\tCategory\tNote\nbond\tAbstract\t\n{PROMPT}\tIllustrations\t\n")


def with_datasets(**options):
    return datasets.load_dataset("csv", data_files="prompts.tsv", sep="\t", split="train", **options)["Prompt"][1]


with open("prompts.tsv", encoding="utf-8", newline="") as file:
    found = {"csv": [row["Prompt"] for row in csv.DictReader(file, dialect="excel-tab")][1]}
found["pandas"] = pandas.read_csv("prompts.tsv", sep="\t").Prompt[1]
found["datasets"] = with_datasets()
for name, text in found.items():
    print(f"{name}: {text}")
whole = {"pandas": pandas.read_csv("prompts.tsv", sep="\t", quoting=3).Prompt[1], "datasets": with_datasets(quoting=3)}
assert set(whole.values()) == {PROMPT}, whole
assert set(found.values()) == {PROMPT.replace('"', "")}, "the quotation marks stay now"
PYTHON
