"""Reading data: files, rows, options, items and batches of streams; decoding, transforms, checks and conversions."""
