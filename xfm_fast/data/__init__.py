"""Data loading: files → rows → items → batches.

- Files: `files` finds and indexes them, `records` holds their readers, `converting` rewrites them.
- Rows of fine-tuning files: `annotations` validates them, `tables` and `collection` read them.
- Items: `texts`, `masking`, `images`, `transforms` and `regions` process a record, `options`
  configures that, `items` collates a batch.
- Batches: `streams` orders and loads them and logs broken rows, `fingerprints` records images that
  were read.
- `shapes` generates a dataset.
"""
