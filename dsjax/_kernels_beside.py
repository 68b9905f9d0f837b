"""In a checkout, `dsjax.kernels` is the folder kernels/ beside dsjax/.

Of this very checkout, whatever is installed: the finder of an editable install
would otherwise lend the kernels of another one. A wheel has them inside.
"""

import importlib.util
import pathlib
import sys


def _load() -> None:
  """Imports it, whose importers follow.

  Raises:
    ImportError: dsjax/ was copied without kernels/.
  """
  package = pathlib.Path(__file__).resolve().parent
  if (package / 'kernels' / '__init__.py').exists():
    return
  folder = package.parent / 'kernels'
  spec = importlib.util.spec_from_file_location(
      'dsjax.kernels', folder / '__init__.py',
      submodule_search_locations=[str(folder)])
  if spec is None or spec.loader is None or not spec.origin or not (
      folder / '__init__.py').exists():
    raise ImportError(f'{package} needs the folder kernels/ of its checkout '
                      f'beside it: {folder} is not there')
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  vars(sys.modules['dsjax'])['kernels'] = module
  spec.loader.exec_module(module)


_load()
