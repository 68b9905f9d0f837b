"""The families of models that are known: a module each, which says FAMILY.

Another module here is another known family; nothing else lists them.
"""

import importlib
import pkgutil

from dsjax.checkpoints.family import Family

FAMILIES: tuple[Family, ...] = tuple(
    importlib.import_module(f'{__name__}.{module.name}').FAMILY
    for module in pkgutil.iter_modules(__path__))
