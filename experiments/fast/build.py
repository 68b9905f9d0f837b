"""Compiles the simulator with mypyc, for .venv-fast.

  make fast
  .venv-fast/bin/python -m experiments.place ...    # or any other runner

The same sources, the same event logs and records, byte for byte, and about
half of the CPU time (`make test-fast`). Needs a C compiler. It takes half a
minute, and only .venv-fast changes: wheels and .venv stay pure Python.
"""

import json
import pathlib
import shutil
import sys
import sysconfig
import tempfile

from experiments.fast import finder

ROOT = pathlib.Path(__file__).parents[2]
# What a simulation spends its time in. Not policy.py, whose values are
# pickled, nor data only (events.py, record.py).
MODULES = {
    'analysis': ('recorder',),
    'scheduling': (
        'batches', 'choices', 'distserve', 'host_tier', 'live',
        'lookahead', 'pace', 'page_pool', 'prefix_cache', 'recent', 'residents',
        'scheduler', 'state', 'streaming', 'views'),
    'simulation': ('executors', 'instance', 'simulator'),
}
# Types are read of these too, which hold what was checked or is the scheduler's
# own. What else is imported has none: a policy may answer anything.
TYPED = ('analysis.record', 'config.engine', 'config.placement',
         'scheduling.events')
CONFIG = '\n'.join([
    '[mypy]', 'follow_imports = skip', 'ignore_missing_imports = True',
    *(f'[mypy-dsjax.{name}]\nfollow_imports = silent' for name in TYPED)])


def build(site: pathlib.Path) -> None:
  """Compiles MODULES and installs them and the finder in a site-packages."""
  import setuptools  # only .venv-fast has both
  from mypyc.build import mypycify

  sources = {f'dsjax.{folder}.{name}': f'dsjax/{folder}/{name}.py'
             for folder, names in MODULES.items() for name in names}
  target = site / 'dsjax_fast_modules'
  with tempfile.TemporaryDirectory() as folder:
    made = pathlib.Path(folder, 'made')
    config = pathlib.Path(folder, 'mypy.ini')
    config.write_text(CONFIG)
    digests = {name: finder.digest(ROOT / source)
               for name, source in sources.items()}
    compiling = setuptools.Distribution({
        'name': 'dsjax-fast', 'ext_modules': mypycify(
            [f'--config-file={config}', '--cache-dir', f'{folder}/cache',
             *sources.values()],
            debug_level='0', opt_level='2', target_dir=f'{folder}/c')
    }).get_command_obj('build_ext')
    compiling.build_lib, compiling.build_temp = str(made), folder
    compiling.ensure_finalized()
    compiling.run()
    (made / finder.MANIFEST).write_text(json.dumps(digests, indent=1))
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(made, target)
  shutil.copy(finder.__file__, site / 'dsjax_fast.py')
  (site / 'dsjax_fast.pth').write_text(
      'import dsjax_fast; dsjax_fast.install()\n')


if __name__ == '__main__':
  if sys.argv[1:]:  # --help: it takes nothing
    print(__doc__)
    sys.exit(0 if sys.argv[1:] == ['--help'] else 2)
  if sys.prefix == sys.base_prefix:
    sys.exit('Run `make fast`: it makes an environment of its own first.')
  build(pathlib.Path(sysconfig.get_path('purelib')))
