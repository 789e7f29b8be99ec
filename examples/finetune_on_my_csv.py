"""Fine-tune retrieval on a CSV of `image,caption`, then ask the model about an image.

    python examples/finetune_on_my_csv.py PAIRS.csv MODEL_FOLDER [key=value ...]

Paths in the CSV begin in its folder. MODEL_FOLDER is a pretrained model with its tokenizer; key=value changes the
recipe, such as epochs=3.
"""

import sys
from pathlib import Path

import xfm_fast
from xfm_fast.finetuning.recipe import load_finetune_recipe
from xfm_fast.finetuning.run import finetune

table, model, *changes = sys.argv[1:]
root, name = Path(table).parent, Path(table).name
mine = [f"data.root={root}", "data.images=.", f"data.train=[{name}]", "data.splits={}", "choose=null", "epochs=1"]
mine += [f"init.checkpoint={model}", "model={}", "tokenizer=null", "checkpoint.folder=runs/my_csv"]
recipe = load_finetune_recipe("retrieval_flickr30k", [*mine, *changes])
finetune(recipe)
print(f"saved: {recipe.checkpoint.folder}")
predictor = xfm_fast.load(recipe.checkpoint.folder)
rows = [line.split(",", 1) for line in Path(table).read_text(encoding="utf-8").splitlines()[1:4]]
(answer,) = predictor.predict([str(root / rows[0][0])], [caption for _, caption in rows])
for text in answer["texts"]:
    print(f"{text['probability']:.1%}  {text['text']}")
