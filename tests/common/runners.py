"""The programs of experiments, as their files start them."""

from experiments.common import cli

ROOT = cli.ROOT / 'experiments'
# {module: how it starts} of every program.
STARTS = {'.'.join(path.relative_to(ROOT).with_suffix('').parts): start
          for path in sorted(ROOT.rglob('*.py'))
          for _, mark, start in [path.read_text().partition(
              "if __name__ == '__main__':")] if mark}
RUNNERS = [name for name, start in STARTS.items() if 'cli.main(' in start]
TASKS = [name for name, start in STARTS.items() if 'child.main(' in start]
