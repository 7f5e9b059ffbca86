"""Datasets: importing this package registers them in Detectron2's catalogs."""

from . import digits

digits.register()
