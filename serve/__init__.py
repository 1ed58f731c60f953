"""Runtimes: start them, check them against the fake-quant model, measure them."""
