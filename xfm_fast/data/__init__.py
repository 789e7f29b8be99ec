"""From files to tensors: decoding, transforms and the readers of the official formats."""
