"""Data loading: files → rows → items → batches.

`files` finds, opens and indexes files, `records` holds their readers, `texts`, `images`, `regions`, `masking` and
`transforms` build the parts of an item, `items` collates them and `streams` orders them. `quarantine` logs skipped
samples, `converting` rewrites files, `annotations`, `tables` and `caption_files` parse fine-tuning files, `shapes`
generates a dataset.
"""
