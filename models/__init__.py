"""Priors that ship with the package: weights, model cards and the scripts that made them."""
