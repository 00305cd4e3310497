"""Measures of quality and side-by-side reports."""
