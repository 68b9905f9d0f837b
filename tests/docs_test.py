"""The pages for people: what they point to, name and run is there.

Each check is a function of a page and its text that gives what is wrong, so
that it can be asked about planted mistakes too.
"""

import ast
import dataclasses
import functools
import importlib
import json
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

import dsjax
from configs.serve import Serve
from dsjax.http.service import Limits
from tests import layers_test

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', *sorted(
    path.relative_to(ROOT).as_posix() for path in ROOT.glob('docs/*.md'))]
FENCE = re.compile(r'^```(.*)\n((?:.*\n)*?)```$', re.MULTILINE)
LINK = re.compile(r'\]\(([^()\s]+)\)')
SPAN = re.compile(r'`([^`]+)`')
FOLDERS = ('dsjax', 'kernels', 'experiments', 'configs', 'examples', 'docs',
           'tests')
WRITTEN_LATER = ('kernels/tuned.json',)  # by kernels.bench --tune
OF_ABSL = {'help', 'helpfull'}
README_BYTES = 8192
WIDEST_CELL = 110


def read(page):
  """The text of a page."""
  return (ROOT / page).read_text()


def prose(text):
  """A page without its fenced blocks."""
  return FENCE.sub('', text)


def blocks(text):
  """The ```python blocks of a page."""
  return [body for kind, body in FENCE.findall(text) if kind == 'python']


def spans(text):
  """What stands in backticks, each on one line."""
  return [' '.join(span.split()) for span in SPAN.findall(prose(text))]


def command_lines(text):
  """Indented lines and code spans, lines that end in a backslash joined."""
  indented = re.findall(r'^ {4,}(\S.*)$', re.sub(
      r'\\\n\s*', '', prose(text)), re.MULTILINE)
  return indented + spans(text)


# --- links ------------------------------------------------------------------


def anchors(text):
  """The anchors that GitHub gives a page's headings."""
  titles = re.findall(r'^#+ (.*)$', prose(text), re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')
          for title in titles}


def wrong_links(page, text):
  """Links and pictures that lead nowhere."""
  for target in LINK.findall(prose(text)):
    if target.startswith(('https://', 'http://')):
      continue
    name, _, anchor = target.partition('#')
    path = (ROOT / page).parent / name if name else ROOT / page
    if not path.exists():
      yield f'{target}: no such file'
    elif anchor and anchor not in anchors(
        path.read_text() if name else text):
      yield f'{target}: no such heading'


# --- names ------------------------------------------------------------------


def missing(owner, names):
  """The first of a chain of attributes or submodules that is not there."""
  for name in names:
    where = getattr(owner, '__name__', '')
    if not hasattr(owner, name):
      if name in getattr(owner, '__annotations__', ()):
        return None
      try:
        importlib.import_module(f'{where}.{name}')
      except ImportError:
        return f'{where or owner} has no {name}'
    owner = getattr(owner, name)
  return None


def imports(tree):
  """(name it binds, module, name in it or None) of each import."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.asname or alias.name.split('.')[0], alias.name, None
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        yield alias.asname or alias.name, node.module, alias.name


def chain(node):
  """The names of a.b.c; [] of anything else."""
  names = []
  while isinstance(node, ast.Attribute):
    names.insert(0, node.attr)
    node = node.value
  return [node.id, *names] if isinstance(node, ast.Name) else []


def wrong_python(page, text):
  """Blocks that do not compile, or use a name that is not there."""
  known = {'server': dsjax.Orchestrator}  # over all blocks of the page
  for block in blocks(text):
    try:
      tree = ast.parse(block)
    except SyntaxError as error:
      yield f'line {error.lineno} of a block: {error.msg}'
      continue
    for bound, module, name in imports(tree):
      try:
        owner = importlib.import_module(module)
      except ImportError:
        yield f'no module {module}'
        continue
      wrong = name and missing(owner, [name])
      if wrong:
        yield wrong
      elif name:
        known[bound] = getattr(owner, name)
      else:  # `import a.b` binds a, `import a.b as c` a.b
        known[bound] = sys.modules.get(bound, owner)
    for node in ast.walk(tree):
      first, *names = chain(node) or ['']
      wrong = first in known and missing(known[first], names)
      if wrong:
        yield wrong


def wrong_spans(page, text):
  """Dotted names in backticks that are not there."""
  for span in spans(text):
    if not re.match(r'[\w.]+(\(|$)', span):
      continue
    first, *names = span.partition('(')[0].split('.')
    if first.endswith('_test'):
      yield from _wrong_test(first, names)
      continue
    owner = {'dsjax': dsjax, 'server': dsjax.Orchestrator}.get(first)
    if owner is None and names and first in dsjax.__all__:
      owner = getattr(dsjax, first)
    wrong = owner and missing(owner, names)
    if wrong:
      yield wrong


def _wrong_test(module, names):
  paths = list(ROOT.glob(f'tests/**/{module}.py'))
  if not paths:
    yield f'no {module}.py'
  elif names and not any(f'def {names[0]}(' in path.read_text()
                         for path in paths):
    yield f'{module} has no {names[0]}'


def test_every_case_names_its_test():
  rows = [line for line in read('docs/cases.md').split('\n')
          if line.startswith('| ') and not line.startswith('| input |')]
  assert len(rows) > 60
  for row in rows:
    assert re.search(r'`\w+_test\.test_\w+` \|$', row), row


# --- files ------------------------------------------------------------------


def wrong_paths(page, text):
  """Paths in backticks that are not in the tree."""
  for span in spans(text):
    if (re.fullmatch(rf'({"|".join(FOLDERS)})/[\w./-]*', span)
        and span not in WRITTEN_LATER
        and not list(ROOT.glob(span.replace('NAME', '*')))):
      yield f'{span}: no such file'


def listed_folders(text):
  """The folders of the tree that a page draws by indentation."""
  above = {}
  for indent, name in re.findall(r'^ {4}( *)(\w+)/ {2,}\S', text,
                                 re.MULTILINE):
    above[len(indent)] = name
    yield '/'.join(above[k] for k in sorted(above) if k <= len(indent))


def test_the_tree_of_the_readme_is_the_tree():
  top = {path.name for path in ROOT.iterdir()
         if path.is_dir() and path.name in FOLDERS}
  layers = {f'dsjax/{path.parent.name}' for path in
            ROOT.glob('dsjax/*/__init__.py')}
  assert sorted(listed_folders(read('README.md'))) == sorted(top | layers)


def layers(text):
  """(folder, kind) of each row of a table of layers."""
  return re.findall(r'^\| `(?:dsjax/)?(\w+)/` \| (\w+) \|', text, re.MULTILINE)


def test_the_layers_are_told_from_the_lowest():
  known = {folder: kind for folder, (_, kind) in layers_test.FOLDERS.items()}
  told = layers(read('docs/design.md'))
  assert dict(told) == known
  ranks = [layers_test.FOLDERS[folder][0] for folder, _ in told]
  assert ranks == sorted(ranks)
  pure, = re.findall(r'pure folders \(([^)]*)\)', read('CONTRIBUTING.md'))
  assert set(re.findall(r'`(\w+)`', pure)) == {
      folder for folder, kind in known.items() if kind == 'pure'}


# --- commands ---------------------------------------------------------------


def source(module):
  """The file of a module that `python -m` runs, or None."""
  path = ROOT.joinpath(*re.sub(r'^dsjax\.kernels\b', 'kernels', module)
                       .split('.'))
  for file in (path.with_suffix('.py'), path / '__main__.py'):
    if file.is_file():
      return file
  return None


@functools.cache
def flags_of(module):
  """Names of a runner's flags: FLAGS, DEFINE_..., or words of sys.argv."""
  file = source(module)
  text = file.read_text()
  names = {*re.findall(r"DEFINE_\w+\(\s*'(\w+)'", text),
           *re.findall(r"'--(\w+)'", text)}
  if re.search('^FLAGS = {', text, re.MULTILINE):
    main = '.__main__' if file.stem == '__main__' else ''
    names |= set(importlib.import_module(module + main).FLAGS)
  return names


@functools.cache
def all_flags():
  """Names of the flags of every runner."""
  modules = ['.'.join(path.relative_to(ROOT).with_suffix('').parts)
             for path in [*ROOT.glob('experiments/**/*.py'),
                          ROOT / 'kernels' / 'bench.py']]
  return OF_ABSL.union(*(flags_of(module.removesuffix('.__main__'))
                         for module in modules if source(module)))


def fields(config, prefix=''):
  """Dotted names of the fields of a dataclass of dataclasses."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name, None)
    name = f'{prefix}{field.name}'
    yield name
    if dataclasses.is_dataclass(value):
      yield from fields(value, f'{name}.')


@functools.cache
def settings():
  """What --set of some runner may change."""
  return {*fields(Serve()), *fields(dsjax.EngineConfig()),
          *fields(Limits(), 'limits.')}


def wrong_commands(page, text):
  """Commands whose module, target, flag, config or field is not there."""
  targets = set(re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(),
                           re.MULTILINE))
  for line in command_lines(text):
    flag = re.match(r'--(\w+)', line)
    if 'python -m ' in line:
      module, *words = shlex.split(line.split('python -m ', 1)[1],
                                   comments=True)
      yield from _wrong_module(module, words)
    elif flag and flag[1] not in all_flags():
      yield f'no runner has --{flag[1]}'
    elif line.startswith('make '):
      yield from (f'make has no {word}' for word in
                  shlex.split(line, comments=True)[1:]
                  if '=' not in word and word not in targets)


def _wrong_module(module, words):
  if module.split('.')[0] not in FOLDERS:
    return
  if source(module) is None:
    yield f'no module {module}'
    return
  known = flags_of(module) | OF_ABSL
  for word in words:
    if not word.startswith('--'):
      yield f'{module} is given {word}'
      continue
    name, _, value = word[2:].partition('=')
    if name not in known and name.removeprefix('no') not in known:
      yield f'{module} has no --{name}'
    if name == 'config' and not (ROOT / f'configs/{value}.py').exists():
      yield f'configs has no {value}'
    if name == 'set' and value.partition('=')[0] not in settings():
      yield f'no field {value.partition("=")[0]}'


# --- tables -----------------------------------------------------------------


def wide_cells(page, text):
  """Table cells that are too long to read at a glance."""
  for line in text.split('\n'):
    if line.startswith('| '):
      yield from (f'{len(cell)} characters: {cell}' for cell in
                  map(str.strip, line.strip('|').split('|'))
                  if len(cell) > WIDEST_CELL)


CHECKS = (wrong_links, wrong_python, wrong_spans, wrong_paths, wrong_commands,
          wide_cells)


@pytest.mark.parametrize('page', PAGES)
@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
def test_what_a_page_says_is_there(page, check):
  wrong = list(check(page, read(page)))
  assert not wrong, '\n'.join(f'{page}: {line}' for line in wrong)


def test_every_address_of_the_repository_is_that_of_the_project():
  project = tomllib.loads(read('pyproject.toml'))['project']
  for page in (*PAGES, *(path.relative_to(ROOT) for path in
                         ROOT.glob('experiments/colabs/*.ipynb'))):
    for address in re.findall(r'https://github\.com/[\w.-]+/dsjax', read(page)):
      assert address == project['urls']['Repository'], page


def test_the_readme_is_short():
  assert (ROOT / 'README.md').stat().st_size <= README_BYTES


RUN = '''
import json, sys
import dsjax
load, serve = dsjax.load, dsjax.serve
small = dsjax.EngineConfig(max_len=128, max_seqs=4, prefill_tokens=64)
dsjax.load = lambda name: load('tiny')
dsjax.serve = lambda model, placement, config=small, **options: serve(
    model, placement, config, **options)
for page, blocks in json.load(sys.stdin).items():
  names = {}
  for number, block in enumerate(blocks):
    print(page, number, flush=True)
    exec(compile(block, f'{page}, block {number}', 'exec'), names)
'''


@pytest.mark.slow
def test_every_block_runs():
  """On the tiny model and small shapes, a page's blocks after each other."""
  pages = {page: blocks(read(page)) for page in PAGES}
  assert sum(map(len, pages.values())) >= 4
  ended = subprocess.run(
      [sys.executable, '-c', RUN], input=json.dumps(pages), text=True, cwd=ROOT,
      timeout=300, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  assert ended.returncode == 0, ended.stdout[-3000:]


@pytest.mark.parametrize('check, text, says', [
    (wrong_links, '[a](docs/nothing.md)', 'no such file'),
    (wrong_links, '![a](docs/nothing.png)', 'no such file'),
    (wrong_links, '[a](docs/faults.md#nowhere)', 'no such heading'),
    (wrong_links, '# A b, c\n[a](#a-b-d)', 'no such heading'),
    (wrong_python, '```python\nx = (\n```\n', 'never closed'),
    (wrong_python, '```python\nimport dsjax.nothing\n```\n', 'no module'),
    (wrong_python, '```python\nfrom dsjax import nothing\n```\n', 'has no'),
    (wrong_python, '```python\nimport dsjax\ndsjax.serv(1)\n```\n',
     'dsjax has no serv'),
    (wrong_python, '```python\nimport dsjax\n```\n```python\n'
     'x = [dsjax.Plan.nothing]\n```\n', 'Plan has no nothing'),
    (wrong_python, '```python\nserver.genrate(1)\n```\n', 'has no genrate'),
    (wrong_spans, '`dsjax.simulation.nothing`', 'has no nothing'),
    (wrong_spans, '`dsjax.lod(1)`', 'dsjax has no lod'),
    (wrong_spans, '`server.kil(instance)`', 'has no kil'),
    (wrong_spans, '`EngineConfig.trys`', 'has no trys'),
    (wrong_spans, '`nothing_test`', 'no nothing_test.py'),
    (wrong_spans, '`layers_test.test_nothing`', 'has no test_nothing'),
    (wrong_paths, '`dsjax/nothing/`', 'no such file'),
    (wrong_paths, '`tests/goldens/NAME.csv`', 'no such file'),
    (wrong_commands, '    python -m experiments.nothing', 'no module'),
    (wrong_commands, '    python -m experiments.place \\\n      --nothing',
     'has no --nothing'),
    (wrong_commands, '    python -m experiments.serve --config=nothing',
     'configs has no nothing'),
    (wrong_commands, '    python -m experiments.serve --set=engine.pages=1',
     'no field engine.pages'),
    (wrong_commands, '`python -m experiments.serve out`', 'is given out'),
    (wrong_commands, '`--nothing=x`', 'no runner has --nothing'),
    (wrong_commands, '    make nothing  # at all', 'make has no nothing'),
    (wide_cells, f'| a | {"b" * 120} |', '120 characters')])
def test_a_planted_mistake_is_seen(check, text, says):
  wrong = list(check('README.md', text))
  assert len(wrong) == 1 and says in wrong[0], wrong


@pytest.mark.parametrize('check, text', [
    (wrong_links, '# Is it `x`, then?\n[a](#is-it-x-then) [b](https://a.b)'),
    (wrong_python, '```python\nimport jax.numpy as jnp\n'
     'from dsjax import workload\nworkload.arrivals; jnp.ones\n```\n'),
    (wrong_spans, '`dsjax.load(1)` `server.faults` `x.y` `EngineConfig.tries`'),
    (wrong_paths, '`dsjax/config/` `configs/NAME.py` `out/x`'),
    (wrong_commands, '    python -m experiments.place --devices=3  # a\n'
     '    python -m tests.runtime.plans_test --full\n    make test')])
def test_what_is_right_is_let_through(check, text):
  assert not list(check('README.md', text))
