"""Fine-tune retrieval on a CSV of `image,caption`, then ask the model about an image.

    python examples/finetune_on_my_csv.py PAIRS.csv MODEL_FOLDER [key=value ...]

Paths in the CSV begin in its folder. MODEL_FOLDER is a pretrained model with its tokenizer; key=value changes the
recipe, such as epochs=3.
"""

import csv
import sys
from pathlib import Path

import xfm_fast
from xfm_fast.finetuning.recipe import load_finetune_recipe
from xfm_fast.finetuning.run import finetune

table, model, *changes = sys.argv[1:]
recipe = load_finetune_recipe(
    "retrieval_csv", [f"data.train={table}", f"init.checkpoint={model}", *changes]
)
finetune(recipe)
print(f"saved: {recipe.checkpoint.folder}")
with open(table, encoding="utf-8-sig", newline="") as file:
    rows = [row for row, _ in zip(csv.DictReader(file), range(3), strict=False)]
predictor = xfm_fast.load(recipe.checkpoint.folder)
(answer,) = predictor.predict(
    [Path(table).parent / rows[0]["image"]], [row["caption"] for row in rows]
)
for text in answer["texts"]:
    print(f"{text['score']:.3f}  {text['text']}")
