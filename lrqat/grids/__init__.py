"""The families of grids: affine, K-quants, codebooks."""
