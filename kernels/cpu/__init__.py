"""The CPU path: oneDNN or MKL products, whichever this machine runs faster, and attention built from them."""
