"""Data loading: files → rows → items → batches.

`files` finds and indexes files, `records` reads rows, `texts`, `images`, `regions`, `masking` and `transforms` build
the parts of an item, `items` collates them and `streams` orders them. `quarantine` logs skipped samples, `checking`
validates files, `converting` rewrites them, `annotations` parses fine-tuning files, `shapes` generates a dataset.
"""
