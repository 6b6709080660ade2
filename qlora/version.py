"""The version of the package: what the wheel is named by, and what runs, cards and merged files record."""

__version__ = "0.1.0"
