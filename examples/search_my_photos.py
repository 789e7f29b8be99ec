"""Find one's photos by words: index a folder, then ask it.

    python examples/search_my_photos.py FOLDER TEXT [MODEL]

MODEL is a CLIP of sentence-transformers, or an X-FM: a run, a folder that save_pretrained wrote, or a name on the
Hugging Face Hub. Without one the weights are random, so that all can be tried and nothing is found.
"""

import sys

from xfm_fast.search import Source, build_index, open_encoder, open_index, search, write_sheet

folder, text, *rest = sys.argv[1:]
encoder = open_encoder(Source(rest[0]) if rest else Source(random="tiny"))
report = build_index(folder, encoder)  # again: reads only what is new or has changed
print(f"{report.entries} images, of which {report.added} were read now, in {report.folder}")
for name, reason in report.faults.items():
    print(f"left out {name}: {reason}")
index = open_index(folder)
found = search(index, encoder, text, top=5)
if encoder.source.random:
    print("the weights are random: this order means nothing")
for hit in found.hits:
    print(f"{hit.score:.1%}  {hit.location}  {hit.entry.caption or ''}")
print(f"contact sheet: {write_sheet('found.html', text, found, index)}")
