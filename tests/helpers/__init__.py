"""Makers of small models, videos and data sets for the tests."""
