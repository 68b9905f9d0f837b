"""In a checkout, `dsjax.kernels` is the folder kernels/ beside dsjax/.

Of this very checkout, whatever is installed: the finder of an editable install
would otherwise lend the kernels of another one. A wheel has them inside.
"""

import importlib.util
import pathlib
import sys


def _load():
  here = pathlib.Path(__file__).resolve().parent
  init = here.parent / 'kernels' / '__init__.py'
  if (here / 'kernels').exists() or not init.exists():
    return
  spec = importlib.util.spec_from_file_location(
      'dsjax.kernels', init, submodule_search_locations=[str(init.parent)])
  module = importlib.util.module_from_spec(spec)
  sys.modules['dsjax.kernels'] = sys.modules['dsjax'].kernels = module
  spec.loader.exec_module(module)


_load()
