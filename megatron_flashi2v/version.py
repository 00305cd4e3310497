"""The release, on its own so that whatever records it need not import the package's face."""

__version__ = "0.2.0"
