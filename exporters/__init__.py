"""Exporters: one module per wire format, each with `write`, `read` and `carries`. Codes are moved, never re-rounded."""
