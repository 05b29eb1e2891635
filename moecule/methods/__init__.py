"""One paper, one file. Methods see sums and matrices, and know nothing of each other."""
