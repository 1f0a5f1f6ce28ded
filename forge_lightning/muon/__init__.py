"""Muon: steps of matrices with singular values near 1."""
