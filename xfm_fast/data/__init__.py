"""Reading data: from files, by way of rows and items, to the batches of a stream.

`files` finds and indexes files, `records` reads any row of them, `options` says how, `texts`, `images`, `regions`,
`masking` and `transforms` make what a batch holds, `items` puts it together and `streams` orders it. `quarantine` lists
broken rows, `checking` finds them beforehand, `converting` rewrites files; `annotations` are the files of fine-tuning,
and `shapes` is a world that needs none.
"""
